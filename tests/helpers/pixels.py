"""Images one by one through the engine's preprocess: what batches are held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.overlap import Meter
from engine.preprocess.stage import Preprocess
from engine.reader import Reader
from engine.records import Part
from engine.settings import Limits


def pixels_alone(paths: Sequence[Path], size: tuple[int, int]) -> list[np.ndarray | None]:
    """uint8 [1, H, W] of each file, None for one that is refused; no other image is near it."""
    part = Part(0, np.arange(len(paths)), [str(path) for path in paths], pa.table({}))
    batches = Reader(Path(), batch_size=1, threads=1, limits=Limits()).stage([part], Meter("read"))
    with Preprocess(size=size, batch_size=1, threads=1, decoding_bytes=1) as preprocess:
        return [
            batch.pixels[0] if len(batch.index) else None
            for batch in preprocess.stage(batches, Meter("preprocess"))
        ]
