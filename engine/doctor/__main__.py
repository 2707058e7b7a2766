"""Check a setup before a run: `python -m engine.doctor [MANIFEST]`."""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console

from engine.cli import options
from engine.cli.log import RedactingLog, named_locations
from engine.cli.parser import Parser
from engine.cli.terminal import hush_libraries, run_command
from engine.core.records import OnMessage
from engine.doctor.show import run_doctor
from engine.runs import run_settings


def option_parser() -> Parser:
    return options.option_parser(
        "python -m engine.doctor",
        "Check what a run with these options would do on this machine, and list problems and their fixes.",
        "examples:\n  python -m engine.doctor -b bundle\n  python -m engine.doctor manifest.csv -b bundle",
        needs_manifest=False,
    )


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    hush_libraries()
    log = RedactingLog(redact="--redact" in arguments)
    console = Console(file=cast(TextIO, log))
    say: OnMessage = partial(console.print, markup=False, highlight=False, soft_wrap=True)

    def work() -> int:
        values = vars(option_parser().parse_args(arguments))
        manifest = values["manifest"] is not None
        settings = run_settings.settings_of(values | {"manifest": values["manifest"] or Path()})
        log.known = named_locations(settings)
        return run_doctor(sys.stdout, settings, manifest=manifest, say=say, stop=threading.Event())

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
