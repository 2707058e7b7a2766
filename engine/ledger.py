"""What a run has done: counts while it goes on, and the sums that have to add up at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from msgspec import UNSET, UnsetType
from msgspec.structs import asdict, replace

from engine.core.json_records import Record, from_json
from engine.overlap import Meter
from engine.provenance import RunRecord
from engine.records import Batch, Scorer, Status
from engine.sink import Done
from engine.storage.location import Place


@dataclass
class Progress:
    """What a run has done so far; `rows_done` and the counters grow while it runs."""

    rows: int  # that the run has to do, earlier starts included
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
        """Rows per second of this start."""
        return self.rows_done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def rows_left(self) -> int:
        return self.rows - self.rows_before - self.rows_done

    def seconds_for(self, rows: int) -> float:
        """How long `rows` more rows take at the rate so far; infinite before there is one."""
        return rows / self.rate if self.rate else float("inf")

    def share_by(self, moment: datetime) -> float:
        """Forecast: the share of the run that is done at `moment`, 0 to 1."""
        left_s = (moment - datetime.now(UTC)).total_seconds()
        done = self.rows_before + self.rows_done + self.rate * max(0.0, left_s)
        return min(1.0, done / self.rows) if self.rows else 1.0


class ScoredBy(Scorer):
    """A scorer, and how much it wrote."""

    parts: int
    rows: int


class StageTimes(Record):
    """Where the time of a stage went: at work, waiting for input, waiting to hand on."""

    busy_s: float
    starved_s: float
    blocked_s: float
    occupancy: float  # share of its lanes' time at work


class ActorCounts(Record):
    """Of a run on Ray: how its actors fared in this start."""

    started: int
    lost: int
    refused: tuple[str, ...]  # why, one line each
    parts_done_again: int
    rows_crashed: int


class LastStart(Record):
    """What the start that finished a run did."""

    rows: int
    elapsed_s: float
    stages: dict[str, StageTimes]
    limited_by: str | None
    decoder_restarts: int = 0
    decoder_refusals: int = 0
    actors: ActorCounts | UnsetType = UNSET


class Success(Record):
    """`_SUCCESS`: the sums of a finished run, and what `--log-json` says at its end. Read since 0.1.0."""

    run_id: str
    shard: str | UnsetType = UNSET  # "3/16" where this is about its parts only
    finished: str  # ISO 8601, UTC
    rows: int
    ok: int
    skipped: int = 0
    errors: int
    by_status: dict[str, int]
    by_class: dict[str, int]
    scored_by: tuple[ScoredBy, ...] = ()
    last_start: LastStart

    @classmethod
    def parse(cls, text: bytes | str) -> Success:
        """Read `_SUCCESS`. Raises ValueError in one line."""
        return from_json(text, cls)


@dataclass(frozen=True)
class Summary:
    """The outcome of a run."""

    output: Place
    run_id: str
    rows: int
    by_status: dict[str, int]
    by_class: dict[str, int]
    scored_by: tuple[ScoredBy, ...]
    rows_done: int  # by this start; 0 when the run was finished already
    elapsed_s: float
    stages: dict[str, StageTimes]  # of this start
    limited_by: str | None
    decoder_restarts: int
    decoder_refusals: int  # images that the GPU's decoder refused
    shard: str | None = None  # "3/16" where this is about its parts only
    actors: ActorCounts | None = None

    @property
    def errors(self) -> int:
        return self.rows - self.by_status.get("ok", 0) - self.by_status.get("skipped", 0)

    def as_record(self) -> Success:
        """Return what `_SUCCESS` is to say of it, finished now."""
        return Success(
            run_id=self.run_id,
            shard=self.shard or UNSET,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            rows=self.rows,
            ok=self.by_status.get("ok", 0),
            skipped=self.by_status.get("skipped", 0),
            errors=self.errors,
            by_status=self.by_status,
            by_class=self.by_class,
            scored_by=self.scored_by,
            last_start=LastStart(
                rows=self.rows_done,
                elapsed_s=self.elapsed_s,
                stages=self.stages,
                limited_by=self.limited_by,
                decoder_restarts=self.decoder_restarts,
                decoder_refusals=self.decoder_refusals,
                actors=self.actors or UNSET,
            ),
        )


def summary_of(
    output: Place,
    run: RunRecord,
    parts: Iterable[Done],
    progress: Progress,
    meters: Mapping[str, Meter],
    decoder_restarts: int = 0,
    decoder_refusals: int = 0,
    actors: ActorCounts | None = None,
) -> Summary:
    """Add up the parts of a complete run."""
    by_status, by_class = Counter[str](), Counter[str]()
    scorers: dict[Scorer, list[int]] = {}  # rows of each part
    for part in parts:
        by_status.update(part.by_status)
        by_class.update(part.by_class)
        scorers.setdefault(replace(part.by, actor=None, round=0), []).append(part.rows)
    elapsed = progress.elapsed_s
    stages = {
        name: StageTimes(
            busy_s=round(meter.busy_s, 3),
            starved_s=round(meter.starved_s, 3),
            blocked_s=round(meter.blocked_s, 3),
            occupancy=round(meter.occupancy(elapsed), 3),
        )
        for name, meter in meters.items()
    }
    return Summary(
        output,
        run.run_id,
        run.rows,
        dict(by_status),
        dict(by_class),
        tuple(ScoredBy(**asdict(one), parts=len(rows), rows=sum(rows)) for one, rows in scorers.items()),
        progress.rows_done,
        round(elapsed, 3),
        stages,
        max(meters, key=lambda name: meters[name].occupancy(elapsed)) if meters else None,
        decoder_restarts,
        decoder_refusals,
        actors=actors,
    )
