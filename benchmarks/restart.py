"""`python -m benchmarks restart`: time to the first finished batch, and cost of a kill.

Runs are `engine.run` in separate processes. Start-up is measured from the start of the process to the first
batch with scores, with files and libraries in the page cache. Kills are `kill -9` after 20 % to 80 % of the
run, followed by the same command; its rows must equal those of an uninterrupted run. Batches in the members
at the time of the kill, at most two more than workers, are not counted.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.throughput import make_archive
from engine.core.errors import EngineError
from engine.core.hardware import available_cpus
from engine.core.settings import CPU_BATCH

LIMIT_S = 4.0  # to the first finished batch
# the command line, with the number of processed rows printed after each batch
_PROGRESS_SCRIPT = """
import sys
from engine import run

class Display(run.ProgressBar):
    def __call__(self, progress):
        print(progress.rows_done, flush=True)
        super().__call__(progress)

run.ProgressBar = Display
sys.exit(run.main())
"""


class EngineProcess:
    """A run in a separate process."""

    def __init__(self, arguments: list[object], errors: Path) -> None:
        self.rows = 0  # rows with scores
        self._errors = errors
        self._began = time.perf_counter()
        with errors.open("w") as log:
            command = [sys.executable, "-c", _PROGRESS_SCRIPT, *map(str, arguments)]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def wait_for(self, rows: int) -> float:
        """Wait until `rows` rows have scores; return the seconds since the start."""
        assert self._process.stdout is not None
        while self.rows < rows:
            line = self._process.stdout.readline()
            if not line:
                raise EngineError(f"engine.run ended early: {self._errors.read_text()[-300:]}")
            self.rows = int(line)
        return time.perf_counter() - self._began

    def kill(self) -> int:
        """Kill the process with SIGKILL; return the number of rows with scores."""
        self._process.kill()
        output, _ = self._process.communicate()
        return max([self.rows, *(int(line) for line in output.split() if line.isdigit())])

    def end(self) -> None:
        self._process.communicate()
        if self._process.returncode:
            raise EngineError(f"engine.run failed: {self._errors.read_text()[-300:]}")


def read_results_table(output: Path) -> pa.Table:
    return ds.dataset(sorted(output.glob("part-*.parquet"))).to_table().replace_schema_metadata(None)


def measure_start_up(arguments: list[object], work: Path, rounds: int) -> list[float]:
    """Measure the seconds to the first finished batch."""
    seconds = []
    for number in range(rounds + 1):
        run = EngineProcess([*arguments, "-o", work / f"start-{number}"], work / "errors.txt")
        seconds.append(run.wait_for(1))
        run.kill()
    return seconds[1:]  # the first run fills the page cache


def kill_and_resume(
    arguments: list[object], work: Path, number: int, rows: int, expected: pa.Table
) -> dict[str, Any]:
    output = work / f"killed-{number}"
    command = [*arguments, "-o", output]
    first = EngineProcess(command, work / "errors.txt")
    first.wait_for(round(rows * random.uniform(0.2, 0.8)))
    scored = first.kill()
    if (output / "_SUCCESS").exists():
        raise EngineError(f"the run of {rows} rows ended before it was killed; set more --rows")
    kept = ds.dataset(sorted(output.glob("part-*.parquet"))).count_rows()
    EngineProcess(command, work / "errors.txt").end()
    success = json.loads((output / "_SUCCESS").read_text())
    if success["rows"] != rows or not read_results_table(output).equals(expected):
        raise EngineError(f"the rows differ from those of an undisturbed run, killed after {scored} rows")
    second = success["last_start"]
    return {
        "scored_before_the_kill": scored,
        "rows_kept": kept,
        "rows_after_it": second["rows"],
        "rows_scored_twice": scored + second["rows"] - rows,
        "seconds_lost": (scored - kept) * second["elapsed_s"] / second["rows"],
    }


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        manifest = make_archive(work, options.rows, options.side)
        arguments = [manifest, "-b", options.bundle, "--part-rows", options.part_rows, "--device", "cpu"]
        arguments += ["--batch-size", CPU_BATCH, "--workers", available_cpus()]  # overrides tuned options
        starts = measure_start_up(arguments, work, options.rounds)
        EngineProcess([*arguments, "-o", work / "undisturbed"], work / "errors.txt").end()
        expected = read_results_table(work / "undisturbed")
        kills = [
            kill_and_resume(arguments, work, number, options.rows, expected)
            for number in range(options.rounds)
        ]
    twice = [kill["rows_scored_twice"] for kill in kills]
    table = Table("figure", "measured", "limit", box=None, pad_edge=False)
    table.add_row("start to first batch, s", f"{statistics.median(starts):.2f}", f"<= {LIMIT_S:g}")
    table.add_row("rows scored twice, per kill", f"{statistics.median(twice):g}", "a part")
    table.add_row("  at most", f"{max(twice)}", f"a part: {options.part_rows}")
    console.print(table)
    target = options.output / "restart-cpu.json"
    command = (
        f"restart --rows {options.rows} --part-rows {options.part_rows} --rounds {options.rounds} "
        f"--side {options.side}"
    )
    figures = {
        "work": {"rows": options.rows, "image": f"{options.side} x {options.side} gray JPEG, quality 90"},
        "first_batch_s": {"median": statistics.median(starts), "rounds": starts, "limit": LIMIT_S},
        "rows_scored_twice": {
            "median": statistics.median(twice),
            "most": max(twice),
            "part_rows": options.part_rows,
        },
        "kills": kills,
    }
    record.write_record(target, command, figures, before=before)
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
