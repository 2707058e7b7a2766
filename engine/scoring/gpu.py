"""Members and ensemble on the GPU: a ring of slots, a stream for each member, one graph for the whole step.

    copy stream    pixels -> slot                       (DALI's buffers move: not in the graph)
    main stream    wait | fork | member A | join | fuse | copy to pinned memory | done
    side stream         | fork | member B | join

The loop never waits for the whole device. The host waits only for `done` of the oldest slot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nvtx
import torch

from engine.bundle.bundle import Bundle
from engine.core.overlap import Meter
from engine.core.records import Batch
from engine.core.tuning import StreamTuning
from engine.runners.base import Runner
from engine.scoring.ensemble import record
from engine.scoring.gpu_fuse import FusedSoftmax
from engine.scoring.gpu_slots import Slot, SlotRing

ALIGNED_ROWS = 64  # of float32: TensorRT needs tensor addresses that are multiples of 256
WARM_UPS = 3  # runs before a capture, which create contexts, workspaces and kernels
TIMED_S = 0.5  # for each of the concurrent and the sequential members
MIN_SPEEDUP = 1.02  # sequential members must be this much faster to be chosen


@dataclass(frozen=True)
class BatchInFlight:
    """A batch on the GPU."""

    batch: Batch
    slot: Slot


class GpuScorer:
    """Scores batches of up to `batch_size` images with all members and the ensemble.

    `cuda` is `torch.cuda`; tests replace it by an object that checks the order of accesses.
    """

    def __init__(
        self,
        bundle: Bundle,
        runners: Sequence[Runner],
        *,
        batch_size: int,
        device: str,
        slots: int = 3,
        concurrent: bool = True,
        graphs: bool = True,
        cuda: Any = torch.cuda,
    ) -> None:
        self._runners, self._cuda, self._device = runners, cuda, device
        self.batch_size, self._graphs = batch_size, graphs
        self.fusion = FusedSoftmax(bundle, device)
        self._main, self._copies = cuda.Stream(device), cuda.Stream(device)
        self._sides = [cuda.Stream(device) for _ in runners[1:]]
        self._ring = SlotRing([self._make_slot(bundle) for _ in range(slots)])
        self.prepare(concurrent=concurrent)

    def _make_slot(self, bundle: Bundle) -> Slot:
        batch, members, classes = self.batch_size, len(bundle.members), len(bundle.classes)
        pixels = (batch, 1, *bundle.size)
        pinned = self._device != "cpu"
        packed = (batch, self.fusion.width)
        rows = -(-batch // ALIGNED_ROWS) * ALIGNED_ROWS
        return Slot(
            # zeros: the padding of a first, short batch must be valid pixels
            torch.zeros(pixels, dtype=torch.uint8, device=self._device),
            torch.zeros(pixels, dtype=torch.uint8, pin_memory=pinned),
            torch.zeros((members, rows, classes), dtype=torch.float32, device=self._device),
            torch.zeros(packed, dtype=torch.float32, device=self._device),
            torch.zeros(packed, dtype=torch.float32, pin_memory=pinned),
            self._cuda.Event(),
            self._cuda.Event(blocking=True),
        )

    def prepare(self, *, concurrent: bool) -> None:
        """Warm up each slot and capture its graph, before decoding starts: a capture forbids allocations."""
        self.concurrent = concurrent
        self._cuda.synchronize()
        pool = self._cuda.graph_pool_handle()  # shared: the graphs replay one after the other, on one stream
        for slot in self._ring.slots:
            slot.graph = None
            for _ in range(WARM_UPS):
                self._enqueue_step(slot)
            self._cuda.synchronize()
            if self._graphs:
                slot.graph = self._capture(slot, pool)
        self._cuda.synchronize()

    def _capture(self, slot: Slot, pool: Any) -> Any:
        graph, cause = self._cuda.CUDAGraph(), None
        try:
            with (
                self._cuda.stream(self._main),  # ends a failed capture
                self._cuda.graph(graph, pool=pool, stream=self._main, capture_error_mode="thread_local"),
            ):
                try:
                    self._enqueue_step(slot)
                except Exception as error:
                    cause = error
                    raise
        except Exception:
            if cause:  # not the error of ending the failed capture
                raise cause from None
            raise
        return graph

    def _enqueue_step(self, slot: Slot) -> None:
        """Enqueue the step from `slot.pixels` to `slot.result`: fork, members, join, fuse, copy to host."""
        main, sides = self._main, self._sides if self.concurrent else [self._main] * len(self._sides)
        fork = self._cuda.Event()
        fork.record(main)
        for number, (runner, stream) in enumerate(zip(self._runners, [main, *sides], strict=True)):
            if stream is not main:
                stream.wait_event(fork)
            runner.enqueue(slot.pixels, slot.logits[number, : self.batch_size], stream)
        for stream in sides:
            if stream is not main:
                join = self._cuda.Event()
                join.record(stream)
                main.wait_event(join)
        with self._cuda.stream(main):
            self.fusion.enqueue(slot.logits, slot.packed)
            slot.result.copy_(slot.packed, non_blocking=True)

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        """Fill the scores; the pixels are dropped. As many batches are in flight as there are slots."""
        # not `ordered_map`: free slots limit the batches in flight, and no thread works on them
        in_flight: deque[BatchInFlight] = deque()
        with meter.upstream(batches) as source:
            for batch in source:
                if not self._ring.free:
                    yield self.finish(in_flight.popleft(), meter)
                in_flight.append(self.enqueue(batch))
            while in_flight:
                yield self.finish(in_flight.popleft(), meter)

    def enqueue(self, batch: Batch) -> BatchInFlight:
        """Copy the pixels into a free slot and start its step; return before either is done."""
        slot = self._ring.take()
        with nvtx.annotate("pixels to slot"):
            if batch.device_pixels:
                batch.device_pixels.copy_to(slot, self._copies, self._cuda)
            else:
                assert batch.pixels is not None
                slot.copy_host(batch.pixels, 0, self._copies, self._cuda)
        slot.copied.record(self._copies)
        self._main.wait_event(slot.copied)
        with nvtx.annotate("members"), self._cuda.stream(self._main):
            if slot.graph is None:
                self._enqueue_step(slot)
            else:
                slot.graph.replay()
        slot.done.record(self._main)
        slot.held.append(batch.device_pixels)  # DALI must not reuse its buffer before `done`
        batch.device_pixels = batch.pixels = None
        return BatchInFlight(batch, slot)

    def finish(self, work: BatchInFlight, meter: Meter) -> Batch:
        """Wait for a batch, read its scores without the padding, and free its slot."""
        start = time.perf_counter()
        batch, slot = work.batch, work.slot
        with nvtx.annotate("wait for results"):
            slot.done.synchronize()
        scores = self.fusion.unpack(slot.result[: len(batch.index)].numpy().copy())
        self._ring.release(slot)
        finite = scores.prediction >= 0
        record(batch, finite, scores.rows(finite))
        meter.add(time.perf_counter() - start)
        return batch

    def seconds_a_batch(self, at_least_s: float = TIMED_S) -> float:
        """Measure the seconds of one step from consecutive replays on the device."""
        slot, start, end = self._ring.slots[0], *(self._cuda.Event(enable_timing=True) for _ in range(2))
        batches, began = 0, time.perf_counter()
        start.record(self._main)
        while time.perf_counter() - began < at_least_s:
            for _ in range(8):
                with self._cuda.stream(self._main):
                    self._enqueue_step(slot) if slot.graph is None else slot.graph.replay()
                batches += 1
            end.record(self._main)
            end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / batches

    def choose_streams(self) -> StreamTuning:
        """Time concurrent and sequential members and keep the faster, concurrent ones if they are equal."""
        seconds = {}
        for concurrent in (True, False):
            self.prepare(concurrent=concurrent)
            seconds[concurrent] = self.seconds_a_batch()
        concurrent = seconds[True] <= MIN_SPEEDUP * seconds[False]
        if concurrent != self.concurrent:
            self.prepare(concurrent=concurrent)
        return StreamTuning(
            concurrent=concurrent,
            sequential_ms=round(1000 * seconds[False], 4),
            concurrent_ms=round(1000 * seconds[True], 4),
            gain=round(seconds[False] / seconds[True], 4),
        )

    def close(self) -> None:
        """Wait for the batches in flight, whose buffers this object owns. The caller closes the runners."""
        self._cuda.synchronize()
