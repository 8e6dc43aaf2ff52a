"""The model card: metadata that the hub's own classes read, and examples that run as they stand."""

import json
import re
import subprocess

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import published
from llm2vec_gen_jax.pretrained import model_card, model_directory
from tests.helpers.conversion import load, new_model
from tests.project.test_packaging import ROOT

SCORES = {
    "STS-B": {"value": 0.7, "type": "STS", "metric": "cosine_spearman", "dataset": "mteb/stsbenchmark-sts"},
    "NFCorpus": 0.25,
}


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """(model directory with scores, its card)."""
    folder = tmp_path_factory.mktemp("card") / "my-model"
    model = new_model(tiny("qwen3"))
    model_directory.save(folder, model.model, model.trainable, model.backbone, {"scores": SCORES})
    return folder, ModelCard.load(folder / "README.md")


def examples(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def test_the_hub_reads_the_metadata(written):
    folder, card = written
    assert card.data.model_name == folder.name and card.data.library_name == "llm2vec_gen_jax"
    sts, retrieval = card.data.eval_results
    assert (sts.task_type, sts.dataset_type, sts.dataset_name) == ("STS", "mteb/stsbenchmark-sts", "STS-B")
    assert (sts.metric_type, sts.metric_value) == ("cosine_spearman", 0.7)
    assert (retrieval.dataset_name, retrieval.metric_type, retrieval.metric_value) == ("NFCorpus", "main_score", 0.25)
    assert "| STS-B | cosine_spearman | 0.700 |" in card.text
    record = published.read(folder)
    record.backbone, record.extra["data"] = "someone/llm", {"responses": "someone/answers", "examples": 3}
    data = ModelCard(model_card.model_card(record, "me/my-model", "apache-2.0")).data
    assert (data.base_model, data.base_model_relation, data.license) == ("someone/llm", "adapter", "apache-2.0")
    text = model_card.model_card(record, "me/my-model", "apache-2.0")
    assert "## Limits\n\n* The vectors encode what the LLM would answer, with its errors" in text
    license = text.partition("## License")[2]
    assert "apache-2.0" in license and "someone/llm" in license
    assert data.datasets == ["someone/answers"] and data.model_name == "my-model"
    for bad in ("0.7", None, True, {"metric": "accuracy"}):
        record.extra["scores"] = {"NFCorpus": bad}
        with pytest.raises(InputError, match="scores of the model card: NFCorpus: expected a number"):
            model_card.model_card(record, "me/my-model")


def test_the_citation_is_that_of_the_project():
    [paper] = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    fields = dict(re.findall(r"(\w+) = {(.*?)}", model_card.CITATION, re.DOTALL))
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert re.split(r"\s+and\s+", fields["author"]) == authors
    assert (fields["title"], fields["year"], fields["url"]) == (paper["title"], str(paper["year"]), paper["url"])


def test_the_examples_give_the_same_vectors(written):
    pytest.importorskip("sentence_transformers")
    folder, card = written
    jax_example, _, torch_example = examples(card)
    found = []
    for example in (jax_example, torch_example):
        names = {}
        exec(compile(example, "example", "exec"), names)  # noqa: S102
        found.append(names["vectors"])
    assert len(names["vectors"]) == 1
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5 * np.abs(found[0]).max())


@pytest.mark.slow
def test_the_examples_of_an_included_model_agree(command, optimized, peer_python, monkeypatch, tmp_path):
    """As they stand: the conversion, then both frameworks. PyTorch has the backbone in bfloat16."""
    pytest.importorskip("sentence_transformers")
    card = ModelCard.load(model_directory.local_folder("smollm2-135m") / "README.md")
    monkeypatch.chdir(tmp_path)
    [line] = re.findall(r"```bash\npython -m launch\.(convert \w+) (.*?)  #", card.text)
    code, _, errors = command(line[0], *line[1].split())
    assert code == 0, errors
    in_jax, published_example, in_torch = examples(card)
    found = [vectors_of_peer(published_example, peer_python)]
    for example in (in_jax, in_torch):
        names = {}
        exec(compile(example, "example", "exec"), names)  # noqa: S102
        found.append(names["vectors"])
    for vectors in found[1:]:
        cosine = (vectors * found[0]).sum() / np.linalg.norm(vectors) / np.linalg.norm(found[0])
        assert vectors.shape == (1, 576) and cosine > 0.999


def vectors_of_peer(example, python):
    code = f"{example}\nimport json; print(json.dumps(vectors.tolist()))"
    ended = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return np.array(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_the_example_of_the_published_package_gives_the_same_vectors(written, peer_python):
    folder, card = written
    expected = load(folder).encode(["What is the capital of France?"])
    np.testing.assert_allclose(vectors_of_peer(examples(card)[1], peer_python), expected, atol=1e-4, rtol=0)


def test_the_cards_of_included_models_are_generated():
    for name in model_directory.MODELS:
        folder = model_directory.local_folder(name)
        license = ModelCard.load(folder / "README.md").data.license
        assert (folder / "README.md").read_text() == model_card.model_card(published.read(folder), name, license)
