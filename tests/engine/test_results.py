"""Reading results: provenance, unfinished runs, the documented ways."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest

import engine
from engine.core.errors import UsageError
from engine.merge import merge
from tests.helpers.images import image_names
from tests.helpers.processes import ROOT
from tests.helpers.runs import Screen


def test_results_come_with_their_provenance(screened: Screen) -> None:
    output = screened("monday", [*image_names(7), "gone.png"], columns={"patient": list("abcdefgh")})
    frame = engine.read_results(output)
    assert frame.row.tolist() == list(range(8))
    assert frame.patient.tolist() == list("abcdefgh")
    assert frame.status.tolist() == ["ok"] * 7 + ["missing"]
    assert frame.confidence.isna().sum() == 1
    run = json.loads((output / "_run.json").read_text())
    assert frame.attrs["provenance"] == run
    assert frame[frame.status == "ok"].attrs["provenance"]["weights"] == {"member0": 0.6, "member1": 0.4}
    assert engine.read_results(str(output), columns=["path", "confidence"]).columns.tolist() == [
        "path",
        "confidence",
    ]
    dataset = engine.open_results(output)
    assert json.loads(dataset.schema.metadata[b"engine"]) == run
    assert dataset.count_rows(filter=pc.field("status") == "ok") == 7
    with pytest.raises(UsageError, match="no column 'confidense'; it has row, path"):
        engine.read_results(output, columns=["confidense"])


def test_an_unfinished_run_is_refused_unless_asked_for(screened: Screen, tmp_path: Path) -> None:
    output = screened("monday", image_names(8))
    (output / "part-00001.parquet").unlink()
    (output / "_SUCCESS").unlink()
    with pytest.raises(UsageError, match="not finished, 5 of 8 rows"):
        engine.read_results(output)
    assert engine.read_results(output, unfinished=True).row.tolist() == [0, 1, 2, 6, 7]
    with pytest.raises(UsageError, match="not finished"):
        merge([output], tmp_path / "merged")
    with pytest.raises(UsageError, match=r"no _run\.json there"):
        engine.read_results(tmp_path)
    run = json.loads((output / "_run.json").read_text())
    for changed in (
        {"classes": []},
        {"started": "soon"},
        {"weights": ["member0"]},
        {"run_id": 5},
        {"new": 1},
    ):
        (output / "_run.json").write_text(json.dumps(run | changed))
        with pytest.raises(UsageError, match=rf"_run\.json can't be read: {next(iter(changed))}"):
            engine.read_results(output, unfinished=True)


def test_what_the_page_shows(
    archive: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert {"engine", "pandas", "duckdb"} <= set(re.findall(r"^import (\w+)", code, re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(bundle)
    paths = [str(archive / name) for name in [*image_names(5), "gone.png"]]
    pd.DataFrame({"path": paths, "patient": list("abcdef")}).to_csv("manifest.csv", index=False)
    result: dict[str, Any] = {}
    exec(code.replace("joined = duckdb", "by_path = duckdb"), result)
    assert "osteo" in capsys.readouterr().out
    assert result["summary"].rows == len(result["worst"]) == 6
    joined, by_path = result["joined"], result["by_path"].sort_values("patient", ignore_index=True)
    assert joined.patient.tolist() == by_path.patient.tolist() == list("abcdef")
    scores = result["rows"].p_osteoporosis.to_numpy()
    for frame in (joined, by_path):
        assert np.array_equal(frame.p_osteoporosis.to_numpy(np.float32), scores, equal_nan=True)
