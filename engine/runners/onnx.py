"""The ONNX Runtime back end: float32 on the CPU."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from engine.bundle import Bundle, Member
from engine.errors import UsageError

try:
    import onnxruntime
except ImportError as error:
    raise UsageError(
        f"ONNX Runtime can't be imported ({error}); install it with: pip install onnxruntime"
    ) from None


class OnnxRunner:
    """One session with one thread; callers run it from as many threads as there are cores.

    One thread per batch needs no barrier between a layer's threads, is faster than several threads on one
    batch, and gives scores that don't depend on how many cores there are.
    """

    def __init__(self, member: Member, bundle: Bundle) -> None:
        self.name = member.name
        self.versions = {"onnxruntime": onnxruntime.__version__}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            # from bytes: what was hashed is what runs, and no external data file can be pulled in
            self._session = onnxruntime.InferenceSession(
                member.files["onnx"].path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises many types for a bad graph
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"bundle {bundle.path}: {self.name}: ONNX Runtime refuses it: {reason}"
            ) from None
        self._shape = bundle.size
        self._check(bundle)

    def _check(self, bundle: Bundle) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        found = [(value.type, list(value.shape)[1:]) for value in (*inputs, *outputs)]
        height, width = bundle.size
        wanted = [("tensor(uint8)", [1, height, width]), ("tensor(float)", [len(bundle.classes)])]
        if found != wanted:
            raise UsageError(
                f"bundle {bundle.path}: {self.name}: the graph has {found}; "
                f"expected uint8 [N, 1, {height}, {width}] to float32 [N, {len(bundle.classes)}]"
            )
        self._input = inputs[0].name

    @property
    def input_shape(self) -> tuple[int, int]:
        return self._shape

    def infer(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        (logits,) = self._session.run(None, {self._input: pixels})
        return np.asarray(logits, np.float32)

    def close(self) -> None:
        del self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
