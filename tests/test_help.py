"""`--help` of every command: on one screen, with an example, at once; and what wrong options are answered."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.command import Parser
from engine.errors import UsageError
from engine.options import OPTIONS
from tests.conftest import ROOT

LINES, COLUMNS = 40, 100
HelpOf = Callable[..., str]
PEERS = "benchmarks/peers/"
NO_COMMANDS = {"engine/preprocess/decoder.py"}  # and the peers: processes that others start


def commands() -> list[str]:
    """What can be run by `python -m`, found by its text, so that a new one is not forgotten."""
    found = []
    for path in sorted(ROOT.glob("*/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(".") or name in NO_COMMANDS or name == "tests/test_help.py":
            continue
        if path.name == "__main__.py" or "if __name__ ==" in (text := path.read_text()):
            if name.startswith(PEERS) and "Job.from_command_line()" in text:
                continue
            found.append(name.removesuffix(".py").removesuffix("/__main__").replace("/", "."))
    return found


def shown(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", command, *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": str(COLUMNS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def check(text: str, *, lines: int) -> None:
    assert len(text.splitlines()) <= lines
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert re.search(r"^examples?:[ \n]+python -m ", text, re.MULTILINE)
    assert text.startswith("usage: python -m ")


def test_every_command_has_help_that_fits_a_screen() -> None:
    names = commands()
    assert {"engine.run", "engine.manifest", "build_engines", "training", "tests.fuzz"} <= set(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = dict(zip(names, pool.map(lambda name: shown(name, "--help"), names), strict=True))
    for name, answer in answers.items():
        assert answer.returncode == 0, f"{name}: {answer.stderr[-500:]}"
        check(answer.stdout, lines=LINES)
        assert answer.stdout.startswith(f"usage: python -m {name} "), name
        heavy = re.findall(r"\| +(torch|nvidia\.dali|tensorrt|sklearn)$", answer.stderr, re.MULTILINE)
        assert not heavy, f"{name} --help imports {heavy}"


def test_help_all_has_every_option(help_of: HelpOf) -> None:
    from build_engines.__main__ import option_parser as of_building
    from engine.doctor import option_parser as of_doctor
    from engine.options import option_parser as of_run
    from training.__main__ import option_parser as of_training

    for parser in (of_run, of_doctor, of_training, of_building):
        texts = {option: help_of(parser(), option) for option in ("--help", "--help-all")}
        check(texts["--help"], lines=LINES)
        check(texts["--help-all"], lines=2 * LINES)
        few, every = (set(re.findall(r"^  .*?(--[\w-]+)", text, re.MULTILINE)) for text in texts.values())
        assert few < every
        if parser is of_run:
            assert "not a medical device" in texts["--help"]
            assert {option.names[-1] for option in OPTIONS.values()} <= every


def test_the_benchmarks_have_help_too(help_of: HelpOf) -> None:
    from benchmarks.__main__ import option_parser

    with pytest.raises(UsageError, match="invalid choice: '' ") as caught:
        option_parser().parse_args([""])
    names = re.findall(r"\w+", str(caught.value).split("choose from")[1].split(")")[0])
    assert "throughput" in names
    for name in names:
        check(help_of(option_parser(), name, "--help"), lines=LINES)


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> HelpOf:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))

    def text(parser: Parser, *arguments: str) -> str:
        with pytest.raises(SystemExit, match=r"^0$"):
            parser.parse_args(arguments)
        return capsys.readouterr().out

    return text


def test_a_near_miss_is_named(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "engine.run", "manifest.csv", "--finishby=06:00"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert answer.stderr == (
        "error: unrecognized arguments: --finishby=06:00; did you mean --finish-by?; "
        "see python -m engine.run --help\n"
    )
