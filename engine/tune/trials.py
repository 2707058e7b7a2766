"""Measure the stages with candidate options on a sample of images."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from msgspec import structs

from engine.bundle.bundle import Bundle
from engine.core.deadline import Deadline
from engine.core.errors import EngineError, Stopped
from engine.core.hardware import available_cpus
from engine.core.records import OnMessage, Part, Scorer
from engine.core.settings import Settings
from engine.core.tuning import Tuning
from engine.manifest.manifest import Manifest
from engine.pipeline.context import StageContext
from engine.pipeline.stages import Stages, make_meters
from engine.runners.base import RunnerChoice
from engine.runs.prepare import select_for_settings
from engine.runs.profile import CPU_BATCHES, TunedOptions
from engine.runs.progress import Progress
from engine.runs.run_record import RunRecord, default_sizes
from engine.sink.columns import ResultSchema
from engine.sink.sink import Sink
from engine.storage.local_folder import LocalFolder

SAMPLE_ROWS = 4096  # rows of the manifest, spread over it
WARM_CYCLES = 2  # batches per lane until the queues between the stages fill evenly


class _MeasurementDone(Exception):  # noqa: N818 - not a failure
    """A measurement is complete."""


class _MeasurementWindow:
    """Counts the finished rows after the warm-up; ends the measurement after whole cycles of the lanes."""

    def __init__(self, lanes: int, seconds: float, stop: threading.Event) -> None:
        self._lanes, self._end, self._stop = lanes, time.monotonic() + seconds, stop
        self._batches = 0
        self._started, self._start_rows = 0.0, 0
        self.rate = 0.0

    def __call__(self, progress: Progress) -> None:
        if self._stop.is_set():
            raise Stopped("tuning was stopped; no profile was written")
        now = time.monotonic()
        self._batches += 1
        cycles, remainder = divmod(self._batches, self._lanes)
        if remainder:
            return
        if cycles <= WARM_CYCLES:
            self._started, self._start_rows = now, progress.rows_done
        elif now >= self._end:
            self.rate = (progress.rows_done - self._start_rows) / (now - self._started)
            raise _MeasurementDone


class Trials:
    """The stages of `engine.run`, opened per candidate, which measure the same sample repeatedly."""

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        choice: RunnerChoice,
        manifest: Manifest,
        *,
        scratch: Path,
        say: OnMessage,
        stop: threading.Event,
    ) -> None:
        self._settings, self._bundle, self._choice = settings, bundle, choice
        self._manifest, self._say, self._stop = manifest, say, stop
        self._folder = LocalFolder(scratch)
        self._schema = ResultSchema.of(bundle, manifest, settings)
        self._run = RunRecord.create(settings, None, manifest, bundle, choice)
        self.paths = sample_paths(manifest)
        self._position = 0  # in the endless repetition of the sample
        self._opened: dict[object, Stages] = {}
        self.by_status: Counter[str] = Counter()
        self.limits: dict[TunedOptions, Counter[str]] = {}  # measurements in which a stage was the limit
        self.tuning: dict[str, Tuning] = {}  # by runner, the result of the GPU's own tuning

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        with ExitStack() as stack:  # closes all, even if one raises
            for stages in self._opened.values():
                stack.push(stages)
        self._opened = {}

    def min_rows(self, options: TunedOptions) -> int:
        """Return the number of images of the shortest useful measurement."""
        return (WARM_CYCLES + 1) * self._lanes(options) * self._batch(options)

    def _lanes(self, options: TunedOptions) -> int:
        return self._settings.slots if self._choice.gpu else options.workers or available_cpus()

    def _batch(self, options: TunedOptions) -> int:
        return options.batch_size or default_sizes(self._choice)[0]

    def measure(self, options: TunedOptions, seconds: float) -> float:
        """Run the stages for some seconds; return the images/s from end to end."""
        stages = self._stages(options)
        batch_size = self._batch(options)
        stages.context = replace(stages.context, batch_size=batch_size)
        stages.meters = make_meters(stages.context.workers, gpu=self._choice.gpu is not None)
        window, progress = (
            _MeasurementWindow(self._lanes(options), seconds, self._stop),
            Progress(sys.maxsize),
        )
        parts = self._parts(self._run.result_options.part_rows)
        sink = Sink(self._folder, self._schema, self._run.to_metadata(), Scorer())
        with suppress(_MeasurementDone):
            stages.run(parts, sink, progress, window, Deadline())
        self._position += progress.rows_done + 8 * batch_size  # after the rows that were read ahead
        self.by_status += progress.by_status
        busiest = max(stages.meters.values(), key=lambda meter: meter.occupancy(progress.elapsed_s))
        self.limits.setdefault(options, Counter())[busiest.name] += 1
        self._say(f"{options}: {window.rate:.1f} images/s")
        return window.rate

    def _parts(self, rows: int) -> Iterator[Part]:
        """Yield parts without end, from the end of the last measurement."""
        for index in range(sys.maxsize):
            start = self._position + index * rows
            paths = [self.paths[number % len(self.paths)] for number in range(start, start + rows)]
            yield Part(index, np.arange(index * rows, (index + 1) * rows), paths, pa.table({}))

    def _stages(self, options: TunedOptions) -> Stages:
        """Return open stages: on a CPU per number of workers, on a GPU for one candidate at a time."""
        gpu = self._choice.gpu is not None
        key = options if gpu else options.workers
        if key not in self._opened:
            if gpu:
                self._close()
            largest = options if gpu else structs.replace(options, batch_size=CPU_BATCHES[-1])
            stages = self._open(largest.on(self._settings))
            self._opened[key] = stages.__enter__()
            tuning = stages.settled.tuning
            if tuning.batch_size_asked is not None:
                raise EngineError(f"out of memory with {options}")
            runner = stages.context.choice.runner
            self.tuning[runner] = Tuning(compiled=tuning.compiled, decoding=tuning.decoding)
        return self._opened[key]

    def _open(self, settings: Settings) -> Stages:
        bundle, manifest = self._bundle, self._manifest
        choice = select_for_settings(settings, bundle)
        rows, tuning = manifest.rows, Tuning()
        if choice.gpu:
            from engine.preprocess.gpu_tuning import TUNE_ROWS

            rows = max(rows, TUNE_ROWS)  # tunes for a long run
            tuning = self.tuning.get(choice.runner, tuning)
        context = StageContext(
            *(settings, bundle, choice, self._say, manifest.root),
            batch_size=settings.batch_size or default_sizes(choice)[0],
            part_rows=self._run.result_options.part_rows,
            rows=rows,
            tuning=tuning,
            resumed=False,
            manifest=manifest,
        )
        return Stages(context)


def sample_paths(manifest: Manifest) -> list[str | None]:
    """Return paths spread over the manifest, in random order: each measurement sees the same mixture."""
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(manifest.rows, min(manifest.rows, SAMPLE_ROWS), replace=False))
    paths: list[str | None] = []
    first = 0
    for table in manifest.tables():
        rows = chosen[(chosen >= first) & (chosen < first + table.num_rows)] - first
        paths += table.column(manifest.path_column).cast(pa.string()).take(rows).to_pylist()
        first += table.num_rows
    rng.shuffle(paths)
    return paths
