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

from engine.cli.parser import Parser
from engine.core.settings import OPTIONS
from tests.helpers.commands import benchmark_names, check_lines, commands, parser_of
from tests.helpers.processes import ROOT

LINES, COLUMNS = 40, 100
HelpOf = Callable[..., str]


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
    for command in ("engine.run", "engine.doctor", "training", "build_engines"):
        texts = {option: help_of(parser_of(command), option) for option in ("--help", "--help-all")}
        check(texts["--help"], lines=LINES)
        check(texts["--help-all"], lines=2 * LINES)
        few, every = (set(re.findall(r"^  .*?(--[\w-]+)", text, re.MULTILINE)) for text in texts.values())
        assert few < every
        assert every == set(parser_of(command).names) | {"--help"}
        if command == "engine.run":
            assert "not a medical device" in texts["--help"]
            assert {option.flag for option in OPTIONS.values()} <= every


def test_the_benchmarks_have_help_too(help_of: HelpOf) -> None:
    names = benchmark_names()
    assert "throughput" in names
    for name in names:
        check(help_of(parser_of("benchmarks"), name, "--help"), lines=LINES)


def test_examples_in_help_parse(help_of: HelpOf) -> None:
    for command in commands():
        whole = help_of(parser_of(command), "--help")
        examples = re.split(r"^examples?:", whole, flags=re.MULTILINE)[1].split("\n\n")[0]
        lines = [re.sub("  +", "  # ", line.strip()) for line in examples.splitlines()]
        assert check_lines("\n".join(lines)) >= 1, command


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> HelpOf:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))

    def text(parser: Parser, *arguments: str) -> str:
        with pytest.raises(SystemExit, match=r"^0$"):
            parser.parse_args(arguments)
        return capsys.readouterr().out

    return text


def test_a_misspelt_option_names_the_nearest(tmp_path: Path) -> None:
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
