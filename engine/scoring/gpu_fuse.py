"""Logits of all members to packed probabilities on the GPU, in one Triton kernel.

The NumPy version is `engine.scoring.ensemble.combine_logits`; both use float32 and agree within 1e-6.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.bundle.bundle import Bundle
from engine.scoring.ensemble import Floats, Scores


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fuse_row(  # type: ignore[no-untyped-def]
    logits,  # float32 [M, R, C]
    weights,  # float32 [M]
    temperatures,  # float32 [M]
    packed,  # float32 [N, (M + 1) * C + 2]
    temperature,
    rows,
    members: tl.constexpr,
    classes: tl.constexpr,
    block: tl.constexpr,  # power of two, at least C
    sharpen: tl.constexpr,  # the ensemble's temperature is not 1
):
    row = tl.program_id(0)
    column = tl.arange(0, block)
    valid = column < classes
    out = packed + row * ((members + 1) * classes + 2)
    total = tl.zeros([block], tl.float32)
    invalid = tl.zeros([block], tl.int32)  # number of logits that are not finite
    for member in tl.static_range(members):
        raw = tl.load(logits + (member * rows + row) * classes + column, mask=valid, other=float("-inf"))
        not_finite = valid & ((raw != raw) | (tl.abs(raw) == float("inf")))
        invalid += not_finite.to(tl.int32)
        # rounded as in NumPy: `/` has an error of 2 ulp on a GPU, which exp makes larger than 1e-6
        scaled = tl.div_rn(tl.where(not_finite, 0.0, raw), tl.load(temperatures + member))
        exponentials = tl.exp(scaled - tl.max(scaled, 0))
        share = exponentials / tl.sum(exponentials, 0)
        tl.store(out + member * classes + column, share, mask=valid)
        total += tl.load(weights + member) * share
    if sharpen:
        logs = tl.div_rn(tl.log(tl.maximum(total, 1.1754943508222875e-38)), temperature)
        logs = tl.where(valid, logs, float("-inf"))
        exponentials = tl.exp(logs - tl.max(logs, 0))
        total = exponentials / tl.sum(exponentials, 0)
    tl.store(out + members * classes + column, total, mask=valid)
    chosen = tl.argmax(tl.where(valid, total, -1.0), 0)
    chosen = tl.where(tl.sum(invalid, 0) > 0, -1, chosen)
    end = out + (members + 1) * classes
    tl.store(end, chosen.to(tl.float32))
    tl.store(end + 1, tl.max(tl.where(valid, total, -1.0), 0))


class FusedSoftmax:
    """The softmax and the weighted average of a bundle on one device; owns the weights there."""

    def __init__(self, bundle: Bundle, device: torch.device | str) -> None:
        self.members, self.classes = len(bundle.members), len(bundle.classes)
        self.width = (self.members + 1) * self.classes + 2
        self._temperature = bundle.temperature
        self._weights = torch.tensor(bundle.weights, dtype=torch.float32, device=device)
        temperatures = [member.temperature for member in bundle.members]
        self._temperatures = torch.tensor(temperatures, dtype=torch.float32, device=device)

    def enqueue(self, logits: torch.Tensor, packed: torch.Tensor) -> None:
        """Combine logits, float32 [M, R, C], R at least N, into float32 [N, (M + 1) * C + 2].

        Runs on the current stream. A row contains the members' probabilities, the ensemble's, the class (-1
        where a logit is not finite), and the probability of the class.
        """
        _fuse_row[(len(packed),)](
            logits,
            self._weights,
            self._temperatures,
            packed,
            self._temperature,
            logits.shape[1],
            members=self.members,
            classes=self.classes,
            block=triton.next_power_of_2(self.classes),
            sharpen=self._temperature != 1.0,
            num_warps=1,
        )

    def unpack(self, packed: Floats) -> Scores:
        """Return the scores in the rows of a packed buffer, as views of it."""
        end = self.members * self.classes
        return Scores(
            packed[:, :end].reshape(-1, self.members, self.classes).transpose(1, 0, 2),
            packed[:, end : end + self.classes],
            packed[:, -2].astype(np.intp),
            packed[:, -1],
        )
