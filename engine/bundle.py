"""The model folder: load it, check every field and every hash. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.distance import OUTPUT
from engine.ensemble import fuse
from engine.errors import UsageError
from engine.settings import DECODES, Decode
from engine.store import atomic
from engine.triage import OperatingPoints

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FORMAT = 1
DESCRIPTION = "ensemble.json"
_MEMBER_NAME = re.compile(r"[a-z0-9_]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SIDE = 8192
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    """An ensemble as trained: what it tells apart, what it eats, who votes with which weight."""

    path: Path
    classes: tuple[str, ...]
    size: tuple[int, int]  # height, width of the pixels [N, 1, H, W]
    normalization: Literal["none", "imagenet"]  # after the division by 255, inside the graphs
    decode: Decode  # of the images it was trained on
    temperature: float
    members: tuple[Member, ...]
    canaries: BundleFile
    groups: dict[str, tuple[str, ...]]  # of classes that are also looked at as one, by name
    operating_points: OperatingPoints | None
    sha256: str  # of ensemble.json, which holds the hashes of all other files

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(member.weight for member in self.members)

    @property
    def target(self) -> str:
        """The class whose probability ranks rows."""
        return self.operating_points.target if self.operating_points else self.classes[-1]


def load(path: Path) -> Bundle:
    """Load a bundle and check the hash of each of its files.

    Raises UsageError, one line, for a bundle that is missing, half-written, altered or makes no sense.
    """
    description = path / DESCRIPTION
    try:
        raw = description.read_bytes()
    except OSError as error:
        hint = f"give a model folder, or make one with: python -m training DATA -o {path}"
        missing = isinstance(error, FileNotFoundError)
        why = f"no {DESCRIPTION} there" if missing else f"{DESCRIPTION}: {error.strerror}"
        raise UsageError(f"bundle {path}: {why}; {hint}") from None
    try:
        bundle = _parse(path, json.loads(raw), hashlib.sha256(raw).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"bundle {path}: {DESCRIPTION}: {_one_line(reason)}") from None
    _check_hashes(bundle)
    return bundle


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _parse(path: Path, data: dict[str, Any], sha256: str) -> Bundle:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not an ensemble description of format {FORMAT}")
    members = tuple(_member(path, entry) for entry in data["members"])
    _expect(len(members) > 0, "members is empty")
    names = [member.name for member in members]
    _expect(len(set(names)) == len(names), f"members have the same name: {', '.join(names)}")
    total = sum(member.weight for member in members)
    _expect(abs(total - 1) < 1e-6, f"weights add up to {total:g}, not to 1")
    shape = data["input"]
    _expect(
        shape.get("channels") == 1 and shape.get("dtype") == "uint8",
        f"input {shape} is not uint8 with 1 channel",
    )
    size = tuple(shape[side] for side in ("height", "width"))
    _expect(all(type(side) is int and 1 <= side <= _MAX_SIDE for side in size), f"input of size {size}")
    _expect(data["decode"] in DECODES, f"decode {data['decode']!r}; allowed: {', '.join(DECODES)}")
    classes = _classes(data["classes"])
    temperature = _positive("temperature", data["temperature"])
    points = data.get("operating_points")
    return Bundle(
        path,
        classes,
        (size[0], size[1]),
        _normalization(shape.get("normalization")),
        data["decode"],
        temperature,
        members,
        _file(path, data["canaries"]),
        _groups(data.get("groups", {}), classes),
        None if points is None else _operating_points(points, classes, members, temperature),
        sha256,
    )


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _classes(values: Iterable[Any]) -> tuple[str, ...]:
    classes = tuple(values)
    fine = all(isinstance(name, str) and 0 < len(name) <= 64 and name.isprintable() for name in classes)
    _expect(
        fine and len(set(classes)) == len(classes) >= 2, f"classes {classes!r}: two or more distinct names"
    )
    return classes


def _groups(entry: Any, classes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    _expect(isinstance(entry, dict), f"groups {entry!r} are not classes by name")
    for name, members in entry.items():
        _expect(
            bool(_MEMBER_NAME.fullmatch(name)) and name not in classes,
            f"group name {name!r}; allowed: a-z, 0-9 and _, no class's name",
        )
        fine = isinstance(members, list) and members and all(one in classes for one in members)
        _expect(
            bool(fine) and len(set(members)) == len(members),
            f"group {name}: {members!r}; allowed: some of {', '.join(classes)}",
        )
    return {name: tuple(members) for name, members in entry.items()}


def _operating_points(
    section: Any, classes: tuple[str, ...], members: tuple[Member, ...], temperature: float
) -> OperatingPoints:
    names = [member.name for member in members]
    points = OperatingPoints.parse(section, classes, names, temperature)
    for member in members:
        _expect(not points.distances or OUTPUT in member.files, f"{member.name}: files has no {OUTPUT}")
    return points


def _normalization(value: Any) -> Literal["none", "imagenet"]:
    if value is None:
        return "none"
    _expect(value == {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}, f"normalization {value!r}")
    return "imagenet"


def _positive(name: str, value: Any) -> float:
    fine = type(value) in (int, float) and math.isfinite(value) and value > 0
    _expect(fine, f"{name} {value!r} is not a positive number")
    return float(value)


def _member(path: Path, entry: dict[str, Any]) -> Member:
    name, weight = entry["name"], entry["weight"]
    _expect(bool(_MEMBER_NAME.fullmatch(name)), f"member name {name!r}; allowed: a-z, 0-9 and _")
    _expect(type(weight) in (int, float) and 0 <= weight <= 1, f"{name}: weight {weight!r} is not in [0, 1]")
    _expect("onnx" in entry["files"], f"{name}: files has no onnx")
    return Member(
        name,
        str(entry["architecture"]),
        float(weight),
        _positive(f"{name}: temperature", entry["temperature"]),
        {kind: _file(path, file) for kind, file in entry["files"].items()},
    )


def _file(bundle: Path, entry: dict[str, Any]) -> BundleFile:
    name, sha256 = entry["path"], entry["sha256"]
    _expect(bool(_SHA256.fullmatch(sha256)), f"{name}: sha256 {sha256!r}")
    relative = Path(name)
    inside = not relative.is_absolute() and ".." not in relative.parts and relative.parts
    _expect(bool(inside), f"file {name!r} is outside the bundle")
    return BundleFile(bundle / relative, sha256)


def load_canaries(bundle: Bundle) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Pixels uint8 [N, 1, H, W] and their reference probabilities float32 [N, C]. Raises UsageError.

    The file holds the members' reference logits [M, N, C]: what follows from them depends on the temperature.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(bundle.canaries.path)
        pixels, logits = arrays["pixels"], arrays["logits"]
    except (SafetensorError, KeyError, OSError) as error:
        problem = _one_line(str(error))
        raise UsageError(
            f"bundle {bundle.path}: its canaries can't be read ({problem}); train it again"
        ) from None
    found = [(str(array.dtype), array.shape) for array in (pixels, logits)]
    rows = len(pixels)
    if not rows or found != [
        ("uint8", (rows, 1, *bundle.size)),
        ("float32", (len(bundle.members), rows, len(bundle.classes))),
    ]:
        raise UsageError(f"bundle {bundle.path}: its canaries are {found}; train it again")
    _, expected = fuse(
        logits,
        weights=bundle.weights,
        temperatures=[member.temperature for member in bundle.members],
        temperature=bundle.temperature,
    )
    return pixels, expected


def revise(bundle: Bundle, changed: dict[str, Any], distances: Mapping[str, bytes] | None = None) -> Bundle:
    """Replace fields of ensemble.json, atomically; the bundle as it is then, with another hash.

    `distances` are what `engine.distance.nodes_of` gives, by member; without, the members have none any more.
    Raises UsageError, and nothing is written, when the file is not the one that was loaded.
    """
    file = bundle.path / DESCRIPTION
    raw = file.read_bytes()
    if hashlib.sha256(raw).hexdigest() != bundle.sha256:
        raise UsageError(f"bundle {bundle.path}: {DESCRIPTION} was changed meanwhile; try again")
    data = json.loads(raw) | changed
    for entry in data["members"]:
        entry["files"].pop(OUTPUT, None)
        if distances:
            nodes = distances[entry["name"]]
            digest = hashlib.sha256(nodes).hexdigest()
            name = f"{entry['name']}.{OUTPUT}-{digest[:12]}.onnx"  # never that of a file in use
            with atomic(bundle.path / name) as temporary:
                temporary.write_bytes(nodes)
            entry["files"][OUTPUT] = {"path": name, "sha256": digest}
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    revised = _parse(bundle.path, json.loads(text), hashlib.sha256(text.encode()).hexdigest())
    with atomic(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    used = {member.files[OUTPUT].path for member in revised.members if OUTPUT in member.files}
    for path in bundle.path.glob(f"*.{OUTPUT}-*.onnx"):
        if path not in used:
            path.unlink(missing_ok=True)
    return revised


def _check_hashes(bundle: Bundle) -> None:
    files = [file for member in bundle.members for file in member.files.values()] + [bundle.canaries]
    with ThreadPoolExecutor(4) as pool:
        for file, problem in zip(files, pool.map(_problem, files), strict=True):
            if problem:
                raise UsageError(f"bundle {bundle.path}: {file.path.name}: {problem}")


def _problem(file: BundleFile) -> str | None:
    try:
        with file.path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return f"{error.strerror}; the bundle is incomplete, make or copy it again"
    if digest != file.sha256:
        return f"altered: sha256 is {digest[:12]}, ensemble.json says {file.sha256[:12]}"
    return None
