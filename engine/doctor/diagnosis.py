"""The diagnosis of `engine.doctor`: lines by section, and problems with the command that fixes each."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from engine.cli.log import named_locations
from engine.core.errors import UsageError
from engine.core.redaction import redact_line
from engine.core.settings import Settings


@dataclass(frozen=True)
class Problem:
    text: str
    fix: str  # a command
    blocking: bool  # a run would fail or ignore an option


@dataclass
class Diagnosis:
    """Sections of lines, and the problems. With --redact, the named locations are hidden."""

    settings: Settings
    sections: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        return UsageError.exit_status if any(problem.blocking for problem in self.problems) else 0

    def add_section(self, title: str) -> None:
        self.sections.append((title, []))

    def add_line(self, label: str, text: str) -> None:
        self.sections[-1][1].append((label, self._redact(text)))

    def add_problem(self, text: str, fix: str, *, blocking: bool = True) -> None:
        """Add a problem. Locations in `fix` must come from `quote`."""
        self.problems.append(Problem(self._redact(text), fix, blocking))

    def _redact(self, text: str) -> str:
        text = "".join(character if character.isprintable() else "?" for character in text)
        return redact_line(text, named_locations(self.settings)) if self.settings.redaction else text

    def quote(self, location: object, placeholder: str) -> str:
        """Quote a location for a command; with --redact, return the placeholder."""
        return placeholder if self.settings.redaction else shlex.quote(str(location))


def format_bytes(count: float) -> str:
    """Format a number of bytes."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
