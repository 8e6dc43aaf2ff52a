"""From a YAML file and `key=value` words to a config, checked against its schema (config/).

A YAML file (configs/) holds what differs from the defaults and serves every command; the command line overrides
it with `section.key=value`. An unknown key, a wrong type or an unknown choice is an error that suggests the fix.
"""

import dataclasses
import math
import numbers
import os
import re
import typing

import numpy as np
import omegaconf
import yaml
from omegaconf import OmegaConf

from llm2vec_gen_jax.common import files
from llm2vec_gen_jax.common.errors import InputError, first_line, nearest
from llm2vec_gen_jax.common.files import has_lone_surrogate, read_yaml, shipped
from llm2vec_gen_jax.config import TrainConfig


def load(schema, file=None, overrides=()):
    """Returns an instance of the dataclass `schema`: its defaults, then the YAML `file`, then `key=value` strings.

    configs/NAME is the shipped file where there is none of that name (files.shipped).
    A file may hold every key of the recipe (TrainConfig); those that this command does not use are checked, then
    left out. Raises InputError that names the file, the key and the nearest known key.
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
    instance = OmegaConf.to_object(config)
    check(instance)
    return instance


def check(config, prefix=""):
    """Raises InputError for a value of another type than its field's, an unknown choice, and a number out of range.

    ~ in a path becomes the user's home, in place. This holds for configs made in Python as well.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if not dataclasses.is_dataclass(field.type):
            setattr(config, field.name, _checked(field, value, name))
        elif isinstance(value, field.type):
            check(value, f"{name}.")
        else:
            raise InputError(f"{name}: expected a {field.type.__name__}, found {_shown(value)}")


def check_argument(schema, key, value, name):
    """`check` of an argument of a Python call by a key of a command's schema. name: what the call names it."""
    _checked(_field_of(schema, key), value, name)


def check_arguments(schema, **values):
    """`check_argument` of arguments that are named as their keys."""
    for key, value in values.items():
        check_argument(schema, key, value, key)


def require(config, *keys):
    """Raises InputError unless `config` passes `check` and every dotted key of it has a value."""
    check(config)
    for key in keys:
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is None:
            raise InputError(f"{key} is needed: pass {key}=... ({_help_of(type(config), key)})")


def to_dict(config):
    """Returns the config as nested plain dicts."""
    return dataclasses.asdict(config)


def to_yaml(config):
    """Returns the config as YAML, every key with its value."""
    return files.to_yaml(to_dict(config))


def help_text(schema):
    """Returns one line per key: name, default, help and choices."""
    defaults, lines = schema(), []
    for key in _leaves(schema):
        value = defaults
        for part in key.split("."):
            value = getattr(value, part)
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        choices = _field_of(schema, key).metadata["choices"]
        described = _help_of(schema, key) + (f" ({' | '.join(choices)})" if choices else "")
        lines.append(f"  {key + '=' + shown:<44} {described}")
    return "\n".join(lines)


def _read_yaml(file):
    values = read_yaml(shipped(os.path.expanduser(file)), "config file", text=True)
    if not isinstance(values or {}, dict):
        raise InputError(f"{file}: expected `key: value` lines, found a {type(values).__name__}")
    return values or {}


def _merge(config, values, source):
    schema = OmegaConf.get_type(config)
    values = _known(schema, values, source)
    try:
        # create() parses numbers as OmegaConf does (1e-3 is a float), not as YAML 1.1 does (a string).
        return OmegaConf.merge(config, OmegaConf.create(values))
    except (omegaconf.errors.OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or "?"
        if key in _leaves(schema):
            expected, value = _VALUES[_kinds(_field_of(schema, key).type)[0]][1], values
            for part in key.split("."):
                value = value[part]
            raise InputError(f"{source}: {key}: expected {expected}, not {_shown(value)}") from None
        raise InputError(f"{source}: {key}: {first_line(error)}") from None


def _known(schema, values, source, prefix=""):
    """Returns nested values ready for OmegaConf. Raises InputError for what is not of the schema."""
    known = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        field = next((field for field in dataclasses.fields(schema) if field.name == key), None)
        if field is None:
            raise InputError(f"{source}: unknown key {name}{_nearest_key(schema, str(key), prefix)}")
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value or {}, dict):
                raise InputError(f"{source}: {name} is a section of keys ({', '.join(_keys(field.type))})")
            known[key] = _known(field.type, value or {}, source, f"{name}.")
        elif isinstance(value, bool) and field.type is not bool:
            raise InputError(f"{source}: {name}: YAML takes this for {str(value).lower()}. Put text in quotes")
        elif isinstance(value, str) and has_lone_surrogate(value):
            raise InputError(f"{source}: {name}={value!r} is no valid UTF-8")
        elif "???" in (value if isinstance(value, list) else [value]):
            raise InputError(f"{source}: {name}: ??? is no value")  # OmegaConf would keep the default
        elif typing.get_origin(field.type) is list and not _is_list_of_text(value):
            raise InputError(f"{source}: {name}: expected a list of text, found {_shown(value)}. Put text in quotes")
        elif typing.get_origin(field.type) is not list and isinstance(value, (dict, list)):
            raise InputError(f"{source}: {name}: expected a single value, found {_shown(value)}")
        elif str in _kinds(field.type) and value is not None and not isinstance(value, str):  # of a YAML tag
            raise InputError(f"{source}: {name}: expected text, found {_shown(value)}. Put text in quotes")
        else:
            known[key] = [_literal(item) for item in value] if isinstance(value, list) else _literal(value)
    return known


def _literal(value):
    """Escapes a string for OmegaConf, to which ${...} is an interpolation; to us it is text like any other."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _is_list_of_text(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _nearest_key(schema, key, prefix=""):
    sections = [field.name for field in dataclasses.fields(schema) if dataclasses.is_dataclass(field.type)]
    if key in sections:
        return f": it is a section; its keys are {', '.join(leaf for leaf in _leaves(schema) if leaf.startswith(key))}"
    if key in _leaves(schema):
        return f": write {key.rpartition('.')[2]} below `{key.rpartition('.')[0]}:`"
    return nearest(prefix + key, [prefix + leaf for leaf in _leaves(schema)] + [prefix + name for name in sections])


def _keys(schema):
    return [field.name for field in dataclasses.fields(schema)]


def _leaves(schema, prefix=""):
    names = []
    for field in dataclasses.fields(schema):
        inner = dataclasses.is_dataclass(field.type)
        names += _leaves(field.type, f"{prefix}{field.name}.") if inner else [prefix + field.name]
    return names


def _field_of(schema, key):
    *parents, name = key.split(".")
    for parent in parents:
        schema = next(field.type for field in dataclasses.fields(schema) if field.name == parent)
    return next(field for field in dataclasses.fields(schema) if field.name == name)


def _help_of(schema, key):
    return _field_of(schema, key).metadata["help"]


def _value(schema, key, text):
    """Turns a command-line value into what its field expects; strings are taken as they are."""
    if key not in _leaves(schema):
        raise InputError(f"command line: unknown key {key}{_nearest_key(schema, key)}")
    kind = _field_of(schema, key).type
    if typing.get_origin(kind) is list:
        return _list_value(key, text) if text.startswith("[") else [part for part in text.split(",") if part]
    return None if text in ("null", "None") and type(None) in typing.get_args(kind) else text


def _list_value(key, text):
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that there is not
        raise InputError(f"command line: {key}={text}: not a list. Write a,b or [a, b]") from None


def _nest(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


_VALUES = {  # type of a field -> types of its values, and what they are called
    bool: (bool | np.bool_, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
    list: (list | tuple, "a list of text"),
}


def _kinds(annotation):
    """Returns the types of an annotation: those of `int | None`, [list] of list[str]."""
    if typing.get_origin(annotation) is list:
        return [list]
    return typing.get_args(annotation) or [annotation]


def _checked(field, value, name):
    """Returns the value of a field, with ~ expanded. Raises InputError for one that makes no sense."""
    kind, *more = _kinds(field.type)
    if value is None and more:
        return None
    about, (types, what) = field.metadata, _VALUES[kind]
    if about["path"]:
        value = [_expanded(item) for item in value] if isinstance(value, list | tuple) else _expanded(value)
    fits = isinstance(value, types) and (kind is bool or not isinstance(value, bool | np.bool_))
    if not fits or (kind is list and not _is_list_of_text(list(value))):
        raise InputError(f"{name}={_shown(value)}: expected {what}")
    if about["choices"] and value not in about["choices"]:
        raise InputError(f"{name}={value}: unknown{nearest(value, about['choices'])}")
    if kind in (int, float):
        least, most = about["least"], about["most"]
        if not (least <= value <= most and value < math.inf):
            limit = f" and at most {most}" if most < math.inf else ""
            raise InputError(f"{name}={value}: must be a number, at least {least}{limit}")
    return value


def _expanded(path):
    return os.path.expanduser(path) if isinstance(path, str | os.PathLike) else path


def _shown(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
