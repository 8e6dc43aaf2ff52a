"""Writes docs/configuration.md from the schema: python -m docs.configuration"""

import dataclasses
import pathlib
import textwrap
import typing

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.files import write_text
from llm2vec_gen_jax.config import common

PAGE = pathlib.Path(__file__).parent / "configuration.md"
SHARED = {  # groups of most commands, described once
    common.BackboneConfig: "backbone",
    common.KernelsConfig: "kernels",
    common.MeshConfig: "mesh",
    common.ShardConfig: "shard",
    common.HubConfig: "Hub",
    common.DistributedConfig: "Processes",
}
INHERITED = (common.HubConfig, common.DistributedConfig)  # groups of keys without a section
HEAD = """\
# Configuration

Every command takes `[CONFIG] [key=value ...]`. CONFIG is a YAML file with the values that differ from the defaults;
`key=value` arguments override it. A file may contain the keys of the complete recipe: each command uses its own. An
unknown key, a wrong type or an unknown choice is an error that suggests the closest key. `null` means no value, `a,b`
or `[a, b]` is a list, and `~` at the start of a path is the home directory. Text is not converted: `2026_11_28` stays
text.

    python -m launch.train configs/smollm2-135m.yaml data.responses=responses.jsonl train.output=runs/demo \\
      train.steps=100
    python -m launch.train --help

```yaml
# the same settings in a file
data:
  responses: responses.jsonl
train:
  output: runs/demo
  steps: 100
```

The architecture of a backbone is not configured: it is read from the backbone. `python -m docs.configuration` generates
this page from the schema in `llm2vec_gen_jax/config/`.
"""


def commands() -> dict[str, type]:
    """Returns {command: schema}: `train` first, because others share its groups, then by name."""
    found = {}
    for name in config.__all__:
        about = getattr(getattr(config, name), "__doc__", None) or ""
        if about.startswith("`python -m launch."):
            found[about.split("`")[1].removeprefix("python -m launch.").removesuffix(" MODEL")] = getattr(config, name)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "train", item[0])))


def page() -> str:
    """Returns the text of the page."""
    places = {group: _anchor(name) for group, name in SHARED.items()}
    parts = [HEAD, "## Shared groups\n"]
    for group, name in SHARED.items():
        prefix = "" if group in INHERITED else f"{name}."
        parts += [f"### {name}\n", f"{_paragraphs(group.__doc__)}\n", _table(_rows(group, prefix, group(), {}))]
    for name, schema in commands().items():
        about, *more = _paragraphs(schema.__doc__).split("\n", 1)
        about = about.split("`: ", 1)[1]
        parts += [f"## {name}\n", about[0].upper() + about[1:], *more, "", _table(_rows(schema, "", schema(), places))]
        for field in dataclasses.fields(schema):
            if dataclasses.is_dataclass(field.type):
                places.setdefault(field.type, _anchor(name))
        if schema is config.ReproduceConfig:
            parts += ["Sizes of the budgets:\n", _budgets()]
    return "\n".join(parts).rstrip() + "\n"


def _rows(schema, prefix, defaults, places):
    """Yields (key, default, help) for every key of a schema; a group described earlier is one row with a link."""
    inherited = [group for group in INHERITED if schema is not group and issubclass(schema, group)]
    for group in inherited:
        first = dataclasses.fields(group)[0].name
        yield f"`{first}`, ...", "", f"see [{SHARED[group]}](#{places[group]})"
    for field in dataclasses.fields(schema):
        key, value = f"{prefix}{field.name}", getattr(defaults, field.name)
        if dataclasses.is_dataclass(field.type):
            if field.type in places:
                changed = [f"`{key}.{line}`" for line in _differences(value, field.type())]
                but = f"; but {', '.join(changed)}" if changed else ""
                yield f"`{key}.*`", "", f"see [{places[field.type]}](#{places[field.type]}){but}"
            else:
                yield from _rows(field.type, f"{key}.", value, places)
        elif prefix or not any(field.name in _names(group) for group in inherited):
            choices = field.metadata["choices"]
            more = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
            yield f"`{key}`", f"`{_shown(value)}`", _escaped(field.metadata["help"]) + more + _kind(field.type)


def _differences(value, default):
    return [
        f"{field.name}={_shown(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != getattr(default, field.name)
    ]


def _budgets():
    names = list(config.BUDGETS)
    rows = [
        (f"`sizes.{field.name}`", *(f"{getattr(config.BUDGETS[name], field.name)}" for name in names))
        for field in dataclasses.fields(config.SizesConfig)
    ]
    return _table(rows, ("key", *names))


def _table(rows, heads=("key", "default", "description")):
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _names(schema):
    return {field.name for field in dataclasses.fields(schema)}


def _kind(kind):
    return "; a list" if typing.get_origin(kind) is list else ""


def _shown(value):
    """Returns a value in command-line notation."""
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return {None: "null", "": "''"}.get(value, str(value).lower() if isinstance(value, bool) else str(value))


def _paragraphs(text):
    return textwrap.dedent(" " * 4 + text).strip()


def _escaped(text):
    return text.replace("|", "\\|").replace("<", "&lt;")


def _anchor(heading):
    return heading.lower().replace(" ", "-")


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"written: {PAGE}")
