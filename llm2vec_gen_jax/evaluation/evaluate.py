"""Evaluation: a model or a baseline on task folders and hub benchmarks, task by task, into OUT/results.json."""

import dataclasses
import pathlib
from typing import Any

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import diff, install_command, read_json, require_written, write_json
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.evaluation import encoders, instructions, tasks
from llm2vec_gen_jax.teachers import hyde

_MAX_LENGTH = 512  # of the published MTEB and AdvBench-IR scripts


@dataclasses.dataclass
class Job:
    """One task to run: a tasks.Task or an mteb task, and what the texts of each side open with."""

    name: str
    type: str
    task: Any
    query_instruction: str
    document_instruction: str
    max_length: int
    data: str  # identifies the task's data

    def record(self):
        """Returns what a finished score depends on, beside the model."""
        return {key: getattr(self, key) for key in ("data", "query_instruction", "document_instruction", "max_length")}


def evaluate(path, config):
    """Runs the tasks of an EvaluateConfig on the MODEL `path`. Returns the results, as in results.json.

    A finished task is not repeated; another model or other settings in the same output raise InputError. Beside
    results.json, run.json has what they were made with.
    """
    options.require(config, "tasks", "output")
    with locks.locked(config.output, "output"):
        jobs = resolve(config)
        output = pathlib.Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        query, document, identity = encoders.load(path, config)
        book = _ResultsFile(output, identity | {"limit": config.limit}, config.overwrite)
        for job in jobs:
            book.check(job)
        for number, job in enumerate(jobs, 1):
            if job.name in book.results:
                print(f"[{number}/{len(jobs)}] {job.name}: done before", flush=True)
                continue
            print(f"[{number}/{len(jobs)}] {job.name} ({job.type})", flush=True)
            limits = {"max_length": job.max_length}
            scores = score(job, dataclasses.replace(query, **limits), dataclasses.replace(document, **limits))
            if isinstance(query, hyde.Hyde):
                scores["generation_seconds_per_query"] = query.clock.read()
            if config.limit is not None:
                scores["limit"] = config.limit
            book.add(job, scores)
        require_written(book.results_file, book.run_file)
    print(table(jobs, book.results))
    return book.results


def score(job, query, document):
    """Returns {"main_score": x, metric: value, ...} of a Job."""
    pair = (job.query_instruction, job.document_instruction)
    if isinstance(job.task, tasks.EvaluationTask) and job.type == "safety_retrieval":
        return tasks.score_safety(job.task, query, document, pair)
    harness = _harness()
    task = harness.folder_task(job.task) if isinstance(job.task, tasks.EvaluationTask) else job.task
    return harness.score(harness.MTEBEncoder(query, document, {job.name: pair}), task)


def resolve(config):
    """Returns the Jobs of an EvaluateConfig, without loading a model.

    Raises InputError for what is neither a folder nor known to mteb, for a task without instruction, and for two of
    one name.
    """
    own = instructions.Instructions() if config.instructions is None else instructions.read(config.instructions)
    known, jobs = own.over(instructions.read()), []
    whole = pathlib.Path(config.tasks).expanduser().is_dir()  # a comma may be part of a folder's name
    for part in [config.tasks] if whole else [part.strip() for part in config.tasks.split(",") if part.strip()]:
        if (folder := pathlib.Path(part).expanduser()).is_dir():
            for inside in tasks.find(folder):
                task = tasks.read(inside, config.limit)
                query = own.query.get(task.name, task.query_instruction)
                document = task.document_instruction if own.document is None else own.document
                jobs.append(_job(config, task.name, task.type, task, (query, document), _MAX_LENGTH, task.digest))
        elif "/" in part or part.startswith("."):
            raise InputError(f"tasks={part}: no such folder")
        elif config.limit is not None:
            raise InputError(f"limit={config.limit} is for task folders; {part} is on the hub and is run whole")
        else:
            jobs += _hub_jobs(config, part, known)
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"tasks={config.tasks}: two tasks are named {name}, so results.json cannot hold both")
    if any(job.type != "safety_retrieval" for job in jobs):
        _harness()  # what is not installed is said before the work
    return jobs


def table(jobs, results):
    """Returns the main scores as aligned lines."""
    lines = [("task", "type", "main metric", "score")]
    for job in jobs:
        metric = job.task.main_metric if isinstance(job.task, tasks.EvaluationTask) else job.task.metadata.main_score
        value = results[job.name]["main_score"]
        lines.append((job.name, job.type, metric, "undefined" if value is None else f"{value:.4f}"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _hub_jobs(config, name, known):
    harness = _harness()
    settings = known.benchmarks.get(name)
    if settings:
        found = harness.hub_tasks(settings["benchmark"], settings.get("tasks"))
    else:
        found = [harness.hub_task(name, known.benchmarks["mteb-eng-v2"]["benchmark"])]
    jobs = []
    for task in found:
        title = task.metadata.name
        # The teacher takes none, so it needs none.
        if title not in known.query and config.query_instruction is None and config.kind != "teacher":
            raise InputError(
                f"task {title} has no published instruction: give one in instructions=FILE "
                f"(query: {{{title}: ...}}), or pass query_instruction=... (may be empty)"
            )
        pair = (known.query.get(title, ""), known.document)
        length = (settings or {}).get("max_length", _MAX_LENGTH)
        jobs.append(_job(config, title, task.metadata.type, task, pair, length, str(task.metadata.revision)))
    return jobs


def _job(config, name, type, task, pair, max_length, data):
    query = pair[0] if config.kind != "teacher" else ""
    document = pair[1] if config.kind == "student" else ""
    query = query if config.query_instruction is None else config.query_instruction
    document = document if config.document_instruction is None else config.document_instruction
    return Job(name, type, task, query.strip(), document.strip(), config.max_length or max_length, data)


def _harness():
    try:
        from llm2vec_gen_jax.evaluation import mteb
    except ImportError as error:
        raise InputError(f"evaluation needs mteb ({error}): {install_command('eval')}") from None
    return mteb


class _ResultsFile:
    """results.json and run.json of an output directory; each is complete at any moment."""

    def __init__(self, output, model, overwrite):
        self.results_file, self.run_file = output / "results.json", output / "run.json"
        if overwrite:
            self.results_file.unlink(missing_ok=True)
            self.run_file.unlink(missing_ok=True)
        if self.results_file.exists() and not self.run_file.exists():
            raise InputError(f"{self.results_file}: was not written by this command. Choose another output")
        self.run = read_json(self.run_file) if self.run_file.exists() else {"model": model, "tasks": {}}
        self.results = read_json(self.results_file) if self.results_file.exists() else {}
        if (before := self.run["model"]) != model:
            self._refuse(diff(before, model))

    def check(self, job):
        """Raises InputError if the task was finished with other data or settings."""
        record = self.run["tasks"].get(job.name)
        if job.name in self.results and record != job.record():
            self._refuse(f"{job.name}: {diff(record or {}, job.record())}")

    def add(self, job, scores):
        """Writes a finished task; run.json first, so that no score is ever without its record."""
        self.run["tasks"][job.name] = job.record()
        write_json(self.run_file, self.run)
        self.results[job.name] = scores
        write_json(self.results_file, self.results)

    def _refuse(self, differing):
        raise InputError(
            f"{self.results_file.parent}: holds another evaluation ({differing}). Repeat its settings to resume it, "
            "choose another output, or pass overwrite=true"
        )
