"""The only module that knows all stages: wires them, overlaps them, stops them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Protocol, Self

from engine.bundle import Bundle
from engine.canaries import Step
from engine.core.deadline import Deadline
from engine.core.tuning import Settled, Tuning
from engine.errors import EngineError
from engine.gpu import machine
from engine.job import Job, Say, Watch, close_ledger, prepare
from engine.ledger import Progress, Summary
from engine.manifest import Manifest
from engine.overlap import Meter, prefetch
from engine.preprocess.stage import Preprocess
from engine.provenance import RunRecord
from engine.reader import Reader
from engine.records import Batch, Header, Part
from engine.run_folder import RunFolder
from engine.runners import Choice, Runner, open_runner
from engine.settings import Settings, available_cpus
from engine.sink import Done, Sink
from engine.step import CpuStep
from engine.storage.location import Place

READ_THREADS = 16
STAGES = ("read", "preprocess", "members", "write")

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


class ReadStage(Protocol):
    def stage(self, parts: Iterable[Part], meter: Meter) -> Iterator[Batch]: ...


def screen(
    settings: Settings,
    *,
    watch: Watch = lambda _: None,
    say: Say = lambda _: None,
    deadline: Deadline | None = None,
    stages_of: Callable[[Opening], Stages] | None = None,
) -> Summary:
    """Screen a manifest as `settings` say; the same settings go on where an earlier run stopped.

    `watch` is called after each batch, `say` with lines for people. At `deadline` the run ends within seconds
    with `Stopped`; without one it is that of `settings`.
    `stages_of` replaces the stages, for benchmarks and for calibration.
    Raises UsageError before anything is written when the manifest, bundle or output folder is wrong.
    """
    with prepare(settings, say) as job, (stages_of or Stages)(Opening.of(job)) as stages:
        job.begin(stages.settled)
        if job.is_finished:
            return job.summary()
        progress = job.progress()
        end = deadline or Deadline(settings.finish_by)
        stages.run(job.parts(progress), job.sink(), progress, watch, end)
        return stages.close_ledger(job.folder, job.run, progress)


@dataclass(frozen=True)
class Opening:
    """What stages are opened with."""

    settings: Settings
    models: Bundle
    choice: Choice
    say: Say
    root: Place  # of relative paths
    _: KW_ONLY
    batch_size: int
    part_rows: int = 0
    rows: int = 0  # of the run: a long one is worth tuning
    tuning: Tuning = field(default_factory=Tuning)  # what is known already
    resumed: bool
    manifest: Manifest | None = None  # None for a retry, which has been tuned

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(
            job.settings,
            job.models,
            job.choice,
            job.say,
            job.manifest.root,
            batch_size=job.run.result_options.batch_size,
            part_rows=job.run.result_options.part_rows,
            rows=job.run.rows,
            tuning=job.run.tuning,
            resumed=job.resumed,
            manifest=job.manifest,
        )

    @property
    def workers(self) -> int:
        return (self.settings.workers or available_cpus()) if self.settings.overlap else 1

    def reader(self, on_gpu: OnGpu | None = None) -> Reader:
        settings = self.settings
        return Reader(
            self.root,
            batch_size=self.batch_size,
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
        self.settled = Settled(opening.batch_size, opening.tuning)
        self.meters: dict[str, Meter] = meters_for(opening.workers, gpu=opening.choice.gpu is not None)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.open(stack)
            self._opened = stack.pop_all()
        return self

    preprocess: PixelStage
    step: Step

    def open(self, stack: ExitStack) -> None:
        """Set `preprocess`, `step` and `settled`; what has to be closed goes to `stack`."""
        if self.opening.choice.device != "cpu":
            from engine.gpu.stages import open_gpu

            self.preprocess, self.step, self.settled = open_gpu(stack, self.opening)
            self.opening = replace(self.opening, batch_size=self.settled.batch_size)
            return
        settings, models, workers = self.opening.settings, self.opening.models, self.opening.workers
        # first, so that it starts while the members load
        preprocess = Preprocess(
            size=models.size,
            batch_size=self.opening.batch_size,
            threads=workers,
            decoding_bytes=settings.limits.decoding_bytes,
            decode=models.decode,
        )
        self.preprocess = stack.enter_context(preprocess)
        members = open_members(stack, self.opening)
        self.settled = replace(self.settled, versions=versions_of(members))
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
        deadline: Deadline,
    ) -> None:
        opening = self.opening
        reader = opening.reader(self.preprocess.on_gpu)
        overlap = opening.settings.overlap
        items = flow(parts, reader, self.preprocess, self.step, sink, self.meters, overlap=overlap)
        progress.started, progress.meters = time.monotonic(), self.meters
        try:
            drain(items, progress, watch, deadline, part_rows=opening.part_rows)
        except RuntimeError as error:  # others use the GPU too
            if opening.choice.gpu and machine.is_shortage(error):
                raise EngineError(
                    f"{opening.choice.gpu.name} ran out of memory; free some, and the same command goes on"
                ) from None
            raise

    def close_ledger(self, folder: RunFolder, run: RunRecord, progress: Progress) -> Summary:
        return close_ledger(
            folder,
            run,
            progress,
            self.meters,
            decoder_restarts=self.preprocess.crashes,
            decoder_refusals=self.preprocess.refusals,
            shard=self.opening.settings.shard,
            say=self.opening.say,
        )


def open_members(stack: ExitStack, opening: Opening, *, compiled: bool = False) -> list[Runner]:
    """Open a runner for each member."""
    members = opening.models.members
    runners = (open_runner(opening.choice, opening.models, member, compiled=compiled) for member in members)
    return [stack.enter_context(runner) for runner in runners]


def versions_of(runners: Iterable[Runner]) -> dict[str, str]:
    """Return the versions of the packages that they use."""
    return {package: version for runner in runners for package, version in runner.versions.items()}


def meters_for(workers: int, *, gpu: bool = False) -> dict[str, Meter]:
    """One meter a stage, with as many lanes as the stage has threads; a GPU counts as one."""
    lanes = {"read": min(READ_THREADS, workers), "preprocess": 1, "members": 1 if gpu else workers}
    return {name: Meter(name, lanes.get(name, 1)) for name in STAGES}


def flow(
    parts: Iterator[Part],
    reader: ReadStage,
    preprocess: PixelStage,
    step: Step,
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
    items: Iterator[Batch | Done], progress: Progress, watch: Watch, deadline: Deadline, *, part_rows: int
) -> None:
    """Run the flow to its end, or to where it has to stop: then raises Stopped."""
    with closing(items):  # type: ignore[type-var]
        for item in items:
            if isinstance(item, Done):
                progress.by_class.update(item.by_class)
                next_s = progress.seconds_for(min(part_rows, progress.rows_left))
                goes_on = deadline.fits(next_s)
            else:
                progress.add(item)
                watch(progress)
                left_s = progress.seconds_for(item.part.rows - item.start - item.rows)
                goes_on = left_s <= deadline.grace_s
            if progress.rows_left and not goes_on:
                raise deadline.stopped(_so_far(progress))


def _so_far(progress: Progress) -> str:
    return f"{progress.rows_before + progress.rows_done} of {progress.rows} rows were through"
