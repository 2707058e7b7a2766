"""The common parser of all commands: --help for one screen, errors in one line."""

from __future__ import annotations

import argparse
import difflib
import shutil
from collections.abc import Sequence
from typing import Any, NoReturn

from engine.core.errors import UsageError

MAX_WIDTH = 100  # columns of --help


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(MAX_WIDTH, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, max_help_position=32, width=width)


class _HelpAllAction(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        assert isinstance(parser, Parser)
        parser.show_all()
        parser.print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """The parser of one command. Raises UsageError for wrong arguments, SystemExit for --help.

    `summary` follows the command in the usage line of --help. With `help_all`, --help hides the options that
    are added with `more`, and --help-all shows them. `names` has all long options.
    """

    def __init__(
        self, prog: str, summary: str, *, description: str, examples: str, help_all: bool = False
    ) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {summary}",
            description=description,
            epilog=examples,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # commands in scripts and logs name options in full
        )
        self.names: list[str] = []
        self._more: dict[argparse.Action, str] = {}
        if help_all:
            text, hide = "show this message with every option", argparse.SUPPRESS
            self.add("--help-all", action=_HelpAllAction, nargs=0, dest=hide, default=hide, help=text)

    def add(self, *names: str, help: str, more: bool = False, group: Any = None, **rest: Any) -> None:  # noqa: A002
        """Add an argument like `add_argument`, to `group` if it is given."""
        self.names += [name for name in names if name.startswith("--")]
        if not more:
            (group or self).add_argument(*names, help=help, **rest)
            return
        self._more[(group or self).add_argument(*names, help=argparse.SUPPRESS, **rest)] = help

    def show_all(self) -> None:
        for action, text in self._more.items():
            action.help = text

    def error(self, message: str) -> NoReturn:
        _, unknown, rest = message.partition("unrecognized arguments: ")
        similar = difflib.get_close_matches(rest.split("=")[0].split()[0], self.names, 1) if unknown else []
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise UsageError(f"{message}{hint}; see {self.prog} --help")
