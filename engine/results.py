"""Read the results of a run, or merged results, with their provenance, as pandas or Arrow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from msgspec import Meta

from engine.core.errors import EngineError, UsageError
from engine.core.extras import install_command
from engine.core.json_records import Count, Record, from_json, to_builtins
from engine.core.location import Location, Url
from engine.core.overlap import ordered_map
from engine.core.records import PartInfo
from engine.core.settings import parse_location
from engine.runs.run_folder import SUCCESS_FILE, RunFolder
from engine.runs.run_record import RunRecord
from engine.sink.parts import METADATA_KEY, part_name
from engine.storage.folders import Folder, error_text
from engine.storage.open_folder import open_folder

if TYPE_CHECKING:
    import pandas as pd

MERGED_FILE = "_merged.json"
PARTS_AHEAD = 4


def read_results(
    path: str | os.PathLike[str], *, columns: Sequence[str] | None = None, unfinished: bool = False
) -> pd.DataFrame:
    """Return the rows of a results folder, local or in an object store, in manifest order.

    `columns` selects columns. `frame.attrs["provenance"]` is the content of `_run.json`: run id, bundle,
    plans, weights, versions, machine, options (for merged results, `_merged.json`, with those of each run).
    Raises UsageError for a folder without results, for an unfinished run (unless `unfinished`, which reads
    the finished parts) and if pandas is missing; EngineError if storage fails.
    """
    try:
        import pandas  # noqa: F401 - to_pandas needs it
    except ImportError:
        raise UsageError(
            f"read_results needs pandas; install it with: {install_command(packages='pandas')}; "
            "engine.open_results does not need it"
        ) from None
    dataset = open_results(path, unfinished=unfinished)
    wanted = list(columns) if columns is not None else None
    if unknown := sorted(set(wanted or ()) - set(dataset.schema.names)):
        known = ", ".join(dataset.schema.names)
        raise UsageError(f"results {path}: no column {unknown[0]!r}; it has {known}")
    try:
        frame = dataset.to_table(columns=wanted).to_pandas()
    except OSError as error:
        raise EngineError(f"results {path}: {error_text(error)}") from None
    frame.attrs["provenance"] = provenance(dataset)
    return frame


def open_results(path: str | os.PathLike[str], *, unfinished: bool = False) -> ds.Dataset:
    """Open the rows as an Arrow dataset, to filter them or to read more than fit in memory.

    The provenance is JSON in `dataset.schema.metadata[b"engine"]`. Raises as `read_results` does.
    """
    folder = open_results_folder(parse_location(os.fspath(path)), unfinished=unfinished)
    if not folder.parts:
        raise UsageError(f"results {path}: the run has no finished part yet")
    return folder.dataset()


def provenance(dataset: ds.Dataset) -> dict[str, Any]:
    return dict(json.loads(dataset.schema.metadata[METADATA_KEY]))


class Origin(Record):
    """The metadata of merged parts: the runs that the rows come from."""

    format: Literal[1] = 1
    merged: str  # when: ISO 8601, UTC
    runs: Annotated[dict[str, RunRecord], Meta(min_length=1)]  # by id


class MergedRecord(Origin):
    """`_merged.json`. Read since version 0.1.0."""

    rows: Count
    parts: Count
    by_status: dict[str, int]


class MergedSuccess(Record):
    """`_SUCCESS` of merged results."""

    rows: Count


@dataclass(frozen=True)
class ResultsFolder:
    """A results folder whose parts are known."""

    place: Location
    files: Folder
    run: RunRecord | MergedRecord
    parts: tuple[str, ...]  # names, in order
    rows: int
    done: tuple[PartInfo, ...]  # the parts of a run, in order; empty for merged results
    finished: bool

    @property
    def runs(self) -> dict[str, RunRecord]:
        """Return the records of the runs that the rows come from, by id."""
        return self.run.runs if isinstance(self.run, MergedRecord) else {self.run.run_id: self.run}

    @property
    def first(self) -> RunRecord:
        return next(iter(self.runs.values()))

    def schema(self) -> pa.Schema:
        """Return the schema of the first part, without provenance. There must be a part."""
        schema: pa.Schema = self.files.read(self.parts[0], pq.read_schema)
        return schema.remove_metadata()

    def tables(
        self, columns: Sequence[str] | None = None, *, words: Sequence[str] = ()
    ) -> Iterator[pa.Table]:
        """Yield the row groups in order, with those of `columns` that exist, `words` as dictionaries.

        The first row groups of the next parts are read ahead.
        """

        def read_group(number: int, file: pa.NativeFile) -> tuple[int, pa.Table]:
            parquet = pq.ParquetFile(file, read_dictionary=list(words))
            names = parquet.schema_arrow.names
            table = parquet.read_row_group(number, [name for name in columns or names if name in names])
            return parquet.num_row_groups, table.replace_schema_metadata(None)

        def read(name: str, number: int) -> tuple[int, pa.Table]:
            return self.files.read(name, partial(read_group, number))

        with ThreadPoolExecutor(PARTS_AHEAD) as threads:
            first = ordered_map(threads, partial(read, number=0), self.parts, PARTS_AHEAD)
            for name, (groups, table) in zip(self.parts, first, strict=True):
                yield table
                for number in range(1, groups):
                    yield read(name, number)[1]

    def dataset(self) -> ds.Dataset:
        schema = self.schema().with_metadata({METADATA_KEY: json.dumps(to_builtins(self.run)).encode()})
        files, names = None, [str(self.place / name) for name in self.parts]
        if isinstance(self.place, Url):
            from engine.storage import objects

            files = objects.filesystem(self.place)
            names = [objects.path_of(self.place / name) for name in self.parts]
        return ds.dataset(names, schema=schema, format="parquet", filesystem=files)


def open_results_folder(location: Location, *, unfinished: bool) -> ResultsFolder:
    """Open a results folder and check its parts' footers. Raises UsageError and EngineError."""
    try:
        files = open_folder(location)
        return (
            _open_merged(location, files)
            if files.exists(MERGED_FILE)
            else _open_run(location, unfinished=unfinished)
        )
    except OSError as error:
        raise EngineError(f"results {location}: {error_text(error)}") from None


def _open_run(location: Location, *, unfinished: bool) -> ResultsFolder:
    folder = RunFolder.existing(location)
    run = folder.run()
    done = folder.finished(run)
    rows = sum(part.rows for part in done.values())
    finished = folder.is_marked_finished() and len(done) == run.part_count
    if not unfinished and not finished:
        raise UsageError(
            f"results {location}: the run is not finished, {rows} of {run.rows} rows are written; run its "
            "own command again (in Python, unfinished=True reads these rows)"
        )
    order = sorted(done)
    parts, names = tuple(done[index] for index in order), tuple(map(part_name, order))
    return ResultsFolder(location, folder.files, run, names, rows, parts, finished)


def _open_merged(location: Location, files: Folder) -> ResultsFolder:
    if not files.exists(SUCCESS_FILE):
        raise UsageError(f"results {location}: merging was not finished; run its own command again")
    try:
        run = from_json(files.read(MERGED_FILE, lambda opened: opened.read()), MergedRecord)
        names = tuple(map(part_name, range(run.parts)))
        rows = sum(files.read(name, pq.read_metadata).num_rows for name in names)
        if rows != run.rows:
            raise ValueError(f"the parts have {rows} rows, {MERGED_FILE} has {run.rows}")
    except (ValueError, pa.ArrowException) as error:
        raise UsageError(f"results {location}: {MERGED_FILE}: {' '.join(str(error).split())[:200]}") from None
    return ResultsFolder(location, files, run, names, rows, (), finished=True)
