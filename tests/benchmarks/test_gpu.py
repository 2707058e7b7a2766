"""The proof kit's own arithmetic, and what of it runs on a CPU."""

from __future__ import annotations

from benchmarks.gpu import decode
from benchmarks.gpu.members import overlap_shares
from tests.helpers.images import write_images


def test_overlap_is_the_time_with_two_busy_streams():
    ms = 1_000_000
    assert overlap_shares([(0, 10 * ms, 7), (10 * ms, 20 * ms, 7)])["overlapping_share"] == 0
    result = overlap_shares(
        [(0, 10 * ms, 7), (5 * ms, 15 * ms, 9), (8 * ms, 9 * ms, 7), (30 * ms, 35 * ms, 7)]
    )
    assert result == {"streams": 2, "busy_ms": 20.0, "overlapping_share": 0.25}
    assert overlap_shares([])["overlapping_share"] == 0


def test_decoding_is_measured_without_a_gpu(tmp_path):
    images = sorted(write_images(tmp_path / "images", 12).glob("*.jpg"))
    rows = decode.measure_grid(images, batch=4, cores=2, device=None, timed_s=0.05)
    assert all(row["images_per_s"] > 0 for row in rows)
    assert [row.get("cpu_share", 0.0) for row in rows] == [0.0, 0.0, 1.0]
