"""What a run is asked to do: one frozen dataclass whose defaults the command line shows."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path

from engine.bundle import Decode
from engine.errors import UsageError
from engine.privacy import Redaction
from engine.storage.location import Place, parse

ALL_GPUS = "cuda:all"  # as a device: see `engine.fleet`
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one image and all images in flight may take."""

    memory: int = 1 << 30  # bytes of images in flight; the models come on top
    max_pixels: int = 100_000_000
    max_file_size: int = 512 << 20  # bytes

    @property
    def encoded_bytes(self) -> int:
        """Bytes of files that are read ahead."""
        return self.memory // 4

    @property
    def decoding_bytes(self) -> int:
        """Bytes that decoding may take for images that are decoded together; a single one may take more."""
        return self.memory // 2


@dataclass(frozen=True)
class Shard:
    """A share of a run's parts: every `of`-th, beginning with part `number` - 1."""

    number: int  # 1 to `of`
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def parts(self, count: int) -> range:
        """Indices of its parts among `count`."""
        return range(self.number - 1, count, self.of)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `engine.run`. None means: as recorded by the run that is resumed, else chosen here."""

    manifest: Place
    output: Place = Path("results")
    bundle: Path = Path("bundle")
    device: str = "auto"
    runner: str = "auto"
    precision: str | None = None
    decode: Decode | None = None  # as the bundle says; another is refused
    batch_size: int | None = None
    part_rows: int | None = None
    path_column: str | None = None
    column_prefix: str = ""
    root: Place | None = None
    workers: int | None = None
    limits: Limits = Limits()
    max_error_rate: float = 1.0
    read_timeout_s: float = 60.0
    finish_by: datetime | None = None  # with a time zone
    only_errors: bool = False  # `manifest` is the results folder whose failed rows are tried again
    overwrite: bool = False
    overlap: bool = True
    include_uids: bool = False  # DICOM's, in the results
    redaction: Redaction | None = None
    include: tuple[str, ...] = ()  # globs, of a folder or archive
    exclude: tuple[str, ...] = ()
    since: Place | None = None  # results whose rows need no second look
    paths_from: Place | None = None  # the manifest of a redacted run whose failed rows are tried again
    decoder: str = "auto"  # "cpu": every image gets libjpeg's strict look, also where there is a GPU
    slots: int = 3  # batches in flight on the GPU
    streams: int | None = None  # 1: members one after the other, 2: at once; None: whatever is faster
    cuda_graph: bool | None = None  # None: as tuned for this machine, else yes
    metrics_file: Path | None = None  # Prometheus text, written every few seconds
    shard: Shard | None = None  # others do the other parts of the run, in the same folder
    ray: str | None = None  # "local", "auto" or HOST:PORT: actors on Ray run the stages
    actors: int | None = None  # of them on CPUs
    part_timeout_s: float = 300.0  # without a finished batch, after which an actor counts as hanging


def available_cpus() -> int:
    """CPUs this process may use: its affinity, and the quota of its control group where there is one."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cpus if quota == "max" else max(1, min(cpus, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cpus


def parse_location(text: str) -> Place:
    """A local path or a URL. Raises UsageError."""
    try:
        return parse(text)
    except ValueError as error:
        # a password may be behind the scheme
        raise UsageError(f"{text.partition('://')[0]}://...: {error}") from None


def parse_bytes(text: str) -> int:
    """'2GiB', '512M' or '4096' as bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not found or found[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size; give bytes or a number with a unit, such as 2GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_shard(text: str) -> Shard:
    """'3/16'. Raises UsageError."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    shard = Shard(int(found[1]), int(found[2])) if found else None
    if shard is None or not 1 <= shard.number <= shard.of:
        raise UsageError(
            f"--shard {text}: allowed: K/N, with K from 1 to N; 1/16 to 16/16 for sixteen shards"
        )
    return shard


def parse_moment(text: str, now: datetime) -> datetime:
    """'06:00' as the next one after `now`, local time, or an ISO 8601 date and time. Raises UsageError."""
    example = "give a time such as 06:00 or 2031-05-17T06:00"
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
            moment = datetime.combine(now.astimezone().date(), time.fromisoformat(text.zfill(5))).astimezone()
            if moment <= now:
                tomorrow = moment.date() + timedelta(days=1)
                moment = datetime.combine(tomorrow, moment.time()).astimezone()
        else:
            moment = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise UsageError(f"--finish-by {text!r} is not a time; {example}") from None
    if moment <= now:
        raise UsageError(f"--finish-by {text} is in the past; {example}")
    return moment
