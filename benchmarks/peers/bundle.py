"""Make the contest's bundle, whose scores show wrong rows: `python -m benchmarks bundle FOLDER`.

Random convolutions amplify the rounding of decoders: in the demo bundle, Pillow's pixels, which differ from
the engine's by 0.1 gray levels on average and 1 at most, change a probability by up to 0.4, as another file
does. Therefore the heads use directions of the features that differ between files and not with rounding. A
discriminant analysis finds them, with each picture as a class and its copies under noise of one gray level as
the variation within the class. On 127 files Pillow then changes a probability by at most 0.0025, OpenCV's
INTER_AREA by 0.015 and its INTER_LINEAR, which is not antialiased, by 0.035, so that both are refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from benchmarks.gpu.bundle import CLASSES, WEIGHTS
from engine.bundle import bundle as bundles
from training import export, models
from training.phases import features

COPIES, CHANGED = 4, 0.1  # noisy copies per picture; share of their pixels that change by one gray level
COMPONENTS, DIRECTIONS = 16, 2
LOGIT_SD = {"resnet50": 0.5, "inception_v3": 0.06}  # InceptionV3 amplifies more

Floats = npt.NDArray[np.float64]


def contest_bundle(folder: Path) -> Path:
    """Return the bundle in `folder`; write it if it is missing."""
    if (folder / bundles.DESCRIPTION_FILE).exists():
        return folder
    pixels = export.canary_pixels(size=(224, 224))
    members = []
    for seed, (name, weight) in enumerate(WEIGHTS.items()):
        network = models.build_network(name, classes=len(CLASSES), weights="none", seed=seed)
        features.calibrate_batch_norm(network, pixels)
        with torch.inference_mode():
            raw_features = network.features(
                torch.from_numpy(np.concatenate([pixels, *_augment_copies(pixels)]))
            ).double()
        matrix, offset = find_stable_directions(raw_features.numpy(), pictures=len(pixels))
        set_head_directions(network.head, matrix, offset, LOGIT_SD[name])
        members.append(export.ExportedMember(name=name, architecture=name, weight=weight, network=network))
    facts = {"random": "seeded convolutions, heads blind to rounding: for measuring speed and agreement only"}
    export.write_bundle(folder, members, classes=CLASSES, canaries=pixels, check=pixels[:4], training=facts)
    return folder


def _augment_copies(pixels: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    rng, probabilities = np.random.default_rng(0), [CHANGED / 2, 1 - CHANGED, CHANGED / 2]
    noise = (rng.choice([-1, 0, 1], pixels.shape, p=probabilities) for _ in range(COPIES))
    return [np.clip(pixels + change, 0, 255).astype(np.uint8) for change in noise]


def find_stable_directions(raw_features: Floats, *, pictures: int) -> tuple[Floats, Floats]:
    """Return matrix [F, D] and offset [D] for features [pictures * (1 + COPIES), F], copies last.

    raw_features @ matrix + offset has mean 0 and standard deviation 1 over the pictures and changes little
    with noise.
    """
    components = PCA(COMPONENTS, random_state=0).fit(raw_features[:pictures])
    discriminant = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.01, n_components=DIRECTIONS)
    discriminant.fit(components.transform(raw_features), np.arange(len(raw_features)) % pictures)
    matrix = components.components_.T @ discriminant.scalings_[:, :DIRECTIONS]
    projected = raw_features[:pictures] @ matrix
    return matrix / projected.std(axis=0), -projected.mean(axis=0) / projected.std(axis=0)


def set_head_directions(head: nn.Sequential, matrix: Floats, offset: Floats, logit_sd: float) -> None:
    """Set a head in place: the hidden units are the directions, the classes lie on a circle in them."""
    first, last = head[0], head[3]
    shift = 4.0  # keeps ReLU's inputs positive
    units = np.arange(first.out_features) % DIRECTIONS
    angles = 2 * np.pi * np.arange(last.out_features) / last.out_features
    circle = logit_sd * np.stack([np.cos(angles), np.sin(angles)], axis=1) / np.bincount(units)  # [C, D]
    weights = circle[:, units]
    values = ((first, matrix.T[units], offset[units] + shift), (last, weights, -shift * weights.sum(axis=1)))
    for layer, weight, bias in values:
        layer.weight.data = torch.from_numpy(weight).float()
        layer.bias.data = torch.from_numpy(bias).float()


def main(console: Console, options: argparse.Namespace) -> None:
    print(contest_bundle(options.folder))
