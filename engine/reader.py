"""Rows to encoded bytes: many reads in flight, bounded by bytes; bad rows get their status here.

A thread reads a batch from end to end; where files come from afar, each file of it is a job of its own.
A read that hangs costs its own row: its batch is set aside and the others pass it. After `timeout_s` the row
is given up, and the rest of its batch is read by another thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import nvtx

from engine import header
from engine.errors import EngineError
from engine.header import HeaderError
from engine.overlap import Meter
from engine.records import Batch, Header, Part, Status
from engine.settings import Limits
from engine.storage import ReadError, Storage, Url

# One more thread reads for each of these that a file takes on average: files in the page cache need one
# thread, and more would only fight for the interpreter lock, which each system call gives up; slow
# storage gets all.
SLOW_FILE_S = 0.000125
REMOTE_FILES = (64, 256)  # in flight where each takes a network's round trips, at least and at most
PATIENCE_S = 1.0  # a batch whose file takes longer is set aside
MAX_HUNG = 64  # reads given up on that have not come back; more, and the storage is down
WITNESSES = 8  # files that were read last: are all of them gone, so is the storage


class _Budget:
    """Bytes that may be held at once. The batch that the consumer waits for always passes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._closed = limit, 0, False
        self._first: _Job | None = None
        self._changed = threading.Condition()

    def acquire(self, size: int, job: _Job) -> None:
        with self._changed:
            while self._used + size > self._limit and job is not self._first and not self._closed:
                self._changed.wait()
            self._used += size

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def let_pass(self, job: _Job) -> None:
        with self._changed:
            self._first = job
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(slots=True, eq=False)
class _Attempt:
    """One thread's try at a batch. `since`: monotonic second that its present read began, if one goes on."""

    since: float | None = None
    overdue: bool = False  # at the last look

    def slow_for(self, now: float) -> float:
        since = self.since
        return 0.0 if since is None else now - since


@dataclass(slots=True, eq=False)
class _Pieces:
    """What the consumer knows of the jobs of one batch."""

    left: int  # not done
    held: int = 0  # bytes of the budget, by those that are


@dataclass(slots=True, eq=False)
class _Job:
    """A batch, or a piece of one, being read. Only the present `attempt` may write to it, under `lock`."""

    batch: Batch
    paths: list[str | None]  # of the batch
    position: int  # of the file that is read now
    stop: int  # position behind the last one
    files: int  # from first to last
    pieces: _Pieces
    attempt: _Attempt = field(default_factory=_Attempt)
    held: int = 0  # bytes of the budget
    busy_s: float = 0.0
    done: bool = False
    aside: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Reader:
    """Reads the files of parts in batches, `threads` batches at once."""

    root: Path | Url
    batch_size: int
    threads: int  # for local files
    limits: Limits
    timeout_s: float = 60.0
    ahead: bool = True  # False: one batch after the other
    on_gpu: Callable[[bytes, Header], bool] | None = None  # whether an image is decoded there

    def stage(self, parts: Iterable[Part], meter: Meter) -> Iterator[Batch]:
        """Batches in manifest order, but for those that a hanging read holds up; none crosses a part."""
        with meter.upstream(parts) as source, closing(_Reading(self, meter)) as reading:
            for part in source:
                for start in range(0, part.rows, self.batch_size):
                    reading.begin(part, start)
                    yield from reading.finished(leave=reading.ahead)
            yield from reading.finished(leave=0)
            yield from reading.stragglers()


class _Reading:
    """The reads of one stage: threads, the batches in their hands, and what waits to be handed on."""

    def __init__(self, reader: Reader, meter: Meter) -> None:
        self._reader, self._meter = reader, meter
        self._storage = Storage(reader.root)
        self._budget = _Budget(reader.limits.encoded_bytes)
        self._pending: deque[_Job] = deque()  # in manifest order
        self._waiting: deque[_Job] = deque()  # those of them that no thread has taken
        self._given: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # to threads that rest
        self._reading = 0  # threads that do not rest, but for those whose batch was set aside
        self._aside: list[_Job] = []
        self._witnesses: deque[str] = deque(maxlen=WITNESSES)
        self._remote, self._at_once = False, reader.threads  # jobs
        self._denied = 0  # reads that were refused before any went well
        self._hung = 0
        self._closed = False
        self._latency_s = 0.0  # of a file, running mean over batches
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        for _ in range(reader.threads):
            self._add_thread()

    @property
    def _wanted(self) -> int:
        """How many threads are worth it."""
        if self._remote or not self._reader.ahead:
            return self._at_once
        return min(self._at_once, 1 + int(self._latency_s / SLOW_FILE_S))

    @property
    def ahead(self) -> int:
        """How many jobs may be in flight beyond the one that is handed on next."""
        return 1 + self._wanted if self._reader.ahead else 0

    def _go_remote(self) -> None:
        """From here on a job is one file, and as many are in flight as two batches have."""
        fewest, most = REMOTE_FILES
        self._remote = True
        self._meter.lanes = self._at_once = max(fewest, min(2 * self._reader.batch_size, most))
        while len(self._threads) < self._at_once:
            self._add_thread()

    def begin(self, part: Part, start: int) -> None:
        paths = part.paths[start : start + self._reader.batch_size]
        rows = len(paths)
        batch = Batch(
            part,
            start,
            status=np.zeros(rows, np.uint8),
            width=np.zeros(rows, np.int32),
            height=np.zeros(rows, np.int32),
            encoded=[b""] * rows,
            headers=[None] * rows,
            on_gpu=[False] * rows,
        )
        if self._reader.ahead and not self._remote and self._storage.any_remote(paths):
            self._go_remote()
        step = 1 if self._remote else rows
        pieces = _Pieces(-(-rows // step))
        for position in range(0, rows, step):
            job = _Job(batch, paths, position, position + step, step, pieces)
            self._pending.append(job)
            self._waiting.append(job)
        self._wake()

    def _wake(self) -> None:
        """Give what waits to threads that rest, as many as are worth it."""
        with self._changed:
            while self._waiting and self._reading < self._wanted:
                self._reading += 1
                self._given.put(self._waiting.popleft())

    def _next(self) -> _Job | None:
        """What the calling thread reads next without a rest; None where it may have one."""
        with self._changed:
            if self._waiting and self._reading <= self._wanted:
                return self._waiting.popleft()
            self._reading -= 1
            return None

    def finished(self, leave: float) -> Iterator[Batch]:
        """Batches that are read, until at most `leave` are in flight; waits for them."""
        while True:
            if self._aside:
                yield from self._ready_aside()
            if len(self._pending) <= leave:
                return
            job = self._pending[0]
            if job.done or self._wait(job):
                self._pending.popleft()
                yield from self._hand_on(job)

    def stragglers(self) -> Iterator[Batch]:
        """What was set aside, as it comes."""
        while self._aside:
            self._wait(self._aside[0])
            yield from self._ready_aside()

    def _ready_aside(self) -> Iterator[Batch]:
        for job in [job for job in self._aside if job.done]:
            self._aside.remove(job)
            yield from self._hand_on(job)

    def _hand_on(self, job: _Job) -> Iterator[Batch]:
        """The batch of `job` if that was all of it that was left to be read."""
        self._meter.add(job.busy_s)
        self._latency_s += (job.busy_s / job.files - self._latency_s) / 16
        pieces = job.pieces
        pieces.left -= 1
        pieces.held += job.held
        if not pieces.left:
            job.batch.release = lambda: self._budget.release(pieces.held)
            yield job.batch

    def _wait(self, job: _Job) -> bool:
        """Wait a moment for `job`; True when it is done. A slow one is set aside, a hanging file given up."""
        self._budget.let_pass(job)
        with self._changed:
            if not job.done and not self._error:
                self._changed.wait(self._until_next_look())
        if self._error:
            raise self._error
        if job.done:
            return True
        now = time.monotonic()
        if job.attempt.slow_for(now) > PATIENCE_S and not job.aside and len(self._aside) < self._at_once:
            self._set_aside(job)
        for slow in {*self._aside, job}:
            overdue = slow.attempt.slow_for(now) > self._reader.timeout_s
            if overdue and slow.attempt.overdue:  # not at the first look: this process may have been paused
                self._give_up(slow)
            slow.attempt.overdue = overdue
        return False

    def _until_next_look(self) -> float:
        return min(PATIENCE_S, self._reader.timeout_s) / 4

    def _set_aside(self, job: _Job) -> None:
        """Let the batches behind `job` pass; its thread ends with it, so another takes its place."""
        with job.lock:
            if job.done:
                return
            job.aside = True
        self._pending.remove(job)
        self._aside.append(job)
        with self._changed:
            self._reading -= 1
        self._add_thread()
        self._wake()

    def _give_up(self, job: _Job) -> None:
        """Take the batch from the thread that hangs; the file it hangs on is lost, the rest goes on."""
        timeout_s = self._reader.timeout_s
        with job.lock:
            if job.done or job.attempt.slow_for(time.monotonic()) <= timeout_s:
                return  # it came at the last moment
            job.attempt = _Attempt()
            job.batch.fail(job.position, Status.TIMEOUT, f"no answer for {timeout_s:g} s (--read-timeout)")
            job.position += 1
        with self._changed:
            self._hung += 1
        if self._hung > MAX_HUNG:
            raise EngineError(
                f"the storage of the images does not answer: {self._hung} reads hang for longer than "
                f"{timeout_s:g} s; the same command goes on when it answers again"
            )
        self._add_thread()
        self._given.put(job)

    def _add_thread(self) -> None:
        # daemons: a read that never comes back must not keep the process
        thread = threading.Thread(target=self._work, name="read", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (job := self._given.get()) is not None:
            while job is not None:
                try:
                    goes_on = self._read_batch(job)
                except BaseException as error:  # handed to the consumer, which raises it
                    self._error, goes_on = error, False
                with self._changed:
                    self._changed.notify_all()
                if not goes_on:
                    return
                job = self._next()

    @nvtx.annotate("read")  # type: ignore[untyped-decorator,unused-ignore]
    def _read_batch(self, job: _Job) -> bool:
        """Read what is left of a batch. False when another thread has taken this one's place meanwhile."""
        began = time.perf_counter()
        attempt, data = job.attempt, b""
        while job.position < job.stop and not self._closed:
            attempt.since = time.monotonic()
            data, found, error = self._read_checked(job, attempt)
            with job.lock:
                if job.attempt is not attempt:
                    break
                self._keep(job, data, found, error)
                attempt.since = None
        with job.lock, self._changed:
            if job.attempt is not attempt:
                self._budget.release(len(data))
                self._hung -= 1
                return False
            job.busy_s += time.perf_counter() - began
            job.done = True
            return not job.aside

    def _read_checked(
        self, job: _Job, attempt: _Attempt
    ) -> tuple[bytes, Header | None, ReadError | HeaderError | None]:
        data = b""
        if job.batch.start + job.position in job.batch.part.crashed:
            return data, None, ReadError(Status.CRASHED, "it ends the process that scores it, alone too")
        try:
            data = self._read(job, attempt)
            return data, header.check(data, self._reader.limits.max_pixels), None
        except (ReadError, HeaderError) as error:
            return data, None, error

    def _keep(
        self, job: _Job, data: bytes, found: Header | None, error: ReadError | HeaderError | None
    ) -> None:
        batch, position = job.batch, job.position
        job.held += len(data)
        if found:
            on_gpu = self._reader.on_gpu is not None and self._reader.on_gpu(data, found)
            batch.keep(position, data, found, on_gpu=on_gpu)
        if error:
            if size := getattr(error, "size", None):
                batch.width[position], batch.height[position] = size
            batch.fail(position, error.status, str(error))
        job.position += 1

    def _read(self, job: _Job, attempt: _Attempt) -> bytes:
        path, admitted = job.paths[job.position], 0

        def admit(size: int) -> None:
            nonlocal admitted
            most = self._reader.limits.max_file_size
            if size > most:
                raise ReadError(Status.TOO_LARGE, f"{size} bytes; --max-file-size allows {most}")
            attempt.since = None  # waiting for room is not the storage's fault
            if size > admitted:
                began = time.perf_counter()
                self._budget.acquire(size - admitted, job)
                job.busy_s -= time.perf_counter() - began
                admitted = size
            attempt.since = time.monotonic()

        def alive() -> None:
            attempt.since = time.monotonic()

        data = b""
        try:
            data = self._storage.read(path, admit, alive)
        except ReadError as error:
            if path and error.status in (Status.MISSING, Status.UNREADABLE):
                self._check_storage(path, error)
            raise
        finally:
            if len(data) < admitted:  # it failed, or the file shrank meanwhile
                self._budget.release(admitted - len(data))
        if path:
            self._witnesses.append(path)
        return data

    def _check_storage(self, path: str, error: ReadError) -> None:
        """Raises EngineError when all storage has gone, and no row may be called missing.

        So it is when none of the files that were read last is there any more; before the first is read, when
        the place of `path` doesn't answer, or refuses one file after the other and a look at the whole.
        """
        if witnesses := list(self._witnesses):
            if any(self._storage.exists(witness) for witness in witnesses):
                return
            raise EngineError(
                f"the images have disappeared: {self._storage.where(path)} or a folder below it went away "
                "during the run; the same command goes on when it is back"
            )
        trouble = self._storage.trouble(path, patient=not error.transient)
        self._denied += error.denied
        if trouble and not self._witnesses and (not trouble.denied or self._denied >= WITNESSES):
            raise EngineError(
                f"images at {self._storage.where(path)}: {trouble}; "
                "the same command goes on when that is mended"
            )

    def close(self) -> None:
        self._closed = True
        self._budget.close()
        with self._changed:
            self._waiting.clear()
        for _ in self._threads:
            self._given.put(None)
        deadline = time.monotonic() + 2 * PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
