"""`python -m training` as a user runs it, in processes of its own, with small members of torchvision."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

import engine
from engine.bundle import bundle as bundles
from tests.helpers.kept import kept
from tests.helpers.processes import ROOT, Command, run_here, run_module
from training.__main__ import main

SMALL = ("--members", "shufflenet_v2_x0_5", "mobilenet_v3_small", "--weights", "none", "--size", "64", "64")
CLASSES = ("normal", "osteopenia", "osteoporosis")


def draw(rng: np.random.Generator, label: int) -> Image.Image:
    """A random texture, no two alike, whose grain tells the class and whose gray level doesn't."""
    height, width = (int(side) for side in rng.integers(70, 110, 2))
    texture = ndimage.gaussian_filter(rng.standard_normal((height, width)), (0.7, 1.5, 3.0)[label])
    gray = rng.uniform(100, 150) + 40 * texture / texture.std() + rng.normal(0, 5, (height, width))
    return Image.fromarray(gray.clip(0, 255).astype(np.uint8))


def write_set(folder: Path, per_class: int, *, seed: int = 0, below: str = "") -> Path:
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        position = folder / below / name
        position.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            draw(rng, label).save(position / f"{name}-{seed}-{number}.jpg", quality=95)
    return folder


def write_labelled(folder: Path) -> Path:
    """75 pictures in class folders; a damaged one, a copy and a contradiction on top."""
    write_set(folder, 25)
    (folder / "normal" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    shutil.copy(folder / "normal" / "normal-0-3.jpg", folder / "normal" / "again.jpg")
    shutil.copy(folder / "normal" / "normal-0-4.jpg", folder / "osteoporosis" / "contradicts.jpg")
    return folder


def write_frozen(folder: Path) -> None:
    images = write_labelled(folder / "images")
    arguments = ["--freeze", "--folds", "2", "--temperature-scaling", "--copies", "1", "--head-epochs", "30"]
    arguments += ["--decode", "fast"]
    run = run_module("training", [images, "-o", "bundle", *SMALL, *arguments], folder=folder, timeout_s=400)
    assert run.returncode == 0, run.stderr
    (folder / "log.txt").write_text(run.stderr + run.stdout)


@pytest.fixture(scope="session")
def frozen(pytestconfig: pytest.Config) -> Path:
    """A folder with images, a bundle of frozen members, its training's folder, and the log. Read-only."""
    return kept(pytestconfig, "frozen", write_frozen)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "images")


@pytest.fixture
def training(tmp_path: Path) -> Command:
    """`python -m training ARGUMENTS` in `tmp_path`, within this process."""
    return lambda *arguments: run_here("training.__main__", arguments, folder=tmp_path)


@pytest.fixture
def training_process(tmp_path: Path) -> Command:
    """`python -m training ARGUMENTS` in a process of its own, in `tmp_path`."""
    return lambda *arguments: run_module("training", arguments, folder=tmp_path, timeout_s=200)


def one_line(run: subprocess.CompletedProcess[str], status: int) -> str:
    """The error: the only line that starts so, and no traceback."""
    assert run.returncode == status, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.rstrip().splitlines()[-1] == errors[0]
    return errors[0]


def evaluation_of(folder: Path) -> dict:
    return json.loads((folder / "bundle" / "evaluation.json").read_text())


def test_the_bundle_loads_and_is_complete(frozen: Path) -> None:
    bundle = bundles.load_bundle(frozen / "bundle")
    assert bundle.classes == CLASSES
    assert [member.name for member in bundle.members] == ["shufflenet_v2_x0_5", "mobilenet_v3_small"]
    assert sum(bundle.weights) == pytest.approx(1)
    assert bundle.temperature != 1.0
    assert bundle.decode == "fast"
    result = evaluation_of(frozen)
    assert result["temperature"]["applied"] == bundle.temperature
    assert (
        result["temperature"]["validation_nll"]["after"] <= result["temperature"]["validation_nll"]["before"]
    )
    assert result["demo"] is True


def test_no_name_of_a_file_is_in_the_bundle(frozen: Path) -> None:
    images = frozen / "images"
    for path in (frozen / "bundle").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(images).encode() not in content, path
            assert b"normal-0-" not in content, path


def test_every_image_is_accounted_for(frozen: Path) -> None:
    images = frozen / "images"
    folder = frozen / "bundle.training"
    split, left_out = (pd.read_csv(folder / name) for name in ("split.csv", "left_out.csv"))
    files = {str(path) for path in images.rglob("*.jpg")}
    assert {*split.path, *left_out.path} == files
    assert len(split) + len(left_out) == len(files) == 78
    assert left_out.path.tolist() == [str(images / "normal" / "broken.jpg")]
    assert "1 of 78 files are left out" in (frozen / "log.txt").read_text()
    assert evaluation_of(frozen)["data"]["left_out"] == {left_out.status[0]: 1}


def test_copies_stay_on_one_side_and_contradictions_are_reported(frozen: Path) -> None:
    folder = frozen / "bundle.training"
    split, copies = (pd.read_csv(folder / name) for name in ("split.csv", "copies.csv"))
    assert (split.groupby("group")["split"].nunique() == 1).all()
    assert sorted(Path(path).name for path in copies.path) == [
        "again.jpg", "contradicts.jpg", "normal-0-3.jpg", "normal-0-4.jpg",
    ]  # fmt: skip
    data = evaluation_of(frozen)["data"]
    assert data["exact"] == {"groups": 2, "images": 4}
    assert data["conflicts"] == {"groups": 1, "images": 2}
    assert data["across"] == {"groups": 0, "images": 0}
    assert (
        "warning: 1 group of copies with contradicting labels; 1 group of identical files"
        in (frozen / "log.txt").read_text()
    )


def test_the_ensemble_is_no_worse_than_its_members_on_validation(frozen: Path) -> None:
    voters = evaluation_of(frozen)["voters"]
    scores = {name: result["validation"]["macro_f1"]["value"] for name, result in voters.items()}
    assert scores["ensemble"] >= max(scores.values()) - 1e-9
    beside = evaluation_of(frozen)["weights_search"]["beside"]
    assert [one["weights"] for one in beside] == [[0.5, 0.5], [0.4, 0.6]]


def test_folds_are_reported_for_every_voter(frozen: Path) -> None:
    result = evaluation_of(frozen)["folds"]
    assert result["count"] == 2
    assert list(result["voters"]) == ["shufflenet_v2_x0_5", "mobilenet_v3_small", "ensemble"]
    for figures in result["voters"].values():
        assert len(figures["macro_f1"]["values"]) == 2
        assert figures["macro_f1"]["mean"] == pytest.approx(np.mean(figures["macro_f1"]["values"]))


def test_the_engine_gives_the_figures_that_training_reports(
    frozen: Path, tmp_path: Path, engine_run: Command
) -> None:
    split = pd.read_csv(frozen / "bundle.training" / "split.csv")
    split[split.split == "test"].to_csv(tmp_path / "test.csv", index=False)
    run = engine_run("test.csv", "-b", frozen / "bundle", "-o", "results")
    assert run.returncode == 0, run.stderr
    rows = engine.read_results(tmp_path / "results")
    assert (rows.status == "ok").all()
    reported = evaluation_of(frozen)["voters"]
    for voter, prefix in (("ensemble", "p_"), ("mobilenet_v3_small", "mobilenet_v3_small_p_")):
        predicted = rows[[f"{prefix}{name}" for name in CLASSES]].to_numpy().argmax(axis=1)
        right = np.mean([CLASSES[one] == label for one, label in zip(predicted, rows.label, strict=True)])
        assert right == pytest.approx(reported[voter]["test"]["accuracy"]["value"])


def test_checkpoints_are_deleted_and_the_bundle_is_not_overwritten(frozen: Path) -> None:
    images = frozen / "images"
    names = {path.name for path in (frozen / "bundle.training").iterdir()}
    assert names == {".lock", "training.json", "split.csv", "copies.csv", "left_out.csv"}
    run = run_here("training.__main__", [images, "-o", "bundle", *SMALL], folder=frozen)
    assert "--overwrite" in one_line(run, 2)


@pytest.mark.slow
def test_training_of_the_whole_network_is_stopped_and_resumed(
    tmp_path: Path, images: Path, training_process: Command
) -> None:
    """A kill during the epochs of the second member; the outcome is that of an undisturbed training."""
    whole = [images, *SMALL, "--epochs", "3", "--seed", "3"]
    undisturbed = training_process(*whole, "-o", "a")
    assert undisturbed.returncode == 0, undisturbed.stderr
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "training", *map(str, whole), "-o", "b"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    second = tmp_path / "b.training" / "work" / "main" / "mobilenet_v3_small-whole.pt"
    deadline = time.monotonic() + 120
    while not second.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 5, log
    assert log.rstrip().endswith("run the same command with --resume to continue")
    assert not (tmp_path / "b").exists()
    assert "--resume" in one_line(training_process(*whole, "-o", "b"), 2)
    assert "seed was 3, is 4" in one_line(training_process(*whole[:-1], "4", "-o", "b", "--resume"), 2)
    resumed = training_process(*whole, "-o", "b", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    first, again = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab")
    assert first == again
    for name in ("shufflenet_v2_x0_5.safetensors", "mobilenet_v3_small.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first["demo"] is False
    assert {one["phase"] for one in first["history"]["mobilenet_v3_small"]} == {"whole"}


@pytest.mark.slow
def test_pretrained_weights_freeze_first_and_fine_tune_then(
    tmp_path: Path, frozen: Path, images: Path, training_process: Command
) -> None:
    weights = [frozen / "bundle" / f"{name}.safetensors" for name in SMALL[1:3]]
    run = training_process(
        images, "-o", "bundle", *SMALL[:3], "--weights", *weights, "--size", "64", "64", "--normalization",
        "imagenet", "--copies", "1", "--head-epochs", "5", "--epochs", "2", "--balance", "sampling",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = evaluation_of(tmp_path)
    phases = [one["phase"] for one in result["history"]["shufflenet_v2_x0_5"]]
    assert phases == ["head"] * 5 + ["whole"] * 2
    rates = {one["phase"]: one["learning_rate"] for one in result["history"]["shufflenet_v2_x0_5"]}
    assert rates["whole"] < rates["head"]
    assert result["recipe"]["weights"] == [path.name for path in weights]


def test_a_given_split_that_leaks_is_refused(tmp_path: Path, training: Command) -> None:
    write_set(tmp_path / "data", 8, below="train")
    write_set(tmp_path / "data", 4, seed=1, below="test")
    original = tmp_path / "data" / "train" / "normal" / "normal-0-0.jpg"
    mirrored = Image.open(original).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(tmp_path / "data" / "test" / "normal" / "aug.jpg", quality=80)
    shutil.copy(original.with_name("normal-0-1.jpg"), tmp_path / "data" / "test" / "normal" / "copy.jpg")
    line = one_line(training("data", "-o", "bundle", "--check-data"), 2)
    assert "4 of 38 images are in 2 groups" in line
    assert "1 with identical files, 2 with copies of any kind, 0 by patient" in line
    run = training("data", "-o", "bundle", "--check-data", "--allow-leak")
    assert run.returncode == 0, run.stderr
    assert "warning: the split leaks: 4 images" in run.stderr
    split = pd.read_csv(tmp_path / "bundle.training" / "split.csv")
    assert split.split.value_counts().to_dict() == {"train": 21, "test": 14, "validation": 3}
    assert not (tmp_path / "bundle").exists()


def test_a_table_with_patients(tmp_path: Path, images: Path, training: Command) -> None:
    files = sorted(path for path in images.rglob("*-0-*.jpg"))
    patients = [f"P{number // 3}" for number in range(len(files))]
    table = pd.DataFrame({"path": files, "label": [path.parent.name for path in files], "patient": patients})
    table.to_csv(tmp_path / "labels.csv", index=False)
    run = training("labels.csv", "-o", "bundle", "--check-data")
    assert run.returncode == 0, run.stderr
    split = pd.read_csv(tmp_path / "bundle.training" / "split.csv").merge(table.astype(str), on="path")
    assert (split.groupby("patient")["split"].nunique() == 1).all()


@pytest.mark.slow
def test_copies_can_be_dropped(tmp_path: Path, images: Path, training: Command) -> None:
    run = training(images, "-o", "bundle", "--check-data", "--duplicates", "drop")
    assert run.returncode == 0, run.stderr
    split = pd.read_csv(tmp_path / "bundle.training" / "split.csv")
    assert len(split) == 77 - 3  # the copy, and both sides of the contradiction
    assert "3 images were left out as copies" in run.stderr


@pytest.mark.slow
def test_shortcuts_are_reported(tmp_path: Path, training: Command) -> None:
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            draw(rng, label).resize((80 + 20 * label, 90)).save(tmp_path / "data" / name / f"{number}.png")
    run = training("data", "-o", "bundle", "--check-data")
    assert run.returncode == 0, run.stderr
    assert "predict the class with a balanced accuracy of 1.00 (chance 0.33)" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "no such file or folder"),
        (["data", "--members", "resnet51"], "no architecture 'resnet51'"),
        (["data", "--weights", "none", "none", "none"], "3 values for 2 members"),
        (["data", "--weights", "absent.pt"], "no such file; allowed: imagenet, none or a file"),
        (["data", "--size", "8", "8"], "--size 8 8: allowed: 32 to 4096"),
        (["data", "--folds", "1"], "--folds 1"),
        (["data", "--epochs", "0"], "--epochs 0: allowed: at least 1"),
        (["data", "--rate", "nan"], "--rate nan"),
        (["data", "--seed", "-1"], "--seed -1"),
        (["data", "--device", "cuda:99"], "--device cuda:99"),
        (["data", "--device", "tpu"], "--device tpu"),
        (["data", "--classes", "normal", "osteopaenia"], "no class folder 'osteopaenia'"),
        (["data", "--optimizer", "sgd"], "unrecognized arguments"),
        (["data", "-o", "data/bundle"], "inside DATA"),
        (["few"], "class 'osteopenia' has 2 images; at least 3"),
        (["broken"], "class 'normal' has 0 readable images"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(images)
    write_set(Path("few"), 4)
    for number in (0, 1):
        Path("few", "osteopenia", f"osteopenia-0-{number}.jpg").unlink()
    write_set(Path("broken"), 3)
    for path in Path("broken", "normal").iterdir():
        path.write_bytes(b"x")
    defaults = [] if "--weights" in arguments or "--members" in arguments else ["--weights", "none"]
    output = [] if "-o" in arguments else ["-o", "bundle"]
    status = main([*arguments, *output, *defaults])
    run = subprocess.CompletedProcess([], status, *capsys.readouterr())
    assert message in one_line(run, 2)
    assert not Path("bundle").exists()


def test_help_names_defaults(tmp_path: Path) -> None:
    run = run_module("training", ["--help-all"], folder=tmp_path, timeout_s=60)
    assert run.returncode == 0
    for expected in ("--freeze", "(cosine)", "(200)", "Research use only"):
        assert expected in run.stdout
