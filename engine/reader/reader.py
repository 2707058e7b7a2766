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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import nvtx

from engine.core.errors import EngineError
from engine.core.location import Url
from engine.core.overlap import Meter
from engine.core.records import Batch, Header, Part, Status
from engine.core.settings import Limits
from engine.formats import header
from engine.formats.common import HeaderError
from engine.reader.budget import ByteBudget
from engine.reader.jobs import BatchJobs, ReadAttempt, ReadJob
from engine.storage.errors import ReadError
from engine.storage.images import ImageStorage

# One more thread reads for each of these that a file takes on average: files in the page cache need one
# thread, and more would only fight for the interpreter lock, which each system call gives up; slow
# storage gets all.
LATENCY_PER_THREAD_S = 0.000125
REMOTE_FILES_IN_FLIGHT = (64, 256)  # in flight where each takes a network's round trips, at least and at most
SLOW_READ_S = 1.0  # a batch whose file takes longer is set aside
MAX_HUNG_READS = 64  # reads given up on that have not come back; more, and the storage is down
RECENT_FILES = 8  # files that were read last: are all of them gone, so is the storage


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
        with meter.upstream(parts) as source, closing(_ReadScheduler(self, meter)) as reading:
            for part in source:
                for start in range(0, part.rows, self.batch_size):
                    reading.begin(part, start)
                    yield from reading.finished(leave=reading.ahead)
            yield from reading.finished(leave=0)
            yield from reading.drain_parked()


class _ReadScheduler:
    """The reads of one stage: threads, the batches in their hands, and what waits to be handed on."""

    def __init__(self, reader: Reader, meter: Meter) -> None:
        self._reader, self._meter = reader, meter
        self._storage = ImageStorage(reader.root)
        self._budget = ByteBudget(reader.limits.encoded_bytes)
        self._pending: deque[ReadJob] = deque()  # in manifest order
        self._waiting: deque[ReadJob] = deque()  # those of them that no thread has taken
        self._jobs: queue.SimpleQueue[ReadJob | None] = queue.SimpleQueue()  # to threads that rest
        self._reading = 0  # threads that do not rest, but for those whose batch was set aside
        self._parked: list[ReadJob] = []
        self._recently_read: deque[str] = deque(maxlen=RECENT_FILES)
        self._remote, self._max_jobs = False, reader.threads  # jobs
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
    def _wanted_threads(self) -> int:
        """Return how many threads the latency of the storage justifies."""
        if self._remote or not self._reader.ahead:
            return self._max_jobs
        return min(self._max_jobs, 1 + int(self._latency_s / LATENCY_PER_THREAD_S))

    @property
    def ahead(self) -> int:
        """Return how many jobs may be in flight beyond the one that is delivered next."""
        return 1 + self._wanted_threads if self._reader.ahead else 0

    def _switch_to_remote(self) -> None:
        """Make each file a separate job, with as many in flight as two batches have files."""
        fewest, most = REMOTE_FILES_IN_FLIGHT
        self._remote = True
        self._meter.lanes = self._max_jobs = max(fewest, min(2 * self._reader.batch_size, most))
        while len(self._threads) < self._max_jobs:
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
            self._switch_to_remote()
        step = 1 if self._remote else rows
        pieces = BatchJobs(-(-rows // step))
        for position in range(0, rows, step):
            job = ReadJob(batch, paths, position, position + step, step, pieces)
            self._pending.append(job)
            self._waiting.append(job)
        self._wake()

    def _wake(self) -> None:
        """Give what waits to threads that rest, as many as are worth it."""
        with self._changed:
            while self._waiting and self._reading < self._wanted_threads:
                self._reading += 1
                self._jobs.put(self._waiting.popleft())

    def _next(self) -> ReadJob | None:
        """Return the next job for the calling thread, None if it may wait."""
        with self._changed:
            if self._waiting and self._reading <= self._wanted_threads:
                return self._waiting.popleft()
            self._reading -= 1
            return None

    def finished(self, leave: float) -> Iterator[Batch]:
        """Batches that are read, until at most `leave` are in flight; waits for them."""
        while True:
            if self._parked:
                yield from self._finished_parked()
            if len(self._pending) <= leave:
                return
            job = self._pending[0]
            if job.done or self._wait(job):
                self._pending.popleft()
                yield from self._deliver(job)

    def drain_parked(self) -> Iterator[Batch]:
        """Yield the parked batches as they finish."""
        while self._parked:
            self._wait(self._parked[0])
            yield from self._finished_parked()

    def _finished_parked(self) -> Iterator[Batch]:
        for job in [job for job in self._parked if job.done]:
            self._parked.remove(job)
            yield from self._deliver(job)

    def _deliver(self, job: ReadJob) -> Iterator[Batch]:
        """Return the batch of `job` if nothing of it is left to read."""
        self._meter.add(job.busy_s)
        self._latency_s += (job.busy_s / job.files - self._latency_s) / 16
        pieces = job.pieces
        pieces.left -= 1
        pieces.held += job.held
        if not pieces.left:
            job.batch.release = lambda: self._budget.release(pieces.held)
            yield job.batch

    def _wait(self, job: ReadJob) -> bool:
        """Wait a moment for `job`; True when it is done. A slow one is set aside, a hanging file given up."""
        self._budget.set_first(job)
        with self._changed:
            if not job.done and not self._error:
                self._changed.wait(self._poll_s())
        if self._error:
            raise self._error
        if job.done:
            return True
        now = time.monotonic()
        if job.attempt.slow_for(now) > SLOW_READ_S and not job.parked and len(self._parked) < self._max_jobs:
            self._park(job)
        for slow in {*self._parked, job}:
            overdue = slow.attempt.slow_for(now) > self._reader.timeout_s
            if overdue and slow.attempt.overdue:  # not at the first look: this process may have been paused
                self._abandon_read(slow)
            slow.attempt.overdue = overdue
        return False

    def _poll_s(self) -> float:
        return min(SLOW_READ_S, self._reader.timeout_s) / 4

    def _park(self, job: ReadJob) -> None:
        """Let the batches behind `job` pass; its thread ends with it, so another takes its place."""
        with job.lock:
            if job.done:
                return
            job.parked = True
        self._pending.remove(job)
        self._parked.append(job)
        with self._changed:
            self._reading -= 1
        self._add_thread()
        self._wake()

    def _abandon_read(self, job: ReadJob) -> None:
        """Take the batch from the thread that hangs; the file it hangs on is lost, the rest goes on."""
        timeout_s = self._reader.timeout_s
        with job.lock:
            if job.done or job.attempt.slow_for(time.monotonic()) <= timeout_s:
                return  # it came at the last moment
            job.attempt = ReadAttempt()
            job.batch.fail(job.position, Status.TIMEOUT, f"no answer for {timeout_s:g} s (--read-timeout)")
            job.position += 1
        with self._changed:
            self._hung += 1
        if self._hung > MAX_HUNG_READS:
            raise EngineError(
                f"the storage of the images does not answer: {self._hung} reads hang for longer than "
                f"{timeout_s:g} s; run the same command again when it answers"
            )
        self._add_thread()
        self._jobs.put(job)

    def _add_thread(self) -> None:
        # daemons: a read that never comes back must not keep the process
        thread = threading.Thread(target=self._work, name="read", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
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
    def _read_batch(self, job: ReadJob) -> bool:
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
            return not job.parked

    def _read_checked(
        self, job: ReadJob, attempt: ReadAttempt
    ) -> tuple[bytes, Header | None, ReadError | HeaderError | None]:
        data = b""
        if job.batch.start + job.position in job.batch.part.crashed:
            return (
                data,
                None,
                ReadError(Status.CRASHED, "scoring this image crashes the worker process, even on its own"),
            )
        try:
            data = self._read(job, attempt)
            return data, header.check(data, self._reader.limits.max_pixels), None
        except (ReadError, HeaderError) as error:
            return data, None, error

    def _keep(
        self, job: ReadJob, data: bytes, found: Header | None, error: ReadError | HeaderError | None
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

    def _read(self, job: ReadJob, attempt: ReadAttempt) -> bytes:
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
            self._recently_read.append(path)
        return data

    def _check_storage(self, path: str, error: ReadError) -> None:
        """Raises EngineError when all storage has gone, and no row may be called missing.

        So it is when none of the files that were read last is there any more; before the first is read, when
        the place of `path` doesn't answer, or refuses one file after the other and a look at the whole.
        """
        if recently_read := list(self._recently_read):
            if any(self._storage.exists(recent_path) for recent_path in recently_read):
                return
            raise EngineError(
                f"the images have disappeared: {self._storage.where(path)} or a folder below it went away "
                "during the run; run the same command again when it is back"
            )
        trouble = self._storage.storage_error(path, retry=not error.transient)
        self._denied += error.denied
        if trouble and not self._recently_read and (not trouble.denied or self._denied >= RECENT_FILES):
            raise EngineError(
                f"images at {self._storage.where(path)}: {trouble}; fix this and run the same command again"
            )

    def close(self) -> None:
        self._closed = True
        self._budget.close()
        with self._changed:
            self._waiting.clear()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + 2 * SLOW_READ_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
