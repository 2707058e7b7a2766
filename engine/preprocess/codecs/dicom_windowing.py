"""Stored values to displayed gray levels: PS3.3 C.7.6.3.1.2, C.11.1, C.11.2; PS3.4 N.2.

Steps: modality LUT or rescale; VOI LUT or window, scaled by its own range; inversion of MONOCHROME1. They
depend on the stored value alone, so they are computed once for each possible value and not for each pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine.formats.dicom import DicomLayout
from engine.preprocess.codecs.gray import DEPTHS, Gray, Samples, apply_lut

MAX_CLIPPED = 0.98  # a window that makes a larger share of the pixels black, or white, is ignored
PERCENTILES = (0.5, 99.5)

T = TypeVar("T", bound=Any)  # a NumPy array or a tensor
Values = npt.NDArray[np.float64]  # one for each possible content of a sample's cell


def display(
    apply: Callable[[Gray], T],
    count_nonzero: Callable[[T], Any],
    counts: Callable[[], npt.NDArray[np.int64]],
    dtype: npt.DTypeLike,
    layout: DicomLayout,
    *,
    inverted: bool,
) -> tuple[T, list[str]]:
    """Return the pixels of an image as it is displayed, and flags; `inverted` for MONOCHROME1.

    `apply` looks up the image's samples, of unsigned `dtype`, in a table of levels and returns an array or a
    tensor, which `count_nonzero` counts. `counts` returns how often each content of a sample's cell occurs.
    The flag "window_fallback" is set where the file has no window or its window is ignored.
    """
    values = _modality(_numbers(dtype, layout), layout.dataset)
    window = _voi(values, layout.dataset)
    if window is not None:
        gray = apply(_levels(window, inverted=inverted))
        black, white = (int(count_nonzero(gray == level)) for level in (0, 255))
        if max(black, white) <= MAX_CLIPPED * math.prod(gray.shape):
            return gray, []
    window = _percentiles(counts(), values, dtype, layout)
    return apply(_levels(window, inverted=inverted)), ["window_fallback"]


def display_samples(samples: Samples, layout: DicomLayout, *, inverted: bool) -> tuple[Gray, list[str]]:
    """Return stored samples [H, W], of unsigned type, as they are displayed, and flags: see `display`."""
    return display(
        lambda levels: apply_lut(samples, levels),
        np.count_nonzero,
        lambda: np.bincount(samples.reshape(-1), minlength=1 << 8 * samples.dtype.itemsize),
        samples.dtype,
        layout,
        inverted=inverted,
    )


def _numbers(dtype: npt.DTypeLike, layout: DicomLayout) -> Values:
    """Return the value of each possible cell content, by BitsStored, HighBit and PixelRepresentation."""
    bits = int(layout.dataset.BitsStored)
    cells = np.arange(1 << 8 * np.dtype(dtype).itemsize)
    numbers = cells >> layout.shift & (1 << bits) - 1
    if layout.signed:
        numbers -= (numbers >> bits - 1) << bits
    return numbers.astype(np.float64)


def _modality(numbers: Values, dataset: Any) -> Values:
    """Apply the modality LUT or the rescale: PS3.3 C.11.1."""
    if dataset.get("ModalityLUTSequence"):
        return _apply_table(numbers, dataset.ModalityLUTSequence[0], dataset)
    slope, intercept = _first_number(dataset, "RescaleSlope"), _first_number(dataset, "RescaleIntercept")
    if slope is None or intercept is None or slope == 0:
        return numbers
    with np.errstate(over="ignore", invalid="ignore"):
        values = numbers * slope + intercept
    return values if np.isfinite(values).all() and np.ptp(values) > 0 else numbers


def _voi(values: Values, dataset: Any) -> Values | None:
    """Apply the VOI LUT or window (PS3.3 C.11.2): black is 0, white is 1. None where neither is valid."""
    if dataset.get("VOILUTSequence"):
        with suppress(ValueError, TypeError, AttributeError):  # an invalid LUT; there may be a window
            item = dataset.VOILUTSequence[0]
            entries = _apply_table(values, item, dataset)
            return entries / _white(int(item.LUTDescriptor[2]), int(entries.max()))
    centre, width = _first_number(dataset, "WindowCenter"), _first_number(dataset, "WindowWidth")
    if centre is None or width is None or width < 1:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    return (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5


def _white(declared: int, largest: int) -> int:
    """Return the white of a VOI LUT from its declared bits, unless its entries contradict them."""
    white = (1 << declared) - 1
    if declared in range(8, 17) and white >= largest > white // 8:  # 12 bits declared as 16 would look black
        return white
    return next((1 << bits) - 1 for bits in DEPTHS if largest < 1 << bits)


def _percentiles(
    counts: npt.NDArray[np.int64], values: Values, dtype: npt.DTypeLike, layout: DicomLayout
) -> Values:
    """Apply a window made of the pixels' percentiles, without padding unless all pixels are padding."""
    unpadded = counts * ~_padding(dtype, layout)
    counts = unpadded if unpadded.any() else counts
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    low, high = (values[order[np.searchsorted(below, below[-1] * p / 100)]] for p in PERCENTILES)
    return np.asarray((values - low) / max(high - low, 1e-9))


def _padding(dtype: npt.DTypeLike, layout: DicomLayout) -> npt.NDArray[np.bool_]:
    """Return which contents of a cell are padding: PS3.3 C.7.5.1.1.2."""
    numbers, bits = _numbers(dtype, layout), int(layout.dataset.BitsStored)
    ends = [_first_number(layout.dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return np.zeros(len(numbers), bool)
    # readers disagree on the sign of these attributes, so they are compared modulo 2^bits
    first, last = ((end if end is not None else ends[0]) % (1 << bits) for end in ends)
    numbers = numbers % (1 << bits)
    return (numbers >= min(first, last)) & (numbers <= max(first, last))


def _apply_table(values: Values, item: Any, dataset: Any) -> Values:
    """Look up `values` in a modality or VOI LUT."""
    return apply_stored_lut(values, item.LUTDescriptor, item.LUTData, dataset)[0]


def apply_stored_lut(values: Values, descriptor: Any, stored: Any, dataset: Any) -> tuple[Values, bool]:
    """Look up `values` in a LUT: PS3.3 C.11.1.1, C.11.2.1.1, C.7.6.3.1.5.

    Returns the entries and whether they have 16 bits.
    """
    entries, first, _ = (int(number) for number in descriptor)
    entries, wide = entries & 0xFFFF or 1 << 16, True
    if first > 0x7FFF and values.min() < 0:  # a signed number that was read as unsigned
        first -= 1 << 16
    if isinstance(stored, bytes):
        order = "<" if dataset.original_encoding[1] is not False else ">"
        wide = len(stored) >= 2 * entries
        table = np.frombuffer(stored, f"{order}u2" if wide else np.uint8)
    else:
        table = np.asarray(stored, np.int64).reshape(-1)
    entries = min(entries, len(table))
    if not entries:
        raise ValueError("the LUT has no entries")
    indexes = np.clip(np.floor(values) - first, 0, entries - 1).astype(np.intp)
    return np.asarray(table[indexes], np.float64), wide


def _first_number(dataset: Any, keyword: str) -> float | None:
    """Return the first value of a numeric element, None where it is missing or not finite."""
    value = dataset.get(keyword)
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def _levels(values: Values, *, inverted: bool) -> Gray:
    levels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return 255 - levels if inverted else levels
