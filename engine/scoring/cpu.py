"""Members and ensemble on the CPU: one thread for each batch in flight; batches are yielded in order."""

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
    """Scores each batch with all members in one of `threads` threads; with 0, in the calling thread."""

    def __init__(self, bundle: Bundle, runners: Sequence[Runner], *, threads: int) -> None:
        self._bundle, self._runners, self._threads = bundle, runners, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="members") if threads else None

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        """Fill `members` and `probabilities`; the pixels are dropped."""
        with meter.upstream(batches) as source:
            yield from ordered_map(self._pool, partial(self._run, meter=meter), source, self._threads + 1)

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
            for runner, member_logits in zip(self._runners, logits, strict=True):
                distances.append(runner.enqueue(batch.pixels, member_logits, None))
        batch.pixels = None
        finite = np.asarray(np.isfinite(logits).all(axis=(0, 2)))
        finite_distances = [distance[finite] for distance in distances if distance is not None]
        members, probabilities = ensemble.combine_logits(
            logits[:, finite],
            weights=self._bundle.weights,
            temperatures=[member.temperature for member in self._bundle.members],
            temperature=self._bundle.temperature,
        )
        scores = ensemble.Scores.of(members, probabilities)
        ensemble.record(batch, finite, scores, np.stack(finite_distances) if finite_distances else None)

    def close(self) -> None:
        """End the threads; the caller closes the runners."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
