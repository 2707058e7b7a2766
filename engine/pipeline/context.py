"""The settings and resources with which the stages of a run are opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol, Self

from engine.bundle.bundle import Bundle
from engine.core.hardware import available_cpus
from engine.core.location import Location
from engine.core.overlap import Meter
from engine.core.records import Batch, Header, OnMessage, Part
from engine.core.settings import Settings
from engine.core.tuning import Tuning
from engine.manifest.manifest import Manifest
from engine.reader.reader import Reader
from engine.runners.base import Runner, RunnerChoice
from engine.runners.select import open_runner
from engine.runs.prepare import PreparedRun

READ_THREADS = 16
DecodesOnGpu = Callable[[bytes, Header], bool]


class PixelStage(Protocol):
    @property
    def crashes(self) -> int:
        """Return how often a decoder was restarted."""
        ...

    @property
    def refusals(self) -> int:
        """Return how many images the GPU's decoder refused and the CPU decoded."""
        ...

    @property
    def on_gpu(self) -> DecodesOnGpu | None:
        """Return the function that tells which images the GPU decodes, None if it decodes none."""
        ...

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]: ...


class ReadStage(Protocol):
    def stage(self, parts: Iterable[Part], meter: Meter) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class StageContext:
    """Settings and resources with which the stages are opened."""

    settings: Settings
    bundle: Bundle
    choice: RunnerChoice
    say: OnMessage
    root: Location  # base of relative paths
    _: KW_ONLY
    batch_size: int
    part_rows: int = 0
    rows: int = 0  # of the run; only long runs are tuned
    tuning: Tuning = field(default_factory=Tuning)  # options that are settled already
    resumed: bool
    manifest: Manifest | None = None  # None for a retry, whose options are settled

    @classmethod
    def of(cls, prepared: PreparedRun) -> Self:
        return cls(
            prepared.settings,
            prepared.bundle,
            prepared.choice,
            prepared.say,
            prepared.manifest.root,
            batch_size=prepared.run.result_options.batch_size,
            part_rows=prepared.run.result_options.part_rows,
            rows=prepared.run.rows,
            tuning=prepared.run.tuning,
            resumed=prepared.resumed,
            manifest=prepared.manifest,
        )

    @property
    def workers(self) -> int:
        return (self.settings.workers or available_cpus()) if self.settings.overlap else 1

    def reader(self, on_gpu: DecodesOnGpu | None = None) -> Reader:
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


def open_runners(stack: ExitStack, context: StageContext, *, compiled: bool = False) -> list[Runner]:
    """Open a runner for each member."""
    members = context.bundle.members
    runners = (open_runner(context.choice, context.bundle, member, compiled=compiled) for member in members)
    return [stack.enter_context(runner) for runner in runners]


def versions_of(runners: Iterable[Runner]) -> dict[str, str]:
    """Return the versions of the packages that the runners use."""
    return {package: version for runner in runners for package, version in runner.versions.items()}
