"""Compiled plans and their passports: source, target machine and parity with the float32 reference."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, structs

from engine.bundle.bundle import Bundle, Member
from engine.core.errors import UsageError
from engine.core.hardware import Gpu, has_vnni
from engine.core.json_records import Count, NotNegative, Record, Sha256, from_json, text, to_json
from engine.storage.atomic import atomic

PASSPORT_FORMAT: Literal[1] = 1
PLANS_FOLDER = "plans"
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # that TensorRT for RTX builds for
INT8_TARGET = "onnx-int8"  # the target of INT8 graphs for the CPU
Word = Annotated[str, Meta(min_length=1, max_length=128)]
BatchSize = Annotated[int, Meta(ge=1)]
Version = Annotated[str, text(r"[0-9]{1,9}(\.[0-9]{1,9}){2,3}", "a version such as 11.1.0.106")]
Capability = Annotated[str, text(r"[0-9]{1,3}\.[0-9]", "a compute capability such as 9.0")]


class OptimizationProfile(Record):
    """An optimization profile: batch sizes."""

    min: BatchSize
    opt: BatchSize
    max: BatchSize


class Parity(Record):
    """The comparison of a plan, or of its source graph, with the float32 reference on `images` images."""

    executed: bool  # the plan itself; False: its FP16 graph, on ONNX Runtime
    images: int
    calibration: str  # source of the images
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
        agrees = self.max <= self.limit and self.agreement >= self.agreement_limit  # False for NaN
        if self.auc is None or self.auc_reference is None or self.auc_limit is None:
            return agrees
        return agrees and abs(self.auc - self.auc_reference) <= self.auc_limit

    @classmethod
    def pending(cls, limit: float, agreement_limit: float) -> Parity:
        """Return the parity of a plan that has not been compared yet, which does not pass."""
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


class Layer(Record, omit_defaults=True):
    """A layer of a plan or graph; fields that its source does not contain are left out."""

    name: str | None
    type: str | None = None
    input: str | None = None  # data types and formats
    output: str | None = None
    precision: str | None = None
    weights: str | None = None


class Passport(Record):
    """`plans/<target>/<member>.json`."""

    format: Literal[1]
    member: Word
    target: Word  # name of the folder
    backend: Literal["tensorrt", "tensorrt_rtx", "onnx"]
    frontend: Literal["onnx", "torch-tensorrt"]
    precision: Literal["fp16", "fp32", "int8"]
    reference_sha256: Sha256  # of the member's float32 graph, as ensemble.json has it
    source: Word  # the file that was compiled, in the bundle
    source_sha256: Sha256
    plan: Word
    plan_sha256: Sha256
    plan_bytes: Count
    version: Version  # of `backend`
    cuda: str | None
    gpu: Gpu | None  # where it was built, None without one
    compute_capabilities: tuple[Capability, ...]  # that it was built for
    hardware_compatible: bool
    version_compatible: bool
    profiles: tuple[OptimizationProfile, ...]
    options: dict[str, str | int | float | bool | None]  # of the builder, or of the quantization
    layers: tuple[Layer, ...]
    layers_from: str  # "network", "engine inspector" or "graph"
    build_s: NotNegative
    built: str  # ISO 8601, UTC
    parity: Parity
    ensemble: Parity | None = None  # of all members' INT8 graphs together

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"{name} {value[:40]!r} is not printable")
        if Path(self.plan).name != self.plan:
            raise ValueError(f"plan {self.plan!r} is not the name of a file beside the passport")
        if bool(self.profiles) == (self.backend == "onnx"):
            raise ValueError(
                f"profiles: {len(self.profiles)}; a compiled plan has some, an ONNX graph has none"
            )

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
        """Return the command that rebuilds a plan for `precision` and `batch_size` on this GPU."""
        rtx_impossible = self.backend == "tensorrt_rtx" and capability not in (None, *RTX_CAPABILITIES)
        target = "tensorrt" if rtx_impossible else self.backend
        words = ["python -m build_engines", shlex.quote(str(bundle)), "--target", target]
        words += ["--precision", precision or self.precision]
        if self.profiles:
            words += ["--batch-size", str(max(batch_size or 0, self.max_batch))]
        words += ["--frontend", self.frontend] * (self.frontend != "onnx")
        words += ["--hardware-compatible"] * self.hardware_compatible
        words += ["--version-compatible"] * self.version_compatible
        return f"build it again with: {' '.join(words)}"

    def problem(self, member: Member, gpu: Gpu, version: str | None) -> str | None:
        """Return why the plan cannot run `member` on `gpu` with `version` of its backend; None if it can."""
        if self.member != member.name or self.reference_sha256 != member.files["onnx"].sha256:
            return "it was made from another model"
        if version is None:
            return f"{self.backend} is not installed"
        if version != self.version and not (
            self.version_compatible and _accepts_version(self.version, version)
        ):
            return f"it was built by {self.backend} {self.version}; installed: {version}"
        if gpu.capability in self.compute_capabilities:
            return None
        if self.hardware_compatible and _ampere_or_newer(gpu.capability, *self.compute_capabilities):
            return None
        capabilities = ", ".join(self.compute_capabilities)
        return f"it was built for compute capability {capabilities}, this GPU has {gpu.capability}"

    def cpu_problem(self, member: Member) -> str | None:
        """Return why the INT8 graph cannot run `member` on this CPU; None if it can."""
        if self.member != member.name or self.reference_sha256 != member.files["onnx"].sha256:
            return "it was made from another model"
        if (self.backend, self.precision) != ("onnx", "int8"):
            return f"it is a plan in {self.precision} for {self.backend} and not an INT8 graph"
        if not (self.parity.passed and self.ensemble and self.ensemble.passed):
            return "it did not pass the comparison with the float32 reference"
        if self.options.get("weight_bits") != 7 and not has_vnni():
            return "it was built for a CPU with VNNI, which this CPU does not have"
        return None


def _accepts_version(built: str, installed: str) -> bool:
    """Return whether a version-compatible plan of version `built` runs on `installed`, same or later."""
    old, new = ([int(part) for part in version.split(".")[:2]] for version in (built, installed))
    return old[0] == new[0] and old[1] <= new[1]


def _ampere_or_newer(*capabilities: str) -> bool:
    return all(float(capability) >= 8 for capability in capabilities)


@dataclass(frozen=True)
class Plan:
    """A plan on disk."""

    path: Path
    passport: Passport

    def with_facts(self, **changed: Any) -> Plan:
        """Return the same plan with `changed` fields in its passport."""
        return replace(self, passport=structs.replace(self.passport, **changed))

    def read(self) -> bytes:
        """Read the plan and check its hash against the passport. Raises UsageError."""
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
        """Read the plan as `read` does; an error names the command that rebuilds it."""
        try:
            return self.read()
        except UsageError as error:
            raise UsageError(f"{error}; {self.passport.rebuild(bundle)}") from None


def write_passport(folder: Path, passport: Passport) -> None:
    with atomic(folder / f"{passport.member}.json") as temporary:
        temporary.write_text(to_json(passport))


def load_plan(path: Path) -> Plan:
    """Read a passport and locate its plan. Raises UsageError for an invalid passport."""
    try:
        passport = from_json(path.read_bytes(), Passport)
    except OSError as error:
        raise UsageError(f"plan {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"plan {path}: {error}") from None
    return Plan(path.parent / passport.plan, passport)


def list_targets(bundle: Bundle) -> Iterator[tuple[str, list[Path]]]:
    """List the targets of a bundle that have a passport for every member, newest first."""
    folder = bundle.path / PLANS_FOLDER
    if not folder.is_dir():
        return
    targets = sorted((path for path in folder.iterdir() if path.is_dir()), key=_modified_time, reverse=True)
    for target in targets:
        paths = [target / f"{member.name}.json" for member in bundle.members]
        if all(path.is_file() for path in paths):
            yield target.name, paths


def load_int8_graphs(bundle: Bundle) -> tuple[Plan, ...]:
    """Return the INT8 graph of each member. Raises UsageError with the command that builds them."""
    build = f"python -m build_engines {shlex.quote(str(bundle.path))} --target onnx --precision int8"
    folder = bundle.path / PLANS_FOLDER / INT8_TARGET
    paths = [folder / f"{member.name}.json" for member in bundle.members]
    if not all(path.is_file() for path in paths):
        raise UsageError(f"--precision int8: the bundle has no INT8 graphs; build them with: {build}")
    try:
        graphs = tuple(load_plan(path) for path in paths)
    except UsageError as error:
        raise UsageError(f"{error}; build it again with: {build}") from None
    for member, plan in zip(bundle.members, graphs, strict=True):
        if problem := plan.passport.cpu_problem(member):
            raise UsageError(f"plan {plan.path}: {problem}; build it again with: {build}")
    return graphs


def _modified_time(path: Path) -> float:
    return path.stat().st_mtime
