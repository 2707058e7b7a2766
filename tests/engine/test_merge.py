"""Merging results: the newest score of each image, what can not stand side by side, memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine import merge as merging
from engine.core.errors import UsageError
from engine.merge import merge
from tests.helpers.bundles import write_bundle
from tests.helpers.images import image_names
from tests.helpers.runs import Screen, many_rows


def test_the_newest_score_of_each_image_wins(
    screened: Screen, tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "PART_ROWS", 4)
    monkeypatch.setattr(merging, "BUCKET_ROWS", 2)  # several buckets
    monday = screened(
        "monday", [*image_names(6), "gone.png"], columns={"site": ["north"] * 7, "age": range(7)}
    )
    (archive / image_names(6)[5]).rename(archive / "away.jpg")
    (archive / "gone.png").write_bytes((archive / image_names(1)[0]).read_bytes())
    tuesday = screened(
        "tuesday",
        [
            image_names(5)[4],
            f"./{image_names(4)[3]}",
            image_names(6)[5],
            "gone.png",
            *image_names(2, 10),
            image_names(11)[10],
            "",
        ],
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
        **dict.fromkeys(image_names(3), "monday"),
        f"./{image_names(4)[3]}": "tuesday",
        image_names(5)[4]: "tuesday",
        image_names(6)[5]: "monday",  # tuesday it was missing, and has no score
        "gone.png": "tuesday",
        **dict.fromkeys(image_names(2, 10), "tuesday"),
    }
    assert by_path.run_row[image_names(11)[10]] == 6  # the later of two rows of one run
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
    wednesday = screened("wednesday", image_names(1))
    outcome = merge([tmp_path / "merged", wednesday], tmp_path / "all")
    assert (outcome.rows, outcome.dropped) == (10, 1)
    again = engine.read_results(tmp_path / "all")
    run_id = again.attrs["provenance"]["runs"].keys() - set(ids.values())
    assert again[again.run_id.isin(run_id)].path.tolist() == image_names(1)
    assert again.columns.tolist() == frame.columns.tolist()


@pytest.mark.slow
def test_runs_that_can_not_be_merged_are_refused(screened: Screen, tmp_path: Path, capsys: Any) -> None:
    monday = screened("monday", image_names(2))
    other = screened("other", image_names(2), bundle=write_bundle(tmp_path / "other-bundle", weights=(1.0,)))
    assert merging.main([str(monday), str(other), "-o", str(tmp_path / "merged")]) == 2
    assert "the bundle differ" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    (tmp_path / "salt").write_text("a salt of sixteen bytes and more")
    hidden = [
        screened(name, image_names(2), redact=True, salt_file=tmp_path / "salt") for name in ("h1", "h2")
    ]
    with pytest.raises(UsageError, match="the salt of paths differ"):
        merge([monday, hidden[0]], tmp_path / "merged")
    assert merge(hidden, tmp_path / "hidden").dropped == 2
    clash = screened("clash", image_names(2), columns={"run_id": ["a", "b"]})
    with pytest.raises(UsageError, match="'run_id'"):
        merge([monday, clash], tmp_path / "merged")
    with pytest.raises(UsageError, match="not empty"):
        merge([monday], other)
    texts = screened("texts", image_names(2), columns={"age": ["x", "y"]})
    numbers = screened("numbers", image_names(2), columns={"age": [1, 2]})
    with pytest.raises(UsageError, match="of two types"):
        merge([texts, numbers], tmp_path / "merged")
    rounded = screened("rounded", image_names(2), columns={"age": [0.5, 1.5]})
    exact = screened("exact", image_names(2), columns={"age": [1, 2**53 + 1]})
    with pytest.raises(UsageError, match="'age' is int64 in one run and double in another"):
        merge([rounded, exact], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    as_int8 = {name: screened(name, image_names(2)) for name in ("int8-a", "int8-b")}
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


def test_memory_does_not_grow_with_the_rows(
    screened: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160,000 rows in 20 parts: what Arrow holds is a few parts and never half of them."""
    template = screened("monday", image_names(1))
    rows, parts = 8_000, 20
    part = many_rows(template, rows, parts)
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    copied = merging._copy_rows

    def watched(*arguments: Any) -> Iterator[pa.Table]:
        nonlocal peak
        for result in copied(*arguments):
            peak = max(peak, pool.bytes_allocated() - before)
            yield result

    monkeypatch.setattr(merging, "_copy_rows", watched)
    monkeypatch.setattr(merging, "PART_ROWS", 4_000)
    assert merge([template], tmp_path / "merged").rows == rows * parts
    assert part < peak < 0.5 * parts * part
