"""Nested frozen dataclasses from and to plain dicts and ConfigDicts, with errors that name the field.

Knows types alone: a misspelt field is an error that names the nearest, a wrong type one that says what was given and
what is needed. What the fields mean is config.py's.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from ml_collections import config_dict

from moejax.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and scalars, fit for JSON; `parse` reads it back."""
    return plain(dataclasses.asdict(config))


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """A dataclass as a ConfigDict with every field, where None keeps its type, so that flags can override it."""
    result = config_dict.ConfigDict()
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            result[name] = to_config_dict(value)
        elif value is None:
            inner = without_none(hint)
            result[name] = config_dict.placeholder(config_dict.ConfigDict if dataclasses.is_dataclass(inner) else inner)
        else:
            result[name] = config_dict.ConfigDict(value) if isinstance(value, dict) else value
    return result


def unknown_field(path: str, siblings: Iterable[str], root: Any, below: str = "") -> UserError:
    """The error for a field that doesn't exist: names the nearest of its siblings, or its namesake elsewhere.

    below: what was asked for inside it, ".steps" of "trian.steps".
    """
    parent, _, name = path.rpartition(".")
    options = list(siblings)
    namesakes = [other for other in _paths(root) if other.rpartition(".")[2] == name]
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if near:
        hint = f"the nearest is config.{parent + '.' if parent else ''}{near[0]}{below}"
    elif namesakes:
        hint = f"there is config.{namesakes[0]}"
    else:
        hint = f"config{'.' + parent if parent else ''} has: {', '.join(options) or 'no fields'}"
    return UserError(f"config.{path}{below} does not exist; {hint}")


def field_type(root: Any, path: str) -> Any:
    """The type of `root`'s field at a dotted path such as "train.steps"; anything below a free dict is `Any`.

    Raises:
      UserError: there is no such field; the nearest is named.
    """
    hint = root
    walked: list[str] = []
    for name in path.split("."):
        hint = without_none(hint)
        if not dataclasses.is_dataclass(hint):
            if typing.get_origin(hint) is dict:
                return Any
            raise UserError(f"config.{path} does not exist: config.{'.'.join(walked)} has no fields")
        walked.append(name)
        hints = _hints(hint)
        if name not in hints:
            known = ".".join(walked)
            raise unknown_field(known, hints, root, path[len(known) :])
        hint = hints[name]
    return hint


def parse(cls: Any, values: Mapping[str, Any] | config_dict.ConfigDict, path: str = "", root: Any = None) -> Any:
    """A `cls` from nested mappings; fields left out take their defaults.

    Raises:
      UserError: an unknown field (the nearest is named) or a wrong type.
    """
    hints = _hints(cls)
    result = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if name not in hints:
            raise unknown_field(where, hints, root or cls)
        result[name] = parse_value(hints[name], value, where, root or cls)
    return cls(**result)


def parse_value(hint: Any, value: Any, path: str, root: Any = None) -> Any:
    """`value` as the type `hint`, tuples from lists and floats from ints; UserError names `path` where it isn't one."""
    inner = without_none(hint)
    origin, items = typing.get_origin(inner), typing.get_args(inner)
    is_mapping = isinstance(value, Mapping | config_dict.ConfigDict)
    if value is None and inner is not hint:
        return None
    if inner is Any:
        return plain(value)
    if dataclasses.is_dataclass(inner) and is_mapping:
        return parse(inner, value, path, root)
    if origin is Literal and value in items:
        return value
    if origin is dict and is_mapping:
        return {key: parse_value(items[1], entry, f"{path}.{key}") for key, entry in value.items()}
    if origin is tuple and isinstance(value, tuple | list):
        expected = [items[0]] * len(value) if items[-1] is ... else items
        if len(expected) == len(value):
            return tuple(parse_value(item, entry, path) for item, entry in zip(expected, value, strict=True))
    if inner is float and type(value) in (int, float):
        return float(value)
    if inner in (int, bool, str) and type(value) is inner:
        return value
    shown = repr(plain(value))
    raise UserError(f"config.{path}={shown if len(shown) <= 60 else shown[:57] + '...'}: it needs {describe(hint)}")


def describe(hint: Any) -> str:
    """A type in words: "an int", "a float or None", "one of: …"."""
    inner = without_none(hint)
    origin = typing.get_origin(inner)
    if origin is Literal:
        words = "one of: " + ", ".join(typing.get_args(inner))
    elif dataclasses.is_dataclass(inner):
        words = "a dict with the fields " + ", ".join(_hints(inner))
    elif origin is tuple:
        items = typing.get_args(inner)
        first = type(typing.get_args(items[0])[0]) if typing.get_origin(items[0]) is Literal else items[0]
        words = f"a tuple of {first.__name__}s" if items[-1] is ... else f"{len(items)} {first.__name__}s"
    else:
        noun = (origin or inner).__name__
        words = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return words if inner is hint else words + " or None"


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        rest = [item for item in typing.get_args(hint) if item is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _paths(cls: Any, path: str = "") -> Iterator[str]:
    for name, hint in _hints(cls).items():
        where = f"{path}.{name}" if path else name
        inner = without_none(hint)
        yield from _paths(inner, where) if dataclasses.is_dataclass(inner) else (where,)


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in nested dicts that is no dict."""
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from leaves(value, where)
        else:
            yield where, value


def plain(value: Any) -> Any:
    """Dicts for ConfigDicts (references resolved), lists for tuples, all the way down."""
    if isinstance(value, Mapping | config_dict.ConfigDict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the nested dicts of `change` written over it; neither is changed."""
    result = dict(base)
    for name, value in change.items():
        below = result.get(name)
        result[name] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result
