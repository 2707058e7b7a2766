"""`python -m benchmarks scaling-out`: cost of Ray compared with one process, and of a killed actor.

Overhead compares `engine.run` with and without `--ray`, in turn, on all cores; rates are those of `_SUCCESS`,
from the first read to the last part and the last canaries. Null stages have no decoder and no members, which
leaves the cost of the engine and of Ray. Recovery is the time from `kill -9` of one of two actors until its
replacement holds a part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import processes, record
from benchmarks.intervals import bootstrap_interval
from benchmarks.restart import read_results_table
from benchmarks.throughput import make_archive
from engine.bundle import bundle as bundles
from engine.core.errors import EngineError, Stopped
from engine.core.hardware import available_cpus
from engine.core.settings import CPU_BATCH

LIMIT = 0.05  # of the rate
RECOVERY_ROWS, RECOVERY_PART_ROWS = 100_000, 256
_NULL = """
import resource, sys
from pathlib import Path
from benchmarks.null import NullStages
from engine.core.settings import Settings
manifest, bundle, output, actors = sys.argv[1:]
settings = Settings(
    manifest=Path(manifest), bundle=Path(bundle), output=Path(output), device="cpu", workers=1
)
if actors == "0":
    from engine.pipeline.pipeline import screen_in_process as screen
else:
    from dataclasses import replace
    from engine.ray.driver import screen_on_ray as screen
    settings = replace(settings, ray="local", actors=int(actors))
summary = screen(settings, stages_type=NullStages)
used = resource.getrusage(resource.RUSAGE_SELF)
print(summary.rows_done / summary.elapsed_s, used.ru_utime + used.ru_stime)
"""


def uniform_bundle(source: Path, target: Path) -> Path:
    """Copy the bundle `source` with canaries that expect the scores of null stages."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target, copy_function=os.link)
    canaries = bundles.load_bundle(source).canaries.path
    arrays = load_file(canaries)
    arrays["logits"] = np.zeros_like(arrays["logits"])
    name = canaries.relative_to(source)
    (target / name).unlink()
    save_file(arrays, target / name)
    description = json.loads((source / bundles.DESCRIPTION_FILE).read_text())
    description["canaries"]["sha256"] = hashlib.sha256((target / name).read_bytes()).hexdigest()
    (target / bundles.DESCRIPTION_FILE).unlink()
    (target / bundles.DESCRIPTION_FILE).write_text(json.dumps(description))
    return target


def run_checked(command: Sequence[object], environment: dict[str, str] | None = None) -> str:
    done = processes.run_command([sys.executable, *map(str, command)], environment=environment)
    if done.status:
        raise EngineError(f"a run failed: {' '.join(done.errors.split())[-300:]}")
    return done.output


def measure_rate(manifest: Path, bundle: Path, output: Path, *more: object) -> tuple[float, float]:
    """Return rows per second, and the seconds of start-up and end."""
    options = ["-b", bundle, "-o", output, "--device", "cpu", "--batch-size", CPU_BATCH, "--part-rows", 256]
    began = time.perf_counter()
    run_checked(["-m", "engine.run", manifest, *options, "--workers", available_cpus(), *more])
    wall_s = time.perf_counter() - began
    last = json.loads((output / "_SUCCESS").read_text())["last_start"]
    return last["rows"] / last["elapsed_s"], wall_s - last["elapsed_s"]


def measure_overhead(
    console: Console, manifest: Path, bundle: Path, work: Path, rounds: int
) -> dict[str, Any]:
    """Run one process and one actor in turn and compare their rates; the rows must be equal."""
    local_rates, ray_rates, overheads = [], [], []
    for number in range(rounds):
        outputs = work / f"alone-{number}", work / f"ray-{number}"
        local_rates.append(measure_rate(manifest, bundle, outputs[0])[0])
        rate, seconds = measure_rate(manifest, bundle, outputs[1], "--ray")
        ray_rates.append(rate)
        overheads.append(seconds)
        if not read_results_table(outputs[0]).equals(read_results_table(outputs[1])):
            raise EngineError("the rows of an actor differ from those of one process")
        console.print(
            f"round {number + 1}: {local_rates[-1]:.2f} images/s, with Ray {rate:.2f}", highlight=False
        )
    losses = [1 - with_ray / without for with_ray, without in zip(ray_rates, local_rates, strict=True)]
    return {
        "median": statistics.median(losses),
        "interval": bootstrap_interval(losses),
        "rounds": losses,
        "limit": LIMIT,
        "images_per_s": {"one process": local_rates, "ray": ray_rates},
        "seconds_around": {"median": statistics.median(overheads), "rounds": overheads},
    }


def measure_null_rates(
    manifest: Path, bundle: Path, work: Path, actors: list[int], rounds: int
) -> dict[str, Any]:
    """Measure rows per second of null stages, and the driver's processor time."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(record.ROOT), *sys.path]))}
    figures: dict[str, Any] = {}
    for number in range(rounds):
        for count in (0, *actors):
            name = f"{count} actor{'s' * (count > 1)}" if count else "one process"
            output = work / f"null-{count}-{number}"
            rate, core_s = run_checked(["-c", _NULL, manifest, bundle, output, count], environment).split()
            row = figures.setdefault(name, {"rounds": [], "driver_core_s": []})
            row["rounds"].append(float(rate))
            row["driver_core_s"].append(float(core_s))
            shutil.rmtree(output)
    for row in figures.values():
        row["median"] = statistics.median(row["rounds"])
    return figures


def measure_recovery(manifest: Path, bundle: Path, work: Path, number: int) -> tuple[float, int]:
    """Measure the seconds from the kill of an actor until another holds a part, and the repeated rows."""
    from engine.core.deadline import Deadline
    from engine.core.settings import Settings
    from engine.pipeline.stages import Stages
    from engine.ray.actor_pool import ActorPool
    from engine.ray.driver import RayRun, write_token
    from engine.runs.prepare import prepare_run

    settings = Settings(
        manifest=manifest,
        bundle=bundle,
        output=work / f"killed-{number}",
        device="cpu",
        part_rows=RECOVERY_PART_ROWS,
        workers=1,
        ray="local",
        actors=2,
    )
    deadline, times = Deadline(), dict[str, float]()
    pool = ActorPool(settings, lambda _: None, deadline)

    def kill_actor() -> None:
        wait_until(lambda: sum(actor.rows_done > 0 for actor in pool.ready) == 2)
        victim = pool.ready[0]
        os.kill(victim.pid, signal.SIGKILL)
        times["killed"] = time.monotonic()
        wait_until(lambda: victim.ended and sum(bool(actor.parts) for actor in pool.ready) == 2)
        times["back"] = time.monotonic()
        deadline.stop.set()

    with (
        closing(pool),
        prepare_run(settings, lambda _: None, chosen=pool.start_actors) as prepared,
        closing(pool),
        write_token(prepared) as token,
    ):
        run = RayRun(pool, prepared, token, lambda _: None, deadline, Stages)
        thread = threading.Thread(target=kill_actor, daemon=True)
        thread.start()
        with suppress(Stopped):
            run.screen()
        thread.join()
    if "back" not in times:
        raise EngineError("the run ended before the killed actor was replaced")
    return times["back"] - times["killed"], run.repeated_parts * RECOVERY_PART_ROWS


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        manifest = make_archive(work, options.rows, options.side)
        overhead = measure_overhead(console, manifest, options.bundle, work, options.rounds)
        long = make_archive(work, RECOVERY_ROWS, options.side)
        kills = [measure_recovery(long, options.bundle, work, number) for number in range(options.rounds)]
        null = make_archive(work, options.null_rows, 64)
        blank = uniform_bundle(options.bundle, work / "bundle")
        rates = measure_null_rates(null, blank, work, options.actors, options.rounds)
    seconds, repeated = [seconds for seconds, _ in kills], [rows for _, rows in kills]
    table = Table("figure", "measured", "limit", box=None, pad_edge=False)
    table.add_row("overhead of --ray, %", f"{100 * overhead['median']:.1f}", f"<= {100 * LIMIT:g}")
    for name, rate in rates.items():
        table.add_row(f"null stages, rows/s, {name}", f"{rate['median']:,.0f}", "")
    table.add_row("killed actor replaced, s", f"{statistics.median(seconds):.1f}", "")
    console.print(table)
    target = options.output / "scaling-out-cpu.json"
    command = f"scaling-out --rows {options.rows} --null-rows {options.null_rows} --rounds {options.rounds}"
    figures = {
        "work": {
            "rows": options.rows,
            "null_rows": options.null_rows,
            "image": f"{options.side} x {options.side} gray JPEG, quality 90",
        },
        "overhead": overhead,
        "null_rows_per_s": rates,
        "recovery": {
            "seconds": {"median": statistics.median(seconds), "rounds": seconds},
            "rows_again": {"median": statistics.median(repeated), "rounds": repeated},
        },
    }
    record.write_record(target, command, figures, before=before)
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
