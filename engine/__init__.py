"""Screens archives of bone radiographs: a manifest in, one row of class probabilities per image out.

    summary = engine.screen("manifest.csv", output="results", bundle="bundle")
    rows = engine.read_results("results")  # pandas; open_results: Arrow, without holding them all

Importing this loads nothing else; the functions come when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.core.version import __version__ as __version__

if TYPE_CHECKING:
    from engine.api import screen
    from engine.core.errors import EngineError, NothingNew, ParityError, Stopped, UsageError
    from engine.results import open_results, read_results
    from engine.runs.summary import ErrorRateError

__all__ = [
    "EngineError",
    "ErrorRateError",
    "NothingNew",
    "ParityError",
    "Stopped",
    "UsageError",
    "open_results",
    "read_results",
    "screen",
]
_ELSEWHERE = {
    "ErrorRateError": "engine.runs.summary",
    "open_results": "engine.results",
    "read_results": "engine.results",
    "screen": "engine.api",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "engine.core.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
