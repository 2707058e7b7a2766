"""Rates in images per second of common PyTorch code, on the same files and networks.

Each peer runs the members in sequence in half precision, averages their softmax and copies it to the host.
No peer keeps a row per image, tolerates a bad file or can resume.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from engine.bundle import bundle as bundles
from engine.runners import network

SIZE = (224, 224)
Batches = Iterator[torch.Tensor]


class ImageDataset(Dataset[torch.Tensor]):
    """Decode with PIL to gray and resize to 224 x 224, as usual."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self._paths[index]) as picture:
            small = picture.convert("L").resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(small).copy())[None]


def _loader(paths: list[Path], batch: int, workers: int, device: str) -> Batches:
    loader = DataLoader(
        ImageDataset(paths), batch_size=batch, num_workers=workers, pin_memory=device != "cpu"
    )
    for pixels in loader:
        yield pixels.to(device, non_blocking=True)


def _torchvision(paths: list[Path], batch: int, workers: int, device: str) -> Batches:
    """Decode image by image with torchvision's nvJPEG and resize on the GPU."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    for start in range(0, len(paths), batch):
        files = [read_file(str(path)) for path in paths[start : start + batch]]
        decoded = decode_jpeg(files, mode=ImageReadMode.GRAY, device=device)
        small = [interpolate(image[None].float(), SIZE, mode="bilinear", antialias=True) for image in decoded]
        yield torch.cat(small).round().clamp(0, 255).to(torch.uint8)


def _dali(paths: list[Path], batch: int, workers: int, device: str) -> Batches:
    """Use DALI's reader, decoder, resize and PyTorch iterator with their defaults."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    gpu = device != "cpu"

    def pixels() -> Any:
        data, _ = fn.readers.file(files=[str(path) for path in paths], name="reader")
        gray = fn.decoders.image(data, device="mixed" if gpu else "cpu", output_type=types.GRAY)
        return fn.transpose(fn.resize(gray, size=list(SIZE), antialias=True), perm=[2, 0, 1])

    pipeline = pipeline_def(pixels)(batch_size=batch, num_threads=workers, device_id=0 if gpu else None)
    for output in DALIGenericIterator(pipeline, ["pixels"], reader_name="reader"):
        yield output[0]["pixels"]


Source = Callable[[list[Path], int, int, str], Batches]
PEERS: dict[str, tuple[Source, bool]] = {  # source of the pixels; whether the members are compiled
    "DataLoader + eager": (_loader, False),
    "DataLoader + compile": (_loader, True),
    "torchvision GPU decode + compile": (_torchvision, True),
    "DALI + compile": (_dali, True),
}


def measure_rates(
    bundle: Path, images: list[Path], *, rows: int, batch: int, workers: int, device: str
) -> list[dict[str, Any]]:
    """Return the images/s of each peer over `rows` images after a warm-up, or its error."""
    return [
        {
            "peer": name,
            **_measure_rate(bundle, images, source, rows, batch, workers, device, compiled=compiled),
        }
        for name, (source, compiled) in PEERS.items()
    ]


def _measure_rate(
    bundle: Path,
    images: list[Path],
    source: Source,
    rows: int,
    batch: int,
    workers: int,
    device: str,
    *,
    compiled: bool,
) -> dict[str, Any]:
    score = _ensemble(bundle, device, compiled=compiled and device != "cpu")
    paths = [images[row % len(images)] for row in range(rows)]
    try:
        for pixels in source(paths[: 2 * batch], batch, workers, device):
            score(pixels)
        start, scored = time.perf_counter(), 0
        for pixels in source(paths, batch, workers, device):
            scored += len(score(pixels))
    except Exception as error:  # the peer or its decoder may be missing
        return {"images_per_s": None, "problem": f"{type(error).__name__}: {error}"[:200]}
    return {"images_per_s": round(scored / (time.perf_counter() - start), 1), "rows": scored, "batch": batch}


def _ensemble(path: Path, device: str, *, compiled: bool) -> Callable[[torch.Tensor], np.ndarray]:
    bundle = bundles.load_bundle(path)
    dtype = torch.float16 if device != "cpu" else torch.float32
    members = []
    for member in bundle.members:
        module = network.load_member(member, bundle).to(device=device, memory_format=torch.channels_last)
        module.base.to(dtype)
        module.head.to(dtype)
        members.append(torch.compile(module.base) if compiled else module.base)
        members.append(module.head)

    @torch.inference_mode()
    def score(pixels: torch.Tensor) -> np.ndarray:
        planes = (pixels.to(dtype) / 255).repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
        total = torch.zeros(())
        for base, head, weight in zip(members[::2], members[1::2], bundle.weights, strict=True):
            total = total.to(device) + weight * torch.softmax(head(base(planes)).float(), dim=1)
        return total.cpu().numpy()

    return score
