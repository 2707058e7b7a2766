"""Frames of DICOM files decoded by nvImageCodec, windowed and resized on the GPU.

Only gray JPEG 2000 and JPEG Lossless frames, in which the strict decoders of the CPU would find no more
damage. The CPU decodes what nvImageCodec refuses.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.core.errors import UsageError
from engine.core.records import Header
from engine.formats import jpeg, jpeg2000
from engine.formats.common import SizeLimit
from engine.formats.dicom import LOSSLESS_JPEG, DicomLayout
from engine.preprocess import resize
from engine.preprocess.codecs.dicom_windowing import display, display_samples

FILES_AT_ONCE = 16  # files whose stored values are in memory together


def can_decode(header: Header) -> bool:
    """Return whether the GPU tries to decode a DICOM file; depends on its header alone."""
    layout: DicomLayout = header.layout
    return layout.channels == 1 and (layout.compression == "JPEG 2000" or layout.syntax in LOSSLESS_JPEG)


@dataclass
class DicomBatch:
    """The outcome of some files of a batch."""

    tensors: list[Any] = field(default_factory=list)  # DALI tensors, uint8 [k, 1, H, W]
    decoded: list[int] = field(default_factory=list)  # [k], positions
    refused: list[int] = field(default_factory=list)
    flags: dict[int, list[str]] = field(default_factory=dict)


class DicomPipeline:
    """Decodes and resizes on a GPU; `device_id` None is the CPU, for tests. Use from one thread."""

    def __init__(
        self, *, size: tuple[int, int], batch_size: int, threads: int, device_id: int | None
    ) -> None:
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # no log lines about single files
        try:
            from nvidia import nvimgcodec
        except ImportError as error:
            raise UsageError(f"nvImageCodec, part of nvidia-dali, cannot be imported ({error})") from None
        self._codec, self._on_gpu = nvimgcodec, device_id is not None
        backends = None if self._on_gpu else [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
        device = device_id if device_id is not None else -99999  # nvImageCodec's number for the CPU
        self._decoder = nvimgcodec.Decoder(device_id=device, max_num_cpu_threads=threads, backends=backends)
        self._as_stored = nvimgcodec.DecodeParams(
            allow_any_depth=True, color_spec=nvimgcodec.ColorSpec.UNCHANGED, apply_exif_orientation=False
        )
        dali = resize.import_dali()
        memory: Literal["cpu", "gpu"] = "gpu" if self._on_gpu else "cpu"

        def pixels() -> Any:
            gray = dali.fn.external_source(
                name="gray", device=memory, dtype=dali.types.UINT8, ndim=3, layout="HWC"
            )
            return resize.resize_nodes(gray, *size, memory)

        self._pipeline = resize.build(pixels, batch_size=batch_size, threads=threads, device_id=device_id)

    def run(self, files: dict[int, tuple[bytes, Header]]) -> DicomBatch:
        """Decode files, given by position; those that fail here are `refused`, and the CPU decodes them."""
        result = DicomBatch()
        with contextlib.suppress(RuntimeError, ValueError):
            result = self._decode(files)
        result.refused = [position for position in files if position not in set(result.decoded)]
        return result

    def _decode(self, files: dict[int, tuple[bytes, Header]]) -> DicomBatch:
        result, encoded, gray = DicomBatch(), {}, []
        for position, (data, header) in files.items():
            with contextlib.suppress(Exception):  # pydicom raises many types for a damaged file
                encoded[position] = _first_frame(data, header)
        for start in range(0, len(encoded), FILES_AT_ONCE):
            positions = list(encoded)[start : start + FILES_AT_ONCE]
            images = self._decoder.decode(
                [encoded[position] for position in positions], params=self._as_stored
            )
            for position, image in zip(positions, images, strict=True):
                displayed = None if image is None else self._display(image, files[position][1])
                if displayed:
                    gray.append(displayed[0])
                    result.decoded.append(position)
                    if displayed[1]:
                        result.flags[position] = displayed[1]
        if gray:
            self._pipeline.feed_input("gray", gray)
            (output,) = self._pipeline.run()
            result.tensors.append(output.as_tensor())
        return result

    def _display(self, image: Any, header: Header) -> tuple[Any, list[str]] | None:
        """Return the displayed 8-bit image [H, W, 1] on its device and its flags, None if it is refused."""
        inverted = header.photometric == "MONOCHROME1"
        if not self._on_gpu:
            samples = np.asarray(image)
            if samples.shape[:2] != (header.height, header.width) or samples.dtype.itemsize > 2:
                return None
            stored = samples.reshape(header.height, header.width).view(f"u{samples.dtype.itemsize}")
            gray, flags = display_samples(stored, header.layout, inverted=inverted)
            return gray[:, :, None], flags
        import torch
        from torch.utils.dlpack import from_dlpack

        tensor = from_dlpack(image)
        if tuple(tensor.shape[:2]) != (header.height, header.width) or tensor.element_size() > 2:
            return None
        bits = 8 * tensor.element_size()
        cells = tensor.reshape(header.height, header.width, 1).view(
            torch.int16 if bits == 16 else torch.uint8
        )
        cells = cells.to(torch.int32) & (1 << bits) - 1
        displayed, flags = display(
            lambda levels: torch.from_numpy(levels).to(cells.device)[cells],
            torch.count_nonzero,
            lambda: torch.bincount(cells.reshape(-1), minlength=1 << bits).cpu().numpy(),
            np.dtype(f"u{bits // 8}"),
            header.layout,
            inverted=inverted,
        )
        torch.cuda.current_stream(tensor.device).synchronize()  # DALI copies on another stream
        return displayed, flags


def _first_frame(data: bytes, header: Header) -> npt.NDArray[np.uint8]:
    """Return the encoded first frame. Raises if it is missing or its size differs from the data set's."""
    from pydicom.encaps import get_frame

    layout: DicomLayout = header.layout
    frame = get_frame(
        data[slice(*layout.span)], 0, number_of_frames=layout.frames, extended_offsets=layout.offsets
    )
    if layout.compression == "JPEG 2000":
        jpeg2000.parse(frame, limit := SizeLimit(sys.maxsize), frame=True)
        size = limit.size
    else:
        _, _, height, width, _ = jpeg.frame_header(frame)
        size = (width, height)
    if size != (header.width, header.height):
        raise ValueError("the frame's size is not the header's")
    return np.frombuffer(frame, np.uint8)
