"""Decode folders of images as on a GPU, with DALI's CPU decoders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from engine.core.overlap import Meter
from engine.core.records import Batch, Status
from engine.preprocess.gpu import DecodedPixels, DecodeOptions, GpuPreprocess
from engine.preprocess.stage import Preprocess
from engine.scoring.gpu_slots import Slot
from tests.helpers.pixels import read_batches

SIZE = (64, 64)


def batches_of(folder: Path, decoding: DecodeOptions, batch_size: int = 8) -> Iterator[Batch]:
    names = sorted(path.name for path in folder.iterdir())
    return read_batches(folder, names, batch_size=batch_size, on_gpu=decoding.on_gpu)


def decoded(folder: Path, decoding: DecodeOptions | None = None, batch_size: int = 8) -> dict[str, object]:
    """Return the pixels by file name, or status and text of the failure."""
    decoding = decoding or DecodeOptions()
    result: dict[str, object] = {}
    with (
        Preprocess(size=SIZE, batch_size=4, threads=2, decoding_bytes=1 << 29) as cpu,
        GpuPreprocess(
            cpu, size=SIZE, batch_size=batch_size, threads=2, device_id=None, decoding=decoding
        ) as preprocess,
    ):
        for batch in preprocess.stage(batches_of(folder, decoding, batch_size), Meter("preprocess")):
            pixels = in_a_slot(batch.device_pixels, len(batch.index))
            names = batch.part.paths[batch.start : batch.start + batch.rows]
            result |= {names[position]: row for position, row in zip(batch.index, pixels, strict=True)}
            result |= {
                names[position]: (Status(batch.status[position]), text)
                for position, text in batch.errors.items()
            }
            assert len(batch.index) + len(batch.errors) == batch.rows
    return result


def in_a_slot(pixels: DecodedPixels, count: int) -> np.ndarray:
    """Return the pixels that `copy_to` writes to a slot; check that it changes nothing else."""
    filled = torch.full((count + 3, 1, *SIZE), 77, dtype=torch.uint8)
    none = torch.empty(0)
    slot = Slot(filled, torch.zeros_like(filled), none, none, none, copied=None, done=None)

    class Cuda:
        @staticmethod
        def stream(stream: object):
            import contextlib

            return contextlib.nullcontext()

    pixels.copy_to(slot, None, Cuda)
    assert (filled[count:] == 77).all()
    return filled[:count].numpy()
