"""Read labelled images, or labelled results, for calibration."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from engine.bundle.bundle import Bundle
from engine.bundle.class_names import ClassNames
from engine.bundle.operating_points import LabelledData
from engine.calibrate.thresholds import CalibrationOptions, LabelledScores, check_counts
from engine.core.errors import UsageError
from engine.core.location import HTTP_SCHEMES, Location, Url
from engine.core.records import PATH_COLUMN, OnMessage, Status
from engine.core.settings import Settings
from engine.results import MERGED_FILE, ResultsFolder
from engine.runs.prepare import open_run_manifest
from engine.runs.run_folder import RUN_FILE
from engine.runs.run_record import RunRecord
from engine.storage.open_folder import open_folder

Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
LABEL_COLUMN, PATIENT_COLUMN = "label", "patient"


@dataclass(frozen=True)
class LabelColumns:
    """The columns of label and patient; None: `label`, else the folders' names, and `patient` if it
    exists.
    """

    label: str | None = None
    group: str | None = None


def _find_labelled_rows(
    settings: Settings, models: Bundle, columns: LabelColumns, asked: CalibrationOptions, listing: Path
) -> Labels:
    """Numbers of the rows with a label. What is wrong with labels is said before hours of screening."""
    manifest = open_run_manifest(settings, listing, since=False)
    label, group = _find_columns(manifest.columns.names, "", columns)
    tables = [
        pa.table(
            {"row": part.row, PATH_COLUMN: pa.array(part.paths, pa.string())}
            | {name: part.columns.column(name) for name in dict.fromkeys(filter(None, (label, group)))}
        )
        for part in manifest.parts(65_536)
    ]
    table = pa.concat_tables(tables, promote_options="permissive")
    labels = _parse_labels(table, label, models, lambda _: None)
    groups = _number_groups(table.column(group)) if group else np.arange(len(labels))
    there = labels >= 0
    check_counts(labels[there] == models.classes.index(asked.target), groups[there], asked)
    return np.flatnonzero(there)


def _is_results_folder(place: Location) -> bool:
    if isinstance(place, Url) and place.scheme in HTTP_SCHEMES:
        return False
    folder = open_folder(place)
    return folder.exists(RUN_FILE) or folder.exists(MERGED_FILE)


def _read_labelled_scores(
    results: ResultsFolder, models: Bundle, columns: LabelColumns, say: OnMessage
) -> tuple[LabelledScores, Labels, LabelledData]:
    """Return the scored rows that have a label, their numbers, and `data` of the operating points."""
    if not results.parts:
        raise UsageError(f"results {results.place}: they have no rows")
    before = models.operating_points
    trained = before.data.bundle_sha256 if before else models.sha256
    for run in results.runs.values():
        if _hash_before_calibration(run) != trained:
            raise UsageError(f"results {results.place}: they are of another bundle than {models.path}")
    (one, *others) = results.runs.values()
    options = one.result_options
    dataset = results.dataset()
    there = dataset.schema.names
    label, group = _find_columns(there, options.column_prefix, columns)
    scores = [f"{member.name}_p_{name}" for member in models.members for name in models.classes]
    wanted = dict.fromkeys(["row", PATH_COLUMN, "status", *filter(None, (label, group)), *scores])
    table = dataset.to_table(columns=list(wanted))
    scored = pc.is_in(table.column("status"), value_set=pa.array([Status.OK.label]))
    left_out = Counter(map(str, table.filter(pc.invert(scored)).column("status").to_pylist()))
    table = table.filter(scored)
    labels = _parse_labels(table, label, models, say)
    left_out["unlabelled"] = int((labels < 0).sum())
    table, labels = table.filter(pa.array(labels >= 0)), labels[labels >= 0]
    if not len(labels):
        why = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        raise UsageError(f"not one row has a score and a label ({why})")
    shape = (len(models.members), len(models.classes), len(labels))
    members = np.stack([table.column(name).to_numpy() for name in scores]).reshape(shape)
    members = np.ascontiguousarray(members.transpose(0, 2, 1), np.float32)
    odd = ~np.isfinite(members).all(axis=(0, 2))
    if odd.any():
        row = table.column("row")[int(odd.argmax())]
        raise UsageError(f"row {row}: its scores are no numbers")
    groups = _number_groups(table.column(group)) if group else np.arange(len(labels))
    digest = hashlib.sha256(labels.tobytes() + members.tobytes() + groups.tobytes())
    counts = np.bincount(labels, minlength=len(models.classes))
    return (
        LabelledScores(members, labels, groups),
        table.column("row").to_numpy(),
        LabelledData(
            sha256=digest.hexdigest(),
            manifest_sha256=None if others else options.manifest_sha256,
            bundle_sha256=trained,
            precision=options.precision,
            images=len(labels),
            by_class=dict(zip(models.classes, counts.tolist(), strict=True)),
            patients=len(np.unique(groups)) if group else None,
            left_out={name: count for name, count in left_out.items() if count},
        ),
    )


def _hash_before_calibration(run: RunRecord) -> str:
    """Return the hash of a run's bundle before it was calibrated, which changes no member and no weight."""
    points = run.operating_points
    return str(points["data"]["bundle_sha256"]) if points else run.result_options.bundle_sha256


def _find_columns(there: list[str], prefix: str, columns: LabelColumns) -> tuple[str | None, str | None]:
    """Find the columns of the label and of the group."""
    return (
        _find_column(there, prefix, columns.label, LABEL_COLUMN, "--label-column"),
        _find_column(there, prefix, columns.group, PATIENT_COLUMN, "--group-column"),
    )


def _find_column(there: list[str], prefix: str, asked: str | None, usual: str, option: str) -> str | None:
    """Find the column of that name, with or without the run's column prefix."""
    found = next((name for name in (asked or usual, prefix + (asked or usual)) if name in there), None)
    if asked and not found:
        raise UsageError(f"{option} {asked}: no such column; there are {', '.join(there[:20])}")
    return found


def _parse_labels(table: pa.Table, column: str | None, models: Bundle, say: OnMessage) -> Labels:
    """Class of each row, -1 where it has none. Raises UsageError."""
    names = ClassNames.of(models.classes)
    if column is None:
        texts = [_class_folder_of(path or "", names) for path in table.column(PATH_COLUMN).to_pylist()]
        if not any(texts):
            raise UsageError(
                f"no column {LABEL_COLUMN!r}, and no folder is named like "
                f"{' or '.join(models.classes)}: give a CSV "
                "with path and label, or --label-column"
            )
        say("labels: by the names of the folders")
    else:
        cells = table.column(column).to_pylist()
        texts = ["" if cell is None else str(cell).strip() for cell in cells]
    known: dict[str, int] = {"": -1}
    for row, text in zip(table.column("row").to_pylist(), texts, strict=True):
        if text not in known:
            position = names.find(text)
            if position is None:
                raise UsageError(f"row {row}: {names.error_for(text)}")
            known[text] = position
    if names.aliases:
        say(f"labels: read {', '.join(names.aliases_used())}")
    return np.array([known[text] for text in texts], np.int64)


def _class_folder_of(path: str, names: ClassNames) -> str:
    """Return the deepest folder that has a class's name."""
    folders = PurePosixPath(path.replace("::", "/")).parts[:-1]
    return next((name for name in reversed(folders) if names.find(name) is not None), "")


def _number_groups(column: pa.ChunkedArray[Any]) -> Labels:
    """Number the rows by text: equal texts get the same number, rows without text one each."""
    cells = ["" if cell is None else str(cell).strip() for cell in column.to_pylist()]
    numbers: dict[str, int] = {}
    return np.array(
        [numbers.setdefault(cell, row) if cell else row for row, cell in enumerate(cells)], np.int64
    )
