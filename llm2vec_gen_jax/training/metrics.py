"""Training records: metrics.jsonl, TensorBoard events and a tracked run, written by process 0."""

import json

from tensorboardX import SummaryWriter

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.files import removed, write_text
from llm2vec_gen_jax.common.jsonl import read_jsonl
from llm2vec_gen_jax.training.tracking import Tracker


class MetricsWriter:
    """Appends one record per logged step. On resuming, records after the restored step are dropped first."""

    def __init__(self, folder, first_step, tracking=None, config=None):
        """tracking: None | wandb | trackio, for which `config` is the whole run's, as a dict."""
        self.path, last = folder / "metrics.jsonl", 0
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8")
            whole = lines[: lines.rfind("\n") + 1]
            rows = [json.loads(line) for line in whole.splitlines()]
            last = max((row["step"] for row in rows), default=0)
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= first_step))
        self.tracker = Tracker(tracking, folder, config, last) if tracking else None
        self.file = open(self.path, "a", encoding="utf-8")
        # No limit to the queue: on a full disk the writing thread is gone, and whoever puts into a full queue hangs.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1, flush_secs=10, max_queue=0)

    def write(self, record):
        """Writes a dict with `step` and numbers. Raises OSError where the file was removed or replaced."""
        if self.tracker:
            self.tracker.write(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if not locks.is_at(self.file.fileno(), self.path):
            raise removed(self.path)
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(f"train/{name}", value, record["step"])

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if self.tracker:
            self.tracker.finish(failed=error is not None)
        if error is None:  # on a full disk closing would fail once more, or wait for the thread that is gone
            self.file.close()
            self.board.close()


def read_metrics(folder):
    """Returns the records of a run directory."""
    return [row for _, row in read_jsonl(folder / "metrics.jsonl")]
