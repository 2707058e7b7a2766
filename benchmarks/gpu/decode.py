"""Measure decoding alone: DALI's options and threads, and the CPU's decoder process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.core.overlap import Meter
from engine.core.records import Batch, Part
from engine.core.settings import Limits
from engine.preprocess import gpu_tuning
from engine.preprocess.gpu import DecodeOptions, GpuPreprocess
from engine.preprocess.stage import Preprocess
from engine.reader.reader import Reader

HW_LOADS = (0.0, 0.1, 0.2, 0.4, 0.65, 0.9, 1.0)
HUFFMAN = (0, 250_000, 1_000_000)
SIZE = (224, 224)


def batches(images: list[Path], count: int, batch: int) -> list[Batch]:
    """Read `count` batches of encoded images, repeating the files."""
    paths = [str(images[row % len(images)]) for row in range(count * batch)]
    part = Part(0, np.arange(len(paths)), paths, pa.table({}))
    limits = Limits(memory=8 << 30)
    encoded = list(Reader(Path(), batch, 8, limits=limits).stage([part], Meter("read")))
    for encoded_batch in encoded:
        encoded_batch.release()
    return encoded


def measure_rate(
    sample: list[Batch],
    decoding: DecodeOptions,
    *,
    batch: int,
    threads: int,
    device: int | None,
    timed_s: float,
) -> float:
    """Return the images/s of the GPU stage; with `device` None, DALI runs on the CPU."""
    limits = Limits(memory=2 << 30)
    with (
        Preprocess(
            size=SIZE, batch_size=min(batch, 32), threads=threads, decoding_bytes=limits.decoding_bytes
        ) as cpu,
        GpuPreprocess(
            cpu, size=SIZE, batch_size=batch, threads=threads, device_id=device, decoding=decoding
        ) as stage,
    ):
        cpu.decoder.await_start()
        return gpu_tuning.measure_rate(stage.stage, sample, decoding.on_gpu, timed_s)


def measure_grid(
    images: list[Path], *, batch: int, cores: int, device: int | None, timed_s: float = 1.0
) -> list[dict[str, Any]]:
    """Measure all options on all cores, the best on fewer cores, the CPU alone, and shares for the CPU."""
    sample = batches(images, 4, batch)
    rows: list[dict[str, Any]] = []

    def measure(threads: int, **options: Any) -> float:
        rate = measure_rate(
            sample, DecodeOptions(**options), batch=batch, threads=threads, device=device, timed_s=timed_s
        )
        rows.append({"threads": threads, **options, "images_per_s": round(rate, 1)})
        return rate

    loads, thresholds = (HW_LOADS, HUFFMAN) if device is not None else (HW_LOADS[:1], HUFFMAN[:1])
    rates = {
        (load, threshold): measure(cores, hw_decoder_load=load, hybrid_huffman_threshold=threshold)
        for load in loads
        for threshold in thresholds
    }
    load, threshold = max(rates, key=lambda options: rates[options])
    best = {"hw_decoder_load": load, "hybrid_huffman_threshold": threshold}
    for threads in sorted({max(1, cores // 4), max(1, cores // 2)} - {cores}):
        measure(threads, **best)
    for share in (0.1, 0.2, 0.3, 0.5, 1.0) if device is not None else (1.0,):
        measure(cores, **best, cpu_share=share)
    return rows
