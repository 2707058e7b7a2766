"""`--device cuda:all` becomes a local Ray; the CPU stands in for the GPUs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from engine.core import hardware
from engine.core.errors import UsageError
from engine.core.settings import Settings
from engine.executors.launch import resolve_all_gpus
from tests.helpers.processes import Command, starting
from tests.helpers.runs import (
    SHARDED_PART_ROWS,
    SHARDED_ROWS,
    ended,
    list_images,
    only_results_are_left,
    table,
)

SCRIPT = """
import sys
from engine.core import hardware
from engine.run import main
hardware.count_gpus = lambda: 2
sys.exit(main())
"""


def test_all_gpus_are_one_run_on_a_local_ray(tmp_path: Path, bundle: Path, whole: pa.Table) -> None:
    list_images(tmp_path, SHARDED_ROWS)
    (tmp_path / "two.py").write_text(SCRIPT)
    arguments = ["two.py", "m.txt", "-b", bundle, "-o", "out", "--part-rows", SHARDED_PART_ROWS]
    with starting(tmp_path) as start:
        log = ended(start(*map(str, arguments), "--device", "cuda:all", "--log-json"))
    output = tmp_path / "out"
    assert table(output).equals(whole)
    (output / "_actors.json").unlink()
    assert only_results_are_left(output)
    (summary,) = (event for event in map(json.loads, log.splitlines()) if event["event"] == "summary")
    assert summary["last_start"]["rows"] == SHARDED_ROWS
    assert summary["last_start"]["actors"]["started"] >= 1


def test_workers_and_memory_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(manifest=Path("m.csv"), device="cuda:all", workers=10, memory=4 << 30)
    monkeypatch.setattr(hardware, "count_gpus", lambda: 4)
    expected = replace(settings, device="auto", ray="local", workers=2, memory=1 << 30)
    assert resolve_all_gpus(settings) == expected
    assert resolve_all_gpus(replace(settings, workers=None)).workers is None
    assert resolve_all_gpus(replace(settings, device="cpu")).ray is None
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"need Ray.*pip install.*CUDA_VISIBLE_DEVICES=0 .* --shard 1/4"):
        resolve_all_gpus(settings)


def test_wrong_use_is_one_line(engine_run: Command, bundle: Path) -> None:
    for options, complaint in (
        (
            ["--device", "cuda:all", "--shard", "1/2"],
            "--device cuda:all with --shard: give each GPU its own shard",
        ),
        (["--device", "cuda:all", "--ray"], "each actor on Ray has a GPU of its own"),
        (["--device", "cuda:all"], "GPU"),
    ):
        run = engine_run("m.csv", "-b", bundle, *options)
        assert (run.returncode, run.stderr.count("\n"), complaint in run.stderr) == (2, 1, True), run.stderr
