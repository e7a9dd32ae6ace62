"""Items: what every dataset module gives, and all that the rest of the toolkit knows about a
dataset.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vggfeat.checked import first_few, shown
from vggfeat.errors import VggfeatError

if TYPE_CHECKING:
    from vggfeat.decode import Frame

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2: edges of a box in pixels, from the image's top left corner."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in whole pixels: `image[top:bottom, left:right]`."""
_FURTHEST = 1 << 30  # pixels from the corner, far beyond any image


def name_digest(names: Sequence[str]) -> str:
    """sha256 of images' names in their order, by which a set of them is known again."""
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def known(labels: np.ndarray) -> NDArray[np.bool_]:
    """(N,) whether anything is known of an image's label; labels as of `Items`."""
    return (labels != 0).any(axis=1) if labels.ndim == 2 else labels >= 0


def counted(
    n: int,
    total: int | None,
    labels: np.ndarray | None,
    classes: Sequence[str],
    splits: Mapping[str, Sized],
) -> str:
    """n images in words: of how many, the number of their classes, and the sizes of the splits."""
    words = f"{n:,}" + ("" if total is None else f", the first of {total:,},")
    words += ", no labels" if labels is None else f" of {_classes(len(classes))}"
    drawn = {name.partition("/")[0] for name in splits if "/" in name}
    first = f"{min(drawn)}/" if drawn else ""
    sizes = [
        f"{len(rows):,} {name.removeprefix(first)}"
        for name, rows in splits.items()
        if name.startswith(first) and len(rows)
    ]
    if not sizes:
        return words
    return f"{words}; {f'{len(drawn)} random splits of ' if drawn else ''}{', '.join(sizes)}"


def _classes(n: int) -> str:
    return "1 class" if n == 1 else f"{n:,} classes"


def images_of_classes(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """(n_classes,) how many images each class is present in; labels as of `Items`."""
    if labels.ndim == 2:
        present: np.ndarray = np.count_nonzero(labels == 1, axis=0)
        return present
    return np.bincount(labels[labels >= 0], minlength=n_classes)


def remarks_on_classes(
    labels: np.ndarray, classes: Sequence[str], splits: Mapping[str, np.ndarray]
) -> tuple[str, ...]:
    """Of names that are one but for their case, and of classes that nothing can be learned of, as
    `Items.remarks`.
    """
    remarks = []
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(name.casefold(), []).append(name)
    if twins := [name for names in alike.values() if len(names) > 1 for name in names]:
        remarks.append(
            f"names of classes that differ only in case: {first_few(twins, spelt=shown)}"
        )
    here = images_of_classes(labels, len(classes)) > 0
    refused = (
        "" if labels.ndim == 2 else ": svm will refuse, since it can't learn a class without one"
    )
    if gone := [name for name, there in zip(classes, here, strict=True) if not there]:
        remarks.append(f"no image of {first_few(gone, spelt=shown)}{refused}")
    train = next((splits[name] for name in ("train", "split0/train") if name in splits), None)
    if train is not None:
        learned = images_of_classes(labels[train], len(classes)) > 0
        if gone := [name for name, missed in zip(classes, here & ~learned, strict=True) if missed]:
            remarks.append(f"no training image of {first_few(gone, spelt=shown)}{refused}")
    return tuple(remarks)


def covering(corners: Corners, where: str, size: tuple[float, float] | None = None) -> Box:
    """The whole pixels that cover a box of these edges; inside the image, where its size (H, W) is
    known.

    Raises VggfeatError, which begins with `where`, for a box without an area, or outside.
    """
    x1, y1, x2, y2 = corners
    if not (np.isfinite(corners).all() and x1 < x2 and y1 < y2):
        raise VggfeatError(f"{where}: the box {_spelt(corners)} has no area")
    height, width = size or (_FURTHEST, _FURTHEST)
    left, top = max(math.floor(x1), 0), max(math.floor(y1), 0)
    right, bottom = min(math.ceil(x2), math.ceil(width)), min(math.ceil(y2), math.ceil(height))
    if left >= right or top >= bottom:
        raise VggfeatError(f"{where}: the box {_spelt(corners)} lies outside of the image")
    return left, top, right, bottom


def in_frame(corners: Corners, frame: Frame, told: tuple[float, float] | None) -> Corners | None:
    """A box of an image in the upright picture; None where it is of another picture.

    VOC's and ILSVRC's boxes are of the pixels as they are stored; so are those of a file that tells
    no size. told: (H, W) as it is told beside the box: where that is the upright picture's alone,
    as annotators see it, the box is, too.
    """
    if told in (None, (frame.height, frame.width)):
        return frame.turned(*corners)
    return corners if told == frame.upright else None


def _spelt(corners: Corners) -> str:
    return ",".join(f"{side:g}" for side in corners)


@dataclass(frozen=True)
class Items:
    """N images in the dataset's own order, with labels and splits.

    dataset: name given to `--dataset`.
    protocol: how a classifier is scored on it: one of `protocol.PROTOCOLS`, or "unlabelled".
    root: folder to which names are relative.
    names: N paths relative to root, with forward slashes; a name is unique.
    boxes: (N, 4) int32 left, top, right, bottom in pixels, where items are boxes in images; a row
        of zeros is the whole image. None: items are images.
    files: N paths, where names are of boxes and aren't paths; an image may have several. Else None.
    labels: (N,) int32, index into classes, -1 where unknown; or (N, C) int8: 1 present, -1 absent,
        0 difficult (left out for that class), a row of zeros where unknown; None when there are
        none at all.
    classes: C names.
    splits: name -> (n,) int64 rows. Official ones are "train", "val", "test"; the random splits of
        a protocol are "split0/train", "split0/val", "split0/test", "split1/train" …
    images: (N, H, W) or (N, H, W, 3) uint8 for a dataset that lives in memory; or (N,) objects, the
        bytes of N files; else None.
    url: of the folder in a store to which names are relative, "" where they are URLs themselves;
        root is of no use then, and images are read by `shards` alone. None: they are files here.
    containers: whether each item is a file with many images in it, of which nobody knows how many;
        `shards` reads them.
    lists: files that were read for all this, relative to root, or absolute where they lie
        elsewhere; no command may write them.
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
    url: str | None = None
    containers: bool = False
    boxes: np.ndarray | None = None
    files: list[str] | None = None
    lists: list[str] = field(default_factory=list)
    remarks: tuple[str, ...] = ()
    total: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> Iterator[Path]:
        """The files that are read here: lists and images; none of a dataset that lives in memory,
        or in a store.
        """
        return (
            iter(())
            if self.images is not None or self.url is not None
            else map(self.root.joinpath, (*self.lists, *dict.fromkeys(self.files or self.names)))
        )

    def source(self, i: int) -> Path | np.ndarray | bytes:
        """Where the image of item i is: a path, its pixels, or the bytes of its file. Raises
        VggfeatError where it is in a store.
        """
        if self.images is not None:
            here: np.ndarray | bytes = self.images[i]
            return here
        if self.url is not None or self.containers:
            what = "holds many images" if self.containers else "is in a store"
            raise VggfeatError(
                f"{self.address(i)} {what}; such are described into a set of shards: give `out` a"
                " folder, as DIR/, or a URL"
            )
        return self.root / (self.files or self.names)[i]

    def address(self, i: int) -> str:
        """The path or URL of item i's file."""
        name = (self.files or self.names)[i]
        if self.url is None:
            return str(self.root / name)
        return f"{self.url}/{name}" if self.url else name

    def by_file(self) -> tuple[Items, np.ndarray]:
        """The images that the items lie in, each once, in the items' order, without labels and
        boxes; and (N,) int64, which of them each item's is.
        """
        if self.files is None:
            return self, np.arange(len(self))
        place = {name: i for i, name in enumerate(dict.fromkeys(self.files))}
        file_N = np.array([place[name] for name in self.files], np.int64)
        first = np.unique(file_N, return_index=True)[1]
        images = replace(
            self,
            names=list(place),
            labels=None,
            splits={},
            images=None if self.images is None else self.images[first],
            boxes=None,
            files=None,
        )
        return images, file_N

    def take(self, rows: np.ndarray) -> Items:
        """The items of these rows, in their order; splits keep what is left of them.

        rows: (n,) different integers.
        """
        place = np.full(len(self), -1, np.int64)
        place[rows] = np.arange(len(rows))
        splits = {name: place[split] for name, split in self.splits.items()}
        return replace(
            self,
            names=[self.names[i] for i in rows],
            labels=None if self.labels is None else self.labels[rows],
            splits={name: split[split >= 0] for name, split in splits.items()},
            images=None if self.images is None else self.images[rows],
            boxes=None if self.boxes is None else self.boxes[rows],
            files=None if self.files is None else [self.files[i] for i in rows],
        )

    def first(self, limit: int) -> Items:
        """The first `limit` items, and how many there are; it is told where classes lack images."""
        if limit >= len(self):
            return self
        taken = replace(self.take(np.arange(limit)), total=self.total or len(self))
        if taken.labels is None:
            return taken
        n = np.count_nonzero(images_of_classes(taken.labels, len(self.classes)))
        if n == len(self.classes):
            return taken
        remark = (
            f"`limit` {limit:,} takes the first images, of {n:,} of the"
            f" {len(self.classes):,} classes"
        )
        return replace(taken, remarks=(*self.remarks, remark))


def class_names(labels: np.ndarray | None, classes: Sequence[str], row: int) -> list[str]:
    """Names of the classes that an image belongs to; none where that is not known. labels: of all
    images, as of `Items`.
    """
    if labels is None:
        return []
    own = labels[row]
    if own.ndim:
        return [classes[k] for k in np.flatnonzero(own == 1).tolist()]
    return [classes[int(own)]] if own >= 0 else []
