"""Task instructions by task name: the published ones (configs/evaluate/published.yaml) and those of a user's file."""

import dataclasses
import pathlib
from typing import Any

from llm2vec_gen_jax.common.errors import InputError, nearest
from llm2vec_gen_jax.common.files import SHIPPED, shipped
from llm2vec_gen_jax.common.yaml_files import read_yaml

PUBLISHED = SHIPPED / "configs" / "evaluate" / "published.yaml"


@dataclasses.dataclass(frozen=True)
class Instructions:
    """query: by task name. document: for the documents of all tasks. benchmarks: named sets of hub tasks."""

    query: dict[str, str] = dataclasses.field(default_factory=dict)
    document: str | None = None
    benchmarks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def override(self, other: "Instructions") -> "Instructions":
        """Returns `other` updated with these instructions."""
        document = other.document if self.document is None else self.document
        return Instructions(other.query | self.query, document, other.benchmarks | self.benchmarks)

    def pairs(self) -> dict[str, tuple[str, str]]:
        """Returns {task name: (query instruction, document instruction)}."""
        return {name: (text, self.document or "") for name, text in self.query.items()}


def read(file: str | pathlib.Path = PUBLISHED) -> Instructions:
    """Returns the Instructions of a YAML file. Raises InputError naming the file and the key."""
    values = read_yaml(shipped(file), "instructions file", text=True) or {}
    if not isinstance(values, dict):
        raise InputError(f"instructions={file}: expected `query:` and `document:`, found a {type(values).__name__}")
    if "benchmarks" in values:  # with numbers as numbers
        values["benchmarks"] = read_yaml(shipped(file))["benchmarks"]
    kinds = {"query": dict, "document": str, "benchmarks": dict}
    for key, value in values.items():
        if key not in kinds:
            raise InputError(f"instructions={file}: unknown key {key}{nearest(str(key), kinds)}")
        if not isinstance(value, kinds[key]):
            raise InputError(f"instructions={file}: {key} must be a {kinds[key].__name__}, found {value!r}")
    for name, text in values.get("query", {}).items():
        if not isinstance(text, str):
            raise InputError(f"instructions={file}: query: {name} must be text, found {text!r}")
    return Instructions(**values)
