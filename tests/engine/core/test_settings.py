from datetime import UTC, datetime, timedelta

import pytest

from engine.core.errors import UsageError
from engine.core.option import byte_size
from engine.core.settings import parse_moment, parse_shard

NOON = datetime(2031, 5, 17, 12, 0).astimezone()


def test_a_time_of_day_is_its_next_occurrence() -> None:
    assert parse_moment("13:30", NOON) == NOON + timedelta(hours=1, minutes=30)
    assert parse_moment("06:00", NOON) == NOON + timedelta(hours=18)
    assert parse_moment("6:00", NOON) == NOON + timedelta(hours=18)
    assert parse_moment("12:00", NOON) == NOON + timedelta(hours=24)
    assert parse_moment("12:00:01", NOON) == NOON + timedelta(seconds=1)


def test_an_iso_time_is_local_unless_it_says_otherwise() -> None:
    assert parse_moment("2031-05-18T06:00", NOON) == NOON + timedelta(hours=18)
    assert parse_moment("2031-05-18T06:00+00:00", NOON) == datetime(2031, 5, 18, 6, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "6", "24:00", "06:60", "tomorrow", "2031-05-17T11:59", "2031-13-01"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give a time such as"):
        parse_moment(text, NOON)


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("2GiB", 2 << 30), ("1.5k", 1500), ("3MB", 3_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size


def test_shards() -> None:
    shard = parse_shard("2/3")
    assert (str(shard), list(shard.parts(8)), list(parse_shard("3/3").parts(2))) == ("2/3", [1, 4, 7], [])


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "a/b", "3", "1/2/3", "-1/4", "1 / 4", "1/4\n", ""])
def test_invalid_shards_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="allowed: K/N, with K from 1 to N"):
        parse_shard(text)
