"""Read JSON into typed records and write it back; what does not fit is named by field and value."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[(\.\.\.)\]")
_SHOWN = 120  # characters of a value in an error line


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of everything that is read from or written to JSON.

    A subclass checks relations between its fields in `__post_init__` and raises ValueError there.
    Fields that older versions did not write have a default. A subclass says `kw_only=True` again, which
    msgspec does not inherit.
    """


def from_json(text: bytes | str, kind: type[T]) -> T:
    """Parse `text` into a `kind`. Raises ValueError in one line: field, value, what is allowed."""
    try:
        # not msgspec's: paths that are not UTF-8 are stored as lone surrogates, which it refuses
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({_one_line(error)})") from None
    return from_builtins(data, kind)


def from_builtins(data: Any, kind: type[T]) -> T:
    """Check `data`, made of dicts, lists, texts and numbers, and return it as a `kind`. Raises ValueError."""
    try:
        return msgspec.convert(data, kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise ValueError(_explain(str(error), data)) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def to_builtins(record: Any) -> Any:
    """Return the dicts, lists, texts and numbers that `to_json` writes."""
    return msgspec.to_builtins(record)


def to_json(record: Any) -> str:
    """Return indented JSON in ASCII. Raises ValueError for a number that JSON cannot hold (NaN, infinity)."""
    return json.dumps(to_builtins(record), indent=2, allow_nan=False) + "\n"


def _explain(message: str, data: Any) -> str:
    """Put field and value before what msgspec says is allowed: `members[0].weight is 1.5: ...`."""
    reason, _, path = message.partition(" - at `$")
    path = path.removesuffix("`").removeprefix(".")
    if reason.startswith("Object contains unknown field"):
        field = reason.partition("`")[2].rstrip("`")
        return f"{_join(path, field)}: unknown field"
    if reason.startswith("Object missing required field"):
        field = reason.partition("`")[2].rstrip("`")
        return f"{_join(path, field)} is missing"
    reason = _one_line(reason[:1].lower() + reason[1:])
    if not path:
        return reason
    return f"{path} is {_value_at(data, path)}: {reason}"


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


def _value_at(data: Any, path: str) -> str:
    """Return the offending value as JSON, shortened; msgspec writes `[...]` for a key or value of a dict."""
    value = data
    for name, index, any_key in _STEP.findall("." + path if not path.startswith("[") else path):
        if any_key or not isinstance(value, dict | list):
            break
        value = value.get(name) if isinstance(value, dict) else value[int(index)]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
