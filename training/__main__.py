"""Command line: `python -m training DATA -o BUNDLE`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.errors import EngineError, UsageError
from training.settings import Options

if TYPE_CHECKING:
    from training.recipe import Report

SMALLEST_SIDE = 75  # pixels; what inception_v3 can still reduce
_EPILOG = """\
example:
  python -m training radiographs -o bundle --classes normal osteopenia osteoporosis

Research use only, not a medical device."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and report. Returns the exit status."""
    try:
        options = _parse(arguments)
        from training.recipe import train  # seconds of imports: after --help and wrong arguments

        with _Steps() as steps:
            report = train(options, step=steps.step, note=steps.note)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("error: interrupted; no bundle was written", file=sys.stderr)
        return 130
    _show(report, options)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see: python -m training --help")


def _parse(arguments: Sequence[str] | None) -> Options:
    parser = _Parser(
        prog="python -m training",
        description="Train an ensemble on a folder of class folders and write a bundle for the engine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="folder with one folder of images per class")
    add("-o", "--output", metavar="BUNDLE", type=Path, required=True, help="where the bundle goes")
    add(
        "--members",
        nargs="+",
        metavar="NAME",
        default=Options.members,
        help="resnet50, inception_v3 (default: both)",
    )
    add(
        "--weights",
        nargs="+",
        metavar="W",
        default=Options.weights,
        help="of the bases: imagenet (default), none (random: a demonstration) or files, one per member",
    )
    add("--classes", nargs="+", metavar="NAME", help="class folders, in order (default: all, sorted)")
    add(
        "--size",
        nargs=2,
        metavar=("H", "W"),
        type=int,
        default=Options.size,
        help="input in pixels (default: 224 224)",
    )
    add("--epochs", type=int, metavar="N", default=Options.epochs, help="at most (default: %(default)s)")
    add(
        "--seed",
        type=int,
        metavar="N",
        default=Options.seed,
        help="of everything random (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a bundle that is there")
    given = vars(parser.parse_args(arguments))
    given["size"] = tuple(given["size"])
    return _checked(Options(**given))


def _checked(options: Options) -> Options:
    if options.epochs < 1:
        raise UsageError(f"--epochs {options.epochs}: at least 1")
    if min(options.size) < SMALLEST_SIDE:
        height, width = options.size
        raise UsageError(
            f"--size {height} {width}: at least {SMALLEST_SIDE} each, or the networks end up empty"
        )
    return options


class _Steps:
    """Progress on stderr: bars on a terminal, one line per finished step elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> _Steps:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self._bars.add_task(what, total=total)
        start, count = time.monotonic(), 0

        def progress(done: int) -> None:
            nonlocal count
            count += done
            self._bars.advance(task, done)

        yield progress
        if not self._console.is_terminal:
            self.note(f"{what}: {count} of {total} in {time.monotonic() - start:.1f} s")

    def note(self, line: str) -> None:
        self._console.print(line, markup=False)


def _show(report: Report, options: Options) -> None:
    """The table and the next command, on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table("", "weight", box=None)
    for which in ("validation", "test"):
        table.add_column(f"{which}\naccuracy", justify="right")
        table.add_column("\nmacro-F1", justify="right")
    weights = [f"{weight:.2f}" for weight in report.chosen.weights]
    for name, weight in zip((*report.members, "ensemble"), (*weights, ""), strict=True):
        scores = report.scores[name]
        figures = [
            scores[which][figure] for which in ("validation", "test") for figure in ("accuracy", "macro_f1")
        ]
        table.add_row(name, weight, *(f"{figure:.3f}" for figure in figures))
    console.print(table)
    for candidate in report.beside:
        mix = " / ".join(f"{weight:g}" for weight in candidate.weights)
        console.print(f"beside: {mix} gives macro-F1 {candidate.macro_f1:.3f} on the validation set")
    bundle = shlex.quote(str(options.output))
    console.print(f"bundle: {bundle}\nuse it: python -m engine.run manifest.csv -b {bundle}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
