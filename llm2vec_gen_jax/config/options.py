"""Loads a config from a YAML file and `key=value` arguments, and validates it against its schema.

A YAML file (configs/) holds the values that differ from the defaults, for any command; `section.key=value` arguments
override it. An unknown key, a wrong type or an unknown choice is an error that suggests the fix.
"""

import dataclasses
import difflib
import math
import numbers
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import omegaconf
import yaml
from omegaconf import OmegaConf

from llm2vec_gen_jax.common import yaml_files
from llm2vec_gen_jax.common.errors import InputError, first_line, nearest
from llm2vec_gen_jax.common.files import SHIPPED, has_lone_surrogate, shipped
from llm2vec_gen_jax.config import TrainConfig

Config = TypeVar("Config")


def load(schema: type[Config], file: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()) -> Config:
    """Returns an instance of the dataclass `schema`: its defaults, updated by the YAML `file`, then by `overrides`.

    file: a path; configs/NAME falls back to the shipped file (files.shipped). It may contain any key of the recipe
    (TrainConfig); keys that `schema` lacks are validated and ignored. overrides: "key=value" strings.
    Raises InputError that names the file, the key and the nearest known key.
    """
    config = OmegaConf.structured(schema)
    if file is not None:
        values = _read_yaml(file)
        recipe = {key: values[key] for key in values if key not in _keys(schema) and key in _keys(TrainConfig)}
        check(OmegaConf.to_object(_merge(OmegaConf.structured(TrainConfig), recipe, file)))
        config = _merge(config, {key: values[key] for key in values if key not in recipe}, file)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r}: expected key=value{nearest(key, _leaves(schema))}")
        config = _merge(config, _nest(key, _value(schema, key, text)), "command line")
    instance: Any = OmegaConf.to_object(config)
    check(instance)
    return cast(Config, instance)


def from_values(schema: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Returns an instance of the dataclass `schema`: its defaults, updated by nested dicts of Python values.

    Paths and NumPy scalars are accepted. source: for errors. Raises InputError as `load` does.
    """
    instance: Any = OmegaConf.to_object(_merge(OmegaConf.structured(schema), _plain(values), source))
    check(instance)
    return cast(Config, instance)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def check(config: Any, prefix: str = "") -> None:
    """Raises InputError for a value of the wrong type, an unknown choice, or a number out of range.

    Expands ~ in paths, in place. Entry points call it, because configs can also be constructed in Python.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        kind: Any = field.type
        nested = dataclasses.is_dataclass(kind)
        if not nested:
            setattr(config, field.name, _checked(field, value, name))
        elif isinstance(value, kind):
            check(value, f"{name}.")
        else:
            raise InputError(f"{name}: expected a {kind.__name__}, found {_shown(value)}")


def check_argument(schema: type, key: str, value: Any, name: str) -> None:
    """Validates an argument of a Python function as the value of a config key. name: the argument's name."""
    _checked(_field_of(schema, key), value, name)


def check_arguments(schema: type, **values: Any) -> None:
    """Calls `check_argument` for arguments with the same names as their keys."""
    for key, value in values.items():
        check_argument(schema, key, value, key)


def require(config: Any, *keys: str) -> list[Any]:
    """Returns the values of dotted keys, default those of REQUIRED in the schema.

    Raises InputError unless `config` passes `check` and none of the values is None or empty.
    """
    check(config)
    values = []
    for key in keys or getattr(config, "REQUIRED", ()):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is None or value == "":  # "": such as from an unset shell variable
            raise InputError(f"{key} is required: pass {key}=... ({_help_of(type(config), key)})")
        values.append(value)
    return values


def suggest(schema: type, arguments: Sequence[str]) -> str:
    """Returns the key=value form of GNU style arguments, such as --steps 5: "train.steps=5"."""
    suggestions, words = [], list(arguments)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("-"):
            continue
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("-") and "=" not in words[0] else "true"
        name = name.lstrip("-").replace("-", "_")
        leaves = _leaves(schema)
        same = [leaf for leaf in leaves if leaf == name] or [leaf for leaf in leaves if leaf.endswith(f".{name}")]
        close = same or difflib.get_close_matches(name, leaves, n=1, cutoff=0.5)
        shown = ((leaf, "..." if _field_of(schema, leaf).metadata["secret"] else value) for leaf in close)
        suggestions.append(" or ".join("=".join(pair) for pair in shown) or f"unknown key {name}")
    return " ".join(suggestions)


def with_key(message: str, config: Any) -> str:
    """Returns a message that begins with a path of a config with the path's key: "input=a.txt: ..."."""
    for key in _leaves(type(config)):
        if not _field_of(type(config), key).metadata["path"]:
            continue
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        for path in value if isinstance(value, list) else [value, *(value or "").split(",")]:
            if path and message.startswith((f"{path}: ", f"{os.path.normpath(path)}: ")):
                return f"{key}={message}"
    return message


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as nested plain dicts, without secrets."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = to_dict(value)
        elif not field.metadata["secret"]:
            values[field.name] = list(value) if isinstance(value, list) else value
    return values


def to_yaml(config: Any) -> str:
    """Returns the config as YAML, with all keys but secrets."""
    return yaml_files.to_yaml(to_dict(config))


def _read_yaml(file: str | os.PathLike[str]) -> dict[str, Any]:
    path = shipped(os.path.expanduser(file))
    if not os.path.exists(path):
        raise InputError(f"{file}: no such config file{_similar_config(file)}")
    values = yaml_files.read_yaml(path, "config file", text=True)
    if not isinstance(values or {}, dict):
        raise InputError(f"{file}: expected `key: value` lines, found a {type(values).__name__}")
    return values or {}


def _similar_config(file: str | os.PathLike[str]) -> str:
    """Returns ", did you mean ...?" for the shipped config with the closest name, or an empty string."""
    known = [path.relative_to(SHIPPED).as_posix() for path in (SHIPPED / "configs").rglob("*.yaml")]
    names = difflib.get_close_matches(os.path.basename(file), {os.path.basename(path) for path in known}, 1, 0.8)
    paths = [path for path in known if os.path.basename(path) in names]  # the same name may be in several folders
    close = difflib.get_close_matches(str(file), paths, n=1, cutoff=0)
    return f", did you mean {close[0]}?" if close else ""


def _merge(config: Any, values: dict[str, Any], source: object) -> Any:
    schema = OmegaConf.get_type(config)
    values = _known(schema, values, source)
    try:
        # create() parses numbers as OmegaConf does (1e-3 is a float), not as YAML 1.1 does (a string).
        return OmegaConf.merge(config, OmegaConf.create(values))
    except (omegaconf.errors.OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or "?"
        if key in _leaves(schema):
            field, value = _field_of(schema, key), values
            expected = _VALUES[_kinds(field.type)[0]][1]
            for part in key.split("."):
                value = value[part]
            raise InputError(f"{source}: {key}: expected {expected}, found {_shown(value, field)}") from None
        raise InputError(f"{source}: {key}: {first_line(error)}") from None


def _known(schema: Any, values: dict[str, Any], source: object, prefix: str = "") -> dict[str, Any]:
    """Returns nested values for OmegaConf. Raises InputError for unknown keys and values of the wrong structure."""
    known: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        field = next((field for field in dataclasses.fields(schema) if field.name == key), None)
        if field is None:
            raise InputError(f"{source}: unknown key {name}{_nearest_key(schema, str(key), prefix)}")
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value or {}, dict):
                raise InputError(f"{source}: {name} is a section with the keys {', '.join(_keys(field.type))}")
            known[key] = _known(field.type, value or {}, source, f"{name}.")
        elif field.type is bool and str(value).lower() not in ("true", "false"):  # OmegaConf accepts 2 and yes
            raise InputError(f"{source}: {name}: expected {_VALUES[bool][1]}, found {_shown(value)}")
        elif isinstance(value, bool) and field.type is not bool:
            raise InputError(f"{source}: {name}: YAML reads this as {str(value).lower()}. Put text in quotes")
        elif isinstance(value, str) and has_lone_surrogate(value):
            raise InputError(f"{source}: {name}={_shown(value, field)}: not valid UTF-8")
        elif "???" in (value if isinstance(value, list) else [value]):
            raise InputError(f"{source}: {name}: ??? is not a valid value")  # OmegaConf would keep the default
        elif typing.get_origin(field.type) is list and not _is_list_of_text(value):
            raise InputError(f"{source}: {name}: expected a list of text, found {_shown(value)}. Put text in quotes")
        elif typing.get_origin(field.type) is not list and isinstance(value, (dict, list)):
            raise InputError(f"{source}: {name}: expected a single value, found {_shown(value, field)}")
        elif str in _kinds(field.type) and value is not None and not isinstance(value, str):  # from a YAML tag
            raise InputError(f"{source}: {name}: expected text, found {_shown(value, field)}. Put text in quotes")
        else:
            known[key] = [_literal(item) for item in value] if isinstance(value, list) else _literal(value)
    return known


def _literal(value: Any) -> Any:
    """Escapes ${...}, which OmegaConf would interpolate."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _nearest_key(schema: Any, key: str, prefix: str = "") -> str:
    sections = [field.name for field in dataclasses.fields(schema) if dataclasses.is_dataclass(field.type)]
    if key in sections:
        return f": a section, with the keys {', '.join(leaf for leaf in _leaves(schema) if leaf.startswith(key))}"
    if key in _leaves(schema):
        return f": write {key.rpartition('.')[2]} below `{key.rpartition('.')[0]}:`"
    return nearest(prefix + key, [prefix + leaf for leaf in _leaves(schema)] + [prefix + name for name in sections])


def _keys(schema: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]


def _leaves(schema: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for field in dataclasses.fields(schema):
        inner = dataclasses.is_dataclass(field.type)
        names += _leaves(field.type, f"{prefix}{field.name}.") if inner else [prefix + field.name]
    return names


def _field_of(schema: Any, key: str) -> dataclasses.Field[Any]:
    *parents, name = key.split(".")
    for parent in parents:
        schema = next(field.type for field in dataclasses.fields(schema) if field.name == parent)
    return next(field for field in dataclasses.fields(schema) if field.name == name)


def _help_of(schema: Any, key: str) -> str:
    return str(_field_of(schema, key).metadata["help"])


def _value(schema: Any, key: str, text: str) -> Any:
    """Parses a command-line value for its field; strings are unchanged."""
    if key not in _leaves(schema):
        raise InputError(f"command line: unknown key {key}{_nearest_key(schema, key)}")
    kind = _field_of(schema, key).type
    if typing.get_origin(kind) is list:
        return _list_value(key, text) if text.startswith("[") else [part for part in text.split(",") if part]
    return None if text in ("null", "None") and type(None) in typing.get_args(kind) else text


def _list_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: an invalid date
        raise InputError(f"command line: {key}={text}: not a list. Write a,b or [a, b]") from None


def _nest(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


_VALUES: dict[type, tuple[Any, str]] = {  # field type -> accepted types, and their name in messages
    bool: (bool | np.bool_, "true or false"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
    list: (list | tuple, "a list of text"),
}


def _kinds(annotation: Any) -> Sequence[Any]:
    """Returns the member types of an annotation, [list] for list[str]."""
    if typing.get_origin(annotation) is list:
        return [list]
    return typing.get_args(annotation) or [annotation]


def _checked(field: dataclasses.Field[Any], value: Any, name: str) -> Any:
    """Returns the value of a field, with ~ expanded. Raises InputError if it is invalid."""
    kind, *more = _kinds(field.type)
    if value is None and more:
        return None
    about, (types, what) = field.metadata, _VALUES[kind]
    if about["path"]:
        value = [_expanded(item) for item in value] if isinstance(value, list | tuple) else _expanded(value)
    fits = isinstance(value, types) and (kind is bool or not isinstance(value, bool | np.bool_))
    if not fits or (kind is list and not _is_list_of_text(list(value))):
        raise InputError(f"{name}={_shown(value, field)}: expected {what}")
    if about["choices"] and value not in about["choices"]:
        raise InputError(f"{name}={value}: unknown{nearest(value, about['choices'])}")
    if kind in (int, float):
        least, most = about["least"], about["most"]
        if not (least <= value <= most and value < math.inf):
            limit = f" and <= {most}" if most < math.inf else ""
            raise InputError(f"{name}={value}: expected {what} >= {least}{limit}")
    return value


def _expanded(path: Any) -> Any:
    return os.path.expanduser(path) if isinstance(path, str | os.PathLike) else path


def _shown(value: object, field: dataclasses.Field[Any] | None = None) -> str:
    """Returns a value for a message. field: of a value that may be secret."""
    text = "..." if field is not None and field.metadata["secret"] else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
