"""Overlap of stages and of tasks, and meters that show which stage limits a run."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
POLL_S = 1.0


@dataclass(slots=True)
class Meter:
    """Seconds of one stage. `lanes` is how many threads can be busy in it at once."""

    name: str
    lanes: int = 1
    busy_s: float = 0.0  # at work, summed over lanes
    starved_s: float = 0.0  # waiting for the stage before
    blocked_s: float = 0.0  # waiting for the stage after
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, seconds: float) -> None:
        """Count work done by one lane; any thread may call it."""
        with self._lock:
            self.busy_s += seconds

    @contextmanager
    def upstream(self, source: Iterable[T]) -> Iterator[Iterator[T]]:
        """Give `source` to the stage, count the wait for it, and close it when the stage ends or fails."""
        try:
            yield self._timed(iter(source))
        finally:
            close_iterator(source)

    def _timed(self, iterator: Iterator[T]) -> Iterator[T]:
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.starved_s += time.perf_counter() - start
            yield item

    def occupancy(self, elapsed_s: float) -> float:
        """Return the share of `elapsed_s` x lanes spent at work; the stage nearest to 1 limits the run."""
        return self.busy_s / (elapsed_s * self.lanes) if elapsed_s > 0 else 0.0


def close_iterator(iterable: object) -> None:
    """Close a generator; other iterables have nothing to close."""
    closer = getattr(iterable, "close", None)
    if closer:
        closer()


class _Channel:
    """A bounded queue between two threads that either side can close."""

    def __init__(self, depth: int) -> None:
        self._items: deque[object] = deque()
        self._depth = depth
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: object) -> bool:
        """Wait for room; return False when the other side has closed the queue."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._depth or self._closed)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self) -> object:
        with self._changed:
            # with a timeout: a signal that comes just before the wait is only handled after it
            while not self._changed.wait_for(lambda: len(self._items) > 0, timeout=POLL_S):
                pass
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


@dataclass(slots=True, frozen=True)
class _EndOfStream:
    error: BaseException | None


def prefetch(source: Iterator[T], depth: int, meter: Meter | None = None) -> Iterator[T]:
    """Run `source` in a background thread, at most `depth` items ahead; depth 0 is the serial twin.

    An error in the source is raised here, after the items that came before it. Closing this iterator
    stops the thread, closes the source and waits for both. `meter` counts the wait for room.
    """
    if depth == 0:
        try:
            yield from source
        finally:
            close_iterator(source)
        return
    channel = _Channel(depth)

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in source:
                start = time.perf_counter()
                if not channel.put(item):
                    break
                if meter:
                    meter.blocked_s += time.perf_counter() - start
        except BaseException as caught:  # passed to the consumer, which raises it
            error = caught
        finally:
            close_iterator(source)
            channel.put(_EndOfStream(error))

    thread = threading.Thread(target=work, name=f"prefetch-{meter.name if meter else 'stage'}", daemon=True)
    thread.start()
    try:
        while True:
            item = channel.get()
            if isinstance(item, _EndOfStream):
                if item.error:
                    raise item.error
                return
            yield item  # type: ignore[misc]
    finally:
        channel.close()
        thread.join()


def ordered_map(
    executor: Executor | None, work: Callable[[T], R], items: Iterable[T], depth: int
) -> Iterator[R]:
    """Yield `work(item)` of each item in order, with at most `depth` later items submitted to `executor`.

    Without an executor each item is worked on when it is asked for: the serial twin. An error in `work` is
    raised in its item's turn. When this iterator ends early, it cancels what has not begun and waits for the
    rest.
    """
    if executor is None:
        yield from map(work, items)
        return
    submitted: deque[Future[R]] = deque()
    try:
        for item in items:
            submitted.append(executor.submit(work, item))
            if len(submitted) > depth:
                yield submitted.popleft().result()
        while submitted:
            yield submitted.popleft().result()
    finally:
        wait([future for future in submitted if not future.cancel()])
