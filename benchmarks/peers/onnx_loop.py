"""ONNX Runtime in a loop over Pillow's images, the usual script."""

from __future__ import annotations

import numpy as np
import onnxruntime

from benchmarks.peers.job import PeerJob, batches
from benchmarks.peers.pixels import load_with_pillow

BATCH = 16


def main(job: PeerJob) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    sessions = [onnxruntime.InferenceSession(graph, options) for graph in job.graphs]

    def score(pixels: np.ndarray) -> np.ndarray:
        return job.average([session.run(None, {"pixels": pixels})[0] for session in sessions])

    paths, scores = job.paths, job.no_scores()
    score(job.blank(BATCH))
    job.start()
    for rows in batches(len(paths), BATCH):
        images, good = [], []
        for row in rows:
            try:
                images.append(load_with_pillow(paths[row], job.bundle.size))
                good.append(row)
            except OSError as error:
                print(f"{paths[row]}: {error}")
        if good:
            scores[good] = score(np.stack(images))
    job.finish(scores)


if __name__ == "__main__":
    main(PeerJob.from_command_line())
