"""Open the stages of a run on a GPU, tune their options and check them on the bundle's canaries."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from msgspec import structs

from engine.bundle.bundle import Bundle
from engine.core import hardware
from engine.core.errors import EngineError, UsageError
from engine.core.overlap import Meter
from engine.core.records import Batch
from engine.core.tuning import DecodeTuning, Settled, Tuning
from engine.preprocess import gpu_tuning
from engine.preprocess.gpu import DecodeOptions, GpuPreprocess
from engine.preprocess.stage import Preprocess
from engine.runners.base import Runner
from engine.scoring.canaries import Canaries, verify_canaries
from engine.scoring.gpu import GpuScorer

if TYPE_CHECKING:
    from engine.pipeline.context import StageContext


def open_gpu(stack: ExitStack, context: StageContext) -> tuple[GpuPreprocess, GpuScorer, Settled]:
    """Open, tune and check the stages. Options that `context.tuning` holds already are kept.

    Graphs are captured before DALI starts. When memory runs out, the batch is halved once, unless the run is
    resumed.
    Raises ParityError when the canaries differ from their reference.
    """
    torch.cuda.set_device(context.choice.index)
    _check_triton()
    requested = context.batch_size
    scorer = _open_scorer_in_memory(stack, context)
    if scorer is None and requested > 1 and not context.resumed:
        tuning = structs.replace(context.tuning, batch_size_asked=requested)
        context = replace(context, batch_size=requested // 2, tuning=tuning)
        context.say(f"out of GPU memory with batches of {requested}: continuing with {requested // 2}")
        scorer = _open_scorer_in_memory(stack, context)
    if scorer is None:
        raise _batch_too_large_error(context)
    step, settled = scorer
    difference = check_canaries(context.bundle, step)
    if settled.tuning.canaries is None:
        settled = replace(settled, tuning=structs.replace(settled.tuning, canaries=difference))
    try:
        preprocess, tuning = _open_preprocess(stack, context, settled.tuning)
        return preprocess, step, replace(settled, tuning=tuning)
    except RuntimeError as error:  # DALI raises it when memory runs out
        if not hardware.is_out_of_memory(error):
            raise
        raise _batch_too_large_error(context) from None


def _batch_too_large_error(context: StageContext) -> EngineError:
    name = context.choice.gpu.name if context.choice.gpu else context.choice.device
    return EngineError(
        f"{name} is out of memory with batches of {context.batch_size}; free some memory or set a "
        "smaller --batch-size"
    )


def _open_scorer_in_memory(stack: ExitStack, context: StageContext) -> tuple[GpuScorer, Settled] | None:
    """Open the scorer; return None when PyTorch or TensorRT runs out of memory."""
    try:
        return _open_scorer(stack, context)
    except (RuntimeError, EngineError) as error:
        if not hardware.is_out_of_memory(error):
            raise
    gc.collect()  # frees the memory of the failed scorer
    torch.cuda.empty_cache()
    return None


def _check_triton() -> None:
    """Compile Triton's launcher, as its first use does. Raises UsageError when this fails."""
    import triton

    try:
        assert triton.runtime.driver.active.utils
    except Exception as error:
        reason = " ".join(f"{error}".split())[:160]
        raise UsageError(
            f"Triton can't start ({reason}); it needs a C compiler and Python's headers: "
            "apt install gcc python3-dev"
        ) from None


def _open_scorer(stack: ExitStack, context: StageContext) -> tuple[GpuScorer, Settled]:
    """Open the members and slots with the recorded or else the faster options (compiled, concurrent)."""
    from engine.pipeline.context import open_runners, versions_of

    tuning = context.tuning
    if tuning.compiled is None:
        should_tune = context.choice.runner == "torch" and context.rows >= gpu_tuning.TUNE_ROWS
        tuning = _tune_compiling(context) if should_tune else structs.replace(tuning, compiled=False)
    with ExitStack() as resources:
        runners = open_runners(resources, context, compiled=bool(tuning.compiled))
        step = _make_scorer(resources, context, runners)
        if tuning.streams is None and context.settings.streams is None and len(context.bundle.members) > 1:
            tuning = structs.replace(tuning, streams=step.choose_streams())
        stack.push(resources.pop_all())
    return step, Settled(context.batch_size, tuning, versions_of(runners))


def _tune_compiling(context: StageContext) -> Tuning:
    """Time the members with and without compilation and return the faster option."""
    eager_ms, compiled_ms = _time_batch(context, compiled=False), None
    try:
        compiled_ms = _time_batch(context, compiled=True)
    except Exception as error:  # the compiler raises many types; eager mode still works
        if hardware.is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        context.say(f"the members can't be compiled and run uncompiled ({reason})")
    compiled = compiled_ms is not None and compiled_ms < eager_ms
    return structs.replace(context.tuning, eager_ms=eager_ms, compiled_ms=compiled_ms, compiled=compiled)


def _time_batch(context: StageContext, *, compiled: bool) -> float:
    """Return the time of a batch in milliseconds."""
    from engine.pipeline.context import open_runners

    with ExitStack() as trial:
        runners = open_runners(trial, context, compiled=compiled)
        return round(1000 * _make_scorer(trial, context, runners).seconds_a_batch(), 4)


def _make_scorer(stack: ExitStack, context: StageContext, runners: Sequence[Runner]) -> GpuScorer:
    settings, choice, streams = context.settings, context.choice, context.tuning.streams
    recorded = streams is None or streams.concurrent
    step = GpuScorer(
        context.bundle,
        runners,
        batch_size=context.batch_size,
        device=choice.device,
        slots=settings.slots if settings.overlap else 1,
        concurrent=recorded if settings.streams is None else settings.streams > 1,
        graphs=settings.cuda_graph is not False
        and choice.runner != "onnx",  # ONNX Runtime uses its own stream
    )
    stack.callback(step.close)
    return step


def check_canaries(bundle: Bundle, step: GpuScorer) -> float:
    """Return the largest difference in probability from the bundle's canaries.

    Raises ParityError when it exceeds the tolerance.
    """
    return verify_canaries(Canaries.of(bundle), step, step.batch_size)


def _open_preprocess(stack: ExitStack, context: StageContext, tuning: Tuning) -> tuple[GpuPreprocess, Tuning]:
    """Open decoding on CPU and GPU with the recorded options; else tune if the run is long enough."""
    bundle, threads, batch_size = context.bundle, context.workers, context.batch_size
    cpu = stack.enter_context(
        Preprocess(
            size=bundle.size,
            batch_size=min(batch_size, 4 * threads),
            threads=threads,
            decoding_bytes=context.settings.limits.decoding_bytes,
            decode=bundle.decode,
        )
    )

    def open_with(decoding: DecodeOptions) -> GpuPreprocess:
        return GpuPreprocess(
            cpu,
            size=bundle.size,
            batch_size=batch_size,
            threads=threads,
            device_id=context.choice.index,
            decoding=decoding,
        )

    def measure_rate(decoding: DecodeOptions) -> float:
        with open_with(decoding) as preprocess:
            return gpu_tuning.measure_rate(preprocess.stage, sample, decoding.on_gpu)

    cpu.decoder.await_start()
    if tuning.decoding is None:
        # DALI has no scaled DCT, and its full decode gives pixels that a fast bundle was not trained on
        on_cpu = context.settings.decoder == "cpu" or bundle.decode == "fast"
        decoding, tried = DecodeOptions(cpu_share=1.0 if on_cpu else 0.0), None
        if not on_cpu and context.manifest and context.rows >= gpu_tuning.TUNE_ROWS:
            context.say("tuning the decoding on the first images")
            sample = _first_batches(context)
            decoding, tried = gpu_tuning.tune_decoding(sample, measure_rate)
        recorded = DecodeTuning(**structs.asdict(decoding))
        tuning = structs.replace(tuning, decoding=recorded, decoding_tried=tried)
    assert tuning.decoding
    preprocess = stack.enter_context(open_with(DecodeOptions(**structs.asdict(tuning.decoding))))
    preprocess.check()
    return preprocess, tuning


def _first_batches(context: StageContext) -> list[Batch]:
    assert context.manifest is not None
    rows = gpu_tuning.SAMPLE_BATCHES * context.batch_size
    parts = islice(context.manifest.parts(rows), 1)
    batches = list(context.reader().stage(parts, Meter("tuning")))
    for batch in batches:
        batch.release()
    return batches
