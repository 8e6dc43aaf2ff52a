"""Measurements of the study beyond task scores: decoded text, refusals and cost per query."""

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.evaluation import encoders, tasks
from llm2vec_gen_jax.experiments import text_metrics
from llm2vec_gen_jax.teachers.hyde import Hyde

_EXAMPLES = 10
_REPEATS = 3


class StudyMeasurements:
    """Measures trained models of one backbone. config: provides backbone, teacher, kernels and mesh."""

    def __init__(self, config: config_lib.ReproduceConfig) -> None:
        self.config = config

    def reconstruction(
        self, runs: Mapping[str, pathlib.Path], rows: Sequence[dict[str, Any]], max_new_tokens: int
    ) -> dict[str, Any]:
        """Compares text decoded from the embeddings of questions with the responses to them.

        runs: {name: run directory}. rows: records with question and answer; empty answers are skipped.
        Returns {"measured": {name: text_metrics.measure(...)}, "examples": [{column: text}]}.
        """
        rows = [row for row in rows if row["answer"].strip()]
        if not rows:
            raise InputError("every held-out response is empty: decoded text cannot be compared. Check the backbone")
        questions, responses = [row["question"] for row in rows], [row["answer"] for row in rows]
        texts = {"the response itself": responses}
        for name, run in runs.items():
            texts[name] = self._decode(self._student(run), questions, max_new_tokens)
        hyde = self._hyde(max_new_tokens)
        measured = {
            name: text_metrics.measure(decoded, responses, hyde.backbone, hyde.teacher, hyde.max_length)
            for name, decoded in texts.items()
        }
        columns = {"question": questions, "response": responses} | {name: texts[name] for name in runs}
        examples = [dict(zip(columns, values)) for values in list(zip(*columns.values()))[:_EXAMPLES]]
        return {"measured": measured, "examples": examples}

    def refusals(
        self, run: pathlib.Path, folder: pathlib.Path, limit: int | None, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns the share of refusals among texts decoded from the embeddings of a safety task's requests, and among
        the LLM's own responses to them: rows of {of, instruction, texts, share}. No text is kept."""
        task = tasks.read(folder, limit)
        requests = [row["text"].strip() for row in task.data["queries"]]
        student, hyde, rows = self._student(run), self._hyde(max_new_tokens), []
        for instruction in dict.fromkeys(["", task.query_instruction]):
            texts = {
                "decoded embedding": self._decode(student, requests, max_new_tokens, instruction),
                "the LLM's own response": hyde.answers(requests, instruction),
            }
            for name, outputs in texts.items():
                share = sum(map(text_metrics.is_refusal, outputs)) / len(outputs)
                rows.append({"of": name, "instruction": instruction or "–", "texts": len(outputs), "share": share})
        return rows

    def cost(self, run: pathlib.Path, questions: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
        """Measures the seconds per query of the student, the teacher and HyDE, in batches and one query at a time.

        max_new_tokens: the longest answer that HyDE generates. Compilation is excluded.
        Returns rows of {way, batch, queries, seconds, relative}; relative: to the student.
        """
        student, hyde = encoders.Student(self._student(run)), self._hyde(max_new_tokens)
        teacher = dataclasses.replace(hyde.teacher, show_progress=False)
        hyde = dataclasses.replace(hyde, teacher=teacher, show_progress=False)
        encoders_by_name = {"student": student.encode, "teacher": teacher.encode, "HyDE": hyde.encode}
        rows: list[dict[str, Any]] = []
        for batch in dict.fromkeys([min(len(questions), hyde.batch_size), 1]):
            texts = questions if batch > 1 else questions[: max(len(questions) // 4, 1)]
            for name, encode in encoders_by_name.items():
                seconds = _seconds_per_text(encode, texts, batch, 1 if name == "HyDE" else _REPEATS)
                rows.append({"way": name, "batch": batch, "queries": len(texts), "seconds": seconds})
                rows[-1]["relative"] = seconds / next(row["seconds"] for row in rows if row["batch"] == batch)
        return rows

    def _decode(
        self, model: LLM2VecGen, questions: Sequence[str], max_new_tokens: int, instruction: str = ""
    ) -> list[str]:
        _, soft_prompts = model.encode(questions, prompt=instruction, return_soft_prompts=True)
        return [text.strip() for text in model.decode(soft_prompts, max_new_tokens, show_progress_bar=True)]

    def _student(self, run: pathlib.Path) -> LLM2VecGen:
        settings = self.config
        return LLM2VecGen.from_pretrained(
            str(run / "model"),
            settings.backbone.dtype,
            mesh=settings.mesh,
            attention=settings.kernels.attention,
            **config_lib.hub_access(settings),
        )

    @functools.lru_cache(maxsize=1)  # noqa: B019  it holds two copies of the backbone
    def _hyde(self, max_new_tokens: int) -> Hyde:
        """Returns the HyDE encoder, which includes the generating LLM and the teacher."""
        settings = config_lib.EvaluateConfig(
            kind="hyde",
            adapters=self.config.teacher.adapters,
            attention=self.config.teacher.attention,
            max_new_tokens=max_new_tokens,
            dtype=self.config.backbone.dtype,
            revision=self.config.backbone.revision,
            **config_lib.hub_access(self.config),
            kernels=self.config.kernels,
            mesh=self.config.mesh,
        )
        query, _, _ = encoders.load(self.config.backbone.path, settings)
        assert isinstance(query, Hyde)
        return query


def _seconds_per_text(encode: Callable[[Sequence[str]], Any], texts: Sequence[str], batch: int, repeats: int) -> float:
    """Returns the median over `repeats` of the seconds per text of encoding `batch` texts at a time."""

    def run_once():
        started = time.perf_counter()
        for start in range(0, len(texts), batch):
            encode(texts[start : start + batch])
        return (time.perf_counter() - started) / len(texts)

    run_once()  # compiles
    return statistics.median(run_once() for _ in range(repeats))
