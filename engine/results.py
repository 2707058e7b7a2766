"""The results of a run, or of several that were merged, with where they come from: pandas or Arrow."""

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
    """Return the rows of a results folder, a local one or in an object store, in manifest order.

    `columns` names those that are wanted. `frame.attrs["provenance"]` is what `_run.json` says: run id,
    bundle, plans, weights, versions, machine, options (for merged results, `_merged.json`: each run's).
    Raises UsageError for a folder without results, a run that is not finished (unless `unfinished`, which
    reads the parts that are there) and where pandas is missing; EngineError when storage fails.
    """
    try:
        import pandas  # noqa: F401 - to_pandas needs it
    except ImportError:
        raise UsageError(
            f"read_results needs pandas; install it with: {install_command(packages='pandas')}; "
            "open_results does without"
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
    """Open the same rows as an Arrow dataset without reading them: to filter, or for more rows than fit in
    memory.

    Its provenance is JSON in `dataset.schema.metadata[b"engine"]`. Raises as `read_results` does.
    """
    found = open_results_folder(parse_location(os.fspath(path)), unfinished=unfinished)
    if not found.parts:
        raise UsageError(f"results {path}: no part is finished yet")
    return found.dataset()


def provenance(dataset: ds.Dataset) -> dict[str, Any]:
    return dict(json.loads(dataset.schema.metadata[METADATA_KEY]))


class Origin(Record):
    """The metadata of merged parts: the runs that rows are from."""

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
    """A results folder that was looked through."""

    place: Location
    files: Folder
    run: RunRecord | MergedRecord
    parts: tuple[str, ...]  # names, in order
    rows: int
    done: tuple[PartInfo, ...]  # the parts of a run, in order; none of merged results
    finished: bool

    @property
    def runs(self) -> dict[str, RunRecord]:
        """Return the records of the runs that the rows come from, by id."""
        return self.run.runs if isinstance(self.run, MergedRecord) else {self.run.run_id: self.run}

    @property
    def first(self) -> RunRecord:
        return next(iter(self.runs.values()))

    def schema(self) -> pa.Schema:
        """Without provenance; there has to be a part."""
        schema: pa.Schema = self.files.read(self.parts[0], pq.read_schema)
        return schema.remove_metadata()

    def tables(
        self, columns: Sequence[str] | None = None, *, words: Sequence[str] = ()
    ) -> Iterator[pa.Table]:
        """Row groups, in order: `columns` of them, where they are there, `words` as dictionaries.

        The first of the next few parts are read meanwhile.
        """

        def take(number: int, file: pa.NativeFile) -> tuple[int, pa.Table]:
            opened = pq.ParquetFile(file, read_dictionary=list(words))
            names = opened.schema_arrow.names
            table = opened.read_row_group(number, [name for name in columns or names if name in names])
            return opened.num_row_groups, table.replace_schema_metadata(None)

        def read(name: str, number: int) -> tuple[int, pa.Table]:
            return self.files.read(name, partial(take, number))

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


def open_results_folder(place: Location, *, unfinished: bool) -> ResultsFolder:
    """Look through a results folder, footers included. Raises UsageError and EngineError."""
    try:
        files = open_folder(place)
        return (
            _open_merged(place, files)
            if files.exists(MERGED_FILE)
            else _open_run(place, unfinished=unfinished)
        )
    except OSError as error:
        raise EngineError(f"results {place}: {error_text(error)}") from None


def _open_run(place: Location, *, unfinished: bool) -> ResultsFolder:
    folder = RunFolder.existing(place)
    run = folder.run()
    done = folder.finished(run)
    rows = sum(part.rows for part in done.values())
    finished = folder.is_marked_finished() and len(done) == run.part_count
    if not unfinished and not finished:
        raise UsageError(
            f"results {place}: the run is not finished, {rows} of {run.rows} rows are there; give its own "
            "command again (in Python, unfinished=True reads what there is)"
        )
    order = sorted(done)
    parts, names = tuple(done[index] for index in order), tuple(map(part_name, order))
    return ResultsFolder(place, folder.files, run, names, rows, parts, finished)


def _open_merged(place: Location, files: Folder) -> ResultsFolder:
    if not files.exists(SUCCESS_FILE):
        raise UsageError(f"results {place}: merging was not finished; give its own command again")
    try:
        run = from_json(files.read(MERGED_FILE, lambda opened: opened.read()), MergedRecord)
        names = tuple(map(part_name, range(run.parts)))
        rows = sum(files.read(name, pq.read_metadata).num_rows for name in names)
        if rows != run.rows:
            raise ValueError(f"{rows} rows in the parts, {run.rows} in {MERGED_FILE}")
    except (ValueError, pa.ArrowException) as error:
        raise UsageError(f"results {place}: {MERGED_FILE}: {' '.join(str(error).split())[:200]}") from None
    return ResultsFolder(place, files, run, names, rows, (), finished=True)
