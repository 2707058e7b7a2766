"""Make the seeded archive that all contenders screen, with fixed shares of file kinds.

A few synthetic radiographs are drawn. Each file shows one of them turned, mirrored, shifted, with another
contrast and noise, so its decoding cost is realistic and its scores differ from those of other files.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from training import synthetic

DRAWN_PICTURES, DRAWN_SIDE = (
    12,
    512,
)  # radiographs, and their pixels; each file adds its own noise
PARALLEL_FROM = 48  # below this many files, starting processes costs more than it saves
SIDE = 1024
CORRUPT_SHARE = 0.001

Gray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FileKind:
    """A kind of files."""

    name: str
    share: float
    height: tuple[int, int] = (SIDE, SIDE)  # pixels, both ends included
    width: int = SIDE
    colour: bool = False
    suffix: str = ".jpg"
    progressive: bool = False

    def encoded(self, gray: Gray) -> bytes:
        picture = Image.fromarray(tint(gray) if self.colour else gray)
        if self.suffix == ".png":
            return _encode(picture, "PNG")
        return _encode(picture, "JPEG", quality=90, subsampling="4:2:0", progressive=self.progressive)


MIXED = (
    FileKind("gray 1024 x 1024", 0.60),
    FileKind("gray 2048 x 1700 to 2500", 0.20, height=(1700, 2500), width=2048),
    FileKind("gray 512 x 512", 0.10, height=(512, 512), width=512),
    FileKind("RGB 4:2:0", 0.05, colour=True),
    FileKind("gray progressive", 0.03, progressive=True),
    FileKind("gray PNG", 0.02, suffix=".png"),
)
UNIFORM = (FileKind("gray 1024 x 1024", 1.0),)
ARCHIVES = {"mixed": MIXED, "uniform": UNIFORM}


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


# Damage that a careful script can detect. Damage that libjpeg decodes with a warning is not included, because
# only the engine flags it (python -m benchmarks damage).
DAMAGE: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    ("truncated", _truncate),
    ("empty", lambda _: b""),
    ("an HTML page", lambda _: b"<!doctype html><title>404 Not Found</title>\n"),
)


@dataclass(frozen=True)
class ArchiveFile:
    """A row of the archive."""

    row: int
    kind: FileKind
    damage: str = ""  # of DAMAGE; `kind` is that of the undamaged file

    @property
    def path(self) -> str:
        return f"{self.row:06}{self.kind.suffix}"


def plan_files(
    kinds: tuple[FileKind, ...], rows: int, seed: int, corrupt: int | None = None
) -> list[ArchiveFile]:
    """Plan `rows` files in seeded order; `corrupt` of them, else one in a thousand, are corrupt."""
    corrupt = max(1, round(rows * CORRUPT_SHARE)) if corrupt is None else corrupt
    sound = rows - corrupt
    if sound < 1:
        raise ValueError(f"an archive needs at least 2 rows, got {rows}")
    ends = np.rint(np.cumsum([kind.share for kind in kinds]) * sound).astype(int)
    contents = [
        (kind, "")
        for kind, end, start in zip(kinds, ends, [0, *ends], strict=False)
        for _ in range(start, end)
    ]
    contents += [(kinds[0], DAMAGE[index % len(DAMAGE)][0]) for index in range(corrupt)]
    order = np.random.default_rng(seed).permutation(rows)
    return [ArchiveFile(row, *contents[index]) for row, index in enumerate(order)]


def make_archive(folder: Path, name: str, rows: int, seed: int, *, corrupt: int | None = None) -> Path:
    """Make the archive `name` in `folder` unless it exists; return its manifest (path, kind, damage)."""
    target = folder / "-".join(str(part) for part in (name, rows, seed, corrupt) if part is not None)
    if not target.exists():
        unfinished = folder / f".{target.name}"
        unfinished.mkdir(parents=True, exist_ok=True)
        files = plan_files(ARCHIVES[name], rows, seed, corrupt)
        with ExitStack() as stack:
            parallel_map = map
            if rows >= PARALLEL_FROM:
                parallel_map = stack.enter_context(ProcessPoolExecutor(mp_context=get_context("spawn"))).map
            np.save(
                unfinished / "drawn.npy",
                np.stack(list(parallel_map(partial(_draw, seed), range(min(rows, DRAWN_PICTURES))))),
            )
            list(parallel_map(partial(_write, unfinished, seed), files))
        (unfinished / "drawn.npy").unlink()
        _write_manifest(unfinished / "manifest.csv", files)
        unfinished.rename(target)
    return target / "manifest.csv"


def _draw(seed: int, index: int) -> Gray:
    return synthetic.draw_sample(seed, index, size_range=(DRAWN_SIDE, DRAWN_SIDE)).pixels8


def _write(folder: Path, seed: int, file: ArchiveFile) -> None:
    drawn = np.load(folder / "drawn.npy", mmap_mode="r")
    rng = np.random.default_rng([seed, file.row])
    data = file.kind.encoded(vary_picture(rng, drawn[rng.integers(len(drawn))], file.kind))
    (folder / file.path).write_bytes(dict(DAMAGE).get(file.damage, bytes)(data))


def vary_picture(rng: np.random.Generator, drawn: Gray, kind: FileKind) -> Gray:
    """Return a unique variant [H, W] of a radiograph."""
    turned = np.rot90(drawn, rng.integers(4))[:: rng.choice((-1, 1))]
    height = int(rng.integers(*kind.height, endpoint=True))
    side, margin = len(drawn), len(drawn) // 8
    left, top = rng.integers(0, margin, 2).tolist()
    box = (left, top, side - margin + left, side - margin + top)
    resized = Image.fromarray(turned).resize((kind.width, height), Image.Resampling.BICUBIC, box)
    samples = np.asarray(resized, np.float32)
    samples = 255 * (samples / 255) ** np.float32(rng.uniform(0.7, 1.4)) * np.float32(rng.uniform(0.8, 1.0))
    samples += rng.standard_normal(samples.shape, np.float32) * np.float32(rng.uniform(1, 4))
    return np.clip(np.rint(samples), 0, 255).astype(np.uint8)


def tint(gray: Gray) -> Gray:
    """Tint [H, W] to [H, W, 3], bluish like a scanned film."""
    return np.rint(gray[..., None] * np.array([0.93, 0.97, 1.0], np.float32)).astype(np.uint8)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _write_manifest(path: Path, files: list[ArchiveFile]) -> None:
    with path.open("w", newline="") as lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(["path", "kind", "damage"])
        table.writerows([file.path, file.kind.name, file.damage] for file in files)
