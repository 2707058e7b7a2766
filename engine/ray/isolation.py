"""A part that has ended its actor again and again: which of its rows does?"""

from __future__ import annotations

from collections import deque
from typing import Any

from engine.ray.crew import Crew, Hand
from engine.records import Part

TRIES = 2  # of a single row, as it may have died of something else


class Isolation:
    """Scores a part's rows for nothing, a batch at a time, on an actor that does nothing else.

    A batch that ends the actor is tried row by row on the next one. `crashed`: positions that end it alone.
    """

    def __init__(self, crew: Crew, part: Part, batch_size: int) -> None:
        self.index, self.crashed = part.index, set[int]()
        self.hand: Hand | None = None
        self._crew = crew
        self._part: Any = crew.ray.put(part)  # handed over once
        starts = range(0, part.rows, batch_size)
        self._pieces = deque((start, min(start + batch_size, part.rows)) for start in starts)
        self._tried = 0  # the single row that is first

    @property
    def is_over(self) -> bool:
        return not self._pieces

    def go_on(self, hand: Hand) -> None:
        self.hand = hand
        self._crew.call(hand, "probe", self._part, *self._pieces[0], then=self._lived)

    def _lived(self, hand: Hand, answer: None) -> None:
        self._pieces.popleft()
        self._tried = 0
        if self._pieces:
            self.go_on(hand)
        else:
            self.hand = None

    def died(self) -> None:
        """The actor is gone."""
        self.hand = None
        start, stop = self._pieces[0]
        if stop - start > 1:
            self._pieces.popleft()
            self._pieces.extendleft((row, row + 1) for row in reversed(range(start, stop)))
            return
        self._tried += 1
        if self._tried == TRIES:
            self._pieces.popleft()
            self._tried = 0
            self.crashed.add(start)
