"""DICOM: the first frame, extracted by pydicom, as it would be exported for display."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut

from engine.core.records import Header
from engine.formats.dicom import DicomLayout, import_pydicom, inflate_deflated
from engine.preprocess.codecs import dicom_frames
from engine.preprocess.codecs.dicom_windowing import apply_stored_lut, display_samples
from engine.preprocess.codecs.gray import Gray, Samples, apply_lut, to_gray

import_pydicom()  # sets its options in the decoder process


def decode(data: bytes, header: Header) -> tuple[Gray, list[str]]:
    """Return gray uint8 [H, W] and flags: "window_fallback" where the file has no usable window."""
    layout: DicomLayout = header.layout
    try:
        samples, photometric = _read_stored(data, header, layout)
        if photometric in ("MONOCHROME1", "MONOCHROME2"):
            return display_samples(samples, layout, inverted=photometric == "MONOCHROME1")
        return _to_luma(samples, photometric, header, layout), []
    except MemoryError:
        raise
    except Exception:  # pydicom raises many types, with header values in the text
        raise ValueError("the image is damaged") from None


def _read_stored(data: bytes, header: Header, layout: DicomLayout) -> tuple[Samples, str]:
    """Read the first frame as stored, [H, W] or [H, W, 3], unsigned, and its photometric interpretation."""
    start, end = layout.span
    if layout.deflated:
        data, _ = inflate_deflated(data, layout.deflated, end)
    encapsulated = layout.compression != "uncompressed"
    options: dict[str, Any] = {
        "rows": header.height,
        "columns": header.width,
        "samples_per_pixel": layout.channels,
        "photometric_interpretation": header.photometric,
        "pixel_representation": 0,
        "bits_allocated": layout.allocated,
        "bits_stored": header.bits,
        "number_of_frames": layout.frames if encapsulated else 1,
        "planar_configuration": int(layout.dataset.get("PlanarConfiguration") or 0),
        "pixel_keyword": "PixelData",
    }
    if encapsulated:
        options["decoding_plugin"] = dicom_frames.PLUGIN
        if layout.offsets:
            options["extended_offsets"] = layout.offsets
    else:
        options |= {"pixel_vr": "OW" if layout.words else "OB", "correct_unused_bits": False}
    decoder = get_decoder(layout.syntax)
    samples, properties = decoder.as_array(data[start:end], index=0, raw=True, **options)
    return samples, str(properties["photometric_interpretation"])


def _to_luma(samples: Samples, photometric: str, header: Header, layout: DicomLayout) -> Gray:
    """Convert colour to gray by its luma, which is the first channel of YBR."""
    white = (1 << header.bits) - 1
    if photometric == "PALETTE COLOR":
        return _apply_palette(samples, layout.dataset)
    return to_gray(samples[:, :, :1] if photometric.startswith("YBR") else samples, white=white)


def _apply_palette(samples: Samples, dataset: Any) -> Gray:
    """Convert palette indexes [H, W] to gray."""
    if not dataset.get("RedPaletteColorLookupTableData"):
        colours = apply_color_lut(samples, dataset)  # a segmented palette, which pydicom expands
        return to_gray(colours, white=int(np.iinfo(colours.dtype).max))
    # not by pydicom, which reads big-endian entries as little-endian and 12-bit indexes as 8-bit ones
    indexes = np.arange(1 << 8 * samples.dtype.itemsize, dtype=np.float64)
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    tables = [
        apply_stored_lut(indexes, dataset[f"{name}Descriptor"].value, dataset[f"{name}Data"].value, dataset)
        for name in names
    ]
    table = np.stack([values for values, _ in tables], -1).astype(np.uint16)
    white = 65535 if tables[0][1] else 255
    return apply_lut(samples, to_gray(table[None], white=white)[0])
