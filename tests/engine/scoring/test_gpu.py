"""The GPU step's slots, streams, events and graphs, on a stand-in that checks their order."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.bundle import bundle as bundles
from engine.bundle.bundle import Bundle
from engine.core.overlap import Meter
from engine.core.records import Batch, Part, Status
from engine.preprocess.gpu import DecodedPixels
from engine.runners.onnx import OnnxRunner
from engine.scoring.cpu import CpuScorer
from engine.scoring.ensemble import combine_logits
from engine.scoring.gpu import GpuScorer
from tests.helpers.stand_in import Member, OrderError, StandIn

pytestmark = pytest.mark.usefixtures("launched_fusion")

BATCH, ROWS = 4, 19


@pytest.fixture(scope="module")
def models(bundle: Path) -> Bundle:
    return bundles.load_bundle(bundle)


@pytest.fixture(scope="module")
def pixels(models: Bundle) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (ROWS, 1, *models.size), np.uint8)


@pytest.fixture(scope="module")
def expected(models: Bundle, pixels: np.ndarray) -> np.ndarray:
    logits = np.stack([OnnxRunner(member, models).infer(pixels) for member in models.members])
    temperatures = [member.temperature for member in models.members]
    return combine_logits(logits, weights=models.weights, temperatures=temperatures)[1]


def device_batches(pixels: np.ndarray) -> Iterator[Batch]:
    """All rows in batches of up to four; the third row of each batch has no pixels."""
    part = Part(0, np.arange(ROWS), [None] * ROWS, pa.table({}))
    for start in range(0, ROWS, BATCH):
        rows = min(BATCH, ROWS - start)
        index = np.array([position for position in range(rows) if position != 2])
        numbers = [np.zeros(rows, kind) for kind in (np.uint8, np.int32, np.int32)]
        yield Batch(
            part, start, *numbers, index=index, device_pixels=DecodedPixels([], pixels[start + index])
        )


def scores(models: Bundle, pixels: np.ndarray, cuda: StandIn, make=GpuScorer, **options) -> np.ndarray:
    """The ensemble's probabilities of all rows through a step, NaN where there were no pixels."""
    result = np.full((ROWS, len(models.classes)), np.nan, np.float32)
    with cuda:
        members = [Member(OnnxRunner(member, models), cuda) for member in models.members]
        step = make(models, members, batch_size=BATCH, device="cpu", cuda=cuda, **options)
        seen = []
        for batch in step.stage(device_batches(pixels), Meter("members")):
            seen.append(batch.start)
            result[batch.start + batch.index] = batch.probabilities
            assert (batch.prediction == batch.probabilities.argmax(axis=1)).all()
            assert np.array_equal(batch.confidence, batch.probabilities.max(axis=1))
        assert seen == sorted(seen)
        step.close()
    return result


def is_noticed(run: Callable[[], np.ndarray], expected: np.ndarray) -> bool:
    """Whether a fault shows: as an access out of order, or as scores that are not those expected."""
    try:
        actual = run()
    except OrderError:
        return True
    return not np.abs(actual[~missing()] - expected[~missing()]).max() < 1e-6


def missing() -> np.ndarray:
    return np.arange(ROWS) % BATCH == 2


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("concurrent", [False, True])
def test_scores_are_those_of_the_cpu_in_every_schedule(models, pixels, expected, slots, graphs, concurrent):
    for seed in range(2):
        actual = scores(models, pixels, StandIn(seed), slots=slots, graphs=graphs, concurrent=concurrent)
        assert np.isnan(actual[missing()]).all()
        assert np.abs(actual[~missing()] - expected[~missing()]).max() < 1e-6


@pytest.mark.parametrize("graphs", [False, True])
def test_every_wait_of_a_stream_is_needed(models, pixels, expected, graphs, monkeypatch):
    """Leave out one wait after the other: each has to be noticed. But for warm-ups, which start from rest."""
    monkeypatch.setattr("engine.scoring.gpu.WARM_UPS", 0)
    counter = StandIn(0)
    scores(models, pixels, counter, graphs=graphs)
    assert counter.waits
    for wait in range(1, counter.waits + 1):
        cuda = StandIn(0, drop_wait=wait)
        assert is_noticed(lambda cuda=cuda: scores(models, pixels, cuda, graphs=graphs), expected), wait


def test_pixels_in_host_memory_get_the_scores_of_decoded_ones(models, pixels, expected):
    cuda = StandIn(0)
    with cuda:
        members = [Member(OnnxRunner(member, models), cuda) for member in models.members]
        step = GpuScorer(models, members, batch_size=BATCH, device="cpu", cuda=cuda)
        for decoded, host in zip(device_batches(pixels), device_batches(pixels), strict=True):
            host.device_pixels, host.pixels = None, pixels[host.start + host.index]
            first, second = step.stage(iter([decoded, host]), Meter("members"))
            assert second.pixels is None
            assert np.array_equal(first.probabilities, second.probabilities)
            assert np.array_equal(first.members, second.members)
            assert np.abs(first.probabilities - expected[first.start + first.index]).max() < 1e-6
        step.close()


def test_an_error_inside_a_capture_is_raised_as_it_is(models, monkeypatch):
    """And not as what ending the broken capture says of itself."""

    class Failing(Member):
        def enqueue(self, pixels, logits, stream):
            if self._cuda._capturing:
                raise torch.OutOfMemoryError("no room")
            super().enqueue(pixels, logits, stream)

    cuda = StandIn(0)
    with cuda:
        opened = [OnnxRunner(member, models) for member in models.members]
        members = [Member(opened[0], cuda), Failing(opened[1], cuda)]
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            GpuScorer(models, members, batch_size=BATCH, device="cpu", cuda=cuda)
        assert cuda.current is cuda.default


def test_a_batch_without_any_pixels_goes_through(models, pixels):
    cuda = StandIn(0)
    with cuda:
        members = [Member(OnnxRunner(member, models), cuda) for member in models.members]
        step = GpuScorer(models, members, batch_size=BATCH, device="cpu", cuda=cuda)
        (batch,) = list(device_batches(pixels))[:1]
        batch.index, batch.device_pixels = np.empty(0, np.intp), DecodedPixels([], pixels[:0])
        (done,) = step.stage(iter([batch]), Meter("members"))
        assert (done.members.shape, done.probabilities.shape) == ((2, 0, 3), (0, 3))
        step.close()


def test_source_buffers_live_until_the_results_are_ready(models, pixels):
    """DALI takes its buffer back with the last reference to it, and knows nothing of our streams."""
    cuda = StandIn(0)
    with cuda:
        members = [Member(OnnxRunner(member, models), cuda) for member in models.members]
        step = GpuScorer(models, members, batch_size=BATCH, device="cpu", cuda=cuda)
        (batch,) = list(device_batches(pixels))[:1]
        buffer = weakref.ref(batch.device_pixels)
        work = step.enqueue(batch)
        assert batch.device_pixels is None
        assert buffer() is not None
        step.finish(work, Meter("members"))
        assert buffer() is None
        step.close()


def test_every_wait_of_the_host_is_needed(models, pixels, expected):
    counter = StandIn(0)
    scores(models, pixels, counter)
    assert counter.syncs == -(-ROWS // BATCH)
    for sync in range(1, counter.syncs + 1):
        cuda = StandIn(0, drop_sync=sync)
        assert is_noticed(lambda cuda=cuda: scores(models, pixels, cuda), expected), sync


def test_a_slot_that_is_used_too_early_is_noticed(models, pixels, expected):
    class Greedy(GpuScorer):
        """Takes the next slot whether it is free or not."""

        def stage(self, batches, meter):
            in_flight = []
            for number, batch in enumerate(batches):
                self._ring._free.clear()
                self._ring._free.append(self._ring.slots[number % len(self._ring.slots)])
                in_flight.append(self.enqueue(batch))
            for work in in_flight:
                self._ring._free.clear()
                yield self.finish(work, meter)

    assert is_noticed(lambda: scores(models, pixels, StandIn(0), make=Greedy), expected)


def test_swapped_members_are_noticed(models, pixels, expected):
    class Swapped(GpuScorer):
        def _enqueue_step(self, slot):
            self._runners = self._runners[::-1]
            super()._enqueue_step(slot)
            self._runners = self._runners[::-1]

    assert is_noticed(lambda: scores(models, pixels, StandIn(0), make=Swapped), expected)


def test_a_nan_score_fails_only_its_own_row(models, pixels, expected):
    class Odd(Member):
        def enqueue(self, pixels, logits, stream):
            super().enqueue(pixels, logits, stream)
            with self._cuda.stream(stream):
                self._cuda.launch(lambda: logits[1].fill_(float("nan")), reads=[], writes=[logits])

    cuda = StandIn(0)
    with cuda:
        opened = [OnnxRunner(member, models) for member in models.members]
        members = [Member(opened[0], cuda), Odd(opened[1], cuda)]
        step, on_gpu = GpuScorer(models, members, batch_size=BATCH, device="cpu", cuda=cuda), []
        for batch in step.stage(device_batches(pixels), Meter("members")):
            assert batch.status[1] == Status.CRASHED
            assert 1 not in batch.index
            assert list(batch.errors) == [1]
            rows = batch.start + batch.index
            assert np.abs(batch.probabilities - expected[rows]).max() < 1e-6
            on_gpu.append(batch)
        step.close()
    runners = [OnnxRunner(member, models) for member in models.members]

    def odd(images, logits, stream):
        OnnxRunner.enqueue(runners[1], images, logits, stream)
        logits[1] = np.nan

    runners[1].enqueue = odd
    cpu = CpuScorer(models, runners, threads=0)
    on_cpu = list(device_batches(pixels))
    for batch in on_cpu:
        batch.pixels, batch.device_pixels = pixels[batch.start + batch.index], None
    for gpu, batch in zip(on_gpu, cpu.stage(iter(on_cpu), Meter("members")), strict=True):
        assert (batch.errors, batch.index.tolist()) == (gpu.errors, gpu.index.tolist())
        assert batch.prediction.tolist() == gpu.prediction.tolist()
        for name in ("members", "probabilities", "confidence"):
            actual, same = getattr(batch, name), getattr(gpu, name)
            assert actual.shape == same.shape, name
            assert np.abs(actual - same).max() < 1e-6, name
