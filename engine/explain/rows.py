"""Choose the rows that are explained and their reference rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.bundle.bundle import Bundle
from engine.core.errors import UsageError
from engine.core.location import Location, parse
from engine.core.records import OnMessage, Part, PartInfo, Status
from engine.core.settings import Settings
from engine.manifest.manifest import Manifest
from engine.runs.finished_run import add_paths, apply_run_settings, load_run_bundle, read_finished_parts
from engine.runs.run_folder import RUN_FILE, RunFolder
from engine.runs.run_record import RunRecord
from engine.sink.parts import part_name, read_rows
from engine.stats.top_k import TopK

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
MAX_ROWS = 10_000
MAX_REFERENCES = 16  # rows of the run that are compared with
MIN_REFERENCES = 4  # with fewer, the bundle's canaries are used
ENSEMBLE = "ensemble"
# The largest difference of a probability from the results. The members run here in PyTorch, in float32, on
# pixels of the CPU decoder. A run in INT8 may differ from float32 as much as for a slightly changed image.
TOLERANCE = {"fp32": 2e-3, "fp16": 0.02, "int8": 0.15}
TOLERANCE_GPU = 0.02  # DALI's pixels are within 2 gray levels, on average, of the CPU's
NO_POINTS_HINT = "; only runs with operating points abstain"


@dataclass(frozen=True, kw_only=True)
class RowSelection:
    """The rows to explain, and the class whose probability is explained."""

    top: int = 0  # number of rows with the highest probability
    rows: Sequence[int] = ()
    abstained: bool = False
    of_class: str | None = None  # None: the run's target


@dataclass(frozen=True)
class ExplainedRun:
    """A finished run, its bundle, and the class to explain."""

    settings: Settings  # with the run's limits
    folder: RunFolder
    record: RunRecord
    bundle: Bundle
    parts: dict[int, PartInfo]
    manifest: Manifest | None  # of a redacted run
    root: Location
    index: int  # of the class

    @classmethod
    def of(cls, settings: Settings, of_class: str | None) -> Self:
        location = settings.manifest
        folder = RunFolder.existing(location)
        run = folder.run()
        options = run.result_options
        bundle = load_run_bundle(settings, folder, run)
        parts = read_finished_parts(folder, run)
        settings, manifest = apply_run_settings(settings, options)
        root = manifest.root if manifest else parse(options.root)
        if options.precision not in TOLERANCE:
            raise UsageError(
                f"results {location}: {RUN_FILE} has the precision {options.precision!r}; allowed: "
                f"{', '.join(TOLERANCE)}"
            )
        if ENSEMBLE in (member.name for member in bundle.members):
            raise UsageError(f"bundle {bundle.path}: no member can be named {ENSEMBLE!r}; rename it")
        name = of_class or run.target or bundle.classes[-1]
        if name not in bundle.classes:
            raise UsageError(f"--class {name}: allowed: {', '.join(bundle.classes)}")
        return cls(settings, folder, run, bundle, parts, manifest, root, bundle.classes.index(name))

    @property
    def name(self) -> str:
        """Return the name of the class."""
        return self.bundle.classes[self.index]

    @property
    def part_rows(self) -> int:
        return self.record.result_options.part_rows

    @property
    def tolerance(self) -> float:
        options = self.record.result_options
        gpu = TOLERANCE_GPU if options.device != "cpu" else 0.0
        return max(TOLERANCE[options.precision], gpu)

    @property
    def scores(self) -> list[str]:
        """Return the columns of the members' probabilities, member by member."""
        return [f"{member.name}_p_{name}" for member in self.bundle.members for name in self.bundle.classes]

    def choose(self, selection: RowSelection, say: OnMessage) -> tuple[list[int], list[int]]:
        """Choose the rows to explain, in order, and the reference rows."""
        best, abstained, status_of = TopK(selection.top), list[int](), dict[int, str]()
        references = EvenSample(sum(part.by_status.get("ok", 0) for part in self.parts.values()))
        probability = f"p_{self.name}"
        for index in sorted(self.parts):
            columns = ["row", "status", probability, *(["abstain"] if selection.abstained else [])]
            table = self._read(index, columns)
            row, status = table.column("row").to_numpy(), table.column("status").to_numpy()
            ok = status == Status.OK.label
            references.add(row[ok])
            best.add(pa.table({"row": row[ok]}), table.column(probability).to_numpy()[ok])
            if selection.abstained:
                abstains = np.array([value is True for value in table.column("abstain").to_pylist()], bool)
                abstained += row[ok & abstains].tolist()
            if len(abstained) > MAX_ROWS:
                raise UsageError(f"the run abstained on more than {MAX_ROWS} rows; choose some with --rows")
            for number in (number for number in selection.rows if len(row) and row[0] <= number <= row[-1]):
                status_of[number] = str(status[number - row[0]])
        for number in selection.rows:
            if number not in status_of:
                say(f"row {number} does not exist; the run has rows 0 to {self.record.rows - 1}")
            elif status_of[number] != Status.OK.label:
                say(f"row {number} has no score to explain: its status is {status_of[number]}")
        scored = [number for number in selection.rows if status_of.get(number) == Status.OK.label]
        rows = list(dict.fromkeys([*scored, *(row["row"] for row in best.rows()), *abstained]))
        if not rows:
            hint = NO_POINTS_HINT if selection.abstained and not self.record.operating_points else ""
            raise UsageError(f"results {self.folder.path}: no scored row of it was requested{hint}")
        if len(rows) > MAX_ROWS:
            raise UsageError(f"{len(rows)} rows were requested; allowed: up to {MAX_ROWS} at once")
        return rows, references.rows

    def _read(self, index: int, columns: list[str]) -> pa.Table:
        """Read columns of a part. Raises UsageError if one is missing."""
        self._check_columns(index, columns)
        return self.folder.files.read(part_name(index), partial(pq.read_table, columns=columns))

    def _check_columns(self, index: int, columns: list[str]) -> None:
        names = self.folder.files.read(part_name(index), pq.read_schema).names
        if missing := [column for column in columns if column not in names]:
            hint = NO_POINTS_HINT if missing[0] == "abstain" else ""
            raise UsageError(f"results {self.folder.path} have no column {missing[0]!r}{hint}")

    def parts_of(self, rows: Iterable[int]) -> Iterator[Part]:
        """Read some rows with their paths and the members' probabilities."""
        filters = {
            index: pc.is_in(pc.field("row"), pa.array(list(group), pa.int64()))
            for index, group in groupby(sorted(rows), lambda row: row // self.part_rows)
        }
        columns = [*self.scores, "width", "height"]
        for index in filters:
            self._check_columns(index, columns)
        parts = read_rows(self.folder.files, filters, columns)
        if self.manifest:
            return add_paths(parts, self.manifest.parts(self.part_rows, filters))
        return parts


class EvenSample:
    """An evenly spaced sample of rows; empty if there are fewer than MIN_REFERENCES."""

    def __init__(self, total: int) -> None:
        count = min(total, MAX_REFERENCES) if total >= MIN_REFERENCES else 0
        self._positions = np.rint(np.linspace(0, total - 1, count)).astype(np.int64)
        self._rows_before = 0
        self.rows: list[int] = []

    def add(self, rows: Rows) -> None:
        positions = self._positions - self._rows_before
        self.rows += rows[positions[(positions >= 0) & (positions < len(rows))]].tolist()
        self._rows_before += len(rows)
