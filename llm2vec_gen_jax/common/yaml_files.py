"""Strict, bounded reading of YAML, and writing of text that every YAML version reads as text."""

import collections
import os
import pathlib
import re
from typing import IO, Any

import yaml

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import check_file

LARGEST_YAML = 1 << 20  # bytes
_MOST_NODES = 100_000


class _BoundedLoader(yaml.SafeLoader):
    """Limits the number of values after expansion of aliases, with which a few lines can exceed any memory."""

    def __init__(self, stream):
        super().__init__(stream)
        self.sizes = {}  # id of a node -> nodes in it, including those of aliases

    def compose_node(self, parent, index):
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self.sizes:
            raise yaml.composer.ComposerError(None, None, "an alias of a value that contains it", mark)
        if not is_alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
            self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in parts)
        if self.sizes[id(node)] > _MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {_MOST_NODES} values", mark)
        return node


class _StrictLoader(_BoundedLoader):
    """Rejects duplicate keys, for which PyYAML silently uses the last value."""

    def construct_mapping(self, node, deep=False):
        keys = collections.Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key}", node.start_mark)
        return super().construct_mapping(node, deep)


class _TextLoader(_StrictLoader):
    """Reads plain scalars as text, also 2026_11_28, 1:30 and no, except for null, true and false."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in ("null", "merge")]
    for first, pairs in _StrictLoader.yaml_implicit_resolvers.items()
}
_TextLoader.add_implicit_resolver(  # as in YAML 1.2
    "tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF")
)


class _QuotingDumper(yaml.SafeDumper):
    """Also quotes text that only YAML 1.2 reads as a number, such as 1e5."""


_QuotingDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+|0o[0-7]+"),
    list("-+.0123456789"),
)


def to_yaml(value: Any) -> str:
    """Returns YAML in which text is quoted where a reader could take it for a number; keys keep their order."""
    return yaml.dump(value, Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True)


def parse_yaml(stream: str | IO[str], where: object, loader: type = _BoundedLoader) -> Any:
    """Returns the value of YAML in a string or an open file; `where` names it in errors."""
    try:
        return yaml.load(stream, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an invalid date
        raise InputError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


def read_yaml(path: str | os.PathLike, what: str = "file", text: bool = False) -> Any:
    """Reads a YAML file. text: whether numbers, dates, yes and no remain text as written.

    Raises InputError that names the file (as `what`) if it is missing or malformed.
    """
    if not (str(path).startswith("/dev/") and pathlib.Path(path).is_fifo()):  # a shell's <(...)
        check_file(path, what, LARGEST_YAML)
    with open(path, encoding="utf-8") as file:
        return parse_yaml(file, path, _TextLoader if text else _StrictLoader)
