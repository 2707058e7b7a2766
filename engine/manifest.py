"""A list of images to rows in order, streamed and cut into parts: CSV, Parquet, text list, folder or archive.

Opening a manifest reads it once from end to end without keeping it: that counts the rows, takes the
fingerprint, settles the column types and finds what is malformed before the first image is touched.
"""

from __future__ import annotations

import csv
import hashlib
import re
import shutil
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from engine.errors import UsageError
from engine.listing import LOOKS_LIKE_IMAGE, PATH, in_words, list_place, skipped_of
from engine.records import Part
from engine.storage import Url
from engine.storage.archive import is_archive
from engine.storage.location import HTTP_SCHEMES, Place, absolute, is_url
from engine.store import atomic

_BLOCK = 4 << 20
_IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG")
_LOOKS_LIKE_PATH = re.compile(r"[/\\]|\.[A-Za-z][A-Za-z0-9]{0,4}$")
_SPREADSHEETS = (".xlsx", ".xls", ".ods")


class _Source(Protocol):
    """The rows of one kind of manifest. `tables` can be called again and gives the same rows."""

    schema: pa.Schema
    rows: int
    sha256: str

    def tables(self) -> Iterator[pa.Table]: ...


@dataclass(frozen=True)
class Manifest:
    """An opened manifest. `path_column` holds the paths, `columns` names the rest in order."""

    source: Place
    root: Place
    rows: int
    sha256: str
    path_column: str
    columns: pa.Schema
    _rows: _Source
    skipped: dict[str, int] = field(default_factory=dict)  # files that a listing left out, by reason
    _copy: Any = None  # of a manifest that was fetched; it goes with this

    @property
    def schema(self) -> pa.Schema:
        """Of `tables`: all columns."""
        return self._rows.schema

    def tables(self) -> Iterator[pa.Table]:
        """All rows in order, some at a time."""
        return self._rows.tables()

    def copy_to(self, target: Path) -> int:
        """Write all rows to a Parquet file; returns how many."""
        with (
            atomic(target) as temporary,
            pq.ParquetWriter(temporary, self.schema, compression="zstd") as writer,
        ):
            for table in self.tables():
                writer.write_table(table)
        return self.rows

    def only(self, columns: Iterable[str]) -> Manifest:
        """Without the columns that are not named. Raises UsageError for a name that is none."""
        wanted = set(columns)
        if unknown := sorted(wanted - set(self.columns.names)):
            shown = ", ".join(map(repr, self.columns.names[:10])) or "no other columns"
            raise UsageError(f"--keep {unknown[0]}: the manifest has no such column; it has {shown}")
        return replace(self, columns=pa.schema([one for one in self.columns if one.name in wanted]))

    def parts(self, part_rows: int, wanted: Iterable[int] | None = None) -> Iterator[Part]:
        """Parts of `part_rows` rows in order, the last one shorter; only those in `wanted` when given."""
        keep = None if wanted is None else set(wanted)
        index, held = 0, _Held(self._rows.schema)
        for table in self._rows.tables():
            held.add(table)
            while held.rows >= part_rows:
                yield from self._part(index, part_rows, held.take(part_rows), keep)
                index += 1
        if held.rows:
            yield from self._part(index, part_rows, held.take(held.rows), keep)

    def _part(self, index: int, part_rows: int, table: pa.Table, keep: set[int] | None) -> Iterator[Part]:
        if keep is None or index in keep:
            paths = table.column(self.path_column).cast(pa.string()).to_pylist()
            first = index * part_rows
            row = np.arange(first, first + len(paths))
            yield Part(index, row, paths, table.select(self.columns.names))


class _Held:
    """Rows that have been read and not yet handed out."""

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
    source: Place,
    *,
    path_column: str | None = None,
    root: Place | None = None,
    listing: Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    since: bool = False,
) -> Manifest:
    """Open a CSV (.csv, .tsv), Parquet, text list (one path a line), folder, zip or tar.

    Relative paths are resolved against `root`, else the manifest's own folder. A folder or archive is listed
    to the Parquet file `listing`, unless that exists, and refused without one; `include` and `exclude` are
    for these. With `since`, `listing` holds what is to be screened. Raises UsageError, one line, for
    anything wrong.
    """
    if isinstance(source, Url):
        return _open_copy(
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
        whole = has_to_be_listed(source)
        if (include or exclude) and not whole:
            raise UsageError(f"manifest {source}: --include and --exclude are for folders and archives")
        if whole and not listing:  # as with --redact
            raise UsageError(
                f"manifest {source}: a folder or archive, whose listing names paths; make it first, where it "
                f"may be: python -m engine.manifest {source} -o list.parquet"
            )
        if whole and listing and not listing.exists():
            list_place(source, listing, include=include, exclude=exclude, own=listing.parent)
        frozen = listing if listing and listing.exists() and (whole or since) else None
        rows = _ParquetSource(frozen) if frozen else _open(source)
    except OSError as error:
        raise UsageError(f"manifest {source}: {error.strerror or error}") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise UsageError(f"manifest {source}: {_reason(error)}") from None
    skipped = skipped_of(frozen) if frozen else {}
    if rows.rows == 0:
        reason = in_words(0, skipped) if whole else "it has no rows"
        raise UsageError(f"manifest {source}: {reason}; each row names one image")
    names = rows.schema.names
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"manifest {source}: these columns appear twice: {', '.join(map(repr, twice))}")
    base = root or (source if source.is_dir() else source.parent)
    column = _path_column(source, rows, path_column, base)
    columns = pa.schema([one for one in rows.schema if one.name != column])
    return Manifest(source, absolute(base), rows.rows, rows.sha256, column, columns, rows, skipped)


def _open_copy(url: Url, **options: Any) -> Manifest:
    """A manifest that is fetched first; the copy goes when the manifest does."""
    from engine.storage import remote

    scratch = _Scratch()
    copy = remote.fetched_manifest(url, scratch.folder)
    if url.scheme in HTTP_SCHEMES and is_archive(copy):
        raise UsageError(f"manifest {url}: an archive on a web server; supported: on disks, in object stores")
    try:
        found = open_manifest(copy, **options)
    except UsageError as error:
        raise UsageError(str(error).replace(str(copy), str(url))) from None
    return replace(found, source=url, _copy=scratch)


class _Scratch:
    """A temporary folder that goes when nothing refers to this any more."""

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="engine-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if "straddl" in text:
        return f"a row of more than {_BLOCK >> 20} MiB; is a closing quote missing?"
    if "UTF8" in text.upper() or isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8; save it as UTF-8 (in Excel: CSV UTF-8)"
    return text


def has_to_be_listed(source: Path) -> bool:
    """Whether it is a folder or an archive. Raises OSError."""
    return source.is_dir() or is_archive(source)


def _start(source: Path) -> bytes:
    with source.open("rb") as opened:
        return opened.read(512)


def _open(source: Path) -> _Source:
    start = _start(source)
    if not start:
        raise UsageError(f"manifest {source}: the file has 0 bytes")
    if start.startswith(_IMAGE_SIGNATURES):
        raise UsageError(f"manifest {source}: this is an image; give a list of images or their folder")
    if start.startswith(b"PAR1"):
        return _ParquetSource(source)
    if source.suffix.lower() in (".csv", ".tsv"):
        return _CsvSource(source)
    return _TextSource(source)


def _path_column(source: Path, rows: _Source, wanted: str | None, root: Place) -> str:
    names = rows.schema.names
    column = wanted or (PATH if PATH in names else names[0])
    if column not in names:
        shown = ", ".join(map(repr, names[:10]))
        raise UsageError(f"manifest {source}: no column {column!r}; it has {shown}; see --path-column")
    kind = rows.schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(f"manifest {source}: column {column!r} holds {kind}, not paths; see --path-column")
    if column in (wanted, PATH):
        return column
    if LOOKS_LIKE_IMAGE.search(column):
        raise UsageError(f"manifest {source}: no header, its first line is {column!r}; add a line 'path'")
    first = next(rows.tables()).column(column).slice(0, 100).to_pylist()
    if not any(value and (_LOOKS_LIKE_PATH.search(value) or _is_there(root, value)) for value in first):
        raise UsageError(
            f"manifest {source}: no column 'path', and {column!r}, the first, has no paths; see --path-column"
        )
    return column


def _is_there(root: Place, name: str) -> bool:
    """Nobody is asked for each name of a list on another machine."""
    return is_url(name) or (isinstance(root, Path) and (root / name).exists())


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class _ParquetSource:
    def __init__(self, source: Path) -> None:
        self._source = source
        with pq.ParquetFile(source) as opened:
            self.schema = pa.schema(
                [field.with_type(_without_views(field.type)) for field in opened.schema_arrow]
            )
            self.rows = opened.metadata.num_rows
        self.sha256 = _sha256(source)

    def tables(self) -> Iterator[pa.Table]:
        with pq.ParquetFile(self._source) as opened:
            for batch in opened.iter_batches(65_536):
                yield pa.Table.from_batches([batch]).cast(self.schema)


def _without_views(kind: pa.DataType) -> pa.DataType:
    """The same type with strings in place of string views, which much of Arrow can't work with."""
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)))
    return pa.string() if pa.types.is_string_view(kind) else kind


class _TextSource:
    """One path a line; blank lines separate, they are not rows."""

    schema = pa.schema([(PATH, pa.string())])

    def __init__(self, source: Path) -> None:
        self._source = source
        with source.open(encoding="utf-8-sig") as opened:
            first = opened.readline(_BLOCK).strip().lower()
        if re.match(r"\"?path\"?($|[,;\t])", first):
            raise UsageError(f"manifest {source}: it has a header, so it is a CSV; rename it to .csv")
        self.rows = sum(table.num_rows for table in self.tables())
        self.sha256 = _sha256(source)

    def tables(self) -> Iterator[pa.Table]:
        with self._source.open(encoding="utf-8-sig", newline="\n") as lines:
            while block := lines.readlines(_BLOCK):
                paths = [path for line in block if (path := line.rstrip("\r\n")).strip()]
                yield pa.table({PATH: pa.array(paths, pa.string())})


class _CsvSource:
    """A CSV with a header; the delimiter is the comma, semicolon or tab that the header uses most.

    All cells are read as text. A column becomes a number only when that loses nothing: "007" stays text.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        with source.open(encoding="utf-8-sig", newline="") as opened:
            header = opened.readline()
            self._delimiter = max(",;\t", key=header.count)
            opened.seek(0)
            names = next(csv.reader(opened, delimiter=self._delimiter))
        self._text = pa.schema([(name, pa.string()) for name in names])
        kinds = {name: _KindOfText() for name in names}
        self.rows = 0
        for table in self._read():
            self.rows += table.num_rows
            for name, column in zip(table.column_names, table.columns, strict=True):
                kinds[name].see(column)
        self.schema = pa.schema([(name, kinds[name].type()) for name in names])
        self._check_quotes()
        self.sha256 = _sha256(source)

    def _check_quotes(self) -> None:
        """A quote that is never closed would swallow all rows behind it."""
        with self._source.open("rb") as opened:
            odd = sum(block.count(b'"') for block in iter(lambda: opened.read(_BLOCK), b"")) % 2
        if not odd:
            return
        line = 0
        with self._source.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.reader(opened, delimiter=self._delimiter, strict=True)
            try:
                for _ in rows:
                    line = rows.line_num
            except csv.Error:
                raise UsageError(
                    f"manifest {self._source}: line {line + 1}: a quote is opened and never closed"
                ) from None

    def _read(self) -> Iterator[pa.Table]:
        reader = pa_csv.open_csv(
            self._source,
            read_options=pa_csv.ReadOptions(block_size=_BLOCK, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict(zip(self._text.names, self._text.types, strict=True)),
                strings_can_be_null=False,
            ),
        )
        for batch in reader:
            yield pa.Table.from_batches([batch])

    def tables(self) -> Iterator[pa.Table]:
        for table in self._read():
            yield pa.table(
                [
                    column if pa.types.is_string(field.type) else _to_kind(column, field.type)
                    for column, field in zip(table.columns, self.schema, strict=True)
                ],
                schema=self.schema,
            )


_EMPTY = pa.scalar("")
_BOOL = r"^(?:true|false|True|False|TRUE|FALSE)?$"
_INTEGER = r"^(?:-?(?:0|[1-9][0-9]{0,17}))?$"
_DECIMAL = r"^(?:-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,3})?)?$"


class _KindOfText:
    """The narrowest type that every cell of a column fits: bool, int64, float64, else string."""

    def __init__(self) -> None:
        self._candidates: list[tuple[str, pa.DataType]] = [
            (_BOOL, pa.bool_()),
            (_INTEGER, pa.int64()),
            (_DECIMAL, pa.float64()),
        ]
        self._seen = False

    def see(self, column: pa.ChunkedArray[Any]) -> None:
        self._seen = self._seen or bool(pc.any(pc.not_equal(column, _EMPTY)).as_py())
        self._candidates = [
            (pattern, kind)
            for pattern, kind in self._candidates
            if pc.all(pc.match_substring_regex(column, pattern)).as_py() is not False
        ]

    def type(self) -> pa.DataType:
        if not self._candidates or not self._seen:
            return pa.string()
        return self._candidates[0][1]


def _to_kind(column: pa.ChunkedArray[Any], kind: pa.DataType) -> pa.ChunkedArray[Any]:
    cells: pa.ChunkedArray[Any] = pc.if_else(pc.equal(column, _EMPTY), pa.scalar(None, pa.string()), column)
    return cells.cast(kind)


if __name__ == "__main__":
    from engine.listing import main

    sys.exit(main())
