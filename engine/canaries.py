"""The bundle's canaries: pixels whose scores are known, sent through the very members that score images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.bundle import Bundle, load_canaries
from engine.errors import ParityError
from engine.overlap import Meter
from engine.records import Batch, Part

CANARY_LIMIT = 5e-3  # largest difference in probability from the float32 reference
SHARE = 1 / 200  # of the rows that a `Guard` lets through


class Step(Protocol):
    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Canaries:
    """Pixels uint8 [N, 1, H, W], and the probabilities float32 [N, C] that they should get."""

    pixels: npt.NDArray[np.uint8]
    expected: npt.NDArray[np.float32]

    @classmethod
    def of(cls, models: Bundle) -> Self:
        """Raises UsageError."""
        return cls(*load_canaries(models))

    @property
    def rows(self) -> int:
        return len(self.pixels)

    def batches(self, size: int) -> Iterator[Batch]:
        """All of them, as the stage before the members would hand them on."""
        part = Part(-1, np.arange(self.rows), [None] * self.rows, pa.table({}))
        for start in range(0, self.rows, size):
            pixels = np.ascontiguousarray(self.pixels[start : start + size])
            rows = len(pixels)
            none = np.zeros(rows, np.int32)
            status = np.zeros(rows, np.uint8)
            yield Batch(part, start, status, none, none, index=np.arange(rows), pixels=pixels)

    def difference(self, scored: Batch) -> float:
        """The largest from the reference, in probability. Raises ParityError where there is no score."""
        if scored.errors or scored.probabilities is None:
            raise ParityError("a canary of the bundle has no score: a member gave what is not a number")
        rows = self.expected[scored.start : scored.start + scored.rows]
        return float(np.abs(scored.probabilities - rows).max())


def scores(canaries: Canaries, step: Step, batch_size: int) -> npt.NDArray[np.float32]:
    """What the canaries get, float32 [N, C]: the reference where another precision's is of no use."""
    scored = step.stage(canaries.batches(batch_size), Meter("canaries"))
    return np.concatenate([batch.probabilities for batch in scored if batch.probabilities is not None])


def check(canaries: Canaries, step: Step, batch_size: int) -> float:
    """Score the canaries and return the largest difference. Raises ParityError when it is over the limit."""
    worst = _worst(canaries, step, batch_size)
    if not worst <= CANARY_LIMIT:
        raise ParityError(
            f"the bundle's canaries differ from their float32 reference by {worst:.2g} in probability "
            f"(allowed: {CANARY_LIMIT:g}): nothing was scored; --precision fp32 keeps full precision"
        )
    return worst


def _worst(canaries: Canaries, step: Step, batch_size: int) -> float:
    scored = step.stage(canaries.batches(batch_size), Meter("canaries"))
    return max(canaries.difference(batch) for batch in scored)


class Guard:
    """A step through which the canaries pass now and then, between the images and in their order.

    `rounds` counts how often they have come through well, `passed` is called with it each time. What comes
    out before a round ends was scored between two good ones. `stage` and `check` raise ParityError when a
    round does not end well.
    """

    def __init__(self, step: Step, canaries: Canaries, batch_size: int) -> None:
        self._step, self._canaries, self._batch_size = step, canaries, batch_size
        self._every_rows = canaries.rows / SHARE
        self._rows = 0  # since a round began
        self.rounds = 0
        self.passed: Callable[[int], None] = lambda rounds: None

    def check(self) -> None:
        """A round by itself; while nothing else is in the step."""
        if self.rounds:
            self._expect(_worst(self._canaries, self._step, self._batch_size))
        else:
            check(self._canaries, self._step, self._batch_size)
        self._rows = 0
        self._pass()

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        with closing(self._step.stage(self._among(batches), meter)) as scored:  # type: ignore[type-var]
            for batch in scored:
                if batch.part.index < 0:
                    self._see(batch)
                else:
                    yield batch

    def _among(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        with Meter("canaries").upstream(batches) as source:
            for batch in source:
                if self._rows >= self._every_rows:
                    self._rows = 0
                    yield from self._canaries.batches(self._batch_size)
                self._rows += batch.rows
                yield batch

    def _see(self, batch: Batch) -> None:
        self._expect(self._canaries.difference(batch))
        if batch.start + batch.rows == self._canaries.rows:
            self._pass()

    @staticmethod
    def _expect(worst: float) -> None:
        if not worst <= CANARY_LIMIT:
            raise ParityError(
                f"the bundle's canaries, right before, differ from their reference by {worst:.2g} in "
                f"probability (allowed: {CANARY_LIMIT:g})"
            )

    def _pass(self) -> None:
        self.rounds += 1
        self.passed(self.rounds)

    def close(self) -> None:
        self._step.close()
