"""The bundle's canaries: pixels whose scores are known, sent through the very members that score images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.bundle.bundle import Bundle
from engine.core.errors import ParityError, UsageError
from engine.core.overlap import Meter
from engine.core.records import Batch, Part
from engine.scoring.ensemble import combine_logits
from engine.scoring.stage import Scorer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


CANARY_LIMIT = 5e-3  # largest difference in probability from the float32 reference
CANARY_SHARE = 1 / 200  # of the rows that a `Guard` lets through


@dataclass(frozen=True)
class Canaries:
    """Pixels uint8 [N, 1, H, W], and the probabilities float32 [N, C] that they should get."""

    pixels: npt.NDArray[np.uint8]
    expected: npt.NDArray[np.float32]

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Raises UsageError."""
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
            none = np.zeros(rows, np.int32)
            status = np.zeros(rows, np.uint8)
            yield Batch(part, start, status, none, none, index=np.arange(rows), pixels=pixels)

    def difference(self, scored: Batch) -> float:
        """Return the largest difference in probability from the reference.

        Raises ParityError for a missing score.
        """
        if scored.errors or scored.probabilities is None:
            raise ParityError("a canary of the bundle has no score: a member gave what is not a number")
        rows = self.expected[scored.start : scored.start + scored.rows]
        return float(np.abs(scored.probabilities - rows).max())


def score_canaries(canaries: Canaries, step: Scorer, batch_size: int) -> npt.NDArray[np.float32]:
    """Score the canaries; return float32 [N, C], the reference where another precision cannot be compared."""
    scored = step.stage(canaries.batches(batch_size), Meter("canaries"))
    return np.concatenate([batch.probabilities for batch in scored if batch.probabilities is not None])


def verify_canaries(canaries: Canaries, step: Scorer, batch_size: int) -> float:
    """Score the canaries and return the largest difference. Raises ParityError when it is over the limit."""
    worst = _largest_difference(canaries, step, batch_size)
    if not worst <= CANARY_LIMIT:
        raise ParityError(
            f"the bundle's canaries differ from their float32 reference by {worst:.2g} in probability "
            f"(allowed: {CANARY_LIMIT:g}): nothing was scored; --precision fp32 keeps full precision"
        )
    return worst


def _largest_difference(canaries: Canaries, step: Scorer, batch_size: int) -> float:
    scored = step.stage(canaries.batches(batch_size), Meter("canaries"))
    return max(canaries.difference(batch) for batch in scored)


class CanaryMonitor:
    """A scorer that inserts rounds of canaries between the batches of images.

    `rounds` counts the rounds that passed; `on_round_passed` is called with it each time. Every batch that
    comes out before a round ends was scored between two rounds that passed. `stage` and `check` raise
    ParityError when a round fails.
    """

    def __init__(self, step: Scorer, canaries: Canaries, batch_size: int) -> None:
        self._step, self._canaries, self._batch_size = step, canaries, batch_size
        self._every_rows = canaries.rows / CANARY_SHARE
        self._rows = 0  # since a round began
        self.rounds = 0
        self.on_round_passed: Callable[[int], None] = lambda rounds: None

    def check(self) -> None:
        """Run a round by itself, while no batch is in the scorer."""
        if self.rounds:
            self._expect(_largest_difference(self._canaries, self._step, self._batch_size))
        else:
            verify_canaries(self._canaries, self._step, self._batch_size)
        self._rows = 0
        self._count_round()

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        with closing(self._step.stage(self._insert_canaries(batches), meter)) as scored:  # type: ignore[type-var]
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
        self._expect(self._canaries.difference(batch))
        if batch.start + batch.rows == self._canaries.rows:
            self._count_round()

    @staticmethod
    def _expect(worst: float) -> None:
        if not worst <= CANARY_LIMIT:
            raise ParityError(
                f"the bundle's canaries, right before, differ from their reference by {worst:.2g} in "
                f"probability (allowed: {CANARY_LIMIT:g})"
            )

    def _count_round(self) -> None:
        self.rounds += 1
        self.on_round_passed(self.rounds)

    def close(self) -> None:
        self._step.close()


def load_canaries(bundle: Bundle) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Pixels uint8 [N, 1, H, W] and their reference probabilities float32 [N, C]. Raises UsageError.

    The file holds the members' reference logits [M, N, C]: what follows from them depends on the temperature.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(bundle.canaries.path)
        pixels, logits = arrays["pixels"], arrays["logits"]
    except (SafetensorError, KeyError, OSError) as error:
        problem = " ".join(str(error).split())[:300]
        raise UsageError(
            f"bundle {bundle.path}: its canaries can't be read ({problem}); train it again"
        ) from None
    found = [(str(array.dtype), array.shape) for array in (pixels, logits)]
    rows = len(pixels)
    if not rows or found != [
        ("uint8", (rows, 1, *bundle.size)),
        ("float32", (len(bundle.members), rows, len(bundle.classes))),
    ]:
        raise UsageError(f"bundle {bundle.path}: its canaries are {found}; train it again")
    _, expected = combine_logits(
        logits,
        weights=bundle.weights,
        temperatures=[member.temperature for member in bundle.members],
        temperature=bundle.temperature,
    )
    return pixels, expected
