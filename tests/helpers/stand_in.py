"""A stand-in for `torch.cuda` on the CPU that checks the order of accesses.

Work on a stream runs only when the host waits for an event that needs it, in a random order that streams and
events allow, so values that are read too early are stale. Two unordered accesses to one buffer, one of them a
write, raise OrderError when the second is launched.

It supports streams, events, graphs and `Tensor.copy_` under a stream; kernels are launched with `launch` and
the tensors that they read and write.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.runners.onnx import OnnxRunner

Span = tuple[int, int]  # addresses of a tensor's bytes


class OrderError(AssertionError):
    """Two unordered accesses to one buffer, or a capture that is not joined."""


class Work:
    """A piece of work, and the work that must end before it starts."""

    def __init__(
        self, run: Callable[[], None], before: Iterable[Work], reads: set[Span], writes: set[Span]
    ) -> None:
        self.run, self.reads, self.writes = run, reads, writes
        self.before = set(before)
        self.ancestors = self.before.union(*(work.ancestors for work in self.before))
        self.ran = self.seen_by_host = False


class Stream:
    def __init__(self, cuda: StandIn) -> None:
        self._cuda = cuda
        self.last: set[Work] = set()  # work before the next work on this stream
        self.cuda_stream = id(self)

    def wait_event(self, event: Event) -> None:
        self._cuda.waits += 1
        if self._cuda.waits != self._cuda.drop_wait:
            self.last = self.last | event.after

    def wait_stream(self, stream: Stream) -> None:
        self.last = self.last | stream.last


class Event:
    def __init__(self, cuda: StandIn) -> None:
        self._cuda = cuda
        self.after: set[Work] = set()

    def record(self, stream: Stream) -> None:
        self.after = set(stream.last)

    def synchronize(self) -> None:
        self._cuda.syncs += 1
        if self._cuda.syncs != self._cuda.drop_sync:
            self._cuda.run_until(self.after)


class Graph:
    """Work captured on streams; a replay adds the same work after the current work of the stream."""

    def __init__(self, cuda: StandIn) -> None:
        self._cuda = cuda
        self.captured: list[Work] = []

    def replay(self) -> None:
        stream = self._cuda.current
        replayed: dict[Work, Work] = {}
        for work in self.captured:  # in the order of capture, an allowed order
            inside = {replayed[before] for before in work.before if before in replayed}
            replayed[work] = self._cuda.add(work.run, inside or stream.last, work.reads, work.writes)
        ends = set(replayed.values()) - {before for work in replayed.values() for before in work.before}
        stream.last = ends or stream.last


class StandIn(TorchDispatchMode):
    """Use as `with StandIn(seed) as cuda: GpuStep(..., cuda=cuda)`.

    `drop_wait` and `drop_sync` omit the n-th wait of a stream, or of the host, to test the stand-in.
    """

    def __init__(self, seed: int, *, drop_wait: int = 0, drop_sync: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._pending: list[Work] = []
        self._launched: list[Work] = []  # and not yet waited for by the host
        self._capturing: Graph | None = None
        self.drop_wait, self.drop_sync = drop_wait, drop_sync
        self.waits = self.syncs = 0
        self._streams: list[Stream] = []
        self.default = self.Stream()
        self.current = self.default

    def Stream(self, device: object = None) -> Stream:  # noqa: N802 - torch.cuda's name
        self._streams.append(Stream(self))
        return self._streams[-1]

    def Event(self, *, blocking: bool = False, enable_timing: bool = False) -> Event:  # noqa: N802
        return Event(self)

    def CUDAGraph(self) -> Graph:  # noqa: N802
        return Graph(self)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self._capturing = graph
        before = {captured: captured.last for captured in self._streams}
        graph.captured = [Work(lambda: None, (), set(), set())]
        stream.last = set(graph.captured)
        with self.stream(stream):
            yield
        self._capturing = None
        ends = set(graph.captured) - {before for work in graph.captured for before in work.before}
        if not ends <= stream.last:
            raise OrderError("a captured stream was not joined")
        for captured, last in before.items():  # a capture runs nothing
            captured.last = last

    def graph_pool_handle(self) -> object:
        return object()

    def synchronize(self) -> None:
        self.run_until(set(self._pending))

    def launch(
        self, run: Callable[[], None], *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        """Launch a kernel on the current stream."""
        stream = self.current
        work = self.add(run, stream.last, {_span(x) for x in reads}, {_span(x) for x in writes})
        stream.last = {work}

    def add(
        self, run: Callable[[], None], before: Iterable[Work], reads: set[Span], writes: set[Span]
    ) -> Work:
        work = Work(run, before, reads, writes)
        if self._capturing:
            if self._capturing.captured[0] not in work.ancestors:
                raise OrderError("a stream that is not part of the capture")
            self._capturing.captured.append(work)
            return work
        self._launched = [other for other in self._launched if not other.seen_by_host]
        for other in self._launched:
            if other not in work.ancestors and _conflict(work, other):
                raise OrderError("two accesses to one buffer are not ordered")
        self._launched.append(work)
        self._pending.append(work)
        return work

    def run_until(self, wanted: set[Work]) -> None:
        """Run `wanted` and the work before it, and at random other work, as a GPU may."""
        needed = wanted.union(*(work.ancestors for work in wanted))
        while any(not work.ran for work in needed):
            ready = [work for work in self._pending if all(before.ran for before in work.before)]
            assert any(work in needed for work in ready), "it waits for work that was never launched"
            work = self._random.choice(ready)
            if work in needed or self._random.random() < 0.3:
                with self.stream(self.default):
                    work.run()
                work.ran = True
                self._pending.remove(work)
        for work in needed:
            work.seen_by_host = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and self.current is not self.default:
            target, source = args[:2]

            def copy() -> None:
                func(target, source)

            self.launch(copy, reads=[source], writes=[target])
            return target
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        super().__enter__()
        return self


def _span(tensor: torch.Tensor) -> Span:
    assert tensor.is_contiguous()
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _conflict(work: Work, other: Work) -> bool:
    """Return whether they access the same bytes and one of them writes."""
    pairs = [(a, b) for a in work.writes for b in other.writes | other.reads]
    pairs += [(a, b) for a in work.reads for b in other.writes]
    return any(a[0] < b[1] and b[0] < a[1] for a, b in pairs)


class Member:
    """A member's real graph on ONNX Runtime, launched as a kernel of the stand-in."""

    def __init__(self, runner: OnnxRunner, cuda: StandIn) -> None:
        self.name, self.input_shape = runner.name, runner.input_shape
        self._runner, self._cuda = runner, cuda

    def enqueue(self, pixels: torch.Tensor, logits: torch.Tensor, stream: object) -> None:
        assert logits.storage_offset() * logits.itemsize % 256 == 0, "TensorRT would refuse the address"
        with self._cuda.stream(stream):
            self._cuda.launch(
                lambda: self._runner.enqueue(pixels.numpy(), logits.numpy()), reads=[pixels], writes=[logits]
            )
