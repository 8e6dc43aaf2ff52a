"""Evaluates a model or a baseline on task folders and hub benchmarks, and writes OUT/results.json task by task."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import diff, install_command, read_json, require_same_run, require_written, write_json
from llm2vec_gen_jax.common.hub import offline_datasets
from llm2vec_gen_jax.common.terminal import align_columns
from llm2vec_gen_jax.config import EvaluateConfig, options
from llm2vec_gen_jax.evaluation import encoders, instructions, safety, tasks
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.teachers import hyde

logger = logging.getLogger(__name__)

_MAX_LENGTH = 512  # of the published MTEB and AdvBench-IR scripts
_CARD_TYPES = {  # types of task folders, as mteb names them
    "retrieval": "Retrieval",
    "sts": "STS",
    "classification": "Classification",
    "clustering": "Clustering",
    "safety_retrieval": "Retrieval",
}


@dataclasses.dataclass
class Job:
    """One task to run: an EvaluationTask or an mteb task, with its instructions. data: identifies the task's data."""

    name: str
    type: str
    task: Any
    query_instruction: str
    document_instruction: str
    max_length: int
    data: str

    def record(self) -> dict[str, Any]:
        """Returns the settings that the score depends on, in addition to the model."""
        return {key: getattr(self, key) for key in ("data", "query_instruction", "document_instruction", "max_length")}

    @property
    def main_metric(self) -> str:
        """The name of the main score."""
        is_folder = isinstance(self.task, tasks.EvaluationTask)
        name: str = self.task.main_metric if is_folder else self.task.metadata.main_score
        return name

    def score_entry(self, value: float | None) -> dict[str, Any]:
        """Returns the entry of a main score in the metadata of a model (model_directory.add_scores)."""
        if isinstance(self.task, tasks.EvaluationTask):
            return {"value": value, "type": _CARD_TYPES[self.type], "metric": self.main_metric}
        dataset = self.task.metadata.dataset["path"]
        return {"value": value, "type": self.type, "metric": self.main_metric, "dataset": dataset}


def evaluate(path: str, config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Runs the tasks of an EvaluateConfig on the MODEL `path`. Returns the results, as in results.json.

    Finished tasks are skipped. Raises InputError if the output holds results of another model or other settings,
    which are recorded in run.json, and for save_scores without a model directory to save them in.
    """
    options.require(config)
    if config.save_scores:
        _check_save_scores(path, config)
    output = pathlib.Path(str(config.output))
    with locks.locked(output, "output"), offline_datasets(config.local_files_only):
        jobs = resolve(config)
        query, document, identity = encoders.load(path, config)
        output.mkdir(parents=True, exist_ok=True)
        results = _ResultsFile(output, identity | {"limit": config.limit}, jobs, config.overwrite)
        for job in jobs:
            results.check(job)
        for number, job in enumerate(jobs, 1):
            if job.name in results.scores:
                logger.info(f"[{number}/{len(jobs)}] {job.name}: done before")
                continue
            logger.info(f"[{number}/{len(jobs)}] {job.name} ({job.type})")
            encoders_of_job = (dataclasses.replace(encoder, max_length=job.max_length) for encoder in (query, document))
            scores = score(job, *encoders_of_job)
            if isinstance(query, hyde.Hyde):
                scores["generation_seconds_per_query"] = query.clock.read()
            if config.limit is not None:
                scores["limit"] = config.limit
            results.add(job, scores)
        require_written(results.scores_file, results.run_file)
    logger.info(table(jobs, results.scores))
    if isinstance(query, encoders.Student) and config.save_scores:
        entries = {job.name: job.score_entry(results.scores[job.name]["main_score"]) for job in jobs}
        defined = {name: entry for name, entry in entries.items() if entry["value"] is not None}
        model_directory.add_scores(path, defined, query.model.backbone.license)
        logger.info(f"written: {path} ({len(defined)} scores, and the model card)")
    return results.scores


def score(job: Job, query: encoders.Encoder, document: encoders.Encoder) -> dict[str, Any]:
    """Returns {"main_score": x, metric: value, ...} of a Job."""
    pair = (job.query_instruction, job.document_instruction)
    if isinstance(job.task, tasks.EvaluationTask) and job.type == "safety_retrieval":
        return safety.score_safety(job.task, query, document, pair)
    mteb = _import_mteb()
    task = mteb.folder_task(job.task) if isinstance(job.task, tasks.EvaluationTask) else job.task
    return mteb.score(mteb.MTEBEncoder(query, document, {job.name: pair}), task)


def resolve(config: EvaluateConfig) -> list[Job]:
    """Returns the jobs of an EvaluateConfig, without loading a model.

    Raises InputError for tasks that are neither a folder nor known to mteb, tasks without an instruction, and
    duplicate task names.
    """
    user = instructions.Instructions() if config.instructions is None else instructions.read(config.instructions)
    known = user.override(instructions.read())
    jobs: list[Job] = []
    selection = str(config.tasks)
    is_folder = pathlib.Path(selection).expanduser().is_dir()  # a folder's name may contain a comma
    for part in [selection] if is_folder else [part.strip() for part in selection.split(",") if part.strip()]:
        if (folder := pathlib.Path(part).expanduser()).is_dir():
            for task_folder in tasks.find(folder):
                task = tasks.read(task_folder, config.limit)
                query = user.query.get(task.name, task.query_instruction)
                document = task.document_instruction if user.document is None else user.document
                jobs.append(_make_job(config, task.name, task.type, task, (query, document), _MAX_LENGTH, task.digest))
        elif "/" in part or part.startswith("."):
            raise InputError(f"tasks={part}: no such folder")
        elif config.limit is not None:
            raise InputError(f"limit={config.limit} is for task folders only: remove it for the hub task {part}")
        else:
            jobs += _hub_jobs(config, part, known)
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"tasks={config.tasks}: two tasks are named {name}. Evaluate them into different outputs")
    if any(job.type != "safety_retrieval" for job in jobs):
        _import_mteb()  # report a missing package before any work
    return jobs


def table(jobs: Sequence[Job], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the main scores as aligned columns."""
    lines = [("task", "type", "main metric", "score")]
    for job in jobs:
        value = results[job.name]["main_score"]
        lines.append((job.name, job.type, job.main_metric, "undefined" if value is None else f"{value:.4f}"))
    return align_columns(lines)


def _check_save_scores(path: str, config: EvaluateConfig) -> None:
    if config.kind != "student":
        raise InputError(f"save_scores=true is for kind=student, not for kind={config.kind}: remove it")
    if config.by_teacher != "none":
        raise InputError(
            f"save_scores=true is for the model alone, not with by_teacher={config.by_teacher}: remove one"
        )
    if config.limit is not None:
        raise InputError(f"save_scores=true: with limit={config.limit}, scores are of a part of each task. Remove one")
    model_directory.require_scores_writable(path)


def _hub_jobs(config: EvaluateConfig, name: str, known: instructions.Instructions) -> list[Job]:
    mteb = _import_mteb()
    settings = known.benchmarks.get(name)
    if settings:
        hub_tasks = mteb.hub_tasks(settings["benchmark"], settings.get("tasks"))
    else:
        hub_tasks = [mteb.hub_task(name, known.benchmarks["mteb-eng-v2"]["benchmark"])]
    jobs = []
    for task in hub_tasks:
        title = task.metadata.name
        if title not in known.query and config.query_instruction is None and not _asks_teacher(config):
            raise InputError(
                f"task {title} has no published instruction: add one to instructions=FILE "
                f"(query: {{{title}: ...}}), or pass query_instruction=... (may be empty)"
            )
        pair = (known.query.get(title, ""), known.document or "")
        length = (settings or {}).get("max_length", _MAX_LENGTH)
        jobs.append(_make_job(config, title, task.metadata.type, task, pair, length, str(task.metadata.revision)))
    return jobs


def _asks_teacher(config: EvaluateConfig) -> bool:
    """Returns whether queries are encoded by a teacher, which gets no instruction."""
    return config.kind == "teacher" or config.by_teacher == "all"


def _make_job(
    config: EvaluateConfig, name: str, type: str, task: Any, pair: tuple[str, str], max_length: int, data: str
) -> Job:
    query = "" if _asks_teacher(config) else pair[0]
    document = pair[1] if config.kind == "student" and config.by_teacher == "none" else ""
    query = query if config.query_instruction is None else config.query_instruction
    document = document if config.document_instruction is None else config.document_instruction
    return Job(name, type, task, query.strip(), document.strip(), config.max_length or max_length, data)


def _import_mteb() -> ModuleType:
    try:
        from llm2vec_gen_jax.evaluation import mteb
    except ImportError as error:
        raise InputError(f"evaluation needs mteb ({error}): {install_command('eval')}") from None
    return mteb


class _ResultsFile:
    """The results.json and run.json of an output directory, each replaced atomically."""

    def __init__(self, output: pathlib.Path, model: dict[str, Any], jobs: Sequence[Job], overwrite: bool) -> None:
        """overwrite: whether results of another model or of other settings of the jobs are removed."""
        self.scores_file, self.run_file = output / "results.json", output / "run.json"
        if self.scores_file.exists() and not self.run_file.exists():
            raise InputError(f"{self.scores_file}: was not written by this command. Choose another output")
        if overwrite and self.run_file.exists():
            old = read_json(self.run_file)
            records = {job.name: job.record() for job in jobs}
            done = {name: record for name, record in old.get("tasks", {}).items() if name in records}
            if diff(old.get("model", {}), model) or any(diff(done[name], records[name]) for name in done):
                self.scores_file.unlink(missing_ok=True)
                self.run_file.unlink()
        self.run = read_json(self.run_file) if self.run_file.exists() else {"model": model, "tasks": {}}
        self.scores = read_json(self.scores_file) if self.scores_file.exists() else {}
        self._require_same(self.run["model"], model)

    def check(self, job: Job) -> None:
        """Raises InputError if the task was finished with other data or settings."""
        if job.name in self.scores:
            self._require_same({job.name: self.run["tasks"].get(job.name)}, {job.name: job.record()})

    def add(self, job: Job, scores: dict[str, Any]) -> None:
        """Writes the scores of a finished task, after its record in run.json: no score is ever without a record."""
        self.run["tasks"][job.name] = job.record()
        write_json(self.run_file, self.run)
        self.scores[job.name] = scores
        write_json(self.scores_file, self.scores)

    def _require_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        require_same_run(self.scores_file.parent, old, new, "choose another output, or pass overwrite=true")
