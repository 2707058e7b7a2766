"""Keep the rows with the highest scores of a table that arrives in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float32]


class TopK:
    """Keeps the `count` rows with the highest scores, highest first; ties keep the earlier row."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._tables: list[pa.Table] = []
        self._scores = np.empty(0, np.float32)

    def add(self, table: pa.Table, scores: Floats) -> None:
        """Add rows and their finite scores [n]."""
        if not self._count:
            return
        full = len(self._scores) == self._count
        candidates = np.flatnonzero(scores > self._scores[-1]) if full else np.arange(len(scores))
        if not len(candidates):
            return
        chosen = candidates[np.argsort(-scores[candidates], kind="stable")[: self._count]]
        rows = pa.concat_tables([*self._tables, table.take(chosen)])
        merged = np.concatenate([self._scores, scores[chosen]])
        best = np.argsort(-merged, kind="stable")[: self._count]
        self._tables, self._scores = [rows.take(best).combine_chunks()], merged[best]

    @property
    def columns(self) -> set[str]:
        return {name for table in self._tables for name in table.column_names}

    def rows(self) -> list[dict[str, Any]]:
        return [row for table in self._tables for row in table.to_pylist()]
