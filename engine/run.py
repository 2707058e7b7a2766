"""`python -m engine.run MANIFEST`: the command line of a screening run, and nothing else."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from rich.console import Console

from engine.errors import EngineError, UsageError
from engine.pipeline import CPU_BATCH, CPU_PART_ROWS, Summary, screen
from engine.progress import Display, show_summary
from engine.runners import RUNNERS
from engine.settings import Limits, Settings, parse_bytes

NOTICE = "Research use only; not a medical device. The output is a work list for people, not a diagnosis."
EXAMPLE = "example: python -m engine.run manifest.csv -b bundle -o results"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m engine.run --help")


def _parser() -> argparse.ArgumentParser:
    defaults = Settings(manifest=Path())
    parser = _Parser(
        prog="python -m engine.run",
        description="Screen a list of bone radiographs: one row of class probabilities per image.",
        epilog=f"{EXAMPLE}\n\n{NOTICE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("manifest", type=Path, metavar="MANIFEST", help="CSV, Parquet, text list or folder of images")
    add("-o", "--output", type=Path, default=defaults.output, help="results folder (%(default)s)")
    add("-b", "--bundle", type=Path, default=defaults.bundle, help="model folder (%(default)s)")
    add("--device", default=defaults.device, help="auto or cpu (%(default)s)")
    add("--runner", default=defaults.runner, help=f"auto, {', '.join(RUNNERS)} (%(default)s)")
    add("--batch-size", type=_count, metavar="N", help=f"images a batch ({CPU_BATCH} on a CPU)")
    add(
        "--part-rows",
        type=_count,
        metavar="N",
        help=f"rows a part, the unit of resume ({CPU_PART_ROWS} on a CPU)",
    )
    add("--path-column", metavar="NAME", help="manifest column with the paths (path, else the first)")
    add("--column-prefix", default=defaults.column_prefix, metavar="TEXT", help="put before manifest columns")
    add("--root", type=Path, help="folder of relative paths (the manifest's own)")
    add("--workers", type=_count, metavar="N", help="CPU threads (all that this process may use)")
    add("--memory", default="1GiB", metavar="SIZE", help="for images in flight (%(default)s)")
    add("--max-pixels", type=_count, default=defaults.limits.max_pixels, metavar="N", help="(%(default)s)")
    add("--max-file-size", default="512MiB", metavar="SIZE", help="(%(default)s)")
    add("--max-error-rate", type=_share, default=defaults.max_error_rate, metavar="F", help="(%(default)s)")
    add("--overwrite", action="store_true", help="delete the run that OUTPUT holds and start again")
    add(
        "--serial",
        action="store_true",
        help="one stage after the other; for checks, the results are the same",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def settings_from(arguments: list[str]) -> Settings:
    """Raises UsageError, and SystemExit for --help."""
    given: dict[str, Any] = vars(_parser().parse_args(arguments))
    limits = Limits(
        memory=parse_bytes(given.pop("memory")),
        max_pixels=given.pop("max_pixels"),
        max_file_size=parse_bytes(given.pop("max_file_size")),
    )
    return Settings(limits=limits, overlap=not given.pop("serial"), **given)


def main(arguments: list[str] | None = None) -> int:
    with _own_stderr() as stderr:
        return _main(sys.argv[1:] if arguments is None else arguments, Console(file=stderr))


@contextmanager
def _own_stderr() -> Iterator[TextIO]:
    """Keep standard error for this program: libjpeg and libpng complain there about each damaged image.

    Their lines name no file; what they mean is in the row's status. Python's own errors still get out.
    """
    kept, python = os.dup(2), sys.stderr
    with os.fdopen(kept, "w", buffering=1) as stderr, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        sys.stderr = stderr
        try:
            yield stderr
        finally:
            os.dup2(kept, 2)
            sys.stderr = python


def _main(arguments: list[str], console: Console) -> int:
    try:
        settings = settings_from(arguments)
        stop = _stop_on_signal(console)
        with Display(console) as display:
            summary = screen(settings, watch=display, stop=stop)
    except EngineError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_status
    except OSError as error:  # a full disk, a folder that went away
        where = f"{error.filename}: " if error.filename else ""
        console.print(
            f"error: {where}{error.strerror or error}", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    return _report(console, summary, settings.max_error_rate)


def _report(console: Console, summary: Summary, max_error_rate: float) -> int:
    if not summary.rows_done:
        console.print(f"{summary.output} is finished already; --overwrite starts again", markup=False)
    show_summary(console, summary)
    print(summary.output)
    if summary.errors > max_error_rate * summary.rows:
        console.print(
            f"error: {summary.errors} of {summary.rows} rows failed, more than --max-error-rate allows"
        )
        return 3
    return 0


def _stop_on_signal(console: Console) -> threading.Event:
    """The first SIGINT or SIGTERM asks the run to stop, the second ends the process."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()
        console.print("stopping; once more to stop at once")

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


if __name__ == "__main__":
    sys.exit(main())
