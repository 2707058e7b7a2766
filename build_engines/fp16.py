"""Convert a graph to FP16, except before its first convolution and after its last layer."""

from __future__ import annotations

import warnings

from engine.core.errors import EngineError, UsageError
from engine.core.extras import install_command

try:
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import TensorProto
except ImportError as error:
    raise UsageError(
        f"ONNX can't be imported ({error}); install it with: {install_command('int8')}"
    ) from None

_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_MAX_FP16 = 65_504.0


def convert_to_fp16(data: bytes) -> bytes:
    """Convert convolutions and matrix products of a float32 ONNX graph to FP16; inputs and outputs stay.

    The division of gray levels by 255 stays in float32, where it is exact. Raises EngineError
    for a graph that can't be converted, UsageError when the converter is missing.
    """
    try:
        from onnxconverter_common import float16
    except ImportError as error:
        raise UsageError(
            f"onnxconverter-common can't be imported ({error}); install it with: " + install_command("build")
        ) from None
    try:
        model = onnx.load_model_from_string(data)
        for number, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{number}"  # the converter identifies nodes by name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights outside FP16's range; parity is measured later
            half = float16.convert_float_to_float16(
                model, keep_io_types=True, max_finite_val=_MAX_FP16, node_block_list=_before_weights(model)
            )
        onnx.checker.check_model(half, full_check=True)
    except (
        ValueError,
        DecodeError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(f"the graph can't be converted to FP16: {reason}") from None
    if float32_layers := _float32_layers(half):
        raise EngineError(f"the FP16 graph keeps {', '.join(float32_layers[:5])} in float32")
    return half.SerializeToString(deterministic=True)


def _before_weights(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that scale the pixels: those between the input and the first weights."""
    tensors = {value.name for value in model.graph.input}
    names = []
    for node in model.graph.node:  # in topological order
        if tensors.intersection(node.input) and node.op_type not in _WEIGHTED:
            tensors.update(node.output)
            names.append(node.name)
    return names


def _float32_layers(model: onnx.ModelProto) -> list[str]:
    """List convolutions and matrix products whose first input is not FP16."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    return [
        node.name
        for node in inferred.node
        if node.op_type in _WEIGHTED and types.get(node.input[0]) != TensorProto.FLOAT16
    ]
