"""`python -m benchmarks peers`: run the engine and other tools in turn on the same work.

Each contender runs in a separate process once per round, in random order, with as many threads as cores. Its
rate is measured from its first read to its last row on the disk, after the members are loaded and compiled.
It counts only if its rows are correct (`gate.py`).
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from benchmarks import archive, processes, record
from benchmarks.intervals import bootstrap_interval
from benchmarks.peers import gate
from benchmarks.peers.job import TIME_MARK
from benchmarks.tables import show_peers
from engine.bundle import bundle as bundles
from engine.core.errors import UsageError
from engine.core.hardware import available_cpus
from engine.core.settings import CPU_BATCH
from engine.runs.run_record import library_versions

TIMEOUT_S = 900
MISHAP_ROWS, MISHAP_CORRUPT = 32, 3
REFERENCE = "engine"
ERROR = re.compile(r"(error|[\w.]*(Error|Exception)(\(\w+\))?):", re.ASCII)


@dataclass(frozen=True)
class Contender:
    title: str
    needs: tuple[str, ...]  # distributions, whose versions are recorded
    module: str | None = None  # of benchmarks.peers; None is the engine itself
    precision: str = "fp32"
    # target of the engine's speed-up over this contender, or of this precision's speed-up over float32
    aim: float | None = None

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if not _version(name)]

    def command(self, manifest: Path, bundle: Path, output: Path) -> list[str]:
        python, threads = [sys.executable, "-m"], str(available_cpus())
        if self.module is None:
            arguments = [str(manifest), "-b", str(bundle), "-o", str(output), "--precision", self.precision]
            # overrides tuned options and a GPU
            arguments += ["--device", "cpu", "--batch-size", str(CPU_BATCH), "--workers", threads]
            return [*python, "engine.run", *arguments, "--max-error-rate", "1"]
        module = f"benchmarks.peers.{self.module}"
        return [*python, module, str(manifest), str(bundle), str(output), "--threads", threads]


CONTENDERS = {
    REFERENCE: Contender("this engine", ()),
    "engine-int8": Contender("this engine, INT8", (), precision="int8", aim=1.8),
    "torch-loader": Contender(
        "PyTorch eager, DataLoader, Pillow", ("torch", "torchvision", "pillow"), "torch_loader", aim=2.0
    ),
    "torch-compiled": Contender(
        "torch.compile, DataLoader, Pillow", ("torch", "torchvision", "pillow"), "torch_compiled"
    ),
    "onnx-loop": Contender("ONNX Runtime loop, Pillow", ("onnxruntime", "pillow"), "onnx_loop", aim=1.15),
    "onnx-prefetch": Contender(
        "ONNX Runtime, threads ahead, OpenCV",
        ("onnxruntime", "opencv-python-headless", "pillow"),
        "onnx_prefetch",
        aim=1.0,
    ),
    "openvino": Contender(
        "OpenVINO AsyncInferQueue, OpenCV", ("openvino", "opencv-python-headless", "pillow"), "openvino_queue"
    ),
    "spdl": Contender(
        "SPDL, ONNX Runtime, OpenCV",
        ("spdl-core", "onnxruntime", "opencv-python-headless", "pillow"),
        "spdl_pipeline",
    ),
    "ray-data": Contender(
        "Ray Data, ONNX Runtime, OpenCV",
        ("ray", "onnxruntime", "opencv-python-headless", "pillow"),
        "ray_data",
        aim=1.5,
    ),
}
MISHAPS = {  # patterns of mishaps.py: title and required packages
    "timm": ("timm's inference.py", ("timm",)),
    "ray": ("Ray Data read_images", ("ray",)),
    "ray-skip": ("Ray Data read_images, max_errored_blocks = -1", ("ray",)),
}


@dataclass(frozen=True)
class ContenderRun:
    """A run of one contender in one round."""

    rate: float  # images/s
    start_up_s: float  # process start to first read, and last row to exit
    peak_memory_mb: float
    verdict: gate.Verdict


class Contest:
    def __init__(self, work: Path, manifest: Path, bundle: bundles.Bundle) -> None:
        self._work, self._manifest, self._bundle = work, manifest, bundle
        with manifest.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        self.rows = len(rows)
        self.kinds = Counter(row["kind"] for row in rows if not row["damage"])
        self.corrupt = [row["path"] for row in rows if row["damage"]]
        self.reference = self._rows(REFERENCE)[1]
        assert list(self.reference["path"]) == [row["path"] for row in rows], "the engine lost or moved rows"
        scored = self.reference["path"][self.reference["confidence"].notna()]
        assert set(scored) == {row["path"] for row in rows if not row["damage"]}, (
            "the engine scored wrong files"
        )

    def run(self, name: str) -> ContenderRun | str:
        """Run the contender; return a line with the reason if it fails."""
        done, rows, seconds = self._rows(name, may_fail=name != REFERENCE)
        if seconds is None:
            return f"{'killed' if done.status < 0 else 'failed'}: {_last_line(done)}"
        limits = gate.INT8 if CONTENDERS[name].precision == "int8" else gate.FLOAT32
        verdict = gate.judge_rows(
            rows, self.reference, corrupt=self.corrupt, classes=self._bundle.classes, limits=limits
        )
        return ContenderRun(self.rows / seconds, done.wall_s - seconds, done.peak_memory_mb, verdict)

    def _rows(
        self, name: str, *, may_fail: bool = False
    ) -> tuple[processes.FinishedProcess, pd.DataFrame, float | None]:
        """Run a contender; return its rows and its seconds, None if it failed."""
        output = self._work / f"rows-{name}"
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(self._work / f"rows-{name}-ready", ignore_errors=True)
        command = CONTENDERS[name].command(self._manifest, self._bundle.path, output)
        done = processes.run_command(command, environment=environment(self._work), timeout_s=TIMEOUT_S)
        if done.status and not may_fail:
            raise UsageError(f"{' '.join(command[1:])} failed: {_last_line(done)}")
        seconds = None if done.status else _seconds(done, output)
        return done, gate.read_rows(output), seconds


def environment(work: Path) -> dict[str, str]:
    """Return an environment in which each library uses one thread per core, without spinning."""
    cores = str(available_cpus())
    libraries = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")
    return {
        **os.environ,
        **{f"{library}_NUM_THREADS": cores for library in libraries},
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(record.ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),  # compiled once per invocation
    }


def _seconds(done: processes.FinishedProcess, output: Path) -> float:
    success = output / "_SUCCESS"
    if success.exists():
        return float(json.loads(success.read_text())["last_start"]["elapsed_s"])
    marks = [
        line.removeprefix(TIME_MARK).split()
        for line in done.output.splitlines()
        if line.startswith(TIME_MARK)
    ]
    times = {name: float(value) for name, value in marks}
    return times["stop"] - times["start"]


def _last_line(done: processes.FinishedProcess) -> str:
    """Return the last line of output, preferably one that names an error."""
    lines = [line.strip() for line in done.errors.splitlines() if line.strip()]
    named = [line for line in lines if ERROR.match(line)]
    return (named or lines or [f"status {done.status}"])[-1][:200]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def contender_figures(results: dict[str, list[ContenderRun | str]]) -> dict[str, Any]:
    """Return each contender's figures over the rounds, and the engine's rate relative to it, by round."""
    engine_runs = [run for run in results[REFERENCE] if isinstance(run, ContenderRun)]
    figures: dict[str, Any] = {}
    for name, outcomes in results.items():
        contender = CONTENDERS[name]
        runs = [run for run in outcomes if isinstance(run, ContenderRun)]
        reasons = [run if isinstance(run, str) else run.verdict.why_not for run in outcomes]
        row: dict[str, Any] = {
            "title": contender.title,
            "precision": contender.precision,
            "not_counted": next((reason for reason in reasons if reason), None),
        }
        if runs:
            rates = [run.rate for run in runs]
            low, median, high = np.percentile(rates, [25, 50, 75]).tolist()
            row |= {
                "images_per_s": {"median": median, "quartiles": [low, high], "rounds": rates},
                "start_up_s": float(np.median([run.start_up_s for run in runs])),
                "peak_memory_mb": max(run.peak_memory_mb for run in runs),
                "largest_difference": _maximum(run.verdict.difference for run in runs),
                "least_agreement": min((run.verdict.agreement or 0.0 for run in runs), default=None),
            }
        if name != REFERENCE and row["not_counted"] is None:
            is_engine = contender.module is None
            pairs = [
                run.rate / engine_run.rate if is_engine else engine_run.rate / run.rate
                for engine_run, run in zip(engine_runs, runs, strict=True)
            ]
            row["beside_the_engine" if is_engine else "engine_beside_it"] = {
                "median": float(np.median(pairs)),
                "interval": bootstrap_interval(pairs),
                "rounds": pairs,
                "aim": contender.aim,
            }
        figures[name] = row
    return figures


def _maximum(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


def run_mishaps(work: Path, bundle: bundles.Bundle, seed: int) -> dict[str, Any]:
    """Run common patterns and the engine on corrupt files."""
    manifest = archive.make_archive(work, "uniform", MISHAP_ROWS, seed, corrupt=MISHAP_CORRUPT)
    contest_run = Contest(work, manifest, bundle)
    columns = [f"p_{name}" for name in bundle.classes]
    figures: dict[str, Any] = {"rows": contest_run.rows, "corrupt": len(contest_run.corrupt), "patterns": {}}
    figures["patterns"][REFERENCE] = {
        "title": "this engine",
        **count_wrong_rows(contest_run.reference, contest_run.corrupt, columns),
    }
    for name, (title, needs) in MISHAPS.items():
        row: dict[str, Any] = {"title": title}
        figures["patterns"][name] = row
        if any(not _version(need) for need in needs):
            row["problem"] = "not installed"
            continue
        output = work / f"rows-{name}"
        shutil.rmtree(output, ignore_errors=True)
        arguments = [name, str(manifest), str(bundle.path), str(output), "--threads", str(available_cpus())]
        command = [sys.executable, "-m", "benchmarks.peers.mishaps", *arguments]
        done = processes.run_command(command, environment=environment(work), timeout_s=TIMEOUT_S)
        if done.status:
            row["problem"] = f"the whole run fails: {_last_line(done)}"
        else:
            row |= count_wrong_rows(gate.read_rows(output), contest_run.corrupt, columns)
    return figures


def count_wrong_rows(rows: pd.DataFrame, corrupt: Collection[str], columns: list[str]) -> dict[str, int]:
    """Count corrupt files with the score of another file, and sound files without a score."""
    scores = rows.set_index("path")[columns].astype(np.float64)
    bad = scores.index.isin(list(corrupt))
    sound = scores[~bad]
    borrowed = sum(
        bool(np.isclose(sound.to_numpy(), score, atol=1e-5, rtol=0).all(axis=1).any())
        for score in scores[bad].to_numpy()
    )
    return {"rows_with_anothers_score": borrowed, "sound_rows_lost": int(sound.isna().any(axis=1).sum())}


def choose_contenders(only: Sequence[str] | None, bundle: bundles.Bundle) -> tuple[list[str], dict[str, str]]:
    """Return the contenders that can run here, and the reasons why the others can't."""
    left_out = {
        name: "not installed: " + ", ".join(contender.missing)
        for name, contender in CONTENDERS.items()
        if contender.missing
    }
    if not any(bundle.path.rglob("*int8*")):
        left_out["engine-int8"] = "the bundle has no INT8 graphs"
    requested = [name for name in CONTENDERS if not only or name in only or name == REFERENCE]
    return [name for name in requested if name not in left_out], {
        name: reason for name, reason in left_out.items() if name in requested
    }


def contest(
    console: Console, work: Path, bundle: bundles.Bundle, options: Any
) -> tuple[dict[str, Any], list[str]]:
    """Return the figures and the names of the contenders."""
    manifest = archive.make_archive(work, options.archive, options.rows, options.seed)
    names, left_out = choose_contenders(options.only, bundle)
    for name, reason in left_out.items():
        console.print(f"{name}: {reason}", highlight=False)
    session, rng = Contest(work, manifest, bundle), random.Random(options.seed)
    results: dict[str, list[ContenderRun | str]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in rng.sample(names, len(names)):
            # a failure is not repeated
            failed = [outcome for outcome in results[name] if isinstance(outcome, str)]
            outcome = failed[0] if failed else session.run(name)
            results[name].append(outcome)
            console.print(
                f"round {number + 1}, {name}: {_describe_outcome(outcome)}", highlight=False, markup=False
            )
    figures = {
        "work": {
            "archive": options.archive,
            "rows": session.rows,
            "rounds": options.rounds,
            "seed": options.seed,
            "files": dict(session.kinds),
            "corrupt": len(session.corrupt),
            "members": [member.architecture for member in bundle.members],
            "threads": available_cpus(),
            "engine_batch_size": CPU_BATCH,
        },
        "limits": {"probability": gate.MAX_DIFFERENCE, "agreement": gate.FLOAT32.agreement},
        "contenders": contender_figures(results),
        "left_out": left_out,
    }
    return figures, names


def _own_bundle(work: Path) -> Path:
    from benchmarks.peers.bundle import contest_bundle  # imports torch

    return contest_bundle(work / "bundle")


def _describe_outcome(outcome: ContenderRun | str) -> str:
    if isinstance(outcome, str):
        return outcome
    reason = outcome.verdict.why_not
    return f"{outcome.rate:.2f} images/s" + (f", not counted: {reason}" if reason else "")


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    unknown = sorted(set(options.only or ()) - set(CONTENDERS))
    if unknown:
        raise UsageError(f"--only {' '.join(unknown)}: no such contender; allowed: {', '.join(CONTENDERS)}")
    if options.rows < 2 or options.rounds < 1:
        raise UsageError(
            f"--rows {options.rows} --rounds {options.rounds}: allowed: at least 2 rows and 1 round"
        )
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(options.work or scratch).absolute()
        work.mkdir(parents=True, exist_ok=True)
        bundle = bundles.load_bundle((options.bundle or _own_bundle(work)).absolute())
        figures, names = contest(console, work, bundle, options)
        if not options.only:
            figures["corrupt_files"] = run_mishaps(work, bundle, options.seed)
    needed = {need for name in names for need in CONTENDERS[name].needs} | {"timm"}
    installed = {name: number for name in sorted(needed) if (number := _version(name))}
    figures["versions"] = library_versions() | installed
    name = "peers-cpu" if options.archive == "mixed" else f"peers-{options.archive}-cpu"
    command = f"peers --archive {options.archive} --rows {options.rows} --rounds {options.rounds}"
    command += f" --seed {options.seed}" + (f" --only {' '.join(options.only)}" if options.only else "")
    target = options.output / f"{name}.json"
    record.write_record(target, command, figures, before=before)
    show_peers(console, figures)
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
