"""Write small real bundles: the logits depend on where a picture is bright, so swapped rows are visible."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from engine.bundle.class_names import class_groups

CLASSES = ("normal", "osteopenia", "osteoporosis")
REAL_WEIGHTS = {"resnet50": 0.4, "inception_v3": 0.6}


def write_member(path: Path, *, size: tuple[int, int], classes: int, seed: int) -> None:
    """Write a graph from uint8 [N, 1, H, W] to float32 logits [N, C], linear in a 4 x 4 thumbnail."""
    rng = np.random.default_rng(seed)
    kernel = [size[0] // 4, size[1] // 4]
    weights = {
        "scale": np.array(1 / 255, np.float32),
        "matrix": rng.normal(0, 2, (16, classes)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["samples"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["samples", "scale"], ["unit"]),
        helper.make_node("AveragePool", ["unit"], ["pooled"], kernel_shape=kernel, strides=kernel),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "member",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 1, *size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def write_bundle(
    folder: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    size: tuple[int, int] = (64, 64),
    weights: tuple[float, ...] = (0.6, 0.4),
    temperature: float = 1.0,
    decode: str = "exact",
) -> Path:
    """Write a bundle as training does, with one member for each weight."""
    (folder / "canaries").mkdir(parents=True)
    members = []
    for index, weight in enumerate(weights):
        name = f"member{index}"
        write_member(folder / f"{name}.onnx", size=size, classes=len(classes), seed=index)
        members.append(
            {
                "name": name,
                "architecture": "thumbnail",
                "weight": weight,
                "temperature": 1.0,
                "files": {"onnx": _file(folder, f"{name}.onnx")},
            }
        )
    _write_canaries(folder, size, len(weights))
    description = {
        "format": 1,
        "classes": list(classes),
        "groups": class_groups(classes),
        "input": {"height": size[0], "width": size[1], "channels": 1, "dtype": "uint8"},
        "decode": decode,
        "temperature": temperature,
        "members": members,
        "canaries": _file(folder, "canaries/canaries.safetensors"),
        "training": {},
    }
    (folder / "ensemble.json").write_text(json.dumps(description))
    return folder


def write_real_bundle(
    target: Path,
    images: Sequence[Path],
    *,
    weights: Mapping[str, float] = REAL_WEIGHTS,
    size: tuple[int, int] = (224, 224),
) -> Path:
    """Write seeded ResNet50 and InceptionV3 with batch statistics and heads fitted to `images`.

    `weights` may name other architectures.
    """
    from engine.pipeline.load_pixels import load_pixels
    from training import export, models
    from training.phases import features, heads

    pixels = load_pixels(images, size=size).pixels
    members = []
    for seed, (name, weight) in enumerate(weights.items()):
        network = models.build_network(name, classes=len(CLASSES), weights="none", seed=seed, size=size)
        features.calibrate_batch_norm(network, pixels)
        with torch.inference_mode():
            result = network.features(torch.from_numpy(pixels))
        heads.fold_standardisation(network.head, *heads.feature_statistics(result))
        members.append(export.ExportedMember(name=name, architecture=name, weight=weight, network=network))
    export.write_bundle(target, members, classes=CLASSES, canaries=pixels, check=pixels[:4], training={})
    return target


def _write_canaries(folder: Path, size: tuple[int, int], members: int) -> None:
    """Write canaries as training does, of 12 images of noise."""
    pixels = np.random.default_rng(12).integers(0, 256, (12, 1, *size), np.uint8)
    sessions = [
        onnxruntime.InferenceSession(folder / f"member{index}.onnx", providers=["CPUExecutionProvider"])
        for index in range(members)
    ]
    logits = np.stack([session.run(None, {"pixels": pixels})[0] for session in sessions])
    save_file({"pixels": pixels, "logits": logits}, folder / "canaries" / "canaries.safetensors")


def _file(folder: Path, name: str) -> dict[str, str]:
    return {"path": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
