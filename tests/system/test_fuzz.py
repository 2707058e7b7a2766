"""The fuzzer over a few hundred files, and proof that it complains when it should."""

from __future__ import annotations

import copy
import io
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.processes import process_tree
from tests.fuzz.__main__ import Outcome, check_rows, check_run, compare, figures, fuzz, write_files
from tests.fuzz.samples import samples
from tests.fuzz.watched import Row, screen

MEMORY_MB = 1000  # of all processes together
SEEDS = (1, pytest.param(2, marks=pytest.mark.slow))
FILES = 400


@pytest.fixture(scope="module", params=SEEDS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("fuzz")
    return fuzz(folder, count=FILES, seed=request.param, memory_mb=MEMORY_MB, timeout_s=60)


def test_damaged_files_cost_only_their_own_rows(outcome: Outcome) -> None:
    assert [f"{each.path}: {each.text}" for each in outcome.problems] == []
    statuses = figures(outcome, {})["mutated_by_format_and_status"]
    assert {"ok", "truncated", "corrupt"} <= set(statuses["jpeg"]) & set(statuses["png"])
    for name, row in outcome.reference.items():
        assert row["status"] == "ok" or not name.startswith(("jpeg-", "png-")), name


def test_pillow_opens_every_base_file() -> None:
    for name, data in samples(0).items():
        if not name.startswith("dicom"):
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    hashes = []
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        (tmp_path / name).mkdir()
        _, sha256 = write_files(tmp_path / name, samples(0), 60, seed)
        hashes.append(sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def complaints(outcome: Outcome, tamper: Callable[[list[Row]], object]) -> set[tuple[str | None, str]]:
    """What the checks say of the rows after `tamper`, beyond what they say of the rows as they are."""
    rows = copy.deepcopy(outcome.runs[0].rows)
    tamper(rows)
    result = [*check_rows(rows, outcome.files, outcome.reference, Path("/secret"))]
    result += compare(outcome.runs[0].rows, rows, "a second time")
    before = check_rows(outcome.runs[0].rows, outcome.files, outcome.reference, Path("/secret"))
    return {(each.path, each.text) for each in result} - {(each.path, each.text) for each in before}


def swap_scores(rows: list[Row], one: int, two: int) -> None:
    names = [name for name in rows[one] if name in ("prediction", "confidence") or "p_" in name]
    for name in names:
        rows[one][name], rows[two][name] = rows[two][name], rows[one][name]


def test_swapped_rows_are_reported(outcome: Outcome) -> None:
    good = [
        index
        for index, (file, row) in enumerate(zip(outcome.files, outcome.runs[0].rows, strict=True))
        if not file.steps and row["status"] == "ok"
    ]
    one, two = (
        good[0],
        next(index for index in good if outcome.files[index].base != outcome.files[good[0]].base),
    )
    noticed = complaints(outcome, lambda rows: swap_scores(rows, one, two))
    alone = {path for path, text in noticed if "of a good file is" in text}
    assert alone == {outcome.files[one].path, outcome.files[two].path}


@pytest.mark.parametrize(
    ("status", "change", "complaint"),
    [
        ("ok", {"status": "corrupt"}, "status 'corrupt' with the scores"),
        ("ok", {"status": "fine"}, "status 'fine' of a file"),
        ("ok", {"status": "missing"}, "status 'missing' of a file"),
        ("ok", {"p_normal": None}, "status 'ok' with the scores"),
        ("ok", {"member1_p_normal": float("nan")}, "scores that are no probabilities"),
        ("ok", {"error": "no error"}, "with the error"),
        ("corrupt", {"error": None}, "with the error None"),
        ("corrupt", {"error": "one\ntwo"}, "not one printable line"),
        ("corrupt", {"error": " "}, "not one printable line"),
        ("corrupt", {"error": "can't read /secret/files/x"}, "names the folder"),
        ("corrupt", {"error": "another text"}, "it differs a second time in 1 columns: error"),
        ("corrupt", {"confidence": 0.0}, "status 'corrupt' with the scores"),
        ("corrupt", {"status": "crashed"}, "a decoder crashed"),
        ("corrupt", {"row": 7000}, "has the number 7000"),
        ("truncated", {"status": "empty"}, "status 'empty' of a file"),
    ],
)
def test_a_wrong_row_is_reported(outcome: Outcome, status: str, change: Row, complaint: str) -> None:
    index = next(index for index, row in enumerate(outcome.runs[0].rows) if row["status"] == status)
    noticed = complaints(outcome, lambda rows: rows[index].update(change))
    assert any(path == outcome.files[index].path and complaint in text for path, text in noticed), noticed


def test_lost_and_surplus_rows_are_reported(outcome: Outcome) -> None:
    path = outcome.files[5].path
    assert (path, "no row") in complaints(outcome, lambda rows: rows.pop(5))
    assert (path, "a row too many") in complaints(outcome, lambda rows: rows.insert(5, rows[5]))
    noticed = complaints(outcome, lambda rows: rows.insert(5, rows.pop(6)))
    assert (None, f"{FILES} rows for {FILES} files, or in another order") in noticed


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"exit_status": None}, "time limit"),
        ({"exit_status": -11, "complaint": "Segmentation fault"}, "exit status -11: Segmentation fault"),
        ({"left": {"_run.json", ".lock"}}, "no _SUCCESS"),
        ({"left": {"_SUCCESS", ".part-00000.parquet.tmp"}}, "left in the output folder: .part-00000"),
        ({"memory_mb": [10.0, MEMORY_MB + 1, 10.0]}, "MB at the peak"),
        ({"orphans": 2}, "2 processes outlived"),
        ({"restarts": 1}, "crashed 1 times"),
    ],
)
def test_a_failed_run_is_reported(outcome: Outcome, change: dict[str, object], complaint: str) -> None:
    (problem,) = check_run(replace(outcome.runs[0], **change), memory_mb=MEMORY_MB)
    assert complaint in problem.text


def test_a_run_over_the_time_limit_is_killed(bundle: Path, tmp_path: Path) -> None:
    run = screen(tmp_path, "late", ["nowhere.png"], bundle, 0.2)
    assert run.exit_status is None
    assert run.elapsed_s < 5


def test_memory_counts_all_descendants() -> None:
    command = ["sh", "-c", "sleep 60 & setsid sleep 60 & wait"]
    with subprocess.Popen(command, start_new_session=True) as shell:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            result = process_tree(shell.pid)
            if len(result) == 3 and all(process.resident_bytes for process in result.values()):
                break  # all are there, and none is just starting
            time.sleep(0.01)
        for process in result:
            subprocess.run(["kill", str(process)], check=True)
    assert len(result) == 3
    assert all(process.resident_bytes > 0 for process in result.values())
