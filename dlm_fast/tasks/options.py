"""Building a task's config from loose options, as command lines and YAML files give them."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def build(config_class: type[Config], options: Mapping[str, Any], task: str) -> Config:
    """A config of named options; texts become the numbers, truth values or maps a field wants."""
    hints = get_type_hints(config_class)
    known = [option.name for option in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    values = {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"task {task} has no option {name!r}; {hint(name, known)}")
        values[name] = _convert(value, hints[name], f"option {name} of task {task}")
    return config_class(**values)


def hint(name: str, known: Iterable[str]) -> str:
    """The nearest known name, else all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."


def _convert(value: Any, kind: Any, what: str) -> Any:
    try:
        if get_origin(kind) is Literal:
            return _choice(value, get_args(kind))
        if kind is bool:
            return _truth(value)
        if get_origin(kind) is dict:
            return _mapping(value)
        if kind is str and isinstance(value, list | tuple):
            return json.dumps(value, ensure_ascii=False)  # such as examples of a few-shot prompt
        # bool is an int to Python, and never what is meant here
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = kind(value)
        if kind is int and not isinstance(value, str) and number != value:
            raise ValueError
        return number
    except (ValueError, OverflowError):
        raise ValueError(f"{what} must be {_describe(kind)}, got {value!r}") from None


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError
    return value


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    truths = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if not isinstance(value, str) or value.lower() not in truths:
        raise ValueError
    return truths[value.lower()]


def _mapping(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.split(",")]
        if not all(key.strip() and sign and column.strip() for key, sign, column in pairs):
            raise ValueError
        return {key.strip(): column.strip() for key, _, column in pairs}
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise ValueError
    return dict(value)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is dict:
        return "a map of field to column, such as puzzle=Puzzle,solution=Solution"
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
