"""What does not fit a record is named by field and value, in one line."""

from __future__ import annotations

from typing import Annotated

import msgspec
import pytest

from engine.core.json_records import Record, from_json, to_json


class _Member(Record):
    name: Annotated[str, msgspec.Meta(pattern="^[a-z]+$")]
    weight: Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Ensemble(Record):
    members: tuple[_Member, ...]
    limits: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("members is empty")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"members": [{"name": "a", "weight": 1.5}]}', "members[0].weight is 1.5: expected `float` <= 1.0"),
        (
            '{"members": [{"name": "a", "weight": true}]}',
            "members[0].weight is true: expected `float`, got `bool`",
        ),
        ('{"members": [{"name": "a", "weight": 1, "wieght": 2}]}', "members[0].wieght: unknown field"),
        ('{"members": [{"name": "a"}]}', "members[0].weight is missing"),
        ('{"members": []}', "members is empty"),
        ("[1]", "expected `object`, got `array`"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        from_json(text, _Ensemble)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    "text", ["", "{", '{"members": [{"name": "a", "weight": NaN}]}', "[" * 100_000, b"\xff"]
)
def test_what_is_not_json_is_said_in_one_line(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is not JSON") as caught:
        from_json(text, _Ensemble)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_record_survives_a_round_trip() -> None:
    record = _Ensemble(members=(_Member(name="a", weight=1.0),), limits={"x": 0.5})
    assert from_json(to_json(record), _Ensemble) == record
    with pytest.raises(ValueError, match="nan"):
        to_json(_Ensemble(members=record.members, limits={"x": float("nan")}))
