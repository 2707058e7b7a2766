"""Finished parts to Parquet, atomically: a part is written whole or not at all, and says its provenance."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
import numpy as np
import nvtx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.bundle import Bundle
from engine.core.json_records import Record, from_json, to_builtins
from engine.errors import EngineError, UsageError
from engine.listing import PATH
from engine.manifest import Manifest
from engine.overlap import Meter
from engine.privacy import Redaction
from engine.records import Batch, Part, Scorer, Status
from engine.settings import Settings
from engine.store import Folder, StoreError, reason
from engine.triage import Triage

ROW_GROUP = 65_536
FOOTERS_AT_ONCE = 16
_LABELS = np.array([status.label for status in Status])
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
METADATA = b"engine"
_PART = b"part"
UIDS = ("study_uid", "series_uid", "sop_uid")


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


@dataclass(frozen=True)
class Layout:
    """The columns of the results, in order."""

    classes: tuple[str, ...]
    members: tuple[str, ...]
    passthrough: pa.Schema  # as in the manifest
    column_prefix: str
    uids: bool  # whether DICOM's UIDs are among them
    redaction: Redaction | None = None  # what stands for paths
    triage: Triage | None = None  # what follows from the scores; none in runs of older versions

    @classmethod
    def of(
        cls, bundle: Bundle, manifest: Manifest, settings: Settings, *, with_triage: bool = True
    ) -> Layout:
        """Raises UsageError for a manifest column with a result's name.

        `with_triage`: False to go on with a run of an older version, which has no such columns.
        """
        names = tuple(member.name for member in bundle.members)
        column_prefix = settings.column_prefix
        uids, redaction = settings.include_uids, settings.redaction
        triage = Triage.of(bundle) if with_triage else None
        layout = cls(bundle.classes, names, manifest.columns, column_prefix, uids, redaction, triage)
        own = [field.name for field in layout._head() + layout._tail()]
        if len(set(own)) < len(own):
            raise UsageError(f"bundle {bundle.path}: members and classes give two columns the same name")
        clash = sorted(set(own) & {column_prefix + name for name in manifest.columns.names})
        if clash:
            raise UsageError(
                f"manifest {manifest.source}: columns {', '.join(map(repr, clash))} are names of results; "
                "rename them or give --column-prefix manifest_"
            )
        return layout

    @classmethod
    def of_part(
        cls,
        bundle: Bundle,
        folder: Folder,
        index: int,
        *,
        uids: bool,
        with_triage: bool,
        redaction: Redaction | None,
    ) -> Layout:
        """As a part of a run on disk has it; its manifest columns have their prefix already."""
        names = tuple(member.name for member in bundle.members)
        triage = Triage.of(bundle) if with_triage else None
        bare = cls(bundle.classes, names, pa.schema([]), "", uids, redaction, triage)
        own = set(bare.schema.names)
        stored = folder.read(part_name(index), pq.read_schema)
        return replace(bare, passthrough=pa.schema([field for field in stored if field.name not in own]))

    @property
    def schema(self) -> pa.Schema:
        kept = [field.with_name(self.column_prefix + field.name) for field in self.passthrough]
        return pa.schema([*self._head(), *kept, *self._tail()])

    def paths(self, paths: list[str | None]) -> list[str | None]:
        """As the results name them."""
        name = self.redaction.name if self.redaction else None
        return [path and name(path) for path in paths] if name else paths

    @staticmethod
    def _head() -> list[pa.Field[Any]]:
        return [pa.field("row", pa.int64()), pa.field(PATH, pa.string())]

    def _tail(self) -> list[pa.Field[Any]]:
        scores = [f"p_{name}" for name in self.classes]
        scores += [f"{member}_p_{name}" for member in self.members for name in self.classes]
        return [
            pa.field("status", pa.string()),
            pa.field("error", pa.string()),
            pa.field("flags", pa.list_(pa.string())),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("bits", pa.int32()),
            pa.field("photometric", pa.string()),
            *(pa.field(name, pa.string()) for name in UIDS if self.uids),
            pa.field("prediction", pa.string()),
            pa.field("confidence", pa.float32()),
            *(pa.field(name, pa.float32()) for name in scores),
            *(self.triage.fields if self.triage else ()),
        ]


class PartBuffer:
    """The columns of a part while its batches come in."""

    def __init__(self, part: Part, layout: Layout) -> None:
        rows, classes, members = part.rows, len(layout.classes), len(layout.members)
        self.part = part
        self.filled = 0
        self.status = np.zeros(rows, np.uint8)
        self.width, self.height = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self.bits = np.zeros(rows, np.int32)
        self.dicom: dict[int, tuple[str, ...]] = {}  # position -> photometric interpretation, UIDs
        self.prediction = np.zeros(rows, np.intp)
        self.confidence = np.zeros(rows, np.float32)
        self.scores = np.zeros((rows, classes), np.float32)
        self.members = np.zeros((members, rows, classes), np.float32)
        self.distances = np.full((members, rows), np.nan, np.float32)
        self.errors: dict[int, str] = {}
        self.flags: dict[int, list[str]] = {}

    def add(self, batch: Batch) -> None:
        assert batch.probabilities is not None
        assert batch.members is not None
        rows = slice(batch.start, batch.start + batch.rows)
        self.status[rows], self.width[rows], self.height[rows] = batch.status, batch.width, batch.height
        for position, header in enumerate(batch.headers, batch.start):
            if header:
                self.bits[position] = header.bits
                if header.photometric:
                    self.dicom[position] = (header.photometric, *header.uids)
        where = batch.start + batch.index
        self.scores[where], self.members[:, where] = batch.probabilities, batch.members
        if batch.distances is not None:
            self.distances[:, where] = batch.distances
        self.prediction[where], self.confidence[where] = batch.prediction, batch.confidence
        self.errors.update((batch.start + position, text) for position, text in batch.errors.items())
        self.flags.update((batch.start + position, names) for position, names in batch.flags.items())
        self.filled += batch.rows

    def table(self, layout: Layout) -> pa.Table:
        part, rows = self.part, self.part.rows
        failed, sizeless = self.status != Status.OK, self.width == 0
        columns = [
            pa.array(part.row),
            pa.array(layout.paths(part.paths), pa.string()),
            *part.columns.columns,
            pa.array(_LABELS[self.status]),
            pa.array([self.errors.get(row) for row in range(rows)], pa.string()),
            pa.array([self.flags.get(row, []) for row in range(rows)], pa.list_(pa.string())),
            pa.array(self.width, mask=sizeless),
            pa.array(self.height, mask=sizeless),
            pa.array(self.bits, mask=self.bits == 0),
            *(self._words(place) for place in range(1 + len(UIDS) * layout.uids)),
            pa.array(np.array(layout.classes)[self.prediction], pa.string(), mask=failed),
            pa.array(self.confidence, mask=failed),
            *(pa.array(column, mask=failed) for column in self.scores.T),
            *(pa.array(column, mask=failed) for member in self.members for column in member.T),
        ]
        if layout.triage:
            columns += layout.triage.columns(self.scores, self.members, self.distances, self.flags, failed)
        return pa.table(columns, schema=layout.schema)

    def _words(self, place: int) -> pa.Array[Any]:
        """One of the words that DICOM files have, null where there is none."""
        words = [self.dicom.get(row, ("",) * (1 + len(UIDS)))[place] or None for row in range(self.part.rows)]
        return pa.array(words, pa.string())


class PartFooter(Record):
    """What the metadata of a part say of it."""

    part: int  # index
    by_status: dict[str, int]
    by_class: dict[str, int]
    by: Scorer = Scorer()
    written: str | None = None  # ISO 8601

    @property
    def written_at(self) -> datetime | None:
        return datetime.fromisoformat(self.written) if self.written else None


class _Owner(msgspec.Struct):
    """Of `_run.json` in the metadata of a part, all that is read there; other fields are passed over."""

    run_id: str


@dataclass(frozen=True)
class Done:
    """A part on disk."""

    index: int
    first_row: int
    rows: int
    by_status: dict[str, int]
    by_class: dict[str, int]
    by: Scorer
    written: datetime | None  # for the first time, UTC; unknown of parts of older versions

    @property
    def errors(self) -> int:
        return self.rows - self.by_status.get("ok", 0) - self.by_status.get("skipped", 0)


class Sink:
    """Writes the parts of one run into `folder`; each file holds the JSON `provenance` and its scorer.

    With `fold` the rows replace those of the same numbers in a part that is there already. `written` is
    called with the index of each part that is safe.
    """

    def __init__(
        self,
        folder: Folder,
        layout: Layout,
        provenance: bytes,
        by: Scorer,
        *,
        fold: bool = False,
        written: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._written = written
        self._folder, self._layout, self._provenance, self._fold = folder, layout, provenance, fold
        self.by = by  # may be replaced between two parts

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch | Done]:
        """Hand each batch on once its rows are kept, and a Done after each part that is safe on disk.

        Batches may come in any order; only the parts they belong to are held.
        """
        opened: dict[int, PartBuffer] = {}
        with meter.upstream(batches) as source:
            for batch in source:
                start = time.perf_counter()
                index = batch.part.index
                part = opened.get(index) or opened.setdefault(index, PartBuffer(batch.part, self._layout))
                part.add(batch)
                done = self._write(opened.pop(index)) if part.filled == part.part.rows else None
                meter.add(time.perf_counter() - start)
                yield batch
                if done:
                    yield done

    @nvtx.annotate("write")  # type: ignore[untyped-decorator,unused-ignore]
    def _write(self, part: PartBuffer) -> Done:
        """The one place that commits a part."""
        index = part.part.index
        name = part_name(index)
        try:
            table = part.table(self._layout)
            written: datetime | None = datetime.now(UTC)
            if self._fold:
                old = self._folder.read(name, _table)
                table = _folded(old, table)
                written = from_json(old.schema.metadata[_PART], PartFooter).written_at
            done = Done(
                index,
                table.column("row")[0].as_py(),
                table.num_rows,
                _counts(table, "status"),
                _counts(table, "prediction"),
                self.by,
                written,
            )
            footer = PartFooter(
                part=index,
                by_status=done.by_status,
                by_class=done.by_class,
                by=done.by,
                written=written.isoformat(timespec="milliseconds") if written else None,
            )
            about = json.dumps(to_builtins(footer)).encode()
            table = table.replace_schema_metadata({METADATA: self._provenance, _PART: about})
            self._folder.write(
                name, partial(pq.write_table, table, compression="zstd", row_group_size=ROW_GROUP)
            )
        except OSError as error:
            raise EngineError(
                f"{self._folder.location / name}: {reason(error)}; "
                "the parts that are written are whole, and the same command goes on"
            ) from None
        self._written(index)
        return done


def failed_rows(folder: Folder, indices: Iterable[int], columns: Sequence[str]) -> Iterator[Part]:
    """Yield the rows of finished parts that failed, to be tried again, with `columns` of the results."""
    done = pa.array([Status.OK.label, Status.SKIPPED.label])
    failed = pc.invert(pc.is_in(pc.field("status"), done))
    yield from rows_again(folder, dict.fromkeys(indices, failed), columns)


def rows_again(folder: Folder, wanted: Mapping[int, pc.Expression], columns: Sequence[str]) -> Iterator[Part]:
    """The rows of finished parts that fit an expression for each, with `columns` of the results."""
    for index, which in wanted.items():
        names = list(dict.fromkeys(["row", PATH, "status", *columns]))
        table = folder.read(part_name(index), partial(_table, columns=names)).filter(which)
        paths = table.column(PATH).to_pylist()
        yield Part(index, table.column("row").to_numpy(), paths, table.select(columns).combine_chunks())


def _table(file: pa.NativeFile, columns: list[str] | None = None) -> pa.Table:
    return pq.ParquetFile(file).read(columns)


def _folded(old: pa.Table, new: pa.Table) -> pa.Table:
    """`old` with the rows of `new` in place of those that have their numbers."""
    kept = old.filter(pc.invert(pc.is_in(old.column("row"), value_set=new.column("row"))))
    return pa.concat_tables([kept.cast(new.schema), new]).sort_by("row")


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    return dict(Counter(filter(None, table.column(column).to_pylist())))


def parts_there(folder: Folder) -> set[int]:
    """The parts on disk, by their names."""
    return {int(found[1]) for found in map(_PART_NAME.fullmatch, folder.names()) if found}


def finished(folder: Folder, run_id: str, wanted: Container[int] | None = None) -> dict[int, Done]:
    """The parts on disk, by index, only `wanted` ones if given. Raises as `finished_part` does."""
    there = [index for index in parts_there(folder) if wanted is None or index in wanted]
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:  # in an object store each takes its round trips
        return {done.index: done for done in threads.map(partial(finished_part, folder, run_id), there)}


def finished_part(folder: Folder, run_id: str, index: int) -> Done:
    """A part on disk. Its footer has to be whole, of this run, and add up; raises EngineError otherwise."""
    name = part_name(index)
    try:
        return _from_footer(index, folder.read(name, pq.read_metadata), run_id)
    except StoreError:
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise EngineError(
            f"{folder.location / name}: not a part of this run ({why}); delete it and run again"
        ) from None


def _from_footer(index: int, footer: pq.FileMetaData, run_id: str) -> Done:
    metadata = footer.metadata or {}
    about, owner = from_json(metadata[_PART], PartFooter), from_json(metadata[METADATA], _Owner).run_id
    if owner != run_id:
        raise ValueError(f"it belongs to run {owner}")
    if about.part != index:
        raise ValueError(f"it is part {about.part}")
    row, prediction = _statistics(footer, "row"), _statistics(footer, "prediction")
    first, last = min(group.min for group in row), max(group.max for group in row)
    done = Done(
        index,
        first,
        footer.num_rows,
        about.by_status,
        about.by_class,
        about.by,
        about.written_at,
    )
    if last - first + 1 != done.rows:
        raise ValueError(f"rows {first} to {last} in {done.rows} rows")
    if sum(done.by_status.values()) != done.rows:
        raise ValueError(f"{sum(done.by_status.values())} of {done.rows} rows have a status")
    scored = done.rows - sum(group.null_count for group in prediction)
    if not scored == done.by_status.get("ok", 0) == sum(done.by_class.values()):
        raise ValueError(f"{scored} rows have scores, {done.by_status.get('ok', 0)} are ok")
    return done


def _statistics(footer: pq.FileMetaData, column: str) -> list[Any]:
    """Of each row group."""
    names = [footer.row_group(0).column(place).path_in_schema for place in range(footer.num_columns)]
    place = names.index(column)
    return [footer.row_group(group).column(place).statistics for group in range(footer.num_row_groups)]
