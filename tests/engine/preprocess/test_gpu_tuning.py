"""Tuning finds the better knob, keeps the default where nothing pays, and stops giving the CPU more."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from msgspec.structs import asdict

from engine.core.records import Batch, Header, Part
from engine.preprocess import gpu_tuning
from engine.preprocess.gpu import DecodeOptions


def batch(rows: int = 4) -> Batch:
    part = Part(0, np.arange(rows), ["a"] * rows, pa.table({}))
    numbers = [np.zeros(rows, kind) for kind in (np.uint8, np.int32, np.int32)]
    headers = [Header("jpeg", 100 + row, 50 - row) for row in range(rows)]
    return Batch(part, 0, *numbers, encoded=[b"x"] * rows, headers=headers)


def test_tuning_changes_one_option_at_a_time():
    def rate(decoding: DecodeOptions) -> float:
        return 1000 + 500 * (decoding.hw_decoder_load == 0.9) + 2000 * min(decoding.cpu_share, 0.2)

    best, tried = gpu_tuning.tune_decoding([batch()], rate)
    assert (best.hw_decoder_load, best.cpu_share) == (0.9, 0.2)
    assert best.hybrid_huffman_threshold == DecodeOptions().hybrid_huffman_threshold
    assert (best.width_hint, best.height_hint) == (103, 50)
    assert max(one.images_per_s for one in tried) == rate(best)
    assert 0.4 not in {one.cpu_share for one in tried}, "0.3 was no gain: not tried further"
    assert DecodeOptions(**asdict(best)) == best


def test_gains_within_noise_change_nothing():
    rng = np.random.default_rng(0)
    best, _ = gpu_tuning.tune_decoding([batch()], lambda decoding: 1000 + rng.uniform(0, 20))
    assert best == DecodeOptions(width_hint=103, height_hint=50)


def test_the_rate_counts_all_rounds_but_the_first(monkeypatch):
    """By a clock that moves on by a second at each look."""
    seconds = itertools.count()
    monkeypatch.setattr(gpu_tuning.time, "perf_counter", lambda: float(next(seconds)))
    seen = []

    def stage(batches, meter):
        for one in batches:
            seen.append(one)
            one.encoded = []
            yield one

    sample = [batch(), batch(3)]
    result = gpu_tuning.measure_rate(stage, sample, lambda data, header: True, timed_s=3)
    assert sum(one.rows for one in seen) == 3 * 7, "one round to warm up, two in three seconds"
    assert result == pytest.approx(14 / 4)
    assert all(one.encoded == [b"x"] * one.rows for one in sample), "the sample itself is kept"
    assert all(one.on_gpu == [True] * one.rows for one in seen)
