"""Encoded bytes to uint8 gray [N, 1, H, W] by one DALI graph; a bad image costs only its own row."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.overlap import Meter
from engine.preprocess.depth import to_gray_pnm
from engine.preprocess.graph import DecodeError, Graph
from engine.reader import Reader
from engine.records import Batch, Part, Status
from engine.settings import Limits, available_cpus

_ONE_PIXEL = b"P5 1 1 255\n\x80"


class Preprocess:
    """The stage between reader and members. Owns one DALI pipeline; use from one thread at a time."""

    def __init__(
        self, *, size: tuple[int, int], batch_size: int, threads: int, max_pixels_at_once: int
    ) -> None:
        self._graph = Graph(size=size, batch_size=batch_size, threads=threads)
        self._max_pixels_at_once = max_pixels_at_once
        self._graph.run([_ONE_PIXEL])  # a graph that can't decode this would call every row corrupt

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        """Fill `pixels` and `index` of each batch; what can't be decoded gets its status."""
        with meter.upstream(batches) as source:
            for batch in source:
                start = time.perf_counter()
                self.fill(batch)
                meter.add(time.perf_counter() - start)
                yield batch

    def fill(self, batch: Batch) -> None:
        images = self._images(batch)
        decoded: dict[int, npt.NDArray[np.uint8]] = {}
        for chunk in self._chunks(batch, list(images)):
            self._decode(batch, images, chunk, decoded)
        batch.drop_encoded()
        batch.index = np.array(sorted(decoded), np.intp)
        batch.pixels = np.empty((len(decoded), 1, *self._graph.size), np.uint8)
        for row, position in enumerate(batch.index):
            batch.pixels[row] = decoded[position]

    def _images(self, batch: Batch) -> dict[int, bytes]:
        """Position -> what the graph decodes, for every row that is still ok."""
        images = {}
        for position, header in enumerate(batch.headers):
            if header is None:
                continue
            try:
                data = batch.encoded[position]
                images[position] = to_gray_pnm(data) if header.deep else data
            except ValueError as error:
                batch.fail(position, Status.CORRUPT, f"{header.format} decoder: {error}")
        return images

    def _chunks(self, batch: Batch, positions: list[int]) -> Iterator[list[int]]:
        """Runs of positions whose decoded sizes fit into memory together."""
        chunk: list[int] = []
        pixels = 0
        for position in positions:
            size = int(batch.width[position]) * int(batch.height[position])
            if chunk and (pixels + size > self._max_pixels_at_once or len(chunk) == self._graph.batch_size):
                yield chunk
                chunk, pixels = [], 0
            chunk.append(position)
            pixels += size
        if chunk:
            yield chunk

    def _decode(
        self,
        batch: Batch,
        images: dict[int, bytes],
        positions: list[int],
        decoded: dict[int, npt.NDArray[np.uint8]],
    ) -> None:
        """Decode `positions` together; when DALI refuses, halve until the bad ones stand alone."""
        try:
            pixels = self._graph.run([images[position] for position in positions])
        except DecodeError:
            if len(positions) == 1:
                header = batch.headers[positions[0]]
                assert header is not None
                batch.fail(positions[0], Status.CORRUPT, f"{header.format} decoder: the image is damaged")
                return
            middle = len(positions) // 2
            self._decode(batch, images, positions[:middle], decoded)
            self._decode(batch, images, positions[middle:], decoded)
            return
        decoded.update(zip(positions, pixels, strict=True))


@dataclass(frozen=True)
class Loaded:
    """Pixels of the files that decoded, and why the others did not."""

    pixels: npt.NDArray[np.uint8]  # [k, 1, H, W]
    index: npt.NDArray[np.int64]  # [k], positions in the list of paths
    failures: list[tuple[int, str, str]]  # position, status, one-line error


def load_pixels(
    paths: Sequence[Path], *, size: tuple[int, int] = (224, 224), threads: int | None = None
) -> Loaded:
    """Read and preprocess files as screening does. All pixels are held at once: for training and checks."""
    limits = Limits()
    threads = threads or available_cpus()
    reader = Reader.within(limits, root=Path(), batch_size=16, threads=threads)
    preprocess = Preprocess(
        size=size, batch_size=16, threads=threads, max_pixels_at_once=limits.pixels_at_once
    )
    part = Part(0, 0, [str(path) for path in paths], pa.table({}))
    pixels, index, failures = [np.empty((0, 1, *size), np.uint8)], [np.empty(0, np.int64)], []
    for batch in preprocess.stage(reader.stage([part], Meter("read")), Meter("preprocess")):
        assert batch.pixels is not None
        pixels.append(batch.pixels)
        index.append(batch.start + batch.index)
        failures += [
            (batch.start + position, Status(batch.status[position]).label, error)
            for position, error in sorted(batch.errors.items())
        ]
    return Loaded(np.concatenate(pixels), np.concatenate(index), failures)
