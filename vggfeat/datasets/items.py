"""Items: what every dataset module gives, and all that the rest of the toolkit knows about a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Items:
    """N images in the dataset's own order, with labels and splits.

    dataset: name given to `--dataset`.
    protocol: how a classifier is scored on it: "voc2007", "voc2012", "caltech101", "caltech256",
        "single-label", "multi-label" or "unlabelled".
    root: folder to which names are relative.
    names: N paths relative to root, with forward slashes; a name is unique.
    labels: (N,) int32, index into classes, -1 where unknown; or (N, C) int8: 1 present, -1 absent,
        0 difficult (left out for that class), a row of zeros where unknown; None when there are none at all.
    classes: C names.
    splits: name -> (n,) int64 rows. Official ones are "train", "val", "test"; the random splits of a
        protocol are "split0/train", "split0/val", "split0/test", "split1/train" …
    images: (N, H, W) or (N, H, W, 3) uint8 for a dataset that lives in memory, else None.
    lists: files that were read for all this, relative to root; no command may write them.
    remarks: sentences about files that were left out.
    """

    dataset: str
    protocol: str
    root: Path
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    images: np.ndarray | None = None
    lists: list[str] = field(default_factory=list)
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> Iterator[Path]:
        """The files that are read: lists and images; none of a dataset that lives in memory."""
        return iter(()) if self.images is not None else map(self.root.joinpath, (*self.lists, *self.names))

    def source(self, i: int) -> Path | np.ndarray:
        """Where image i is: a path, or its pixels."""
        return self.root / self.names[i] if self.images is None else self.images[i]
