import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.core.overlap import Meter
from engine.core.records import Batch, Status
from engine.core.settings import Limits
from engine.reader.reader import Reader
from tests.helpers.images import encode, smooth
from tests.helpers.pixels import part_of, read_batches


def read(paths: list[str | None], *, threads: int = 3, **options: object) -> list[Batch]:
    settings = {"memory": 4 << 20, "max_pixels": 10_000, "max_file_size": 1 << 20} | options
    return list(read_batches(Path("/"), paths, batch_size=4, threads=threads, limits=Limits(**settings)))


def picture(path: Path, seed: int = 0) -> bytes:
    data = encode(Image.fromarray(smooth(30, 40, seed=seed)), "PNG")
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_come_in_manifest_order(tmp_path: Path, threads: int) -> None:
    contents = [picture(tmp_path / str(index), index) for index in range(10)]
    batches = read([str(tmp_path / str(index)) for index in range(10)], threads=threads)
    assert [batch.start for batch in batches] == [0, 4, 8]
    assert [data for batch in batches for data in batch.encoded] == contents
    assert {
        (int(w), int(h)) for batch in batches for w, h in zip(batch.width, batch.height, strict=True)
    } == {(40, 30)}


def test_each_failure_has_its_status(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "big").write_bytes(bytes(2 << 20))
    (tmp_path / "wide.png").write_bytes(encode(Image.fromarray(np.zeros((200, 200), np.uint8)), "PNG"))
    good = picture(tmp_path / "good")
    (tmp_path / "cut").write_bytes(good[:-20])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        expected = {
            "good": Status.OK,
            "nowhere": Status.MISSING,
            "good/below": Status.MISSING,
            "dangling": Status.MISSING,
            "empty": Status.EMPTY,
            "folder": Status.UNREADABLE,
            "fifo": Status.UNREADABLE,
            "socket": Status.UNREADABLE,
            "loop": Status.UNREADABLE,
            "nul\0byte": Status.UNREADABLE,
            "n" * 300: Status.UNREADABLE,
            "text": Status.UNSUPPORTED,
            "big": Status.TOO_LARGE,
            "wide.png": Status.TOO_LARGE,
            "cut": Status.TRUNCATED,
        }
        batches = read([str(tmp_path / name) for name in expected] + [None, "", "/dev/zero"])
    actual = [Status(value) for batch in batches for value in batch.status]
    assert actual == [*expected.values(), Status.MISSING, Status.MISSING, Status.UNREADABLE]
    for batch in batches:
        for position, status in enumerate(batch.status):
            assert (position in batch.errors) == (status != Status.OK)
        assert not any("\n" in error or str(tmp_path) in error for error in batch.errors.values())


def test_a_refused_image_keeps_its_declared_size(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(encode(Image.fromarray(np.zeros((150, 200), np.uint8)), "PNG"))
    (tmp_path / "cut").write_bytes(picture(tmp_path / "good")[:-20])
    (tmp_path / "text").write_text("hello")
    (batch,) = read([str(tmp_path / name) for name in ("wide.png", "cut", "text")])
    assert batch.width.tolist() == [200, 40, 0]
    assert batch.height.tolist() == [150, 30, 0]


def test_unreadable_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    picture(tmp_path / "secret")
    (tmp_path / "secret").chmod(0)
    (batch,) = read([str(tmp_path / "secret")])
    assert batch.status.tolist() == [Status.UNREADABLE]


def test_reading_ahead_is_bounded_by_bytes(tmp_path: Path) -> None:
    """With a budget of one file, batches come one by one, and every one comes."""
    contents = [picture(tmp_path / str(index), index) for index in range(24)]
    reader = Reader(Path("/"), 4, 3, limits=Limits(memory=4 * len(contents[0])))
    part = part_of([str(tmp_path / str(index)) for index in range(24)])
    seen = []

    def consume() -> None:
        for batch in reader.stage([part], Meter("read")):
            seen.extend(batch.encoded)
            batch.drop_encoded()

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    thread.join(30)
    assert seen == contents


def test_closing_early_leaves_no_thread(tmp_path: Path) -> None:
    for index in range(24):
        picture(tmp_path / str(index))
    reader = Reader(Path("/"), 4, 3, limits=Limits(memory=1))
    part = part_of([str(tmp_path / str(index)) for index in range(24)])
    stage = reader.stage([part], Meter("read"))
    next(stage)
    stage.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]
