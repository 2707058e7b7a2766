"""Synthetic radiographs: true labels, a closed-form posterior, telling structure and a mute gray level."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import fft

from training import synthetic
from training.synthetic import CLASSES, Recipe, draw_sample, posterior

SMALL = (96, 140)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return synthetic.write_archive(
        folder, count=45, seed=3, size_range=SMALL, balance="balanced", processes=1
    )


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as lines:
        return list(csv.DictReader(lines))


def band_energy(pixels: np.ndarray, field_mm: float) -> float:
    """Energy below the joint at periods of 0.62-1.1 mm, after the resize that the networks see."""
    small = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR), np.float64)
    tibia = small[128:168, 84:140] / small[128:168, 84:140].mean()
    power = np.abs(fft.rfft2((tibia - 1) * np.outer(np.hanning(40), np.hanning(56)))) ** 2
    step = field_mm / 224
    k = np.hypot(fft.fftfreq(40, step)[:, None], fft.rfftfreq(56, step))  # cycles per mm
    return float(power[(k > 1 / 1.1) & (k < 1 / 0.62)].sum())


def test_an_image_depends_on_seed_and_index_alone() -> None:
    forward = [draw_sample(5, index, size_range=SMALL) for index in range(3)]
    backward = [draw_sample(5, index, size_range=SMALL) for index in (2, 1, 0)][::-1]
    for first, second in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(first.pixels, second.pixels)
        assert (first.t_score, first.metadata) == (second.t_score, second.metadata)
    assert forward[0].t_score != forward[1].t_score
    assert draw_sample(6, 0, size_range=SMALL).t_score != forward[0].t_score


@pytest.mark.parametrize(
    ("t_score", "name"),
    [(0.3, "normal"), (-1.0, "normal"), (-1.01, "osteopenia"), (-2.49, "osteopenia"), (-2.5, "osteoporosis")],
)
def test_label_follows_the_who_cuts(t_score: float, name: str) -> None:
    assert CLASSES[synthetic.label_of(t_score)] == name


@pytest.mark.parametrize("label", range(3))
def test_a_class_can_be_requested(label: int) -> None:
    drawn = [draw_sample(1, index, label=label, size_range=(64, 64)) for index in range(8)]
    assert {s.label for s in drawn} == {label}
    assert all(synthetic.label_of(s.t_score) == label for s in drawn)


def test_posterior_agrees_with_monte_carlo() -> None:
    rng = np.random.default_rng(0)
    recipe = Recipe(label_noise_sd=0.5)
    t = rng.normal(recipe.t_mean, recipe.t_sd, 2_000_000)
    surrogate = t + rng.normal(0, recipe.label_noise_sd, t.size)
    for s in (-3.5, -2.4, -1.7, -1.05, 0.5):
        near = t[np.abs(surrogate - s) < 0.02]
        counted = [(near >= -1).mean(), ((near > -2.5) & (near < -1)).mean(), (near <= -2.5).mean()]
        exact = posterior(s, 0.5)
        assert exact.dtype == np.float64
        assert exact.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(exact, counted, atol=0.015)
    np.testing.assert_allclose(
        synthetic.class_priors(), [(t >= -1).mean(), 0.42, (t <= -2.5).mean()], atol=0.01
    )


@pytest.mark.parametrize(("sd", "ceiling"), [(0.10, 0.960), (0.15, 0.941), (0.30, 0.881)])
def test_label_noise_sets_the_ceiling(sd: float, ceiling: float) -> None:
    rng = np.random.default_rng(1)
    surrogates = rng.normal(Recipe.t_mean, np.hypot(Recipe.t_sd, sd), 4000)
    assert np.mean([posterior(s, sd).max() for s in surrogates]) == pytest.approx(ceiling, abs=0.01)


@pytest.mark.slow
def test_gray_level_does_not_predict_the_class() -> None:
    drawn = [draw_sample(2, index, label=index % 3, size_range=(128, 128)) for index in range(150)]
    surrogates = [s.surrogate for s in drawn]
    means = np.array([s.pixels.mean() for s in drawn])
    assert abs(np.corrcoef(means, surrogates)[0, 1]) < 0.25
    by_class = [means[label::3].mean() for label in range(3)]
    assert np.ptp(by_class) < 0.5 * means.std()


def test_trabecular_energy_rises_with_quality() -> None:
    def energy(surrogate: float) -> float:
        rngs = [np.random.default_rng(seed) for seed in range(6)]
        drawn = [synthetic.render(rng, surrogate=surrogate, height=320, width=320) for rng in rngs]
        return float(np.median([band_energy(pixels, 70.0) for pixels in drawn]))

    poor, middling, good = energy(-4.0), energy(-1.75), energy(0.5)
    assert 1.15 * poor < middling
    assert 1.15 * middling < good


def test_bone_is_bright_on_darker_flesh_on_black() -> None:
    pixels = synthetic.render(
        np.random.default_rng(0), surrogate=0.0, height=256, width=256, recipe=Recipe(metal_rate=0)
    )
    assert pixels.dtype == np.uint16
    bone, flesh, air = pixels[160:185, 115:140], pixels[160:185, 40:55], pixels[10:60, 240:250]
    assert bone.mean() > 1.2 * flesh.mean() > 3 * air.mean()


def test_sizes_lie_in_range() -> None:
    shapes = [draw_sample(4, index, size_range=(70, 110)).pixels.shape for index in range(30)]
    assert min(map(min, shapes)) >= 70
    assert max(map(max, shapes)) <= 110
    assert len(set(shapes)) > 10
    assert synthetic.render(np.random.default_rng(0), surrogate=0, height=1300, width=1101).shape == (
        1300,
        1101,
    )


def test_archive_holds_the_promised_formats(archive: Path) -> None:
    rows = rows_of(archive)
    files = [archive.parent / row["path"] for row in rows]
    formats, modes, folders = set(), set(), {path.parent for path in files}
    for path in files:
        with Image.open(path) as image:
            formats.add((image.format, image.mode))
            modes.add(image.mode)
            if image.mode == "I;16":
                assert np.asarray(image).max() > 60_000
    assert {("JPEG", "L"), ("PNG", "L"), ("PNG", "I;16")} <= formats
    assert "RGB" in modes
    assert len(folders) > 2
    on_disk = {path for path in archive.parent.rglob("*") if path.is_file()}
    assert on_disk == {*files, archive}


def test_manifest_has_the_correct_labels(archive: Path) -> None:
    rows = rows_of(archive)
    assert list(rows[0]) == ["path", "patient", "t_score", "label"]
    assert {row["patient"] for row in rows} == {f"{index:05d}" for index in range(45)}
    assert all(CLASSES[synthetic.label_of(float(row["t_score"]))] == row["label"] for row in rows)
    assert {name: sum(row["label"] == name for row in rows) for name in CLASSES} == dict.fromkeys(CLASSES, 15)


def test_a_repeated_call_in_other_processes_writes_the_same(archive: Path, tmp_path: Path) -> None:
    """Once over a half-written archive, with two workers."""
    (tmp_path / "manifest.csv").write_text("half")
    again = synthetic.write_archive(
        tmp_path, count=45, seed=3, size_range=SMALL, balance="balanced", processes=2
    )
    assert again.read_bytes() == archive.read_bytes()
    for row in rows_of(again):
        assert (tmp_path / row["path"]).read_bytes() == (archive.parent / row["path"]).read_bytes()


def test_natural_archive_follows_the_prior(tmp_path: Path) -> None:
    rows = rows_of(synthetic.write_archive(tmp_path, count=40, seed=1, size_range=(48, 48), processes=1))
    shares = [sum(row["label"] == name for row in rows) / 40 for name in CLASSES]
    np.testing.assert_allclose(shares, synthetic.class_priors(), atol=0.2)


def test_class_folders(tmp_path: Path) -> None:
    folder = synthetic.write_class_folders(tmp_path / "train", per_class=4, seed=9, size_range=(64, 80))
    assert sorted(path.name for path in folder.iterdir()) == sorted(CLASSES)
    assert all(len(list((folder / name).iterdir())) == 4 for name in CLASSES)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--count", "0"], "at least 1"),
        (["--count", "two"], "invalid int value"),
        (["--count", "1", "--size", "90", "40"], "size_range"),
        (["--count", "1", "--seed", "-1"], "non-negative"),
    ],
)
def test_command_line_errors_take_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = synthetic.main([str(tmp_path / "out"), *arguments])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert complaint in error
    assert error.count("\n") == 1


def test_command_line_writes_an_archive_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from training.synthetic import main; "
        f"status = main([{str(tmp_path)!r}, '--count', '2', '--size', '64', '80']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "manifest.csv"
    assert len(rows_of(tmp_path / "manifest.csv")) == 2


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label must be one of"):
        draw_sample(0, 0, label=3)
    with pytest.raises(ValueError, match="label_noise_sd"):
        Recipe(label_noise_sd=0)
    with pytest.raises(ValueError, match="balance"):
        synthetic.write_archive(tmp_path, count=1, seed=0, balance="even")  # type: ignore[arg-type]
