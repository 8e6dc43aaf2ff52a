"""Ablations: trains several configs in sequence and summarizes them in one table."""

import pathlib
from collections.abc import Sequence

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_json
from llm2vec_gen_jax.common.terminal import align_columns
from llm2vec_gen_jax.config import AblateConfig, options
from llm2vec_gen_jax.experiments.comparisons import final_losses
from llm2vec_gen_jax.training.train import train


def ablate(files: Sequence[str], configs: Sequence[AblateConfig], show_progress: bool = True) -> str:
    """Trains each config into its train.output/NAME, where NAME is the stem of its file. Returns the table of all runs.

    Finished runs are skipped and interrupted ones are resumed. Raises InputError for two files with the same stem.
    """
    folders: list[pathlib.Path] = []
    for file, config in zip(files, configs, strict=True):
        options.require(config)
        folder = pathlib.Path(str(config.train.output)) / pathlib.Path(file).stem
        if folder in folders:
            raise InputError(f"{file}: another config file has the same name, and both would train into {folder}")
        folders.append(folder)
        config.train.output = str(folder)
    for number, (file, config) in enumerate(zip(files, configs), 1):
        print(f"{number} of {len(files)}: {file} -> {config.train.output}", flush=True)
        train(config, show_progress)
    return table(folders)


def table(folders: Sequence[pathlib.Path]) -> str:
    """Returns one line of text per run directory: its final losses, and its main scores if it was evaluated.

    The scores are read from `results.json`, written by `python -m launch.evaluate MODEL output=RUN`.
    """
    rows, scores = [], []
    for folder in folders:
        losses = final_losses(folder)
        row = {"run": folder.name, "step": str(losses.pop("step"))}
        rows.append(row | {name: f"{value:.4f}" for name, value in losses.items()})
        results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
        found = {task: metrics["main_score"] for task, metrics in results.items()}
        scores.append({task: f"{score:.4f}" for task, score in found.items() if score is not None})
    columns = list(dict.fromkeys(name for row in (*rows, *scores) for name in row))
    return align_columns(
        [columns, *([(row | score).get(name, "-") for name in columns] for row, score in zip(rows, scores))]
    )
