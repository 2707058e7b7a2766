"""`python -m engine.run MANIFEST`: the command line of a screening run, and nothing else."""

from __future__ import annotations

import sys
from functools import partial
from typing import TextIO, cast

from rich.console import Console

from engine.cli.terminal import hush_libraries, run_command, stop_on_signal
from engine.core.deadline import Deadline
from engine.core.json_records import to_builtins
from engine.errors import ErrorRateError
from engine.ledger import Summary
from engine.log import Log, nowhere
from engine.options import settings_from
from engine.progress import Display, show_summary
from engine.settings import ALL_GPUS, Settings
from engine.storage import Url
from engine.watching import JsonDisplay, run


def main(arguments: list[str] | None = None, deadline: Deadline | None = None) -> int:
    """Return the exit status of a run; `deadline` is that of --finish-by unless the caller has another."""
    arguments = sys.argv[1:] if arguments is None else arguments
    hush_libraries()
    log = Log(redact="--redact" in arguments, as_json="--log-json" in arguments)
    console = Console(file=cast(TextIO, log), emoji=False, force_terminal=False if log.as_json else None)

    def work() -> int:
        settings = settings_from(arguments)
        log.known = places(settings)
        end = stop_on_signal(console, deadline or Deadline(settings.finish_by))
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        if settings.dry_run:
            from engine.doctor import report_to

            return report_to(sys.stdout, settings, manifest=True, say=say, stop=end.stop)
        try:
            with JsonDisplay(log) if log.as_json else Display(console) as display:
                summary = run(settings, watch=display, say=say, deadline=end)
        except ErrorRateError as error:
            _report(console, error.summary, settings)
            raise
        _report(console, summary, settings)
        return 0

    return run_command(work, console)


def places(settings: Settings) -> list[tuple[str, str]]:
    """What the user named, as it may turn up on the log."""
    named = {
        "MANIFEST": settings.manifest,
        "ROOT": settings.root or settings.manifest.parent,
        "OUTPUT": settings.output,
        "BUNDLE": settings.bundle,
        "PATHS_FROM": settings.paths_from,
    }
    places = []
    for word, one in named.items():
        if isinstance(one, Url):
            places += [(form, word) for form in (one.whole, str(one))]
        elif one and one.name:
            places += [(str(form), word) for form in (one, one.absolute(), one.resolve())]
    return places


def _report(console: Console, summary: Summary, settings: Settings) -> None:
    if not summary.rows_done and not summary.shard and settings.device != ALL_GPUS:
        hint = "no row failed" if settings.only_errors else "--overwrite starts again"
        console.print(f"{summary.output} is finished already; {hint}", markup=False, soft_wrap=True)
    if isinstance(console.file, Log) and console.file.as_json:
        console.file.event("summary", **to_builtins(summary.as_record()))
    else:
        show_summary(console, summary)
    try:
        print(summary.output, flush=True)
    except OSError:  # the results are safe, whoever wanted to read this
        sys.stdout = nowhere()
    if summary.by_status.get("missing") == summary.rows:
        console.print(
            "not one of the files is there; do relative paths start elsewhere? see --root", soft_wrap=True
        )


if __name__ == "__main__":
    sys.exit(main())
