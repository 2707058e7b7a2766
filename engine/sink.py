"""Finished parts to Parquet, atomically: a part is written whole or not at all, and says its provenance."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.bundle import Bundle
from engine.errors import EngineError, UsageError
from engine.manifest import PATH, Manifest
from engine.overlap import Meter
from engine.records import Batch, Part, Status

ROW_GROUP = 65_536
_LABELS = np.array([status.label for status in Status])
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
_METADATA = b"engine"


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


@dataclass(frozen=True)
class Layout:
    """The columns of the results, in order."""

    classes: tuple[str, ...]
    members: tuple[str, ...]
    passthrough: pa.Schema  # as in the manifest
    column_prefix: str

    @classmethod
    def of(cls, bundle: Bundle, manifest: Manifest, column_prefix: str) -> Layout:
        """Raises UsageError when a manifest column has the name of a results column."""
        names = tuple(member.name for member in bundle.members)
        layout = cls(bundle.classes, names, manifest.columns, column_prefix)
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

    @property
    def schema(self) -> pa.Schema:
        kept = [field.with_name(self.column_prefix + field.name) for field in self.passthrough]
        return pa.schema([*self._head(), *kept, *self._tail()])

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
            pa.field("prediction", pa.string()),
            pa.field("confidence", pa.float32()),
            *(pa.field(name, pa.float32()) for name in scores),
        ]


class _OpenPart:
    """The columns of a part while its batches come in."""

    def __init__(self, part: Part, layout: Layout) -> None:
        rows, classes, members = part.rows, len(layout.classes), len(layout.members)
        self.part = part
        self.filled = 0
        self.status = np.zeros(rows, np.uint8)
        self.width, self.height = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self.scores = np.zeros((rows, classes), np.float32)
        self.members = np.zeros((members, rows, classes), np.float32)
        self.errors: dict[int, str] = {}
        self.flags: dict[int, list[str]] = {}

    def add(self, batch: Batch) -> None:
        assert batch.start == self.filled
        assert batch.probabilities is not None
        assert batch.members is not None
        rows = slice(batch.start, batch.start + batch.rows)
        self.status[rows], self.width[rows], self.height[rows] = batch.status, batch.width, batch.height
        where = batch.start + batch.index
        self.scores[where], self.members[:, where] = batch.probabilities, batch.members
        self.errors.update((batch.start + position, text) for position, text in batch.errors.items())
        self.flags.update((batch.start + position, names) for position, names in batch.flags.items())
        self.filled += batch.rows

    def table(self, layout: Layout) -> pa.Table:
        part, rows = self.part, self.part.rows
        failed, sizeless = self.status != Status.OK, self.width == 0
        best = self.scores.argmax(axis=1) if rows else np.zeros(0, np.intp)
        columns = [
            pa.array(np.arange(part.first_row, part.first_row + rows)),
            pa.array(part.paths, pa.string()),
            *part.columns.columns,
            pa.array(_LABELS[self.status]),
            pa.array([self.errors.get(row) for row in range(rows)], pa.string()),
            pa.array([self.flags.get(row, []) for row in range(rows)], pa.list_(pa.string())),
            pa.array(self.width, mask=sizeless),
            pa.array(self.height, mask=sizeless),
            pa.array(np.array(layout.classes)[best], pa.string(), mask=failed),
            pa.array(self.scores[np.arange(rows), best], mask=failed),
            *(pa.array(column, mask=failed) for column in self.scores.T),
            *(pa.array(column, mask=failed) for member in self.members for column in member.T),
        ]
        return pa.table(columns, schema=layout.schema)


@dataclass(frozen=True)
class Done:
    """A part on disk."""

    index: int
    rows: int
    by_status: dict[str, int]
    by_class: dict[str, int]


class Sink:
    """Writes the parts of one run into `folder`. `provenance` goes into each file."""

    def __init__(self, folder: Path, layout: Layout, provenance: dict[str, Any]) -> None:
        self._folder, self._layout = folder, layout
        self._provenance = json.dumps(provenance).encode()

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch | Done]:
        """Hand each batch on once its rows are kept, and a Done after each part that is safe on disk."""
        current: _OpenPart | None = None
        with meter.upstream(batches) as source:
            for batch in source:
                start = time.perf_counter()
                if current is None or current.part is not batch.part:
                    current = _OpenPart(batch.part, self._layout)
                current.add(batch)
                done = self._write(current) if current.filled == batch.part.rows else None
                meter.add(time.perf_counter() - start)
                yield batch
                if done:
                    current = None
                    yield done

    def _write(self, part: _OpenPart) -> Done:
        table = part.table(self._layout)
        by_status = Counter(_LABELS[part.status].tolist())
        by_class = Counter(filter(None, table.column("prediction").to_pylist()))
        done = Done(part.part.index, part.part.rows, dict(by_status), dict(by_class))
        facts = {"part": done.index, "by_status": done.by_status, "by_class": done.by_class}
        table = table.replace_schema_metadata(
            {_METADATA: self._provenance, b"part": json.dumps(facts).encode()}
        )
        target = self._folder / part_name(done.index)
        with atomic(target) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP)
        return done


class atomic:
    """`with atomic(path) as temporary:` write `temporary`; then it is synced and renamed to `path`."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = target.with_name(f".{target.name}.tmp")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        _sync(self._temporary)
        self._temporary.replace(self._target)
        _sync(self._target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(target: Path, data: dict[str, Any]) -> None:
    with atomic(target) as temporary:
        temporary.write_text(json.dumps(data, indent=2, default=str) + "\n")


def finished(folder: Path) -> dict[int, Done]:
    """The parts on disk, by index, as their own footers tell. Raises EngineError for a damaged one."""
    parts = {}
    for path in folder.iterdir():
        found = _PART_NAME.fullmatch(path.name)
        if not found:
            continue
        try:
            metadata = pq.read_metadata(path)
            facts = json.loads((metadata.metadata or {})[b"part"])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise EngineError(f"{path}: not a finished part ({reason}); delete it and run again") from None
        parts[int(found[1])] = Done(int(found[1]), metadata.num_rows, facts["by_status"], facts["by_class"])
    return parts
