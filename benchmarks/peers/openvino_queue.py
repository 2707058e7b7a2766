"""OpenVINO's AsyncInferQueue over both members in one model, fed by threads that decode ahead with OpenCV."""

from __future__ import annotations

import numpy as np
import openvino

from benchmarks.peers.job import PeerJob
from benchmarks.peers.prefetch import decode_ahead

BATCH = 8


def merge_members(core: openvino.Core, job: PeerJob) -> openvino.Model:
    """Merge all members behind one input, so that they share one pool of threads."""
    first, *others = [core.read_model(graph) for graph in job.graphs]
    results = [*first.get_results()]
    for other in others:
        for use in other.input(0).get_target_inputs():
            use.replace_source_output(first.input(0).get_node().output(0))
        results += other.get_results()
    model = openvino.Model(results, first.get_parameters())
    model.reshape([BATCH, 1, *job.bundle.size])
    return model


def main(job: PeerJob) -> None:
    core = openvino.Core()
    model = core.compile_model(
        merge_members(core, job),
        "CPU",
        {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 if the processor supports it
        },
    )
    scores = job.no_scores()

    def store(request: openvino.InferRequest, rows: list[int]) -> None:
        logits = [tensor.data[: len(rows)] for tensor in request.output_tensors]
        scores[rows] = job.average(logits)

    queue = openvino.AsyncInferQueue(model)
    for _ in range(len(queue)):
        queue.start_async({0: job.blank(BATCH)}, [])
    queue.wait_all()
    queue.set_callback(store)
    job.start()
    for rows, pixels in decode_ahead(job, BATCH):
        padding = BATCH - len(rows)
        queue.start_async({0: np.pad(pixels, ((0, padding), (0, 0), (0, 0), (0, 0)))}, rows)
    queue.wait_all()
    job.finish(scores)


if __name__ == "__main__":
    main(PeerJob.from_command_line())
