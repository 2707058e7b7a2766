"""Tune decoding at the start of a long run on the first files of the manifest; the run records the choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from msgspec import structs

from engine.core.overlap import Meter
from engine.core.records import Batch
from engine.core.tuning import DecodeTrial
from engine.preprocess.gpu import DecodeOptions

TUNE_ROWS = 50_000  # in a shorter run tuning takes longer than it saves
SAMPLE_BATCHES = 6
TIMED_S = 1.0  # for each candidate
MIN_SPEEDUP = 1.03  # a candidate must be this much faster to replace the best one so far

HW_LOADS = (0.0, 0.4, 0.9, 1.0)  # candidates other than the default
HUFFMAN_THRESHOLDS = (250_000, 0)
CPU_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)

RateFunction = Callable[[DecodeOptions], float]  # images/s with these settings


def tune_decoding(
    sample: Sequence[Batch], rate: RateFunction
) -> tuple[DecodeOptions, tuple[DecodeTrial, ...]]:
    """Find the fastest settings for `sample`; return them and each tried setting with its images/s.

    Options are tuned one after the other, each with the best values of those before it.
    """
    jpegs = [header for batch in sample for header in batch.headers if header and header.format == "jpeg"]
    best = DecodeOptions(
        width_hint=max((header.width for header in jpegs), default=0),
        height_hint=max((header.height for header in jpegs), default=0),
    )
    tried: list[DecodeTrial] = []

    def measure(candidate: DecodeOptions) -> float:
        images_per_s = rate(candidate)
        tried.append(DecodeTrial(**structs.asdict(candidate), images_per_s=round(images_per_s, 1)))
        return images_per_s

    fastest = measure(best)
    for option, values in (
        ("hw_decoder_load", HW_LOADS),
        ("hybrid_huffman_threshold", HUFFMAN_THRESHOLDS),
        ("cpu_share", CPU_SHARES),
    ):
        start = best
        for value in values:
            candidate = structs.replace(start, **{option: value})
            images_per_s = measure(candidate)
            if images_per_s > MIN_SPEEDUP * fastest:
                best, fastest = candidate, images_per_s
            elif option == "cpu_share":
                break  # the CPU is saturated
    return best, tuple(tried)


def measure_rate(
    stage: Callable[[Iterator[Batch], Meter], Iterator[Batch]],
    sample: Sequence[Batch],
    on_gpu: Callable[[Any, Any], bool],
    timed_s: float = TIMED_S,
) -> float:
    """Measure the images/s that `stage` decodes of `sample`, repeated; the first round is not timed."""

    def copies() -> Iterator[Batch]:
        for batch in sample:
            routes = [
                bool(header) and on_gpu(data, header)
                for data, header in zip(batch.encoded, batch.headers, strict=True)
            ]
            yield replace(
                batch,
                status=batch.status.copy(),
                encoded=list(batch.encoded),
                on_gpu=routes,
                errors={},
                flags={},
                release=lambda: None,
            )

    began = 0.0

    def rounds() -> Iterator[Batch]:
        nonlocal began
        yield from copies()
        began = time.perf_counter()
        while time.perf_counter() - began < timed_s:
            yield from copies()

    first = sum(batch.rows for batch in sample)
    images = sum(batch.rows for batch in stage(rounds(), Meter("tuning"))) - first
    return images / (time.perf_counter() - began)
