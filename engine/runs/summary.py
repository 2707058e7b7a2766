"""Summarize a run: check and add up its parts, and write and read `_SUCCESS`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from msgspec import UNSET, UnsetType
from msgspec.structs import asdict, replace

from engine.core.errors import EngineError
from engine.core.json_records import Record, from_json
from engine.core.location import Location
from engine.core.overlap import Meter
from engine.core.records import PartInfo, Scorer
from engine.runs.progress import Progress
from engine.runs.run_record import RunRecord


class ScoredBy(Scorer):
    """A scorer, with the parts and rows that it wrote."""

    parts: int
    rows: int


class StageTimes(Record):
    """The seconds that a stage worked, waited for input and waited for the next stage."""

    busy_s: float
    starved_s: float
    blocked_s: float
    occupancy: float  # share of its threads' time that they worked


class ActorCounts(Record):
    """The counts of a run's actors on Ray in this start."""

    started: int
    lost: int
    refused: tuple[str, ...]  # one reason each
    parts_done_again: int
    rows_crashed: int


class LastStart(Record):
    """The counts and times of the start that finished a run."""

    rows: int
    elapsed_s: float
    stages: dict[str, StageTimes]
    limited_by: str | None
    decoder_restarts: int = 0
    decoder_refusals: int = 0
    actors: ActorCounts | UnsetType = UNSET


class Success(Record):
    """`_SUCCESS` and the last event of `--log-json`: the sums of a finished run. Read since 0.1.0."""

    run_id: str
    shard: str | UnsetType = UNSET  # "3/16" if it covers only the parts of a shard
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

    output: Location
    run_id: str
    rows: int
    by_status: dict[str, int]
    by_class: dict[str, int]
    scored_by: tuple[ScoredBy, ...]
    rows_done: int  # by this start; 0 if the run was already finished
    elapsed_s: float
    stages: dict[str, StageTimes]  # of this start
    limited_by: str | None
    decoder_restarts: int
    decoder_refusals: int  # images that the GPU's decoder refused
    shard: str | None = None  # "3/16" if it covers only the parts of a shard
    actors: ActorCounts | None = None

    @property
    def errors(self) -> int:
        return self.rows - self.by_status.get("ok", 0) - self.by_status.get("skipped", 0)

    def as_record(self) -> Success:
        """Return the content of `_SUCCESS`, finished now."""
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


def summarise_run(
    output: Location,
    run: RunRecord,
    parts: Iterable[PartInfo],
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
        tuple(
            ScoredBy(**asdict(scorer), parts=len(rows), rows=sum(rows)) for scorer, rows in scorers.items()
        ),
        progress.rows_done,
        round(elapsed, 3),
        stages,
        max(meters, key=lambda name: meters[name].occupancy(elapsed)) if meters else None,
        decoder_restarts,
        decoder_refusals,
        actors=actors,
    )


class ErrorRateError(EngineError):
    """A run is finished, but more of its rows failed than allowed."""

    exit_status = 3

    def __init__(self, text: str, summary: Summary) -> None:
        super().__init__(text)
        self.summary = summary
