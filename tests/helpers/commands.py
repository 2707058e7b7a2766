"""List all commands of the project, by their source text, and their parsers."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from engine.cli.parser import Parser
from engine.core.errors import UsageError
from tests.helpers.processes import ROOT

PEERS = "benchmarks/peers/"
# modules that other processes start
NO_COMMANDS = {"engine/preprocess/decoder.py", "tests/helpers/nodes.py"}


def commands() -> list[str]:
    """List the modules that run with `python -m`."""
    result = []
    for path in sorted(ROOT.glob("*/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(".") or name in NO_COMMANDS or path == Path(__file__):
            continue
        if path.name == "__main__.py" or "if __name__ ==" in (text := path.read_text()):
            if name.startswith(PEERS) and "Job.from_command_line()" in text:
                continue
            result.append(name.removesuffix(".py").removesuffix("/__main__").replace("/", "."))
    return result


def parser_of(command: str) -> Parser:
    module = "engine.cli.options" if command == "engine.run" else command
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
    """Parse each `python -m COMMAND ...` of a shell text with the command's parser; return their number."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    result = [match[1] for line in lines if (match := re.search(r"(?:^|\s)python -m ([a-z].*)", line))]
    for line in result:
        command, *arguments = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)  # variables: any number
        if command in ("venv", "pip"):
            continue
        parser = parser_of(command)
        if not arguments:  # only its name
            continue
        try:
            parser.parse_args(arguments)
        except SystemExit:  # for --help
            continue
        except UsageError as error:
            raise AssertionError(f"python -m {line}: {error}") from error
    return len(result)
