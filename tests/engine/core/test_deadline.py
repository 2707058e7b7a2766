"""One rule for every stop: at a moment, or when asked."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

from engine.core.deadline import GRACE_S, Deadline


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_without_a_moment_only_the_event_ends_a_run() -> None:
    stop = threading.Event()
    deadline = Deadline(stop=stop)
    assert not deadline.reached()
    assert deadline.fits(float("inf"))
    assert deadline.grace_s == float("inf")
    stop.set()
    assert deadline.reached()
    assert not deadline.fits(0)
    assert GRACE_S - 1 < deadline.grace_s <= GRACE_S
    assert (
        str(deadline.stopped("1 of 2 rows")) == "stopped, 1 of 2 rows; run the same command again to continue"
    )
    assert deadline.stopped("").exit_status == 5


def test_a_part_is_begun_only_where_it_ends_in_time() -> None:
    deadline = Deadline(in_seconds(60))
    assert not deadline.reached()
    assert deadline.fits(50)
    assert not deadline.fits(70)
    assert deadline.grace_s == float("inf")
    assert deadline.why.startswith("stopped for --finish-by ")  # no part that is left fits


def test_a_moment_that_has_come_is_named_and_leaves_its_grace() -> None:
    moment = in_seconds(-2)
    deadline = Deadline(moment)
    assert deadline.reached()
    assert not deadline.fits(0)
    assert GRACE_S - 3 < deadline.grace_s <= GRACE_S - 2
    assert deadline.why == f"stopped for --finish-by {moment.astimezone():%H:%M}"
    assert Deadline(in_seconds(-60)).grace_s == 0


def test_a_signal_before_the_moment_is_the_cause() -> None:
    deadline = Deadline(in_seconds(60))
    deadline.stop.set()
    assert deadline.reached()
    assert deadline.why == "stopped"
