"""`python -m benchmarks damage`: what damaged files cost that only the decoder can tell.

The same rows, with none, 1 % and 20 % of their images damaged in the middle, in turn, `rounds` times.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.throughput import DISTINCT, EndToEnd, make_archive, run_engine

SHARES = (0.0, 0.01, 0.2)
LIMIT = 0.95  # of the rate without damage that 1 % may leave


def damaged(folder: Path, images: str) -> list[str]:
    """A stray marker in the middle of each image: libjpeg decodes on, with a warning."""
    names = []
    for index in range(DISTINCT):
        data = bytearray((folder / images / f"{index:03}.jpg").read_bytes())
        data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\xd3"
        names.append(f"{images}/damaged-{index:03}.jpg")
        (folder / names[-1]).write_bytes(data)
    return names


def make_manifest(folder: Path, rows: int, side: int, share: float) -> tuple[Path, int]:
    """The manifest with `share` of its rows replaced, spread at random, and how many that are."""
    lines = make_archive(folder, rows, side).read_text().splitlines()
    bad = damaged(folder, f"images-{side}")
    count = round(share * rows)
    for place in random.Random(1).sample(range(1, rows + 1), count):
        lines[place] = bad[place % DISTINCT]
    manifest = folder / f"damage-{share:g}.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest, count


def main(console: Console, options: Any) -> None:
    before = record.machine()
    runs: dict[float, list[EndToEnd]] = {share: [] for share in SHARES}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        manifests = {share: make_manifest(work, options.rows, options.side, share) for share in SHARES}
        for _ in range(options.rounds):
            for share in random.sample(SHARES, len(SHARES)):
                manifest, bad = manifests[share]
                runs[share].append(run_engine(manifest, options.bundle, work, errors_expected=bad))
    figures = {}
    table = Table("damaged", "rows/s", "of the rate without", "core-ms a row", box=None, pad_edge=False)
    for share, taken in runs.items():
        ratios = [run.rate / clean.rate for run, clean in zip(taken, runs[0.0], strict=True)]
        figures[f"{share:g}"] = {
            "rows_per_s": statistics.median(run.rate for run in taken),
            "of_clean": {"median": statistics.median(ratios), "rounds": ratios},
            "core_ms_per_row": 1000 * statistics.median(run.core_s_per_image for run in taken),
        }
        found = figures[f"{share:g}"]
        cells = f"{found['rows_per_s']:.2f}", f"{found['of_clean']['median']:.3f}"
        table.add_row(f"{share:.0%}", *cells, f"{found['core_ms_per_row']:.1f}")
    console.print(table)
    console.print(f"limit at 1 %: {LIMIT} of the rate without damage", highlight=False)
    target = options.output / "damage-cpu.json"
    command = f"damage --rows {options.rows} --rounds {options.rounds} --side {options.side}"
    work_done = {"rows": options.rows, "image": f"{options.side} x {options.side} gray JPEG, quality 90"}
    record.write(
        target, command, {"work": work_done, "damaged_share": figures, "limit": LIMIT}, before=before
    )
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
