"""Read JSON into typed records and write it back; errors name the field and its value."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, dataclass_transform

import msgspec
from msgspec import inspect

T = TypeVar("T")
Path = tuple[str | int, ...]  # the fields, keys and positions that lead to a value

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[(\.\.\.)\]")
_LOCATION = re.compile(r" - at (`key` in )?`\$([^`]*)`$")
_PATTERN = re.compile(r"`str` matching regex '(.*)'$")
_FIELD = re.compile(r"Object (contains unknown|missing required) field `(.*)`$")
_SHOWN = 120  # characters of a value in an error line
_LINE = 300  # characters of an error line
_TYPE = re.compile("`([a-z| ]+)`")
_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
# msgspec 0.22 has crashed where several threads used a record type for the first time at once
_convert_lock = threading.RLock()
_FORMS: dict[str, str] = {}  # descriptions given to `text`, by the pattern in msgspec's messages


class _KeywordsOnly(msgspec.StructMeta):
    """Makes subclasses of a record take keywords only, which msgspec does not inherit."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        return super().__new__(cls, name, bases, namespace, **{"kw_only": True} | options)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, metaclass=_KeywordsOnly):
    """Base class of everything that is read from or written to JSON.

    A subclass checks relations between its fields in `__post_init__` and raises ValueError there.
    Fields that older versions did not write have a default.
    """


def text(pattern: str, description: str) -> Any:
    """Return the metadata of a text that matches all of `pattern`; an error line shows `description`."""
    anchored = rf"\A(?:{pattern})\Z"
    _FORMS[repr(anchored)[1:-1]] = description
    return msgspec.Meta(pattern=anchored)


Count = Annotated[int, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Sha256 = Annotated[str, text("[0-9a-f]{64}", "64 digits of 0-9 and a-f")]


def check_order(name: str, *numbers: float) -> None:
    """Raise ValueError unless `numbers` ascend."""
    if list(numbers) != sorted(numbers):
        raise ValueError(f"{name} {list(numbers)} is not in order")


def from_json(text: bytes | str, kind: type[T]) -> T:
    """Parse `text` into a `kind`. Raises ValueError in one line: field, value, what is allowed."""
    try:
        # not msgspec's parser: it refuses lone surrogates, which stand for bytes of non-UTF-8 file names
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({_one_line(error)})") from None
    return from_builtins(data, kind)


def from_builtins(data: Any, kind: type[T]) -> T:
    """Check `data`, made of dicts, lists, texts and numbers, and return it as a `kind`. Raises ValueError."""
    try:
        for path, number in _not_finite(data, ()):
            raise ValueError(f"{_named(path)} is {json.dumps(number)}: expected a finite number")
        with _convert_lock:
            return msgspec.convert(data, kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise ValueError(_one_line(_explain(str(error), data, kind))) from None


def to_builtins(record: Any) -> Any:
    """Return the dicts, lists, texts and numbers that `to_json` writes."""
    return msgspec.to_builtins(record)


def to_json(record: Any, *, ascii_only: bool = True) -> str:
    """Return indented JSON. Raises ValueError for a number that JSON cannot hold (NaN, infinity)."""
    return json.dumps(to_builtins(record), indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n"


def _not_finite(data: Any, path: Path) -> Iterator[tuple[Path, float]]:
    if isinstance(data, dict | list):
        for step, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _not_finite(value, (*path, step))
    elif isinstance(data, float) and not math.isfinite(data):
        yield path, data


def _explain(message: str, data: Any, kind: Any) -> str:
    """Put field and value before msgspec's message: `members[0].weight is 1.5: ...`."""
    reason, location = message, _LOCATION.search(message)
    path: Path = ()
    if location:
        reason = message[: location.start()]
        path = _path(location[2], data, kind, message)
        if location[1]:  # a key does not fit
            (entry,) = _offending(data, path, kind, message)
            return f"{_named(path)}: key {_shown(entry)}: {_allowed(reason, kind, path)}"
    if match := _FIELD.match(reason):
        return f"{_named((*path, match[2]))}" + (
            " is missing" if "missing" in match[1] else ": unknown field"
        )
    if not reason.startswith(("Expected ", "Invalid ", "Number ", "Integer ")):  # raised by a __post_init__
        return f"{_named(path)}: {reason}" if path else reason
    allowed = _allowed(reason, kind, path)
    return f"{_named(path)} is {_shown(_value_at(data, path))}: {allowed}" if path else allowed


def _allowed(reason: str, kind: Any, path: Path) -> str:
    """Return msgspec's message with the description of `text` for a pattern and the values of a Literal."""
    if reason.startswith("Invalid enum value"):
        return f"allowed: {', '.join(map(str, _literals(kind, path)))}"
    if match := _PATTERN.search(reason):
        return f"expected {_FORMS.get(match[1], f'a text like {match[1]}')}"
    if path:  # the value is shown
        reason = reason.partition(", got `")[0]
    return _TYPE.sub(_in_words, reason[0].lower() + reason[1:])


def _in_words(types: re.Match[str]) -> str:
    """Return types such as `float | null` in words."""
    return " or ".join(_TYPES.get(name, name) for name in types[1].split(" | "))


def _literals(kind: Any, path: Path) -> tuple[Any, ...]:
    """Return the values that are allowed at `path` of a `kind`."""
    node: Any = inspect.type_info(kind)
    for step in (*path, None):
        if isinstance(node, inspect.UnionType):
            node = next(entry for entry in node.types if not isinstance(entry, inspect.NoneType))
        if isinstance(node, inspect.StructType):
            node = next(entry.type for entry in node.fields if entry.encode_name == step)
        elif isinstance(node, inspect.DictType):
            node = node.value_type
        elif isinstance(node, inspect.TupleType):
            node = node.item_types[int(step or 0)]
        elif not isinstance(node, inspect.LiteralType):
            node = node.item_type
    return tuple(node.values)


def _path(location: str, data: Any, kind: Any, message: str) -> Path:
    """Return the path at msgspec's `location`, which shows `[...]` for the entry of a dict."""
    path: Path = ()
    for name, index, any_entry in _STEP.findall(location):
        if any_entry:
            entries = _offending(data, path, kind, message)
            if not entries:
                break
            path = (*path, *entries)
        else:
            path = (*path, name or int(index))
    return path


def _offending(data: Any, path: Path, kind: Any, message: str) -> list[Any]:
    """Bisect the dict at `path` for the key whose entry makes msgspec raise `message`."""
    entries = _value_at(data, path)
    keys = list(entries) if isinstance(entries, dict) else []
    while len(keys) > 1:
        half = keys[: len(keys) // 2]
        try:
            msgspec.convert(_with(data, path, {key: entries[key] for key in half}), kind)
            fits = True
        except msgspec.ValidationError as error:
            fits = str(error) != message
        keys = keys[len(half) :] if fits else half
    return keys


def _with(data: Any, path: Path, value: Any) -> Any:
    """Return a copy of `data` with another value at `path`."""
    if not path:
        return value
    step, *rest = path
    copy = data.copy()
    copy[step] = _with(data[step], tuple(rest), value)
    return copy


def _value_at(data: Any, path: Path) -> Any:
    for step in path:
        data = data[step]
    return data


def _named(path: Path) -> str:
    """Return `members[0].weight`."""
    steps = (
        f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{_shown(step)}]" for step in path
    )
    return "".join(steps).removeprefix(".")


def _shown(value: Any) -> str:
    """Return `value` as JSON, shortened."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _one_line(error: object) -> str:
    """Return printable text in one line: a value may contain control characters."""
    words = " ".join(str(error).split())[:_LINE]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in words)
