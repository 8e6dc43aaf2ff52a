"""The complete study, from queries to report, in resumable stages; finished stages are skipped."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import (
    entries,
    read_json,
    require_same_run,
    require_written,
    visible,
    write_json,
    write_text,
)
from llm2vec_gen_jax.common.jsonl import read_jsonl, write_jsonl
from llm2vec_gen_jax.config import BUDGETS, HUB_KEYS, options
from llm2vec_gen_jax.data import records
from llm2vec_gen_jax.data.texts import comparison_key
from llm2vec_gen_jax.evaluation.evaluate import evaluate, resolve
from llm2vec_gen_jax.experiments import measurements, plots, splits, tables
from llm2vec_gen_jax.experiments.comparisons import (
    RESPONSES_PER_QUERY,
    STEP_MULTIPLIERS,
    final_losses,
    resolve_comparisons,
)
from llm2vec_gen_jax.inference.respond import respond
from llm2vec_gen_jax.inference.synthesize import synthesize
from llm2vec_gen_jax.pretrained.backbone import resolve_adapter, resolve_embedder, resolve_path
from llm2vec_gen_jax.training.train import train

_FIRST_SEED = 42
# Settings that may differ when a study is resumed.
_CHANGEABLE = ("output", "comparisons", "kernels", "mesh", *HUB_KEYS)
ScoredModel = pathlib.Path | str  # a run directory, or a baseline: "teacher", "causal" or "hyde"


def reproduce(config: config_lib.ReproduceConfig) -> pathlib.Path:
    """Runs (or resumes) the study of a ReproduceConfig. Returns the path of its report, OUTPUT/report.md."""
    options.require(config)
    if config.teacher.kind != "llm2vec" or config.teacher.path:
        raise InputError(
            "the study's teacher is the backbone with teacher.adapters: remove teacher.kind and teacher.path"
        )
    output = pathlib.Path(config.output)
    with locks.locked(output, "output"):
        output.mkdir(parents=True, exist_ok=True)
        report = Study(config).run()
        require_written(output / "study.json", report)
        return report


class Study:
    """The stages of one study. sizes: those of the config, with the budget's values for unset ones."""

    def __init__(self, config: config_lib.ReproduceConfig) -> None:
        self.output = pathlib.Path(config.output)
        overrides = {key: value for key, value in vars(config.sizes).items() if value is not None}
        self.sizes: Any = dataclasses.replace(BUDGETS[config.budget], **overrides)  # every size has a value
        self.config = dataclasses.replace(config, sizes=self.sizes)
        self.comparisons = resolve_comparisons(self.config)
        self._check_inputs()
        self._claim_output()

    def run(self) -> pathlib.Path:
        """Runs the stages in order. Returns the path of the report."""
        limits = (self.sizes.limit, self.sizes.hyde_limit)
        cut = {"documents": self.sizes.documents, "queries": max(limits) if all(limits) else 0}
        self.stage(
            "tasks",
            {"tasks": self.config.tasks} | cut,
            lambda: splits.split(str(self.config.tasks), self.output / "tasks", **cut),
        )
        self.types = {part: splits.types(self.output / "tasks" / part) for part in ("development", "test")}
        for part in (part for part, names in self.types.items() if names):  # part of a task may be too small
            resolve(config_lib.EvaluateConfig(tasks=str(self.output / "tasks" / part), kind="teacher"))
        self.prepare_data()
        students = [self.train("base", self.sizes.steps, seed) for seed in range(self.sizes.seeds)]
        compared = {
            name: self.train(name, self.sizes.ablation_steps * STEP_MULTIPLIERS.get(name, 1))
            for name in self.comparisons
        }
        baselines: list[ScoredModel] = ["teacher", "causal"]
        for part, runs in (("development", list(compared.values())), ("test", students)):
            if self.types[part]:
                for model in (*runs, *baselines):
                    self.score(part, self.sizes.limit, model)
        if self.types["test"]:
            for model in (students[0], "teacher", "hyde"):
                self.score("test", self.sizes.hyde_limit, model)
        self.measure(students[0], compared)
        return self.report(students, compared)

    def stage(self, name: str, settings: dict[str, Any], run: Callable[[], Any]) -> None:
        """Calls run() unless the stage has finished with the same settings (JSON values). Records its duration."""
        settings = {key: value for key, value in settings.items() if key not in HUB_KEYS}
        marker = self.output / "stages" / f"{name}.json"
        if marker.exists() and read_json(marker).get("settings") == settings:
            print(f"{name}: done before", flush=True)
            return
        print(f"\n{name}", flush=True)
        start = time.monotonic()
        run()
        write_json(marker, {"settings": settings, "seconds": round(time.monotonic() - start, 1)})

    def prepare_data(self) -> None:
        """Writes the training and held-out queries and their responses."""
        sizes = self.sizes
        common: dict[str, Any] = {key: getattr(self.config, key) for key in ("backbone", "mesh", "kernels", *HUB_KEYS)}
        source = self.config.queries
        if source is None:
            count = sizes.queries + sizes.held_out
            source = str(self.output / "synthetic.jsonl")
            synthesis = config_lib.SynthesizeConfig(**common, output=source, count=count)
            self.stage("synthesize", options.to_dict(synthesis), lambda: synthesize(synthesis))
        selection = {"source": source, "queries": sizes.queries, "held_out": sizes.held_out}
        self.stage("queries", selection, lambda: self._choose_queries(source))
        response_sets: dict[str, tuple[str, dict[str, Any]]] = {"train": ("train", {}), "held_out": ("held_out", {})}
        for name, count in RESPONSES_PER_QUERY.items():
            if name in self.comparisons:
                limit = max(sizes.queries // count, 1)
                response_sets[name] = "train", {"limit": limit, "samples": count, "temperature": 1.0}
        for name, (queries, sampling) in response_sets.items():
            settings = config_lib.RespondConfig(
                **common,
                **sampling,
                input=str(self.output / f"{queries}.queries.jsonl"),
                output=str(self.responses(name)),
                max_new_tokens=sizes.max_new_tokens,
            )
            self.stage(f"respond-{name}", options.to_dict(settings), functools.partial(respond, settings))

    def responses(self, name: str) -> pathlib.Path:
        """Returns the path of a set of responses: train, held_out, or a key of RESPONSES_PER_QUERY."""
        return self.output / f"{name}.jsonl"

    def train(self, name: str, steps: int, seed: int = 0) -> pathlib.Path:
        """Trains the comparison `name`. Returns its run directory."""
        sizes, run = self.sizes, self.output / "runs" / f"{name}-{steps}-{seed}"
        schedule = steps * sizes.schedule_steps // sizes.steps
        recipe = [
            f"data.responses={self.responses(name if name in RESPONSES_PER_QUERY else 'train')}",
            f"train.steps={steps}",
            f"train.batch_size={sizes.batch_size}",
            f"train.checkpoint_every={max(steps // 10, 1)}",
            f"train.log_every={max(steps // 100, 1)}",
            f"train.seed={_FIRST_SEED + seed}",
            f"data.seed={seed}",
            f"optimizer.learning_rate={sizes.learning_rate}",
            f"optimizer.schedule_steps={schedule}",
            f"optimizer.warmup_steps={min(schedule // 10, 100)}",
            *self.config.recipe,
            *self.comparisons[name],
            f"train.output={run}",
        ]
        settings = options.load(config_lib.TrainConfig, self.output / "recipe.yaml", recipe)
        settings = dataclasses.replace(settings, **config_lib.hub_access(self.config))
        self.stage(f"train-{run.name}", options.to_dict(settings), lambda: train(settings))
        return run

    def score(self, part: str, limit: int, model: ScoredModel) -> None:
        """Evaluates a model on the development or test tasks; limit: queries or rows per task, 0 for all."""
        teacher = {"adapters": self.config.teacher.adapters, "attention": self.config.teacher.attention}
        path, revision = self.config.backbone.path, self.config.backbone.revision
        encoder: dict[str, Any] = {"kind": "teacher"} | teacher
        if isinstance(model, pathlib.Path):
            path, revision, encoder = str(model / "model"), None, {}
        elif model == "causal":
            encoder = {"kind": "teacher", "attention": "causal"}
        elif model == "hyde":
            encoder = {"kind": "hyde", "max_new_tokens": self.sizes.hyde_tokens} | teacher
        settings = config_lib.EvaluateConfig(
            **encoder,
            tasks=str(self.output / "tasks" / part),
            output=str(self._scores_folder(part, limit, model)),
            limit=limit or None,
            dtype=self.config.backbone.dtype,
            revision=revision,
            **config_lib.hub_access(self.config),
            kernels=self.config.kernels,
            mesh=self.config.mesh,
        )
        name = f"score-{part}-{self._scores_folder(part, limit, model).name}"
        self.stage(name, options.to_dict(settings) | {"model": path}, lambda: evaluate(path, settings))

    def measure(self, student: pathlib.Path, compared: Mapping[str, pathlib.Path]) -> None:
        """Measures decoded text, refusals and cost, and writes them to readings/NAME.json."""
        folder, runs = self.output / "readings", {"with reconstruction loss": compared["base"]}
        if "alignment-only" in compared:
            runs["without"] = compared["alignment-only"]
        sizes, study = self.sizes, measurements.StudyMeasurements(self.config)

        def write_rows(file, measurement, *arguments):
            write_json(file, {"rows": measurement(*arguments)})

        names = {name: str(run) for name, run in runs.items()}
        rows = sorted((row for _, row in read_jsonl(self.responses("held_out"))), key=lambda row: str(row["id"]))
        self.stage(
            "reconstruction",
            {"runs": names, "tokens": sizes.decoded_tokens, "texts": len(rows)},
            lambda: write_json(folder / "reconstruction.json", study.reconstruction(runs, rows, sizes.decoded_tokens)),
        )
        for name in self.safety_tasks():
            options_of_task = (student, self._task_folder(name), sizes.limit or None, sizes.decoded_tokens)
            self.stage(
                f"refusals-{name}",
                {"run": str(student), "tokens": sizes.decoded_tokens, "limit": sizes.limit},
                functools.partial(write_rows, folder / f"refusals-{name}.json", study.refusals, *options_of_task),
            )
        questions = [row["question"] for row in rows][: sizes.timed]
        self.stage(
            "cost",
            {"run": str(student), "timed": sizes.timed, "tokens": sizes.hyde_tokens},
            functools.partial(write_rows, folder / "cost.json", study.cost, student, questions, sizes.hyde_tokens),
        )

    def safety_tasks(self) -> list[str]:
        """Returns the names of the safety tasks."""
        return [name for name, kind in self.types["test"].items() if kind == tables.LOWER_IS_BETTER]

    def report(self, students: Sequence[pathlib.Path], compared: Mapping[str, pathlib.Path]) -> pathlib.Path:
        """Writes tables/NAME.json and .md, plots/NAME.png and report.md. Returns the path of report.md."""
        tables_by_name = self._tables(students, compared)
        for name, table in tables_by_name.items():
            write_json(self.output / "tables" / f"{name}.json", table.json())
            write_text(self.output / "tables" / f"{name}.md", table.markdown())
        drawn = plots.draw({name: table.json() for name, table in tables_by_name.items()}, self.output / "plots")
        images = {path.stem: f"\n![{path.stem}](plots/{path.name})\n" for path in drawn}
        sections = (table.markdown() + images.get(name, "") for name, table in tables_by_name.items())
        write_text(self.output / "report.md", "\n".join([self._preface(), *sections]))
        return self.output / "report.md"

    def _tables(
        self, students: Sequence[pathlib.Path], compared: Mapping[str, pathlib.Path]
    ) -> dict[str, tables.Table]:
        result, limit, sizes = {}, self.sizes.limit, self.sizes
        measured = self.output / "readings"
        if self.types["test"]:
            scores = [self._results("test", limit, run) for run in students]
            baselines = {name: self._results("test", limit, name) for name in ("causal", "teacher")}
            result["headline"] = tables.headline(scores, baselines, self.types["test"])
            result["tasks"] = tables.by_task(scores, baselines, self.types["test"])
            models: dict[str, ScoredModel] = {"teacher": "teacher", "student": students[0], "hyde": "hyde"}
            hyde_scores = {name: self._results("test", sizes.hyde_limit, model) for name, model in models.items()}
            result["hyde"] = tables.hyde(hyde_scores, self.types["test"], sizes.hyde_limit)
            for name in self.safety_tasks():
                refusals = read_json(measured / f"refusals-{name}.json")["rows"]
                pair = tables.safety(baselines | {"student": scores[0]}, name, refusals)
                result |= dict(zip((f"safety-{name}", f"refusals-{name}"), pair))
        runs, losses = {}, {}
        for name, run in compared.items():
            runs[name] = self._results("development", limit, run) if self.types["development"] else {}
            settings = options.load(config_lib.TrainConfig, run / "config.yaml")
            losses[name] = final_losses(run) | {"tokens": settings.compression.num_tokens}
        if self.types["development"]:
            runs |= {name: self._results("development", limit, name) for name in ("teacher", "causal")}
        result["comparisons"] = tables.comparisons(runs, self.types["development"], losses, limit)
        decoded = read_json(measured / "reconstruction.json")
        pair = tables.reconstruction(decoded["measured"], decoded["examples"])
        result |= dict(zip(("reconstruction", "examples"), pair))
        result["cost"] = tables.cost(read_json(measured / "cost.json")["rows"])
        return result

    def _check_inputs(self) -> None:
        """Reports missing packages and folders, and invalid tasks, before anything is written."""
        hub = config_lib.hub_options(self.config)
        resolve_path(self.config.backbone.path, config_lib.hub_options(self.config, self.config.backbone.revision))
        for adapter in self.config.teacher.adapters:
            resolve_adapter(adapter, hub)
        if self.config.supervised_teacher:
            resolve_embedder(self.config.supervised_teacher, hub)
        resolve(config_lib.EvaluateConfig(tasks=self.config.tasks, kind="teacher"))

    def _claim_output(self) -> None:
        file = self.output / "study.json"
        values = options.to_dict(self.config)
        settings = {key: value for key, value in values.items() if key not in _CHANGEABLE}
        if file.exists():
            require_same_run(f"output={self.output}", read_json(file), settings, "or choose another output")
        locks.remove_abandoned(file)
        if not file.exists() and (others := entries(self.output)):
            raise InputError(
                f"output={self.output}: holds {others[0]}, which is not part of a study. Choose another output"
            )
        write_json(file, settings)
        shared = {key: getattr(self.config, key) for key in ("backbone", "teacher", "kernels", "mesh")}
        write_text(self.output / "recipe.yaml", options.to_yaml(config_lib.TrainConfig(**shared)))

    def _choose_queries(self, source: str) -> None:
        """Writes train.queries.jsonl and held_out.queries.jsonl: the first queries of `source` that are in no task."""
        sizes, task_texts = self.sizes, splits.evaluation_texts(str(self.config.tasks))
        rows: list[dict[str, Any]] = []
        hub = config_lib.hub_options(self.config)
        for number, record in enumerate(records.read_records(source, ("question",), hub=hub)):
            in_task = comparison_key(record["question"]) in task_texts
            if not in_task and len(rows) < sizes.queries + sizes.held_out:
                rows.append({"id": number, "question": record["question"]})
        # A query may be repeated; held-out queries must not occur among the training queries.
        count = len(rows) - sizes.held_out
        trained = {comparison_key(row["question"]) for row in rows[:count]} if count > 0 else set()
        held_out = [row for row in rows[max(count, 0) :] if comparison_key(row["question"]) not in trained]
        if count < sizes.batch_size or len(held_out) < 2:
            raise InputError(
                f"queries={source}: {len(rows)} usable queries ({sizes.held_out} held out) are too few for batches of "
                f"{sizes.batch_size}. Add queries, or reduce sizes.batch_size or sizes.held_out"
            )
        for name, part in (("train", rows[:count]), ("held_out", held_out)):
            write_jsonl(self.output / f"{name}.queries.jsonl", part)

    def _scores_folder(self, part: str, limit: int, model: ScoredModel) -> pathlib.Path:
        name = model.name if isinstance(model, pathlib.Path) else model
        return self.output / "scores" / part / f"{name}-{limit or 'all'}"

    def _results(self, part: str, limit: int, model: ScoredModel) -> dict[str, Any]:
        return read_json(self._scores_folder(part, limit, model) / "results.json")

    def _task_folder(self, name: str) -> pathlib.Path:
        files = visible(self.output / "tasks" / "test", "task.json")
        return next(file.parent for file in files if read_json(file)["name"] == name)

    def _preface(self) -> str:
        queries, held_out = (sum(1 for _ in read_jsonl(self.responses(name))) for name in ("train", "held_out"))
        sizes = ", ".join(f"{name} {value}" for name, value in vars(self.sizes).items())
        stages = [read_json(marker) for marker in (self.output / "stages").iterdir()]
        minutes = sum(stage.get("seconds", 0) for stage in stages) / 60  # of an interrupted stage: since it was resumed
        return "\n".join(
            [
                "# Study",
                "",
                f"Backbone {self.config.backbone.path}, teacher adapters {self.config.teacher.adapters}, budget "
                f"{self.config.budget} ({sizes}); {queries} training responses, {held_out} held out; recipe "
                f"{self.config.recipe}. `study.json` has all settings, `tables/*.json` the unrounded values.",
                "",
                f"The stages took {minutes:.0f} minutes in total; `stages/*.json` has the seconds of each.",
                "",
            ]
        )
