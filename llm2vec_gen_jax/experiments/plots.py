"""Plots of the tables, PNG by matplotlib, which is imported only here and only when a plot is drawn."""

import pathlib
import re

from llm2vec_gen_jax.common.files import install_command


def draw(found, folder):
    """Writes a plot of each table that has one. found: {name: table as JSON}. Returns their paths; none without
    matplotlib, which is then said."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"plots are left out: {install_command('study')}")
        return []
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in _PLOTS.items():
        if not found.get(name, {}).get("rows"):
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        if plot(axes, found[name]):
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _headline(axes, table):
    rows = [row for row in table["rows"] if "student" in row]
    names = [name for name in table["columns"] if name not in ("category", "deviation", "gain")]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(rows))]
        heights = [row.get(name) or 0 for row in rows]
        errors = [row.get("deviation") or 0 for row in rows] if name == "student" else None
        axes.bar(places, heights, width, yerr=errors, capsize=3, label=name)
    axes.set_xticks(range(len(rows)), [row["category"].replace("_", "\n") for row in rows])
    axes.set_ylabel("main metric (safety: less is safer)")
    axes.legend()
    return rows


def _comparisons(axes, table):
    """The mean development score over the number of compression tokens."""
    points = {}
    for row in table["rows"]:
        if row.get("mean") is not None and re.fullmatch(r"base|tokens-\d+", row["run"]):
            points[row["tokens"]] = row["mean"]
    if len(points) < 2:
        return False
    axes.plot(sorted(points), [points[tokens] for tokens in sorted(points)], marker="o")
    axes.set_xscale("log")
    axes.set_xticks(sorted(points), [str(tokens) for tokens in sorted(points)])
    axes.minorticks_off()
    axes.set_xlabel("compression tokens")
    axes.set_ylabel("mean of development tasks")
    return True


def _cost(axes, table):
    rows = [row for row in table["rows"] if row["seconds"]]
    axes.barh([f"{row['way']}, batch {row['batch']}" for row in rows], [row["seconds"] for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel("seconds per query")
    return rows


_PLOTS = {"headline": _headline, "comparisons": _comparisons, "cost": _cost}
