"""`python -m engine.report RESULTS`: the page of a run that is there already, with other rows or pictures."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from functools import partial

from rich.console import Console

from engine.report import ROWS, write
from engine.run import NOTICE, Parser, answered, number
from engine.settings import parse_location

MOST_ROWS, MOST_THUMBNAILS = 20_000, 5_000


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m engine.report",
        description="Write RESULTS/report.html, one file that opens in any browser, without a network.",
        epilog=f"example: python -m engine.report results --thumbnails 50\n\n{NOTICE}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("results", type=parse_location, metavar="RESULTS", help="of a run or merged; s3://, gs://, az:// too")
    add(
        "--rows",
        type=partial(_whole, most=MOST_ROWS),
        default=ROWS,
        metavar="N",
        help="of the riskiest and of the abstained rows, each (%(default)s)",
    )
    add(
        "--thumbnails",
        type=partial(_whole, most=MOST_THUMBNAILS),
        default=0,
        metavar="N",
        help="pictures of the first N listed rows, read again; not of a run with --redact",
    )
    add("--label-column", metavar="NAME", help="with the true class, for the figures of merit (label)")
    add("--unfinished", action="store_true", help="of the parts that are there")
    console = Console(stderr=True, emoji=False)

    def work() -> int:
        given = vars(parser.parse_args(arguments))
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        print(write(given.pop("results"), say=say, **given))
        return 0

    try:
        return answered(console, work)
    except KeyboardInterrupt:
        return 130


def _whole(text: str, most: int) -> int:
    value = number(text, 1, most)
    if value != int(value):
        raise ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
