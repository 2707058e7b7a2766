"""Declare the interface of scoring on the CPU and the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from engine.core.overlap import Meter
from engine.core.records import Batch


class Scorer(Protocol):
    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]: ...

    def close(self) -> None: ...
