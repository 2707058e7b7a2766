"""Measure the end-to-end rate and the ceiling given by the stages when each runs alone.

The ceiling is cores / (sum over stages of core-seconds per image): the rate with perfect overlap and no other
cost. Pipeline efficiency is rate / ceiling.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks import processes, record
from benchmarks.intervals import bootstrap_interval
from benchmarks.null import NullPixels, NullScores
from benchmarks.processes import core_seconds
from engine.bundle import bundle as bundles
from engine.bundle.bundle import Bundle
from engine.core.hardware import available_cpus
from engine.core.overlap import Meter
from engine.core.records import Batch, Part, Scorer
from engine.core.settings import CPU_BATCH, CPU_PART_ROWS, GPU_BATCH, GPU_PART_ROWS, Limits, Settings
from engine.manifest.manifest import Manifest, open_manifest
from engine.pipeline.context import READ_THREADS
from engine.pipeline.flow import chain_stages
from engine.pipeline.stages import make_meters
from engine.preprocess.stage import Preprocess
from engine.reader.reader import Reader
from engine.runners.onnx import OnnxRunner
from engine.scoring.cpu import CpuScorer
from engine.sink.columns import ResultSchema
from engine.sink.sink import Sink
from engine.sink.triage import Triage
from engine.storage.local_folder import LocalFolder

DISTINCT = 32  # images on disk; the manifest repeats them
HOST_ROUNDS = 3


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage for `rows` images when it ran alone."""

    rows: int
    wall_s: float
    core_s: float

    @property
    def rate(self) -> float:
        return self.rows / self.wall_s

    @property
    def core_s_per_image(self) -> float:
        return self.core_s / self.rows


def time_work(work: Callable[[], int]) -> StageCost:
    """Time `work`, which returns the number of processed images."""
    wall, core = time.perf_counter(), core_seconds(os.getpid())
    rows = work()
    return StageCost(rows, time.perf_counter() - wall, core_seconds(os.getpid()) - core)


def write_image(folder: Path, index: int, side: int) -> None:
    from PIL import Image

    from training import synthetic

    sample = synthetic.draw_sample(seed=1, index=index, size_range=(side, side))
    Image.fromarray(sample.pixels8).save(folder / f"{index:03}.jpg", quality=90)


def make_archive(folder: Path, rows: int, side: int) -> Path:
    """Write a manifest of `rows` rows that name `DISTINCT` gray JPEGs, `side` x `side`, quality 90."""
    images = folder / f"images-{side}"
    if not images.exists():
        unfinished = folder / f".images-{side}"
        unfinished.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            list(pool.map(write_image, [unfinished] * DISTINCT, range(DISTINCT), [side] * DISTINCT))
        unfinished.rename(images)
    manifest = folder / f"manifest-{rows}.csv"
    lines = (f"{images.name}/{row % DISTINCT:03}.jpg\n" for row in range(rows))
    manifest.write_text("path\n" + "".join(lines))
    return manifest


class StageTimings:
    """Measures each stage alone, with the settings that `engine.run` chooses on this machine."""

    def __init__(self, bundle: Bundle, manifest: Manifest, workers: int) -> None:
        self._bundle, self._workers = bundle, workers
        self._paths = [path for part in manifest.parts(CPU_PART_ROWS) for path in part.paths]
        self._root = manifest.root
        self._schema = ResultSchema.of(bundle, manifest, Settings(manifest=manifest.source))
        runners = [OnnxRunner(member, bundle) for member in bundle.members]
        self._step = CpuScorer(bundle, runners, threads=workers)
        self._preprocess = Preprocess(
            size=bundle.size,
            batch_size=CPU_BATCH,
            threads=workers,
            decoding_bytes=Limits().decoding_bytes,
            decode=bundle.decode,
        )

    def costs(self, rows: int) -> dict[str, StageCost]:
        """Measure every stage, in random order, on the first `rows` rows."""
        part = Part(
            0, np.arange(rows), self._paths[:rows], pa.table({"_": pa.nulls(rows)}).drop_columns(["_"])
        )
        stages = {
            "read": lambda: self._read(part),
            "preprocess": lambda: self._decode(part),
            "members": lambda: self._infer(part),
            "write": lambda: self._write(part),
        }
        names = list(stages)
        random.shuffle(names)
        costs = {name: stages[name]() for name in names}
        return {name: costs[name] for name in stages}

    def _batches(self, part: Part) -> Iterator[Batch]:
        reader = Reader(self._root, CPU_BATCH, READ_THREADS, limits=Limits())
        return reader.stage([part], Meter("read"))

    def _read(self, part: Part) -> StageCost:
        def work() -> int:
            rows = 0
            for batch in self._batches(part):
                batch.drop_encoded()
                rows += batch.rows
            return rows

        return time_work(work)

    def _decode(self, part: Part) -> StageCost:
        batches = list(self._batches(part))  # read before timing; dropped as they are decoded
        return time_work(lambda: _count(self._preprocess.stage(batches, Meter("preprocess"))))

    def _decoded(self, part: Part) -> list[Batch]:
        return list(self._preprocess.stage(self._batches(part), Meter("preprocess")))

    def _infer(self, part: Part) -> StageCost:
        batches = self._decoded(part)
        return time_work(lambda: _count(self._step.stage(batches, Meter("members"))))

    def _write(self, part: Part) -> StageCost:
        members, classes = len(self._bundle.members), len(self._bundle.classes)
        batches = list(self._batches(part))
        for batch in batches:
            batch.drop_encoded()
        scored = list(NullScores(members, classes).stage(NullPixels().stage(batches, Meter("")), Meter("")))
        with tempfile.TemporaryDirectory() as folder:
            sink = Sink(LocalFolder(Path(folder)), self._schema, b"{}", Scorer())
            return time_work(lambda: sum(1 for _ in sink.stage(scored, Meter("write"))) * 0 + part.rows)


def _count(batches: Iterable[Batch]) -> int:
    return sum(batch.rows for batch in batches)


@dataclass(frozen=True)
class EndToEnd:
    """The figures of a run of `python -m engine.run`."""

    rate: float  # images/s from the first read to the last part synced
    core_s_per_image: float  # all of the process, including start-up
    peak_memory_mb: float  # of the process tree
    start_up_s: float  # process start to first read, and last part to exit


def run_engine(manifest: Path, bundle: Path, folder: Path, *, errors_expected: int = 0) -> EndToEnd:
    output = folder / f"results-{time.time_ns()}"
    command = [sys.executable, "-m", "engine.run", str(manifest), "-b", str(bundle), "-o", str(output)]
    # overrides tuned options and a GPU
    command += ["--device", "cpu", "--batch-size", str(CPU_BATCH), "--workers", str(available_cpus())]
    done = processes.run_command(command)
    if done.status:
        raise RuntimeError(f"engine.run ended with status {done.status}: {done.errors[-500:]}")
    success = json.loads((output / "_SUCCESS").read_text())
    last = success["last_start"]
    assert success["errors"] == errors_expected, success["by_status"]
    return EndToEnd(
        rate=last["rows"] / last["elapsed_s"],
        core_s_per_image=done.core_s / last["rows"],
        peak_memory_mb=done.peak_memory_mb,
        start_up_s=done.wall_s - last["elapsed_s"],
    )


def measure_throughput(
    console: Console, work: Path, path: Path, rows: int, rounds: int, side: int
) -> dict[str, Any]:
    """Measure end to end and each stage alone in `rounds` rounds: medians, and efficiency by round."""
    archive = make_archive(work, rows, side)
    bundle = bundles.load_bundle(path)
    manifest = open_manifest(archive)
    cores = available_cpus()
    stages = StageTimings(bundle, manifest, cores)
    stages.costs(min(rows, 8 * CPU_BATCH))  # warm-up
    rounds_taken = []
    for number in range(rounds):
        end_to_end = run_engine(archive, path, work)
        costs = stages.costs(min(rows, 512))
        ceiling = cores / sum(cost.core_s_per_image for cost in costs.values())
        rounds_taken.append((end_to_end, costs, end_to_end.rate / ceiling))
        console.print(
            f"round {number + 1}: {end_to_end.rate:.2f} images/s of {ceiling:.2f}, "
            f"efficiency {end_to_end.rate / ceiling:.3f}",
            highlight=False,
        )
    return _throughput_figures(rounds_taken, cores, rows, side, bundle)


def _throughput_figures(
    rounds_taken: list[tuple[EndToEnd, dict[str, StageCost], float]],
    cores: int,
    rows: int,
    side: int,
    bundle: Bundle,
) -> dict[str, Any]:
    def median(values: Iterable[float]) -> float:
        return statistics.median(values)

    stages = {}
    for name in rounds_taken[0][1]:
        stages[name] = {
            "rate_alone": median(costs[name].rate for _, costs, _ in rounds_taken),
            "core_ms_per_image": 1000 * median(costs[name].core_s_per_image for _, costs, _ in rounds_taken),
        }
    total_ms = sum(stage["core_ms_per_image"] for stage in stages.values())
    return {
        "work": {
            "rows": rows,
            "distinct_images": DISTINCT,
            "image": f"{side} x {side} gray JPEG, quality 90, synthetic",
            "members": [member.architecture for member in bundle.members],
            "batch_size": CPU_BATCH,
            "precision": "fp32",
        },
        "pipeline_efficiency": {
            "median": median(efficiency for *_, efficiency in rounds_taken),
            "interval": bootstrap_interval([efficiency for *_, efficiency in rounds_taken]),
            "rounds": [efficiency for *_, efficiency in rounds_taken],
        },
        "images_per_s": median(run.rate for run, *_ in rounds_taken),
        "ceiling_images_per_s": cores / (total_ms / 1000),
        "stages": stages,
        "peak_memory_mb": max(run.peak_memory_mb for run, *_ in rounds_taken),
        "start_up_s": median(run.start_up_s for run, *_ in rounds_taken),
        "core_ms_per_image_whole_process": 1000 * median(run.core_s_per_image for run, *_ in rounds_taken),
    }


def make_tiny_archive(work: Path, rows: int) -> Path:
    """Write a manifest of `rows` rows that name a hundred PNG files of 16 x 16 pixels."""
    from PIL import Image

    images = work / "tiny"
    images.mkdir(parents=True, exist_ok=True)
    for index in range(100):
        Image.new("L", (16, 16), index).save(images / f"{index:02}.png")
    manifest = work / f"tiny-{rows}.csv"
    with manifest.open("w") as lines:
        lines.write("path\n")
        lines.writelines(f"tiny/{row % 100:02}.png\n" for row in range(rows))
    return manifest


def measure_host_cost(work: Path, rows: int) -> dict[str, Any]:
    """Measure Python's cost on `rows` tiny files: all stages without decoding and inference.

    The figure is process CPU time per row: manifest, file reads, header checks, queues, Parquet. Batches and
    parts have the sizes of `engine.run` on a CPU and on a GPU.
    """
    manifest = open_manifest(make_tiny_archive(work, rows))
    sizes = {"cpu": (CPU_BATCH, CPU_PART_ROWS), "gpu": (GPU_BATCH, GPU_PART_ROWS)}
    return {
        "work": {"rows": rows, "image": "16 x 16 PNG"},
        "sizes": {name: _measure_once(manifest, work, *size) for name, size in sizes.items()},
    }


def _measure_once(manifest: Manifest, work: Path, batch_size: int, part_rows: int) -> dict[str, float]:
    classes = ("normal", "osteopenia", "osteoporosis")
    triage = Triage(classes, (0.5, 0.5), {"bone_loss": (1, 2)}, None)
    schema = ResultSchema(classes, ("a", "b"), manifest.columns, "", uids=False, triage=triage)
    reader = Reader(manifest.root, batch_size, READ_THREADS, limits=Limits())

    def run() -> int:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            items = chain_stages(
                manifest.parts(part_rows),
                reader,
                NullPixels(),
                NullScores(2, 3),
                Sink(LocalFolder(Path(folder)), schema, b"{}", Scorer()),
                make_meters(available_cpus()),
                overlap=True,
            )
            with closing(items):  # type: ignore[type-var]
                return sum(item.rows for item in items if isinstance(item, Batch))

    costs = [time_work(run) for _ in range(HOST_ROUNDS)]
    reading = time_work(
        lambda: sum(batch.rows for batch in reader.stage(manifest.parts(part_rows), Meter("")))
    )
    return {
        "batch_size": batch_size,
        "part_rows": part_rows,
        "host_us_per_image": 1e6 * statistics.median(cost.core_s_per_image for cost in costs),
        "of_that_reading_us": 1e6 * reading.core_s_per_image,
        "images_per_s": statistics.median(cost.rate for cost in costs),
    }


def show_figures(console: Console, figures: dict[str, Any], limits: dict[str, str]) -> None:
    """Print the figures with their limits: efficiency, stages, others."""
    table = Table("figure", "measured", "limit", box=None, pad_edge=False)
    if "stages" in figures:
        table.add_row(
            "pipeline efficiency", f"{figures['pipeline_efficiency']['median']:.3f}", limits["efficiency"]
        )
        table.add_row("images/s end to end", f"{figures['images_per_s']:.2f}", "")
        table.add_row("images/s ceiling", f"{figures['ceiling_images_per_s']:.2f}", "")
        for name, stage in figures["stages"].items():
            cost = f"{stage['rate_alone']:.1f} images/s, {stage['core_ms_per_image']:.3f} core-ms"
            table.add_row(f"  {name} alone", cost, "")
        table.add_row("peak memory, MB", f"{figures['peak_memory_mb']:.0f}", limits["memory"])
        table.add_row("start-up and end, s", f"{figures['start_up_s']:.2f}", "")
    else:
        for size in figures["sizes"].values():
            name = f"host cost, us per image, batches of {size['batch_size']}"
            table.add_row(name, f"{size['host_us_per_image']:.1f}", limits["host"])
            table.add_row("  of that reading", f"{size['of_that_reading_us']:.1f}", "")
            table.add_row("  rows/s", f"{size['images_per_s']:.0f}", "")
    console.print(table)


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    limits = {"efficiency": ">= 0.95", "memory": "<= 1200", "host": "<= 20"}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(options.work or scratch).absolute()
        work.mkdir(parents=True, exist_ok=True)
        if options.null:
            rows = options.rows or 200_000
            name, figures = "throughput-null", measure_host_cost(work, rows)
            command = f"throughput --null --rows {rows}"
        else:
            rows = options.rows or 2048
            name, command = (
                "throughput",
                f"throughput --rows {rows} --rounds {options.rounds} --side {options.side}",
            )
            figures = measure_throughput(console, work, options.bundle, rows, options.rounds, options.side)
    show_figures(console, figures, limits)
    target = options.output / f"{name}-cpu.json"
    record.write_record(target, command, figures, before=before)
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
