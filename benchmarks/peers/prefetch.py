"""Decode ahead with OpenCV in a pool of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np

from benchmarks.peers.job import PeerJob, batches
from benchmarks.peers.pixels import Pixels, load_with_opencv

AHEAD = 2  # batches


def decode_ahead(job: PeerJob, batch: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield rows and their pixels uint8 [n, 1, H, W] by batch, without files that can't be decoded."""
    cv2.setNumThreads(1)
    paths, size = job.paths, job.bundle.size

    def load(row: int) -> Pixels | None:
        try:
            return load_with_opencv(paths[row], size)
        except OSError as error:
            print(f"{paths[row]}: {error}")
            return None

    with ThreadPoolExecutor(job.threads) as pool:
        loading: deque[list[tuple[int, Future[Pixels | None]]]] = deque()
        for rows in batches(len(paths), batch):
            loading.append([(row, pool.submit(load, row)) for row in rows])
            if len(loading) > AHEAD:
                yield from _batch(loading.popleft())
        while loading:
            yield from _batch(loading.popleft())


def _batch(loading: list[tuple[int, Future[Pixels | None]]]) -> Iterator[tuple[list[int], np.ndarray]]:
    images = [(row, pixels) for row, future in loading if (pixels := future.result()) is not None]
    if images:
        rows, pixels = zip(*images, strict=True)
        yield list(rows), np.stack(pixels)
