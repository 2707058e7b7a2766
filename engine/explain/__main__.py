"""Explain rows of a run: `python -m engine.explain RESULTS`."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import Progress

from engine.cli.log import RedactingLog, named_locations
from engine.cli.parser import Parser
from engine.cli.terminal import hush_libraries, run_command
from engine.core.errors import UsageError
from engine.core.option import integer
from engine.core.records import OnMessage
from engine.core.settings import MAX_WORKERS, Settings, parse_location
from engine.explain.explain import explain
from engine.explain.rows import MAX_ROWS, RowSelection
from engine.runs.run_folder import EXPLANATIONS_FOLDER, recorded_bundle_path

DEFAULT_TOP = 50
_REDACTION_OPTIONS = ("salt_file", "paths_from", "root")


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.explain",
        "RESULTS [options]",
        description="Draw which image regions moved the scores of some rows of a finished run.",
        examples="example: python -m engine.explain results --top 50",
    )
    add = parser.add
    add("manifest", type=parse_location, metavar="RESULTS", help="folder of a run, s3://, gs:// or az://")
    add(
        "--top",
        type=integer(1, MAX_ROWS),
        metavar="N",
        help=f"the N rows with the highest probability ({DEFAULT_TOP})",
    )
    add("--rows", type=_parse_row_ranges, default=[], metavar="ROWS", help="these rows, such as 3,17,40-45")
    add("--abstained", action="store_true", help="the rows on which the run abstained")
    add("--class", dest="of_class", metavar="NAME", help="class (the run's target, else the last)")
    add(
        "-o", "--output", type=parse_location, help=f"folder for the pictures (RESULTS/{EXPLANATIONS_FOLDER})"
    )
    add("-b", "--bundle", type=Path, help="the run's bundle, if it was moved")
    add("--device", default="cpu", help="cpu or cuda:N (%(default)s)")
    add(
        "--workers",
        type=integer(1, MAX_WORKERS),
        metavar="N",
        help="CPU threads (all usable CPUs)",
    )
    add("--redact", action="store_true", help="for a run with --redact: no line shows a path")
    add("--salt-file", type=Path, metavar="FILE", help="key of that run's hashes (ENGINE_SALT)")
    add("--paths-from", type=parse_location, metavar="MANIFEST", help="the manifest of that run")
    add("--root", type=parse_location, help="folder of that manifest's relative paths (its own folder)")
    return parser


def _parse_row_ranges(text: str) -> list[int]:
    """Return the row numbers of a text such as '3,17,40-45', each once."""
    rows: dict[int, None] = {}
    for word in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise argparse.ArgumentTypeError(
                f"{word!r} is not a row number or range; allowed: such as 3,17,40-45"
            )
        if last - first + len(rows) >= MAX_ROWS:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is more than {MAX_ROWS} rows")
        rows |= dict.fromkeys(range(first, last + 1))
    return list(rows)


def _settings_from(options: dict[str, Any]) -> tuple[Settings, RowSelection]:
    rows, abstained, top = options["rows"], options["abstained"], options["top"]
    if top is None and not rows and not abstained:
        top = DEFAULT_TOP
    option = next((name for name in _REDACTION_OPTIONS if options[name]), None)
    if option and not options["redact"]:
        raise UsageError(f"--{option.replace('_', '-')} works only with --redact")
    settings = Settings(
        manifest=options["manifest"],
        bundle=options["bundle"] or recorded_bundle_path(options["manifest"]),
        device=options["device"],
        workers=options["workers"],
        root=options["root"],
        paths_from=options["paths_from"],
        redact=options["redact"],
        salt_file=options["salt_file"],
    )
    return settings, RowSelection(top=top or 0, rows=rows, abstained=abstained, of_class=options["of_class"])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    hush_libraries()
    log = RedactingLog(redact="--redact" in arguments)
    console = Console(file=cast(TextIO, log), emoji=False)
    say: OnMessage = partial(console.print, markup=False, highlight=False, soft_wrap=True)

    def work() -> int:
        options = vars(option_parser().parse_args(arguments))
        settings, selection = _settings_from(options)
        log.known = named_locations(settings)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("explain", total=None)
            result = explain(
                settings,
                selection,
                output=options["output"],
                say=say,
                on_progress=lambda done, rows: bar.update(task, completed=done, total=rows),
            )
        say(f"{result.explained} of {result.requested} rows explained; research use only")
        if not options["output"] and not options["redact"]:
            say(f"add them to the report with: python -m engine.report {options['manifest']}")
        print(result.output)
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
