"""Items: what every dataset module gives, and all that the rest of the toolkit knows about a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# What the official archives hold, beside which a part of them is told: classes, with the background; labelled images.
_CLASSES = {"caltech101": 102, "caltech256": 257}
_IMAGES = {
    "voc2007": {"train": 2501, "val": 2510, "test": 4952},
    "voc2012": {"train": 5717, "val": 5823},
}


def name_digest(names: Sequence[str]) -> str:
    """sha256 of images' names in their order, by which a set of them is known again."""
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def other_counts(protocol: str, n_classes: int, splits: Mapping[str, np.ndarray]) -> list[str]:
    """In which counts the images are not those that the paper's protocols are about, each in a few words."""
    counts = []
    if (classes := _CLASSES.get(protocol, n_classes)) != n_classes:
        counts.append(f"{n_classes:,} classes instead of {classes:,}")
    for part, official in _IMAGES.get(protocol, {}).items():
        if (n := len(splits.get(part, ()))) != official:
            counts.append(f"{n:,} {part} images instead of {official:,}")
    return counts


def remarks_on(protocol: str, n_classes: int, splits: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The same, as `Items.remarks`."""
    counts = ", ".join(other_counts(protocol, n_classes, splits))
    return (f"{protocol} with {counts}: no figure of these is its protocol's",) if counts else ()


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
    remarks: sentences for the user, of what was left out or understood in one of several ways.
    total: images of the data set, where only the first of them were taken; else None.
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
    total: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> Iterator[Path]:
        """The files that are read: lists and images; none of a dataset that lives in memory."""
        return iter(()) if self.images is not None else map(self.root.joinpath, (*self.lists, *self.names))

    def source(self, i: int) -> Path | np.ndarray:
        """Where image i is: a path, or its pixels."""
        return self.root / self.names[i] if self.images is None else self.images[i]
