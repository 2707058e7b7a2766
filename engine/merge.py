"""`python -m engine.merge RESULTS... -o merged`: one row per image out of several runs, the newest score.

Two passes over the runs. The first writes a key of each row, the hash of its image's place, to buckets on the
disk; in each bucket the row that is kept is found for every key. The second copies these rows. Memory holds
one bucket and one part, however many rows there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec.structs import asdict

from engine.cli.parser import Parser
from engine.cli.terminal import run_command
from engine.core.errors import EngineError, UsageError
from engine.core.json_records import to_builtins, to_json
from engine.core.location import Location, is_url
from engine.core.records import PATH_COLUMN, Status
from engine.core.settings import parse_location
from engine.results import (
    MERGED_FILE,
    MergedRecord,
    MergedSuccess,
    Origin,
    ResultsFolder,
    open_results_folder,
)
from engine.runs.incremental import ScoreOptions
from engine.runs.run_folder import SUCCESS_FILE
from engine.runs.run_record import RunRecord
from engine.sink.parts import METADATA_KEY, ROW_GROUP, part_name
from engine.storage.folders import Folder, error_text
from engine.storage.open_folder import open_folder

PART_ROWS = 65_536
BUCKET_ROWS, MAX_BUCKETS = 1 << 20, 256
RUN_ID, RUN_ROW = "run_id", "run_row"
_OK = np.uint64(1 << 63)
_MAX_RUNS = 1 << 15  # runs
_ENTRY = np.dtype([("key", "<u8", 2), ("worth", "<u8"), ("place", "<u8")])
Entries = npt.NDArray[np.void]


@dataclass(frozen=True)
class MergeResult:
    rows: int
    dropped: int  # for another row of the same image
    by_status: dict[str, int]


def merge(sources: Sequence[Location], output: Location) -> MergeResult:
    """Join the results in the folders `sources`, merged ones among them, into the folder `output`.

    Of the rows of one image (the same path below the same root) the newest that has scores is kept, else the
    newest: that of the run begun last, within a run the last. Columns are those of all runs, null where a run
    has none; `row` is numbered anew, `run_id` and `run_row` say where a row is from. One without path stays.
    Raises UsageError for unfinished runs and for runs that can't stand beside each other: of another bundle,
    precision or decoding, or with paths hashed by another salt.
    """
    found = [open_results_folder(place, unfinished=False) for place in sources]
    runs = {run_id: run for one in found for run_id, run in one.runs.items()}
    _check_compatible(found, runs)
    schema = _merged_schema(found)
    folder = open_folder(output)
    try:
        if names := folder.names():
            raise UsageError(f"output {output}: it is not empty ({names[0]!r}); give another -o")
        folder.lock()
    except OSError as error:
        raise UsageError(f"output {output}: {error_text(error)}") from None
    try:
        with tempfile.TemporaryDirectory(prefix="engine-") as scratch:
            kept = _choose_rows(found, _rank_runs(runs), Path(scratch))
            rows, parts, by_status = 0, 0, Counter[str]()
            origin = Origin(merged=datetime.now(UTC).isoformat(timespec="seconds"), runs=runs)
            about = {METADATA_KEY: json.dumps(to_builtins(origin)).encode()}
            for table in _rechunk(_copy_rows(found, kept, schema), PART_ROWS):
                table = table.set_column(0, "row", pa.array(np.arange(rows, rows + table.num_rows)))
                by_status.update(map(str, table.column("status").to_pylist()))
                whole = table.replace_schema_metadata(about)
                write = partial(pq.write_table, whole, compression="zstd", row_group_size=ROW_GROUP)
                folder.write(part_name(parts), write)
                rows, parts = rows + table.num_rows, parts + 1
        merged = MergedRecord(**asdict(origin), rows=rows, parts=parts, by_status=dict(by_status))
        folder.write(MERGED_FILE, lambda temporary: temporary.write_text(to_json(merged)))
        folder.write(SUCCESS_FILE, lambda temporary: temporary.write_text(to_json(MergedSuccess(rows=rows))))
    except BaseException as error:
        with suppress(OSError):
            _clear(folder)
        if isinstance(error, OSError):
            raise EngineError(f"output {output}: {error_text(error)}") from None
        if isinstance(error, pa.ArrowException):
            why = " ".join(str(error).split())[:200]
            raise EngineError(f"a part of the results can't be read: {why}") from None
        raise
    finally:
        folder.unlock(remove_created=True)
    return MergeResult(rows, sum(one.rows for one in found) - rows, dict(by_status))


def _clear(folder: Folder) -> None:
    for name in folder.names():
        if name == MERGED_FILE or name.startswith("part-"):
            folder.delete(name)


def _check_compatible(found: Sequence[ResultsFolder], runs: dict[str, RunRecord]) -> None:
    if len(runs) >= _MAX_RUNS:
        raise UsageError(f"{len(runs)} runs; allowed: up to {_MAX_RUNS - 1}; merge some of them first")
    first = found[0]
    for one in found:
        if words := _difference(first.first, one.first):  # the runs of one folder are alike
            raise UsageError(
                f"results {one.place}: {words} differ from those of {first.place}; such scores can't be "
                "compared, keep them apart"
            )


def _difference(first: RunRecord, other: RunRecord) -> str | None:
    """Return what keeps the scores of two runs from being compared, in words."""
    if words := ScoreOptions.of_run(first.result_options).changed_option(
        ScoreOptions.of_run(other.result_options)
    ):
        return words
    if first.classes != other.classes:
        return "the classes"
    salts = first.result_options.redacted_by, other.result_options.redacted_by
    return "the salt of paths" if salts[0] != salts[1] else None


def _merged_schema(found: Sequence[ResultsFolder]) -> pa.Schema:
    schemas = []
    for one in found:
        schema = one.schema()
        clash = {RUN_ID, RUN_ROW} & set(schema.names)
        if clash and isinstance(one.run, RunRecord):
            raise UsageError(
                f"results {one.place}: a manifest column has the name {min(clash)!r}, which merging "
                "gives to one of its own; run it with --column-prefix manifest_"
            )
        schemas.append(schema)
    try:
        whole = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise UsageError(f"a column is of two types in the runs: {' '.join(str(error).split())}") from None
    rest: list[pa.Field[Any]] = [field for field in whole if field.name not in (RUN_ID, RUN_ROW)]
    return pa.schema([*rest, pa.field(RUN_ID, pa.string()), pa.field(RUN_ROW, pa.int64())])


def _rank_runs(runs: dict[str, RunRecord]) -> dict[str, int]:
    """Rank the runs by id; the run that began last gets the highest rank."""
    order = sorted(runs, key=lambda run_id: runs[run_id].began)
    return {run_id: age for age, run_id in enumerate(order)}


def _read_tables(source: ResultsFolder, wanted: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Row groups, in order, with `run_id` and `run_row`."""
    for table in source.tables(wanted):
        if isinstance(source.run, RunRecord):
            (run_id,) = source.runs
            table = table.append_column(RUN_ID, pa.array([run_id] * table.num_rows, pa.string()))
            table = table.append_column(RUN_ROW, table.column("row"))
        yield table


def _choose_rows(
    found: Sequence[ResultsFolder], ages: dict[str, int], scratch: Path
) -> npt.NDArray[np.bool_]:
    """Decide for every row of all folders, in order, whether it stays; the result is on the disk."""
    total = sum(one.rows for one in found)
    buckets = min(MAX_BUCKETS, 1 + total // BUCKET_ROWS)
    with ExitStack() as stack:
        files = [stack.enter_context((scratch / f"{number}").open("w+b")) for number in range(buckets)]
        place = 0
        for source in found:
            for table in _read_tables(source, ["row", PATH_COLUMN, "status", RUN_ID, RUN_ROW]):
                _spill_to_buckets(_index_entries(source, table, ages, place), files)
                place += table.num_rows
        if place != total:
            raise EngineError(
                f"{place} rows in the parts, {total} in their footers; a run is still writing there"
            )
        kept = np.memmap(scratch / "kept", np.bool_, "w+", shape=(max(1, total),))
        for file in files:
            file.seek(0)
            entries = np.frombuffer(file.read(), _ENTRY)
            order = np.lexsort((entries["place"], entries["worth"], *entries["key"].T))
            keys = entries["key"][order]
            last = np.append((keys[1:] != keys[:-1]).any(axis=1), True)[: len(keys)]
            kept[entries["place"][order[last]]] = True
    return kept


def _index_entries(source: ResultsFolder, table: pa.Table, ages: dict[str, int], place: int) -> Entries:
    ids = [str(run_id) for run_id in table.column(RUN_ID).to_pylist()]
    roots = {run_id: run.result_options.root for run_id, run in source.runs.items()}
    entries = np.empty(table.num_rows, _ENTRY)
    keys = b"".join(
        _image_key(roots[run_id], path)
        for run_id, path in zip(ids, table.column(PATH_COLUMN).to_pylist(), strict=True)
    )
    entries["key"] = np.frombuffer(keys, "<u8").reshape(-1, 2)
    entries["worth"] = [ages[run_id] for run_id in ids]
    entries["worth"][table.column("status").to_numpy() == Status.OK.label] |= _OK
    entries["place"] = np.arange(place, place + table.num_rows)
    return entries


def _image_key(root: str, path: str | None) -> bytes:
    """Return the key of an image's location; a row without path gets a unique key."""
    if not path:
        return os.urandom(16)
    place = path if is_url(path) else os.path.join(root, path)
    place = place if is_url(place) else os.path.normpath(place)
    return hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _spill_to_buckets(entries: Entries, files: Sequence[BinaryIO]) -> None:
    bucket = entries["key"][:, 0] % np.uint64(len(files))
    for number, file in enumerate(files):
        file.write(entries[bucket == number].tobytes())


def _copy_rows(
    found: Sequence[ResultsFolder], kept: npt.NDArray[np.bool_], schema: pa.Schema
) -> Iterator[pa.Table]:
    place = 0
    for source in found:
        for table in _read_tables(source):
            chosen = table.filter(pa.array(kept[place : place + table.num_rows]))
            place += table.num_rows
            yield pa.table([_cast_column(chosen, field) for field in schema], schema=schema)


def _cast_column(table: pa.Table, field: pa.Field[Any]) -> Any:
    """Return the column of that name, cast; nulls where it is missing."""
    if field.name not in table.column_names:
        nulls: pa.Array[Any] = pa.nulls(table.num_rows, field.type)
        return nulls
    column = table.column(field.name)
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid:  # whose words repeat a cell
        raise UsageError(
            f"column {field.name!r} is {column.type} in one run and {field.type} in another, which does not "
            "hold all of its values; what was written is of no use"
        ) from None


def _rechunk(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of `rows`, the last one shorter."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(one.num_rows for one in held) >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows)
            held = [whole.slice(rows)]
    rest = pa.concat_tables(held)
    if rest.num_rows:
        yield rest


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.merge",
        "RESULTS [RESULTS ...] -o MERGED",
        description="Join the results of several runs: one row per image, the newest score. The runs have to "
        "be\nfinished and of one bundle.",
        examples="example: python -m engine.merge monday tuesday -o merged",
    )
    parser.add("results", nargs="+", metavar="RESULTS", help="folder, s3://, gs:// or az://")
    parser.add(
        *("-o", "--output"), required=True, metavar="MERGED", help="a new folder, or s3://, gs://, az://"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    def work() -> int:
        given = option_parser().parse_args(arguments)
        _print_result(merge([parse_location(one) for one in given.results], parse_location(given.output)))
        print(given.output)
        return 0

    return run_command(work)


def _print_result(outcome: MergeResult) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in sorted(outcome.by_status.items()))
    print(f"{outcome.rows} rows ({counts}); {outcome.dropped} older ones left out", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
