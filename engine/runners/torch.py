"""The PyTorch back end: a member from its architecture and safetensors, FP16, channels-last."""

from __future__ import annotations

from typing import Self

import torch

from engine.bundle.bundle import Bundle, Member
from engine.runners.network import load_for_inference


class TorchRunner:
    """A fused network in one precision on one device. If `compiled`, each new batch size is compiled."""

    def __init__(self, member: Member, bundle: Bundle, *, device: str, half: bool, compiled: bool) -> None:
        self.name = member.name
        self.versions = {"torch": str(torch.__version__)}
        self._shape = bundle.size
        torch.backends.cudnn.allow_tf32 = False  # fp32 in full
        module = load_for_inference(member, bundle, torch.float16 if half else torch.float32).to(device)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # all members share one cache
        self._module = torch.compile(module, dynamic=False) if compiled else module

    @property
    def input_shape(self) -> tuple[int, int]:
        return self._shape

    @torch.inference_mode()
    def enqueue(self, pixels: torch.Tensor, logits: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        """Compute logits, float32 [B, C], of pixels, uint8 [B, 1, H, W], in the order of any `stream`."""
        with torch.cuda.stream(stream):
            logits.copy_(self._module(pixels))

    def close(self) -> None:
        del self._module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
