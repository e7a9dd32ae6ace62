"""Datasets as Items: which images, in which order, with which labels and which official splits.

A dataset is read from what its official archive (or torchvision's downloader) leaves on disk.
Nothing here opens an image; `Items.source(i)` says where image i is.

    items = vggfeat.datasets.load("voc2007", Path("data"))     # data/VOCdevkit/VOC2007
    items.names[0], items.labels[0], items.splits["train"]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vggfeat.checked import shown
from vggfeat.datasets import (
    caltech,
    containers,
    csv_file,
    digits,
    folder,
    imagenet,
    photographs,
    voc,
    voc_action,
)
from vggfeat.datasets.items import Items
from vggfeat.datasets.remote import load_remote
from vggfeat.datasets.splits import random_splits
from vggfeat.errors import NoData, VggfeatError, WrongUsage
from vggfeat.place import is_url

__all__ = [
    "Items",
    "at_hand",
    "describe_datasets",
    "load",
    "random_splits",
    "refuse_absent",
    "refuse_idle_root",
]


@dataclass(frozen=True)
class _Dataset:
    """One entry of the registry.

    read: root (a Path, or as it was typed where it is a pattern; None where there is none) ->
        Items.
    fetch: (root) leaves the data set there, unless it is there whole; or, in words, why none does.
    about: what it is and how it is split, in one line.
    files: what is looked for under `--root`; where that is nothing, "none: " and why.
    absent: what to do where none of its images is there.
    in_memory: whether its images are read without a root, as pixels.
    by_pattern: whether its root is a pattern of files, or of URLs, and no folder. lists: whether
    what a text or table in it holds matters, beside the names.
    """

    read: Callable[[Any], Items]
    fetch: Callable[[Path], None] | str
    about: str
    files: str
    absent: str = "these are links that lead nowhere"
    in_memory: bool = False
    by_pattern: bool = False
    lists: bool = True


_DATASETS = {
    "voc2007": _Dataset(
        partial(voc.load, year=2007),
        partial(voc.fetch, year=2007),
        "PASCAL VOC 2007: 9,963 images, 20 classes, several an image; official train/val/test;"
        " 11-point mAP",
        "ROOT/VOCdevkit/VOC2007/{ImageSets/Main,JPEGImages}",
        "unpack the official archive there, or add `download`",
    ),
    "voc2012": _Dataset(
        partial(voc.load, year=2012),
        partial(voc.fetch, year=2012),
        "PASCAL VOC 2012: 11,540 labelled images, 20 classes, several an image; official"
        " train/val; mAP",
        "ROOT/VOCdevkit/VOC2012/{ImageSets/Main,JPEGImages}",
        "unpack the official archive there, or add `download`",
    ),
    "voc2012action": _Dataset(
        voc_action.load,
        partial(voc.fetch, year=2012, read=voc_action.load),
        "PASCAL VOC 2012 action: persons in boxes, in 4,600 labelled images; 11 actions, several a"
        " person; official train/val; mAP",
        "ROOT/VOCdevkit/VOC2012/{ImageSets/Action,Annotations,JPEGImages}",
        "unpack the official archive there, or add `download`",
    ),
    "caltech101": _Dataset(
        partial(caltech.load, dataset="caltech101"),
        partial(caltech.fetch, dataset="caltech101"),
        "Caltech-101: 102 classes with the background; 3 random splits, 30 train and up to 50 test"
        " a class",
        "ROOT/101_ObjectCategories/CLASS/*.jpg, or under ROOT/caltech101",
        lists=False,
    ),
    "caltech256": _Dataset(
        partial(caltech.load, dataset="caltech256"),
        partial(caltech.fetch, dataset="caltech256"),
        "Caltech-256: 257 classes with clutter; 3 random splits, 60 train a class, the rest test",
        "ROOT/256_ObjectCategories/CLASS/*.jpg, or under ROOT/caltech256",
        lists=False,
    ),
    "imagenet": _Dataset(
        imagenet.load,
        "imagenet has no open download: get it from image-net.org, then",
        "ILSVRC-2012 or any part of it; classes are the sorted synset ids",
        "ROOT/train/WNID/*.JPEG and ROOT/val/WNID/*.JPEG, or one of the two; or a flat ROOT/val,"
        " with the devkit or Kaggle's LOC_val_solution.csv beside it",
    ),
    "folder": _Dataset(
        folder.load,
        "there is nothing to download for a folder of your own:",
        "your images, one folder a class, or one flat folder, unlabelled; 3 random 80/20 splits"
        " unless given",
        "ROOT/CLASS/*.jpg, ROOT/{train,val,test}/CLASS/*.jpg, or ROOT/*.jpg",
        lists=False,
    ),
    "csv": _Dataset(
        csv_file.load,
        "there is nothing to download for a CSV file of your own:",
        "your images, listed with one label or several each; splits as listed, or 3 random 80/20",
        "ROOT is the file: path,label[,split]; or path,labels[,split] with ';' between labels; or"
        " 0/1 columns",
        "paths are relative to the CSV file's folder, or absolute",
    ),
    "webdataset": _Dataset(
        containers.load_tars,
        "there is nothing to download for tars of your own:",
        "WebDataset's tars, here or in a store, each a shard of a set; labels from .cls, splits"
        " from the tars' names or 3 random 80/20",
        "ROOT is a pattern of tars: 'train-{0000..0127}.tar', 's3://bucket/*.tar', or their folder",
        by_pattern=True,
    ),
    "parquet": _Dataset(
        containers.load_parquet,
        "there is nothing to download for Parquet files of your own:",
        "Parquet or Arrow files with images inside, as Hugging Face's, each a shard of a set; or"
        " that list images; splits as listed or named, or 3 random 80/20",
        "ROOT is a pattern of files: 'hf://datasets/OWNER/NAME/data/*.parquet'; a column image, or"
        " path; label, split",
        "paths are relative to the Parquet file's folder, absolute, or URLs",
        by_pattern=True,
    ),
    "photographs": _Dataset(
        photographs.load,
        "there is nothing to download for photographs, they come with scikit-learn and"
        " scikit-image:",
        "269 pieces of twelve photographs, no pixel in two of them; the class is the photograph;"
        " 3 random 80/20 splits",
        "none: they come with scikit-learn and scikit-image",
        in_memory=True,
    ),
    "digits": _Dataset(
        digits.load,
        "there is nothing to download for digits, it comes with scikit-learn:",
        "scikit-learn's 1,797 handwritten digits of 8x8 pixels, 10 classes; 3 random 80/20 splits",
        "none: it comes with scikit-learn",
        in_memory=True,
    ),
}


def load(name: str, root: Path | str | None = None, *, download: bool = False) -> Items:
    """The images, labels and splits of dataset `name`, read from under `root`, a folder or the URL
    of one in a store.

    download: fetch it into `root` first unless it is already there whole (VOC and Caltech only).
    Raises VggfeatError when the name is unknown, or a file or folder is missing or malformed (it is
    named).
    """
    if name not in _DATASETS:
        raise WrongUsage(f"there is no dataset {name!r}; choose one of {', '.join(_DATASETS)}")
    entry = _DATASETS[name]
    if download and isinstance(entry.fetch, str):
        raise WrongUsage(f"{entry.fetch} leave out `download`")
    if entry.by_pattern:
        return entry.read(None if root is None else os.fspath(root))
    if isinstance(root, str) and is_url(root) and not entry.in_memory:
        if download:
            raise WrongUsage("`download` is into a folder of this machine: give `root` such a one")
        return load_remote(root, entry.read, lists=entry.lists)
    where = None if root is None else Path(root)
    if download and not isinstance(entry.fetch, str) and where is not None:
        entry.fetch(where)  # where there is none, reading says what is needed
    return entry.read(where)


def refuse_idle_root(name: str) -> None:
    """Raise WrongUsage where `name` is a dataset that reads nothing under a root."""
    if name in _DATASETS and _DATASETS[name].in_memory:
        why = _DATASETS[name].files.removeprefix("none: ")
        raise WrongUsage(f"there is nothing to read for {name}, {why}: leave out `root`")


def refuse_absent(items: Items) -> None:
    """Raise VggfeatError where none of the images is there: lists without the images, links that
    lead nowhere.
    """
    names = items.by_file()[0].names
    paths = map(items.root.absolute().joinpath, names)
    if (
        items.images is None
        and items.url is None
        and not items.containers
        and names
        and not any(map(os.path.isfile, paths))
    ):
        first = items.root.absolute() / names[0]
        raise NoData(
            f"none of the {len(names):,} images of {items.dataset} is there, such as {first}: "
            f"{_DATASETS[items.dataset].absent}"
        )


def at_hand(
    name: str,
    names: Sequence[str],
    root: Path | None,
    stored: str,
    *,
    files: Sequence[str] | None = None,
    boxes: np.ndarray | None = None,
) -> tuple[Items | None, str]:
    """The images of dataset `name`, for looking at some of them; or None, and why they are not
    there.

    names, files, boxes: of those that are wanted, as `Items` has them; one of them must be there.
    root: as of `load`. None: they are where they were described, below the folder `stored`; it and
    the names are a file's word, so no name leads out of the folder.
    """
    if root is not None or (name in _DATASETS and _DATASETS[name].in_memory):
        try:
            items = load(name, root)
            refuse_absent(items)
        except VggfeatError as error:
            return None, f"the images are not at hand ({error})"
        if not set(names) & set(items.names):
            return None, f"the images are not at hand ({root} has others)"
        return items, ""
    paths = names if files is None else files
    inside = [i for i, path in enumerate(paths) if _stays_inside(path)]
    if not os.path.isdir(stored) or not any(
        os.path.isfile(os.path.join(stored, paths[i])) for i in inside
    ):
        return (
            None,
            (
                f"the images are not at hand (none is left in {shown(stored)}: `root` says where"
                " they are)"
            ),
        )
    items = Items(
        name,
        "unlabelled",
        Path(stored),
        [names[i] for i in inside],
        None,
        [],
        boxes=None if boxes is None else boxes[inside],
        files=None if files is None else [files[i] for i in inside],
    )
    return items, ""


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def describe_datasets() -> list[tuple[str, str, str]]:
    """For each dataset: its name, what it is in one line, and where its files are expected."""
    return [(name, dataset.about, dataset.files) for name, dataset in _DATASETS.items()]
