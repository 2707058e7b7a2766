"""The records that travel between stages. Comments name the stage that fills a field."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import UNSET, UnsetType

from engine.core.json_records import Record

if TYPE_CHECKING:
    import pyarrow as pa

OnMessage = Callable[[str], None]
PATH_COLUMN, SIZE_COLUMN, MODIFIED_COLUMN = "path", "file_size", "file_mtime"


class Status(enum.IntEnum):
    """The outcome of a row. The results hold the lower-case name."""

    OK = 0
    MISSING = 1
    EMPTY = 2
    UNREADABLE = 3
    UNSUPPORTED = 4
    TRUNCATED = 5
    CORRUPT = 6
    TOO_LARGE = 7
    TIMEOUT = 8
    SKIPPED = 9
    CRASHED = 10

    @property
    def label(self) -> str:
        return self.name.lower()


# facts that users should know about a scored image
FLAGS = (
    "first_frame",
    "decoder_warning",
    "colour",
    "window_fallback",
    "for_processing",
    "burned_in",
    "inverse_lut",
)


class Scorer(Record, omit_defaults=True):
    """Host, device, runner and precision that scored a part; empty in results of older versions."""

    host: str = ""
    device: str = ""
    gpu: str | UnsetType | None = UNSET  # name
    runner: str = ""
    precision: str = ""
    actor: str | None = None  # of a run on Ray
    round: int = 0  # rounds of canaries that had passed in that actor before


_PEAK_BYTES_PER_PIXEL = {
    "bmp": 6,
    "dicom": 20,
    "gif": 4,
    "jpeg": 4,
    "jpeg2000": 27,
    "png": 12,
    "pnm": 6,
    "tiff": 12,
    "webp": 14,
}


class Header(NamedTuple):
    """The facts in an image's header. Filled by `engine.formats.header.parse_header`."""

    format: str
    width: int  # pixels as stored
    height: int
    flags: tuple[str, ...] = ()
    orientation: int = 1  # EXIF 1 to 8
    layout: Any = None  # further facts for the decoder of the format
    bits: int = 8  # of a stored sample
    photometric: str = ""  # DICOM's PhotometricInterpretation
    uids: tuple[str, str, str] = ("", "", "")  # DICOM's study, series and SOP instance

    @property
    def decoding_bytes(self) -> int:
        """Return the peak memory of decoding in bytes, as measured for each format."""
        return self.width * self.height * _PEAK_BYTES_PER_PIXEL[self.format]


class PixelSlot(Protocol):
    """The buffer on a GPU that the members read the pixels of a batch from."""

    pixels: Any  # uint8 tensor [B, 1, H, W] on the device

    def copy_host(self, pixels: npt.NDArray[np.uint8], start: int, stream: Any, cuda: Any) -> None:
        """Copy pixels [c, 1, H, W] from host memory to the rows from `start`, in the order of `stream`."""


class DevicePixels(Protocol):
    """Pixels of a batch, some or all of which are on a GPU."""

    def copy_to(self, slot: PixelSlot, stream: Any, cuda: Any) -> None:
        """Copy k images to the first k rows of `slot`, in the order of `stream`; must outlive the copy."""


@dataclass(slots=True)
class Part:
    """Manifest rows that become one file, the unit of resume. Filled by the manifest."""

    index: int
    row: npt.NDArray[np.int64]  # [n], numbers in the manifest: consecutive, but for a retry of failed rows
    paths: list[str | None]
    columns: pa.Table  # the other manifest columns, same length as `paths`
    crashed: frozenset[int] = frozenset()  # positions that are not scored because each crashes the worker

    @property
    def rows(self) -> int:
        return len(self.paths)

    def slice(self, start: int, stop: int) -> Part:
        """Return some of the part's rows, by position."""
        rows = slice(start, stop)
        return Part(self.index, self.row[rows], self.paths[rows], self.columns.slice(start, stop - start))


@dataclass(slots=True)
class Batch:
    """Consecutive rows of one part that pass through the stages: n rows, k of them with pixels.

    A row is addressed by its position in the batch; `index` ties pixels and scores to it.
    """

    # reader
    part: Part
    start: int  # position of the batch's first row in its part
    status: npt.NDArray[np.uint8]  # [n], Status; later stages may turn OK into a failure
    width: npt.NDArray[np.int32]  # [n], pixels as stored; 0 where unknown
    height: npt.NDArray[np.int32]  # [n]
    errors: dict[int, str] = field(default_factory=dict)  # position -> one line
    flags: dict[int, list[str]] = field(default_factory=dict)
    encoded: list[bytes] = field(default_factory=list)  # [n], b"" where there is nothing to decode
    headers: list[Header | None] = field(default_factory=list)  # [n]
    on_gpu: list[bool] = field(default_factory=list)  # [n], decoded on the GPU and not on the CPU
    release: Callable[[], None] = lambda: None  # returns the encoded bytes to the reader's budget
    # preprocess
    index: npt.NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))  # [k], positions
    pixels: npt.NDArray[np.uint8] | None = None  # [k, 1, H, W], dropped by the members
    device_pixels: DevicePixels | None = None  # instead of `pixels`, from decoders on a GPU
    # members and ensemble
    members: npt.NDArray[np.float32] | None = None  # [M, k, C], probabilities of each member
    distances: npt.NDArray[np.float32] | None = None  # [M, k], of the features, if the runner computes them
    probabilities: npt.NDArray[np.float32] | None = None  # [k, C], probabilities of the ensemble
    prediction: npt.NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))  # [k], class
    confidence: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # [k]

    @property
    def rows(self) -> int:
        return len(self.status)

    def fail(self, position: int, status: Status, error: str) -> None:
        """Set a row's status and error; all failures go through here."""
        self.status[position] = status
        self.errors[position] = error

    def keep(self, position: int, data: bytes, header: Header, *, on_gpu: bool) -> None:
        """Store an encoded image that will be decoded, and its header."""
        self.encoded[position], self.headers[position] = data, header
        self.on_gpu[position] = on_gpu
        self.width[position], self.height[position] = header.width, header.height
        if header.flags:
            self.flags[position] = list(header.flags)

    def drop_encoded(self) -> None:
        """Free the encoded bytes, so that the reader can read further ahead."""
        self.encoded = []
        self.release()

    def __repr__(self) -> str:
        row = self.part.row[self.start : self.start + self.rows]
        return f"Batch(rows {row[0]}..{row[-1]}, {len(self.index)} with pixels)"


@dataclass(frozen=True)
class PartInfo:
    """A part on disk."""

    index: int
    first_row: int
    rows: int
    by_status: dict[str, int]
    by_class: dict[str, int]
    by: Scorer
    written: datetime | None  # first time, UTC; None for parts of older versions

    @property
    def errors(self) -> int:
        return self.rows - self.by_status.get("ok", 0) - self.by_status.get("skipped", 0)
