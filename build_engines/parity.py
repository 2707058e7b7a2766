"""Compare a plan, or the graph it is made from, with the float32 reference.

In FP16 each probability must be near the reference, and the class must be the same unless the two best
classes are close. In INT8 probabilities may differ, but 99 % of the images must keep their class, except
images whose two best classes are close, and the AUC (one class against the rest, mean over the classes) may
drop by at most 0.002. The labels for the AUC come from class folders or a table. Without labels they are the
reference's classes; the AUC then only measures whether INT8 ranks the images as float32 does. The passport
records which labels were used. INT8 is compared on images that were not used for calibration, if there are
enough.
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
_MIN_SPLIT_IMAGES = 32  # with fewer images on a side, all are used for both
_MAX_BATCH = 128  # largest number of calibration images; more do not improve the ranges


@dataclass(frozen=True)
class CalibrationImages:
    """The images to calibrate on and to compare on."""

    pixels: Pixels  # [N, 1, H, W]
    origin: str
    labels: Labels | None = None  # [N], positions in the bundle's classes; None if unknown

    def split(self) -> tuple[CalibrationImages, CalibrationImages]:
        """Split into images to calibrate on and images to compare on; use too few images for both."""
        count = len(self.pixels)
        if count < 2 * _MIN_SPLIT_IMAGES:
            origin = f"{self.origin}, calibrated on too"
            return self, replace(self, origin=origin)
        first = np.arange(count) % max(2, -(-count // _MAX_BATCH)) == 0
        return self._select(first), self._select(~first)

    def _select(self, mask: npt.NDArray[np.bool_]) -> CalibrationImages:
        labels = None if self.labels is None else self.labels[mask]
        return replace(self, pixels=self.pixels[mask], labels=labels)


def load_images(bundle: Bundle, options: BuildOptions) -> CalibrationImages:
    """Load the images to calibrate and compare on.

    They are spread evenly over the list or folder of `--calibration`. Without it they are the bundle's
    synthetic canaries and their mirror images.
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
    return CalibrationImages(
        loaded.pixels, "images given", labels
    )  # not the folder's name, which may be a patient's


def _read_labels(source: Path, bundle: Bundle, paths: list[Path]) -> Labels | None:
    """Read labels as training does, if all of `paths` have a label."""
    try:
        listing = list_images(source, classes=bundle.classes)
    except UsageError:  # neither class folders nor a column with labels
        return None
    by_path = {path.absolute(): label for path, label in zip(listing.paths, listing.labels, strict=True)}
    labels = [by_path.get(path.absolute()) for path in paths]
    return None if None in labels else np.array(labels, np.int64)


def run_in_batches(infer: Callable[[Pixels], Floats], pixels: Pixels) -> Floats:
    """Run `infer` on all of `pixels`, on as many batches at once as there are cores."""
    batches = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
    with ThreadPoolExecutor(available_cpus()) as pool:
        return np.concatenate(list(pool.map(infer, batches)))


def run_on_gpu(runner: Runner, pixels: Pixels, batch_size: int, classes: int) -> Floats:
    """Return logits [N, C] of uint8 [N, 1, H, W] from `runner` on the current GPU, in padded batches."""
    import torch

    stream = torch.cuda.Stream()
    buffer = torch.zeros((batch_size, *pixels.shape[1:]), dtype=torch.uint8, device="cuda")
    logits = torch.empty((batch_size, classes), dtype=torch.float32, device="cuda")
    outputs = []
    for start in range(0, len(pixels), batch_size):
        batch = torch.from_numpy(np.ascontiguousarray(pixels[start : start + batch_size]))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            buffer[: len(batch)].copy_(batch)
            runner.enqueue(buffer, logits, stream)
            outputs.append(logits[: len(batch)].cpu().numpy())  # waits for the stream
    return np.concatenate(outputs)


def compare_probabilities(
    reference: Floats,
    candidate: Floats,
    *,
    executed: bool,
    calibration: str,
    options: BuildOptions,
    labels: Labels | None = None,
) -> Parity:
    """Compare probabilities [N, C].

    The agreement counts only images whose two best classes differ by at least twice the limit (in INT8, twice
    the limit of FP16). `labels` [N] are for INT8's AUC.
    """
    int8 = options.precision == "int8"
    limit, agreement = options.limits
    difference = np.abs(reference - candidate)
    best = np.sort(reference, axis=1)
    clear = best[:, -1] - best[:, -2] >= 2 * (MAX_DIFFERENCE if int8 else limit)
    same = reference.argmax(axis=1) == candidate.argmax(axis=1)
    parity = Parity(
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
        return parity
    truth = reference.argmax(axis=1) if labels is None else labels
    return structs.replace(
        parity,
        auc=macro_auc(truth, candidate),
        auc_reference=macro_auc(truth, reference),
        auc_limit=options.auc_limit,
        labels="the reference's own classes" if labels is None else "labels of the images",
    )


def macro_auc(labels: Labels, probabilities: Floats) -> float:
    """Return the mean AUC of each class against the rest; ties count half.

    Classes that all or none of the images have are left out; the AUC is 1 if no class remains.
    """
    areas = []
    for index, scores in enumerate(probabilities.T):
        positive = labels == index
        count, others = int(positive.sum()), int((~positive).sum())
        if count and others:
            _, level, ties = np.unique(scores, return_inverse=True, return_counts=True)
            ranks = (np.cumsum(ties) - (ties - 1) / 2)[level]
            areas.append((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))
    return float(np.mean(areas)) if areas else 1.0


def require_parity(parity: Parity, what: str, precision: str) -> None:
    """Raise ParityError unless the comparison passed."""
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
        f"clear cases (allowed: {parity.agreement_limit:.2%}){auc} on "
        f"{parity.images} images; it is not installed; --precision fp32 keeps full precision"
    )
