"""Read a manifest (CSV, Parquet, text list, folder or archive) as rows in order, cut into parts.

Opening a manifest reads it once to its end without keeping it in memory. This counts the rows, hashes the
file, settles the column types and finds malformed rows before the first image is read.
"""

from __future__ import annotations

import re
import shutil
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.core.errors import UsageError
from engine.core.location import HTTP_SCHEMES, Location, Url, absolute, is_url
from engine.core.records import PATH_COLUMN, Part
from engine.manifest.listing import IMAGE_SUFFIX, describe_list, list_location, read_skipped
from engine.manifest.sources import READ_BLOCK, ParquetSource, RowSource, _open_source
from engine.storage.archive import is_archive
from engine.storage.atomic import atomic

_LOOKS_LIKE_PATH = re.compile(r"[/\\]|\.[A-Za-z][A-Za-z0-9]{0,4}$")
_SPREADSHEETS = (".xlsx", ".xls", ".ods")


@dataclass(frozen=True)
class Manifest:
    """An opened manifest. `path_column` holds the paths; `columns` are the other columns in order."""

    source: Location
    root: Location
    rows: int
    sha256: str
    path_column: str
    columns: pa.Schema
    _rows: RowSource
    skipped: dict[str, int] = field(default_factory=dict)  # files that a listing skipped, by reason
    _copy: Any = None  # of a remote manifest; deleted with this object

    @property
    def schema(self) -> pa.Schema:
        """Return the schema of `tables`, with all columns."""
        return self._rows.schema

    def tables(self) -> Iterator[pa.Table]:
        """Yield all rows in order, as tables."""
        return self._rows.tables()

    def copy_to(self, target: Path) -> int:
        """Write all rows to a Parquet file; return their number."""
        with (
            atomic(target) as temporary,
            pq.ParquetWriter(temporary, self.schema, compression="zstd") as writer,
        ):
            for table in self.tables():
                writer.write_table(table)
        return self.rows

    def only(self, columns: Iterable[str]) -> Manifest:
        """Return the manifest with only these columns. Raises UsageError for an unknown name."""
        wanted = set(columns)
        if unknown := sorted(wanted - set(self.columns.names)):
            shown = ", ".join(map(repr, self.columns.names[:10])) or "no other columns"
            raise UsageError(f"--keep {unknown[0]}: the manifest has no such column; it has {shown}")
        return replace(self, columns=pa.schema([column for column in self.columns if column.name in wanted]))

    def parts(self, part_rows: int, wanted: Iterable[int] | None = None) -> Iterator[Part]:
        """Yield parts of `part_rows` rows in order, the last one shorter; if given, only the `wanted`."""
        keep = None if wanted is None else set(wanted)
        index, buffer = 0, _RowBuffer(self._rows.schema)
        for table in self._rows.tables():
            buffer.add(table)
            while buffer.rows >= part_rows:
                yield from self._part(index, part_rows, buffer.take(part_rows), keep)
                index += 1
        if buffer.rows:
            yield from self._part(index, part_rows, buffer.take(buffer.rows), keep)

    def _part(self, index: int, part_rows: int, table: pa.Table, keep: set[int] | None) -> Iterator[Part]:
        if keep is None or index in keep:
            paths = table.column(self.path_column).cast(pa.string()).to_pylist()
            first = index * part_rows
            row = np.arange(first, first + len(paths))
            yield Part(index, row, paths, table.select(self.columns.names))


class _RowBuffer:
    """Rows that are read but not yet in a part."""

    def __init__(self, schema: pa.Schema) -> None:
        self._tables: list[pa.Table] = []
        self._schema, self.rows = schema, 0

    def add(self, table: pa.Table) -> None:
        self._tables.append(table)
        self.rows += table.num_rows

    def take(self, rows: int) -> pa.Table:
        everything = pa.concat_tables(self._tables) if self._tables else self._schema.empty_table()
        self._tables, self.rows = [everything.slice(rows)], self.rows - rows
        return everything.slice(0, rows).combine_chunks()


def open_manifest(
    source: Location,
    *,
    path_column: str | None = None,
    root: Location | None = None,
    listing: Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    since: bool = False,
) -> Manifest:
    """Open a CSV (.csv, .tsv), Parquet, text list (one path a line), folder, zip or tar.

    Relative paths are resolved against `root`, else the manifest's own folder. A folder or archive is listed
    to the Parquet file `listing`, unless it exists, and refused without `listing`; `include` and `exclude`
    apply to it. With `since`, `listing` holds the rows to screen. Raises UsageError in one line.
    """
    if isinstance(source, Url):
        return _open_remote(
            source,
            path_column=path_column,
            root=root or source.parent,
            listing=listing,
            include=include,
            exclude=exclude,
            since=since,
        )
    if source.suffix.lower() in _SPREADSHEETS:
        raise UsageError(f"manifest {source}: this is a spreadsheet; save it as CSV (in Excel: CSV UTF-8)")
    try:
        needs_list = needs_listing(source)
        if (include or exclude) and not needs_list:
            raise UsageError(f"manifest {source}: --include and --exclude are for folders and archives")
        if needs_list and not listing:  # with --redact
            raise UsageError(
                f"manifest {source}: a list of this folder or archive would store paths in the results; make "
                f"the list elsewhere first: python -m engine.manifest {source} -o list.parquet"
            )
        if needs_list and listing and not listing.exists():
            list_location(source, listing, include=include, exclude=exclude, own=listing.parent)
        frozen = listing if listing and listing.exists() and (needs_list or since) else None
        rows = ParquetSource(frozen) if frozen else _open_source(source)
    except OSError as error:
        raise UsageError(f"manifest {source}: {error.strerror or error}") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise UsageError(f"manifest {source}: {_error_text(error)}") from None
    skipped = read_skipped(frozen) if frozen else {}
    if rows.rows == 0:
        reason = describe_list(0, skipped) if needs_list else "it has no rows"
        raise UsageError(f"manifest {source}: {reason}; each row names one image")
    names = rows.schema.names
    if len(set(names)) < len(names):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"manifest {source}: two columns are named {', '.join(map(repr, duplicates))}")
    base = root or (source if source.is_dir() else source.parent)
    column = _path_column(source, rows, path_column, base)
    columns = pa.schema([field for field in rows.schema if field.name != column])
    return Manifest(source, absolute(base), rows.rows, rows.sha256, column, columns, rows, skipped)


def _open_remote(url: Url, **options: Any) -> Manifest:
    """Fetch and open a remote manifest; the copy is deleted with the manifest."""
    from engine.storage import remote

    scratch = _TemporaryFolder()
    copy = remote.fetch_manifest(url, scratch.folder)
    if url.scheme in HTTP_SCHEMES and is_archive(copy):
        raise UsageError(f"manifest {url}: archives are read from disks and object stores, not from https://")
    try:
        manifest = open_manifest(copy, **options)
    except UsageError as error:
        raise UsageError(str(error).replace(str(copy), str(url))) from None
    return replace(manifest, source=url, _copy=scratch)


class _TemporaryFolder:
    """A temporary folder that is deleted with this object."""

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="engine-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _error_text(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if "straddl" in text:
        return f"a row has more than {READ_BLOCK >> 20} MiB; is a closing quote missing?"
    if "UTF8" in text.upper() or isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8; save it as UTF-8 (in Excel: CSV UTF-8)"
    return text


def needs_listing(source: Path) -> bool:
    """Return whether `source` is a folder or an archive. Raises OSError."""
    return source.is_dir() or is_archive(source)


def _path_column(source: Path, rows: RowSource, wanted: str | None, root: Location) -> str:
    names = rows.schema.names
    column = wanted or (PATH_COLUMN if PATH_COLUMN in names else names[0])
    if column not in names:
        shown = ", ".join(map(repr, names[:10]))
        raise UsageError(f"manifest {source}: no column {column!r}; it has {shown}; see --path-column")
    kind = rows.schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(f"manifest {source}: column {column!r} holds {kind}, not paths; see --path-column")
    if column in (wanted, PATH_COLUMN):
        return column
    if IMAGE_SUFFIX.search(column):
        raise UsageError(
            f"manifest {source}: it has no header, but begins with {column!r}; add a line 'path'"
        )
    first = next(rows.tables()).column(column).slice(0, 100).to_pylist()
    if not any(value and (_LOOKS_LIKE_PATH.search(value) or _path_exists(root, value)) for value in first):
        raise UsageError(
            f"manifest {source}: it has no column 'path', and {column!r}, the first, has no paths; see "
            "--path-column"
        )
    return column


def _path_exists(root: Location, name: str) -> bool:
    """Return whether a path exists; remote storage is not asked."""
    return is_url(name) or (isinstance(root, Path) and (root / name).exists())
