"""Describe reads in progress: a batch, its pieces and each attempt."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from engine.core.records import Batch


@dataclass(slots=True, eq=False)
class ReadAttempt:
    """A thread's attempt at a batch. `since`: monotonic second when its present read began, if one is
    running.
    """

    since: float | None = None
    overdue: bool = False  # at the last look

    def slow_for(self, now: float) -> float:
        since = self.since
        return 0.0 if since is None else now - since


@dataclass(slots=True, eq=False)
class BatchJobs:
    """The consumer's state of the jobs of one batch."""

    left: int  # not done
    held: int = 0  # bytes of the budget, by those that are


@dataclass(slots=True, eq=False)
class ReadJob:
    """A batch, or a piece of one, being read. Only the present `attempt` may write to it, under `lock`."""

    batch: Batch
    paths: list[str | None]  # of the batch
    position: int  # of the file that is read now
    stop: int  # position behind the last one
    files: int  # from first to last
    pieces: BatchJobs
    attempt: ReadAttempt = field(default_factory=ReadAttempt)
    held: int = 0  # bytes of the budget
    busy_s: float = 0.0
    done: bool = False
    parked: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
