"""What is read of somebody else's text: which values are of a type, how a wrong one is named, how
long a text may be.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest

from vggfeat.checked import OneOf, Range, Several, fitted, parse_json, read_text, shown
from vggfeat.errors import VggfeatError


class Point(TypedDict):
    x: float
    name: str | None


@dataclasses.dataclass(frozen=True)
class Line:
    ends: tuple[Point, Point]
    width: int = 1


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Each type beside what it takes, said otherwise.
KINDS: list[tuple[Any, Callable[[Any], bool]]] = [
    (str, lambda value: isinstance(value, str)),
    (bool, lambda value: value is True or value is False),
    (int, whole),
    (float, lambda value: number(value) and math.isfinite(value)),
    (int | None, lambda value: value is None or whole(value)),
    (list[int], lambda value: isinstance(value, list) and all(map(whole, value))),
    (
        tuple[int, str],
        lambda value: isinstance(value, list) and [type(v) for v in value] == [int, str],
    ),
    (dict[str, float], lambda value: isinstance(value, dict) and all(map(number, value.values()))),
    (Annotated[float, Range(0, 1)], lambda value: number(value) and 0 <= value <= 1),
    (Annotated[str, OneOf(("a", "b"))], lambda value: value in ("a", "b")),
    (
        Annotated[list[int], Several(2, different=True)],
        lambda value: isinstance(value, list) and all(map(whole, value)) and value in ([1], [1, 2]),
    ),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, 1.5, math.nan, math.inf, "", "a", "c"),
    *([], [1], [1, 1], [1, 2], [1, 2, 3], [1, "a"], ["a", 1], [True], [0.5], {}),
    *({"x": 0.5}, {"x": 1, "y": 2}, {"x": None}, {"x": "1"}),
]


@pytest.mark.parametrize(("kind", "takes"), KINDS, ids=[str(kind) for kind, _ in KINDS])
def test_a_type_takes_its_values_and_no_other(kind: Any, takes: Callable[[Any], bool]) -> None:
    assert any(map(takes, VALUES)) and not all(map(takes, VALUES))
    for value in VALUES:
        if takes(value):
            found = fitted(value, kind, "r.json")
            assert found == (tuple(value) if isinstance(found, tuple) else value)
        else:
            with pytest.raises(VggfeatError, match=r"^r\.json(: \S+)? must "):
                fitted(value, kind, "r.json")


LINE = {"ends": [{"x": 1, "name": None}, {"x": 2.5, "name": "b", "more": 0}]}


def test_a_record_is_built_of_its_parts() -> None:
    """Of a TypedDict more keys are left alone; of a dataclass what has a default may be missing."""
    line = fitted(LINE, Line, "r.json")
    assert line == Line(({"x": 1.0, "name": None}, LINE["ends"][1]), 1)  # type: ignore[arg-type]
    assert type(line.ends[0]["x"]) is float


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ends": []}, "ends must be a list of 2, not a list of 0"),
        ({"ends": [LINE["ends"][0], {"x": 1}]}, "ends[1].name is missing"),
        (
            {"ends": [{"x": "1", "name": None}, LINE["ends"][1]]},
            "ends[0].x must be a finite number",
        ),
        ({"width": 2**63}, "width must be less than 2^63"),
        ({"length": 1}, "can't have 'length': a Line has ends, width"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(change: dict[str, Any], told: str) -> None:
    with pytest.raises(VggfeatError) as error:
        fitted({**LINE, **change}, Line, "r.json")
    assert told in str(error.value) and str(error.value).startswith("r.json")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "None"),
        (-1.5, "-1.5"),
        ("a\nb", r"'a\nb'"),
        (58 * "x", "'" + 58 * "x" + "'"),
        (59 * "x", "'" + 56 * "x" + "..."),
        ([1, 2, 3], "a list of 3"),
        ({"a": [1]}, "a record of 1"),
        (10**59, str(10**59)),
        pytest.param(10**5000, "a huge number", id="huge"),  # which Python refuses to print
    ],
)
def test_a_value_is_shown_in_60_characters(value: Any, told: str) -> None:
    assert shown(value) == told and len(told) <= 60


@pytest.mark.parametrize("text", ["", "{", "[1,]", "{'a': 1}", "[" * 100_000, "\ufeff{}"])
def test_what_is_no_json_is_one_line(text: str) -> None:
    with pytest.raises(VggfeatError, match=r"^r\.json is not JSON: "):
        parse_json(text, "r.json")


def test_a_text_is_utf8_with_or_without_its_mark_and_no_longer_than_it_may_be(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + json.dumps({"ü": 1}, ensure_ascii=False).encode())
        assert parse_json(read_text(path, "a text"), path) == {"ü": 1}
        assert read_text(path, "a text", most=path.stat().st_size)
        with pytest.raises(VggfeatError, match="is longer than the 0 KiB that a text may have"):
            read_text(path, "a text", most=path.stat().st_size - 1)
    path.write_bytes(b"abc\xff")
    with pytest.raises(VggfeatError, match=r"is not UTF-8 text: .* at byte 3$"):
        read_text(path, "a text")
    for other, told in ((tmp_path, "is a folder"), (tmp_path / "none", "no a text at")):
        with pytest.raises(VggfeatError, match=told):
            read_text(other, "a text")
    # /proc tells no length: what is read is counted
    if Path("/proc/self/maps").exists():
        with pytest.raises(VggfeatError, match="is longer than the 1 KiB"):
            read_text(Path("/proc/self/maps"), "a text", most=1024)
