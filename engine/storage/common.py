"""What all kinds of storage share."""

from __future__ import annotations

from engine.records import Status


class ReadError(Exception):
    """A file can't be had; `status` says why in the ledger's words."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
