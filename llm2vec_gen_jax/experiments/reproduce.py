"""The whole study from nothing: every stage resumes after a kill, and a finished one is skipped."""

import dataclasses
import pathlib

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError, nearest
from llm2vec_gen_jax.common.files import diff, read_json, visible, write_json, write_text
from llm2vec_gen_jax.common.jsonl import read_jsonl, write_jsonl
from llm2vec_gen_jax.config import BUDGETS, options
from llm2vec_gen_jax.data import records
from llm2vec_gen_jax.evaluation.evaluate import evaluate, resolve
from llm2vec_gen_jax.experiments import measurements, plots, splits, tables
from llm2vec_gen_jax.inference.respond import respond
from llm2vec_gen_jax.inference.synthesize import synthesize
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train

# What is compared: `key=value` of `train`, in the place of the recipe's.
PAPER = {
    "reconstruction-only": ["loss.alignment=0"],
    "alignment-only": ["loss.reconstruction=0"],
    **{f"tokens-{number}": [f"compression.num_tokens={number}"] for number in (1, 2, 5, 20, 50)},
    "thoughts-10": ["compression.num_thought_tokens=10"],
    "lora-8": ["lora.rank=8"],
}
SUPERVISED = "supervised-teacher"
# Not in the paper, and never part of a budget.
OWN = {
    "cosine": ["loss.alignment_function=cosine"],
    "centred": ["teacher.centre=true"],
    "centred-cosine": ["teacher.centre=true", "loss.alignment_function=cosine"],
    "half-whitened": ["teacher.whiten=0.5"],
    "whitened": ["teacher.whiten=1"],
    "sampled-4": ["teacher.average=true"],
    "ridge": ["train.ridge_examples=1000000"],  # at most one epoch
    "finished-only": ["data.finished_only=true"],
    "alignment-10": ["loss.alignment=10"],
    "reconstruction-10": ["loss.reconstruction=10"],
    "longer": [],
}
LENGTH = {"longer": 3}  # times the steps of the others
SAMPLED = {"sampled-4": 4}  # responses to each of as many fewer queries
PAID = {
    "minutes": ["alignment-only", "reconstruction-only", "tokens-1"],
    "hours": [name for name in PAPER if name != "lora-8"],
    "full": list(PAPER),
}
_FIRST_SEED = 42
# What may change when a study is resumed.
_FREE = ("output", "comparisons", "kernels", "mesh")


def reproduce(config):
    """Runs (or resumes) the study of a ReproduceConfig. Returns the path of its report, OUTPUT/report.md."""
    options.require(config, "tasks")
    if config.teacher.kind != "llm2vec" or config.teacher.path:
        raise InputError("the study's teacher is the backbone with teacher.adapters: leave teacher.kind and .path out")
    output = pathlib.Path(config.output)
    with locks.locked(output, "output"):
        output.mkdir(parents=True, exist_ok=True)
        return Study(config).run()


class Study:
    """A ReproduceConfig with its sizes filled in, and the folder in which its stages leave what they make."""

    def __init__(self, config):
        self.output = pathlib.Path(config.output)
        given = {key: value for key, value in vars(config.sizes).items() if value is not None}
        self.sizes = dataclasses.replace(BUDGETS[config.budget], **given)
        self.config = dataclasses.replace(config, sizes=self.sizes)
        self.arms = self._arms()
        self._claim()

    def run(self):
        """Runs the stages in their order. Returns the path of the report."""
        limits = (self.sizes.limit, self.sizes.hyde_limit)
        cut = {"documents": self.sizes.documents, "queries": max(limits) if all(limits) else 0}
        self.stage(
            "tasks",
            {"tasks": self.config.tasks} | cut,
            lambda: splits.split(self.config.tasks, self.output / "tasks", **cut),
        )
        self.types = {part: splits.types(self.output / "tasks" / part) for part in ("development", "test")}
        # What is not installed, or no task, is said before the work.
        resolve(config_lib.EvaluateConfig(tasks=self.config.tasks, kind="teacher"))
        self.write_data()
        students = [self.train("base", self.sizes.steps, seed) for seed in range(self.sizes.seeds)]
        compared = {name: self.train(name, self.sizes.ablation_steps * LENGTH.get(name, 1)) for name in self.arms}
        for part, runs in (("development", compared), ("test", dict(enumerate(students)))):
            if self.types[part]:
                for run in runs.values():
                    self.score(part, self.sizes.limit, run)
                self.score(part, self.sizes.limit, "teacher")
                self.score(part, self.sizes.limit, "causal")
        if self.types["test"]:
            for who in (students[0], "teacher", "hyde"):
                self.score("test", self.sizes.hyde_limit, who)
        self.read_out(students[0], compared)
        return self.report(students, compared)

    def stage(self, name, settings, make):
        """Calls make() unless it was done before with the same settings (JSON-like)."""
        marker = self.output / "stages" / f"{name}.json"
        if marker.exists() and read_json(marker) == {"settings": settings}:
            print(f"{name}: done before", flush=True)
            return
        print(f"\n{name}", flush=True)
        make()
        write_json(marker, {"settings": settings})

    def write_data(self):
        """Writes queries and responses, of those to train on and of those that are held out."""
        sizes, common = self.sizes, {"backbone": self.config.backbone, "mesh": self.config.mesh}
        common["kernels"] = self.config.kernels
        source = self.config.queries
        if source is None:
            count = sizes.queries + sizes.held_out
            source = str(self.output / "synthetic.jsonl")
            settings = config_lib.SynthesizeConfig(**common, output=source, count=count)
            self.stage("synthesize", options.to_dict(settings), lambda: synthesize(settings))
        wanted = {"source": source, "queries": sizes.queries, "held_out": sizes.held_out}
        self.stage("queries", wanted, lambda: self._choose_queries(source))
        asked = {"train": ("train", {}), "held_out": ("held_out", {})}
        for name, count in SAMPLED.items():
            if name in self.arms:
                limit = max(sizes.queries // count, 1)
                asked[name] = "train", {"limit": limit, "samples": count, "temperature": 1.0}
        for name, (queries, how) in asked.items():
            settings = config_lib.RespondConfig(
                **common,
                **how,
                input=str(self.output / f"{queries}.queries.jsonl"),
                output=str(self.responses(name)),
                max_new_tokens=sizes.max_new_tokens,
            )
            self.stage(f"respond-{name}", options.to_dict(settings), lambda settings=settings: respond(settings))

    def responses(self, name):
        """Returns the path of the responses `name` (train | held_out, or a comparison of SAMPLED)."""
        return self.output / f"{name}.jsonl"

    def train(self, name, steps, seed=0):
        """Trains a comparison, or base. Returns its run directory."""
        sizes, run = self.sizes, self.output / "runs" / f"{name}-{steps}-{seed}"
        schedule = steps * sizes.schedule_steps // sizes.steps
        recipe = [
            f"data.responses={self.responses(name if name in SAMPLED else 'train')}",
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
            *self.arms.get(name, []),
            f"train.output={run}",
        ]
        settings = options.load(config_lib.TrainConfig, self.output / "recipe.yaml", recipe)
        self.stage(f"train-{run.name}", options.to_dict(settings), lambda: train(settings))
        return run

    def score(self, part, limit, who):
        """Scores a run directory, or teacher, causal or hyde, on the views of `part`."""
        model = {"adapters": self.config.teacher.adapters, "attention": self.config.teacher.attention}
        path, kind = self.config.backbone.path, {"kind": "teacher"}
        if isinstance(who, pathlib.Path):
            path, kind, model = str(who / "model"), {}, {}
        elif who == "causal":
            model = {"attention": "causal"}
        elif who == "hyde":
            kind = {"kind": "hyde", "max_new_tokens": self.sizes.hyde_tokens}
        settings = config_lib.EvaluateConfig(
            **kind,
            **model,
            tasks=str(self.output / "tasks" / part),
            output=str(self._scores(part, limit, who)),
            limit=limit or None,
            dtype=self.config.backbone.dtype,
            kernels=self.config.kernels,
            mesh=self.config.mesh,
        )
        name = f"score-{part}-{self._scores(part, limit, who).name}"
        self.stage(name, options.to_dict(settings) | {"model": path}, lambda: evaluate(path, settings))

    def read_out(self, student, compared):
        """Measures decoded text, refusals and cost."""
        where, runs = self.output / "readings", {"with reconstruction loss": compared["base"]}
        if "alignment-only" in compared:
            runs["without"] = compared["alignment-only"]
        sizes, reader = self.sizes, measurements.Reader(self.config)
        names = {name: str(run) for name, run in runs.items()}
        rows = sorted((row for _, row in read_jsonl(self.responses("held_out"))), key=lambda row: str(row["id"]))
        self.stage(
            "reconstruction",
            {"runs": names, "tokens": sizes.decoded_tokens, "texts": len(rows)},
            lambda: write_json(where / "reconstruction.json", reader.reconstruction(runs, rows, sizes.decoded_tokens)),
        )
        for name in self.safety_tasks():
            self.stage(
                f"refusals-{name}",
                {"run": str(student), "tokens": sizes.decoded_tokens, "limit": sizes.limit},
                lambda name=name: write_json(
                    where / f"refusals-{name}.json",
                    {"rows": reader.refusals(student, self._view(name), sizes.limit or None, sizes.decoded_tokens)},
                ),
            )
        questions = [row["question"] for row in rows][: sizes.timed]
        self.stage(
            "cost",
            {"run": str(student), "timed": sizes.timed, "tokens": sizes.hyde_tokens},
            lambda: write_json(where / "cost.json", {"rows": reader.cost(student, questions, sizes.hyde_tokens)}),
        )

    def safety_tasks(self):
        """Returns the names of the safety tasks."""
        return [name for name, kind in self.types["test"].items() if kind == tables.LOWER_IS_BETTER]

    def report(self, students, compared):
        """Writes tables/NAME.json and .md, plots/NAME.png and report.md. Returns the path of the last."""
        found, limit, sizes = {}, self.sizes.limit, self.sizes
        readings_folder = self.output / "readings"
        if self.types["test"]:
            scores = [self._results("test", limit, run) for run in students]
            baselines = {name: self._results("test", limit, name) for name in ("causal", "teacher")}
            found["headline"] = tables.headline(scores, baselines, self.types["test"])
            found["tasks"] = tables.by_task(scores, baselines, self.types["test"])
            beside = {"teacher": "teacher", "student": students[0], "hyde": "hyde"}
            beside = {name: self._results("test", sizes.hyde_limit, who) for name, who in beside.items()}
            found["hyde"] = tables.hyde(beside, self.types["test"], sizes.hyde_limit)
            for name in self.safety_tasks():
                refusals = read_json(readings_folder / f"refusals-{name}.json")["rows"]
                pair = tables.safety(baselines | {"student": scores[0]}, name, refusals)
                found |= dict(zip((f"safety-{name}", f"refusals-{name}"), pair))
        runs, records = {}, {}
        for name, run in compared.items():
            runs[name] = self._results("development", limit, run) if self.types["development"] else {}
            made = options.load(config_lib.TrainConfig, run / "config.yaml")
            records[name] = read_metrics(run)[-1] | {"tokens": made.compression.num_tokens}
        if self.types["development"]:
            runs |= {name: self._results("development", limit, name) for name in ("teacher", "causal")}
        found["comparisons"] = tables.comparisons(runs, self.types["development"], records)
        decoded = read_json(readings_folder / "reconstruction.json")
        pair = tables.reconstruction(decoded["measured"], decoded["examples"])
        found |= dict(zip(("reconstruction", "examples"), pair))
        found["cost"] = tables.cost(read_json(readings_folder / "cost.json")["rows"])
        for name, table in found.items():
            write_json(self.output / "tables" / f"{name}.json", table.json())
            write_text(self.output / "tables" / f"{name}.md", table.markdown())
        drawn = plots.draw({name: table.json() for name, table in found.items()}, self.output / "plots")
        pictures = {path.stem: f"\n![{path.stem}](plots/{path.name})\n" for path in drawn}
        text = [self._preface(), *(table.markdown() + pictures.get(name, "") for name, table in found.items())]
        write_text(self.output / "report.md", "\n".join(text))
        return self.output / "report.md"

    def _arms(self):
        """Returns {name: words} of what is compared, base first."""
        known = PAPER | OWN
        if self.config.supervised_teacher:
            teacher = ["teacher.kind=sentence_transformers", f"teacher.path={self.config.supervised_teacher}"]
            known[SUPERVISED] = [*teacher, "teacher.adapters=[]"]
        arms = {"base": []}
        for entry in self.config.comparisons:
            name, colon, words = entry.partition(":")
            if entry == "budget":
                names = PAID[self.config.budget] + [SUPERVISED] * (SUPERVISED in known)
                arms |= {name: known[name] for name in names}
            elif colon and name.strip() and "/" not in name and name.strip() not in known | arms:
                arms[name.strip()] = words.split()
            elif not colon and name in known:
                arms[name] = known[name]
            elif not colon and name == SUPERVISED:
                raise InputError(f"comparisons={SUPERVISED} needs supervised_teacher=FOLDER_OR_HUB_ID")
            else:
                suggestion = nearest(name, [*known, "budget"])
                raise InputError(f"comparisons={entry}: no known one, nor a new 'NAME: key=value ...'{suggestion}")
        for words in (self.config.recipe, *arms.values()):
            options.load(config_lib.TrainConfig, None, words)  # a misspelt key is said before the work
        return arms

    def _claim(self):
        file = self.output / "study.json"
        values = options.to_dict(self.config)
        mine = {key: value for key, value in values.items() if key not in _FREE}
        if file.exists():
            if differing := diff(read_json(file), mine):
                raise InputError(
                    f"output={self.output}: holds another study ({differing}). Repeat its settings to resume it, or "
                    "choose another output"
                )
        locks.remove_abandoned(file)
        if not file.exists() and (others := [path.name for path in self.output.iterdir()]):
            raise InputError(f"output={self.output}: holds {others[0]}, which is of no study. Choose another output")
        write_json(file, mine)
        shared = {key: getattr(self.config, key) for key in ("backbone", "teacher", "kernels", "mesh")}
        write_text(self.output / "recipe.yaml", options.to_yaml(config_lib.TrainConfig(**shared)))

    def _choose_queries(self, source):
        """Writes train.queries.jsonl and held_out.queries.jsonl: the first of `source`, less what a task asks."""
        sizes, asked, rows = self.sizes, splits.questions(self.config.tasks), []
        for number, record in enumerate(records.read_records(source, ("question",), key="queries")):
            if splits.key(record["question"]) not in asked and len(rows) < sizes.queries + sizes.held_out:
                rows.append({"id": number, "question": record["question"]})
        # One query may be there many times; a held-out one must be new.
        chosen = len(rows) - sizes.held_out
        known = {splits.key(row["question"]) for row in rows[:chosen]} if chosen > 0 else set()
        held_out = [row for row in rows[max(chosen, 0) :] if splits.key(row["question"]) not in known]
        if chosen < sizes.batch_size or len(held_out) < 2:
            raise InputError(
                f"queries={source}: {len(rows)} usable queries, of which {sizes.held_out} are held out, are not enough "
                f"for batches of {sizes.batch_size}"
            )
        for name, part in (("train", rows[:chosen]), ("held_out", held_out)):
            write_jsonl(self.output / f"{name}.queries.jsonl", part)

    def _scores(self, part, limit, who):
        name = who.name if isinstance(who, pathlib.Path) else who
        return self.output / "scores" / part / f"{name}-{limit or 'all'}"

    def _results(self, part, limit, who):
        return read_json(self._scores(part, limit, who) / "results.json")

    def _view(self, name):
        files = visible(self.output / "tasks" / "test", "task.json")
        return next(file.parent for file in files if read_json(file)["name"] == name)

    def _preface(self):
        queries, held_out = (sum(1 for _ in read_jsonl(self.responses(name))) for name in ("train", "held_out"))
        sizes = ", ".join(f"{name} {value}" for name, value in vars(self.sizes).items())
        return "\n".join(
            [
                "# Study",
                "",
                f"Backbone {self.config.backbone.path}, teacher adapters {self.config.teacher.adapters}, budget "
                f"{self.config.budget} ({sizes}); {queries} responses to train on, {held_out} held out; recipe "
                f"{self.config.recipe}. `study.json` has every setting, `tables/` every digit.",
                "",
            ]
        )
