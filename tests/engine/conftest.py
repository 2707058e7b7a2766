from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from engine.gpu import step
from tests.helpers.stand_in import StandIn


@pytest.fixture
def launched_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kernel, in Triton's interpreter, launched on the stand-in's current stream."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the stand-in is for machines without a GPU")

    class Launched(step.Fusion):
        def enqueue(self, logits: torch.Tensor, packed: torch.Tensor) -> None:
            run, cuda = super().enqueue, _get_current_dispatch_mode()
            assert isinstance(cuda, StandIn)
            cuda.launch(lambda: run(logits, packed), reads=[logits], writes=[packed])

    monkeypatch.setattr(step, "Fusion", Launched)
