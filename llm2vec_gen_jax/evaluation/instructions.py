"""Task instructions by name: the published ones (configs/evaluate/published.yaml), and a user's own over them."""

import dataclasses

from llm2vec_gen_jax.common.errors import InputError, nearest
from llm2vec_gen_jax.common.files import SHIPPED, read_yaml, shipped

PUBLISHED = SHIPPED / "configs" / "evaluate" / "published.yaml"


@dataclasses.dataclass(frozen=True)
class Instructions:
    """query: by task name. document: of every task's documents. benchmarks: named sets of hub tasks."""

    query: dict[str, str] = dataclasses.field(default_factory=dict)
    document: str | None = None
    benchmarks: dict[str, dict] = dataclasses.field(default_factory=dict)

    def over(self, other):
        """Returns `other` with these in place of its own."""
        document = other.document if self.document is None else self.document
        return Instructions(other.query | self.query, document, other.benchmarks | self.benchmarks)

    def pairs(self):
        """Returns task name -> (query instruction, document instruction)."""
        return {name: (text, self.document or "") for name, text in self.query.items()}


def read(file=PUBLISHED):
    """Returns the Instructions of a YAML file. Raises InputError that names the file and the key."""
    values = read_yaml(shipped(file), "file of instructions", text=True) or {}
    if not isinstance(values, dict):
        raise InputError(f"instructions={file}: expected `query:` and `document:`, found a {type(values).__name__}")
    if "benchmarks" in values:  # whose numbers are numbers
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
