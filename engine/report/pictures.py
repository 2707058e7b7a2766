"""Embed pictures in the page: thumbnails of the images, and the overlays of `engine.explain`."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from engine.core.errors import EngineError
from engine.core.json_records import from_json
from engine.core.location import parse
from engine.core.records import OnMessage
from engine.core.settings import Limits
from engine.pipeline.load_pixels import load_pixels
from engine.report.page import printable
from engine.results import MergedRecord, ResultsFolder
from engine.runs.run_folder import EXPLANATIONS_FOLDER, INDEX_FILE, ExplanationIndex
from engine.storage.folders import error_text
from engine.storage.open_folder import open_folder

SIDE = 192  # pixels of a square thumbnail; the page shows it in the shape of its image
MAX_PICTURE_BYTES = 4 << 20  # of an overlay
MAX_OVERLAY_BYTES = 48 << 20  # of all overlays, so that a browser can show the page
_NAME = re.compile(r"row-\d{9,}-[^/\\]+\.png")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A picture for an `img` element."""

    source: str  # data: URL
    width: int  # CSS pixels
    height: int


@dataclass(frozen=True)
class ExplainedRow:
    row: int
    named: str  # the explained class
    voters: dict[str, Picture]


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read_thumbnails(
    results: ResultsFolder, rows: Iterable[Mapping[str, Any]], *, say: OnMessage
) -> dict[int, Picture]:
    """Read thumbnails of `rows` by their number; `say` names the images that cannot be read."""
    by_root: dict[str, list[Mapping[str, Any]]] = {}
    max_pixels = 0
    for row in rows:
        run = results.runs[row.get("run_id") or next(iter(results.runs))]
        max_pixels = max(max_pixels, run.result_options.max_pixels)
        by_root.setdefault(run.result_options.root, []).append(row)
    thumbnails = {}
    for root, group in by_root.items():
        try:
            loaded = load_pixels(
                [row["path"] for row in group],
                root=parse(root),
                size=(SIDE, SIDE),
                limits=replace(Limits(), max_pixels=max_pixels),
            )
        except EngineError as error:  # storage is lost
            say(f"the report leaves out {len(group)} thumbnails: {error}")
            continue
        for pixels, index, header in zip(loaded.pixels, loaded.index, loaded.headers, strict=True):
            rotated = header.orientation >= 5  # EXIF: by 90 degrees
            width, height = (header.height, header.width) if rotated else (header.width, header.height)
            scale = SIDE / max(width, height)
            thumbnails[group[index]["row"]] = Picture(
                _data_url("jpeg", _encode_jpeg(pixels)),
                max(1, round(width * scale)),
                max(1, round(height * scale)),
            )
        if loaded.failures:
            count = f"{len(loaded.failures)} of {len(group)}"
            say(f"{count} thumbnails are left out: {loaded.failures[0][2]}")
    return thumbnails


def read_explanations(results: ResultsFolder, *, say: OnMessage) -> tuple[str, list[ExplainedRow]]:
    """Read the method and the overlays of the folder `explanations`, if they belong to this run."""
    if isinstance(results.run, MergedRecord):  # its rows have other numbers
        return "", []
    folder = open_folder(results.place / EXPLANATIONS_FOLDER)
    try:
        if INDEX_FILE not in folder.names():
            return "", []
        index = from_json(folder.read(INDEX_FILE, lambda opened: opened.read()), ExplanationIndex)
        if index.run_id not in results.runs:
            say(f"{EXPLANATIONS_FOLDER}/ is left out: it belongs to another run")
            return "", []
        explained, left = list[ExplainedRow](), MAX_OVERLAY_BYTES
        for row in index.rows:
            voters = {}
            for voter, name in row.voters.items():
                if not _NAME.fullmatch(name):
                    continue
                data = folder.read(name, lambda opened: opened.read(MAX_PICTURE_BYTES))
                left -= len(data)
                if left < 0:
                    count = f"{len(explained)} of {len(index.rows)}"
                    say(f"the page shows {count} explanations; {EXPLANATIONS_FOLDER}/ has all")
                    return index.method, explained
                voters[voter] = _read_overlay(data)
            explained.append(ExplainedRow(row.row, printable(row.of_class), printable(voters)))
        return index.method, explained
    except OSError as error:
        say(f"{EXPLANATIONS_FOLDER}/ is left out: {error_text(error)}")
    except ValueError as error:
        say(f"{EXPLANATIONS_FOLDER}/{INDEX_FILE} is left out: it is not an index of engine.explain ({error})")
    return "", []


def _encode_jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode [1, H, W] as JPEG."""
    gray = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return bytes(simplejpeg.encode_jpeg(gray, 85, colorspace="GRAY", colorsubsampling="Gray"))


def _read_overlay(data: bytes) -> Picture:
    """Read a PNG. Raises ValueError for other data."""
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    if not (data.startswith(_PNG) and width and height and len(data) < MAX_PICTURE_BYTES):
        raise ValueError("a picture is not a PNG, or is too large")
    return Picture(_data_url("png", data), width, height)
