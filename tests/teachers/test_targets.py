"""Alignment targets: computed once, resumed, from a file, averaged, centred, whitened."""

import json

import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.data.examples import Examples
from llm2vec_gen_jax.parallel import preemption
from llm2vec_gen_jax.teachers import targets, whitening
from llm2vec_gen_jax.training.examples import load_training_data
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train
from tests.conftest import write_jsonl
from tests.helpers.adapters import ANSWERS, FAMILY, interrupted, kept, settings_of
from tests.helpers.adapters import targets as computed

# Computed once


def test_targets_are_kept_beside_the_responses_and_reused(tiny, tiny_folder, responses):
    first = computed(tiny(FAMILY), tiny_folder, responses)
    (file,) = kept(responses)
    before = file.stat().st_mtime_ns
    again = computed(tiny(FAMILY), tiny_folder, responses, "teacher.batch_size=2")
    np.testing.assert_array_equal(again, first)
    assert file.stat().st_mtime_ns == before
    # Another attention, text or backbone is another file.
    other = computed(tiny(FAMILY), tiny_folder, responses, "teacher.attention=bidirectional")
    assert np.abs(other - first).max() > 1e-3
    computed(tiny(FAMILY), tiny_folder, responses, answers=[*ANSWERS[:-1], "y"])
    computed(tiny(FAMILY), tiny_folder, responses, "data.max_answer_length=3")
    computed(tiny("llama"), tiny_folder, responses)
    assert len(kept(responses)) == 5


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(b""),
        lambda path: np.save(path, np.load(path).astype(np.float64)),
        lambda path: np.save(path, np.load(path)[::-1]),
        lambda path: np.save(path, np.load(path)[:, :-1]),
        lambda path: np.save(path, np.zeros((3, 3), np.float32)),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
    ],
)
def test_kept_targets_that_are_not_what_was_written_are_computed_again(tiny, tiny_folder, responses, damage, messages):
    first = computed(tiny(FAMILY), tiny_folder, responses)
    (file,) = kept(responses)
    damage(file)
    again = computed(tiny(FAMILY), tiny_folder, responses)
    np.testing.assert_array_equal(again, first)
    assert f"{file}: modified after it was written, or without a record; computed again" in messages()
    assert kept(responses) == [file]
    np.testing.assert_array_equal(np.load(file), first)


def test_an_interrupted_computation_goes_on_where_it_stopped(tiny, tiny_folder, responses):
    answers = [f"answer {'x' * (number % 30)}" for number in range(50)]
    words = ("teacher.batch_size=4",)
    whole = computed(tiny(FAMILY), tiny_folder, responses, *words, answers=answers)
    (file,) = kept(responses)
    partial, marker = file.with_suffix(".partial.npy"), file.with_suffix(".partial.json")
    order = np.argsort([-len(answer) for answer in answers], kind="stable")  # a token per byte
    for done in (0, 4, 24, 48):
        interrupted(file, whole + 0.5, order, done)  # to see that these are not computed again
        found = computed(tiny(FAMILY), tiny_folder, responses, *words, answers=answers)
        np.testing.assert_array_equal(found[order[:done]], whole[order[:done]] + 0.5)
        np.testing.assert_array_equal(found[order[done:]], whole[order[done:]])
        assert kept(responses) == [file]
    # What is done is only known with both files, and where they fit each other.
    damages = (
        lambda: marker.unlink(),
        lambda: partial.write_text("torn"),
        lambda: partial.write_bytes(partial.read_bytes()[:200]),
        lambda: _flip(partial),
        lambda: np.save(partial, np.load(partial)[:, ::-1]),
        lambda: marker.write_text(json.dumps({"done": 50})),
        lambda: marker.write_text(json.dumps(json.loads(marker.read_text()) | {"done": 50})),
    )
    for damage in damages:
        interrupted(file, whole + 0.5, order, 48)
        damage()
        found = computed(tiny(FAMILY), tiny_folder, responses, *words, answers=answers)
        np.testing.assert_array_equal(found, whole)
        assert kept(responses) == [file]


def test_one_computes_the_targets_that_two_need(tiny, tiny_folder, responses, monkeypatch, messages):
    computed(tiny(FAMILY), tiny_folder, responses)
    (file,) = kept(responses)
    file.unlink()
    other = locks.Lock(file.with_suffix(".lock"))
    assert other.acquire()
    monkeypatch.setattr(preemption, "_asked", True)
    with pytest.raises(preemption.Stopped, match="stopped on request, while another process computes the targets"):
        computed(tiny(FAMILY), tiny_folder, responses)
    assert "waiting for another process" in messages()
    other.release()


def test_the_batch_a_text_is_in_is_no_matter(tiny, tiny_folder, responses):
    one = computed(tiny(FAMILY), tiny_folder, responses, "teacher.batch_size=1")
    kept(responses)[0].unlink()
    all_ = computed(tiny(FAMILY), tiny_folder, responses, "teacher.batch_size=8")
    np.testing.assert_allclose(one, all_, atol=1e-5)


# From a file


def test_targets_of_a_file_are_the_rows_used(tmp_path):
    for dtype in (np.float16, np.float32, np.float64):
        array = np.random.default_rng(0).normal(size=(6, 3)).astype(dtype)
        np.save(tmp_path / "targets.npy", array)
        found = targets.read_targets(tmp_path / "targets.npy", 6, np.array([0, 2, 5]))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, array[[0, 2, 5]].astype(np.float32))


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.zeros((5, 3), np.float32), r"expected a float array \(6 rows of data.responses, E\), found .*\(5, 3\)"),
        (np.zeros(6, np.float32), r"found float32 \(6,\)"),
        (np.zeros((6, 3, 2), np.float32), r"found float32 \(6, 3, 2\)"),
        (np.zeros((6, 3), np.int32), "found int32"),
        (np.array([["a"]] * 6), "found <U1"),
        (np.array([[None]] * 6), "not a .npy array"),
        (np.array([[1.0], [2.0], [np.nan], [4.0], [np.inf], [6.0]]), r"row 2 \(from 0\) holds NaN or infinity"),
        (np.array([[1e300]] * 6), "row 0 .from 0. holds NaN or infinity"),
    ],
)
def test_a_file_of_other_targets_is_named(tmp_path, array, expected):
    np.save(tmp_path / "targets.npy", array)
    with pytest.raises(InputError, match=f"teacher.path={tmp_path / 'targets.npy'}: .*{expected}"):
        targets.read_targets(tmp_path / "targets.npy", 6, np.arange(6))


def test_a_file_that_is_no_array_is_named(tmp_path):
    np.save(tmp_path / "whole.npy", np.zeros((6, 3), np.float32))
    whole = (tmp_path / "whole.npy").read_bytes()
    np.savez(tmp_path / "many.npy", a=np.zeros((6, 3)))
    for name, content in (("empty", b""), ("text", b"{}"), ("cut", whole[:-1]), ("header", whole[:20])):
        (tmp_path / f"{name}.npy").write_bytes(content)
    for name in ("empty", "text", "cut", "header", "many.npy", "none", "."):
        path = tmp_path / (name if "." in name else f"{name}.npy")
        path = path if path.exists() or name == "none" else tmp_path / f"{name}.npz"
        with pytest.raises(InputError, match=f"teacher.path={path}: "):
            targets.read_targets(path, 6, np.arange(6))


def test_centred_targets_are_the_targets_less_their_mean(tiny_folder, tmp_path):
    """Of the rows that train: the third answer is empty."""
    rows = [{"question": f"q{number}", "answer": "" if number == 2 else f"a{number}"} for number in range(9)]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    targets_BE = np.random.default_rng(0).normal(3, 1, (9, 4)).astype(np.float32)
    mean_E = np.delete(targets_BE, 2, axis=0).mean(axis=0)
    np.save(tmp_path / "plain.npy", targets_BE)
    np.save(tmp_path / "centred.npy", targets_BE - mean_E)
    words = ("teacher.kind=file", f"data.responses={tmp_path / 'responses.jsonl'}", "train.steps=1")
    words += ("train.batch_size=8", "loss.reconstruction=0")

    def loss(name, *more):
        output = tmp_path / f"{name}{len(more)}"
        more += (f"teacher.path={tmp_path / name}.npy", f"train.output={output}")
        train(settings_of(tiny_folder, *words, *more), False)
        return read_metrics(output)[-1]["alignment_loss"]

    assert loss("plain", "teacher.centre=true") == pytest.approx(loss("centred"), rel=1e-5)
    assert loss("plain") > 2 * loss("centred", "teacher.centre=false")
    examples = Examples([], [], np.arange(2), np.array([[1.0, 2], [3, 6]]), {}, np.array([[0.0, 0], [2, 4]]))
    whitening.transform_targets(examples, config.TeacherConfig(centre=True), ["a", "b"])
    assert examples.target.tolist() == [[-1, -2], [1, 2]] and examples.negative_target.tolist() == [[-2, -4], [0, 0]]


@pytest.mark.parametrize("count, power", [(200, 1.0), (200, 0.5), (200, 0.0), (5, 1.0)])
def test_whitened_targets_have_the_covariance_to_a_power(count, power):
    """Of fewer texts than directions too: what has no variance gets none."""
    generator = np.random.default_rng(0)
    targets_BE = (generator.normal(3, 1, (count, 8)) * 4.0 ** -np.arange(8)).astype(np.float32)
    mean_E, matrix_EE = whitening.whitening(targets_BE, power)
    whitened_BE = (targets_BE - mean_E) @ matrix_EE
    before_EE, after_EE = np.cov(targets_BE.T, bias=True), np.cov(whitened_BE.T, bias=True)
    variances_E, axes_EE = np.linalg.eigh(before_EE)
    expected_E = np.where(variances_E > 1e-6 * variances_E.max(), np.abs(variances_E) ** (1 - power), 0)
    expected_E *= variances_E.sum() / expected_E.sum()
    np.testing.assert_allclose(after_EE, (axes_EE * expected_E) @ axes_EE.T, atol=1e-3 * expected_E.max())
    np.testing.assert_allclose(whitened_BE.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(matrix_EE, matrix_EE.T, atol=1e-6)


def test_equal_targets_stay_finite():
    mean_E, matrix_EE = whitening.whitening(np.ones((3, 4), np.float32), 1.0)
    assert mean_E.tolist() == [1] * 4 and matrix_EE.tolist() == [[0] * 4] * 4


def test_records_of_one_question_share_the_mean_of_their_targets():
    examples = Examples([], [], np.arange(4), np.array([[1.0, 2], [5, 5], [3, 6], [7, 8]], np.float32), {}, None)
    whitening.transform_targets(examples, config.TeacherConfig(average=True, centre=True), ["b", "a", "b", "c"])
    mean = np.array([[2, 4], [5, 5], [2, 4], [7, 8]], np.float32).mean(axis=0)
    np.testing.assert_allclose(examples.target + mean, [[2, 4], [5, 5], [2, 4], [7, 8]])


# Mixed with the vector of the query


def test_the_target_holds_the_query_by_its_weight(tiny_folder, tmp_path):
    """Whatever the weight, the parts are computed once and kept."""
    rows = [{"question": f"why {n}", "answer": f"because {n * 7}"} for n in range(6)]
    path = write_jsonl(tmp_path / "responses.jsonl", rows)

    def targets_of(weight, *words):
        settings = settings_of(tiny_folder, f"data.responses={path}", f"teacher.query_weight={weight}", *words)
        return load_training_data(settings).examples.target

    answer, query = targets_of(0), targets_of(1)
    assert np.abs(answer - query).max() > 1e-2
    before = {file: file.stat().st_mtime_ns for file in kept(path)}
    np.testing.assert_allclose(targets_of(0.25), 0.75 * answer + 0.25 * query, rtol=1e-6, atol=1e-6)
    assert {file: file.stat().st_mtime_ns for file in kept(path)} == before and len(before) == 2
    np.save(tmp_path / "own.npy", answer)
    with pytest.raises(InputError, match="query_weight"):
        targets_of(0.5, "teacher.kind=file", f"teacher.path={tmp_path / 'own.npy'}")
