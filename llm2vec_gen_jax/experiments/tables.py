"""Tables of the study, as Markdown with rounded values and as JSON with unrounded ones."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CATEGORIES = ("sts", "classification", "clustering", "retrieval", "safety_retrieval")
LOWER_IS_BETTER = "safety_retrieval"
Results = Mapping[str, Mapping[str, Any]]  # {task: {"main_score": x, metric: value, ...}}, as in results.json


@dataclasses.dataclass
class Table:
    """columns: {row key: heading}. rows: dicts of numbers and texts; a missing or None value is undefined."""

    title: str
    note: str
    columns: dict[str, str]
    rows: list[dict[str, Any]]

    def markdown(self) -> str:
        """Returns the title, the note and the table, numbers rounded to four decimals."""
        lines = [f"## {self.title}", "", self.note, ""] if self.note else [f"## {self.title}", ""]
        lines += [_line(self.columns.values()), _line("---" for _ in self.columns)]
        lines += [_line(_cell(row.get(key)) for key in self.columns) for row in self.rows]
        return "\n".join(lines) + "\n"

    def json(self) -> dict[str, Any]:
        """Returns the table as plain dicts and lists."""
        return dataclasses.asdict(self)


def by_category(results: Results, types: Mapping[str, str]) -> dict[str, float]:
    """Returns {category: mean main score of its tasks}, in the order of CATEGORIES.

    types: {task: type}. Categories with a missing or undefined score are omitted.
    """
    means = {}
    for category in CATEGORIES:
        scores: list[Any] = [
            results.get(name, {}).get("main_score") for name, kind in types.items() if kind == category
        ]
        if scores and None not in scores:
            means[category] = statistics.fmean(scores)
    return means


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample standard deviation, None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def gain(student: float, teacher: float) -> float | None:
    """Returns the relative gain over the teacher's score in percent; None if that score is not positive."""
    return 100 * (student - teacher) / teacher if teacher > 0 else None


def headline(students: Sequence[Results], baselines: Mapping[str, Results], types: Mapping[str, str]) -> Table:
    """Returns the table of student against teacher by category, with the average relative gain.

    students: results per seed. baselines: {name: results}, including "teacher". Safety, where lower is better, is not
    in the average.
    """
    by_seed = [by_category(results, types) for results in students]
    others = {name: by_category(results, types) for name, results in baselines.items()}
    rows: list[dict[str, Any]] = []
    gains = []
    for category in CATEGORIES:
        if not all(category in scores for scores in (*by_seed, others["teacher"])):
            continue
        mean, deviation = mean_and_deviation([scores[category] for scores in by_seed])
        row: dict[str, Any] = {"category": category} | {name: scores.get(category) for name, scores in others.items()}
        row |= {"student": mean, "deviation": deviation, "gain": gain(mean, others["teacher"][category])}
        rows.append(row)
        if category != LOWER_IS_BETTER and row["gain"] is not None:
            gains.append(row["gain"])
    if gains:
        rows.append({"category": "average relative gain, without safety", "gain": statistics.fmean(gains)})
    columns = {"category": "category"} | {name: name for name in others}
    columns |= {"student": "student", "deviation": "± (seeds)", "gain": "gain over teacher, %"}
    note = (
        f"Mean of the main metrics of a category's test tasks; for the student, the mean over {len(students)} "
        "seed(s) ± the sample standard deviation. For safety_retrieval, lower is safer; the average gain is over the "
        "other categories with a positive teacher score."
    )
    return Table("Student against teacher", note, columns, rows)


def by_task(students: Sequence[Results], baselines: Mapping[str, Results], types: Mapping[str, str]) -> Table:
    """Returns the table of main scores by task."""
    rows = []
    for name, kind in types.items():
        row: dict[str, Any] = {"task": name, "type": kind}
        row |= {other: results.get(name, {}).get("main_score") for other, results in baselines.items()}
        scores: list[Any] = [results.get(name, {}).get("main_score") for results in students]
        if None not in scores:
            row["student"], row["deviation"] = mean_and_deviation(scores)
        rows.append(row)
    columns = {"task": "task", "type": "type"} | {name: name for name in baselines}
    return Table("Main scores by task", "", columns | {"student": "student", "deviation": "± (seeds)"}, rows)


def hyde(results: Mapping[str, Results], types: Mapping[str, str], limit: int) -> Table:
    """Returns the table of HyDE and the models that generate nothing, on the same queries.

    results: {name: results}, including "hyde". limit: queries or test rows per task, 0 for all.
    """
    scores = {name: by_category(values, types) for name, values in results.items()}
    rows = []
    for category in CATEGORIES:
        if category not in scores["hyde"]:
            continue
        tasks = [name for name, kind in types.items() if kind == category]
        seconds: list[Any] = [results["hyde"][name].get("generation_seconds_per_query") for name in tasks]
        row: dict[str, Any] = {"category": category} | {name: means.get(category) for name, means in scores.items()}
        row["seconds"] = statistics.fmean(seconds) if None not in seconds else None
        rows.append(row)
    note = f"The first {limit} queries or test rows of every task." if limit else "All rows of every task."
    columns = {"category": "category"} | {name: name for name in results}
    columns["seconds"] = "generation, seconds/query"
    return Table("HyDE: the generated answer is embedded", note, columns, rows)


def comparisons(
    runs: Mapping[str, Results], types: Mapping[str, str], records: Mapping[str, Mapping[str, Any]], limit: int
) -> Table:
    """Returns the table of the comparisons.

    runs: {name: results}. records: {name: {"tokens": K, "reconstruction_loss", "alignment_loss"}} of trained models.
    limit: queries or test rows per task, 0 for all.
    """
    columns = {"run": "run", "tokens": "K", "reconstruction_loss": "reconstruction loss"}
    columns |= {"alignment_loss": "alignment loss"}
    rows = []
    for name, results in runs.items():
        row: dict[str, Any] = {"run": name} | {key: records.get(name, {}).get(key) for key in list(columns)[1:4]}
        scores = by_category(results, types)
        row |= scores | ({"mean": statistics.fmean(scores.values())} if scores else {})
        rows.append(row)
    columns |= {category: category for category in CATEGORIES if any(category in row for row in rows)}
    columns["mean"] = "mean"
    note = (
        "Development tasks, one seed each. Losses are those of the last logged step; they are comparable only between "
        "runs with the same targets."
    )
    if limit:  # 2 sqrt(p (1 - p) / limit) with p = 1/2
        note += (
            f" With {limit} queries or test rows per task, two standard errors of an accuracy are up to "
            f"{1 / math.sqrt(limit):.2f}: smaller differences are no differences at this size."
        )
    return Table("Comparisons", note, columns, rows)


def safety(results: Mapping[str, Results], task: str, refusals: list[dict[str, Any]]) -> list[Table]:
    """Returns the tables of a safety task: harmful retrieval (lower is safer) and refusals (higher is safer).

    results: {name: results}. refusals: rows of StudyMeasurements.refusals.
    """
    scores = {name: values[task] for name, values in results.items() if task in values}
    metrics = [key for key in next(iter(scores.values()), {}) if key.startswith("top_")]
    columns = {"metric": "metric (lower is safer)"} | {name: name for name in scores}
    rows = [{"metric": metric} | {name: values.get(metric) for name, values in scores.items()} for metric in metrics]
    note = "top_K_acc: the top K include the query's own harmful passage."
    retrieval = Table(f"Safety: harmful retrieval on {task}", note, columns, rows)
    columns = {"of": "text", "instruction": "instruction", "texts": "requests", "share": "share of refusals"}
    return [retrieval, Table("Safety: refusals", "By the phrases of text_metrics.REFUSALS.", columns, refusals)]


def reconstruction(measured: Mapping[str, Mapping[str, float | None]], examples: list[dict[str, Any]]) -> list[Table]:
    """Returns the tables of decoded text and of examples.

    measured: {name: text_metrics.measure(...)}. examples: dicts of texts with the same keys.
    """
    keys = list(next(iter(measured.values())))
    rows = [{"from": name} | dict(values) for name, values in measured.items()]
    columns = {"from": "decoded from"} | {key: key.replace("_", " ") for key in keys}
    example_columns = {key: key for key in examples[0]} if examples else {}
    note = (
        "Held-out queries. Repetition also lowers perplexity: compare distinct bigrams. Shuffled: against the response "
        "to another query."
    )
    return [Table("Reconstruction", note, columns, rows), Table("Decoded examples", "", example_columns, examples)]


def cost(rows: list[dict[str, Any]]) -> Table:
    """Returns the table of seconds per query. rows: those of StudyMeasurements.cost."""
    columns = {"way": "encoder", "batch": "batch", "queries": "queries", "seconds": "seconds/query"}
    note = "Without compilation; medians of three runs for student and teacher, one run for HyDE."
    return Table("Cost", note, columns | {"relative": "relative to the student"}, rows)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return " ".join(str(value).split()).replace("|", "\\|")
