"""Instants: what is read, what is refused, and that they come back."""

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from hypernet.memory.store.times import to_micros, to_text


@pytest.mark.parametrize(
    "value",
    [
        "2026-03-01",
        " 2026-03-01T00:00:00Z",
        "2026-03-01T05:30:00+05:30",
        date(2026, 3, 1),
        datetime(2026, 3, 1),
        datetime(2026, 2, 28, 20, tzinfo=timezone(timedelta(hours=-4))),
    ],
)
def test_the_same_instant_in_every_notation(value):
    assert to_text(to_micros(value, "at")) == "2026-03-01T00:00:00+00:00"


@pytest.mark.parametrize(
    "value", ["0001-01-01", "1969-12-31T23:59:59.999999", "9999-12-31T23:59:59.999999", "2026-07-01"]
)
def test_instants_come_back_to_the_microsecond(value):
    expected = datetime.fromisoformat(value).replace(tzinfo=UTC)
    assert datetime.fromisoformat(to_text(to_micros(value, "at"))) == expected


@pytest.mark.parametrize(
    "value",
    [
        "2026-02-30",
        "2026-13-01",
        "yesterday",
        "",
        "2026-03-01T25:00",
        "2026-03-01T00:00+25:00",
        "2026-03-01 Mars",
        "9999-12-31T23:59:59-14:00",
        "0001-01-01T00:00:00+14:00",
        5,
        None,
    ],
)
def test_impossible_dates_are_named_in_one_line(value):
    with pytest.raises(ValueError, match="not a date that exists. Give ISO 8601") as error:
        to_micros(value, "at")
    assert str(error.value).startswith(f"at is {str(value)!r}, not") and "\n" not in str(error.value)


def test_no_end_has_no_text():
    assert to_text(None) is None
