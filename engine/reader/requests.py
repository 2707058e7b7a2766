"""Reads in progress: the requests of a batch and the attempts at each."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from engine.core.records import Batch


@dataclass(slots=True, eq=False)
class ReadAttempt:
    """A thread's attempt at a request."""

    since: float | None = None  # monotonic second at which the current read began; None between reads
    overdue: bool = False  # at the last check

    def slow_for(self, now: float) -> float:
        since = self.since
        return 0.0 if since is None else now - since


@dataclass(slots=True, eq=False)
class BatchReads:
    """The consumer's state of the requests of one batch."""

    left: int  # requests that are not done
    held: int = 0  # bytes of the budget that the finished requests hold


@dataclass(slots=True, eq=False)
class ReadRequest:
    """A batch, or one file of it, to be read. Only the current `attempt` may write to it, under `lock`."""

    batch: Batch
    paths: list[str | None]  # of the batch
    position: int  # of the file that is being read
    stop: int  # position after the last file
    files: int  # number of files
    reads: BatchReads
    attempt: ReadAttempt = field(default_factory=ReadAttempt)
    held: int = 0  # bytes of the budget
    busy_s: float = 0.0
    done: bool = False
    parked: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
