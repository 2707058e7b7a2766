"""Open the stages of a run and run parts through them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from engine.core import hardware
from engine.core.deadline import Deadline
from engine.core.errors import EngineError
from engine.core.overlap import Meter
from engine.core.records import Part
from engine.core.tuning import Settled
from engine.pipeline.context import READ_THREADS, PixelStage, StageContext, open_runners, versions_of
from engine.pipeline.flow import chain_stages, run_until_stopped
from engine.preprocess.stage import Preprocess
from engine.runs.finish import finish_run
from engine.runs.progress import OnProgress, Progress
from engine.runs.run_folder import RunFolder
from engine.runs.run_record import RunRecord
from engine.runs.summary import Summary
from engine.scoring.cpu import CpuScorer
from engine.scoring.stage import Scorer
from engine.sink.sink import Sink

STAGES = ("read", "preprocess", "members", "write")


class Stages:
    """The opened stages of one run: decoder process, members and threads."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.settled = Settled(context.batch_size, context.tuning)
        self.meters: dict[str, Meter] = make_meters(context.workers, gpu=context.choice.gpu is not None)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.open(stack)
            self._resources = stack.pop_all()
        return self

    preprocess: PixelStage
    step: Scorer

    def open(self, stack: ExitStack) -> None:
        """Set `preprocess`, `step` and `settled`; resources to close are pushed on `stack`."""
        if self.context.choice.device != "cpu":
            from engine.pipeline.open_gpu import open_gpu

            self.preprocess, self.step, self.settled = open_gpu(stack, self.context)
            self.context = replace(self.context, batch_size=self.settled.batch_size)
            return
        settings, bundle, workers = self.context.settings, self.context.bundle, self.context.workers
        # opened first, so that it starts while the members load
        preprocess = Preprocess(
            size=bundle.size,
            batch_size=self.context.batch_size,
            threads=workers,
            decoding_bytes=settings.limits.decoding_bytes,
            decode=bundle.decode,
        )
        self.preprocess = stack.enter_context(preprocess)
        members = open_runners(stack, self.context)
        self.settled = replace(self.settled, versions=versions_of(members))
        self.step = CpuScorer(bundle, members, threads=workers if settings.overlap else 0)
        stack.callback(self.step.close)
        preprocess.decoder.await_start()

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(
        self,
        parts: Iterator[Part],
        sink: Sink,
        progress: Progress,
        on_progress: OnProgress,
        deadline: Deadline,
    ) -> None:
        context = self.context
        reader = context.reader(self.preprocess.on_gpu)
        overlap = context.settings.overlap
        items = chain_stages(parts, reader, self.preprocess, self.step, sink, self.meters, overlap=overlap)
        progress.started, progress.meters = time.monotonic(), self.meters
        try:
            run_until_stopped(items, progress, on_progress, deadline, part_rows=context.part_rows)
        except RuntimeError as error:  # other processes may use the GPU too
            if context.choice.gpu and hardware.is_out_of_memory(error):
                raise EngineError(
                    f"{context.choice.gpu.name} ran out of memory; free some memory, then run "
                    "the same command again to continue"
                ) from None
            raise

    def finish_run(self, folder: RunFolder, run: RunRecord, progress: Progress) -> Summary:
        return finish_run(
            folder,
            run,
            progress,
            self.meters,
            decoder_restarts=self.preprocess.crashes,
            decoder_refusals=self.preprocess.refusals,
            shard=self.context.settings.shard,
            say=self.context.say,
        )


def make_meters(workers: int, *, gpu: bool = False) -> dict[str, Meter]:
    """Make one meter for each stage, with the number of its threads; a GPU counts as one."""
    threads = {"read": min(READ_THREADS, workers), "preprocess": 1, "members": 1 if gpu else workers}
    return {name: Meter(name, threads.get(name, 1)) for name in STAGES}
