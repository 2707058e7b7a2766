"""Count the properties of a sample of files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.core.records import Batch, Header, Status


@dataclass
class FileSample:
    """The properties of a sample of the files."""

    rows: int = 0
    elapsed_s: float = 0.0
    by_status: Counter[str] = field(default_factory=Counter)
    headers: list[Header] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # by "status: error"

    def add(self, batch: Batch) -> None:
        self.rows += batch.rows
        self.by_status.update(Status(code).label for code in batch.status)
        for header, data in zip(batch.headers, batch.encoded, strict=True):
            if header:
                self.headers.append(header)
                self.bytes_read.append(len(data))
        for position, error in batch.errors.items():
            self.errors[f"{Status(batch.status[position]).label}: {error}"] += 1
        batch.drop_encoded()
