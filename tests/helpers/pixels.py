"""Run images through the engine's reader and preprocessing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.core.location import Url
from engine.core.overlap import Meter
from engine.core.records import Batch, Part
from engine.core.settings import Limits
from engine.preprocess.stage import Preprocess
from engine.reader.reader import Reader


def part_of(paths: Sequence[str | None], index: int = 0) -> Part:
    """Make a part whose rows are `paths`, without further columns."""
    return Part(index, np.arange(len(paths)), list(paths), pa.table({"_": pa.nulls(len(paths))}))


def read_batches(
    root: Path | Url,
    paths: Sequence[str | None],
    *,
    batch_size: int = 8,
    threads: int = 2,
    limits: Limits | None = None,
    **options: Any,
) -> Iterator[Batch]:
    """Read the batches of one part of `paths`."""
    reader = Reader(root, batch_size, threads, limits or Limits(), **options)
    return reader.stage([part_of(paths)], Meter("read"))


def pixels_alone(paths: Sequence[Path], size: tuple[int, int]) -> list[np.ndarray | None]:
    """Return uint8 [1, H, W] of each file, None if it is refused; each image is its own batch."""
    batches = read_batches(Path(), [str(path) for path in paths], batch_size=1, threads=1)
    with Preprocess(size=size, batch_size=1, threads=1, decoding_bytes=1) as preprocess:
        return [
            batch.pixels[0] if len(batch.index) else None
            for batch in preprocess.stage(batches, Meter("preprocess"))
        ]
