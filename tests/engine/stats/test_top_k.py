"""The highest rows of a table that comes in pieces."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from engine.stats.top_k import TopK


def test_the_highest_rows_whatever_the_cuts() -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 50, 1000).astype(np.float32)  # many are equal
    rows = pa.table({"row": np.arange(1000)})
    wanted = np.lexsort((np.arange(1000), -scores))[:40].tolist()
    for size in (1, 7, 300, 1000):
        top = TopK(40)
        for start in range(0, 1000, size):
            top.add(rows.slice(start, size), scores[start : start + size])
        assert [row["row"] for row in top.rows()] == wanted
    none = TopK(0)
    none.add(rows, scores)
    assert none.rows() == []
