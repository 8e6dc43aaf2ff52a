"""There and back: what PyTorch writes is read here, what is written here is read there, and nothing is lost."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.formats import published
from llm2vec_gen_jax.integrations.verify import TEXTS, verify
from llm2vec_gen_jax.pretrained import export, model_directory
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from tests.conftest import one_device_mesh
from tests.helpers.conversion import load, new_model, same_trees

PAIRS = [
    {"question": "What is the capital of France?", "answer": "The capital of France is Paris."},
    {"question": "y", "answer": "Ja."},
]
ASKED = {"dtype": "float32", "num_tokens": 10, "num_read": 10, "width": 24, "lora_rank": 0, "source": None}
ASKED |= {"steps": 0, "pairs": PAIRS, "texts": list(TEXTS[:-1])}


def backbone_folder(request, name, folder):
    """Writes the folder of a tiny backbone, or of the real one, that transformers 4 and 5 read; returns it."""
    if name == "smollm2":  # on an empty text its vector turns on the rounding of the first token's large states
        request.getfixturevalue("optimized")
        source = request.getfixturevalue("smollm2")
    else:
        source = request.getfixturevalue("tiny")(name)
    export.save_backbone(source, folder)
    return str(folder)


def train_in_pytorch(peer_python, runs):
    """Lets one process of the published package train and save. runs: {folder: what is asked}.

    Returns [(checkpoint, what the package says of it)].
    """
    files, checkpoints = [], []
    for folder, asked in runs.items():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.append(folder / "outputs" / "run" / "checkpoint-2")
        request = ASKED | asked | {"checkpoint": str(checkpoints[-1])}
        (folder / "request.json").write_text(json.dumps(request))
        files += [folder / "request.json", folder / "out.npz"]
    script = pathlib.Path(__file__).with_name("peer_train.py")
    result = subprocess.run([peer_python, script, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [(checkpoint, dict(np.load(numbers))) for checkpoint, numbers in zip(checkpoints, files[1::2])]


# What the published training saves

VARIANTS = {
    "llama3": {},
    "qwen2": {"num_tokens": 20, "num_read": 10},
    "qwen3": {"lora_rank": 4},
    "qwen3-20": {"lora_rank": 2, "num_tokens": 20},
    "smollm2": {"width": 576},
}


@pytest.fixture(scope="module")
def trained(peer_python, tiny, smollm2, tmp_path_factory):
    """{variant: (checkpoint of the published package's training, its own numbers, the request)}."""
    runs = {}
    for name, variant in VARIANTS.items():
        folder = tmp_path_factory.mktemp("there")
        export.save_backbone(smollm2 if name == "smollm2" else tiny(name.split("-")[0]), folder / "backbone")
        runs[folder] = ASKED | variant | {"backbone": str(folder / "backbone"), "steps": 1}
    return {
        name: (*made, asked) for name, made, asked in zip(VARIANTS, train_in_pytorch(peer_python, runs), runs.values())
    }


@pytest.fixture(scope="module", params=VARIANTS)
def made_there(request, trained):
    """(checkpoint of the published package's training, its own numbers, the request) of each family."""
    if request.param == "smollm2":
        request.getfixturevalue("optimized")
    return trained[request.param]


def test_what_the_published_training_saves_gives_the_same_vectors_here(made_there):
    checkpoint, theirs, asked = made_there
    ours = load(checkpoint)
    embeddings, soft_prompts = ours.encode(ASKED["texts"], return_soft_prompts=True)
    np.testing.assert_allclose(embeddings, theirs["embeddings"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(soft_prompts, theirs["soft_prompts"], atol=1e-4, rtol=0)
    assert ours.model.num_tokens == asked["num_read"] and ours.model.lora_rank == asked["lora_rank"]


def test_every_number_of_it_arrives_and_leaves_unchanged(made_there, tmp_path):
    checkpoint, theirs, _ = made_there
    first = load(checkpoint)
    np.testing.assert_array_equal(first.trainable["tokens"], theirs["tokens"])
    for name in model_directory.HEADS:
        np.testing.assert_array_equal(first.trainable[name]["kernel"].T, theirs[f"{name}_weight"])
        np.testing.assert_array_equal(first.trainable[name]["bias"], theirs[f"{name}_bias"])
    first.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    same_trees(again.trainable, first.trainable)
    assert again.model == first.model and again.special_tokens == first.special_tokens
    if "lora" in first.trainable:  # the same tensors in the same file, but for those that are the backbone's own
        before, after = published.read(checkpoint), published.read(tmp_path / "again")
        assert before.lora["tensors"].keys() == after.lora["tensors"].keys()
        for key, value in before.lora["tensors"].items():
            np.testing.assert_array_equal(after.lora["tensors"][key], value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_in_half_precision(request, peer_python, tmp_path, dtype):
    backbone = backbone_folder(request, "qwen3", tmp_path / "backbone")
    [(checkpoint, theirs)] = train_in_pytorch(peer_python, {tmp_path: {"backbone": backbone, "dtype": dtype}})
    ours = load(checkpoint)
    np.testing.assert_array_equal(ours.trainable["tokens"], theirs["tokens"])
    np.testing.assert_array_equal(ours.trainable["alignment"]["kernel"].T, theirs["alignment_weight"])
    cosines = [ours.similarity(a, b)[0, 0] for a, b in zip(ours.encode(ASKED["texts"]), theirs["embeddings"])]
    assert min(cosines) > 0.999
    report = verify(checkpoint, peer_python)  # both in that dtype, within its limits
    assert report.passed and report.dtype == dtype, str(report)


def test_trained_on_in_pytorch_and_back(request, peer_python, tmp_path):
    backbone = backbone_folder(request, "llama3", tmp_path / "backbone")
    before = new_model(load_backbone(backbone, "float32", one_device_mesh()), thoughts=0)
    before.save_pretrained(tmp_path / "model")
    more = {"backbone": backbone, "source": str(tmp_path / "model"), "steps": 2}
    [(checkpoint, theirs)] = train_in_pytorch(peer_python, {tmp_path / "there": more})
    after = load(checkpoint)
    np.testing.assert_allclose(after.encode(ASKED["texts"]), theirs["embeddings"], atol=1e-4, rtol=0)
    for name, array in (("tokens", "tokens"), ("alignment_bias", "alignment")):
        moved = np.asarray(before.trainable[array] if array == "tokens" else before.trainable[array]["bias"])
        assert np.abs(theirs[name] - moved).max() > 1e-4


# What is written here, read by both readers of PyTorch


@pytest.mark.parametrize("reader", ["published", pytest.param("current", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family, rank",
    [
        pytest.param("llama3", 0, marks=pytest.mark.slow),
        pytest.param("llama", 4, marks=pytest.mark.slow),
        ("qwen2", 0),
        ("qwen3", 4),
        ("smollm2", 0),
        pytest.param("smollm2", 8, marks=pytest.mark.slow),
    ],
)
def test_what_is_written_here_gives_the_same_vectors_there(request, tmp_path, reader, family, rank):
    python = request.getfixturevalue("peer_python") if reader == "published" else sys.executable
    backbone = backbone_folder(request, family, tmp_path / "backbone")
    if family == "smollm2":  # those of the package
        name = "smollm2-135m-lora" if rank else "smollm2-135m"
        mine = LLM2VecGen.from_pretrained(name, "float32", mesh=one_device_mesh())
        mine.save_pretrained(tmp_path / "model", backbone=backbone)
    else:
        new_model(load_backbone(backbone, "float32", one_device_mesh()), rank).save_pretrained(tmp_path / "model")
    report = verify(tmp_path / "model", python)
    assert report.passed, str(report)
    assert len(report.rows) == len(TEXTS) and [row["decoded"] for row in report.rows[:2]] == ["equal", "equal"]
    versions = " ".join(report.reader)
    assert ("llm2vec-gen 0.1.3 transformers 4.56.2 peft 0.18.0" in versions) == (reader == "published")
