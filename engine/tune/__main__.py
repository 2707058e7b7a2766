"""Search for the fastest options: `python -m engine.tune MANIFEST`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.cli.options import add_options
from engine.cli.parser import Parser
from engine.cli.terminal import hush_libraries, run_command, stop_on_signal
from engine.core.option import number
from engine.core.settings import Settings, parse_location
from engine.tune.search import tune


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.tune",
        "BUNDLE --sample MANIFEST [option ...]",
        description="Find the fastest options on this machine for your images; engine.run uses them.",
        examples="example: python -m engine.tune bundle --sample manifest.csv",
    )
    add = parser.add
    add("bundle", type=Path, metavar="BUNDLE", help="model folder; the profile goes into BUNDLE.tuning")
    add(
        "--sample",
        dest="manifest",
        type=parse_location,
        required=True,
        metavar="MANIFEST",
        help="images to measure, as for engine.run",
    )
    add("--seconds", type=number(1, 86_400), default=60.0, metavar="S", help="search time (%(default)g)")
    add_options(parser, "device", "runner", "precision", "path_column", "root", "memory")
    return parser


def main(arguments: list[str] | None = None) -> int:
    console = Console(stderr=True, emoji=False)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    hush_libraries()

    def work() -> int:
        values: dict[str, Any] = vars(option_parser().parse_args(arguments))
        seconds = values.pop("seconds")
        stop = stop_on_signal(console).stop
        verdict, path = tune(Settings(**values), seconds=seconds, say=say, stop=stop)
        say(f"the profile for engine.run was written to {path}")
        print(verdict)
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
