"""Baselines: teacher and HyDE against independent computations, instructions, and the command."""

import dataclasses

import numpy as np
import pytest

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.evaluation import evaluate
from llm2vec_gen_jax.inference.generate import Sampling, generate
from llm2vec_gen_jax.teachers import encoder
from llm2vec_gen_jax.teachers.hyde import Clock, Hyde
from tests.conftest import tiny_torch_model, torch_outputs
from tests.helpers.tasks import run, settings

# Baselines


def test_the_teacher_is_the_mean_of_last_hidden_states(tiny):
    """Against torch, causal and bidirectional, in a batch of different lengths."""
    backbone = tiny("llama")
    texts = ["one", "a longer text", "x"]
    rows = backbone.tokenizer.encode([f"Do: {text}" for text in texts], 512)
    for causal in (True, False):
        outputs = torch_outputs(tiny_torch_model("llama"), rows, causal)
        teacher = encoder.Teacher(backbone, backbone.frozen, causal, batch_size=2)
        expected = [hidden.mean(axis=0) for hidden, _ in outputs]
        np.testing.assert_allclose(teacher.encode(texts, "Do:"), expected, atol=2e-4)
    assert teacher.encode([]).shape == (0, 32)


def test_batch_sizes_of_the_teacher(tiny, monkeypatch):
    """A single query is a batch of one row; many queries are batches of one shape."""
    backbone, pool, shapes = tiny("llama"), encoder.pool_rows, []

    def pool_rows(architecture, frozen, causal, ids, shape, execution):
        shapes.append(shape)
        return pool(architecture, frozen, causal, ids, shape, execution)

    monkeypatch.setattr(encoder, "pool_rows", pool_rows)
    teacher = encoder.Teacher(backbone, backbone.frozen, True, batch_size=6)
    for texts in (1, 3, 5, 13):
        assert teacher.encode(["text"] * texts).shape == (texts, 32)
    assert [rows for rows, _ in shapes] == [1, 4, 6, 6, 6, 6]


def test_instructions_by_kind(task_folders):
    """A student uses both; HyDE only that of queries; a teacher none, unless configured."""
    folder = str(task_folders / "retrieval")

    def pair(kind, **changes):
        job = evaluate.resolve(dataclasses.replace(settings(kind, **changes), tasks=folder))[0]
        return job.query_instruction, job.document_instruction

    evaluate_without_mteb = pytest.MonkeyPatch()
    evaluate_without_mteb.setattr(evaluate, "_import_mteb", lambda: None)
    try:
        assert pair("student") == ("Answer:", "Sum up:")
        assert pair("hyde") == ("Answer:", "")
        assert pair("teacher") == ("", "")
        assert pair("teacher", query_instruction="Q:", document_instruction="D:") == ("Q:", "D:")
        assert pair("student", query_instruction="", document_instruction="") == ("", "")
    finally:
        evaluate_without_mteb.undo()


def test_an_instructions_file_overrides_those_of_tasks(task_folders, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("query:\n  Small-safety_retrieval: 'Mine:'\ndocument: 'Theirs:'\n")
    config = dataclasses.replace(
        settings("student", instructions=str(file)), tasks=str(task_folders / "safety_retrieval")
    )
    job = evaluate.resolve(config)[0]
    assert (job.query_instruction, job.document_instruction) == ("Mine:", "Theirs:")
    for text, message in [
        ("queries: {}", "did you mean 'query'"),
        ("query: text", "must be a dict"),
        ("- a", "expected"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            evaluate.resolve(config)


def test_hyde_embeds_generated_answers(tiny):
    backbone = tiny("llama")
    teacher = encoder.Teacher(backbone, backbone.frozen, True)
    hyde = Hyde(backbone, teacher, max_new_tokens=5, batch_size=2)
    texts = ["one", "a longer question", "x"]
    prompts = [backbone.tokenizer.chat_prompt(f"Answer: {text}", 512) for text in texts]
    answers = [backbone.tokenizer.decode(ids).strip() for ids in generate(backbone, prompts, Sampling(5))]
    assert hyde.answers(texts, "Answer:") == answers and len(set(answers)) > 1
    np.testing.assert_allclose(hyde.encode(texts, "Answer:"), teacher.encode(answers), atol=1e-5)
    assert hyde.clock.read() > 0 and hyde.clock.read() is None


def test_the_clock_excludes_compilation_if_possible():
    clock = Clock()
    clock.add("shape", 10.0, 2)
    assert clock.read() == 5.0
    clock.add("shape", 1.0, 2)
    clock.add("other", 9.0, 2)
    assert clock.read() == 0.5


def test_baselines_through_the_command(tiny_folder, task_folders, tmp_path):
    """kind=hyde reports its time; kind=teacher uses no instruction; both embed documents the same way."""
    task, folder = task_folders / "safety_retrieval", tiny_folder("llama")
    teacher = run(folder, task, tmp_path / "teacher", "kind=teacher")["Small-safety_retrieval"]
    causal = run(folder, task, tmp_path / "causal", "kind=teacher", "attention=causal")["Small-safety_retrieval"]
    assert teacher == causal, "auto is causal without adapters"
    hyde = run(folder, task, tmp_path / "hyde", "kind=hyde", "max_new_tokens=4", "limit=3")["Small-safety_retrieval"]
    assert hyde["generation_seconds_per_query"] > 0 and 0 <= hyde["main_score"] <= 1
    with pytest.raises(InputError, match="max_new_tokens: 4 -> 5"):
        run(folder, task, tmp_path / "hyde", "kind=hyde", "max_new_tokens=5", "limit=3")


def test_adapters_are_rejected_for_a_student(model_folder, task_folders, tmp_path):
    with pytest.raises(InputError, match="adapters= is for kind=teacher"):
        run(model_folder, task_folders / "safety_retrieval", tmp_path / "out", "adapters=[a]")
