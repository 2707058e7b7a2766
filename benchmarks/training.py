"""`python -m benchmarks training`: train a bundle, screen the test images, compare the figures.

Both commands run in separate processes. The figures of training on the test set are compared with figures
from the Parquet rows that the engine writes for the same images.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.processes import peak_memory
from engine.core.errors import EngineError
from engine.results import read_results

FIGURES = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "auc", "balanced_accuracy", "kappa")
AGREEMENT = 1e-9  # largest difference between the engine's figures and those of training


def main(console: Console, options: Any) -> None:
    """Train, screen the test images, compare, write JSON. Raises EngineError if anything fails or differs."""
    before = record.describe_machine()
    arguments = shlex.split(options.arguments)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        bundle = work / "bundle"
        trained = _run(console, ["-m", "training", options.data, "-o", bundle, *arguments])
        split = pd.read_csv(f"{bundle}.training/split.csv", dtype=str)
        manifest = work / "test.csv"
        split[split["split"] == "test"].to_csv(manifest, index=False)
        screened = _run(console, ["-m", "engine.run", manifest, "-b", bundle, "-o", work / "results"])
        evaluation = json.loads((bundle / "evaluation.json").read_text())
        rows = read_results(work / "results")
    engine = _scores(rows, evaluation["classes"])
    _check(engine, evaluation)
    figures = {
        "arguments": options.arguments,
        "images": evaluation["images"],
        "training": trained,
        "screening": screened | {"rows": len(rows), "ok": int((rows.status == "ok").sum())},
        "engine_on_test": engine,
        "demo": evaluation["demo"],
        "validation": _summary(evaluation, "validation"),
        "test": _summary(evaluation, "test"),
        "ensemble_less_better_member": evaluation["difference"],
        "weights": evaluation["weights_search"]["chosen"]["weights"],
        "beside": evaluation["weights_search"]["beside"],
        "best": evaluation["best"],
        "folds": evaluation["folds"],
        "data": {name: value for name, value in evaluation["data"].items() if name != "shortcuts"},
        "shortcut": {
            name: evaluation["data"]["shortcuts"][name]
            for name in ("balanced_accuracy", "chance", "p_value", "suspicious")
        },
    }
    path = options.output / f"training-{options.name}.json"
    command = f"training --data DIR --name {options.name} --arguments {shlex.quote(options.arguments)}"
    record.write_record(path, command, figures, before=before)
    _show(console, figures)
    console.print(f"written: {path}")


def _run(console: Console, arguments: list[object]) -> dict[str, float]:
    """Run one of the project's commands. Raises EngineError with its last line when it fails."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with peak_memory(process) as peak:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.decode(errors="replace").rstrip())
            console.print(lines[-1], markup=False, highlight=False)
    if process.wait():
        raise EngineError(f"python {arguments[0]} {arguments[1]} failed: {lines[-1] if lines else ''}")
    return {"seconds": round(time.monotonic() - start, 1), "peak_bytes": peak.bytes}


def _scores(rows: pd.DataFrame, classes: list[str]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    predicted = rows[[f"p_{name}" for name in classes]].to_numpy().argmax(axis=1)
    truth = np.array([classes.index(label) for label in rows["label"]])
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
    }


def _check(engine: dict[str, float], evaluation: dict[str, Any]) -> None:
    for name, value in engine.items():
        reported = evaluation["voters"]["ensemble"]["test"][name]["value"]
        if abs(value - reported) > AGREEMENT:
            raise EngineError(f"{name} on the test images: the engine gives {value}, training {reported}")


def _summary(evaluation: dict[str, Any], subset: str) -> dict[str, Any]:
    return {
        voter: {name: scores[subset][name] for name in (*FIGURES, "nll", "ece", "confusion")}
        for voter, scores in evaluation["voters"].items()
    }


def _show(console: Console, figures: dict[str, Any]) -> None:
    table = Table("test", "accuracy", "macro-F1", "95 %", "AUC")
    for voter, scores in figures["test"].items():
        f1 = scores["macro_f1"]
        table.add_row(
            voter,
            f"{scores['accuracy']['value']:.3f}",
            f"{f1['value']:.3f}",
            f"{f1['low']:.3f}-{f1['high']:.3f}",
            f"{scores['auc']['value']:.3f}",
        )
    console.print(table)
    console.print(
        f"trained in {figures['training']['seconds']} s, peak {figures['training']['peak_bytes'] >> 20} MiB"
    )
