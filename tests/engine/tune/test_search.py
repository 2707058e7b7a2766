"""Tuning finds what is faster and keeps the defaults otherwise; a run uses the profile only where it fits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from engine.bundle import bundle as bundles
from engine.core.errors import UsageError
from engine.core.hardware import Gpu
from engine.core.settings import Settings
from engine.core.tuning import DecodeTuning, Tuning
from engine.runs import profile as tuned
from engine.runs.prepare import select_for_settings
from engine.runs.profile import TunedOptions
from engine.runs.run_record import UsedProfile
from engine.tune.search import SearchResult, search
from tests.helpers.bundles import write_bundle
from tests.helpers.processes import ROOT, Command, run_here, run_module
from tests.helpers.profiles import profile_of
from tests.helpers.records import run_record

OTHERS = [TunedOptions(batch_size=size) for size in (1, 2, 4, 16, 32)] + [TunedOptions(workers=1)]


class Machine:
    """A clock, and rates with noise of `spread`, which slow down as the machine grows hot."""

    def __init__(self, rate: Callable[[TunedOptions], float], spread: float, seed: int) -> None:
        self.now, self._rate, self._spread = 0.0, rate, spread
        self._rng = np.random.default_rng(seed)
        self.spent: dict[TunedOptions, float] = {}

    def measure(self, options: TunedOptions, seconds: float) -> float:
        self.now += seconds
        self.spent[options] = self.spent.get(options, 0.0) + seconds
        return self._rate(options) * (1 - 0.2 * self.now / 60) * self._rng.normal(1, self._spread)

    def search(self) -> SearchResult:
        return search(OTHERS, self.measure, seconds=60, min_rows=lambda options: 10, clock=lambda: self.now)


def rates(gains: dict[TunedOptions, float]) -> Callable[[TunedOptions], float]:
    return lambda options: 25 * gains.get(options, 1.0)


def test_the_search_finds_faster_options_and_measures_them_longest() -> None:
    better = TunedOptions(batch_size=16)
    for seed in range(20):
        machine = Machine(
            rates({better: 1.1, TunedOptions(batch_size=32): 1.02, TunedOptions(batch_size=1): 0.7}),
            0.01,
            seed,
        )
        result = machine.search()
        assert result.chosen == better
        assert abs(result.gain - 0.1) < 0.03
        assert machine.now < 66
        others = [
            seconds for options, seconds in machine.spent.items() if options not in (better, TunedOptions())
        ]
        assert machine.spent[better] > 2 * max(others)


def test_the_search_combines_options_that_each_gain() -> None:
    both = TunedOptions(batch_size=16, workers=1)
    machine = Machine(
        rates({TunedOptions(batch_size=16): 1.1, TunedOptions(workers=1): 1.1, both: 1.2}), 0.005, 0
    )
    assert machine.search().chosen == both


def test_noise_and_small_gains_leave_the_defaults() -> None:
    kept = [
        Machine(rates({TunedOptions(batch_size=16): 1.01}), 0.02, seed).search().chosen for seed in range(50)
    ]
    assert kept.count(TunedOptions()) >= 42, "0.97 of many"


def test_slow_candidates_are_skipped() -> None:
    machine = Machine(rates({}), 0.01, 0)
    result = search(
        OTHERS,
        machine.measure,
        seconds=60,
        min_rows=lambda options: 30 * (options.batch_size or 8),
        clock=lambda: machine.now,
    )
    assert result.skipped == [
        TunedOptions(batch_size=16),
        TunedOptions(batch_size=32),
        TunedOptions(workers=1),
    ]
    assert TunedOptions(batch_size=32) not in machine.spent
    with pytest.raises(UsageError, match="give 9 or more"):
        search(OTHERS, machine.measure, seconds=1, min_rows=lambda _: 25, clock=lambda: machine.now)


@pytest.fixture
def own_bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def machine_of(bundle: Path) -> tuned.Machine:
    models = bundles.load_bundle(bundle)
    return tuned.machine_key(models, select_for_settings(Settings(manifest=Path()), models))


def write_profile(bundle: Path, knobs: TunedOptions) -> Path:
    return tuned.save_profile(bundle, profile_of(machine_of(bundle), knobs))


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "_run.json").read_text())


def test_a_tune_of_seconds_ends_with_a_profile_that_a_run_uses(
    engine_run: Command, archive: Path, own_bundle: Path, tmp_path: Path
) -> None:
    done = run_module(
        "engine.tune", [own_bundle, "--sample", archive, "--seconds", "4"], folder=tmp_path, timeout_s=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "images/s" in done.stdout
    assert done.stdout.strip().endswith("this machine")
    (path,) = tmp_path.glob("bundle.tuning/*")
    profile = json.loads(path.read_text())
    assert profile["verdict"] == done.stdout.strip()
    assert profile["sample"]["by_status"]["ok"] > 100
    assert {"batch_size": 1} in [one["knobs"] for one in profile["tried"]]
    run = engine_run(archive, "-b", own_bundle)
    assert run.returncode == 0, run.stderr
    assert f"as tuned for this machine (bundle.tuning/{path.name})" in run.stderr
    recorded = record(tmp_path / "results")
    assert recorded["profile"] == {"file": path.name, "knobs": profile["knobs"]}
    assert recorded["result_options"]["batch_size"] == profile["knobs"].get("batch_size", 8)


def test_a_run_uses_the_profile_and_a_resumed_run_the_record(
    engine_run: Command, archive: Path, own_bundle: Path, tmp_path: Path
) -> None:
    profile = write_profile(own_bundle, TunedOptions(batch_size=16, workers=1))
    first = engine_run(archive, "-b", own_bundle, "-o", "a", "--part-rows", 10)
    assert "as tuned for this machine" in first.stderr
    assert "batch 16, 1 worker" in first.stderr
    assert record(tmp_path / "a")["result_options"]["batch_size"] == 16
    assert record(tmp_path / "a")["profile"]["knobs"] == {"batch_size": 16, "workers": 1}

    named = engine_run(archive, "-b", own_bundle, "-o", "b", "--batch-size", 4)
    assert ": 1 worker\n" in named.stderr
    assert record(tmp_path / "b")["result_options"]["batch_size"] == 4

    write_profile(own_bundle, TunedOptions(batch_size=2))
    for now in ("another", "none"):
        (tmp_path / "a" / "part-00002.parquet").unlink()
        (tmp_path / "a" / "_SUCCESS").unlink(missing_ok=True)
        again = engine_run(archive, "-b", own_bundle, "-o", "a")
        assert again.returncode == 0, (now, again.stderr)
        assert record(tmp_path / "a")["result_options"]["batch_size"] == 16
        profile.unlink(missing_ok=True)


def test_a_profile_of_another_machine_or_bundle_is_ignored_with_a_line(
    engine_run: Command, archive: Path, own_bundle: Path, tmp_path: Path
) -> None:
    other = write_bundle(tmp_path / "other", weights=(0.5, 0.5))
    shutil.copytree(write_profile(other, TunedOptions(batch_size=16)).parent, tmp_path / "bundle.tuning")
    other_machine = structs.replace(machine_of(own_bundle), cores=96)
    tuned.save_profile(own_bundle, profile_of(other_machine, TunedOptions(batch_size=16)))
    run = engine_run(archive, "-b", own_bundle)
    assert run.returncode == 0, run.stderr
    assert "bundle.tuning is ignored: no profile in it is for this machine" in run.stderr
    assert record(tmp_path / "results")["result_options"]["batch_size"] == 8
    assert record(tmp_path / "results")["profile"] is None


def changed(**fields: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def replaced_by_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\x00" * 100),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"a": ' + "1" * 2_000_000),
        replaced_by_a_fifo,
        changed(knobs={"batch_size": 10**9}),
        changed(knobs={"batch_size": True}),
        changed(knobs={"batch_size": 7}),
        changed(knobs={"workers": 100_000}),
        changed(knobs={"workers": "\x1b[2J"}),
        changed(knobs={"runner": "os.system"}),
        changed(knobs={"output": "/"}),
        changed(knobs={"decoding": {"cpu_share": 0.5}}),
        changed(knobs=[1]),
        changed(format=2),
        changed(machine={}),
    ],
)
def test_a_damaged_or_hostile_profile_is_ignored_with_a_line(
    own_bundle: Path, damage: Callable[[Path], object]
) -> None:
    damage(write_profile(own_bundle, TunedOptions(batch_size=16)))
    settings = Settings(manifest=Path(), bundle=own_bundle)
    models = bundles.load_bundle(own_bundle)
    advice = tuned.apply_profile(settings, models, select_for_settings(settings, models), recorded=None)
    assert advice.settings == settings
    assert advice.recorded is None
    assert advice.line is not None
    assert "is ignored: it " in advice.line or "is ignored: " in advice.line
    assert advice.line.isprintable()


def test_gpu_tuning_of_a_profile_applies_only_to_new_runs(own_bundle: Path) -> None:
    decoding = {
        "hw_decoder_load": 0.9,
        "hybrid_huffman_threshold": 0,
        "width_hint": 2000,
        "height_hint": 1700,
        "cpu_share": 0.1,
    }
    settings = Settings(manifest=Path(), bundle=own_bundle)
    models = bundles.load_bundle(own_bundle)
    on_cpu = select_for_settings(settings, models)
    choice = replace(on_cpu, gpu=Gpu(name="stand-in", uuid="GPU-0", capability="9.0", driver="580"))
    settled = DecodeTuning(**decoding)  # type: ignore[arg-type]
    knobs = TunedOptions(cuda_graph=False, compiled=True, decoding=settled)
    for machine in (tuned.machine_key(models, one) for one in (choice, on_cpu)):
        tuned.save_profile(own_bundle, profile_of(machine, knobs))
    refused = tuned.apply_profile(settings, models, on_cpu, recorded=None)
    assert refused.settings == settings
    assert "entries for a GPU" in (refused.line or "")
    new = tuned.apply_profile(settings, models, choice, recorded=None)
    assert new.settings == replace(settings, cuda_graph=False)
    assert new.tuning == Tuning(compiled=True, decoding=settled)
    resumed = tuned.apply_profile(settings, models, choice, recorded=run_record())
    assert resumed.tuning == Tuning()
    assert resumed.settings.runner == "auto"
    profile = UsedProfile(file="a.json", knobs={"runner": "torch"})
    began_with = structs.replace(run_record(runner="torch"), profile=profile)
    assert tuned.apply_profile(settings, models, choice, recorded=began_with).settings.runner == "torch"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nowhere", "--sample", "archive"], 2, "bundle nowhere"),
        (["bundle", "--sample", "nowhere.csv"], 2, "no such file"),
        (["bundle"], 2, "--sample"),
        (["bundle", "--sample", "archive", "--seconds", "0"], 2, "0"),
        (["bundle", "--sample", "archive", "--device", "tpu"], 2, "tpu"),
        (["bundle", "--sample", "gone.txt", "--seconds", "2"], 2, "--root"),
    ],
)
def test_errors_are_one_line(
    archive: Path, own_bundle: Path, tmp_path: Path, arguments: list[str], status: int, said: str
) -> None:
    (tmp_path / "gone.txt").write_text("archive/not-there.jpg\n" * 50)
    done = run_here("engine.tune", arguments, folder=tmp_path)
    assert done.returncode == status
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert not (tmp_path / "bundle.tuning").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_no_profile(archive: Path, own_bundle: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "engine.tune", own_bundle, "--sample", archive],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert any("images/s" in line for line in process.stderr)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 5
    assert "no profile was written" in rest
    assert time.monotonic() - began < 20
    assert not (tmp_path / "bundle.tuning").exists()
