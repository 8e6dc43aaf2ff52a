"""What of a study is neither trained nor scored by task: decoded text, refusals, and what a query costs."""

import dataclasses
import functools
import statistics
import time

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.evaluation import encoders, tasks
from llm2vec_gen_jax.experiments import text_metrics

_EXAMPLES = 10
_REPEATS = 3


class Reader:
    """Reads models of one backbone. config: with backbone, teacher, kernels and mesh."""

    def __init__(self, config):
        self.config = config

    def reconstruction(self, runs, rows, max_new_tokens):
        """Returns {"measured": {name: decoded.measure}, "examples": [...]} of responses and of texts decoded from the
        embeddings of their questions.

        runs: {name: run directory}. rows: records with question and answer; those without a response are left out.
        """
        rows = [row for row in rows if row["answer"].strip()]
        if not rows:
            raise InputError("every held-out response is empty: there is nothing to compare decoded text with")
        questions, responses = [row["question"] for row in rows], [row["answer"] for row in rows]
        texts = {"the response itself": responses}
        for name, run in runs.items():
            texts[name] = self._decode(self._student(run), questions, max_new_tokens)
        hyde = self._hyde(max_new_tokens)
        length = hyde.max_length
        measured = {
            name: text_metrics.measure(found, responses, hyde.backbone, hyde.teacher, length)
            for name, found in texts.items()
        }
        columns = {"question": questions, "response": responses} | {name: texts[name] for name in runs}
        examples = [dict(zip(columns, values)) for values in list(zip(*columns.values()))[:_EXAMPLES]]
        return {"measured": measured, "examples": examples}

    def refusals(self, run, folder, limit, max_new_tokens):
        """Returns rows of {of, instruction, texts, share}: how much of what is decoded from the embeddings of a safety
        task's requests is a refusal, and of what the LLM itself says to them. No text is kept."""
        task = tasks.read(folder, limit)
        requests = [row["text"].strip() for row in task.data["queries"]]
        student, hyde, rows = self._student(run), self._hyde(max_new_tokens), []
        for instruction in dict.fromkeys(["", task.query_instruction]):
            texts = {
                "decoded embedding": self._decode(student, requests, max_new_tokens, instruction),
                "the LLM's own response": hyde.answers(requests, instruction),
            }
            for name, found in texts.items():
                share = sum(map(text_metrics.is_refusal, found)) / len(found)
                rows.append({"of": name, "instruction": instruction or "–", "texts": len(found), "share": share})
        return rows

    def cost(self, run, questions, max_new_tokens):
        """Returns rows of {way, batch, queries, seconds, relative}: measured seconds per query of the student's one
        pass, of the teacher's, and of HyDE, which writes an answer of at most max_new_tokens first.

        Everything is compiled by a first, unmeasured time; in batches, and one query at a time.
        """
        student, hyde = encoders.Student(self._student(run)), self._hyde(max_new_tokens)
        teacher = dataclasses.replace(hyde.teacher, show_progress=False)
        hyde = dataclasses.replace(hyde, teacher=teacher, show_progress=False)
        ways = {"student": student.encode, "teacher": teacher.encode, "HyDE": hyde.encode}
        rows = []
        for batch in dict.fromkeys([min(len(questions), hyde.batch_size), 1]):
            asked = questions if batch > 1 else questions[: max(len(questions) // 4, 1)]
            for way, encode in ways.items():
                seconds = _seconds(encode, asked, batch, 1 if way == "HyDE" else _REPEATS)
                rows.append({"way": way, "batch": batch, "queries": len(asked), "seconds": seconds})
                rows[-1]["relative"] = seconds / next(row["seconds"] for row in rows if row["batch"] == batch)
        return rows

    def _decode(self, model, questions, max_new_tokens, instruction=""):
        _, soft_prompts = model.encode(questions, prompt=instruction, return_soft_prompts=True)
        return [text.strip() for text in model.decode(soft_prompts, max_new_tokens, show_progress_bar=True)]

    def _student(self, run):
        settings = self.config
        return LLM2VecGen.from_pretrained(
            str(run / "model"), settings.backbone.dtype, mesh=settings.mesh, attention=settings.kernels.attention
        )

    @functools.lru_cache(maxsize=1)  # noqa: B019  two copies of the backbone: kept while the reader lives
    def _hyde(self, max_new_tokens):
        """Returns the HyDE encoder: the LLM that writes, and the teacher."""
        settings = config_lib.EvaluateConfig(
            kind="hyde",
            adapters=self.config.teacher.adapters,
            attention=self.config.teacher.attention,
            max_new_tokens=max_new_tokens,
            dtype=self.config.backbone.dtype,
            kernels=self.config.kernels,
            mesh=self.config.mesh,
        )
        return encoders.load(self.config.backbone.path, settings)[0]


def _seconds(encode, texts, batch, repeats):
    """Returns the median seconds per text of encoding them, `batch` at a time, after one time that compiles."""

    def once():
        began = time.perf_counter()
        for start in range(0, len(texts), batch):
            encode(texts[start : start + batch])
        return (time.perf_counter() - began) / len(texts)

    once()
    return statistics.median(once() for _ in range(repeats))
