"""Decoding as on a GPU, with DALI's CPU decoders in place of the GPU's: routes, isolation, neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.core.errors import EngineError
from engine.core.records import Status
from engine.formats.header import parse_header
from engine.pipeline.load_pixels import load_pixels
from engine.preprocess.gpu import BatchRefusedError, DecodeOptions, GpuPreprocess, JpegPipeline
from engine.preprocess.stage import Preprocess
from tests.helpers.gpu_pixels import SIZE, decoded
from tests.helpers.images import jpeg, write_images


@pytest.fixture(scope="module")
def radiograph() -> np.ndarray:
    from training.synthetic import draw_sample

    return draw_sample(seed=3, index=0, size_range=(300, 400)).pixels8


def spoiled(data: bytes) -> bytes:
    """A JPEG that looks sound but has a Huffman table that is none: DALI refuses the batch that holds it."""
    table = data.index(b"\xff\xc4") + 5
    return data[:table] + b"\xff" * 16 + data[table + 16 :]


def on_the_cpu(folder: Path) -> dict[str, np.ndarray]:
    paths = sorted(folder.iterdir())
    loaded = load_pixels(paths, size=SIZE, threads=2)
    return {paths[position].name: row for position, row in zip(loaded.index, loaded.pixels, strict=True)}


def test_pixels_are_those_of_the_cpu_wherever_they_are_decoded(tmp_path):
    folder = write_images(tmp_path / "images", 21)  # PNG and JPEG, gray and colour, of any size
    expected = on_the_cpu(folder)
    for share in (0.0, 0.5, 1.0):
        actual = decoded(folder, DecodeOptions(cpu_share=share))
        assert actual.keys() == expected.keys()
        for name, pixels in expected.items():
            difference = np.abs(actual[name].astype(int) - pixels)
            assert difference.mean() < (2 if name.endswith("jpg") else 1e-9), name


def test_a_bad_image_costs_its_own_row_and_its_neighbours_keep_their_pixels(tmp_path, radiograph):
    folder = write_images(tmp_path / "images", 30)
    sound = decoded(folder)
    for number in (3, 4, 17, 29):
        (folder / f"image-{number:02}-bad.jpg").write_bytes(spoiled(jpeg(radiograph, comment=b"x" * number)))
    (folder / "image-05-empty.jpg").write_bytes(b"")
    (folder / "image-06-text.jpg").write_text("not an image")
    for batch_size in (1, 5, 32):
        result = decoded(folder, batch_size=batch_size)
        assert len(result) == 36
        for name, pixels in sound.items():
            assert np.array_equal(result[name], pixels), "the neighbours' pixels don't depend on it"
        bad = {name: value[0] for name, value in result.items() if isinstance(value, tuple)}
        assert {name for name in bad if "bad" in name} == {
            f"image-{number:02}-bad.jpg" for number in (3, 4, 17, 29)
        }
        assert bad["image-05-empty.jpg"] == Status.EMPTY
        assert bad["image-06-text.jpg"] == Status.UNSUPPORTED
        assert all(bad[f"image-{number:02}-bad.jpg"] == Status.CORRUPT for number in (3, 4, 17, 29))


def test_images_that_dali_refuses_are_decoded_on_the_cpu(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "images", 12)
    victim = (folder / "image-03.jpg").read_bytes()
    begin, end = JpegPipeline.begin, JpegPipeline.end

    def refuses(self, images):
        self.refuse = victim in images
        begin(self, images)

    def ends(self):
        output = end(self)
        if self.refuse:
            raise BatchRefusedError("no reason")
        return output

    expected = on_the_cpu(folder)
    monkeypatch.setattr(JpegPipeline, "begin", refuses)
    monkeypatch.setattr(JpegPipeline, "end", ends)
    actual = decoded(folder)
    assert np.array_equal(actual["image-03.jpg"], expected["image-03.jpg"])
    assert not [name for name, value in actual.items() if isinstance(value, tuple)]


def test_a_dali_that_can_not_decode_is_an_error_at_the_start(monkeypatch):
    with (
        Preprocess(size=SIZE, batch_size=4, threads=1, decoding_bytes=1 << 28) as cpu,
        GpuPreprocess(
            cpu, size=SIZE, batch_size=4, threads=1, device_id=None, decoding=DecodeOptions()
        ) as preprocess,
    ):
        preprocess.check()

        def broken(self):
            raise BatchRefusedError("nvJPEG is missing")

        monkeypatch.setattr(JpegPipeline, "end", broken)
        with pytest.raises(EngineError, match="cannot decode a valid JPEG on this GPU: nvJPEG is missing"):
            preprocess.check()


def test_the_route_depends_on_the_bytes_alone(radiograph):
    gray, colour = jpeg(radiograph), jpeg(Image.fromarray(radiograph).convert("CMYK"))
    assert DecodeOptions().on_gpu(gray, parse_header(gray, 10**9))
    assert not DecodeOptions().on_gpu(colour, parse_header(colour, 10**9)), "DALI's CMYK is another"
    assert not DecodeOptions(cpu_share=1.0).on_gpu(gray, parse_header(gray, 10**9))
    files = [jpeg(radiograph, comment=b"x" * number) for number in range(400)]
    routes = [DecodeOptions(cpu_share=0.3).on_gpu(data, parse_header(data, 10**9)) for data in files]
    assert 0.6 < np.mean(routes) < 0.8
    assert routes == [DecodeOptions(cpu_share=0.3).on_gpu(data, parse_header(data, 10**9)) for data in files]
