"""PyTorch's DataLoader over Pillow's images and the members in eager mode, the usual script."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.job import PeerJob
from benchmarks.peers.pixels import load_with_pillow
from engine.runners import network

BATCH = 16


class ImageDataset(Dataset[Any]):
    """Items are row, success of decoding, and pixels uint8 [1, H, W], zeros if it failed."""

    def __init__(self, paths: list[str], size: tuple[int, int]) -> None:
        self._paths, self._size = paths, size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> tuple[int, bool, torch.Tensor]:
        try:
            pixels = load_with_pillow(self._paths[row], self._size)
        except OSError as error:
            print(f"{self._paths[row]}: {error}")
            return row, False, torch.zeros((1, *self._size), dtype=torch.uint8)
        return row, True, torch.from_numpy(pixels.copy())


@torch.inference_mode()
def main(job: PeerJob, *, compiled: bool = False) -> None:
    torch.set_num_threads(job.threads)
    members = [network.load_member(member, job.bundle).eval() for member in job.bundle.members]
    if compiled:
        members = [torch.compile(member, dynamic=False) for member in members]

    def score(pixels: torch.Tensor) -> np.ndarray:
        missing = BATCH - len(pixels)  # a compiled graph has one shape
        padded = torch.nn.functional.pad(pixels, (0, 0) * 3 + (0, missing)) if compiled else pixels
        return job.average([member(padded)[: len(pixels)].numpy() for member in members])

    scores = job.no_scores()
    score(torch.from_numpy(job.blank(BATCH)))
    loader = DataLoader(ImageDataset(job.paths, job.bundle.size), batch_size=BATCH, num_workers=job.threads)
    job.start()
    for rows, good, pixels in loader:
        scores[rows[good].numpy()] = score(pixels)[good.numpy()]
    job.finish(scores)


if __name__ == "__main__":
    main(PeerJob.from_command_line())
