"""Write a run's log to standard error: with --redact without paths, with --log-json as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO

from engine.core.location import Url
from engine.core.redaction import redact_line
from engine.core.settings import Settings


def open_null() -> TextIO:
    return open(os.devnull, "w")


class RedactingLog:
    """Standard error, but a full disk or a closed pipe behind it does not end the run.

    With `as_json` each line written becomes an object {"time", "event": "message", "level", "message"}.
    """

    def __init__(self, *, redact: bool, as_json: bool = False) -> None:
        self._stream: TextIO = sys.stderr or open_null()  # None if it was closed
        self._redact = redact
        self.as_json = as_json
        self.known: list[tuple[str, str]] = []  # paths and their placeholders

    def write(self, text: str) -> int:
        redacted = redact_line(text, self.known) if self._redact else text
        if not self.as_json:
            self._put(redacted)
            return len(text)
        for line in filter(str.strip, redacted.splitlines()):
            level = "error" if line.startswith("error: ") else "info"
            self.event("message", level=level, message=line.removeprefix("error: "))
        return len(text)

    def event(self, event: str, **fields: Any) -> None:
        """Write one JSON object. `fields` must contain no path."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._put(json.dumps({"time": time, "event": event, **fields}, allow_nan=False) + "\n")
        self.flush()

    def _put(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def named_locations(settings: Settings) -> list[tuple[str, str]]:
    """Return every form of the user's locations that may appear in the log, with its placeholder."""
    locations = {
        "MANIFEST": settings.manifest,
        "ROOT": settings.root or settings.manifest.parent,
        "OUTPUT": settings.output,
        "BUNDLE": settings.bundle,
        "PATHS_FROM": settings.paths_from,
    }
    forms: list[tuple[str, str]] = []
    for placeholder, location in locations.items():
        if isinstance(location, Url):
            forms += [(form, placeholder) for form in (location.with_query, str(location))]
        elif location and location.name:
            paths = (location, location.absolute(), location.resolve())
            forms += [(str(form), placeholder) for form in paths]
    return forms
