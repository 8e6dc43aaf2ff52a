"""README.md and docs/ as they run: every command and every example, on small models.

A command of ours runs as it stands, in a folder where MODEL, DIR, queries.jsonl and the like exist, with the words of
SMALL behind it that make it small.
"""

import ast
import gzip
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import pytest

from llm2vec_gen_jax import LLM2VecGen
from tests.conftest import write_jsonl
from tests.helpers.conversion import new_model
from tests.helpers.pages import CANNOT_RUN, CASES, PAGES, ROOT, blocks, commands, split, stand_in
from tests.helpers.processes import free_port
from tests.helpers.tasks import TYPES, write_task

TRAIN = ["backbone.path=tiny", "backbone.dtype=float32", "train.steps=2", "train.batch_size=8", "train.remat=none"]
TRAIN += ["compression.num_tokens=3", "data.max_query_length=40", "data.max_answer_length=24", "kernels.attention=xla"]
STUDY = {"queries": 8, "held_out": 3, "max_new_tokens": 12, "steps": 2, "schedule_steps": 3, "ablation_steps": 2}
STUDY |= {"batch_size": 8, "seeds": 1, "limit": 4, "hyde_limit": 2, "hyde_tokens": 4, "decoded_tokens": 4, "timed": 2}
# What is added to each command, by its name, to make it small.
SMALL = {
    "quickstart": ["backbone.path=talker", "queries=16", "steps=2", "max_new_tokens=8"],
    "synthesize": ["backbone.path=talker", "count=3", "batch_size=4", "max_new_tokens=24"],
    "instruct": ["count=3"],
    "respond": ["backbone.path=tiny", "limit=4", "batch_size=2", "max_new_tokens=4"],
    "train": TRAIN,
    "ablate": [*TRAIN, "teacher.adapters="],
    "train_teacher": [
        *("backbone.path=tiny", "mntp.steps=2", "mntp.batch_size=8", "mntp.max_length=16", "mntp.rank=2"),
        *("simcse.steps=2", "simcse.batch_size=8", "simcse.rank=2", "simcse.max_length=16"),
    ],
    "encode": ["batch_size=2", "max_length=40"],
    "decode": ["max_new_tokens=4"],
    "lens logit": ["max_length=40"],
    "lens build_index": ["contexts=50", "max_length=24", "batch_size=4", "layers="],
    "lens query": ["max_length=40", "layers="],
    "lens generations": ["limit=3", "max_new_tokens=4", "max_length=40"],
    "lens report": ["limit=3", "max_new_tokens=4", "max_length=40"],
    "convert verify": ["max_new_tokens=2"],
    "evaluate": ["limit=4", "max_new_tokens=4", "batch_size=8", "dtype=float32"],
    "reproduce": ["backbone.path=tiny", "teacher.adapters=", *(f"sizes.{key}={n}" for key, n in STUDY.items())],
    "plan": [  # for processors: the compiler for TPUs is no requirement, and test_figures.py has it
        *("architecture=tiny/config.json", "topology=cpu:8", "mesh.data=4", "mesh.fsdp=2", "train.batch_size=8"),
        *("query_length=16", "answer_length=16", "search=false"),
    ],
}
OUTPUTS = ("output", "train.output", "merged", "backbone_output")
# A second or two each; others are slow.
FAST = ("decode", "encode", "instruct", "lens logit", "convert from_pytorch", "respond")


@pytest.fixture(scope="module")
def world(tiny, tiny_folder, model_folder, talker_folder, tmp_path_factory):
    """A folder in which the commands of the pages find what they name."""
    folder = tmp_path_factory.mktemp("world")
    for name, target in {"configs": ROOT / "configs", "tiny": tiny_folder("qwen3"), "talker": talker_folder}.items():
        (folder / name).symlink_to(target)
    for name in ("MODEL", "model-pt", "runs/quickstart/run/model", "runs/demo/model"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model_folder, folder / name)
    new_model(tiny("qwen3"), thoughts=9, count=1).save_merged(folder / "one-token")
    questions = [f"How many {word} are {number}?" for number, word in enumerate("cats dogs rivers teas".split() * 5)]
    rows = [{"id": n, "question": text, "answer": f"About {n * n}, they say."} for n, text in enumerate(questions)]
    write_jsonl(folder / "responses.jsonl", rows)
    write_jsonl(folder / "queries.jsonl", [{"id": row["id"], "question": row["question"]} for row in rows])
    # Parts of the queries of the included embedder.
    shutil.copy(folder / "queries.jsonl", folder / "questions.jsonl")
    write_jsonl(
        folder / "t0.jsonl", [{"question": f"{text} Nobody knows how many of them there are."} for text in questions]
    )
    shutil.copy(folder / "responses.jsonl", folder / "held-out.jsonl")
    for name in ("classify.txt", "topics.txt"):
        (folder / name).write_text("Classify this:\n\n")
    (folder / "queries.jsonl.gz").write_bytes(gzip.compress((folder / "queries.jsonl").read_bytes()))
    (folder / "texts.txt").write_text("\n".join(questions) + "\n")
    (folder / "questions.txt").write_text("\n".join(questions[:3]) + "\n")
    write_jsonl(folder / "texts.jsonl", [{"id": row["id"], "text": row["question"]} for row in rows])
    for name in ("corpus", "notes"):
        (folder / name).mkdir()
    shutil.copy(folder / "texts.jsonl", folder / "corpus" / "a.jsonl")
    (folder / "corpus" / "b.jsonl.gz").write_bytes(gzip.compress((folder / "texts.jsonl").read_bytes()))
    for number, text in enumerate(questions[:5]):
        (folder / "notes" / f"{number}.txt").write_text(text)
    for kind in TYPES:
        write_task(folder / "DIR" / kind, kind)
    write_task(folder / "DIR" / "dev", "sts", "SmallDev")
    for name in ("queries", "corpus"):  # texts that are in no other task
        file = folder / "DIR" / "safety_retrieval" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_jsonl(file, [row | {"text": f"forbidden {row['text'].strip()}"} for row in rows])
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world, for one command."""
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.setenv("LLM2VEC_GEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "world"


def made_by_others(words):
    """Yields the commands that make what a command reads and the world does not hold."""
    if any("soft_prompts=vectors" in word for word in words):
        yield "encode", ["MODEL", "input=texts.jsonl", "output=vectors", "save_soft_prompts=true"]
    if "index=index" in words:
        yield "lens build_index", ["MODEL", "input=corpus/*.jsonl", "output=index"]
    if any("runs/teacher/mntp" in word for word in words):
        yield "train_teacher", ["corpus.path=texts.txt", "train.output=runs/teacher"]


def runnable():
    """Yields the commands of ours that run here, slow ones marked."""
    for line, place in CASES.items():
        name, words = split(shlex.split(line))
        if name is None or "--help" in words or any(part in line for part in CANNOT_RUN):
            continue
        slow = name not in FAST or list(made_by_others(words))
        yield pytest.param(name, words, id=f"{place}: {line}", marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("name, words", list(runnable()))
def test_a_command_runs(name, words, here, command, monkeypatch):
    if name in ("evaluate", "reproduce"):
        pytest.importorskip("mteb", reason="needs requirements-eval.txt")
    monkeypatch.chdir(here)
    more = SMALL.get(name, [])
    if name == "train" and not any(word.startswith("teacher.adapters=runs/") for word in words):
        more = [*more, "teacher.adapters="]  # those of the configs are of other backbones
    if "save_scores=true" in words:
        more = [word for word in more if not word.startswith("limit=")]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("COLUMNS", "80")
    for other, its in made_by_others(words):
        code, _, errors = command(other, *its, *SMALL.get(other, []))
        assert code == 0, errors
    given = stand_in(words, here)
    for word in given:  # the world holds a file of this name for the commands that read it
        key, _, value = word.partition("=")
        if key in OUTPUTS and (here / value).exists():
            shutil.rmtree(value) if (here / value).is_dir() else (here / value).unlink()
    if name == "quickstart":  # its output's default
        shutil.rmtree("runs/quickstart")
    before = {path for path in here.rglob("*")}
    if "input=-" in given:
        monkeypatch.setattr(sys, "stdin", open(here / "texts.txt", encoding="utf-8"))
    code, out, errors = command(name, *given, *more)
    assert code == 0, errors
    assert not [line for line in out.splitlines() if len(line) > 80 and os.sep not in line], "only paths may be longer"
    assert out and (set(here.rglob("*")) - before or not any(word.partition("=")[0] in OUTPUTS for word in given))


def is_slow(page, text):
    """Whether an example is of another page than the README, or is its first one, which test_examples.py runs."""
    return page.name != "README.md" or 'from_pretrained("smollm2-135m")' in text


PYTHON = [
    pytest.param(text, id=f"{page.name}, line {line}", marks=pytest.mark.slow if is_slow(page, text) else ())
    for page in PAGES
    for line, language, text in blocks(page)
    if language == "python"
]
SERVER = "runs with the page of the server"
NEEDS = {"openai": SERVER, "InferenceClient": SERVER, "get_tasks": "downloads from the hub"}
LIBRARIES = ("sentence_transformers", "langchain_core", "llama_index")  # of requirements-integrations.txt


@pytest.mark.parametrize("text", PYTHON)
def test_python_runs(text, here, command, monkeypatch, request):
    """Each example runs by itself; `model` and `texts` are there, and the vectors that a command before it writes."""
    text = text.replace('backbone="Qwen/Qwen3-0.6B"', 'backbone="tiny"')
    tree = ast.parse(text)
    for part, reason in NEEDS.items():
        if part in text:
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("llm2vec_gen_jax"):
                    module = pytest.importorskip(node.module) if node.module.endswith(".mteb") else None
                    assert module is None or all(hasattr(module, alias.name) for alias in node.names)
            pytest.skip(reason)
    if "evaluation.mteb" in text:
        pytest.importorskip("mteb", reason="needs requirements-eval.txt")
    for library in LIBRARIES:
        if f"import {library}" in text or f"from {library}" in text:
            pytest.importorskip(library)
    if 'from_pretrained("smollm2-135m")' in text:  # decodes by the real model: half of the time with optimisations
        request.getfixturevalue("optimized")
        text = text.replace("max_new_tokens=64", "max_new_tokens=8")
        tree = ast.parse(text)
    monkeypatch.chdir(here)
    if "load_embeddings" in text:
        assert command("encode", "MODEL", "input=texts.txt", "output=vectors", *SMALL["encode"])[0] == 0
    if 'save_pretrained("model-pt")' in text:
        shutil.rmtree("model-pt")
    names = {"texts": ["one text", "another"]}
    if "model." in text and "from_pretrained" not in text:
        names["model"] = LLM2VecGen.from_pretrained("MODEL")
    exec(compile(tree, "example", "exec"), names)  # noqa: S102


def environment():
    """Of processes on one device, whose `python` is this one."""
    folder = pathlib.Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/clusters.md"])
def test_two_processes_run(page, here):
    [text] = [text for _, language, text in blocks(ROOT / page) if language == "bash" and "process_id=$i" in text]
    small = " ".join([*TRAIN, "teacher.adapters="])
    text = text.replace("process_id=$i", f"process_id=$i {small}").replace("9876", str(free_port()))
    done = subprocess.run(["bash", "-c", text], cwd=here, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and (here / "runs/two/model/run_config.yml").is_file(), done.stderr
    assert done.stdout.count("model: runs/two/model") == 2


@pytest.mark.slow
def test_the_page_of_the_server_runs(here, monkeypatch):
    """One server, and every request of the page to it; vectors of the tiny model have 12 numbers."""
    pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
    pytest.importorskip("openai", reason="needs requirements-serve.txt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    port = free_port()
    shell = [text for _, language, text in blocks(ROOT / "docs/serving.md") if language == "bash"]
    [plain] = [words for text in shell for words in commands(text) if words[-2:] == ["launch.serve", "MODEL"]]
    server = subprocess.Popen(
        [*plain, f"port={port}", "max_length=40", "batch_size=2"],
        cwd=here,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any(line.startswith("ready to decode: ") for line in server.stdout)
        asked = 0
        for line in [line for text in shell for line in text.splitlines() if line.startswith("curl")]:
            line = line.replace("8000", str(port)).replace('"dimensions": 128', '"dimensions": 8')
            done = subprocess.run(["bash", "-c", f"{line} -s"], capture_output=True, text=True)
            assert done.returncode == 0 and "error" not in json.loads(done.stdout), (line, done.stdout)
            asked += 1
        assert asked >= 3
        for _, language, text in blocks(ROOT / "docs/serving.md"):
            if language == "python":
                names = {}
                exec(compile(text.replace("8000", str(port)), "example", "exec"), names)  # noqa: S102
                assert len(names["vectors"]) == 2 and len(names["vectors"][0]) == 12
    finally:
        server.terminate()
        assert server.wait(60) == 0
