"""Measure the effect of corrupt files on common patterns.

    python -m benchmarks.peers.mishaps PATTERN MANIFEST BUNDLE OUTPUT --threads N

`timm` follows its `inference.py`: ImageDataset, create_loader, file names joined by position. `ray` is
`read_images` as in its documentation. `ray-skip` also skips failed blocks.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.peers.job import PeerJob

BATCH = 8


def open_sessions(job: PeerJob) -> list[onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    return [onnxruntime.InferenceSession(graph, options) for graph in job.graphs]


def run_timm(job: PeerJob) -> None:
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(job.manifest.parent), input_img_mode="L")
    loader = create_loader(
        dataset,
        (1, *job.bundle.size),
        BATCH,
        use_prefetcher=False,
        interpolation="bilinear",
        mean=(0.0,),
        std=(1.0,),
        crop_pct=1.0,
        crop_mode="squash",
        num_workers=1,
    )
    sessions, probabilities = open_sessions(job), []
    for images, _ in loader:
        pixels = np.rint(images.numpy() * 255).astype(np.uint8)
        probabilities.append(job.average([session.run(None, {"pixels": pixels})[0] for session in sessions]))
    by_name = dict(zip(dataset.filenames(basename=True), np.concatenate(probabilities), strict=True))
    job.start()
    job.finish(np.stack([by_name[name] for name in job.names]))


def run_ray_read_images(job: PeerJob, *, skip: bool) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=job.threads, include_dashboard=False, object_store_memory=1 << 28, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if skip:
        context.max_errored_blocks = -1
    images = ray.data.read_images(
        job.paths,
        size=job.bundle.size,
        mode="L",
        include_paths=True,
        override_num_blocks=len(job.paths) // BATCH,
    )
    sessions, scores = open_sessions(job), job.no_scores()
    rows = {path: row for row, path in enumerate(job.paths)}
    for batch in images.iter_batches(batch_size=BATCH):
        pixels = batch["image"].reshape(-1, 1, *job.bundle.size)
        logits = [session.run(None, {"pixels": pixels})[0] for session in sessions]
        scores[[rows[path] for path in batch["path"]]] = job.average(logits)
    job.start()
    job.finish(scores)


PATTERNS: dict[str, Any] = {
    "timm": run_timm,
    "ray": lambda job: run_ray_read_images(job, skip=False),
    "ray-skip": lambda job: run_ray_read_images(job, skip=True),
}

if __name__ == "__main__":
    PATTERNS[sys.argv.pop(1)](PeerJob.from_command_line())
