"""The members as torch modules: a classifier of torchvision with the head of the method.

Training fits them; the torch runner loads them from a bundle.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.fx
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from engine.bundle.bundle import IMAGENET_MEAN, IMAGENET_STD, Bundle, Member
from engine.core.errors import UsageError

Normalization = Literal["none", "imagenet"]
# With pretrained weights torchvision scales the input of these networks, wrongly for [0, 1], and adds heads
# that cannot run at 224 x 224. They are built without both and use the remaining weights.
_BARE = {"aux_logits": False, "transform_input": False, "init_weights": False}
_BARE_OPTIONS: dict[str, dict[str, Any]] = {"inception_v3": _BARE, "googlenet": _BARE}


class Network(nn.Module):
    """A member: gray levels [N, 1, H, W] to float32 logits [N, C], including scaling.

    `base` is torchvision's network from [N, 3, H, W] to features [N, F]; `head` is that of the method.
    """

    def __init__(self, base: nn.Module, head: nn.Sequential, normalization: Normalization = "none") -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.base, self.head, self.normalization = base, head, normalization
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if normalization == "imagenet" else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def planes(self, gray: Tensor) -> Tensor:
        """Return the input of the first layer, float32 [N, 3, H, W]; `gray` is uint8 or float, 0 to 255."""
        planes = (gray.to(torch.float32) / 255).repeat(1, 3, 1, 1)
        if self.normalization != "none":
            planes = (planes - self.mean) / self.std
        return planes.contiguous(memory_format=torch.channels_last)

    def features(self, gray: Tensor) -> Tensor:
        """Return the features [N, F] of gray levels [N, 1, H, W]."""
        features: Tensor = self.base(self.planes(gray))
        return features

    def forward(self, gray: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(gray))
        return logits


class OneChannel(nn.Module):
    """A `Network` whose first convolution takes one gray channel: its filters are summed over the channels.

    This is exact unless a mean is subtracted and the convolution pads with zeros. The division by 255 is not
    folded in, so that the filters keep their precision in FP16.
    """

    def __init__(self, base: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.base, self.head = base, head

    def planes(self, gray: Tensor) -> Tensor:
        """Return the input of the first layer, float32 [N, 1, H, W]."""
        return gray.to(torch.float32) / 255

    def forward(self, gray: Tensor) -> Tensor:
        logits: Tensor = self.head(self.base(self.planes(gray)))
        return logits


def fold_channels(network: Network) -> Network | OneChannel:
    """Return a copy of `network` whose first convolution has one channel, where that is exact."""
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
    network.base.set_submodule(name, _fold_stem(stem, network.mean, network.std))
    return OneChannel(network.base, network.head)


def _fold_stem(stem: nn.Conv2d, mean: Tensor, std: Tensor) -> nn.Conv2d:
    weight = stem.weight.detach().double()  # [K, 3, h, w]
    shift = -(weight * (mean / std).double()).sum(dim=(1, 2, 3))
    bias = shift if stem.bias is None else shift + stem.bias.detach().double()
    folded = nn.Conv2d(
        1,
        stem.out_channels,
        stem.kernel_size,  # type: ignore[arg-type]
        stem.stride,  # type: ignore[arg-type]
        stem.padding,  # type: ignore[arg-type]
        stem.dilation,  # type: ignore[arg-type]
        bias=bool(bias.any()),
    )
    with torch.no_grad():
        folded.weight.copy_((weight / std.double()).sum(dim=1, keepdim=True))
        if folded.bias is not None:
            folded.bias.copy_(bias)
    return folded.to(memory_format=torch.channels_last)


def list_architectures() -> list[str]:
    """Return the names of torchvision's classifiers."""
    return list(torchvision.models.list_models(module=torchvision.models))


def fuse_batch_norms(network: Network | OneChannel) -> Network | OneChannel:
    """Fold batch norms of `network` into the convolutions before them, in place, if fx can trace it."""
    try:
        network.base = fuse(network.base.eval())
    except (torch.fx.proxy.TraceError, NotImplementedError, TypeError, ValueError):
        return network  # its control flow depends on data; unfused it is a little slower
    return network


class InferenceNetwork(nn.Module):
    """A network for inference. The division by 255 is done in float32, before the cast to `dtype`."""

    def __init__(
        self, network: Network | OneChannel, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        super().__init__()
        self.network, self._dtype, self._memory_format = network, dtype, memory_format
        network.base.to(dtype)
        network.head.to(dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 logits [N, C] of pixels, uint8 [N, 1, H, W]."""
        planes = self.network.planes(pixels).to(self._dtype, memory_format=self._memory_format)
        logits: Tensor = self.network.head(self.network.base(planes)).float()
        return logits


def load_for_inference(
    member: Member,
    bundle: Bundle,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.channels_last,
) -> InferenceNetwork:
    """Load a member of a bundle on the CPU with fused layers. Raises UsageError."""
    network = fuse_batch_norms(fold_channels(load_member(member, bundle)))
    return InferenceNetwork(network, dtype, memory_format).eval().to(memory_format=memory_format)


def make_head(features: int, classes: int) -> nn.Sequential:
    """Return the head of the method: features [N, F] to logits [N, C]."""
    return nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, classes))


def load_member(member: Member, bundle: Bundle) -> Network:
    """Load a member of a bundle on the CPU in evaluation mode.

    Raises UsageError when its weights do not fit.
    """
    if "safetensors" not in member.files:
        raise UsageError(f"bundle {bundle.path}: {member.name}: --runner torch needs its safetensors")
    model = build_architecture(member.architecture)
    remove_classifier(model, member.architecture)
    try:
        states = tensors_from_bytes(member.files["safetensors"].path.read_bytes())
        features = states["head.0.weight"].shape[1]
        network = Network(model, make_head(features, len(bundle.classes)), bundle.normalization)
        ordered = OrderedDict(states)
        # safetensors does not store the version of each module's state, which MNASNet reads
        vars(ordered)["_metadata"] = vars(network.state_dict())["_metadata"]
        network.load_state_dict(ordered)
    except (SafetensorError, RuntimeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"bundle {bundle.path}: {member.name}: its weights do not fit: {reason}") from None
    return network.eval().to(memory_format=torch.channels_last)


def build_architecture(architecture: str) -> nn.Module:
    """Return torchvision's classifier without weights. Raises UsageError for an unknown name."""
    if architecture not in list_architectures():
        raise UsageError(
            f"no architecture {architecture!r} exists; allowed: torchvision's classifiers, such as resnet50, "
            "inception_v3, densenet121, efficientnet_b0, convnext_tiny"
        )
    options = _BARE_OPTIONS.get(architecture, {})
    model: nn.Module = torchvision.models.get_model(architecture, weights=None, **options)
    return model


def remove_classifier(model: nn.Module, architecture: str) -> str:
    """Remove a network's classifier in place; return the prefix of the removed parameters' names.

    The network then returns pooled features [N, F]. torchvision's classifiers end in one child, a linear
    layer or a sequence with one; the layers before the first linear layer (a norm, a pooling) stay in the
    base. Dropout is removed: the head has its own.
    """
    name, last = list(model.named_children())[-1]
    layers = list(last) if isinstance(last, nn.Sequential) else [last]
    linear = next((position for position, layer in enumerate(layers) if isinstance(layer, nn.Linear)), None)
    if linear is None:
        raise UsageError(f"{architecture} does not end in a linear layer, so the head cannot replace it")
    setattr(model, name, nn.Sequential(*layers[:linear], nn.Flatten()))
    if isinstance(getattr(model, "avgpool", None), nn.AdaptiveAvgPool2d):
        model.avgpool = nn.AdaptiveAvgPool2d(1)  # VGG and AlexNet pool to 7 x 7
    for module_name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout) and module_name.split(".")[0] in ("dropout", name):
            model.set_submodule(module_name, nn.Identity())
    return f"{name}."
