"""How long something takes, in the unit that a person would say."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from vggfeat.machine import CORES, duration

UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "days": "days"}


@pytest.mark.parametrize("seconds", [0, 0.04, 90, 119.9, 120, 7199, 7200, 172_799, 172_800, 1e7])
def test_a_duration_is_a_number_between_1_and_120_of_its_unit(seconds: float) -> None:
    told = re.fullmatch(r"(\d+\.\d) (s|min|h|days)", duration(seconds))
    assert told is not None
    number, unit = float(told[1]), timedelta(**{UNITS[told[2]]: 1}).total_seconds()
    assert abs(number * unit - seconds) <= 0.05001 * unit
    assert number <= 120 and (number >= 2 or told[2] == "s")


def test_there_is_a_core() -> None:
    assert CORES >= 1
