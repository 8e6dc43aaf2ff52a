"""PNG plots of the study's tables, by matplotlib, which is imported only when a plot is drawn."""

import pathlib
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
        errors = [row.get("deviation") for row in rows] if name == "student" else [None]
        spread = None if None in errors else errors
        bars = axes.bar(positions, heights, width, yerr=spread, capsize=3, label=name)
        axes.bar_label(bars, [f"{height:.2f}" for height in heights], padding=2, fontsize=8)
    axes.set_xticks(range(len(rows)), [row["category"].replace("_", "\n") for row in rows])
    axes.set_ylabel("main metric (safety: lower is safer)")
    axes.legend()
    return bool(rows)


def _plot_comparisons(axes: Any, table: dict[str, Any]) -> bool:
    """Plots the mean development score of each run, from 0, so that small differences look small."""
    rows = [row for row in table["rows"] if row.get("mean") is not None]
    bars = axes.barh([row["run"] for row in rows], [row["mean"] for row in rows])
    axes.bar_label(bars, [f"{row['mean']:.3f}" for row in rows], padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("mean of development tasks")
    return bool(rows)


def _plot_cost(axes: Any, table: dict[str, Any]) -> bool:
    rows = [row for row in table["rows"] if row["seconds"]]
    bars = axes.barh([f"{row['way']}, batch {row['batch']}" for row in rows], [row["seconds"] for row in rows])
    axes.bar_label(bars, [f"{row['seconds']:.3f}" for row in rows], padding=3)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per query")
    return bool(rows)


_PLOTS = {"headline": _plot_headline, "comparisons": _plot_comparisons, "cost": _plot_cost}
