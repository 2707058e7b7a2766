"""Quantize a float32 graph to INT8 for ONNX Runtime on a CPU; inputs and outputs stay the same.

Quantization is static and in QDQ form, which ONNX Runtime fuses when it loads the graph. Activations are
uint8, clipped at a percentile of their values on the calibration images; weights are symmetric int8 per
output channel. Weights have 8 bits on CPUs with VNNI and 7 elsewhere: without VNNI, x86 adds two products in
16 bits, where 2 * 255 * 64 fits and larger weights would overflow. The head stays in float32, and so do as
many of the first layers as accuracy needs, because later layers amplify their errors.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator, save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process

from engine.bundle.plans import Layer
from engine.core.errors import EngineError

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PERCENTILE = 99.99
RECIPE = f"static, QDQ, uint8 activations to percentile {PERCENTILE}, weights per channel, biases corrected"
FINE_FIRST_LAYERS = (1, 2, 4, 8, 16)  # layers in float32, tried in turn
HEAD_LAYERS = 2  # layers between features and logits
_BATCH = 4  # all activations of a batch are held at once
_QUANTIZE_ERRORS = (DecodeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class QuantizedGraph:
    """A graph and the precision of its layers."""

    graph: bytes
    layers: tuple[Layer, ...]  # name, type and precision of each layer with weights


def quantize_to_int8(
    data: bytes, pixels: Pixels, is_accurate: Callable[[bytes], bool], *, bits: int
) -> QuantizedGraph:
    """Quantize a float32 ONNX graph, calibrated on uint8 [N, 1, H, W], with weights of `bits` bits, 7 or 8.

    Return the first graph that `is_accurate` accepts, else the last one. Raises EngineError if it can't be
    quantized.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # errors are raised as exceptions too
    try:
        with tempfile.TemporaryDirectory(prefix="int8-") as scratch:
            return _quantize(data, pixels, is_accurate, bits, Path(scratch))
    except (*_QUANTIZE_ERRORS, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(f"the graph can't be quantized: {reason}") from None
    finally:
        logging.disable(before)


def _quantize(
    data: bytes, pixels: Pixels, is_accurate: Callable[[bytes], bool], bits: int, scratch: Path
) -> QuantizedGraph:
    source, prepared, ranges, output = (scratch / name for name in ("source", "prepared", "ranges", "output"))
    source.write_bytes(data)
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{number}"  # layers are excluded by name
    weighted = [node for node in model.graph.node if node.op_type in _WEIGHTED]
    _replace_pooling(model)
    onnx.save(model, prepared)
    tries = [first for first in FINE_FIRST_LAYERS if first + HEAD_LAYERS < len(weighted)]
    if not tries:
        raise EngineError(f"none of its {len(weighted)} layers is between the first one and the head")
    _calibrate(prepared, pixels, scratch, ranges)
    means = _input_means(model, pixels)
    for first in tries:
        float32_nodes = {
            node.name for node in (*weighted[:first], *weighted[-HEAD_LAYERS:])
        } | _preprocessing_nodes(model, weighted[0])
        quantize_static(
            prepared,
            output,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=bits == 7,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(float32_nodes),
            calibrate_method=CalibrationMethod.Percentile,
            calibration_cache_path=ranges,
        )
        quantized = onnx.load(output)
        _correct_biases(quantized.graph, model.graph, means)
        onnx.checker.check_model(quantized, full_check=True)
        graph = quantized.SerializeToString(deterministic=True)
        if is_accurate(graph):
            break
    layers = tuple(
        Layer(name=node.name, type=node.op_type, precision="FLOAT" if node.name in float32_nodes else "INT8")
        for node in weighted
    )
    return QuantizedGraph(graph, layers)


def _replace_pooling(model: onnx.ModelProto) -> None:
    """Replace average pooling by an equal depthwise convolution, which is several times as fast in INT8."""
    values = onnx.shape_inference.infer_shapes(model).graph.value_info
    shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
    for node in model.graph.node:
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        padded = any(attributes.get("pads", [])) and not attributes.get("count_include_pad")
        is_unsupported = (
            padded or attributes.get("ceil_mode") or attributes.get("auto_pad", b"NOTSET") != b"NOTSET"
        )
        shape = shapes.get(node.input[0], ()) if node.op_type == "AveragePool" else ()
        if is_unsupported or len(shape) != 4 or not shape[1].dim_value:
            continue
        channels, kernel = shape[1].dim_value, attributes["kernel_shape"]
        means = np.full((channels, 1, *kernel), 1 / np.prod(kernel), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(means, f"{node.name}.means"))
        kept_attributes = {
            name: attributes[name]
            for name in ("kernel_shape", "pads", "strides", "dilations")
            if name in attributes
        }
        inputs = [node.input[0], f"{node.name}.means"]
        node.CopyFrom(
            helper.make_node("Conv", inputs, node.output, name=node.name, group=channels, **kept_attributes)
        )


def _preprocessing_nodes(model: onnx.ModelProto, layer: onnx.NodeProto) -> set[str]:
    """Return the names of the nodes before the first layer, which scale the pixels."""
    names = [node.name for node in model.graph.node]
    return set(names[: names.index(layer.name)])


class _CalibrationReader(CalibrationDataReader):
    def __init__(self, name: str, pixels: Pixels) -> None:
        self._batches = iter([{name: pixels}])

    def get_next(self) -> dict[str, Pixels] | None:
        return next(self._batches, None)


def _batches(pixels: Pixels) -> Iterator[Pixels]:
    return (pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH))


def _calibrate(model: Path, pixels: Pixels, scratch: Path, ranges: Path) -> None:
    """Write the range of each tensor, batch by batch, because ONNX Runtime holds all batches of a reader."""
    with contextlib.redirect_stdout(io.StringIO()):  # standard output holds only results
        calibrator = create_calibrator(
            model,
            augmented_model_path=str(scratch / "augmented"),
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"percentile": PERCENTILE},
        )
        for batch in _batches(pixels):
            calibrator.collect_data(_CalibrationReader(calibrator.model.graph.input[0].name, batch))
        save_tensors_data(calibrator.compute_data(), ranges)


def _input_means(model: onnx.ModelProto, pixels: Pixels) -> dict[str, Floats]:
    """Return the mean [channels] of each convolution's input, by name, over all images and positions."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    graph = probe.graph
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3]), "means.axes"))
    for node in convolutions:
        name = f"means.{node.name}"
        graph.node.append(helper.make_node("ReduceMean", [node.input[0], "means.axes"], [name], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [f"means.{node.name}" for node in convolutions]
    batch_means = [session.run(names, {graph.input[0].name: batch}) for batch in _batches(pixels)]
    return {
        node.name: np.mean(means, axis=0)
        for node, means in zip(convolutions, zip(*batch_means, strict=True), strict=True)
    }


def _correct_biases(quantized: onnx.GraphProto, original: onnx.GraphProto, means: dict[str, Floats]) -> None:
    """Correct each output channel's mean for the rounding of its weights (Nagel et al. 2019, section 4.2).

    Activations after a ReLU are positive, so the errors of a filter's weights add up to an offset.
    """
    weights = {node.name: node.input[1] for node in original.node if node.op_type == "Conv"}
    exact = {tensor.name: tensor for tensor in original.initializer}
    tensors = {tensor.name: tensor for tensor in quantized.initializer}
    producers = {output: node for node in quantized.node for output in node.output}
    for node in quantized.node:
        pair = [producers.get(name) for name in node.input[1:3]] if node.op_type == "Conv" else []
        if len(pair) < 2 or not all(source and source.op_type == "DequantizeLinear" for source in pair):
            continue  # in float32, or without a bias
        if weights.get(node.name) not in exact:
            continue  # the graph computes these weights
        rounded, scale, steps, step = (
            numpy_helper.to_array(tensors[name]) for source in pair if source for name in source.input[:2]
        )
        error = numpy_helper.to_array(exact[weights[node.name]]) - rounded * scale[:, None, None, None]
        # in a grouped convolution each output reads the channels of its group
        groups = len(means[node.name]) // error.shape[1]
        inputs = np.repeat(means[node.name].reshape(groups, -1), len(error) // groups, axis=0)  # [out, in]
        missing = (error.sum(axis=(2, 3)) * inputs).sum(axis=1)
        bias = tensors[pair[1].input[0]]
        bias.CopyFrom(numpy_helper.from_array((steps + np.rint(missing / step)).astype(np.int32), bias.name))
