"""ONNX Runtime with a pool of threads that decodes ahead with OpenCV."""

from __future__ import annotations

import numpy as np
import onnxruntime

from benchmarks.peers.job import PeerJob
from benchmarks.peers.prefetch import decode_ahead

BATCH = 16


def main(job: PeerJob) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the decoders need the cores
    sessions = [onnxruntime.InferenceSession(graph, options) for graph in job.graphs]

    def score(pixels: np.ndarray) -> np.ndarray:
        return job.average([session.run(None, {"pixels": pixels})[0] for session in sessions])

    scores = job.no_scores()
    score(job.blank(BATCH))
    job.start()
    for rows, pixels in decode_ahead(job, BATCH):
        scores[rows] = score(pixels)
    job.finish(scores)


if __name__ == "__main__":
    main(PeerJob.from_command_line())
