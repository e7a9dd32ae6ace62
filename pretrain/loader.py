"""Which image each process reads at each iteration, and the workers that read them. N images, B batch size.

A training set is the rows of an `Items` that may be learned from, less a held-out slice; the order of an epoch, and
everything random about a sample, follow from (seed, stage, epoch, sample). So the batch of an iteration is the same
whatever the number of processes, and each reads its own contiguous part of it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.augment import ORDER, SAMPLE, augmented_crop, draw, kept_units, keyed
from pretrain.recipe import Recipe, Stage
from vggfeat.datasets import Items, folder, imagenet
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import rescaled_crop, smallest_side_shape
from vggfeat.ranks import Ranks


@dataclass(frozen=True)
class TrainingSet:
    """Images to learn from, images that steer the schedule, images that only report.

    items: all of them. train, held_out, val: rows of items, in the dataset's order; val may be empty.
    """

    items: Items
    train: np.ndarray
    held_out: np.ndarray
    val: np.ndarray

    @property
    def classes(self) -> list[str]:
        return self.items.classes

    def without(self, unreadable: set[str]) -> TrainingSet:
        """Less the images of these names; val keeps them, so that its error counts them."""

        def readable(rows: np.ndarray) -> np.ndarray:
            return np.array([i for i in rows if self.items.names[i] not in unreadable], np.int64)

        return TrainingSet(self.items, readable(self.train), readable(self.held_out), self.val)


def read_training_set(root: Path, recipe: Recipe) -> TrainingSet:
    """root/train/CLASS/IMAGE (and root/val), as ImageNet; or one folder a class, a fifth of it kept for val.

    Raises VggfeatError: another layout, a class without images, fewer training images than a batch has.
    """
    if root.is_dir() and not any((root / s).is_dir() for s in ("train", "val")):
        subfolders, _ = folder.children(root)
        items = folder.load(root) if subfolders else imagenet.load(root)
    else:
        items = imagenet.load(root)
    if items.labels is None or "unlabelled" in items.protocol:
        raise VggfeatError(f"{root} has no labels: put its images in one folder per class")
    if "split0/train" in items.splits:
        train = np.sort(np.concatenate([items.splits["split0/train"], items.splits["split0/val"]]))
        val = items.splits["split0/test"]
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
            f"{len(learned)} training images are fewer than one batch of {recipe.batch_size}: give --set batch_size=N"
        )
    return TrainingSet(items, learned, held_out, val)


def held_out_slice(items: Items, train: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of the held-out slice, sorted: of each class, the share of images whose hashed names come first.

    By name, so that adding or removing an image leaves the others where they were. At least one image a class,
    unless share is 0 or the class has only one.
    """
    assert items.labels is not None
    rows: list[int] = []
    for label in range(len(items.classes)):
        of_class = train[items.labels[train] == label]
        n = min(max(1, round(share * len(of_class))), len(of_class) - 1) if share else 0
        digest = {
            i: hashlib.sha256(f"{seed} {items.names[i]}".encode("utf-8", "surrogateescape")).digest()
            for i in of_class
        }
        rows += sorted(of_class, key=digest.__getitem__)[: max(n, 0)]
    return np.sort(np.array(rows, np.int64))


class Batch(NamedTuple):
    """One process's part of a batch, n images. An unreadable image stays as a row of zeros that doesn't count."""

    crops_NHWC: Tensor
    """(n, crop, crop, 3) uint8 RGB."""
    alpha_N3: Tensor
    """(n, 3) float32: factors of the colour shift."""
    kept: Tensor
    """(n, bytes) uint8: bits of the units that dropout keeps, fc6's and fc7's."""
    labels: Tensor
    """(n,) int64."""
    counts: Tensor
    """(n,) float32: 1, or 0 for an unreadable image."""
    unreadable: list[tuple[str, str]]
    """(name, reason)."""


class Samples(Dataset):
    """Augmented training samples by key (epoch, row of items): uint8 crops, to be finished on the device."""

    def __init__(
        self, data: TrainingSet, recipe: Recipe, stage: Stage, stage_number: int, hidden_units: int
    ) -> None:
        self.items, self.recipe, self.stage, self.stage_number = data.items, recipe, stage, stage_number
        self.hidden_units = hidden_units  # of fc6 and fc7 together

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, row = key
        recipe = self.recipe
        rng = keyed(recipe.seed, SAMPLE, self.stage_number, epoch, row)
        augmentation = draw(rng, self.stage.train_scale, recipe.colour_std, recipe.flip)
        kept = kept_units(rng, self.hidden_units, recipe.dropout)
        unreadable = []
        try:
            crop = augmented_crop(read_rgb(self.items.source(row)), augmentation, recipe.crop)
        except UnreadableImage as error:
            crop = np.zeros((recipe.crop, recipe.crop, 3), np.uint8)
            unreadable.append((self.items.names[row], str(error)))
        return Batch(
            torch.from_numpy(crop),
            torch.tensor(augmentation.alpha, dtype=torch.float32),
            torch.from_numpy(kept),
            torch.tensor(int(self.items.labels[row])),  # type: ignore[index]
            torch.tensor(0.0 if unreadable else 1.0),
            unreadable,
        )


class CentreCrops(Dataset):
    """The central crop at smallest side Q, by row of items: the held-out and validation checks."""

    def __init__(self, data: TrainingSet, Q: int, crop: int) -> None:
        self.items, self.Q, self.crop = data.items, Q, crop

    def __getitem__(self, row: int) -> Batch:
        unreadable = []
        try:
            image_HWC = read_rgb(self.items.source(row))
            height, width = smallest_side_shape(image_HWC.shape[0], image_HWC.shape[1], self.Q)
            crop = rescaled_crop(
                image_HWC, self.Q, (height - self.crop) // 2, (width - self.crop) // 2, self.crop
            )
        except UnreadableImage as error:
            crop = np.zeros((self.crop, self.crop, 3), np.uint8)
            unreadable.append((self.items.names[row], str(error)))
        return Batch(
            torch.from_numpy(crop),
            torch.zeros(3),
            torch.zeros(0, dtype=torch.uint8),
            torch.tensor(int(self.items.labels[row])),  # type: ignore[index]
            torch.tensor(0.0 if unreadable else 1.0),
            unreadable,
        )


def collate(samples: list[Batch]) -> Batch:
    """n samples as one Batch."""
    crops, alpha, kept, labels, counts, unreadable = zip(*samples, strict=True)
    return Batch(
        torch.stack(crops),
        torch.stack(alpha),
        torch.stack(kept),
        torch.stack(labels),
        torch.stack(counts),
        [pair for pairs in unreadable for pair in pairs],
    )


@dataclass
class Schedule:
    """Keys of this process's samples, one list an iteration, from iteration `start` to `stop`: a batch sampler.

    An epoch is len(train) // batch_size iterations in an order of its own; what is left over waits for another epoch.
    """

    train: np.ndarray
    recipe: Recipe
    stage_number: int
    ranks: Ranks
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
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


def read_batches(dataset: Dataset, keys: object, workers: int, device: torch.device) -> Iterator[Batch]:
    """The Batches of lists of keys, in their order, read by so many processes; workers 0 reads in this one.

    Raises RuntimeError with PyTorch's words, "DataLoader worker", when one of these processes was killed.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=partial(_quiet_worker, os.getpid()),
    )
    try:
        yield from loader
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # killed as it handed over a batch
        raise RuntimeError("DataLoader worker doesn't answer") from error


def _quiet_worker(trainer: int, _: int) -> None:
    parent = multiprocessing.parent_process()
    # a fork's brothers hold its line to the parent open, so there the number must tell
    forked = multiprocessing.get_start_method() == "fork"
    if (os.getppid() != trainer) if forked else (parent is None or not parent.is_alive()):
        # Killed while this process began: PyTorch would take its heir for the trainer and wait for ever.
        os._exit(1)
    # Ctrl-C reaches the whole group: the trainer decides when its workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the trainer's handler, which a forked worker inherits
