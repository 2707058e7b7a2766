"""Passports: what version 0.1.0 wrote of plans and INT8 graphs, and what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import plans
from engine.core.errors import UsageError

WRITTEN = Path(__file__).parent / "written_by_0_1_0"


@pytest.mark.parametrize("name", ["passport-int8", "passport-tensorrt"])
def test_files_of_version_0_1_0_are_read_and_rewritten_identically(name: str, tmp_path: Path) -> None:
    plan = plans.load_plan(WRITTEN / f"{name}.json")
    assert plan.path == WRITTEN / plan.passport.plan
    assert plan.passport.parity.passed
    plans.write_passport(tmp_path, plan.passport)
    assert (tmp_path / "member0.json").read_bytes() == (WRITTEN / f"{name}.json").read_bytes()


def test_older_passports_have_no_ensemble(tmp_path: Path) -> None:
    data = json.loads((WRITTEN / "passport-tensorrt.json").read_text())
    del data["ensemble"]
    (tmp_path / "member0.json").write_text(json.dumps(data))
    assert plans.load_plan(tmp_path / "member0.json").passport.ensemble is None


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"plan": "../../secret"}, "is not the name of a file beside the passport"),
        ({"plan": ""}, 'plan is ""'),
        ({"member": "x\n"}, "is not printable"),
        ({"profiles": []}, "profiles: 0; a compiled plan has some"),
        ({"profiles": [{"min": 1, "opt": 8, "max": True}]}, r"profiles\[0\].max is true"),
        ({"profiles": [{"min": 1, "opt": 8}]}, r"profiles\[0\].max is missing"),
        ({"version": "1" * 5000}, "expected a version such as"),
        ({"version": "11.x"}, 'version is "11.x": expected a version such as'),
        ({"plan_bytes": -1}, "plan_bytes is -1"),
        ({"backend": "pickle"}, 'backend is "pickle": allowed: onnx, tensorrt, tensorrt_rtx'),
        ({"plan_sha256": "b" * 63}, "expected 64 digits"),
        ({"gpu": {"name": "x"}}, "gpu.uuid is missing"),
        ({"parity": {"max": float("nan")}}, "parity.max is NaN"),
        ({"options": {"workspace": []}}, r"options.workspace is \[\]"),
        ({"layers": [7]}, r"layers\[0\] is 7: expected an object"),
        ({"surprise": 1}, "surprise: unknown field"),
    ],
)
def test_invalid_fields_are_named(changed: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "member0.json"
    path.write_text(json.dumps(json.loads((WRITTEN / "passport-tensorrt.json").read_text()) | changed))
    with pytest.raises(UsageError, match=complaint) as caught:
        plans.load_plan(path)
    assert str(caught.value).startswith(f"plan {path}: ")
    assert "\n" not in str(caught.value)
