"""DICOM: PS3.10 files, with or without preamble, read by pydicom; PS3.3 defines the attributes.

Header values identify people: error texts repeat only values that the standard defines.
"""

from __future__ import annotations

import functools
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

from engine.core.errors import UsageError
from engine.core.extras import install_command
from engine.core.records import Header, Status
from engine.formats.common import INT32_MAX, HeaderError, SizeLimit, corrupt, truncated, unsupported

MODALITIES = ("CR", "DX", "RG", "RF", "XA", "MG", "PX", "IO", "OT", "SC", "BMD", "DXA")
MAX_HEADER = 16 << 20  # bytes before the pixels of a deflated file
MAX_FRAGMENTS = 200_000
MAX_READS = 200_000  # two or three for each element; pydicom needs 0.7 kB for each item of a sequence
MAX_PALETTE = 1 << 16
MAX_TABLES, MAX_ITEMS = 4 << 20, 1000  # bytes and items of a sequence of LUTs, which is parsed later
_MAX_FIRST_ELEMENT, _MAX_FIRST_LENGTH = 0x0100, 1024  # element number and bytes of a file's first element
# fmt: off
_OTHER_MODALITIES = frozenset((  # of the standard; an error may name them
    "AU", "CT", "DOC", "ECG", "ES", "GM", "IVOCT", "IVUS", "KO", "MR", "NM", "OCT", "OP", "OPT", "PR", "PT",
    "REG", "RTDOSE", "RTIMAGE", "RTPLAN", "RTRECORD", "RTSTRUCT", "SEG", "SM", "SR", "US", "XC",
))
# fmt: on
_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_UID = re.compile(r"[0-9.]{1,64}")
_IMPLICIT, _BIG, _DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
_NATIVE = (_IMPLICIT, "1.2.840.10008.1.2.1", _BIG, _DEFLATED)
SYNTAXES = {
    **dict.fromkeys(_NATIVE, "uncompressed"),
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.4.50": "JPEG",
    "1.2.840.10008.1.2.4.51": "JPEG",
    "1.2.840.10008.1.2.4.57": "JPEG",
    "1.2.840.10008.1.2.4.70": "JPEG",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.90": "JPEG 2000",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.201": "JPEG 2000",
    "1.2.840.10008.1.2.4.202": "JPEG 2000",
    "1.2.840.10008.1.2.4.203": "JPEG 2000",
}
LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_PIXELS, _FLOAT, _DOUBLE = 0x7FE00010, 0x7FE00008, 0x7FE00009
# fmt: off
_KEYWORDS = (
    "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "PresentationIntentType",
    "PhotometricInterpretation", "PlanarConfiguration", "SamplesPerPixel", "NumberOfFrames",
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "BurnedInAnnotation", "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "LUTDescriptor", "LUTData",
    "PresentationLUTShape",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{kind}{colour}PaletteColorLookupTableData" for kind in ("", "Segmented")
      for colour in ("Red", "Green", "Blue")),
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
)
# fmt: on


class DicomLayout(NamedTuple):
    dataset: Any  # pydicom Dataset of the elements that decoding needs, without the pixels
    syntax: str  # transfer syntax, its UID
    compression: str  # uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000
    big_endian: bool
    deflated: int  # byte of the file where the deflated data set starts; 0 where it is not deflated
    span: tuple[int, int]  # first byte and end of the pixel data, in the data set where that is deflated
    words: bool  # the pixel data's VR is OW
    channels: int  # 1 or 3
    allocated: int  # bits of a sample's cell: 1, 8 or 16
    shift: int  # unused low bits of a cell
    signed: bool
    frames: int

    @property
    def offsets(self) -> tuple[Any, Any] | None:
        """Return the extended offset table and its lengths, where the file has them."""
        tables = self.dataset.get("ExtendedOffsetTable"), self.dataset.get("ExtendedOffsetTableLengths")
        return tables if all(tables) else None


def matches(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def begins_without_preamble(start: bytes) -> bool:
    """Return whether the bytes begin with a short element of group 2 or 8, as DICOM without preamble does."""
    order = {b"\x02\0": "<", b"\x08\0": "<", b"\0\x08": ">"}.get(start[:2])
    if order is None or len(start) < 8:
        return False
    element, length = (
        struct.unpack_from(order + "H", start, 2)[0],
        struct.unpack_from(order + "I", start, 4)[0],
    )
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    return element <= _MAX_FIRST_ELEMENT and (explicit or (length <= _MAX_FIRST_LENGTH and length % 2 == 0))


def lacks_preamble(data: bytes) -> bool:
    """Return whether the bytes are DICOM without preamble: an element of group 2 or 8 first, pixels later."""
    if not begins_without_preamble(data):
        return False
    import_pydicom()
    try:
        dataset, element, _ = _read(data)
        return element is not None and all(
            _number(dataset, name) for name in ("Rows", "Columns", "BitsAllocated")
        )
    except MemoryError:
        raise
    except Exception:  # pydicom raises many types for bytes that are not DICOM
        return False


def parse(data: bytes, limit: SizeLimit) -> Header:
    """Parse the header. Raises HeaderError, and UsageError when pydicom is missing."""
    import_pydicom()
    try:
        return _parse(data, limit)
    except (HeaderError, MemoryError):
        raise
    except Exception:  # pydicom raises many types, with header values in the text
        raise corrupt("the DICOM header cannot be read") from None


@functools.cache
def import_pydicom() -> None:
    """Import pydicom and turn off its log. Raises UsageError when it is missing."""
    try:
        from pydicom import config
    except ImportError:
        raise UsageError(
            "there are DICOM files, and the package pydicom, which reads them, is missing; install it with: "
            + install_command("dicom")
        ) from None
    config.settings.reading_validation_mode = config.IGNORE
    # its messages may contain header values
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module="pydicom")


def _parse(data: bytes, limit: SizeLimit) -> Header:
    dataset, element, layout = _read(data)
    modality = _text(dataset, "Modality")
    if modality and modality not in MODALITIES:
        name = f"is {modality}" if modality in _OTHER_MODALITIES else "is not in the DICOM standard"
        raise _unsupported_object(f"the modality {name}; screened modalities: {', '.join(MODALITIES)}")
    if element is None:
        raise _unsupported_object("the DICOM file contains no image")
    width, height = _number(dataset, "Columns"), _number(dataset, "Rows")
    limit.check("DICOM", width, height)
    frames = _number(dataset, "NumberOfFrames", 1) or 1
    photometric = _text(dataset, "PhotometricInterpretation")
    if photometric not in _GRAY + _COLOUR:
        raise unsupported("the DICOM photometric interpretation", ", ".join(_GRAY + _COLOUR))
    layout = _read_sample_layout(dataset, photometric, layout._replace(frames=frames))
    if photometric == "PALETTE COLOR":
        _check_palette(dataset, layout.big_endian)
    stored = _number(dataset, "BitsStored")
    layout = layout._replace(span=_pixel_span(element, layout, width * height), words=element.vr == b"OW")
    return Header(
        "dicom",
        width,
        height,
        tuple(_flags(dataset, photometric, frames)),
        layout=layout,
        bits=stored,
        photometric=photometric,
        uids=(
            _uid(dataset, "StudyInstanceUID"),
            _uid(dataset, "SeriesInstanceUID"),
            _uid(dataset, "SOPInstanceUID"),
        ),
    )


class _PixelElement(NamedTuple):
    """The pixel data element: its VR and length, and the bytes that contain it."""

    data: bytes
    complete: bool  # False: only the start of a deflated data set was inflated
    vr: bytes
    start: int  # of the value
    length: int  # 0xFFFFFFFF where it is undefined


def _read(data: bytes) -> tuple[Any, _PixelElement | None, DicomLayout]:
    """Read the elements that are used and find the pixel data element, None where there is none."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_dataset

    source = _LimitedReads(data)
    source.seek(132 if matches(data) else 0)
    meta = read_dataset(source, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    syntax = str(meta.get("TransferSyntaxUID") or _guess_syntax(data, source.tell()))
    if syntax not in SYNTAXES:
        raise unsupported("the DICOM transfer syntax", "uncompressed, RLE, JPEG, JPEG-LS, JPEG 2000")
    deflated, complete = 0, True
    if syntax == _DEFLATED:
        deflated = source.tell()
        data, complete = inflate_deflated(data, deflated, MAX_HEADER)
        source = _LimitedReads(data)
    tags: list[Any] = [tag_for_keyword(name) for name in _KEYWORDS]
    big = syntax == _BIG
    dataset = read_dataset(source, syntax == _IMPLICIT, not big, stop_when=_at_pixels, specific_tags=tags)
    _check_tables(dataset)
    layout = DicomLayout(dataset, syntax, SYNTAXES[syntax], big, deflated, (0, 0), False, 1, 8, 0, False, 1)
    implicit = bool(dataset.original_encoding[0])  # pydicom detects it from the bytes, not from the syntax
    return dataset, _find_pixel_element(data, source.tell(), implicit, complete, ">" if big else "<"), layout


class _LimitedReads(BytesIO):
    """Bytes that pydicom may read at most MAX_READS times."""

    _reads_left = MAX_READS

    def read(self, size: int | None = -1) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise unsupported(f"a DICOM header that needs more than {MAX_READS} reads")
        return super().read(size)


def _check_tables(dataset: Any) -> None:
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        stored = getattr(dataset.get_item(keyword), "value", None)  # bytes: pydicom has not parsed it yet
        if isinstance(stored, bytes) and (
            len(stored) > MAX_TABLES or stored.count(b"\xfe\xff\x00\xe0") > MAX_ITEMS
        ):
            raise unsupported(
                f"DICOM with more than {MAX_ITEMS} LUTs, or LUTs of more than {MAX_TABLES >> 20} MiB,"
            )


def _at_pixels(tag: int, vr: str | None, length: int) -> bool:
    return tag in (_PIXELS, _FLOAT, _DOUBLE) or tag > _PIXELS


def _guess_syntax(data: bytes, start: int) -> str:
    """Guess the transfer syntax of a data set without one from its first element."""
    group, vr = data[start : start + 2], data[start + 4 : start + 6]
    if not vr.isalpha() or not vr.isupper():
        return _IMPLICIT
    return _BIG if group[:1] == b"\0" else "1.2.840.10008.1.2.1"


def inflate_deflated(data: bytes, start: int, limit: int) -> tuple[bytes, bool]:
    """Inflate `data` from `start`, at most to `limit` bytes; return them and whether the stream has ended."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflate.decompress(memoryview(data)[start:], limit)
    except zlib.error:
        raise corrupt("the deflated DICOM data set is damaged") from None
    return inflated, inflate.eof


def _find_pixel_element(
    data: bytes, position: int, implicit: bool, complete: bool, order: str
) -> _PixelElement | None:
    if position + 8 > len(data):
        return None
    group, number = struct.unpack_from(order + "HH", data, position)
    tag = group << 16 | number
    if tag in (_FLOAT, _DOUBLE):
        raise unsupported("DICOM with floating-point pixels", "integers")
    if tag != _PIXELS:
        return None
    if implicit:
        (length,) = struct.unpack_from("<I", data, position + 4)
        return _PixelElement(data, complete, b"OW", position + 8, length)
    (length,) = struct.unpack_from(order + "I", data, position + 8)
    return _PixelElement(data, complete, data[position + 4 : position + 6], position + 12, length)


def _read_sample_layout(dataset: Any, photometric: str, layout: DicomLayout) -> DicomLayout:
    """Return `layout` with the facts about how a sample is stored."""
    channels = _number(dataset, "SamplesPerPixel", 1)
    expected = 1 if photometric in (*_GRAY, "PALETTE COLOR") else 3
    if channels != expected:
        raise corrupt(f"the DICOM header declares {channels} samples a pixel for {photometric}")
    allocated, stored = _number(dataset, "BitsAllocated"), _number(dataset, "BitsStored")
    if allocated not in (1, 8, 16) or (allocated == 1 and layout.compression != "uncompressed"):
        raise unsupported(f"DICOM with {allocated} bits allocated", "1, 8, 16")
    if not 1 <= stored <= allocated:
        raise corrupt(f"the DICOM header declares {stored} bits stored in {allocated} bits allocated")
    high = _number(dataset, "HighBit", stored - 1)
    shift = high + 1 - stored if stored <= high + 1 <= allocated else 0
    signed = _number(dataset, "PixelRepresentation", 0) == 1
    return layout._replace(channels=channels, allocated=allocated, shift=shift, signed=signed)


def _check_palette(dataset: Any, big_endian: bool) -> None:
    """Check that a segmented palette (PS3.3 C.7.9.2) has no repeats and at most MAX_PALETTE entries."""
    error = unsupported(f"a DICOM palette with repeated segments, or of more than {MAX_PALETTE} entries,")
    for colour in ("Red", "Green", "Blue"):
        stored = dataset.get(f"Segmented{colour}PaletteColorLookupTableData") or b""
        if len(stored) > 4 * MAX_PALETTE:
            raise error
        wide = dataset.get("RedPaletteColorLookupTableDescriptor", [0, 0, 16])[2] != 8
        words = struct.unpack_from(f"{'<>'[big_endian]}{len(stored) // 2}H", stored) if wide else stored
        entries = position = 0
        while position + 1 < len(words):
            kind, length = words[position], words[position + 1]
            entries += length
            if kind > 1 or entries > MAX_PALETTE:
                raise error
            position += 2 + (length if kind == 0 else 1)


def _pixel_span(element: _PixelElement, layout: DicomLayout, pixels: int) -> tuple[int, int]:
    """Return first byte and end of the pixel data. Raises HeaderError where the file has fewer bytes."""
    encapsulated = layout.compression != "uncompressed"
    if element.length == 0:
        raise _unsupported_object("the DICOM file contains no image")
    if encapsulated != (element.length == 0xFFFFFFFF):
        raise corrupt("the DICOM pixel data do not match the transfer syntax")
    if encapsulated:
        return element.start, _end_of_items(element)
    channels = 2 if _text(layout.dataset, "PhotometricInterpretation") == "YBR_FULL_422" else layout.channels
    frame = (pixels * channels * layout.allocated + 7) // 8
    if element.length < frame:
        raise corrupt(f"the DICOM file has {element.length} bytes of pixels; {frame} expected")
    if element.complete and element.start + frame > len(element.data):
        raise truncated(f"the DICOM file ends at byte {len(element.data)} of {element.start + frame}")
    return element.start, element.start + frame + frame % 2


def _end_of_items(element: _PixelElement) -> int:
    position = element.start
    for _ in range(MAX_FRAGMENTS):
        if position == len(element.data):  # only the last delimiter is missing
            return position
        tag, length = struct.unpack_from("<II", element.data, position)
        if tag == 0xE0DDFFFE:
            return position
        if tag != 0xE000FFFE:
            raise corrupt(f"the DICOM file has no fragment at byte {position}, where one is expected")
        position += 8 + length
        if position > len(element.data):
            raise truncated(f"the DICOM file ends at byte {len(element.data)} of {position}")
    raise corrupt(f"the DICOM file has more than {MAX_FRAGMENTS} fragments")


def _flags(dataset: Any, photometric: str, frames: int) -> Iterator[str]:
    if frames > 1:
        yield "first_frame"
    if photometric in _COLOUR:
        yield "colour"
    if _text(dataset, "PresentationIntentType") == "FOR PROCESSING":
        yield "for_processing"
    if _text(dataset, "PresentationLUTShape") == "INVERSE" and photometric == "MONOCHROME2":
        yield "inverse_lut"
    if _text(dataset, "BurnedInAnnotation") == "YES":
        yield "burned_in"


def _number(dataset: Any, keyword: str, default: int | None = None) -> int:
    value = dataset.get(keyword)
    if value in (None, "") and default is not None:
        return default
    if not isinstance(value, int) or not 0 <= value <= INT32_MAX:
        raise corrupt(f"the DICOM header has no valid {keyword}")
    return int(value)


def _text(dataset: Any, keyword: str) -> str:
    value = dataset.get(keyword)
    return value.strip().upper() if isinstance(value, str) else ""


def _uid(dataset: Any, keyword: str) -> str:
    value = str(dataset.get(keyword) or "")
    return value if _UID.fullmatch(value) else ""


def _unsupported_object(message: str) -> HeaderError:
    return HeaderError(Status.SKIPPED, message)
