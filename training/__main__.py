"""Command line: `python -m training DATA -o BUNDLE`."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.cli.parser import Parser
from engine.cli.terminal import run_command
from engine.core.errors import Stopped
from engine.core.settings import DECODES
from training.settings import Balance, Duplicates, Normalization, Schedule, TrainingOptions, literal_choices

MIN_COLUMNS = 100  # of the table at the end
_EXAMPLES = """\
examples:
  python -m training radiographs -o bundle
  python -m training radiographs -o bundle --freeze       heads only, on cached features, on a CPU
  python -m training radiographs -o bundle --check-data   only report copies, leaks and shortcuts
  python -m training labels.csv -o bundle --folds 5       columns path, label [, patient, split]

The folder BUNDLE.training gets split.csv, copies.csv and left_out.csv, which contain file names.
Research use only, not a medical device."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and report; return the exit status."""

    def train_and_report() -> int:
        options = _parse(arguments)
        from training.recipe import train  # seconds of imports: after --help and wrong arguments

        with _StepProgress() as steps:
            result = train(options, step=steps.step, note=steps.note)
        if result.evaluation is None:
            print("--check-data: the data were checked and nothing was trained")
        else:
            _show(result.evaluation, options)
        return 0

    stopped = "stopped; no bundle was written; run the same command with --resume to continue"
    return run_command(
        train_and_report,
        interrupted=(stopped, Stopped.exit_status),
        describe_os_error=_describe_unexpected,
        describe_unexpected=_describe_unexpected,
    )


def _describe_unexpected(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory: {text[:100]}; try a smaller --batch-size, then --resume"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; fix this, then run the same command with --resume to continue"
    return f"{type(error).__name__}: {text}; set ENGINE_DEBUG=1 for the traceback"


def option_parser() -> Parser:
    parser = Parser(
        "python -m training",
        "DATA -o BUNDLE [option ...]",
        description="Train an ensemble on labelled images and write a bundle for the engine.",
        examples=_EXAMPLES,
        help_all=True,
    )
    _add_data(parser)
    _add_members(parser)
    _add_recipe(parser)
    _add_run(parser)
    return parser


def _parse(arguments: Sequence[str] | None) -> TrainingOptions:
    values = vars(option_parser().parse_args(arguments))
    values["size"] = tuple(values["size"])
    return TrainingOptions(**values)


def _option_adder(parser: Parser, title: str) -> Callable[..., None]:
    """Return a function that adds an option with the default of TrainingOptions."""
    group = parser.add_argument_group(title)

    def add(flag: str, text: str, **rest: Any) -> None:
        default = getattr(TrainingOptions, flag.removeprefix("--").replace("-", "_"))
        shown = "" if default in (None, False, 0) or isinstance(default, tuple) else f" ({default})"
        parser.add(flag, group=group, default=default, help=text + shown, **rest)

    return add


def _add_data(parser: Parser) -> None:
    parser.add("data", metavar="DATA", type=Path, help="folder of class folders, or a CSV")
    parser.add(
        *("-o", "--output"), metavar="BUNDLE", type=Path, required=True, help="folder of the new bundle"
    )
    add = _option_adder(parser, "data")
    add("--classes", "names of the classes, in order (those of the data)", nargs="+", metavar="NAME")
    add("--path-column", "column of image paths in a CSV (path, else the first)", metavar="NAME")
    add("--label-column", "column of labels in a CSV", metavar="NAME")
    add(
        "--root",
        "base folder of relative paths in a CSV (the CSV's folder)",
        type=Path,
        metavar="DIR",
        more=True,
    )
    add(
        "--duplicates",
        "copies of one image: group keeps them on one side of the split, drop uses one of them and none if "
        "labels contradict, ignore splits them freely as the paper does, which leaks",
        choices=literal_choices(Duplicates),
        more=True,
    )
    add(
        "--allow-leak",
        "accept a split of the data that leaks",
        action="store_true",
        more=True,
    )
    add(
        "--decode",
        "JPEG decoding: exact, or fast with a scaled DCT; screening with the bundle does the same",
        choices=DECODES,
        more=True,
    )
    add("--check-data", "check the data, then stop", action="store_true")


def _add_members(parser: Parser) -> None:
    add = _option_adder(parser, "members")
    add(
        "--members",
        "classifiers of torchvision (resnet50 inception_v3)",
        nargs="+",
        metavar="NAME",
    )
    add(
        "--weights",
        "initial weights: imagenet (default), none (random) or a file; one for all members, or one each",
        nargs="+",
        metavar="W",
    )
    add("--size", "input size in pixels (224 224)", nargs=2, metavar=("H", "W"), type=int, more=True)
    add(
        "--normalization",
        "normalization inside the graphs, after the division by 255",
        choices=literal_choices(Normalization),
        more=True,
    )


def _add_recipe(parser: Parser) -> None:
    add = _option_adder(parser, "recipe")
    add("--freeze", "train the heads only", action="store_true")
    add("--copies", "augmented copies of each training image for the heads", type=int, metavar="N", more=True)
    add("--head-epochs", "most epochs of the heads", type=int, metavar="N", more=True)
    add("--head-rate", "learning rate of the heads", type=float, metavar="R", more=True)
    add(
        "--epochs",
        "most epochs of the whole network (40; 150 from random weights)",
        type=int,
        metavar="N",
        more=True,
    )
    add(
        "--rate",
        "learning rate of the whole network (1e-4; 1e-3 from random weights)",
        type=float,
        metavar="R",
        more=True,
    )
    add(
        "--patience",
        "epochs without a better validation macro-F1 (heads 40; whole network 10, or 40 if random)",
        type=int,
        metavar="N",
        more=True,
    )
    add("--batch-size", "images per batch", type=int, metavar="N", more=True)
    add("--schedule", "schedule of the learning rate", choices=literal_choices(Schedule), more=True)
    add(
        "--balance",
        "balance classes by weights in the loss or by sampling",
        choices=literal_choices(Balance),
        more=True,
    )
    add(
        "--temperature-scaling",
        "fit the ensemble's temperature on the validation set",
        action="store_true",
        more=True,
    )
    add("--folds", "also cross-validate with this many folds", type=int, metavar="K")
    add("--seed", "seed of all random choices", type=int, metavar="N", more=True)


def _add_run(parser: Parser) -> None:
    add = _option_adder(parser, "run")
    add("--device", "device: auto, cpu, cuda or cuda:N", metavar="D")
    add("--resume", "continue an interrupted training", action="store_true")
    add("--overwrite", "replace an existing bundle or an unfinished training", action="store_true")


class _StepProgress:
    """Progress on stderr: bars on a terminal, one line per finished step elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> _StepProgress:
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
        self._bars.update(task, total=count)  # a step may end early
        if not self._console.is_terminal:
            self.note(f"{what}: {count} of {total} in {time.monotonic() - start:.1f} s")

    def note(self, line: str) -> None:
        self._console.print(line, markup=False)


def _show(evaluation: dict[str, Any], options: TrainingOptions) -> None:
    """Print the table and the next command to stdout."""
    width = max(MIN_COLUMNS, shutil.get_terminal_size().columns)
    console = Console(highlight=False, soft_wrap=True, width=width, emoji=False)
    table = Table(box=None)
    for header in ("", "weight"):
        table.add_column(header, no_wrap=True)
    for header in ("validation\naccuracy", "\nmacro-F1", "test\naccuracy", "\nmacro-F1", "\n95 %"):
        table.add_column(header, justify="right", no_wrap=True)
    weights = [f"{weight:.2f}" for weight in evaluation["weights_search"]["chosen"]["weights"]]
    for (name, scores), weight in zip(evaluation["voters"].items(), [*weights, ""], strict=True):
        figures = [
            scores[subset][figure]["value"]
            for subset in ("validation", "test")
            for figure in ("accuracy", "macro_f1")
        ]
        interval = scores["test"]["macro_f1"]
        span = "" if interval["low"] is None else f"{interval['low']:.3f}-{interval['high']:.3f}"
        table.add_row(name, weight, *(f"{figure:.3f}" for figure in figures), span)
    console.print(table)
    for candidate in evaluation["weights_search"]["beside"]:
        weights = " / ".join(f"{weight:g}" for weight in candidate["weights"])
        console.print(
            f"for comparison: weights {weights} give validation macro-F1 {candidate['macro_f1']:.3f}"
        )
    if evaluation["folds"]:
        figure = evaluation["folds"]["voters"]["ensemble"]["macro_f1"]
        console.print(
            f"{evaluation['folds']['count']} folds: ensemble macro-F1 {figure['mean']:.3f} "
            f"+- {figure['deviation']:.3f} on held-out images"
        )
    bundle = shlex.quote(str(options.output))
    console.print(
        f"bundle: {bundle}; report: {shlex.quote(str(options.output / 'report.html'))}", markup=False
    )
    console.print(f"next: python -m engine.run manifest.csv -b {bundle}", markup=False)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
