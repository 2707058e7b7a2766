"""Out of distribution: distances against scikit-learn's, inside the graph, through calibration and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from PIL import Image
from sklearn.covariance import LedoitWolf

import engine
from engine.bundle import bundle as bundles
from engine.bundle.bundle import DISTANCE_OUTPUT
from engine.calibrate import __main__ as calibrate
from engine.calibrate.out_of_distribution import (
    COMPONENTS,
    distance_subgraph,
    extract_features,
    fit_gaussian,
    held_out_distances,
)
from engine.core.errors import UsageError
from engine.runners.onnx import OnnxRunner, create_session
from tests.helpers.bundles import write_bundle
from tests.helpers.images import write_images


@pytest.mark.parametrize(("count", "width"), [(200, 12), (40, 90)])
def test_distances_are_those_of_the_shrunk_covariance(count: int, width: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(0, rng.uniform(0.5, 2, width), (count, width)) + 3
    assert min(count - 1, width) < COMPONENTS
    odd = rng.normal(2, 3, (50, width))
    wanted = LedoitWolf().fit(features).mahalanobis(odd)
    assert np.allclose(fit_gaussian(features).distances(odd) ** 2 * width, wanted)


def test_remaining_components_have_their_mean_variance() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(600, 300)) * np.repeat([5.0, 1.0], [20, 280])
    alike, odd = rng.normal(size=(2, 400, 300)) * np.repeat([5.0, 1.0], [20, 280])
    odd[:, 250:] += 2  # in directions that are not kept apart
    result = fit_gaussian(features)
    assert result.components.shape == (300, COMPONENTS)
    assert np.median(result.distances(alike)) == pytest.approx(1, abs=0.1)
    assert result.distances(odd).min() > np.quantile(result.distances(alike), 0.5)


def test_held_out_distances_are_not_too_small() -> None:
    rng = np.random.default_rng(2)
    features, others = rng.normal(size=(2, 150, 80))
    held = [np.arange(150) % 5 == one for one in range(5)]
    fresh = fit_gaussian(features).distances(others).mean()
    assert fit_gaussian(features).distances(features).mean() < held_out_distances(features, held).mean()
    assert held_out_distances(features, held).mean() == pytest.approx(fresh, rel=0.1)
    with pytest.raises(UsageError, match="the same for all images"):
        fit_gaussian(np.ones((40, 8)))


def test_the_graph_gives_the_distance_and_the_same_logits(bundle: Path) -> None:
    graph = (bundle / "member0.onnx").read_bytes()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 1, 64, 64), np.uint8)
    features = extract_features(graph, pixels, threads=1)
    blocks = pixels.reshape(70, 4, 16, 4, 16).mean(axis=(2, 4)).reshape(70, 16) / 255
    assert np.allclose(features, blocks, atol=1e-6)
    gaussian = fit_gaussian(features)
    session = create_session(graph + distance_subgraph(graph, gaussian), ["CPUExecutionProvider"])
    logits, result = session.run(None, {"pixels": pixels})
    assert np.array_equal(
        logits, create_session(graph, ["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]
    )
    assert (result.dtype, result.shape) == (np.float32, (70,))
    assert np.allclose(result, gaussian.distances(features), rtol=1e-3)


def test_real_networks_have_pooled_features(real_bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 224, 224), np.uint8)
    for name in ("resnet50", "inception_v3"):
        assert extract_features((real_bundle / f"{name}.onnx").read_bytes(), pixels, threads=2).shape == (
            3,
            2048,
        )


def test_graphs_without_a_head_are_refused(bundle: Path) -> None:
    model = onnx.load(bundle / "member0.onnx")
    model.opset_import[0].version = 17
    with pytest.raises(UsageError, match="opset 18 or newer, but this graph has 17"):
        distance_subgraph(model.SerializeToString(), fit_gaussian(np.eye(16)))
    model.opset_import[0].version = 20
    model.graph.node[-1].op_type = "Exp"
    with pytest.raises(UsageError, match="no head of dense layers"):
        distance_subgraph(model.SerializeToString(), fit_gaussian(np.eye(16)))


@pytest.fixture(scope="module")
def archive_with_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("ood") / "images", 150)
    names = sorted(path.name for path in folder.iterdir())
    labels = [("normal", "osteopenia", "osteoporosis")[row % 3] for row in range(150)]
    pd.DataFrame({"path": names, "label": labels}).to_csv(folder / "labelled.csv", index=False)
    # sixteen equal blocks are a corner of what random blocks give; a flat picture is near their mean
    for row in range(5):
        Image.fromarray(np.full((90, 90), 255, np.uint8)).save(folder / f"white-{row}.png")
    return folder


def test_the_run_abstains_on_unusual_images(archive_with_labels: Path, tmp_path: Path, capsys: Any) -> None:
    folder, path = archive_with_labels, write_bundle(tmp_path / "bundle")
    graphs = {name: (path / name).read_bytes() for name in ("member0.onnx", "member1.onnx")}
    labelled = str(folder / "labelled.csv")
    assert calibrate.main([str(path), "--on", labelled, "--ood"]) == 0
    assert "out of distribution (quantile 0.99 of 150 images)" in capsys.readouterr().out
    loaded = bundles.load_bundle(path)
    assert loaded.operating_points
    limits = loaded.operating_points.distances
    assert set(limits) == {"member0", "member1"}
    assert all((path / name).read_bytes() == graph for name, graph in graphs.items())
    files = {member.files[DISTANCE_OUTPUT].path.name for member in loaded.members}
    assert files == {file.name for file in path.glob(f"*{DISTANCE_OUTPUT}*")}
    with OnnxRunner(loaded.members[0], loaded) as runner:
        assert runner.gives_distance

    log: list[str] = []
    engine.screen(folder, output=tmp_path / "out", bundle=path, include=["*.png", "*.jpg"], say=log.append)
    rows = engine.read_results(tmp_path / "out")
    odd = rows.abstain_reasons.map(lambda reasons: "out_of_distribution" in reasons)
    white = rows.path.str.startswith("white")
    assert odd[white].all()
    assert odd[~white].sum() <= 4  # 1 % of 150, more or less
    assert rows.abstain[odd].all()
    assert rows.attrs["provenance"]["out_of_distribution"] == "looked at"
    assert not any("out of distribution" in line for line in log)

    # again, on other images: other nodes, and the old ones are gone
    frame = pd.read_csv(labelled).iloc[:140]
    frame.to_csv(folder / "fewer.csv", index=False)
    assert calibrate.main([str(path), "--on", str(folder / "fewer.csv"), "--ood"]) == 0
    again = {member.files[DISTANCE_OUTPUT].path.name for member in bundles.load_bundle(path).members}
    assert again == {file.name for file in path.glob(f"*{DISTANCE_OUTPUT}*")}
    assert not again & files

    # an altered file, a limit that is none, a file that is missing
    description = path / "ensemble.json"
    good = description.read_text()
    for change, complaint in [
        (lambda data: data["members"][0]["files"].pop(DISTANCE_OUTPUT), "member0: files has no distance"),
        (
            lambda data: data["operating_points"]["abstain"]["distance"]["above"].pop("member1"),
            "'member1' missing",
        ),
        (
            lambda data: data["operating_points"]["abstain"]["distance"]["above"].update(
                member1=float("nan")
            ),
            "distance.above.member1 is NaN: expected a finite number",
        ),
    ]:
        data = json.loads(good)
        change(data)
        description.write_text(json.dumps(data))
        with pytest.raises(UsageError, match=complaint):
            bundles.load_bundle(path)
    description.write_text(good)
    (path / min(again)).write_bytes(b"nothing")
    with pytest.raises(UsageError, match="altered"):
        bundles.load_bundle(path)


def test_without_ood_the_distances_are_removed(
    archive_with_labels: Path, tmp_path: Path, capsys: Any
) -> None:
    path, labelled = write_bundle(tmp_path / "bundle"), str(archive_with_labels / "labelled.csv")
    assert calibrate.main([str(path), "--on", labelled, "--ood"]) == 0
    engine.screen(labelled, output=tmp_path / "out", bundle=path)
    capsys.readouterr()
    assert calibrate.main([str(path), "--on", str(tmp_path / "out"), "--ood"]) == 2
    assert "--ood needs the images, but" in capsys.readouterr().err
    assert calibrate.main([str(path), "--on", str(tmp_path / "out")]) == 0
    assert not list(path.glob(f"*{DISTANCE_OUTPUT}*"))
    assert bundles.load_bundle(path).operating_points.distances == {}  # type: ignore[union-attr]
