"""`python -m benchmarks scaling`: cost by rows, image size, batch size, threads, parts and bad files.

Each point is the median of `rounds` complete runs; the points of a series run in random order. A straight
line is fitted to each series: slope, intercept, R^2. `draw_series` makes the plot from the JSON.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.damage import make_manifest
from benchmarks.memory import measure_null_run
from benchmarks.null import NullScores, NullStages
from benchmarks.throughput import make_archive, make_tiny_archive
from engine.core.errors import UsageError
from engine.core.hardware import available_cpus
from engine.core.settings import Settings
from engine.pipeline.pipeline import screen_in_process
from engine.pipeline.stages import Stages

ROWS = (1_000, 10_000, 100_000, 500_000, 2_000_000)
ONCE_ROWS = 200_000  # longer runs are measured once
SIDES = (256, 512, 1024, 1536, 2048)
BATCHES = (1, 2, 4, 8, 16, 32)
PART_ROWS = (64, 128, 256, 1024, 16_384)
SHARES = (0.0, 0.01, 0.1, 0.25, 0.5)
QUICK = {"rows": 10_000, "rounds": 1, "images": 32, "side": 256}


class DecodeStages(Stages):
    """The stages of a run that decodes but does not score."""

    def open(self, stack: ExitStack) -> None:
        super().open(stack)
        bundle = self.context.bundle
        self.step = NullScores(len(bundle.members), len(bundle.classes))


@dataclass(frozen=True)
class Series:
    """The points to measure: x, a run that returns its seconds, and `cost`, which converts them to y."""

    title: str
    x: str
    y: str
    runs: dict[float, Callable[[], float]]
    cost: Callable[[float, float], float] = lambda x, seconds: seconds


def time_stages(stages: type[Stages] | None, manifest: Path, bundle: Path, **options: Any) -> float:
    """Time a run in this process, without opening and closing its stages."""
    with tempfile.TemporaryDirectory(dir=manifest.parent) as scratch:
        settings = Settings(manifest=manifest, bundle=bundle, output=Path(scratch, "out"), **options)
        summary = screen_in_process(settings, stages_type=stages)
    assert summary.rows_done == summary.rows
    return summary.elapsed_s


def _time_null_run(rows: int, bundle: Path, work: Path) -> float:
    """Time a complete run with null stages in a separate process."""
    manifest = make_tiny_archive(work, rows)
    with (
        tempfile.TemporaryDirectory(dir=work) as scratch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(measure_null_run, manifest, bundle, Path(scratch, "out")).result()[1]


def all_series(options: Any, work: Path, worker: ProcessPoolExecutor) -> dict[str, Callable[[], Series]]:
    """Return makers of the series; each makes its archives and runs in `worker`."""
    cores, images, side = available_cpus(), options.images, options.side
    null_rows = min(options.rows, 2 * PART_ROWS[-1])

    def run(stages: type[Stages] | None, manifest: Path, **settings: Any) -> Callable[[], float]:
        # overrides tuned options
        options_of_run = {"device": "cpu", "batch_size": 8, "workers": cores} | settings
        return lambda: worker.submit(time_stages, stages, manifest, options.bundle, **options_of_run).result()

    def rows() -> Series:
        counts = [count for count in ROWS if count <= options.rows]
        runs = {count: partial(_time_null_run, count, options.bundle, work) for count in counts}
        return Series("rows, nothing decoded or scored", "rows", "s", runs)

    def image_size() -> Series:
        sides = [pixels for pixels in SIDES if pixels <= 2 * side]
        runs = {
            pixels**2 / 1e6: run(DecodeStages, make_archive(work / str(pixels), 4 * images, pixels))
            for pixels in sides
        }
        title = "image size, nothing scored"
        return Series(title, "megapixels", "ms an image", runs, lambda _, s: 1000 * s / (4 * images))

    def batch_size() -> Series:
        manifest = make_archive(work, images, side)
        runs = {size: run(None, manifest, batch_size=size) for size in BATCHES}
        return Series(
            "batch size",
            "images a batch",
            "core-ms a batch",
            runs,
            lambda size, s: 1000 * cores * s * size / images,
        )

    def threads() -> Series:
        manifest = make_archive(work, images, side)
        counts = sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})
        runs = {count: run(None, manifest, workers=count) for count in counts}
        return Series("threads", "workers", "images/s", runs, lambda _, s: images / s)

    def part_size() -> Series:
        manifest = make_tiny_archive(work, null_rows)
        runs = {-(-null_rows // size): run(NullStages, manifest, part_rows=size) for size in PART_ROWS}
        return Series(f"parts of {null_rows} rows, nothing decoded or scored", "parts", "s", runs)

    def bad_files() -> Series:
        folder = work / "bad"
        runs = {share: run(None, make_manifest(folder, images, side, share)[0]) for share in SHARES}
        return Series("damaged images", "share", "ms a row", runs, lambda _, s: 1000 * s / images)

    return {
        "rows": rows,
        "image_size": image_size,
        "batch_size": batch_size,
        "threads": threads,
        "part_size": part_size,
        "bad_files": bad_files,
    }


def measure_series(series: Series, rounds: int) -> dict[str, Any]:
    """Measure the medians of `rounds` rounds and fit a line."""
    costs: dict[float, list[float]] = {x: [] for x in series.runs}
    for number in range(rounds):
        for x in random.sample(list(series.runs), len(series.runs)):
            if number == 0 or series.x != "rows" or x <= ONCE_ROWS:
                costs[x].append(series.cost(x, series.runs[x]()))
    points = [
        {"x": x, "y": statistics.median(rounds_costs), "rounds": rounds_costs}
        for x, rounds_costs in costs.items()
    ]
    return {
        "title": series.title,
        "x": series.x,
        "y": series.y,
        "points": points,
        "line": fit_line([(point["x"], point["y"]) for point in points]),
    }


def fit_line(points: Iterable[tuple[float, float]]) -> dict[str, float] | None:
    """Fit slope, intercept and R^2 by least squares; return None for fewer than three points."""
    x, y = np.array(sorted(points)).T
    if len(x) < 3:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    residual, total = float(((y - slope * x - intercept) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r2": 1 - residual / total if total else 1.0,
    }


def draw_series(source: Path) -> Path:
    """Draw a small plot of each series beside the JSON file."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("the plot needs matplotlib; install it with: pip install matplotlib") from None
    figures = json.loads(source.read_text())
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 8}):
        figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.5), layout="constrained")
        for axis in axes.flat[len(figures["series"]) :]:
            axis.remove()
        for axis, series in zip(axes.flat, figures["series"].values(), strict=False):
            x, y = np.array([(point["x"], point["y"]) for point in series["points"]]).T
            axis.plot(x, y, "o", color="#1f6fb4", markersize=4)
            title, line = series["title"], series["line"]
            if line:
                ends = np.array([0, x.max()])
                axis.plot(ends, line["slope"] * ends + line["intercept"], color="#999999", linewidth=1)
                title += f"\n{line['intercept']:.3g} {line['slope']:+.3g} x, R² {line['r2']:.3f}"
            axis.set(title=title, xlabel=series["x"], ylabel=series["y"])
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
        machine = figures["machine"]
        figure.suptitle(f"{machine['cores']} cores, {machine['processor']}; {figures['taken'][:10]}")
        target = source.with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None})
        pyplot.close(figure)
    return target


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    if options.quick:
        vars(options).update(QUICK)
    options.images = options.images or 64 * available_cpus()
    series_figures = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker,
    ):
        makers = all_series(options, Path(scratch), worker)
        for name in options.series:
            series_figures[name] = measure_series(makers[name](), options.rounds)
            _show(console, series_figures[name])
    target = options.output / "scaling-cpu.json"
    command = (
        f"scaling --rows {options.rows} --rounds {options.rounds} --images {options.images} "
        f"--side {options.side} --series {' '.join(options.series)}"
    )
    work = {
        "image": f"{options.side} x {options.side} gray JPEG, quality 90, synthetic",
        "images": options.images,
        "image_size_images": 4 * options.images,
    }
    record.write_record(target, command, {"work": work, "series": series_figures}, before=before)
    console.print(
        f"written: {target} and {draw_series(target).name}", markup=False, highlight=False, soft_wrap=True
    )


def _show(console: Console, series: dict[str, Any]) -> None:
    console.print(f"\n{series['title']}", highlight=False)
    table = Table(series["x"], series["y"], box=None, pad_edge=False)
    for point in series["points"]:
        table.add_row(f"{point['x']:g}", f"{point['y']:.4g}")
    console.print(table)
    if line := series["line"]:
        console.print(
            f"{line['intercept']:.4g} {line['slope']:+.4g} x, R^2 {line['r2']:.4f}", highlight=False
        )
