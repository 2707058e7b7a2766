"""Encoded bytes to pixels on the GPU: JPEG by DALI there, some DICOM by nvImageCodec, all else by the CPU.

Which of the two an image gets depends on its own bytes and on what the run has recorded, never on load or
time. nvJPEG gives no warnings: damage that it can decode through is scored. So each JPEG's structure is
scanned, and one that is in doubt gets libjpeg-turbo's strict look instead, as does one that DALI refuses.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import nvtx
import simplejpeg

from engine.core.errors import EngineError
from engine.core.overlap import Meter
from engine.core.records import Batch, Header, PixelSlot
from engine.core.tuning import DecodeTuning
from engine.formats.jpeg import looks_damaged
from engine.preprocess import gpu_dicom, resize
from engine.preprocess.gpu_dicom import DicomBatch, DicomPipeline
from engine.preprocess.stage import Preprocess

PIPELINES = 2  # pipelines that take turns: one decodes while the other is fed, and an error stays in its own
HASH_BUCKETS = 1 << 16


class DecodeOptions(DecodeTuning):
    """The place and the options of decoding."""

    def on_gpu(self, data: bytes, header: Header) -> bool:
        """Return whether DALI decodes the image: a function of its bytes alone."""
        if header.format == "dicom":
            return self.cpu_share < 1 and gpu_dicom.can_decode(header)
        if header.format != "jpeg" or header.layout.channels == 4:
            return False
        if (len(data) * 40_503) % HASH_BUCKETS < self.cpu_share * HASH_BUCKETS:  # Knuth's multiplicative hash
            return False
        return not looks_damaged(data)


class BatchRefusedError(Exception):
    """DALI could not decode a batch; it does not say which image."""


class JpegPipeline:
    """DALI from encoded JPEGs to uint8 [N, 1, H, W] on a GPU; `device_id` None is the CPU, for tests."""

    def __init__(
        self,
        *,
        size: tuple[int, int],
        batch_size: int,
        threads: int,
        device_id: int | None,
        decoding: DecodeOptions,
    ) -> None:
        self._fed: list[npt.NDArray[np.uint8]] = []
        os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "0")  # its words about single files
        dali = resize.import_dali()
        fn, types = dali.fn, dali.types
        mixed = {
            "device": "mixed",
            "hw_decoder_load": decoding.hw_decoder_load,
            "hybrid_huffman_threshold": decoding.hybrid_huffman_threshold,
            "preallocate_width_hint": decoding.width_hint,
            "preallocate_height_hint": decoding.height_hint,
        }

        def pixels() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            options = {"device": "cpu"} if device_id is None else mixed
            gray = fn.decoders.image(encoded, output_type=types.GRAY, **options)
            return resize.resize_nodes(gray, *size, "cpu" if device_id is None else "gpu")

        self._pipeline = resize.build(pixels, batch_size=batch_size, threads=threads, device_id=device_id)

    def begin(self, images: Sequence[bytes]) -> None:
        """Start on 1 to `batch_size` images; returns at once."""
        self._fed = [np.frombuffer(image, np.uint8) for image in images]
        self._pipeline.feed_input("encoded", self._fed)
        self._pipeline.schedule_run()

    def end(self) -> Any:
        """DALI's output for what was begun; it stays valid while it is held. Raises RefusedError."""
        try:
            (output,) = self._pipeline.share_outputs()
        except (RuntimeError, ValueError, IndexError, TypeError) as error:  # as DALI maps its own
            raise BatchRefusedError(" ".join(str(error).split())[-200:]) from None
        finally:
            self._pipeline.release_outputs()
            self._fed = []
        return output.as_tensor()


@dataclass
class DecodedPixels:
    """The pixels of k images on their way to a slot: those that DALI decoded, then those of the CPU."""

    decoded: list[Any]  # DALI tensors, uint8 [g, 1, H, W] each
    host: npt.NDArray[np.uint8]  # [c, 1, H, W]

    def copy_to(self, slot: PixelSlot, stream: Any, cuda: Any) -> None:
        """Copy k images to the first k places of `slot`, in the order of `stream`; must outlive the copy."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        start = 0
        for tensor in self.decoded:
            end = start + tensor.shape()[0]
            feed_ndarray(tensor, slot.pixels[start:end], cuda_stream=stream)
            start = end
        slot.copy_host(self.host, start, stream, cuda)


@dataclass
class _BatchInProgress:
    """A batch being decoded on both sides."""

    batch: Batch
    lane: JpegPipeline
    on_gpu: list[int]  # positions of JPEGs
    framed: Future[DicomBatch] | None  # of DICOM files
    on_cpu: Future[npt.NDArray[np.uint8]]  # pixels of the positions that `batch.index` then names
    index: npt.NDArray[np.intp]


class GpuPreprocess:
    """Fills in pixels on the GPU; its stage is for one thread. Owns the pipelines; `cpu` is the caller's."""

    def __init__(
        self,
        cpu: Preprocess,
        *,
        size: tuple[int, int],
        batch_size: int,
        threads: int,
        device_id: int | None,
        decoding: DecodeOptions,
    ) -> None:
        self._cpu, self._size = cpu, size
        self.refusals = 0  # images that DALI refused and the CPU had to look at
        self.on_gpu = decoding.on_gpu
        self._lanes = deque(
            JpegPipeline(
                size=size,
                batch_size=batch_size,
                threads=max(1, threads // PIPELINES),
                device_id=device_id,
                decoding=decoding,
            )
            for _ in range(PIPELINES)
        )
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cpu-decode")
        self._framer = ThreadPoolExecutor(1, thread_name_prefix="dicom-decode")
        self._frame_graph: DicomPipeline | None = None
        self._shape: dict[str, Any] = {
            "size": size,
            "batch_size": batch_size,
            "threads": max(1, threads // PIPELINES),
            "device_id": device_id,
        }

    def check(self) -> None:
        """Decode a sound image on each pipeline: raises EngineError where DALI can't decode at all."""
        picture = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64, 1)
        image = simplejpeg.encode_jpeg(picture, colorspace="GRAY", colorsubsampling="Gray")
        for lane in self._lanes:
            lane.begin([image])
            try:
                lane.end()
            except BatchRefusedError as error:
                raise EngineError(f"DALI can't decode a sound JPEG here: {error}") from None

    @property
    def crashes(self) -> int:
        """Return how often the decoder process had to be started anew."""
        return self._cpu.crashes

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        """Fill `device_pixels` and `index`; what can't be decoded gets its status."""
        # not `ordered_map`: this thread takes the output of a lane before it begins the lane again
        begun: deque[_BatchInProgress] = deque()
        with meter.upstream(batches) as source:
            for batch in source:
                start = time.perf_counter()
                begun.append(self._start_batch(batch))
                meter.add(time.perf_counter() - start)
                if len(begun) == PIPELINES:
                    yield self._end(begun.popleft(), meter)
            while begun:
                yield self._end(begun.popleft(), meter)

    @nvtx.annotate("begin decoding")  # type: ignore[untyped-decorator,unused-ignore]
    def _start_batch(self, batch: Batch) -> _BatchInProgress:
        """Start both sides on their share of a batch."""
        on_gpu, of_dicom = [], {}
        for position, there in enumerate(batch.on_gpu):
            header = batch.headers[position]
            if there and header and header.format == "dicom":
                of_dicom[position] = (batch.encoded[position], header)
            elif there:
                on_gpu.append(position)
        on_cpu = [
            position for position, header in enumerate(batch.headers) if header and not batch.on_gpu[position]
        ]
        lane = self._lanes[0]
        self._lanes.rotate(-1)
        if on_gpu:
            lane.begin([batch.encoded[position] for position in on_gpu])
        index = np.zeros(batch.rows, bool)
        framed = self._framer.submit(self._frames().run, of_dicom) if of_dicom else None
        strict = self._worker.submit(self._strict, batch, on_cpu, index)
        return _BatchInProgress(batch, lane, on_gpu, framed, strict, index)

    def _frames(self) -> DicomPipeline:
        """Made for the first DICOM file that is tried."""
        if self._frame_graph is None:
            self._frame_graph = DicomPipeline(**self._shape)
        return self._frame_graph

    def _strict(
        self, batch: Batch, positions: list[int], decoded: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.uint8]:
        """Decode `positions` strictly on the CPU; marks those that decoded, returns their pixels."""
        pixels = np.empty((batch.rows, 1, *self._size), np.uint8)
        decoded[self._cpu.decode(batch, positions, pixels)] = True
        return pixels[decoded]

    @nvtx.annotate("end decoding")  # type: ignore[untyped-decorator,unused-ignore]
    def _end(self, begun: _BatchInProgress, meter: Meter) -> Batch:
        start = time.perf_counter()
        batch = begun.batch
        host, cpu_index = begun.on_cpu.result(), np.flatnonzero(begun.index)
        tensors: list[Any] = []
        gpu_index: list[int] = []
        refused: list[int] = []
        if begun.on_gpu:
            try:
                tensors, gpu_index = [begun.lane.end()], begun.on_gpu
            except BatchRefusedError:
                self._bisect(batch, begun.lane, begun.on_gpu, tensors, gpu_index, refused)
        if begun.framed:
            framed = begun.framed.result()
            tensors, gpu_index = tensors + framed.tensors, gpu_index + framed.decoded
            refused += framed.refused
            for position, flags in framed.flags.items():
                batch.flags.setdefault(position, []).extend(flags)
        if refused:
            self.refusals += len(refused)
            looked = np.zeros(batch.rows, bool)
            host = np.concatenate([host, self._worker.submit(self._strict, batch, refused, looked).result()])
            cpu_index = np.concatenate([cpu_index, np.flatnonzero(looked)])
        batch.index = np.concatenate([np.array(gpu_index, np.intp), cpu_index])
        batch.device_pixels = DecodedPixels(tensors, host)
        batch.drop_encoded()
        meter.add(time.perf_counter() - start)
        return batch

    def _bisect(
        self,
        batch: Batch,
        lane: JpegPipeline,
        positions: list[int],
        tensors: list[Any],
        decoded: list[int],
        refused: list[int],
    ) -> None:
        """Decode `positions`, which failed together, in halves, down to the images that DALI refuses alone.

        Short of memory on the GPU, halves are what helps too.
        """
        if len(positions) == 1:
            refused += positions
            return
        middle = len(positions) // 2
        for half in (positions[:middle], positions[middle:]):
            lane.begin([batch.encoded[position] for position in half])
            try:
                tensors.append(lane.end())
                decoded += half
            except BatchRefusedError:
                self._bisect(batch, lane, half, tensors, decoded, refused)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)
        self._framer.shutdown(cancel_futures=True)
        self._frame_graph = None
        self._lanes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
