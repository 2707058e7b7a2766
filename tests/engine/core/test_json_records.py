"""What does not fit a record is named by field and value, in one line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from engine.core.json_records import Fraction, Record, Sha256, from_builtins, from_json, text, to_json


class _Limits(Record):
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    sha256: Sha256 | None = None

    def __post_init__(self) -> None:
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"interval {self.interval} is not in order")


class _Member(Record):
    name: Annotated[str, msgspec.Meta(pattern="^[a-z]+$")]
    weight: Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Ensemble(Record):
    members: tuple[_Member, ...]
    limits: dict[str, float] = msgspec.field(default_factory=dict)
    by_name: dict[Annotated[str, text("[a-z ]+", "letters of a-z")], _Limits] = msgspec.field(
        default_factory=dict
    )
    decode: Literal["exact", "fast"] | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("members is empty")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"members": [{"name": "a", "weight": 1.5}]}', "members[0].weight is 1.5: expected a number <= 1.0"),
        (
            '{"members": [{"name": "a", "weight": true}]}',
            "members[0].weight is true: expected a number",
        ),
        ('{"members": [{"name": "a", "weight": 1, "wieght": 2}]}', "members[0].wieght: unknown field"),
        ('{"members": [{"name": "a"}]}', "members[0].weight is missing"),
        ('{"members": []}', "members is empty"),
        ("[1]", "expected an object, got a list"),
        ('{"members": [{"name": "a", "weight": NaN}]}', "members[0].weight is NaN: expected a finite number"),
        ('{"members": [], "limits": {"x": 1e999}}', "limits.x is Infinity: expected a finite number"),
        ('{"members": [], "decode": "sloppy"}', 'decode is "sloppy": allowed: exact, fast'),
        ('{"a\x7f\\u202e": 1}', '["a\\x7f\\u202e"]: unknown field'),
    ],
)
def test_a_wrong_field_is_named_with_its_value(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        from_json(text, _Ensemble)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"interval": [0, 7]}, 'by_name["b c"].interval[1] is 7: expected a number <= 1.0'),
        ({"interval": [0.5, 0.1]}, 'by_name["b c"]: interval (0.5, 0.1) is not in order'),
        ({"sha256": "00"}, 'by_name["b c"].sha256 is "00": expected 64 digits of 0-9 and a-f'),
        ({"high": 1}, 'by_name["b c"].high: unknown field'),
        (7, 'by_name["b c"] is 7: expected an object'),
    ],
)
def test_the_entry_of_a_dict_is_named(limits: Any, error: str) -> None:
    for entries in ({"b c": limits}, {"a": {}, "b c": limits}, {"b c": limits, "d": {}, "e": {}, "f": {}}):
        with pytest.raises(ValueError, match=r".") as caught:
            from_builtins({"members": [{"name": "a", "weight": 1}], "by_name": entries}, _Ensemble)
        assert str(caught.value) == error
    with pytest.raises(ValueError, match=r'^by_name: key "A": expected letters of a-z$'):
        from_builtins({"members": [], "by_name": {"a": {}, "A": {}}}, _Ensemble)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff", "1" * 10_000])
def test_invalid_json_is_a_one_line_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is not JSON") as caught:
        from_json(text, _Ensemble)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_record_survives_a_round_trip() -> None:
    record = _Ensemble(members=(_Member(name="a", weight=1.0),), limits={"x": 0.5})
    assert from_json(to_json(record), _Ensemble) == record
    with pytest.raises(ValueError, match="nan"):
        to_json(_Ensemble(members=record.members, limits={"x": float("nan")}))
