"""Collect the rows of an open part in arrays and turn them into an Arrow table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from engine.core.records import Batch, Part, Status
from engine.sink.columns import UID_COLUMNS, ResultSchema

_LABELS = np.array([status.label for status in Status])


class PartBuffer:
    """The columns of an open part, filled batch by batch."""

    def __init__(self, part: Part, layout: ResultSchema) -> None:
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
        scored = batch.start + batch.index
        self.scores[scored], self.members[:, scored] = batch.probabilities, batch.members
        if batch.distances is not None:
            self.distances[:, scored] = batch.distances
        self.prediction[scored], self.confidence[scored] = batch.prediction, batch.confidence
        self.errors.update((batch.start + position, text) for position, text in batch.errors.items())
        self.flags.update((batch.start + position, names) for position, names in batch.flags.items())
        self.filled += batch.rows

    def table(self, layout: ResultSchema) -> pa.Table:
        part, rows = self.part, self.part.rows
        failed, no_size = self.status != Status.OK, self.width == 0
        columns = [
            pa.array(part.row),
            pa.array(layout.paths(part.paths), pa.string()),
            *part.columns.columns,
            pa.array(_LABELS[self.status]),
            pa.array([self.errors.get(row) for row in range(rows)], pa.string()),
            pa.array([self.flags.get(row, []) for row in range(rows)], pa.list_(pa.string())),
            pa.array(self.width, mask=no_size),
            pa.array(self.height, mask=no_size),
            pa.array(self.bits, mask=self.bits == 0),
            *(self._dicom_column(position) for position in range(1 + len(UID_COLUMNS) * layout.uids)),
            pa.array(np.array(layout.classes)[self.prediction], pa.string(), mask=failed),
            pa.array(self.confidence, mask=failed),
            *(pa.array(column, mask=failed) for column in self.scores.T),
            *(pa.array(column, mask=failed) for member in self.members for column in member.T),
        ]
        if layout.triage:
            columns += layout.triage.columns(self.scores, self.members, self.distances, self.flags, failed)
        return pa.table(columns, schema=layout.schema)

    def _dicom_column(self, position: int) -> pa.Array[Any]:
        """Return one DICOM text per row, null if the row has none."""
        absent = ("",) * (1 + len(UID_COLUMNS))
        texts = [self.dicom.get(row, absent)[position] or None for row in range(self.part.rows)]
        return pa.array(texts, pa.string())
