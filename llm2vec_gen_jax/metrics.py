"""Training records: metrics.jsonl and TensorBoard events, written by process 0."""

import json

from tensorboardX import SummaryWriter

from llm2vec_gen_jax.files import read_jsonl, write_text


class MetricsWriter:
    """Appends one record per logged step. On resuming, records after the restored step are dropped first."""

    def __init__(self, folder, first_step):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8")
            whole = lines[: lines.rfind("\n") + 1]
            rows = [row for row in map(json.loads, whole.splitlines()) if row["step"] <= first_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = open(self.path, "a", encoding="utf-8")
        # No limit to the queue: on a full disk the writing thread is gone, and whoever puts into a full queue hangs.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1, flush_secs=10, max_queue=0)

    def write(self, record):
        """Writes a dict with `step` and numbers."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(f"train/{name}", value, record["step"])

    def close(self):
        """Closes both files."""
        self.file.close()
        self.board.close()


def read_metrics(folder):
    """Returns the records of a run directory."""
    return [row for _, row in read_jsonl(folder / "metrics.jsonl")]
