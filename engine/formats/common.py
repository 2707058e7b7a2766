"""Share the error that the parsers of all formats raise, and the check of the declared size."""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.records import Status

INT32_MAX = (1 << 31) - 1


class HeaderError(Exception):
    """The bytes can't be scored; `status` says why in the ledger's words.

    `size` is the declared (width, height) where it is known and fits int32.
    """

    def __init__(self, status: Status, message: str, size: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.status, self.size = status, size


@dataclass
class SizeLimit:
    """Takes the declared size as soon as a parser knows it; `size` goes into every later error."""

    max_pixels: int
    size: tuple[int, int] | None = None

    def check(self, name: str, width: int, height: int) -> None:
        """Raises HeaderError: CORRUPT for an empty image, TOO_LARGE for more than `max_pixels`."""
        if width <= 0 or height <= 0:
            raise corrupt(f"{name} of {width} x {height} pixels")
        if max(width, height) <= INT32_MAX:
            self.size = (width, height)
        if width * height > self.max_pixels:
            raise HeaderError(
                Status.TOO_LARGE, f"{width} x {height} pixels; --max-pixels allows {self.max_pixels}"
            )


def corrupt(message: str) -> HeaderError:
    return HeaderError(Status.CORRUPT, message)


def truncated(message: str) -> HeaderError:
    return HeaderError(Status.TRUNCATED, message)


def unsupported(message: str) -> HeaderError:
    return HeaderError(Status.UNSUPPORTED, message)
