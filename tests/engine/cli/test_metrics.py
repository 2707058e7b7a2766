"""What machines see of a run: Prometheus text and JSON lines, with no path in either under --redact."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from engine.core.errors import Stopped, UsageError
from engine.core.overlap import Meter
from engine.core.records import Status
from engine.monitoring.metrics import MetricsFile
from engine.runs.progress import Progress
from tests.helpers.processes import Command

OPERATING = ("--metrics-file", "nightly.prom", "--log-json")


def families(file: Path) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(file.read_text())}


def value(found: dict[str, Metric], name: str) -> float:
    (sample,) = found[f"screening_{name}"].samples
    return sample.value


def by_label(found: dict[str, Metric], name: str, label: str) -> dict[str, float]:
    return {sample.labels[label]: sample.value for sample in found[f"screening_{name}"].samples}


def lines(stderr: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in stderr.splitlines()]


def test_metrics_and_json_lines_of_a_run(
    engine_run: Command, archive: Path, bundle: Path, tmp_path: Path
) -> None:
    (archive / "bad.jpg").write_bytes((archive / "image-01.jpg").read_bytes()[:-400])
    done = engine_run(archive, "-b", bundle, "-o", "out", *OPERATING)
    assert done.returncode == 0, done.stderr
    result = families(tmp_path / "nightly.prom")
    counts = by_label(result, "processed_rows", "status")
    assert set(counts) == {status.label for status in Status}
    assert {status: count for status, count in counts.items() if count} == {"ok": 40, "truncated": 1}
    assert result["screening_processed_rows"].type == "counter"
    assert all(family.documentation for family in result.values())
    assert value(result, "rows") == 41
    assert (value(result, "running"), value(result, "exit_status")) == (0, 0)
    occupancy = by_label(result, "stage_occupancy_ratio", "stage")
    assert set(occupancy) == {"read", "preprocess", "members", "write"}
    assert 0 < max(occupancy.values()) <= 1
    assert value(result, "rows_per_second") > 0
    assert value(result, "remaining_seconds") == 0
    assert {sample.labels["run"] for family in result.values() for sample in family.samples} == {"nightly"}

    events = lines(done.stderr)
    assert [event["event"] for event in events if event["event"] != "message"][-2:] == ["progress", "summary"]
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["rows"], last["rows_done"]) == (41, 41)
    assert last["by_status"] == {"ok": 40, "truncated": 1}
    (summary,) = (event for event in events if event["event"] == "summary")
    assert summary["by_status"] == {"ok": 40, "truncated": 1}

    # they may change on resume, and with --only-errors
    again = engine_run(archive, "-b", bundle, "-o", "out", "--metrics-file", "other.prom")
    assert (again.returncode, "finished already" in again.stderr) == (0, True)
    retried = engine_run("--only-errors", "out", "--max-error-rate", "0", *OPERATING)
    assert retried.returncode == 3
    assert lines(retried.stderr)[-1]["level"] == "error"
    assert value(families(tmp_path / "nightly.prom"), "exit_status") == 3


def test_no_path_with_redact(
    engine_run: Command, archive: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_SALT", "a salt of sixteen bytes and more")
    manifest = archive / "DOE^JANE.csv"
    manifest.write_text("path\nimage-00.png\nDOE-gone.png\n")
    done = engine_run(manifest, "-b", bundle, "-o", "out", "--redact", *OPERATING)
    assert done.returncode == 0, done.stderr
    failed = engine_run(archive / "DOE-none.csv", "-b", bundle, "-o", "out", "--redact", *OPERATING)
    assert failed.returncode == 2
    written = done.stderr + failed.stderr + (tmp_path / "nightly.prom").read_text()
    for word in ("DOE", "image-0", str(archive)):
        assert word not in written
    assert lines(failed.stderr)[-1]["message"] == "manifest MANIFEST: no such file or folder"


def test_while_it_runs_and_when_it_stops(tmp_path: Path) -> None:
    file = tmp_path / 'a "night".prom'
    progress = Progress(100, rows_before=20)
    progress.by_status.update(ok=20)
    with suppress(Stopped), MetricsFile(file) as metrics:
        result = families(file)
        assert value(result, "running") == 1
        assert "screening_rows" not in result
        metrics(progress)
        metrics._write()
        result = families(file)
        assert "screening_remaining_seconds" not in result  # there is no rate yet
        progress.rows_done, progress.started = 40, progress.started - 10
        progress.meters = {"read": Meter("read", 2, busy_s=5)}
        metrics._write()
        result = families(file)
        assert math.isclose(value(result, "remaining_seconds"), 10, rel_tol=0.05)
        assert math.isclose(value(result, "rows_per_second"), 4, rel_tol=0.05)
        assert math.isclose(by_label(result, "stage_occupancy_ratio", "stage")["read"], 0.25, rel_tol=0.05)
        assert result["screening_running"].samples[0].labels["run"] == 'a "night"'
        raise Stopped("enough")
    result = families(file)
    assert (value(result, "running"), value(result, "exit_status")) == (0, 5)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere/a.prom", "No such file"), ("a.txt", r"ends in \.prom"), (".prom", "prom")]
)
def test_a_file_that_can_not_be_written(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words), MetricsFile(tmp_path / name):
        pass
