"""What the doctor says of this machine and a manifest: true, in one screen, each problem with its command."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import engine
from engine.bundle import bundle as bundles
from engine.core import extras, hardware
from engine.core.overlap import Meter
from engine.core.records import Batch, Scorer
from engine.core.settings import Settings
from engine.doctor import __main__ as doctor
from engine.doctor import forecast
from engine.doctor.checks import diagnose
from engine.doctor.diagnosis import Diagnosis
from engine.doctor.show import show_diagnosis
from engine.runners.select import select_runner
from engine.runs import profile
from engine.runs.prepare import describe, open_run_manifest, select_for_settings
from engine.sink.parts import part_name
from engine.sink.sink import Sink
from engine.storage.local_folder import LocalFolder
from tests.helpers.bundles import write_bundle
from tests.helpers.processes import Command, run_module
from tests.helpers.profiles import profile_of


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in this process need not be right."""
    monkeypatch.setattr(forecast, "MEASURE_S", 0.1)


def lines_of(diagnosis: Diagnosis) -> dict[str, str]:
    return {label: text for _, lines in diagnosis.sections for label, text in lines}


def shown(diagnosis: Diagnosis, width: int = 100, *, terminal: bool = True) -> str:
    stream = io.StringIO()
    show_diagnosis(diagnosis, Console(file=stream, width=width, force_terminal=terminal, color_system=None))
    return stream.getvalue()


def asked(settings: Settings, *, manifest: bool = True) -> Diagnosis:
    return diagnose(settings, manifest=manifest, say=lambda _: None)


@pytest.fixture
def manifest(archive: Path) -> Path:
    """40 good images, one that is cut off and one that is not there."""
    (archive / "cut.jpg").write_bytes((archive / "image-01.jpg").read_bytes()[:-400])
    names = [*sorted(path.name for path in archive.iterdir()), "gone.png"]
    pd.DataFrame({"path": names, "patient": "DOE^JANE"}).to_csv(archive / "manifest.csv", index=False)
    return archive / "manifest.csv"


@pytest.mark.slow
def test_the_report_of_doctor_is_correct(
    engine_process: Command, manifest: Path, bundle: Path, tmp_path: Path
) -> None:
    arguments = [manifest, "-b", bundle, "-o", "out", "--device", "cpu", "--finish-by", "23:59"]
    done = run_module("engine.doctor", arguments, folder=tmp_path, timeout_s=60)
    assert done.returncode == 0, done.stderr
    log = done.stdout
    assert len(log.splitlines()) <= 45
    for words in (
        "rows                 42",
        "missing              1 of all 42",
        "42 rows: 40 ok, 1 missing, 1 truncated",
        "20 jpeg, 20 png",
        "runs on              ONNX Runtime on the CPU: requested",
        "measured just now on a sample",
        "for 42 rows",
        "done by 23:59",
        "output               out: a new run",
    ):
        assert words in log, log
    assert "--only-errors out" in log  # what is missing is no reason not to start
    dry = engine_process(*arguments, "--dry-run")
    assert dry.returncode == 0
    labels = [line[:22] for line in log.splitlines()]
    assert [line[:22] for line in dry.stdout.splitlines()] == labels
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == [manifest.parent]
    bare = run_module("engine.doctor", ["-b", bundle, "--device", "cpu"], folder=tmp_path, timeout_s=60)
    assert (bare.returncode, "\nmanifest\n" in bare.stdout) == (0, False)


def test_the_size_of_results_is_about_what_a_run_writes(manifest: Path, bundle: Path, tmp_path: Path) -> None:
    settings = Settings(device="cpu", manifest=manifest, bundle=bundle, output=tmp_path / "out")
    told = lines_of(asked(settings))["results"]
    engine.screen(manifest, bundle=bundle, output=tmp_path / "out")
    real = (tmp_path / "out" / "part-00000.parquet").stat().st_size / 1000
    result = re.fullmatch(r"about ([\d.]+) KB", told)
    assert result
    assert 0.6 * real < float(result[1]) < 1.6 * real
    again = lines_of(asked(settings))
    assert again["output"].endswith("out: finished")
    assert "for 0 rows" in again["takes"]


@pytest.mark.parametrize(("members", "classes"), [(1, 2), (2, 3), (2, 14)])
@pytest.mark.parametrize("rows", [40, 4096])
def test_the_bytes_of_results(tmp_path: Path, rows: int, members: int, classes: int) -> None:
    """The constants of the estimate are within 25 % of what the sink writes of random scores."""
    rng = np.random.default_rng(0)
    paths = [f"study-{row // 4:06}/{rng.integers(1 << 40):012x}.dcm" for row in range(rows)]
    pd.DataFrame({"path": paths, "age": rng.integers(20, 90, rows)}).to_csv(tmp_path / "m.csv", index=False)
    names = tuple(f"class {number}" for number in range(classes))
    folder = write_bundle(tmp_path / "bundle", classes=names, weights=(1 / members,) * members)
    settings = Settings(device="cpu", manifest=tmp_path / "m.csv", bundle=folder, output=tmp_path / "out")
    models = bundles.load_bundle(folder)
    manifest = open_run_manifest(settings, tmp_path / "listing.parquet", since=False)
    layout, _, _, run = describe(
        *(settings, None, manifest, models, select_for_settings(settings, models)), earlier=None
    )
    scores = rng.dirichlet(np.ones(classes), (1 + members, rows)).astype(np.float32)
    batch = Batch(
        next(manifest.parts(rows)),
        0,
        status=np.zeros(rows, np.uint8),
        width=rng.integers(1000, 4000, rows, np.int32),
        height=rng.integers(1000, 4000, rows, np.int32),
        headers=[None] * rows,
        index=np.arange(rows),
        members=scores[1:],
        probabilities=scores[0],
        prediction=scores[0].argmax(axis=1),
        confidence=scores[0].max(axis=1),
    )
    (tmp_path / "out").mkdir()
    sink = Sink(LocalFolder(tmp_path / "out"), layout, run.to_metadata(), Scorer())
    for _ in sink.stage([batch], Meter("write")):
        pass
    real = (tmp_path / "out" / part_name(0)).stat().st_size
    assert forecast.results_bytes(manifest, models, parts=1) == pytest.approx(real, rel=0.25)


def test_each_problem_has_a_fix(manifest: Path, bundle: Path, tmp_path: Path) -> None:
    good = Settings(device="cpu", manifest=manifest, bundle=bundle, output=tmp_path / "out")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").touch()
    engine.screen(manifest, bundle=bundle, output=tmp_path / "other", max_pixels=5000)
    names = manifest.with_name("names.csv")
    names.write_text("path\n" + "".join(f"nowhere/{row}.png\n" for row in range(9)))
    clash = manifest.with_name("clash.csv")
    clash.write_text("path,confidence\nimage-00.png,1\n")
    for changes, words, command in (
        (
            {"bundle": tmp_path / "no"},
            r"bundle .*no: it has no ensemble\.json",
            f"python -m training DATA -o {tmp_path}/no",
        ),
        ({"manifest": tmp_path / "no.csv"}, "no such file", "python -m engine.manifest FOLDER"),
        ({"manifest": names}, "9 of 9 files do not exist", "--root FOLDER"),
        ({"root": tmp_path / "no"}, "no such folder", "--root FOLDER"),
        ({"path_column": "file"}, "no column 'file'", "--path-column NAME"),
        ({"manifest": clash}, "names of result columns", "--column-prefix manifest_"),
        ({"output": foreign}, "holds no run", "-o FOLDER"),
        ({"output": tmp_path / "other"}, "another run: max_pixels was 5000", "-o FOLDER"),
        ({"runner": "tensorrt"}, "needs a GPU", "--runner auto"),
        ({"precision": "fp16"}, "needs a GPU", "--precision fp32"),
        ({"device": "cuda:99"}, "GPU", "--device cpu"),
    ):
        diagnosis = asked(replace(good, **changes))
        result = [
            problem for problem in diagnosis.problems if problem.blocking and re.search(words, problem.text)
        ]
        assert result, (words, diagnosis.problems)
        assert command in result[0].fix
        assert diagnosis.exit_status == 2
        assert f"problem: {result[0].text}\n    {result[0].fix}\n" in shown(diagnosis)


def test_no_path_is_shown_with_redact(
    manifest: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ENGINE_SALT", "a salt of sixteen bytes and more")
    monkeypatch.setattr(doctor, "hush_libraries", lambda: None)  # for good, and of this process
    secret = tmp_path / "DOE^JANE"
    manifest.parent.rename(secret)
    for position, status, command in (
        (secret / "manifest.csv", 0, "run"),
        (secret / "DOE.csv", 2, "manifest FOLDER -o"),
        (secret, 2, "manifest MANIFEST -o"),
    ):
        options = [str(position), "-b", str(bundle), "-o", str(secret / "out"), "--redact"]
        options += ["--device", "cpu"]
        assert doctor.main(options) == status
        log = capfd.readouterr()
        for word in ("DOE", "JANE", "image-0", str(tmp_path)):
            assert word not in log.out + log.err, log.out
        assert f"python -m engine.{command}" in log.out
    dry = run_module("engine.run", [*options, "--dry-run"], folder=tmp_path, timeout_s=60)
    assert (dry.returncode, "DOE" in dry.stdout + dry.stderr, "rows" in dry.stdout) == (2, False, False)


def test_a_narrow_terminal_and_hostile_names(manifest: Path, tmp_path: Path) -> None:
    odd = write_bundle(tmp_path / "odd", classes=("[red]normal", "thin bones " * 5))
    diagnosis = asked(Settings(device="cpu", manifest=manifest, bundle=odd))
    diagnosis.add_line("odd", "a\x1b[31m\nname")
    narrow = shown(diagnosis, 40).split("note: ")[0]
    assert max(map(len, narrow.splitlines())) <= 40
    assert "[red]normal" in narrow
    assert "\x1b" not in narrow
    assert "runs on              ONNX" in shown(diagnosis, terminal=False)


def test_the_rate_of_a_tuned_machine_is_taken(manifest: Path, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    models = bundles.load_bundle(copy)
    choice = select_runner("auto", "cpu", models, precision=None, batch_size=None)
    knobs = profile.TunedOptions(batch_size=4)
    tried = [
        profile.Tried(knobs=profile.TunedOptions(), images_per_s=(50.0,)),
        profile.Tried(knobs=knobs, images_per_s=(7.0, 9.0, 8.0)),
    ]
    kept = profile.save_profile(copy, profile_of(profile.machine_key(models, choice), knobs, tried))
    result = lines_of(asked(Settings(device="cpu", manifest=manifest, bundle=copy, output=tmp_path / "out")))
    assert result["rate"] == f"8.0 images/s, as engine.tune measured here (bundle.tuning/{kept.name})"
    assert "batch 4" in result["tuned"]
    kept.write_text("{}")
    result = lines_of(asked(Settings(device="cpu", manifest=manifest, bundle=copy, output=tmp_path / "out")))
    assert "measured just now" in result["rate"]


def test_packages_are_compared_with_the_metadata(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distribution of this project's name that asks for what is not here, found before the real one."""
    for name, lines in {
        extras.PROJECT: [
            *(f"Provides-Extra: {extra}" for extra in ("dicom", "gpu")),
            "Requires-Dist: numpy>=99",
            "Requires-Dist: rich>=13",
            "Requires-Dist: old-friend==2.0",
            'Requires-Dist: not-there-at-all>=1; extra == "dicom"',
            'Requires-Dist: pyarrow>=99; extra == "gpu"',
        ],
        "old-friend": ["Requires-Dist: rich<2", 'Requires-Dist: pyarrow<2; extra == "never"'],
    }.items():
        folder = tmp_path / f"{name.replace('-', '_')}-2.0.dist-info"
        folder.mkdir()
        head = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 2.0"]
        (folder / "METADATA").write_text("\n".join([*head, *lines]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    diagnosis = asked(Settings(device="cpu", manifest=Path(), bundle=bundle), manifest=False)
    told = {problem.text: problem for problem in diagnosis.problems}
    here = extras.package_version("numpy")
    assert told[f"packages: numpy {here} does not fit >=99"].fix == "pip install -c constraints.txt ."
    clash = f"old-friend 2.0 requires rich<2; installed: {extras.package_version('rich')}"
    assert told[clash].blocking
    (gpu,) = (problem for text, problem in told.items() if text.startswith("extra gpu: pyarrow"))
    assert not gpu.blocking  # there is no GPU
    assert lines_of(diagnosis)["extras"] == "complete: none; not complete: dicom, gpu"
    assert diagnosis.exit_status == 2
    assert any(text.startswith("imagecodecs cannot be imported: ") for text in told)
    assert len(told) == 4


def test_requirements_of_a_checkout_are_those_of_its_metadata() -> None:
    """What pip wrote of pyproject.toml when this was installed may be older, but not of another kind."""
    checkout = {(extra, requirement.name) for extra, requirement in extras._checkout_requirements()}
    assert {("", "onnxruntime"), ("gpu", "torch-tensorrt"), ("dicom", "pydicom")} <= checkout
    assert {extra for extra, _ in extras._requirements()} == {extra for extra, _ in checkout}


@pytest.mark.skipif(hardware.has_gpu(), reason="there is a GPU")
def test_a_gpu_that_can_not_be_used(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device files of a GPU without its driver: what PyTorch says of that is real."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 9.0, 81559 MiB, 570.86'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    monkeypatch.setattr(hardware, "driver_version", lambda: "570.86")
    diagnosis = asked(Settings(manifest=Path(), bundle=bundle), manifest=False)
    assert lines_of(diagnosis)["GPU"] == (
        "cuda:0 NVIDIA H100 80GB HBM3, compute capability 9.0, 81559 MiB, driver 570.86"
    )
    assert lines_of(diagnosis)["runs on"].startswith("ONNX Runtime on the CPU: the GPU cannot be used")
    told = " ".join(problem.text for problem in diagnosis.problems if problem.blocking)
    assert "driver is 570.86, but a run needs r580 or newer" in told
    assert "the run would be on the CPU" in told
    assert re.search(r"extra gpu: .*tensorrt-cu13 is missing", told)
    asleep = asked(Settings(manifest=Path(), bundle=bundle, device="cpu"), manifest=False)
    assert asleep.exit_status == 0


def test_wrong_usage(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "hush_libraries", lambda: None)
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["--batch-size", "0"], "whole number"),
        (["--only-errors", "results"], "leave it out"),
        (["a", "b"], "unrecognized"),
    ):
        assert doctor.main([*arguments, "-b", str(bundle)]) == 2
        log = capfd.readouterr()
        assert (log.out, words in log.err) == ("", True), log.err
    assert not list(tmp_path.iterdir())
