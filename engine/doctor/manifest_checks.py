"""Check a manifest for `engine.doctor`, and how long its run would take.

All paths are looked at for some seconds, a sample of the files is read by the run's own reader, and the
bundle is measured on it by the run's own stages.
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

EXISTENCE_CHECK_S = 4.0  # for files that are not there
SAMPLE_ROWS, SAMPLE_S = 200, 10.0  # files that are read, at most, and for how long
MAX_EXAMPLES = 3


def check_manifest(
    report: Diagnosis, found: tuple[Bundle, RunnerChoice] | None, say: OnMessage, stop: threading.Event
) -> None:
    """Add to `report` what a run over its manifest would do; without a bundle, what can be said without."""
    settings = report.settings
    where = report.place(settings.manifest, "MANIFEST")
    report.section("manifest")
    with TemporaryDirectory(prefix="engine-") as name:
        scratch = Path(name)
        try:
            check_inputs(settings)
            manifest = _open_manifest(settings, found, scratch / "listing.parquet", say)
            if settings.redaction:
                manifest = manifest.only(settings.redaction.keep)
        except NothingNew as nothing:
            report.line("rows", str(nothing))
            return
        except EngineError as error:
            report.problem(str(error), _fix_command(report, str(error)))
            return
        report.line("rows", str(manifest.rows))
        if manifest.skipped:
            report.line("left out", describe_list(manifest.rows, manifest.skipped))
        _check_files_exist(report, manifest, where)
        try:
            sampled = _read_sample(settings, manifest, stop)
        except UsageError as error:  # a package that reads these files is missing
            report.problem(str(error), _fix_command(report, str(error)))
            return
        except EngineError as error:
            report.problem(str(error), f"python -m engine.run {where} --root FOLDER")
            return
        _report_sample(report, sampled, where)
        if found and sampled.headers:
            forecast_run(report, manifest, sampled, found, scratch, say, stop)


def _open_manifest(
    settings: Settings, found: tuple[Bundle, RunnerChoice] | None, listing: Path, say: OnMessage
) -> Manifest:
    since = settings.since is not None and found is not None
    if settings.since and found:
        list_incremental(settings, PreviousRun(settings.since), *found, listing, say)
    return open_run_manifest(settings, listing, since=since)


def _fix_command(report: Diagnosis, error: str) -> str:
    """Return the command that fixes a manifest that cannot be opened."""
    where = report.place(report.settings.manifest, "MANIFEST")
    _, installs, command = error.partition("install it with: ")
    if installs:
        return command
    if "no such file" in error:
        return "python -m engine.manifest FOLDER -o list.parquet"
    if "python -m engine.manifest" in error:
        return f"python -m engine.manifest {where} -o list.parquet"
    options = {"--root": "--root FOLDER", "--path-column": "--path-column NAME", "--keep": "--redact"}
    option = next((option for name, option in options.items() if name in error), None)
    return f"python -m engine.run {where} {option}" if option else "python -m engine.run MANIFEST"


def _check_files_exist(report: Diagnosis, manifest: Manifest, where: str) -> None:
    """Are the files there: all that can be asked for in a few seconds, none on other machines."""
    storage, looked, missing, began = ImageStorage(manifest.root), 0, 0, time.monotonic()

    def is_there(path: str | None) -> bool:
        return bool(path) and storage.exists(str(path))

    with ThreadPoolExecutor(READ_THREADS) as threads:
        for paths in _first_paths(manifest, 1000):
            if storage.any_remote(paths) or time.monotonic() - began > EXISTENCE_CHECK_S:
                break
            missing += list(threads.map(is_there, paths)).count(False)
            looked += len(paths)
    if not looked:
        report.line("missing", "not looked for: files elsewhere are only sampled")
        return
    of = f"all {looked}" if looked == manifest.rows else f"the first {looked}, in {EXISTENCE_CHECK_S:g} s"
    report.line("missing", f"{missing} of {of}")
    if missing:
        everything = missing == looked
        hint = "do relative paths start elsewhere?" if everything else "later, when they are back:"
        fix = f"{where} --root FOLDER"
        if not everything:
            fix = f"--only-errors {report.place(report.settings.output, 'OUTPUT')}"
        report.problem(
            f"{missing} of {looked} files are not there; {hint}",
            f"python -m engine.run {fix}",
            blocking=everything,
        )


def _first_paths(manifest: Manifest, count: int) -> Iterator[list[str | None]]:
    for table in manifest.tables():
        column = table.column(manifest.path_column).cast(pa.string())
        for start in range(0, len(column), count):
            yield column.slice(start, count).to_pylist()


def _read_sample(settings: Settings, manifest: Manifest, stop: threading.Event) -> FileSample:
    """Read a sample of the files with the run's reader. Raises UsageError and EngineError, as a run would."""
    paths = sample_paths(manifest)[:SAMPLE_ROWS]
    reader = Reader(
        manifest.root,
        batch_size=8,
        threads=READ_THREADS,
        limits=settings.limits,
        timeout_s=min(settings.read_timeout_s, SAMPLE_S),
    )
    found, began = FileSample(), time.monotonic()
    part = Part(0, np.arange(len(paths)), paths, pa.table({}))
    with closing(reader.stage([part], Meter("read"))) as batches:  # type: ignore[type-var]
        for batch in batches:
            found.add(batch)
            found.elapsed_s = time.monotonic() - began
            if found.elapsed_s > SAMPLE_S or stop.is_set():
                break
    return found


def _report_sample(report: Diagnosis, sampled: FileSample, where: str) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in sampled.by_status.most_common())
    rate = sampled.rows / max(sampled.elapsed_s, 1e-6)
    report.line("sample", f"{sampled.rows} rows: {counts}; read at {rate:.0f} files/s")
    for error, count in sampled.errors.most_common(MAX_EXAMPLES):
        report.line("such as", f"{count} x {error}")
    if not sampled.headers:
        report.problem(
            "none of the files sampled can be scored", f"python -m engine.run {where} --root FOLDER"
        )
        return
    formats = Counter(header.format for header in sampled.headers)
    report.line("formats", ", ".join(f"{count} {name}" for name, count in formats.most_common()))
    order = sorted(sampled.headers, key=lambda header: header.width * header.height)
    middle, largest = (f"{one.width} x {one.height}" for one in (order[len(order) // 2], order[-1]))
    bytes_each = format_bytes(float(np.mean(sampled.bytes_read)))
    report.line("sizes", f"{middle} in the middle, {largest} the largest; {bytes_each} a file")
