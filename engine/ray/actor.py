"""The actor: bundle, plans and stages in a process of its own. It takes parts and writes them itself.

One thread does all the work, fed by an inbox, so that the stages don't run empty between two parts.
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

from engine import bundle
from engine.canaries import Canaries, Guard, scores
from engine.core.tuning import Settled, Tuning
from engine.core.version import __version__
from engine.errors import EngineError, Stopped, UsageError
from engine.overlap import Meter
from engine.pipeline import Opening, Stages, flow
from engine.provenance import scorer_of, versions
from engine.ray.cluster import Post
from engine.reader import Reader
from engine.records import Batch, Part, Status
from engine.runners import Choice, choose
from engine.settings import Settings
from engine.sink import Done, Layout, Sink
from engine.storage.location import Place
from engine.store import open_folder, reason

WAIT_S = 0.05  # for the next part, before the stages are let run empty
T = TypeVar("T")


@dataclass(frozen=True)
class Brief:
    """What an actor is made with."""

    name: str
    settings: Settings  # all paths absolute
    post: Post


@dataclass(frozen=True)
class Hello:
    """What an actor is."""

    host: str
    pid: int
    choice: Choice
    bundle_sha256: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Work:
    """What an actor opens its stages for."""

    batch_size: int  # of this actor's kind
    part_rows: int
    rows: int  # of the run
    tuning: Tuning
    layout: Layout
    root: Place
    resumed: bool  # keep what is tuned
    stages_of: type[Stages]
    token: tuple[str, str] | None  # name and content of a file in the results folder, to know it by
    witnesses: tuple[str, ...]  # files that the driver sees
    expected: npt.NDArray[np.float32] | None  # scores of canaries where the bundle's can't be held against


@dataclass(frozen=True)
class Opened:
    """What opening has settled."""

    settled: Settled
    expected: npt.NDArray[np.float32] | None
    lines: list[str]


@dataclass(frozen=True)
class Pulse:
    """How an actor is at the moment."""

    rounds: int  # that canaries came through well
    idle_s: float  # since anything came out of the stages that should have
    underway: dict[int, dict[str, int]]  # rows by status, of parts that are not done
    meters: dict[str, tuple[int, float, float, float]]  # lanes, and seconds busy, starved, blocked
    crashes: int
    refusals: int


class Clock:
    """How long nothing has come out of the stages, while something should.

    The wait for the reader does not count: it gives up by itself.
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
class Watched:
    """A reader that tells the clock when it is waited for."""

    reader: Reader
    clock: Clock

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
class _Order:
    """Something other than a part for the thread to do."""

    work: Callable[[], Any]
    result: Future[Any]


@dataclass
class _Underway:
    rows: int
    result: Future[Done] = field(default_factory=Future)
    by_status: Counter[str] = field(default_factory=Counter)


class Actor:
    """What runs in Ray's worker process; its methods are called over there by `crew.Crew`."""

    def __init__(self, brief: Brief) -> None:
        self._brief, self._settings = brief, replace(brief.settings, workers=brief.post.workers)
        self._inbox: queue.SimpleQueue[Part | _Order] = queue.SimpleQueue()
        self._taken: dict[int, _Underway] = {}
        self._clock = Clock()
        self._error: BaseException | None = None
        self._stop_by: float | None = None
        self._opened = ExitStack()
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="actor", daemon=True).start()

    def hello(self) -> Hello:
        """Raises UsageError where the bundle, or what should run it, is not to be had."""
        settings, gpu = self._settings, self._brief.post.gpu
        self._models = bundle.load(settings.bundle)
        self._choice = choose(
            settings.runner,
            "cuda:0" if gpu else "cpu",  # Ray shows each actor its own GPU only
            self._models,
            precision=settings.precision,
            batch_size=settings.batch_size,
        )
        found = {"engine": __version__, **versions()}
        return Hello(platform.node(), os.getpid(), self._choice, self._models.sha256, found)

    def open(self, work: Work) -> Opened:
        """Open the stages; the canaries have to come through them well. Raises EngineError."""
        return self._do(partial(self._open, work))

    def begin(self, provenance: bytes) -> None:
        """Parts may come, whose footers are to hold `provenance`."""
        by = structs.replace(scorer_of(self._choice), actor=self._brief.name, round=self._guard.rounds)
        self._sink = Sink(open_folder(self._settings.output), self._layout, provenance, by)
        self._guard.passed = self._passed

    def _passed(self, rounds: int) -> None:
        self._sink.by = structs.replace(self._sink.by, round=rounds)

    def take(self, part: Part) -> Done:
        """Score a part and write it. Several may be taken at once."""
        with self._lock:
            if self._error:
                raise self._error
            if self._stop_by is not None:
                raise Stopped("stopped")
            underway = self._taken[part.index] = _Underway(part.rows)
            if not self._clock.busy:
                self._clock.tick()
                self._clock.busy = True
            self._inbox.put(part)
        return underway.result.result()

    def check(self) -> Pulse:
        """Let the canaries through once more, after the parts that were taken. Raises ParityError."""
        self._do(lambda: self._guard.check())
        return self.pulse()

    def stop(self, grace_s: float) -> Pulse:
        """Finish the parts that can be within `grace_s`, drop the others, and check."""
        with self._lock:
            self._stop_by = time.monotonic() + grace_s
        return self.check()

    def probe(self, part: Part, start: int, stop: int) -> None:
        """Score some rows of a part, by position, for nothing but to see whether this process lives."""

        def score() -> None:
            batches = self._stages.preprocess.stage(
                self._reader().stage([part.slice(start, stop)], Meter("read")), Meter("preprocess")
            )
            for _ in self._stages.step.stage(batches, Meter("members")):
                self._clock.tick()

        self._do(score)

    def pulse(self) -> Pulse:
        stages = self._stages
        with self._lock:
            underway = {index: dict(taken.by_status) for index, taken in self._taken.items()}
        return Pulse(
            self._guard.rounds,
            self._clock.idle_s,
            underway,
            {
                name: (meter.lanes, meter.busy_s, meter.starved_s, meter.blocked_s)
                for name, meter in stages.meters.items()
            },
            stages.preprocess.crashes,
            stages.preprocess.refusals,
        )

    def _do(self, work: Callable[[], T]) -> T:
        order = _Order(work, Future())
        with self._lock:
            if self._error:
                raise self._error
            self._inbox.put(order)
        result: T = order.result.result()
        return result

    def _open(self, work: Work) -> Opened:
        self._see_the_same(work)
        lines: list[str] = []
        self._layout = work.layout
        opening = Opening(
            self._settings,
            self._models,
            self._choice,
            lines.append,
            work.root,
            batch_size=work.batch_size,
            part_rows=work.part_rows,
            rows=work.rows,
            tuning=work.tuning,
            resumed=work.resumed,
        )
        self._stages = self._opened.enter_context(work.stages_of(opening))
        batch_size = self._stages.settled.batch_size
        canaries, expected = Canaries.of(self._models), work.expected
        if self._choice.precision == "int8":  # whose scores are far from float32's
            if expected is None:
                expected = scores(canaries, self._stages.step, batch_size)
            canaries = replace(canaries, expected=expected)
        self._guard = Guard(self._stages.step, canaries, batch_size)
        self._guard.check()
        return Opened(self._stages.settled, expected, lines)

    def _see_the_same(self, work: Work) -> None:
        """Raises UsageError where this machine sees other folders than the driver's."""
        if work.token:
            name, content = work.token
            folder = open_folder(self._settings.output)
            try:
                found = folder.read(name, lambda opened: opened.read().decode())
            except OSError:
                found = ""
            if found != content:
                raise UsageError(
                    f"output {folder.location}: not the same folder on every machine of the cluster; give "
                    "one that all share, or s3://, gs:// or az://"
                )
        if work.witnesses and not any(map(os.path.exists, work.witnesses)):
            raise UsageError(
                f"images: {work.witnesses[0]} is there for the driver and not on every machine of the "
                "cluster; mount the folder by the same name everywhere"
            )

    def _reader(self) -> Watched:
        opening = self._stages.opening
        return Watched(opening.reader(self._stages.preprocess.on_gpu), self._clock)

    def _work(self) -> None:
        """The thread: what is in the inbox, in turn; parts that follow each other as one stream."""
        self._next: Part | _Order | None = None
        while True:
            item = self._next or self._inbox.get()
            self._next = None
            try:
                if isinstance(item, _Order):
                    self._clock.tick()
                    self._clock.busy = True
                    item.result.set_result(item.work())
                else:
                    self._score(item)
            except BaseException as error:
                self._fail(error, item)
                return
            with self._lock:
                self._clock.busy = bool(self._taken)

    def _fail(self, error: BaseException, item: Part | _Order) -> None:
        """Nothing more is scored: whatever comes gets this error."""
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            error = EngineError(f"{where}{reason(error)}")
        with self._lock:
            self._error = error
            waiting: list[Future[Any]] = [taken.result for taken in self._taken.values()]
            self._taken.clear()
            orders = [item, self._next]
            while not self._inbox.empty():
                orders.append(self._inbox.get())
            waiting += [order.result for order in orders if isinstance(order, _Order)]
        for future in waiting:
            future.set_exception(error)

    def _parts(self, first: Part) -> Iterator[Part]:
        """Parts as long as they come without a pause."""
        part: Part | _Order = first
        while isinstance(part, Part):
            if self._stop_by is not None:
                return
            yield part
            try:
                part = self._inbox.get(timeout=WAIT_S)
            except queue.Empty:
                return
        self._next = part

    def _score(self, first: Part) -> None:
        stages = self._stages
        items = flow(
            self._parts(first),
            self._reader(),
            stages.preprocess,
            self._guard,
            self._sink,
            stages.meters,
            overlap=self._settings.overlap,
        )
        with closing(items):  # type: ignore[type-var]
            began, rows = time.monotonic(), 0
            for item in items:
                self._clock.tick()
                if isinstance(item, Done):
                    with self._lock:
                        taken = self._taken.pop(item.index)
                    taken.result.set_result(item)
                else:
                    self._count(item)
                    rows += item.rows
                if self._stop_by is not None and not self._can_finish(rows / (time.monotonic() - began)):
                    break
        if self._stop_by is not None:
            with self._lock:
                dropped, self._taken = self._taken, {}
            for taken in dropped.values():
                taken.result.set_exception(Stopped("stopped"))

    def _count(self, batch: Batch) -> None:
        by_status = self._taken[batch.part.index].by_status
        found = Counter(Status(batch.status[position]).label for position in batch.errors)
        found["ok"] += len(batch.index)
        with self._lock:
            by_status.update(found)

    def _can_finish(self, rate: float) -> bool:
        """Whether one of the parts that have begun will be done before this has to stop."""
        assert self._stop_by is not None
        rows = (self._stop_by - time.monotonic()) * rate
        with self._lock:
            begun = [taken for taken in self._taken.values() if taken.by_status]
            return any(taken.rows - taken.by_status.total() <= rows for taken in begun)
