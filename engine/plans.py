"""Compiled plans and their passports: what a plan was made from, for which machine, how well it agrees."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from engine.bundle import Bundle, Member
from engine.errors import UsageError
from engine.store import write_json

FORMAT = 1
PLANS = "plans"
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # that TensorRT for RTX builds for
INT8 = "onnx-int8"  # the target of INT8 graphs for the CPU
_TEXTS = (
    *("member", "target", "backend", "frontend", "precision", "reference_sha256"),
    *("source", "source_sha256", "plan", "plan_sha256", "version"),
)
_WORDS: dict[str, tuple[object, ...]] = {
    "backend": ("tensorrt", "tensorrt_rtx", "onnx"),
    "frontend": ("onnx", "torch-tensorrt"),
    "precision": ("fp16", "fp32", "int8"),
    "hardware_compatible": (True, False),
    "version_compatible": (True, False),
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What decides whether a plan fits: NVIDIA's names."""

    name: str
    uuid: str
    capability: str  # "9.0"
    driver: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An optimization profile: batch sizes."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How a plan, or the graph it was made from, compares with the float32 reference on `images` images."""

    executed: bool  # the plan itself; False: its FP16 graph, on ONNX Runtime
    images: int
    calibration: str  # where the images are from
    max: float  # largest difference of a probability
    mean: float
    agreement: float  # of the arg max, among the `counted` images that are not close calls
    counted: int
    limit: float
    agreement_limit: float
    # int8 only: macro one-vs-rest AUC, and the classes it was measured against
    auc: float | None = None
    auc_reference: float | None = None
    auc_limit: float | None = None
    labels: str | None = None

    @property
    def passed(self) -> bool:
        fine = self.max <= self.limit and self.agreement >= self.agreement_limit  # False for NaN
        if self.auc is None or self.auc_reference is None or self.auc_limit is None:
            return fine
        return fine and abs(self.auc - self.auc_reference) <= self.auc_limit

    @classmethod
    def pending(cls, limit: float, agreement_limit: float) -> Parity:
        """Of a plan that has not been compared yet: never passed."""
        return cls(
            executed=False,
            images=0,
            calibration="",
            max=math.inf,
            mean=math.inf,
            agreement=0.0,
            counted=0,
            limit=limit,
            agreement_limit=agreement_limit,
        )


@dataclass(frozen=True, kw_only=True)
class Passport:
    """`plans/<target>/<member>.json`."""

    format: int
    member: str
    target: str  # name of the folder
    backend: str  # "tensorrt", "tensorrt_rtx" or "onnx"
    frontend: str  # "onnx" or "torch-tensorrt"
    precision: str  # "fp16", "fp32" or "int8"
    reference_sha256: str  # of the member's float32 graph, as ensemble.json has it
    source: str  # the file that was compiled, in the bundle
    source_sha256: str
    plan: str
    plan_sha256: str
    plan_bytes: int
    version: str  # of `backend`
    cuda: str | None
    gpu: Gpu | None  # where it was built, None without one
    compute_capabilities: tuple[str, ...]  # that it was built for
    hardware_compatible: bool
    version_compatible: bool
    profiles: tuple[Profile, ...]
    options: dict[str, Any]
    layers: list[dict[str, Any]]  # name, type and precision of each
    layers_from: str  # "network", "engine inspector" or "graph"
    build_s: float
    built: str  # ISO 8601, UTC
    parity: Parity
    ensemble: Parity | None = None  # of all members' INT8 graphs together

    @property
    def max_batch(self) -> int:
        return max(profile.max for profile in self.profiles)

    def rebuild(
        self,
        bundle: Path,
        *,
        precision: str | None = None,
        batch_size: int | None = None,
        capability: str | None = None,
    ) -> str:
        """What to do about a plan that does not fit a run of `precision` and `batch_size` on this GPU."""
        hopeless = self.backend == "tensorrt_rtx" and capability not in (None, *RTX_CAPABILITIES)
        target = "tensorrt" if hopeless else self.backend
        words = ["python -m build_engines", shlex.quote(str(bundle)), "--target", target]
        words += ["--precision", precision or self.precision]
        if self.profiles:
            words += ["--batch-size", str(max(batch_size or 0, self.max_batch))]
        words += ["--frontend", self.frontend] * (self.frontend != "onnx")
        words += ["--hardware-compatible"] * self.hardware_compatible
        words += ["--version-compatible"] * self.version_compatible
        return f"build it again with: {' '.join(words)}"

    def problem(self, member: Member, gpu: Gpu, version: str | None) -> str | None:
        """Why the plan can't run `member` on `gpu` under `version` of its backend; None when it can."""
        if self.member != member.name or self.reference_sha256 != member.files["onnx"].sha256:
            return "it was made from another model"
        if version is None:
            return f"{self.backend} is not installed"
        if version != self.version and not (self.version_compatible and _runs_under(self.version, version)):
            return f"it was built by {self.backend} {self.version}, here is {version}"
        if gpu.capability in self.compute_capabilities:
            return None
        if self.hardware_compatible and _ampere_or_newer(gpu.capability, *self.compute_capabilities):
            return None
        capabilities = ", ".join(self.compute_capabilities)
        return f"it was built for compute capability {capabilities}, this GPU has {gpu.capability}"

    def cpu_problem(self, member: Member) -> str | None:
        """Why the INT8 graph can't run `member` on the CPU here; None when it can."""
        if self.member != member.name or self.reference_sha256 != member.files["onnx"].sha256:
            return "it was made from another model"
        if (self.backend, self.precision) != ("onnx", "int8"):
            return f"it is {self.precision} for {self.backend}, and no INT8 graph"
        if not (self.parity.passed and self.ensemble and self.ensemble.passed):
            return "it did not pass the gate"
        if self.options.get("weight_bits") != 7 and not has_vnni():
            return "it was built for a CPU with VNNI, which this one has not"
        return None


def has_vnni() -> bool:
    """Whether products of 8-bit numbers can be summed here without overflow: on x86 only with VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_vnni", "avx_vnni"})


def _runs_under(built: str, here: str) -> bool:
    """Whether a version-compatible plan that `built` made runs under `here`: the same or a later minor."""
    old, new = ([int(part) for part in version.split(".")[:2]] for version in (built, here))
    return old[0] == new[0] and old[1] <= new[1]


def _ampere_or_newer(*capabilities: str) -> bool:
    return all(float(capability) >= 8 for capability in capabilities)


@dataclass(frozen=True)
class Plan:
    """A plan on disk."""

    path: Path
    passport: Passport

    def with_facts(self, **changed: Any) -> Plan:
        """The same plan; `changed` fields of its passport."""
        return replace(self, passport=replace(self.passport, **changed))

    def read(self) -> bytes:
        """The plan, if its bytes are those the passport names. Raises UsageError."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"plan {self.path}: {error.strerror}") from None
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.passport.plan_sha256:
            raise UsageError(
                f"plan {self.path}: altered: sha256 is {digest[:12]}, its passport says "
                f"{self.passport.plan_sha256[:12]}"
            )
        return data

    def usable(self, bundle: Path) -> bytes:
        """As `read`; the error says how to build it again."""
        try:
            return self.read()
        except UsageError as error:
            raise UsageError(f"{error}; {self.passport.rebuild(bundle)}") from None


def write(folder: Path, passport: Passport) -> None:
    write_json(folder / f"{passport.member}.json", asdict(passport))


def load(path: Path) -> Plan:
    """A passport and where its plan is. Raises UsageError, one line, for one that makes no sense."""
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"not a passport of format {FORMAT}")
        passport = _parse(data)
    except OSError as error:
        raise UsageError(f"plan {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"plan {path}: {' '.join(str(error).split())[:200]}") from None
    return Plan(path.parent / passport.plan, passport)


def _parse(data: dict[str, Any]) -> Passport:
    known = {field.name for field in fields(Passport)}
    if set(data) | {"ensemble"} != known:
        raise ValueError(f"fields {', '.join(sorted(set(data) ^ known))} are missing or unknown")
    passport = Passport(
        **data
        | {
            "gpu": Gpu(**data["gpu"]) if data["gpu"] else None,
            "profiles": tuple(Profile(**profile) for profile in data["profiles"]),
            "compute_capabilities": tuple(data["compute_capabilities"]),
            "parity": Parity(**data["parity"]),
            "ensemble": Parity(**data["ensemble"]) if data.get("ensemble") else None,
        }
    )
    _check(passport)
    return passport


def _check(passport: Passport) -> None:
    """Raise ValueError for a value that can't be."""
    for name in _TEXTS:
        text = getattr(passport, name)
        _expect(isinstance(text, str) and 0 < len(text) <= 128 and text.isprintable(), name, text)
    for name, allowed in _WORDS.items():
        _expect(getattr(passport, name) in allowed, name, getattr(passport, name))
    _expect(bool(re.fullmatch(r"\d+(\.\d+){2,3}", passport.version)), "version", passport.version)
    beside = Path(passport.plan).name == passport.plan
    _expect(beside, "plan", f"{passport.plan} is not the name of a file beside the passport")
    sizes = [size for profile in passport.profiles for size in astuple(profile)]
    compiled = passport.backend != "onnx"
    _expect(
        bool(sizes) == compiled and all(type(size) is int for size in sizes), "profiles", passport.profiles
    )
    for number in (passport.parity.limit, passport.parity.max, passport.parity.agreement):
        _expect(type(number) in (int, float), "parity", number)
    _expect(isinstance(passport.options, dict), "options", passport.options)
    for text in passport.compute_capabilities:
        _expect(bool(re.fullmatch(r"\d{1,3}\.\d", text)), "compute_capabilities", text)


def _expect(condition: bool, name: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} {value!r}"[:120])


def passports(bundle: Bundle) -> Iterator[tuple[str, list[Path]]]:
    """The targets of a bundle that have a passport for every member, newest first."""
    folder = bundle.path / PLANS
    if not folder.is_dir():
        return
    targets = sorted((path for path in folder.iterdir() if path.is_dir()), key=_age, reverse=True)
    for target in targets:
        paths = [target / f"{member.name}.json" for member in bundle.members]
        if all(path.is_file() for path in paths):
            yield target.name, paths


def quantized(bundle: Bundle) -> tuple[Plan, ...]:
    """The INT8 graph of each member, for the CPU. Raises UsageError with the command that builds them."""
    build = f"python -m build_engines {shlex.quote(str(bundle.path))} --target onnx --precision int8"
    folder = bundle.path / PLANS / INT8
    paths = [folder / f"{member.name}.json" for member in bundle.members]
    if not all(path.is_file() for path in paths):
        raise UsageError(f"--precision int8: the bundle has no INT8 graphs; build them with: {build}")
    try:
        found = tuple(load(path) for path in paths)
    except UsageError as error:
        raise UsageError(f"{error}; build it again with: {build}") from None
    for member, plan in zip(bundle.members, found, strict=True):
        if problem := plan.passport.cpu_problem(member):
            raise UsageError(f"plan {plan.path}: {problem}; build it again with: {build}")
    return found


def _age(path: Path) -> float:
    return path.stat().st_mtime
