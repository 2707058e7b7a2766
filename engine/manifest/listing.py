"""List the images of folders and archives, in a fixed order, and count the files that are skipped.

A list is a Parquet file with the columns of SCHEMA; its metadata hold the counts.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pathspec import PathSpec

from engine.core.errors import UsageError
from engine.core.overlap import ordered_map
from engine.core.records import MODIFIED_COLUMN, PATH_COLUMN, SIZE_COLUMN
from engine.formats import header
from engine.storage import archive
from engine.storage.atomic import atomic
from engine.storage.errors import ReadError

_FIELDS: list[pa.Field[Any]] = [
    pa.field(PATH_COLUMN, pa.string()),
    pa.field(SIZE_COLUMN, pa.int64()),
    pa.field(MODIFIED_COLUMN, pa.timestamp("us", tz="UTC")),
]
SCHEMA = pa.schema(_FIELDS)
IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png|dcm|dicom|tiff?|bmp|webp|jp2|j2k|pgm|ppm|pbm|gif)$", re.IGNORECASE)
LISTING_THREADS = 16  # that open files; remote storage answers many at once
AHEAD = 256  # files opened ahead
CHUNK_ROWS = 65_536  # rows written at once
_SKIPPED = "skipped"
_FILE, _FOLDER, _LINK = "file", "folder", "link"


class ListedFile(NamedTuple):
    path: str
    size: int | None  # bytes
    modified: datetime | None


@dataclass
class FileLister:
    """Selects the images in a folder or archive. `skipped` counts the other files, by reason."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    def folder(self, folder: Path, own: Path | None = None) -> Iterator[ListedFile]:
        """Yield the images below `folder`; the files of each folder are sorted and before its subfolders.

        Hidden files, links to folders and files that are no image by content are skipped. A file with the
        name of an image is always listed, so that its row gets an error. `own`, the results folder or the
        list itself, is not counted.
        """
        read_entry = partial(self._entry_of, str(folder))
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            for entry in ordered_map(pool, read_entry, self._files(folder, own), AHEAD):
                if isinstance(entry, str):
                    self.skipped[entry] += 1
                else:
                    yield entry

    def _files(self, folder: Path, own: Path | None) -> Iterator[str]:
        """Yield the paths of files that may be images, with the names of one folder at a time in memory."""
        own = own.resolve() if own else None
        own_names = (own.name, f".{own.name}.tmp") if own else ("", "")
        pending = [""]
        while pending:
            parent = pending.pop()
            try:
                with os.scandir(folder / parent) as entries:
                    keys = sorted(map(_sort_key, entries))  # texts, since millions of entries take gigabytes
            except OSError:
                if not parent:
                    raise
                self.skipped["folders that can't be read"] += 1
                continue
            folders = []
            for name, file_type in (key.split("\0") for key in keys):
                path = parent + name
                if (
                    own
                    and name in own_names
                    and (folder / path).resolve() in (own, own.with_name(own_names[1]))
                ):
                    continue
                kind = self._kind(folder, path, name, file_type)
                if kind == _FILE:
                    yield path
                elif kind == _FOLDER:
                    folders.append(path + "/")
                else:
                    self.skipped[kind] += 1
            pending += reversed(folders)

    def _kind(self, folder: Path, path: str, name: str, file_type: str) -> str:
        """Return _FILE, _FOLDER, or the reason to skip it."""
        if name.startswith("."):
            return "hidden"
        if file_type == _FOLDER:
            return "excluded" if self._excluded.match_file(path + "/") else _FOLDER
        if file_type == _LINK and os.path.isdir(folder / path):
            return "links to folders"
        return _FILE if self.matches_globs(path) else "excluded"

    def _entry_of(self, folder: str, path: str) -> ListedFile | str:
        """Return the entry of a file, or the reason to skip it."""
        # a name that is not UTF-8 cannot be stored; its row becomes "missing"
        name, full_path = path.encode("utf-8", "replace").decode(), os.path.join(folder, path)
        try:
            info = os.stat(full_path)
            if not IMAGE_SUFFIX.search(path):
                if not stat.S_ISREG(info.st_mode):
                    return "neither files nor folders"
                with open(os.open(full_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                    if not header.may_be_image(start := file.read(header.SIGNATURE_BYTES)):
                        return "archives" if archive.archive_kind(start) else "not images"
        except OSError:  # its row gets the error
            return ListedFile(name, None, None)
        return ListedFile(name, info.st_size, _modified_time(info))

    def archive(self, file: Path, spool: Path) -> Iterator[ListedFile]:
        """Yield the images of a zip or tar in its order, as `archive::name`; all have its time of change.

        Names are kept in a temporary file in the folder `spool`.
        """
        modified = _modified_time(file.stat())
        with archive.list_images(file, spool, self.matches_globs) as (images, left_out):
            self.skipped.update(left_out)
            for name, size in images:
                yield ListedFile(name.encode("utf-8", "replace").decode(), size, modified)

    def matches_globs(self, path: str) -> bool:
        """Return whether the globs select a file."""
        return (not self.include or self._included.match_file(path)) and not self._excluded.match_file(path)

    def __post_init__(self) -> None:
        # like .gitignore: without a slash for names in any folder, ** for any number of folders
        self._included, self._excluded = map(_compile_globs, (self.include, self.exclude))


def _compile_globs(globs: Sequence[str]) -> PathSpec[Any]:
    """Compile globs. Raises UsageError for one that is invalid, blank or a comment in .gitignore."""
    try:
        spec = PathSpec.from_lines("gitignore", globs)
    except ValueError:
        spec = PathSpec([])
    if sum(pattern.include is not None for pattern in spec.patterns) < len(globs):
        shown = ", ".join(map(repr, globs))
        raise UsageError(f"{shown}: not globs as in .gitignore; examples: '*.dcm', 'backup/**', '\\#1'")
    return spec


def _modified_time(info: os.stat_result) -> datetime:
    return datetime.fromtimestamp(info.st_mtime_ns // 10**9, UTC).replace(
        microsecond=info.st_mtime_ns // 1000 % 10**6
    )


def _sort_key(entry: os.DirEntry[str]) -> str:
    """Return name, NUL and kind as a sort key; no name contains NUL."""
    try:
        file_type = _FOLDER if entry.is_dir(follow_symlinks=False) else _LINK if entry.is_symlink() else _FILE
    except OSError:
        file_type = _FILE
    return f"{entry.name}\0{file_type}"


def write_list(entries: Iterable[ListedFile], listing: FileLister, target: Path) -> int:
    """Write a list atomically, with the counts of skipped files; return its rows."""
    rows = 0
    with atomic(target) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for chunk in _to_tables(entries):
            writer.write_table(pa.table(list(zip(*chunk, strict=True)), schema=SCHEMA))
            rows += len(chunk)
        writer.add_key_value_metadata({_SKIPPED: json.dumps(dict(sorted(listing.skipped.items())))})
    return rows


def read_skipped(listing: Path) -> dict[str, int]:
    """Read the counts of skipped files from a list's metadata, by reason."""
    metadata = pq.read_metadata(listing).metadata or {}
    return dict(json.loads(metadata.get(_SKIPPED.encode(), b"{}")))


def describe_list(rows: int, skipped: dict[str, int]) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    return f"listed {rows} images" + (f"; skipped {counts}" if counts else "")


def _to_tables(entries: Iterable[ListedFile]) -> Iterator[list[ListedFile]]:
    chunk: list[ListedFile] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def list_location(
    source: Path, target: Path, *, include: Sequence[str], exclude: Sequence[str], own: Path | None
) -> int:
    """List a folder or archive to `target`; return the rows. Raises UsageError."""
    listing = FileLister(include, exclude)
    try:
        entries = listing.folder(source, own) if source.is_dir() else listing.archive(source, target.parent)
        return write_list(entries, listing, target)
    except (OSError, ReadError) as error:
        raise UsageError(f"manifest {source}: {getattr(error, 'strerror', None) or error}") from None
