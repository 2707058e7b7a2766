"""The PyTorch back end: a member from its architecture and safetensors, FP16, channels-last."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from engine import network
from engine.bundle import Bundle, Member


class _Precision(nn.Module):
    """Float32 up to the first convolution, where gray levels over 255 are exact; then half precision."""

    def __init__(self, module: network.OneChannel | network.Network, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        module.base.to(dtype)
        module.head.to(dtype)
        self._dtype = dtype

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        unit = self.module.planes(pixels).to(self._dtype, memory_format=torch.channels_last)
        logits: torch.Tensor = self.module.head(self.module.base(unit)).float()
        return logits


class TorchRunner:
    """Fused, in one precision, on one device. Each new batch size compiles anew, when `compiled`."""

    def __init__(self, member: Member, bundle: Bundle, *, device: str, half: bool, compiled: bool) -> None:
        self.name = member.name
        self.versions = {"torch": str(torch.__version__)}
        self._shape = bundle.size
        fused = network.with_fused_norms(network.folded(network.load(member, bundle)))
        module = _Precision(fused, torch.float16 if half else torch.float32).eval().to(device)
        module.to(memory_format=torch.channels_last)
        self._module = torch.compile(module, dynamic=False) if compiled else module

    @property
    def input_shape(self) -> tuple[int, int]:
        return self._shape

    @torch.inference_mode()
    def enqueue(self, pixels: torch.Tensor, logits: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        """uint8 [B, 1, H, W] to float32 [B, C], in the order of `stream`; without one, on the CPU."""
        with torch.cuda.stream(stream):
            logits.copy_(self._module(pixels))

    def close(self) -> None:
        del self._module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
