"""Metrics: metrics.jsonl, validation.jsonl, TensorBoard events and experiment tracking, written by process 0."""

import json
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tensorboardX import SummaryWriter

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.files import removed, write_text
from llm2vec_gen_jax.common.jsonl import read_jsonl
from llm2vec_gen_jax.training.tracking import Tracker

VALIDATION = "validation.jsonl"


class MetricsWriter:
    """Appends one record per logged step, and per evaluated step. A resumed run drops those after the restored step."""

    def __init__(
        self,
        folder: pathlib.Path,
        first_step: int,
        tracking: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """tracking: None | wandb | trackio, which gets `config`, the complete configuration as a dict."""
        self.path, self.validation_path = folder / "metrics.jsonl", folder / VALIDATION
        last = _drop_after(self.path, first_step)
        last_validated = _drop_after(self.validation_path, first_step)
        self.tracker = Tracker(tracking, folder, config, last, last_validated) if tracking else None
        self.file = open(self.path, "a", encoding="utf-8")
        # An unlimited queue: on a full disk the writing thread ends, and a put into a full queue would block forever.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1, flush_secs=10, max_queue=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a dict with `step` and numbers. Raises OSError if the file was removed or replaced."""
        if self.tracker:
            self.tracker.write(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if not locks.is_at(self.file.fileno(), self.path):
            raise removed(self.path)
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(f"train/{name}", value, record["step"])

    def write_validation(self, record: Mapping[str, Any]) -> None:
        """Writes a dict with `step` and numbers to validation.jsonl."""
        if self.tracker:
            self.tracker.write(record, "validation")
        with open(self.validation_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(f"validation/{name}", value, record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.tracker:
            self.tracker.finish(failed=error is not None)
        if error is None:  # on a full disk closing would fail again, or wait forever for the ended thread
            self.file.close()
            self.board.close()


def _drop_after(path: pathlib.Path, step: int) -> int:
    """Removes the records after a step, and a partial line, from a file. Returns the last step that it had, or 0."""
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines[: lines.rfind("\n") + 1].splitlines()]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    return max((row["step"] for row in rows), default=0)


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a run directory."""
    return [row for _, row in read_jsonl(folder / "metrics.jsonl")]


def read_validation(folder: pathlib.Path, last_step: int) -> list[dict[str, Any]]:
    """Returns the records of the evaluations of a run directory up to a step."""
    path = folder / VALIDATION
    return [row for _, row in read_jsonl(path) if row["step"] <= last_step] if path.exists() else []
