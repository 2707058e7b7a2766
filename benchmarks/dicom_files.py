"""Make DICOM files in each transfer syntax that the engine reads."""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmwrite, uid
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder

Samples = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.int16]

# decode to identical samples
LOSSLESS = {
    "implicit": uid.ImplicitVRLittleEndian,
    "explicit": uid.ExplicitVRLittleEndian,
    "big-endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "rle": uid.RLELossless,
    "jpeg-p14": uid.JPEGLossless,
    "jpeg-sv1": uid.JPEGLosslessSV1,
    "jpeg-ls": uid.JPEGLSLossless,
    "jpeg2000": uid.JPEG2000Lossless,
    "htj2k": uid.HTJ2KLossless,
    "htj2k-rpcl": uid.HTJ2KLosslessRPCL,
}
LOSSY = {
    "jpeg": uid.JPEGBaseline8Bit,
    "jpeg-extended": uid.JPEGExtended12Bit,
    "jpeg-ls-near": uid.JPEGLSNearLossless,
    "jpeg2000-lossy": uid.JPEG2000,
    "htj2k-lossy": uid.HTJ2K,
}


def dicom(
    samples: Samples,
    syntax: str = "explicit",
    *,
    preamble: bytes = bytes(128),
    bits: int | None = None,
    **more: Any,
) -> bytes:
    """Make a DX file of samples [H, W], or [H, W, 3] in RGB.

    `more` are attributes by keyword; None omits an attribute.
    """
    gray = samples.ndim == 2
    size = samples.dtype.itemsize * 8
    bits = bits or size
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = (LOSSLESS | LOSSY)[syntax]
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    data = FileDataset(None, Dataset(), preamble=preamble, file_meta=meta)
    attributes = {
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.9",
        "PatientName": "DOE^JANE",
        "Modality": "DX",
        "Rows": samples.shape[0],
        "Columns": samples.shape[1],
        "SamplesPerPixel": 1 if gray else 3,
        "PhotometricInterpretation": "MONOCHROME2" if gray else "RGB",
        "PlanarConfiguration": None if gray else 0,
        "BitsAllocated": size,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(samples.dtype.kind == "i"),
    } | more
    for keyword, value in attributes.items():
        if value is not None:
            setattr(data, keyword, value)
    if syntax in ("implicit", "explicit", "big-endian", "deflated"):
        data.PixelData = samples.astype(
            samples.dtype.newbyteorder(">" if syntax == "big-endian" else "<")
        ).tobytes()
        data["PixelData"].VR = "OW" if size == 16 else "OB"
    else:
        data.PixelData = encapsulate([frame(samples, syntax, bits)])
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    little = syntax != "big-endian"
    dcmwrite(file, data, implicit_vr=syntax == "implicit", little_endian=little, enforce_file_format=True)
    return file.getvalue()


def frame(samples: Samples, syntax: str, bits: int) -> bytes:
    """Encode one frame."""
    cells = samples.view(f"u{samples.dtype.itemsize}") & (1 << bits) - 1  # as encoders see them
    match syntax:
        case "rle":
            rows, columns, *channels = cells.shape
            return get_encoder(uid.RLELossless).encode(
                cells,
                rows=rows,
                columns=columns,
                samples_per_pixel=3 if channels else 1,
                photometric_interpretation="RGB" if channels else "MONOCHROME2",
                planar_configuration=0 if channels else None,
                pixel_representation=0,
                bits_allocated=8 * cells.itemsize,
                bits_stored=8 * cells.itemsize,
                number_of_frames=1,
            )
        case "jpeg":
            return bytes(imagecodecs.jpeg8_encode(cells, level=95))
        case "jpeg-extended":
            return bytes(imagecodecs.jpeg8_encode(cells, level=98, bitspersample=12))
        case "jpeg-p14":
            return bytes(imagecodecs.jpeg8_encode(cells, lossless=True, predictor=5, bitspersample=bits))
        case "jpeg-sv1":
            return bytes(imagecodecs.jpeg8_encode(cells, lossless=True, predictor=1, bitspersample=bits))
        case "jpeg-ls":
            return bytes(imagecodecs.jpegls_encode(cells))
        case "jpeg-ls-near":
            return bytes(imagecodecs.jpegls_encode(cells, level=2))
        case "jpeg2000" | "jpeg2000-lossy":
            lossless = syntax == "jpeg2000"
            options = {"level": 0, "reversible": True} if lossless else {"level": 60}
            return bytes(imagecodecs.jpeg2k_encode(cells, codecformat="j2k", bitspersample=bits, **options))
        case _:
            return bytes(imagecodecs.htj2k_encode(cells, reversible="lossy" not in syntax))
