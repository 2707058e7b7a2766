"""Compute which regions of an image raised or lowered the probability of a class, and by how much.

Method: integrated gradients (Sundararajan et al. 2017) in the members' last feature maps, as Integrated
Grad-CAM has it (Sattarzadeh et al. 2021), from each of some reference images and averaged over them, as
expected gradients are (Erion et al. 2021).

A member pools its last feature maps A [K, h, w] to f = mean over places of A, and its head makes scores of f.
The ensemble's probability P(c) is a function F(f1 ... fM) of all members' pooled features, weights and
temperatures inside. For a reference image with maps R and pooled features r, the gradients along the straight
way between the two are averaged for all members at once,

    g = mean over a in [0, 1] of dF/df at r + a (f - r)        member m's map at a place: g_m . (A_m - R_m)

and the maps averaged over the references. What follows from it, and why this and not plain Grad-CAM:

- Completeness: the mean of a member's map over the picture is its share, and the shares of all members add up
  to P(c) of this image minus the references' mean P(c). So maps are in one unit, points of probability, and
  compare between members, images and classes; none is stretched by itself. The ensemble's map is their sum.
- Behind global average pooling the gradient is the same at all places. So Grad-CAM (Selvaraju et al. 2017)
  is here the same as HiResCAM (Draelos and Carin 2020), which shows only places that the network used, and
  this map inherits that. But Grad-CAM's one gradient vanishes where the probability is near 0 or 1, which is
  where a work list begins, and it compares with feature maps that are zero, which no image has; with
  features that are seldom zero, that drowns what is particular to an image in what all have in common.
- Randomising the head changes the map, as it should (Adebayo et al. 2018); other methods fail there.
- The networks run forward only; gradients are the head's alone, so a map costs little more than a score.

Each cell of the feature maps is drawn where it looks. A map is as coarse as they are (7 x 7 for ResNet50 at
224 x 224), and a cell sees more than its place. It tells what moved the score, which is not where disease is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from engine.bundle.bundle import Bundle
from engine.core.errors import UsageError
from engine.runners import network
from engine.runners.network import Network

INTEGRATION_STEPS = (16, 64, 256)  # along the way from a reference; more where the sum is off by more than
MAX_COMPLETENESS_ERROR = 0.005  # of probability
METHOD = "integrated gradients in the last feature maps"
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    """The explanation of one image for one class."""

    probability: float  # of the ensemble
    typical: float  # mean probability of the references
    own: tuple[float, ...]  # [M], each member's own probability
    maps: Floats  # [M, H, W]; the mean of one is the member's share of `probability - typical`

    @property
    def shares(self) -> tuple[float, ...]:
        """[M], points of probability that each member adds to `typical`."""
        return tuple(float(one.mean(dtype=np.float64)) for one in self.maps)


@dataclass(frozen=True)
class FeatureMaps:
    """The members' feature maps of n images, before their heads."""

    maps: tuple[Tensor, ...]  # M times [n, K, h, w]
    pooled: tuple[Tensor, ...]  # M times [n, K]

    @classmethod
    def joined(cls, some: Sequence[FeatureMaps]) -> FeatureMaps:
        maps = zip(*(one.maps for one in some), strict=True)
        pooled = zip(*(one.pooled for one in some), strict=True)
        return cls(tuple(map(torch.cat, maps)), tuple(map(torch.cat, pooled)))

    def only(self, which: npt.NDArray[np.bool_]) -> FeatureMaps:
        """Return the images that `which` [n] marks."""
        kept = torch.from_numpy(which)
        return FeatureMaps(tuple(one[kept] for one in self.maps), tuple(one[kept] for one in self.pooled))


class Explainer:
    """The ensemble of a bundle, as torch modules on one device; `set_references` before `explain`."""

    def __init__(self, bundle: Bundle, members: Sequence[Network], device: str = "cpu") -> None:
        """Raises UsageError that names the member whose head does not read pooled feature maps."""
        torch.backends.cudnn.allow_tf32 = False
        self._bundle, self._device = bundle, torch.device(device)
        self._eyes = [
            PooledMember(one.eval().to(self._device), member.architecture, bundle.size)
            for one, member in zip(members, bundle.members, strict=True)
        ]

    @classmethod
    def of(cls, bundle: Bundle, device: str = "cpu") -> Explainer:
        """Load the explainer from the bundle's weights."""
        return cls(bundle, [network.load_member(member, bundle) for member in bundle.members], device)

    @torch.no_grad()
    def see(self, pixels: Pixels) -> FeatureMaps:
        """uint8 [n, 1, H, W]."""
        on_device = torch.from_numpy(pixels).to(self._device)
        maps = tuple(eye.maps(on_device) for eye in self._eyes)
        return FeatureMaps(maps, tuple(one.mean((2, 3)) for one in maps))

    @torch.no_grad()
    def probabilities(self, seen: FeatureMaps) -> tuple[Floats, Floats]:
        """Compute the probabilities of each member [M, n, C] and of the ensemble [n, C]."""
        members, ensemble = self._fuse(seen.pooled)
        return members.cpu().numpy(), ensemble.cpu().numpy()

    def set_references(self, references: FeatureMaps) -> None:
        """Set the typical images that the others are compared with."""
        self._references = references

    def explain(self, seen: FeatureMaps, index: int) -> list[Explanation]:
        """Class number `index` of each image."""
        references = self._references
        count = len(references.pooled[0])
        members, ensemble = self.probabilities(seen)
        typical = float(self.probabilities(references)[1][:, index].mean(dtype=np.float64))
        found = []
        for place in range(len(ensemble)):
            pooled = tuple(one[place].expand(count, -1) for one in seen.pooled)
            probability = float(ensemble[place, index])
            gradients = self._gradients(pooled, index, probability - typical)
            whole = zip(self._eyes, gradients, seen.maps, references.maps, strict=True)
            maps = [eye.to_picture_map(gradient, one[place], others) for eye, gradient, one, others in whole]
            own = tuple(float(one[place, index]) for one in members)
            found.append(Explanation(probability, typical, own, torch.stack(maps).cpu().numpy()))
        return found

    def _gradients(self, pooled: tuple[Tensor, ...], index: int, change: float) -> tuple[Tensor, ...]:
        """M times [R, K], averaged along the ways from the references to `pooled`; these explain `change`."""
        references = self._references.pooled
        ways = IntegratedGradients(lambda *some: self._fuse(some)[1][:, index], multiply_by_inputs=False)
        for steps in INTEGRATION_STEPS:
            gradients: tuple[Tensor, ...] = ways.attribute(pooled, baselines=references, n_steps=steps)
            gradients = tuple(one.to(pooled[0].dtype) for one in gradients)
            parts = zip(gradients, pooled, references, strict=True)
            explained = sum(float((gradient * (one - other)).sum(1).mean()) for gradient, one, other in parts)
            if abs(explained - change) < MAX_COMPLETENESS_ERROR:
                break
        return gradients

    def _fuse(self, pooled: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Combine logits as `combine_logits` does, but differentiably: [M, n, C] and [n, C]."""
        bundle = self._bundle
        members = torch.stack(
            [
                torch.softmax(eye.logits(features) / member.temperature, dim=-1)
                for eye, features, member in zip(self._eyes, pooled, bundle.members, strict=True)
            ]
        )
        weights = torch.tensor(bundle.weights, device=members.device)
        ensemble = (weights[:, None, None] * members).sum(0)
        if bundle.temperature != 1.0:
            logs = ensemble.clamp_min(torch.finfo(ensemble.dtype).tiny).log()
            ensemble = torch.softmax(logs / bundle.temperature, dim=-1)
        return members, ensemble


class PooledMember:
    """A member, cut where it pools its last feature maps."""

    def __init__(self, member: Network, architecture: str, size: tuple[int, int]) -> None:
        self._network = member.requires_grad_(False)
        self._last: Tensor | None = None
        # a norm that some networks have between pooling and head, else nothing
        self._rest: nn.Module = list(member.base.children())[-1]
        with torch.no_grad():
            name, cells = self._last_maps(architecture, size)
            self.centres = _cell_centres(member.base, name, size, cells)
        member.base.get_submodule(name).register_forward_hook(self._keep)
        self._spread = [  # [H, h] and [W, w]
            _interpolation_weights(each, side).to(member.mean.device)
            for each, side in zip(self.centres, size, strict=True)
        ]

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._last = output

    def _last_maps(self, architecture: str, size: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """Name of the layer whose output is pooled, the last with several places, and its height and width.

        That its output is pooled is tried out, on noise.
        """
        found: list[tuple[str, Tensor]] = []

        def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                found.append((name, output))

        layers = self._network.base.named_modules()
        hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in layers]
        noise = torch.randint(0, 256, (2, 1, *size), generator=torch.Generator().manual_seed(0))
        features = self._network.features(noise.to(self._network.mean.device))
        for hook in hooks:
            hook.remove()
        if not found or not self._pools(found[-1][1], features):
            raise UsageError(
                f"{architecture}: its scores are not made from the average of its last feature maps, "
                "so there is no map of a picture to show"
            )
        name, maps = found[-1]
        return name, (maps.shape[2], maps.shape[3])

    def _pools(self, maps: Tensor, features: Tensor) -> bool:
        try:
            again = self._features(maps.mean((2, 3)))
        except RuntimeError:  # the rest takes something else
            return False
        scale = float(features.abs().max())
        return again.shape == features.shape and torch.allclose(again, features, 1e-3, 1e-4 * scale)

    def _features(self, pooled: Tensor) -> Tensor:
        features: Tensor = self._rest(pooled[:, :, None, None])
        return features

    def maps(self, pixels: Tensor) -> Tensor:
        """[n, 1, H, W] to [n, K, h, w]."""
        self._network.features(pixels)
        maps, self._last = self._last, None
        assert maps is not None
        return maps

    def to_picture_map(self, gradients: Tensor, maps: Tensor, references: Tensor) -> Tensor:
        """Gradients [R, K] and feature maps [K, h, w], [R, K, h, w] to a map [H, W]."""
        cells = torch.einsum("k,khw->hw", gradients.mean(0), maps)
        cells = cells - torch.einsum("rk,rkhw->hw", gradients, references) / len(gradients)
        rows, columns = self._spread
        return rows @ (cells / cells.numel()) @ columns.T * (len(rows) * len(columns))

    def logits(self, pooled: Tensor) -> Tensor:
        """[n, K] to [n, C]."""
        logits: Tensor = self._network.head(self._features(pooled))
        return logits


def _interpolation_weights(centres: Tensor, side: int) -> Tensor:
    """Compute the weights [side, h] of the cells with `centres` [h] for each of `side` pixels; each cell
    sums to 1.

    A Gaussian of half a cell: straight interpolation would draw a grid of ridges.
    """
    count = len(centres)
    distance = float(centres[-1] - centres[0]) / (count - 1) if count > 1 else side
    pixels = torch.arange(side) + 0.5
    parts = torch.exp(-2 * ((pixels[:, None] - centres) / distance) ** 2)
    return parts / parts.sum(0)


def _cell_centres(base: nn.Module, name: str, size: tuple[int, int], cells: tuple[int, int]) -> list[Tensor]:
    """Locate the centres of the cells of layer `name`'s feature maps: [h] and [w], in pixels.

    They do not divide the picture evenly: at 224 x 224 those of ResNet50 look at 0, 32 ... 192, half a cell
    up and left of that, and those of InceptionV3, which hardly pads, at 47, 70, 102, 133 and 161. Found by
    sending coordinates through a copy whose layers pass on what is in the middle of their kernels; each also
    the other way round, since a maximum prefers the larger. Evenly it is in networks of patches, and where
    nothing comes through.
    """
    even = [(torch.arange(count) + 0.5) * side / count for count, side in zip(cells, size, strict=True)]
    if any(isinstance(layer, nn.Linear | nn.LayerNorm) for layer in base.modules()):
        return even
    base = copy.deepcopy(base).cpu()
    for place, layer in list(base.named_modules()):
        if isinstance(layer, nn.Conv2d):
            _reduce_to_centre(layer)
        elif isinstance(layer, nn.AdaptiveAvgPool2d):  # of a squeeze and excitation, which looks everywhere
            layer.register_forward_hook(lambda layer, inputs, output: torch.ones_like(output))
        elif isinstance(layer, nn.BatchNorm2d) or type(layer).__module__ == nn.ReLU.__module__:
            base.set_submodule(place, nn.Identity())
    y, x = (torch.arange(side) + 0.5 for side in size)
    one = torch.ones(size)
    planes = torch.stack([one, y[:, None] * one, (size[0] - y)[:, None] * one, x * one, (size[1] - x) * one])
    found: list[Tensor] = []
    base.get_submodule(name).register_forward_hook(lambda layer, inputs, output: found.append(output))
    base(planes[:, None].repeat(1, 3, 1, 1))
    one, down, up, right, left = found[-1].mean(1)  # [h, w]
    centres = [
        (down / one + size[0] - up / one).mean(1) / 2,
        (right / one + size[1] - left / one).mean(0) / 2,
    ]
    apart = all(bool((each.diff() > 0).all()) for each in centres)  # not so where one is not a number
    return centres if apart and all(bool(each.isfinite().all()) for each in centres) else even


def _reduce_to_centre(layer: nn.Conv2d) -> None:
    """Make it pass on the mean over channels of its kernel's middle: one place, two of an even side."""
    middle = [slice((side - 1) // 2, side // 2 + 1) for side in layer.kernel_size]
    layer.weight.zero_()
    part = layer.weight[:, :, middle[0], middle[1]]
    part.fill_(1 / part[0].numel())
    if layer.bias is not None:
        layer.bias.zero_()
