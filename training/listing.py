"""List labelled images and their classes, from class folders or a table, before any is opened."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.bundle.class_names import CANONICAL, DIGITS, VOCABULARY, ClassNames, label_key
from engine.core.errors import UsageError
from engine.manifest.manifest import Manifest, open_manifest

Labels = npt.NDArray[np.int64]

MIN_PER_CLASS = 3  # one image each for training, validation and test
SETS = ("train", "validation", "test")
_SET_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_LONGEST_NAME = 64  # of a class: what a bundle holds


@dataclass(frozen=True)
class ImageListing:
    """Image files with their labels, in sorted or table order."""

    classes: tuple[str, ...]
    paths: list[Path]
    labels: Labels  # [N], positions in `classes`
    patients: list[str | None] | None = None  # [N], None without such a column
    set_names: list[str | None] | None = None  # [N], names of SETS; None without such folders or column
    notes: list[str] = field(default_factory=list)  # files that were skipped and names that were translated

    def __post_init__(self) -> None:
        assert len(self.paths) == len(self.labels)
        _check_names(self.classes)
        check_counts(self.labels, self.classes, "images")


def list_images(
    data: Path,
    *,
    classes: Sequence[str] | None = None,
    path_column: str | None = None,
    label_column: str = "label",
    root: Path | None = None,
) -> ImageListing:
    """List a folder of class folders, or a CSV or Parquet table with path and label. Raises UsageError."""
    if classes is not None and len({label_key(name) for name in classes}) < max(2, len(classes)):
        raise UsageError(f"--classes {' '.join(classes)}: at least two distinct names are needed")
    if data.is_dir():
        return _from_folder(data, classes)
    if not data.exists():
        raise UsageError(f"{data}: no such file or folder; allowed: a folder of class folders, or a CSV")
    return _from_table(open_manifest(data, path_column=path_column, root=root), classes, label_column)


def count_per_class(labels: Labels, classes: Sequence[str]) -> dict[str, int]:
    """Count the images per class, in the order of `classes`."""
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


def check_counts(labels: Labels, classes: Sequence[str], what: str) -> None:
    """Raise UsageError if a class has too few images to split."""
    for name, count in count_per_class(labels, classes).items():
        if count < MIN_PER_CLASS:
            raise UsageError(f"class {name!r} has {count} {what}; at least {MIN_PER_CLASS} are needed")


def _check_names(classes: Sequence[str]) -> None:
    for name in classes:
        if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()):
            raise UsageError(f"class name {name[:80]!r}: allowed: 1 to {_LONGEST_NAME} printable characters")


def _spelled_classes(texts: Iterable[str]) -> ClassNames:
    """Return unknown names as classes, sorted; names that differ only in case are one class."""
    folded = {label_key(name): name.strip() for name in sorted(texts, reverse=True)}
    return ClassNames(sorted(folded.values()), digits=False)


def _clinical_classes(texts: Iterable[str]) -> ClassNames | None:
    """Return the method's classes among the names, when there are two or more of them."""
    keys = {label_key(name) for name in texts}
    digits = {key for key in keys if key.isdigit()} == DIGITS
    present = {CANONICAL[key] for key in keys if key in CANONICAL and (digits or key not in DIGITS)}
    if len(present) < 2:
        return None
    return ClassNames([name for name in VOCABULARY if name in present], digits=digits)


def _notes(names: ClassNames) -> list[str]:
    aliases = names.aliases_used()
    return [f"read {', '.join(aliases)}; to keep the names as they are, set --classes"] if aliases else []


@dataclass(frozen=True)
class _File:
    path: Path
    folders: tuple[str, ...]  # below the root, without the folders of a split
    set_names: str | None


def _from_folder(root: Path, classes: Sequence[str] | None) -> ImageListing:
    files = list(_walk(root))
    folder_names = {name for file in files for name in file.folders}
    names = ClassNames.of(classes) if classes else _clinical_classes(folder_names)
    members = _group_by_class_folder(files, names) if names else _group_by_first_folder(files)
    if names is None:
        names = _spelled_classes({file.folders[depth] for file, depth in members})
    labels = [names.find(file.folders[depth]) for file, depth in members]
    _check_classes(root, names.classes, labels, folder_names, must_have_all=classes is not None)
    notes = _notes(names) + _note_unused_files(root, files, members, allow_beside=classes is not None)
    set_names = [file.set_names for file, _ in members]
    return ImageListing(
        names.classes,
        [file.path for file, _ in members],
        np.array(labels, np.int64),
        set_names=set_names if any(set_names) else None,
        notes=notes,
    )


def _walk(root: Path) -> Iterator[_File]:
    """Yield all files below `root` in sorted order, without hidden ones."""
    for current, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parts = Path(current).relative_to(root).parts
        sets = [_SET_NAMES[name.casefold()] for name in parts if name.casefold() in _SET_NAMES]
        rest = tuple(name for name in parts if name.casefold() not in _SET_NAMES)
        for name in sorted(files):
            if not name.startswith("."):
                yield _File(Path(current, name), rest, sets[-1] if sets else None)


def _group_by_class_folder(files: Sequence[_File], names: ClassNames) -> list[tuple[_File, int]]:
    """Group the files by the deepest folder that has a class's name."""
    members = []
    for file in files:
        depths = [depth for depth, name in enumerate(file.folders) if names.find(name) is not None]
        if depths:
            members.append((file, depths[-1]))
    return members


def _group_by_first_folder(files: Sequence[_File]) -> list[tuple[_File, int]]:
    """Group by unknown names: the classes are the folders of the first level with several folders."""
    inside = [file for file in files if file.folders]
    depth = 0
    while inside and len({file.folders[: depth + 1] for file in inside}) == 1:
        if any(len(file.folders) <= depth + 1 for file in inside):
            break
        depth += 1
    return [(file, depth) for file in inside if len(file.folders) > depth]


def _check_classes(
    root: Path,
    classes: Sequence[str],
    labels: Sequence[int | None],
    folder_names: set[str],
    *,
    must_have_all: bool,
) -> None:
    if must_have_all:
        for position, name in enumerate(classes):
            if position not in labels:
                folders = ", ".join(sorted(folder_names)[:10]) or "none"
                raise UsageError(f"{root}: no class folder {name!r}; its folders are: {folders}")
    if len(set(labels)) < 2:
        listed = ", ".join(classes) or "none"
        raise UsageError(f"{root}: at least two class folders with images are needed; there are: {listed}")


def _note_unused_files(
    root: Path, files: Sequence[_File], members: Sequence[tuple[_File, int]], *, allow_beside: bool
) -> list[str]:
    """Return a note on files without a class. Raises UsageError if their folder is beside class folders."""
    used = {file.path for file, _ in members}
    rest = [file for file in files if file.path not in used]
    if not rest:
        return []
    above = {file.folders[:depth] for file, depth in members}
    beside = sorted(
        folder for file in rest for depth, folder in enumerate(file.folders) if file.folders[:depth] in above
    )
    if beside and not allow_beside:
        raise UsageError(
            f"{root}: folder {beside[0]!r} is beside class folders, but its name is not a known class; "
            "name all classes with --classes"
        )
    folders = Counter("/".join(file.folders) or "." for file in rest)
    shown = ", ".join(f"{name} ({count})" for name, count in sorted(folders.items())[:5])
    return [f"skipped {len(rest)} files outside the class folders, in: {shown}"]


def _from_table(manifest: Manifest, classes: Sequence[str] | None, label_column: str) -> ImageListing:
    source = manifest.source
    if label_column not in manifest.columns.names:
        others = ", ".join(map(repr, manifest.columns.names[:10])) or "only paths"
        raise UsageError(
            f"{source}: no column {label_column!r}; it has {others}; name one with --label-column"
        )
    paths: list[Path] = []
    columns: dict[str, list[str]] = {label_column: [], "patient": [], "split": []}
    for part in manifest.parts(65_536):
        paths += [manifest.root / (path or "") for path in part.paths]
        for name, cells in columns.items():
            if name in part.columns.column_names:
                cells += _to_texts(part.columns.column(name))
    texts = columns[label_column]
    names = (ClassNames.of(classes) if classes else _clinical_classes(texts)) or _spelled_classes(
        set(texts) - {""}
    )
    labels = [_parse_label(source, row, text, names) for row, text in enumerate(texts)]
    if len(names.classes) < 2:
        raise UsageError(f"{source}: at least two labels are needed; there are: {', '.join(names.classes)}")
    return ImageListing(
        names.classes,
        paths,
        np.array(labels, np.int64),
        patients=[text or None for text in columns["patient"]] or None,
        set_names=[_parse_set_name(source, row, text) for row, text in enumerate(columns["split"])] or None,
        notes=_notes(names),
    )


def _to_texts(column: pa.ChunkedArray) -> list[str]:
    return ["" if value is None else str(value).strip() for value in column.to_pylist()]


def _parse_label(source: Path, row: int, text: str, names: ClassNames) -> int:
    position = names.find(text)
    if position is None:
        raise UsageError(f"{source}: row {row + 1}: {names.error_for(text)}")
    return position


def _parse_set_name(source: Path, row: int, text: str) -> str:
    try:
        return _SET_NAMES[text.casefold()]
    except KeyError:
        raise UsageError(
            f"{source}: row {row + 1}: split {text[:80]!r}; allowed: {', '.join(SETS)}"
        ) from None
