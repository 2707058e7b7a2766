"""Compute which regions of an image raised or lowered the probability of a class, and by how much.

Method: integrated gradients (Sundararajan et al. 2017) in the members' last feature maps, as in Integrated
Grad-CAM (Sattarzadeh et al. 2021), from several reference images and averaged over them, as in expected
gradients (Erion et al. 2021).

A member pools its last feature maps A [K, h, w] to f = mean of A over its cells, and its head computes
scores from f. The ensemble's probability P(c) is a function F(f1 ... fM) of all members' pooled features,
with weights and temperatures inside. For a reference image with maps R and pooled features r, the gradients
are averaged on the straight path between the two for all members at once,

    g = mean over a in [0, 1] of dF/df at r + a (f - r)        member m's map in a cell: g_m . (A_m - R_m)

and the maps are averaged over the references. Properties, and reasons against plain Grad-CAM:

- Completeness: the mean of a member's map over the picture is its share, and the shares of all members add up
  to P(c) of this image minus the references' mean P(c). So all maps have one unit, points of probability, and
  are comparable between members, images and classes. The ensemble's map is their sum.
- After global average pooling the gradient is the same in all cells. So Grad-CAM (Selvaraju et al. 2017) is
  the same here as HiResCAM (Draelos and Carin 2020), which shows only regions that the network used, and this
  map has the same property. But the single gradient of Grad-CAM vanishes if the probability is near 0 or 1,
  as at the top of a work list, and its baseline is feature maps of zero, which no image has. If features are
  seldom zero, those that all images share hide those of one image.
- Randomising the head changes the map, as it should (Adebayo et al. 2018); other methods fail this test.
- The networks run forward only; only the head needs gradients, so a map costs little more than a score.

Each cell of the feature maps is drawn at the centre of its receptive field. A map has their resolution (7 x 7
for ResNet50 at 224 x 224), and a receptive field is larger than its cell. A map shows which regions moved the
score; these are not necessarily regions of disease.
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

INTEGRATION_STEPS = (16, 64, 256)  # on the path from a reference; the next if the error is larger than
MAX_COMPLETENESS_ERROR = 0.005  # of probability
METHOD = "integrated gradients in the last feature maps"
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    """The explanation of one image for one class."""

    probability: float  # of the ensemble
    typical: float  # mean probability of the references
    member_probabilities: tuple[float, ...]  # [M]
    maps: Floats  # [M, H, W]; the mean of a map is the member's share of `probability - typical`

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the probability [M] that each member adds to `typical`."""
        return tuple(float(change.mean(dtype=np.float64)) for change in self.maps)


@dataclass(frozen=True)
class FeatureMaps:
    """The members' feature maps of n images, before their heads."""

    maps: tuple[Tensor, ...]  # M times [n, K, h, w]
    pooled: tuple[Tensor, ...]  # M times [n, K]

    @classmethod
    def concatenate(cls, batches: Sequence[FeatureMaps]) -> FeatureMaps:
        maps = zip(*(batch.maps for batch in batches), strict=True)
        pooled = zip(*(batch.pooled for batch in batches), strict=True)
        return cls(tuple(map(torch.cat, maps)), tuple(map(torch.cat, pooled)))

    def only(self, chosen: npt.NDArray[np.bool_]) -> FeatureMaps:
        """Return the features of the `chosen` [n] images."""
        mask = torch.from_numpy(chosen)
        return FeatureMaps(tuple(maps[mask] for maps in self.maps), tuple(f[mask] for f in self.pooled))


class Explainer:
    """The ensemble of a bundle, as torch modules on one device; `set_references` before `explain`."""

    def __init__(self, bundle: Bundle, members: Sequence[Network], device: str = "cpu") -> None:
        """Raise UsageError if the head of a member does not read pooled feature maps."""
        torch.backends.cudnn.allow_tf32 = False
        self._bundle, self._device = bundle, torch.device(device)
        self._members = [
            PooledMember(member.eval().to(self._device), described.architecture, bundle.size)
            for member, described in zip(members, bundle.members, strict=True)
        ]

    @classmethod
    def of(cls, bundle: Bundle, device: str = "cpu") -> Explainer:
        """Load the explainer from the bundle's weights."""
        return cls(bundle, [network.load_member(member, bundle) for member in bundle.members], device)

    @torch.no_grad()
    def extract_features(self, pixels: Pixels) -> FeatureMaps:
        """Run all members on uint8 pixels [n, 1, H, W] up to their last feature maps."""
        on_device = torch.from_numpy(pixels).to(self._device)
        maps = tuple(member.maps(on_device) for member in self._members)
        return FeatureMaps(maps, tuple(member_maps.mean((2, 3)) for member_maps in maps))

    @torch.no_grad()
    def probabilities(self, features: FeatureMaps) -> tuple[Floats, Floats]:
        """Compute the probabilities of each member [M, n, C] and of the ensemble [n, C]."""
        members, ensemble = self._fuse(features.pooled)
        return members.cpu().numpy(), ensemble.cpu().numpy()

    def set_references(self, references: FeatureMaps) -> None:
        """Set the reference images that the others are compared with."""
        self._references = references

    def explain(self, features: FeatureMaps, index: int) -> list[Explanation]:
        """Explain the probability of class number `index` of each image."""
        references = self._references
        count = len(references.pooled[0])
        members, ensemble = self.probabilities(features)
        typical = float(self.probabilities(references)[1][:, index].mean(dtype=np.float64))
        explanations = []
        for image in range(len(ensemble)):
            pooled = tuple(member[image].expand(count, -1) for member in features.pooled)
            probability = float(ensemble[image, index])
            gradients = self._gradients(pooled, index, probability - typical)
            maps = [
                member.to_picture_map(gradient, member_maps[image], reference_maps)
                for member, gradient, member_maps, reference_maps in zip(
                    self._members, gradients, features.maps, references.maps, strict=True
                )
            ]
            alone = tuple(float(member[image, index]) for member in members)
            explanations.append(Explanation(probability, typical, alone, torch.stack(maps).cpu().numpy()))
        return explanations

    def _gradients(self, pooled: tuple[Tensor, ...], index: int, change: float) -> tuple[Tensor, ...]:
        """Average the gradients, M times [R, K], on the paths from the references to `pooled`.

        More steps are taken until they explain `change` within MAX_COMPLETENESS_ERROR.
        """
        references = self._references.pooled
        method = IntegratedGradients(
            lambda *inputs: self._fuse(inputs)[1][:, index], multiply_by_inputs=False
        )
        for steps in INTEGRATION_STEPS:
            gradients: tuple[Tensor, ...] = method.attribute(pooled, baselines=references, n_steps=steps)
            gradients = tuple(gradient.to(pooled[0].dtype) for gradient in gradients)
            members = zip(gradients, pooled, references, strict=True)
            explained = sum(float((gradient * (f - r)).sum(1).mean()) for gradient, f, r in members)
            if abs(explained - change) < MAX_COMPLETENESS_ERROR:
                break
        return gradients

    def _fuse(self, pooled: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Combine logits as `combine_logits` does, but differentiably: [M, n, C] and [n, C]."""
        bundle = self._bundle
        members = torch.stack(
            [
                torch.softmax(member.logits(features) / described.temperature, dim=-1)
                for member, features, described in zip(self._members, pooled, bundle.members, strict=True)
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
        # the layers between pooling and head: a normalization in some networks, else nothing
        self._rest: nn.Module = list(member.base.children())[-1]
        with torch.no_grad():
            name, cells = self._find_last_maps(architecture, size)
            self.centres = _cell_centres(member.base, name, size, cells)
        member.base.get_submodule(name).register_forward_hook(self._store_output)
        self._interpolation = [  # [H, h] and [W, w]
            _interpolation_weights(centres, side).to(member.mean.device)
            for centres, side in zip(self.centres, size, strict=True)
        ]

    def _store_output(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._last = output

    def _find_last_maps(self, architecture: str, size: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """Find the last layer with several cells; return its name, and the height and width of its output.

        A forward pass on noise checks that its output is pooled.
        """
        outputs: list[tuple[str, Tensor]] = []

        def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                outputs.append((name, output))

        layers = self._network.base.named_modules()
        hooks = [layer.register_forward_hook(partial(record, name)) for name, layer in layers]
        noise = torch.randint(0, 256, (2, 1, *size), generator=torch.Generator().manual_seed(0))
        features = self._network.features(noise.to(self._network.mean.device))
        for hook in hooks:
            hook.remove()
        if not outputs or not self._are_pooled(outputs[-1][1], features):
            raise UsageError(
                f"{architecture} does not compute its scores from the average of its last feature maps, "
                "so its scores cannot be explained by a map"
            )
        name, maps = outputs[-1]
        return name, (maps.shape[2], maps.shape[3])

    def _are_pooled(self, maps: Tensor, features: Tensor) -> bool:
        """Return whether `features` are the average of `maps`."""
        try:
            pooled = self._features(maps.mean((2, 3)))
        except RuntimeError:  # the layers after the pooling need another shape
            return False
        scale = float(features.abs().max())
        return pooled.shape == features.shape and torch.allclose(pooled, features, 1e-3, 1e-4 * scale)

    def _features(self, pooled: Tensor) -> Tensor:
        features: Tensor = self._rest(pooled[:, :, None, None])
        return features

    def maps(self, pixels: Tensor) -> Tensor:
        """Compute the last feature maps [n, K, h, w] of pixels [n, 1, H, W]."""
        self._network.features(pixels)
        maps, self._last = self._last, None
        assert maps is not None
        return maps

    def to_picture_map(self, gradients: Tensor, maps: Tensor, references: Tensor) -> Tensor:
        """Compute a map [H, W] from gradients [R, K] and feature maps [K, h, w], [R, K, h, w]."""
        cells = torch.einsum("k,khw->hw", gradients.mean(0), maps)
        cells = cells - torch.einsum("rk,rkhw->hw", gradients, references) / len(gradients)
        rows, columns = self._interpolation
        return rows @ (cells / cells.numel()) @ columns.T * (len(rows) * len(columns))

    def logits(self, pooled: Tensor) -> Tensor:
        """Compute the logits [n, C] of pooled features [n, K]."""
        logits: Tensor = self._network.head(self._features(pooled))
        return logits


def _interpolation_weights(centres: Tensor, side: int) -> Tensor:
    """Compute the weights [side, h] of cells with `centres` [h] for `side` pixels; each cell sums to 1.

    The kernel is a Gaussian of half a cell; linear interpolation would draw a grid of ridges.
    """
    count = len(centres)
    distance = float(centres[-1] - centres[0]) / (count - 1) if count > 1 else side
    pixels = torch.arange(side) + 0.5
    weights = torch.exp(-2 * ((pixels[:, None] - centres) / distance) ** 2)
    return weights / weights.sum(0)


def _cell_centres(base: nn.Module, name: str, size: tuple[int, int], cells: tuple[int, int]) -> list[Tensor]:
    """Locate the receptive fields of the cells of layer `name`: their centres [h] and [w], in pixels.

    The centres do not divide the picture evenly: at 224 x 224 those of ResNet50 are 0, 32 ... 192, half a
    cell up and left of that, and those of InceptionV3, which hardly pads, are 47, 70, 102, 133 and 161.
    Coordinates pass through a copy of the network whose layers return the middle of their kernels; reversed
    coordinates pass as well, since max pooling prefers the larger. The centres are taken as even for networks
    of patches, and if the coordinates do not reach the layer.
    """
    even = [(torch.arange(count) + 0.5) * side / count for count, side in zip(cells, size, strict=True)]
    if any(isinstance(layer, nn.Linear | nn.LayerNorm) for layer in base.modules()):
        return even
    base = copy.deepcopy(base).cpu()
    for path, layer in list(base.named_modules()):
        if isinstance(layer, nn.Conv2d):
            _reduce_to_centre(layer)
        elif isinstance(layer, nn.AdaptiveAvgPool2d):  # a squeeze and excitation uses the whole picture
            layer.register_forward_hook(lambda layer, inputs, output: torch.ones_like(output))
        elif isinstance(layer, nn.BatchNorm2d) or type(layer).__module__ == nn.ReLU.__module__:
            base.set_submodule(path, nn.Identity())
    y, x = (torch.arange(side) + 0.5 for side in size)
    ones = torch.ones(size)
    y, x = y[:, None] * ones, x * ones
    planes = torch.stack([ones, y, size[0] - y, x, size[1] - x])
    outputs: list[Tensor] = []
    base.get_submodule(name).register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    base(planes[:, None].repeat(1, 3, 1, 1))
    ones, down, up, right, left = outputs[-1].mean(1)  # [h, w]
    centres = [
        (down / ones + size[0] - up / ones).mean(1) / 2,
        (right / ones + size[1] - left / ones).mean(0) / 2,
    ]
    valid = all(bool((axis.diff() > 0).all() and axis.isfinite().all()) for axis in centres)
    return centres if valid else even


def _reduce_to_centre(layer: nn.Conv2d) -> None:
    """Replace the kernel by the mean over channels of its middle: one cell, or two of an even side."""
    middle = [slice((side - 1) // 2, side // 2 + 1) for side in layer.kernel_size]
    layer.weight.zero_()
    centre = layer.weight[:, :, middle[0], middle[1]]
    centre.fill_(1 / centre[0].numel())
    if layer.bias is not None:
        layer.bias.zero_()
