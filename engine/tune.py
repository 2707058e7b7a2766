"""`python -m engine.tune BUNDLE --sample MANIFEST`: the fastest options on this machine, for one's own files.

Candidates run the stages of `engine.run` from end to end, in turn, for seconds at a time. Half of them is
left out after each round, so that most of the time goes to the good ones; the best is then held against the
defaults in pairs, and replaces them only when it is clearly faster.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import structs
from rich.console import Console

from engine import bundle
from engine.bundle import Bundle
from engine.cli.terminal import hush_libraries, run_command, stop_on_signal
from engine.command import Parser
from engine.core.deadline import Deadline
from engine.core.json_records import from_builtins, to_builtins
from engine.core.option import number
from engine.core.tuning import Tuning
from engine.errors import EngineError, Stopped, UsageError
from engine.job import Say, check_paths, choice_of
from engine.ledger import Progress
from engine.manifest import Manifest, open_manifest
from engine.options import add_options
from engine.pipeline import Opening, Stages, meters_for
from engine.provenance import RunRecord, defaults
from engine.records import Part, Scorer
from engine.runners import Choice
from engine.settings import Settings, available_cpus, parse_location
from engine.sink import Layout, Sink
from engine.store import LocalFolder
from engine.tuned import (
    CPU_BATCHES,
    FORMAT,
    GPU_BATCHES,
    BestBeside,
    Knobs,
    Sampled,
    Tried,
    TuningProfile,
    folder_of,
    keep,
    machine_of,
)

SAMPLE_ROWS = 4096  # of the manifest, spread over it
WORTH = 1.03  # the best has to be this much faster than the defaults to replace them
ROUNDS_END = (0.4, 0.65)  # share of the time after which each round is over; the pairs have the rest
PAIRS = 3  # of the best and the defaults, at least; with fewer, the defaults stay
PAIRS_WANTED = 6
OVERTIME = 1.5  # times the seconds asked for, at most, for that many pairs
LONGEST = 0.15  # share of the time that a candidate's shortest visit may take
WARM_CYCLES = 2  # batches of each lane until the queues between the stages are as full as they stay
LIMITED_BY = {
    "read": "reading limits",
    "preprocess": "decoding limits",
    "members": "the members limit",
    "write": "writing limits",
}

Visit = Callable[[Knobs, float], float]  # a candidate for some seconds: images/s


@dataclass
class Found:
    """What a search has found."""

    best: Knobs = field(default_factory=Knobs)  # beside the defaults
    pairs: list[float] = field(default_factory=list)  # its rate / that of the defaults, visited in turn
    tried: dict[Knobs, list[float]] = field(default_factory=dict)  # images/s of each visit but the first
    left_out: list[Knobs] = field(default_factory=list)  # too slow to be measured in the time there is

    @property
    def gain(self) -> float:
        """Of the best over the defaults: 0.04 is 4 %."""
        return statistics.median(self.pairs) - 1 if self.pairs else 0.0

    @property
    def knobs(self) -> Knobs:
        """The best where it is clearly faster, else the defaults."""
        slower = sum(ratio <= 1 for ratio in self.pairs)
        clearly = len(self.pairs) >= PAIRS and 1 + self.gain >= WORTH and slower <= len(self.pairs) / 4
        return self.best if clearly else Knobs()

    def rate(self, knobs: Knobs) -> float:
        return statistics.median(self.tried[knobs])


def search(
    others: Sequence[Knobs],
    visit: Visit,
    *,
    seconds: float,
    rows_of: Callable[[Knobs], int],
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """The fastest of `others`, candidates beside the defaults that differ in one knob each.

    `rows_of`: how many images the shortest visit of a candidate takes. Raises UsageError when there is
    too little time for any.
    """
    default, found, began = Knobs(), Found(), clock()

    def measured(knobs: Knobs, visit_s: float) -> float:
        rate = visit(knobs, visit_s)
        found.tried.setdefault(knobs, []).append(rate)
        return rate

    first = visit(default, seconds / 20)  # warms up
    left = [knobs for knobs in others if rows_of(knobs) <= LONGEST * seconds * first]
    found.left_out = [knobs for knobs in others if knobs not in left]
    if others and not left:
        enough = math.ceil(min(map(rows_of, others)) / (LONGEST * first))
        raise UsageError(
            f"--seconds {seconds:g} is too short to try anything beside the defaults, "
            f"at {first:.1f} images/s; give {enough} or more"
        )
    ratios: dict[Knobs, list[float]] = {knobs: [] for knobs in left}
    for index, end in enumerate(ROUNDS_END):
        if not left:
            break
        visit_s = max(0.0, began + end * seconds - clock()) / (len(left) + 1)
        round_of = {
            knobs: measured(knobs, visit_s) for knobs in random.sample([default, *left], len(left) + 1)
        }
        for knobs in left:
            ratios[knobs].append(round_of[knobs] / round_of[default])
        left.sort(key=lambda knobs: statistics.median(ratios[knobs]), reverse=True)
        last = index == len(ROUNDS_END) - 1
        kept = left[: 1 if last else math.ceil(len(left) / 2)]
        joined = None if last else _joined({knobs: ratios[knobs][0] for knobs in left})
        if joined and joined not in kept and rows_of(joined) <= LONGEST * seconds * first:
            kept.append(joined)
            ratios[joined] = []
        left = kept
    if left:
        found.best = left[0]
    if left and statistics.median(ratios[left[0]]) > 1 / WORTH:
        visit_s = max(0.0, began + seconds - clock()) / (2 * PAIRS_WANTED)
        while not found.pairs or clock() - began < (OVERTIME if len(found.pairs) < PAIRS else 1) * seconds:
            order = [default, found.best] if len(found.pairs) % 2 else [found.best, default]
            rates = {knobs: measured(knobs, visit_s) for knobs in order}
            found.pairs.append(rates[found.best] / rates[default])
    return found


def _joined(ratios: dict[Knobs, float]) -> Knobs | None:
    """Each knob where it gained most, together, if there are several that gained."""
    best: dict[str, Any] = {}
    for knobs in sorted((one for one in ratios if ratios[one] > 1), key=lambda one: ratios[one]):
        best |= knobs.named
    return Knobs(**best) if len(best) > 1 else None


def candidates(choice: Choice, settings: Settings) -> list[Knobs]:
    """What is tried beside the defaults: one knob each, of those that the user has not named."""
    cpus = available_cpus()
    batch = defaults(choice)[0]
    if choice.gpu:
        most = min([GPU_BATCHES[-1], *(plan.passport.max_batch for plan in choice.plans)])
        found = [Knobs(batch_size=size) for size in GPU_BATCHES if size != batch and size <= most]
        found += [Knobs(cuda_graph=False)]
        if choice.runner == "tensorrt" and settings.runner == "auto":
            found += [Knobs(runner="torch")]
        workers = {max(1, cpus // 2)}
    else:
        found = [Knobs(batch_size=size) for size in CPU_BATCHES if size != batch]
        workers = {max(1, cpus // 2), cpus + 1}  # one thread a core where two of them share it; one more
    return found + [Knobs(workers=count) for count in sorted(workers - {cpus})]


class _Enough(Exception):  # noqa: N818 - not a failure
    """A visit is over."""


class _Window:
    """Counts what comes out of the stages once they run evenly; ends the visit after whole cycles."""

    def __init__(self, lanes: int, seconds: float, stop: threading.Event) -> None:
        self._lanes, self._until, self._stop = lanes, time.monotonic() + seconds, stop
        self._batches = 0
        self._since, self._rows_before = 0.0, 0
        self.rate = 0.0

    def __call__(self, progress: Progress) -> None:
        if self._stop.is_set():
            raise Stopped("stopped; no profile was written")
        now = time.monotonic()
        self._batches += 1
        cycles, rest = divmod(self._batches, self._lanes)
        if rest:
            return
        if cycles <= WARM_CYCLES:
            self._since, self._rows_before = now, progress.rows_done
        elif now >= self._until:
            self.rate = (progress.rows_done - self._rows_before) / (now - self._since)
            raise _Enough


class Trials:
    """The stages of `engine.run`, open for one candidate or several, over and over the same sample."""

    def __init__(
        self,
        settings: Settings,
        models: Bundle,
        choice: Choice,
        manifest: Manifest,
        *,
        scratch: Path,
        say: Say,
        stop: threading.Event,
    ) -> None:
        self._settings, self._models, self._choice = settings, models, choice
        self._manifest, self._say, self._stop = manifest, say, stop
        self._folder = LocalFolder(scratch)
        self._layout = Layout.of(models, manifest, settings)
        self._run = RunRecord.create(settings, None, manifest, models, choice)
        self.paths = sample(manifest)
        self._at = 0
        self._opened: dict[object, Stages] = {}
        self.by_status: Counter[str] = Counter()
        self.limits: dict[
            Knobs, Counter[str]
        ] = {}  # of each candidate, in how many visits a stage was the limit
        self.tuning: dict[str, Tuning] = {}  # by runner, what a GPU's own tuning has settled

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        with ExitStack() as stack:  # all of them, whatever one raises
            for stages in self._opened.values():
                stack.push(stages)
        self._opened = {}

    def rows_of(self, knobs: Knobs) -> int:
        """The images of the shortest visit that tells something."""
        return (WARM_CYCLES + 1) * self._lanes(knobs) * self._batch(knobs)

    def _lanes(self, knobs: Knobs) -> int:
        return self._settings.slots if self._choice.gpu else knobs.workers or available_cpus()

    def _batch(self, knobs: Knobs) -> int:
        return knobs.batch_size or defaults(self._choice)[0]

    def visit(self, knobs: Knobs, seconds: float) -> float:
        """Images/s from end to end."""
        stages = self._stages(knobs)
        batch_size = self._batch(knobs)
        stages.opening = replace(stages.opening, batch_size=batch_size)
        stages.meters = meters_for(stages.opening.workers, gpu=self._choice.gpu is not None)
        window, progress = _Window(self._lanes(knobs), seconds, self._stop), Progress(sys.maxsize)
        parts = self._parts(self._run.result_options.part_rows)
        sink = Sink(self._folder, self._layout, self._run.to_metadata(), Scorer())
        with suppress(_Enough):
            stages.run(parts, sink, progress, window, Deadline())
        self._at += progress.rows_done + 8 * batch_size  # behind what was read ahead
        self.by_status += progress.by_status
        busiest = max(stages.meters.values(), key=lambda meter: meter.occupancy(progress.elapsed_s))
        self.limits.setdefault(knobs, Counter())[busiest.name] += 1
        self._say(f"{knobs}: {window.rate:.1f} images/s")
        return window.rate

    def _parts(self, rows: int) -> Iterator[Part]:
        """Without end, from where the last visit ended."""
        for index in range(sys.maxsize):
            start = self._at + index * rows
            paths = [self.paths[place % len(self.paths)] for place in range(start, start + rows)]
            yield Part(index, np.arange(index * rows, (index + 1) * rows), paths, pa.table({}))

    def _stages(self, knobs: Knobs) -> Stages:
        """Of a number of workers, for batches up to the largest; on a GPU of one candidate at a time."""
        gpu = self._choice.gpu is not None
        key = knobs if gpu else knobs.workers
        if key not in self._opened:
            if gpu:
                self._close()
            widest = knobs if gpu else structs.replace(knobs, batch_size=CPU_BATCHES[-1])
            stages = self._open(widest.on(self._settings))
            self._opened[key] = stages.__enter__()
            tuning = stages.settled.tuning
            if tuning.batch_size_asked is not None:
                raise EngineError(f"out of memory with {knobs}")
            runner = stages.opening.choice.runner
            self.tuning[runner] = Tuning(compiled=tuning.compiled, decoding=tuning.decoding)
        return self._opened[key]

    def _open(self, settings: Settings) -> Stages:
        models, manifest = self._models, self._manifest
        choice = choice_of(settings, models)
        rows, tuning = manifest.rows, Tuning()
        if choice.gpu:
            from engine.gpu.tuning import TUNE_ROWS

            rows = max(rows, TUNE_ROWS)  # it is tuned for a long run
            tuning = self.tuning.get(choice.runner, tuning)
        opening = Opening(
            *(settings, models, choice, self._say, manifest.root),
            batch_size=settings.batch_size or defaults(choice)[0],
            part_rows=self._run.result_options.part_rows,
            rows=rows,
            tuning=tuning,
            resumed=False,
            manifest=manifest,
        )
        return Stages(opening)


def sample(manifest: Manifest) -> list[str | None]:
    """Paths spread over the whole manifest, in random order: every visit sees the same mixture."""
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(manifest.rows, min(manifest.rows, SAMPLE_ROWS), replace=False))
    paths: list[str | None] = []
    first = 0
    for table in manifest.tables():
        here = chosen[(chosen >= first) & (chosen < first + table.num_rows)] - first
        paths += table.column(manifest.path_column).cast(pa.string()).take(here).to_pylist()
        first += table.num_rows
    rng.shuffle(paths)
    return paths


def tune(settings: Settings, *, seconds: float, say: Say, stop: threading.Event) -> tuple[str, Path]:
    """Find the fastest options for the images of `settings.manifest`. Returns verdict and profile.

    Raises UsageError for a bundle, sample or device that can't be used, Stopped when `stop` is set.
    """
    models = bundle.load(settings.bundle)
    choice = choice_of(settings, models)
    check_paths(settings)
    folder = folder_of(settings.bundle)
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise UsageError(f"{folder}: the profile can't be written there; copy the bundle to where it can")
    say(choice.reason)
    load, cpus = os.getloadavg()[0], available_cpus()
    if load > cpus / 2:
        say(f"this machine is busy already (load {load:.1f} on {cpus} CPUs): its figures will be of that")
    with TemporaryDirectory(prefix="engine-tune-") as name:
        scratch = Path(name, "results")
        scratch.mkdir()
        manifest = open_manifest(
            settings.manifest,
            path_column=settings.path_column,
            root=settings.root,
            listing=Path(name, "listing.parquet"),
        ).only(())
        if not manifest.rows:
            raise UsageError(f"--sample {settings.manifest}: it has no rows")
        with Trials(settings, models, choice, manifest, scratch=scratch, say=say, stop=stop) as trials:
            visit = _tolerant(trials, manifest, choice, say)
            found = search(candidates(choice, settings), visit, seconds=seconds, rows_of=trials.rows_of)
    if found.left_out:
        say(f"not tried, for want of time (--seconds {seconds:g}): {'; '.join(map(str, found.left_out))}")
    limits = trials.limits[found.knobs].most_common(1)[0][0]
    verdict = f"{_in_words(found, choice)}; {LIMITED_BY[limits]} this machine"
    settled = trials.tuning.get(found.knobs.runner or choice.runner, Tuning())
    profile = TuningProfile(
        format=FORMAT,
        knobs=from_builtins(found.knobs.named | to_builtins(settled), Knobs),
        verdict=verdict,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        sample=Sampled(rows=len(trials.paths), of=manifest.rows, by_status=dict(trials.by_status)),
        best_beside=BestBeside(**found.best.named, of_defaults=tuple(found.pairs)),
        tried=tuple(Tried(knobs=one, images_per_s=tuple(rates)) for one, rates in found.tried.items()),
        load_average=(load, os.getloadavg()[0]),
        machine=machine_of(models, choice),
    )
    return verdict, keep(settings.bundle, profile)


def _tolerant(trials: Trials, manifest: Manifest, choice: Choice, say: Say) -> Visit:
    """Visits that need images; on a GPU a candidate that does not fit is lost, and not the search."""

    def visit(knobs: Knobs, seconds: float) -> float:
        try:
            rate = trials.visit(knobs, seconds)
        except EngineError as error:
            if isinstance(error, Stopped) or not (choice.gpu and knobs.named):
                raise
            say(f"{knobs}: {error}")
            return 0.0
        if not trials.by_status["ok"]:
            counts = ", ".join(f"{count} {status}" for status, count in trials.by_status.most_common())
            raise UsageError(
                f"--sample {manifest.source}: none of its images was scored ({counts}); "
                "do relative paths start elsewhere? see --root"
            )
        return rate

    return visit


def _in_words(found: Found, choice: Choice) -> str:
    default, best = Knobs(), found.best
    own = f"batch {defaults(choice)[0]}, {available_cpus()} workers"
    if found.knobs.named:
        return (
            f"{best}: {found.rate(best):.1f} images/s, {found.gain:.0%} more than the defaults "
            f"({own}: {found.rate(default):.1f})"
        )
    change = f"was {abs(100 * found.gain):.1f} % {'faster' if found.gain > 0 else 'slower'}"
    if not found.pairs:
        change = "was clearly slower"
    elif len(found.pairs) < PAIRS:
        change += ", in too short a time to tell"
    elif 1 + found.gain >= WORTH:
        change += ", but not steadily"
    beside = f"; the best beside them, {best}, {change}" if best.named else ""
    return f"the defaults ({own}) stay: {found.rate(default):.1f} images/s{beside}"


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.tune",
        "BUNDLE --sample MANIFEST [option ...]",
        description="Find the options that are fastest here for your own images; engine.run uses them.",
        examples="example: python -m engine.tune bundle --sample manifest.csv",
    )
    add = parser.add
    add("bundle", type=Path, metavar="BUNDLE", help="model folder; the profile goes into BUNDLE.tuning")
    add(
        "--sample",
        dest="manifest",
        type=parse_location,
        required=True,
        metavar="MANIFEST",
        help="as engine.run",
    )
    add("--seconds", type=number(1, 86_400), default=60.0, metavar="S", help="to take for it (%(default)g)")
    add_options(parser, "device", "runner", "precision", "path_column", "root", "memory")
    return parser


def main(arguments: list[str] | None = None) -> int:
    console = Console(stderr=True, emoji=False)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    hush_libraries()

    def work() -> int:
        given: dict[str, Any] = vars(option_parser().parse_args(arguments))
        seconds = given.pop("seconds")
        stop = stop_on_signal(console).stop
        verdict, place = tune(Settings(**given), seconds=seconds, say=say, stop=stop)
        say(f"kept for engine.run in {place}")
        print(verdict)
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
