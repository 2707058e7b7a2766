"""The bundle's canaries: pixels with known scores, which are scored by the same members as the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.bundle.bundle import Bundle
from engine.core.errors import ParityError, UsageError
from engine.core.overlap import Meter
from engine.core.records import Batch, Part
from engine.scoring.ensemble import combine_logits
from engine.scoring.stage import Scorer

CANARY_LIMIT = 5e-3  # largest difference in probability from the float32 reference
CANARY_SHARE = 1 / 200  # of the rows that a `CanaryMonitor` scores


@dataclass(frozen=True)
class Canaries:
    """Pixels uint8 [N, 1, H, W], and their expected probabilities, float32 [N, C]."""

    pixels: npt.NDArray[np.uint8]
    expected: npt.NDArray[np.float32]

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Load the canaries of a bundle. Raises UsageError."""
        return cls(*load_canaries(bundle))

    @property
    def rows(self) -> int:
        return len(self.pixels)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all canaries as batches from the preprocess stage."""
        part = Part(-1, np.arange(self.rows), [None] * self.rows, pa.table({}))
        for start in range(0, self.rows, size):
            pixels = np.ascontiguousarray(self.pixels[start : start + size])
            rows = len(pixels)
            sizes = np.zeros(rows, np.int32)
            status = np.zeros(rows, np.uint8)
            yield Batch(part, start, status, sizes, sizes, index=np.arange(rows), pixels=pixels)

    def difference(self, scored: Batch) -> float:
        """Return the largest difference in probability from the reference.

        Raises ParityError for a missing score.
        """
        if scored.errors or scored.probabilities is None:
            raise ParityError("a canary of the bundle has no score: a member returned NaN or infinity")
        rows = self.expected[scored.start : scored.start + scored.rows]
        return float(np.abs(scored.probabilities - rows).max())


def score_canaries(canaries: Canaries, scorer: Scorer, batch_size: int) -> npt.NDArray[np.float32]:
    """Score the canaries; return their probabilities, float32 [N, C]."""
    scored = scorer.stage(canaries.batches(batch_size), Meter("canaries"))
    return np.concatenate([batch.probabilities for batch in scored if batch.probabilities is not None])


def verify_canaries(canaries: Canaries, scorer: Scorer, batch_size: int) -> float:
    """Score the canaries and return the largest difference. Raises ParityError when it is over the limit."""
    worst = _largest_difference(canaries, scorer, batch_size)
    if not worst <= CANARY_LIMIT:
        raise ParityError(
            f"the bundle's canaries differ from their float32 reference by {worst:.2g} in probability "
            f"(allowed: {CANARY_LIMIT:g}): nothing was scored; --precision fp32 keeps full precision"
        )
    return worst


def _largest_difference(canaries: Canaries, scorer: Scorer, batch_size: int) -> float:
    scored = scorer.stage(canaries.batches(batch_size), Meter("canaries"))
    return max(canaries.difference(batch) for batch in scored)


class CanaryMonitor:
    """A scorer that inserts rounds of canaries between the batches of images.

    `rounds` counts the rounds that passed; `on_round_passed` is called with it each time. Every batch
    that is yielded before a round ends was scored between two rounds that passed. `stage` and `check` raise
    ParityError when a round fails.
    """

    def __init__(self, scorer: Scorer, canaries: Canaries, batch_size: int) -> None:
        self._scorer, self._canaries, self._batch_size = scorer, canaries, batch_size
        self._every_rows = canaries.rows / CANARY_SHARE
        self._rows = 0  # since a round began
        self.rounds = 0
        self.on_round_passed: Callable[[int], None] = lambda rounds: None

    def check(self) -> None:
        """Run one round of canaries while no batch is in the scorer."""
        if self.rounds:
            self._check_difference(_largest_difference(self._canaries, self._scorer, self._batch_size))
        else:
            verify_canaries(self._canaries, self._scorer, self._batch_size)
        self._rows = 0
        self._count_round()

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        with closing(self._scorer.stage(self._insert_canaries(batches), meter)) as scored:  # type: ignore[type-var]
            for batch in scored:
                if batch.part.index < 0:
                    self._check_batch(batch)
                else:
                    yield batch

    def _insert_canaries(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        with Meter("canaries").upstream(batches) as source:
            for batch in source:
                if self._rows >= self._every_rows:
                    self._rows = 0
                    yield from self._canaries.batches(self._batch_size)
                self._rows += batch.rows
                yield batch

    def _check_batch(self, batch: Batch) -> None:
        self._check_difference(self._canaries.difference(batch))
        if batch.start + batch.rows == self._canaries.rows:
            self._count_round()

    @staticmethod
    def _check_difference(worst: float) -> None:
        if not worst <= CANARY_LIMIT:
            raise ParityError(
                f"the bundle's canaries differ during the run from their reference by {worst:.2g} in "
                f"probability (allowed: {CANARY_LIMIT:g})"
            )

    def _count_round(self) -> None:
        self.rounds += 1
        self.on_round_passed(self.rounds)

    def close(self) -> None:
        self._scorer.close()


def load_canaries(bundle: Bundle) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return pixels, uint8 [N, 1, H, W], and reference probabilities, float32 [N, C]. Raises UsageError.

    The file contains reference logits [M, N, C], because the probabilities depend on the temperature.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(bundle.canaries.path)
        pixels, logits = arrays["pixels"], arrays["logits"]
    except (SafetensorError, KeyError, OSError) as error:
        problem = " ".join(str(error).split())[:300]
        raise UsageError(
            f"bundle {bundle.path}: its canaries cannot be read ({problem}); train it again"
        ) from None
    stored = [(str(array.dtype), array.shape) for array in (pixels, logits)]
    rows = len(pixels)
    logits_shape = (len(bundle.members), rows, len(bundle.classes))
    if not rows or stored != [("uint8", (rows, 1, *bundle.size)), ("float32", logits_shape)]:
        raise UsageError(f"bundle {bundle.path}: its canaries are {stored}; train it again")
    _, expected = combine_logits(
        logits,
        weights=bundle.weights,
        temperatures=[member.temperature for member in bundle.members],
        temperature=bundle.temperature,
    )
    return pixels, expected
