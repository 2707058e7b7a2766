"""The commands that there are, found by their text, so that a new one is not forgotten; and their parsers."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from engine.command import Parser
from engine.errors import UsageError
from tests.helpers.processes import ROOT

PEERS = "benchmarks/peers/"
# processes that others start, and so are the peers
NO_COMMANDS = {"engine/preprocess/decoder.py", "engine/fleet.py", "tests/helpers/nodes.py"}


def commands() -> list[str]:
    """What is run by `python -m`."""
    found = []
    for path in sorted(ROOT.glob("*/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(".") or name in NO_COMMANDS or path == Path(__file__):
            continue
        if path.name == "__main__.py" or "if __name__ ==" in (text := path.read_text()):
            if name.startswith(PEERS) and "Job.from_command_line()" in text:
                continue
            found.append(name.removesuffix(".py").removesuffix("/__main__").replace("/", "."))
    return found


def parser_of(command: str) -> Parser:
    module = {"engine.manifest": "engine.listing", "engine.run": "engine.options"}.get(command, command)
    if (ROOT / module.replace(".", "/")).is_dir():
        module += ".__main__"
    parser = import_module(module).option_parser()
    assert isinstance(parser, Parser)
    return parser


def benchmark_names() -> list[str]:
    with pytest.raises(UsageError, match="invalid choice: '' ") as caught:
        parser_of("benchmarks").parse_args([""])
    return re.findall(r"[\w-]+", str(caught.value).split("choose from")[1].split(")")[0])


def check_lines(text: str) -> int:
    """Parse each `python -m COMMAND ...` of a shell text as the command itself does; how many there are."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [match[1] for line in lines if (match := re.search(r"(?:^|\s)python -m ([a-z].*)", line))]
    for line in found:
        command, *arguments = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)  # variables: any number
        if command in ("venv", "pip"):
            continue
        parser = parser_of(command)
        if not arguments:  # its name alone
            continue
        try:
            parser.parse_args(arguments)
        except SystemExit:  # for --help
            continue
        except UsageError as error:
            raise AssertionError(f"python -m {line}: {error}") from error
    return len(found)
