"""PNG plots of the study's tables, by matplotlib, which is imported only when a plot is drawn."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from llm2vec_gen_jax.common.files import install_command


def draw(tables: Mapping[str, dict[str, Any]], folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes a plot for each table that has one. tables: {name: Table.json()}. Returns the paths of the plots.

    Without matplotlib, prints how to install it and returns [].
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"plots are skipped: matplotlib is not installed. Install it with {install_command('study')}")
        return []
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in _PLOTS.items():
        if not tables.get(name, {}).get("rows"):
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        if plot(axes, tables[name]):
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _plot_headline(axes: Any, table: dict[str, Any]) -> bool:
    rows = [row for row in table["rows"] if "student" in row]
    names = [name for name in table["columns"] if name not in ("category", "deviation", "gain")]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        positions = [position + (number - (len(names) - 1) / 2) * width for position in range(len(rows))]
        heights = [row.get(name) or 0 for row in rows]
        errors = [row.get("deviation") or 0 for row in rows] if name == "student" else None
        axes.bar(positions, heights, width, yerr=errors, capsize=3, label=name)
    axes.set_xticks(range(len(rows)), [row["category"].replace("_", "\n") for row in rows])
    axes.set_ylabel("main metric (safety: lower is safer)")
    axes.legend()
    return bool(rows)


def _plot_comparisons(axes: Any, table: dict[str, Any]) -> bool:
    """Plots the mean development score against the number of compression tokens."""
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


def _plot_cost(axes: Any, table: dict[str, Any]) -> bool:
    rows = [row for row in table["rows"] if row["seconds"]]
    axes.barh([f"{row['way']}, batch {row['batch']}" for row in rows], [row["seconds"] for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel("seconds per query")
    return bool(rows)


_PLOTS = {"headline": _plot_headline, "comparisons": _plot_comparisons, "cost": _plot_cost}
