"""The stages of a run on a GPU, opened: decoding, members, slots; tuned, checked on the bundle's canaries."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from msgspec import structs

from engine.bundle import Bundle
from engine.canaries import Canaries, check
from engine.core.tuning import DecodeTuning, Settled, Tuning
from engine.errors import EngineError, UsageError
from engine.gpu import machine, tuning
from engine.gpu.decode import Decoding, GpuPreprocess
from engine.gpu.step import GpuStep
from engine.overlap import Meter
from engine.preprocess.stage import Preprocess
from engine.records import Batch
from engine.runners import Runner

if TYPE_CHECKING:
    from engine.pipeline import Opening


def open_gpu(stack: ExitStack, opening: Opening) -> tuple[GpuPreprocess, GpuStep, Settled]:
    """Open, tune and check the stages; of the tuning, what `opening` knows already is kept.

    Graphs are captured before DALI starts. Out of memory halves the batch once, unless the run is resumed.
    Raises ParityError when the canaries differ from their reference.
    """
    torch.cuda.set_device(opening.choice.index)
    _check_triton()
    asked = opening.batch_size
    opened = _step_in_memory(stack, opening)
    if opened is None and asked > 1 and not opening.resumed:
        tuning = structs.replace(opening.tuning, batch_size_asked=asked)
        opening = replace(opening, batch_size=asked // 2, tuning=tuning)
        opening.say(f"out of GPU memory with batches of {asked}: going on with {asked // 2}")
        opened = _step_in_memory(stack, opening)
    if opened is None:
        raise _too_large(opening)
    step, settled = opened
    difference = check_canaries(opening.models, step)
    if settled.tuning.canaries is None:
        settled = replace(settled, tuning=structs.replace(settled.tuning, canaries=difference))
    try:
        preprocess, tuning = _open_preprocess(stack, opening, settled.tuning)
        return preprocess, step, replace(settled, tuning=tuning)
    except RuntimeError as error:  # as DALI says it
        if not machine.is_shortage(error):
            raise
        raise _too_large(opening) from None


def _too_large(opening: Opening) -> EngineError:
    name = opening.choice.gpu.name if opening.choice.gpu else opening.choice.device
    return EngineError(
        f"{name} is out of memory with batches of {opening.batch_size}; free some, or give a smaller "
        "--batch-size"
    )


def _step_in_memory(stack: ExitStack, opening: Opening) -> tuple[GpuStep, Settled] | None:
    """The step, or None when PyTorch or, in its own words, TensorRT is short of memory."""
    try:
        return _open_step(stack, opening)
    except (RuntimeError, EngineError) as error:
        if not machine.is_shortage(error):
            raise
    gc.collect()  # what the failed step held
    torch.cuda.empty_cache()
    return None


def _check_triton() -> None:
    """Triton compiles its launcher when it first runs. Raises UsageError where it can't."""
    import triton

    try:
        assert triton.runtime.driver.active.utils
    except Exception as error:
        reason = " ".join(f"{error}".split())[:160]
        raise UsageError(
            f"Triton can't start ({reason}); it needs a C compiler and Python's headers: "
            "apt install gcc python3-dev"
        ) from None


def _open_step(stack: ExitStack, opening: Opening) -> tuple[GpuStep, Settled]:
    """Members and slots: as recorded, else compiled or not, at once or in turn, whatever is faster."""
    from engine.pipeline import open_members, versions_of

    tuned = opening.tuning
    if tuned.compiled is None:
        worth_it = opening.choice.runner == "torch" and opening.rows >= tuning.TUNE_ROWS
        tuned = _tune_compiling(opening) if worth_it else structs.replace(tuned, compiled=False)
    with ExitStack() as opened:
        runners = open_members(opened, opening, compiled=bool(tuned.compiled))
        step = _step(opened, opening, runners)
        if tuned.streams is None and opening.settings.streams is None and len(opening.models.members) > 1:
            tuned = structs.replace(tuned, streams=step.choose_streams())
        stack.push(opened.pop_all())
    return step, Settled(opening.batch_size, tuned, versions_of(runners))


def _tune_compiling(opening: Opening) -> Tuning:
    """Time the members compiled and not."""
    eager_ms, compiled_ms = _trial(opening, compiled=False), None
    try:
        compiled_ms = _trial(opening, compiled=True)
    except Exception as error:  # whatever the compiler raises: eager works
        if machine.is_shortage(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        opening.say(f"the members can't be compiled, going on without ({reason})")
    compiled = compiled_ms is not None and compiled_ms < eager_ms
    return structs.replace(opening.tuning, eager_ms=eager_ms, compiled_ms=compiled_ms, compiled=compiled)


def _trial(opening: Opening, *, compiled: bool) -> float:
    """Milliseconds of a batch."""
    from engine.pipeline import open_members

    with ExitStack() as trial:
        runners = open_members(trial, opening, compiled=compiled)
        return round(1000 * _step(trial, opening, runners).seconds_a_batch(), 4)


def _step(stack: ExitStack, opening: Opening, runners: Sequence[Runner]) -> GpuStep:
    settings, choice, streams = opening.settings, opening.choice, opening.tuning.streams
    recorded = streams is None or streams.concurrent
    step = GpuStep(
        opening.models,
        runners,
        batch_size=opening.batch_size,
        device=choice.device,
        slots=settings.slots if settings.overlap else 1,
        concurrent=recorded if settings.streams is None else settings.streams > 1,
        graphs=settings.cuda_graph is not False
        and choice.runner != "onnx",  # ONNX Runtime has a stream of its own
    )
    stack.callback(step.close)
    return step


def check_canaries(models: Bundle, step: GpuStep) -> float:
    """The largest difference in probability from the bundle's canaries. Raises ParityError: see `check`."""
    return check(Canaries.of(models), step, step.batch_size)


def _open_preprocess(stack: ExitStack, opening: Opening, tuned: Tuning) -> tuple[GpuPreprocess, Tuning]:
    """Decoding on both sides: as recorded, else tuned when the run is long enough."""
    models, threads, batch_size = opening.models, opening.workers, opening.batch_size
    cpu = stack.enter_context(
        Preprocess(
            size=models.size,
            batch_size=min(batch_size, 4 * threads),
            threads=threads,
            decoding_bytes=opening.settings.limits.decoding_bytes,
            decode=models.decode,
        )
    )

    def opened(decoding: Decoding) -> GpuPreprocess:
        return GpuPreprocess(
            cpu,
            size=models.size,
            batch_size=batch_size,
            threads=threads,
            device_id=opening.choice.index,
            decoding=decoding,
        )

    def rate(decoding: Decoding) -> float:
        with opened(decoding) as preprocess:
            return tuning.rate_of(preprocess.stage, sample, decoding.on_gpu)

    cpu.decoder.await_start()
    if tuned.decoding is None:
        # DALI has no scaled DCT, and its full decode gives pixels that a fast bundle was not trained on
        on_cpu = opening.settings.decoder == "cpu" or models.decode == "fast"
        decoding, tried = Decoding(cpu_share=1.0 if on_cpu else 0.0), None
        if not on_cpu and opening.manifest and opening.rows >= tuning.TUNE_ROWS:
            opening.say("tuning the decoding on the first images")
            sample = _first_batches(opening)
            decoding, tried = tuning.tune(sample, rate)
        recorded = DecodeTuning(**structs.asdict(decoding))
        tuned = structs.replace(tuned, decoding=recorded, decoding_tried=tried)
    assert tuned.decoding
    preprocess = stack.enter_context(opened(Decoding(**structs.asdict(tuned.decoding))))
    preprocess.check()
    return preprocess, tuned


def _first_batches(opening: Opening) -> list[Batch]:
    assert opening.manifest is not None
    rows = tuning.SAMPLE_BATCHES * opening.batch_size
    parts = islice(opening.manifest.parts(rows), 1)
    batches = list(opening.reader().stage(parts, Meter("tuning")))
    for batch in batches:
        batch.release()
    return batches
