"""The stage between reader and members: encoded bytes to pixels; a bad image costs only its own row."""

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
    """Fills in pixels through a decoder process, which it owns; use from one thread at a time."""

    on_gpu, refusals = None, 0  # there is no GPU

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
        """Return how often the decoder had to be started anew."""
        return self.decoder.crashes

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        """Fill `pixels` and `index` of each batch; what can't be decoded gets its status."""
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
        """Decode `positions` of a batch into `pixels`, [n, 1, H, W]; the others get their status.

        Returns the positions that decoded.
        """
        chunks = self._chunks(batch, positions)
        return [position for chunk in chunks for position in self._decode(batch, chunk, pixels)]

    def _chunks(self, batch: Batch, positions: Iterable[int]) -> Iterator[list[int]]:
        """Runs of `positions` that can be decoded together within the memory allowed."""
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
        """Decode `positions` together into `pixels`. Returns those that decoded.

        If the decoder dies over them each is tried alone, and once more, since it can die of something else.
        """
        try:
            return self._request(batch, positions, pixels)
        except CrashedError as error:
            if len(positions) > 1:
                return [one for position in positions for one in self._decode(batch, [position], pixels)]
            if not again:
                return self._decode(batch, positions, pixels, again=True)
            (position,) = positions
            batch.fail(position, Status.CRASHED, f"{_format_name(batch, position)} decoder: {error}")
            return []

    def _request(self, batch: Batch, positions: list[int], pixels: npt.NDArray[np.uint8]) -> list[int]:
        headers = [header for position in positions if (header := batch.headers[position])]
        reply = self.decoder.decode([batch.encoded[position] for position in positions], headers)
        for place, error in reply.failed.items():
            position = positions[place]
            batch.fail(position, Status.CORRUPT, f"{_format_name(batch, position)} decoder: {error}")
        for place, flags in reply.flags.items():
            batch.flags.setdefault(positions[place], []).extend(flags)
        decoded = [position for place, position in enumerate(positions) if place not in reply.failed]
        pixels[decoded] = reply.pixels
        return decoded

    def close(self) -> None:
        self.decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _format_name(batch: Batch, position: int) -> str:
    header = batch.headers[position]
    assert header is not None
    return header.format
