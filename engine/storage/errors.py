"""Define the errors and retries of all kinds of storage."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from engine.core.records import Status

ATTEMPTS = 6
BACKOFF_S = 0.2  # before the second attempt; doubled for each further attempt
CUT_SHORT = "the file was cut short: fewer bytes arrived than announced"
T = TypeVar("T")


class ReadError(Exception):
    """A file cannot be read; `status` becomes that of its row.

    `transient`: another attempt may succeed. `denied`: the storage refuses access with these credentials.
    """

    def __init__(
        self, status: Status, message: str, *, transient: bool = False, denied: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.transient = transient
        self.denied = denied


def with_retries(action: Callable[[], T]) -> T:
    """Call `action` and return its result; retry temporary failures after growing, random pauses."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except ReadError as error:
            if not error.transient:
                raise
        time.sleep(BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))
    return action()
