"""The options of a build, and the targets of each option."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.bundle.plans import RTX_CAPABILITIES
from engine.core.errors import UsageError

TARGETS = ("tensorrt", "tensorrt_rtx", "onnx")
FRONTENDS = ("onnx", "torch-tensorrt")
PRECISIONS = ("fp16", "fp32", "int8")
SMALL_BATCH = 8  # largest batch of the second profile
# limits: largest difference of a probability, smallest agreement; for INT8 any difference, and the AUC's
MAX_DIFFERENCE, MIN_AGREEMENT = 5e-3, 0.999
INT8_MAX_DIFFERENCE, INT8_MIN_AGREEMENT, MAX_AUC_LOSS = 1.0, 0.99, 0.002

# options of only some targets, with those targets
_ONLY_FOR = {
    "compute_capabilities": ("tensorrt_rtx",),
    "hardware_compatible": ("tensorrt",),
    "timing_cache": ("tensorrt",),
    "version_compatible": ("tensorrt",),
    "workspace": ("tensorrt", "tensorrt_rtx"),
    "optimization_level": ("tensorrt", "tensorrt_rtx"),
    "max_aux_streams": ("tensorrt", "tensorrt_rtx"),
}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options of a build. Raises UsageError for options that can't be combined."""

    bundle: Path
    target: str = "tensorrt"
    frontend: str = "onnx"
    precision: str = "fp16"
    batch_size: int = 128
    compute_capabilities: tuple[str, ...] = ()  # "8.6"; empty: this machine's GPU
    hardware_compatible: bool = False
    version_compatible: bool = False
    timing_cache: Path | None = None
    workspace: int | None = None  # bytes
    optimization_level: int | None = None
    max_aux_streams: int | None = None
    calibration: Path | None = None
    calibration_images: int = 256
    limit: float | None = None  # None: the default of the precision
    agreement: float | None = None
    auc_limit: float = MAX_AUC_LOSS  # int8

    def __post_init__(self) -> None:
        for name, targets in _ONLY_FOR.items():
            value = getattr(self, name)
            is_set = value is not None and value is not False and value != ()  # 0 is a value too
            if is_set and self.target not in targets:
                option = "--" + name.replace("ies", "y").replace("_", "-")
                raise UsageError(f"{option} is for --target {' or '.join(targets)}, not {self.target}")
        if self.frontend == "torch-tensorrt" and self.target != "tensorrt":
            raise UsageError(f"--frontend torch-tensorrt is for --target tensorrt, not {self.target}")
        if self.frontend == "torch-tensorrt" and self.batch_size == 1:
            raise UsageError("--frontend torch-tensorrt needs --batch-size 2 or more")
        if self.frontend == "torch-tensorrt" and self.timing_cache:
            raise UsageError("--timing-cache is for --frontend onnx; Torch-TensorRT has its own timing cache")
        if self.timing_cache and not self.timing_cache.absolute().parent.is_dir():
            raise UsageError(f"--timing-cache {self.timing_cache}: its folder does not exist")
        if self.target == "onnx" and self.precision == "fp32":
            raise UsageError(
                "--target onnx --precision fp32: nothing to build, the bundle already holds this graph"
            )
        if self.precision == "int8" and self.target != "onnx":
            raise UsageError(f"--precision int8 is for --target onnx (on the CPU), not {self.target}")

    @property
    def limits(self) -> tuple[float, float]:
        """Return the limits of the parity check: largest difference of a probability, smallest agreement."""
        limit, agreement = (
            (INT8_MAX_DIFFERENCE, INT8_MIN_AGREEMENT)
            if self.precision == "int8"
            else (MAX_DIFFERENCE, MIN_AGREEMENT)
        )
        return (
            limit if self.limit is None else self.limit,
            agreement if self.agreement is None else self.agreement,
        )

    @property
    def batches(self) -> tuple[int, ...]:
        """Return the largest batch of each profile."""
        if self.frontend == "torch-tensorrt" or self.batch_size <= SMALL_BATCH:
            return (self.batch_size,)
        return (self.batch_size, SMALL_BATCH)


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Parse 'sm86,sm89' or '8.6' into ("8.6", ...). Raises UsageError."""
    capabilities = []
    for item in text.split(","):
        digits = re.fullmatch(r"\s*(?:sm_?)?(\d+)\.?(\d)\s*", item.lower())
        capability = f"{digits[1]}.{digits[2]}" if digits else None
        if capability not in RTX_CAPABILITIES:
            allowed = ", ".join("sm" + capability.replace(".", "") for capability in RTX_CAPABILITIES)
            raise UsageError(
                f"--compute-capability {item.strip()!r}: TensorRT for RTX builds for {allowed}"
                " (other GPUs: --target tensorrt, on that GPU)"
            )
        capabilities.append(capability)
    return tuple(dict.fromkeys(capabilities))
