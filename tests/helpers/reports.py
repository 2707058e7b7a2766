"""Results for reports: operating points, overlays, hostile names."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "</script><script>alert(2)</script>.png",
    "javascript:alert(3)",
    "\u202egnp.exe\x07\x1b[31m.png",
    '=HYPERLINK("http://example.invalid","x")|\' OR 1=1.png',
    "{{ 7 * 7 }}{% raw %}&amp;&#x3c;b&#x3e;.png",
    "x" * 10_000 + ".png",
]
LABELS = ["<b>normal</b>", "osteopenia\u2066", '"><svg onload=alert(4)>', "y" * 10_000]


def votes(table: pa.Table, prefix: str, classes: list[str]) -> Any:
    return np.column_stack(
        [table[f"{prefix}p_{name}"].to_numpy(zero_copy_only=False) for name in classes]
    ).astype(np.float64)


def with_operating_points(results: Path) -> Path:
    """Change results to those of a bundle with groups and operating points."""
    run = json.loads((results / "_run.json").read_text())
    classes, weights = run["classes"], run["weights"]
    calibrated = Path(__file__).parents[1] / "engine/bundle/written_by_0_1_0/calibrated.json"
    points = json.loads(calibrated.read_text())["operating_points"] | {"target": classes[-1]}
    points["rule_out"]["below"], points["refer"]["above"] = 0.2, 0.6
    run |= {
        "target": classes[-1],
        "groups": {"bone_loss": classes[1:]},
        "operating_points": points,
    }
    (results / "_run.json").write_text(json.dumps(run))
    for file in results.glob("part-*.parquet"):
        table = pq.read_table(file)
        metadata = table.schema.metadata
        scored = [status == "ok" for status in table["status"].to_pylist()]
        ensemble = votes(table, "", classes)
        members = [votes(table, f"{name}_", classes) for name in weights]
        spread = _bits(ensemble) - sum(
            weight * _bits(member) for weight, member in zip(weights.values(), members, strict=True)
        )
        risk = ensemble[:, -1]
        triage = np.where(risk > 0.6, "refer", np.where(risk < 0.2, "rule_out", "gray_zone")).tolist()
        reasons = [["gray_zone"] if zone == "gray_zone" else [] for zone in triage]
        added = {
            "p_bone_loss": (ensemble[:, 1:].sum(axis=1).tolist(), pa.float32()),
            "entropy": (_bits(ensemble).tolist(), pa.float32()),
            "member_disagreement": (np.maximum(spread, 0).tolist(), pa.float32()),
            "triage": (triage, pa.string()),
            "abstain": ([bool(names) for names in reasons], pa.bool_()),
            "abstain_reasons": (reasons, pa.list_(pa.string())),
        }
        table = table.drop_columns([name for name in added if name in table.column_names])
        for name, (values, kind) in added.items():
            cells = [value if ok else None for value, ok in zip(values, scored, strict=True)]
            table = table.append_column(name, pa.array(cells, kind))
        pq.write_table(table.replace_schema_metadata(metadata), file)
    return results


def _bits(probabilities: Any) -> Any:
    return -(probabilities * np.log2(np.maximum(probabilities, 1e-12))).sum(axis=1)


def with_explanations(results: Path, row: int, voter: str = "ensemble") -> Path:
    """Write an overlay as engine.explain does."""
    folder = results / "explanations"
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(picture, "PNG")
    name = f"row-{row:09d}-{voter}.png"
    (folder / name).write_bytes(picture.getvalue())
    index = {
        "run_id": json.loads((results / "_run.json").read_text())["run_id"],
        "method": "Grad-CAM",
        "class": "osteoporosis",
        "compared_with": {"canaries": 8},
        "rows": [
            {
                "row": row,
                "class": "osteoporosis",
                "voters": {voter: name, "evil": "../../_run.json"},
                "probability": 0.9,
                "typical": 0.2,
                "shares": {},
                "scale": 0.01,
            }
        ],
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder
