"""Wire, overlap and stop all stages of a run in one process."""

from __future__ import annotations

from collections.abc import Callable

from engine.core.deadline import Deadline
from engine.core.records import OnMessage
from engine.core.settings import Settings
from engine.pipeline.context import StageContext
from engine.pipeline.stages import Stages
from engine.runs.prepare import prepare_run
from engine.runs.progress import OnProgress
from engine.runs.summary import Summary


def screen_in_process(
    settings: Settings,
    *,
    on_progress: OnProgress = lambda _: None,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
    stages_type: Callable[[StageContext], Stages] | None = None,
) -> Summary:
    """Screen a manifest with `settings`. The same settings resume a run that was stopped.

    `on_progress` is called after each batch, `say` with messages for the user. Raises Stopped within seconds
    of `deadline`, by default that of `settings`. `stages_type` replaces the stages, for benchmarks and
    calibration.
    Raises UsageError before anything is written when the manifest, bundle or output folder is wrong.
    """
    with prepare_run(settings, say) as prepared, (stages_type or Stages)(StageContext.of(prepared)) as stages:
        prepared.begin(stages.settled)
        if prepared.is_finished:
            return prepared.summary()
        progress = prepared.progress()
        end = deadline or Deadline(settings.finish_by)
        stages.run(prepared.parts(progress), prepared.sink(), progress, on_progress, end)
        return stages.finish_run(prepared.folder, prepared.run, progress)
