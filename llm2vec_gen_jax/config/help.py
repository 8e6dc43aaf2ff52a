"""The help of a command: its keys in groups, wrapped at the width of the terminal."""

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from llm2vec_gen_jax.common.terminal import terminal_width, wrap
from llm2vec_gen_jax.config.common import DistributedConfig, HubConfig

_INHERITED = (HubConfig, DistributedConfig)  # groups of keys without a section


def help_text(schema: type, width: int | None = None) -> str:
    """Returns the required keys of a command, then the others in groups: name, default, help and choices."""
    width = width or terminal_width()
    required = set(getattr(schema, "REQUIRED", ()))
    groups: dict[str, list[tuple[str, dataclasses.Field[Any], Any]]] = {"required": [], "keys and their defaults": []}
    for group, key, field, value in _keys(schema, schema()):
        groups.setdefault("required" if key in required else group, []).append((key, field, value))
    parts = [
        "\n".join([*wrap(f"{title}:", width), *(_entry(*entry, title == "required", width) for entry in entries)])
        for title, entries in groups.items()
        if entries
    ]
    return "\n\n".join(parts)


def example_text(command: str, example: str, width: int | None = None) -> str:
    """Returns the example of a command, continued with backslashes on lines that are too long."""
    width, lines = width or terminal_width(), [f"  {command}"]
    for word in shlex.split(example):
        quoted = '{}="{}"'.format(*word.split("=", 1)) if " " in word else word
        if len(lines[-1]) + len(quoted) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"     {quoted}")
        else:
            lines[-1] += f" {quoted}"
    return "\n".join(["example:", *lines])


def _keys(schema: Any, defaults: Any) -> Iterator[tuple[str, str, dataclasses.Field[Any], Any]]:
    """Yields (group, key, field, default) for every key; the keys of the inherited groups are last."""
    groups = [group for group in _INHERITED if issubclass(schema, group)]
    shared = {field.name for group in groups for field in dataclasses.fields(group)}
    fields = [field for field in dataclasses.fields(schema) if field.name not in shared]
    for field in fields:
        value: Any = getattr(defaults, field.name)
        if not dataclasses.is_dataclass(value):
            yield "keys and their defaults", field.name, field, value
    for field in fields:
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            about = (value.__doc__ or "").splitlines()[0].rstrip(".")
            for inner in dataclasses.fields(value):
                yield about, f"{field.name}.{inner.name}", inner, getattr(value, inner.name)
    for group in groups:
        about = str(group.__doc__).rstrip(".")
        for field in dataclasses.fields(group):
            yield about, field.name, field, getattr(defaults, field.name)


def _entry(key: str, field: dataclasses.Field[Any], value: Any, is_required: bool, width: int) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, list):
        shown = f"[{', '.join(value)}]"
    choices: Sequence[str] | None = field.metadata["choices"]
    about = field.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")
    column = 48 if width > 100 else 32 if width > 70 else 22
    name = f"  {key}={'...' if is_required else shown}"
    if len(name) + 2 > column:
        return "\n".join([name, *wrap(about, width, " " * column)])
    return "\n".join(wrap(about, width, " " * column, f"{name:<{column}}"))
