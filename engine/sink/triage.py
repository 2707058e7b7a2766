"""Derive further columns from the probabilities: groups, uncertainty, triage zone and abstention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.bundle.operating_points import ZONES, OperatingPoints
from engine.scoring.ensemble import Bools, Floats, disagreement, entropy

if TYPE_CHECKING:
    from engine.bundle.bundle import Bundle


ABSTAIN_REASONS = ("gray_zone", "disagreement", "image_flags", "out_of_distribution")


def assign_zones(scores: Floats, rule_out: float, refer: float) -> npt.NDArray[np.int8]:
    """Return the zones [N], positions in ZONES, of the target's probabilities [N]; a threshold is gray."""
    above, below = scores > np.float32(refer), scores < np.float32(rule_out)
    return np.asarray(1 + above.astype(np.int8) - below.astype(np.int8), np.int8)


@dataclass(frozen=True)
class Triage:
    """Computes the result columns that are derived from probabilities and flags."""

    classes: tuple[str, ...]
    weights: tuple[float, ...]
    groups: Mapping[str, tuple[int, ...]]  # positions in `classes`, by name
    points: OperatingPoints | None
    distance_limits: tuple[float, ...] = ()  # of each member's features; empty without limits

    @classmethod
    def of(cls, bundle: Bundle) -> Triage:
        groups = {name: tuple(map(bundle.classes.index, members)) for name, members in bundle.groups.items()}
        points = bundle.operating_points
        by_member = points.distances if points else {}
        limits = tuple(by_member[member.name] for member in bundle.members if by_member)
        return cls(bundle.classes, bundle.weights, groups, points, limits)

    @property
    def fields(self) -> list[pa.Field[Any]]:
        return [
            *(pa.field(f"p_{name}", pa.float32()) for name in self.groups),
            pa.field("entropy", pa.float32()),
            pa.field("member_disagreement", pa.float32()),
            pa.field("triage", pa.string()),
            pa.field("abstain", pa.bool_()),
            pa.field("abstain_reasons", pa.list_(pa.string())),
        ]

    def columns(
        self,
        probabilities: Floats,
        members: Floats,
        distances: Floats,
        flags: Mapping[int, Sequence[str]],
        failed: Bools,
    ) -> list[pa.Array[Any]]:
        """Return the columns of N rows, null where `failed` [N]; without operating points, triage is null.

        `probabilities` [N, C] are the ensemble's, `members` [M, N, C] the members', `distances` [M, N] those
        of the members' features, NaN where unknown; `flags` are by position.
        """
        spread = disagreement(members, self.weights)
        sums = [
            probabilities[:, positions].sum(axis=1, dtype=np.float32) for positions in self.groups.values()
        ]
        return [
            *(pa.array(column, mask=failed) for column in (*sums, entropy(probabilities), spread)),
            *self._triage(probabilities, spread, distances, flags, failed),
        ]

    def _triage(
        self,
        probabilities: Floats,
        spread: Floats,
        distances: Floats,
        flags: Mapping[int, Sequence[str]],
        failed: Bools,
    ) -> list[pa.Array[Any]]:
        points, rows = self.points, len(failed)
        if points is None:
            return [pa.nulls(rows, kind) for kind in (pa.string(), pa.bool_(), pa.list_(pa.string()))]
        zone = assign_zones(
            probabilities[:, self.classes.index(points.target)], points.rule_out.below, points.refer.above
        )
        reasons = np.zeros((rows, len(ABSTAIN_REASONS)), np.bool_)
        reasons[:, 0] = zone == ZONES.index("gray_zone")
        limit = points.abstain.disagreement.above
        if limit is not None:
            reasons[:, 1] = spread > np.float32(limit)
        doubtful = set(points.abstain.image_flags)
        reasons[[row for row, names in flags.items() if not doubtful.isdisjoint(names)], 2] = True
        for distance_limit, distance in zip(self.distance_limits, distances, strict=False):
            reasons[:, 3] |= distance > np.float32(distance_limit)
        reasons[failed] = False
        offsets = np.concatenate([[0], reasons.sum(axis=1).cumsum()]).astype(np.int32)
        return [
            pa.DictionaryArray.from_arrays(pa.array(zone, pa.int8(), mask=failed), pa.array(ZONES)).cast(
                pa.string()
            ),
            pa.array(np.asarray(reasons.any(axis=1)), pa.bool_(), mask=failed),
            pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()),
                pa.array(np.array(ABSTAIN_REASONS)[reasons.nonzero()[1]], pa.string()),
                mask=pa.array(failed, pa.bool_()),
            ),
        ]
