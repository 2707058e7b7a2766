"""Helpers of runs: lists of images, processes that screen them, their rows."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

import engine
from tests.helpers.images import image_names, write_images

Screen = Callable[..., Path]
SHARDED_ROWS, SHARDED_PART_ROWS = 2000, 16  # of the fixture `whole`


def list_images(folder: Path, rows: int, *, name: str = "m.txt") -> Path:
    """Write a text list of `rows` rows over eight images, a missing one and a damaged one."""
    if not (folder / "images").exists():
        write_images(folder / "images", 8)
    good = (folder / "images" / "image-01.jpg").read_bytes()
    (folder / "images" / "bad.jpg").write_bytes(good[: len(good) * 3 // 4] + b"\xff\xd9")
    names = [*image_names(8), "nowhere", "bad.jpg"]
    rng = random.Random(1)
    lines = [f"images/{rng.choice(names)}" for _ in range(rows)]
    (folder / name).write_text("\n".join(lines))
    return folder / name


def screen_columns(
    archive: Path, output: Path, columns: Mapping[str, Any], bundle: Path, **options: Any
) -> Path:
    """Screen a manifest with these columns in the folder `archive`; return `output`."""
    manifest = archive / f"{output.name}.csv"
    pd.DataFrame(columns).to_csv(manifest, index=False)
    engine.screen(manifest, output=output, bundle=bundle, **options)
    return output


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def wait_for_parts(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(parts(folder)) < count and process.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)


def table(folder: Path) -> pa.Table:
    return ds.dataset(parts(folder)).to_table().replace_schema_metadata(None)


def only_results_are_left(folder: Path) -> bool:
    allowed = {"_run.json", "_SUCCESS", "_manifest.parquet", "report.html", ".lock"}
    return not {path.name for path in folder.iterdir()} - allowed - {path.name for path in parts(folder)}


def only_one_run_is_left(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()} - {path.name for path in parts(folder)}
    return names == {"_run.json", "_SUCCESS", "report.html", ".lock", ".locks"}


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for the end of the process; return its standard error."""
    _, log = process.communicate(timeout=120)
    assert process.returncode == status, log
    assert "Traceback" not in log
    return log


def read_frame(output: Path) -> pd.DataFrame:
    return pd.concat(pd.read_parquet(path) for path in sorted(output.glob("part-*.parquet")))


def csv(paths: list[str]) -> bytes:
    return "\n".join(["path", *paths]).encode() + b"\n"


def rows(parts: Sequence[Any]) -> pa.Table:
    """Return the rows without the columns that differ by design: paths and columns of a listing."""
    table = pa.concat_tables([pq.read_table(part) for part in parts]).replace_schema_metadata(None)
    return table.select(
        [name for name in table.column_names if name not in ("path", "file_size", "file_mtime")]
    )


def local_rows(folder: Path) -> pa.Table:
    return rows(parts(folder))


def keys(client: Any, prefix: str) -> list[str]:
    result = client.list_objects_v2(Bucket="archive", Prefix=prefix).get("Contents", [])
    return [entry["Key"].removeprefix(prefix) for entry in result if entry["Key"] != prefix]


def stored_rows(client: Any, prefix: str) -> pa.Table:
    names = [key for key in keys(client, prefix) if key.startswith("part-")]
    bodies = [client.get_object(Bucket="archive", Key=prefix + key)["Body"].read() for key in names]
    return rows([pa.BufferReader(body) for body in bodies])


def many_rows(results: Path, rows: int, parts: int) -> int:
    """Repeat the row of `results` with different paths; return the bytes of a part in Arrow."""
    run = json.loads((results / "_run.json").read_text()) | {"rows": rows * parts}
    run["result_options"]["part_rows"] = rows
    (results / "_run.json").write_text(json.dumps(run))
    table = pq.read_table(results / "part-00000.parquet").take(np.zeros(rows, np.int64))
    for index in range(parts):
        numbers = np.arange(index * rows, (index + 1) * rows)
        table = table.set_column(0, "row", pa.array(numbers))
        table = table.set_column(1, "path", pa.array([f"{row}.png" for row in numbers]))
        facts = {"part": index, "by_status": {"ok": rows}, "by_class": {table["prediction"][0].as_py(): rows}}
        metadata = {b"engine": json.dumps(run).encode(), b"part": json.dumps(facts).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), results / f"part-{index:05}.parquet")
    return table.nbytes
