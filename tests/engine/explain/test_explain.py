"""Explanations: maps whose truth is known, and pictures of the rows of real runs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import boto3
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

import engine
from engine.bundle.bundle import Bundle
from engine.core.errors import UsageError
from engine.explain import __main__ as explain_command
from engine.explain import drawing, explain, integrated_gradients
from engine.explain.integrated_gradients import Explainer, Explanation
from engine.runners.network import Network
from engine.scoring.ensemble import combine_logits
from engine.storage import objects
from tests.helpers.bundles import write_real_bundle
from tests.helpers.images import write_images
from tests.helpers.networks import random_pixels, tiny_network
from tests.helpers.servers import CREDENTIALS
from training import models

SIZE = (32, 32)
UPPER_LEFT = (slice(0, 16), slice(0, 16))


class Blinkered(Network):
    """Sees one part of the picture only."""

    part = UPPER_LEFT

    def planes(self, gray: torch.Tensor) -> torch.Tensor:
        planes = torch.zeros(len(gray), 3, *SIZE)
        planes[:, :, *self.part] = super().planes(gray)[:, :, *self.part]
        return planes


def ensemble_of(
    *networks: Network, weights: Sequence[float], temperatures: Sequence[float] = (), temperature: float = 1.0
) -> Explainer:
    members = [
        SimpleNamespace(architecture="tiny", temperature=one) for one in temperatures or [1.0] * len(networks)
    ]
    bundle = SimpleNamespace(size=SIZE, weights=weights, members=members, temperature=temperature)
    return Explainer(cast(Bundle, bundle), networks)


def decided(network: Network, size: tuple[int, int] = SIZE) -> Network:
    """With a head that tells random pictures apart: logits of standard deviation 1."""
    with torch.no_grad():
        features = network.features(torch.from_numpy(random_pixels(64, size, seed=9)))
        first, last = network.head[0], network.head[3]
        first.weight.copy_(torch.randn_like(first.weight) / features.std(0).clamp_min(0.01))
        first.bias.copy_(-first.weight @ features.mean(0))
        logits = network.head(features)
        last.weight.div_(logits.std(0)[:, None])
        last.bias.copy_(-(logits - last.bias).mean(0) / logits.std(0))
    return network


def explained(
    one: Explainer, pixels: np.ndarray, references: np.ndarray, index: int = 2
) -> list[Explanation]:
    one.set_references(one.extract_features(references))
    return one.explain(one.extract_features(pixels), index)


def inside(part: np.ndarray, whole: np.ndarray) -> float:
    return float(np.abs(part).sum() / np.abs(whole).sum())


def test_a_member_that_sees_one_quadrant_is_explained_there() -> None:
    """The truth is known: the others' pixels differ everywhere, and only this quadrant's are looked at."""
    whole, seeing = tiny_network(seed=1), decided(tiny_network(seed=2))
    blinkered = decided(Blinkered(whole.base, whole.head))
    pixels, references = random_pixels(3, SIZE, seed=1), random_pixels(8, SIZE, seed=2)
    for one in explained(ensemble_of(blinkered, seeing, weights=(0.5, 0.5)), pixels, references):
        first, second = one.maps
        assert inside(first[:20, :20], first) > 0.9  # a cell of the last maps reaches over the edge
        assert inside(second[:20, :20], second) < 0.7


def test_a_change_in_one_quadrant_is_explained_there() -> None:
    """The truth is known: the picture is the reference, but for one quadrant."""
    references = random_pixels(1, SIZE, seed=3)
    pixels = np.repeat(references, 6, axis=0)
    pixels[:, :, 16:, 16:] = random_pixels(6, SIZE, seed=4)[:, :, 16:, 16:]
    whole = ensemble_of(decided(tiny_network()), weights=(1.0,))
    result = [one for index in range(3) for one in explained(whole, pixels, references, index)]
    assert max(abs(one.probability - one.typical) for one in result) > 0.05
    for one in result:
        assert inside(one.maps[0, 12:, 12:], one.maps[0]) > 0.9


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_shares_add_up_to_the_difference_of_probabilities(temperature: float) -> None:
    networks = [decided(tiny_network(seed=seed)) for seed in range(3)]
    weights, temperatures = (0.2, 0.5, 0.3), (1.0, 1.7, 0.8)
    pixels, references = random_pixels(4, SIZE, seed=5), random_pixels(8, SIZE, seed=6)
    one = ensemble_of(*networks, weights=weights, temperatures=temperatures, temperature=temperature)
    logits = np.stack([network(torch.from_numpy(pixels)).detach().numpy() for network in networks])
    members, whole = combine_logits(
        logits, weights=weights, temperatures=temperatures, temperature=temperature
    )
    result = one.probabilities(one.extract_features(pixels))
    np.testing.assert_allclose(result[0], members, atol=1e-6)
    np.testing.assert_allclose(result[1], whole, atol=1e-6)
    for index in range(3):
        for position, each in enumerate(explained(one, pixels, references, index)):
            assert each.probability == pytest.approx(whole[position, index], abs=1e-6)
            assert sum(each.shares) == pytest.approx(
                each.probability - each.typical, abs=integrated_gradients.MAX_COMPLETENESS_ERROR
            )
            assert each.maps.shape == (3, *SIZE)


def test_a_sure_probability_is_explained_too() -> None:
    """Where the gradient at the image itself vanishes: Grad-CAM would show nothing."""
    network = decided(tiny_network(seed=4))
    with torch.no_grad():
        network.head[3].weight.mul_(20)
        network.head[3].bias.mul_(20)
    pixels, references = random_pixels(24, SIZE, seed=7), random_pixels(8, SIZE, seed=8)
    result = explained(ensemble_of(network, weights=(1.0,)), pixels, references)
    sure = [one for one in result if one.probability > 0.9999]
    assert sure
    for one in sure:
        assert sum(one.shares) == pytest.approx(one.probability - one.typical, abs=0.02)
        assert one.probability - one.typical > 0.1


def test_other_weights_in_the_head_give_other_maps() -> None:
    """Adebayo et al. 2018: a map that stays when what is learnt goes explains nothing of it."""
    pixels, references = random_pixels(6, SIZE, seed=10), random_pixels(8, SIZE, seed=11)
    network = decided(tiny_network(seed=5))
    before = explained(ensemble_of(network, weights=(1.0,)), pixels, references)
    again = explained(ensemble_of(network, weights=(1.0,)), pixels, references)
    torch.manual_seed(99)
    network.head = models.make_head(16, 3).eval()
    after = explained(ensemble_of(decided(network), weights=(1.0,)), pixels, references)
    for one, two, other in zip(before, again, after, strict=True):
        np.testing.assert_array_equal(one.maps, two.maps)
        assert abs(np.corrcoef(one.maps.ravel(), other.maps.ravel())[0, 1]) < 0.9
    alike = [
        np.corrcoef(one.maps.ravel(), other.maps.ravel())[0, 1]
        for one, other in zip(before, after, strict=True)
    ]
    assert abs(np.mean(alike)) < 0.5


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("resnet18", (64, 64)),
        ("densenet121", (64, 64)),  # a ReLU without a module before the pooling
        ("mobilenet_v3_small", (64, 48)),
        ("convnext_tiny", (64, 64)),  # a norm behind the pooling
        ("swin_t", (64, 64)),  # channels last
        ("shufflenet_v2_x0_5", (64, 64)),  # no module that pools
        ("vgg11", (64, 64)),
    ],
)
def test_networks_are_cut_where_they_pool(architecture: str, size: tuple[int, int]) -> None:
    network = models.build_network(architecture, classes=3, weights="none", seed=0, size=size)
    pixels = torch.from_numpy(random_pixels(2, size))
    with torch.no_grad():
        eye = integrated_gradients.PooledMember(network.eval(), architecture, size)
        maps = eye.maps(pixels)
        assert maps.shape[2] * maps.shape[3] >= 2
        torch.testing.assert_close(eye.logits(maps.mean((2, 3))), network(pixels))


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("resnet18", [0, 32, 64, 96]),  # it pads, and so looks half a cell up and left
        ("mobilenet_v3_small", [0, 32, 64, 96]),  # with squeeze and excitation
        ("vgg11", [16, 48, 80, 112]),
        ("convnext_tiny", [16, 48, 80, 112]),
    ],
)
def test_cells_are_drawn_where_they_look(architecture: str, expected: list[int]) -> None:
    """By the arithmetic of strides and padding."""
    network = models.build_network(architecture, classes=3, weights="none", seed=0, size=(128, 64)).eval()
    rows, columns = integrated_gradients.PooledMember(network, architecture, (128, 64)).centres
    np.testing.assert_allclose(rows, expected, atol=2)
    np.testing.assert_allclose(columns, expected[:2], atol=2)


def test_a_network_that_does_not_pool_is_refused_by_name() -> None:
    network = models.build_network("vit_b_32", classes=3, weights="none", seed=0, size=(224, 224))
    with pytest.raises(UsageError, match=r"vit_b_32 does not compute .* average of its last feature maps"):
        integrated_gradients.PooledMember(network.eval(), "vit_b_32", (224, 224))


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real networks at 96 x 96; read-only for tests."""
    folder = tmp_path_factory.mktemp("small")
    images = sorted(write_images(folder / "images", 24).iterdir())
    weights = {"resnet18": 0.4, "alexnet": 0.6}
    return write_real_bundle(folder / "bundle", images, weights=weights, size=(96, 96))


@pytest.fixture(scope="module")
def finished(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten images, one of them missing, and `results` of them; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    images = sorted(write_images(folder / "images", 9).iterdir())
    paths = [f"images/{image.name}" for image in images]
    pd.DataFrame({"path": [*paths[:4], "images/gone.png", *paths[4:]]}).to_csv(folder / "m.csv", index=False)
    engine.screen(folder / "m.csv", output=folder / "results", bundle=small_bundle, part_rows=4)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Results whose images are in `images`, as the run found them there."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    facts = json.loads((folder / "results/_run.json").read_text())
    facts["result_options"]["root"] = str(folder)
    (folder / "results/_run.json").write_text(json.dumps(facts))
    return folder / "results"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = explain_command.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


@pytest.mark.slow
def test_pictures_of_the_requested_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parent / "images/image-02.png").write_bytes((run.parent / "images/image-06.png").read_bytes())
    (run.parent / "images/image-05.jpg").unlink()
    status, log = command(capsys, run, "--rows", "9,0-6,12", "--class", "osteopenia", "--workers", 2)
    assert status == 0, log
    assert "row 2: its image has changed since the run (it has another size)" in log
    assert "row 4 has no score to explain: its status is missing" in log
    assert "row 6: its image cannot be read as in the run: missing" in log
    assert "row 12 does not exist; the run has rows 0 to 9" in log
    assert "5 of 7 rows explained" in log
    assert "image-" not in log
    folder = run / "explanations"
    index = json.loads((folder / "index.json").read_text())
    rows = engine.read_results(run).set_index("row")
    assert index["run_id"] == rows.attrs["provenance"]["run_id"]
    assert (index["class"], index["method"]) == ("osteopenia", integrated_gradients.METHOD)
    assert index["compared_with"] == {"rows": [0, 1, 3, 5, 7, 8, 9]}
    assert [item["row"] for item in index["rows"]] == [9, 0, 1, 3, 5]
    names = {"index.json"}
    for item in index["rows"]:
        assert item["class"] == "osteopenia"
        assert item["probability"] == pytest.approx(rows.p_osteopenia[item["row"]], abs=1e-3)
        change = item["probability"] - item["typical"]
        assert sum(item["shares"].values()) == pytest.approx(
            change, abs=integrated_gradients.MAX_COMPLETENESS_ERROR
        )
        assert list(item["voters"]) == ["ensemble", "resnet18", "alexnet"]
        for voter, name in item["voters"].items():
            assert name == f"row-{item['row']:09d}-{voter}.png"
            names.add(name)
            with Image.open(folder / name) as picture:
                assert picture.format == "PNG"
                assert min(picture.size) > 448
    assert {path.name for path in folder.iterdir()} == names
    # once more, other rows: what was there before goes, and the same row gives the same
    shown = np.asarray(Image.open(folder / "row-000000009-ensemble.png")).astype(int)
    assert command(capsys, run, "--top", 2, "--rows", 9, "--class", "osteopenia")[0] == 0
    again = [item["row"] for item in json.loads((folder / "index.json").read_text())["rows"]]
    asked = [9, *rows.p_osteopenia.nlargest(2).index]
    assert again == [row for row in dict.fromkeys(asked) if row not in (2, 6)]
    assert len(list(folder.iterdir())) == 1 + 3 * len(again)
    now = np.asarray(Image.open(folder / "row-000000009-ensemble.png")).astype(int)
    assert np.abs(now - shown).mean() < 0.05  # sums depend on the batch a little


@pytest.mark.slow
def test_the_same_size_and_another_picture_is_not_explained(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = run.parent / "images/image-04.png"
    with Image.open(image) as opened:
        opened.rotate(180).save(image)
    status, log = command(capsys, run, "--rows", "5")
    assert status == 1
    assert "row 5: its image has changed since the run (a probability differs by" in log
    assert "none of the 1 rows could be explained; nothing was written" in log
    assert not (run / "explanations").exists()


@pytest.mark.slow
def test_unexplainable_rows_are_one_line_errors(
    run: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        status, log = command(capsys, run, *arguments)
        assert status == 2, log
        assert log.count("\n") == 1
        return log

    assert "allowed: normal, osteopenia, osteoporosis" in refused("--class", "arthrosis")
    assert "was requested; only runs with operating points abstain" in refused("--abstained")
    assert "'4-2' is not a row number or range; allowed: such as 3,17,40-45" in refused("--rows", "1,4-2")
    assert "is more than 10000 rows" in refused("--rows", "0-10000")
    status, log = command(capsys, run, "--rows", "4,10")
    assert status == 2
    assert "no scored row of it was requested" in log
    assert "not the bundle that" in refused("-b", bundle)
    assert "allowed: cpu, cuda:N" in refused("--device", "gpu")
    assert "contains a foreign file" in refused("-o", run)
    assert "works only with --redact" in refused("--paths-from", "m.csv")
    (run / "_SUCCESS").unlink()
    (run / "part-00001.parquet").unlink()
    assert "the run is not finished" in refused()
    (run / "_run.json").write_text('{"run_id": 3, "result_options": {"bundle_sha256": []}}')
    assert "results" in refused("-b", bundle)
    monkeypatch.setattr(explain, "find_spec", lambda name: None if name == "captum" else object())
    log = refused("-b", bundle)
    assert "explanations need captum; install with: pip install -c constraints.txt '.[explain]'" in log


@pytest.mark.slow
def test_abstained_rows_are_explained_and_a_new_run_deletes_explanations(
    run: Path, small_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        file = run / f"part-{index:05}.parquet"
        table = pq.read_table(file)
        abstain = [None if row == 4 else row in (3, 7) for row in table["row"].to_pylist()]
        position = table.column_names.index("abstain")
        pq.write_table(table.set_column(position, "abstain", pa.array(abstain, pa.bool_())), file)
    facts = json.loads((run / "_run.json").read_text())
    (run / "_run.json").write_text(json.dumps(facts | {"target": "normal"}))
    status, log = command(capsys, run, "--abstained", "--rows", 7)
    assert status == 0, log
    index = json.loads((run / "explanations/index.json").read_text())
    assert index["class"] == "normal"
    assert [item["row"] for item in index["rows"]] == [7, 3]
    engine.screen(run.parent / "m.csv", output=run, bundle=small_bundle, overwrite=True)
    assert not (run / "explanations").exists()


@pytest.mark.slow
def test_a_redacted_run_of_an_archive(
    finished: Path,
    small_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINE_SALT", "a salt of some length")
    shutil.make_archive(str(tmp_path / "a"), "tar", finished / "images")
    paths = [f"a.tar::image-{row:02}{('.png', '.jpg')[row % 2]}" for row in range(3)]
    pd.DataFrame({"path": paths}).to_csv(tmp_path / "m.csv", index=False)
    output = tmp_path / "out"
    engine.screen(tmp_path / "m.csv", output=output, bundle=small_bundle, redact=True)
    status, log = command(capsys, output, "-b", small_bundle)
    assert status == 2
    assert "its paths are hashed; give --redact and --paths-from" in log
    redacted = ("-b", small_bundle, "--redact", "--paths-from", tmp_path / "m.csv")
    status, log = command(capsys, output, *redacted, "-o", tmp_path / "other")
    assert status == 0, log
    text = (tmp_path / "other/index.json").read_text()
    index = json.loads(text)
    assert len(index["rows"]) == 3
    assert index["compared_with"] == {"canaries": 16}  # three rows are no crowd
    assert not [name for name in ("image-", "a.tar") if name in text]


@pytest.mark.slow
def test_results_and_images_in_an_object_store(
    finished: Path, small_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    objects._open_s3.cache_clear()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="explained")
        for image in (finished / "images").iterdir():
            client.upload_file(str(image), "explained", f"images/{image.name}")
        client.upload_file(str(finished / "m.csv"), "explained", "m.csv")
        engine.screen("s3://explained/m.csv", output="s3://explained/out", bundle=small_bundle)

        def kept() -> list[str]:
            result = client.list_objects_v2(Bucket="explained", Prefix="out/explanations/")
            names = (Path(one["Key"]).name for one in result.get("Contents", []))
            return [name for name in names if name != "explanations"]  # what stands for the folder

        for row in (3, 1):
            status, log = command(capsys, "s3://explained/out", "--rows", row)
            assert status == 0, log
            voters = ("alexnet", "ensemble", "resnet18")
            assert kept() == ["index.json", *(f"row-{row:09d}-{voter}.png" for voter in voters)]
        engine.screen(
            "s3://explained/m.csv", output="s3://explained/out", bundle=small_bundle, overwrite=True
        )
        assert kept() == []
    finally:
        server.stop()
        objects._open_s3.cache_clear()


def test_a_picture_takes_any_class_name_and_shape(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
    change = np.linspace(-1, 1, 64, dtype=np.float32) * np.ones((48, 1), np.float32)
    caption = drawing.Caption(r"row 1: $\frac{ <b>_^", "text", "unit", "foot")
    for name in ("one.png", "two.png"):
        drawing.draw_explanation(tmp_path / name, gray, change, limit=1.0, caption=caption)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height = round(48 * drawing.PICTURE_SIDE / 64)
    shown = pixels[-drawing._FOOT - height : -drawing._FOOT]
    left = shown[:, drawing._MARGIN : drawing._MARGIN + drawing.PICTURE_SIDE]
    right = shown[
        :, 2 * drawing._MARGIN + drawing.PICTURE_SIDE : 2 * drawing._MARGIN + 2 * drawing.PICTURE_SIDE
    ]
    assert (left[..., 0] == left[..., 2]).all()  # as it is, gray
    assert (right[:, :60, 2] > right[:, :60, 0]).all()  # lowered: blue
    assert (right[:, -60:, 0] > right[:, -60:, 2]).all()  # raised: orange
