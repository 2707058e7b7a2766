"""The Ray actor: a process with bundle, plans and stages that scores parts and writes their files.

One thread processes an inbox of parts, so that the stages don't run empty between two parts.
"""

from __future__ import annotations

import os
import platform
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import structs

from engine.bundle import bundle
from engine.core.errors import EngineError, Stopped, UsageError
from engine.core.location import Location
from engine.core.overlap import Meter
from engine.core.records import Batch, Part, PartInfo, Status
from engine.core.settings import Settings
from engine.core.tuning import Settled, Tuning
from engine.core.version import __version__
from engine.pipeline.context import StageContext
from engine.pipeline.flow import chain_stages
from engine.pipeline.stages import Stages
from engine.ray.cluster import ActorResources
from engine.reader.reader import Reader
from engine.runners.base import RunnerChoice
from engine.runners.select import select_runner
from engine.runs.run_record import library_versions, scorer_of
from engine.scoring.canaries import Canaries, CanaryMonitor, score_canaries
from engine.sink.columns import ResultSchema
from engine.sink.sink import Sink
from engine.storage.folders import error_text
from engine.storage.open_folder import open_folder

NEXT_PART_WAIT_S = 0.05  # for the next part, before the stages are drained
T = TypeVar("T")


@dataclass(frozen=True)
class ActorConfig:
    """The arguments of an actor."""

    name: str
    settings: Settings  # all paths absolute
    resources: ActorResources


@dataclass(frozen=True)
class ActorInfo:
    """The process, bundle and versions of an actor."""

    host: str
    pid: int
    choice: RunnerChoice
    bundle_sha256: str
    versions: dict[str, str]


@dataclass(frozen=True)
class RunSpec:
    """The properties of a run for which an actor opens its stages."""

    batch_size: int  # of this actor's group
    part_rows: int
    rows: int  # of the run
    tuning: Tuning
    schema: ResultSchema
    root: Location
    resumed: bool  # keep the tuned options
    stages_type: type[Stages]
    token: tuple[str, str] | None  # name and content of a file in the results folder
    checked_files: tuple[str, ...]  # files that exist for the driver
    expected: npt.NDArray[np.float32] | None  # canary scores that replace the bundle's


@dataclass(frozen=True)
class OpenedStages:
    """The result of `Actor.open`."""

    settled: Settled
    expected: npt.NDArray[np.float32] | None
    lines: list[str]


@dataclass(frozen=True)
class Heartbeat:
    """The current progress of an actor."""

    rounds: int  # canary checks passed
    idle_s: float  # time without output from busy stages
    in_progress: dict[int, dict[str, int]]  # rows by status, of unfinished parts
    meters: dict[str, tuple[int, float, float, float]]  # threads; seconds busy, starved, blocked
    crashes: int
    refusals: int


class IdleClock:
    """Measures the time for which busy stages have given no output.

    The wait for the reader does not count, because the reader has its own timeout.
    """

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.reading = self.busy = False

    def tick(self) -> None:
        self.since = time.monotonic()

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self.since if self.busy and not self.reading else 0.0


@dataclass
class TimedReader:
    """A reader that pauses the clock while the stages wait for it."""

    reader: Reader
    clock: IdleClock

    def stage(self, parts: Iterable[Part], meter: Meter) -> Iterator[Batch]:
        with closing(self.reader.stage(parts, meter)) as batches:  # type: ignore[type-var]
            while True:
                self.clock.reading = True
                try:
                    batch = next(batches, None)
                finally:
                    self.clock.tick()
                    self.clock.reading = False
                if batch is None:
                    return
                yield batch


@dataclass
class _Task:
    """A call, other than a part, in the inbox of the thread."""

    work: Callable[[], Any]
    result: Future[Any]


@dataclass
class _PartInProgress:
    rows: int
    result: Future[PartInfo] = field(default_factory=Future)
    by_status: Counter[str] = field(default_factory=Counter)


class Actor:
    """Runs in Ray's worker process; `ActorPool` calls its methods remotely."""

    def __init__(self, config: ActorConfig) -> None:
        self._config, self._settings = config, replace(config.settings, workers=config.resources.workers)
        self._inbox: queue.SimpleQueue[Part | _Task] = queue.SimpleQueue()
        self._in_progress: dict[int, _PartInProgress] = {}
        self._clock = IdleClock()
        self._error: BaseException | None = None
        self._stop_by: float | None = None
        self._resources = ExitStack()
        self._lock = threading.Lock()
        threading.Thread(target=self._process_inbox, name="actor", daemon=True).start()

    def load_bundle(self) -> ActorInfo:
        """Return the actor's info. Raises UsageError when the bundle or its runner is not available."""
        settings, gpu = self._settings, self._config.resources.gpu
        self._bundle = bundle.load_bundle(settings.bundle)
        self._choice = select_runner(
            settings.runner,
            "cuda:0" if gpu else "cpu",  # each Ray actor sees only its own GPU
            self._bundle,
            precision=settings.precision,
            batch_size=settings.batch_size,
        )
        versions = {"engine": __version__, **library_versions()}
        return ActorInfo(platform.node(), os.getpid(), self._choice, self._bundle.sha256, versions)

    def open(self, spec: RunSpec) -> OpenedStages:
        """Open the stages and check the canaries. Raises EngineError when either fails."""
        return self._run_in_thread(partial(self._open, spec))

    def begin(self, provenance: bytes) -> None:
        """Prepare to take parts; `provenance` is written to their footers."""
        by = structs.replace(
            scorer_of(self._choice), actor=self._config.name, round=self._canary_monitor.rounds
        )
        self._sink = Sink(open_folder(self._settings.output), self._schema, provenance, by)
        self._canary_monitor.on_round_passed = self._record_round

    def _record_round(self, rounds: int) -> None:
        self._sink.by = structs.replace(self._sink.by, round=rounds)

    def score_part(self, part: Part) -> PartInfo:
        """Score a part and write it. Several calls may run at once."""
        with self._lock:
            if self._error:
                raise self._error
            if self._stop_by is not None:
                raise Stopped("stopped")
            in_progress = self._in_progress[part.index] = _PartInProgress(part.rows)
            if not self._clock.busy:
                self._clock.tick()
                self._clock.busy = True
            self._inbox.put(part)
        return in_progress.result.result()

    def check(self) -> Heartbeat:
        """Check the canaries after the parts taken so far. Raises ParityError when they differ."""
        self._run_in_thread(lambda: self._canary_monitor.check())
        return self.heartbeat()

    def stop(self, grace_s: float) -> Heartbeat:
        """Finish the parts that fit into `grace_s`, drop the others and check the canaries."""
        with self._lock:
            self._stop_by = time.monotonic() + grace_s
        return self.check()

    def probe(self, part: Part, start: int, stop: int) -> None:
        """Score rows [start, stop) of a part and drop the scores, to test whether this process survives."""

        def score() -> None:
            batches = self._stages.preprocess.stage(
                self._reader().stage([part.slice(start, stop)], Meter("read")), Meter("preprocess")
            )
            for _ in self._stages.step.stage(batches, Meter("members")):
                self._clock.tick()

        self._run_in_thread(score)

    def heartbeat(self) -> Heartbeat:
        stages = self._stages
        with self._lock:
            in_progress = {index: dict(part.by_status) for index, part in self._in_progress.items()}
        return Heartbeat(
            self._canary_monitor.rounds,
            self._clock.idle_s,
            in_progress,
            {
                name: (meter.lanes, meter.busy_s, meter.starved_s, meter.blocked_s)
                for name, meter in stages.meters.items()
            },
            stages.preprocess.crashes,
            stages.preprocess.refusals,
        )

    def _run_in_thread(self, work: Callable[[], T]) -> T:
        task = _Task(work, Future())
        with self._lock:
            if self._error:
                raise self._error
            self._inbox.put(task)
        result: T = task.result.result()
        return result

    def _open(self, spec: RunSpec) -> OpenedStages:
        self._check_folders(spec)
        lines: list[str] = []
        self._schema = spec.schema
        context = StageContext(
            self._settings,
            self._bundle,
            self._choice,
            lines.append,
            spec.root,
            batch_size=spec.batch_size,
            part_rows=spec.part_rows,
            rows=spec.rows,
            tuning=spec.tuning,
            resumed=spec.resumed,
        )
        self._stages = self._resources.enter_context(spec.stages_type(context))
        batch_size = self._stages.settled.batch_size
        canaries, expected = Canaries.of(self._bundle), spec.expected
        if self._choice.precision == "int8":  # its scores differ from those of float32
            if expected is None:
                expected = score_canaries(canaries, self._stages.step, batch_size)
            canaries = replace(canaries, expected=expected)
        self._canary_monitor = CanaryMonitor(self._stages.step, canaries, batch_size)
        self._canary_monitor.check()
        return OpenedStages(self._stages.settled, expected, lines)

    def _check_folders(self, spec: RunSpec) -> None:
        """Raise UsageError when the folders of this machine differ from the driver's."""
        if spec.token:
            name, content = spec.token
            folder = open_folder(self._settings.output)
            try:
                content_here = folder.read(name, lambda opened: opened.read().decode())
            except OSError:
                content_here = ""
            if content_here != content:
                raise UsageError(
                    f"output {folder.location}: it is not the same folder on every machine of the cluster; "
                    "allowed: a folder that all machines share, or s3://, gs:// or az://"
                )
        if spec.checked_files and not any(map(os.path.exists, spec.checked_files)):
            raise UsageError(
                f"images: {spec.checked_files[0]} exists on the driver's machine but not on every machine "
                "of the cluster; mount the folder at the same path everywhere"
            )

    def _reader(self) -> TimedReader:
        context = self._stages.context
        return TimedReader(context.reader(self._stages.preprocess.on_gpu), self._clock)

    def _process_inbox(self) -> None:
        """Process the inbox in order; consecutive parts form one stream."""
        self._next: Part | _Task | None = None
        while True:
            item = self._next or self._inbox.get()
            self._next = None
            try:
                if isinstance(item, _Task):
                    self._clock.tick()
                    self._clock.busy = True
                    item.result.set_result(item.work())
                else:
                    self._score(item)
            except BaseException as error:
                self._fail(error, item)
                return
            with self._lock:
                self._clock.busy = bool(self._in_progress)

    def _fail(self, error: BaseException, item: Part | _Task) -> None:
        """Fail the item and all later ones with this error."""
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            error = EngineError(f"{where}{error_text(error)}")
        with self._lock:
            self._error = error
            futures: list[Future[Any]] = [part.result for part in self._in_progress.values()]
            self._in_progress.clear()
            items = [item, self._next]
            while not self._inbox.empty():
                items.append(self._inbox.get())
            futures += [task.result for task in items if isinstance(task, _Task)]
        for future in futures:
            future.set_exception(error)

    def _parts(self, first: Part) -> Iterator[Part]:
        """Yield the parts that follow each other without a pause."""
        part: Part | _Task = first
        while isinstance(part, Part):
            if self._stop_by is not None:
                return
            yield part
            try:
                part = self._inbox.get(timeout=NEXT_PART_WAIT_S)
            except queue.Empty:
                return
        self._next = part

    def _score(self, first: Part) -> None:
        stages = self._stages
        items = chain_stages(
            self._parts(first),
            self._reader(),
            stages.preprocess,
            self._canary_monitor,
            self._sink,
            stages.meters,
            overlap=self._settings.overlap,
        )
        with closing(items):  # type: ignore[type-var]
            began, rows = time.monotonic(), 0
            for item in items:
                self._clock.tick()
                if isinstance(item, PartInfo):
                    with self._lock:
                        scored = self._in_progress.pop(item.index)
                    scored.result.set_result(item)
                else:
                    self._count_rows(item)
                    rows += item.rows
                if self._stop_by is not None and not self._can_finish(rows / (time.monotonic() - began)):
                    break
        if self._stop_by is not None:
            with self._lock:
                dropped, self._in_progress = self._in_progress, {}
            for part in dropped.values():
                part.result.set_exception(Stopped("stopped"))

    def _count_rows(self, batch: Batch) -> None:
        by_status = self._in_progress[batch.part.index].by_status
        counts = Counter(Status(batch.status[position]).label for position in batch.errors)
        counts["ok"] += len(batch.index)
        with self._lock:
            by_status.update(counts)

    def _can_finish(self, rate: float) -> bool:
        """Return whether a part in progress will be done before the actor has to stop."""
        assert self._stop_by is not None
        rows = (self._stop_by - time.monotonic()) * rate
        with self._lock:
            started = [part for part in self._in_progress.values() if part.by_status]
            return any(part.rows - part.by_status.total() <= rows for part in started)
