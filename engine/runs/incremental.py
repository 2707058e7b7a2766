"""`--since RESULTS`: select the rows of a manifest that are new or changed since an earlier run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.bundle.bundle import Bundle
from engine.core.errors import UsageError
from engine.core.location import Location, is_url, parse
from engine.core.records import MODIFIED_COLUMN, PATH_COLUMN, SIZE_COLUMN, Status
from engine.manifest.manifest import Manifest
from engine.runners.base import RunnerChoice
from engine.runs.run_folder import RunFolder
from engine.runs.run_record import ResultOptions
from engine.sink.parts import part_name
from engine.storage.atomic import atomic

# result options whose change invalidates old scores
SCORE_OPTIONS = {
    "bundle_sha256": "the bundle",
    "precision": "the precision",
    "int8_graphs": "the INT8 graphs",
    "decode": "the decoding",
}

Keys = npt.NDArray[np.bytes_]  # 128-bit hashes of path, size and time of change


@dataclass(frozen=True)
class ScoreOptions:
    """The options that decide the scores of a run, by the names in SCORE_OPTIONS.

    GPU plans are not among them, since each passes the accuracy gate; INT8 graphs are.
    """

    bundle_sha256: str
    precision: str
    int8_graphs: dict[str, str] | None  # sha256 by member
    decode: str | None

    @classmethod
    def create(cls, bundle: Bundle, choice: RunnerChoice) -> Self:
        graphs = choice.plan_hashes if choice.precision == "int8" else None
        return cls(bundle.sha256, choice.precision, graphs, bundle.decode)

    @classmethod
    def of_run(cls, options: ResultOptions) -> Self:
        graphs = options.plans if options.precision == "int8" else None
        return cls(options.bundle_sha256, options.precision, graphs, options.decode)

    def changed_option(self, other: Self) -> str | None:
        """Return the description of the first option that differs, None if there is none."""
        changed = (
            text for name, text in SCORE_OPTIONS.items() if getattr(self, name) != getattr(other, name)
        )
        return next(changed, None)


class PreviousRun:
    """A finished run and the images that it scored."""

    def __init__(self, results: Location) -> None:
        """Open the run. Raises UsageError unless it is finished and its paths are not hashed."""
        self.location = results
        folder = RunFolder.existing(results)
        run = folder.run()
        self._files, self._run, self.options = folder.files, run, run.result_options
        self.run_id = run.run_id
        self.since = run.since  # location of the run that this one continued
        if not folder.is_marked_finished():
            raise UsageError(f"--since {results}: that run is not finished")
        if self.options.redacted_by:
            raise UsageError(f"--since {results}: its paths are hashed, so nothing can be compared")

    def changed_option(self, options: ScoreOptions) -> str | None:
        """Return the option that makes these scores differ from those of `options`, None if there is none."""
        return ScoreOptions.of_run(self.options).changed_option(options)

    def keys(self, options: ScoreOptions) -> Keys:
        """Return the sorted keys, 16 bytes each, of the rows that need not be screened again.

        Rows of the runs before this one count too, as long as their results exist.
        """
        keys: list[Keys] = []
        run, seen = self, set[str]()
        while run.run_id not in seen and run.changed_option(options) is None:
            seen.add(run.run_id)
            keys += run._own_keys()
            if run.since is None:
                break
            try:
                run = PreviousRun(parse(run.since))
            except UsageError:  # its results are deleted: its rows are screened again
                break
        return np.sort(np.concatenate(keys))

    def _own_keys(self) -> Iterator[Keys]:
        prefix = self.options.column_prefix
        names = [PATH_COLUMN, prefix + SIZE_COLUMN, prefix + MODIFIED_COLUMN, "status"]
        done = pa.array([Status.OK.label, Status.SKIPPED.label])
        for index in range(self._run.part_count):
            columns = self._files.read(part_name(index), pq.read_schema).names
            if missing := set(names) - set(columns):
                raise UsageError(
                    f"--since {self.location}: its results have no column {min(missing)!r}; screen a folder, "
                    "or a list made by python -m engine.manifest"
                )
            table = self._files.read(part_name(index), partial(pq.read_table, columns=names))
            table = table.filter(pc.is_in(table.column("status"), value_set=done))
            yield _image_keys(self.options.root, *table.columns[:3])


def write_changed(manifest: Manifest, previous: PreviousRun, options: ScoreOptions, target: Path) -> int:
    """Write the rows of `manifest` that are new or changed since `previous`; return their number.

    Raises UsageError.
    """
    columns = manifest.columns
    if not pa.types.is_timestamp(_column_type(columns, MODIFIED_COLUMN)) or not pa.types.is_integer(
        _column_type(columns, SIZE_COLUMN)
    ):
        raise UsageError(
            f"manifest {manifest.source}: --since needs columns {SIZE_COLUMN} and {MODIFIED_COLUMN}; "
            "make the list with python -m engine.manifest"
        )
    known, rows = previous.keys(options), 0
    root = str(manifest.root)
    with (
        atomic(target) as temporary,
        pq.ParquetWriter(temporary, manifest.schema) as writer,
    ):
        for table in manifest.tables():
            keys = _image_keys(
                root,
                table.column(manifest.path_column),
                table.column(SIZE_COLUMN),
                table.column(MODIFIED_COLUMN),
            )
            nearest = np.minimum(np.searchsorted(known, keys), max(0, len(known) - 1))
            new = table if not len(known) else table.filter(pa.array(known[nearest] != keys))
            if new.num_rows:
                writer.write_table(new)
                rows += new.num_rows
    return rows


def _column_type(columns: pa.Schema, name: str) -> pa.DataType:
    return columns.field(name).type if name in columns.names else pa.null()


def _image_keys(root: str, *columns: pa.ChunkedArray[Any]) -> Keys:
    paths, sizes, times = columns
    times = times.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    rows = zip(paths.to_pylist(), sizes.to_pylist(), times.to_pylist(), strict=True)
    return np.array(list(_hash_rows(root, rows)), "S16")


def _hash_rows(root: str, rows: Iterable[tuple[str | None, int | None, int | None]]) -> Iterator[bytes]:
    """Hash rows by path, size and time; a row that lacks one of them gets a unique hash."""
    for number, (path, size, time) in enumerate(rows):
        if path is None or size is None or time is None:
            text = f"{number} {os.urandom(8).hex()}"
        else:
            text = f"{path if is_url(path) else os.path.join(root, path)}\0{size}\0{time}"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        yield digest[:-1] + bytes([digest[-1] | 1])  # NumPy drops zeros at the end of byte strings
