"""The parity gate: a plan, or the graph it is made from, beside the float32 reference.

FP16 rounds: every probability has to be near, and the class the same unless it was a close call. INT8 does
more than round, and what counts is the work list: the class of 99 % of the images, those apart whose two best
classes are as close as a close call in FP16, and the AUC (one class against the rest, mean over the classes)
within 0.002. AUC needs the truth. Where the images are in class folders, or in a table with labels, that is
the truth; else it is the reference's own class, and the AUC tells only whether INT8 puts the images in the
order that float32 does, not how good either is. What was used is in the passport. INT8 is compared on images
that it was not calibrated on, where there are enough.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from msgspec import structs

from build_engines.options import MAX_DIFFERENCE, BuildOptions
from engine.bundle.bundle import Bundle
from engine.bundle.plans import Parity
from engine.core.errors import ParityError, UsageError
from engine.core.hardware import available_cpus
from engine.manifest.manifest import open_manifest
from engine.pipeline.load_pixels import load_pixels
from engine.runners.base import Runner
from engine.scoring.canaries import load_canaries
from training.listing import list_images

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

_BATCH = 8
_MIN_SPLIT_IMAGES = 32  # images: with fewer to calibrate on, or to compare on, all are for both
_MAX_BATCH = 128  # images to calibrate on; more change nothing and take seconds each


@dataclass(frozen=True)
class CalibrationImages:
    """The images to calibrate on and to compare on."""

    pixels: Pixels  # [N, 1, H, W]
    origin: str
    labels: Labels | None = None  # [N], positions in the bundle's classes; None where they are not known

    def split(self) -> tuple[CalibrationImages, CalibrationImages]:
        """Split into images to calibrate on and images to compare on; too few serve for both."""
        count = len(self.pixels)
        if count < 2 * _MIN_SPLIT_IMAGES:
            again = f"{self.origin}, calibrated on too"
            return self, replace(self, origin=again)
        first = np.arange(count) % max(2, -(-count // _MAX_BATCH)) == 0
        return self._only(first), self._only(~first)

    def _only(self, chosen: npt.NDArray[np.bool_]) -> CalibrationImages:
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, pixels=self.pixels[chosen], labels=labels)


def load_images(bundle: Bundle, options: BuildOptions) -> CalibrationImages:
    """Images to compare on.

    From `--calibration`, spread evenly over the list or folder; else the bundle's canaries and their mirror
    images, which are synthetic.
    """
    if options.calibration is None:
        canaries, _ = load_canaries(bundle)
        pixels = np.concatenate([canaries, canaries[..., ::-1], canaries[:, :, ::-1]])
        return CalibrationImages(pixels, "synthetic canaries")
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
    labels = _read_labels(options.calibration, bundle, [chosen[number] for number in loaded.index])
    return CalibrationImages(loaded.pixels, "images given", labels)  # a folder's name may be a patient's


def _read_labels(source: Path, bundle: Bundle, paths: list[Path]) -> Labels | None:
    """Read labels as training does, if all of `paths` have one."""
    try:
        listing = list_images(source, classes=bundle.classes)
    except UsageError:  # neither class folders nor a column with labels
        return None
    known = {path.absolute(): label for path, label in zip(listing.paths, listing.labels, strict=True)}
    found = [known.get(path.absolute()) for path in paths]
    return None if None in found else np.array(found, np.int64)


def run_in_batches(infer: Callable[[Pixels], Floats], pixels: Pixels) -> Floats:
    """`infer` on all of `pixels`, as many batches at once as there are cores."""
    batches = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
    with ThreadPoolExecutor(available_cpus()) as pool:
        return np.concatenate(list(pool.map(infer, batches)))


def run_on_gpu(runner: Runner, pixels: Pixels, batch_size: int, classes: int) -> Floats:
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


def compare_probabilities(
    reference: Floats,
    candidate: Floats,
    *,
    executed: bool,
    calibration: str,
    options: BuildOptions,
    labels: Labels | None = None,
) -> Parity:
    """Compare probabilities [N, C]. A call closer than twice the limit counts for no agreement; in INT8,
    whose probabilities have none, twice FP16's.

    `labels` [N] are for INT8's AUC.
    """
    int8 = options.precision == "int8"
    limit, agreement = options.limits
    difference = np.abs(reference - candidate)
    best = np.sort(reference, axis=1)
    clear = best[:, -1] - best[:, -2] >= 2 * (MAX_DIFFERENCE if int8 else limit)
    same = reference.argmax(axis=1) == candidate.argmax(axis=1)
    found = Parity(
        executed=executed,
        images=len(reference),
        calibration=calibration,
        max=float(difference.max()),
        mean=float(difference.mean()),
        agreement=float(same[clear].mean()) if clear.any() else 1.0,
        counted=int(clear.sum()),
        limit=limit,
        agreement_limit=agreement,
    )
    if not int8:
        return found
    truth = reference.argmax(axis=1) if labels is None else labels
    return structs.replace(
        found,
        auc=macro_auc(truth, candidate),
        auc_reference=macro_auc(truth, reference),
        auc_limit=options.auc_limit,
        labels="the reference's own classes" if labels is None else "labels of the images",
    )


def macro_auc(labels: Labels, probabilities: Floats) -> float:
    """Mean over the classes of the area under the curve of one [N] against the rest; ties count half.

    A class that all or none of the images have gives none; 1 if that is so of all.
    """
    found = []
    for index, scores in enumerate(probabilities.T):
        positive = labels == index
        count, others = int(positive.sum()), int((~positive).sum())
        if count and others:
            _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
            ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
            found.append((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))
    return float(np.mean(found)) if found else 1.0


def require_parity(parity: Parity, what: str, precision: str) -> None:
    """Raise ParityError unless it passed."""
    if parity.passed:
        return
    auc = (
        f", AUC {parity.auc:.4f} against {parity.auc_reference:.4f} (allowed: within {parity.auc_limit:g})"
        if parity.auc is not None
        else ""
    )
    raise ParityError(
        f"{what} in {precision} differs from float32 by up to {parity.max:.2g} in probability (allowed: "
        f"{parity.limit:g}), same class in {parity.agreement:.2%} of {parity.counted} "
        f"clear calls (allowed: {parity.agreement_limit:.2%}){auc} on "
        f"{parity.images} images; it is not installed (--precision fp32 rounds nothing)"
    )
