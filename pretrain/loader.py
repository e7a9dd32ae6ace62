"""Which image each process reads at each iteration. B batch size.

A training set is the rows of an `Items` that may be learned from, less a held-out slice; the order
of an epoch, and everything random about a sample, follow from (seed, stage, epoch, sample). So the
batch of an iteration is the same whatever the number of processes, and each reads its own
contiguous part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

import numpy as np

from pretrain.augment import ORDER, keyed
from pretrain.readers import NO_BOXES, Key
from pretrain.recipe import LOCALISATION, Recipe, Stage
from vggfeat import datasets
from vggfeat.checked import first_few
from vggfeat.datasets import Items, folder, imagenet
from vggfeat.datasets.boxes import Boxes, read_boxes
from vggfeat.errors import VggfeatError
from vggfeat.ranks import Ranks


@dataclass(frozen=True)
class TrainingSet:
    """Images to learn from, images that steer the schedule, images that only report.

    items: all of them. train, held_out, val: rows of items, in the dataset's order; val may be
    empty. boxes: of all images, each of its image's own class, for localisation.
    """

    items: Items
    train: np.ndarray
    held_out: np.ndarray
    val: np.ndarray
    boxes: Boxes | None = None

    @property
    def classes(self) -> list[str]:
        return self.items.classes

    def without(self, unreadable: set[str]) -> TrainingSet:
        """Less the images of these names; val keeps them, so that its error counts them."""

        def readable(rows: np.ndarray) -> np.ndarray:
            return np.array([i for i in rows if self.items.names[i] not in unreadable], np.int64)

        return replace(self, train=readable(self.train), held_out=readable(self.held_out))

    def with_boxes(self, source: Path) -> TrainingSet:
        """With the boxes of `datasets.boxes.read_boxes`. An image is learned by those of its own
        class.
        """
        boxes, remarks = read_boxes(source, self.items)
        labels, names = cast(np.ndarray, self.items.labels), self.items.names
        own = boxes.labels_M == labels[boxes.rows_M]
        mine = Boxes(*(getattr(boxes, f.name)[own] for f in fields(boxes)))
        if not own.all():
            others = np.unique(boxes.rows_M[~own])
            bare = np.setdiff1d(others, mine.rows_M)
            remarks = (
                *remarks,
                f"left out: {np.count_nonzero(~own):,} boxes of another class than their image's"
                f" ({first_few([names[i] for i in others], 3)}); {len(bare):,} of these images"
                " have no box of their own"
                + (f" ({first_few([names[i] for i in bare], 3)})" if len(bare) else ""),
            )
        learned = {*labels[np.intersect1d(mine.rows_M, self.train)].tolist()}
        lacking = [c for k, c in enumerate(self.classes) if k not in learned]
        if lacking:
            remarks = (
                *remarks,
                f"no training image with a box of the class{'' if len(lacking) == 1 else 'es'}"
                f" {first_few(lacking)}: a net that says a box of each class (pcr) can't learn"
                " theirs",
            )
        items = replace(self.items, remarks=(*self.items.remarks, *remarks))
        return replace(self, items=items, boxes=mine)

    def names(self) -> list[str]:
        """Of all images that a run has for training, held-out ones too, in their order: by these a
        training set is known again.
        """
        rows = np.sort(np.concatenate([self.train, self.held_out]))
        return [self.items.names[i] for i in rows]

    def of_stage(self, stage: Stage, batch_size: int) -> TrainingSet:
        """The images that a stage learns from: for localisation those that have a box. Raises
        VggfeatError where they are fewer than a batch.
        """
        if stage.task != LOCALISATION:
            return replace(self, boxes=None)
        if self.boxes is None:
            raise VggfeatError(
                f"stage {stage.name} learns boxes: give `annotations`, where they are"
            )
        train, held_out, val = (
            np.intersect1d(rows, self.boxes.rows_M)
            for rows in (self.train, self.held_out, self.val)
        )
        if len(train) < batch_size:
            raise VggfeatError(
                f"stage {stage.name}: {len(train)} training images with a box are fewer than one"
                f" batch of {batch_size}: give `set` batch_size=N"
            )
        return replace(self, train=train, held_out=held_out, val=val)

    def boxes_digest(self) -> str:
        """sha256 of the boxes that are learned from and checked with."""
        assert self.boxes is not None, "a stage of localisation has them"
        digest = hashlib.sha256(self.boxes.rows_M.astype("<i8").tobytes())
        digest.update(self.boxes.corners_M4.astype("<f8").tobytes())
        return digest.hexdigest()

    def corners(self, row: int) -> np.ndarray:
        """(k, 4): the true boxes of an image; (0, 4) where none are asked for."""
        if self.boxes is None:
            return NO_BOXES
        low, high = np.searchsorted(self.boxes.rows_M, [row, row + 1])
        return self.boxes.corners_M4[low:high]


def read_training_set(root: Path, recipe: Recipe) -> TrainingSet:
    """root/train/CLASS/IMAGE (and root/val), as ImageNet; or one folder a class, a fifth of it kept
    for val.

    The parts may have any of the names that `datasets.splits.parts_among` knows.

    Raises VggfeatError: another layout, a class without images, fewer training images than a batch
    has.
    """
    subfolders, _ = folder.children(root) if root.is_dir() else ([], [])
    # a class may be called train: it holds images, where a part holds folders
    base = imagenet.with_parts(root) if subfolders else root
    in_parts = subfolders and any(
        folder.children(base / s)[0] for s in imagenet.part_folders(base).values()
    )
    items = datasets.load("folder" if subfolders and not in_parts else "imagenet", root)
    if items.labels is None or "unlabelled" in items.protocol:
        raise VggfeatError(f"{root} has no labels: put its images in one folder per class")
    if "split0/train" in items.splits:
        train = np.sort(np.concatenate([items.splits["split0/train"], items.splits["split0/val"]]))
        val = items.splits["split0/test"]
        said = (
            f"no folders train and val: of the {len(items):,} images {len(train):,} are for"
            f" training (split0's train and val), {len(val):,} (its test) only report the"
            " validation error; `vggfeat svm` tests this net fairly in split0 alone, as `vggfeat"
            " extract --dataset folder` draws it: these images by another name have other splits"
        )
        items = replace(items, remarks=(*items.remarks, said))
    elif "train" in items.splits:
        train = items.splits["train"]
        val = items.splits.get("val", np.zeros(0, np.int64))
    else:
        raise VggfeatError(
            f"no folder {root}/train to learn from: expected train/CLASS/IMAGE, and val/CLASS/IMAGE"
        )
    held_out = held_out_slice(items, train, recipe.held_out, recipe.seed)
    learned = np.setdiff1d(train, held_out)
    if len(learned) < recipe.batch_size:
        raise VggfeatError(
            f"{len(learned)} training images are fewer than one batch of {recipe.batch_size}: give"
            " `set` batch_size=N"
        )
    return TrainingSet(items, learned, held_out, val)


def held_out_slice(items: Items, train: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of the held-out slice, sorted: of each class, the share of images whose hashed names
    come first.

    By name, so that adding or removing an image leaves the others where they were. At least one
    image a class, unless share is 0 or the class has only one.
    """
    assert items.labels is not None
    rows: list[int] = []
    for label in range(len(items.classes)):
        of_class = train[items.labels[train] == label]
        n = min(max(1, round(share * len(of_class))), len(of_class) - 1) if share else 0
        digest = {
            i: (
                hashlib.sha256(
                    f"{seed} {items.names[i]}".encode("utf-8", "surrogateescape")
                ).digest()
            )
            for i in of_class
        }
        rows += sorted(of_class, key=digest.__getitem__)[: max(n, 0)]
    return np.sort(np.array(rows, np.int64))


@dataclass
class Schedule:
    """Keys of this process's samples, one list an iteration, from iteration `start` to `stop`.

    An epoch is len(train) // batch_size iterations in an order of its own; what is left over waits
    for another epoch.
    """

    train: np.ndarray
    recipe: Recipe
    stage_number: int
    ranks: Ranks
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[Key]]:
        size = self.recipe.batch_size
        per_epoch = len(self.train) // size
        order, of_epoch = self.train, -1
        for iteration in range(self.start, self.stop):
            epoch, position = divmod(iteration, per_epoch)
            if epoch != of_epoch:
                rng = keyed(self.recipe.seed, ORDER, self.stage_number, epoch)
                order, of_epoch = rng.permutation(self.train), epoch
            low, high = self.ranks.share(position * size, (position + 1) * size)
            yield [(epoch, int(row)) for row in order[low:high]]

    def __len__(self) -> int:
        return self.stop - self.start
