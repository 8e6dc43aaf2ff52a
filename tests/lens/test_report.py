"""The report page: its numbers, that texts stay texts, and how it looks to a browser."""

import html
import importlib.util
import pathlib
import re
import shutil

import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen, config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference import postprocess
from llm2vec_gen_jax.lens import chart, index, report, search
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.teachers.encoder import Teacher
from llm2vec_gen_jax.teachers.hyde import Hyde
from tests.conftest import check_error, write_jsonl

TEXTS = ["What is this?", "<script>document.title = 'no'</script><b>&amp;</b>", "", "é🙂 " * 40, "What is this?"]
SETTINGS = config.ReportConfig(top_k=2, nearest=2, max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tiny):
    """An embedder whose vectors have the teacher's width, as it is before training."""
    import jax

    backbone = tiny("qwen3")
    method = LLM2VecGenModel(backbone.architecture, 4, 0, backbone.architecture.hidden_size)
    trainable = method.init(jax.random.key(0), backbone.frozen)
    return LLM2VecGen(method, sharding.put_replicated(trainable, backbone.mesh), backbone)


@pytest.fixture(scope="module")
def index_folder(model_folder, tmp_path_factory):
    """An index of the same backbone."""
    folder = tmp_path_factory.mktemp("index")
    corpus = write_jsonl(folder / "corpus.jsonl", [{"text": f"Number {n} & <i>more</i> words."} for n in range(20)])
    settings = {"contexts": 50, "layers": ["1", "3"], "dtype": "float32"}
    index.build_index(
        model_folder, config.BuildIndexConfig(input=str(corpus), output=str(folder / "index"), **settings)
    )
    return folder / "index"


@pytest.fixture(scope="module")
def values(model, index_folder):
    """What the page shows."""
    return report.gather(model, TEXTS, SETTINGS, search.Index(index_folder, model.backbone))


@pytest.fixture(scope="module")
def page(values, tmp_path_factory):
    """The page as a file."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.render(values | {"name": "a <model>"}), encoding="utf-8")
    return path


# Numbers


def test_the_page_shows_what_the_parts_give(model, values):
    embeddings, soft_prompts = model.encode(TEXTS, return_soft_prompts=True)
    reader = Teacher(model.backbone, model.backbone.frozen, True)
    answers = Hyde(model.backbone, reader, 12).answers(TEXTS)
    rows = values["texts"]
    assert [row["decoded"] for row in rows] == model.decode(soft_prompts, max_new_tokens=12)
    assert [row["answer"] for row in rows] == answers
    assert [row["words"]["hidden"] for row in rows] == model.logit_lens(TEXTS, top_k=2, words=True)
    assert [[layer["number"] for layer in row["layers"]] for row in rows] == [[1, 3]] * len(TEXTS)
    assert rows[0]["nearest"][0] == {"row": 4, "cosine": pytest.approx(1, abs=1e-5)}
    output = values["panels"]["output-centric"]
    own = (postprocess.l2_normalize(embeddings) * postprocess.l2_normalize(reader.encode(answers))).sum(axis=1)
    assert output.cosine == pytest.approx(own.mean(), abs=1e-5)


def test_without_a_comparable_teacher_there_is_no_map_and_the_page_says_why(embedder):
    values = report.gather(embedder, TEXTS[:2], SETTINGS)
    text = html.unescape(report.render(values | {"name": "x"}))
    assert "There is no map: the teacher's vectors have 32 dimensions, the model's 12." in text
    assert "figure>" not in text


def test_principal_components_are_those_of_the_covariance():
    points = np.random.default_rng(0).normal(size=(30, 5)) * [5, 1, 3, 1, 1]
    plane = chart.project(points)
    values = np.linalg.eigvalsh(np.cov(points.T))[::-1][:2]
    np.testing.assert_allclose(np.cov(plane.T), np.diag(values), atol=1e-9)
    np.testing.assert_allclose(chart.project(points[:, ::-1]), plane, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_every_point_is_inside_the_picture(count):
    random = np.random.default_rng(count)
    panel = chart.panel(random.normal(size=(count, 8)), random.normal(size=(count, 8)))
    places = np.array([*panel.queries, *panel.responses])
    assert len(places) == 2 * count and np.isfinite(places).all()
    assert (places >= 0).all() and (places <= [chart.WIDTH, chart.HEIGHT]).all()
    same = chart.panel(np.eye(8)[:count], np.eye(8)[:count]) if count <= 8 else None
    assert same is None or (same.first, same.cosine) == (count, pytest.approx(1))


@pytest.mark.skipif(importlib.util.find_spec("umap") is not None, reason="umap is installed")
def test_umap_must_be_installed():
    with pytest.raises(InputError, match="pip install umap-learn"):
        chart.project(np.eye(4), "umap")


# The file


def test_texts_stay_texts_and_nothing_is_loaded(page):
    source = page.read_text(encoding="utf-8")
    assert "<script" not in source and "&lt;script&gt;document.title" in source and "&lt;i&gt;more" in source
    assert not re.search(r"\b(src|href)=\"(?!#)|url\(|@import|\bon\w+=\"", source)
    assert "<title>What 5 embeddings encode</title>" in source


def test_the_command_writes_the_page_or_nothing(command, model_folder, index_folder, tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    words = [model_folder, f"input={texts}", "output=report.html", "max_new_tokens=4", "dtype=float32", "limit=2"]
    code, out, errors = command("lens report", *words, f"index={index_folder}")
    assert (code, "written: report.html (2 texts)" in out) == (0, True), errors
    source = pathlib.Path("report.html").read_text(encoding="utf-8")
    assert 'id="text-2"' in source and 'id="text-3"' not in source and "Latent lens: nearest contexts" in source
    check_error(command("lens report", *words), "report.html: already exists")
    check_error(command("lens report", *words[:2]), "output is required")
    check_error(
        command("lens report", *words[:2], "output=other.html", "index=nowhere"), "index=nowhere", "build_index"
    )
    assert [path.name for path in pathlib.Path().iterdir()] == ["report.html"]


# A browser

_CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const rgb = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data]
  }
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0)
  let least = 99, seen = 0
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walker.nextNode()) {
    const owner = walker.currentNode.parentElement
    if (!walker.currentNode.data.trim() || owner.tagName === 'title') continue
    let behind = owner
    while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement
    const style = getComputedStyle(owner)
    const colors = [style[owner.tagName === 'text' ? 'fill' : 'color'], getComputedStyle(behind).backgroundColor]
    const [a, b] = colors.map(rgb).map(light)
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05))
    seen += 1
  }
  return [least, seen]
}"""


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: Playwright's own, or one that is on the PATH."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    installed = next((found for name in names if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as runner:
        own = pathlib.Path(runner.chromium.executable_path)
        if not own.exists() and installed is None:
            pytest.skip("no browser: run `playwright install chromium`, or put a chromium on the PATH")
        path = str(own) if own.exists() else installed
        opened = runner.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_a_complaint(browser, page, values, scheme, width):
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert (said, asked) == ([], [page.as_uri()])
    assert tab.title() == "What 5 embeddings encode", "a text was run"
    assert TEXTS[1] in tab.inner_text("#text-2") and tab.locator("article").count() == len(TEXTS)
    assert tab.locator("svg[role=img]").count() == 2 and tab.locator("svg[role=img] circle").count() == 2 * len(TEXTS)
    assert tab.locator("#text-1 ol.strip").first.locator("> li").count() == 4
    tab.locator("summary").last.click()
    assert tab.locator("details[open]").last.is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "scrolls sideways"
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    least, seen = tab.evaluate(_CONTRAST)
    assert seen > 50 and least >= 4.5, "WCAG AA"
    tab.close()
