"""The stage between reader and members: encoded bytes to pixels. A bad image fails only its own row."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from engine.core.overlap import Meter
from engine.core.records import Batch, Status
from engine.core.settings import Decode
from engine.preprocess.decoder import CrashedError, DecoderProcess


class Preprocess:
    """Decodes batches in a decoder process, which it owns; use from one thread at a time."""

    on_gpu, refusals = None, 0  # nothing is decoded on a GPU

    def __init__(
        self,
        *,
        size: tuple[int, int],
        batch_size: int,
        threads: int,
        decoding_bytes: int,
        decode: Decode = "exact",
    ) -> None:
        self.decoder = DecoderProcess(size=size, batch_size=batch_size, threads=threads, decode=decode)
        self._decoding_bytes = decoding_bytes

    @property
    def crashes(self) -> int:
        """Return how often the decoder process crashed."""
        return self.decoder.crashes

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        """Fill `pixels` and `index` of each batch; an image that cannot be decoded gets its status."""
        with meter.upstream(batches) as source:
            for batch in source:
                start = time.perf_counter()
                self.fill(batch)
                meter.add(time.perf_counter() - start)
                yield batch

    def fill(self, batch: Batch) -> None:
        pixels = np.empty((batch.rows, 1, *self.decoder.size), np.uint8)
        decoded = np.zeros(batch.rows, bool)
        decoded[self.decode(batch, range(batch.rows), pixels)] = True
        batch.drop_encoded()
        batch.index = np.flatnonzero(decoded)
        batch.pixels = pixels if decoded.all() else pixels[decoded]

    def decode(self, batch: Batch, positions: Iterable[int], pixels: npt.NDArray[np.uint8]) -> list[int]:
        """Decode `positions` of a batch into `pixels`, [n, 1, H, W]; return those that were decoded.

        The others get their status.
        """
        chunks = self._chunks(batch, positions)
        return [position for chunk in chunks for position in self._decode(batch, chunk, pixels)]

    def _chunks(self, batch: Batch, positions: Iterable[int]) -> Iterator[list[int]]:
        """Cut `positions` into runs that can be decoded together within `decoding_bytes`."""
        chunk: list[int] = []
        held = 0
        for position in positions:
            header = batch.headers[position]
            if header is None:
                continue
            size = header.decoding_bytes
            if chunk and (held + size > self._decoding_bytes or len(chunk) == self.decoder.batch_size):
                yield chunk
                chunk, held = [], 0
            chunk.append(position)
            held += size
        if chunk:
            yield chunk

    def _decode(
        self, batch: Batch, positions: list[int], pixels: npt.NDArray[np.uint8], *, again: bool = False
    ) -> list[int]:
        """Decode `positions` together into `pixels`; return those that were decoded.

        If the decoder process crashes, each image is decoded alone, twice if it crashes again: the cause may
        be another.
        """
        try:
            return self._request(batch, positions, pixels)
        except CrashedError as error:
            if len(positions) > 1:
                return [done for position in positions for done in self._decode(batch, [position], pixels)]
            if not again:
                return self._decode(batch, positions, pixels, again=True)
            (position,) = positions
            _fail(batch, position, Status.CRASHED, error)
            return []

    def _request(self, batch: Batch, positions: list[int], pixels: npt.NDArray[np.uint8]) -> list[int]:
        headers = [header for position in positions if (header := batch.headers[position])]
        reply = self.decoder.decode([batch.encoded[position] for position in positions], headers)
        for number, error in reply.failed.items():
            _fail(batch, positions[number], Status.CORRUPT, error)
        for number, flags in reply.flags.items():
            batch.flags.setdefault(positions[number], []).extend(flags)
        decoded = [position for number, position in enumerate(positions) if number not in reply.failed]
        pixels[decoded] = reply.pixels
        return decoded

    def close(self) -> None:
        self.decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _fail(batch: Batch, position: int, status: Status, error: object) -> None:
    header = batch.headers[position]
    assert header is not None
    batch.fail(position, status, f"decoding the {header.format} image failed: {error}")
