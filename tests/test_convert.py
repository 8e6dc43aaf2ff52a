"""There and back: what PyTorch writes is read here, what is written here is read there, and nothing is lost."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from llm2vec_gen_jax import LLM2VecGen, directory, export
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.formats import hf, published
from llm2vec_gen_jax.loading import load_backbone
from llm2vec_gen_jax.model import Model
from llm2vec_gen_jax.verify import TEXTS, verify

from .conftest import one_device_mesh

PAIRS = [
    {"question": "What is the capital of France?", "answer": "The capital of France is Paris."},
    {"question": "y", "answer": "Ja."},
]
ASKED = {"dtype": "float32", "num_tokens": 10, "num_read": 10, "width": 24, "lora_rank": 0, "source": None}
ASKED |= {"steps": 0, "pairs": PAIRS, "texts": list(TEXTS[:-1])}


def backbone_folder(request, name, folder):
    """Writes the folder of a tiny backbone, or of the real one, that transformers 4 and 5 read; returns it."""
    source = request.getfixturevalue("smollm2") if name == "smollm2" else request.getfixturevalue("tiny")(name)
    export.save_backbone(source, folder)
    return str(folder)


def train_in_pytorch(peer_python, folder, **asked):
    """Lets the published package train and save. Returns (the checkpoint, what it says of it)."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "outputs" / "run" / "checkpoint-2"
    (folder / "request.json").write_text(json.dumps(ASKED | asked | {"checkpoint": str(checkpoint)}))
    script = pathlib.Path(__file__).with_name("peer_train.py")
    command = [peer_python, script, folder / "request.json", folder / "out.npz"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return checkpoint, dict(np.load(folder / "out.npz"))


def load(path, dtype="float32"):
    return LLM2VecGen.from_pretrained(path, dtype=dtype, mesh=one_device_mesh())


def new_model(backbone, lora_rank=0, thoughts=2, width=24):
    """An untrained embedder whose every part does something."""
    model = Model(backbone.architecture, 10, thoughts, width, lora_rank, 2.0 if lora_rank else 0.0)
    trainable = model.init(jax.random.key(1), backbone.frozen)
    if lora_rank:
        grown = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), trainable["lora"])
        trainable["lora"] = grown
    return LLM2VecGen(model, trainable, backbone)


def same_trees(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


# What the published training saves

VARIANTS = {
    "llama3": {},
    "qwen2": {"num_tokens": 20, "num_read": 10},
    "qwen3": {"lora_rank": 4},
    "qwen3-20": {"lora_rank": 2, "num_tokens": 20},
    "smollm2": {"width": 576},
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) if name == "qwen3-20" else name for name in VARIANTS]


@pytest.fixture(scope="module", params=SLOW)
def made_there(request, peer_python, tmp_path_factory):
    """(checkpoint of the published package's training, its own numbers, the request) of each family."""
    folder = tmp_path_factory.mktemp("there")
    backbone = backbone_folder(request, request.param.split("-")[0], folder / "backbone")
    asked = VARIANTS[request.param] | {"backbone": backbone, "steps": 1}
    return *train_in_pytorch(peer_python, folder, **asked), ASKED | asked


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
    for name in directory.HEADS:
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_in_half_precision(request, peer_python, tmp_path, dtype):
    backbone = backbone_folder(request, "qwen3", tmp_path / "backbone")
    checkpoint, theirs = train_in_pytorch(peer_python, tmp_path, backbone=backbone, dtype=dtype)
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
    checkpoint, theirs = train_in_pytorch(peer_python, tmp_path / "there", **more)
    after = load(checkpoint)
    np.testing.assert_allclose(after.encode(ASKED["texts"]), theirs["embeddings"], atol=1e-4, rtol=0)
    for name, array in (("tokens", "tokens"), ("alignment_bias", "alignment")):
        moved = np.asarray(before.trainable[array] if array == "tokens" else before.trainable[array]["bias"])
        assert np.abs(theirs[name] - moved).max() > 1e-4


# What is written here, read by both readers of PyTorch


@pytest.mark.parametrize("reader", ["published", "current"])
@pytest.mark.parametrize(
    "family, rank",
    [
        ("llama3", 0),
        pytest.param("llama", 4, marks=pytest.mark.slow),
        ("qwen2", 0),
        ("qwen3", 4),
        ("smollm2", 0),
    ],
)
def test_what_is_written_here_gives_the_same_vectors_there(request, tmp_path, reader, family, rank):
    python = request.getfixturevalue("peer_python") if reader == "published" else sys.executable
    backbone = backbone_folder(request, family, tmp_path / "backbone")
    new_model(load_backbone(backbone, "float32", one_device_mesh()), rank).save_pretrained(tmp_path / "model")
    report = verify(tmp_path / "model", python)
    assert report.passed, str(report)
    assert len(report.rows) == len(TEXTS) and [row["decoded"] for row in report.rows[:2]] == ["equal", "equal"]
    versions = " ".join(report.reader)
    assert ("llm2vec-gen 0.1.3 transformers 4.56.2 peft 0.18.0" in versions) == (reader == "published")


@pytest.mark.parametrize("family, rank", [("qwen3", 4), ("llama", 0)])
def test_the_merged_encoder_is_a_plain_transformers_model(tiny, tmp_path, family, rank):
    import torch
    from transformers import AutoModel, AutoTokenizer

    ours = new_model(tiny(family), rank)
    before = jax.tree.map(np.array, ours.backbone.frozen)
    ours.save_merged(tmp_path / "merged")
    same_trees(ours.backbone.frozen, before)
    tokenizer, model = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoTokenizer, AutoModel))
    texts = [text + "".join(ours.special_tokens) for text in TEXTS[:6]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state[:, -ours.model.num_tokens :]
        for name in directory.HEADS:
            head = load_file(tmp_path / "merged" / f"{name}_mlp.safetensors")
            weight, bias = (torch.from_numpy(head[f"projection.{key}"]) for key in ("weight", "bias"))
            hidden = torch.nn.functional.linear(hidden, weight, bias)
    np.testing.assert_allclose(hidden.mean(dim=1).numpy(), ours.encode(list(TEXTS[:6])), atol=1e-4, rtol=0)


def test_large_backbones_are_written_in_several_files(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "MAX_FILE_BYTES", 20_000)
    export.save_backbone(tiny("llama"), tmp_path / "many")
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and all(f"-of-{len(files):05}" in name for name in files)
    again = load_backbone(str(tmp_path / "many"), "float32", one_device_mesh())
    same_trees(again.frozen, tiny("llama").frozen)
    assert again.identity == tiny("llama").identity


ONE_OF_TWO = """
import sys
import jax
port, rank, backbone, model, output = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from llm2vec_gen_jax import LLM2VecGen, config, export
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
embedder = LLM2VecGen.from_pretrained(model, "float32", backbone, config.MeshConfig(data=1, fsdp=4, tensor=2))
assert not embedder.backbone.frozen["embedding"].is_fully_addressable
embedder.save_pretrained(f"{output}/model")
embedder.save_merged(f"{output}/merged")
export.save_backbone(embedder.backbone, f"{output}/backbone")
"""


def test_two_processes_write_what_one_does(tiny, tiny_folder, tmp_path):
    """Weights split over two real processes of four devices: gathered one by one, written once, byte for byte."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    one = new_model(tiny("qwen3"), 4)
    one.save_pretrained(tmp_path / "one" / "model")
    again = LLM2VecGen.from_pretrained(tmp_path / "one" / "model", "float32", mesh=one_device_mesh())
    again.save_merged(tmp_path / "one" / "merged")
    export.save_backbone(again.backbone, tmp_path / "one" / "backbone")
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    words = [str(tiny_folder("qwen3")), str(tmp_path / "one" / "model"), str(tmp_path / "two")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(port), str(rank), *words],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    first, second = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert first.keys() == second.keys()
    differing = {str(path) for path in first if first[path] != second[path]}
    # The card names its folder; a merged weight is a sum, which devices may take in another order.
    assert differing <= {"model/README.md", "merged/model.safetensors"}
    merged = [load_file(tmp_path / name / "merged" / "model.safetensors") for name in ("one", "two")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *merged)


# The command


@pytest.fixture(scope="module")
def model_folder(tiny, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "model"
    new_model(tiny("llama")).save_pretrained(folder)
    return folder


def wait(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_verify_prints_a_table_and_fails_on_a_changed_number(launch, model_folder, tmp_path):
    code, out, err = wait(launch(tmp_path, "convert", "verify", str(model_folder)))
    assert (code, out.splitlines()[-1]) == (0, "PASS"), out + err
    assert "transformers" in out and "What is the capital of France?" in out
    ours = load(model_folder)
    # As if one framework's copy of a head had been damaged: in PyTorch's file and in ours, another number.
    record = published.read(model_folder)
    record.alignment["bias"] = record.alignment["bias"] + np.eye(24, dtype=np.float32)[0] * 1e-2
    path = tmp_path / "changed"
    tokenizer = ours.backbone.tokenizer.hf
    config = json.loads((model_folder / "encoder" / "config.json").read_text())
    config["vocab_size"] = ours.backbone.architecture.vocab_size
    published.write(path, record, tokenizer, config, "")
    (path / "alignment_mlp.safetensors").write_bytes((model_folder / "alignment_mlp.safetensors").read_bytes())
    code, out, err = wait(launch(tmp_path, "convert", "verify", str(path)))
    assert code == 2 and "alignment_mlp.safetensors: projection.bias differs" in err
    (path / "alignment_mlp").unlink()  # now only the safetensors copy is left, which PyTorch does not read
    code, out, err = wait(launch(tmp_path, "convert", "verify", str(path)))
    assert code == 2 and "PyTorch" in err and "cannot read it" in err


def test_a_difference_fails(model_folder, tmp_path):
    """Right-padded in PyTorch, as a tokenizer without its padding side would be: the vectors are others."""
    path = tmp_path / "model"
    load(model_folder).save_pretrained(path)
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings["padding_side"] == "left"
    file.write_text(json.dumps(settings | {"padding_side": "right"}))
    report = verify(path, sys.executable)
    assert not report.passed and "FAIL" in str(report) and "<-- differs" in str(report)


def test_verify_without_pytorch_says_so(model_folder, tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    report = verify(model_folder, str(bare))
    assert report.passed and "PyTorch is not installed" in str(report)
    with pytest.raises(InputError, match="python=/nowhere/python: No such file"):
        verify(model_folder, "/nowhere/python")


def test_from_and_to_pytorch(launch, model_folder, tmp_path):
    code, out, err = wait(launch(tmp_path, "convert", "from_pytorch", str(model_folder), "output=here"))
    assert code == 0, err
    same_trees(load(tmp_path / "here").trainable, load(model_folder).trainable)
    words = ("output=there", "backbone_output=llm", "merged=merged", "torch_dtype=bfloat16")
    code, out, err = wait(launch(tmp_path, "convert", "to_pytorch", "here", *words))
    assert code == 0 and "written: merged" in out, err
    run = yaml.safe_load((tmp_path / "there" / "run_config.yml").read_text())
    assert run["torch_dtype"] == "bfloat16" and run["model_name_or_path"] == str(tmp_path / "llm")
    same_trees(load(tmp_path / "there").trainable, load(model_folder).trainable)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    code, _, err = wait(launch(tmp_path, "convert", "to_pytorch", "here", "output=there"))
    assert code == 2 and "output=there: exists already" in err
    code, _, err = wait(launch(tmp_path, "convert", "verfy", "here"))
    assert code == 2 and "did you mean 'verify'" in err
    code, out, _ = wait(launch(tmp_path, "convert", "--help"))
    assert code == 0 and all(f"convert {name} MODEL" in out for name in ("from_pytorch", "to_pytorch", "verify"))


# The hub

LOAD = """
from llm2vec_gen_jax import LLM2VecGen
from tests.conftest import one_device_mesh
print(LLM2VecGen.from_pretrained("someone/embedder", "float32", BACKBONE, one_device_mesh()).encode("x").sum())
"""


def test_a_hub_id_loads_from_the_hubs_cache_and_a_path_never_asks_it(model_folder, tiny_folder, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--embedder"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    blobs.mkdir()
    for number, file in enumerate(path for path in model_folder.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(model_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(file.read_bytes())
        link.symlink_to(blobs / str(number))
    code = LOAD.replace("BACKBONE", repr(str(tiny_folder("llama"))))
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert np.isclose(float(result.stdout), load(model_folder).encode("x").sum(), atol=1e-5)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        load("runs/embeder")


def test_push_to_hub_uploads_what_loads_elsewhere(tiny, tiny_folder, tmp_path, monkeypatch):
    """The hub's own client is replaced by one that keeps what it is given: there is no hub here."""
    import huggingface_hub

    kept = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            pathlib.Path(folder_path).rename(tmp_path / "uploaded")
            kept.append(repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = new_model(tiny("llama"))
    with pytest.raises(InputError, match="which nobody else has"):
        model.push_to_hub("someone/embedder")
    model.backbone.name, name = "someone/llm", model.backbone.name
    try:
        assert model.push_to_hub("someone/embedder") == "https://huggingface.co/someone/embedder"
    finally:
        model.backbone.name = name
    again = LLM2VecGen.from_pretrained(tmp_path / "uploaded", "float32", tiny_folder("llama"), one_device_mesh())
    same_trees(again.trainable, model.trainable)
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert card.count("from_pretrained('someone/embedder')") == 2
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "someone/llm" and front["library_name"] == "llm2vec_gen_jax"


def test_offline_the_hub_says_so(tiny, monkeypatch):
    model = new_model(tiny("llama"))
    monkeypatch.setattr(model.backbone, "name", "someone/llm")
    with pytest.raises(InputError, match="someone/embedder: cannot be uploaded"):
        model.push_to_hub("someone/embedder")
