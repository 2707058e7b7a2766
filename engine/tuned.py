"""What `engine.tune` found for a machine: kept beside the bundle, looked up by `engine.run`.

`BUNDLE.tuning` lies beside the bundle and not in it: a bundle is passed on, copied and hashed, while what is
here is of use on one machine only. Each file is named by a hash of all that its figures depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from engine.bundle import Bundle
from engine.core.json_records import from_builtins
from engine.core.tuning import Tuning
from engine.provenance import RunRecord, UsedProfile, processor_name, versions
from engine.runners import RUNNERS, Choice
from engine.settings import Settings, available_cpus
from engine.store import as_json, atomic

FORMAT = 1
CPU_BATCHES = (1, 2, 4, 8, 16, 32)
GPU_BATCHES = (16, 32, 64, 128, 256, 512)
MOST_BYTES = 1 << 20
# what decides the speed, and its versions: of the CPU's runner, and of a GPU's
_DECIDES = ("engine", "python", "nvidia-dali-cuda130", "imagecodecs", "simplejpeg", "numpy")
_RUNNERS = ("onnxruntime", "onnxruntime-gpu", "torch", "tensorrt-cu13", "tensorrt-rtx-cu13")
_DECODING = {  # the fields of engine.gpu.decode.Decoding, and their highest values
    "hw_decoder_load": 1.0,
    "hybrid_huffman_threshold": 1 << 40,
    "width_hint": 1 << 16,
    "height_hint": 1 << 16,
    "cpu_share": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What differs from the defaults; None leaves a default. Checked: anybody may write a profile."""

    batch_size: int | None = None
    workers: int | None = None
    runner: str | None = None  # of a GPU
    cuda_graph: bool | None = None
    compiled: bool | None = None  # the members, by torch.compile
    decoding: dict[str, float] | None = None  # what the GPU's own tuning has settled

    def __post_init__(self) -> None:
        """Raises ValueError for what `engine.tune` does not write."""
        batches = CPU_BATCHES + GPU_BATCHES
        _expect("batch_size", self.batch_size, type(self.batch_size) is int and self.batch_size in batches)
        most = 2 * available_cpus()
        _expect("workers", self.workers, type(self.workers) is int and 1 <= self.workers <= most)
        _expect("runner", self.runner, self.runner in RUNNERS)
        _expect("cuda_graph", self.cuda_graph, type(self.cuda_graph) is bool)
        _expect("compiled", self.compiled, type(self.compiled) is bool)
        _expect("decoding", self.decoding, _is_decoding(self.decoding))

    def __str__(self) -> str:
        words = [
            self.batch_size and f"batch {self.batch_size}",
            self.workers and f"{self.workers} worker{'s' * (self.workers > 1)}",
            self.runner and f"the runner {self.runner}",
            self.cuda_graph is not None and f"{'a' if self.cuda_graph else 'no'} CUDA graph",
        ]
        return ", ".join(word for word in words if word) or "the defaults"

    @property
    def named(self) -> dict[str, Any]:
        """Those that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def for_gpu(self) -> dict[str, Any]:
        """What goes into the tuning that a run on a GPU records."""
        return {name: self.named[name] for name in ("compiled", "decoding") if name in self.named}

    @property
    def for_cpu(self) -> bool:
        """Whether a run on the CPU can take them."""
        sizes = (None, *CPU_BATCHES)
        return self.named.keys() <= {"batch_size", "workers"} and self.batch_size in sizes

    def on(self, settings: Settings) -> Settings:
        """`settings` with these where the user named nothing."""
        return replace(
            settings,
            batch_size=self.batch_size if settings.batch_size is None else settings.batch_size,
            workers=self.workers if settings.workers is None else settings.workers,
            runner=self.runner or "auto" if settings.runner == "auto" else settings.runner,
            cuda_graph=self.cuda_graph if settings.cuda_graph is None else settings.cuda_graph,
        )


def _expect(name: str, value: object, fine: bool) -> None:
    if value is not None and not fine:
        raise ValueError(f"{name} is not what engine.tune writes")


def _is_decoding(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == _DECODING.keys()
        and all(
            type(value[name]) is type(most) and 0 <= value[name] <= most for name, most in _DECODING.items()
        )
    )


def machine_of(models: Bundle, choice: Choice) -> dict[str, Any]:
    """All that the figures depend on: a profile fits where it is the same."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = choice.gpu
    found = versions()
    return {
        "bundle_sha256": models.sha256,
        "precision": choice.precision,
        "device": "gpu" if gpu else choice.device,
        "runner": choice.runner,
        "plans": choice.plan_hashes,
        "processor": processor_name(),
        "cores": available_cpus(),
        "memory_gib": round(memory / 2**30),
        "gpu": {"name": gpu.name, "capability": gpu.capability, "driver": gpu.driver} if gpu else None,
        "versions": {name: found[name] for name in _DECIDES if name in found}
        | _installed(_RUNNERS if gpu else _RUNNERS[:1]),
    }


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def folder_of(bundle: Path) -> Path:
    return Path(f"{bundle.absolute().resolve()}.tuning")


def path_of(bundle: Path, machine: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    return folder_of(bundle) / f"{key}.json"


def keep(bundle: Path, machine: Mapping[str, Any], knobs: Knobs, found: Mapping[str, Any]) -> Path:
    """Write a profile, whole or not at all; `found` are facts for people. Raises OSError."""
    path = path_of(bundle, machine)
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(
            as_json({"format": FORMAT, "knobs": knobs.named, **found, "machine": dict(machine)})
        )
    return path


@dataclass(frozen=True)
class Advice:
    """What the profiles beside a bundle have to say to a run."""

    settings: Settings  # with what fits of the profile
    line: str | None = None  # for people
    recorded: UsedProfile | None = None  # for `_run.json`
    tuning: Tuning | None = None  # what a run on a GPU need not tune


def advise(settings: Settings, models: Bundle, choice: Choice, *, recorded: RunRecord | None) -> Advice:
    """The profile that fits machine and bundle, where the user named nothing.

    `choice` is what runs the members by `settings` alone. A run that is resumed keeps the result options that
    are `recorded` for it. A profile that does not fit or can't be read is ignored, with a line.
    """
    began_with = recorded.profile.knobs.get("runner") if recorded and recorded.profile else None
    if began_with and settings.runner == "auto":
        settings = replace(settings, runner=str(began_with))
    folder = folder_of(models.path)
    machine = machine_of(models, choice)
    path = path_of(models.path, machine)
    try:
        if not path.exists():
            others = folder.is_dir() and any(entry.suffix == ".json" for entry in folder.iterdir())
            line = f"{folder.name}: no profile there is for this machine, bundle and versions: ignored"
            return Advice(settings, line if others else None)
        knobs = _read(path, machine)
        if not choice.gpu and not knobs.for_cpu:
            raise ValueError("it has entries for a GPU, and there is none")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return Advice(settings, f"{folder.name}/{path.name} is ignored: {reason}")
    if choice.gpu and settings.decoder == "cpu":
        knobs = replace(knobs, decoding=None)
    nothing_gained = not knobs.named
    if recorded is not None:
        knobs = replace(knobs, batch_size=None, runner=None, compiled=None, decoding=None)
    applied = knobs.on(settings)
    used = Knobs(
        **{
            name: value
            for name, value in knobs.named.items()
            if name in knobs.for_gpu or getattr(settings, name) != getattr(applied, name)
        }
    )
    line = f"as tuned for this machine ({folder.name}/{path.name}): {used}"
    return Advice(
        applied,
        line if used.named or nothing_gained else None,
        UsedProfile(file=path.name, knobs=used.named),
        from_builtins(knobs.for_gpu, Tuning),
    )


def rate_of(models: Bundle, choice: Choice) -> tuple[float, str] | None:
    """Images/s that `engine.tune` measured here with what it chose, and the name of the profile."""
    machine = machine_of(models, choice)
    path = path_of(models.path, machine)
    try:
        knobs = _read(path, machine).named
        compared = {name: value for name, value in knobs.items() if name not in ("compiled", "decoding")}
        tried = json.loads(path.read_bytes())["tried"]
        rates = next(one["images_per_s"] for one in tried if one["knobs"] == compared)
        return float(median(rates)), f"{path.parent.name}/{path.name}"
    except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError):
        return None


def _read(path: Path, machine: Mapping[str, Any]) -> Knobs:
    """Raises ValueError, with words of our own, and OSError."""
    # a FIFO by this name must not hold up the run
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise ValueError("it is no file")
        raw = opened.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    try:
        data = json.loads(raw)
        knobs = dict(data["knobs"])
        is_ours, made_for = data["format"] == FORMAT, data["machine"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it is damaged; run engine.tune again") from None
    if not is_ours:
        raise ValueError("it is of another version; run engine.tune again")
    if made_for != machine:
        raise ValueError("it was made for another machine, bundle or version")
    if unknown := knobs.keys() - Knobs().__dataclass_fields__.keys():
        raise ValueError(f"it has {len(unknown)} entries that engine.tune does not write")
    return Knobs(**knobs)
