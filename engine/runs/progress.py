"""Count the rows of a run while it goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from engine.core.overlap import Meter
from engine.core.records import Batch, Status


@dataclass
class Progress:
    """The counts of a run so far; `rows_done` and the counters grow while it runs."""

    rows: int  # of the run, those of earlier starts included
    rows_before: int = 0  # finished by an earlier start of the same run
    rows_done: int = 0  # by this start, on disk or not
    by_status: Counter[str] = field(default_factory=Counter)  # of rows_before and rows_done
    by_class: Counter[str] = field(default_factory=Counter)  # of finished parts
    finish_by: datetime | None = None
    started: float = field(default_factory=time.monotonic)
    meters: dict[str, Meter] = field(default_factory=dict)  # of the stages, once they run

    def add(self, batch: Batch) -> None:
        self.rows_done += batch.rows
        self.by_status["ok"] += len(batch.index)
        for position in batch.errors:
            self.by_status[Status(batch.status[position]).label] += 1

    @property
    def errors(self) -> int:
        return self.by_status.total() - self.by_status["ok"] - self.by_status["skipped"]

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Return the rows per second of this start."""
        return self.rows_done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def rows_left(self) -> int:
        return self.rows - self.rows_before - self.rows_done

    def seconds_for(self, rows: int) -> float:
        """Return the seconds for `rows` more rows at the present rate; infinite before the first batch."""
        return rows / self.rate if self.rate else float("inf")

    def share_by(self, moment: datetime) -> float:
        """Forecast the share of the run that is done at `moment`, 0 to 1."""
        left_s = (moment - datetime.now(UTC)).total_seconds()
        done = self.rows_before + self.rows_done + self.rate * max(0.0, left_s)
        return min(1.0, done / self.rows) if self.rows else 1.0


OnProgress = Callable[[Progress], None]
