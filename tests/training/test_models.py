"""Any classifier of torchvision as a member; weights from anywhere, and the channel fold."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from engine.bundle.bundle import Bundle, BundleFile, Member
from engine.core.errors import UsageError
from engine.runners.network import Network, OneChannel, _fold_stem, fold_channels, load_member
from tests.helpers.networks import random_pixels, tiny_network
from training import models

SMALL = "shufflenet_v2_x0_5"  # quick to build and run


def build(architecture: str, **changes) -> Network:
    arguments = {"classes": 3, "weights": "none", "seed": 0, "size": (64, 64)} | changes
    return models.build_network(architecture, **arguments)


def run(network: torch.nn.Module, pixels: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return network.eval()(torch.from_numpy(pixels))


@pytest.mark.parametrize(
    ("architecture", "features"),
    [("resnet50", 2048), ("inception_v3", 2048), ("densenet121", 1024), ("mobilenet_v3_small", 576),
     ("convnext_tiny", 768), ("alexnet", 256), ("swin_t", 768), (SMALL, 1024)],
)  # fmt: skip
def test_members_have_the_head_of_the_method(architecture, features):
    network = build(architecture, classes=4, size=(96, 80))
    assert [type(layer).__name__ for layer in network.head] == ["Linear", "ReLU", "Dropout", "Linear"]
    shapes = network.head[0].in_features, network.head[0].out_features, network.head[3].out_features
    assert shapes == (features, 256, 4)
    assert network.head[2].p == 0.5
    assert run(network, random_pixels(2, (96, 80))).shape == (2, 4)


def test_the_only_dropout_before_the_classes_is_the_heads():
    for architecture in ("inception_v3", "mobilenet_v3_small", "efficientnet_b0"):
        modules = build(architecture, size=(96, 96)).base.modules()
        assert not any(isinstance(module, torch.nn.Dropout) for module in modules)


def test_inception_without_its_auxiliary_and_input_transform(tmp_path):
    """Weights as torchvision trains them bring an auxiliary head and its own scaling of the input."""
    published = torchvision.models.inception_v3(aux_logits=True, transform_input=True, init_weights=False)
    torch.save(published.state_dict(), tmp_path / "inception.pth")
    network = build("inception_v3", weights=str(tmp_path / "inception.pth"), size=(96, 96))
    assert network.base.transform_input is False
    assert not any("AuxLogits" in name for name in network.state_dict())
    assert torch.equal(network.base.Mixed_7c.branch1x1.conv.weight, published.Mixed_7c.branch1x1.conv.weight)
    published.aux_logits, published.transform_input, published.fc = False, False, torch.nn.Identity()
    pixels = random_pixels(2, (96, 96))
    with torch.inference_mode():
        expected = published.eval()(torch.from_numpy(pixels).float().repeat(1, 3, 1, 1) / 255)
        assert torch.allclose(network.eval().features(torch.from_numpy(pixels)), expected, atol=1e-4)


def test_a_member_follows_its_seed_and_reads_weights_of_torchvision_and_of_a_bundle(tmp_path):
    first, again, other = build(SMALL), build(SMALL), build(SMALL, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.base.conv1[0].weight, other.base.conv1[0].weight)
    save_file(
        {name: value.contiguous() for name, value in first.state_dict().items()}, tmp_path / "a.safetensors"
    )
    torch.save(torchvision.models.get_model(SMALL).state_dict(), tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        read = build(SMALL, weights=str(tmp_path / name), classes=5, seed=7)
        assert read.head[3].out_features == 5
        if name == "a.safetensors":
            assert torch.equal(read.base.conv5[0].weight, first.base.conv5[0].weight)


def test_a_norm_before_the_classes_keeps_its_weights(tmp_path):
    published = torchvision.models.convnext_tiny()
    torch.nn.init.constant_(published.classifier[0].weight, 3.0)
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    network = build("convnext_tiny", weights=str(tmp_path / "weights.pth"))
    assert network.base.classifier[0].weight.unique().tolist() == [3.0]


def test_bad_weights_are_one_line(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pt")
    for name, message in {
        "absent.pt": "no such file",
        "broken.pt": "neither safetensors nor",
        "broken.safetensors": "neither safetensors nor",
        "list.pt": "it holds a list; allowed: a state dict",
        "other.pt": "do not fit",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            build(SMALL, weights=str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_without_a_connection_the_alternatives_are_named(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", refuse)
    with pytest.raises(UsageError, match=r"--weights FILE.*--weights none"):
        build("resnet50", weights="imagenet")


@pytest.mark.parametrize(
    ("architecture", "size", "message"),
    [
        ("resnet51", (64, 64), "no architecture 'resnet51'"),
        ("squeezenet1_0", (64, 64), "does not end in a linear layer"),
        ("vit_b_16", (64, 64), "can't take images of 64 x 64"),
        ("inception_v3", (32, 32), "can't take images of 32 x 32"),
    ],
)
def test_unsupported_members_are_one_line_errors(architecture, size, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(architecture, size=size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("normalization", "padding", "folds"),
    [("none", 1, True), ("none", 0, True), ("imagenet", 0, True), ("imagenet", 1, False)],
)
def test_the_channel_fold_is_exact_where_it_is_made(normalization, padding, folds):
    network = tiny_network(padding=padding, normalization=normalization)
    one = fold_channels(network)
    assert isinstance(one, OneChannel) == folds
    if folds:
        assert one.base[0].in_channels == 1
        assert (one.base[0].bias is not None) == (normalization == "imagenet")
    pixels = random_pixels(5, (20, 28))
    assert torch.allclose(run(one, pixels), run(network, pixels), atol=1e-6)
    assert network.base[0].in_channels == 3, "the network itself stays as it is"


def test_a_shift_can_not_be_folded_under_zero_padding():
    """Why the case above is left alone: the border would differ."""
    network = tiny_network(padding=1, normalization="imagenet")
    stem = network.base[0]
    wrong = OneChannel(network.base, network.head)
    wrong.base[0] = _fold_stem(stem, network.mean, network.std)
    pixels = random_pixels(5, (20, 28))
    result = run(wrong, pixels)
    network.base[0] = stem
    assert not torch.allclose(result, run(network, pixels), atol=1e-3)


def test_normalization_is_imagenets():
    plain, normalized = tiny_network(), tiny_network(normalization="imagenet")
    pixels = torch.from_numpy(random_pixels(2))
    planes = pixels.float().div(255).repeat(1, 3, 1, 1)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.inference_mode():
        assert torch.allclose(normalized.features(pixels), plain.base((planes - mean) / std), atol=1e-6)
    assert normalized.state_dict().keys() == plain.state_dict().keys()


def test_members_whose_layout_has_a_version_load(tmp_path: Path) -> None:
    """MNASNet refuses weights that do not say which they are, and safetensors keep no such thing."""
    network = models.build_network("mnasnet0_5", classes=3, weights="none", seed=0, size=(64, 64)).eval()
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "weights"
    )
    file = BundleFile(tmp_path / "weights", "")
    member = Member("one", "mnasnet0_5", 1.0, 1.0, {"safetensors": file})
    bundle = Bundle(tmp_path, ("a", "b", "c"), (64, 64), "none", "exact", 1.0, (member,), file, {}, None, "")
    pixels = torch.full((1, 1, 64, 64), 100, dtype=torch.uint8)
    torch.testing.assert_close(load_member(member, bundle)(pixels), network(pixels))
