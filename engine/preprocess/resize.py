"""The one resize: gray images of any size to uint8 [N, 1, H, W], by DALI. Training and screening both run it.

Where the triangle filter reaches over the edge, DALI repeats the image's outermost line, so that a frame of
one pixel has a large weight. Pillow leaves out that share w and scales up the rest. This module does so too:
the first and last line of the small image become (line - w * outermost) / (1 - w), with the outermost line
resized in the same way. When s source pixels become one, w = n (s - n) / (2 s^2) with n = floor(s / 2 + 1/2),
about 1/8. An enlarged image (s < 1) has w = 0.

`ResizePipeline` does that in NumPy, `resize_nodes` in DALI nodes for images that stay on the GPU. The pixels
are equal, but on a CPU the nodes would take longer than the resize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from engine.core.errors import UsageError
from engine.core.extras import install_command

if TYPE_CHECKING:
    from engine.preprocess.codecs.gray import Margins

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def import_dali() -> Any:
    """Import and return DALI. Raises UsageError when it is missing."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.math
    except ImportError as error:
        raise UsageError(f"DALI cannot be imported ({error}); install it with: {install_command()}") from None
    return nvidia.dali


def build(nodes: Callable[[], Any], *, batch_size: int, threads: int, device_id: int | None) -> Any:
    """Build the DALI pipeline of `nodes`; `device_id` None is the CPU. Raises UsageError without DALI."""
    pipeline = import_dali().pipeline_def(nodes)(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


def resize_nodes(gray: Any, height: int, width: int, device: Literal["cpu", "gpu"]) -> Any:
    """Build the resize as DALI nodes: gray uint8 [h, w, 1] to uint8 [1, H, W] on `device`."""
    from nvidia.dali import fn, types

    small = _resize(gray, height, width, types.UINT8)
    for axis in (0, 1):
        small = _border_removal_nodes(small, gray, axis, (height, width), device)
    return fn.reshape(fn.cast(small, dtype=types.UINT8), shape=[1, height, width])


def _resize(image: Any, height: int, width: int, dtype: Any, **region: Any) -> Any:
    from nvidia.dali import fn, types

    return fn.resize(
        image, size=[height, width], interp_type=types.INTERP_LINEAR, antialias=True, dtype=dtype, **region
    )


def _border_removal_nodes(small: Any, gray: Any, axis: int, size: tuple[int, int], device: str) -> Any:
    """Remove the repeated border from the first and last line of `small` along `axis`."""
    from nvidia.dali import fn, math, types

    length = fn.cast(gray.shape()[axis], dtype=types.FLOAT)
    s = length / size[axis]
    n = math.floor(s / 2 + 0.5)
    w = n * (s - n) / (2 * s * s) * fn.cast(s > 1.0, dtype=types.FLOAT)
    if device == "gpu":
        w = w.gpu()
    repeated, ends = 0.0, 0.0
    for start, position in ((0, 0), (fn.cast(length - 1, dtype=types.INT32), size[axis] - 1)):
        line = fn.slice(gray, start=start, shape=[1], axes=[axis])
        height, width = (1, size[1]) if axis == 0 else (size[0], 1)
        mask = np.zeros((size[0], 1, 1) if axis == 0 else (1, size[1], 1), np.float32)
        mask.flat[position] = 1
        end = types.Constant(mask, device=device)
        repeated = repeated + end * _resize(line, height, width, types.FLOAT)
        ends = ends + end
    return (small - w * repeated) * (1 + w / (1 - w) * ends)


class ResizePipeline:
    """Resizes on the CPU with antialiased linear filtering.

    Pixels differ from Pillow's BILINEAR resize by less than 1 gray level on average, by 8 at most.
    """

    def __init__(self, *, size: tuple[int, int], batch_size: int, threads: int) -> None:
        self.size, self.batch_size = size, batch_size
        self._pipeline = build(self._nodes, batch_size=batch_size, threads=threads, device_id=None)

    def _nodes(self) -> Any:
        """Build nodes for the images and, separately, for their outermost rows and columns."""
        from nvidia.dali import fn, types

        height, width = self.size

        def small(name: str, rows: int, columns: int, dtype: Any) -> Any:
            image = fn.external_source(name=name, dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True)
            start, end = (
                fn.external_source(name=f"{name} {edge}", dtype=types.FLOAT, ndim=1, no_copy=True)
                for edge in ("start", "end")
            )
            return _resize(image, rows, columns, dtype, roi_start=start, roi_end=end)

        return (
            small("images", height, width, types.UINT8),
            small("rows", 2, width, types.FLOAT),
            small("columns", height, 2, types.FLOAT),
        )

    def run(self, images: Sequence[Pixels], margins: Sequence[Margins] | None = None) -> Pixels:
        """Resize 1 to `batch_size` gray images [h, w], each without its margins, to uint8 [N, 1, H, W]."""
        margins = margins or [((0, 0), (0, 0))] * len(images)
        outside = np.array(margins, np.float32)  # [N, axis, end]
        lengths = np.array([image.shape for image in images], np.float32)  # [N, axis]
        start, end = outside[:, :, 0], lengths - outside[:, :, 1]
        rows, columns = np.eye(2, dtype=np.float32)
        inputs = {  # a pair of lines is resized along the lines only
            "images": (images, start, end),
            "rows": ([image[[0, -1]] for image in images], start * columns, end * columns + 2 * rows),
            "columns": ([image[:, [0, -1]] for image in images], start * rows, end * rows + 2 * columns),
        }
        buffers = []  # kept alive until the run: DALI does not copy them
        for name, (pictures, first, last) in inputs.items():
            for key, value in (
                (name, [np.ascontiguousarray(picture)[:, :, None] for picture in pictures]),
                (f"{name} start", np.ascontiguousarray(first)),
                (f"{name} end", np.ascontiguousarray(last)),
            ):
                self._pipeline.feed_input(key, value)
                buffers.append(value)
        outputs = self._pipeline.run()
        small: Pixels = np.array(outputs[0].as_tensor())[..., 0]
        lines = [np.asarray(output.as_tensor())[..., 0] for output in outputs[1:]]
        _remove_border(small, lines[0], lines[1], _border_shares(outside, end - start, self.size))
        return small[:, None]


def _border_shares(outside: Floats, lengths: Floats, size: tuple[int, int]) -> Floats:
    """Return the share of the repeated border in the first and last line, [N, axis, end].

    The padding `outside` the picture is not a border: with d lines of it n = floor(s / 2 - d + 1/2), and
    w = n (s - n - 2 d) / (2 s^2).
    """
    s = (lengths / np.array(size, np.float32))[:, :, None]
    n = np.floor(s / 2 - outside + 0.5)
    return np.where(s > 1, n * (s - n - 2 * outside) / (2 * s * s), np.float32(0))


def _remove_border(small: Pixels, rows: Floats, columns: Floats, share: Floats) -> None:
    """Correct `small` [N, H, W] in place with its outermost rows [N, 2, W] and columns [N, H, 2]."""
    ends = [0, -1]
    w = share[:, 0, :, None]
    outer_rows = (small[:, ends] - w * rows) * (1 + w / (1 - w))
    outer_columns = small[:, :, ends].astype(np.float32)
    outer_columns[:, ends] = outer_rows[:, :, ends]
    w = share[:, 1, None, :]
    outer_columns = (outer_columns - w * columns) * (1 + w / (1 - w))
    small[:, ends] = _round_half_up(outer_rows)
    small[:, :, ends] = _round_half_up(outer_columns)


def _round_half_up(levels: Floats) -> Pixels:
    """Round halves up, as DALI does."""
    rounded: Pixels = np.clip(np.floor(levels + 0.5), 0, 255).astype(np.uint8)
    return rounded
