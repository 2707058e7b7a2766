"""Format the pages of the engine and of training: templates, numbers and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
SPACES = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"  # spaces inside formatted numbers
SERIES = 8  # colours in style.css; a ninth line has the first colour
DASHES = ("none", "5 2", "1.5 1.5", "6 2 1.5 2")  # in line widths, as matplotlib and SVG count them


def make_environment(*folders: Path, **filters: Any) -> jinja2.Environment:
    """Return the templates of `folders` and of this folder; they escape all values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"series": SERIES, "dashes": DASHES}
    environment.filters |= {
        "number": format_number,
        "span": format_interval,
        "percent": format_percent,
        "count": format_count,
        "share": row_share,
        "shown": format_option,
        **filters,
    }
    return environment


def printable(value: Any) -> Any:
    """Replace control characters, lone surrogates and marks that change the direction of text."""
    if isinstance(value, Markup):  # from this program
        return value
    if isinstance(value, str):
        return "".join(
            character if character.isprintable() or character in SPACES else "\N{REPLACEMENT CHARACTER}"
            for character in value
        )
    if isinstance(value, dict):
        return {printable(key): printable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(entry) for entry in value]
    return value


def format_number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """Format a number with a true minus sign; None becomes a dash."""
    if value is None:
        return DASH
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}".replace("-", MINUS)


def format_interval(figure: Mapping[str, Any], digits: int = 3, signed: bool = False) -> str:
    """Format the interval of a figure; a missing one becomes a dash."""
    if figure["low"] is None:
        return DASH
    low, high = (format_number(figure[end], digits, signed) for end in ("low", "high"))
    return f"{low} to {high}" if signed or low.startswith(MINUS) else f"{low}{DASH}{high}"


def format_percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def format_count(value: int) -> str:
    """Format a count, with a narrow space between thousands."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def count_noun(number: int, noun: str) -> str:
    return f"{format_count(number)} {noun}{'' if number == 1 else 's'}"


def row_share(row: Sequence[int], index: int) -> float:
    """Return the share, 0 to 1, of a cell in a row of a confusion matrix."""
    return round(row[index] / max(sum(row), 1), 3)


def format_option(value: Any) -> str:
    """Format an option or any other JSON value."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_option, value)) or DASH
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_option(entry)}" for name, entry in value.items()) or DASH
    return f"{value:g}" if isinstance(value, float) else str(value) or DASH
