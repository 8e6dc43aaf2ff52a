"""GGUF files: equal to the folder that they were made from, on any mesh; what is unknown in them is refused."""

import json
import struct

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, normalizers

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import gguf_file, published
from llm2vec_gen_jax.formats.gguf import GGUFSource
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.pretrained.backbone import open_checkpoint
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer
from tests.conftest import one_device_mesh, tiny_tokenizer, tiny_torch_model
from tests.helpers.backbones import assert_same_weights, load, mesh_of, save_folder

# Files


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[stem]}.{suffix}"
    return f"{GGUF_NAMES[stem]}.{suffix}"


def rope_factors(rope, head_dim):
    """Llama 3.1's division of each rotary frequency, written as in its reference code."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        ratio = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if ratio > high:
            factors.append(1.0)
        elif ratio < low:
            factors.append(rope["factor"])
        else:
            smooth = (ratio - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_gguf(path, model, kinds=(), metadata=None, merges=(), tokenizer=None, pre="gpt-2", parts=None, types=()):
    """Writes a torch model as llama.cpp's converter does, with the tiny tokenizer or another one of its kind.

    kinds: {part of a name: quantisation type}; the torch model is rounded to what the file holds.
    metadata: a function that adds fields to the open writer. merges: of the tokenizer, which has none.
    pre: tokenizer.ggml.pre, None to leave it out. types: {token's number: its type, where it is another}.
    parts: number of tensors in a file, None for one file.
    """
    import torch

    c, family = model.config, model.config.model_type
    rope = c.rope_parameters
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer = gguf.GGUFWriter(path, family, split_max_tensors=parts or 0)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    if c.num_key_value_heads != c.num_attention_heads:  # the default
        writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(rope, head_dim))
    if metadata:
        metadata(writer)
    tokenizer = tokenizer or tiny_tokenizer()
    tokens, kinds_of_tokens = tokens_of(tokenizer)
    for number, kind in dict(types).items():
        kinds_of_tokens[number] = kind
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds_of_tokens)
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if isinstance(tokenizer.chat_template, dict):
        templates = [{"name": name, "template": text} for name, text in tokenizer.chat_template.items()]
        writer.add_chat_template(templates)
    else:
        writer.add_chat_template(tokenizer.chat_template)
    heads = {"q_proj.weight": c.num_attention_heads, "k_proj.weight": c.num_key_value_heads}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        kind = next((kinds[part] for part in kinds if part in name), None)
        if kind is not None:
            array = gguf.dequantize(gguf.quantize(array, kind), kind)
            with torch.no_grad():
                parameter.copy_(torch.tensor(array))
        count = next((heads[part] for part in heads if part in name), None)
        if count and family == "llama":
            array = array.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        stored = array if kind is None else gguf.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens_of(tokenizer):
    """Returns (tokens, types) as llama.cpp's converter writes them; ids without a token are unused."""
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    tokens, types = [], []
    for number in range(264):
        tokens.append(vocabulary.get(number, f"[PAD{number}]"))
        types.append(kinds[added.get(number)] if number in vocabulary else gguf.TokenType.UNUSED)
    return tokens, types


def llama3_scaling(factor):
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **scaling}}


GGUF_VARIANTS = {
    "llama": ("llama", {}),
    "llama, as many key/value heads": ("llama", {"num_key_value_heads": 4}),
    "llama3.1": ("llama3", llama3_scaling(8.0)),
    "llama3.2": ("llama3", llama3_scaling(32.0)),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("merge", ["a b", "a nothere", "a", "a b c"])
def test_gguf_merges_that_are_not_of_its_tokens_are_named(tmp_path, merge):
    path = write_gguf(tmp_path / "model.gguf", tiny_torch_model("llama"), merges=[merge])
    with pytest.raises(InputError, match=f"merges has '{merge}'"):
        load(path)


@pytest.mark.parametrize("variant", GGUF_VARIANTS)
def test_gguf_equals_folder(variant, tmp_path):
    family, changes = GGUF_VARIANTS[variant]
    model = tiny_torch_model(family, **changes)
    expected = load(save_folder(tmp_path / "folder", model))
    found = load(write_gguf(tmp_path / "model.gguf", model))
    assert_same_weights(found.frozen, expected.frozen)
    assert (found.architecture, found.identity) == (expected.architecture, expected.identity)
    texts = ["Where am I? <|im_end|>", ""]
    assert found.tokenizer.encode(texts, 99) == expected.tokenizer.encode(texts, 99)
    assert found.tokenizer.stop_ids == expected.tokenizer.stop_ids
    assert found.tokenizer.identity == expected.tokenizer.identity


# Tokenizers


def with_tokens(*tokens, special=False):
    """The tiny tokenizer with added tokens, by default such as a text can hold (<think>, ...)."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens], special)
    return tokenizer


def both(tmp_path, tokenizer, **options):
    """Returns the tokenizers of a folder and of the GGUF file made of it."""
    model = tiny_torch_model("qwen3")
    folder = save_folder(tmp_path / "folder", model)
    tokenizer.save_pretrained(folder)
    file = write_gguf(tmp_path / "model.gguf", model, tokenizer=tokenizer, **options)
    return [opened(path).tokenizer for path in (folder, file)]


def opened(path):
    return open_checkpoint(str(path), Execution(one_device_mesh(), "auto"))[0]


TEXTS = ["Hi", "<think>a</think>", "a<think> b", "<tool_call", "[PAD263] [PAD262]", "<|im_end|> <control>", ""]


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", None, "default"])
def test_a_gguf_file_and_its_folder_give_the_same_ids(tmp_path, pre):
    """Added tokens that texts can hold, ids without a token, and files that do not say how texts are split."""
    tokenizer = with_tokens("<think>", "</think>")
    if pre != "gpt-2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    folder, file = both(tmp_path, tokenizer, pre=pre)
    assert file.encode(TEXTS, 99) == folder.encode(TEXTS, 99)
    assert [260, 261] == [id_ for id_ in file.encode(TEXTS, 99)[1] if id_ >= 260]
    assert [file.chat_prompt(text, 99) for text in TEXTS] == [folder.chat_prompt(text, 99) for text in TEXTS]
    assert (file.identity, file.pieces) == (folder.identity, folder.pieces)
    written = []
    for name, one in (("a", folder), ("b", file)):
        (tmp_path / name).mkdir()
        published.write_tokenizer(tmp_path / name, one.hf, ["<question1>"])
        written.append(json.loads((tmp_path / name / "tokenizer.json").read_text())["added_tokens"])
    assert written[0] == written[1]


def test_the_identity_of_a_tokenizer_covers_added_tokens(tmp_path):
    plain, tokens = tiny_tokenizer(), with_tokens("<think>", "</think>")
    special = with_tokens("<think>", "</think>", special=True)
    other = with_tokens("</think>", "<think>")
    identities = {Tokenizer(one).identity for one in (plain, tokens, other)}
    assert len(identities) == 3
    assert Tokenizer(special).identity == Tokenizer(plain).identity  # no text gives their ids


def test_llama_files_that_do_not_say_how_texts_are_split_are_refused(tmp_path):
    for pre in (None, "default", "other"):
        path = write_gguf(tmp_path / "model.gguf", tiny_torch_model("llama"), pre=pre)
        with pytest.raises(InputError, match="tokenizer.ggml.pre.*supported: gpt-2.*gguf-new-metadata"):
            opened(path)


def test_every_type_of_token(tmp_path):
    """Byte and normal tokens are made by splitting and merging; unknown and control ones by no text; unused by none."""
    types = {number: gguf.TokenType[name] for number, name in ((3, "UNKNOWN"), (36, "BYTE"), (37, "UNUSED"))}
    tokenizer = opened(write_gguf(tmp_path / "model.gguf", tiny_torch_model("llama"), types=types)).tokenizer
    assert "<|begin|>" in tokenizer.control and len(tokenizer.encode(["<|begin|>"], 99)[0]) == len("<|begin|>")
    assert tokenizer.encode(["A"], 9) == [[36]] and tokenizer.pieces[36:38] == ["A", ""]
    with pytest.raises(InputError, match="token_type 9 is not supported"):
        opened(write_gguf(tmp_path / "other.gguf", tiny_torch_model("llama"), types={5: 9}))


@pytest.mark.parametrize("bos, eos", [(True, False), (False, True), (True, True), (False, False)])
def test_a_gguf_file_says_what_is_put_around_a_text(tmp_path, bos, eos):
    def metadata(writer):
        writer.add_bos_token_id(3)
        writer.add_add_bos_token(bos)
        writer.add_add_eos_token(eos)

    tokenizer = opened(write_gguf(tmp_path / "model.gguf", tiny_torch_model("llama"), metadata=metadata)).tokenizer
    a = tokenizer.plain.encode("a", add_special_tokens=False).ids
    assert tokenizer.encode(["a"], 9) == [[3] * bos + a + [2] * eos]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (lambda writer: writer.add_add_bos_token(True), "add_bos_token is set, but bos_token_id is missing"),
        (lambda writer: writer.add_bos_token_id(263), "bos_token_id=263 is not the id of a token"),
        (lambda writer: writer.add_add_space_prefix(True), "add_space_prefix=True is not supported"),
    ],
)
def test_tokenizer_flags_that_cannot_be_followed_are_named(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "model.gguf", tiny_torch_model("llama"), metadata=metadata)
    with pytest.raises(InputError, match=message):
        opened(path)


def test_named_chat_templates_of_a_gguf_file(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    folder, file = both(tmp_path, tokenizer)
    assert file.hf.chat_template == folder.hf.chat_template
    assert file.chat_prompt("a", 99) == folder.chat_prompt("a", 99)


# Several files


def test_a_model_in_several_files_is_read_from_the_first(tmp_path):
    model = tiny_torch_model("qwen3")
    expected = load(write_gguf(tmp_path / "whole.gguf", model))
    write_gguf(tmp_path / "model.gguf", model, parts=9)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 4 and parts[0].name == "model-00001-of-00004.gguf"
    found = load(parts[0])
    assert_same_weights(found.frozen, expected.frozen)
    assert found.identity == expected.identity
    with pytest.raises(InputError, match="is part 2 of 4. Pass the first part, .*model-00001-of-00004.gguf.*--merge"):
        load(parts[1])
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[3].read_bytes())
    with pytest.raises(InputError, match="00003-of-00004.gguf: is part 4 of 4, expected 3 of 4"):
        load(parts[0])
    parts[2].write_bytes(third[:100])
    with pytest.raises(InputError, match="00003-of-00004.gguf: not a complete"):
        load(parts[0])
    parts[2].unlink()
    with pytest.raises(InputError, match="part model-00003-of-00004.gguf of 4 parts is missing"):
        load(parts[0])
    with pytest.raises(InputError, match="is part 1 of 4, but its name does not end in.*Rename"):
        load(parts[0].rename(tmp_path / "renamed.gguf"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantised_gguf_on_a_mesh_equals_its_rounded_weights(kind, tmp_path):
    """A shard starts at any head or row of a tensor, also where blocks are packed and rows are permuted."""
    kinds = {part: gguf.GGMLQuantizationType[kind] for part in ("_proj.weight", "embed_tokens")}
    model = tiny_torch_model("llama", intermediate_size=64)
    unrounded = model.model.layers[0].self_attn.q_proj.weight.detach().numpy().copy()
    path = write_gguf(tmp_path / "model.gguf", model, kinds)
    assert not np.array_equal(model.model.layers[0].self_attn.q_proj.weight.detach().numpy(), unrounded)
    expected = load(save_folder(tmp_path / "folder", model)).frozen
    assert_same_weights(load(path).frozen, expected)
    assert_same_weights(load(path, mesh_of(2, 2, 2)).frozen, expected)


def test_unknown_rope_factors_are_refused(tmp_path):
    with pytest.raises(InputError, match="rope_freqs"):
        load(write_gguf(tmp_path / "model.gguf", tiny_torch_model("llama3", **llama3_scaling(16.0))))


@pytest.mark.parametrize(
    "metadata, message",
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope_type 'yarn'"),
        (lambda writer: writer.add_rope_dimension_count(4), "partial_rotary_factor=0.5"),
    ],
)
def test_rotation_that_is_not_implemented_is_refused(metadata, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write_gguf(tmp_path / "model.gguf", tiny_torch_model("llama"), metadata=metadata))


def header(tensors, fields, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


KEY = struct.pack("<Q", 3) + b"a.b"
HUGE = [2**20, 2**31, 2**62, 2**63, 2**64 - 1]


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize(
    "place", ["fields", "tensors", "key", "string", "numbers", "bytes", "strings", "in strings", "arrays", "shape"]
)
def test_a_count_that_the_file_cannot_hold_is_refused_at_once(tmp_path, place, count):
    number = struct.pack("<Q", count)
    content = {
        "fields": header(0, count),
        "tensors": header(count, 0),
        "key": header(0, 1, number + b"a.b" + bytes(12)),
        "string": header(0, 1, KEY + struct.pack("<I", 8) + number),
        "numbers": header(0, 1, KEY + struct.pack("<II", 9, 12) + number + bytes(8)),
        "bytes": header(0, 1, KEY + struct.pack("<II", 9, 0) + number),
        "strings": header(0, 1, KEY + struct.pack("<II", 9, 8) + number + bytes(64)),
        "in strings": header(0, 1, KEY + struct.pack("<IIQ", 9, 8, 1) + number + b"a"),
        "arrays": header(0, 1, KEY + struct.pack("<II", 9, 9) + number + bytes(64)),
        "shape": header(1, 0, KEY + struct.pack("<I", 1) + number + struct.pack("<IQ", 0, 0)),
    }[place]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match="model.gguf: not a complete GGUF file"):
        GGUFSource(tmp_path / "model.gguf")


@pytest.mark.parametrize("kinds", [{}, {"q_proj": gguf.GGMLQuantizationType.Q8_0}])
def test_a_gguf_file_is_what_the_reader_of_llama_cpp_makes_of_it(tmp_path, kinds):
    def metadata(writer):
        writer.add_array("x.words", ["a", "é", ""])
        writer.add_array("x.numbers", [1.5, 2.5])
        writer.add_bool("x.bool", True)
        writer.add_uint64("x.large", 2**63)

    path = write_gguf(tmp_path / "model.gguf", tiny_torch_model("llama3"), kinds, metadata)
    ours, theirs = gguf_file.GGUFFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: field.contents() for key, field in ours.fields.items()} == fields
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.name, one.shape, one.tensor_type) == (other.name, tuple(other.shape), other.tensor_type)
        np.testing.assert_array_equal(one.data, other.data)
