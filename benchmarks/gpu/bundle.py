"""Make a bundle of ResNet50 and InceptionV3 with seeded random weights and untrained heads.

It is for measuring speed and agreement, not accuracy. Small head weights keep FP16 close to float32, although
random networks amplify rounding.
"""

from __future__ import annotations

from pathlib import Path

from engine.bundle import bundle as bundles
from training import export, models
from training.phases import features

CLASSES = ("normal", "osteopenia", "osteoporosis")
WEIGHTS = {"resnet50": 0.4, "inception_v3": 0.6}
HEAD_SCALE = 0.5


def proof_bundle(folder: Path) -> Path:
    """Return the bundle in `folder`; write it if it is missing."""
    if (folder / bundles.DESCRIPTION_FILE).exists():
        return folder
    pixels = export.canary_pixels(size=(224, 224))
    members = []
    for seed, (name, weight) in enumerate(WEIGHTS.items()):
        network = models.build_network(name, classes=len(CLASSES), weights="none", seed=seed)
        features.calibrate_batch_norm(network, pixels)
        network.head[3].weight.data *= HEAD_SCALE
        members.append(export.ExportedMember(name=name, architecture=name, weight=weight, network=network))
    facts = {"random": "seeded weights, nothing trained: for measuring speed and agreement only"}
    export.write_bundle(folder, members, classes=CLASSES, canaries=pixels, check=pixels[:4], training=facts)
    return folder
