"""Ray Data: files to blocks, a pool of scoring actors, Parquet output.

`read_images` fails at the first file that is no image, so a separate map decodes the bytes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray

from benchmarks.peers.job import PeerJob
from benchmarks.peers.pixels import decode_with_opencv

BATCH = 16
CPUS_PER_READER = 0.75  # of each scoring actor; the rest is for reading and decoding


class MembersActor:
    """An actor with one thread and all members."""

    def __init__(self, job: PeerJob, ready: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._job = job
        self._sessions = [onnxruntime.InferenceSession(graph, options) for graph in job.graphs]
        self._score(job.blank(BATCH))
        (ready / str(os.getpid())).write_text(str(time.monotonic()))

    def _score(self, pixels: np.ndarray) -> np.ndarray:
        return self._job.average([session.run(None, {"pixels": pixels})[0] for session in self._sessions])

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        good = rows["status"] == "ok"
        scores = np.full((len(good), len(self._job.columns)), np.nan, np.float32)
        if good.any():
            scores[good] = self._score(np.stack(rows["pixels"][good]))
        columns = dict(zip(self._job.columns, scores.T, strict=True))
        return {"path": rows["path"], "status": rows["status"], **columns}


def main(job: PeerJob) -> None:
    ready = job.output.with_name(job.output.name + "-ready")
    ready.mkdir(parents=True)
    size, blank = job.bundle.size, job.blank(1)[0]

    def load(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"path": row["path"], "status": "ok", "pixels": decode_with_opencv(row["bytes"], size)}
        except OSError:
            return {"path": row["path"], "status": "corrupt", "pixels": blank}

    ray.init(num_cpus=job.threads, include_dashboard=False, object_store_memory=1 << 29, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = 300  # reading starts when the actors are ready
    spare = (1 - CPUS_PER_READER) / 2
    rows = ray.data.read_binary_files(
        job.paths,
        include_paths=True,
        override_num_blocks=-(-len(job.paths) // BATCH),
        ray_remote_args={"num_cpus": spare},
    ).map(load, num_cpus=spare)
    scored = rows.map_batches(
        MembersActor,
        fn_constructor_args=(job, ready),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=job.threads),
        num_cpus=CPUS_PER_READER,
    )
    scored.write_parquet(str(job.output), ray_remote_args={"num_cpus": spare})
    job.start(max(float(path.read_text()) for path in ready.iterdir()))
    job.stop()


if __name__ == "__main__":
    main(PeerJob.from_command_line())
