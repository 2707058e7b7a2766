"""Build the command line of `engine.run` and of doctor from the options of `Settings`."""

from __future__ import annotations

from typing import Any

from engine.cli.parser import Parser
from engine.core.option import Option
from engine.core.settings import OPTIONS, parse_location

NOTICE = "Research use only; not a medical device. The output is a work list for people, not a diagnosis."
EXAMPLES = """\
examples:
  python -m engine.run manifest.csv -b bundle -o results
  python -m engine.run archive.zip -b bundle -o results --finish-by 06:00"""


def option_parser(
    prog: str = "python -m engine.run",
    description: str = "Screen a list of bone radiographs: one row of class probabilities per image.",
    examples: str = EXAMPLES,
    *,
    needs_manifest: bool = True,
) -> Parser:
    manifest = "MANIFEST" if needs_manifest else "[MANIFEST]"
    parser = Parser(
        prog,
        f"{manifest} [-b BUNDLE] [-o RESULTS] [option ...]",
        description=description,
        examples=f"{examples}\n\n{NOTICE}",
        help_all=True,
    )
    groups = {
        title: parser.add_argument_group(title)
        for title in dict.fromkeys(option.group for option in OPTIONS.values())
    }
    parser.add(
        "manifest",
        group=next(iter(groups.values())),
        help="CSV, Parquet, text list, folder, zip or tar",
        type=parse_location,
        nargs=None if needs_manifest else "?",
        metavar="MANIFEST",
    )
    for option in OPTIONS.values():
        _add(parser, option, groups[option.group], more=not option.first)
    return parser


def add_options(parser: Parser, *names: str) -> None:
    """Add some options of `engine.run` to the parser of another command."""
    for name in names:
        _add(parser, OPTIONS[name], None, more=False)


def _add(parser: Parser, option: Option, group: Any, *, more: bool) -> None:
    flags = (option.short, option.flag) if option.short else (option.flag,)
    parser.add(*flags, help=option.help, more=more, group=group, **option.argparse_arguments)
