from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.core.overlap import Meter
from engine.formats.header import parse_header
from engine.pipeline.load_pixels import load_pixels
from engine.preprocess.codecs import decode as codecs
from engine.preprocess.decoder import DecoderProcess
from engine.preprocess.resize import ResizePipeline, import_dali, resize_nodes
from engine.preprocess.stage import Preprocess
from tests.helpers.images import encode, pillow_reference, png, smooth
from tests.helpers.pixels import pixels_alone
from tests.helpers.tolerances import PIXEL_MAX, PIXEL_MEAN

SIZE = (224, 224)


@pytest.fixture(scope="module")
def graph() -> ResizePipeline:
    return ResizePipeline(size=SIZE, batch_size=8, threads=2)


def difference(graph: ResizePipeline, data: bytes) -> tuple[float, int]:
    (pixels,) = graph.run([codecs.decode(data, parse_header(data, 1 << 30)).gray])
    assert pixels.shape == (1, *SIZE)
    assert pixels.dtype == np.uint8
    apart = np.abs(pixels[0].astype(int) - pillow_reference(data, SIZE))
    return float(apart.mean()), int(apart.max())


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (7, 300), (224, 224), (600, 500), (1024, 1024), (2660, 2180)]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_gray_pixels_are_pillows(graph: ResizePipeline, height: int, width: int, kind: str) -> None:
    mean, largest = difference(graph, encode(Image.fromarray(smooth(height, width)), kind))
    assert mean <= PIXEL_MEAN
    assert largest <= PIXEL_MAX


@pytest.mark.parametrize(
    ("height", "width"), [(3, 3), (224, 448), (225, 260), (300, 700), (1024, 1024), (2430, 1994)]
)
def test_a_bright_frame_keeps_its_weight(graph: ResizePipeline, height: int, width: int) -> None:
    """Scanned films have frames of a pixel or two; a resize that repeats the border makes much of them."""
    framed = smooth(height, width)
    framed[0], framed[:, -1], framed[-1], framed[:, 0] = 255, 255, 0, 0
    _, largest = difference(graph, encode(Image.fromarray(framed), "PNG"))
    assert largest <= PIXEL_MAX


def test_real_radiographs_have_pillows_pixels(graph: ResizePipeline, radiographs: list[Path]) -> None:
    for path in radiographs[::5]:
        mean, largest = difference(graph, path.read_bytes())
        assert (mean <= PIXEL_MEAN, largest <= PIXEL_MAX) == (True, True)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"quality": 90}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("CMYK", "JPEG", {"quality": 95}),
        ("RGB", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
    ],
)
def test_colour_becomes_luma(graph: ResizePipeline, mode: str, kind: str, options: dict[str, object]) -> None:
    picture = Image.fromarray(smooth(600, 500, channels=3)).convert(mode)
    mean, _ = difference(graph, encode(picture, kind, **options))
    assert mean <= PIXEL_MEAN


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(graph: ResizePipeline, kind: str, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    mean, largest = difference(graph, encode(Image.fromarray(smooth(300, 400)), kind, exif=exif))
    assert mean <= PIXEL_MEAN
    assert largest <= PIXEL_MAX


def test_graph_nodes_and_numpy_remove_the_same_repeats(graph: ResizePipeline) -> None:
    """What stays on a GPU is resized by nodes alone; here they run on the CPU."""
    dali = import_dali()

    def nodes() -> object:
        gray = dali.fn.external_source(name="gray", dtype=dali.types.UINT8, ndim=3, layout="HWC")
        return resize_nodes(gray, *SIZE, "cpu")

    pipeline = dali.pipeline_def(nodes)(batch_size=8, num_threads=2, device_id=None, exec_dynamic=True)
    pipeline.build()
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (7, 300), (224, 448), (225, 260), (300, 101), (333, 1001), (512, 512), (1100, 900)]
    images = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    pipeline.feed_input("gray", [image[:, :, None] for image in images])
    (output,) = pipeline.run()
    assert np.array_equal(graph.run(images), np.array(output.as_tensor()))


@pytest.mark.parametrize(
    "margins", [((0, 0.75), (0, 0.25)), ((0.5, 0), (0.875, 0)), ((0.1, 0.2), (0.3, 0.4))]
)
@pytest.mark.parametrize(("height", "width"), [(250, 304), (448, 700), (1001, 333)])
def test_margins_are_left_out_as_pillow_does(
    graph: ResizePipeline, height: int, width: int, margins: tuple[tuple[float, float], tuple[float, float]]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    image[0], image[:, -1], image[-1], image[:, 0] = 255, 255, 0, 0
    (top, bottom), (left, right) = margins
    box = (left, top, width - right, height - bottom)
    expected = np.asarray(Image.fromarray(image).resize(SIZE, Image.Resampling.BILINEAR, box=box))
    apart = np.abs(graph.run([image], [margins])[0, 0].astype(int) - expected)
    assert apart.mean() <= PIXEL_MEAN
    assert apart.max() <= 4


def test_twenty_megapixels(graph: ResizePipeline) -> None:
    mean, largest = difference(graph, encode(Image.fromarray(smooth(5000, 4000)), "JPEG"))
    assert mean <= PIXEL_MEAN
    assert largest <= PIXEL_MAX


def test_16_bits_give_the_pixels_of_8_bits(tmp_path: Path) -> None:
    gray = smooth(500, 400)
    twelve = np.rint(gray / 255 * 4095).astype(np.uint16)
    for name, data in {"8": png(gray), "12": png(twelve), "16": png(gray.astype(np.uint16) * 257)}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    loaded = load_pixels([tmp_path / f"{name}.png" for name in ("8", "12", "16")])
    eight, *others = loaded.pixels.astype(int)
    for other in others:
        assert np.abs(other - eight).max() <= 1


def test_damaged_images_cost_only_their_rows(tmp_path: Path) -> None:
    paths = []
    for index in range(20):
        data = encode(Image.fromarray(smooth(90, 70, seed=index)), ("PNG", "JPEG")[index % 2])
        if index in (3, 4, 8, 17):
            middle = len(data) // 2
            data = data[:middle] + bytes(200) + (b"\xff\xd9" if index % 2 else data[middle + 200 :])
        paths.append(tmp_path / f"{index}")
        paths[-1].write_bytes(data)
    loaded = load_pixels(paths, size=(32, 32))
    alone = pixels_alone(paths, (32, 32))
    assert {position for position, status, _ in loaded.failures if status == "corrupt"} == {3, 4, 8, 17}
    assert [position for position, pixels in enumerate(alone) if pixels is None] == [3, 4, 8, 17]
    for row, position in enumerate(loaded.index):
        assert np.array_equal(loaded.pixels[row], alone[position])
    assert len(loaded.index) + len(loaded.failures) == 20


def test_images_are_decoded_within_the_pixel_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(6):
        (tmp_path / f"{index}").write_bytes(encode(Image.fromarray(smooth(100, 100, seed=index)), "PNG"))
    paths = [tmp_path / f"{index}" for index in range(6)]
    plenty = load_pixels(paths, size=(32, 32))
    together = []
    decode = DecoderProcess.decode
    monkeypatch.setattr(
        DecoderProcess,
        "decode",
        lambda self, images, headers: together.append(len(images)) or decode(self, images, headers),
    )
    monkeypatch.setattr("engine.core.settings.Limits.decoding_bytes", 250_000)
    scarce = load_pixels(paths, size=(32, 32))
    assert together == [2, 2, 2]
    assert np.array_equal(plenty.pixels, scarce.pixels)


def test_a_stage_closes_its_source() -> None:
    closed = []

    def source():
        try:
            yield from ()
        finally:
            closed.append(True)

    with Preprocess(size=(8, 8), batch_size=2, threads=1, decoding_bytes=1 << 20) as preprocess:
        assert list(preprocess.stage(source(), Meter("preprocess"))) == []
    assert closed
