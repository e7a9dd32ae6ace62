"""Charts of a page: of any values, and no larger than they must be."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from vggfeat.page import (
    TOP,
    Outlined,
    Section,
    Series,
    as_data,
    chart,
    matrix_picture,
    outlined,
    page,
    thumbnail,
    wrapping,
)


def test_curves_are_thinned_but_keep_their_shape() -> None:
    y = np.zeros(100_000)
    y[54_321] = 1.0
    svg = str(chart([Series("s", np.arange(100_000), y)], "x", "y", y_range=(0, 1)))
    assert len(svg) < 45_000
    points = re.search(r'points="([^"]*)"', svg)
    assert points and min(float(point.split(",")[1]) for point in points[1].split()) == TOP
    # precision falls only after the last positive, however many images follow
    recall, precision = (
        np.minimum(np.arange(1, 5001) / 10, 1),
        np.minimum(10 / np.arange(1, 5001), 1),
    )
    svg = str(
        chart(
            [Series("s", recall, precision)], "recall", "precision", x_range=(0, 1), y_range=(0, 1)
        )
    )
    points = re.search(r'points="([^"]*)"', svg)
    drawn = [tuple(map(float, point.split(","))) for point in points[1].split()] if points else []
    right = max(x for x, _ in drawn)
    assert {y for x, y in drawn if x < right} == {TOP} and (right, TOP) in drawn


@pytest.mark.parametrize("value", [1e308, -1e300, 1e-320, 1e300, 5e-324])
@pytest.mark.parametrize("log", [False, True])
def test_no_value_breaks_a_chart(value: float, log: bool) -> None:
    svg = str(
        chart(
            [Series("s", np.array([value, value]), np.array([1.0, value]))],
            "x",
            "y",
            log_x=log,
            log_y=log,
        )
    )
    assert "nan" not in svg and "inf" not in svg


def test_values_that_are_not_finite_draw_nothing() -> None:
    svg = str(
        chart([Series("s", np.array([np.nan, 1.0]), np.array([1.0, np.inf]))], "x", "y", log_x=True)
    )
    assert "nan" not in svg and "inf" not in svg


def test_boxes_lie_on_the_picture_in_its_own_pixels() -> None:
    pixels = np.zeros((300, 400, 3), np.uint8)
    box = Outlined(np.array([10, 20.5, 110, 60]), "true", "a <dog>")
    text = outlined(thumbnail(pixels), (300, 400), [box], "a.jpg", "IoU 1.00")
    assert '<svg viewBox="0 0 400 300"' in text and 'width="400" height="300"' in text
    assert 'class="box true" x="10.0" y="20.5" width="100.0" height="39.5"' in text
    assert "a &lt;dog&gt;" in text and text.count("<rect") == 1
    assert "<svg" not in outlined(None, (300, 400), [box], "a.jpg", "gone")


def test_only_a_long_word_may_be_broken_and_only_at_its_joints() -> None:
    assert wrapping("dandelion 91.67 % a-b.c") == "dandelion 91.67 % a-b.c"
    assert wrapping("daisy/12764617214_1a.jpg") == "daisy/<wbr>12764617214_<wbr>1a.<wbr>jpg"
    assert wrapping("x" * 40) == "x" * 40
    assert wrapping("<b>&long_words_are_escaped") == (
        "&lt;b&gt;&amp;long_<wbr>words_<wbr>are_<wbr>escaped"
    )


def test_what_stands_in_backticks_is_code() -> None:
    text = page("t", "", [Section("a", "A", Markup(""), "give `vggfeat <b>` or `--x`; 2 < 3")])
    assert "give <code>vggfeat &lt;b&gt;</code> or <code>--x</code>; 2 &lt; 3</p>" in text
    keys = re.findall(r'id="(\w+)"', text)
    assert len(keys) == len(set(keys))


def test_data_never_end_their_script() -> None:
    value = {"</script><b>&": ['"', "\u2028", "\udcff", float("nan")]}
    text = as_data(value)
    assert not {"<", ">", "&", "\u2028"} & {*text}
    assert json.loads(text) == {"</script><b>&": ['"', "\u2028", "\udcff", None]}


def test_a_large_matrix_keeps_its_single_cells() -> None:
    share = np.zeros((1000, 1000))
    share[700, 999] = 1
    [uri] = re.findall(r'src="data:image/png;base64,([^"]*)"', matrix_picture(share, "m"))
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))[..., 3]
    assert alpha.shape == (334, 334)
    assert np.argwhere(alpha).tolist() == [[233, 333]] and alpha.max() == 255
