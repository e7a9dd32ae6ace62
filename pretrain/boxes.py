"""Boxes as Appendix A has them: what the last layer is trained to say of one, and how two are
compared.

A box in an image is its corners (x1, y1, x2, y2), float64: edges in pixels of the upright image,
from its top left corner, so that a box of the whole image is (0, 0, W, H). What a net says of a box
are four numbers in the frame of the crop that it sees: centre x, centre y, width, height (A.1). The
centre is counted from the crop's own, and all four in units of `unit` times the crop's side, which
the paper doesn't tell. N boxes, M others.
"""

from __future__ import annotations

import numpy as np

CORRECT = 0.5
"""A predicted box is right where its IoU with a true one is above it (A.2)."""


def area(corners_N4: np.ndarray) -> np.ndarray:
    """(N,) square pixels; 0 of a box without extent."""
    sides = np.clip(corners_N4[..., 2:] - corners_N4[..., :2], 0, None)
    product: np.ndarray = sides[..., 0] * sides[..., 1]
    return product


def iou(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """(N, M): the area that two boxes share, divided by what they cover together; 0 of boxes
    without area. Axes before these two are those of pairs of sets of boxes.
    """
    a, b = a_N4[..., :, None, :], b_M4[..., None, :, :]
    wide = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    high = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    shared = np.maximum(wide, 0) * np.maximum(high, 0)
    covered = area(a) + area(b) - shared
    shares: np.ndarray = np.divide(shared, covered, out=np.zeros_like(shared), where=covered > 0)
    return shares


def cover(corners_N4: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """(N,) share of each box that lies in the frame (4,), corners too; 0 of a box without area."""
    inside = np.concatenate(
        [np.maximum(corners_N4[:, :2], frame[:2]), np.minimum(corners_N4[:, 2:], frame[2:])], axis=1
    )
    own = area(corners_N4)
    shares: np.ndarray = np.divide(area(inside), own, out=np.zeros(len(own)), where=own > 0)
    return shares


def encoded(corners_N4: np.ndarray, crop: int, unit: float) -> np.ndarray:
    """(N, 4): what a net is to say of boxes whose corners are in pixels of the crop that it
    sees.
    """
    low, high = corners_N4[..., :2], corners_N4[..., 2:]
    return np.concatenate([(low + high) / 2 - crop / 2, high - low], axis=-1) / (unit * crop)


def decoded(said_N4: np.ndarray, crop: int, unit: float) -> np.ndarray:
    """(N, 4): the corners, in pixels of the crop; the inverse of `encoded`. A side that is said to
    be negative is 0.
    """
    pixels = said_N4 * (unit * crop)
    centre, half = pixels[..., :2] + crop / 2, np.clip(pixels[..., 2:], 0, None) / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def mirrored(corners_N4: np.ndarray, width: float) -> np.ndarray:
    """(N, 4): the boxes in the mirror image of a frame of this width."""
    flipped = corners_N4.copy()
    flipped[..., 0], flipped[..., 2] = width - corners_N4[..., 2], width - corners_N4[..., 0]
    return flipped
