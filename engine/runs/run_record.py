"""Define `_run.json`, which every part repeats in its footer: options, bundle, versions and machine."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, Self

from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import replace

from engine.bundle.bundle import Bundle
from engine.bundle.operating_points import OperatingPoints
from engine.core.hardware import Gpu, processor_name
from engine.core.json_records import Count, Record, from_json, to_builtins
from engine.core.location import absolute
from engine.core.records import Scorer
from engine.core.settings import CPU_BATCH, CPU_PART_ROWS, GPU_BATCH, GPU_PART_ROWS, Settings, Shard
from engine.core.tuning import Settled, Tuning
from engine.core.version import __version__
from engine.manifest.manifest import Manifest
from engine.runners.base import RunnerChoice

PARTS_PER_SHARD = 8  # about, if the manifest has enough rows

PositiveInt = Annotated[int, Meta(ge=1)]


class HardwareGroup(Record):
    """Actors on Ray that give the same scores, bit for bit, and get batches of the same size."""

    runner: str
    device: str
    precision: str
    plans: dict[str, str] | None  # sha256 by member
    gpu: str | None
    batch_size: PositiveInt


class ResultOptions(Record):
    """The options that decide the results and may not change on resume."""

    manifest_sha256: str
    root: str  # of relative paths
    path_column: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    since: str | None = None  # "RUN_ID of MANIFEST"
    column_prefix: str = ""
    bundle_sha256: str
    runner: str
    device: str  # "cpu" or "cuda": GPUs of one kind may share a run
    precision: str
    plans: dict[str, str] | None = None  # sha256 by member
    decode: str | None = None
    decoder: str | None = None  # None on the CPU, which has only one
    batch_size: PositiveInt
    part_rows: PositiveInt
    shards: PositiveInt | None = None
    max_pixels: Count
    max_file_size: Count
    include_uids: bool = False
    redacted_by: str | None = None  # a hash of the salt
    kept_columns: tuple[str, ...] | None = None
    kinds: tuple[HardwareGroup, ...] | UnsetType = UNSET  # if a run on Ray has several groups

    @classmethod
    def create(
        cls,
        settings: Settings,
        recorded: RunRecord | None,
        manifest: Manifest,
        bundle: Bundle,
        choice: RunnerChoice,
        *,
        since: str | None,
    ) -> Self:
        """Return the result options of `settings`; unset ones are taken from `recorded`."""
        redaction = settings.redaction
        return cls(
            manifest_sha256=manifest.sha256,
            root=redaction.name(str(manifest.root)) if redaction else str(manifest.root),
            path_column=manifest.path_column,
            include=settings.include,
            exclude=settings.exclude,
            since=since,
            column_prefix=settings.column_prefix,
            bundle_sha256=bundle.sha256,
            runner=choice.runner,
            device=choice.kind,
            precision=choice.precision,
            plans=choice.plan_hashes,
            decode=bundle.decode,
            decoder=settings.decoder if choice.gpu else None,
            batch_size=_batch_size(settings, recorded, choice),
            part_rows=_part_rows(settings, recorded, manifest, choice),
            shards=settings.shard.of if settings.shard else None,
            max_pixels=settings.limits.max_pixels,
            max_file_size=settings.limits.max_file_size,
            include_uids=settings.include_uids,
            redacted_by=redaction.key if redaction else None,
            kept_columns=redaction.keep if redaction else None,
        )


class Machine(Record):
    """The machine on which a run began."""

    system: str
    processor: str
    gpu: Gpu | None = None

    @classmethod
    def create(cls, choice: RunnerChoice) -> Self:
        system = f"{platform.system()} {platform.release()}"
        return cls(system=system, processor=processor_name(), gpu=choice.gpu)


class UsedProfile(Record):
    """The profile of `engine.tune` that a run began with, and the options that were taken from it."""

    file: str
    knobs: dict[str, bool | int | str | dict[str, int | float]]


class RunRecord(Record):
    """`_run.json`: the options that decide the results, and other facts. Read since version 0.1.0."""

    format: Literal[1] = 1
    run_id: str
    started: str  # ISO 8601, UTC
    result_options: ResultOptions
    manifest: str | None = None  # None where paths are redacted
    rows: Count
    not_listed: dict[str, int] = field(default_factory=dict)  # files that a listing skipped, by reason
    since: str | None = None  # results folder of an earlier run
    bundle: str | None = None
    classes: Annotated[tuple[str, ...], Meta(min_length=1)]
    target: str | None = None
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)  # classes by group
    operating_points: OperatingPoints | UnsetType | None = UNSET  # unset before 0.1
    out_of_distribution: str | None = None  # "looked at", or why not; None if the bundle has no limits
    weights: dict[str, float]  # by member
    machine: Machine | None = None
    chosen: str | None = None  # runner of the members, and why it was selected
    tuning: Tuning = Tuning()
    versions: dict[str, str] = field(default_factory=dict)
    profile: UsedProfile | None = None

    def __post_init__(self) -> None:
        """Raises ValueError."""
        try:
            datetime.fromisoformat(self.started)
        except ValueError:
            raise ValueError(f"started is {self.started!r}: expected an ISO 8601 date and time") from None

    @classmethod
    def create(
        cls,
        settings: Settings,
        recorded: RunRecord | None,
        manifest: Manifest,
        bundle: Bundle,
        choice: RunnerChoice,
        *,
        since: str | None = None,
        profile: UsedProfile | None = None,
        tuning: Tuning | None = None,
    ) -> Self:
        """Describe the run of `settings`; unset options are taken from `recorded`, the run to resume.

        `since`: an earlier run's id and the manifest. `tuning`: values from this machine's profile.
        """
        return cls(
            run_id=uuid.uuid4().hex,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            result_options=ResultOptions.create(settings, recorded, manifest, bundle, choice, since=since),
            manifest=None if settings.redaction else str(absolute(manifest.source)),
            rows=manifest.rows,
            not_listed=manifest.skipped,
            since=str(absolute(settings.since)) if settings.since else None,
            bundle=None if settings.redaction else str(bundle.path.absolute()),
            classes=bundle.classes,
            target=bundle.target,
            groups=dict(bundle.groups),
            operating_points=bundle.operating_points,
            out_of_distribution=_out_of_distribution(bundle, choice),
            weights={member.name: member.weight for member in bundle.members},
            machine=Machine.create(choice),
            chosen=choice.reason,
            tuning=recorded.tuning if recorded else tuning or Tuning(),
            versions=library_versions(),
            profile=profile,
        )

    @classmethod
    def parse(cls, text: bytes | str) -> Self:
        """Read `_run.json`. Raises ValueError in one line."""
        run = from_json(text, cls)
        device = run.result_options.device.partition(":")[0]  # older runs name the GPU's number
        return run.with_options(device=device)

    def to_metadata(self) -> bytes:
        """Return the JSON that footers of parts hold."""
        return json.dumps(to_builtins(self)).encode()

    def with_options(self, **changed: Any) -> Self:
        """Return a copy with other result options."""
        return replace(self, result_options=replace(self.result_options, **changed))

    def with_settled(self, settled: Settled) -> Self:
        """Return a copy with the values that the open stages have settled."""
        run = self.with_options(batch_size=settled.batch_size)
        return replace(run, tuning=settled.tuning, versions=self.versions | settled.versions)

    @property
    def began(self) -> datetime:
        return datetime.fromisoformat(self.started)

    @property
    def has_triage(self) -> bool:
        """Return whether the results have triage columns, which older versions did not write."""
        return self.operating_points is not UNSET

    @property
    def part_count(self) -> int:
        return -(-self.rows // self.result_options.part_rows)

    def rows_in_part(self, index: int) -> int:
        part_rows = self.result_options.part_rows
        return max(0, min(part_rows, self.rows - index * part_rows))

    def part_indices(self, shard: Shard | None) -> Sequence[int]:
        """Return the indices of all parts, or of those of the shard."""
        return shard.parts(self.part_count) if shard else range(self.part_count)

    def shard_rows(self, shard: Shard | None) -> int:
        """Return the number of rows in these parts."""
        return sum(map(self.rows_in_part, self.part_indices(shard)))


def _batch_size(settings: Settings, recorded: RunRecord | None, choice: RunnerChoice) -> int:
    requested = settings.batch_size
    # a recorded size that differs from the requested one was halved because memory was short
    if recorded and requested in (None, recorded.tuning.batch_size_asked):
        return recorded.result_options.batch_size
    return requested or default_sizes(choice)[0]


def _part_rows(
    settings: Settings, recorded: RunRecord | None, manifest: Manifest, choice: RunnerChoice
) -> int:
    if settings.part_rows:
        return settings.part_rows
    if recorded:
        return recorded.result_options.part_rows
    batch_size, part_rows = default_sizes(choice)
    if settings.shard:  # smaller parts, so that the shards have about the same number of rows
        share = -(-manifest.rows // (PARTS_PER_SHARD * settings.shard.of))
        part_rows = min(part_rows, max(share, batch_size))
    return part_rows


def _out_of_distribution(bundle: Bundle, choice: RunnerChoice) -> str | None:
    """Return whether out-of-distribution images are detected, or why not; None without limits."""
    if bundle.operating_points is None or not bundle.operating_points.distances:
        return None
    return "looked at" if choice.gives_distances else f"not looked at: {choice.runner} in {choice.precision}"


def default_sizes(choice: RunnerChoice) -> tuple[int, int]:
    """Return the default batch size and number of rows of a part."""
    if choice.device == "cpu":
        return CPU_BATCH, CPU_PART_ROWS
    largest = [plan.passport.max_batch for plan in choice.plans]
    return min(largest, default=GPU_BATCH), GPU_PART_ROWS


def scorer_of(choice: RunnerChoice) -> Scorer:
    return Scorer(
        host=platform.node(),
        device=choice.device,
        gpu=choice.gpu.name if choice.gpu else None,
        runner=choice.runner,
        precision=choice.precision,
    )


def library_versions() -> dict[str, str]:
    """Return the versions of the engine and of the libraries that decide pixels and files."""
    versions = {"engine": __version__, "python": platform.python_version()}
    for package in ("nvidia-dali-cuda130", "imagecodecs", "simplejpeg", "numpy", "pyarrow", "pydicom"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
