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
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine.bundle import bundle as bundles
from engine.core.errors import EngineError, Stopped, UsageError
from engine.core.hardware import available_cpus
from engine.core.json_records import from_builtins, to_builtins
from engine.core.records import OnMessage
from engine.core.settings import Settings
from engine.core.tuning import Tuning
from engine.manifest.manifest import Manifest, open_manifest
from engine.runners.base import RunnerChoice
from engine.runs.prepare import check_inputs, select_for_settings
from engine.runs.profile import (
    CPU_BATCHES,
    GPU_BATCHES,
    PROFILE_FORMAT,
    BestBeside,
    Sampled,
    Tried,
    TunedOptions,
    TuningProfile,
    machine_key,
    profiles_folder,
    save_profile,
)
from engine.runs.run_record import default_sizes
from engine.tune.trials import Trials

MIN_SPEEDUP = 1.03  # the best has to be this much faster than the defaults to replace them
ROUNDS_END = (0.4, 0.65)  # share of the time after which each round is over; the pairs have the rest
PAIRS = 3  # of the best and the defaults, at least; with fewer, the defaults stay
PAIRS_WANTED = 6
OVERTIME = 1.5  # times the seconds asked for, at most, for that many pairs
MAX_VISIT_SHARE = 0.15  # share of the time that a candidate's shortest visit may take
LIMIT_TEXTS = {
    "read": "reading limits",
    "preprocess": "decoding limits",
    "members": "the members limit",
    "write": "writing limits",
}

MeasureFunction = Callable[[TunedOptions, float], float]  # a candidate for some seconds: images/s


@dataclass
class SearchResult:
    """The result of a search."""

    best: TunedOptions = field(default_factory=TunedOptions)  # beside the defaults
    pairs: list[float] = field(default_factory=list)  # its rate / that of the defaults, visited in turn
    tried: dict[TunedOptions, list[float]] = field(
        default_factory=dict
    )  # images/s of each visit but the first
    left_out: list[TunedOptions] = field(default_factory=list)  # too slow to be measured in the time there is

    @property
    def gain(self) -> float:
        """Return the gain of the best over the defaults: 0.04 is 4 %."""
        return statistics.median(self.pairs) - 1 if self.pairs else 0.0

    @property
    def knobs(self) -> TunedOptions:
        """Return the best options where they are clearly faster, else the defaults."""
        slower = sum(ratio <= 1 for ratio in self.pairs)
        clearly = len(self.pairs) >= PAIRS and 1 + self.gain >= MIN_SPEEDUP and slower <= len(self.pairs) / 4
        return self.best if clearly else TunedOptions()

    def rate(self, knobs: TunedOptions) -> float:
        return statistics.median(self.tried[knobs])


def search(
    others: Sequence[TunedOptions],
    visit: MeasureFunction,
    *,
    seconds: float,
    rows_of: Callable[[TunedOptions], int],
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Find the fastest of `others`, candidates that differ from the defaults in one option each.

    `rows_of`: how many images the shortest visit of a candidate takes. Raises UsageError when there is
    too little time for any.
    """
    default, found, began = TunedOptions(), SearchResult(), clock()

    def measured(knobs: TunedOptions, visit_s: float) -> float:
        rate = visit(knobs, visit_s)
        found.tried.setdefault(knobs, []).append(rate)
        return rate

    first = visit(default, seconds / 20)  # warms up
    left = [knobs for knobs in others if rows_of(knobs) <= MAX_VISIT_SHARE * seconds * first]
    found.left_out = [knobs for knobs in others if knobs not in left]
    if others and not left:
        enough = math.ceil(min(map(rows_of, others)) / (MAX_VISIT_SHARE * first))
        raise UsageError(
            f"--seconds {seconds:g} is too short to try anything beside the defaults, "
            f"at {first:.1f} images/s; give {enough} or more"
        )
    ratios: dict[TunedOptions, list[float]] = {knobs: [] for knobs in left}
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
        joined = None if last else _combine_gains({knobs: ratios[knobs][0] for knobs in left})
        if joined and joined not in kept and rows_of(joined) <= MAX_VISIT_SHARE * seconds * first:
            kept.append(joined)
            ratios[joined] = []
        left = kept
    if left:
        found.best = left[0]
    if left and statistics.median(ratios[left[0]]) > 1 / MIN_SPEEDUP:
        visit_s = max(0.0, began + seconds - clock()) / (2 * PAIRS_WANTED)
        while not found.pairs or clock() - began < (OVERTIME if len(found.pairs) < PAIRS else 1) * seconds:
            order = [default, found.best] if len(found.pairs) % 2 else [found.best, default]
            rates = {knobs: measured(knobs, visit_s) for knobs in order}
            found.pairs.append(rates[found.best] / rates[default])
    return found


def _combine_gains(ratios: dict[TunedOptions, float]) -> TunedOptions | None:
    """Combine the best value of each option, if several options gained."""
    best: dict[str, Any] = {}
    for knobs in sorted((one for one in ratios if ratios[one] > 1), key=lambda one: ratios[one]):
        best |= knobs.named
    return TunedOptions(**best) if len(best) > 1 else None


def candidates(choice: RunnerChoice, settings: Settings) -> list[TunedOptions]:
    """List the candidates: one option changed each, of those that the user has not named."""
    cpus = available_cpus()
    batch = default_sizes(choice)[0]
    if choice.gpu:
        most = min([GPU_BATCHES[-1], *(plan.passport.max_batch for plan in choice.plans)])
        found = [TunedOptions(batch_size=size) for size in GPU_BATCHES if size != batch and size <= most]
        found += [TunedOptions(cuda_graph=False)]
        if choice.runner == "tensorrt" and settings.runner == "auto":
            found += [TunedOptions(runner="torch")]
        workers = {max(1, cpus // 2)}
    else:
        found = [TunedOptions(batch_size=size) for size in CPU_BATCHES if size != batch]
        workers = {max(1, cpus // 2), cpus + 1}  # one thread a core where two of them share it; one more
    return found + [TunedOptions(workers=count) for count in sorted(workers - {cpus})]


def tune(settings: Settings, *, seconds: float, say: OnMessage, stop: threading.Event) -> tuple[str, Path]:
    """Find the fastest options for the images of `settings.manifest`. Returns verdict and profile.

    Raises UsageError for a bundle, sample or device that can't be used, Stopped when `stop` is set.
    """
    bundle = bundles.load_bundle(settings.bundle)
    choice = select_for_settings(settings, bundle)
    check_inputs(settings)
    folder = profiles_folder(settings.bundle)
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
        with Trials(settings, bundle, choice, manifest, scratch=scratch, say=say, stop=stop) as trials:
            visit = _tolerate_failures(trials, manifest, choice, say)
            found = search(candidates(choice, settings), visit, seconds=seconds, rows_of=trials.rows_of)
    if found.left_out:
        say(f"not tried, for want of time (--seconds {seconds:g}): {'; '.join(map(str, found.left_out))}")
    limits = trials.limits[found.knobs].most_common(1)[0][0]
    verdict = f"{_describe_result(found, choice)}; {LIMIT_TEXTS[limits]} this machine"
    settled = trials.tuning.get(found.knobs.runner or choice.runner, Tuning())
    profile = TuningProfile(
        format=PROFILE_FORMAT,
        knobs=from_builtins(found.knobs.named | to_builtins(settled), TunedOptions),
        verdict=verdict,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        sample=Sampled(rows=len(trials.paths), of=manifest.rows, by_status=dict(trials.by_status)),
        best_beside=BestBeside(**found.best.named, of_defaults=tuple(found.pairs)),
        tried=tuple(Tried(knobs=one, images_per_s=tuple(rates)) for one, rates in found.tried.items()),
        load_average=(load, os.getloadavg()[0]),
        machine=machine_key(bundle, choice),
    )
    return verdict, save_profile(settings.bundle, profile)


def _tolerate_failures(
    trials: Trials, manifest: Manifest, choice: RunnerChoice, say: OnMessage
) -> MeasureFunction:
    """Visits that need images; on a GPU a candidate that does not fit is lost, and not the search."""

    def visit(knobs: TunedOptions, seconds: float) -> float:
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


def _describe_result(found: SearchResult, choice: RunnerChoice) -> str:
    default, best = TunedOptions(), found.best
    own = f"batch {default_sizes(choice)[0]}, {available_cpus()} workers"
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
    elif 1 + found.gain >= MIN_SPEEDUP:
        change += ", but not steadily"
    beside = f"; the best beside them, {best}, {change}" if best.named else ""
    return f"the defaults ({own}) stay: {found.rate(default):.1f} images/s{beside}"
