"""SPDL's pipeline with OpenCV and ONNX Runtime; SPDL's decoders need FFmpeg's shared libraries."""

from __future__ import annotations

import cv2
import numpy as np
import onnxruntime
from spdl.pipeline import PipelineBuilder

from benchmarks.peers.job import PeerJob
from benchmarks.peers.pixels import Pixels, load_with_opencv

BATCH = 16


def main(job: PeerJob) -> None:
    cv2.setNumThreads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one batch per core runs at once
    sessions = [onnxruntime.InferenceSession(graph, options) for graph in job.graphs]

    def load(row: int) -> tuple[int, Pixels] | None:
        try:
            return row, load_with_opencv(paths[row], job.bundle.size)
        except OSError as error:
            print(f"{paths[row]}: {error}")
            return None  # the pipeline drops it

    def score(images: list[tuple[int, Pixels]]) -> tuple[list[int], np.ndarray]:
        pixels = np.stack([pixels for _, pixels in images])
        logits = [session.run(None, {"pixels": pixels})[0] for session in sessions]
        return [row for row, _ in images], job.average(logits)

    paths, scores = job.paths, job.no_scores()
    score([(0, job.blank(1)[0])] * BATCH)
    pipeline = (
        PipelineBuilder()
        .add_source(range(len(paths)))
        .pipe(load, concurrency=job.threads)
        .aggregate(BATCH)
        .pipe(score, concurrency=job.threads)
        .add_sink(2)
        .build(num_threads=2 * job.threads)
    )
    job.start()
    with pipeline.auto_stop():
        for rows, probabilities in pipeline:
            scores[rows] = probabilities
    job.finish(scores)


if __name__ == "__main__":
    main(PeerJob.from_command_line())
