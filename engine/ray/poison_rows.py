"""Search the rows of a part that repeatedly end its actor."""

from __future__ import annotations

from collections import deque
from typing import Any

from engine.core.records import Part
from engine.ray.actor_pool import ActorHandle, ActorPool

TRIES_PER_ROW = 2  # an actor may die for another reason


class PoisonRowSearch:
    """Scores a part's rows by batches on an actor without other parts and discards the scores.

    The rows of a batch that ends the actor are tried singly on the next one. `crashed` holds the positions of
    single rows that end it.
    """

    def __init__(self, pool: ActorPool, part: Part, batch_size: int) -> None:
        self.index, self.crashed = part.index, set[int]()
        self.actor: ActorHandle | None = None
        self._pool = pool
        self._part: Any = pool.ray.put(part)  # stored once for all calls
        starts = range(0, part.rows, batch_size)
        self._pieces = deque((start, min(start + batch_size, part.rows)) for start in starts)
        self._tries = 0  # of the first row, when it is tried singly

    @property
    def is_done(self) -> bool:
        return not self._pieces

    def probe_next(self, actor: ActorHandle) -> None:
        self.actor = actor
        self._pool.call(actor, "probe", self._part, *self._pieces[0], then=self._on_probe_ok)

    def _on_probe_ok(self, actor: ActorHandle, answer: None) -> None:
        self._pieces.popleft()
        self._tries = 0
        if self._pieces:
            self.probe_next(actor)
        else:
            self.actor = None

    def on_actor_lost(self) -> None:
        """Narrow the search after the actor died."""
        self.actor = None
        start, stop = self._pieces[0]
        if stop - start > 1:
            self._pieces.popleft()
            self._pieces.extendleft((row, row + 1) for row in reversed(range(start, stop)))
            return
        self._tries += 1
        if self._tries == TRIES_PER_ROW:
            self._pieces.popleft()
            self._tries = 0
            self.crashed.add(start)
