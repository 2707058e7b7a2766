"""Write the report of a run again, with other rows or pictures: `python -m engine.report RESULTS`."""

from __future__ import annotations

import sys
from functools import partial

from rich.console import Console

from engine.cli.parser import Parser
from engine.cli.terminal import run_command
from engine.core.option import integer
from engine.core.settings import parse_location
from engine.report.render import DEFAULT_ROWS, write_report

MAX_ROWS, MAX_THUMBNAILS = 20_000, 5_000


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.report",
        "RESULTS [options]",
        description="Write RESULTS/report.html, one file that opens in any browser, without a network.",
        examples="example: python -m engine.report results --thumbnails 50",
    )
    add = parser.add
    add(
        "results",
        type=parse_location,
        metavar="RESULTS",
        help="results of a run, or merged ones; also s3://, gs://, az://",
    )
    add(
        "--rows",
        type=integer(1, MAX_ROWS),
        default=DEFAULT_ROWS,
        metavar="N",
        help="number of rows in each list: highest risk, abstained (%(default)s)",
    )
    add(
        "--thumbnails",
        type=integer(1, MAX_THUMBNAILS),
        default=0,
        metavar="N",
        help="add pictures of the first N listed rows; not for a run with --redact",
    )
    add("--label-column", metavar="NAME", help="column of the true class, for figures of merit (label)")
    add("--unfinished", action="store_true", help="report the finished parts of an unfinished run")
    return parser


def main(arguments: list[str] | None = None) -> int:
    console = Console(stderr=True, emoji=False)

    def work() -> int:
        options = vars(option_parser().parse_args(arguments))
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        print(write_report(options.pop("results"), say=say, **options))
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
