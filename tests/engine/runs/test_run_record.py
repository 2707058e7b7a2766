"""What a run writes is read again as it was; what does not fit is named by field and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import UsageError
from engine.core.json_records import Record, from_json, to_json
from engine.core.settings import Shard
from engine.runs.run_folder import ActorsRecord, RunFolder
from engine.runs.run_record import RunRecord
from engine.runs.summary import Success
from engine.sink.parts import PartFooter
from tests.helpers.records import ACTORS, FOOTER, RUN, SUCCESS, run_record


@pytest.mark.parametrize(
    ("text", "kind"), [(RUN, RunRecord), (SUCCESS, Success), (ACTORS, ActorsRecord), (FOOTER, PartFooter)]
)
def test_files_of_version_0_1_are_read_and_rewritten_identically(text: str, kind: type[Record]) -> None:
    assert to_json(from_json(text, kind)) == text


def test_fields_missing_in_older_versions_have_defaults() -> None:
    data = json.loads(RUN)
    for name in (
        "format",
        "operating_points",
        "tuning",
        "versions",
        "profile",
        "machine",
        "groups",
        "target",
    ):
        del data[name]
    for name in ("include", "exclude", "since", "decode", "shards", "redacted_by", "kept_columns"):
        del data["result_options"][name]
    data["result_options"]["device"] = "cuda:1"
    run = RunRecord.parse(json.dumps(data))
    assert not run.has_triage
    assert run_record().has_triage
    assert run.result_options.device == "cuda"
    footer = json.loads(FOOTER)
    del footer["by"], footer["written"]
    assert json.loads(to_json(from_json(json.dumps(footer), PartFooter)))["by"] == {}


def test_parts_and_their_rows() -> None:
    run = run_record(part_rows=16)
    assert run.part_count == 3
    assert [run.rows_in_part(index) for index in range(4)] == [16, 16, 8, 0]
    assert list(run.part_indices(Shard(2, 2))) == [1]
    assert (run.shard_rows(Shard(1, 2)), run.shard_rows(None)) == (24, 40)


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("format", 2, "format is 2: allowed: 1"),
        ("rows", -1, "rows is -1: expected a whole number >= 0"),
        ("rows", "40", 'rows is "40": expected a whole number'),
        ("started", "soon", "started is 'soon': expected an ISO 8601 date and time"),
        ("classes", [], "classes is []: expected a list of length >= 1"),
        ("weights", {"a": "much"}, 'weights.a is "much": expected a number'),
        ("run_id", 5, "run_id is 5: expected a text"),
        ("result_options.batch_size", 0, "result_options.batch_size is 0: expected a whole number >= 1"),
        ("result_options.include_uids", 1, "result_options.include_uids is 1: expected true or false"),
        ("result_options.new", 1, "result_options.new: unknown field"),
        (
            "tuning.decoding.cpu_share",
            None,
            "tuning.decoding.cpu_share is null: expected a number",
        ),
        ("machine.gpu", "H100", 'machine.gpu is "H100": expected an object or null'),
        ("newer", [], "newer: unknown field"),
        ("weights", None, "weights is null: expected an object"),
    ],
)
def test_a_field_of_a_run_that_does_not_fit_is_named(
    tmp_path: Path, path: str, value: Any, error: str
) -> None:
    data = json.loads(RUN)
    *parents, name = path.split(".")
    target = data
    for parent in parents:
        target = target[parent]
    target[name] = value
    (tmp_path / "_run.json").write_text(json.dumps(data))
    with pytest.raises(UsageError) as caught:
        RunFolder.existing(tmp_path).run()
    line = f"output {tmp_path}: _run.json can't be read: {error}; if a newer version of the engine "
    assert str(caught.value).startswith(line)
    del target[name]
    if name in ("rows", "run_id"):
        with pytest.raises(ValueError, match=f"^{name} is missing$"):
            RunRecord.parse(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"run_id": NaN}'])
def test_invalid_records_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "_run.json").write_text(text)
    with pytest.raises(UsageError, match=r"_run\.json can't be read"):
        RunFolder.existing(tmp_path).run()
