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
    """Return positions [N] in ZONES of the target's probabilities [N]; a score equal to a threshold is
    between.
    """
    above, below = scores > np.float32(refer), scores < np.float32(rule_out)
    return np.asarray(1 + above.astype(np.int8) - below.astype(np.int8), np.int8)


@dataclass(frozen=True)
class Triage:
    """The columns of the results that follow from probabilities and flags."""

    classes: tuple[str, ...]
    weights: tuple[float, ...]
    groups: Mapping[str, tuple[int, ...]]  # positions in `classes`, by name
    points: OperatingPoints | None
    distance_limits: tuple[float, ...] = ()  # of each member's features; none where none are known

    @classmethod
    def of(cls, bundle: Bundle) -> Triage:
        groups = {name: tuple(map(bundle.classes.index, members)) for name, members in bundle.groups.items()}
        points = bundle.operating_points
        far = points.distances if points else {}
        limits = tuple(far[member.name] for member in bundle.members if far)
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
        """Return the columns of N rows from probabilities [N, C] of the ensemble, [M, N, C] of the
        members, and their features' distances [M, N], NaN where none is known; flags by position.

        Null where a row has `failed` [N]; without operating points there is no triage.
        """
        apart = disagreement(members, self.weights)
        sums = [probabilities[:, places].sum(axis=1, dtype=np.float32) for places in self.groups.values()]
        return [
            *(pa.array(column, mask=failed) for column in (*sums, entropy(probabilities), apart)),
            *self._triage(probabilities, apart, distances, flags, failed),
        ]

    def _triage(
        self,
        probabilities: Floats,
        apart: Floats,
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
        most = points.abstain.disagreement.above
        if most is not None:
            reasons[:, 1] = apart > np.float32(most)
        doubtful = set(points.abstain.image_flags)
        reasons[[row for row, names in flags.items() if not doubtful.isdisjoint(names)], 2] = True
        for limit, distance in zip(self.distance_limits, distances, strict=False):
            reasons[:, 3] |= distance > np.float32(limit)
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
