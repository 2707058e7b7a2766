"""The only module that knows all stages: wires them, overlaps them, stops them."""

from __future__ import annotations

import platform
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from engine import __version__, bundle, runners
from engine.bundle import Bundle
from engine.errors import Stopped, UsageError
from engine.manifest import Manifest, open_manifest
from engine.overlap import Meter, prefetch
from engine.preprocess import Preprocess
from engine.reader import Reader
from engine.records import Batch, Part, Status
from engine.run_folder import RunFolder
from engine.settings import Settings, available_cpus
from engine.sink import Done, Layout, Sink, finished
from engine.step import CpuStep

CPU_BATCH = 8  # larger batches take more memory and are no faster
CPU_PART_ROWS = 1024
READ_THREADS = 16
STAGES = ("read", "preprocess", "members", "write")


@dataclass
class Progress:
    """What a run has done so far; `rows_done` and the counters grow while it runs."""

    rows: int  # of the manifest
    rows_before: int = 0  # finished by an earlier start of the same run
    rows_done: int = 0  # by this start, on disk or not
    by_status: Counter[str] = field(default_factory=Counter)  # of rows_before and rows_done
    by_class: Counter[str] = field(default_factory=Counter)  # of finished parts
    started: float = field(default_factory=time.monotonic)

    @property
    def errors(self) -> int:
        return self.by_status.total() - self.by_status["ok"] - self.by_status["skipped"]

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Rows per second of this start."""
        return self.rows_done / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(frozen=True)
class Summary:
    """The outcome of a run, as `_SUCCESS` records it."""

    output: Path
    run_id: str
    rows: int
    by_status: dict[str, int]
    by_class: dict[str, int]
    rows_done: int  # by this start; 0 when the run was finished already
    elapsed_s: float
    stages: dict[str, dict[str, float]]  # seconds busy, starved and blocked, and occupancy, of this start
    limited_by: str | None

    @property
    def errors(self) -> int:
        return self.rows - self.by_status.get("ok", 0) - self.by_status.get("skipped", 0)


Watch = Callable[[Progress], None]


class PixelStage(Protocol):
    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]: ...


class ScoreStage(Protocol):
    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]: ...

    def close(self) -> None: ...


def screen(
    settings: Settings, *, watch: Watch = lambda _: None, stop: threading.Event | None = None
) -> Summary:
    """Screen a manifest as `settings` say; the same settings go on where an earlier run stopped.

    `watch` is called after each batch. Setting `stop` ends the run at the next batch with `Stopped`.
    Raises UsageError before anything is written when the manifest, bundle or output folder is wrong.
    """
    models = bundle.load(settings.bundle)
    runner, device = runners.choose(settings.runner, settings.device)
    with ExitStack() as stack:
        _check_source(settings.manifest)
        folder = stack.enter_context(RunFolder(settings.output, overwrite=settings.overwrite))
        manifest = open_manifest(
            settings.manifest, path_column=settings.path_column, root=settings.root, listing=folder.listing
        )
        layout = Layout.of(models, manifest, settings.column_prefix)
        run = _describe(settings, folder.recorded(), manifest, models, runner, device)
        opened = [runners.open_runner(runner, models, member) for member in models.members]
        for member in opened:
            stack.enter_context(member)
        run["versions"] |= {name: text for member in opened for name, text in member.versions.items()}
        run = folder.begin(run)
        if folder.succeeded():
            return _summary(folder, manifest, run, Progress(manifest.rows), {})
        options = run["result_options"]
        workers = settings.workers or available_cpus()
        reader = Reader.within(
            settings.limits,
            root=manifest.root,
            batch_size=options["batch_size"],
            threads=READ_THREADS if settings.overlap else 0,
        )
        preprocess = Preprocess(
            size=models.size,
            batch_size=options["batch_size"],
            threads=workers if settings.overlap else 1,
            max_pixels_at_once=settings.limits.pixels_at_once,
        )
        step = CpuStep(models, opened, lanes=workers if settings.overlap else 0)
        stack.callback(step.close)
        done = finished(folder.path)
        progress = Progress(manifest.rows, rows_before=sum(part.rows for part in done.values()))
        for part in done.values():
            progress.by_status.update(part.by_status)
        parts = manifest.parts(
            options["part_rows"], set(range(-(-manifest.rows // options["part_rows"]))) - set(done)
        )
        sink = Sink(folder.path, layout, run)
        meters = meters_for(workers if settings.overlap else 1)
        items = flow(parts, reader, preprocess, step, sink, meters, overlap=settings.overlap)
        _drain(items, progress, watch, stop)
        summary = _summary(folder, manifest, run, progress, meters)
        folder.succeed(_as_json(summary, run))
        return summary


def meters_for(workers: int) -> dict[str, Meter]:
    """One meter a stage, with as many lanes as the stage has threads."""
    lanes = {"read": min(READ_THREADS, workers), "preprocess": 1, "members": workers}
    return {name: Meter(name, lanes.get(name, 1)) for name in STAGES}


def flow(
    parts: Iterator[Part],
    reader: Reader,
    preprocess: PixelStage,
    step: ScoreStage,
    sink: Sink,
    meters: dict[str, Meter],
    *,
    overlap: bool,
) -> Iterator[Batch | Done]:
    """The stages in a row. Without `overlap` each waits for the next, and the results are the same.

    Reader and step work ahead in threads of their own; only preprocess needs one from here.
    """
    batches = reader.stage(parts, meters["read"])
    pixels = preprocess.stage(batches, meters["preprocess"])
    ready = prefetch(pixels, 2 if overlap else 0, meters["preprocess"])
    return sink.stage(step.stage(ready, meters["members"]), meters["write"])


def _drain(
    items: Iterator[Batch | Done], progress: Progress, watch: Watch, stop: threading.Event | None
) -> None:
    with closing(items):  # type: ignore[type-var]
        for item in items:
            if isinstance(item, Done):
                progress.by_class.update(item.by_class)
                continue
            progress.rows_done += item.rows
            progress.by_status["ok"] += len(item.index)
            for position in item.errors:
                progress.by_status[Status(item.status[position]).label] += 1
            watch(progress)
            if stop and stop.is_set():
                raise Stopped("stopped; the same command goes on where it stopped")


def _check_source(source: Path) -> None:
    """A manifest that isn't there must not leave an output folder behind."""
    if not source.exists():
        raise UsageError(f"manifest {source}: no such file or folder")


def _describe(
    settings: Settings,
    recorded: dict[str, Any] | None,
    manifest: Manifest,
    models: Bundle,
    runner: str,
    device: str,
) -> dict[str, Any]:
    """`_run.json`: result options, which may not change on resume, and facts."""
    before = recorded["result_options"] if recorded else {}
    return {
        "format": 1,
        "run_id": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "result_options": {
            "manifest_sha256": manifest.sha256,
            "root": str(manifest.root),
            "path_column": manifest.path_column,
            "column_prefix": settings.column_prefix,
            "bundle_sha256": models.sha256,
            "runner": runner,
            "device": device,
            "precision": "fp32",
            "decode": models.decode,
            "batch_size": settings.batch_size or before.get("batch_size") or CPU_BATCH,
            "part_rows": settings.part_rows or before.get("part_rows") or CPU_PART_ROWS,
            "max_pixels": settings.limits.max_pixels,
            "max_file_size": settings.limits.max_file_size,
        },
        "manifest": str(manifest.source.absolute()),
        "rows": manifest.rows,
        "bundle": str(models.path.absolute()),
        "classes": list(models.classes),
        "weights": {member.name: member.weight for member in models.members},
        "machine": {"system": f"{platform.system()} {platform.release()}", "processor": processor_name()},
        "versions": versions(),
    }


def processor_name() -> str:
    """The processor's marketing name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def versions() -> dict[str, str]:
    """Of the engine and of what decides the pixels and the files."""
    found = {"engine": __version__, "python": platform.python_version()}
    for package in ("nvidia-dali-cuda130", "imagecodecs", "numpy", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _summary(
    folder: RunFolder, manifest: Manifest, run: dict[str, Any], progress: Progress, meters: dict[str, Meter]
) -> Summary:
    """Counts from the footers of the parts on disk, which have to add up to the manifest."""
    parts = finished(folder.path)
    folder.check(
        {index: part.rows for index, part in parts.items()}, run["result_options"]["part_rows"], manifest.rows
    )
    by_status, by_class = Counter[str](), Counter[str]()
    for part in parts.values():
        by_status.update(part.by_status)
        by_class.update(part.by_class)
    elapsed = progress.elapsed_s
    stages = {
        name: {
            "busy_s": round(meter.busy_s, 3),
            "starved_s": round(meter.starved_s, 3),
            "blocked_s": round(meter.blocked_s, 3),
            "occupancy": round(meter.occupancy(elapsed), 3),
        }
        for name, meter in meters.items()
    }
    limited_by = max(meters, key=lambda name: meters[name].occupancy(elapsed)) if meters else None
    return Summary(
        folder.path,
        run["run_id"],
        manifest.rows,
        dict(by_status),
        dict(by_class),
        progress.rows_done,
        round(elapsed, 3),
        stages,
        limited_by,
    )


def _as_json(summary: Summary, run: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_id": run["run_id"],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": summary.rows,
        "ok": summary.by_status.get("ok", 0),
        "skipped": summary.by_status.get("skipped", 0),
        "errors": summary.errors,
        "by_status": summary.by_status,
        "by_class": summary.by_class,
        "last_start": {
            "rows": summary.rows_done,
            "elapsed_s": summary.elapsed_s,
            "stages": summary.stages,
            "limited_by": summary.limited_by,
        },
    }
