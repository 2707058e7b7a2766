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
    blocking: bool  # a run would not start, or not do what it was asked to


@dataclass
class Diagnosis:
    """Sections of lines, and the problems; what people named is hidden where that was asked for."""

    settings: Settings
    sections: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        return UsageError.exit_status if any(problem.blocking for problem in self.problems) else 0

    def section(self, title: str) -> None:
        self.sections.append((title, []))

    def line(self, label: str, text: str) -> None:
        self.sections[-1][1].append((label, self.hidden(text)))

    def problem(self, text: str, fix: str, *, blocking: bool = True) -> None:
        """`fix` names places by `place` only."""
        self.problems.append(Problem(self.hidden(text), fix, blocking))

    def hidden(self, text: str) -> str:
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
        return redact_line(text, named_locations(self.settings)) if self.settings.redaction else text

    def place(self, place: object, word: str) -> str:
        """Quote a location for a command."""
        return word if self.settings.redaction else shlex.quote(str(place))


def format_bytes(count: float) -> str:
    """Format a number of bytes."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
