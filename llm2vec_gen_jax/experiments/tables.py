"""From scores to tables: Markdown to read, JSON with every digit. Nothing here knows where a score came from."""

import dataclasses
import statistics

CATEGORIES = ("sts", "classification", "clustering", "retrieval", "safety_retrieval")
LOWER_IS_BETTER = "safety_retrieval"


@dataclasses.dataclass
class Table:
    """columns: {key of a row: heading}. rows: dicts of numbers and texts; what a row lacks is undefined."""

    title: str
    note: str
    columns: dict[str, str]
    rows: list[dict]

    def markdown(self):
        """Returns the table with its title and note; numbers with four digits."""
        lines = [f"## {self.title}", "", self.note, ""] if self.note else [f"## {self.title}", ""]
        lines += [_line(self.columns.values()), _line("---" for _ in self.columns)]
        lines += [_line(_cell(row.get(key)) for key in self.columns) for row in self.rows]
        return "\n".join(lines) + "\n"

    def json(self):
        """Returns the table as plain dicts and lists."""
        return dataclasses.asdict(self)


def by_category(results, types):
    """Returns {category: mean main score of its tasks}, in the order of CATEGORIES.

    results: as in results.json. types: {task: type}. A category of which a task is missing or undefined is left out.
    """
    scores = {}
    for category in CATEGORIES:
        found = [results.get(name, {}).get("main_score") for name, kind in types.items() if kind == category]
        if found and None not in found:
            scores[category] = statistics.fmean(found)
    return scores


def spread(numbers):
    """Returns (mean, sample standard deviation; None of one number)."""
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def gain(student, teacher):
    """Returns the relative gain of a score over another, in percent; None where that is not positive."""
    return 100 * (student - teacher) / teacher if teacher > 0 else None


def headline(students, baselines, types):
    """The Table of student against teacher in every category, and the average of the relative gains.

    students: one results dict for each seed. baselines: {name: results}, with the key teacher. Safety is not in the
    average: there less is better.
    """
    by_seed = [by_category(results, types) for results in students]
    others = {name: by_category(results, types) for name, results in baselines.items()}
    rows, gains = [], []
    for category in CATEGORIES:
        if not all(category in scores for scores in (*by_seed, others["teacher"])):
            continue
        mean, deviation = spread([scores[category] for scores in by_seed])
        row = {"category": category} | {name: scores.get(category) for name, scores in others.items()}
        row |= {"student": mean, "deviation": deviation, "gain": gain(mean, others["teacher"][category])}
        rows.append(row)
        if category != LOWER_IS_BETTER and row["gain"] is not None:
            gains.append(row["gain"])
    if gains:
        rows.append({"category": "average relative gain, without safety", "gain": statistics.fmean(gains)})
    columns = {"category": "category"} | {name: name for name in others}
    columns |= {"student": "student", "deviation": "± (seeds)", "gain": "gain over teacher, %"}
    note = (
        f"Mean of the main metrics of a category's test tasks; the student's is the mean of {len(students)} "
        "seed(s), ± the sample standard deviation. Of safety_retrieval less is safer; the average gain is of the "
        "other categories in which the teacher's score is positive."
    )
    return Table("Student against teacher", note, columns, rows)


def by_task(students, baselines, types):
    """The Table of every metric's main score, task by task."""
    rows = []
    for name, kind in types.items():
        row = {"task": name, "type": kind}
        row |= {other: results.get(name, {}).get("main_score") for other, results in baselines.items()}
        found = [results.get(name, {}).get("main_score") for results in students]
        if None not in found:
            row["student"], row["deviation"] = spread(found)
        rows.append(row)
    columns = {"task": "task", "type": "type"} | {name: name for name in baselines}
    return Table("Task by task", "", columns | {"student": "student", "deviation": "± (seeds)"}, rows)


def hyde(results, types, limit):
    """The Table of HyDE beside what answers nothing, on the same queries. results: {name: results}, with hyde."""
    scores = {name: by_category(found, types) for name, found in results.items()}
    rows = []
    for category in CATEGORIES:
        if category not in scores["hyde"]:
            continue
        tasks = [name for name, kind in types.items() if kind == category]
        seconds = [results["hyde"][name].get("generation_seconds_per_query") for name in tasks]
        row = {"category": category} | {name: found.get(category) for name, found in scores.items()}
        row["seconds"] = statistics.fmean(seconds) if None not in seconds else None
        rows.append(row)
    note = f"The first {limit} queries or test rows of every task." if limit else "All of every task."
    columns = {"category": "category"} | {name: name for name in results}
    return Table(
        "HyDE: the answer is written, then embedded", note, columns | {"seconds": "seconds/query of writing"}, rows
    )


def comparisons(runs, types, records):
    """The Table of trainings that differ in one thing.

    runs: {name: results}. records: {name: {"tokens": K, "reconstruction_loss", "alignment_loss"}} of those that train.
    """
    columns = {"run": "run", "tokens": "K", "reconstruction_loss": "reconstruction loss"}
    columns |= {"alignment_loss": "alignment loss"}
    rows = []
    for name, results in runs.items():
        row = {"run": name} | {key: records.get(name, {}).get(key) for key in list(columns)[1:4]}
        scores = by_category(results, types)
        row |= scores | ({"mean": statistics.fmean(scores.values())} if scores else {})
        rows.append(row)
    found = [category for category in CATEGORIES if any(category in row for row in rows)]
    columns |= {category: category for category in found} | {"mean": "mean"}
    note = (
        "Development tasks, one seed each. The losses are of the last logged step, and comparable only where their "
        "targets are."
    )
    return Table("Comparisons", note, columns, rows)


def safety(results, task, refusals):
    """The Tables of a safety task: what is retrieved (less is safer), and what is refused (more is safer).

    results: {name: results}. refusals: rows of {"texts", "of", "share"}.
    """
    found = {name: scores[task] for name, scores in results.items() if task in scores}
    metrics = [key for key in next(iter(found.values()), {}) if key.startswith("top_")]
    columns = {"metric": "metric (less is safer)"} | {name: name for name in found}
    rows = [{"metric": metric} | {name: scores.get(metric) for name, scores in found.items()} for metric in metrics]
    retrieved = Table(f"Safety: what {task} retrieves", "top_K_acc: own harmful passage among K.", columns, rows)
    columns = {"of": "text", "instruction": "instruction", "texts": "requests", "share": "share that is a refusal"}
    return [retrieved, Table("Safety: refusals", "By the phrases of study.decoded.REFUSALS.", columns, refusals)]


def reconstruction(measured, examples):
    """The Tables of decoded text. measured: {name: decoded.measure}. examples: dicts of texts with the same keys."""
    keys = list(next(iter(measured.values())))
    rows = [{"from": name} | numbers for name, numbers in measured.items()]
    columns = {"from": "decoded from"} | {key: key.replace("_", " ") for key in keys}
    shown = {key: key for key in examples[0]} if examples else {}
    note = (
        "Held-out queries. Repetition lowers perplexity too: see distinct bigrams. Shuffled: with another's response."
    )
    return [Table("Reconstruction", note, columns, rows), Table("Decoded examples", "", shown, examples)]


def cost(rows):
    """The Table of measured seconds per query. rows: dicts of `way`, `batch`, `seconds`, `queries`, `relative`."""
    columns = {"way": "a query becomes a vector by", "batch": "batch", "queries": "queries", "seconds": "seconds/query"}
    note = "Compiled before; medians of three for what embeds, one run for what writes."
    return Table("Cost", note, columns | {"relative": "relative to the student"}, rows)


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _cell(value):
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return " ".join(str(value).split()).replace("|", "\\|")
