"""Greedy merging, against sums worked by hand and against a slow search of all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.boxes import iou
from pretrain.merging import UNITS, merged


def test_close_boxes_become_their_average_and_scores_add_up() -> None:
    boxes = np.array([[0, 0, 10, 10], [40, 0, 50, 10], [2, 0, 12, 10], [0, 0, 10, 12]], float)
    scores = np.array([[0.5, 0.1], [0.9, 0.2], [0.25, 0.3], [0.125, 0.4]])
    # IoU: 0 and 2 share 80 of 120; 0 and 3 share 100 of 120, the closest: [0, 0, 10, 11] of two.
    # With 2 it shares 80 of 130, above a half: (2 * [0, 0, 10, 11] + [2, 0, 12, 10]) / 3.
    left, ratings = merged(boxes, scores)
    assert left == pytest.approx(np.array([[2 / 3, 0, 32 / 3, 32 / 3], [40, 0, 50, 10]]))
    assert ratings == pytest.approx(np.array([[0.875, 0.8], [0.9, 0.2]]))
    # the first class's box is the lone one, the second's the one of three windows
    assert ratings.argmax(0).tolist() == [1, 0]
    apart, alone = merged(boxes, scores, above=0.62)  # 80 / 130 = 0.615
    assert apart == pytest.approx(np.array([[0, 0, 10, 11], [40, 0, 50, 10], [2, 0, 12, 10]]))
    assert alone[:, 0] == pytest.approx([0.625, 0.9, 0.25])


def test_an_average_is_of_windows_however_they_came_together() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 11, 10], [0, 0, 12, 10], [0, 0, 13, 10]], float)
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [2, 3, 1, 0]):
        left, ratings = merged(boxes[order], np.ones((4, 1)))
        assert left == pytest.approx(np.array([[0, 0, 11.5, 10]])) and ratings == 4


def test_of_equally_close_pairs_the_first_is_merged() -> None:
    boxes = np.array([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], float)  # 60 of 140, twice
    for shift in (0, 1e-7):  # what rounding may make of them
        boxes[2, 2] += shift
        left, _ = merged(boxes, np.ones((3, 1)), above=0.4)
        assert left == pytest.approx(np.array([[2, 0, 12, 10], [8, 0, 18, 10]]), abs=1e-6)


def test_none_one_and_boxes_without_area() -> None:
    left, ratings = merged(np.zeros((0, 4)), np.zeros((0, 2)))
    assert left.shape == (0, 4) and ratings.shape == (0, 2)
    one = np.array([[1.0, 2, 3, 4]])
    left, ratings = merged(one, np.array([[0.5]]))
    assert (left == one).all() and ratings == 0.5
    flat = np.array([[1.0, 2, 3, 2], [1, 2, 3, 2], [0, 0, 0, 0]])
    left, _ = merged(flat, np.ones((3, 1)), above=0)
    assert (left == flat).all()


def search(boxes: np.ndarray, scores: np.ndarray, above: float) -> tuple[np.ndarray, np.ndarray]:
    """The same by the words of the paper: all pairs are compared before each merge."""
    groups = [(box, score, 1) for box, score in zip(boxes, scores, strict=True)]
    while len(groups) > 1:
        every = np.stack([box for box, _, _ in groups])
        overlaps = np.triu(np.rint(iou(every, every) * UNITS), 1)
        i, j = np.unravel_index(overlaps.argmax(), overlaps.shape)
        if overlaps[i, j] <= above * UNITS:
            break
        (a, p, n), (b, q, m) = groups[i], groups.pop(j)
        groups[i] = ((n * a + m * b) / (n + m), p + q, n + m)
    return np.stack([g[0] for g in groups]), np.stack([g[1] for g in groups])


@pytest.mark.parametrize("above", [0.3, 0.5, 0.7])
def test_it_is_a_search_of_all_pairs(above: float) -> None:
    random = np.random.default_rng(3)
    for n in (2, 7, 90):
        low = random.integers(0, 60, (n, 2)).astype(float)
        boxes = np.concatenate([low, low + random.integers(10, 40, (n, 2))], 1)
        scores = random.random((n, 3))
        found, expected = merged(boxes, scores, above), search(boxes, scores, above)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs)
