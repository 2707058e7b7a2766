"""Measure members, decoding, end to end with its ceilings, peers, and TensorRT if installed."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import record
from benchmarks.gpu import decode, members, peers
from benchmarks.gpu.bundle import proof_bundle
from benchmarks.throughput import make_archive
from engine.bundle import bundle as bundles
from engine.core import hardware
from engine.core.errors import EngineError
from engine.core.hardware import available_cpus
from engine.core.json_records import to_builtins
from engine.runners.base import RunnerChoice
from engine.runners.select import select_runner
from engine.runners.select_gpu import tensorrt_version
from engine.runners.tensorrt import EXTRAS
from engine.runs.run_record import library_versions

ABLATIONS = {
    "one stream": ["--streams", "1"],
    "two streams": ["--streams", "2"],
    "no graph": ["--no-cuda-graph"],
    "one slot": ["--slots", "1"],
    "four slots": ["--slots", "4"],
}


def main(console: Console, options: argparse.Namespace) -> None:
    """Run the requested sections; add each to the JSON file when it is done."""
    before = record.describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        proof = GpuBenchmark(console, options, options.work or Path(scratch))
        for section in options.sections:
            start = time.perf_counter()
            console.print(f"{section} ...", highlight=False)
            proof.run(section)
            proof.figures.setdefault("seconds", {})[section] = round(time.perf_counter() - start, 1)
            record.write_record(options.output / proof.name, "gpu", proof.figures, before=before)
    console.print(f"written: {options.output / proof.name}")


def _gpu_package_versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "torchvision", "triton", "torch-tensorrt", "onnxruntime"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    versions |= {name: installed for name in EXTRAS if (installed := tensorrt_version(name))}
    return versions


class GpuBenchmark:
    """The state shared by the sections; `figures` is written as JSON."""

    def __init__(self, console: Console, options: argparse.Namespace, work: Path) -> None:
        self._console, self._options, self._work = console, options, work
        self._bundle = proof_bundle(work / "bundle")
        self._manifest = make_archive(work, options.rows, options.side)
        self._images = sorted((work / f"images-{options.side}").glob("*.jpg"))
        self.on_gpu = options.device != "cpu"
        self.figures: dict[str, Any] = {"images": {"side": options.side, "rows": options.rows}}
        kind = "cpu"
        self.figures["versions"] = library_versions() | _gpu_package_versions()
        if self.on_gpu:
            gpu = hardware.require_gpu()
            self.figures["gpu"] = to_builtins(gpu) | {"cuda": hardware.cuda_version()}
            kind = gpu.name.lower().replace(" ", "-")
        self.name = f"gpu-proof-{kind}.json"

    def run(self, section: str) -> None:
        sections: dict[str, Callable[[], Any]] = {
            "members": self.members,
            "decode": self.decode,
            "end to end": self.end_to_end,
            "peers": self.peers,
            "tensorrt": self.tensorrt,
        }
        try:
            self.figures[section] = sections[section]()
        except Exception as error:  # the other sections still run
            self._console.print(f"{section}: {type(error).__name__}: {error}", markup=False)
            self.figures[section] = {"problem": traceback.format_exc().splitlines()[-6:]}

    def _choice(self, runner: str = "torch") -> RunnerChoice:
        return select_runner(
            runner, self._options.device, bundles.load_bundle(self._bundle), precision=None, batch_size=None
        )

    def members(self) -> Any:
        if not self.on_gpu:
            return "needs a GPU"
        batch = self._options.batch_size
        options = self._options
        return {
            "rates": members.measure_rates(
                self._bundle, self._choice(), options.batches, options.compiled_batches
            ),
            "overlap": members.measure_overlap(self._bundle, self._choice(), batch),
        }

    def decode(self) -> Any:
        return decode.measure_grid(
            self._images,
            batch=self._options.batch_size,
            cores=available_cpus(),
            device=0 if self.on_gpu else None,
            timed_s=self._options.timed,
        )

    def end_to_end(self) -> Any:
        """Measure the engine with default options, its variants, and the ceilings of its stages."""
        runs = {"as it comes": self._engine([])}
        if self.on_gpu:
            runs |= {name: self._engine(extra) for name, extra in ABLATIONS.items()}
        ceilings = self._ceilings()
        best = min((rate for rate in ceilings.values() if rate), default=None)
        rate = runs["as it comes"].get("images_per_s")
        return {
            "runs": runs,
            "ceilings": ceilings,
            "efficiency": round(rate / best, 4) if rate and best else None,
        }

    def _ceilings(self) -> dict[str, float | None]:
        """Return the best rate of each stage alone, from the earlier sections."""

        def best(rows: Any) -> float | None:
            return max((row["images_per_s"] for row in rows if row["images_per_s"]), default=None)

        ceilings = {}
        if isinstance(self.figures.get("members"), dict):
            batch = self._options.batch_size
            rows = [row for row in self.figures["members"]["rates"] if row["batch"] == batch]
            ceilings["members"] = best(rows)
        if "decode" in self.figures:
            ceilings["decode"] = best(self.figures["decode"])
        return ceilings

    def _engine(self, extra: list[str], runner: str = "torch") -> dict[str, Any]:
        output = self._work / "results"
        shutil.rmtree(output, ignore_errors=True)
        device = ["--device", self._options.device]
        device += ["--runner", runner, "--batch-size", str(self._options.batch_size)] if self.on_gpu else []
        command = [sys.executable, "-m", "engine.run", self._manifest, "-b", self._bundle, "-o", output]
        done = subprocess.run(
            [*map(str, command), *device, *extra], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"images_per_s": None, "problem": done.stderr.strip().splitlines()[-1:]}
        success = json.loads((output / "_SUCCESS").read_text())
        last = success["last_start"]
        tuning = json.loads((output / "_run.json").read_text())["tuning"]
        tuning.pop("decoding_tried", None)
        return {
            "images_per_s": round(last["rows"] / last["elapsed_s"], 1),
            "errors": success["errors"],
            "stages": last["stages"],
            "limited_by": last["limited_by"],
            "tuning": tuning,
        }

    def peers(self) -> Any:
        """Measure each peer and the engine's speed-up over it in this invocation."""
        rows = peers.measure_rates(
            self._bundle,
            self._images,
            rows=self._options.peer_rows,
            batch=self._options.batch_size,
            workers=available_cpus(),
            device=self._options.device,
        )
        engine_rate = (
            self.figures.get("end to end", {}).get("runs", {}).get("as it comes", {}).get("images_per_s")
        )
        for row in rows:
            rate = row["images_per_s"]
            row["engine_is_faster_by"] = round(engine_rate / rate, 3) if engine_rate and rate else None
        return rows

    def tensorrt(self) -> Any:
        """Build, check and run both plans and compare them with the torch runner, if TensorRT imports."""
        try:
            import tensorrt
        except Exception as error:
            return f"not installed: {type(error).__name__}: {error}"[:200]
        batch = str(self._options.batch_size)
        command = [sys.executable, "-m", "build_engines", str(self._bundle), "--batch-size", batch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"version": tensorrt.__version__, "build": done.stderr.strip().splitlines()[-1:]}
        folder = Path(done.stdout.strip().splitlines()[-1])
        passports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        for passport in passports:
            del passport["layers"]
        try:
            rates = members.measure_rates(
                self._bundle, self._choice("tensorrt"), [self._options.batch_size], []
            )
        except EngineError as error:
            rates = [{"problem": str(error)}]
        return {
            "version": tensorrt.__version__,
            "passports": passports,
            "members": rates,
            "engine": self._engine([], "tensorrt"),
            "engine with torch": self._engine([], "torch"),
        }
