"""Show the builder's phases on a terminal, from TensorRT's progress monitor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import tensorrt as trt

    from engine.runners.tensorrt import TensorRTBackend


class Phases(Protocol):
    """The builder's progress; phases nest."""

    def start(self, name: str, steps: int) -> None: ...

    def step(self, name: str, done: int) -> None: ...

    def finish(self, name: str) -> None: ...


class NoProgress:
    """Phases that are not shown."""

    def start(self, name: str, steps: int) -> None:
        pass

    def step(self, name: str, done: int) -> None:
        pass

    def finish(self, name: str) -> None:
        pass


class ProgressBars:
    """Progress bars, one for each open phase."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._open: dict[str, TaskID] = {}

    def start(self, name: str, steps: int) -> None:
        self._open[name] = self._progress.add_task(name, total=max(steps, 1))

    def step(self, name: str, done: int) -> None:
        if name in self._open:
            self._progress.update(self._open[name], completed=done + 1)

    def finish(self, name: str) -> None:
        if task := self._open.pop(name, None):
            self._progress.remove_task(task)


@contextmanager
def show_phases(console: Console) -> Iterator[Phases]:
    """Show bars while the builder works; show nothing without a terminal."""
    if not console.is_terminal:
        yield NoProgress()
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield ProgressBars(progress)


def monitor_for(backend: TensorRTBackend, phases: Phases, stop: threading.Event) -> trt.IProgressMonitor:
    """Make a TensorRT progress monitor that reports to `phases` and ends the build soon after `stop` is set.

    Its class exists only once TensorRT is imported.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = backend.trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return not stop.is_set()  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
