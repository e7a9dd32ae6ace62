"""Boxes by arithmetic worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.boxes import area, cover, decoded, encoded, iou, mirrored

BOXES = np.array([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 96.0, 96.0], [20.0, 20.0, 40.0, 60.0]])


def test_iou_by_hand() -> None:
    # 20 x 40 = 800 each; the first and the third share 10 x 40 = 400 of 1,200
    assert area(BOXES).tolist() == [800, 9216, 800]
    shares = iou(BOXES, BOXES)
    assert shares[0, 2] == pytest.approx(1 / 3)
    assert shares[0, 1] == pytest.approx(800 / 9216)
    assert np.diag(shares).tolist() == [1, 1, 1]
    assert np.array_equal(shares, shares.T)


@pytest.mark.parametrize(
    "other", [[30.0, 20.0, 50.0, 60.0], [100.0, 0.0, 120.0, 5.0], [15.0, 30.0, 15.0, 50.0]]
)
def test_boxes_that_touch_lie_apart_or_have_no_area_share_nothing(other: list[float]) -> None:
    assert iou(BOXES[:1], np.array([other]))[0, 0] == 0


def test_a_box_without_area_is_not_like_itself() -> None:
    nothing = np.array([[5.0, 5.0, 5.0, 9.0]])
    assert iou(nothing, nothing)[0, 0] == cover(nothing, BOXES[1])[0] == 0


def test_how_much_of_a_box_a_crop_has() -> None:
    frame = np.array([0.0, 0.0, 20.0, 40.0])  # a half of the width and a half of the height
    assert cover(BOXES[:1], frame)[0] == pytest.approx(0.25)


def test_what_a_net_says_is_counted_from_the_middle_of_the_crop() -> None:
    # centre 20, 40; 48 is the crop's own; in tenths of 96 pixels
    said = encoded(BOXES[:1], 96, 0.1)
    assert said[0] == pytest.approx([(20 - 48) / 9.6, (40 - 48) / 9.6, 20 / 9.6, 40 / 9.6])
    assert decoded(encoded(BOXES, 96, 0.1), 96, 0.1) == pytest.approx(BOXES)
    # and a side is never negative
    thin = decoded(np.array([[0.0, 0.0, -1.0, 2.0]]), 96, 0.1)[0]
    assert thin == pytest.approx([48, 38.4, 48, 57.6])


def test_the_mirror_image_of_a_box() -> None:
    assert mirrored(BOXES[:1], 96)[0].tolist() == [66, 20, 86, 60]
    assert np.array_equal(mirrored(mirrored(BOXES, 96), 96), BOXES)
