"""What a prompt and a notebook show of the library's objects: short, escaped, in the notebook's own
colours.
"""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import vggfeat
from vggfeat.notebook import MOST_ROWS, Displayed
from vggfeat.results import ClassFigures

FORMATS = Path(__file__).parents[1] / "formats/version2"
EVIL = "<script>\x1b[2J\nalert('\udce9')</script>"


class Tags(HTMLParser):
    """Which elements there are, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag != "wbr":  # where a long name may be broken; it has no end
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def displayed() -> dict[str, Displayed]:
    model = vggfeat.open_model(FORMATS / "model.h5")
    assert model.results is not None
    one = vggfeat.Prediction("a.jpg", ("cat",), (1.25,), (0.5,), 0.75, np.zeros(2))
    return {
        "features": vggfeat.open_features(FORMATS / "features.h5"),
        "model": model,
        "results": model.results,
        "network": vggfeat.load("mini:A", device="cpu"),
        "prediction": one,
        "unreadable": vggfeat.Prediction("b.jpg", error="no such file"),
        "none": replace(one, classes=(), scores=(), probabilities=()),
    }


def test_a_line_and_a_table(displayed: dict[str, Displayed]) -> None:
    for each in displayed.values():
        assert len(repr(each)) < 1000 and "\n" not in repr(each)
        text = each._repr_html_()
        tags = Tags(text).seen
        assert len(text) < 20_000 and {"table", "style"} <= tags and "script" not in tags
        style = text.partition("<style>")[2].partition("</style>")[0]
        assert not re.search(
            r"#[0-9a-f]{3}|rgb\(|white;|black", style
        )  # of light pages, or of dark
    assert (
        repr(displayed["prediction"]) == "<Prediction of a.jpg; cat: +1.250, 50.0 %; margin: 0.750>"
    )
    assert "unreadable: no such file" in repr(displayed["unreadable"])
    assert "no class: above the threshold" in repr(displayed["none"])
    assert re.match(
        "<Net A; descriptor: fc7, [0-9,]+ values at each of Q = ", repr(displayed["network"])
    )
    features = repr(displayed["features"])
    assert features.startswith("<Features of ") and " images: " not in features.partition(";")[0]
    assert "<summary>Each class</summary>" in displayed["results"]._repr_html_()


def test_names_of_strangers_are_text(displayed: dict[str, Displayed]) -> None:
    features, model = displayed["features"], displayed["model"]
    assert isinstance(features, vggfeat.Features) and isinstance(model, vggfeat.Model)
    results = model.results
    assert results is not None
    classes = [EVIL, "x" * 5000]
    many = {f"{EVIL}{i}": ClassFigures(recall=1.0) for i in range(MOST_ROWS + 1)}
    for each in (
        replace(features, classes=classes, attributes={**features.attributes, "dataset": EVIL}),
        replace(model, classes=classes),
        replace(results, dataset=EVIL, per_class=many),
        vggfeat.Prediction(EVIL, (EVIL,), (1.0,)),
    ):
        text = each._repr_html_()
        assert "script" not in Tags(text).seen and "&lt;script&gt;" in text
        assert len(text) < 20_000 and text.encode()
        assert repr(each).isprintable()
