"""`python -m engine.run MANIFEST`: the command line of a screening run, and nothing else."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from types import FrameType
from typing import Any, TextIO, cast

from rich.console import Console

from engine.core.json_records import to_builtins
from engine.errors import EngineError, ErrorRateError, NothingNew, Stopped, UsageError
from engine.ledger import Summary
from engine.log import Log, nowhere
from engine.options import OPTIONS, option_parser
from engine.pipeline import GRACE_S
from engine.privacy import Redaction, read_salt
from engine.progress import Display, show_summary
from engine.run_folder import recorded_bundle
from engine.settings import ALL_GPUS, Limits, Settings, parse_moment
from engine.storage import Url
from engine.watching import JsonDisplay, run

GIVE_UP_S = 2 * GRACE_S  # after this long without a clean stop the process ends all the same


def settings_from(arguments: list[str]) -> Settings:
    """Raises UsageError, and SystemExit for --help."""
    given: dict[str, Any] = vars(option_parser().parse_args(arguments))
    if given["overwrite"] and (given["shard"] or given["device"] == ALL_GPUS):
        option = f"--shard {given['shard']}" if given["shard"] else f"--device {ALL_GPUS}"
        raise UsageError(
            f"--overwrite with {option}: it would delete what other shards have done; delete "
            f"{given['output']} before they start, or give another -o"
        )
    if given["only_errors"]:
        _take_from_run(given, {name for name, option in OPTIONS.items() if given[name] != option.default})
    limits = Limits(
        memory=given.pop("memory"),
        max_pixels=given.pop("max_pixels"),
        max_file_size=given.pop("max_file_size"),
    )
    if given["finish_by"]:
        given["finish_by"] = parse_moment(given["finish_by"], datetime.now(UTC))
    del given["log_json"], given["dry_run"]
    _check_ray(given)
    given["include"], given["exclude"] = tuple(given["include"]), tuple(given["exclude"])
    return Settings(limits=limits, overlap=not given.pop("serial"), redaction=_redaction(given), **given)


def _redaction(given: dict[str, Any]) -> Redaction | None:
    redact, keep, salt_file = given.pop("redact"), given.pop("keep"), given.pop("salt_file")
    if not redact and (keep or salt_file):
        raise UsageError(f"{'--keep' if keep else '--salt-file'} is of use with --redact only")
    if given["paths_from"] and not (redact and given["only_errors"]):
        raise UsageError("--paths-from is for --only-errors of a run with --redact; give all three")
    return Redaction(read_salt(salt_file), tuple(sorted(set(keep)))) if redact else None


def _check_ray(given: dict[str, Any]) -> None:
    address = given["ray"]
    if address is None:
        if given["actors"]:
            raise UsageError("--actors is of use with --ray only")
        return
    if not re.fullmatch(r"local|auto|[\w.-]+:\d{1,5}", address):
        raise UsageError(
            f"--ray {address}: allowed: nothing (a Ray of its own), auto, or a cluster's HOST:PORT"
        )
    for option in ("--only-errors", "--shard"):
        if given[option[2:].replace("-", "_")]:
            raise UsageError(f"{option} works in one process; leave --ray out")
    if given["device"] not in ("auto", "cpu"):
        raise UsageError(
            f"--device {given['device']}: each actor on Ray has a GPU of its own; allowed: auto, cpu"
        )


def _take_from_run(given: dict[str, Any], changed: set[str]) -> None:
    """--only-errors: the options are those of the run, but for how it is operated."""
    wrong = {OPTIONS[name].names[-1] for name in changed if not OPTIONS[name].operating}
    if given["paths_from"]:
        wrong.discard("--root")
    if wrong:
        option = min(wrong)
        raise UsageError(f"{option} can't be given with --only-errors, which takes it from the run")
    if "bundle" not in changed:
        given["bundle"] = recorded_bundle(given["manifest"])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    hush_libraries()
    log = Log(redact="--redact" in arguments, as_json="--log-json" in arguments)
    console = Console(file=cast(TextIO, log), emoji=False, force_terminal=False if log.as_json else None)

    def work() -> int:
        settings = settings_from(arguments)
        log.known = places(settings)
        stop = stop_on_signal(console, settings.finish_by)
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        if "--dry-run" in arguments:
            from engine.doctor import report_to

            return report_to(sys.stdout, settings, manifest=True, say=say, stop=stop)
        try:
            with JsonDisplay(log) if log.as_json else Display(console) as display:
                summary = run(settings, arguments, watch=display, say=say, stop=stop)
        except ErrorRateError as error:
            _report(console, error.summary, settings)
            raise
        _report(console, summary, settings)
        return 0

    return answered(console, work)


def answered(console: Console, work: Callable[[], int]) -> int:
    """The exit status that `work` returns, or that of its error, which is told in one line."""
    try:
        return work()
    except NothingNew as nothing:
        console.print(str(nothing), markup=False, highlight=False, soft_wrap=True)
        return 0
    except EngineError as error:
        return _failed(console, str(error), error.exit_status)
    except OSError as error:  # a full disk, a folder that went away
        where = f"{error.filename}: " if error.filename else ""
        return _failed(console, f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:  # of a command that has no way of its own to stop
        return 130
    except Exception as error:
        if "ENGINE_DEBUG" in os.environ:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _failed(console, f"internal: {text} (ENGINE_DEBUG=1 shows where)", 1)


def hush_libraries() -> None:
    """What libraries say of single files may hold paths and header values."""
    warnings.simplefilter("ignore")
    logging.lastResort = None


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


def _failed(console: Console, reason: str, exit_status: int) -> int:
    console.print(f"error: {reason}", markup=False, highlight=False, soft_wrap=True)
    return exit_status


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


def stop_on_signal(console: Console, finish_by: datetime | None) -> threading.Event:
    """The first signal, or the deadline, asks the run to stop; a second signal ends the process."""
    stop = threading.Event()

    def give_up() -> None:
        console.show_cursor(True)
        console.print("error: stopped while storage or a stage hangs; the same command goes on")
        os._exit(Stopped.exit_status)

    def ask() -> None:
        stop.set()
        _in_background(GIVE_UP_S, give_up)

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            console.show_cursor(True)
            os._exit(130)
        # not console.print: the signal may have come in the middle of one, or of what it imports
        console.file.write("stopping; once more to stop at once\n")
        console.file.flush()
        ask()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, handle)
    if finish_by:
        _in_background((finish_by - datetime.now(UTC)).total_seconds(), ask)
    return stop


def _in_background(seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
