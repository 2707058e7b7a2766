"""What the results say of a row beyond its probabilities: groups, doubt, and where it stands in a triage."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.ensemble import average
from engine.records import FLAGS

if TYPE_CHECKING:
    from engine.bundle import Bundle

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

ZONES = ("rule_out", "gray_zone", "refer")
REASONS = ("gray_zone", "disagreement", "image_flags", "out_of_distribution")
# flags of an image whose pixels may not be like those of the training set; `first_frame`, `colour` and
# `burned_in` tell of the file, and leave the picture as it is
DOUBTFUL = ("decoder_warning", "window_fallback", "for_processing", "inverse_lut")
_RATES = ("sensitivity", "specificity", "ppv", "npv")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def entropy(probabilities: Floats) -> Floats:
    """Of each row of [..., C], in bits (Shannon 1948, "A mathematical theory of communication")."""
    logs = np.log2(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return np.asarray(np.maximum(-(probabilities * logs).sum(axis=-1), 0), np.float32)


def disagreement(members: Floats, weights: Sequence[float]) -> Floats:
    """Jensen-Shannon divergence [N] of the members' probabilities [M, N, C], in bits.

    The entropy of their weighted mean, less the weighted mean of their entropies: 0 where all say the same,
    at most 1 for two members (Lin 1991, "Divergence measures based on the Shannon entropy").
    """
    apart = entropy(average(members, weights))
    for weight, member in zip(weights, members, strict=True):
        apart -= np.float32(weight) * entropy(member)
    return np.asarray(np.maximum(apart, 0), np.float32)


def zones(scores: Floats, rule_out: float, refer: float) -> npt.NDArray[np.int8]:
    """Positions [N] in ZONES of the target's probabilities [N]; what equals a threshold is between."""
    above, below = scores > np.float32(refer), scores < np.float32(rule_out)
    return np.asarray(1 + above.astype(np.int8) - below.astype(np.int8), np.int8)


@dataclass(frozen=True)
class OperatingPoints:
    """Where a bundle rules out and where it refers, as `engine.calibrate` has found."""

    target: str  # class
    rule_out: float  # its probability below which a row is ruled out
    refer: float  # and above which it is referred; not below `rule_out`
    disagreement: float | None  # of the members, in bits, beyond which a row is abstained from
    flags: tuple[str, ...]  # of an image that is abstained from
    distances: dict[str, float]  # by member: of its features, beyond which too; empty where none are known
    recorded: dict[str, Any]  # all of it, as ensemble.json has it

    def __str__(self) -> str:
        data = self.recorded["data"]
        return (
            f"p_{self.target} below {self.rule_out:.3g} rules out, above {self.refer:.3g} refers "
            f"(calibrated {self.recorded['made'][:10]} on {data['images']} images in {data['precision']})"
        )

    @classmethod
    def parse(
        cls, section: Any, classes: Sequence[str], members: Sequence[str], temperature: float
    ) -> OperatingPoints:
        """Check `operating_points` of an ensemble.json, field by field. Raises ValueError and KeyError."""
        _keys(
            "operating_points",
            section,
            "target asked level rule_out refer crossed temperature zones abstain data made",
        )
        target = section["target"]
        _expect(target in classes, "target", f"{target!r} is none of {', '.join(classes)}")
        _keys("asked", section["asked"], "sensitivity specificity")
        for name, value in {**section["asked"], "level": section["level"]}.items():
            _number(name, value, 0, 1)
        _expect(type(section["crossed"]) is bool, "crossed", section["crossed"])
        rule_out = _point("rule_out", section["rule_out"], "below")
        refer = _point("refer", section["refer"], "above")
        _expect(rule_out <= refer, "rule_out", f"below {rule_out:g} is over refer above {refer:g}")
        _temperature(section["temperature"], temperature)
        _keys("zones", section["zones"], " ".join(ZONES))
        for name, counts in section["zones"].items():
            _keys(name, counts, "images positives")
            for value in counts.values():
                _count(name, value)
        limit, flags, distances = _abstain(section["abstain"], members)
        _data(section["data"], classes)
        _expect(isinstance(section["made"], str), "made", section["made"])
        datetime.fromisoformat(section["made"])
        return cls(target, rule_out, refer, limit, flags, distances, section)


def _point(name: str, entry: Any, side: str) -> float:
    _keys(name, entry, f"{side} interval on_data cross_fitted")
    _interval(f"{name} interval", entry["interval"], 0, 1)
    for measured in ("on_data", "cross_fitted"):
        rates = entry[measured]
        _keys(f"{name} {measured}", rates, " ".join(_RATES))
        for rate, one in rates.items():
            what = f"{name} {rate}"
            _keys(what, one, "hits of value low high")
            _count(what, one["hits"])
            _count(what, one["of"])
            if one["of"]:
                _interval(what, [one["low"], one["value"], one["high"]], 0, 1)
            else:
                _expect(one["low"] is one["value"] is one["high"] is None, what, one)
    return _number(f"{name} {side}", entry[side], 0, 1)


def _temperature(entry: Any, temperature: float) -> None:
    _keys("temperature", entry, "value interval nll")
    _expect(
        _number("temperature", entry["value"], 0, math.inf) == temperature,
        "temperature",
        f"{entry['value']!r} is not the ensemble's, {temperature:g}; remove the section, calibrate again",
    )
    if entry["interval"] is not None:
        _interval("temperature interval", entry["interval"], 0, math.inf)
    _keys("nll", entry["nll"], "before after")
    for value in entry["nll"].values():
        _number("nll", value, 0, math.inf)


def _abstain(entry: Any, members: Sequence[str]) -> tuple[float | None, tuple[str, ...], dict[str, float]]:
    _keys("abstain", entry, "disagreement image_flags distance")
    apart, flags = entry["disagreement"], entry["image_flags"]
    _keys("disagreement", apart, "quantile above")
    _number("disagreement quantile", apart["quantile"], 0, 1)
    above = apart["above"]
    limit = None if above is None else _number("disagreement above", above, 0, 64)
    fine = isinstance(flags, list) and all(flag in FLAGS for flag in flags) and len(set(flags)) == len(flags)
    _expect(fine, "image_flags", f"{flags!r}; allowed: {', '.join(FLAGS)}")
    far, distances = entry["distance"], {}
    if far is not None:
        _keys("distance", far, "quantile images above")
        _number("distance quantile", far["quantile"], 0, 1)
        _count("distance images", far["images"])
        _keys("distance above", far["above"], None, members)
        distances = {
            name: _number(f"distance above {name}", far["above"][name], 0, math.inf) for name in members
        }
    return limit, tuple(flags), distances


def _data(entry: Any, classes: Sequence[str]) -> None:
    _keys("data", entry, "sha256 manifest_sha256 bundle_sha256 precision images by_class patients left_out")
    merged = entry["manifest_sha256"] is None  # results of several manifests
    for name in ("sha256", "bundle_sha256", *(() if merged else ("manifest_sha256",))):
        text = entry[name]
        _expect(isinstance(text, str) and bool(_SHA256.fullmatch(text)), name, text)
    precision = entry["precision"]
    _expect(isinstance(precision, str) and precision.isalnum() and len(precision) < 9, "precision", precision)
    _count("images", entry["images"])
    if entry["patients"] is not None:
        _count("patients", entry["patients"])
    _keys("by_class", entry["by_class"], None, classes)
    _expect(isinstance(entry["left_out"], dict), "left_out", entry["left_out"])
    for name, value in {**entry["by_class"], **entry["left_out"]}.items():
        _count(name, value)


def _expect(condition: bool, name: str, value: object) -> None:
    if not condition:
        raise ValueError(f"operating_points: {name}: {value}"[:200])


def _keys(name: str, entry: Any, words: str | None, names: Sequence[str] = ()) -> None:
    wanted = set(words.split() if words is not None else names)
    _expect(isinstance(entry, dict), name, f"{entry!r} has no fields")
    odd = ", ".join(sorted(map(repr, set(entry) ^ wanted)))
    _expect(not odd, name, f"{odd} missing or unknown")


def _number(name: str, value: Any, low: float, high: float) -> float:
    fine = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    _expect(fine, name, f"{value!r} is not a number from {low:g} to {high:g}")
    return float(value)


def _count(name: str, value: Any) -> None:
    _expect(type(value) is int and value >= 0, name, f"{value!r} is not a count")


def _interval(name: str, values: Any, low: float, high: float) -> None:
    _expect(isinstance(values, list) and len(values) >= 2, name, f"{values!r} is not an interval")
    for value in values:
        _number(name, value, low, high)
    _expect(values == sorted(values), name, f"{values!r} is not in order")


@dataclass(frozen=True)
class Triage:
    """The columns of the results that follow from probabilities and flags."""

    classes: tuple[str, ...]
    weights: tuple[float, ...]
    groups: Mapping[str, tuple[int, ...]]  # positions in `classes`, by name
    points: OperatingPoints | None

    @classmethod
    def of(cls, bundle: Bundle) -> Triage:
        groups = {name: tuple(map(bundle.classes.index, members)) for name, members in bundle.groups.items()}
        return cls(bundle.classes, bundle.weights, groups, bundle.operating_points)

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
        """Of N rows: probabilities [N, C] of the ensemble, [M, N, C] of the members, and their features'
        distances [M, N], NaN where none is known; flags by position.

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
        zone = zones(probabilities[:, self.classes.index(points.target)], points.rule_out, points.refer)
        reasons = np.zeros((rows, len(REASONS)), np.bool_)
        reasons[:, 0] = zone == ZONES.index("gray_zone")
        if points.disagreement is not None:
            reasons[:, 1] = apart > np.float32(points.disagreement)
        doubtful = set(points.flags)
        reasons[[row for row, names in flags.items() if not doubtful.isdisjoint(names)], 2] = True
        for limit, distance in zip(points.distances.values(), distances, strict=False):
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
                pa.array(np.array(REASONS)[reasons.nonzero()[1]], pa.string()),
                mask=pa.array(failed, pa.bool_()),
            ),
        ]
