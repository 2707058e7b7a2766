"""SPDL's pipeline around OpenCV and ONNX Runtime: its own decoders need FFmpeg's shared libraries."""

from __future__ import annotations

import cv2
import numpy as np
import onnxruntime
from spdl.pipeline import PipelineBuilder

from benchmarks.peers.job import Job
from benchmarks.peers.pixels import Pixels, by_opencv

BATCH = 16


def main(job: Job) -> None:
    cv2.setNumThreads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as many batches at once as there are cores
    sessions = [onnxruntime.InferenceSession(graph, options) for graph in job.graphs]

    def load(row: int) -> tuple[int, Pixels] | None:
        try:
            return row, by_opencv(paths[row], job.models.size)
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
        for rows, found in pipeline:
            scores[rows] = found
    job.finish(scores)


if __name__ == "__main__":
    main(Job.from_command_line())
