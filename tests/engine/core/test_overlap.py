import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from engine.core.overlap import Meter, ordered_map, prefetch


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_order_is_kept(depth: int) -> None:
    assert list(prefetch(iter(range(1000)), depth)) == list(range(1000))


@pytest.mark.parametrize("depth", [0, 2])
def test_errors_come_after_what_preceded_them(depth: int) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("gone")

    items = prefetch(source(), depth)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(items)


@pytest.mark.parametrize("depth", [0, 2])
def test_closing_stops_the_source(depth: int) -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(1_000_000)
        finally:
            closed.set()

    iterator = prefetch(source(), depth)
    assert next(iterator) == 0
    iterator.close()
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_reads_ahead_up_to_its_depth() -> None:
    made = []

    def source() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            yield item

    iterator = prefetch(source(), 3)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # one taken, three held, one waiting for room
    iterator.close()


def test_meters_measure_starved_and_blocked_time() -> None:
    def slow() -> Iterator[int]:
        for item in range(5):
            time.sleep(0.02)
            yield item

    meter = Meter("consumer")
    with meter.upstream(slow()) as source:
        assert list(source) == list(range(5))
    assert meter.starved_s >= 0.1
    meter.add(1.0)
    assert meter.occupancy(2.0) == 0.5


@pytest.fixture(params=[0, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[Executor | None]:
    if not request.param:
        yield None
        return
    with ThreadPoolExecutor(request.param) as pool:
        yield pool


def test_ordered_map_keeps_the_order(threads: Executor | None) -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return 2 * item

    assert list(ordered_map(threads, work, range(50), 4)) == list(range(0, 100, 2))


def test_ordered_map_raises_an_error_in_its_turn(threads: Executor | None) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise OSError("gone")
        return item

    results = ordered_map(threads, work, range(9), 4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_ordered_map_submits_no_more_than_its_depth() -> None:
    pulled = []

    def source() -> Iterator[int]:
        for item in range(100):
            pulled.append(item)
            yield item

    with ThreadPoolExecutor(2) as pool:
        results = ordered_map(pool, abs, source(), 3)
        assert next(results) == 0
        time.sleep(0.05)
        assert pulled == [0, 1, 2, 3]


def test_closing_ordered_map_cancels_what_has_not_begun() -> None:
    begun, ended = [], []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.05 if item else 0)
        ended.append(item)
        return item

    with ThreadPoolExecutor(1) as pool:
        results = ordered_map(pool, work, range(100), 10)
        assert next(results) == 0
        results.close()
        assert begun == ended
        assert len(begun) <= 2
