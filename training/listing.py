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
    """Image files and what they show, in sorted or table order."""

    classes: tuple[str, ...]
    paths: list[Path]
    labels: Labels  # [N], positions in `classes`
    patients: list[str | None] | None = None  # [N], None without such a column
    given: list[str | None] | None = None  # [N], names of SETS; None without such folders or column
    notes: list[str] = field(default_factory=list)  # what was passed over or read in a special way

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
        raise UsageError(f"--classes {' '.join(classes)}: two or more distinct names")
    if data.is_dir():
        return _from_folder(data, classes)
    if not data.exists():
        raise UsageError(f"{data}: no such file or folder; give a folder of class folders, or a CSV")
    return _from_table(open_manifest(data, path_column=path_column, root=root), classes, label_column)


def count_per_class(labels: Labels, classes: Sequence[str]) -> dict[str, int]:
    """Images per class, in the order of `classes`."""
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


def check_counts(labels: Labels, classes: Sequence[str], what: str) -> None:
    """Raise UsageError for a class with too few to split."""
    for name, count in count_per_class(labels, classes).items():
        if count < MIN_PER_CLASS:
            raise UsageError(f"class {name!r} has {count} {what}; at least {MIN_PER_CLASS} are needed")


def _check_names(classes: Sequence[str]) -> None:
    for name in classes:
        if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()):
            raise UsageError(f"class name {name[:80]!r}: 1 to {_LONGEST_NAME} printable characters")


def _spelled_classes(found: Iterable[str]) -> ClassNames:
    """Names that mean nothing to us, sorted; those that differ in case only are one."""
    folded = {label_key(name): name.strip() for name in sorted(found, reverse=True)}
    return ClassNames(sorted(folded.values()), digits=False)


def _clinical_classes(found: Iterable[str]) -> ClassNames | None:
    """Return the method's classes among the names, when there are two or more of them."""
    keys = {label_key(name) for name in found}
    digits = {one for one in keys if one.isdigit()} == DIGITS
    present = {CANONICAL[one] for one in keys if one in CANONICAL and (digits or one not in DIGITS)}
    if len(present) < 2:
        return None
    return ClassNames([name for name in VOCABULARY if name in present], digits=digits)


def _notes(names: ClassNames) -> list[str]:
    read = names.aliases_used()
    return [f"read {', '.join(read)}; --classes keeps names as they are"] if read else []


@dataclass(frozen=True)
class _File:
    path: Path
    folders: tuple[str, ...]  # below the root, without the folders of a split
    given: str | None


def _from_folder(root: Path, classes: Sequence[str] | None) -> ImageListing:
    files = list(_walk(root))
    every = {name for file in files for name in file.folders}
    names = ClassNames.of(classes) if classes else _clinical_classes(every)
    found = _group_by_class_folder(files, names) if names else _group_by_first_folder(files)
    if names is None:
        names = _spelled_classes({file.folders[place] for file, place in found})
    labels = [names.find(file.folders[place]) for file, place in found]
    _check_found(root, names.classes, labels, every, asked=classes is not None)
    notes = _notes(names) + _note_outside(root, files, found, named=classes is not None)
    given = [file.given for file, _ in found]
    return ImageListing(
        names.classes,
        [file.path for file, _ in found],
        np.array(labels, np.int64),
        given=given if any(given) else None,
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
    found = []
    for file in files:
        places = [place for place, name in enumerate(file.folders) if names.find(name) is not None]
        if places:
            found.append((file, places[-1]))
    return found


def _group_by_first_folder(files: Sequence[_File]) -> list[tuple[_File, int]]:
    """Names that mean nothing to us: the classes are the first folders that are not alone on their level."""
    inside = [file for file in files if file.folders]
    place = 0
    while inside and len({file.folders[: place + 1] for file in inside}) == 1:
        if any(len(file.folders) <= place + 1 for file in inside):
            break
        place += 1
    return [(file, place) for file in inside if len(file.folders) > place]


def _check_found(
    root: Path, classes: Sequence[str], labels: Sequence[int | None], every: set[str], *, asked: bool
) -> None:
    if asked:
        for position, name in enumerate(classes):
            if position not in labels:
                folders = ", ".join(sorted(every)[:10]) or "none"
                raise UsageError(f"{root}: no class folder {name!r}; folders there: {folders}")
    if len(set(labels)) < 2:
        listed = ", ".join(classes) or "none"
        raise UsageError(f"{root}: two or more class folders with images are needed, found: {listed}")


def _note_outside(
    root: Path, files: Sequence[_File], found: Sequence[tuple[_File, int]], *, named: bool
) -> list[str]:
    """Return a note on files that are in no class. Raises UsageError if their folder is beside a class's."""
    used = {file.path for file, _ in found}
    rest = [file for file in files if file.path not in used]
    if not rest:
        return []
    above = {file.folders[:place] for file, place in found}
    beside = sorted(
        folder for file in rest for depth, folder in enumerate(file.folders) if file.folders[:depth] in above
    )
    if beside and not named:
        raise UsageError(
            f"{root}: folder {beside[0]!r} stands beside class folders, but it is no class that I know; "
            "name all classes with --classes"
        )
    folders = Counter("/".join(file.folders) or "." for file in rest)
    shown = ", ".join(f"{name} ({count})" for name, count in sorted(folders.items())[:5])
    return [f"passed over {len(rest)} files outside the class folders, in: {shown}"]


def _from_table(manifest: Manifest, classes: Sequence[str] | None, label_column: str) -> ImageListing:
    source = manifest.source
    if label_column not in manifest.columns.names:
        others = ", ".join(map(repr, manifest.columns.names[:10])) or "only paths"
        raise UsageError(f"{source}: no column {label_column!r}; it has {others}; see --label-column")
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
        raise UsageError(f"{source}: two or more labels are needed, found: {', '.join(names.classes)}")
    return ImageListing(
        names.classes,
        paths,
        np.array(labels, np.int64),
        patients=[text or None for text in columns["patient"]] or None,
        given=[_parse_given(source, row, text) for row, text in enumerate(columns["split"])] or None,
        notes=_notes(names),
    )


def _to_texts(column: pa.ChunkedArray) -> list[str]:
    return ["" if value is None else str(value).strip() for value in column.to_pylist()]


def _parse_label(source: Path, row: int, text: str, names: ClassNames) -> int:
    position = names.find(text)
    if position is None:
        raise UsageError(f"{source}: row {row + 1}: {names.error_for(text)}")
    return position


def _parse_given(source: Path, row: int, text: str) -> str:
    try:
        return _SET_NAMES[text.casefold()]
    except KeyError:
        raise UsageError(
            f"{source}: row {row + 1}: split {text[:80]!r}; allowed: {', '.join(SETS)}"
        ) from None
