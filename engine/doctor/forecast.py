"""Forecast the time and the disk space of a run."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from engine.bundle.bundle import Bundle
from engine.core import extras
from engine.core.errors import EngineError, Stopped, UsageError
from engine.core.records import OnMessage
from engine.core.settings import Settings
from engine.doctor.diagnosis import Diagnosis, format_bytes
from engine.doctor.sample import FileSample
from engine.manifest.manifest import Manifest
from engine.runners.base import RunnerChoice
from engine.runs.incremental import PreviousRun
from engine.runs.prepare import describe
from engine.runs.profile import TunedOptions, profiled_rate
from engine.runs.run_folder import RunFolder
from engine.runs.run_record import RunRecord
from engine.tune.trials import Trials

MEASURE_S = 5.0
# sizes in a Parquet file of the sink, with random scores: measured by `test_the_bytes_of_results`
BYTES_A_PART, BYTES_A_COLUMN = 7_700, 320  # footer and headers: of all, and of each column of scores
BYTES_A_ROW = 24.0  # all columns but scores and those of the manifest
BYTES_A_SCORE = 5.1
MANIFEST_SHARE, MANIFEST_ROWS = 0.4, 4096  # compressed size of manifest columns, of their size in memory
MAX_FORECAST = timedelta(days=3650)


def forecast_run(
    report: Diagnosis,
    manifest: Manifest,
    sampled: FileSample,
    found: tuple[Bundle, RunnerChoice],
    scratch: Path,
    say: OnMessage,
    stop: threading.Event,
) -> None:
    """Rate, hours, end; size of the results; what the output folder holds."""
    settings, (bundle, choice) = report.settings, found
    report.section("run")
    earlier = PreviousRun(settings.since) if settings.since else None

    def described(recorded: RunRecord | None) -> RunRecord:
        return describe(settings, recorded, manifest, bundle, choice, earlier=earlier)[-1]

    try:
        run = described(None)
    except UsageError as error:
        where = report.place(settings.manifest, "MANIFEST")
        report.problem(str(error), f"python -m engine.run {where} --column-prefix manifest_")
        return
    done = _check_output(report, described)
    try:
        rate, source = _measure_rate(settings, manifest, found, scratch, say, stop)
    except Stopped:
        raise
    except EngineError as error:
        report.problem(str(error), extras.install_command("gpu" if choice.gpu else extras.NO_EXTRA))
        return
    reading = sampled.rows / sampled.elapsed_s
    if reading < rate and sampled.elapsed_s > 1:  # not for threads that have only just begun
        rate, source = reading, f"what reading gave ({source}, but for that: {rate:.1f})"
    left = run.shard_rows(settings.shard) - done
    took = timedelta(seconds=left / rate)
    report.line("rate", f"{rate:.1f} images/s, {source}")
    report.line(
        "takes",
        f"{_format_span(took)} for {left} rows" + (f" of shard {settings.shard}" if settings.shard else ""),
    )
    end = datetime.now(UTC) + took if took < MAX_FORECAST else None
    text = f"{end.astimezone():%a %d %b %H:%M} if started now" if end else "not in ten years"
    if deadline := settings.finish_by:
        share = (deadline - datetime.now(UTC)) / took if took else 1.0
        text += f"; by {deadline.astimezone():%H:%M} {min(1.0, share):.0%} of it are done"
    report.line("ends", text)
    total = results_bytes(manifest, bundle, parts=run.part_count)
    report.line("results", f"about {format_bytes(total)}")
    if isinstance(settings.output, Path):
        parent = _nearest_folder(settings.output)
        free = shutil.disk_usage(parent).free
        report.line("disk", f"{format_bytes(free)} free where the results go")
        where = report.place(settings.manifest, "MANIFEST")
        if free < total:
            report.problem(
                f"results of about {format_bytes(total)} do not fit on a disk with {format_bytes(free)} free",
                f"python -m engine.run {where} -o /LARGER/results",
            )
        if not os.access(parent, os.W_OK):
            report.problem(
                f"output {settings.output}: nothing can be written in {parent}",
                f"python -m engine.run {where} -o FOLDER",
            )


def _check_output(report: Diagnosis, described: Callable[[RunRecord | None], RunRecord]) -> int:
    """Say what the output folder holds; return how many rows are done there already.

    `described` gives the run, which may go on with a recorded one.
    """
    settings = report.settings
    where = f"python -m engine.run {report.place(settings.manifest, 'MANIFEST')}"
    folder = RunFolder(settings.output, overwrite=settings.overwrite)
    try:
        folder.refuse_foreign()
        recorded = folder.recorded()
        if recorded is None:
            report.line("output", f"{settings.output}: a new run")
            return 0
        if settings.overwrite:
            report.line("output", f"{settings.output}: the run there would be deleted")
            return 0
        finished = folder.finished(recorded, recorded.part_indices(settings.shard))
        folder.check_same(recorded, described(recorded))
    except (EngineError, OSError) as error:
        report.problem(str(error), f"{where} -o FOLDER")
        return 0
    done = sum(part.rows for part in finished.values())
    rows = recorded.shard_rows(settings.shard)
    state = "finished" if folder.is_marked_finished() else f"{done} of {rows} rows done; it continues there"
    report.line("output", f"{settings.output}: {state}")
    return done


def _measure_rate(
    settings: Settings,
    manifest: Manifest,
    found: tuple[Bundle, RunnerChoice],
    scratch: Path,
    say: OnMessage,
    stop: threading.Event,
) -> tuple[float, str]:
    """Images/s of this machine, and where that is from."""
    if tuned := profiled_rate(*found):
        return tuned[0], f"as engine.tune measured here ({tuned[1]})"
    say(f"measuring {found[0].path.name} on a sample for some {MEASURE_S:g} s")
    output = scratch / "results"
    output.mkdir()
    bundle, choice = found
    bare = manifest.only(())
    trials = Trials(settings, bundle, choice, bare, scratch=output, say=lambda _: None, stop=stop)
    with trials:
        rate = trials.visit(TunedOptions(), MEASURE_S)
    (limit,) = trials.limits[TunedOptions()]
    return rate, f"measured just now on a sample; limited by {limit}"


def _format_span(span: timedelta) -> str:
    seconds = span.total_seconds()
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def results_bytes(manifest: Manifest, bundle: Bundle, *, parts: int) -> int:
    """Estimate the size of the results; `manifest` columns by those of its first rows."""
    part = next(manifest.parts(MANIFEST_ROWS))
    columns = part.columns.nbytes + sum(len(path or "") for path in part.paths)
    scores = (1 + len(bundle.members)) * len(bundle.classes)
    row = BYTES_A_ROW + BYTES_A_SCORE * scores + MANIFEST_SHARE * columns / part.rows
    return int((BYTES_A_PART + BYTES_A_COLUMN * scores) * parts + row * manifest.rows)


def _nearest_folder(path: Path) -> Path:
    """Return the folder, or the nearest existing one above it."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place
