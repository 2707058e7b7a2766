"""State an option as a field's metadata; parse it from the command line or check it as a Python keyword."""

from __future__ import annotations

import argparse
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
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
_WORDS = {
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

    name: str  # of the field that holds its value
    group: str  # title in --help
    help: str
    default: Any
    short: str
    first: bool  # shown by --help, and not by --help-all alone
    operating: bool  # how a run is operated and not what it is: --only-errors does not take it from the run
    in_python: bool
    parse: Callable[[Any], Any] | None  # of a text, or of what `keyword_type` allows
    keyword_type: Any  # what `engine.screen` takes, None left out
    for_argparse: Mapping[str, Any]  # metavar, choices, nargs, const

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
        rest = {"dest": self.name, "default": self.default, **self.for_argparse}
        if self.keyword_type is bool:
            rest["action"] = argparse.BooleanOptionalAction if self.default is None else "store_true"
        elif self.is_list:
            rest |= {"action": "append", "default": []}
        elif self.parse:
            rest["type"] = self.parse
        return rest

    def check(self, value: Any) -> Any:
        """Return the field's value for a keyword's `value`; None is the default.

        Raises TypeError for a wrong type and UsageError for a value that is not allowed.
        """
        if value is None:
            return self.default
        if isinstance(value, Integral) and not isinstance(value, bool):  # of NumPy, too
            value = int(value)
        kinds = _members(self.keyword_type)
        if not any(_is_one(value, kind) for kind in kinds):
            words = ", ".join(dict.fromkeys(_WORDS[_plain(kind)] for kind in kinds))
            raise TypeError(f"{self.name} is {value!r}; allowed: {words}")
        choices = self.for_argparse.get("choices", (value,))
        if value not in choices:
            raise UsageError(f"{self.name} is {value!r}; allowed: {', '.join(choices)}")
        if self.is_list:
            return tuple(value)
        try:
            return self.parse(value) if self.parse else value
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{self.name}: {error}") from None


def option(
    group: str,
    text: str,
    default: Any = None,
    *,
    short: str = "",
    first: bool = False,
    operating: bool = False,
    in_python: bool = True,
    parse: Callable[[Any], Any] | None = None,
    keyword_type: Any = None,
    **for_argparse: Any,
) -> Any:
    """Return a dataclass field that states an option; see `Option`.

    `keyword_type` is given where `engine.screen` takes another type than the field holds.
    """
    stated = {
        "group": group,
        "help": text,
        "short": short,
        "first": first,
        "operating": operating,
        "in_python": in_python,
        "parse": parse,
        "keyword_type": keyword_type,
        "for_argparse": for_argparse,
    }
    return field(default=default, metadata={"option": stated})


def options_of(record: type[Any]) -> dict[str, Option]:
    """Return the options that the fields of a dataclass state, by name, in their order."""
    hints = typing.get_type_hints(record)
    found = {}
    for one in fields(record):
        if stated := one.metadata.get("option"):
            kind = stated["keyword_type"] or _keyword_type(hints[one.name])
            found[one.name] = Option(name=one.name, default=one.default, **(stated | {"keyword_type": kind}))
    return found


def _keyword_type(hint: Any) -> Any:
    members = [one for one in _members(hint) if one is not types.NoneType]
    kinds = [_KEYWORD_TYPES.get(one, one) for one in members]
    return kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)]  # noqa: UP007 - of a tuple


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _plain(kind: Any) -> Any:
    """Return the class behind a type; str for a Literal."""
    origin = typing.get_origin(kind)
    return str if origin is typing.Literal else origin or kind


def _is_one(value: Any, kind: Any) -> bool:
    kind = _plain(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is Sequence:
        return (
            isinstance(value, Iterable)
            and not isinstance(value, str | bytes)
            and all(isinstance(one, str) for one in value)
        )
    return isinstance(value, Real if kind is float else kind)


def whole(low: int = 1, high: int | None = None) -> Callable[[str | int], int]:
    """Return a parser of whole numbers from `low` to `high`."""

    def parse(given: str | int) -> int:
        value = int(given) if isinstance(given, int) or re.fullmatch(r"[0-9]{1,18}", given) else low - 1
        if value < low or (high is not None and value > high):
            allowed = (
                f"a whole number from {low} to {high}" if high is not None else "a positive whole number"
            )
            raise argparse.ArgumentTypeError(f"{given!r} is not {allowed}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[str | float], float]:
    """Return a parser of numbers from `low` to `high`."""

    def parse(given: str | float) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{given!r} is not a number between {low:g} and {high:g}")
        return value

    return parse


def size(given: str | int) -> int:
    """Return bytes, from 2GiB or the like."""
    try:
        return parse_bytes(str(given))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_bytes(text: str) -> int:
    """Return '2GiB', '512M' or '4096' as bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not found or found[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size; give bytes or a number with a unit, such as 2GiB")
    return int(float(found[1]) * _UNITS[found[2]])
