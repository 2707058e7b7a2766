"""The operating points of a bundle: its thresholds and the data that they were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated

from msgspec import Meta

from engine.core.json_records import Count, Fraction, NotNegative, Record, Sha256, check_order, text
from engine.core.records import FLAGS
from engine.stats.intervals import Proportion

ZONES = ("rule_out", "gray_zone", "refer")
# flags of an image whose pixels may differ from those of the training set; `first_frame`, `colour` and
# `burned_in` describe the file and do not change the pixels
DOUBTFUL = ("decoder_warning", "window_fallback", "for_processing", "inverse_lut")

Interval = tuple[Fraction, Fraction]
Bits = Annotated[float, Meta(ge=0, le=64)]
Precision = Annotated[str, text("[0-9A-Za-z]{1,8}", "a precision such as fp32")]


class AskedRates(Record):
    """The rates that the thresholds were required to keep."""

    sensitivity: Fraction  # of "not ruled out"
    specificity: Fraction  # of "referred"


class Rates(Record):
    """The rates of a test that calls some images positive."""

    sensitivity: Proportion
    specificity: Proportion
    ppv: Proportion
    npv: Proportion


class RuleOut(Record):
    """The threshold below which a row is ruled out."""

    below: Fraction  # the target's probability
    interval: Interval  # by a bootstrap
    on_data: Rates  # of "not ruled out", on the images that the threshold was computed from
    cross_fitted: Rates  # on other images

    def __post_init__(self) -> None:
        check_order("interval", *self.interval)


class Refer(Record):
    """The threshold above which a row is referred."""

    above: Fraction
    interval: Interval
    on_data: Rates  # of "referred"
    cross_fitted: Rates

    def __post_init__(self) -> None:
        check_order("interval", *self.interval)


class LogLikelihoods(Record):
    """Negative log-likelihood of an image's class, in nats, without and with the temperature."""

    before: NotNegative
    after: NotNegative


class FittedTemperature(Record):
    """The ensemble's temperature as it was fitted; no interval where the likelihood has no maximum."""

    value: NotNegative
    interval: tuple[NotNegative, NotNegative] | None
    nll: LogLikelihoods

    def __post_init__(self) -> None:
        if self.interval:
            check_order("interval", *self.interval)


class ZoneCounts(Record):
    """The number of labelled images in a zone, and of those of the target's class."""

    images: Count
    positives: Count


class Zones(Record):
    """The zones of ZONES."""

    rule_out: ZoneCounts
    gray_zone: ZoneCounts
    refer: ZoneCounts


class DisagreementLimit(Record):
    """The members' disagreement in bits beyond which a row is abstained from; None for one member."""

    quantile: Fraction
    above: Bits | None


class DistanceLimits(Record):
    """The distance of each member's features beyond which an image is out of distribution."""

    quantile: Fraction
    images: Count  # number of images that the quantile is of
    above: dict[str, NotNegative]


class Abstention(Record):
    """The reasons for which a row is abstained from."""

    disagreement: DisagreementLimit
    image_flags: tuple[str, ...]
    distance: DistanceLimits | None

    def __post_init__(self) -> None:
        flags = self.image_flags
        if not set(flags) <= set(FLAGS) or len(set(flags)) < len(flags):
            raise ValueError(f"image_flags {list(flags)}; allowed, each once: {', '.join(FLAGS)}")


class LabelledData(Record):
    """The images that the operating points were computed from."""

    sha256: Sha256  # of labels, members' probabilities, patients
    manifest_sha256: Sha256 | None  # None: results of several manifests
    bundle_sha256: Sha256  # of the bundle before it was calibrated
    precision: Precision
    images: Count
    by_class: dict[str, Count]
    patients: Count | None
    left_out: dict[str, Count]  # by status; `unlabelled`


class OperatingPoints(Record):
    """`operating_points` of ensemble.json, written by `engine.calibrate`."""

    target: str  # class
    asked: AskedRates
    level: Fraction  # of the intervals
    rule_out: RuleOut
    refer: Refer
    crossed: bool  # whether a range of thresholds kept both rates, of which the middle was taken
    temperature: FittedTemperature
    zones: Zones
    abstain: Abstention
    data: LabelledData
    made: str  # ISO 8601, UTC

    def __post_init__(self) -> None:
        if self.rule_out.below > self.refer.above:
            raise ValueError(
                f"rule_out.below {self.rule_out.below:g} is over refer.above {self.refer.above:g}"
            )
        try:
            datetime.fromisoformat(self.made)
        except ValueError:
            raise ValueError(f"made {self.made[:40]!r} is not a date and time of ISO 8601") from None

    def __str__(self) -> str:
        return (
            f"p_{self.target} below {self.rule_out.below:.3g} rules out, above {self.refer.above:.3g} refers "
            f"(calibrated {self.made[:10]} on {self.data.images} images in {self.data.precision})"
        )

    @property
    def distances(self) -> Mapping[str, float]:
        """Return the distance limit of each member's features; empty where the bundle has none."""
        return self.abstain.distance.above if self.abstain.distance else {}

    def check_bundle(self, classes: Sequence[str], members: Sequence[str], temperature: float) -> None:
        """Raise ValueError unless these are the operating points of an ensemble with this temperature."""
        if self.target not in classes:
            raise ValueError(f"target {self.target!r} is not one of {', '.join(classes)}")
        if self.temperature.value != temperature:
            raise ValueError(
                f"temperature {self.temperature.value!r} is not the ensemble's, {temperature:g}; "
                "remove the section, calibrate again"
            )
        _check_names("data.by_class", self.data.by_class, classes)
        if self.abstain.distance:
            _check_names("abstain.distance.above", self.distances, members)


def _check_names(what: str, entries: Mapping[str, object], names: Sequence[str]) -> None:
    if different := ", ".join(sorted(map(repr, set(entries) ^ set(names)))):
        raise ValueError(f"{what}: {different} missing or unknown")
