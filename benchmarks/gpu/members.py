"""Measure members and fusion without decoding, and the overlap of the members' kernels."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from engine.bundle import bundle as bundles
from engine.pipeline.open_gpu import check_canaries
from engine.runners.base import Runner, RunnerChoice
from engine.runners.select import open_runner
from engine.scoring.gpu import GpuScorer


def measure_rates(
    bundle: Path, choice: RunnerChoice, batches: Sequence[int], compiled_batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the images/s of members and fusion: batch x (eager | graph) x (one stream | two).

    For the runner "torch" also compiled, with `compiled_batches`, since each takes a minute to compile.
    """
    rows = []
    for compiled in (False, True) if choice.runner == "torch" else (False,):
        with ExitStack() as stack:
            members = _open_members(stack, bundle, choice, compiled=compiled)
            for batch in compiled_batches if compiled else batches:
                for graphs in (False, True):
                    form = " ".join(["compiled"] * compiled + ["graph"] * graphs) or "eager"
                    stream_rows = _measure_streams(bundle, choice, members, batch, graphs=graphs)
                    rows += [{"batch": batch, "form": form, **row} for row in stream_rows]
        torch.cuda.empty_cache()
    return rows


def _open_members(stack: ExitStack, path: Path, choice: RunnerChoice, *, compiled: bool) -> list[Runner]:
    bundle = bundles.load_bundle(path)
    return [
        stack.enter_context(open_runner(choice, bundle, member, compiled=compiled))
        for member in bundle.members
    ]


def _measure_streams(
    path: Path, choice: RunnerChoice, members: list[Runner], batch: int, *, graphs: bool
) -> list[dict[str, Any]]:
    """Measure a row for one stream and one for two, each the median of three rounds."""
    bundle, rows = bundles.load_bundle(path), []
    try:
        step = GpuScorer(
            bundle, members, batch_size=batch, device=choice.device, slots=2, concurrent=False, graphs=graphs
        )
        worst = check_canaries(bundle, step)
        for concurrent in (False, True):
            step.prepare(concurrent=concurrent)
            rounds = [round(batch / step.seconds_a_batch(), 1) for _ in range(3)]
            rows.append(
                {
                    "streams": 1 + concurrent,
                    "images_per_s": statistics.median(rounds),
                    "rounds": rounds,
                    "canaries": worst,
                }
            )
        step.close()
    except torch.OutOfMemoryError:
        rows.append({"images_per_s": None, "problem": "out of memory"})
    return rows


def measure_overlap(bundle: Path, choice: RunnerChoice, batch: int) -> dict[str, Any]:
    """Measure with a profiler, over ten steps, how much of the time kernels of two streams overlap."""
    from torch.profiler import ProfilerActivity, profile

    with ExitStack() as stack:
        members = _open_members(stack, bundle, choice, compiled=False)
        step = GpuScorer(
            bundles.load_bundle(bundle),
            members,
            batch_size=batch,
            device=choice.device,
            slots=1,
            graphs=False,
        )
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step.seconds_a_batch(at_least_s=0.05)
            torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    kernels = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.device_resource_id())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0
    ]
    return {"batch": batch, "kernels": len(kernels), **overlap_shares(kernels)}


def overlap_shares(kernels: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Return the busy time of (start, end, stream) intervals and the share with two or more busy streams."""
    starts = [(start, 1, stream) for start, _, stream in kernels]
    edges = sorted(starts + [(end, -1, stream) for _, end, stream in kernels])
    running: dict[int, int] = {}
    busy = overlapping = 0
    last = edges[0][0] if edges else 0
    for moment, change, stream in edges:
        active = sum(count > 0 for count in running.values())
        busy += (moment - last) * (active > 0)
        overlapping += (moment - last) * (active > 1)
        last = moment
        running[stream] = running.get(stream, 0) + change
    return {
        "streams": len(running),
        "busy_ms": round(busy / 1e6, 3),
        "overlapping_share": round(overlapping / busy, 4) if busy else 0.0,
    }
