"""The settings of a run, from which the command line and the keywords of `engine.screen` are made."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Literal, get_args

from engine.core.errors import UsageError
from engine.core.location import Location, Url, parse
from engine.core.option import byte_size, integer, number, option, options_of
from engine.core.redaction import Redaction, read_salt

ALL_GPUS = "cuda:all"  # as a device: an actor on a local Ray for each GPU
Decode = Literal["exact", "fast"]  # JPEG in full, or near the size that is needed by a scaled DCT
DECODES: tuple[Decode, ...] = get_args(Decode)
RUNNERS = ("tensorrt", "torch", "onnx")
PRECISIONS = ("fp32", "fp16", "int8")
CPU_BATCH = 8  # larger batches take more memory and are no faster
CPU_PART_ROWS = 1024
GPU_BATCH = 128  # or what the plans are made for
GPU_PART_ROWS = 65_536
MAX_WORKERS = 1024
_SCREENED, _RESULTS, _SPEED = "what is screened", "where the results go", "how fast"
_ACTORS, _STRICT, _PRIVACY, _WATCHING = "on several actors", "how strict", "privacy", "watching"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one image and of all images in flight."""

    memory: int = 1 << 30  # bytes of images in flight; the models come on top
    max_pixels: int = 100_000_000
    max_file_size: int = 512 << 20  # bytes

    @property
    def encoded_bytes(self) -> int:
        """Return the bytes of files that are read ahead."""
        return self.memory // 4

    @property
    def decoding_bytes(self) -> int:
        """Return the bytes that images decoded together may take; one image alone may take more."""
        return self.memory // 2


@dataclass(frozen=True)
class Shard:
    """A share of a run's parts: every `of`-th, beginning with part `number` - 1."""

    number: int  # 1 to `of`
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def parts(self, count: int) -> range:
        """Return the indices of its parts among `count`."""
        return range(self.number - 1, count, self.of)


def parse_location(location: str | os.PathLike[str] | Url) -> Location:
    """Parse a local path or URL. Raises UsageError."""
    if isinstance(location, Url):
        return location
    text = os.fspath(location)
    try:
        return parse(text)
    except ValueError as error:
        # the text after the scheme may contain a password
        raise UsageError(f"{text.partition('://')[0]}://...: {error}") from None


def parse_shard(text: str) -> Shard:
    """Parse a shard such as '3/16'. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    shard = Shard(int(match[1]), int(match[2])) if match else None
    if shard is None or not 1 <= shard.number <= shard.of:
        raise UsageError(
            f"--shard {text}: allowed: K/N, with K from 1 to N, such as 1/16 to 16/16 for sixteen shards"
        )
    return shard


def parse_moment(value: str | datetime, now: datetime | None = None) -> datetime:
    """Return the next '06:00' after `now`, local time, or an ISO 8601 date and time. Raises UsageError."""
    text = value.isoformat() if isinstance(value, datetime) else value  # pandas' Timestamp is one too
    now = now or datetime.now(UTC)
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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `engine.run`, each stated here and nowhere else: see `engine.core.option`.

    None means: the value recorded by the run that is resumed, otherwise chosen at the start of the run.
    """

    manifest: Location

    bundle: Path = option(
        _SCREENED,
        "model folder (%(default)s)",
        Path("bundle"),
        short="-b",
        first=True,
        operating=True,
        parse=Path,
        metavar="BUNDLE",
    )
    path_column: str | None = option(
        _SCREENED, "manifest column with the paths (path, else the first)", first=True, metavar="NAME"
    )
    root: Location | None = option(
        _SCREENED,
        "where relative paths start (the manifest's own folder)",
        first=True,
        parse=parse_location,
        metavar="FOLDER",
    )
    include: tuple[str, ...] = option(
        _SCREENED, "of a folder or archive: only these files", (), metavar="GLOB"
    )
    exclude: tuple[str, ...] = option(
        _SCREENED, "of a folder or archive: not these files", (), metavar="GLOB"
    )
    since: Location | None = option(
        _SCREENED,
        "only what is new or changed since that run (all if the bundle is)",
        first=True,
        parse=parse_location,
        metavar="RESULTS",
    )
    only_errors: bool = option(
        _SCREENED,
        "MANIFEST is a results folder: try its failed rows again",
        False,
        first=True,
        operating=True,
    )

    output: Location = option(
        _RESULTS,
        "folder, or s3://, gs://, az:// (%(default)s)",
        Path("results"),
        short="-o",
        first=True,
        parse=parse_location,
        metavar="RESULTS",
    )
    overwrite: bool = option(_RESULTS, "delete the run that RESULTS holds and start again", False, first=True)
    part_rows: int | None = option(
        _RESULTS,
        f"rows a part, the unit of resume ({CPU_PART_ROWS} on a CPU, {GPU_PART_ROWS} on a GPU)",
        parse=integer(1, 1_000_000),
        metavar="N",
    )
    column_prefix: str = option(_RESULTS, "put before the names of manifest columns", "", metavar="TEXT")
    include_uids: bool = option(_RESULTS, "DICOM's study, series and SOP UIDs as columns", False)

    device: str = option(
        _SPEED, "auto, cpu, cuda:N, or cuda:all: all GPUs, with Ray (%(default)s)", "auto", first=True
    )
    shard: Shard | None = option(
        _SPEED,
        "every Nth part; other processes do the others, into RESULTS too",
        parse=parse_shard,
        keyword_type=str,
        metavar="K/N",
    )
    runner: str = option(
        _SPEED,
        f"auto, {', '.join(RUNNERS)} (%(default)s)",
        "auto",
        keyword_type=Literal["auto", "tensorrt", "torch", "onnx"],
    )
    precision: str | None = option(
        _SPEED,
        "of the members (fp16 on a GPU, fp32 on a CPU; int8: on a CPU, by build_engines)",
        choices=PRECISIONS,
    )
    workers: int | None = option(
        _SPEED,
        "CPU threads (as tuned; else all that this process may use)",
        operating=True,
        parse=integer(1, MAX_WORKERS),
        metavar="N",
    )
    memory: int = option(
        _SPEED,
        f"for images in flight ({Limits.memory >> 30}GiB)",
        Limits.memory,
        first=True,
        operating=True,
        parse=byte_size,
        keyword_type=int | str,
        metavar="SIZE",
    )
    batch_size: int | None = option(
        _SPEED,
        f"images a batch (as tuned; else {CPU_BATCH} on a CPU, {GPU_BATCH} or the plan's on a GPU)",
        parse=integer(1, 4096),
        metavar="N",
    )
    slots: int = option(
        _SPEED, "batches on the GPU (%(default)s)", 3, operating=True, parse=integer(1, 16), metavar="N"
    )
    streams: int | None = option(
        _SPEED,
        "1: members in turn, 2: at once (the faster)",
        operating=True,
        parse=integer(1, 2),
        metavar="N",
    )
    cuda_graph: bool | None = option(_SPEED, "replay each batch's step as one graph", operating=True)
    serial: bool = option(
        _SPEED, "one stage after the other; for checks, the results are the same", False, operating=True
    )

    ray: str | None = option(
        _ACTORS,
        "actors on Ray do it: one started here, or the cluster at HOST:PORT or auto",
        operating=True,
        nargs="?",
        const="local",
        metavar="ADDRESS",
    )
    actors: int | None = option(
        _ACTORS,
        "with --ray: on CPUs (none beside GPUs, else as many as fit)",
        operating=True,
        parse=integer(1, MAX_WORKERS),
        metavar="N",
    )
    part_timeout_s: float = option(
        _ACTORS,
        "with --ray: seconds without a finished batch after which an actor is replaced (%(default)g)",
        300.0,
        operating=True,
        parse=number(0.1, 86_400),
        metavar="S",
    )

    finish_by: datetime | None = option(  # with a time zone
        _STRICT,
        "stop at a clean point in time for 06:00, or an ISO date and time",
        first=True,
        operating=True,
        parse=parse_moment,
        keyword_type=datetime | str,
        metavar="TIME",
    )
    max_error_rate: float = option(
        _STRICT,
        "share of failed rows that still counts as success (%(default)g)",
        1.0,
        first=True,
        operating=True,
        parse=number(0, 1),
        metavar="F",
    )
    read_timeout_s: float = option(
        _STRICT,
        "seconds that reading one file may take (%(default)g)",
        60.0,
        operating=True,
        parse=number(0.1, 86_400),
        metavar="S",
    )
    max_pixels: int = option(
        _STRICT, "of an image (%(default)s)", Limits.max_pixels, parse=integer(), metavar="N"
    )
    max_file_size: int = option(
        _STRICT,
        f"of an image ({Limits.max_file_size >> 20}MiB)",
        Limits.max_file_size,
        parse=byte_size,
        keyword_type=int | str,
        metavar="SIZE",
    )
    decode: Decode | None = option(
        _STRICT, "of JPEG, as the bundle was trained (its own); another is refused", choices=DECODES
    )
    decoder: str = option(
        _STRICT,
        "cpu: each image decoded strictly there, for a GPU too (%(default)s)",
        "auto",
        keyword_type=Literal["auto", "cpu"],
        choices=("auto", "cpu"),
    )

    redact: bool = option(
        _PRIVACY,
        "a keyed hash in place of each path, no other manifest columns",
        False,
        first=True,
        operating=True,
    )
    salt_file: Path | None = option(
        _PRIVACY, "key of the hashes of --redact (ENGINE_SALT)", operating=True, parse=Path, metavar="FILE"
    )
    keep: tuple[str, ...] = option(
        _PRIVACY, "with --redact: a manifest column that stays", (), metavar="COLUMN"
    )
    paths_from: Location | None = option(
        _PRIVACY,
        "with --only-errors: manifest of a run with --redact, whose results name no path",
        operating=True,
        parse=parse_location,
        metavar="MANIFEST",
    )

    dry_run: bool = option(
        _WATCHING,
        "only say what the run would do, as python -m engine.doctor",
        False,
        first=True,
        operating=True,
        in_python=False,
    )
    metrics_file: Path | None = option(
        _WATCHING,
        "Prometheus metrics, rewritten every few seconds",
        operating=True,
        parse=Path,
        metavar="FILE",
    )
    log_json: bool = option(
        _WATCHING, "one JSON object a line on stderr", False, operating=True, in_python=False
    )

    redaction: Redaction | None = None  # made of `redact`, `salt_file` and `keep`: the salt is read once

    def __post_init__(self) -> None:
        """Raises UsageError for a salt that can't be read."""
        if self.redact and self.redaction is None:
            redaction = Redaction(read_salt(self.salt_file), tuple(sorted(set(self.keep))))
            object.__setattr__(self, "redaction", redaction)

    @property
    def limits(self) -> Limits:
        return Limits(memory=self.memory, max_pixels=self.max_pixels, max_file_size=self.max_file_size)

    @property
    def overlap(self) -> bool:
        """Return whether the stages work at the same time."""
        return not self.serial


OPTIONS = options_of(Settings)
