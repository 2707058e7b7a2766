"""The members: torchvision's networks with the head of the method, from uint8 pixels to logits."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import (
    Inception_V3_Weights,
    ResNet50_Weights,
    WeightsEnum,
    inception_v3,
    resnet50,
)
from torchvision.models.inception import BasicConv2d
from torchvision.models.resnet import Bottleneck

from engine.errors import UsageError

# ResNet50: the first recipe's weights. The second scores higher on ImageNet, but its label smoothing makes
# frozen features less useful elsewhere (Kornblith et al. 2021, "Why do better loss functions lead to less
# transferable features?").
IMAGENET: dict[str, WeightsEnum] = {
    "resnet50": ResNet50_Weights.IMAGENET1K_V1,
    "inception_v3": Inception_V3_Weights.IMAGENET1K_V1,
}
ARCHITECTURES = tuple(IMAGENET)
FEATURES = 2048  # what both bases give
_NOT_IN_THE_BASE = ("fc.", "AuxLogits.")


class PixelsToLogits(nn.Module):
    """What a bundle's graph does: uint8 [N, 1, H, W] to float32 logits [N, C], scaling and all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        gray = pixels.to(torch.float32) / 255.0
        logits: Tensor = self.model(torch.cat((gray, gray, gray), dim=1))
        return logits


def build(architecture: str, *, classes: int, weights: str, seed: int) -> nn.Module:
    """A network [N, 3, H, W] -> logits [N, classes] with a new head `fc`, both seeded.

    `weights` of the base: "imagenet" (downloaded once), "none" (random) or a file, safetensors or a torch
    state dict. Raises UsageError.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"no architecture {architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    torch.manual_seed(seed)
    model = _network(architecture)
    if weights == "none":
        _initialise(model)
    else:
        states = _imagenet(architecture) if weights == "imagenet" else _read(Path(weights))
        _load_base(model, states, f"{architecture}: weights {weights}")
    model.fc = head(FEATURES, classes)
    return model


def head(features: int, classes: int) -> nn.Sequential:
    """Features [N, F] to logits [N, C]."""
    return nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, classes))


def split_head(model: nn.Module) -> tuple[nn.Module, nn.Sequential]:
    """Take the head off, in place: (base that gives features [N, F], head)."""
    taken = model.fc
    assert isinstance(taken, nn.Sequential)
    model.fc = nn.Identity()
    return model, taken


def join_head(base: nn.Module, head: nn.Sequential) -> None:
    """Undo `split_head`."""
    base.fc = head


def _network(architecture: str) -> nn.Module:
    """The bare network. InceptionV3 without its own scaling of the input (ours is [0, 1]), without the
    auxiliary head (it can't run at 224) and without its dropout (the head has one)."""
    if architecture == "resnet50":
        return resnet50()
    model = inception_v3(transform_input=False, aux_logits=False, init_weights=False)
    model.dropout = nn.Identity()
    return model


def _initialise(model: nn.Module) -> None:
    """A random base whose features still tell images apart and survive half precision.

    Batch-normalised random networks amplify small differences layer by layer (Yang et al. 2019, "A mean field
    theory of batch normalization"). Two usual remedies: ResNet's residual branches start small (not at zero:
    every layer has to count when forms of the model are compared), and where there are none a bias keeps most
    of each ReLU's inputs in its linear part. The first filters sum to zero: they see texture, not brightness.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.05)
        elif isinstance(module, BasicConv2d):
            nn.init.constant_(module.bn.bias, 1.0)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        first.weight -= first.weight.mean(dim=(1, 2, 3), keepdim=True)


def _imagenet(architecture: str) -> dict[str, Tensor]:
    try:
        return dict(IMAGENET[architecture].get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:  # no network, no space; a hash that differs
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"ImageNet weights of {architecture} can't be downloaded ({reason}); "
            "give them with --weights FILE, or train on a random base with --weights none"
        ) from None


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UsageError(f"--weights {file}: no such file; allowed: imagenet, none or a file of weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        states = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"--weights {file}: not safetensors nor a torch state dict ({reason})") from None
    if not isinstance(states, dict) or not all(isinstance(value, Tensor) for value in states.values()):
        raise UsageError(f"--weights {file}: a {type(states).__name__}, not a state dict of tensors")
    return states


def _load_base(model: nn.Module, states: dict[str, Tensor], what: str) -> None:
    """Load all but the heads, strictly. Raises UsageError for weights of another network."""
    base = {name: value for name, value in states.items() if not name.startswith(_NOT_IN_THE_BASE)}
    head_only = {
        name: value for name, value in model.state_dict().items() if name.startswith(_NOT_IN_THE_BASE)
    }
    try:
        model.load_state_dict(base | head_only)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"{what} do not fit: {reason}") from None
