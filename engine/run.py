"""`python -m engine.run MANIFEST`: the command line of a screening run."""

from __future__ import annotations

import sys
from functools import partial
from typing import TextIO, cast

from rich.console import Console

from engine.cli.log import RedactingLog, named_locations, open_null
from engine.cli.terminal import hush_libraries, run_command, stop_on_signal
from engine.core.deadline import Deadline
from engine.core.json_records import to_builtins
from engine.core.settings import Settings
from engine.executors.launch import launch_run
from engine.monitoring.metrics import JsonProgress
from engine.monitoring.progress_bar import ProgressBar, show_summary
from engine.runs.run_settings import settings_from
from engine.runs.summary import ErrorRateError, Summary


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    hush_libraries()
    log = RedactingLog(redact="--redact" in arguments, as_json="--log-json" in arguments)
    console = Console(file=cast(TextIO, log), emoji=False, force_terminal=False if log.as_json else None)

    def run() -> int:
        settings = settings_from(arguments)
        log.known = named_locations(settings)
        run_deadline = stop_on_signal(console, Deadline(settings.finish_by))
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        if settings.dry_run:
            from engine.doctor.show import run_doctor

            return run_doctor(sys.stdout, settings, manifest=True, say=say, stop=run_deadline.stop)
        try:
            with JsonProgress(log) if log.as_json else ProgressBar(console) as display:
                summary = launch_run(settings, on_progress=display, say=say, deadline=run_deadline)
        except ErrorRateError as error:
            _report(console, error.summary, settings)
            raise
        _report(console, summary, settings)
        return 0

    return run_command(run, console)


def _report(console: Console, summary: Summary, settings: Settings) -> None:
    if not summary.rows_done and not summary.shard:
        hint = "no row failed" if settings.only_errors else "--overwrite screens everything again"
        console.print(f"{summary.output} is finished already; {hint}", markup=False, soft_wrap=True)
    if isinstance(console.file, RedactingLog) and console.file.as_json:
        console.file.event("summary", **to_builtins(summary.as_record()))
    else:
        show_summary(console, summary)
    try:
        print(summary.output, flush=True)
    except OSError:  # nobody reads stdout; the results are complete
        sys.stdout = open_null()
    if summary.by_status.get("missing") == summary.rows:
        console.print(
            "none of the files exists; if relative paths start in another folder, give it with --root",
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(main())
