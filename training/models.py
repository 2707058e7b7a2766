"""Build the members to train, with seeded heads and initial weights."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d
from torchvision.models.resnet import Bottleneck

from engine.core.errors import UsageError
from engine.runners.network import Network, Normalization, build_architecture, make_head, remove_classifier

# The first recipe's weights where there are two. The second scores higher on ImageNet, but its label
# smoothing makes features less useful elsewhere (Kornblith et al. 2021, "Why do better loss functions lead to
# less transferable features?").
PREFERRED_WEIGHTS = "IMAGENET1K_V1"
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def build_network(
    architecture: str,
    *,
    classes: int,
    weights: str,
    seed: int,
    size: tuple[int, int] = (224, 224),
    normalization: Normalization = "none",
) -> Network:
    """Build a network with a new head, both seeded.

    `weights` of the base are "imagenet" (downloaded once), "none" (random) or a file, safetensors or a torch
    state dict. Raises UsageError if they can't be used.
    """
    torch.manual_seed(seed)
    model = build_architecture(architecture)
    classifier = remove_classifier(model, architecture)
    if weights == "none":
        _initialise_weights(model)
    else:
        states = _imagenet_weights(architecture) if weights == "imagenet" else _read_weights(Path(weights))
        _load_base(model, states, f"{architecture}: weights {weights}", classifier)
    features = _count_features(model, size, architecture)
    return Network(model, make_head(features, classes), normalization).to(memory_format=torch.channels_last)


def _count_features(model: nn.Module, size: tuple[int, int], architecture: str) -> int:
    try:
        with torch.inference_mode():
            features = model.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        height, width = size
        raise UsageError(f"{architecture} can't take images of {height} x {width} pixels: {reason}") from None
    return int(features.shape[1])


def _initialise_weights(model: nn.Module) -> None:
    """Set random weights whose features differ between images and survive half precision.

    Batch-normalised random networks amplify small differences layer by layer (Yang et al. 2019, "A mean field
    theory of batch normalization"). So ResNet's residual branches start small, but not at zero, since every
    layer has to matter when forms of the model are compared; in other networks a bias keeps most inputs of
    each ReLU in its linear part. The first filters sum to zero, so they respond to texture, not brightness.
    """
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.05)
        elif isinstance(module, BasicConv2d):
            nn.init.constant_(module.bn.bias, 1.0)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    first = convolutions[0]
    with torch.no_grad():
        first.weight -= first.weight.mean(dim=(1, 2, 3), keepdim=True)


def _imagenet_weights(architecture: str) -> dict[str, Tensor]:
    choices = torchvision.models.get_model_weights(architecture)
    entry = choices[PREFERRED_WEIGHTS] if PREFERRED_WEIGHTS in choices.__members__ else next(iter(choices))
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:  # no network, no space; a hash that differs
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"ImageNet weights of {architecture} can't be downloaded ({reason}); "
            "set --weights FILE, or train from random weights with --weights none"
        ) from None


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UsageError(f"--weights {file}: no such file; allowed: imagenet, none or a file of weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        states = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"--weights {file}: it is neither safetensors nor a torch state dict ({reason})"
        ) from None
    if not isinstance(states, dict) or not all(isinstance(value, Tensor) for value in states.values()):
        raise UsageError(
            f"--weights {file}: it holds a {type(states).__name__}; allowed: a state dict of tensors"
        )
    return states


def _load_base(model: nn.Module, states: dict[str, Tensor], what: str, classifier: str) -> None:
    """Load all but the classifiers, strictly: torchvision's weights, or those of a bundle's member.

    Raises UsageError if the weights are of another network.
    """
    own = model.state_dict().keys()
    if any(name.startswith("base.") for name in states):
        states = {
            name.removeprefix("base."): value for name, value in states.items() if name.startswith("base.")
        }
    base_states = {
        name: value
        for name, value in states.items()
        if name in own or not name.startswith((classifier, *_AUXILIARY))
    }
    try:
        model.load_state_dict(base_states)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"{what} do not fit the network: {reason}") from None
