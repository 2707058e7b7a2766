"""Decide when a run has to stop: at the time of --finish-by, or on request."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

from engine.core.errors import Stopped

GRACE_S = 5.0  # a part that ends within this time is finished before the run stops
GIVE_UP_S = 2 * GRACE_S  # a command without a clean stop ends its process after this time


class Deadline:
    """The end of a run, the same rule for all executors.

    A part is begun only if it ends before `moment`. When `moment` has come or `stop` is set, a part that
    was begun is finished if that takes no more than GRACE_S; then the run ends with `stopped`.
    """

    def __init__(self, moment: datetime | None = None, stop: threading.Event | None = None) -> None:
        self.moment, self.stop = moment, stop or threading.Event()
        self._stop_seen: float | None = None  # when `stop` was first seen, on the monotonic clock

    @property
    def left_s(self) -> float:
        """Return the seconds until `moment`; infinite without one."""
        return (self.moment - datetime.now(UTC)).total_seconds() if self.moment else float("inf")

    def reached(self) -> bool:
        """Return whether the run has to stop."""
        if self._stop_seen is None and self.stop.is_set():
            self._stop_seen = time.monotonic()
        return self._stop_seen is not None or self.left_s <= 0

    def fits(self, seconds: float) -> bool:
        """Return whether a part that takes `seconds` may be begun."""
        return not self.reached() and (self.moment is None or seconds <= self.left_s)

    @property
    def grace_s(self) -> float:
        """Return the seconds that the current part may still take; infinite unless the run has to stop."""
        if not self.reached():
            return float("inf")
        since = [time.monotonic() - self._stop_seen] if self._stop_seen is not None else []
        return max(0.0, GRACE_S - max([*since, -self.left_s]))

    @property
    def why(self) -> str:
        """Return the beginning of the message about the stop."""
        if self.moment is None or (self._stop_seen is not None and self.left_s > 0):
            return "stopped"
        return f"stopped for --finish-by {self.moment.astimezone():%H:%M}"

    def stopped(self, so_far: str) -> Stopped:
        """Return the error that ends the run; `so_far` says how far it came."""
        return Stopped(f"{self.why}, {so_far}; run the same command again to continue")
