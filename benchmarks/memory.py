"""`python -m benchmarks memory`: peak memory of a run of two million rows and one of twenty thousand.

Both are complete runs (manifest, reads, Parquet, ledger) with null stages, each in a separate process.
"""

from __future__ import annotations

import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.null import NullStages
from benchmarks.throughput import make_tiny_archive
from engine.core.settings import Settings
from engine.pipeline.pipeline import screen_in_process

LIMIT_MB = 100  # largest difference between the long and the short run


def measure_null_run(manifest: Path, bundle: Path, output: Path) -> tuple[float, float]:
    """Return peak memory in MB and seconds of a run in this process."""
    start = time.perf_counter()
    summary = screen_in_process(
        Settings(manifest=manifest, bundle=bundle, output=output), stages_type=NullStages
    )
    assert summary.rows_done == summary.rows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - start


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in (20_000, options.rows):
            work = Path(scratch, str(rows))
            work.mkdir()
            manifest = make_tiny_archive(work, rows)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peak, seconds = pool.submit(measure_null_run, manifest, options.bundle, work / "out").result()
            runs.append({"rows": rows, "peak_memory_mb": peak, "seconds": seconds})
    growth = runs[1]["peak_memory_mb"] - runs[0]["peak_memory_mb"]
    table = Table("rows", "peak memory, MB", "seconds", box=None, pad_edge=False)
    for run in runs:
        table.add_row(str(run["rows"]), f"{run['peak_memory_mb']:.0f}", f"{run['seconds']:.1f}")
    console.print(table)
    console.print(f"growth {growth:.0f} MB, limit {LIMIT_MB}", highlight=False)
    target = options.output / "memory-cpu.json"
    command = f"memory --rows {options.rows}"
    record.write_record(
        target, command, {"runs": runs, "growth_mb": growth, "limit_mb": LIMIT_MB}, before=before
    )
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
