"""Load listed images as the engine preprocesses them, with facts about their files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.core.records import Header
from engine.core.settings import Decode
from engine.pipeline.load_pixels import load_pixels
from training.listing import ImageListing, Labels, check_counts

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int], None]  # called with the number of images, batches or epochs just done


@dataclass(frozen=True)
class FileFacts:
    """The properties of a file besides its picture, which should not reveal the class."""

    width: int
    height: int
    bytes: int
    mode: str  # Pillow's: L, RGB, I;16, ...; or DICOM's
    format: str


@dataclass(frozen=True)
class Dataset:
    """The decoded images, in the order of the listing."""

    classes: tuple[str, ...]
    paths: list[Path]
    labels: Labels  # [N]
    pixels: Pixels  # [N, 1, H, W]
    facts: list[FileFacts]  # [N]
    hashes: list[str]  # [N], sha256 of the files
    patients: list[str | None] | None  # [N]
    set_names: list[str | None] | None  # [N], names of sets
    failures: list[tuple[Path, str, str]]  # files that did not decode: path, status, one-line reason

    def __post_init__(self) -> None:
        assert len(self.paths) == len(self.labels) == len(self.pixels) == len(self.facts) == len(self.hashes)

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"Dataset({len(self)} images of {', '.join(self.classes)})"

    @property
    def sha256(self) -> str:
        """Hash everything that determines a training: files in order, labels, patients, sets."""
        content = (self.classes, self.labels.tolist(), self.hashes, self.patients, self.set_names)
        return hashlib.sha256(repr(content).encode("utf-8", "backslashreplace")).hexdigest()

    def take(self, positions: Labels) -> Dataset:
        """Return the images at `positions`, in that order."""
        chosen = {
            field.name: [getattr(self, field.name)[position] for position in positions]
            for field in fields(self)
            if field.name in ("paths", "facts", "hashes", "patients", "set_names")
            and getattr(self, field.name) is not None
        }
        return replace(self, labels=self.labels[positions], pixels=self.pixels[positions], **chosen)


def load_dataset(
    listing: ImageListing, *, size: tuple[int, int], decode: Decode = "exact", progress: Progress
) -> Dataset:
    """Decode all images at `size` = (height, width). Raises UsageError if a class has too few."""
    loaded = load_pixels(listing.paths, size=size, decode=decode, progress=progress)
    labels = listing.labels[loaded.index]
    check_counts(labels, listing.classes, "readable images")
    paths = [listing.paths[position] for position in loaded.index]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decompressed
        facts_and_hashes = [
            _read_facts(path, header) for path, header in zip(paths, loaded.headers, strict=True)
        ]
    return Dataset(
        classes=listing.classes,
        paths=paths,
        labels=labels,
        pixels=loaded.pixels,
        facts=[facts for facts, _ in facts_and_hashes],
        hashes=[sha256 for _, sha256 in facts_and_hashes],
        patients=_take_positions(listing.patients, loaded.index),
        set_names=_take_positions(listing.set_names, loaded.index),
        failures=[(listing.paths[position], *reason) for position, *reason in loaded.failures],
    )


def _take_positions(values: Sequence[str | None] | None, positions: Labels) -> list[str | None] | None:
    return None if values is None else [values[position] for position in positions]


def _read_facts(path: Path, header: Header) -> tuple[FileFacts, str]:
    data = path.read_bytes()
    return (
        FileFacts(
            header.width, header.height, len(data), header.photometric or _pillow_mode(path), header.format
        ),
        hashlib.sha256(data).hexdigest(),
    )


def _pillow_mode(path: Path) -> str:
    """Return Pillow's mode of the image, from the header."""
    try:
        with Image.open(path) as image:
            return image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unknown"
