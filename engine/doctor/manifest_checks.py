"""Check a manifest for `engine.doctor`, and forecast how long its run would take.

For some seconds the paths are checked for existence; then the reader of a run reads a sample of the files,
and the stages of a run measure the bundle on a sample.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from engine.bundle.bundle import Bundle
from engine.core.errors import EngineError, NothingNew, UsageError
from engine.core.overlap import Meter
from engine.core.records import OnMessage, Part
from engine.core.settings import Settings
from engine.doctor.diagnosis import Diagnosis, format_bytes
from engine.doctor.forecast import forecast_run
from engine.doctor.sample import FileSample
from engine.manifest.listing import describe_list
from engine.manifest.manifest import Manifest
from engine.pipeline.context import READ_THREADS
from engine.reader.reader import Reader
from engine.runners.base import RunnerChoice
from engine.runs.incremental import PreviousRun
from engine.runs.prepare import check_inputs, list_incremental, open_run_manifest
from engine.storage.images import ImageStorage
from engine.tune.trials import sample_paths

EXISTENCE_CHECK_S = 4.0  # time to look for missing files
SAMPLE_ROWS, SAMPLE_S = 200, 10.0  # limits of the sample that is read
MAX_EXAMPLES = 3


def check_manifest(
    diagnosis: Diagnosis,
    bundle_and_choice: tuple[Bundle, RunnerChoice] | None,
    say: OnMessage,
    stop: threading.Event,
) -> None:
    """Add the lines of the manifest to `diagnosis`, and with a bundle the forecast of its run."""
    settings = diagnosis.settings
    path = diagnosis.quote(settings.manifest, "MANIFEST")
    diagnosis.add_section("manifest")
    with TemporaryDirectory(prefix="engine-") as name:
        scratch = Path(name)
        try:
            check_inputs(settings)
            manifest = _open_manifest(settings, bundle_and_choice, scratch / "listing.parquet", say)
            if settings.redaction:
                manifest = manifest.only(settings.redaction.keep)
        except NothingNew as nothing:
            diagnosis.add_line("rows", str(nothing))
            return
        except EngineError as error:
            diagnosis.add_problem(str(error), _fix_command(diagnosis, str(error)))
            return
        diagnosis.add_line("rows", str(manifest.rows))
        if manifest.skipped:
            diagnosis.add_line("left out", describe_list(manifest.rows, manifest.skipped))
        _check_files_exist(diagnosis, manifest, path)
        try:
            sample = _read_sample(settings, manifest, stop)
        except UsageError as error:  # a package is missing that reads these files
            diagnosis.add_problem(str(error), _fix_command(diagnosis, str(error)))
            return
        except EngineError as error:
            diagnosis.add_problem(str(error), f"python -m engine.run {path} --root FOLDER")
            return
        _describe_sample(diagnosis, sample, path)
        if bundle_and_choice and sample.headers:
            forecast_run(diagnosis, manifest, sample, *bundle_and_choice, scratch, say, stop)


def _open_manifest(
    settings: Settings,
    bundle_and_choice: tuple[Bundle, RunnerChoice] | None,
    listing: Path,
    say: OnMessage,
) -> Manifest:
    if settings.since and bundle_and_choice:
        list_incremental(settings, PreviousRun(settings.since), *bundle_and_choice, listing, say)
        return open_run_manifest(settings, listing, since=True)
    return open_run_manifest(settings, listing, since=False)


def _fix_command(diagnosis: Diagnosis, error: str) -> str:
    """Return the command that fixes a manifest that cannot be opened."""
    path = diagnosis.quote(diagnosis.settings.manifest, "MANIFEST")
    _, installs, command = error.partition("install it with: ")
    if installs:
        return command
    if "no such file" in error:
        return "python -m engine.manifest FOLDER -o list.parquet"
    if "python -m engine.manifest" in error:
        return f"python -m engine.manifest {path} -o list.parquet"
    options = {"--root": "--root FOLDER", "--path-column": "--path-column NAME", "--keep": "--redact"}
    option = next((option for name, option in options.items() if name in error), None)
    return f"python -m engine.run {path} {option}" if option else "python -m engine.run MANIFEST"


def _check_files_exist(diagnosis: Diagnosis, manifest: Manifest, manifest_path: str) -> None:
    """Count the missing files among those that can be checked within EXISTENCE_CHECK_S; skip remote ones."""
    storage, checked, missing, began = ImageStorage(manifest.root), 0, 0, time.monotonic()

    def exists(path: str | None) -> bool:
        return bool(path) and storage.exists(str(path))

    with ThreadPoolExecutor(READ_THREADS) as threads:
        for paths in _path_chunks(manifest, 1000):
            if storage.any_remote(paths) or time.monotonic() - began > EXISTENCE_CHECK_S:
                break
            missing += list(threads.map(exists, paths)).count(False)
            checked += len(paths)
    if not checked:
        diagnosis.add_line("missing", "not checked: remote files are only sampled")
        return
    total = f"all {checked}" if checked == manifest.rows else f"the first {checked}"
    diagnosis.add_line("missing", f"{missing} of {total}")
    if not missing:
        return
    hint, fix = "name the folder where relative paths start:", f"{manifest_path} --root FOLDER"
    if missing < checked:
        output = diagnosis.quote(diagnosis.settings.output, "OUTPUT")
        hint, fix = "score them later, when they exist:", f"--only-errors {output}"
    text = f"{missing} of {checked} files do not exist; {hint}"
    diagnosis.add_problem(text, f"python -m engine.run {fix}", blocking=missing == checked)


def _path_chunks(manifest: Manifest, count: int) -> Iterator[list[str | None]]:
    for table in manifest.tables():
        column = table.column(manifest.path_column).cast(pa.string())
        for start in range(0, len(column), count):
            yield column.slice(start, count).to_pylist()


def _read_sample(settings: Settings, manifest: Manifest, stop: threading.Event) -> FileSample:
    """Read a sample of the files with the run's reader. Raises UsageError and EngineError like a run."""
    paths = sample_paths(manifest)[:SAMPLE_ROWS]
    reader = Reader(
        manifest.root,
        batch_size=8,
        threads=READ_THREADS,
        limits=settings.limits,
        timeout_s=min(settings.read_timeout_s, SAMPLE_S),
    )
    sample, began = FileSample(), time.monotonic()
    part = Part(0, np.arange(len(paths)), paths, pa.table({}))
    with closing(reader.stage([part], Meter("read"))) as batches:  # type: ignore[type-var]
        for batch in batches:
            sample.add(batch)
            sample.elapsed_s = time.monotonic() - began
            if sample.elapsed_s > SAMPLE_S or stop.is_set():
                break
    return sample


def _describe_sample(diagnosis: Diagnosis, sample: FileSample, manifest_path: str) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in sample.by_status.most_common())
    rate = sample.rows / max(sample.elapsed_s, 1e-6)
    diagnosis.add_line("sample", f"{sample.rows} rows: {counts}; read at {rate:.0f} files/s")
    for error, count in sample.errors.most_common(MAX_EXAMPLES):
        diagnosis.add_line("error", f"{count} x {error}")
    if not sample.headers:
        fix = f"python -m engine.run {manifest_path} --root FOLDER"
        diagnosis.add_problem("no file of the sample can be scored", fix)
        return
    formats = Counter(header.format for header in sample.headers)
    diagnosis.add_line("formats", ", ".join(f"{count} {name}" for name, count in formats.most_common()))
    order = sorted(sample.headers, key=lambda header: header.width * header.height)
    median, largest = (f"{header.width} x {header.height}" for header in (order[len(order) // 2], order[-1]))
    bytes_each = format_bytes(float(np.mean(sample.bytes_read)))
    diagnosis.add_line("sizes", f"median {median}, largest {largest}; {bytes_each} a file")
