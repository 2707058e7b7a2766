"""Pictures inside the page: thumbnails made from the images, overlays that `engine.explain` left."""

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

SIDE = 192  # pixels of a thumbnail, before it gets its image's shape
MAX_PICTURE_BYTES = 4 << 20  # of an overlay
MAX_OVERLAY_BYTES = 48 << 20  # bytes of all overlays; a browser has to hold the page
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
    named: str  # the class
    voters: dict[str, Picture]


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read_thumbnails(
    results: ResultsFolder, rows: Iterable[Mapping[str, Any]], *, say: OnMessage
) -> dict[int, Picture]:
    """Read thumbnails of `rows` by their number; `say` names the images that cannot be read."""
    by_root: dict[str, list[Mapping[str, Any]]] = {}
    most = 0
    for row in rows:
        run = results.runs[row.get("run_id") or next(iter(results.runs))]
        most = max(most, run.result_options.max_pixels)
        by_root.setdefault(run.result_options.root, []).append(row)
    found = {}
    for root, wanted in by_root.items():
        try:
            loaded = load_pixels(
                [row["path"] for row in wanted],
                root=parse(root),
                size=(SIDE, SIDE),
                limits=replace(Limits(), max_pixels=most),
            )
        except EngineError as error:  # storage that is gone
            say(f"{len(wanted)} thumbnails are left out: {error}")
            continue
        for pixels, place, header in zip(loaded.pixels, loaded.index, loaded.headers, strict=True):
            turned = header.orientation >= 5  # EXIF: lies on its side
            width, height = (header.height, header.width) if turned else (header.width, header.height)
            scale = SIDE / max(width, height)
            found[wanted[place]["row"]] = Picture(
                _data_url("jpeg", _encode_jpeg(pixels)),
                max(1, round(width * scale)),
                max(1, round(height * scale)),
            )
        if loaded.failures:
            say(f"{len(loaded.failures)} of {len(wanted)} images give no thumbnail: {loaded.failures[0][2]}")
    return found


def read_explanations(results: ResultsFolder, *, say: OnMessage) -> tuple[str, list[ExplainedRow]]:
    """Read the method and the overlays of the folder `explanations`, if they belong to this run."""
    if isinstance(results.run, MergedRecord):  # rows have other numbers
        return "", []
    folder = open_folder(results.place / EXPLANATIONS_FOLDER)
    try:
        if INDEX_FILE not in folder.names():
            return "", []
        index = from_json(folder.read(INDEX_FILE, lambda opened: opened.read()), ExplanationIndex)
        if index.run_id not in results.runs:
            say(f"{EXPLANATIONS_FOLDER}/ is of another run: left out")
            return "", []
        found, left = list[ExplainedRow](), MAX_OVERLAY_BYTES
        for place, one in enumerate(index.rows):
            voters = {}
            for voter, name in one.voters.items():
                if not _NAME.fullmatch(name):
                    continue
                data = folder.read(name, lambda opened: opened.read(MAX_PICTURE_BYTES))
                left -= len(data)
                if left < 0:
                    rest = len(index.rows) - place
                    say(
                        f"the first {place} explanations are on the page, {rest} more in "
                        f"{EXPLANATIONS_FOLDER}/"
                    )
                    return index.method, found
                voters[voter] = _read_overlay(data)
            found.append(ExplainedRow(one.row, printable(one.of_class), printable(voters)))
        return index.method, found
    except OSError as error:
        say(f"{EXPLANATIONS_FOLDER}/ is left out: {error_text(error)}")
    except ValueError as error:
        say(f"{EXPLANATIONS_FOLDER}/{INDEX_FILE} is left out: it is not what engine.explain writes ({error})")
    return "", []


def _encode_jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode [1, H, W] as JPEG."""
    gray = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return bytes(simplejpeg.encode_jpeg(gray, 85, colorspace="GRAY", colorsubsampling="Gray"))


def _read_overlay(data: bytes) -> Picture:
    """Raises ValueError for what is no PNG."""
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    if not (data.startswith(_PNG) and width and height and len(data) < MAX_PICTURE_BYTES):
        raise ValueError("no PNG")
    return Picture(_data_url("png", data), width, height)
