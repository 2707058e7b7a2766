"""The ring of slots: static buffers, each with its events and the CUDA graph of its step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(eq=False)
class Slot:
    """The buffers of one batch in flight. They never move: contexts and graphs use their addresses.

    The code that takes a slot from the ring owns it until `done` has passed and the results are read.
    """

    pixels: torch.Tensor  # uint8 [B, 1, H, W], on the device
    staging: torch.Tensor  # uint8 [B, 1, H, W], pinned: pixels that were decoded on the CPU
    logits: torch.Tensor  # float32 [M, R, C], on the device; R is B rounded up, for alignment
    packed: torch.Tensor  # float32 [B, K], on the device
    result: torch.Tensor  # float32 [B, K], pinned
    copied: Any  # event: the pixels are in the slot
    done: Any  # event: the results are in `result`
    graph: Any = None
    held: list[object] = field(default_factory=list)  # objects that must live until `done`

    def copy_host(self, pixels: npt.NDArray[np.uint8], start: int, stream: Any, cuda: Any) -> None:
        """Copy pixels [c, 1, H, W] from host memory to the rows from `start`, in the order of `stream`.

        They are staged in pinned memory, so `pixels` need not outlive the call.
        """
        if count := len(pixels):
            self.staging[:count] = torch.from_numpy(pixels)
            with cuda.stream(stream):
                self.pixels[start : start + count].copy_(self.staging[:count], non_blocking=True)


class SlotRing:
    """Slots, which are taken in turn and only when free."""

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots
        self._free = deque(slots)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> Slot:
        """Return a slot whose last results have been read."""
        return self._free.popleft()

    def release(self, slot: Slot) -> None:
        """Return a slot to the ring after `slot.done` was waited for and its results were read."""
        assert slot not in self._free, "a slot is released once"
        slot.held.clear()
        self._free.append(slot)
