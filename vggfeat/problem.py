"""What a protocol is run on: descriptors with labels and splits, from files or from memory.

N images, D descriptor length, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vggfeat.datasets.items import known
from vggfeat.datasets.protocol import Protocol, protocol_of
from vggfeat.errors import VggfeatError
from vggfeat.matrix import Matrix


@dataclass(frozen=True)
class Problem:
    """What is classified: one descriptor an image, with labels and splits as `datasets.Items` codes
    them.

    X: (N, D) float32, aggregated and normalised; rows of unreadable images are NaN. An array, or
        what reads its rows when they are asked for (`descriptors.Descriptors`).
    labels: (N,) int32, -1 where unknown; or (N, K) int8 of 1, -1, 0 (difficult), all zeros where
    unknown. classes: K names.
    splits: name -> rows: "train", "val", "test", or "split0/train", "split0/val", "split0/test", …
    readable: (N,) bool.
    protocol: one of `datasets.protocol.PROTOCOLS`.
    names: N image names.
    total: images of the data set, where these are the first of them; else None.
    seen: (N,) bool, the images that trained the network that described them; None: unknown.
    same: (N,) the first row that holds the same image file, of most rows their own; None: unknown.
    dataset: its name.
    """

    X: Matrix
    labels: np.ndarray
    classes: list[str]
    splits: dict[str, np.ndarray]
    readable: np.ndarray
    protocol: str
    names: Sequence[str]
    total: int | None = None
    seen: np.ndarray | None = None
    same: np.ndarray | None = None
    dataset: str = ""

    def __post_init__(self) -> None:
        n = self.X.shape[0]
        if len(self.X.shape) != 2 or not (
            len(self.labels) == len(self.readable) == len(self.names) == n
        ):
            raise VggfeatError(
                f"descriptors {tuple(self.X.shape)}, labels {self.labels.shape}, readable"
                f" {self.readable.shape} and {len(self.names)} names don't describe the same images"
            )
        if self.labels.ndim not in (1, 2) or (
            self.labels.ndim == 2 and self.labels.shape[1] != len(self.classes)
        ):
            raise VggfeatError(
                f"labels {self.labels.shape} don't match {len(self.classes)} classes"
            )
        if (
            self.labels.ndim == 1
            and n
            and not -1 <= self.labels.min() <= self.labels.max() < len(self.classes)
        ):
            raise VggfeatError(f"labels must lie within -1 … {len(self.classes) - 1}")
        for name, rows in self.splits.items():
            if len(rows) and not 0 <= np.min(rows) <= np.max(rows) < n:
                raise VggfeatError(f"split {name} names rows outside 0 … {n - 1}")

    @property
    def multilabel(self) -> bool:
        return self.labels.ndim == 2

    @property
    def known(self) -> NDArray[np.bool_]:
        """(N,) whether anything is known of an image's label."""
        return known(self.labels)

    @property
    def rules(self) -> Protocol:
        return protocol_of(self.protocol)

    @property
    def compared_by(self) -> str:
        """The figure that chooses C and is compared."""
        return self.rules.compared_by(self.multilabel)
