"""Print a diagnosis."""

from __future__ import annotations

import threading
from functools import partial
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.core.records import OnMessage
from engine.core.settings import Settings
from engine.doctor.checks import diagnose
from engine.doctor.diagnosis import Diagnosis


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print short tables, then the problems with their commands on one line each."""
    width = max((len(label) for _, lines in diagnosis.sections for label, _ in lines), default=0)
    narrow, say = console.width < 3 * width, partial(console.print, soft_wrap=True)
    for title, lines in diagnosis.sections:
        if not lines:
            continue
        say(Text(title, "bold"))
        if not console.is_terminal:  # one line each, to be searched and stored
            for label, text in lines:
                say(Text(f"  {label:{width}}  {text}"))
            continue
        table = Table.grid(padding=(0, 2))
        if not narrow:
            table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in lines:
            cells = [Text(label), Text(text)]
            table.add_row(*([Text(": ").join(cells)] if narrow else cells))
        console.print(table)
    for problem in diagnosis.problems:
        label, style = ("problem: ", "bold red") if problem.blocking else ("note: ", "bold yellow")
        say(Text.assemble((label, style), problem.text))
        say(Text(f"    {problem.fix}"))
    if not diagnosis.problems:
        say(Text("no problem found", "bold green"))


def run_doctor(
    stream: TextIO, settings: Settings, *, manifest: bool, say: OnMessage, stop: threading.Event
) -> int:
    """Check a setup, print the diagnosis and return the exit status."""
    diagnosis = diagnose(settings, manifest=manifest, say=say, stop=stop)
    show_diagnosis(diagnosis, Console(file=stream))
    return diagnosis.exit_status
