"""Read manifests of each kind (CSV, Parquet, text list) as Arrow tables."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from engine.core.errors import UsageError
from engine.core.records import PATH_COLUMN

READ_BLOCK = 4 << 20
_IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG")
_BOOL = r"^(?:true|false|True|False|TRUE|FALSE)?$"
_INTEGER = r"^(?:-?(?:0|[1-9][0-9]{0,17}))?$"
_DECIMAL = r"^(?:-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,3})?)?$"


class RowSource(Protocol):
    """The rows of a manifest. `tables` can be called repeatedly."""

    schema: pa.Schema
    rows: int
    sha256: str

    def tables(self) -> Iterator[pa.Table]: ...


def _read_start(source: Path) -> bytes:
    with source.open("rb") as file:
        return file.read(512)


def _open_source(source: Path) -> RowSource:
    start = _read_start(source)
    if not start:
        raise UsageError(f"manifest {source}: the file has 0 bytes")
    if start.startswith(_IMAGE_SIGNATURES):
        raise UsageError(f"manifest {source}: this is an image; give a list of images or their folder")
    if start.startswith(b"PAR1"):
        return ParquetSource(source)
    if source.suffix.lower() in (".csv", ".tsv"):
        return _CsvSource(source)
    return _TextSource(source)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ParquetSource:
    def __init__(self, source: Path) -> None:
        self._source = source
        with pq.ParquetFile(source) as file:
            self.schema = pa.schema(
                [field.with_type(_without_string_views(field.type)) for field in file.schema_arrow]
            )
            self.rows = file.metadata.num_rows
        self.sha256 = _sha256(source)

    def tables(self) -> Iterator[pa.Table]:
        with pq.ParquetFile(self._source) as file:
            for batch in file.iter_batches(65_536):
                yield pa.Table.from_batches([batch]).cast(self.schema)


def _without_string_views(kind: pa.DataType) -> pa.DataType:
    """Replace string views in a type by strings, since much of Arrow does not support views."""
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_string_views(kind.value_type)))
    return pa.string() if pa.types.is_string_view(kind) else kind


class _TextSource:
    """A text list with one path per line; blank lines are not rows."""

    schema = pa.schema([(PATH_COLUMN, pa.string())])

    def __init__(self, source: Path) -> None:
        self._source = source
        with source.open(encoding="utf-8-sig") as file:
            first = file.readline(READ_BLOCK).strip().lower()
        if re.match(r"\"?path\"?($|[,;\t])", first):
            raise UsageError(f"manifest {source}: it has a header, so it is a CSV; rename it to .csv")
        self.rows = sum(table.num_rows for table in self.tables())
        self.sha256 = _sha256(source)

    def tables(self) -> Iterator[pa.Table]:
        with self._source.open(encoding="utf-8-sig", newline="\n") as lines:
            while block := lines.readlines(READ_BLOCK):
                paths = [path for line in block if (path := line.rstrip("\r\n")).strip()]
                yield pa.table({PATH_COLUMN: pa.array(paths, pa.string())})


class _CsvSource:
    """A CSV with a header; the delimiter is the comma, semicolon or tab that is most frequent in the header.

    All cells are read as text. A column becomes a number only if no information is lost: "007" stays text.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        with source.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            self._delimiter = max(",;\t", key=header.count)
            file.seek(0)
            names = next(csv.reader(file, delimiter=self._delimiter))
        self._text = pa.schema([(name, pa.string()) for name in names])
        types = {name: ColumnTypeInference() for name in names}
        self.rows = 0
        for table in self._read():
            self.rows += table.num_rows
            for name, column in zip(table.column_names, table.columns, strict=True):
                types[name].add(column)
        self.schema = pa.schema([(name, types[name].type()) for name in names])
        self._check_quotes()
        self.sha256 = _sha256(source)

    def _check_quotes(self) -> None:
        """Raise UsageError for a quote that is never closed, which would hide all rows after it."""
        with self._source.open("rb") as file:
            quotes = sum(block.count(b'"') for block in iter(lambda: file.read(READ_BLOCK), b""))
        if quotes % 2 == 0:
            return
        line = 0
        with self._source.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=self._delimiter, strict=True)
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
            read_options=pa_csv.ReadOptions(block_size=READ_BLOCK, use_threads=False),
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
                    column if pa.types.is_string(field.type) else _cast_column(column, field.type)
                    for column, field in zip(table.columns, self.schema, strict=True)
                ],
                schema=self.schema,
            )


class ColumnTypeInference:
    """Finds the narrowest type that fits all cells of a column: bool, int64, float64, else string."""

    def __init__(self) -> None:
        self._candidates: list[tuple[str, pa.DataType]] = [
            (_BOOL, pa.bool_()),
            (_INTEGER, pa.int64()),
            (_DECIMAL, pa.float64()),
        ]
        self._has_values = False

    def add(self, column: pa.ChunkedArray[Any]) -> None:
        self._has_values = self._has_values or bool(pc.any(pc.not_equal(column, pa.scalar(""))).as_py())
        self._candidates = [
            (pattern, kind)
            for pattern, kind in self._candidates
            if pc.all(pc.match_substring_regex(column, pattern)).as_py() is not False
        ]

    def type(self) -> pa.DataType:
        if not self._candidates or not self._has_values:
            return pa.string()
        return self._candidates[0][1]


def _cast_column(column: pa.ChunkedArray[Any], kind: pa.DataType) -> pa.ChunkedArray[Any]:
    cells: pa.ChunkedArray[Any] = pc.if_else(
        pc.equal(column, pa.scalar("")), pa.scalar(None, pa.string()), column
    )
    return cells.cast(kind)
