"""Measure the distance of an image's pooled features from those of the calibration images.

The Mahalanobis distance to their mean (Lee et al. 2018, "A simple unified framework for detecting
out-of-distribution samples"), class-agnostic, with a shrunk covariance (Ledoit and Wolf 2004). It is worked
out inside a member's graph, by a few nodes that are kept in a file of their own: protobuf merges messages
that are concatenated, so the graph's bytes followed by the file's are a graph with a second output.
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

COMPONENTS = 128  # of the covariance that are kept apart; the rest have their mean variance
_OPSET = 18
_HEAD_OPERATORS = {
    "Gemm",
    "MatMul",
    "Add",
    "Relu",
    "Identity",
    "Dropout",
}  # what comes after the pooled features
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
        apart = features - self.mean
        along = apart @ self.components
        left = (apart**2).sum(axis=1) - (along**2).sum(axis=1)
        found: Floats = np.sqrt((along**2) @ self.inverse_variances + self.rest * np.maximum(left, 0))
        return found


def _packages() -> str:
    return install_command(packages="onnx scikit-learn")


def check_installed() -> None:
    """Raises UsageError where what only calibrating needs is missing."""
    _import_onnx()
    try:
        import sklearn.covariance  # noqa: F401
    except ImportError:
        raise UsageError(f"--ood needs scikit-learn; install it with: {_packages()}") from None


def fit_gaussian(features: Floats) -> Gaussian:
    """Fit a distribution to features [N, F]. Raises UsageError where they are all equal."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    count, width = features.shape
    mean = features.mean(axis=0)
    apart = (features - mean).astype(np.float64)
    usual = float((apart**2).mean())
    if not usual > 0:
        raise UsageError("--ood: the members' features are the same for all images")
    shrinkage = float(ledoit_wolf_shrinkage(apart, assume_centered=True))
    _, lengths, vectors = np.linalg.svd(apart, full_matrices=False)
    kept = min(COMPONENTS, count - 1, width)
    values = lengths[:kept] ** 2 / count  # variances along the components
    others = max(usual * width - float(values.sum()), 0.0) / max(width - kept, 1)
    variances = (1 - shrinkage) * values + shrinkage * usual
    floor = 1e-6 * usual  # where nothing is shrunk and a direction has no variance
    return Gaussian(
        mean,
        vectors[:kept].T,
        1 / np.maximum(variances, floor) / width,
        1 / max((1 - shrinkage) * others + shrinkage * usual, floor) / width,
    )


def held_out_distances(features: Floats, folds: Iterable[npt.NDArray[np.bool_]]) -> Floats:
    """Distances [N] of features [N, F], of each of `folds`, masks [N], by what was fitted to the others."""
    found = np.empty(len(features))
    for held in folds:
        found[held] = fit_gaussian(features[~held]).distances(features[held])
    return found


def extract_features(graph: bytes, pixels: npt.NDArray[np.uint8], *, threads: int) -> Floats:
    """Pooled features [N, F] of pixels [N, 1, H, W] by a member's float32 graph."""
    import onnxruntime

    from engine.runners.onnx import create_session

    onnx = _import_onnx()
    name = _find_pooled_features(graph)
    part = onnx.ModelProto()
    part.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session: onnxruntime.InferenceSession = create_session(
        graph + part.SerializeToString(), ["CPUExecutionProvider"], threads=threads
    )
    (given,) = session.get_inputs()
    found = [
        session.run([name], {given.name: pixels[start : start + _BATCH]})[0]
        for start in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(found).astype(np.float64)


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
        raise UsageError(f"--ood needs onnx; install it with: {_packages()}") from None
    return onnx


def _find_pooled_features(graph: bytes) -> str:
    """Find the tensor [N, F] that the head starts from. Raises UsageError where there is none."""
    model = _import_onnx().load_from_string(graph)
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < _OPSET:
        raise UsageError(f"--ood needs graphs of opset {_OPSET} or newer, this one has {opset}")
    makers = {output: node for node in model.graph.node for output in node.output}
    constants = {one.name for one in model.graph.initializer}
    name = model.graph.output[0].name
    while name in makers and makers[name].op_type in _HEAD_OPERATORS:
        name = next((one for one in makers[name].input if one not in constants), "")
    if name not in makers or name == model.graph.output[0].name:
        raise UsageError("--ood: a member's graph has no head of dense layers after pooled features")
    return str(name)
