"""Retry the failed rows of a finished run and merge the new rows into their parts."""

from __future__ import annotations

from contextlib import ExitStack

from engine.core.deadline import Deadline
from engine.core.errors import UsageError
from engine.core.location import parse
from engine.core.records import OnMessage
from engine.core.settings import Settings
from engine.pipeline.context import StageContext
from engine.pipeline.stages import Stages
from engine.runners.select import select_runner
from engine.runs.finished_run import add_paths, apply_run_settings, load_run_bundle, read_finished_parts
from engine.runs.progress import OnProgress, Progress
from engine.runs.run_folder import RunFolder
from engine.runs.run_record import scorer_of
from engine.runs.summary import Summary, summarise_run
from engine.sink.columns import ResultSchema
from engine.sink.parts import read_failed_rows
from engine.sink.sink import Sink


def retry_failed_rows(
    settings: Settings,
    *,
    on_progress: OnProgress = lambda _: None,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
) -> Summary:
    """Retry the failed rows of the finished run in the folder `settings.manifest`, with its options.

    The new rows of each part are written immediately, so a stop loses no results. `settings.bundle` is the
    current path of the run's bundle. Raises UsageError when the folder holds no finished run or the bundle
    differs.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder.existing(settings.manifest))
        run = folder.run()
        options = run.result_options
        bundle = load_run_bundle(settings, folder, run)
        choice = select_runner(
            options.runner,
            options.device,
            bundle,
            precision=options.precision,
            batch_size=options.batch_size,
        )
        if choice.plan_hashes != options.plans:
            raise UsageError(
                f"bundle {settings.bundle}: its plans were rebuilt after the run; screen the manifest again"
            )
        done = read_finished_parts(folder, run)
        failed = {index: part.errors for index, part in done.items() if part.errors}
        progress = Progress(sum(failed.values()), finish_by=settings.finish_by)
        if not failed:
            return summarise_run(folder.path, run, done.values(), progress, {}, 0)
        settings, manifest = apply_run_settings(settings, options)
        root = manifest.root if manifest else parse(options.root)
        context = StageContext(
            *(settings, bundle, choice, say, root),
            batch_size=options.batch_size,
            part_rows=options.part_rows,
            rows=run.rows,
            tuning=run.tuning,
            resumed=True,
        )
        stages = stack.enter_context(Stages(context))
        schema = ResultSchema.of_part(
            *(bundle, folder.files, min(failed)),
            uids=options.include_uids,
            with_triage=run.has_triage,
            redaction=settings.redaction,
        )
        folder.mark_unfinished()
        parts = read_failed_rows(folder.files, sorted(failed), schema.passthrough.names)
        if manifest:
            parts = add_paths(parts, manifest.parts(options.part_rows, failed))
        sink = Sink(folder.files, schema, run.to_metadata(), scorer_of(choice), fold=True)
        stages.run(parts, sink, progress, on_progress, deadline or Deadline(settings.finish_by))
        return stages.finish_run(folder, run, progress)
