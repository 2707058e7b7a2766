"""Measure the distance of an image's pooled features from those of the calibration images.

This is the class-agnostic Mahalanobis distance to their mean (Lee et al. 2018, "A simple unified framework
for detecting out-of-distribution samples"), with a shrunk covariance (Ledoit and Wolf 2004). A few nodes in a
file of their own compute it inside a member's graph: protobuf merges concatenated messages, so the bytes of
the graph followed by those of the file are a graph with a second output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.bundle.bundle import DISTANCE_OUTPUT
from engine.core.errors import UsageError
from engine.core.extras import install_command
from engine.stats.intervals import Floats

COMPONENTS = 128  # principal components of the covariance; the others share their mean variance
_OPSET = 18
_HEAD_OPERATORS = {"Gemm", "MatMul", "Add", "Relu", "Identity", "Dropout"}  # after the pooled features
_BATCH = 16


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of features [F].

    d(x)^2 = sum of inverse_variances * (components . (x - mean))^2, plus rest * the squared remainder.
    """

    mean: Floats  # [F]
    components: Floats  # [F, K], orthonormal
    inverse_variances: Floats  # [K]
    rest: float

    def distances(self, features: Floats) -> Floats:
        """Return the distances [N] of features [N, F]."""
        centred = features - self.mean
        projected = centred @ self.components
        remainder = (centred**2).sum(axis=1) - (projected**2).sum(axis=1)
        squares: Floats = (projected**2) @ self.inverse_variances + self.rest * np.maximum(remainder, 0)
        return np.sqrt(squares)


def _install_command() -> str:
    return install_command(packages="onnx scikit-learn")


def check_installed() -> None:
    """Raise UsageError if a package that only calibration needs is missing."""
    _import_onnx()
    try:
        import sklearn.covariance  # noqa: F401
    except ImportError:
        raise UsageError(f"--ood needs scikit-learn; install it with: {_install_command()}") from None


def fit_gaussian(features: Floats) -> Gaussian:
    """Fit a distribution to features [N, F]. Raises UsageError if they are all equal."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    count, width = features.shape
    mean = features.mean(axis=0)
    centred = (features - mean).astype(np.float64)
    mean_variance = float((centred**2).mean())
    if not mean_variance > 0:
        raise UsageError("--ood: the members' features are the same for all images")
    shrinkage = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    _, singular_values, vectors = np.linalg.svd(centred, full_matrices=False)
    kept = min(COMPONENTS, count - 1, width)
    leading = singular_values[:kept] ** 2 / count  # variances along the components
    trailing = max(mean_variance * width - float(leading.sum()), 0.0) / max(width - kept, 1)
    variances = (1 - shrinkage) * leading + shrinkage * mean_variance
    floor = 1e-6 * mean_variance  # for directions without variance when nothing is shrunk
    return Gaussian(
        mean,
        vectors[:kept].T,
        1 / np.maximum(variances, floor) / width,
        1 / max((1 - shrinkage) * trailing + shrinkage * mean_variance, floor) / width,
    )


def held_out_distances(features: Floats, folds: Iterable[npt.NDArray[np.bool_]]) -> Floats:
    """Return the distances [N] of features [N, F], each from a fit without its fold (masks [N])."""
    distances = np.empty(len(features))
    for held in folds:
        distances[held] = fit_gaussian(features[~held]).distances(features[held])
    return distances


def extract_features(graph: bytes, pixels: npt.NDArray[np.uint8], *, threads: int) -> Floats:
    """Return the pooled features [N, F] of pixels [N, 1, H, W] in a member's float32 graph."""
    import onnxruntime

    from engine.runners.onnx import create_session

    onnx = _import_onnx()
    name = _find_pooled_features(graph)
    part = onnx.ModelProto()
    part.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session: onnxruntime.InferenceSession = create_session(
        graph + part.SerializeToString(), ["CPUExecutionProvider"], threads=threads
    )
    (graph_input,) = session.get_inputs()
    batches = [
        session.run([name], {graph_input.name: pixels[start : start + _BATCH]})[0]
        for start in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(batches).astype(np.float64)


def distance_subgraph(graph: bytes, gaussian: Gaussian) -> bytes:
    """Return the bytes that, appended to a member's `graph`, add the output `distance`."""
    onnx = _import_onnx()
    node, constant = onnx.helper.make_node, onnx.numpy_helper.from_array
    constants = {
        "mean": gaussian.mean,
        "components": gaussian.components,
        "gains": gaussian.inverse_variances[:, None],
        "rest": np.array(gaussian.rest),
    }
    names = {name: f"{DISTANCE_OUTPUT}.{name}" for name in (*constants, "apart", "along", "back", "left")}
    squares = {name: f"{DISTANCE_OUTPUT}.{name}2" for name in ("along", "left", "both", "flat")}
    part = onnx.ModelProto()
    part.graph.node.extend(
        [
            node("Sub", [_find_pooled_features(graph), names["mean"]], [names["apart"]]),
            node("MatMul", [names["apart"], names["components"]], [names["along"]]),
            node("Gemm", [names["along"], names["components"]], [names["back"]], transB=1),
            node("Sub", [names["apart"], names["back"]], [names["left"]]),
            node(
                "ReduceSumSquare", [names["left"], f"{DISTANCE_OUTPUT}.axis"], [f"{DISTANCE_OUTPUT}.length"]
            ),
            node("Mul", [f"{DISTANCE_OUTPUT}.length", names["rest"]], [squares["left"]]),
            node("Mul", [names["along"], names["along"]], [f"{DISTANCE_OUTPUT}.squares"]),
            node("MatMul", [f"{DISTANCE_OUTPUT}.squares", names["gains"]], [squares["along"]]),
            node("Add", [squares["along"], squares["left"]], [squares["both"]]),
            node("Squeeze", [squares["both"], f"{DISTANCE_OUTPUT}.axis"], [squares["flat"]]),
            node("Sqrt", [squares["flat"]], [DISTANCE_OUTPUT]),
        ]
    )
    part.graph.initializer.extend(
        [
            *(constant(np.asarray(value, np.float32), names[name]) for name, value in constants.items()),
            constant(np.array([1], np.int64), f"{DISTANCE_OUTPUT}.axis"),
        ]
    )
    output = onnx.helper.make_tensor_value_info(DISTANCE_OUTPUT, onnx.TensorProto.FLOAT, ["N"])
    part.graph.output.append(output)
    return bytes(part.SerializeToString())


def _import_onnx() -> Any:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise UsageError(f"--ood needs onnx; install it with: {_install_command()}") from None
    return onnx


def _find_pooled_features(graph: bytes) -> str:
    """Find the tensor [N, F] that the head starts from. Raises UsageError if it is missing."""
    model = _import_onnx().load_from_string(graph)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _OPSET:
        raise UsageError(f"--ood needs graphs of opset {_OPSET} or newer, but this graph has {opset}")
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    name = model.graph.output[0].name
    while name in producers and producers[name].op_type in _HEAD_OPERATORS:
        name = next((tensor for tensor in producers[name].input if tensor not in constants), "")
    if name not in producers or name == model.graph.output[0].name:
        raise UsageError("--ood: a member's graph has no head of dense layers after pooled features")
    return str(name)
