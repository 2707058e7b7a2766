"""Name, read and check the Parquet parts of a run."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.core.errors import EngineError
from engine.core.json_records import Record, from_json
from engine.core.records import PATH_COLUMN, Part, PartInfo, Scorer, Status
from engine.storage.folders import Folder, StoreError

ROW_GROUP = 65_536
FOOTERS_AT_ONCE = 16
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
METADATA_KEY = b"engine"
_PART_KEY = b"part"


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


class PartFooter(Record):
    """The facts about a part in its metadata."""

    part: int  # index
    by_status: dict[str, int]
    by_class: dict[str, int]
    by: Scorer = Scorer()
    written: str | None = None  # ISO 8601

    @property
    def written_at(self) -> datetime | None:
        return datetime.fromisoformat(self.written) if self.written else None


class _Owner(msgspec.Struct):
    """The field of `_run.json` that is read from a part's metadata; other fields are ignored."""

    run_id: str


def read_failed_rows(folder: Folder, indices: Iterable[int], columns: Sequence[str]) -> Iterator[Part]:
    """Yield the failed rows of finished parts, with `columns` of the results."""
    done = pa.array([Status.OK.label, Status.SKIPPED.label])
    failed = pc.invert(pc.is_in(pc.field("status"), done))
    yield from read_rows(folder, dict.fromkeys(indices, failed), columns)


def read_rows(folder: Folder, filters: Mapping[int, pc.Expression], columns: Sequence[str]) -> Iterator[Part]:
    """Yield the rows of each part in `filters` that match its filter, with `columns` of the results."""
    for index, condition in filters.items():
        names = list(dict.fromkeys(["row", PATH_COLUMN, "status", *columns]))
        table = folder.read(part_name(index), partial(_read_table, columns=names)).filter(condition)
        paths = table.column(PATH_COLUMN).to_pylist()
        yield Part(index, table.column("row").to_numpy(), paths, table.select(columns).combine_chunks())


def _read_table(file: pa.NativeFile, columns: list[str] | None = None) -> pa.Table:
    return pq.ParquetFile(file).read(columns)


def list_parts(folder: Folder) -> set[int]:
    """List the parts on disk by their names."""
    return {int(match[1]) for match in map(_PART_NAME.fullmatch, folder.names()) if match}


def read_parts(folder: Folder, run_id: str, wanted: Container[int] | None = None) -> dict[int, PartInfo]:
    """Read the footers of the parts on disk, by index; only of the `wanted` ones, if given.

    Raises as `read_part` does.
    """
    indices = [index for index in list_parts(folder) if wanted is None or index in wanted]
    with ThreadPoolExecutor(
        FOOTERS_AT_ONCE
    ) as threads:  # in an object store each footer takes several round trips
        return {part.index: part for part in threads.map(partial(read_part, folder, run_id), indices)}


def read_part(folder: Folder, run_id: str, index: int) -> PartInfo:
    """Read the footer of a part. Raises EngineError if it is damaged, of another run or inconsistent."""
    name = part_name(index)
    try:
        return _parse_footer(index, folder.read(name, pq.read_metadata), run_id)
    except StoreError:
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(
            f"{folder.location / name}: it is not a part of this run ({reason}); delete it and run again"
        ) from None


def _parse_footer(index: int, footer: pq.FileMetaData, run_id: str) -> PartInfo:
    metadata = footer.metadata or {}
    facts = from_json(metadata[_PART_KEY], PartFooter)
    owner = from_json(metadata[METADATA_KEY], _Owner).run_id
    if owner != run_id:
        raise ValueError(f"it belongs to run {owner}")
    if facts.part != index:
        raise ValueError(f"it is part {facts.part}")
    row, prediction = _column_statistics(footer, "row"), _column_statistics(footer, "prediction")
    first, last = min(group.min for group in row), max(group.max for group in row)
    part = PartInfo(
        index, first, footer.num_rows, facts.by_status, facts.by_class, facts.by, facts.written_at
    )
    if last - first + 1 != part.rows:
        raise ValueError(f"it has rows {first} to {last}, but {part.rows} rows")
    if sum(part.by_status.values()) != part.rows:
        raise ValueError(f"{sum(part.by_status.values())} of {part.rows} rows have a status")
    scored = part.rows - sum(group.null_count for group in prediction)
    if not scored == part.by_status.get("ok", 0) == sum(part.by_class.values()):
        raise ValueError(f"{scored} rows have scores, but {part.by_status.get('ok', 0)} are ok")
    return part


def _column_statistics(footer: pq.FileMetaData, column: str) -> list[Any]:
    """Return the statistics of a column, one for each row group."""
    names = [footer.row_group(0).column(number).path_in_schema for number in range(footer.num_columns)]
    number = names.index(column)
    return [footer.row_group(group).column(number).statistics for group in range(footer.num_row_groups)]
