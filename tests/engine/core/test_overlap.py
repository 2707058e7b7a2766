import threading
import time
from collections.abc import Iterator

import pytest

from engine.overlap import Meter, prefetch


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


def test_it_runs_ahead_but_no_further_than_its_depth() -> None:
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


def test_meters_tell_who_waits() -> None:
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
