"""Commands as a user runs them: help, one-line errors, resumed and sharded jobs, encode and decode; and `encode`."""

import json
import os
import pathlib
import shutil
import signal
import time

import hypothesis
import jax
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from llm2vec_gen_jax import LLM2VecGen, config, directory, files, heads, load_embeddings, options
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.loading import load_backbone
from llm2vec_gen_jax.model import Model
from llm2vec_gen_jax.respond import respond
from llm2vec_gen_jax.synthesize import synthesize

from .conftest import check_error, one_device_mesh, tiny_tokenizer, tiny_torch_model, write_jsonl

ROOT = pathlib.Path(__file__).parent.parent
FILES = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__", "start", "convert", "lens"}
ACTIONS = {"convert": ("from_pytorch", "to_pytorch", "verify")}
ACTIONS |= {"lens": ("logit", "build_index", "query", "generations", "report")}
COMMANDS = sorted(FILES | {f"{name} {action}" for name, actions in ACTIONS.items() for action in actions})
K, THOUGHTS, E = 3, 1, 12
TEXTS = ["", "one", "a longer text with words", "é🙂 <|im_end|> <question1>", "x" * 90, "one"]


def schema_of(command):
    """The config dataclass whose docstring describes `python -m launch.COMMAND`."""
    schemas = [value for name, value in vars(config).items() if name.endswith("Config")]
    return next(value for value in schemas if f"launch.{command} " in value.__doc__.replace("`", " ").split(":")[0])


@pytest.fixture(scope="session")
def talker_folder(tmp_path_factory):
    """A tiny random LLM that ends a turn about every twentieth token: dimension 0 is a constant that says so."""
    folder = tmp_path_factory.mktemp("talker")
    model = tiny_torch_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        model.model.norm.weight[0] = 1
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[2, 0] = 1.5
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def talker(talker_folder):
    """That LLM on one device."""
    return load_backbone(str(talker_folder), "float32", one_device_mesh())


@pytest.fixture(scope="session")
def model(talker):
    """An embedder on it, as it is before training."""
    method = Model(talker.architecture, K, THOUGHTS, E)
    trainable = heads.init_trainable(method.compressor, jax.random.key(0), talker.frozen["embedding"])
    return LLM2VecGen(method, trainable, talker, prompts={"query": "Find:", "other": ""})


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory):
    """Its model directory."""
    folder = tmp_path_factory.mktemp("embedder") / "model"
    directory.save(folder, model.model, model.trainable, model.backbone, {})
    return folder


# Help and errors


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_command_does_and_lists_every_key(command, name):
    code, out, _ = command(name, "--help")
    schema = schema_of(name)
    about = schema.__doc__.splitlines()[0].split("`: ", 1)[1]
    assert code == 0
    assert f"usage: python -m launch.{name} " in out and about[1:] in out
    assert options.help_text(schema) in out
    assert command(name, "-h", "nonsense=1")[:2] == (0, out)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_key_is_named_with_the_nearest(command, name):
    key = options.help_text(schema_of(name)).split("=")[0].strip()
    model = ["MODEL"] if "MODEL" in schema_of(name).__doc__ else []
    check_error(command(name, *model, f"{key}x=1"), f"unknown key {key}x", f"did you mean {key!r}")
    expected = "more: no such config file" if name == "ablate" else "expected one"
    check_error(command(name, *model, "more", "words"), expected)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "words, expected",
    [
        (["train"], ["data.responses is needed", "data.responses="]),
        (["train", "data.responses=r.jsonl"], ["train.output is needed"]),
        (["train", "data.responses=none.jsonl", "train.output=run"], ["data.responses=none.jsonl: no such file"]),
        (["train", "none.yaml"], ["none.yaml: no such config file"]),
        (["train", "train.steps=x"], ["train.steps", "'x'"]),
        (["ablate", "train.output=runs"], ["which configs"]),
        (["respond", "output=a.jsonl"], ["input is needed"]),
        (["respond", "input=none.jsonl", "output=a.jsonl"], ["none.jsonl: no such file"]),
        (["respond", "input=none.jsonl", "output=a.txt"], ["a.txt", ".jsonl"]),
        (["respond", "input=none.jsonl", "output=a.jsonl", "shard.index=2", "shard.count=2"], ["shard.index=2"]),
        (["synthesize"], ["output is needed"]),
        (["synthesize", "output=a.jsonl", "backbone.path=none"], ["none: no such file or folder"]),
        (["encode"], ["which model"]),
        (["encode", "nowhere", "output=a"], ["input is needed"]),
        (["encode", "nowhere", "input=none.txt", "output=a"], ["none.txt: no such file"]),
        (["decode", "nowhere"], ["text=, input= and soft_prompts="]),
        (["decode", "nowhere", "text=a", "input=b"], ["text and input"]),
        (["decode", "nowhere", "soft_prompts=none.npy"], ["none.npy"]),
        (["decode", "nowhere", "text=a"], ["nowhere"]),
    ],
)
def test_a_missing_input_is_named(command, words, expected):
    check_error(command(*words), *expected)
    assert set(os.listdir()) <= {"run"}


def broken(source, folder, how):
    """A copy of a backbone's folder with one thing wrong. Returns what the message must name."""
    shutil.copytree(source, folder)
    file, settings = folder / "config.json", json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "family":
        file.write_text(json.dumps(settings | {"model_type": "mamba"}))
        return file, "model_type 'mamba' is not supported"
    if how == "field":
        file.write_text(json.dumps({key: value for key, value in settings.items() if key != "intermediate_size"}))
        return file, "intermediate_size is missing"
    if how == "no config":
        file.unlink()
        return file, "no such file"
    if how == "half config":
        file.write_text(file.read_text()[:50])
        return file, "not valid JSON"
    if how == "table":
        file.write_text(json.dumps(settings | {"vocab_size": 100}))
        return folder, "the tokenizer has id 259", "only 100 rows"
    if how == "shape":
        file.write_text(json.dumps(settings | {"intermediate_size": 40}))
        return folder, "has shape", "the config says"
    if how == "layers":
        file.write_text(json.dumps(settings | {"num_hidden_layers": 4}))
        return folder, "weights are missing, the first is model.layers.3."
    if how == "activation":
        file.write_text(json.dumps(settings | {"hidden_act": "gelu"}))
        return file, "hidden_act='gelu' is not supported"
    if how == "index":
        weights.unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder / "model-00001-of-00002.safetensors", "no such file"
    if how == "outside":
        weights.rename(folder.parent / "elsewhere.safetensors")
        index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder / "model.safetensors.index.json", "outside its folder"
    if how == "no weights":
        weights.unlink()
        return folder, "no model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return weights, "damaged or truncated"
    if how == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        return weights, "damaged or truncated"
    if how == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
        return folder, "no readable tokenizer"
    raise ValueError(how)


HOWS = (
    "family,field,no config,half config,table,shape,layers,activation,index,outside,no weights,truncated,pointer,"
    "tokenizer"
)


@pytest.mark.parametrize("how", HOWS.split(","))
def test_a_broken_backbone_is_named(command, talker_folder, tmp_path, how):
    expected = broken(talker_folder, tmp_path / "backbone", how)
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"question": "a"}])
    words = [f"backbone.path={tmp_path / 'backbone'}", f"input={queries}", "output=answers.jsonl"]
    check_error(command("respond", *words), *expected)
    assert os.listdir() == []


def test_a_broken_input_is_named(command, model_folder, talker_folder, tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"question": "a"}\n{"qestion": "b"}\n')
    words = [f"backbone.path={talker_folder}", "output=answers.jsonl"]
    result = command("respond", f"input={tmp_path / 'queries.jsonl'}", *words)
    check_error(result, "queries.jsonl, line 2", "'question'", "'qestion'")
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"question": "a", "id": 1}, {"question": "b", "id": 1}])
    check_error(command("respond", f"input={twice}", *words), "twice.jsonl: the ids are not unique")
    lists = write_jsonl(tmp_path / "lists.jsonl", [{"question": "a", "id": [1]}])
    check_error(command("respond", f"input={lists}", *words), "lists.jsonl, line 1", "'id'")
    np.save("prompts.npy", np.zeros((2, K, 5), np.float32))
    check_error(command("decode", model_folder, "soft_prompts=prompts.npy"), f"(n, {K}, 32)", "(2, 3, 5)")
    np.save("words.npy", np.full((2, K, 32), "a"))
    check_error(command("decode", model_folder, "soft_prompts=words.npy"), "must be numbers", "<U1")
    for name, content in (("empty.npy", b""), ("text.npy", b"text")):
        pathlib.Path(name).write_bytes(content)
        check_error(command("decode", model_folder, f"soft_prompts={name}"), f"soft_prompts={name}")


def test_an_existing_output_is_named_and_left_as_it_is(command, model_folder, talker_folder, tmp_path):
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"question": "a"}])
    mine = pathlib.Path("mine.jsonl")
    mine.write_text("mine")
    pathlib.Path("folder").mkdir()
    (pathlib.Path("folder") / "mine").write_text("mine")
    backbone = f"backbone.path={talker_folder}"
    check_error(command("respond", backbone, f"input={queries}", "output=mine.jsonl"), "mine.jsonl: exists")
    check_error(command("synthesize", backbone, "output=mine.jsonl"), "mine.jsonl: exists")
    check_error(command("encode", model_folder, f"input={queries}", "output=folder"), "output=folder: exists")
    words = ["data.responses=none.jsonl", "train.output=folder", "train.overwrite=true"]
    check_error(command("train", *words), "train.output=folder: exists and is not a run directory")
    assert sorted(os.listdir()) == ["folder", "mine.jsonl"] and os.listdir("folder") == ["mine"]
    assert mine.read_text() == "mine"


def test_a_loss_that_is_not_finite_is_a_failure_with_one_line(command, talker_folder, tmp_path):
    rows = [{"question": f"q{number}", "answer": "a"} for number in range(8)]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    np.save(tmp_path / "targets.npy", np.full((8, 2), 3e38, np.float32))
    words = [f"backbone.path={talker_folder}", f"data.responses={tmp_path / 'responses.jsonl'}"]
    words += ["teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}", "train.output=run", "train.batch_size=8"]
    code, _, errors = command("train", *words)
    assert code == 1 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: step 1: the loss is inf")


def test_a_real_process_says_the_same(talker_folder, tmp_path, launch):
    expected = broken(talker_folder, tmp_path / "backbone", "truncated")
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"question": "a"}])
    words = [f"backbone.path={tmp_path / 'backbone'}", f"input={queries}", "output=answers.jsonl"]
    bad, good = launch(tmp_path, "respond", *words), launch(tmp_path, "respond", "--help")
    out, errors = bad.communicate(timeout=60)
    check_error((bad.returncode, out, errors), *expected)
    assert errors.count("\n") == 1
    out, errors = good.communicate(timeout=60)
    assert (good.returncode, errors) == (0, "") and options.help_text(config.RespondConfig) in out


# Responses and queries


def rows_of(path):
    return [row for _, row in files.read_jsonl(path)]


def test_a_killed_respond_started_again_loses_and_repeats_nothing(talker_folder, tmp_path, launch):
    queries = [{"question": f"What is {number * 7919 % 997}? " * (number % 4 + 1)} for number in range(240)]
    write_jsonl(tmp_path / "queries.jsonl", queries)
    words = [f"backbone.path={talker_folder}", "input=queries.jsonl", "batch_size=2", "max_new_tokens=12"]
    undisturbed = launch(tmp_path, "respond", *words, "output=undisturbed.jsonl")
    killed = launch(tmp_path, "respond", *words, "output=killed.jsonl")
    path = tmp_path / "killed.jsonl"
    while not path.exists() or path.stat().st_size < 1000:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = path.read_bytes()
    assert 0 < before.count(b"\n") < len(queries)
    path.write_bytes(before[:-3])  # as if the last write had been torn
    again = launch(tmp_path, "respond", *words, "output=killed.jsonl")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert undisturbed.communicate(timeout=120) and undisturbed.returncode == 0
    assert path.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    rows = rows_of(path)
    assert sorted(row["id"] for row in rows) == list(range(len(queries)))
    assert all(row["question"] == queries[row["id"]]["question"] for row in rows)
    assert {row["finish"] for row in rows} == {"stop", "length"}
    assert path.read_bytes().startswith(before[:-3])


def respond_settings(tmp_path, **more):
    return config.RespondConfig(
        input=str(tmp_path / "queries.jsonl"), batch_size=4, max_new_tokens=12, **({"output": "a.jsonl"} | more)
    )


def test_shards_together_are_the_whole(talker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "queries.jsonl", [{"question": f"q {'x' * (n % 5)}", "id": f"id{n}"} for n in range(14)])
    for temperature in (0.0, 1.0):
        more = {"temperature": temperature, "overwrite": True}
        whole = rows_of(respond(respond_settings(tmp_path, **more), talker))
        parts = []
        for index in range(3):
            settings = respond_settings(tmp_path, shard=config.ShardConfig(index, 3), **more)
            path = respond(settings, talker)
            assert path.name == f"a.0000{index}-of-00003.jsonl"
            parts += rows_of(path)
        assert sorted(parts, key=lambda row: row["id"]) == sorted(whole, key=lambda row: row["id"])
        assert len(whole) == 14


def test_a_finished_respond_writes_nothing_and_other_settings_are_refused(talker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "queries.jsonl", [{"question": f"q{n}"} for n in range(6)])
    path = respond(respond_settings(tmp_path), talker)
    before = path.read_bytes()
    assert respond(respond_settings(tmp_path), talker) == path and path.read_bytes() == before
    with pytest.raises(InputError, match="a.jsonl: holds another run .sampling"):
        respond(respond_settings(tmp_path, temperature=0.5), talker)
    write_jsonl(tmp_path / "queries.jsonl", [{"question": f"q{n}"} for n in range(7)])
    with pytest.raises(InputError, match="a.jsonl: holds another run .input"):
        respond(respond_settings(tmp_path), talker)
    assert path.read_bytes() == before
    limited = rows_of(respond(respond_settings(tmp_path, limit=6, output="b.jsonl"), talker))
    assert limited == rows_of(path)


def test_synthesize_resumes_to_the_same_bytes_wherever_it_is_cut(talker, tmp_path):
    settings = config.SynthesizeConfig(output=str(tmp_path / "q.jsonl"), count=14, batch_size=4, max_new_tokens=40)
    path = synthesize(settings, talker)
    whole, rows = path.read_bytes(), rows_of(path)
    assert len(rows) == 14 and len({row["question"] for row in rows}) == 14
    assert [row["id"] for row in rows] == sorted({row["id"] for row in rows})
    assert rows[-1]["id"] > 14, "some samples were left out: else this test shows little"
    for cut in (0, 5, len(whole) // 3, whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert synthesize(settings, talker).read_bytes() == whole
    # More of them are the same ones and some more.
    more = synthesize(config.SynthesizeConfig(**vars(settings) | {"count": 17}), talker).read_bytes()
    assert more.startswith(whole) and more.count(b"\n") == 17
    with pytest.raises(InputError, match="q.jsonl: holds another run .seed: 0 -> 1"):
        synthesize(config.SynthesizeConfig(**vars(settings) | {"seed": 1}), talker)


def test_synthesize_gives_up_on_what_writes_no_queries(talker, tmp_path):
    settings = config.SynthesizeConfig(output=str(tmp_path / "q.jsonl"), count=2, batch_size=1, max_new_tokens=2)
    with pytest.raises(InputError, match="no new query"):  # too short, all of them
        synthesize(settings, talker)
    with pytest.raises(InputError, match="temperature"):
        synthesize(config.SynthesizeConfig(output=str(tmp_path / "z.jsonl"), temperature=0.0), talker)


def test_quickstart_goes_from_nothing_to_a_model_and_resumes(command, talker_folder):
    words = [f"backbone.path={talker_folder}", "output=quick", "queries=16", "steps=4", "max_new_tokens=16"]
    code, out, errors = command("quickstart", *words)
    assert code == 0, errors
    assert {"queries.jsonl", "responses.jsonl", "run"} <= set(os.listdir("quick"))
    assert len(rows_of("quick/queries.jsonl")) == len(rows_of("quick/responses.jsonl")) == 16
    for part in ("own answer nearest:", "decoded:", "next: python -m launch.encode quick/run/model"):
        assert part in out
    assert LLM2VecGen.from_pretrained("quick/run/model").encode(["a", "b"]).shape == (2, 32)
    before = files.sha256_file("quick/run/model/alignment_mlp")
    code, out, errors = command("quickstart", *words)
    assert code == 0 and "already finished" in out, errors
    assert files.sha256_file("quick/run/model/alignment_mlp") == before


# Encode and decode


def test_encode_and_decode(command, model_folder, tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", [{"body": text} for text in TEXTS])
    words = [f"input={tmp_path / 'texts.jsonl'}", "field=body", "output=out", "batch_size=4"]
    code, out, errors = command("encode", model_folder, *words, "save_soft_prompts=true")
    assert (code, "written: out (6 x 12)" in out) == (0, True), errors
    assert sorted(os.listdir("out")) == ["embeddings-00000.npy", "manifest.json", "soft_prompts-00000.npy"]
    embeddings, prompts = load_embeddings("out", verify=True), np.load("out/soft_prompts-00000.npy")
    loaded = LLM2VecGen.from_pretrained(model_folder)
    expected, expected_prompts = loaded.encode(TEXTS, return_soft_prompts=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(prompts, expected_prompts, atol=1e-5)
    manifest = json.loads(pathlib.Path("out/manifest.json").read_text())
    assert (manifest["rows"], manifest["dimension"]) == embeddings.shape == (6, E)
    assert list(manifest["input"]["sha256"].values()) == [files.sha256_file(tmp_path / "texts.jsonl")]

    common = [model_folder, "max_new_tokens=9"]
    from_text = ["decode", *common, f"input={tmp_path / 'texts.jsonl'}", "field=body", "output=a.jsonl"]
    assert command(*from_text)[0] == 0
    assert command("decode", *common, "soft_prompts=out/soft_prompts-00000.npy", "output=b.jsonl")[0] == 0
    rows = rows_of("a.jsonl")
    assert [row["text"] for row in rows] == TEXTS
    assert [row["decoded"] for row in rows] == [row["decoded"] for row in rows_of("b.jsonl")]
    assert len({row["decoded"] for row in rows}) > 1
    code, out, _ = command("decode", *common, f"text={TEXTS[2]}")
    assert (code, json.loads(out)) == (0, rows[2])
    assert rows[2]["decoded"] == loaded.decode(expected_prompts, max_new_tokens=9)[2]


def test_encode_leaves_nothing_behind_after_an_error(command, model_folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    write_jsonl(tmp_path / "good.jsonl", [{"text": "a"}])
    for file, expected in (("texts.jsonl", "line 2: 'text'"), ("latin.txt", "line 1: not UTF-8")):
        check_error(command("encode", model_folder, f"input={tmp_path / file}", "output=out"), f"{file}, {expected}")
    words = [f"input={tmp_path / 'good.jsonl'}", "output=out"]
    check_error(command("encode", tmp_path / "nowhere", *words), "nowhere")
    check_error(command("encode", model_folder, *words, "max_length=4"), "max_length")
    check_error(command("encode", model_folder, *words, "field=txt"), "'txt'", "'text'")
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    (copy / "alignment_mlp").write_bytes(b"torn")
    check_error(command("encode", copy, *words), "alignment_mlp")
    assert os.listdir() == []
    (tmp_path / "file").touch()
    code, _, errors = command("encode", model_folder, words[0], f"output={tmp_path / 'file/out'}")
    assert (code, errors) == (1, f"error: {tmp_path / 'file'}: File exists\n")


# LLM2VecGen.encode, by the conventions of sentence-transformers


def test_one_string_gives_one_vector_and_a_list_keeps_its_order(model):
    embeddings = model.encode(TEXTS, batch_size=4)
    assert embeddings.shape == (6, E) and embeddings.dtype == np.float32 and isinstance(embeddings, np.ndarray)
    assert model.get_embedding_dimension() == E
    for text, expected in zip(TEXTS, embeddings):
        one = model.encode(text)
        assert one.shape == (E,)
        np.testing.assert_allclose(one, expected, atol=1e-5)
    order = [3, 1, 5, 0, 2, 4]
    np.testing.assert_allclose(model.encode([TEXTS[n] for n in order]), embeddings[order], atol=1e-5)
    np.testing.assert_allclose(embeddings[1], embeddings[5], atol=1e-5)
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3
    np.testing.assert_allclose(model.encode(np.array(TEXTS)), embeddings, atol=1e-5)
    np.testing.assert_allclose(model.encode(text for text in TEXTS), embeddings, atol=1e-5)


@hypothesis.given(st.lists(st.sampled_from([*TEXTS, "What is the capital of Peru?", "long " * 50]), max_size=4))
@hypothesis.settings(max_examples=15)
def test_a_text_has_the_same_vector_in_any_batch(model, others):
    text = "What is the capital of France?"
    expected = model.encode(text)
    for texts, row in (([text, *others], 0), ([*others, text], -1)):
        for batch_size in (1, 4):
            np.testing.assert_allclose(model.encode(texts, batch_size=batch_size)[row], expected, atol=1e-5)


def test_an_empty_list_gives_an_empty_array(model):
    for keywords, width in (({}, E), ({"truncate_dim": 5}, 5), ({"normalize_embeddings": True}, E)):
        found = model.encode([], **keywords)
        assert (found.shape, found.dtype) == ((0, width), np.float32)
    embeddings, prompts = model.encode([], return_soft_prompts=True)
    assert (embeddings.shape, prompts.shape) == ((0, E), (0, K, 32))
    assert model.decode(prompts) == []
    assert model.encode([], precision="int8").shape == (0, E)
    assert model.encode([], precision="binary").shape == (0, 2)


def test_truncation_comes_before_normalisation(model):
    plain = model.encode(TEXTS)
    found = model.encode(TEXTS, truncate_dim=5, normalize_embeddings=True)
    expected = plain[:, :5] / np.linalg.norm(plain[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(model.encode(TEXTS, truncate_dim=5), plain[:, :5])
    np.testing.assert_allclose(np.linalg.norm(model.encode("a", normalize_embeddings=True)), 1, atol=1e-6)
    for wrong in (0, E + 1, -1):
        with pytest.raises(InputError, match=f"truncate_dim.*{wrong}"):
            model.encode(TEXTS, truncate_dim=wrong)


def test_precisions(model):
    plain = model.encode(TEXTS)
    int8 = model.encode(TEXTS, precision="int8")
    assert (int8.shape, int8.dtype) == ((6, E), np.int8)
    low, high = plain.min(axis=0), plain.max(axis=0)
    np.testing.assert_allclose(
        (int8.astype(float) + 128) / 255 * (high - low) + low, plain, atol=(high - low).max() / 255
    )
    assert (int8.min(axis=0) == -128).all() and (int8.max(axis=0) >= 126).all()  # rounding of 255 steps
    binary = model.encode(TEXTS, precision="binary")
    assert (binary.shape, binary.dtype) == ((6, 2), np.int8)  # 12 signs in 2 bytes
    bits = np.unpackbits((binary.astype(np.int16) + 128).astype(np.uint8), axis=1)[:, :E]
    np.testing.assert_array_equal(bits, plain > 0)
    assert model.encode("a", precision="binary").shape == (2,)
    np.testing.assert_array_equal(model.encode(TEXTS, precision="uint8"), int8.astype(np.int16) + 128)
    np.testing.assert_array_equal(model.encode(TEXTS, precision="ubinary"), np.packbits(plain > 0, axis=-1))
    with pytest.raises(InputError, match="precision 'int9'.*'int8'"):
        model.encode(TEXTS, precision="int9")
    with pytest.raises(InputError, match="'int8' needs more than one text"):
        model.encode("a", precision="int8")


def test_prompts_are_joined_with_one_space(model):
    expected = model.encode("Find: me")
    np.testing.assert_allclose(model.encode("me", prompt="Find:"), expected, atol=1e-6)
    np.testing.assert_allclose(model.encode("me", prompt_name="query"), expected, atol=1e-6)
    np.testing.assert_allclose(model.encode(["me"], prompt_name="query")[0], expected, atol=1e-6)
    np.testing.assert_allclose(model.encode_query("me"), expected, atol=1e-6)
    plain = model.encode("me")
    for found in (
        model.encode("me", prompt=""),
        model.encode("me", prompt_name="other"),
        model.encode_document("me"),
        model.encode_query("me", prompt=""),
        model.encode_query("me", prompt_name="other"),
    ):
        np.testing.assert_allclose(found, plain, atol=1e-6)
    assert np.abs(plain - expected).max() > 1e-3
    with pytest.raises(InputError, match="prompt_name 'qurey' is unknown.*'query'"):
        model.encode("me", prompt_name="qurey")


def test_lengths_soft_prompts_and_arrays(model):
    long = "abcdefgh" * 10
    room = 20 - K - THOUGHTS  # a token per byte
    np.testing.assert_allclose(model.encode(long, max_length=20), model.encode(long[:room]), atol=1e-5)
    assert np.abs(model.encode(long, max_length=20) - model.encode(long)).max() > 1e-3
    for wrong in (K + THOUGHTS, 1, 0):
        with pytest.raises(InputError, match="max_length must exceed the 4 appended tokens"):
            model.encode(long, max_length=wrong)
    embedding, prompts = model.encode("a", return_soft_prompts=True)
    assert (embedding.shape, prompts.shape) == ((E,), (K, 32))
    embeddings, many = model.encode(["b", "a"], return_soft_prompts=True)
    np.testing.assert_allclose(many[1], prompts, atol=1e-5)
    assert model.decode(prompts, max_new_tokens=6) == model.decode(many, max_new_tokens=6)[1]
    array = model.encode(["b", "a"], convert_to_numpy=False)
    assert isinstance(array, jax.Array)
    np.testing.assert_allclose(array, embeddings, atol=1e-5)


def test_what_encode_does_not_know_is_an_error(model):
    for name in ("convert_to_tensor", "normalize", "device"):
        with pytest.raises(TypeError, match=name):
            model.encode("a", **{name: True})
    for texts, expected in ((["a", None], "input 1.*NoneType"), ([b"a"], "input 0.*bytes"), ([["a"]], "input 0.*list")):
        with pytest.raises(InputError, match=expected):
            model.encode(texts)
    with pytest.raises(InputError, match="input 1.*surrogate"):
        model.encode(["a", "b\ud800"])
    with pytest.raises(InputError, match="batch_size must be positive, found 0"):
        model.encode("a", batch_size=0)


def test_similarity_is_the_cosine(model):
    embeddings = model.encode(TEXTS)
    found = model.similarity(embeddings, embeddings[:2] * 7)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit @ unit[:2].T, atol=1e-6)
    assert model.similarity(embeddings[0], embeddings).shape == (1, 6)
    assert np.isfinite(model.similarity(np.zeros((1, E)), embeddings)).all()
