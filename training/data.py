"""Class folders to labelled pixels, and their stratified split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.errors import UsageError

Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

MIN_PER_CLASS = 3  # one image each for training, validation and test


@dataclass(frozen=True)
class Listing:
    """Image files and what they show, before anything is decoded."""

    classes: tuple[str, ...]
    paths: list[Path]
    labels: Labels  # [N], positions in `classes`


@dataclass(frozen=True)
class Dataset:
    """What decoded, as the engine's preprocess graph gives it."""

    classes: tuple[str, ...]
    paths: list[Path]
    labels: Labels  # [N]
    pixels: Pixels  # [N, 1, H, W]
    failures: list[tuple[Path, str]]  # what did not decode, with a one-line reason

    def __post_init__(self) -> None:
        assert len(self.paths) == len(self.labels) == len(self.pixels)


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of positions in a dataset, sorted."""

    train: Labels
    validation: Labels
    test: Labels

    def named(self) -> Sequence[tuple[str, Labels]]:
        return ("train", self.train), ("validation", self.validation), ("test", self.test)


def scan(folder: Path, *, classes: Sequence[str] | None = None) -> Listing:
    """List the files of a folder of class folders, in sorted order; hidden files are left out.

    The class list is `classes`, in that order, or the sorted folder names. Raises UsageError.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected a folder with one folder of images per class")
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name))
    chosen = tuple(classes or found)
    absent = [name for name in chosen if name not in found]
    if absent:
        raise UsageError(f"{folder}: no class folder {absent[0]!r}; it has: {', '.join(found) or 'none'}")
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        listed = ", ".join(chosen) or "none"
        raise UsageError(f"{folder}: two or more distinct class folders are needed, found: {listed}")
    files = [_files(folder / name) for name in chosen]
    labels = np.repeat(np.arange(len(chosen)), [len(group) for group in files])
    _check_counts(labels, chosen, "images")
    return Listing(chosen, [path for group in files for path in group], labels)


def load(listing: Listing, *, size: tuple[int, int]) -> Dataset:
    """Decode everything at `size` = (height, width). Raises UsageError when a class has too few left."""
    from engine.preprocess.stage import load_pixels

    loaded = load_pixels(listing.paths, size=size)
    labels = listing.labels[loaded.index]
    _check_counts(labels, listing.classes, "readable images")
    return Dataset(
        classes=listing.classes,
        paths=[listing.paths[position] for position in loaded.index],
        labels=labels,
        pixels=loaded.pixels,
        failures=[
            (listing.paths[position], f"{status}: {error}") for position, status, error in loaded.failures
        ],
    )


def split(labels: Labels, *, seed: int, shares: tuple[float, float] = (0.15, 0.15)) -> Split:
    """Cut every class by itself into train, validation and test; `shares` are those of the last two.

    Each class gives at least one image to each set, so that a class of three is still in all of them.
    """
    random = np.random.default_rng(seed)
    sets: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        validation, test = (max(1, round(share * len(members))) for share in shares)
        cuts = np.split(members, [len(members) - validation - test, len(members) - test])
        for chosen, cut in zip(sets, cuts, strict=True):
            chosen.extend(cut)
    return Split(*(np.sort(np.array(chosen, np.int64)) for chosen in sets))


def counts(labels: Labels, classes: Sequence[str]) -> dict[str, int]:
    """Images per class, in the order of `classes`."""
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


def _check_counts(labels: Labels, classes: Sequence[str], what: str) -> None:
    for name, count in counts(labels, classes).items():
        if count < MIN_PER_CLASS:
            raise UsageError(f"class {name!r} has {count} {what}; at least {MIN_PER_CLASS} are needed")


def _files(folder: Path) -> list[Path]:
    inside = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in inside if not any(map(_hidden, path.relative_to(folder).parts)))


def _hidden(name: str) -> bool:
    return name.startswith(".")
