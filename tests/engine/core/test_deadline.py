"""One rule for every stop: at a moment, or when asked."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

from engine.core.deadline import GRACE_S, Deadline


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_without_a_deadline_only_the_event_ends_a_run() -> None:
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


def test_a_part_starts_only_if_it_ends_before_the_deadline() -> None:
    deadline = Deadline(in_seconds(60))
    assert not deadline.reached()
    assert deadline.fits(50)
    assert not deadline.fits(70)
    assert deadline.grace_s == float("inf")
    assert deadline.why.startswith("stopped for --finish-by ")  # no part that is left fits


def test_a_reached_deadline_is_named_and_leaves_the_grace_time() -> None:
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
