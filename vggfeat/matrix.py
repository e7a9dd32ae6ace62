"""A matrix of rows that needn't lie in memory: what is asked of it, in which blocks it is read, and
some of its rows without a copy. N rows, D values a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Of a block as float64, whatever kind the rows have: what is made of them is float64, and takes a
# few times as much.
BLOCK_BYTES = 1 << 25


class Matrix(Protocol):
    """(N, D) of numbers, read in parts: an array, a memory map, an HDF5 data set, `Selected`,
    `descriptors.Descriptors`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its values."""
        ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Rows as an array (n, D), by a slice or by (n,) indices."""
        ...


def row_blocks(n_rows: int, values_per_row: int) -> Iterator[slice]:
    """All rows in blocks of BLOCK_BYTES as float64, of one row at least."""
    step = max(1, BLOCK_BYTES // (8 * max(1, values_per_row)))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def one_run(rows: NDArray[np.int64]) -> slice | None:
    """The slice that these rows are, where each is the one after the last; else None."""
    if len(rows) == 0 or rows[-1] - rows[0] != len(rows) - 1 or not (np.diff(rows) == 1).all():
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1)


class Selected:
    """Some rows of a matrix as one of its own: they are copied a part at a time, when they are
    asked for, and not at all where they are a run of an array.

    X: (N, D). rows: (n,) indices, in any order. finite: whether the rows are known to be, so that
    who trains on them needn't read them once more to know.
    """

    def __init__(self, X: Matrix, rows: NDArray[np.int64], *, finite: bool = False) -> None:
        self.X, self.rows, self.finite = X, rows, finite
        self.shape: tuple[int, ...] = (len(rows), X.shape[1])
        self.dtype = X.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def array(self) -> NDArray[Any] | None:
        """All of them without a copy, where that is possible."""
        run = one_run(self.rows)
        return self.X[run] if isinstance(self.X, np.ndarray) and run is not None else None

    def __getitem__(self, rows: slice | NDArray[Any], /) -> Any:
        chosen = self.rows[rows]
        run = one_run(chosen)
        return self.X[chosen if run is None else run]
