"""`python -m benchmarks damage`: cost and detection of damage that only decoding reveals.

Rates are measured on the same rows, with 0 %, 1 % and 20 % of the images damaged in the middle, in turn, for
`rounds` rounds. Detection is measured on copies of JPEGs (of `--radiographs`, else synthetic) with random
damage in the middle of their pixels.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.throughput import DISTINCT, EndToEnd, make_archive, run_engine
from engine.core.settings import Limits
from engine.formats.common import HeaderError
from engine.formats.header import parse_header
from engine.formats.jpeg import looks_damaged
from engine.preprocess.codecs import decode

COPIES = 400  # of each kind of damage
SHARES = (0.0, 0.01, 0.2)
LIMIT = 0.95  # smallest rate with 1 % damage, relative to the rate without


def damage_images(folder: Path, images: str) -> list[str]:
    """Put a stray marker in the middle of each image, which libjpeg decodes with a warning."""
    names = []
    for index in range(DISTINCT):
        data = bytearray((folder / images / f"{index:03}.jpg").read_bytes())
        data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\xd3"
        names.append(f"{images}/damaged-{index:03}.jpg")
        (folder / names[-1]).write_bytes(data)
    return names


def make_manifest(folder: Path, rows: int, side: int, share: float) -> tuple[Path, int]:
    """Return the manifest with `share` of its rows replaced at random, and their number."""
    lines = make_archive(folder, rows, side).read_text().splitlines()
    bad = damage_images(folder, f"images-{side}")
    count = round(share * rows)
    for row in random.Random(1).sample(range(1, rows + 1), count):
        lines[row] = bad[row % DISTINCT]
    manifest = folder / f"damage-{share:g}.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest, count


def _flip_bit(data: bytearray, position: int, rng: random.Random) -> None:
    data[position] ^= 1 << rng.randrange(8)


def _randomise(data: bytearray, position: int, rng: random.Random) -> None:
    data[position : position + 64] = rng.randbytes(64)


def _zero_out(data: bytearray, position: int, rng: random.Random) -> None:
    data[position : position + 512] = bytes(512)


DAMAGE = {
    "1 bit": (_flip_bit, 1),
    "4 bits": (_flip_bit, 4),
    "64 random bytes": (_randomise, 1),
    "512 zeros": (_zero_out, 1),
}


def caught_share(images: list[bytes], copies: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the shares of refused damaged copies, by kind: on the CPU, and the least share on a GPU.

    The least share on a GPU counts the copies that the structural scan sends to the CPU; DALI may refuse
    more.
    """
    refused_shares, scanned_shares = {}, {}
    for name, (change, times) in DAMAGE.items():
        rng, refused, suspected = random.Random(name), 0, 0
        for _ in range(copies):
            data = bytearray(rng.choice(images))
            for _ in range(times):
                change(data, rng.randrange(data.index(b"\xff\xda") + 14, len(data) - 514), rng)
            try:
                decode.decode(bytes(data), parse_header(bytes(data), Limits().max_pixels))
            except HeaderError:
                refused, suspected = refused + 1, suspected + 1
            except ValueError:
                refused, suspected = refused + 1, suspected + looks_damaged(bytes(data))
        refused_shares[name], scanned_shares[name] = refused / copies, suspected / copies
    return refused_shares, scanned_shares


def scan(images: list[bytes]) -> dict[str, float]:
    """Measure the cost of the structural scan and how many sound files it suspects."""
    start = time.perf_counter()
    suspected = sum(looks_damaged(data) for data in images)
    seconds = time.perf_counter() - start
    return {
        "sound_files": len(images),
        "in_doubt": suspected,
        "us_per_file": 1e6 * seconds / len(images),
        "ns_per_byte": 1e9 * seconds / sum(map(len, images)),
    }


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    runs: dict[float, list[EndToEnd]] = {share: [] for share in SHARES}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        manifests = {share: make_manifest(work, options.rows, options.side, share) for share in SHARES}
        folder = options.radiographs or work / f"images-{options.side}"
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "damaged" not in path.name]
        images = [data for path in files if (data := path.read_bytes()).startswith(b"\xff\xd8")]
        shares, scanned = caught_share(images, COPIES)
        cost = scan(images)
        for _ in range(options.rounds):
            for share in random.sample(SHARES, len(SHARES)):
                manifest, bad = manifests[share]
                runs[share].append(run_engine(manifest, options.bundle, work, errors_expected=bad))
    figures = {}
    table = Table("damaged", "rows/s", "relative to no damage", "core-ms per row", box=None, pad_edge=False)
    for share, share_runs in runs.items():
        ratios = [run.rate / clean.rate for run, clean in zip(share_runs, runs[0.0], strict=True)]
        figures[f"{share:g}"] = {
            "rows_per_s": statistics.median(run.rate for run in share_runs),
            "of_clean": {"median": statistics.median(ratios), "rounds": ratios},
            "core_ms_per_row": 1000 * statistics.median(run.core_s_per_image for run in share_runs),
        }
        row = figures[f"{share:g}"]
        cells = f"{row['rows_per_s']:.2f}", f"{row['of_clean']['median']:.3f}"
        table.add_row(f"{share:.0%}", *cells, f"{row['core_ms_per_row']:.1f}")
    console.print(table)
    for name, share in shares.items():
        console.print(
            f"{name}: {share:.0%} of {COPIES} damaged copies detected, on a GPU at least {scanned[name]:.1%}",
            highlight=False,
        )
    console.print(f"limit at 1 % damage: {LIMIT} of the rate without damage", highlight=False)
    target = options.output / "damage-cpu.json"
    command = f"damage --rows {options.rows} --rounds {options.rounds} --side {options.side}"
    work_done = {"rows": options.rows, "image": f"{options.side} x {options.side} gray JPEG, quality 90"}
    record.write_record(
        target,
        command,
        {
            "work": work_done,
            "damaged_share": figures,
            "limit": LIMIT,
            "caught": {"of": "radiographs" if options.radiographs else "synthetic", "copies": COPIES}
            | shares,
            "caught_on_a_gpu_at_least": scanned,
            "scan": cost,
        },
        before=before,
    )
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
