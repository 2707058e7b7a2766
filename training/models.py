"""The members: any classifier of torchvision with the head of the method, from uint8 pixels to logits."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d
from torchvision.models.resnet import Bottleneck

from engine.errors import UsageError
from training.settings import Normalization

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The first recipe's weights where there are two. The second scores higher on ImageNet, but its label
# smoothing makes features less useful elsewhere (Kornblith et al. 2021, "Why do better loss functions lead to
# less transferable features?").
PREFERRED_WEIGHTS = "IMAGENET1K_V1"
# Pretrained weights make torchvision scale the input of these itself, wrongly for [0, 1], and build auxiliary
# heads that can't run at 224 x 224: the network is built without both and takes the weights that remain.
_BARE = {"aux_logits": False, "transform_input": False, "init_weights": False}
_BARE_OPTIONS: dict[str, dict[str, Any]] = {"inception_v3": _BARE, "googlenet": _BARE}
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


class Network(nn.Module):
    """One member: gray levels [N, 1, H, W] to float32 logits [N, C], scaling and all.

    `base` is torchvision's network from [N, 3, H, W] to features [N, F], `head` the method's.
    """

    def __init__(self, base: nn.Module, head: nn.Sequential, normalization: Normalization = "none") -> None:
        super().__init__()
        self.base, self.head, self.normalization = base, head, normalization
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if normalization == "imagenet" else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def features(self, gray: Tensor) -> Tensor:
        """`gray` is uint8 or float, 0 to 255; features are [N, F]."""
        unit = gray.to(torch.float32) / 255
        planes = unit.repeat(1, 3, 1, 1)
        if self.normalization != "none":
            planes = (planes - self.mean) / self.std
        features: Tensor = self.base(planes.contiguous(memory_format=torch.channels_last))
        return features

    def forward(self, gray: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(gray))
        return logits


class OneChannel(nn.Module):
    """A `Network` whose first convolution takes the gray channel itself, the sum of its three filters.

    Only where that is the same function: a shift of the mean is not where the convolution pads with zeros.
    The division by 255 stays apart, so that filters keep their precision in FP16.
    """

    def __init__(self, base: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.base, self.head = base, head

    def forward(self, gray: Tensor) -> Tensor:
        logits: Tensor = self.head(self.base(gray.to(torch.float32) / 255))
        return logits


def folded(network: Network) -> Network | OneChannel:
    """`network` with the channel repeat folded into its first convolution where that is exact; a copy."""
    network = copy.deepcopy(network)
    stems = [
        (name, module)
        for name, module in network.base.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.groups == 1
    ]
    if len(stems) != 1:
        return network
    ((name, stem),) = stems
    if network.normalization != "none" and (any(stem.padding) or stem.padding_mode != "zeros"):
        return network
    network.base.set_submodule(name, _on_one_channel(stem, network.mean, network.std))
    return OneChannel(network.base, network.head)


def _on_one_channel(stem: nn.Conv2d, mean: Tensor, std: Tensor) -> nn.Conv2d:
    weight = stem.weight.detach().double()  # [K, 3, h, w]
    shift = -(weight * (mean / std).double()).sum(dim=(1, 2, 3))
    bias = shift if stem.bias is None else shift + stem.bias.detach().double()
    one = nn.Conv2d(
        1,
        stem.out_channels,
        stem.kernel_size,  # type: ignore[arg-type]
        stem.stride,  # type: ignore[arg-type]
        stem.padding,  # type: ignore[arg-type]
        stem.dilation,  # type: ignore[arg-type]
        bias=bool(bias.any()),
    )
    with torch.no_grad():
        one.weight.copy_((weight / std.double()).sum(dim=1, keepdim=True))
        if one.bias is not None:
            one.bias.copy_(bias)
    return one.to(memory_format=torch.channels_last)


def architectures() -> list[str]:
    """Names of torchvision's classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def build(
    architecture: str,
    *,
    classes: int,
    weights: str,
    seed: int,
    size: tuple[int, int] = (224, 224),
    normalization: Normalization = "none",
) -> Network:
    """A network with a new head, both seeded.

    `weights` of the base: "imagenet" (downloaded once), "none" (random) or a file, safetensors or a torch
    state dict. Raises UsageError.
    """
    if architecture not in architectures():
        raise UsageError(
            f"no architecture {architecture!r}; allowed: torchvision's classifiers, such as resnet50, "
            "inception_v3, densenet121, efficientnet_b0, convnext_tiny"
        )
    torch.manual_seed(seed)
    model = torchvision.models.get_model(architecture, weights=None, **_BARE_OPTIONS.get(architecture, {}))
    classifier = _cut_off_classifier(model, architecture)
    if weights == "none":
        _initialise(model)
    else:
        states = _imagenet(architecture) if weights == "imagenet" else _read(Path(weights))
        _load_base(model, states, f"{architecture}: weights {weights}", classifier)
    features = _count_features(model, size, architecture)
    return Network(model, head(features, classes), normalization).to(memory_format=torch.channels_last)


def head(features: int, classes: int) -> nn.Sequential:
    """Features [N, F] to logits [N, C]."""
    return nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, classes))


def _cut_off_classifier(model: nn.Module, architecture: str) -> str:
    """Make a network give pooled features [N, F], in place; what is cut off starts with the name returned.

    torchvision's classifiers end in one child, a linear layer or a sequence with one; what comes before
    the first linear layer (a norm, a pooling) is part of the base. Dropout is not: the head has its own.
    """
    name, last = list(model.named_children())[-1]
    layers = list(last) if isinstance(last, nn.Sequential) else [last]
    linear = next((place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear)), None)
    if linear is None:
        raise UsageError(f"{architecture}: it does not end in a linear layer, so it can't take the head")
    setattr(model, name, nn.Sequential(*layers[:linear], nn.Flatten()))
    if isinstance(getattr(model, "avgpool", None), nn.AdaptiveAvgPool2d):
        model.avgpool = nn.AdaptiveAvgPool2d(1)  # VGG and AlexNet pool to 7 x 7
    for module_name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout) and module_name.split(".")[0] in ("dropout", name):
            model.set_submodule(module_name, nn.Identity())
    return f"{name}."


def _count_features(model: nn.Module, size: tuple[int, int], architecture: str) -> int:
    try:
        with torch.inference_mode():
            features = model.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        height, width = size
        raise UsageError(f"{architecture} can't take images of {height} x {width} pixels: {reason}") from None
    return int(features.shape[1])


def _initialise(model: nn.Module) -> None:
    """Random weights whose features tell images apart and survive half precision.

    Batch-normalised random networks amplify small differences layer by layer (Yang et al. 2019, "A mean field
    theory of batch normalization"). Two usual remedies: ResNet's residual branches start small (not at zero:
    every layer has to count when forms of the model are compared), and where there are none a bias keeps most
    of each ReLU's inputs in its linear part. The first filters sum to zero: they see texture, not brightness.
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


def _imagenet(architecture: str) -> dict[str, Tensor]:
    known = torchvision.models.get_model_weights(architecture)
    entry = known[PREFERRED_WEIGHTS] if PREFERRED_WEIGHTS in known.__members__ else next(iter(known))
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True, weights_only=True))
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


def _load_base(model: nn.Module, states: dict[str, Tensor], what: str, classifier: str) -> None:
    """Load all but the classifiers, strictly: torchvision's weights, or those of a bundle's member.

    Raises UsageError for weights of another network.
    """
    own = model.state_dict().keys()
    if any(name.startswith("base.") for name in states):
        states = {
            name.removeprefix("base."): value for name, value in states.items() if name.startswith("base.")
        }
    known = {
        name: value
        for name, value in states.items()
        if name in own or not name.startswith((classifier, *_AUXILIARY))
    }
    try:
        model.load_state_dict(known)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"{what} do not fit: {reason}") from None
