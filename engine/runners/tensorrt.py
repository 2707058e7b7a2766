"""The TensorRT back end: runs a member's plan. TensorRT and TensorRT for RTX have the same Python API."""

from __future__ import annotations

import contextlib
import importlib
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar

from engine.bundle.bundle import Bundle, Member
from engine.bundle.plans import Plan
from engine.core.errors import EngineError, UsageError
from engine.core.extras import install_command

if TYPE_CHECKING:
    import tensorrt as trt
    import torch

T = TypeVar("T")

# the metapackage of TensorRT for RTX may be absent where its bindings are installed
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
EXTRAS = {"tensorrt": "gpu", "tensorrt_rtx": "build"}


class TensorRTBackend:
    """An imported package, TensorRT or TensorRT for RTX, with a logger that keeps its messages.

    Raises UsageError when the package is missing or broken.
    """

    if TYPE_CHECKING:
        import tensorrt as trt

    def __init__(self, name: str) -> None:
        self.name = name
        self.trt = _import_backend(name)  # type: ignore[assignment,misc,unused-ignore]
        self.logger = _make_logger(self.trt)

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @cached_property
    def runtime(self) -> trt.Runtime:
        """Return the TensorRT runtime, which must outlive all engines."""
        return self.checked(self.trt.Runtime(self.logger), "starting the runtime")

    def checked(self, result: T | None, what: str) -> T:
        """Return `result`. Raises EngineError with TensorRT's last messages if it is None, False or negative.

        These are TensorRT's signs of failure; `what` names the failed action.
        """
        messages = "; ".join(self.logger.errors[-3:]) or "no reason given"
        self.logger.errors.clear()
        if result is None or result is False or (isinstance(result, int) and result < 0):
            raise EngineError(f"{self.name} {self.version}: {what} failed: {messages}")
        return result


def _import_backend(name: str) -> Any:
    reason = ""
    for module in _MODULES[name]:
        try:
            return importlib.import_module(module)
        except Exception as error:  # many types: missing libraries, another CUDA, no driver
            reason = reason or " ".join(f"{error}".split())[:160]
    command = install_command(EXTRAS[name])
    raise UsageError(f"{name} cannot be imported ({reason}); install it with: {command}") from None


@cache
def _make_logger(module: Any) -> Any:
    """Make the logger of the process, a subclass of TensorRT's logger class."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            with contextlib.suppress(Exception):  # called from C++, which must not see an exception
                text = " ".join(message.split())[:300]
                if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                    self.errors.append(text)
                elif severity == module.ILogger.WARNING:
                    self.warnings.append(text)

    return Logger()


def deserialize_engine(backend: TensorRTBackend, plan: bytes, *, version_compatible: bool) -> trt.ICudaEngine:
    """Deserialize a plan on the current GPU. Raises EngineError.

    A version-compatible plan contains a small runtime, code for the host, which must be allowed.
    """
    backend.runtime.engine_host_code_allowed = version_compatible
    return backend.checked(backend.runtime.deserialize_cuda_engine(plan), "loading the plan")


def tensor_names(backend: TensorRTBackend, engine: trt.ICudaEngine) -> tuple[str, str]:
    """Return the names of the only input and the only output."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    mode = backend.trt.TensorIOMode
    inputs = [name for name in names if engine.get_tensor_mode(name) == mode.INPUT]
    outputs = [name for name in names if engine.get_tensor_mode(name) == mode.OUTPUT]
    if len(inputs) != 1 or len(outputs) != 1:
        raise EngineError(f"the plan has inputs {inputs} and outputs {outputs}; expected one of each")
    return inputs[0], outputs[0]


class TensorRTRunner:
    """A TensorRT engine with an execution context for each pair of input and output buffers."""

    def __init__(self, member: Member, bundle: Bundle, plan: Plan) -> None:
        self.name = member.name
        self._shape, self._classes = bundle.size, len(bundle.classes)
        self._backend = TensorRTBackend(plan.passport.backend)
        self.versions = {self._backend.name: self._backend.version}
        try:
            self._engine = deserialize_engine(
                self._backend, plan.read(), version_compatible=plan.passport.version_compatible
            )
            self._input, self._output = tensor_names(self._backend, self._engine)
            self._check_types()
        except EngineError as error:
            raise UsageError(f"plan {plan.path}: {error}; {plan.passport.rebuild(bundle.path)}") from None
        self._contexts: dict[tuple[int, int], trt.IExecutionContext] = {}

    def _check_types(self) -> None:
        height, width = self._shape
        trt = self._backend.trt
        tensors = {
            name: (self._engine.get_tensor_dtype(name), tuple(self._engine.get_tensor_shape(name))[1:])
            for name in (self._input, self._output)
        }
        wanted = {
            self._input: (trt.DataType.UINT8, (1, height, width)),
            self._output: (trt.DataType.FLOAT, (self._classes,)),
        }
        if tensors != wanted:
            raise EngineError(f"the tensors of the plan are {tensors}; expected: {wanted}")

    @property
    def input_shape(self) -> tuple[int, int]:
        return self._shape

    def enqueue(self, pixels: torch.Tensor, logits: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Compute logits, float32 [B, C], of pixels, uint8 [B, 1, H, W], in the order of `stream`."""
        key = (pixels.data_ptr(), logits.data_ptr())
        context = self._contexts.get(key) or self._contexts.setdefault(
            key, self._make_context(pixels, logits, stream)
        )
        self._backend.checked(context.execute_async_v3(stream.cuda_stream), f"running {self.name}")

    def _make_context(
        self, pixels: torch.Tensor, logits: torch.Tensor, stream: torch.cuda.Stream
    ) -> trt.IExecutionContext:
        checked = self._backend.checked
        context = checked(self._create_context(), "making an execution context")
        profile = self._find_profile(len(pixels))
        checked(context.set_optimization_profile_async(profile, stream.cuda_stream), "choosing the profile")
        checked(context.set_input_shape(self._input, tuple(pixels.shape)), f"the shape {tuple(pixels.shape)}")
        checked(context.set_tensor_address(self._input, pixels.data_ptr()), "binding the pixels")
        checked(context.set_tensor_address(self._output, logits.data_ptr()), "binding the logits")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise EngineError(f"{self.name}: TensorRT cannot infer the shapes of the plan: {error}") from None
        if missing:
            raise EngineError(f"{self.name}: TensorRT does not know the shapes of {', '.join(missing)}")
        return context

    def _create_context(self) -> trt.IExecutionContext:
        if self._backend.name != "tensorrt_rtx":
            return self._engine.create_execution_context()
        # by default slower kernels run until those for the shape are compiled; a CUDA graph would keep them
        api: Any = self._backend.trt
        config: Any = self._engine.create_runtime_config()
        strategies = api.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return self._engine.create_execution_context(config)

    def _find_profile(self, batch_size: int) -> int:
        """Return the profile with the smallest maximum batch that is at least `batch_size`."""
        limits = [
            (int(self._engine.get_tensor_profile_shape(self._input, index)[2][0]), index)
            for index in range(self._engine.num_optimization_profiles)
        ]
        fits = [index for largest, index in sorted(limits) if largest >= batch_size]
        if not fits:
            raise UsageError(
                f"{self.name}: the plan takes at most {max(limits)[0]} images a batch, not {batch_size}"
            )
        return fits[0]

    def close(self) -> None:
        self._contexts.clear()
        del self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
