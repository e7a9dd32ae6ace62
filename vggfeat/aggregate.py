"""From raw descriptors to what the SVM sees: pool over scales, L2-normalise, fuse networks.

N images, Q scales, D descriptor length. Descriptors are stored neither pooled nor normalised (they
are ReLU activations), so every choice here is made afterwards, without a second extraction. A row
of NaN (an unreadable image) stays a row of NaN through everything; an image never moves to another
row. Sums are float64, but only of a block of rows at a time: memory doesn't grow with the dataset.

Paper, Appendix B: "the resulting descriptor" is L2-normalised. With stacking and with several
networks, each part is normalised by itself, so that a scale or network with larger activations
doesn't drown the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vggfeat.matrix import row_blocks

Pool = Literal["average", "stack", "max"]
"""Over the scales; see `aggregate`."""
POOLINGS: tuple[Pool, ...] = get_args(Pool)


def _unit(x: NDArray[np.float64], first_row: int) -> NDArray[np.float64]:
    """x scaled to length 1 along its last axis; zeros stay zeros, a vector with a NaN becomes all
    NaN.
    """
    peak = np.abs(x).max(axis=-1, keepdims=True)  # NaN where any is
    if np.isinf(peak).any():
        row = first_row + int(np.flatnonzero(np.isinf(peak).reshape(len(x), -1).any(axis=1))[0])
        raise ValueError(
            f"descriptor row {row} holds an infinite value: extract it again in float32"
        )
    # Dividing by the peak first keeps the squares of very small or large values from under- or
    # overflowing.
    x = x / np.where(peak == 0, 1, peak)
    norm = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    return x / np.where(norm == 0, 1, norm)


def l2_normalise(x_ND: Any) -> NDArray[np.float32]:
    """Rows scaled to length 1, as a new float32 array (N, D); zeros stay zeros, a row with a NaN
    becomes NaN.

    x_ND: (N, D), any float type; an array or an HDF5 dataset.
    ValueError for other shapes or an infinite value.
    """
    if len(x_ND.shape) != 2:
        raise ValueError(f"descriptors to normalise must be (N, D), not {tuple(x_ND.shape)}")
    n_rows, length = x_ND.shape
    out = np.empty((n_rows, length), dtype=np.float32)
    for rows in row_blocks(n_rows, length):
        out[rows] = _unit(np.asarray(x_ND[rows], dtype=np.float64), rows.start)
    return out


def pooled_length(how: str, n_scales: int, length: int, regions: int = 1) -> int:
    """Length of a row that `aggregate` makes of descriptors of that length at so many scales."""
    return regions * length * (n_scales if how == "stack" else 1)


def aggregate(descriptors_NQD: Any, how: str = "average", regions: int = 1) -> NDArray[np.float32]:
    """One L2-normalised float32 row an image: (N, D) for average and max, (N, Q*D) for stack.

    descriptors_NQD: (N, Q, D), any float type; an array or an HDF5 dataset, which is read block by
        block. how: "average" or "max" over the scales, then L2; "stack": each scale's descriptor
        L2-normalised, the scales stacked in their order, and L2 again.
    regions: how many parts of an image each row is of: with two there are Q descriptors of the
        first and then Q of the second. Each part is pooled and normalised by itself, and they are
        stacked and normalised again, as `fuse` does with two networks.
    ValueError for another `how`, other shapes, no scale, or an infinite value (a float16 overflow).
    """
    if how not in POOLINGS:
        raise ValueError(f"pooling over scales must be one of {', '.join(POOLINGS)}, not {how!r}")
    shape = descriptors_NQD.shape
    if len(shape) != 3 or shape[1] == 0 or shape[1] % regions:
        raise ValueError(
            f"descriptors must be (N, Q, D) with Q > 0, not {tuple(shape)}"
            + (f", Q a multiple of {regions}" if regions > 1 else "")
        )
    n_rows, n_scales, length = shape[0], shape[1] // regions, shape[2]
    out = np.empty((n_rows, pooled_length(how, n_scales, length, regions)), dtype=np.float32)
    for rows in row_blocks(n_rows, shape[1] * length):
        block = np.asarray(descriptors_NQD[rows], dtype=np.float64)
        block = block.reshape(len(block), regions, n_scales, length)
        if how == "average":
            pooled = block.mean(axis=2)
        elif how == "max":
            pooled = block.max(axis=2)
        else:
            pooled = _unit(block, rows.start).reshape(len(block), regions, -1)
        pooled = _unit(pooled, rows.start).reshape(len(block), -1)
        out[rows] = pooled if regions == 1 else _unit(pooled, rows.start)
    return out


def fuse(parts: Sequence[Any]) -> NDArray[np.float32]:
    """Descriptors of several networks for the same images: each L2-normalised, stacked,
    L2-normalised again.

    parts: one (N, D_i) array a network, rows in the same order. One part comes back unchanged, not
    copied. Returns (N, D_1 + D_2 + …) float32; a row that is NaN in any part is NaN throughout.
    ValueError for no parts or for unequal N.
    """
    if not parts:
        raise ValueError("there are no descriptors to fuse")
    shapes = [tuple(part.shape) for part in parts]
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"descriptors to fuse must be (N, D) with the same N, not {shapes}")
    if len(parts) == 1:
        alone: NDArray[np.float32] = parts[0]
        return alone
    n_rows, length = shapes[0][0], sum(shape[1] for shape in shapes)
    out = np.empty((n_rows, length), dtype=np.float32)
    for rows in row_blocks(n_rows, length):
        units = [_unit(np.asarray(part[rows], dtype=np.float64), rows.start) for part in parts]
        out[rows] = _unit(np.concatenate(units, axis=1), rows.start)
    return out
