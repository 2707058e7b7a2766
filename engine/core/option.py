"""Options as metadata of dataclass fields, for the command line and for Python keywords."""

from __future__ import annotations

import argparse
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from engine.core.errors import UsageError
from engine.core.location import Url

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_KEYWORD_TYPES: dict[Any, Any] = {Path: str | os.PathLike[str], tuple[str, ...]: Sequence[str]}
_FOR_ARGPARSE = ("metavar", "choices", "nargs", "const")
_TYPE_NAMES = {
    bool: "True, False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    os.PathLike: "a path",
    Url: "a Url",
    datetime: "a datetime",
    Sequence: "a list of texts",
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of the command line and, unless `in_python` is false, a keyword of `engine.screen`."""

    group: str  # title in --help
    help: str
    default: Any
    for_argparse: Mapping[str, Any]  # metavar, choices, nargs, const
    name: str = ""  # of the field, filled by `options_of`
    short: str = ""  # short flag
    first: bool = False  # shown by --help; the others are shown only by --help-all
    operating: bool = False  # --only-errors does not take it from the earlier run
    in_python: bool = True
    parse: Callable[[Any], Any] | None = None  # of a text, or of a value of `keyword_type`
    keyword_type: Any = None  # type that `engine.screen` takes, without None; filled by `options_of`

    @property
    def flag(self) -> str:
        """Return the long flag: the field's name without its unit."""
        return "--" + self.name.removesuffix("_s").replace("_", "-")

    @property
    def is_list(self) -> bool:
        return bool(self.keyword_type == Sequence[str])

    @property
    def argparse_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `add_argument`, without the help."""
        arguments = {"dest": self.name, "default": self.default, **self.for_argparse}
        if self.keyword_type is bool:
            arguments["action"] = argparse.BooleanOptionalAction if self.default is None else "store_true"
        elif self.is_list:
            arguments |= {"action": "append", "default": []}
        elif self.parse:
            arguments["type"] = self.parse
        return arguments

    def check(self, value: Any) -> Any:
        """Return the field's value for a Python keyword's `value`; None means the default.

        Raises TypeError for a wrong type and UsageError for a value that is not allowed.
        """
        if value is None:
            return self.default
        if isinstance(value, Integral) and not isinstance(value, bool):  # also integers of NumPy
            value = int(value)
        kinds = _members(self.keyword_type)
        if not any(_is_instance(value, kind) for kind in kinds):
            allowed = ", ".join(dict.fromkeys(_TYPE_NAMES[_class_of(kind)] for kind in kinds))
            raise TypeError(f"{self.name} is {value!r}; allowed: {allowed}")
        choices = self.for_argparse.get("choices", (value,))
        if value not in choices:
            raise UsageError(f"{self.name} is {value!r}; allowed: {', '.join(choices)}")
        if self.is_list:
            return tuple(value)
        try:
            return self.parse(value) if self.parse else value
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{self.name}: {error}") from None


def option(group: str, text: str, default: Any = None, **stated: Any) -> Any:
    """Return a dataclass field that states an option: fields of `Option`, and arguments of `add_argument`.

    `keyword_type` is needed only if `engine.screen` takes another type than the field holds.
    """
    for_argparse = {name: stated.pop(name) for name in _FOR_ARGPARSE if name in stated}
    described = Option(group=group, help=text, default=default, for_argparse=for_argparse, **stated)
    return field(default=default, metadata={"option": described})


def options_of(record: type[Any]) -> dict[str, Option]:
    """Return the options that the fields of a dataclass state, by name, in their order."""
    hints = typing.get_type_hints(record)
    return {
        name: replace(described, name=name, keyword_type=described.keyword_type or _keyword_type(hints[name]))
        for name, described in ((entry.name, entry.metadata.get("option")) for entry in fields(record))
        if described
    }


def _keyword_type(hint: Any) -> Any:
    kinds = [_KEYWORD_TYPES.get(kind, kind) for kind in _members(hint) if kind is not types.NoneType]
    return kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)]  # noqa: UP007 - of a tuple


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _class_of(kind: Any) -> Any:
    """Return the class of a type annotation; str for a Literal."""
    origin = typing.get_origin(kind)
    return str if origin is typing.Literal else origin or kind


def _is_instance(value: Any, kind: Any) -> bool:
    kind = _class_of(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is Sequence:
        return (
            isinstance(value, Iterable)
            and not isinstance(value, str | bytes)
            and all(isinstance(item, str) for item in value)
        )
    return isinstance(value, Real if kind is float else kind)


def integer(low: int = 1, high: int | None = None) -> Callable[[str | int], int]:
    """Return a parser of whole numbers from `low` to `high`."""

    allowed = "a positive whole number" if high is None else f"a whole number from {low} to {high}"

    def parse(value: str | int) -> int:
        number = int(value) if isinstance(value, int) or re.fullmatch(r"[0-9]{1,18}", value) else low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{value!r} is not {allowed}")
        return number

    return parse


def number(low: float, high: float) -> Callable[[str | float], float]:
    """Return a parser of numbers from `low` to `high`."""

    def parse(value: str | float) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{value!r} is not a number between {low:g} and {high:g}")
        return number

    return parse


def byte_size(value: str | int) -> int:
    """Parse '2GiB', '512M' or '4096' as a number of bytes."""
    text = str(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; give bytes or a number with a unit, such as 2GiB"
        )
    return int(float(match[1]) * _UNITS[match[2]])
