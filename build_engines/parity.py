"""The parity gate: a plan, or the graph it is made from, beside the float32 reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from build_engines.options import Options
from engine.bundle import Bundle, load_canaries
from engine.errors import ParityError, UsageError
from engine.manifest import open_manifest
from engine.plans import Parity
from engine.preprocess.stage import load_pixels
from engine.runners import Runner
from engine.settings import available_cpus

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_BATCH = 8


def calibration_pixels(bundle: Bundle, options: Options) -> tuple[Pixels, str]:
    """Images to compare on, uint8 [N, 1, H, W], and where they are from.

    From `--calibration`, spread evenly over the list or folder; else the bundle's canaries and their mirror
    images, which are synthetic.
    """
    if options.calibration is None:
        canaries, _ = load_canaries(bundle)
        return np.concatenate([canaries, canaries[..., ::-1], canaries[:, :, ::-1]]), "synthetic canaries"
    if not options.calibration.exists():
        raise UsageError(f"--calibration {options.calibration}: no such file or folder")
    with tempfile.TemporaryDirectory() as scratch:
        manifest = open_manifest(options.calibration, listing=Path(scratch) / "listing.parquet")
        paths = [path for part in manifest.parts(1024) for path in part.paths if path]
    every = max(1, len(paths) // options.calibration_images)
    chosen = [manifest.root / path for path in paths[::every][: options.calibration_images]]
    loaded = load_pixels(chosen, size=bundle.size, decode=bundle.decode)
    if not len(loaded.pixels):
        _, status, error = loaded.failures[0]
        raise UsageError(
            f"--calibration {options.calibration}: no image can be read; the first is {status}: {error}"
        )
    return loaded.pixels, "images given"  # a folder's name may be a patient's


def in_batches(infer: Callable[[Pixels], Floats], pixels: Pixels) -> Floats:
    """`infer` on all of `pixels`, as many batches at once as there are cores."""
    batches = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
    with ThreadPoolExecutor(available_cpus()) as pool:
        return np.concatenate(list(pool.map(infer, batches)))


def on_gpu(runner: Runner, pixels: Pixels, batch_size: int, classes: int) -> Floats:
    """Logits [N, C] of uint8 [N, 1, H, W] through `runner` on the current GPU, in padded batches."""
    import torch

    stream = torch.cuda.Stream()
    buffer = torch.zeros((batch_size, *pixels.shape[1:]), dtype=torch.uint8, device="cuda")
    logits = torch.empty((batch_size, classes), dtype=torch.float32, device="cuda")
    found = []
    for start in range(0, len(pixels), batch_size):
        batch = torch.from_numpy(np.ascontiguousarray(pixels[start : start + batch_size]))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            buffer[: len(batch)].copy_(batch)
            runner.enqueue(buffer, logits, stream)
            found.append(logits[: len(batch)].cpu().numpy())  # waits for the stream
    return np.concatenate(found)


def compare(
    reference: Floats, candidate: Floats, *, executed: bool, calibration: str, options: Options
) -> Parity:
    """How probabilities [N, C] agree. A call closer than twice the limit counts for no agreement."""
    difference = np.abs(reference - candidate)
    best = np.sort(reference, axis=1)
    clear = best[:, -1] - best[:, -2] >= 2 * options.limit
    same = reference.argmax(axis=1) == candidate.argmax(axis=1)
    return Parity(
        executed=executed,
        images=len(reference),
        calibration=calibration,
        max=float(difference.max()),
        mean=float(difference.mean()),
        agreement=float(same[clear].mean()) if clear.any() else 1.0,
        counted=int(clear.sum()),
        limit=options.limit,
        agreement_limit=options.agreement,
    )


def require(parity: Parity, what: str) -> None:
    """Raise ParityError unless it passed."""
    if not parity.passed:
        raise ParityError(
            f"{what} differs from float32 by up to {parity.max:.2g} in probability (allowed: "
            f"{parity.limit:g}), same class in {parity.agreement:.2%} of {parity.counted} clear calls "
            f"(allowed: {parity.agreement_limit:.2%}) on {parity.images} images; it is not installed "
            "(--precision fp32 rounds nothing)"
        )
