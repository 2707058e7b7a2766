"""Choose the executor for the settings, run it and write the report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from engine.core import hardware
from engine.core.deadline import Deadline
from engine.core.errors import UsageError
from engine.core.records import OnMessage
from engine.core.settings import ALL_GPUS, Settings
from engine.executors.retry import retry_failed_rows
from engine.monitoring.metrics import MetricsFile
from engine.pipeline.pipeline import screen_in_process
from engine.runs.progress import OnProgress, Progress
from engine.runs.run_folder import REPORT_FILE, SUCCESS_FILE
from engine.runs.summary import ErrorRateError, Summary
from engine.storage.open_folder import open_folder


def launch_run(
    settings: Settings,
    *,
    on_progress: OnProgress,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
) -> Summary:
    """Screen or retry failed rows with `settings`. Raises ErrorRateError after too many errors."""
    deadline = deadline or Deadline(settings.finish_by)
    settings = resolve_all_gpus(settings)
    execute: Callable[..., Summary] = (
        retry_failed_rows
        if settings.only_errors
        else _import_ray_driver()
        if settings.ray
        else screen_in_process
    )
    with ExitStack() as stack:
        publish_progress = on_progress
        if settings.metrics_file:
            metrics = stack.enter_context(MetricsFile(settings.metrics_file))

            def publish_progress(progress: Progress) -> None:
                metrics(progress)
                on_progress(progress)

        summary = execute(settings, on_progress=publish_progress, say=say, deadline=deadline)
        _write_report(summary, say, deadline)
        if summary.errors > settings.max_error_rate * summary.rows:
            raise ErrorRateError(
                f"{summary.errors} of {summary.rows} rows failed, more than --max-error-rate allows", summary
            )
    return summary


def resolve_all_gpus(settings: Settings) -> Settings:
    """Return `settings` with `--device cuda:all` replaced by a local Ray, which has an actor for each GPU.

    `workers` and `memory` are divided among the actors. Raises UsageError without a GPU or without Ray.
    """
    if settings.device != ALL_GPUS:
        return settings
    from engine.ray.cluster import import_ray

    gpus = hardware.count_gpus()
    try:
        import_ray()
    except UsageError as error:
        raise UsageError(
            f"{error}; without Ray, start a process for each GPU: "
            f"CUDA_VISIBLE_DEVICES=0 python -m engine.run MANIFEST --shard 1/{gpus}, and so on"
        ) from None
    workers = max(1, settings.workers // gpus) if settings.workers else None
    return replace(settings, device="auto", ray="local", workers=workers, memory=settings.memory // gpus)


def _write_report(summary: Summary, say: OnMessage, deadline: Deadline) -> None:
    """Write report.html. An error is only reported with `say`, because the run is already finished."""
    try:
        files = open_folder(summary.output)
        if not files.exists(SUCCESS_FILE) or files.exists(REPORT_FILE):
            return  # other shards are unfinished, or the report exists
        from engine.report.render import write_report

        write_report(summary.output, say=say, deadline=deadline)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"{REPORT_FILE} could not be written: {reason}; to retry, run: python -m engine.report RESULTS")


def _import_ray_driver() -> Callable[..., Summary]:
    from engine.ray.driver import screen_on_ray

    return screen_on_ray
