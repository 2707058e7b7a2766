"""`python -m engine.run MANIFEST`: the command line of a screening run, and nothing else."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

from rich.console import Console

from engine.bundle import DECODES
from engine.errors import EngineError, ErrorRateError, NothingNew, Stopped, UsageError
from engine.ledger import Summary
from engine.listing import add_globs
from engine.log import Log, nowhere
from engine.pipeline import GRACE_S
from engine.privacy import Redaction, read_salt
from engine.progress import Display, show_summary
from engine.provenance import CPU_BATCH, CPU_PART_ROWS, GPU_BATCH, GPU_PART_ROWS
from engine.run_folder import recorded_bundle
from engine.runners import PRECISIONS, RUNNERS
from engine.settings import Limits, Settings, parse_bytes, parse_location, parse_moment
from engine.storage import Url
from engine.watching import JsonDisplay, run

NOTICE = "Research use only; not a medical device. The output is a work list for people, not a diagnosis."
EXAMPLE = "example: python -m engine.run manifest.csv -b bundle -o results"
GIVE_UP_S = 2 * GRACE_S  # after this long without a clean stop the process ends all the same
_OPERATING = frozenset(
    (
        "manifest",
        "only_errors",
        "paths_from",
        "redact",
        "salt_file",
        "bundle",
        "workers",
        "memory",
        "read_timeout_s",
        "finish_by",
        "max_error_rate",
        "serial",
        "slots",
        "streams",
        "cuda_graph",
        "metrics_file",
        "log_json",
        "dry_run",
        "ray",
        "actors",
        "part_timeout_s",
    )
)
MAX_BATCH, MAX_PART_ROWS, MAX_WORKERS = 4096, 1_000_000, 1024


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def option_parser(
    prog: str = "python -m engine.run",
    description: str = "Screen a list of bone radiographs: one row of class probabilities per image.",
    example: str = EXAMPLE,
    *,
    needs_manifest: bool = True,
) -> argparse.ArgumentParser:
    defaults = Settings(manifest=Path())
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"{example}\n\n{NOTICE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what is asked for stands on the command line in full
    )
    add = parser.add_argument
    add(
        "manifest",
        type=parse_location,
        nargs=None if needs_manifest else "?",
        metavar="MANIFEST",
        help="CSV, Parquet, text list, folder, zip or tar",
    )
    add(
        "-o",
        "--output",
        type=parse_location,
        default=defaults.output,
        help="results folder, or s3://, gs://, az:// (%(default)s)",
    )
    add("-b", "--bundle", type=Path, default=defaults.bundle, help="model folder (%(default)s)")
    add("--device", default=defaults.device, help="auto, cpu or cuda:N (%(default)s)")
    add("--runner", default=defaults.runner, help=f"auto, {', '.join(RUNNERS)} (%(default)s)")
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the members (fp16 on a GPU, fp32 on a CPU; int8: on a CPU, from build_engines)",
    )
    add("--decode", choices=DECODES, help="of JPEG, as the bundle was trained (its own); another is refused")
    add(
        "--batch-size",
        type=_count(MAX_BATCH),
        metavar="N",
        help=f"images a batch (as tuned; else {CPU_BATCH} on a CPU, {GPU_BATCH} or the plan's on a GPU)",
    )
    add(
        "--part-rows",
        type=_count(MAX_PART_ROWS),
        metavar="N",
        help=f"rows a part, the unit of resume ({CPU_PART_ROWS} on a CPU, {GPU_PART_ROWS} on a GPU)",
    )
    add("--path-column", metavar="NAME", help="manifest column with the paths (path, else the first)")
    add("--column-prefix", default=defaults.column_prefix, metavar="TEXT", help="put before manifest columns")
    add("--root", type=parse_location, help="folder of relative paths (the manifest's own)")
    add(
        "--workers",
        type=_count(MAX_WORKERS),
        metavar="N",
        help="CPU threads (as tuned; else all that this process may use)",
    )
    add("--memory", default="1GiB", metavar="SIZE", help="for images in flight (%(default)s)")
    pixels = defaults.limits.max_pixels
    add("--max-pixels", type=_count(), default=pixels, metavar="N", help="of an image (%(default)s)")
    add("--max-file-size", default="512MiB", metavar="SIZE", help="of an image (%(default)s)")
    add(
        "--read-timeout",
        dest="read_timeout_s",
        type=_seconds,
        default=defaults.read_timeout_s,
        metavar="S",
        help="seconds that reading one file may take (%(default)g)",
    )
    add(
        "--finish-by", metavar="TIME", help="stop at a clean point in time for 06:00, or an ISO date and time"
    )
    add(
        "--max-error-rate",
        type=_share,
        default=defaults.max_error_rate,
        metavar="F",
        help="share of failed rows that still counts as success (%(default)g)",
    )
    add(
        "--only-errors",
        action="store_true",
        help="MANIFEST is a results folder: try its failed rows again, with the options of that run",
    )
    add_globs(parser)
    add(
        "--since",
        type=parse_location,
        metavar="RESULTS",
        help="only what is new or changed since that run (everything if the bundle is)",
    )
    add("--include-uids", action="store_true", help="DICOM's study, series and SOP UIDs as columns")
    add("--redact", action="store_true", help="a keyed hash in place of each path, no other manifest columns")
    add("--keep", action="append", default=[], metavar="COLUMN", help="with --redact: not this one")
    add("--salt-file", type=Path, metavar="FILE", help="key of --redact's hashes (ENGINE_SALT)")
    add(
        "--paths-from",
        type=parse_location,
        metavar="MANIFEST",
        help="with --only-errors: the manifest of a run with --redact, whose results name no path",
    )
    add("--overwrite", action="store_true", help="delete the run that OUTPUT holds and start again")
    add(
        "--decoder",
        choices=("auto", "cpu"),
        default=defaults.decoder,
        help="cpu: each image decoded strictly there, for a GPU too (%(default)s)",
    )
    add(
        "--slots",
        type=_count(16),
        default=defaults.slots,
        metavar="N",
        help="batches on the GPU (%(default)s)",
    )
    add("--streams", type=_count(2), metavar="N", help="1: members in turn, 2: at once (the faster)")
    add(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=defaults.cuda_graph,
        help="replay each batch's step as one graph",
    )
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="several actors on Ray do it: one started here, or the cluster at HOST:PORT or auto",
    )
    add(
        "--actors",
        type=_count(MAX_WORKERS),
        metavar="N",
        help="with --ray: on CPUs (none beside GPUs, else as many as fit)",
    )
    add(
        "--part-timeout",
        dest="part_timeout_s",
        type=_seconds,
        default=defaults.part_timeout_s,
        metavar="S",
        help="with --ray: seconds without a finished batch after which an actor is replaced (%(default)g)",
    )
    add("--metrics-file", type=Path, metavar="FILE", help="Prometheus text, written anew every few seconds")
    add("--log-json", action="store_true", help="one JSON object a line on stderr")
    add("--dry-run", action="store_true", help="only say what the run would do, as python -m engine.doctor")
    add(
        "--serial",
        action="store_true",
        help="one stage after the other; for checks, the results are the same",
    )
    return parser


def _count(most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0
        if value < 1 or (most and value > most):
            allowed = f"a whole number from 1 to {most}" if most else "a positive whole number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


def number(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between {low:g} and {high:g}")
    return value


def _share(text: str) -> float:
    return number(text, 0, 1)


def _seconds(text: str) -> float:
    return number(text, 0.1, 86_400)


def settings_from(arguments: list[str]) -> Settings:
    """Raises UsageError, and SystemExit for --help."""
    parser = option_parser()
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    if given["only_errors"]:
        _take_from_run(given, {name for name in given if given[name] != parser.get_default(name)})
    limits = Limits(
        memory=parse_bytes(given.pop("memory")),
        max_pixels=given.pop("max_pixels"),
        max_file_size=parse_bytes(given.pop("max_file_size")),
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
    if given["only_errors"]:
        raise UsageError("--only-errors works in one process; leave --ray out")
    if given["device"] not in ("auto", "cpu"):
        raise UsageError(
            f"--device {given['device']}: each actor on Ray has a GPU of its own; allowed: auto, cpu"
        )


def _take_from_run(given: dict[str, Any], changed: set[str]) -> None:
    """--only-errors: the options are those of the run, but for how it is operated."""
    wrong = changed - _OPERATING - ({"root"} if given["paths_from"] else set())
    if wrong:
        option = "--" + min(wrong).replace("_", "-")
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
                summary = run(settings, watch=display, say=say, stop=stop)
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
    if not summary.rows_done:
        hint = "no row failed" if settings.only_errors else "--overwrite starts again"
        console.print(f"{summary.output} is finished already; {hint}", markup=False, soft_wrap=True)
    if isinstance(console.file, Log) and console.file.as_json:
        console.file.event("summary", **summary.as_json())
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
