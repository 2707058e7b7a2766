"""Keep the rows with the highest scores of a table that comes in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float32]


class TopK:
    """Keeps the `most` rows with the highest scores, of equal ones the first, and gives the highest first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tables: list[pa.Table] = []
        self._scores = np.empty(0, np.float32)

    def add(self, table: pa.Table, scores: Floats) -> None:
        """Take in rows and their scores [n], which are numbers."""
        full = len(self._scores) == self._most
        may_enter = (
            np.flatnonzero(scores > self._scores[-1]) if full and self._most else np.arange(len(scores))
        )
        if not len(may_enter) or not self._most:
            return
        order = np.argsort(-scores[may_enter], kind="stable")[: self._most]
        chosen = may_enter[order]
        rows = pa.concat_tables([*self._tables, table.take(chosen)])
        merged = np.concatenate([self._scores, scores[chosen]])
        best = np.argsort(-merged, kind="stable")[: self._most]
        self._tables, self._scores = [rows.take(best).combine_chunks()], merged[best]

    @property
    def columns(self) -> set[str]:
        return {name for table in self._tables for name in table.column_names}

    def rows(self) -> list[dict[str, Any]]:
        return [row for table in self._tables for row in table.to_pylist()]
