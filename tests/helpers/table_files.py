"""Rows written in every format that `data/tables.py` reads."""

import csv
import gzip
import io
import json

import datasets
import pyarrow
import pyarrow.parquet

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".arrow", "")


def write_table(path, rows):
    """Writes rows in the format of a path's suffix; without one, as a saved dataset. Returns the path."""
    table = pyarrow.Table.from_pylist(rows)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif path.name.endswith((".csv", ".csv.gz")):
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        content = file.getvalue()
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
        return path
    elif path.suffix == ".arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return path
    else:
        datasets.Dataset(table).save_to_disk(path)
        return path
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path
