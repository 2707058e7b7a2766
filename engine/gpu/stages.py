"""The stages of a run on a GPU, opened: decoding, members, slots; tuned, checked on the bundle's canaries."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

import torch

from engine.bundle import Bundle
from engine.canaries import Canaries, check
from engine.errors import EngineError, UsageError
from engine.gpu import machine, tuning
from engine.gpu.decode import Decoding, GpuPreprocess
from engine.gpu.step import GpuStep
from engine.overlap import Meter
from engine.preprocess.stage import Preprocess
from engine.records import Batch

if TYPE_CHECKING:
    from engine.pipeline import Opening


def open_gpu(stack: ExitStack, opening: Opening) -> tuple[GpuPreprocess, GpuStep]:
    """Open, tune and check the stages; what a resumed run has recorded is kept, the rest goes into `tuning`.

    Graphs are captured before DALI starts. Out of memory halves the batch once, unless the run is resumed.
    Raises ParityError when the canaries differ from their reference.
    """
    torch.cuda.set_device(opening.choice.index)
    _check_triton()
    options, tuned = opening.run["result_options"], opening.run["tuning"]
    asked = options["batch_size"]
    step = _step_in_memory(stack, opening)
    if step is None and asked > 1 and not opening.resumed:
        options["batch_size"], tuned["batch_size_asked"] = asked // 2, asked
        opening.say(f"out of GPU memory with batches of {asked}: going on with {asked // 2}")
        step = _step_in_memory(stack, opening)
    if step is None:
        raise _too_large(opening)
    tuned.setdefault("canaries", check_canaries(opening.models, step))
    try:
        return _open_preprocess(stack, opening), step
    except RuntimeError as error:  # as DALI says it
        if not machine.is_shortage(error):
            raise
        raise _too_large(opening) from None


def _too_large(opening: Opening) -> EngineError:
    name = opening.choice.gpu.name if opening.choice.gpu else opening.choice.device
    batch_size = opening.run["result_options"]["batch_size"]
    return EngineError(
        f"{name} is out of memory with batches of {batch_size}; free some, or give a smaller --batch-size"
    )


def _step_in_memory(stack: ExitStack, opening: Opening) -> GpuStep | None:
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


def _open_step(stack: ExitStack, opening: Opening) -> GpuStep:
    """Members and slots: as recorded, else compiled or not, at once or in turn, whatever is faster."""
    tuned = opening.run["tuning"]
    compile_too = (
        opening.choice.runner == "torch"
        and "compiled" not in tuned
        and opening.run["rows"] >= tuning.TUNE_ROWS
    )
    if compile_too:
        tuned["eager_ms"], tuned["compiled_ms"] = _trial(opening, compiled=False), None
        try:
            tuned["compiled_ms"] = _trial(opening, compiled=True)
        except Exception as error:  # whatever the compiler raises: eager works
            if machine.is_shortage(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            opening.say(f"the members can't be compiled, going on without ({reason})")
        compiled_ms = tuned["compiled_ms"]
        tuned["compiled"] = compiled_ms is not None and compiled_ms < tuned["eager_ms"]
    tuned.setdefault("compiled", False)
    with ExitStack() as opened:
        step = _step(opened, opening, compiled=tuned["compiled"])
        if "streams" not in tuned and opening.settings.streams is None and len(opening.models.members) > 1:
            tuned["streams"] = step.choose_streams()
        stack.push(opened.pop_all())
    return step


def _trial(opening: Opening, *, compiled: bool) -> float:
    """Milliseconds of a batch."""
    with ExitStack() as trial:
        return round(1000 * _step(trial, opening, compiled=compiled).seconds_a_batch(), 4)


def _step(stack: ExitStack, opening: Opening, *, compiled: bool) -> GpuStep:
    from engine.pipeline import open_members

    settings, choice = opening.settings, opening.choice
    recorded = opening.run["tuning"].get("streams", {}).get("concurrent", True)
    step = GpuStep(
        opening.models,
        open_members(stack, opening, compiled=compiled),
        batch_size=opening.run["result_options"]["batch_size"],
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


def _open_preprocess(stack: ExitStack, opening: Opening) -> GpuPreprocess:
    """Decoding on both sides: as recorded, else tuned when the run is long enough."""
    models, tuned, threads = opening.models, opening.run["tuning"], opening.workers
    batch_size = opening.run["result_options"]["batch_size"]
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
    if "decoding" not in tuned:
        # DALI has no scaled DCT, and its full decode gives pixels that a fast bundle was not trained on
        on_cpu = opening.run["result_options"]["decoder"] == "cpu" or models.decode == "fast"
        decoding = Decoding(cpu_share=1.0 if on_cpu else 0.0)
        if not on_cpu and opening.manifest and opening.run["rows"] >= tuning.TUNE_ROWS:
            opening.say("tuning the decoding on the first images")
            sample = _first_batches(opening)
            decoding, tuned["decoding_tried"] = tuning.tune(sample, rate)
        tuned["decoding"] = asdict(decoding)
    preprocess = stack.enter_context(opened(Decoding(**tuned["decoding"])))
    preprocess.check()
    return preprocess


def _first_batches(opening: Opening) -> list[Batch]:
    assert opening.manifest is not None
    rows = tuning.SAMPLE_BATCHES * opening.run["result_options"]["batch_size"]
    parts = islice(opening.manifest.parts(rows), 1)
    batches = list(opening.reader().stage(parts, Meter("tuning")))
    for batch in batches:
        batch.release()
    return batches
