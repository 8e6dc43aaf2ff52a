"""The published model directory and its torch files: round trips, and everything that must be refused."""

import dataclasses
import json
import os

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
import yaml
from hypothesis import strategies as st

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import published, torchzip

WIDTH, EMBEDDING, TOKENS = 8, 6, ["<thought1>", "<question1>", "<question2>"]
LORA_KEY = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
DELTA_KEY = "base_model.model.embed_tokens.trainable_tokens_delta"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "rope_theta": 5e5,
}
DTYPES = [np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)]


def tiny_tokenizer():
    """A byte-level BPE without merges: one token per byte, and an end-of-text token but no pad token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def random_model(dtype="float32", lora=False):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return published.PublishedModel(
        backbone="some/backbone",
        dtype=dtype,
        special_tokens=TOKENS,
        num_tokens=2,
        tokens_MD=normal(len(TOKENS), WIDTH),
        reconstruction={"kernel": normal(WIDTH, WIDTH), "bias": normal(WIDTH)},
        alignment={"kernel": normal(WIDTH, EMBEDDING), "bias": normal(EMBEDDING)},
        lora={"config": {"r": 4, "lora_alpha": 8}, "tensors": {LORA_KEY: normal(4, WIDTH)}} if lora else None,
        extra={"teacher": "some/teacher"},
    )


@pytest.fixture
def directory(tmp_path):
    """A written model directory."""
    published.write(tmp_path / "model", random_model(), tiny_tokenizer(), CONFIG, "# card\n")
    return tmp_path / "model"


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_head(path, shape=(EMBEDDING, WIDTH), value=1.0, **config):
    tensors = {
        "projection.weight": np.full(shape, value, np.float32),
        "projection.bias": np.ones(shape[0], "f4"),
    }
    torchzip.write(path, tensors, {"size": 1, "pooling_mode": "linear"} | config)
    path.with_suffix(".safetensors").unlink(missing_ok=True)


# The directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora", [False, True])
def test_read_returns_what_write_was_given(tmp_path, dtype, lora):
    model = random_model(dtype, lora)
    published.write(tmp_path / "new" / "model", model, tiny_tokenizer(), CONFIG, "# card\n")
    found = published.read(tmp_path / "new" / "model")
    for field in ("backbone", "dtype", "special_tokens", "num_tokens", "extra"):
        assert getattr(found, field) == getattr(model, field)
    np.testing.assert_array_equal(found.tokens_MD, model.tokens_MD)
    for name in published.HEADS:
        for key, value in getattr(model, name).items():
            np.testing.assert_array_equal(getattr(found, name)[key], value)
            assert getattr(found, name)[key].dtype == np.float32
    assert (found.lora is not None) == lora
    if lora:
        assert found.lora["config"]["r"] == 4
        np.testing.assert_array_equal(found.lora["tensors"][LORA_KEY], model.lora["tensors"][LORA_KEY])
    assert os.listdir(tmp_path / "new") == ["model"]


def test_torch_files_hold_the_heads_in_the_dtype_of_the_backbone(tmp_path):
    model = random_model("bfloat16")
    published.write(tmp_path / "model", model, tiny_tokenizer(), CONFIG, "")
    tensors, config = torchzip.read(tmp_path / "model" / "alignment_mlp")
    assert config["dtype"] == "torch.bfloat16"
    assert (config["input_dim"], config["output_dim"]) == (WIDTH, EMBEDDING)
    expected = model.alignment["kernel"].T.astype(ml_dtypes.bfloat16)
    assert tensors["projection.weight"].tobytes() == expected.tobytes()


def test_tokenizer_files(directory):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert (config["padding_side"], config["pad_token"]) == ("left", "<eos>")
    assert (config["tokenizer_class"], config["additional_special_tokens"]) == (
        "PreTrainedTokenizerFast",
        TOKENS,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = json.loads((directory / published.ADAPTER_CONFIG).read_text())["token_indices"]
    assert tokenizer.convert_tokens_to_ids(TOKENS) == ids == [257, 258, 259]
    plain = tiny_tokenizer()("a b")["input_ids"]
    assert tokenizer(["a b", "a b" + TOKENS[0]], padding=True)["input_ids"] == [[0, *plain], [*plain, 257]]
    assert transformers.AutoConfig.from_pretrained(directory / "encoder").rope_parameters["rope_theta"] == 5e5


def test_write_does_not_change_the_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    before = tokenizer.backend_tokenizer.to_str(), len(tokenizer), tokenizer.pad_token, tokenizer.padding_side
    published.write(tmp_path / "model", random_model(), tokenizer, CONFIG, "")
    after = tokenizer.backend_tokenizer.to_str(), len(tokenizer), tokenizer.pad_token, tokenizer.padding_side
    assert before == after


def test_rows_follow_the_special_tokens_whatever_the_order_of_ids(directory):
    edit_json(directory / published.ADAPTER_CONFIG, token_indices=[259, 257, 258])
    model = random_model()
    np.testing.assert_array_equal(published.read(directory).tokens_MD, model.tokens_MD[[1, 2, 0]])
    edit_json(directory / published.ADAPTER_CONFIG, token_indices=[259, 257, 256])
    with pytest.raises(InputError, match="adapter_config.json.*256.*tokenizer.json"):
        published.read(directory)


def test_adapter_keys(directory):
    path = directory / published.ADAPTER_WEIGHTS
    rows = random_model().tokens_MD
    embedding = "base_model.model.embed_tokens.base_layer.weight"
    safetensors.numpy.save_file({DELTA_KEY: rows.astype(np.float16), embedding: np.zeros((9, WIDTH))}, path)
    assert published.read(directory).tokens_MD.dtype == np.float32
    safetensors.numpy.save_file({DELTA_KEY: rows, LORA_KEY: rows}, path)
    with pytest.raises(InputError, match="adapter_model.safetensors.*lora_A"):
        published.read(directory)
    safetensors.numpy.save_file({DELTA_KEY: rows[:2]}, path)
    with pytest.raises(InputError, match=r"adapter_model.safetensors.*\(2, 8\), expected \(3, 8\)"):
        published.read(directory)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="adapter_model.safetensors"):
        published.read(directory)


RUN_CONFIG = """
model_name_or_path: first/backbone
token: None
special_tokens: ['<thought1>', '<question1>', '<question2>']
torch_dtype: bfloat16
encoding_mode: last_1_tokens
lr_scheduler_type: !!python/object/apply:transformers.trainer_utils.SchedulerType [linear]
debug: !!python/object/apply:os.system ["touch MARKER"]

model_name_or_path: last/backbone
"""


@pytest.mark.parametrize("name", ["2026_11_28", "1e5", "on", "0123", "2026-11-28"])
def test_names_that_look_like_numbers_come_back(tmp_path, name):
    model = random_model()
    model = dataclasses.replace(model, backbone=name, special_tokens=[name, *model.special_tokens[1:]])
    published.write(tmp_path / "model", model, tiny_tokenizer(), CONFIG, "")
    found = published.read(tmp_path / "model")
    assert (found.backbone, found.special_tokens) == (name, model.special_tokens)
    run = yaml.safe_load((tmp_path / "model" / "run_config.yml").read_text())
    assert (run["model_name_or_path"], run["special_tokens"]) == (name, model.special_tokens)


def test_run_config_as_the_published_training_writes_it(directory, tmp_path):
    marker = tmp_path / "marker"
    (directory / "run_config.yml").unlink()
    (directory / "encoder_decoder_config.json").unlink()
    run_path = tmp_path / "run_config.yml"
    run_path.write_text(RUN_CONFIG.replace("MARKER", str(marker)))
    found = published.read(directory)
    assert (found.backbone, found.dtype, found.num_tokens) == ("last/backbone", "bfloat16", 1)
    assert not marker.exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(RUN_CONFIG)
    run_path.write_text(RUN_CONFIG + "model_name_or_path: None\n")
    with pytest.raises(InputError, match="run_config.yml: model_name_or_path"):
        published.read(directory)
    run_path.write_text("a: b: c\n")
    with pytest.raises(InputError, match="run_config.yml.*line 1"):
        published.read(directory)
    run_path.unlink()
    with pytest.raises(InputError, match="run_config.yml"):
        published.read(directory)


def test_heads_that_cannot_be_used(directory):
    path = directory / "alignment_mlp"
    write_head(path, (EMBEDDING, WIDTH + 1))
    with pytest.raises(InputError, match=r"alignment_mlp: projection.weight.*\(6, 9\), expected \(6, 8\)"):
        published.read(directory)
    for field, value in (("size", 3), ("pooling_mode", "mean_linear")):
        write_head(path, **{field: value})
        with pytest.raises(InputError, match=f"alignment_mlp: {field}"):
            published.read(directory)
    write_head(path, value=np.nan)
    with pytest.raises(InputError, match="alignment_mlp: projection.weight contains NaN"):
        published.read(directory)
    path.unlink()
    with pytest.raises(InputError, match="alignment_mlp: no such file"):
        published.read(directory)


def test_stale_copy_of_a_head_is_refused(directory):
    tensors, config = torchzip.read(directory / "alignment_mlp")
    torchzip.write(directory / "alignment_mlp", {key: value + 1 for key, value in tensors.items()}, config)
    with pytest.raises(InputError, match="alignment_mlp.safetensors: projection.* differs"):
        published.read(directory)
    (directory / "alignment_mlp.safetensors").unlink()
    expected = random_model().alignment["bias"] + 1
    np.testing.assert_array_equal(published.read(directory).alignment["bias"], expected)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("encoder_decoder_config.json", {"save_decoder": True}, "save_decoder"),
        ("encoder_decoder_config.json", {"encoding_mode": "mean"}, "encoding_mode is 'mean'"),
        ("encoder_decoder_config.json", {"encoding_mode": "last_4_tokens"}, "last 4 of 3"),
        (published.ADAPTER_CONFIG, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (published.ADAPTER_CONFIG, {"token_indices": None}, "token_indices is None"),
        ("tokenizer.json", {"added_tokens": []}, "<thought1>"),
        ("llm2vec_gen_jax.json", {"format_version": 99}, "format_version is 99"),
    ],
)
def test_unsupported_values_name_file_and_key(directory, file, values, message):
    edit_json(directory / file, **values)
    with pytest.raises(InputError, match=f"{file}.*{message}"):
        published.read(directory)


def test_paths_out_of_the_directory_are_refused(directory, tmp_path):
    outside = tmp_path / "outside"
    (directory / "reconstruction_mlp").rename(outside)
    (directory / "reconstruction_mlp").symlink_to(outside)
    with pytest.raises(InputError, match="reconstruction_mlp: points outside the directory"):
        published.read(directory)


def test_snapshots_of_the_hugging_face_cache_are_read(directory, tmp_path):
    snapshot, blobs = tmp_path / "cache/snapshots/abc", tmp_path / "cache/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in directory.rglob("*") if path.is_file()):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert published.read(snapshot).backbone == "some/backbone"


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(UnicodeEncodeError):
        published.write(tmp_path / "model", random_model(), tiny_tokenizer(), CONFIG, "a card \ud800")
    assert os.listdir(tmp_path) == []

    def interrupted(path, tensors, config):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torchzip, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        published.write(tmp_path / "model", random_model(), tiny_tokenizer(), CONFIG, "")
    assert os.listdir(tmp_path) == []


def test_write_refuses_what_does_not_fit(directory, tmp_path):
    model, tokenizer = random_model(), tiny_tokenizer()
    with pytest.raises(InputError, match="already exists"):
        published.write(directory, model, tokenizer, CONFIG, "")
    for change, message in (
        ({"num_tokens": 4}, "last 4 of 3"),
        ({"dtype": "int8"}, "torch_dtype"),
        ({"special_tokens": ["<a>", "<a>", "<b>"]}, "special_tokens"),
        ({"tokens_MD": model.tokens_MD[:2]}, "trainable_tokens_delta"),
        ({"tokens_MD": model.tokens_MD * np.nan}, "NaN"),
        (
            {"dtype": "float16", "alignment": {**model.alignment, "bias": np.full(EMBEDDING, 1e6)}},
            "too large",
        ),
    ):
        with pytest.raises(InputError, match=message), np.errstate(over="ignore"):
            published.write(tmp_path / "x", dataclasses.replace(model, **change), tokenizer, CONFIG, "")
    with pytest.raises(InputError, match="hidden_size"):
        published.write(tmp_path / "x", model, tokenizer, CONFIG | {"hidden_size": 9}, "")
    assert os.listdir(tmp_path) == ["model"]


# Anything at all as run_config.yml

NAMES = ("model_name_or_path", "torch_dtype", "special_tokens", "encoding_mode", "learning_rate")
VALUES = st.text("abc_/.1 ", min_size=1, max_size=12) | st.sampled_from(["None", "null", "True", "3e-4", "float32"])
LINES = st.lists(st.tuples(st.sampled_from(NAMES[:2] + NAMES[3:]), VALUES), min_size=1, max_size=12)


@hypothesis.given(lines=LINES, tokens=st.lists(st.sampled_from(["<question1>", "<question2>", "a b"]), min_size=1))
def test_the_last_of_repeated_keys_holds_and_none_is_null(tmp_path_factory, lines, tokens):
    """Written as the published training writes it: `key: value`, the value as Python prints it."""
    path = tmp_path_factory.mktemp("run") / "run_config.yml"
    lines = [(key, value.strip() or "x") for key, value in lines]
    path.write_text("".join(f"{key}: {value}\n" for key, value in [*lines, ("special_tokens", tokens)]))
    last = dict(lines)
    if any(last.get(key, "None") in ("None", "null") for key in NAMES[:2]):
        with pytest.raises(InputError, match="missing or null"):
            published._read_run_config(path)
    else:
        assert published._read_run_config(path) == last | {"special_tokens": tokens}


@hypothesis.given(
    st.text(max_size=200)
    | st.binary(max_size=200)
    | st.sampled_from([b"!!python/object/apply:os.system [x]", b"&a [*a]"])
)
def test_any_bytes_as_run_config_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("run") / "run_config.yml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        found = published._read_run_config(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(found["special_tokens"], list)
