"""`python -m engine.report RESULTS`: the page of a run that is there already, with other rows or pictures."""

from __future__ import annotations

import sys
from functools import partial

from rich.console import Console

from engine.cli.parser import Parser
from engine.cli.terminal import run_command
from engine.core.option import whole
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
    add("results", type=parse_location, metavar="RESULTS", help="of a run or merged; s3://, gs://, az:// too")
    add(
        "--rows",
        type=whole(1, MAX_ROWS),
        default=DEFAULT_ROWS,
        metavar="N",
        help="of the riskiest and of the abstained rows, each (%(default)s)",
    )
    add(
        "--thumbnails",
        type=whole(1, MAX_THUMBNAILS),
        default=0,
        metavar="N",
        help="pictures of the first N listed rows, read again; not of a run with --redact",
    )
    add("--label-column", metavar="NAME", help="with the true class, for the figures of merit (label)")
    add("--unfinished", action="store_true", help="of the parts that are there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    console = Console(stderr=True, emoji=False)

    def work() -> int:
        given = vars(option_parser().parse_args(arguments))
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        print(write_report(given.pop("results"), say=say, **given))
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
