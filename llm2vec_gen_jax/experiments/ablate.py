"""Ablations: several trainings, one after the other, and one table of what came out."""

import pathlib

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_json
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train


def ablate(files, configs, show_progress=True):
    """Trains each AblateConfig into its train.output/NAME, NAME being its file's. Returns the table of them all.

    What is finished is left as it is, what was interrupted goes on. Raises InputError for two files of one name.
    """
    folders = []
    for file, config in zip(files, configs, strict=True):
        options.require(config, "data.responses", "train.output")
        folder = pathlib.Path(config.train.output) / pathlib.Path(file).stem
        if folder in folders:
            raise InputError(f"{file}: another file has this name too, and {folder} can only be one run")
        folders.append(folder)
        config.train.output = str(folder)
    for number, (file, config) in enumerate(zip(files, configs), 1):
        print(f"{number} of {len(files)}: {file} -> {config.train.output}", flush=True)
        train(config, show_progress)
    return table(folders)


def table(folders):
    """Returns one line of text per run directory: its last losses, and the main scores where it was evaluated.

    The scores are those of `results.json`, which `python -m launch.evaluate MODEL output=RUN` writes.
    """
    rows, scores = [], []
    for folder in folders:
        last = read_metrics(folder)[-1]
        losses = ["loss", *(name for name in last if name.endswith("_loss"))]
        rows.append({"run": folder.name, "step": str(last["step"])} | {name: f"{last[name]:.4f}" for name in losses})
        results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
        scores.append({task: f"{metrics['main_score']:.4f}" for task, metrics in results.items()})
    columns = list(dict.fromkeys(name for row in (*rows, *scores) for name in row))
    rows = [row | score for row, score in zip(rows, scores)]
    cells = [columns] + [[row.get(name, "-") for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)
