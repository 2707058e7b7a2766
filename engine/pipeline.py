"""The only module that knows all stages: wires them, overlaps them, stops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

from engine import bundle
from engine.bundle import Bundle
from engine.errors import EngineError, NothingNew, Stopped, UsageError
from engine.gpu import machine
from engine.header import Header
from engine.ledger import Progress, Summary, summary_of
from engine.listing import in_words
from engine.manifest import Manifest, open_manifest
from engine.overlap import Meter, prefetch
from engine.preprocess.stage import Preprocess
from engine.provenance import describe
from engine.reader import Reader
from engine.records import Batch, Part
from engine.run_folder import RunFolder, parts_of
from engine.runners import Choice, Runner, choose, open_runner
from engine.settings import Settings, available_cpus
from engine.since import Earlier, write_new
from engine.sink import Done, Layout, Sink
from engine.step import CpuStep
from engine.storage import Url
from engine.storage.location import Place, absolute
from engine.tuned import advise

READ_THREADS = 16
GRACE_S = 5.0  # a part that ends within is finished before the run stops
STAGES = ("read", "preprocess", "members", "write")

Watch = Callable[[Progress], None]
Say = Callable[[str], None]
OnGpu = Callable[[bytes, Header], bool]


class PixelStage(Protocol):
    @property
    def crashes(self) -> int:
        """How often a decoder had to be started anew."""
        ...

    @property
    def refusals(self) -> int:
        """How many images the GPU's decoder refused, so that the CPU had to look."""
        ...

    @property
    def on_gpu(self) -> OnGpu | None:
        """Which images are decoded on the GPU; None where none is."""
        ...

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]: ...


class ScoreStage(Protocol):
    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]: ...

    def close(self) -> None: ...


def screen(
    settings: Settings,
    *,
    watch: Watch = lambda _: None,
    say: Say = lambda _: None,
    stop: threading.Event | None = None,
    stages_of: Callable[[Opening], Stages] | None = None,
) -> Summary:
    """Screen a manifest as `settings` say; the same settings go on where an earlier run stopped.

    `watch` is called after each batch, `say` with lines for people. Setting `stop` ends the run within
    seconds with `Stopped`.
    `stages_of` replaces the stages, for benchmarks and for calibration.
    Raises UsageError before anything is written when the manifest, bundle or output folder is wrong.
    """
    models = bundle.load(settings.bundle)
    choice = choice_of(settings, models)
    check_paths(settings)
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(settings.output, overwrite=settings.overwrite))
        earlier = Earlier(settings.since) if settings.since else None
        listing = folder.listing()
        if earlier and not listing.exists():
            list_new(settings, earlier, models, choice, listing, say)
        manifest = manifest_of(settings, listing, since=earlier is not None)
        folder.keep_listing()
        if settings.redaction:
            manifest = manifest.only(settings.redaction.keep)
        recorded = None if settings.overwrite else folder.recorded()
        layout = Layout.of(models, manifest, settings, recorded)
        advice = advise(settings, models, choice, recorded=recorded)
        if advice.settings != settings:
            settings = advice.settings
            choice = choice_of(settings, models)
        run = describe(
            settings,
            recorded,
            manifest,
            models,
            choice,
            since=f"{earlier.run_id} of {absolute(settings.manifest)}" if earlier else None,
        )
        run["profile"] = advice.recorded
        run["tuning"] |= advice.tuning or {}
        opening = Opening(
            settings, models, run, choice, say, manifest.root, resumed=recorded is not None, manifest=manifest
        )
        stages = stack.enter_context((stages_of or Stages)(opening))
        run = folder.begin(run)
        done = folder.finished(run)
        if folder.succeeded() and len(done) == parts_of(run):
            return summary_of(folder.path, run, done.values(), Progress(manifest.rows), {}, 0)
        say(choice.reason)
        if models.operating_points:
            say(f"triage: {models.operating_points}{_other_precision(models, choice)}")
        if (run.get("out_of_distribution") or "").startswith("not"):
            say(f"out of distribution is {run['out_of_distribution']} gives no distances")
        if advice.line:
            say(advice.line)
        if recorded is None and manifest.skipped:
            say(in_words(manifest.rows, manifest.skipped))
        folder.withdraw()
        progress = Progress(manifest.rows, finish_by=settings.finish_by)
        for part in done.values():
            progress.rows_before += part.rows
            progress.by_status.update(part.by_status)
        wanted = set(range(parts_of(run))) - set(done)
        parts = manifest.parts(run["result_options"]["part_rows"], wanted)
        stages.run(parts, Sink(folder.files, layout, run), progress, watch, stop)
        return close_ledger(folder, run, progress, stages)


def choice_of(settings: Settings, models: Bundle) -> Choice:
    """What runs the members. Raises UsageError for what can't be had here, or not of this bundle."""
    _check_decode(settings, models)
    return choose(
        settings.runner,
        settings.device,
        models,
        precision=settings.precision,
        batch_size=settings.batch_size,
    )


@dataclass(frozen=True)
class Opening:
    """What stages are opened with."""

    settings: Settings
    models: Bundle
    run: dict[str, Any]  # `_run.json` to be; takes in versions and what is tuned
    choice: Choice
    say: Say
    root: Place  # of relative paths
    _: KW_ONLY
    resumed: bool
    manifest: Manifest | None = None  # None for a retry, which has been tuned

    @property
    def workers(self) -> int:
        return (self.settings.workers or available_cpus()) if self.settings.overlap else 1

    def reader(self, on_gpu: OnGpu | None = None) -> Reader:
        settings, options = self.settings, self.run["result_options"]
        return Reader(
            self.root,
            batch_size=options["batch_size"],
            threads=READ_THREADS if settings.overlap else 1,
            limits=settings.limits,
            timeout_s=settings.read_timeout_s,
            ahead=settings.overlap,
            on_gpu=on_gpu,
        )


class Stages:
    """The stages of one run, opened: decoder process, members and lanes."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.meters: dict[str, Meter] = meters_for(opening.workers, gpu=opening.choice.gpu is not None)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.open(stack)
            self._opened = stack.pop_all()
        return self

    preprocess: PixelStage
    step: ScoreStage

    def open(self, stack: ExitStack) -> None:
        """Set `preprocess` and `step`; what has to be closed goes to `stack`."""
        if self.opening.choice.device != "cpu":
            from engine.gpu.stages import open_gpu

            self.preprocess, self.step = open_gpu(stack, self.opening)
            return
        settings, models, workers = self.opening.settings, self.opening.models, self.opening.workers
        # first, so that it starts while the members load
        preprocess = Preprocess(
            size=models.size,
            batch_size=self.opening.run["result_options"]["batch_size"],
            threads=workers,
            decoding_bytes=settings.limits.decoding_bytes,
            decode=models.decode,
        )
        self.preprocess = stack.enter_context(preprocess)
        members = open_members(stack, self.opening)
        self.step = CpuStep(models, members, lanes=workers if settings.overlap else 0)
        stack.callback(self.step.close)
        preprocess.decoder.await_start()

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def run(
        self,
        parts: Iterator[Part],
        sink: Sink,
        progress: Progress,
        watch: Watch,
        stop: threading.Event | None,
    ) -> None:
        opening = self.opening
        reader = opening.reader(self.preprocess.on_gpu)
        overlap = opening.settings.overlap
        items = flow(parts, reader, self.preprocess, self.step, sink, self.meters, overlap=overlap)
        progress.started, progress.meters = time.monotonic(), self.meters
        try:
            drain(items, progress, watch, stop, part_rows=opening.run["result_options"]["part_rows"])
        except RuntimeError as error:  # others use the GPU too
            if opening.choice.gpu and machine.is_shortage(error):
                raise EngineError(
                    f"{opening.choice.gpu.name} ran out of memory; free some, and the same command goes on"
                ) from None
            raise


def open_members(stack: ExitStack, opening: Opening, *, compiled: bool = False) -> list[Runner]:
    """A runner for each member; their versions go into the run."""
    members = []
    for member in opening.models.members:
        runner = open_runner(opening.choice, opening.models, member, compiled=compiled)
        members.append(stack.enter_context(runner))
        opening.run["versions"] |= runner.versions
    return members


def meters_for(workers: int, *, gpu: bool = False) -> dict[str, Meter]:
    """One meter a stage, with as many lanes as the stage has threads; a GPU counts as one."""
    lanes = {"read": min(READ_THREADS, workers), "preprocess": 1, "members": 1 if gpu else workers}
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


def drain(
    items: Iterator[Batch | Done],
    progress: Progress,
    watch: Watch,
    stop: threading.Event | None,
    *,
    part_rows: int,
) -> None:
    """Run the flow to its end, or to where it has to stop: then raises Stopped."""
    asked: float | None = None
    with closing(items):  # type: ignore[type-var]
        for item in items:
            if isinstance(item, Done):
                progress.by_class.update(item.by_class)
                left = 0
            else:
                progress.add(item)
                watch(progress)
                left = item.part.rows - item.start - item.rows
            if stop and stop.is_set() and progress.rows_left:
                asked = asked or time.monotonic()
                grace_s = asked + GRACE_S - time.monotonic()
                if isinstance(item, Done) or progress.seconds_for(left) > grace_s:
                    raise Stopped(f"stopped, {_so_far(progress)}")
            if progress.finish_by and progress.rows_left:
                next_part_s = progress.seconds_for(min(part_rows, progress.rows_left))
                left_s = (progress.finish_by - datetime.now(UTC)).total_seconds()
                if left_s <= 0 or (isinstance(item, Done) and next_part_s > left_s):
                    raise Stopped(f"stopped for --finish-by {progress.finish_by:%H:%M}, {_so_far(progress)}")


def _so_far(progress: Progress) -> str:
    return (
        f"{progress.rows_before + progress.rows_done} of {progress.rows} rows were through; "
        "the same command goes on"
    )


def manifest_of(settings: Settings, listing: Path, *, since: bool) -> Manifest:
    return open_manifest(
        settings.manifest,
        path_column=settings.path_column,
        root=settings.root,
        listing=None if settings.redaction else listing,  # which names paths
        include=settings.include,
        exclude=settings.exclude,
        since=since,
    )


def list_new(
    settings: Settings, earlier: Earlier, models: Bundle, choice: Choice, listing: Path, say: Say
) -> None:
    """Freeze what is to be screened since an earlier run. Raises NothingNew."""
    with TemporaryDirectory(prefix="engine-") as scratch:
        whole = manifest_of(settings, Path(scratch, listing.name), since=False)
        options = {"bundle_sha256": models.sha256, "precision": choice.precision, "decode": models.decode}
        if changed := earlier.differs(options):
            say(f"{changed} has changed since {earlier.place}: all {whole.rows} rows are screened")
            rows = whole.copy_to(listing)
        else:
            rows = write_new(whole, earlier, options, listing)
            say(f"{rows} of {whole.rows} rows are new or changed since {earlier.place}")
    if not rows:
        listing.unlink()
        raise NothingNew(f"nothing is new since {earlier.place}; nothing was written")


def _other_precision(models: Bundle, choice: Choice) -> str:
    assert models.operating_points
    measured = models.operating_points.recorded["data"]["precision"]
    return f"; this run is in {choice.precision}" if choice.precision != measured else ""


def _check_decode(settings: Settings, models: Bundle) -> None:
    """Scores are for pixels like those that the bundle was trained on."""
    if settings.decode not in (None, models.decode):
        raise UsageError(
            f"--decode {settings.decode}: bundle {models.path} was trained with {models.decode}; leave the "
            f"option out, or train one with: python -m training DATA -o BUNDLE --decode {settings.decode}"
        )


def check_paths(settings: Settings) -> None:
    """A wrong manifest or root must not leave an output folder behind."""
    manifest, root = settings.manifest, settings.root
    if settings.redaction and settings.since:
        raise UsageError("--since with --redact: the list of what is new would put paths into the results")
    if isinstance(root, Url) and root.query:
        raise UsageError(f"--root {root}?...: a folder has no query; give it without")
    if isinstance(manifest, Url):
        if manifest.path.endswith("/") or not manifest.key:
            raise UsageError(
                f"manifest {manifest}: a folder there can't be listed; give a list of its images"
            )
        return
    if not manifest.exists():
        raise UsageError(f"manifest {manifest}: no such file or folder")
    if not (manifest.is_file() or manifest.is_dir()):
        raise UsageError(f"manifest {manifest}: neither a file nor a folder")
    if isinstance(root, Path) and not root.is_dir():
        raise UsageError(f"--root {root}: no such folder; relative paths of the manifest start there")


def close_ledger(folder: RunFolder, run: dict[str, Any], progress: Progress, stages: Stages) -> Summary:
    """Re-read the footers of all parts; only when they add up to the manifest does the run succeed."""
    parts = folder.complete(run)
    pixels = stages.preprocess
    summary = summary_of(
        folder.path, run, parts.values(), progress, stages.meters, pixels.crashes, pixels.refusals
    )
    folder.succeed(summary.as_json())
    return summary
