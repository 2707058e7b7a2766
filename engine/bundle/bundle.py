"""Load the model folder and check every field and every hash; nothing is unpickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import replace

from engine.bundle.class_names import class_groups
from engine.bundle.operating_points import OperatingPoints
from engine.core.errors import UsageError
from engine.core.json_records import Fraction, Positive, Record, Sha256, from_json, text, to_json
from engine.core.settings import Decode
from engine.storage.atomic import atomic

DISTANCE_OUTPUT = "distance"  # float32 [N], about 1 for images like those it was fitted to
FORMAT_VERSION: Literal[1] = 1
DESCRIPTION_FILE = "ensemble.json"
Name = Annotated[str, text("[a-z0-9_]{1,64}", "a name of a-z, 0-9 and _")]
Side = Annotated[int, Meta(ge=1, le=8192)]  # pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FileEntry(Record):
    """A file of the bundle, as ensemble.json names it."""

    path: str
    sha256: Sha256

    def __post_init__(self) -> None:
        path = Path(self.path)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in self.path:
            raise ValueError(f"file {self.path!r} is outside the bundle")


class Normalization(Record):
    """The normalization after the division by 255, inside the graphs."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError(f"mean {self.mean}, std {self.std}; allowed: {IMAGENET_MEAN}, {IMAGENET_STD}")


class InputEntry(Record):
    """The input of the graphs: pixels uint8 [N, 1, H, W]."""

    height: Side
    width: Side
    channels: Literal[1]
    dtype: Literal["uint8"]
    normalization: Normalization | None = None


class MemberEntry(Record):
    """A member, as ensemble.json describes it."""

    name: Name
    architecture: str
    weight: Fraction
    temperature: Positive
    files: dict[str, FileEntry]  # by kind: "onnx", "safetensors", DISTANCE_OUTPUT

    def __post_init__(self) -> None:
        if "onnx" not in self.files:
            raise ValueError(f"{self.name}: files has no onnx")


class EnsembleDescription(Record, kw_only=True):
    """`ensemble.json`. `training` describes how the bundle was made; the engine does not read it."""

    format: Literal[1]
    classes: tuple[str, ...]
    groups: dict[Name, tuple[str, ...]] = field(
        default_factory=dict
    )  # classes that are also evaluated as one
    input: InputEntry
    decode: Decode
    temperature: Positive
    members: tuple[MemberEntry, ...]
    canaries: FileEntry
    documents: tuple[FileEntry, ...] = ()  # for readers, not for the engine
    training: dict[str, Any] = field(default_factory=dict)
    operating_points: OperatingPoints | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if not names:
            raise ValueError("members is empty")
        if len(set(names)) < len(names):
            raise ValueError(f"members have the same name: {', '.join(names)}")
        total = sum(member.weight for member in self.members)
        if not abs(total - 1) < 1e-6:
            raise ValueError(f"weights add up to {total:g}, not to 1")
        valid_names = all(0 < len(name) <= 64 and name.isprintable() for name in self.classes)
        if not (valid_names and len(set(self.classes)) == len(self.classes) >= 2):
            raise ValueError(f"classes {list(self.classes)}; allowed: two or more distinct names")
        for group, members in self.groups.items():
            if group in self.classes:
                raise ValueError(f"group {group} has the name of a class")
            if not members or not set(members) <= set(self.classes) or len(set(members)) < len(members):
                raise ValueError(
                    f"group {group}: {list(members)}; allowed: some of {', '.join(self.classes)}"
                )
        if self.operating_points:
            self._check_points(self.operating_points, names)

    def _check_points(self, points: OperatingPoints, names: list[str]) -> None:
        try:
            points.check_bundle(self.classes, names, self.temperature)
        except ValueError as error:
            raise ValueError(f"operating_points: {error}") from None
        for member in self.members:
            if points.distances and DISTANCE_OUTPUT not in member.files:
                raise ValueError(f"{member.name}: files has no {DISTANCE_OUTPUT}")


@dataclass(frozen=True)
class BundleFile:
    path: Path
    sha256: str


@dataclass(frozen=True)
class Member:
    name: str
    architecture: str
    weight: float
    temperature: float
    files: dict[str, BundleFile]  # by kind: "onnx", "safetensors"


@dataclass(frozen=True)
class Bundle:
    """A trained ensemble: classes, input size and normalization, members and their weights."""

    path: Path
    classes: tuple[str, ...]
    size: tuple[int, int]  # height, width of the pixels [N, 1, H, W]
    normalization: Literal["none", "imagenet"]  # after the division by 255, inside the graphs
    decode: Decode  # of the images it was trained on
    temperature: float
    members: tuple[Member, ...]
    canaries: BundleFile
    groups: dict[str, tuple[str, ...]]  # classes that are also evaluated as one, by name
    operating_points: OperatingPoints | None
    sha256: str  # of ensemble.json, which holds the hashes of all other files

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(member.weight for member in self.members)

    @property
    def target(self) -> str:
        """Return the class whose probability ranks rows."""
        return self.operating_points.target if self.operating_points else self.classes[-1]


def load_bundle(path: Path) -> Bundle:
    """Load a bundle and check the hash of each of its files.

    Raises UsageError, one line, for a bundle that is missing, incomplete, altered or inconsistent.
    """
    description = path / DESCRIPTION_FILE
    try:
        raw = description.read_bytes()
    except OSError as error:
        hint = f"give a model folder, or make one with: python -m training DATA -o {path}"
        missing = isinstance(error, FileNotFoundError)
        reason = f"it has no {DESCRIPTION_FILE}" if missing else f"{DESCRIPTION_FILE}: {error.strerror}"
        raise UsageError(f"bundle {path}: {reason}; {hint}") from None
    bundle = _parse(path, raw)
    _check_hashes(bundle)
    return bundle


def serialize(description: EnsembleDescription) -> bytes:
    """Return the bytes of ensemble.json."""
    return to_json(description, ascii_only=False).encode()


def _parse(path: Path, raw: bytes) -> Bundle:
    """Return the bundle that ensemble.json describes. Raises UsageError."""
    try:
        description = from_json(raw, EnsembleDescription)
    except ValueError as error:
        raise UsageError(f"bundle {path}: {DESCRIPTION_FILE}: {error}") from None

    def file(entry: FileEntry) -> BundleFile:
        return BundleFile(path / entry.path, entry.sha256)

    return Bundle(
        path,
        description.classes,
        (description.input.height, description.input.width),
        "imagenet" if description.input.normalization else "none",
        description.decode,
        description.temperature,
        tuple(
            Member(
                member.name,
                member.architecture,
                member.weight,
                member.temperature,
                {kind: file(entry) for kind, entry in member.files.items()},
            )
            for member in description.members
        ),
        file(description.canaries),
        description.groups,
        description.operating_points or None,
        hashlib.sha256(raw).hexdigest(),
    )


def update_bundle(
    bundle: Bundle, points: OperatingPoints, distances: Mapping[str, bytes] | None = None
) -> Bundle:
    """Write operating points and their temperature into ensemble.json, atomically; return the new bundle.

    `distances` has the bytes of `distance_subgraph` by member; without it, members lose theirs. A bundle
    without groups gets them. Raises UsageError, and writes nothing, if the file has changed since loading.
    """
    file = bundle.path / DESCRIPTION_FILE
    raw = file.read_bytes()
    if hashlib.sha256(raw).hexdigest() != bundle.sha256:
        raise UsageError(f"bundle {bundle.path}: {DESCRIPTION_FILE} was changed meanwhile; try again")
    before = from_json(raw, EnsembleDescription)
    members = []
    for member in before.members:
        files = {kind: entry for kind, entry in member.files.items() if kind != DISTANCE_OUTPUT}
        if distances:
            files[DISTANCE_OUTPUT] = _write_nodes(bundle.path, member.name, distances[member.name])
        members.append(replace(member, files=files))
    after = replace(
        before,
        groups=before.groups or class_groups(before.classes),
        temperature=points.temperature.value,
        members=tuple(members),
        operating_points=points,
    )
    written = serialize(after)
    revised = _parse(bundle.path, written)
    with atomic(file) as temporary:
        temporary.write_bytes(written)
    used = {
        member.files[DISTANCE_OUTPUT].path for member in revised.members if DISTANCE_OUTPUT in member.files
    }
    for path in bundle.path.glob(f"*.{DISTANCE_OUTPUT}-*.onnx"):
        if path not in used:
            path.unlink(missing_ok=True)
    return revised


def _write_nodes(folder: Path, member: str, nodes: bytes) -> FileEntry:
    digest = hashlib.sha256(nodes).hexdigest()
    name = f"{member}.{DISTANCE_OUTPUT}-{digest[:12]}.onnx"  # a new name, so that no file in use is replaced
    with atomic(folder / name) as temporary:
        temporary.write_bytes(nodes)
    return FileEntry(path=name, sha256=digest)


def _check_hashes(bundle: Bundle) -> None:
    files = [file for member in bundle.members for file in member.files.values()] + [bundle.canaries]
    with ThreadPoolExecutor(4) as pool:
        for file, problem in zip(files, pool.map(_find_mismatch, files), strict=True):
            if problem:
                raise UsageError(f"bundle {bundle.path}: {file.path.name}: {problem}")


def _find_mismatch(file: BundleFile) -> str | None:
    try:
        with file.path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return f"{error.strerror}; the bundle is incomplete: make or copy it again"
    if digest != file.sha256:
        return f"altered: sha256 is {digest[:12]}, ensemble.json says {file.sha256[:12]}"
    return None
