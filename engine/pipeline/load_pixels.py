"""Read and preprocess a list of images without a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.core.hardware import available_cpus
from engine.core.location import Location
from engine.core.overlap import Meter
from engine.core.records import Header, Part, Status
from engine.core.settings import Decode, Limits
from engine.preprocess.stage import Preprocess
from engine.reader.reader import Reader


@dataclass(frozen=True)
class LoadedPixels:
    """Pixels of the decoded files, and the errors of the others."""

    pixels: npt.NDArray[np.uint8]  # [k, 1, H, W]
    index: npt.NDArray[np.int64]  # [k], positions in the list of paths
    headers: list[Header]  # [k], metadata of the files
    failures: list[tuple[int, str, str]]  # position, status, one-line error


def load_pixels(
    paths: Sequence[Path | str],
    *,
    root: Location = Path(),
    size: tuple[int, int] = (224, 224),
    decode: Decode = "exact",
    limits: Limits | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> LoadedPixels:
    """Read and preprocess files as screening does, for training and checks. All pixels are held in memory.

    `progress` is called with the number of files just processed.
    """
    limits = limits or Limits()
    threads = threads or available_cpus()
    reader = Reader(root, batch_size=16, threads=threads, limits=limits)
    part = Part(0, np.arange(len(paths)), [str(path) for path in paths], pa.table({}))
    pixels, index = [np.empty((0, 1, *size), np.uint8)], [np.empty(0, np.int64)]
    headers: list[Header | None] = []
    failures = []
    with Preprocess(
        size=size, batch_size=16, threads=threads, decoding_bytes=limits.decoding_bytes, decode=decode
    ) as preprocess:
        for batch in preprocess.stage(reader.stage([part], Meter("read")), Meter("preprocess")):
            assert batch.pixels is not None
            pixels.append(batch.pixels)
            index.append(batch.start + batch.index)
            headers += [batch.headers[position] for position in batch.index]
            failures += [
                (batch.start + position, Status(batch.status[position]).label, error)
                for position, error in sorted(batch.errors.items())
            ]
            progress(batch.rows)
    positions = np.concatenate(index)
    order = np.argsort(positions)  # files may finish out of order
    decoded_headers = [header for position in order if (header := headers[position]) is not None]
    assert len(decoded_headers) == len(positions), "each decoded image has a header"
    return LoadedPixels(np.concatenate(pixels)[order], positions[order], decoded_headers, sorted(failures))
