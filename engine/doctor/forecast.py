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
# sizes in a Parquet part with random scores, checked by `test_the_bytes_of_results`
BYTES_A_PART, BYTES_A_COLUMN = 7_700, 320  # footer and headers, per part and per column of scores
BYTES_A_ROW = 24.0  # without the scores and the columns of the manifest
BYTES_A_SCORE = 5.1
MANIFEST_SHARE, MANIFEST_ROWS = 0.4, 4096  # compressed size of manifest columns / size in memory
MAX_FORECAST = timedelta(days=3650)


def forecast_run(
    diagnosis: Diagnosis,
    manifest: Manifest,
    sample: FileSample,
    bundle: Bundle,
    choice: RunnerChoice,
    scratch: Path,
    say: OnMessage,
    stop: threading.Event,
) -> None:
    """Add the forecast of rate, time, end and disk space, and the state of the output folder."""
    settings = diagnosis.settings
    command = f"python -m engine.run {diagnosis.quote(settings.manifest, 'MANIFEST')}"
    diagnosis.add_section("run")
    previous = PreviousRun(settings.since) if settings.since else None

    def describe_run(recorded: RunRecord | None) -> RunRecord:
        return describe(settings, recorded, manifest, bundle, choice, earlier=previous)[-1]

    try:
        run = describe_run(None)
    except UsageError as error:
        diagnosis.add_problem(str(error), f"{command} --column-prefix manifest_")
        return
    done = _check_output(diagnosis, describe_run, command)
    try:
        rate, source = _measure_rate(settings, manifest, bundle, choice, scratch, say, stop)
    except Stopped:
        raise
    except EngineError as error:
        diagnosis.add_problem(str(error), extras.install_command("gpu" if choice.gpu else extras.NO_EXTRA))
        return
    read_rate = sample.rows / sample.elapsed_s
    if read_rate < rate and sample.elapsed_s > 1:  # a shorter sample measures the start of the threads
        rate, source = read_rate, f"limited by reading (without it {rate:.1f}, {source})"
    left = run.shard_rows(settings.shard) - done
    duration = timedelta(seconds=left / rate)
    diagnosis.add_line("rate", f"{rate:.1f} images/s, {source}")
    shard = f" of shard {settings.shard}" if settings.shard else ""
    diagnosis.add_line("takes", f"{_format_duration(duration)} for {left} rows{shard}")
    end = datetime.now(UTC) + duration if duration < MAX_FORECAST else None
    text = f"{end.astimezone():%a %d %b %H:%M} if started now" if end else "in more than ten years"
    if deadline := settings.finish_by:
        share = (deadline - datetime.now(UTC)) / duration if duration else 1.0
        text += f"; {min(1.0, share):.0%} done by {deadline.astimezone():%H:%M}"
    diagnosis.add_line("ends", text)
    total = results_bytes(manifest, bundle, parts=run.part_count)
    diagnosis.add_line("results", f"about {format_bytes(total)}")
    if isinstance(settings.output, Path):
        parent = _nearest_folder(settings.output)
        free = shutil.disk_usage(parent).free
        diagnosis.add_line("disk", f"{format_bytes(free)} free for the results")
        if free < total:
            diagnosis.add_problem(
                f"results of about {format_bytes(total)} do not fit on a disk with {format_bytes(free)} free",
                f"{command} -o /LARGER/results",
            )
        if not os.access(parent, os.W_OK):
            text = f"output {settings.output}: the folder {parent} is not writable"
            diagnosis.add_problem(text, f"{command} -o FOLDER")


def _check_output(
    diagnosis: Diagnosis, describe_run: Callable[[RunRecord | None], RunRecord], command: str
) -> int:
    """Describe the output folder; return the number of rows that are already done there.

    `describe_run` returns the record of the run, which may continue a recorded one.
    """
    settings = diagnosis.settings
    folder = RunFolder(settings.output, overwrite=settings.overwrite)
    try:
        folder.refuse_foreign()
        recorded = folder.recorded()
        if recorded is None:
            diagnosis.add_line("output", f"{settings.output}: a new run")
            return 0
        if settings.overwrite:
            diagnosis.add_line("output", f"{settings.output}: the run in it would be deleted")
            return 0
        finished = folder.finished(recorded, recorded.part_indices(settings.shard))
        folder.check_same(recorded, describe_run(recorded))
    except (EngineError, OSError) as error:
        diagnosis.add_problem(str(error), f"{command} -o FOLDER")
        return 0
    done = sum(part.rows for part in finished.values())
    rows = recorded.shard_rows(settings.shard)
    state = "finished" if folder.is_marked_finished() else f"{done} of {rows} rows done; the run continues"
    diagnosis.add_line("output", f"{settings.output}: {state}")
    return done


def _measure_rate(
    settings: Settings,
    manifest: Manifest,
    bundle: Bundle,
    choice: RunnerChoice,
    scratch: Path,
    say: OnMessage,
    stop: threading.Event,
) -> tuple[float, str]:
    """Return the images/s of this machine and the source of the figure."""
    if tuned := profiled_rate(bundle, choice):
        return tuned[0], f"as engine.tune measured here ({tuned[1]})"
    say(f"measuring {bundle.path.name} on a sample for some {MEASURE_S:g} s")
    output = scratch / "results"
    output.mkdir()
    bare = manifest.only(())
    with Trials(settings, bundle, choice, bare, scratch=output, say=lambda _: None, stop=stop) as trials:
        rate = trials.measure(TunedOptions(), MEASURE_S)
    (limit,) = trials.limits[TunedOptions()]
    return rate, f"measured just now on a sample; limited by {limit}"


def _format_duration(duration: timedelta) -> str:
    seconds = duration.total_seconds()
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def results_bytes(manifest: Manifest, bundle: Bundle, *, parts: int) -> int:
    """Estimate the size of the results from the first rows of the manifest."""
    part = next(manifest.parts(MANIFEST_ROWS))
    columns = part.columns.nbytes + sum(len(path or "") for path in part.paths)
    scores = (1 + len(bundle.members)) * len(bundle.classes)
    row = BYTES_A_ROW + BYTES_A_SCORE * scores + MANIFEST_SHARE * columns / part.rows
    return int((BYTES_A_PART + BYTES_A_COLUMN * scores) * parts + row * manifest.rows)


def _nearest_folder(path: Path) -> Path:
    """Return the folder, or the nearest existing one above it."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
