"""`python -m engine.merge RESULTS... -o merged`: one row per image out of several runs, the newest score.

The runs are read twice. First, a key of each row, the hash of its image's location, is written to buckets on
the disk, and in each bucket the row to keep is chosen for every key. Then these rows are copied. Memory holds
one bucket and one part, however many rows there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from tempfile import TemporaryFile
from typing import Any

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
from engine.storage.folders import error_text
from engine.storage.open_folder import open_folder

PART_ROWS = 65_536
BUCKET_ROWS, MAX_BUCKETS = 1 << 20, 256
RUN_ID, RUN_ROW = "run_id", "run_row"


@dataclass(frozen=True)
class MergeResult:
    rows: int
    dropped: int  # for another row of the same image
    by_status: dict[str, int]


def merge(sources: Sequence[Location], output: Location) -> MergeResult:
    """Join the results in the folders `sources`, merged ones among them, into the folder `output`.

    Of the rows of one image (the same path below the same root) the newest that has scores is kept, else the
    newest: that of the run begun last, within a run the last. Rows without a path are all kept. The columns
    are those of all runs, null where a run has none; `row` is numbered anew, `run_id` and `run_row` name the
    run and its row. Raises UsageError for unfinished runs and for runs whose scores can't be compared: of
    another bundle, precision or decoding, or with paths hashed by another salt.
    """
    results = [open_results_folder(location, unfinished=False) for location in sources]
    runs = {run_id: run for source in results for run_id, run in source.runs.items()}
    _check_compatible(results)
    schema = _merged_schema(results)
    folder = open_folder(output)
    try:
        if names := folder.names():
            raise UsageError(f"output {output}: it is not empty ({names[0]!r}); give another -o")
        folder.lock()
    except OSError as error:
        raise UsageError(f"output {output}: {error_text(error)}") from None
    try:
        kept = _choose_rows(results, runs)
        by_status = Counter[str]()
        origin = Origin(merged=datetime.now(UTC).isoformat(timespec="seconds"), runs=runs)
        metadata = {METADATA_KEY: json.dumps(to_builtins(origin)).encode()}
        for part, table in enumerate(_rechunk(_copy_rows(results, kept, schema), PART_ROWS)):
            row = part * PART_ROWS
            table = table.set_column(0, "row", pa.array(np.arange(row, row + table.num_rows)))
            by_status.update(map(str, table.column("status").to_pylist()))
            table = table.replace_schema_metadata(metadata)
            write = partial(pq.write_table, table, compression="zstd", row_group_size=ROW_GROUP)
            folder.write(part_name(part), write)
        rows = by_status.total()
        parts = -(-rows // PART_ROWS)
        merged = MergedRecord(**asdict(origin), rows=rows, parts=parts, by_status=dict(by_status))
        folder.write(MERGED_FILE, lambda temporary: temporary.write_text(to_json(merged)))
        folder.write(SUCCESS_FILE, lambda temporary: temporary.write_text(to_json(MergedSuccess(rows=rows))))
    except BaseException as error:
        with suppress(OSError):
            for name in folder.names():
                if name == MERGED_FILE or name.startswith("part-"):
                    folder.delete(name)
        if isinstance(error, OSError):
            raise EngineError(f"output {output}: {error_text(error)}") from None
        if isinstance(error, pa.ArrowException):
            why = " ".join(str(error).split())[:200]
            raise EngineError(f"a part of the results can't be read: {why}") from None
        raise
    finally:
        folder.unlock(remove_created=True)
    return MergeResult(rows, sum(source.rows for source in results) - rows, dict(by_status))


def _check_compatible(results: Sequence[ResultsFolder]) -> None:
    """Raise UsageError if scores of two folders can't be compared; the runs of one folder are alike."""
    first = results[0].first
    options = first.result_options
    for source in results:
        run = source.first
        words = ScoreOptions.of_run(options).changed_option(ScoreOptions.of_run(run.result_options))
        if not words and run.classes != first.classes:
            words = "the classes"
        if not words and run.result_options.redacted_by != options.redacted_by:
            words = "the salt of paths"
        if words:
            raise UsageError(
                f"results {source.place}: {words} differ from those of {results[0].place}; such scores "
                "can't be compared, keep them apart"
            )


def _merged_schema(results: Sequence[ResultsFolder]) -> pa.Schema:
    schemas = []
    for source in results:
        schema = source.schema()
        clash = {RUN_ID, RUN_ROW} & set(schema.names)
        if clash and isinstance(source.run, RunRecord):
            raise UsageError(
                f"results {source.place}: a manifest column has the name {min(clash)!r}, which merging "
                "gives to one of its own; run it with --column-prefix manifest_"
            )
        schemas.append(schema)
    try:
        whole = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise UsageError(f"a column is of two types in the runs: {' '.join(str(error).split())}") from None
    rest: list[pa.Field[Any]] = [field for field in whole if field.name not in (RUN_ID, RUN_ROW)]
    return pa.schema([*rest, pa.field(RUN_ID, pa.string()), pa.field(RUN_ROW, pa.int64())])


def _read_tables(source: ResultsFolder, wanted: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the row groups, in order, with `run_id` and `run_row`."""
    for table in source.tables(wanted):
        if isinstance(source.run, RunRecord):
            table = table.append_column(RUN_ID, pa.array([source.run.run_id] * table.num_rows, pa.string()))
            table = table.append_column(RUN_ROW, table.column("row"))
        yield table


def _choose_rows(results: Sequence[ResultsFolder], runs: dict[str, RunRecord]) -> npt.NDArray[np.bool_]:
    """Decide for each row of all folders, in order, whether it is kept; the array is a file on the disk.

    An entry of a bucket is four integers: two of the key, the rank (higher for a row with scores, then for a
    run that began later), and the number of the row.
    """
    ages = {run_id: age for age, run_id in enumerate(sorted(runs, key=lambda run_id: runs[run_id].began))}
    total = sum(source.rows for source in results)
    with ExitStack() as stack:
        count = min(MAX_BUCKETS, 1 + total // BUCKET_ROWS)
        files = [stack.enter_context(TemporaryFile()) for _ in range(count)]
        start = 0
        for source in results:
            roots = {run_id: run.result_options.root for run_id, run in source.runs.items()}
            for table in _read_tables(source, ["row", PATH_COLUMN, "status", RUN_ID]):
                ids = [str(run_id) for run_id in table.column(RUN_ID).to_pylist()]
                paths = table.column(PATH_COLUMN).to_pylist()
                keys = b"".join(map(_image_key, (roots[run_id] for run_id in ids), paths))
                ok = table.column("status").to_numpy() == Status.OK.label
                ranks = ok * len(ages) + [ages[run_id] for run_id in ids]
                numbers = np.arange(start, start + table.num_rows)
                entries = np.column_stack([np.frombuffer(keys, np.int64).reshape(-1, 2), ranks, numbers])
                for bucket, file in enumerate(files):
                    file.write(entries[entries[:, 0] % count == bucket].tobytes())
                start += table.num_rows
        if start != total:
            raise EngineError(
                f"{start} rows in the parts, {total} in their footers; a run is still writing there"
            )
        kept = np.memmap(stack.enter_context(TemporaryFile()), np.bool_, "w+", shape=(max(1, total),))
        for file in files:
            file.seek(0)
            entries = np.frombuffer(file.read(), np.int64).reshape(-1, 4)
            entries = entries[np.lexsort(entries.T[[2, 1, 0]])]  # stable: of equal ranks the last row is last
            changed = entries[1:, :2] != entries[:-1, :2]
            last = np.append(changed.any(axis=1), True)[: len(entries)]
            kept[entries[last, 3]] = True
    return kept


def _image_key(root: str, path: str | None) -> bytes:
    """Return the key of an image's location; a row without path gets a unique key."""
    if not path:
        return os.urandom(16)
    place = path if is_url(path) else os.path.join(root, path)
    place = place if is_url(place) else os.path.normpath(place)
    return hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _copy_rows(
    results: Sequence[ResultsFolder], kept: npt.NDArray[np.bool_], schema: pa.Schema
) -> Iterator[pa.Table]:
    start = 0
    for source in results:
        for table in _read_tables(source):
            chosen = table.filter(pa.array(kept[start : start + table.num_rows]))
            start += table.num_rows
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
    if (rest := pa.concat_tables(held)).num_rows:
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
        merged = merge([parse_location(one) for one in given.results], parse_location(given.output))
        counts = ", ".join(f"{count} {status}" for status, count in sorted(merged.by_status.items()))
        print(f"{merged.rows} rows ({counts}); {merged.dropped} older ones left out", file=sys.stderr)
        print(given.output)
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
