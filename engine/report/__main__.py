"""`python -m engine.report RESULTS`: the page of a run that is there already, with other rows or pictures."""

from __future__ import annotations

import sys
from functools import partial

from rich.console import Console

from engine.cli.terminal import run_command
from engine.command import Parser
from engine.core.option import whole
from engine.report import ROWS, write
from engine.settings import parse_location

MOST_ROWS, MOST_THUMBNAILS = 20_000, 5_000


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
        type=whole(1, MOST_ROWS),
        default=ROWS,
        metavar="N",
        help="of the riskiest and of the abstained rows, each (%(default)s)",
    )
    add(
        "--thumbnails",
        type=whole(1, MOST_THUMBNAILS),
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
        print(write(given.pop("results"), say=say, **given))
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
