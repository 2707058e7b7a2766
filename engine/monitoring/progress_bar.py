"""Show the progress of a run: a bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from engine.runs.progress import Progress
from engine.runs.summary import Summary

LINE_EVERY_S = 5.0
BAR_EVERY_S = 0.1


class ProgressBar:
    """Shows progress at a limited rate."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_s = time.monotonic()
        self._task: TaskID | None = None
        self.bar: Bar | None = None  # only on a terminal
        if console.is_terminal:
            self.bar = Bar(
                BarColumn(None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.1f} images/s, {task.fields[errors]} errors, ETA"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[forecast]}"),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        done = progress.rows_before + progress.rows_done
        if now - self._last_s < (BAR_EVERY_S if self.bar else LINE_EVERY_S) and done < progress.rows:
            return
        self._last_s = now
        if self.bar:
            if self._task is None:
                self._task = self.bar.add_task("", total=progress.rows, rate=0.0, errors=0, forecast="")
            self.bar.update(
                self._task,
                completed=done,
                rate=progress.rate,
                errors=progress.errors,
                forecast=_format_forecast(progress).removeprefix(", "),
            )
        else:
            left_s = progress.seconds_for(progress.rows_left)
            self._console.print(
                f"{done}/{progress.rows} rows, {progress.rate:.1f} images/s, {progress.errors} errors, "
                f"ETA {_format_clock(left_s)}{_format_forecast(progress)}",
                highlight=False,
                soft_wrap=True,
            )


def _format_forecast(progress: Progress) -> str:
    """Describe whether the run will finish by its deadline."""
    deadline = progress.finish_by
    if not deadline:
        return ""
    share = progress.share_by(deadline)
    return f", done by {deadline:%H:%M}" if share >= 1 else f", {share:.0%} done by {deadline:%H:%M}"


def _format_clock(seconds: float) -> str:
    if math.isinf(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def show_summary(console: Console, summary: Summary) -> None:
    """Print the row counts, the classes, the rate and the time of each stage."""
    counts = Table(box=None, show_header=False, pad_edge=False)
    counts.add_column(justify="left")
    counts.add_column(justify="right")
    counts.add_row("rows", str(summary.rows))
    for status, count in sorted(summary.by_status.items(), key=lambda item: (item[0] != "ok", item[0])):
        counts.add_row(status, str(count))
    for name, count in summary.by_class.items():
        counts.add_row(f"  predicted {name}", str(count))
    for name in ("lost", "refused", "parts_done_again"):
        if summary.actors and (value := getattr(summary.actors, name)):
            label = name.replace("_", " ") if name.startswith("parts") else f"actors {name}"
            counts.add_row(label, str(len(value) if isinstance(value, tuple) else value))
    if summary.rows_done:
        counts.add_row("images/s", f"{summary.rows_done / summary.elapsed_s:.1f}")
        counts.add_row("seconds", f"{summary.elapsed_s:.1f}")
    console.print(counts)
    if summary.stages:
        stages = Table("stage", "busy s", "starved s", "blocked s", "occupancy", box=None, pad_edge=False)
        for column in stages.columns[1:]:
            column.justify = "right"
        for name, times in summary.stages.items():
            cells = [f"{seconds:.1f}" for seconds in (times.busy_s, times.starved_s, times.blocked_s)]
            stages.add_row(name, *cells, f"{times.occupancy:.0%}")
        console.print(stages)
        console.print(f"limited by: {summary.limited_by}")
