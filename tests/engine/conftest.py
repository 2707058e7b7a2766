from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from engine.scoring import gpu
from tests.helpers.runs import Screen, screen_columns
from tests.helpers.stand_in import StandIn


@pytest.fixture
def launched_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch the real kernel, in Triton's interpreter, on the stand-in's current stream."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the stand-in is for machines without a GPU")

    class Launched(gpu.FusedSoftmax):
        def enqueue(self, logits: torch.Tensor, packed: torch.Tensor) -> None:
            run, cuda = super().enqueue, _get_current_dispatch_mode()
            assert isinstance(cuda, StandIn)
            cuda.launch(lambda: run(logits, packed), reads=[logits], writes=[packed])

    monkeypatch.setattr(gpu, "FusedSoftmax", Launched)


@pytest.fixture
def screened(archive: Path, bundle: Path, tmp_path: Path) -> Screen:
    """Return a function that screens named images into a named folder; the runs start a minute apart."""
    begun = 0

    def run(name: str, images: list[str], **options: Any) -> Path:
        nonlocal begun
        columns = {"path": images, **options.pop("columns", {})}
        output = tmp_path / name
        screen_columns(archive, output, columns, **{"bundle": bundle, "part_rows": 3, **options})
        begun += 1
        began_at(output, begun)
        return output

    return run


def began_at(results: Path, minute: int) -> None:
    file = results / "_run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps(run | {"started": f"2031-05-17T06:{minute:02}:00+00:00"}))
