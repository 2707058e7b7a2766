"""Profiles of `engine.tune` for a machine: stored beside the bundle, read by `engine.run`.

`BUNDLE.tuning` is beside the bundle and not in it: a bundle is copied and hashed, while a profile applies to
one machine only. Each file is named by a hash of all facts that its figures depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from msgspec import Meta, structs

from engine.bundle.bundle import Bundle
from engine.core.hardware import available_cpus, processor_name
from engine.core.json_records import (
    Count,
    Record,
    from_builtins,
    from_json,
    to_builtins,
    to_json,
)
from engine.core.settings import Settings
from engine.core.tuning import DecodeTuning, Tuning
from engine.runners.base import RunnerChoice
from engine.runs.run_record import RunRecord, UsedProfile, library_versions
from engine.storage.atomic import atomic

PROFILE_FORMAT: Literal[1] = 1
CPU_BATCHES = (1, 2, 4, 8, 16, 32)
GPU_BATCHES = (16, 32, 64, 128, 256, 512)
MAX_PROFILE_BYTES = 1 << 20
# packages whose versions decide the speed
_KEY_PACKAGES = ("engine", "python", "nvidia-dali-cuda130", "imagecodecs", "simplejpeg", "numpy")
_RUNNER_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch", "tensorrt-cu13", "tensorrt-rtx-cu13")


class TunedOptions(Record, omit_defaults=True):
    """The options that differ from the defaults; None keeps a default.

    They are checked, since a profile may come from anybody.
    """

    batch_size: int | None = None
    workers: Annotated[int, Meta(ge=1)] | None = None
    runner: Literal["tensorrt", "torch", "onnx"] | None = None  # of a GPU
    cuda_graph: bool | None = None
    compiled: bool | None = None  # the members, by torch.compile
    decoding: DecodeTuning | None = None

    def __post_init__(self) -> None:
        batches = sorted({*CPU_BATCHES, *GPU_BATCHES})
        if self.batch_size is not None and self.batch_size not in batches:
            raise ValueError(f"batch_size is {self.batch_size}: allowed: {', '.join(map(str, batches))}")
        limit = 2 * available_cpus()
        if self.workers is not None and self.workers > limit:
            raise ValueError(f"workers is {self.workers}: allowed: up to {limit} on this machine")

    def __str__(self) -> str:
        texts = [
            self.batch_size and f"batch {self.batch_size}",
            self.workers and f"{self.workers} worker{'s' * (self.workers > 1)}",
            self.runner and f"the runner {self.runner}",
            self.cuda_graph is not None and f"{'a' if self.cuda_graph else 'no'} CUDA graph",
        ]
        return ", ".join(text for text in texts if text) or "the defaults"

    @property
    def named(self) -> dict[str, Any]:
        """Return the options that are not None."""
        return dict(to_builtins(self))

    @property
    def for_gpu(self) -> dict[str, Any]:
        """Return the tuning that a run on a GPU records."""
        return {name: self.named[name] for name in ("compiled", "decoding") if name in self.named}

    @property
    def for_cpu(self) -> bool:
        """Return whether a run on the CPU can use these options."""
        sizes = (None, *CPU_BATCHES)
        return self.named.keys() <= {"batch_size", "workers"} and self.batch_size in sizes

    def on(self, settings: Settings) -> Settings:
        """Return `settings` with these options where the user set none."""
        return replace(
            settings,
            batch_size=self.batch_size if settings.batch_size is None else settings.batch_size,
            workers=self.workers if settings.workers is None else settings.workers,
            runner=self.runner or "auto" if settings.runner == "auto" else settings.runner,
            cuda_graph=self.cuda_graph if settings.cuda_graph is None else settings.cuda_graph,
        )


class MachineGpu(Record):
    """The facts that decide a GPU's speed."""

    name: str
    capability: str
    driver: str


class Machine(Record):
    """The facts that the figures depend on; a profile fits if they are equal."""

    bundle_sha256: str
    precision: str
    device: str
    runner: str
    plans: dict[str, str] | None  # sha256 by member
    processor: str
    cores: int
    memory_gib: int
    gpu: MachineGpu | None
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """Return the hash of all fields, which names the profile's file."""
        return hashlib.sha256(json.dumps(to_builtins(self), sort_keys=True).encode()).hexdigest()[:16]


class Sampled(Record):
    """The images that candidates were measured on."""

    rows: Count
    of: Count  # rows of the manifest
    by_status: dict[str, Count]


class BestBeside(TunedOptions, omit_defaults=True):
    """The best candidate, compared with the defaults."""

    of_defaults: tuple[float, ...]  # its rate / the default rate, for each pair of visits


class Tried(Record):
    """A candidate, and its images/s at each visit except the first."""

    knobs: TunedOptions
    images_per_s: tuple[float, ...]


class TuningProfile(Record):
    """A file of BUNDLE.tuning: the options that `engine.tune` chose for a machine, and how."""

    format: Literal[1]
    knobs: TunedOptions
    verdict: str
    made: str  # ISO 8601, UTC
    sample: Sampled
    best_beside: BestBeside
    tried: tuple[Tried, ...]
    load_average: tuple[float, float]  # before and after
    machine: Machine


def machine_key(bundle: Bundle, choice: RunnerChoice) -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = choice.gpu
    versions = library_versions()
    return Machine(
        bundle_sha256=bundle.sha256,
        precision=choice.precision,
        device="gpu" if gpu else choice.device,
        runner=choice.runner,
        plans=choice.plan_hashes,
        processor=processor_name(),
        cores=available_cpus(),
        memory_gib=round(memory / 2**30),
        gpu=MachineGpu(name=gpu.name, capability=gpu.capability, driver=gpu.driver) if gpu else None,
        versions={name: versions[name] for name in _KEY_PACKAGES if name in versions}
        | _package_versions(_RUNNER_PACKAGES if gpu else _RUNNER_PACKAGES[:1]),
    )


def _package_versions(packages: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def profiles_folder(bundle: Path) -> Path:
    return Path(f"{bundle.absolute().resolve()}.tuning")


def profile_path(bundle: Path, machine: Machine) -> Path:
    return profiles_folder(bundle) / f"{machine.key}.json"


def save_profile(bundle: Path, profile: TuningProfile) -> Path:
    """Write a profile atomically. Raises OSError."""
    path = profile_path(bundle, profile.machine)
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(to_json(profile))
    return path


@dataclass(frozen=True)
class AppliedProfile:
    """The effect of a tuning profile on a run."""

    settings: Settings  # with the options of the profile
    line: str | None = None  # status line
    recorded: UsedProfile | None = None  # for `_run.json`
    tuning: Tuning | None = None  # values that a run on a GPU need not measure


def apply_profile(
    settings: Settings, bundle: Bundle, choice: RunnerChoice, *, recorded: RunRecord | None
) -> AppliedProfile:
    """Apply the profile of this machine and bundle to the options that the user did not set.

    `choice` is the runner by `settings` alone. A resumed run keeps its `recorded` result options. A profile
    that does not fit or cannot be read is ignored, with a status line.
    """
    runner = recorded.profile.knobs.get("runner") if recorded and recorded.profile else None
    if runner and settings.runner == "auto":
        settings = replace(settings, runner=str(runner))
    folder = profiles_folder(bundle.path)
    machine = machine_key(bundle, choice)
    path = profile_path(bundle.path, machine)
    try:
        if not path.exists():
            others = folder.is_dir() and any(entry.suffix == ".json" for entry in folder.iterdir())
            line = f"{folder.name} is ignored: no profile in it is for this machine, bundle and versions"
            return AppliedProfile(settings, line if others else None)
        knobs = _read_profile(path, machine).knobs
        if not choice.gpu and not knobs.for_cpu:
            raise ValueError("it has entries for a GPU, but this machine has none")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return AppliedProfile(settings, f"{folder.name}/{path.name} is ignored: {reason}")
    if choice.gpu and settings.decoder == "cpu":
        knobs = structs.replace(knobs, decoding=None)
    nothing_gained = not knobs.named
    if recorded is not None:
        knobs = structs.replace(knobs, batch_size=None, runner=None, compiled=None, decoding=None)
    applied = knobs.on(settings)
    used = TunedOptions(
        **{
            name: getattr(knobs, name)
            for name in knobs.named
            if name in knobs.for_gpu or getattr(settings, name) != getattr(applied, name)
        }
    )
    line = f"as tuned for this machine ({folder.name}/{path.name}): {used}"
    return AppliedProfile(
        applied,
        line if used.named or nothing_gained else None,
        UsedProfile(file=path.name, knobs=used.named),
        from_builtins(knobs.for_gpu, Tuning),
    )


def profiled_rate(bundle: Bundle, choice: RunnerChoice) -> tuple[float, str] | None:
    """Return the images/s that `engine.tune` measured with the chosen options, and the profile's name."""
    machine = machine_key(bundle, choice)
    path = profile_path(bundle.path, machine)
    try:
        profile = _read_profile(path, machine)
        compared = structs.replace(profile.knobs, compiled=None, decoding=None)
        rates = next(tried.images_per_s for tried in profile.tried if tried.knobs == compared)
        return float(median(rates)), f"{path.parent.name}/{path.name}"
    except (OSError, ValueError, StopIteration):
        return None


def _read_profile(path: Path, machine: Machine) -> TuningProfile:
    """Read a profile. Raises ValueError and OSError."""
    # O_NONBLOCK: a FIFO by this name must not block the run
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a file")
        raw = file.read(MAX_PROFILE_BYTES + 1)
    if len(raw) > MAX_PROFILE_BYTES:
        raise ValueError(f"it has more than {MAX_PROFILE_BYTES} bytes")
    try:
        profile = from_json(raw, TuningProfile)
    except ValueError as error:
        raise ValueError(f"{error}; run engine.tune again") from None
    if profile.machine != machine:
        raise ValueError("it was made for another machine, bundle or version")
    return profile
