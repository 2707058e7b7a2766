"""One start of the engine as its own process, watched: time, processor time, memory, leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.processes import process_tree, resident_bytes
from benchmarks.record import ROOT

SAMPLE_EVERY_S = 0.1
AHEAD = 2048  # files that a dying engine may have looked at beyond its last part

Row = dict[str, Any]  # of the results, by column


@dataclass
class Run:
    """One start of the engine."""

    exit_status: int | None  # None: killed at the time limit
    elapsed_s: float
    cpu_s: float
    memory_mb: list[float]  # over time, of all processes together
    left: set[str]  # names in the output folder
    complaint: str  # the end of its standard error
    orphans: int  # processes that outlived it
    unwritten: list[str]  # the paths behind the last row, as far as the engine may have come
    restarts: int | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def peak_mb(self) -> float:
        return max(self.memory_mb, default=0.0)

    def figures(self) -> dict[str, Any]:
        quarter = -(-len(self.memory_mb) // 4) or 1
        starts = range(0, len(self.memory_mb), quarter)
        return {
            "elapsed_s": self.elapsed_s,
            "cpu_s": self.cpu_s,
            "files_per_s": len(self.rows) / self.elapsed_s,
            "peak_memory_mb": self.peak_mb,
            "peak_memory_mb_of_each_quarter": [
                max(self.memory_mb[start : start + quarter]) for start in starts
            ],
            "decoder_restarts": self.restarts,
        }


def screen(folder: Path, name: str, paths: Sequence[str], bundle: Path, timeout_s: float) -> Run:
    """`python -m engine.run` over `paths`, relative to `folder`, into the new folder `name` there."""
    manifest, output, errors = folder / f"{name}.txt", folder / name, folder / f"{name}.log"
    manifest.write_text("\n".join(paths))
    command = [sys.executable, "-m", "engine.run", manifest, "-b", bundle, "-o", output]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start, cpu_before, memory = time.monotonic(), _children_cpu_s(), []
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
        while process.poll() is None and time.monotonic() - start < timeout_s:
            memory.append(resident_bytes(process.pid) / 1e6)
            with suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_EVERY_S)
    status, elapsed = process.poll(), time.monotonic() - start
    orphans = 0 if status is None else len(process_tree(process.pid))
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = {path.name for path in output.iterdir()} if output.is_dir() else set()
    complaint = errors.read_text()[-500:].replace(str(folder), "")
    rows = [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    restarts = None
    if "_SUCCESS" in left:
        restarts = json.loads((output / "_SUCCESS").read_text())["last_start"].get("decoder_restarts")
    return Run(
        status,
        elapsed,
        _children_cpu_s() - cpu_before,
        memory,
        left,
        complaint,
        orphans,
        restarts=restarts,
        rows=rows,
        unwritten=list(paths[len(rows) : len(rows) + AHEAD]),
    )


def culprits(folder: Path, run: Run, bundle: Path, timeout_s: float = 60) -> list[str]:
    """The fewest files that still end a run badly, found by halving; none if `run` ended well."""
    suspects = [] if run.exit_status == 0 else run.unwritten
    while len(suspects) > 1:
        middle = len(suspects) // 2
        for part in (suspects[:middle], suspects[middle:]):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                paths = [str(folder / path) for path in part]
                ended_well = screen(Path(scratch), "narrow", paths, bundle, timeout_s).exit_status == 0
            if not ended_well:
                suspects = part
                break
        else:
            break
    return suspects if len(suspects) <= 8 else []


def _children_cpu_s() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system
