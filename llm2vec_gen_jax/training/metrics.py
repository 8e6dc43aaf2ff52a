"""Training metrics: metrics.jsonl, TensorBoard events and experiment tracking, written by process 0."""

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


class MetricsWriter:
    """Appends one record per logged step. A resumed run drops the records after the restored step."""

    def __init__(
        self,
        folder: pathlib.Path,
        first_step: int,
        tracking: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """tracking: None | wandb | trackio, which gets `config`, the complete configuration as a dict."""
        self.path, last = folder / "metrics.jsonl", 0
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8")
            complete = lines[: lines.rfind("\n") + 1]
            rows = [json.loads(line) for line in complete.splitlines()]
            last = max((row["step"] for row in rows), default=0)
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= first_step))
        self.tracker = Tracker(tracking, folder, config, last) if tracking else None
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


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a run directory."""
    return [row for _, row in read_jsonl(folder / "metrics.jsonl")]
