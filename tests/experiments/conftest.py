"""Tasks of every type, and the arguments of a small study."""

import pytest

from tests.conftest import write_jsonl
from tests.helpers.adapters import LORA, write_adapter
from tests.helpers.commands import rows_of
from tests.helpers.tasks import TYPES, write_task

SIZES = {
    "queries": 8,
    "held_out": 3,
    "max_new_tokens": 12,
    "steps": 3,
    "schedule_steps": 3,
    "ablation_steps": 3,
    "batch_size": 8,
    "seeds": 2,
    "limit": 6,
    "documents": 0,
    "hyde_limit": 4,
    "hyde_tokens": 8,
    "decoded_tokens": 8,
    "timed": 2,
}


@pytest.fixture(scope="module")
def task_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for kind in TYPES:
        write_task(folder / kind, kind)
    write_task(folder / "dev", "sts", "SmallDev")
    for name in ("queries", "corpus"):  # make the texts different from those of other tasks
        file = folder / "safety_retrieval" / f"{name}.jsonl"
        write_jsonl(file, [row | {"text": f"forbidden {row['text'].strip()}"} for row in rows_of(file)])
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_folder, tmp_path_factory):
    """Arguments of a study of the tiny LLM, without tasks and output."""
    folder = tmp_path_factory.mktemp("teacher")
    adapter = write_adapter(folder / "adapter", LORA, {(layer, "mlp.up_proj"): 4 for layer in range(3)})
    rows = [{"question": f"question {number} of {number * number}?"} for number in range(11)]
    queries = write_jsonl(folder / "queries.jsonl", rows)
    sizes = [f"sizes.{name}={value}" for name, value in SIZES.items()]
    return [f"backbone.path={tiny_folder('qwen2')}", f"teacher.adapters=[{adapter}]", f"queries={queries}", *sizes]
