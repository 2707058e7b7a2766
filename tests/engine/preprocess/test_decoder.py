"""The decoder process under images that crash it, hang it, or make libjpeg complain."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import EngineError
from engine.core.overlap import Meter
from engine.core.records import Batch, Status
from engine.preprocess import decoder
from engine.preprocess.stage import Preprocess
from tests.helpers.decoder_faults import FAULTS
from tests.helpers.images import smooth_jpeg
from tests.helpers.pixels import read_batches


@pytest.fixture
def preprocess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Preprocess]:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(decoder, "DECODE_TIMEOUT_S", 1)
    with Preprocess(size=(32, 32), batch_size=8, threads=2, decoding_bytes=1 << 24) as opened:
        yield opened


def decoded(preprocess: Preprocess, folder: Path, images: list[bytes]) -> list[Batch]:
    folder.mkdir(exist_ok=True)
    for index, data in enumerate(images):
        (folder / str(index)).write_bytes(data)
    batches = read_batches(folder, [str(index) for index in range(len(images))], threads=1)
    return list(preprocess.stage(batches, Meter("")))


@pytest.mark.parametrize(("word", "reason"), [(b"CRASH", "ended by SIGSEGV"), (b"HANG", "stopped after 1 s")])
def test_an_image_that_ends_the_decoder_costs_only_its_row(
    preprocess: Preprocess, tmp_path: Path, word: bytes, reason: str
) -> None:
    good = [smooth_jpeg(seed) for seed in range(16)]
    (first, second) = decoded(preprocess, tmp_path / "images", good)
    images = [*good[:3], smooth_jpeg(3, word), *good[4:]]
    (batch, after) = decoded(preprocess, tmp_path / "images", images)
    assert batch.status.tolist() == [0, 0, 0, Status.CRASHED, 0, 0, 0, 0]
    assert batch.errors == {3: f"decoding the jpeg image failed: the decoder process was {reason}"}
    assert np.array_equal(batch.pixels, np.delete(first.pixels, 3, axis=0))
    assert np.array_equal(after.pixels, second.pixels)
    assert preprocess.decoder.crashes == 3  # together, alone, and alone once more


def test_a_header_that_cannot_be_sent_costs_only_its_row(preprocess: Preprocess, tmp_path: Path) -> None:
    images = [smooth_jpeg(seed) for seed in range(3)]
    (before,) = decoded(preprocess, tmp_path / "images", images)
    (batch,) = read_batches(tmp_path / "images", ["0", "1", "2"], threads=1)
    batch.headers[1] = batch.headers[1]._replace(layout=lambda: None)
    preprocess.fill(batch)
    assert batch.errors == {
        1: "decoding the jpeg image failed: the header cannot be sent to the decoder process"
    }
    assert np.array_equal(batch.pixels, before.pixels[[0, 2]])
    assert preprocess.decoder.crashes == 0


def test_a_decoder_killed_from_outside_costs_nothing(preprocess: Preprocess, tmp_path: Path) -> None:
    images = [smooth_jpeg(seed) for seed in range(3)]
    (before,) = decoded(preprocess, tmp_path / "images", images)
    process = preprocess.decoder._process
    process.kill()
    process.wait()
    (after,) = decoded(preprocess, tmp_path / "images", images)
    assert not after.errors
    assert np.array_equal(before.pixels, after.pixels)
    assert preprocess.decoder.crashes == 1


def test_a_decoder_killed_while_it_starts_is_started_again(preprocess: Preprocess, tmp_path: Path) -> None:
    preprocess.decoder._process.kill()
    (batch,) = decoded(preprocess, tmp_path / "images", [smooth_jpeg(0)])
    assert not batch.errors
    assert preprocess.decoder.crashes == 0


def test_a_decoder_that_never_starts_is_one_line(
    preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    preprocess.decoder._process.kill()
    with pytest.raises(EngineError, match="does not start: the decoder process ended with status 1"):
        preprocess.decoder.await_start()


def test_signals_for_the_engine_do_not_end_the_decoder(preprocess: Preprocess, tmp_path: Path) -> None:
    images = [smooth_jpeg(seed) for seed in range(3)]
    decoded(preprocess, tmp_path / "images", images)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(preprocess.decoder._process.pid, number)
    (after,) = decoded(preprocess, tmp_path / "images", images)
    assert not after.errors
    assert preprocess.decoder.crashes == 0


@pytest.mark.parametrize("limit", ["RECYCLE_BYTES", "RECYCLE_FAILURES"])
def test_a_decoder_that_may_leak_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(decoder, limit, 1)
    images = [smooth_jpeg(0), damaged_middle(smooth_jpeg(1)), damaged_middle(smooth_jpeg(2))]
    with Preprocess(size=(32, 32), batch_size=8, threads=1, decoding_bytes=1 << 24) as preprocess:
        first = preprocess.decoder._process.pid
        for _ in range(decoder.RECYCLE_REQUESTS + 1):
            (batch,) = decoded(preprocess, tmp_path / "images", images)
            assert sorted(batch.errors) == [1, 2]
        assert preprocess.decoder._process.pid != first
        assert preprocess.decoder.crashes == 0


def test_no_process_stays_behind(tmp_path: Path) -> None:
    preprocess = Preprocess(size=(32, 32), batch_size=8, threads=1, decoding_bytes=1 << 24)
    pid = preprocess.decoder._process.pid
    preprocess.close()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the decoder is still there")


def damaged_middle(data: bytes) -> bytes:
    """A stray marker in the entropy-coded segment; libjpeg decodes it with a warning."""
    start = data.index(b"\xff\xda") + 100
    return data[:start] + b"\xff\xd3" + data[start + 2 :]


def test_a_jpeg_with_a_damaged_middle_is_corrupt(preprocess: Preprocess, tmp_path: Path) -> None:
    good = [smooth_jpeg(seed) for seed in range(8)]
    (reference,) = decoded(preprocess, tmp_path / "images", good)
    for bad in ([2], [0, 7], [1, 2, 3, 4, 5, 6]):
        images = [damaged_middle(data) if n in bad else data for n, data in enumerate(good)]
        (batch,) = decoded(preprocess, tmp_path / "images", images)
        assert sorted(batch.errors) == bad
        assert all(batch.status[position] == Status.CORRUPT for position in bad)
        assert all("Corrupt JPEG data" in error for error in batch.errors.values())
        assert np.array_equal(batch.pixels, np.delete(reference.pixels, bad, axis=0))


def test_a_jpeg_cut_short_and_ended_is_corrupt(preprocess: Preprocess, tmp_path: Path) -> None:
    good = smooth_jpeg(0)
    (batch,) = decoded(preprocess, tmp_path / "images", [good, good[: len(good) // 2] + b"\xff\xd9"])
    assert batch.errors == {
        1: "decoding the jpeg image failed: Corrupt JPEG data: premature end of data segment"
    }


def test_a_warning_that_may_hide_damage_is_a_flag(preprocess: Preprocess, tmp_path: Path) -> None:
    good = smooth_jpeg(0)
    version = good.index(b"JFIF\0") + 5
    odd = good[:version] + b"\x07" + good[version + 1 :]
    (batch,) = decoded(preprocess, tmp_path / "images", [good, odd])
    assert not batch.errors
    assert batch.flags == {1: ["decoder_warning"]}
    assert np.array_equal(batch.pixels[0], batch.pixels[1])
