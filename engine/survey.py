"""What a manifest holds and how long its run would take: for `engine.doctor`.

All paths are looked at for some seconds, a sample of the files is read by the run's own reader, and the
bundle is measured on it by the run's own stages.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from engine import installed
from engine.bundle import Bundle
from engine.errors import EngineError, NothingNew, Stopped, UsageError
from engine.findings import Report, size
from engine.job import Say, check_paths, describe, list_new, manifest_of
from engine.listing import in_words
from engine.manifest import Manifest
from engine.overlap import Meter
from engine.pipeline import READ_THREADS
from engine.provenance import RunRecord
from engine.reader import Reader
from engine.records import Batch, Header, Part, Status
from engine.run_folder import RunFolder
from engine.runners import Choice
from engine.settings import Settings
from engine.since import Earlier
from engine.storage import Storage
from engine.tune import Trials, sample
from engine.tuned import Knobs, rate_of

LOOK_S = 4.0  # for files that are not there
SAMPLE, SAMPLE_S = 200, 10.0  # files that are read, at most, and for how long
MEASURE_S = 5.0
# sizes in a Parquet file of the sink, with random scores: measured by `test_the_bytes_of_results`
BYTES_A_PART, BYTES_A_COLUMN = 7_700, 320  # footer and headers: of all, and of each column of scores
BYTES_A_ROW = 24.0  # all columns but scores and those of the manifest
BYTES_A_SCORE = 5.1
MANIFEST_SHARE, MANIFEST_ROWS = 0.4, 4096  # compressed size of manifest columns, of their size in memory
EXAMPLES = 3
FAR = timedelta(days=3650)


@dataclass
class Sampled:
    """What a sample of the files is like."""

    rows: int = 0
    elapsed_s: float = 0.0
    by_status: Counter[str] = field(default_factory=Counter)
    headers: list[Header] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # status and error, by how often

    def add(self, batch: Batch) -> None:
        self.rows += batch.rows
        self.by_status.update(Status(one).label for one in batch.status)
        for found, data in zip(batch.headers, batch.encoded, strict=True):
            if found:
                self.headers.append(found)
                self.bytes_read.append(len(data))
        for position, error in batch.errors.items():
            self.errors[f"{Status(batch.status[position]).label}: {error}"] += 1
        batch.drop_encoded()


def survey(report: Report, found: tuple[Bundle, Choice] | None, say: Say, stop: threading.Event) -> None:
    """Add to `report` what a run over its manifest would do; without a bundle, what can be said without."""
    settings = report.settings
    where = report.place(settings.manifest, "MANIFEST")
    report.section("manifest")
    with TemporaryDirectory(prefix="engine-") as name:
        scratch = Path(name)
        try:
            check_paths(settings)
            manifest = _manifest(settings, found, scratch / "listing.parquet", say)
            if settings.redaction:
                manifest = manifest.only(settings.redaction.keep)
        except NothingNew as nothing:
            report.line("rows", str(nothing))
            return
        except EngineError as error:
            report.problem(str(error), _mended(report, str(error)))
            return
        report.line("rows", str(manifest.rows))
        if manifest.skipped:
            report.line("left out", in_words(manifest.rows, manifest.skipped))
        _look(report, manifest, where)
        try:
            sampled = _read(settings, manifest, stop)
        except UsageError as error:  # a package that reads these files is missing
            report.problem(str(error), _mended(report, str(error)))
            return
        except EngineError as error:
            report.problem(str(error), f"python -m engine.run {where} --root FOLDER")
            return
        _show(report, sampled, where)
        if found and sampled.headers:
            _forecast(report, manifest, sampled, found, scratch, say, stop)


def _manifest(settings: Settings, found: tuple[Bundle, Choice] | None, listing: Path, say: Say) -> Manifest:
    since = settings.since is not None and found is not None
    if settings.since and found:
        list_new(settings, Earlier(settings.since), *found, listing, say)
    return manifest_of(settings, listing, since=since)


def _mended(report: Report, error: str) -> str:
    """The command for a manifest that can't be opened."""
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


def _look(report: Report, manifest: Manifest, where: str) -> None:
    """Are the files there: all that can be asked for in a few seconds, none on other machines."""
    storage, looked, missing, began = Storage(manifest.root), 0, 0, time.monotonic()

    def is_there(path: str | None) -> bool:
        return bool(path) and storage.exists(str(path))

    with ThreadPoolExecutor(READ_THREADS) as threads:
        for paths in _paths(manifest, 1000):
            if storage.any_remote(paths) or time.monotonic() - began > LOOK_S:
                break
            missing += list(threads.map(is_there, paths)).count(False)
            looked += len(paths)
    if not looked:
        report.line("missing", "not looked for: files elsewhere are only sampled")
        return
    of = f"all {looked}" if looked == manifest.rows else f"the first {looked}, in {LOOK_S:g} s"
    report.line("missing", f"{missing} of {of}")
    if missing:
        everything = missing == looked
        hint = "do relative paths start elsewhere?" if everything else "later, when they are back:"
        mend = f"{where} --root FOLDER"
        if not everything:
            mend = f"--only-errors {report.place(report.settings.output, 'OUTPUT')}"
        report.problem(
            f"{missing} of {looked} files are not there; {hint}",
            f"python -m engine.run {mend}",
            grave=everything,
        )


def _paths(manifest: Manifest, count: int) -> Iterator[list[str | None]]:
    for table in manifest.tables():
        column = table.column(manifest.path_column).cast(pa.string())
        for start in range(0, len(column), count):
            yield column.slice(start, count).to_pylist()


def _read(settings: Settings, manifest: Manifest, stop: threading.Event) -> Sampled:
    """A sample of the files by the run's reader. Raises UsageError and EngineError, as a run would."""
    paths = sample(manifest)[:SAMPLE]
    reader = Reader(
        manifest.root,
        batch_size=8,
        threads=READ_THREADS,
        limits=settings.limits,
        timeout_s=min(settings.read_timeout_s, SAMPLE_S),
    )
    found, began = Sampled(), time.monotonic()
    part = Part(0, np.arange(len(paths)), paths, pa.table({}))
    with closing(reader.stage([part], Meter("read"))) as batches:  # type: ignore[type-var]
        for batch in batches:
            found.add(batch)
            found.elapsed_s = time.monotonic() - began
            if found.elapsed_s > SAMPLE_S or stop.is_set():
                break
    return found


def _show(report: Report, sampled: Sampled, where: str) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in sampled.by_status.most_common())
    rate = sampled.rows / max(sampled.elapsed_s, 1e-6)
    report.line("sample", f"{sampled.rows} rows: {counts}; read at {rate:.0f} files/s")
    for error, count in sampled.errors.most_common(EXAMPLES):
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
    bytes_each = size(float(np.mean(sampled.bytes_read)))
    report.line("sizes", f"{middle} in the middle, {largest} the largest; {bytes_each} a file")


def _forecast(
    report: Report,
    manifest: Manifest,
    sampled: Sampled,
    found: tuple[Bundle, Choice],
    scratch: Path,
    say: Say,
    stop: threading.Event,
) -> None:
    """Rate, hours, end; size of the results; what the output folder holds."""
    settings, (models, choice) = report.settings, found
    report.section("run")
    earlier = Earlier(settings.since) if settings.since else None

    def described(recorded: RunRecord | None) -> RunRecord:
        return describe(settings, recorded, manifest, models, choice, earlier=earlier)[-1]

    try:
        run = described(None)
    except UsageError as error:
        where = report.place(settings.manifest, "MANIFEST")
        report.problem(str(error), f"python -m engine.run {where} --column-prefix manifest_")
        return
    done = _output(report, described)
    try:
        rate, source = _rate(settings, manifest, found, scratch, say, stop)
    except Stopped:
        raise
    except EngineError as error:
        report.problem(str(error), installed.install_command("gpu" if choice.gpu else installed.CORE))
        return
    reading = sampled.rows / sampled.elapsed_s
    if reading < rate and sampled.elapsed_s > 1:  # not for threads that have only just begun
        rate, source = reading, f"what reading gave ({source}, but for that: {rate:.1f})"
    left = run.shard_rows(settings.shard) - done
    took = timedelta(seconds=left / rate)
    report.line("rate", f"{rate:.1f} images/s, {source}")
    report.line(
        "takes", f"{_span(took)} for {left} rows" + (f" of shard {settings.shard}" if settings.shard else "")
    )
    end = datetime.now(UTC) + took if took < FAR else None
    text = f"{end.astimezone():%a %d %b %H:%M} if started now" if end else "not in ten years"
    if deadline := settings.finish_by:
        share = (deadline - datetime.now(UTC)) / took if took else 1.0
        text += f"; by {deadline.astimezone():%H:%M} {min(1.0, share):.0%} of it are done"
    report.line("ends", text)
    total = results_bytes(manifest, models, parts=run.part_count)
    report.line("results", f"about {size(total)}")
    if isinstance(settings.output, Path):
        parent = _existing(settings.output)
        free = shutil.disk_usage(parent).free
        report.line("disk", f"{size(free)} free where the results go")
        where = report.place(settings.manifest, "MANIFEST")
        if free < total:
            report.problem(
                f"results of about {size(total)} do not fit on a disk with {size(free)} free",
                f"python -m engine.run {where} -o /LARGER/results",
            )
        if not os.access(parent, os.W_OK):
            report.problem(
                f"output {settings.output}: nothing can be written in {parent}",
                f"python -m engine.run {where} -o FOLDER",
            )


def _output(report: Report, described: Callable[[RunRecord | None], RunRecord]) -> int:
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
    state = "finished" if folder.succeeded() else f"{done} of {rows} rows done, it goes on there"
    report.line("output", f"{settings.output}: {state}")
    return done


def _rate(
    settings: Settings,
    manifest: Manifest,
    found: tuple[Bundle, Choice],
    scratch: Path,
    say: Say,
    stop: threading.Event,
) -> tuple[float, str]:
    """Images/s of this machine, and where that is from."""
    if tuned := rate_of(*found):
        return tuned[0], f"as engine.tune measured here ({tuned[1]})"
    say(f"measuring {found[0].path.name} on a sample for some {MEASURE_S:g} s")
    output = scratch / "results"
    output.mkdir()
    models, choice = found
    bare = manifest.only(())
    trials = Trials(settings, models, choice, bare, scratch=output, say=lambda _: None, stop=stop)
    with trials:
        rate = trials.visit(Knobs(), MEASURE_S)
    (limit,) = trials.limits[Knobs()]
    return rate, f"measured just now on a sample; limited by {limit}"


def _span(span: timedelta) -> str:
    seconds = span.total_seconds()
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def results_bytes(manifest: Manifest, models: Bundle, *, parts: int) -> int:
    """Estimate the size of the results; `manifest` columns by those of its first rows."""
    part = next(manifest.parts(MANIFEST_ROWS))
    columns = part.columns.nbytes + sum(len(path or "") for path in part.paths)
    scores = (1 + len(models.members)) * len(models.classes)
    row = BYTES_A_ROW + BYTES_A_SCORE * scores + MANIFEST_SHARE * columns / part.rows
    return int((BYTES_A_PART + BYTES_A_COLUMN * scores) * parts + row * manifest.rows)


def _existing(path: Path) -> Path:
    """The folder, or the nearest above that is there."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place
