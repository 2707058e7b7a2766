"""Members and ensemble on the CPU: several batches in flight, a thread for each, yielded in order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from engine.bundle.bundle import Bundle
from engine.core.overlap import Meter, ordered_map
from engine.core.records import Batch
from engine.runners.base import Runner
from engine.scoring import ensemble


class CpuScorer:
    """Scores batches in threads; each takes a whole batch through all members. lanes 0 is the serial twin."""

    def __init__(self, bundle: Bundle, runners: Sequence[Runner], *, lanes: int) -> None:
        self._bundle, self._runners, self._lanes = bundle, runners, lanes
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix="members") if lanes else None

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        """Fill `members` and `probabilities`; the pixels are dropped."""
        with meter.upstream(batches) as source:
            yield from ordered_map(self._pool, partial(self._run, meter=meter), source, self._lanes + 1)

    def _run(self, batch: Batch, meter: Meter) -> Batch:
        start = time.perf_counter()
        self._score(batch)
        meter.add(time.perf_counter() - start)
        return batch

    def _score(self, batch: Batch) -> None:
        assert batch.pixels is not None
        shape = (len(self._runners), len(batch.index), len(self._bundle.classes))
        logits, distances = np.empty(shape, np.float32), []
        if len(batch.index):
            for runner, member in zip(self._runners, logits, strict=True):
                distances.append(runner.enqueue(batch.pixels, member, None))
        batch.pixels = None
        finite = np.asarray(np.isfinite(logits).all(axis=(0, 2)))
        given = [one[finite] for one in distances if one is not None]
        members, probabilities = ensemble.combine_logits(
            logits[:, finite],
            weights=self._bundle.weights,
            temperatures=[member.temperature for member in self._bundle.members],
            temperature=self._bundle.temperature,
        )
        scores = ensemble.Scores.of(members, probabilities)
        ensemble.record(batch, finite, scores, np.stack(given) if given else None)

    def close(self) -> None:
        """End the lanes; the runners belong to the caller."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
