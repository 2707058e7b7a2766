"""Calibration, cached features, both phases: they learn, stop early, keep the best, go on after a kill."""

import numpy as np
import pytest
import torch
from torch import nn

from engine.core.errors import EngineError
from engine.runners.network import Network
from tests.helpers.networks import random_pixels, stripes, tiny_network
from training import models, split
from training.phases import features, fit, heads, whole
from training.settings import FitOptions

CPU = torch.device("cpu")


def test_calibration_gives_the_statistics_of_the_pixels():
    network, pixels = tiny_network(), random_pixels(10)
    features.calibrate_batch_norm(network, pixels)
    planes = torch.from_numpy(pixels).float().div(255).repeat(1, 3, 1, 1)
    with torch.inference_mode():
        convolved = network.base[0](planes).transpose(0, 1).flatten(1)
    assert torch.allclose(network.base[1].running_mean, convolved.mean(dim=1), atol=1e-5)
    assert torch.allclose(network.base[1].running_var, convolved.var(dim=1), rtol=1e-4)
    assert network.base[1].momentum == 0.1
    assert not network.training


def test_inference_does_not_depend_on_the_batch():
    network, pixels = tiny_network(), torch.from_numpy(random_pixels(features.batch_size_for(CPU) + 3))
    done = []
    result = features.infer(network, pixels, progress=done.append)
    assert result.shape == (len(pixels), 3)
    assert result.dtype == torch.float32
    assert done == [features.batch_size_for(CPU), 3]
    assert torch.allclose(result[-1:], features.infer(network, pixels[-1:]), atol=1e-6)


TRAIN = np.array([1, 4, 5])


def extract(folder, network=None, copies=2, train=TRAIN, progress=features.no_progress) -> np.ndarray:
    return features.cached_features(
        network or tiny_network(),
        random_pixels(8),
        train,
        copies=copies,
        seed=0,
        folder=folder,
        device=CPU,
        progress=progress,
    )


def test_only_training_images_get_augmented_copies(tmp_path):
    result = extract(tmp_path)
    assert result.shape == (3, 8, 16)
    plain = features.infer(tiny_network().base, torch.from_numpy(random_pixels(8)).repeat(1, 3, 1, 1) / 255)
    assert np.allclose(result[0], plain, atol=1e-6)
    assert np.isnan(result[1:, [0, 2, 3, 6, 7]]).all()
    assert not np.isnan(result[1:, TRAIN]).any()
    assert np.abs(result[1, TRAIN] - result[2, TRAIN]).max() > 1e-3


def test_features_are_computed_once(tmp_path):
    first = extract(tmp_path).copy()
    (file,) = tmp_path.iterdir()
    kept = np.memmap(file, np.float32, "r+", shape=first.shape)
    kept[0, 3], kept[1, 4] = 7.0, np.nan  # as if row 3 came from before, and a kill had lost row 4
    kept.flush()
    done = []
    again = extract(tmp_path, progress=done.append)
    assert (again[0, 3] == 7.0).all()
    assert np.allclose(again[1, 4], first[1, 4], atol=1e-6)
    assert sum(done) == 8 + 2 * 3
    extract(tmp_path, network=tiny_network(seed=1))
    assert len(list(tmp_path.iterdir())) == 2, "another base has a file of its own"


def test_a_damaged_cache_is_rebuilt(tmp_path):
    expected = extract(tmp_path).copy()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    assert np.array_equal(extract(tmp_path), expected, equal_nan=True)


def blobs(count: int = 120, copies: int = 1) -> tuple[np.ndarray, np.ndarray, split.Split]:
    """Features [copies + 1, N, 16] of three classes, far from mean 0 and scale 1."""
    labels = np.arange(count) % 3
    random = np.random.default_rng(0)
    centres = (labels[:, None] == np.arange(16)).astype(float)
    result = random.normal(centres, 0.1, (copies + 1, count, 16)) * random.uniform(1e-2, 10, 16) + 5
    parts = split.split_dataset(labels, np.arange(count), classes=("a", "b", "c"), seed=0)
    result[1:, np.concatenate([parts.validation, parts.test])] = np.nan
    return result.astype(np.float32), labels, parts


def fit_blobs(folder, blobs_used=None, **changes) -> tuple[fit.FitResult, Network]:
    actual, labels, parts = blobs_used or blobs()
    network = tiny_network()
    fitting = FitOptions(**{"epochs": 60, "patience": 60, "learning_rate": 3e-3, **changes})
    result = heads.fit_head(
        network, actual, labels, parts, fitting, checkpoint=folder / "head.pt", device=CPU
    )
    return result, network


def logits_of(network: Network, found: np.ndarray) -> np.ndarray:
    return features.infer(network.head, torch.from_numpy(found[0])).numpy()


@pytest.mark.parametrize("balance", ["loss", "sampling"])
@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_head_learns_raw_features_and_stops_early(tmp_path, balance, schedule):
    actual, labels, parts = blobs()
    result, network = fit_blobs(tmp_path, epochs=400, patience=10, balance=balance, schedule=schedule)
    assert result.best.validation_macro_f1 == 1.0
    assert (logits_of(network, actual).argmax(axis=1) == labels)[parts.test].all()
    assert len(result.history) < 400


def test_the_weights_of_the_best_epoch_are_kept(tmp_path):
    actual, labels, parts = blobs()
    result, network = fit_blobs(tmp_path, learning_rate=0.5, epochs=30, schedule="plateau")
    targets = torch.from_numpy(labels)
    loss = nn.functional.cross_entropy(
        torch.from_numpy(logits_of(network, actual))[parts.validation],
        targets[parts.validation],
        heads.class_weights_of(targets[parts.train], 3),
    )
    assert float(loss) == pytest.approx(result.best.validation_loss, abs=1e-4)
    assert result.best.epoch < len(result.history)


def test_folding_is_exact():
    actual, _, parts = blobs()
    head, raw = models.make_head(16, 3).eval(), torch.from_numpy(actual[0])
    mean, scale = heads.feature_statistics(raw[parts.train])
    with torch.inference_mode():
        expected = head((raw - mean) / scale)
    heads.fold_standardisation(head, mean, scale)
    with torch.inference_mode():
        assert torch.allclose(head(raw), expected, atol=1e-4)


def test_a_constant_feature_keeps_its_scale():
    mean, scale = heads.feature_statistics(torch.full((5, 2), 1e6))
    assert scale.tolist() == [1.0, 1.0]
    assert mean.tolist() == [1e6, 1e6]


def test_balance_weights_all_classes_equally():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = heads.class_weights_of(labels, 3)
    assert (weights * torch.bincount(labels)).tolist() == pytest.approx([10 / 3] * 3)
    sampling = FitOptions(epochs=1, patience=1, learning_rate=1.0, balance="sampling", batch_size=50)
    many = np.repeat([0, 1, 2], [600, 300, 100])
    drawn = np.concatenate([positions for positions, _ in fit.epoch_batches(many, sampling, 1)])
    assert np.abs(np.bincount(many[drawn]) / 1000 - 1 / 3).max() < 0.06


def test_fitting_follows_the_seed(tmp_path):
    result = blobs()[0]
    runs = [logits_of(fit_blobs(tmp_path / str(n), epochs=5, seed=seed)[1], result)
            for n, seed in enumerate((0, 0, 1))]  # fmt: skip
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_a_loss_that_is_not_a_number_is_one_line(tmp_path):
    result, labels, parts = blobs()
    result[0, parts.train[0]] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(EngineError, match="epoch 1: the training loss is nan"):
        fit_blobs(tmp_path, (result, labels, parts), epochs=3)


def fit_stripes(folder, progress=lambda epoch: None, **changes) -> tuple[fit.FitResult, Network]:
    pixels, labels, parts = stripes(90)
    network = tiny_network()
    fitting = FitOptions(**{"epochs": 4, "patience": 40, "learning_rate": 1e-2, "batch_size": 16, **changes})
    result = whole.fit_whole(
        network,
        pixels,
        labels,
        parts,
        fitting,
        classes=3,
        checkpoint=folder / "whole.pt",
        device=CPU,
        progress=progress,
    )
    return result, network


def test_the_whole_network_learns_more_than_a_frozen_base(tmp_path):
    pixels, labels, parts = stripes(90)
    result, network = fit_stripes(tmp_path, epochs=30)
    actual = features.infer(network, torch.from_numpy(pixels)).argmax(dim=1).numpy()
    assert (actual == labels)[parts.test].mean() > 0.9
    assert result.history[0].train_loss > 2 * result.history[-1].train_loss


class KilledError(Exception):
    pass


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, schedule):
    expected, through = fit_stripes(tmp_path / "a", schedule=schedule)

    def kill(epoch: fit.Epoch) -> None:
        if epoch.epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        fit_stripes(tmp_path / "b", kill, schedule=schedule)
    seen = []
    actual, resumed = fit_stripes(tmp_path / "b", seen.append, schedule=schedule)
    assert actual == expected
    assert seen == expected.history
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_finished_phase_is_not_trained_again(tmp_path):
    first, network = fit_stripes(tmp_path, epochs=2)
    before = (tmp_path / "whole.pt").stat().st_mtime_ns
    again, same = fit_stripes(tmp_path, epochs=2)
    assert again == first
    assert (tmp_path / "whole.pt").stat().st_mtime_ns == before
    assert torch.equal(network.head[0].weight, same.head[0].weight)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    fit_stripes(tmp_path, epochs=1)
    for content in (b"", b"nonsense", (tmp_path / "whole.pt").read_bytes()[:3000]):
        (tmp_path / "whole.pt").write_bytes(content)
        with pytest.raises(EngineError, match="can't be read; to start again, set --overwrite"):
            fit_stripes(tmp_path, epochs=2)


@pytest.mark.gpu
def test_the_whole_network_learns_on_a_gpu(tmp_path):
    pixels, labels, parts = stripes(90)
    device, network = torch.device("cuda"), tiny_network()
    whole.fit_whole(
        network.to(device),
        pixels,
        labels,
        parts,
        FitOptions(epochs=30, patience=30, learning_rate=1e-2, batch_size=16),
        classes=3,
        checkpoint=tmp_path / "whole.pt",
        device=device,
        progress=lambda epoch: None,
    )
    result = features.infer(network, torch.from_numpy(pixels), device=device).argmax(dim=1).numpy()
    assert (result == labels)[parts.test].mean() > 0.9
