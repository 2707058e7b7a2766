"""Encoded bytes to pixels on the GPU: JPEG by DALI, some DICOM by nvImageCodec; all other images by the CPU.

The bytes of an image and the recorded settings of the run decide which of them decodes it, never load or
time. nvJPEG gives no warnings and decodes some damaged images. Therefore each JPEG's structure is scanned: a
JPEG that looks damaged, and one that DALI refuses, is decoded strictly by libjpeg-turbo.
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

PIPELINES = 2  # pipelines used in turn: one decodes while the other gets its input
HASH_BUCKETS = 1 << 16


class DecodeOptions(DecodeTuning):
    """The split of images between GPU and CPU, and DALI's options, with their defaults."""

    hw_decoder_load: float = 0.65
    hybrid_huffman_threshold: int = 1_000_000
    width_hint: int = 0
    height_hint: int = 0
    cpu_share: float = 0.0

    def on_gpu(self, data: bytes, header: Header) -> bool:
        """Return whether the GPU decodes the image; depends on its bytes alone."""
        if header.format == "dicom":
            return self.cpu_share < 1 and gpu_dicom.can_decode(header)
        if header.format != "jpeg" or header.layout.channels == 4:
            return False
        if (len(data) * 40_503) % HASH_BUCKETS < self.cpu_share * HASH_BUCKETS:  # Knuth's multiplicative hash
            return False
        return not looks_damaged(data)


class BatchRefusedError(Exception):
    """DALI could not decode a batch; it does not report which image failed."""


class JpegPipeline:
    """Decodes JPEGs to uint8 [N, 1, H, W] by DALI on a GPU; `device_id` None is the CPU, for tests."""

    def __init__(
        self,
        *,
        size: tuple[int, int],
        batch_size: int,
        threads: int,
        device_id: int | None,
        decoding: DecodeOptions,
    ) -> None:
        self._inputs: list[npt.NDArray[np.uint8]] = []
        os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "0")  # no log lines about single files
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
        """Start to decode 1 to `batch_size` images; return at once."""
        self._inputs = [np.frombuffer(image, np.uint8) for image in images]
        self._pipeline.feed_input("encoded", self._inputs)
        self._pipeline.schedule_run()

    def end(self) -> Any:
        """Return DALI's output for the images of `begin`, valid as long as it is referenced.

        Raises BatchRefusedError.
        """
        try:
            (output,) = self._pipeline.share_outputs()
        except (RuntimeError, ValueError, IndexError, TypeError) as error:  # the types that DALI raises
            raise BatchRefusedError(" ".join(str(error).split())[-200:]) from None
        finally:
            self._pipeline.release_outputs()
            self._inputs = []
        return output.as_tensor()


@dataclass
class DecodedPixels:
    """The pixels of k images before they are copied to a slot: first those of DALI, then those of the CPU."""

    decoded: list[Any]  # DALI tensors, uint8 [g, 1, H, W] each
    host: npt.NDArray[np.uint8]  # [c, 1, H, W]

    def copy_to(self, slot: PixelSlot, stream: Any, cuda: Any) -> None:
        """Copy k images to the first k rows of `slot`, in the order of `stream`; must outlive the copy."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        start = 0
        for tensor in self.decoded:
            end = start + tensor.shape()[0]
            feed_ndarray(tensor, slot.pixels[start:end], cuda_stream=stream)
            start = end
        slot.copy_host(self.host, start, stream, cuda)


@dataclass
class _BatchInProgress:
    """A batch that is being decoded on the GPU and the CPU."""

    batch: Batch
    pipeline: JpegPipeline
    on_gpu: list[int]  # positions of JPEGs
    dicom: Future[DicomBatch] | None
    on_cpu: Future[npt.NDArray[np.uint8]]  # pixels of the positions in `decoded_on_cpu`
    decoded_on_cpu: npt.NDArray[np.bool_]  # [n]


class GpuPreprocess:
    """Decodes batches on the GPU, in one thread. Owns its pipelines; the caller closes `cpu`."""

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
        self.refusals = 0  # images that the GPU refused and the CPU decoded or failed
        self.on_gpu = decoding.on_gpu
        self._pipelines = deque(
            JpegPipeline(
                size=size,
                batch_size=batch_size,
                threads=max(1, threads // PIPELINES),
                device_id=device_id,
                decoding=decoding,
            )
            for _ in range(PIPELINES)
        )
        self._cpu_thread = ThreadPoolExecutor(1, thread_name_prefix="cpu-decode")
        self._dicom_thread = ThreadPoolExecutor(1, thread_name_prefix="dicom-decode")
        self._dicom_pipeline: DicomPipeline | None = None
        self._dicom_options: dict[str, Any] = {
            "size": size,
            "batch_size": batch_size,
            "threads": max(1, threads // PIPELINES),
            "device_id": device_id,
        }

    def check(self) -> None:
        """Decode a valid image on each pipeline. Raises EngineError where DALI cannot decode at all."""
        gray = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64, 1)
        image = simplejpeg.encode_jpeg(gray, colorspace="GRAY", colorsubsampling="Gray")
        for pipeline in self._pipelines:
            pipeline.begin([image])
            try:
                pipeline.end()
            except BatchRefusedError as error:
                raise EngineError(f"DALI cannot decode a valid JPEG on this GPU: {error}") from None

    @property
    def crashes(self) -> int:
        """Return how often the decoder process crashed."""
        return self._cpu.crashes

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        """Fill `device_pixels` and `index`; an image that cannot be decoded gets its status."""
        # not `ordered_map`: this thread takes the output of a pipeline before it begins the next batch on it
        in_flight: deque[_BatchInProgress] = deque()
        with meter.upstream(batches) as source:
            for batch in source:
                start = time.perf_counter()
                in_flight.append(self._start_batch(batch))
                meter.add(time.perf_counter() - start)
                if len(in_flight) == PIPELINES:
                    yield self._finish_batch(in_flight.popleft(), meter)
            while in_flight:
                yield self._finish_batch(in_flight.popleft(), meter)

    @nvtx.annotate("begin decoding")  # type: ignore[untyped-decorator,unused-ignore]
    def _start_batch(self, batch: Batch) -> _BatchInProgress:
        """Start to decode a batch on the GPU and the CPU."""
        on_gpu, dicom_files = [], {}
        for position, is_on_gpu in enumerate(batch.on_gpu):
            header = batch.headers[position]
            if is_on_gpu and header and header.format == "dicom":
                dicom_files[position] = (batch.encoded[position], header)
            elif is_on_gpu:
                on_gpu.append(position)
        on_cpu = [
            position for position, header in enumerate(batch.headers) if header and not batch.on_gpu[position]
        ]
        pipeline = self._pipelines[0]
        self._pipelines.rotate(-1)
        if on_gpu:
            pipeline.begin([batch.encoded[position] for position in on_gpu])
        decoded = np.zeros(batch.rows, bool)
        dicom = self._dicom_thread.submit(self._make_dicom().run, dicom_files) if dicom_files else None
        cpu = self._cpu_thread.submit(self._decode_on_cpu, batch, on_cpu, decoded)
        return _BatchInProgress(batch, pipeline, on_gpu, dicom, cpu, decoded)

    def _make_dicom(self) -> DicomPipeline:
        """Return the DICOM pipeline, which the first DICOM file creates."""
        if self._dicom_pipeline is None:
            self._dicom_pipeline = DicomPipeline(**self._dicom_options)
        return self._dicom_pipeline

    def _decode_on_cpu(
        self, batch: Batch, positions: list[int], decoded: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.uint8]:
        """Decode `positions` strictly on the CPU; mark those that were decoded and return their pixels."""
        pixels = np.empty((batch.rows, 1, *self._size), np.uint8)
        decoded[self._cpu.decode(batch, positions, pixels)] = True
        return pixels[decoded]

    @nvtx.annotate("end decoding")  # type: ignore[untyped-decorator,unused-ignore]
    def _finish_batch(self, work: _BatchInProgress, meter: Meter) -> Batch:
        start = time.perf_counter()
        batch = work.batch
        host, cpu_index = work.on_cpu.result(), np.flatnonzero(work.decoded_on_cpu)
        tensors: list[Any] = []
        gpu_index: list[int] = []
        refused: list[int] = []
        if work.on_gpu:
            try:
                tensors, gpu_index = [work.pipeline.end()], work.on_gpu
            except BatchRefusedError:
                self._bisect(batch, work.pipeline, work.on_gpu, tensors, gpu_index, refused)
        if work.dicom:
            dicom = work.dicom.result()
            tensors, gpu_index = tensors + dicom.tensors, gpu_index + dicom.decoded
            refused += dicom.refused
            for position, flags in dicom.flags.items():
                batch.flags.setdefault(position, []).extend(flags)
        if refused:
            self.refusals += len(refused)
            decoded = np.zeros(batch.rows, bool)
            pixels = self._cpu_thread.submit(self._decode_on_cpu, batch, refused, decoded).result()
            host = np.concatenate([host, pixels])
            cpu_index = np.concatenate([cpu_index, np.flatnonzero(decoded)])
        batch.index = np.concatenate([np.array(gpu_index, np.intp), cpu_index])
        batch.device_pixels = DecodedPixels(tensors, host)
        batch.drop_encoded()
        meter.add(time.perf_counter() - start)
        return batch

    def _bisect(
        self,
        batch: Batch,
        pipeline: JpegPipeline,
        positions: list[int],
        tensors: list[Any],
        decoded: list[int],
        refused: list[int],
    ) -> None:
        """Decode `positions`, which failed together, in halves, down to the images that DALI refuses.

        Halves also help where GPU memory was short.
        """
        if len(positions) == 1:
            refused += positions
            return
        middle = len(positions) // 2
        for half in (positions[:middle], positions[middle:]):
            pipeline.begin([batch.encoded[position] for position in half])
            try:
                tensors.append(pipeline.end())
                decoded += half
            except BatchRefusedError:
                self._bisect(batch, pipeline, half, tensors, decoded, refused)

    def close(self) -> None:
        self._cpu_thread.shutdown(cancel_futures=True)
        self._dicom_thread.shutdown(cancel_futures=True)
        self._dicom_pipeline = None
        self._pipelines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
