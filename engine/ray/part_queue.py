"""A queue of unassigned parts: those streamed from the manifest, and lost parts again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

from engine.core.records import Part

PARTS_AHEAD = 2  # parts that are read and not yet assigned
POLL_S = 0.2


class PartQueue:
    """Reads the manifest in a thread, so that the driver never waits for it, and holds only a few parts.

    Lost parts are read again in a further pass. `parts_of` returns the parts of given indices, in order.
    """

    def __init__(self, parts_of: Callable[[set[int]], Iterator[Part]], wanted: set[int]) -> None:
        self._parts_of = parts_of
        self._wanted = wanted
        self._ready: queue.Queue[Part | BaseException | None] = queue.Queue(PARTS_AHEAD)
        self._next: Part | None = None
        self._reading = self._closed = False
        self.left = len(wanted)  # parts that have not been taken

    def peek(self) -> Part | None:
        """Return the next part without taking it, None if there is none now.

        Raises errors of the manifest.
        """
        if self._next is None and not self._reading and self._wanted:
            wanted, self._wanted = self._wanted, set()
            self._reading = True
            threading.Thread(target=self._read, args=(wanted,), name="manifest", daemon=True).start()
        if self._next is None and self._reading:
            with suppress(queue.Empty):
                item = self._ready.get_nowait()
                if isinstance(item, BaseException):
                    raise item
                self._next, self._reading = item, item is not None
        return self._next

    def take(self) -> None:
        """Remove the part that `peek` returned."""
        self._next = None
        self.left -= 1

    def put_back(self, index: int) -> None:
        self._wanted.add(index)
        self.left += 1

    def close(self) -> None:
        self._closed = True

    def _read(self, wanted: set[int]) -> None:
        try:
            for part in self._parts_of(wanted):
                self._put(part)
                if self._closed:
                    return
            self._put(None)
        except BaseException as error:  # `peek` raises it in the driver
            self._put(error)

    def _put(self, item: Part | BaseException | None) -> None:
        while not self._closed:
            with suppress(queue.Full):
                self._ready.put(item, timeout=POLL_S)
                return
