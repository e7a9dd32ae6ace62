"""Greedy merging of boxes (Sermanet et al., OverFeat, arXiv 1312.6229, Sect. 4.3), by which A.2
makes one box of all that localisation nets say of a class.

The closest two boxes are replaced by their average until no two are close; what is left is rated by
the class scores of all windows that a box was merged of, and the best-rated one is the prediction.

Here the closest are those with the largest IoU, and close is an IoU above a limit. OverFeat's own
measure, "the sum of the distance between centers [...] and the intersection area", adds pixels to
square pixels, its limit isn't told, and it calls two boxes less alike the more they share; IoU
needs no unit, and is what a box is judged by. The average weighs a box by the windows that it was
merged of, so that it is the mean of theirs. M boxes, C classes, G merged ones.
"""

from __future__ import annotations

import numpy as np

from pretrain.boxes import CORRECT, iou

MERGED_ABOVE = CORRECT
"""Two boxes are merged while their IoU is above it: they then count as one object's."""
UNITS = 10_000
"""Of an IoU of 1, in whole ones of which closeness is compared: boxes of neighbouring windows often
share alike, and rounding in a net's arithmetic mustn't decide which come first.
"""


def merged(
    corners_M4: np.ndarray, scores_MC: np.ndarray, above: float = MERGED_ABOVE
) -> tuple[np.ndarray, np.ndarray]:
    """(G, 4) boxes that are left, and (G, C) their ratings: the sums of their windows' scores.

    scores_MC: of each class at the window that the box comes from. above: see MERGED_ABOVE. Of
    pairs that are equally close the first in order are merged; a merged box has the place of the
    first of its two.
    """
    if not len(corners_M4):
        return corners_M4, scores_MC
    boxes, scores = corners_M4.astype(np.float64), scores_MC.astype(np.float64)
    counts, left = np.ones(len(boxes)), np.ones(len(boxes), bool)
    alike_MM = np.concatenate([_alike(part, boxes) for part in _parts(boxes)])
    np.fill_diagonal(alike_MM, -1)
    near = alike_MM.argmax(1)  # of each its closest, the first of equals
    close = alike_MM[np.arange(len(boxes)), near]
    while close.max() > above * UNITS:
        i = int(close.argmax())
        j = int(near[i])
        together = counts[i] + counts[j]
        boxes[i] = (counts[i] * boxes[i] + counts[j] * boxes[j]) / together
        scores[i] += scores[j]
        counts[i], left[j] = together, False
        now = np.where(left, _alike(boxes[i : i + 1], boxes)[0], -1)
        now[i] = -1
        alike_MM[i], alike_MM[:, i], alike_MM[j], alike_MM[:, j], close[j] = now, now, -1, -1, -1
        nearer = (now > close) | ((now == close) & (i < near))
        near[nearer], close[nearer] = i, now[nearer]
        ask = np.flatnonzero(left & ~nearer & ((near == i) | (near == j)))
        ask = np.append(ask, i)
        near[ask] = alike_MM[ask].argmax(1)
        close[ask] = alike_MM[ask, near[ask]]
        if 2 * left.sum() < len(left):  # those that are gone cost time
            near = (left.cumsum() - 1)[near]
            boxes, scores, counts, near, close = (
                each[left] for each in (boxes, scores, counts, near, close)
            )
            alike_MM, left = alike_MM[np.ix_(left, left)], np.ones(len(boxes), bool)
    return boxes[left], scores[left]


def _parts(boxes_M4: np.ndarray) -> list[np.ndarray]:
    """Some hundred boxes at a time, whose IoUs with all are computed at once."""
    return np.array_split(boxes_M4, 1 + len(boxes_M4) // 256)


def _alike(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """(N, M) int16: the IoU in units of 1 / UNITS."""
    alike: np.ndarray = np.rint(iou(a_N4, b_M4) * UNITS).astype(np.int16)
    return alike
