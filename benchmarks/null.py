"""Stages that do nothing, to measure the engine's own cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import numpy as np

from engine.core.overlap import Meter
from engine.core.records import Batch, Status
from engine.pipeline.stages import Stages


class NullPixels:
    """A preprocessing stage that decodes nothing."""

    crashes = refusals = 0
    on_gpu = None

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        with meter.upstream(batches) as source:
            for batch in source:
                batch.drop_encoded()
                batch.index = np.flatnonzero(batch.status == Status.OK)
                yield batch


class NullScores:
    """A scorer that gives every class the same probability."""

    def __init__(self, members: int, classes: int) -> None:
        self._members, self._classes = members, classes

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        with meter.upstream(batches) as source:
            for batch in source:
                rows, value = len(batch.index), 1 / self._classes
                batch.members = np.full((self._members, rows, self._classes), value, np.float32)
                batch.probabilities = np.full((rows, self._classes), value, np.float32)
                batch.prediction = np.zeros(rows, np.intp)
                batch.confidence = np.full(rows, value, np.float32)
                yield batch

    def close(self) -> None:
        pass


class NullStages(Stages):
    """The stages of a run without decoder and members."""

    def open(self, stack: ExitStack) -> None:
        self.preprocess = NullPixels()
        bundle = self.context.bundle
        self.step = NullScores(len(bundle.members), len(bundle.classes))
