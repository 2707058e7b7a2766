"""The ONNX Runtime back end: float32 or INT8 on the CPU; on a GPU where its CUDA build is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from engine.bundle.bundle import DISTANCE_OUTPUT, Bundle, Member
from engine.core.errors import UsageError
from engine.core.extras import install_command

if TYPE_CHECKING:
    import torch

try:
    import onnxruntime
except ImportError as error:
    raise UsageError(
        f"ONNX Runtime cannot be imported ({error}); install it with: {install_command()}"
    ) from None


def create_session(graph: bytes, providers: list[Any], *, threads: int = 1) -> onnxruntime.InferenceSession:
    """Create a session from bytes, so that the hashed bytes run and no external file is loaded."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=providers)


class _OnnxSession:
    """An ONNX Runtime session of one member, whose graph is checked for types and shapes."""

    def __init__(self, member: Member, bundle: Bundle, graph: bytes, providers: list[Any]) -> None:
        self.name = member.name
        self.versions = {"onnxruntime": onnxruntime.__version__}
        try:
            self._session = create_session(graph, providers)
        except Exception as error:  # ONNX Runtime raises many types for a bad graph
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"bundle {bundle.path}: {self.name}: ONNX Runtime refuses the graph: {reason}"
            ) from None
        self._shape = bundle.size
        self._check(bundle)

    def _check(self, bundle: Bundle) -> None:
        """Check inputs and outputs; a second output may be the distance of the features, float32 [N]."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        signature = [(value.type, list(value.shape)[1:]) for value in (*inputs, *outputs)]
        height, width = bundle.size
        wanted = [("tensor(uint8)", [1, height, width]), ("tensor(float)", [len(bundle.classes)])]
        self.gives_distance = [value.name for value in outputs[1:]] == [DISTANCE_OUTPUT]
        if signature != wanted + [("tensor(float)", [])] * self.gives_distance:
            raise UsageError(
                f"bundle {bundle.path}: {self.name}: the graph has {signature}; "
                f"expected uint8 [N, 1, {height}, {width}] to float32 [N, {len(bundle.classes)}]"
            )
        self._input, self._output = inputs[0].name, outputs[0].name

    @property
    def input_shape(self) -> tuple[int, int]:
        return self._shape

    def close(self) -> None:
        del self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class OnnxRunner(_OnnxSession):
    """A session with one thread; callers run it from as many threads as there are cores.

    One thread per batch is faster than several threads on one batch, because it needs no barrier after each
    layer, and its scores do not depend on the number of cores.
    """

    def __init__(self, member: Member, bundle: Bundle, *, graph: bytes | None = None) -> None:
        """`graph` replaces the member's own, which computes a distance if the bundle has a limit for it."""
        if graph is None:
            graph = member.files["onnx"].path.read_bytes()
            if bundle.operating_points and bundle.operating_points.distances:
                graph += member.files[DISTANCE_OUTPUT].path.read_bytes()
        super().__init__(member, bundle, graph, ["CPUExecutionProvider"])

    def infer(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return float32 logits [N, C] of pixels, uint8 [N, 1, H, W]."""
        (logits,) = self._session.run([self._output], {self._input: pixels})
        return np.asarray(logits, np.float32)

    def enqueue(
        self, pixels: npt.NDArray[np.uint8], logits: npt.NDArray[np.float32], stream: None = None
    ) -> npt.NDArray[np.float32] | None:
        logits[:], *distances = self._session.run(None, {self._input: pixels})
        return np.asarray(distances[0], np.float32) if distances else None


class CudaOnnxRunner(_OnnxSession):
    """A session on a GPU. Its kernels run on a stream that ONNX Runtime fixes when the session is made."""

    def __init__(self, member: Member, bundle: Bundle, *, device: str, half: bool) -> None:
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UsageError(
                "--runner onnx on a GPU needs ONNX Runtime's CUDA build; install it with: "
                "pip uninstall onnxruntime; pip install onnxruntime-gpu"
            )
        import torch

        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        options = {
            "device_id": int(device.split(":")[1]),
            "user_compute_stream": str(self._stream.cuda_stream),
            "use_tf32": "0",
        }
        super().__init__(
            member, bundle, _member_graph(member, bundle, half=half), [("CUDAExecutionProvider", options)]
        )
        if self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise UsageError("--runner onnx: ONNX Runtime cannot load its CUDA libraries on this machine")
        self._session.disable_fallback()

    def enqueue(self, pixels: torch.Tensor, logits: torch.Tensor, stream: torch.cuda.Stream) -> None:
        self._stream.wait_stream(stream)
        binding = self._session.io_binding()
        device = pixels.device.index
        binding.bind_input(self._input, "cuda", device, np.uint8, tuple(pixels.shape), pixels.data_ptr())
        binding.bind_output(self._output, "cuda", device, np.float32, tuple(logits.shape), logits.data_ptr())
        run = onnxruntime.RunOptions()
        run.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(binding, run)
        stream.wait_stream(self._stream)


def _member_graph(member: Member, bundle: Bundle, *, half: bool) -> bytes:
    if not half:
        return member.files["onnx"].path.read_bytes()
    try:
        return (bundle.path / f"{member.name}.fp16.onnx").read_bytes()
    except OSError:
        raise UsageError(
            f"bundle {bundle.path}: {member.name} has no FP16 graph; make it with: "
            f"python -m build_engines {bundle.path} --target onnx, or give --precision fp32"
        ) from None
