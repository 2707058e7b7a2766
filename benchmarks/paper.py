"""`python -m benchmarks paper`: 64 GPUs and 50 million images, worked out from what is measured here.

Measured: reading a manifest, a part as a message, Ray's calls, a part's file and footer, what the driver
holds of it. Assumed: the constants below, which are the cluster's and an object store's. The figures go into
docs/scaling-out.md.
"""

from __future__ import annotations

import json
import pickle
import resource
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks import record
from benchmarks.throughput import DISTINCT, make_archive
from engine.canaries import SHARE
from engine.manifest import Manifest, open_manifest
from engine.ray.actor import Pulse
from engine.ray.cluster import Post, joined
from engine.ray.crew import Hand, Slot
from engine.ray.driver import IN_STAGES, soonest
from engine.records import Part, Scorer
from engine.settings import CPU_PART_ROWS, GPU_BATCH, GPU_PART_ROWS, Settings
from engine.sink import FOOTERS_AT_ONCE, METADATA, Done, finished
from engine.store import LocalFolder

DOCUMENT = record.ROOT / "docs" / "scaling-out.md"
BEGIN, END = "<!-- worked out: python -m benchmarks paper -->", "<!-- end of worked out -->"
GPUS, NODES, IMAGES = 64, 8, 50_000_000
RATES = (1000, 7000)  # images/s a GPU: a modest one, and the aim on an H100 (not measured yet)
STORE_GETS, STORE_PUTS = 5500, 3500  # requests/s that S3 promises for one prefix, reads and writes
NODE_BITS = 100e9  # of a node's network, per second
LATENCY_S = 0.03  # of a request to an object store
# requests, counted against an S3 emulator: an image, a part written, a footer read, names of a listing's page
IMAGE_GETS, PART_WRITES, FOOTER_GETS, PAGE = 2, 4, 2, 1000
CALLS = 400
CANARIES = 32
Json = dict[str, Any]


class Echo:
    """An actor that only answers."""

    def take(self, part: Part) -> Done:
        by = Scorer(host="node", device="cuda:0", gpu="H100", actor="0123456789ab", round=7)
        return Done(part.index, 0, part.rows, {"ok": part.rows}, {"normal": part.rows}, by, datetime.now(UTC))

    def pulse(self) -> dict[str, Any]:
        return {"underway": {7: {"ok": 1000}, 8: {"ok": 10}}, "meters": {"read": (1, 2.0, 3.0, 4.0)}}


def write_manifest(path: Path, rows: int) -> None:
    row = np.arange(rows)
    paths = [f"site-{one % 31:02}/{2001 + one % 20}/{one:010}/IMG-{one % 4:04}.dcm" for one in row.tolist()]
    table = pa.table({"path": paths, "study": row, "age": (row % 70 + 20).astype(np.int16)})
    pq.write_table(table, path, compression="zstd")


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def of_manifest(folder: Path, rows: int) -> tuple[Manifest, Json]:
    path = folder / "manifest.parquet"
    write_manifest(path, rows)
    opening_s = seconds(lambda: open_manifest(path))
    manifest = open_manifest(path)
    found: Json = {"bytes_a_row": path.stat().st_size / rows, "opening_us_a_row": 1e6 * opening_s / rows}
    for size in (CPU_PART_ROWS, GPU_PART_ROWS):
        took = seconds(lambda size=size: [None for _ in manifest.parts(size)])
        found[f"parts_of_{size}_us_a_row"] = 1e6 * took / rows
    part = next(manifest.parts(GPU_PART_ROWS))
    found["message_bytes_a_row"] = len(pickle.dumps(part, 5)) / part.rows
    return manifest, found


def of_calls(manifest: Manifest) -> Json:
    """Processor time of the driver's process for a part, and for a pulse."""
    found = {}
    with joined(Settings(manifest=Path(), ray="local", actors=1, workers=1)) as cluster:
        ray = cluster.ray
        echo = ray.remote(Echo).options(num_cpus=1).remote()
        ray.get(echo.pulse.remote())
        for size in (CPU_PART_ROWS, GPU_PART_ROWS):
            part = next(manifest.parts(size))
            calls = CALLS if size == CPU_PART_ROWS else CALLS // 20
            found[f"part_of_{size}_core_ms"] = 1000 * core_s(ray, partial(echo.take.remote, part), calls)
        found["choice_core_ms"] = of_choices()
        found["pulse_core_ms"] = 1000 * core_s(ray, echo.pulse.remote, CALLS)
    return found


def of_choices() -> float:
    """Milliseconds to choose one of all actors for a part."""
    hands = []
    for number in range(GPUS):
        hand = Hand(f"{number}", Slot(Post(True, 8)), None, began=time.monotonic() - 100 - number)
        hand.parts, hand.rows_done = {number: CPU_PART_ROWS, GPUS + number: CPU_PART_ROWS}, 1000 * number + 1
        hand.pulse = Pulse(3, 0.0, {number: {"ok": 512}}, {}, 0, 0)
        hands.append(hand)
    rounds = [seconds(lambda: soonest(hands[:4], hands, CPU_PART_ROWS, IMAGES)) for _ in range(CALLS)]
    return 1000 * statistics.median(rounds)


def core_s(ray: Any, ask: Callable[[], Any], times: int) -> float:
    """Of this process, for a call and its answer."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    before = used.ru_utime + used.ru_stime
    for _ in range(times):
        ray.get(ask())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime - before) / times


def of_parts(folder: Path) -> Json:
    """A part's file, and what the driver holds of one that is done."""
    rng, names = np.random.default_rng(0), [f"p_{number}" for number in range(9)]
    found: Json = {}
    for rows in (CPU_PART_ROWS, GPU_PART_ROWS):
        row, path = np.arange(rows), [f"site-01/2019/{one:010}/IMG-0001.dcm" for one in range(rows)]
        scores = {name: rng.random(rows).astype(np.float32) for name in names}
        table = pa.table({"row": row, "path": path, "prediction": ["normal"] * rows} | scores)
        facts = {"part": 0, "by_status": {"ok": rows}, "by_class": {"normal": rows}, "by": {"host": "node"}}
        table = table.replace_schema_metadata(
            {METADATA: json.dumps({"run_id": "x", "filler": "." * 2000}), b"part": json.dumps(facts)}
        )
        place = LocalFolder(folder / str(rows))
        place.location.mkdir()
        place.write("part-00000.parquet", partial(pq.write_table, table, compression="zstd"))
        size = (place.location / "part-00000.parquet").stat().st_size
        found[f"file_bytes_a_row_{rows}"] = size / rows
        found[f"footer_ms_{rows}"] = 1000 * statistics.median(
            seconds(partial(finished, place, "x")) for _ in range(20)
        )
    done = pickle.dumps(Echo().take(Part(0, np.arange(1), ["a"], pa.table({}))))
    tracemalloc.start()
    held = [pickle.loads(done) for _ in range(10_000)]
    found["done_bytes"] = tracemalloc.get_traced_memory()[0] / len(held)
    tracemalloc.stop()
    return found


def of_images(folder: Path) -> Json:
    make_archive(folder, DISTINCT, 1024)
    sizes = [path.stat().st_size for path in (folder / "images-1024").iterdir()]
    return {"image_bytes": statistics.fmean(sizes)}


def worked_out(found: Json, part_rows: int, rate: int) -> Json:
    """All that follows for one size of parts and one rate of a GPU; times in seconds."""
    total = GPUS * rate
    parts = -(-IMAGES // part_rows)
    rounds = -(-parts // GPUS)
    held = max(2, 2 + IN_STAGES * GPU_BATCH // part_rows)  # parts an actor has, see driver._has_room
    driver_ms = (
        found[f"part_of_{part_rows}_core_ms"]
        + found[f"parts_of_{part_rows}_us_a_row"] * part_rows / 1000
        + found["choice_core_ms"]
    )
    pages, footer_s = -(-parts // PAGE), FOOTER_GETS * LATENCY_S + found[f"footer_ms_{part_rows}"] / 1000
    return {
        "images_per_s": total,
        "run_s": IMAGES / total,
        "parts": parts,
        "tail_s": rounds * part_rows / rate - IMAGES / total,
        "parts_per_s": total / part_rows,
        "driver_cores": total / part_rows * driver_ms / 1000 + GPUS * found["pulse_core_ms"] / 1000,
        "driver_limit_images_per_s": 1000 / driver_ms * part_rows,
        "manifest_read_s": IMAGES * found["opening_us_a_row"] / 1e6,
        "store_mb": GPUS * held * part_rows * found["message_bytes_a_row"] / 1e6,
        "messages_mb_per_s": total * found["message_bytes_a_row"] / 1e6,
        "done_mb": parts * found["done_bytes"] / 1e6,
        "results_gb": IMAGES * found[f"file_bytes_a_row_{part_rows}"] / 1e9,
        "writes_per_s": PART_WRITES * total / part_rows,
        "listing_s": pages * LATENCY_S,
        "footers_s": parts * footer_s / FOOTERS_AT_ONCE,
        "image_requests_per_s": IMAGE_GETS * total,
        "prefixes": IMAGE_GETS * total / STORE_GETS,
        "gbit_per_s_a_node": 8 * total * found["image_bytes"] / NODES / 1e9,
        "lost_by_a_kill": held * part_rows + max(int(CANARIES / SHARE), part_rows),
    }


_LINES: tuple[tuple[str, Callable[[Json], str]], ...] = (
    ("images/s of all GPUs", lambda one: f"{one['images_per_s']:,}"),
    ("the run", lambda one: span(one["run_s"])),
    ("parts", lambda one: f"{one['parts']:,}"),
    ("longer than that since parts are whole", lambda one: span(one["tail_s"])),
    ("parts given out a second", lambda one: f"{one['parts_per_s']:.1f}"),
    ("cores that the driver needs", lambda one: f"{one['driver_cores']:.2f}"),
    ("images/s at which its one thread is full", lambda one: f"{one['driver_limit_images_per_s']:,.0f}"),
    ("reading the manifest before the first part", lambda one: span(one["manifest_read_s"])),
    ("paths in Ray's object store at once", lambda one: f"{one['store_mb']:,.0f} MB"),
    ("paths through the driver's network", lambda one: f"{one['messages_mb_per_s']:,.1f} MB/s"),
    ("what the driver holds of parts that are done", lambda one: f"{one['done_mb']:,.1f} MB"),
    ("results", lambda one: f"{one['results_gb']:.1f} GB"),
    ("requests/s to write parts", lambda one: f"{one['writes_per_s']:,.0f}"),
    ("listing the parts at the end (and at each start)", lambda one: span(one["listing_s"])),
    ("reading their footers, 16 at once", lambda one: span(one["footers_s"])),
    ("requests/s for images in an object store", lambda one: f"{one['image_requests_per_s']:,}"),
    ("that many times what S3 promises a prefix", lambda one: f"{one['prefixes']:,.0f}"),
    ("Gbit/s of images into each node", lambda one: f"{one['gbit_per_s_a_node']:,.0f}"),
    ("rows done again after an actor is killed, at most", lambda one: f"{one['lost_by_a_kill']:,}"),
)


def span(value: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if value >= 2 * length:
            return f"{value / length:.1f} {unit}"
    return f"{value:.1f} s"


def cases(found: Json) -> dict[str, Json]:
    return {
        f"{rate:,}/s a GPU, parts of {rows:,}": worked_out(found, rows, rate)
        for rate in RATES
        for rows in (GPU_PART_ROWS, CPU_PART_ROWS)
    }


def table(found: Json) -> str:
    """For docs/scaling-out.md."""
    lines = list(_table(cases(found)))
    measured = ", ".join(f"`{name}` {value:.3g}" for name, value in found.items())
    return "\n".join([*lines, "", f"Measured: {measured}."])


def with_table(text: str, table: str) -> str:
    """The document with `table` between its two marks."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def _table(columns: dict[str, Json]) -> Iterator[str]:
    yield f"| {GPUS} GPUs, {IMAGES:,} images | {' | '.join(columns)} |"
    yield "| --- |" + " ---: |" * len(columns)
    for name, told in _LINES:
        yield f"| {name} | {' | '.join(told(one) for one in columns.values())} |"


def main(console: Console, options: Any) -> None:
    before = record.machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifest, found = of_manifest(folder, options.rows)
        found |= of_calls(manifest) | of_parts(folder) | of_images(folder)
    target = options.output / "paper.json"
    record.write(
        target, f"paper --rows {options.rows}", {"measured": found, "cases": cases(found)}, before=before
    )
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(), table(found)))
    console.print(f"written: {target}, {DOCUMENT}", markup=False, highlight=False, soft_wrap=True)
