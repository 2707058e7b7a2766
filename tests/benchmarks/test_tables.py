"""README's measured table equals the table of the committed JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.record import ROOT
from engine.core.errors import UsageError

RESULTS = ROOT / "benchmarks" / "results"


def test_readme_has_the_figures_of_the_json_files() -> None:
    readme = (ROOT / "README.md").read_text()
    expected = tables.insert_table(readme, tables.format_tables(tables.load_results(RESULTS)))
    assert expected == readme, "run: python -m benchmarks tables"


def test_rows_of_scaling_out() -> None:
    figures = {
        "work": {"rows": 2048, "null_rows": 400_000},
        "overhead": {"median": 0.021, "interval": [0.012, 0.03], "limit": 0.05},
        "null_rows_per_s": {"one process": {"median": 24_000.4}, "2 actors": {"median": 36_000}},
        "recovery": {"seconds": {"median": 4.21}, "rows_again": {"median": 512}},
    }
    assert list(tables.scaling_out_rows(figures)) == [
        (
            "`scaling-out`: what `--ray` takes from the rate of one process (2048 rows)",
            "2.1 %, 95 % 1.2 to 3.0",
            "5 %",
        ),
        ("rows/s with null stages (400,000 rows)", "one process: 24,000, 2 actors: 36,000", ""),
        ("an actor is killed: until another is at work (and rows scored again)", "4.2 s (512)", ""),
    ]


def test_figures_come_from_the_json(tmp_path: Path) -> None:
    figures = json.loads((RESULTS / "memory-cpu.json").read_text())
    figures["growth_mb"], figures["machine"]["processor"] = 71.4, "Another"
    (tmp_path / "memory-cpu.json").write_text(json.dumps(figures))
    table = tables.format_tables(tables.load_results(tmp_path))
    assert table.startswith("On 2 cores (Another), no GPU")
    assert table.endswith(
        "| `memory`: peak of 2,000,000 rows beyond that of 20,000 (null stages) | 71 MB | 100 MB |"
    )


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(UsageError, match="between the lines"):
        tables.insert_table("# A project\n", "| a |")


PEER = {
    "title": "A peer",
    "precision": "fp32",
    "not_counted": None,
    "images_per_s": {"median": 10.0, "quartiles": [9.0, 11.0], "rounds": [9.0, 10.0, 11.0]},
    "engine_beside_it": {"median": 2.0, "interval": [1.8, 2.2], "rounds": [2.0], "aim": 1.5},
}


def test_rows_of_peers_that_count_and_that_do_not(tmp_path: Path) -> None:
    figures = {
        "machine": {"cores": 2, "processor": "X"},
        "work": {"archive": "mixed", "rows": 224, "rounds": 3},
        "contenders": {
            "engine": {**PEER, "title": "this engine"},
            "a": PEER,
            "b": {"title": "Another", "precision": "fp32", "not_counted": "9 rows are missing"},
        },
        "left_out": {},
    }
    rows = list(tables.peers_rows(figures))
    assert ("its rate beside A peer", "2.00 x, 95 % 1.80 to 2.20 (10.0 images/s)", "1.5") in rows
    assert ("its rate beside Another", "not counted: 9 rows are missing", "") in rows
    tables.plot_peers(figures, tmp_path / "peers.svg")
    assert "<svg" in (tmp_path / "peers.svg").read_text()
