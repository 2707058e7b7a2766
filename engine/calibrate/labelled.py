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
    """The columns of label and patient. Defaults: `label`, else the folder names; `patient` if it exists."""

    label: str | None = None
    group: str | None = None


def find_labelled_rows(
    settings: Settings, bundle: Bundle, columns: LabelColumns, options: CalibrationOptions, listing: Path
) -> Labels:
    """Return the numbers of the labelled rows. Check the labels before hours of screening."""
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
    labels = _parse_labels(table, label, bundle, lambda _: None)
    groups = _number_groups(table.column(group)) if group else np.arange(len(labels))
    labelled = labels >= 0
    check_counts(labels[labelled] == bundle.classes.index(options.target), groups[labelled], options)
    return np.flatnonzero(labelled)


def is_results_folder(location: Location) -> bool:
    if isinstance(location, Url) and location.scheme in HTTP_SCHEMES:
        return False
    folder = open_folder(location)
    return folder.exists(RUN_FILE) or folder.exists(MERGED_FILE)


def read_labelled_scores(
    results: ResultsFolder, bundle: Bundle, columns: LabelColumns, say: OnMessage
) -> tuple[LabelledScores, Labels, LabelledData]:
    """Return the scored rows that have a label, their numbers, and `data` of the operating points."""
    if not results.parts:
        raise UsageError(f"results {results.place}: the folder has no rows")
    points = bundle.operating_points
    trained_sha256 = points.data.bundle_sha256 if points else bundle.sha256
    for run in results.runs.values():
        if _hash_before_calibration(run) != trained_sha256:
            raise UsageError(f"results {results.place}: they come from another bundle than {bundle.path}")
    (run, *others) = results.runs.values()
    run_options = run.result_options
    dataset = results.dataset()
    names = dataset.schema.names
    label, group = _find_columns(names, run_options.column_prefix, columns)
    scores = [f"{member.name}_p_{name}" for member in bundle.members for name in bundle.classes]
    selected = dict.fromkeys(["row", PATH_COLUMN, "status", *filter(None, (label, group)), *scores])
    table = dataset.to_table(columns=list(selected))
    scored = pc.is_in(table.column("status"), value_set=pa.array([Status.OK.label]))
    left_out = Counter(map(str, table.filter(pc.invert(scored)).column("status").to_pylist()))
    table = table.filter(scored)
    labels = _parse_labels(table, label, bundle, say)
    left_out["unlabelled"] = int((labels < 0).sum())
    table, labels = table.filter(pa.array(labels >= 0)), labels[labels >= 0]
    if not len(labels):
        counts_left_out = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        raise UsageError(f"no row has both a score and a label ({counts_left_out})")
    shape = (len(bundle.members), len(bundle.classes), len(labels))
    members = np.stack([table.column(name).to_numpy() for name in scores]).reshape(shape)
    members = np.ascontiguousarray(members.transpose(0, 2, 1), np.float32)
    invalid = ~np.isfinite(members).all(axis=(0, 2))
    if invalid.any():
        row = table.column("row")[int(invalid.argmax())]
        raise UsageError(f"row {row}: its scores are not finite numbers")
    groups = _number_groups(table.column(group)) if group else np.arange(len(labels))
    digest = hashlib.sha256(labels.tobytes() + members.tobytes() + groups.tobytes())
    counts = np.bincount(labels, minlength=len(bundle.classes))
    return (
        LabelledScores(members, labels, groups),
        table.column("row").to_numpy(),
        LabelledData(
            sha256=digest.hexdigest(),
            manifest_sha256=None if others else run_options.manifest_sha256,
            bundle_sha256=trained_sha256,
            precision=run_options.precision,
            images=len(labels),
            by_class=dict(zip(bundle.classes, counts.tolist(), strict=True)),
            patients=len(np.unique(groups)) if group else None,
            left_out={name: count for name, count in left_out.items() if count},
        ),
    )


def _hash_before_calibration(run: RunRecord) -> str:
    """Return the hash of a run's bundle before it was calibrated, which changes no member and no weight."""
    points = run.operating_points
    return points.data.bundle_sha256 if points else run.result_options.bundle_sha256


def _find_columns(names: list[str], prefix: str, columns: LabelColumns) -> tuple[str | None, str | None]:
    """Find the columns of the label and of the group."""
    return (
        _find_column(names, prefix, columns.label, LABEL_COLUMN, "--label-column"),
        _find_column(names, prefix, columns.group, PATIENT_COLUMN, "--group-column"),
    )


def _find_column(names: list[str], prefix: str, named: str | None, default: str, option: str) -> str | None:
    """Find the column of that name, with or without the run's column prefix."""
    name = named or default
    column = next((column for column in (name, prefix + name) if column in names), None)
    if named and not column:
        raise UsageError(f"{option} {named}: there is no such column; allowed: {', '.join(names[:20])}")
    return column


def _parse_labels(table: pa.Table, column: str | None, bundle: Bundle, say: OnMessage) -> Labels:
    """Return the class of each row, -1 for rows without a label. Raises UsageError."""
    names = ClassNames.of(bundle.classes)
    if column is None:
        texts = [_class_folder_of(path or "", names) for path in table.column(PATH_COLUMN).to_pylist()]
        if not any(texts):
            raise UsageError(
                f"there is no column {LABEL_COLUMN!r}, and no folder is named "
                f"{' or '.join(bundle.classes)}; give a CSV with path and label, or --label-column"
            )
        say("labels: the names of the folders")
    else:
        cells = table.column(column).to_pylist()
        texts = ["" if cell is None else str(cell).strip() for cell in cells]
    classes: dict[str, int] = {"": -1}
    for row, text in zip(table.column("row").to_pylist(), texts, strict=True):
        if text not in classes:
            position = names.find(text)
            if position is None:
                raise UsageError(f"row {row}: {names.error_for(text)}")
            classes[text] = position
    if names.aliases:
        say(f"labels: read {', '.join(names.aliases_used())}")
    return np.array([classes[text] for text in texts], np.int64)


def _class_folder_of(path: str, names: ClassNames) -> str:
    """Return the deepest folder that has a class's name."""
    folders = PurePosixPath(path.replace("::", "/")).parts[:-1]
    return next((name for name in reversed(folders) if names.find(name) is not None), "")


def _number_groups(column: pa.ChunkedArray[Any]) -> Labels:
    """Number the rows by text: equal texts share a number, each row without text has its own."""
    cells = ["" if cell is None else str(cell).strip() for cell in column.to_pylist()]
    numbers: dict[str, int] = {}
    return np.array(
        [numbers.setdefault(cell, row) if cell else row for row, cell in enumerate(cells)], np.int64
    )
