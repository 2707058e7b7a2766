"""Folders and archives to lists of images: lazily, in one order, with what was left out counted.

A list is a Parquet file of the columns in SCHEMA; its metadata hold the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pathspec import PathSpec

from engine import header
from engine.cli.terminal import run_command
from engine.command import Parser
from engine.errors import EngineError, UsageError
from engine.overlap import ordered_map
from engine.settings import parse_location
from engine.storage import ReadError, Url, archive
from engine.storage.location import HTTP_SCHEMES
from engine.store import atomic

PATH, SIZE, MODIFIED = "path", "file_size", "file_mtime"
_FIELDS: list[pa.Field[Any]] = [
    pa.field(PATH, pa.string()),
    pa.field(SIZE, pa.int64()),
    pa.field(MODIFIED, pa.timestamp("us", tz="UTC")),
]
SCHEMA = pa.schema(_FIELDS)
LOOKS_LIKE_IMAGE = re.compile(
    r"\.(jpe?g|png|dcm|dicom|tiff?|bmp|webp|jp2|j2k|pgm|ppm|pbm|gif)$", re.IGNORECASE
)
THREADS = 16  # that look into files; storage far away answers many at once
AHEAD = 256  # files being looked at
CHUNK = 65_536  # rows written at once
_SKIPPED = "skipped"
_FILE, _FOLDER, _LINK = "file", "folder", "link"


class Entry(NamedTuple):
    path: str
    size: int | None  # bytes
    modified: datetime | None


@dataclass
class Listing:
    """Which files of a folder or archive are listed. `skipped` counts the others, by reason."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    def folder(self, folder: Path, own: Path | None = None) -> Iterator[Entry]:
        """Images below `folder`, the files of each folder sorted and before the folders in it.

        Hidden files, links to folders and what is no image by content are left out; one named like an image
        is listed whatever is in it, so that its row says what is wrong. `own`, the results folder or the list
        that is made, is not even counted.
        """
        look = partial(self._looked_at, str(folder))
        with ThreadPoolExecutor(THREADS) as pool:
            for entry in ordered_map(pool, look, self._files(folder, own), AHEAD):
                if isinstance(entry, str):
                    self.skipped[entry] += 1
                else:
                    yield entry

    def _files(self, folder: Path, own: Path | None) -> Iterator[str]:
        """Paths of files that may be images; the names of one folder at a time are in memory."""
        own = own.resolve() if own else None
        ours = (own.name, f".{own.name}.tmp") if own else ("", "")
        waiting = [""]
        while waiting:
            below = waiting.pop()
            try:
                with os.scandir(folder / below) as found:
                    marked = sorted(map(_marked, found))  # not the entries: of millions they are gigabytes
            except OSError:
                if not below:
                    raise
                self.skipped["folders that can't be read"] += 1
                continue
            folders = []
            for name, mark in (text.split("\0") for text in marked):
                path = below + name
                if own and name in ours and (folder / path).resolve() in (own, own.with_name(ours[1])):
                    continue
                kind = self._kind(folder, path, name, mark)
                if kind == _FILE:
                    yield path
                elif kind == _FOLDER:
                    folders.append(path + "/")
                else:
                    self.skipped[kind] += 1
            waiting += reversed(folders)

    def _kind(self, folder: Path, path: str, name: str, mark: str) -> str:
        """_FILE, _FOLDER, or why it is left out."""
        if name.startswith("."):
            return "hidden"
        if mark == _FOLDER:
            return "excluded" if self._excluded.match_file(path + "/") else _FOLDER
        if mark == _LINK and os.path.isdir(folder / path):
            return "links to folders"
        return _FILE if self.wants(path) else "excluded"

    def _looked_at(self, folder: str, path: str) -> Entry | str:
        """An entry, or why there is none."""
        # names that are not UTF-8 can't be stored; their row will say that no such file exists
        name, whole = path.encode("utf-8", "replace").decode(), os.path.join(folder, path)
        try:
            info = os.stat(whole)
            if not LOOKS_LIKE_IMAGE.search(path):
                if not stat.S_ISREG(info.st_mode):
                    return "neither files nor folders"
                with open(os.open(whole, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as opened:
                    if not header.may_be_image(start := opened.read(header.START)):
                        return "archives" if archive.kind_of(start) else "not images"
        except OSError:  # its row will say so
            return Entry(name, None, None)
        return Entry(name, info.st_size, _moment(info))

    def archive(self, file: Path, spool: Path) -> Iterator[Entry]:
        """Images in a zip or tar, in its order, as `archive::name`, all of the archive's own time of change.

        Names wait in a temporary file in the folder `spool`.
        """
        modified = _moment(file.stat())
        with archive.images(file, spool, self.wants) as (images, left_out):
            self.skipped.update(left_out)
            for name, size in images:
                yield Entry(name.encode("utf-8", "replace").decode(), size, modified)

    def wants(self, path: str) -> bool:
        """Whether the globs let it through."""
        return (not self.include or self._included.match_file(path)) and not self._excluded.match_file(path)

    def __post_init__(self) -> None:
        # as .gitignore has them: without a slash for names in any folder, ** for any number of folders
        self._included, self._excluded = map(_spec, (self.include, self.exclude))


def _spec(globs: Sequence[str]) -> PathSpec[Any]:
    """Raises UsageError for a glob that is none, or that .gitignore would take for a blank or a remark."""
    try:
        spec = PathSpec.from_lines("gitignore", globs)
    except ValueError:
        spec = PathSpec([])
    if sum(pattern.include is not None for pattern in spec.patterns) < len(globs):
        shown = ", ".join(map(repr, globs))
        raise UsageError(f"{shown}: not globs as .gitignore has them; examples: '*.dcm', 'backup/**', '\\#1'")
    return spec


def _moment(info: os.stat_result) -> datetime:
    return datetime.fromtimestamp(info.st_mtime_ns // 10**9, UTC).replace(
        microsecond=info.st_mtime_ns // 1000 % 10**6
    )


def _marked(entry: os.DirEntry[str]) -> str:
    """Its name and, behind a NUL, which no name has and which sorts first, what it is."""
    try:
        mark = _FOLDER if entry.is_dir(follow_symlinks=False) else _LINK if entry.is_symlink() else _FILE
    except OSError:
        mark = _FILE
    return f"{entry.name}\0{mark}"


def write(entries: Iterable[Entry], listing: Listing, target: Path) -> int:
    """Write a list, whole or not at all; returns its rows. The counts go into the file when all is listed."""
    rows = 0
    with atomic(target) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for chunk in _chunked(entries):
            writer.write_table(pa.table(list(zip(*chunk, strict=True)), schema=SCHEMA))
            rows += len(chunk)
        writer.add_key_value_metadata({_SKIPPED: json.dumps(dict(sorted(listing.skipped.items())))})
    return rows


def skipped_of(listing: Path) -> dict[str, int]:
    """What the list in this file left out, by reason."""
    metadata = pq.read_metadata(listing).metadata or {}
    return dict(json.loads(metadata.get(_SKIPPED.encode(), b"{}")))


def in_words(rows: int, skipped: dict[str, int]) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    return f"listed {rows} images" + (f"; skipped {counts}" if counts else "")


def _chunked(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def list_place(
    place: Path, target: Path, *, include: Sequence[str], exclude: Sequence[str], own: Path | None
) -> int:
    """List a folder or archive to `target`; returns the rows. Raises UsageError."""
    listing = Listing(include, exclude)
    try:
        entries = listing.folder(place, own) if place.is_dir() else listing.archive(place, target.parent)
        return write(entries, listing, target)
    except (OSError, ReadError) as error:
        raise UsageError(f"manifest {place}: {getattr(error, 'strerror', None) or error}") from None


def option_parser() -> Parser:
    """Of `python -m engine.manifest`."""
    from engine.options import add_options  # here, since a run's options know manifests

    parser = Parser(
        "python -m engine.manifest",
        "FOLDER [-o MANIFEST] [option ...]",
        description="List the images of a folder or archive, with size and time of change, as a manifest.",
        examples="example: python -m engine.manifest /archive -o manifest.parquet --exclude 'backup/**'",
    )
    parser.add(
        "folder", type=parse_location, metavar="FOLDER", help="or a .zip or .tar, here or in an object store"
    )
    parser.add(
        *("-o", "--output"),
        type=Path,
        default=Path("manifest.parquet"),
        metavar="MANIFEST",
        help="the list that is made (%(default)s)",
    )
    add_options(parser, "include", "exclude")
    parser.add("--overwrite", action="store_true", help="replace MANIFEST")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """`python -m engine.manifest FOLDER -o list.parquet`."""

    def work() -> int:
        options = option_parser().parse_args(arguments)
        try:
            print(_made(options), file=sys.stderr)
        except OSError as error:
            raise EngineError(f"{error.filename or options.output}: {error.strerror or error}") from None
        print(options.output)
        return 0

    return run_command(work)


def _made(options: argparse.Namespace) -> str:
    """Write the list; paths in it are relative if it lies in the folder itself, else absolute."""
    place, output = options.folder, options.output
    if output.exists() and not options.overwrite:
        raise UsageError(f"{output}: it exists; give --overwrite, or another -o")
    if isinstance(place, Url):
        from engine.storage import remote

        if place.scheme in HTTP_SCHEMES or not place.name:
            raise UsageError(
                f"{place}: it can't be listed; give a local folder, or an archive in an object store"
            )
        with TemporaryDirectory(prefix="engine-") as scratch:
            copy = remote.fetched_manifest(place, Path(scratch))
            return _listed(copy, f"{place}".removesuffix(place.name), options)
    if not place.is_dir() and not place.is_file():
        raise UsageError(f"{place}: no such folder or archive")
    base = place if place.is_dir() else place.parent
    return _listed(place, "" if output.parent.resolve() == base.resolve() else f"{base.absolute()}/", options)


def _listed(place: Path, before: str, options: argparse.Namespace) -> str:
    if not place.is_dir() and not archive.is_archive(place):
        raise UsageError(f"{options.folder}: neither a folder nor an archive")
    listing, output = Listing(options.include, options.exclude), options.output
    entries = listing.folder(place, output) if place.is_dir() else listing.archive(place, output.parent)
    try:
        rows = write((entry._replace(path=before + entry.path) for entry in entries), listing, output)
    except ReadError as error:
        raise UsageError(f"{options.folder}: {error}") from None
    return in_words(rows, listing.skipped)
