"""What an SVM sees of feature files, as one matrix that is made when its rows are asked for.

N images, Q scales, D length of a row. The files hold (N, Q, D') of each net; a row is pooled over
the scales, L2-normalised and fused (`aggregate`). All of them at once are as large as the files:
where they fit into memory they are held once (`held`), else read again at each pass over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggfeat.aggregate import aggregate, fuse, pooled_length
from vggfeat.machine import memory
from vggfeat.matrix import one_run
from vggfeat.store import READ_BYTES, Description, Features

HELD_SHARE = 0.5  # of the machine's memory: the rest is for the solver, and for the files' cache
# Times READ_BYTES that reading takes at most: what is stored, what of it is asked for, both as they
# are checked, and as float64.
READING = 5


class Descriptors:
    """(N, D) float32: rows of feature files of the same images. `X[slice]` and `X[indices]`, in any
    order, read and make just those; rows of unreadable images are NaN, all others finite.

    parts: how each file was described, with the scales that are used. pool: see `aggregate`.
    processes: of this machine, each of which has one.
    Raises VggfeatError for a scale that a file doesn't have; reading raises as `Features.read`.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        files: Sequence[Features],
        parts: Sequence[Description],
        pool: str,
        processes: int = 1,
    ) -> None:
        self._files, self._parts, self._pool = files, parts, pool
        self.share = HELD_SHARE / processes  # of the memory
        length = stored = 0
        for file, part in zip(files, parts, strict=True):
            file.columns_of(part.scales)  # a scale that isn't there is refused before the work
            length += pooled_length(pool, len(part.scales), file.shape[2], len(part.regions))
            stored = max(stored, file.shape[1] * file.shape[2] * file.dtype.itemsize)
        self.shape: tuple[int, ...] = (files[0].shape[0], length)
        self.stored = stored * files[0].shape[0]  # bytes, in the largest of the files
        # a power of two: row groups of shards are such, and none is read for two blocks
        self._step = 1 << (max(1, READ_BYTES // stored).bit_length() - 1)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Of all rows, were they held."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def fits(self) -> bool:
        """Whether all rows may be held, by HELD_SHARE of the memory, of which each process has its
        part.
        """
        return self.nbytes <= self.share * memory()

    def held(self) -> NDArray[np.float32]:
        """All rows as one array, which is filled block by block: beside it there is never more than
        READING blocks of what is stored.
        """
        return self[:]

    def __getitem__(self, rows: slice | NDArray[Any], /) -> NDArray[np.float32]:
        wanted = np.arange(self.shape[0])[rows]
        if (np.diff(wanted) > 0).all():
            return self._made(wanted)
        rising, place = np.unique(wanted, return_inverse=True)
        return self._made(rising)[place]

    def _made(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of rising rows. Blocks begin at multiples of a step, so neighbouring calls share none."""
        made = np.empty((len(rows), self.shape[1]), np.float32)
        ends = np.flatnonzero(np.diff(rows // self._step)) + 1
        start = 0
        for part in np.split(rows, ends) if len(rows) else []:
            made[start : start + len(part)] = self._block(part)
            start += len(part)
        return made

    def _block(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        run, chosen = one_run(rows), None
        if run is None and rows[-1] - rows[0] < 2 * len(rows):
            # one long read is faster than many short ones, of half as much
            run, chosen = slice(int(rows[0]), int(rows[-1]) + 1), rows - rows[0]
        parts = []
        for file, part in zip(self._files, self._parts, strict=True):
            raw_nQD = file.read(part.scales, rows if run is None else run)
            if chosen is not None:
                raw_nQD = raw_nQD[chosen]
            parts.append(aggregate(raw_nQD, self._pool, len(part.regions)))
        return fuse(parts)
