"""`python -m engine.tune BUNDLE --sample MANIFEST`: find the fastest options on this machine for a sample.

Candidates take turns: each runs the stages of `engine.run` from end to end for some seconds. Each round drops
the slower half (successive halving). The best is then compared with the defaults in pairs, and replaces them
only if it is clearly faster.
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

MIN_SPEEDUP = 1.03  # of the best over the defaults, to replace them
ROUNDS_END = (0.4, 0.65)  # share of the time at which each round ends; the rest is for the pairs
PAIRS = 3  # minimum of pairs of the best and the defaults; with fewer, the defaults stay
PAIRS_WANTED = 6
OVERTIME = 1.5  # times --seconds, at most, to reach PAIRS
MAX_MEASUREMENT_SHARE = 0.15  # of the time, for the shortest measurement of a candidate
LIMIT_TEXTS = {
    "read": "reading limits",
    "preprocess": "decoding limits",
    "members": "the members limit",
    "write": "writing limits",
}

MeasureFunction = Callable[[TunedOptions, float], float]  # options, seconds -> images/s


@dataclass
class SearchResult:
    """The result of a search."""

    best: TunedOptions = field(default_factory=TunedOptions)  # the fastest candidate
    pairs: list[float] = field(default_factory=list)  # rate of the best / rate of the defaults
    rates: dict[TunedOptions, list[float]] = field(default_factory=dict)  # images/s after the warm-up
    skipped: list[TunedOptions] = field(default_factory=list)  # too slow for the given time

    @property
    def gain(self) -> float:
        """Return the gain of the best over the defaults: 0.04 is 4 %."""
        return statistics.median(self.pairs) - 1 if self.pairs else 0.0

    @property
    def chosen(self) -> TunedOptions:
        """Return the best options if they are clearly faster, else the defaults."""
        slower = sum(ratio <= 1 for ratio in self.pairs)
        clearly = len(self.pairs) >= PAIRS and 1 + self.gain >= MIN_SPEEDUP and slower <= len(self.pairs) / 4
        return self.best if clearly else TunedOptions()

    def rate(self, options: TunedOptions) -> float:
        return statistics.median(self.rates[options])


def search(
    others: Sequence[TunedOptions],
    measure: MeasureFunction,
    *,
    seconds: float,
    min_rows: Callable[[TunedOptions], int],
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Find the fastest of `others`, candidates that differ from the defaults in one option each.

    `min_rows` returns the number of images of a candidate's shortest measurement. Raises UsageError if there
    is not enough time for any candidate.
    """
    default, result, began = TunedOptions(), SearchResult(), clock()

    def measure_and_record(options: TunedOptions, measure_s: float) -> float:
        rate = measure(options, measure_s)
        result.rates.setdefault(options, []).append(rate)
        return rate

    first_rate = measure(default, seconds / 20)  # the warm-up
    max_rows = MAX_MEASUREMENT_SHARE * seconds * first_rate
    left = [options for options in others if min_rows(options) <= max_rows]
    result.skipped = [options for options in others if options not in left]
    if others and not left:
        enough = math.ceil(min(map(min_rows, others)) / (MAX_MEASUREMENT_SHARE * first_rate))
        raise UsageError(
            f"--seconds {seconds:g} is too short to measure a candidate at {first_rate:.1f} images/s; "
            f"give {enough} or more"
        )
    ratios: dict[TunedOptions, list[float]] = {options: [] for options in left}
    for index, end in enumerate(ROUNDS_END):
        if not left:
            break
        measure_s = max(0.0, began + end * seconds - clock()) / (len(left) + 1)
        order = random.sample([default, *left], len(left) + 1)
        rates = {options: measure_and_record(options, measure_s) for options in order}
        for options in left:
            ratios[options].append(rates[options] / rates[default])
        left.sort(key=lambda options: statistics.median(ratios[options]), reverse=True)
        last = index == len(ROUNDS_END) - 1
        kept = left[: 1 if last else math.ceil(len(left) / 2)]
        combined = None if last else _combine_gains({options: ratios[options][0] for options in left})
        if combined and combined not in kept and min_rows(combined) <= max_rows:
            kept.append(combined)
            ratios[combined] = []
        left = kept
    if left:
        result.best = left[0]
    if left and statistics.median(ratios[left[0]]) > 1 / MIN_SPEEDUP:
        measure_s = max(0.0, began + seconds - clock()) / (2 * PAIRS_WANTED)
        while not result.pairs or clock() - began < (OVERTIME if len(result.pairs) < PAIRS else 1) * seconds:
            order = [default, result.best] if len(result.pairs) % 2 else [result.best, default]
            rates = {options: measure_and_record(options, measure_s) for options in order}
            result.pairs.append(rates[result.best] / rates[default])
    return result


def _combine_gains(ratios: dict[TunedOptions, float]) -> TunedOptions | None:
    """Combine the best value of each option, if several options gained."""
    best: dict[str, Any] = {}
    gains = {options: ratio for options, ratio in ratios.items() if ratio > 1}
    for options in sorted(gains, key=lambda options: gains[options]):
        best |= options.named
    return TunedOptions(**best) if len(best) > 1 else None


def candidates(choice: RunnerChoice, settings: Settings) -> list[TunedOptions]:
    """List the candidates, each with one changed option that the user has not named."""
    cpus = available_cpus()
    batch = default_sizes(choice)[0]
    if choice.gpu:
        most = min([GPU_BATCHES[-1], *(plan.passport.max_batch for plan in choice.plans)])
        options = [TunedOptions(batch_size=size) for size in GPU_BATCHES if size != batch and size <= most]
        options += [TunedOptions(cuda_graph=False)]
        if choice.runner == "tensorrt" and settings.runner == "auto":
            options += [TunedOptions(runner="torch")]
        workers = {max(1, cpus // 2)}
    else:
        options = [TunedOptions(batch_size=size) for size in CPU_BATCHES if size != batch]
        workers = {max(1, cpus // 2), cpus + 1}  # without hyper-threads; one more than CPUs
    return options + [TunedOptions(workers=count) for count in sorted(workers - {cpus})]


def tune(settings: Settings, *, seconds: float, say: OnMessage, stop: threading.Event) -> tuple[str, Path]:
    """Find the fastest options for the images of `settings.manifest`; return the verdict and the profile.

    Raises UsageError for an unusable bundle, sample or device, and Stopped when `stop` is set.
    """
    bundle = bundles.load_bundle(settings.bundle)
    choice = select_for_settings(settings, bundle)
    check_inputs(settings)
    folder = profiles_folder(settings.bundle)
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise UsageError(f"the profile cannot be written to {folder}; copy the bundle to a writable folder")
    say(choice.reason)
    load, cpus = os.getloadavg()[0], available_cpus()
    if load > cpus / 2:
        say(f"this machine is busy (load {load:.1f} on {cpus} CPUs); the profile will be for a busy machine")
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
            raise UsageError(f"--sample {settings.manifest} has no rows")
        with Trials(settings, bundle, choice, manifest, scratch=scratch, say=say, stop=stop) as trials:
            measure = _tolerate_failures(trials, manifest, choice, say)
            result = search(candidates(choice, settings), measure, seconds=seconds, min_rows=trials.min_rows)
    if result.skipped:
        say(f"not measured within --seconds {seconds:g}: {'; '.join(map(str, result.skipped))}")
    options = result.chosen
    limit = trials.limits[options].most_common(1)[0][0]
    verdict = f"{_describe_result(result, choice)}; {LIMIT_TEXTS[limit]} this machine"
    tuning = trials.tuning.get(options.runner or choice.runner, Tuning())
    profile = TuningProfile(
        format=PROFILE_FORMAT,
        knobs=from_builtins(options.named | to_builtins(tuning), TunedOptions),
        verdict=verdict,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        sample=Sampled(rows=len(trials.paths), of=manifest.rows, by_status=dict(trials.by_status)),
        best_beside=BestBeside(**result.best.named, of_defaults=tuple(result.pairs)),
        tried=tuple(Tried(knobs=tried, images_per_s=tuple(rates)) for tried, rates in result.rates.items()),
        load_average=(load, os.getloadavg()[0]),
        machine=machine_key(bundle, choice),
    )
    return verdict, save_profile(settings.bundle, profile)


def _tolerate_failures(
    trials: Trials, manifest: Manifest, choice: RunnerChoice, say: OnMessage
) -> MeasureFunction:
    """Wrap `trials.measure`: a candidate that fails on a GPU, as by lack of memory, has a rate of 0.

    The wrapper raises UsageError if no image of the sample was scored.
    """

    def measure(options: TunedOptions, seconds: float) -> float:
        try:
            rate = trials.measure(options, seconds)
        except EngineError as error:
            if isinstance(error, Stopped) or not (choice.gpu and options.named):
                raise
            say(f"{options}: {error}")
            return 0.0
        if not trials.by_status["ok"]:
            counts = ", ".join(f"{count} {status}" for status, count in trials.by_status.most_common())
            raise UsageError(
                f"--sample {manifest.source}: no image was scored ({counts}); "
                "if relative paths start in another folder, name it with --root"
            )
        return rate

    return measure


def _describe_result(result: SearchResult, choice: RunnerChoice) -> str:
    default, best = TunedOptions(), result.best
    default_text = f"batch {default_sizes(choice)[0]}, {available_cpus()} workers"
    if result.chosen.named:
        return (
            f"{best}: {result.rate(best):.1f} images/s, {result.gain:.0%} more than the defaults "
            f"({default_text}: {result.rate(default):.1f})"
        )
    change = f"was {abs(100 * result.gain):.1f} % {'faster' if result.gain > 0 else 'slower'}"
    if not result.pairs:
        change = "was clearly slower"
    elif len(result.pairs) < PAIRS:
        change += ", in too short a time to decide"
    elif 1 + result.gain >= MIN_SPEEDUP:
        change += ", but not steadily"
    candidate = f"; the best candidate, {best}, {change}" if best.named else ""
    return f"the defaults ({default_text}) stay: {result.rate(default):.1f} images/s{candidate}"
