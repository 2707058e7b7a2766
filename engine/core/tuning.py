"""Values that are measured when the stages open, recorded, and kept on resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from engine.core.json_records import Fraction, Record


class DecodeTuning(Record):
    """The split of JPEGs between the GPU's decoder, its CUDA kernels and the CPU (NVIDIA DALI's names)."""

    hw_decoder_load: Fraction
    hybrid_huffman_threshold: Annotated[int, Meta(ge=0, le=1 << 40)]  # pixels
    width_hint: Annotated[int, Meta(ge=0, le=1 << 16)]
    height_hint: Annotated[int, Meta(ge=0, le=1 << 16)]
    cpu_share: Fraction  # of the JPEGs, chosen by file length; 1: all images


class DecodeTrial(DecodeTuning):
    """A setting that was tried."""

    images_per_s: float


class StreamTuning(Record):
    """The time of members on separate CUDA streams, compared with one stream."""

    concurrent: bool
    sequential_ms: float  # of a batch
    concurrent_ms: float
    gain: float  # sequential / concurrent


class Tuning(Record, omit_defaults=True):
    """`tuning` of `_run.json`: measurements and choices on the GPU; empty for a run on the CPU."""

    batch_size_asked: int | None = None  # if it was halved because GPU memory was short
    eager_ms: float | None = None  # of a batch through the members
    compiled_ms: float | UnsetType | None = UNSET  # None: they cannot be compiled
    compiled: bool | None = None
    streams: StreamTuning | None = None
    canaries: float | None = None  # largest difference in probability from their reference
    decoding_tried: tuple[DecodeTrial, ...] | None = None
    decoding: DecodeTuning | None = None


@dataclass(frozen=True)
class Settled:
    """The values that the stages of one process have chosen when they are open."""

    batch_size: int
    tuning: Tuning = field(default_factory=Tuning)
    versions: dict[str, str] = field(default_factory=dict)  # of the runners' packages
