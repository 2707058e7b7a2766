"""Parse an encoded image's header: format, size and layout, without decoding.

One module per format, each with `matches(data)` and `parse(data, limit)`. Files may be hostile: no loop runs
longer than the file or a fixed bound, no allocation is proportional to a declared number, and an image whose
decoder would allocate much more than its pixels need is refused here.
"""

from __future__ import annotations

import struct
from typing import Protocol

from engine.core.errors import EngineError
from engine.core.records import Header, Status
from engine.formats import bmp, dicom, gif, jpeg, jpeg2000, png, pnm, tiff, webp
from engine.formats.common import HeaderError, SizeLimit, truncated

__all__ = ["SIGNATURE_BYTES", "HeaderError", "check", "may_be_image", "parse_header"]


class _Format(Protocol):
    def matches(self, data: bytes) -> bool: ...

    def parse(self, data: bytes, limit: SizeLimit) -> Header: ...


_FORMATS: dict[str, _Format] = {
    "DICOM": dicom,  # first: its preamble may be that of a TIFF
    "JPEG": jpeg,
    "PNG": png,
    "TIFF": tiff,
    "JPEG 2000": jpeg2000,
    "WebP": webp,
    "BMP": bmp,
    "PNM": pnm,
    "GIF": gif,
}
_OTHER_SIGNATURES = ((b"%PDF", "a PDF file"), (b"PK\x03\x04", "a ZIP file"), (b"P7\n", "a PAM file"))


def parse_header(data: bytes, max_pixels: int) -> Header:
    """Parse the header of an encoded image, whose format is recognized by its content.

    Raises HeaderError: TOO_LARGE (checked first where the size is known), UNSUPPORTED, TRUNCATED (the end is
    missing), CORRUPT or, for a DICOM file that is not a radiograph, SKIPPED.
    """
    name = next((name for name, module in _FORMATS.items() if module.matches(data)), None)
    if name is None and dicom.lacks_preamble(data):
        name = "DICOM"
    if name is None:
        file_type = next(
            (name for magic, name in _OTHER_SIGNATURES if data.startswith(magic)), "not an image"
        )
        message = f"the file is {file_type}; supported formats: {', '.join(_FORMATS)}"
        raise HeaderError(Status.UNSUPPORTED, message)
    limit = SizeLimit(max_pixels)
    try:
        return _FORMATS[name].parse(data, limit)
    except struct.error:
        error = truncated(f"the {name} file ends inside its header at byte {len(data)}")
    except HeaderError as raised:
        error = raised
    error.size = limit.size
    raise error


def check(data: bytes, max_pixels: int) -> Header:
    """Return the header of an image that may be decoded.

    Raises HeaderError as `parse_header` does, EMPTY for 0 bytes, and CORRUPT where a parser fails.
    """
    if not data:
        raise HeaderError(Status.EMPTY, "the file has 0 bytes")
    try:
        return parse_header(data, max_pixels)
    except (HeaderError, EngineError, MemoryError):
        raise
    except Exception as error:  # no file may end the run
        raise HeaderError(Status.CORRUPT, f"the header cannot be read: {type(error).__name__}") from None


SIGNATURE_BYTES = 132  # length of the start of a file that may_be_image needs


def may_be_image(start: bytes) -> bool:
    """Return whether a file with this start may be an image in a supported format."""
    return any(module.matches(start) for module in _FORMATS.values()) or dicom.begins_without_preamble(start)
