"""The error that the parsers of all formats raise, and the check of the declared size."""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.records import Status

INT32_MAX = (1 << 31) - 1


class HeaderError(Exception):
    """The file cannot be decoded; `status` becomes the status of its row.

    `size` is the declared (width, height) where it is known and fits int32.
    """

    def __init__(self, status: Status, message: str, size: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.status, self.size = status, size


@dataclass
class SizeLimit:
    """The limit of an image's size, and the size that the parser found; every later error carries it."""

    max_pixels: int
    size: tuple[int, int] | None = None

    def check(self, name: str, width: int, height: int) -> None:
        """Raise HeaderError: CORRUPT for an empty image, TOO_LARGE for more than `max_pixels`."""
        if width <= 0 or height <= 0:
            raise corrupt(f"the {name} header declares a size of {width} x {height} pixels")
        if max(width, height) <= INT32_MAX:
            self.size = (width, height)
        if width * height > self.max_pixels:
            raise HeaderError(
                Status.TOO_LARGE,
                f"the image has {width} x {height} pixels; --max-pixels allows {self.max_pixels}",
            )


def corrupt(message: str) -> HeaderError:
    return HeaderError(Status.CORRUPT, message)


def truncated(message: str) -> HeaderError:
    return HeaderError(Status.TRUNCATED, message)


def unsupported(feature: str, supported: str = "") -> HeaderError:
    message = f"{feature} is not supported"
    return HeaderError(Status.UNSUPPORTED, f"{message}; supported: {supported}" if supported else message)
