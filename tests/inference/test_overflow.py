"""Half precision: a text whose states exceed float16 is named, and those beside it get what they get alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.data import records
from llm2vec_gen_jax.data.examples import tokenize
from llm2vec_gen_jax.inference import generate, postprocess
from llm2vec_gen_jax.inference.generate import Sampling
from llm2vec_gen_jax.lens.logit import logit_lens
from llm2vec_gen_jax.lens.states import compression_states
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.serving.engine import Engine
from llm2vec_gen_jax.teachers.encoder import Teacher
from llm2vec_gen_jax.teachers.hyde import Hyde
from llm2vec_gen_jax.training import ridge
from llm2vec_gen_jax.training.train import CompressionTrainer
from llm2vec_gen_jax.training.validation import Validation
from tests.conftest import check_error, one_device_mesh, tiny_tokenizer, tiny_torch_model, write_jsonl
from tests.helpers.adapters import settings_of
from tests.helpers.backbones import save_overflowing_backbone
from tests.helpers.commands import rows_of, train
from tests.helpers.embedders import embedder_on
from tests.helpers.tasks import needs_mteb, write_task

GOOD = ["one", "a longer text with words", "x" * 90, "", "four " * 30]
TEXTS = [*GOOD[:2], "too ~ much", *GOOD[2:]]
BAD = 2
NAMED = r"2.*too ~ much.*float16.*bfloat16 or float32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_overflowing_backbone(tmp_path_factory.mktemp("overflow") / "backbone")


@pytest.fixture(scope="module")
def half(folder):
    return load_backbone(str(folder), "float16", one_device_mesh())


def embedder_of(backbone):
    """An embedder whose own tokens do not exceed float16."""
    embedder = embedder_on(backbone)
    embedder.trainable = embedder.trainable | {"tokens": embedder.trainable["tokens"].at[:, 1].set(0)}
    return embedder


@pytest.fixture(scope="module")
def model(half):
    return embedder_of(half)


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("overflow") / "model"
    model_directory.save(path, model.model, model.trainable, model.backbone, {}, "float16")
    return path


# Vectors


def test_the_text_is_named_and_its_neighbors_are_unharmed(model):
    for options in ({}, {"precision": "int8"}, {"precision": "binary"}, {"return_soft_prompts": True}):
        with pytest.raises(InputError, match=f"input {NAMED}"):
            model.encode(TEXTS, **options)
    expected, prompts = model.encode(GOOD, return_soft_prompts=True)
    assert np.isfinite(expected).all()
    refused = []
    windows = [("w", model.tokenize(TEXTS))]
    bar = type("Bar", (), {"format_dict": {}, "update": print, "set_postfix_str": lambda *_, **__: None})()
    bar.format_dict = {"elapsed": 1.0}
    [(_, found, soft)] = model.encode_windows(windows, 4, True, bar, lambda *text: refused.append(text))
    assert refused == [("w", BAD)] and not np.isfinite(found[BAD]).all()
    np.testing.assert_allclose(np.delete(found, BAD, axis=0), expected, atol=2e-2)
    np.testing.assert_allclose(np.delete(soft, BAD, axis=0), prompts, atol=2e-2)


def test_the_same_text_is_nothing_special_in_other_dtypes(folder):
    for dtype in ("float32", "bfloat16", "int8"):
        model = embedder_of(load_backbone(str(folder), dtype, one_device_mesh()))
        assert np.isfinite(model.encode(TEXTS)).all()


def test_padding_that_overflows_changes_nothing(half, model):
    """The padding is id 0: here, too, a token that exceeds float16."""
    frozen = half.frozen | {"embedding": half.frozen["embedding"].at[0, 1].set(100)}
    expected = model.encode(GOOD), generate.generate(half, [[70] * 9, [80]], Sampling(4))
    pooled = Teacher(half, half.frozen, False).encode(GOOD)
    padded = dataclasses.replace(half, frozen=frozen)
    np.testing.assert_array_equal(LLM2VecGen(model.model, model.trainable, padded).encode(GOOD), expected[0])
    assert generate.generate(padded, [[70] * 9, [80]], Sampling(4)) == expected[1]
    np.testing.assert_array_equal(Teacher(padded, frozen, False).encode(GOOD), pooled)


def test_padding_that_overflows_changes_no_training_and_no_lens(half, model):
    """As above, in the passes that have their own padding."""
    core, trainable = model.model, model.trainable
    ids_BT, lengths_B = np.array([[70, 71, 72, 0, 0, 0], [80, 81, 82, 83, 84, 85]]), np.array([3, 6])

    @jax.jit
    def passes(frozen):
        cache = core.prefill(frozen, ids_BT, lengths_B, 8)
        embedding_BE, soft_prompts_BKD = core.compress(trainable, frozen, cache, lengths_B)
        encoded, _ = core.encode(trainable, frozen, ids_BT, lengths_B)
        read_BSD = core.predict_answer(frozen, soft_prompts_BKD, ids_BT, lengths_B)[0, : core.num_tokens]
        return embedding_BE, encoded, read_BSD, core.states_of_text(frozen, ids_BT, lengths_B[:, None] - 1, (1, 3))

    loud = half.frozen | {"embedding": half.frozen["embedding"].at[0, 1].set(100)}
    for found, expected in zip(passes(loud), passes(half.frozen), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_the_command_names_the_text_and_keeps_what_is_done(command, model_folder, tmp_path, precision):
    rows = [{"text": text, "id": f"no-{number}"} for number, text in enumerate([*GOOD, *TEXTS])]
    write_jsonl(tmp_path / "texts.jsonl", rows)
    words = [f"input={tmp_path / 'texts.jsonl'}", "output=out", "shard_size=5", f"precision={precision}"]
    words += ["id_field=id", "format=parquet"]
    check_error(command("encode", model_folder, *words, "dtype=float16"), "text 7", "'no-7'", "too ~ much", "bfloat16")
    code, _, errors = command("encode", model_folder, *words, "dtype=float32")
    assert code == (2 if precision != "int8" else 0), errors  # what is there is of float16; int8 came to no shard


def test_numbers_beyond_float16_are_an_error_not_infinity():
    large = np.array([[1.0, 2.0], [3.0, 70000.0]], np.float32)
    with pytest.raises(InputError, match="vector 8 .* 65504.*precision=float32"):
        postprocess.quantize(large, "float16", first=7)
    np.testing.assert_array_equal(postprocess.quantize(large, "float32"), large)
    assert np.isfinite(postprocess.quantize(np.array([[65504.0]], np.float32), "float16")).all()
    for value in (np.nan, np.inf):
        for precision in (*postprocess.PRECISIONS, "float16"):
            with pytest.raises(InputError, match="vector 1 .*NaN or infinity"):
                postprocess.quantize(np.array([[1.0], [value]], np.float32), precision)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_vectors_of_any_size_have_unit_length(scale):
    x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32) * np.float32(scale)
    np.testing.assert_allclose(postprocess.l2_normalize(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_similarity_of_what_is_not_finite_is_refused(model):
    with pytest.raises(InputError, match="similarity: vector 1 .*NaN or infinity"):
        model.similarity(np.ones((1, 2)), [[1, 2], [1, np.nan]])


# Text


def test_generation_marks_the_prompt_and_keeps_the_others(half):
    prompts = [half.tokenizer.encode([text], 64)[0] for text in ("Hi", "to ~", "Hello there")]
    found = generate.generate(half, prompts, Sampling(6))
    assert found[1] is None
    assert [found[0], found[2]] == generate.generate(half, [prompts[0], prompts[2]], Sampling(6))
    assert generate.generate(half, prompts, Sampling(6, temperature=1.0, top_p=0.9))[1] is None


def test_what_comes_after_the_end_of_a_row_does_not_mark_it(half, folder):
    """The token of "~" ends a row, which then is written on without being read."""
    tilde = half.tokenizer.encode(["~"], 9)[0][0]
    head = half.frozen["head"].at[tilde].set(half.frozen["head"][tilde] * 20)
    backbone = load_backbone(str(folder), "float16", one_device_mesh())
    backbone = dataclasses.replace(backbone, frozen=half.frozen | {"head": head})
    prompts = [[number] * 3 for number in range(70, 90)]
    backbone.tokenizer.stop_ids = []
    marked = [row is None for row in generate.generate(backbone, prompts, Sampling(6))]
    assert any(marked), "some write ~, read it, and overflow"
    backbone.tokenizer.stop_ids = [tilde]
    assert None not in generate.generate(backbone, prompts, Sampling(6))


def test_decode_names_the_soft_prompt(model):
    prompts = np.zeros((3, model.model.num_tokens, 32), np.float32)
    prompts[1] = 1e6
    with pytest.raises(InputError, match=r"soft prompts: row 1 \(from 0\).*float16.*bfloat16"):
        model.decode(prompts, max_new_tokens=3)


def test_respond_names_the_question_and_keeps_the_other_answers(command, folder, tmp_path):
    queries = write_jsonl(
        tmp_path / "queries.jsonl", [{"id": f"q{n}", "question": text} for n, text in enumerate(TEXTS)]
    )
    words = [f"backbone.path={folder}", f"input={queries}", "output=answers.jsonl", "max_new_tokens=4"]
    check_error(command("respond", *words, "backbone.dtype=float16"), "'q2'", "too ~ much", "bfloat16 or float32")
    assert {row["id"] for row in rows_of("answers.jsonl")} == {"q0", "q1", "q3", "q4", "q5"}
    assert command("respond", *words, "backbone.dtype=float32")[0] == 0
    assert len(rows_of("answers.jsonl")) == len(TEXTS)


# Readings, targets, scores


def test_the_lens_names_the_text(model, half):
    states = compression_states(model, GOOD, [0, 3])
    assert np.isfinite(states).all()
    for read in (lambda: compression_states(model, TEXTS, [3]), lambda: model.logit_lens(TEXTS)):
        with pytest.raises(InputError, match=f"text {NAMED}"):
            read()
    loud = embedder_of(half)
    kernel = loud.trainable["reconstruction"]["kernel"] * 1e6
    loud.trainable = loud.trainable | {"reconstruction": loud.trainable["reconstruction"] | {"kernel": kernel}}
    with pytest.raises(InputError, match="text 0 .*'one'.*float16"):
        logit_lens(loud, GOOD, state="soft_prompts")
    assert np.isfinite([word.probability for token in logit_lens(loud, GOOD)[0] for word in token]).all()


def test_the_index_of_the_latent_lens_names_the_text(command, model_folder, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join([*GOOD[:3], "a text that is ~ too much"]))
    words = [f"input={tmp_path / 'corpus.txt'}", "output=index", "dtype=float16", "layers=3"]
    check_error(command("lens build_index", model_folder, *words), "corpus.txt", "a text that is ~", "bfloat16")


def test_teachers_and_answers_name_the_text(half):
    pooling = Teacher(half, half.frozen, True)
    hyde = Hyde(half, pooling, 3)
    for embedder in (pooling, hyde):
        assert np.isfinite(embedder.encode(GOOD)).all()
        with pytest.raises(InputError, match=f"text {NAMED}"):
            embedder.encode(TEXTS)


def test_targets_name_the_answer(command, folder):
    rows = [{"question": "a", "answer": answer} for answer in ("fine", "good", "not ~ so")]
    result = train(command, folder, rows, "train.batch_size=2", "backbone.dtype=float16")
    check_error(result, "responses.jsonl", "not ~ so", "bfloat16 or float32")


@needs_mteb
@pytest.mark.parametrize("kind", ["retrieval", "safety_retrieval"])
def test_an_evaluation_names_the_text(command, model_folder, folder, tmp_path, kind):
    task = write_task(tmp_path / "tasks" / kind, kind)
    write_jsonl(task / "corpus.jsonl", [*rows_of(task / "corpus.jsonl"), {"_id": "d99", "text": "too ~ much"}])
    words = [f"tasks={tmp_path / 'tasks'}", "dtype=float16"]
    for name, more in (("student", model_folder), ("teacher", folder)):
        result = command("evaluate", more, *words, f"kind={name}", f"output={name}")
        check_error(result, "too ~ much", "exceed float16", "bfloat16 or float32")


# Weights


def test_weights_beyond_float16_are_named(half, tmp_path):
    import torch

    torch_model = tiny_torch_model("llama")
    with torch.no_grad():
        torch_model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    torch_model.save_pretrained(tmp_path / "large")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match="up_proj.*exceed float16 .use bfloat16 or float32"):
        load_backbone(str(tmp_path / "large"), "float16", one_device_mesh())
    load_backbone(str(tmp_path / "large"), "bfloat16", one_device_mesh())
    loud = embedder_of(half)
    loud.trainable = loud.trainable | {"tokens": loud.trainable["tokens"] * 1e8}
    with pytest.raises(InputError, match="embed_tokens.*float16.*bfloat16 or float32"):
        loud.save_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_ridge_and_the_held_out_losses_name_the_row(half, folder, tmp_path):
    rows = [{"question": f"{n}" + " ~" * (n == 21), "answer": "a"} for n in range(48)]
    path = write_jsonl(tmp_path / "responses.jsonl", rows)
    settings = settings_of(lambda _: folder, "train.batch_size=8", "compression.num_tokens=2", f"data.responses={path}")
    examples = tokenize(records.read_records(path, ("question", "answer")), half.tokenizer, settings.data, 2)
    examples.target = np.random.default_rng(0).normal(size=(48, 6)).astype(np.float32)
    trainer = CompressionTrainer(settings, half, examples)
    start = trainer.init()
    start = start | {"tokens": jnp.asarray(start["tokens"]).at[:, 1].set(0)}
    with pytest.raises(InputError, match="responses.jsonl: the question of row 21 .*bfloat16"):
        ridge.solve_alignment_head(trainer, start, 48)
    held_out = dataclasses.replace(settings.validation, responses=str(path))
    with pytest.raises(InputError, match=r"validation.responses: a loss of rows \[.*21.*responses.jsonl.*bfloat16"):
        Validation(dataclasses.replace(settings, validation=held_out), trainer, examples, []).evaluate(start)


# The server


def test_a_request_that_overflows_fails_alone(model):
    from llm2vec_gen_jax.config import ServeConfig

    engine = Engine(model, ServeConfig(max_length=100, max_wait_ms=200.0), lambda *_: None)
    texts = [["one"], ["too ~ much", "fine"], ["x" * 90]]
    found = [future.result(60) for future in [engine.embed(engine.tokenize(part, "")) for part in texts]]
    assert found[1][0] is None and np.isfinite([found[0][0], found[1][1], found[2][0]]).all()
    np.testing.assert_allclose(found[0][0], model.encode("one"), atol=2e-2)
    loud = np.full((model.model.num_tokens, 32), 1e6, np.float32)
    rows = engine.decode([loud, np.zeros_like(loud)], 4, 0).result(60)
    with pytest.raises(InputError, match="'input' 0.*float16"):
        engine.require_finite(rows, "input")
    assert rows[0] is None and rows[1] is not None
    engine.batcher.close()


def test_the_server_answers_in_openais_shape(model_folder):
    from tests.helpers import servers

    with servers.running(model_folder, "dtype=float16", "warmup=false") as server:
        server.ready_to_decode()
        one = server.post("embeddings", {"input": "one"})
        assert one.status_code == 200
        for path, body in (
            ("embeddings", {"input": ["one", "too ~ much"]}),
            ("decode", {"input": ["one", "too ~ much"], "max_tokens": 2}),
        ):
            refusal = server.post(path, body)
            servers.check_refusal(refusal, 400, "'input' 1", "float16", "bfloat16 or float32")
        again = json.loads(server.post("embeddings", {"input": "one"}).content)
        assert again["data"] == one.json()["data"] and server.healthy()


def test_from_pretrained_gives_the_same_error(model_folder):
    model = LLM2VecGen.from_pretrained(model_folder, "float16", mesh=one_device_mesh())
    with pytest.raises(InputError, match=f"input {NAMED}"):
        model.encode(TEXTS)
