"""Calibration, fitting and folding, on tiny networks."""

import numpy as np
import pytest
import torch
from torch import nn

from engine.errors import EngineError, UsageError
from training import data, heads, models
from training.settings import Fitting


def tiny_base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def random_pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 16, 12), dtype=np.uint8)


def blobs(count: int = 120) -> tuple[torch.Tensor, np.ndarray, data.Split]:
    """Features [N, 20] of three classes that can be told apart, far from mean 0 and scale 1."""
    labels = np.arange(count) % 3
    random = np.random.default_rng(0)
    features = random.normal(labels[:, None] == np.arange(20), 0.1) * random.uniform(1e-2, 10, 20) + 5
    return torch.from_numpy(features).float(), labels, data.split(labels, seed=0)


def test_calibration_gives_the_statistics_of_the_pixels():
    base, pixels = tiny_base(), random_pixels(10)
    heads.calibrate_batch_norm(base, pixels)
    planes = torch.from_numpy(pixels).float().div(255).repeat(1, 3, 1, 1)
    with torch.inference_mode():
        convolved = base[0](planes).transpose(0, 1).flatten(1)
    assert torch.allclose(base[1].running_mean, convolved.mean(dim=1), atol=1e-5)
    assert torch.allclose(base[1].running_var, convolved.var(dim=1), rtol=1e-4)
    assert base[1].momentum == 0.1
    assert not base.training


def test_features_do_not_depend_on_the_batch():
    base, pixels = tiny_base(), random_pixels(heads.FEATURE_BATCH + 3)
    done = []
    features = heads.infer(base, pixels, done.append)
    assert features.shape == (len(pixels), 8)
    assert features.dtype == torch.float32
    assert done == [heads.FEATURE_BATCH, 3]
    assert torch.allclose(features[-1:], heads.infer(base, pixels[-1:]), atol=1e-6)


def test_folding_is_exact():
    features, _, split = blobs()
    head = models.head(20, 3).eval()
    mean, scale = heads.standardisation(features[split.train])
    with torch.inference_mode():
        expected = head((features - mean) / scale)
    heads.fold(head, mean, scale)
    assert np.abs(heads.logits(head, features) - expected.numpy()).max() <= 1e-5


def test_a_constant_feature_is_harmless():
    features = torch.full((10, 2), 1e6)
    mean, scale = heads.standardisation(features)
    assert scale.tolist() == [1.0, 1.0]
    assert mean.tolist() == [1e6, 1e6]


def test_balance_gives_every_class_the_same_say():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = heads.balance(labels, 3)
    assert (weights * torch.bincount(labels)).tolist() == pytest.approx([10 / 3] * 3)


def fit_blobs(**changes) -> tuple[heads.Fit, np.ndarray]:
    features, labels, split = blobs()
    torch.manual_seed(0)
    head = models.head(20, 3)
    fit = heads.fit(head, features, labels, split, Fitting(**{"epochs": 60, **changes}))
    return fit, heads.logits(head, features)


def test_a_head_learns_raw_features_and_stops_early():
    fit, logits = fit_blobs(epochs=400, patience=10, learning_rate=3e-3)
    _, labels, split = blobs()
    assert fit.macro_f1 == 1.0
    assert (logits.argmax(axis=1) == labels)[split.test].all()
    assert fit.best_epoch <= fit.epochs < 400


def test_the_best_epoch_is_what_remains():
    _, labels, split = blobs()
    fit, logits = fit_blobs(learning_rate=0.3, epochs=30)  # too fast: the last epoch is not the best
    scores, targets = torch.from_numpy(logits)[split.validation], torch.from_numpy(labels)
    balance = heads.balance(targets[split.train], 3)
    loss = nn.functional.cross_entropy(scores, targets[split.validation], balance)
    assert float(loss) == pytest.approx(fit.loss, abs=1e-4)


def test_fitting_follows_the_seed():
    assert np.array_equal(fit_blobs(epochs=5)[1], fit_blobs(epochs=5)[1])
    assert not np.array_equal(fit_blobs(epochs=5)[1], fit_blobs(epochs=5, seed=1)[1])


def test_a_loss_that_is_not_a_number_is_one_line():
    features, labels, split = blobs()
    with pytest.raises(EngineError, match="epoch 1: the validation loss is nan"):
        heads.fit(models.head(20, 3), features * float("nan"), labels, split, Fitting(epochs=3))


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_members_have_the_head_of_the_method(architecture):
    model = models.build(architecture, classes=4, weights="none", seed=0).eval()
    assert [type(layer).__name__ for layer in model.fc] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert (model.fc[0].in_features, model.fc[0].out_features, model.fc[3].out_features) == (2048, 256, 4)
    assert model.fc[2].p == 0.5
    assert not any("AuxLogits" in name for name in model.state_dict())
    base, head = models.split_head(model)
    assert heads.infer(base, random_pixels(1).repeat(7, axis=2).repeat(7, axis=3)).shape == (1, 2048)
    models.join_head(base, head)
    assert model.fc is head


def test_a_member_follows_its_seed_and_reads_its_weights_back(tmp_path):
    first, again = (models.build("resnet50", classes=2, weights="none", seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    read = models.build("resnet50", classes=3, weights=str(tmp_path / "weights.pt"), seed=6)
    assert torch.equal(read.layer4[2].conv3.weight, first.layer4[2].conv3.weight)
    with pytest.raises(UsageError, match="do not fit"):
        models.build("inception_v3", classes=3, weights=str(tmp_path / "weights.pt"), seed=0)


def test_bad_weights_are_one_line(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in {
        "absent.pt": "no such file",
        "broken.pt": "not safetensors nor",
        "broken.safetensors": "not safetensors nor",
        "list.pt": "not a state dict",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            models.build("resnet50", classes=2, weights=str(tmp_path / name), seed=0)
        assert "\n" not in str(caught.value)


def test_no_network_names_the_ways_on(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", refuse)
    with pytest.raises(UsageError, match=r"--weights FILE.*--weights none"):
        models.build("resnet50", classes=2, weights="imagenet", seed=0)
