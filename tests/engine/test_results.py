"""Reading results and merging them: provenance, unfinished runs, the newest score of each image."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import engine
from engine import merge as merging
from engine.errors import UsageError
from engine.merge import merge
from tests.helpers.bundles import write_bundle
from tests.helpers.processes import ROOT

Screen = Callable[..., Path]


@pytest.fixture
def screened(archive: Path, bundle: Path, tmp_path: Path) -> Screen:
    """Results of the images named, in a folder named; runs are begun a minute after each other."""
    begun = 0

    def run(name: str, images: list[str], **options: Any) -> Path:
        nonlocal begun
        manifest = archive / f"{name}.csv"
        columns = options.pop("columns", {})
        pd.DataFrame({"path": images, **columns}).to_csv(manifest, index=False)
        output = tmp_path / name
        engine.screen(manifest, output=output, **{"bundle": bundle, "part_rows": 3, **options})
        begun += 1
        began_at(output, begun)
        return output

    return run


def began_at(results: Path, minute: int) -> None:
    file = results / "_run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps(run | {"started": f"2031-05-17T06:{minute:02}:00+00:00"}))


def names(count: int, start: int = 0) -> list[str]:
    return [f"image-{row:02}{('.png', '.jpg')[row % 2]}" for row in range(start, start + count)]


def test_results_come_with_their_provenance(screened: Screen) -> None:
    output = screened("monday", [*names(7), "gone.png"], columns={"patient": list("abcdefgh")})
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
    output = screened("monday", names(8))
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


def test_the_newest_score_of_each_image_wins(
    screened: Screen, tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "PART_ROWS", 4)
    monkeypatch.setattr(merging, "BUCKET_ROWS", 2)  # several buckets
    monday = screened("monday", [*names(6), "gone.png"], columns={"site": ["north"] * 7, "age": range(7)})
    (archive / names(6)[5]).rename(archive / "away.jpg")
    (archive / "gone.png").write_bytes((archive / names(1)[0]).read_bytes())
    tuesday = screened(
        "tuesday",
        [names(5)[4], f"./{names(4)[3]}", names(6)[5], "gone.png", *names(2, 10), names(11)[10], ""],
        columns={"age": np.linspace(0, 1, 8)},
    )
    # the order of the folders says nothing of the runs' age
    outcome = merge([tuesday, monday], tmp_path / "merged")
    frame = engine.read_results(tmp_path / "merged")
    assert outcome.rows == len(frame) == 10
    assert outcome.dropped == 5
    assert frame.row.tolist() == list(range(10))
    by_path = frame[frame.path != ""].set_index("path")
    ids = {
        name: engine.read_results(tmp_path / name).attrs["provenance"]["run_id"]
        for name in ("monday", "tuesday")
    }
    origin = by_path.run_id.map({run_id: name for name, run_id in ids.items()}).to_dict()
    assert origin == {
        **dict.fromkeys(names(3), "monday"),
        f"./{names(4)[3]}": "tuesday",
        names(5)[4]: "tuesday",
        names(6)[5]: "monday",  # tuesday it was missing, and has no score
        "gone.png": "tuesday",
        **dict.fromkeys(names(2, 10), "tuesday"),
    }
    assert by_path.run_row[names(11)[10]] == 6  # the later of two rows of one run
    assert (frame.path == "").sum() == 1
    assert frame.site.isna().sum() == 6
    assert frame.age.dtype == np.float64
    for name in ("monday", "tuesday"):
        source = engine.read_results(tmp_path / name).set_index("row")
        of_run = frame[frame.run_id == ids[name]]
        expected = source.loc[of_run.run_row, "p_normal"].to_numpy()
        assert np.array_equal(of_run.p_normal.to_numpy(), expected, equal_nan=True)
    provenance = frame.attrs["provenance"]
    assert set(provenance["runs"]) == set(ids.values())
    part = pq.read_schema(tmp_path / "merged" / "part-00000.parquet")
    assert set(json.loads(part.metadata[b"engine"])["runs"]) == set(ids.values())

    # merged results merge
    wednesday = screened("wednesday", names(1))
    outcome = merge([tmp_path / "merged", wednesday], tmp_path / "all")
    assert (outcome.rows, outcome.dropped) == (10, 1)
    again = engine.read_results(tmp_path / "all")
    run_id = again.attrs["provenance"]["runs"].keys() - set(ids.values())
    assert again[again.run_id.isin(run_id)].path.tolist() == names(1)
    assert again.columns.tolist() == frame.columns.tolist()


def test_what_can_not_stand_side_by_side(screened: Screen, tmp_path: Path, capsys: Any) -> None:
    monday = screened("monday", names(2))
    other = screened("other", names(2), bundle=write_bundle(tmp_path / "other-bundle", weights=(1.0,)))
    assert merging.main([str(monday), str(other), "-o", str(tmp_path / "merged")]) == 2
    assert "the bundle differ" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    (tmp_path / "salt").write_text("a salt of sixteen bytes and more")
    hidden = [screened(name, names(2), redact=True, salt_file=tmp_path / "salt") for name in ("h1", "h2")]
    with pytest.raises(UsageError, match="the salt of paths differ"):
        merge([monday, hidden[0]], tmp_path / "merged")
    assert merge(hidden, tmp_path / "hidden").dropped == 2
    clash = screened("clash", names(2), columns={"run_id": ["a", "b"]})
    with pytest.raises(UsageError, match="'run_id'"):
        merge([monday, clash], tmp_path / "merged")
    with pytest.raises(UsageError, match="not empty"):
        merge([monday], other)
    texts = screened("texts", names(2), columns={"age": ["x", "y"]})
    numbers = screened("numbers", names(2), columns={"age": [1, 2]})
    with pytest.raises(UsageError, match="of two types"):
        merge([texts, numbers], tmp_path / "merged")
    rounded = screened("rounded", names(2), columns={"age": [0.5, 1.5]})
    exact = screened("exact", names(2), columns={"age": [1, 2**53 + 1]})
    with pytest.raises(UsageError, match="'age' is int64 in one run and double in another"):
        merge([rounded, exact], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    as_int8 = {name: screened(name, names(2)) for name in ("int8-a", "int8-b")}
    for name, folder in as_int8.items():
        run = json.loads((folder / "_run.json").read_text())
        run["result_options"] |= {"precision": "int8", "plans": {"member0": name}}
        (folder / "_run.json").write_text(json.dumps(run))
    with pytest.raises(UsageError, match="the INT8 graphs differ"):
        merge(list(as_int8.values()), tmp_path / "merged")
    assert merging.main([str(monday), "-o", str(tmp_path / "merged")]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "merged")
    assert "2 rows (2 ok); 0 older" in captured.err
    origin = tmp_path / "merged" / "_merged.json"
    about = json.loads(origin.read_text())
    for runs in ({}, {"a": {}}, {"a": []}, {"a": {"started": "soon"}}):
        origin.write_text(json.dumps(about | {"runs": runs}))
        assert merging.main([str(tmp_path / "merged"), "-o", str(tmp_path / "again")]) == 2
        assert "_merged.json: " in capsys.readouterr().err
    (tmp_path / "merged" / "_SUCCESS").unlink()
    with pytest.raises(UsageError, match="merging was not finished"):
        engine.read_results(tmp_path / "merged")


def test_what_the_page_shows(
    archive: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert {"engine", "pandas", "duckdb"} <= set(re.findall(r"^import (\w+)", code, re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(bundle)
    paths = [str(archive / name) for name in [*names(5), "gone.png"]]
    pd.DataFrame({"path": paths, "patient": list("abcdef")}).to_csv("manifest.csv", index=False)
    found: dict[str, Any] = {}
    exec(code.replace("joined = duckdb", "by_path = duckdb"), found)
    assert "osteo" in capsys.readouterr().out
    assert found["summary"].rows == len(found["worst"]) == 6
    joined, by_path = found["joined"], found["by_path"].sort_values("patient", ignore_index=True)
    assert joined.patient.tolist() == by_path.patient.tolist() == list("abcdef")
    scores = found["rows"].p_osteoporosis.to_numpy()
    for frame in (joined, by_path):
        assert np.array_equal(frame.p_osteoporosis.to_numpy(np.float32), scores, equal_nan=True)


def test_memory_does_not_grow_with_the_rows(
    screened: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160,000 rows in 20 parts: what Arrow holds is a few parts and never half of them."""
    template = screened("monday", names(1))
    rows, parts = 8_000, 20
    part = many_rows(template, rows, parts)
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    copied = merging._copied

    def watched(*arguments: Any) -> Iterator[pa.Table]:
        nonlocal peak
        for found in copied(*arguments):
            peak = max(peak, pool.bytes_allocated() - before)
            yield found

    monkeypatch.setattr(merging, "_copied", watched)
    monkeypatch.setattr(merging, "PART_ROWS", 4_000)
    assert merge([template], tmp_path / "merged").rows == rows * parts
    assert part < peak < 0.5 * parts * part


def many_rows(results: Path, rows: int, parts: int) -> int:
    """Make the one row of `results` many, each of its own path; the bytes of a part as Arrow holds it."""
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
