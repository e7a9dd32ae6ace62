"""Any images: one folder a class, with or without train, val and test above; or one flat folder, no labels.

    photos/cat/1.jpg                 classes cat, dog …; three random splits, 80% train (a fifth of it val)
    photos/train/cat/1.jpg           classes cat, dog …; the splits are the folders
    photos/1.jpg                     unlabelled

What is an image is decided by its extension alone: a damaged file keeps its row, and extraction reports it.
Hidden files and folders are skipped. Folders inside a class folder belong to the class.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vggfeat.datasets.download import need_root
from vggfeat.datasets.items import Items
from vggfeat.datasets.splits import random_splits
from vggfeat.errors import VggfeatError, reason

# Compared in lower case.
IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)
TRAIN_FRACTION = 0.8
# Folder name -> split.
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def load(root: Path | None, download: bool = False) -> Items:
    """The images under `root`, in sorted order of class, then name.

    labels: (N,) int32, or None for a flat folder.
    Raises VggfeatError when the layout is none of the three above, or a class folder has no images.
    """
    if download:
        raise VggfeatError("there is nothing to download for a folder of your own: leave out `download`")
    root = need_root("folder", root, "the folder that holds one folder of images per class")
    folders, images = children(root)
    if not folders:
        if not images:
            raise VggfeatError(f"no images and no class folders in {root.absolute()}")
        return Items("folder", "unlabelled", root, images, None, [])

    given = [name for name in folders if name.lower() in _SPLITS]
    if len(given) == len(folders):
        folder_of: dict[str, str] = {}
        for name in given:
            if (other := folder_of.setdefault(_SPLITS[name.lower()], name)) != name:
                raise VggfeatError(f"{root.absolute()} holds both {other} and {name}: keep one of them")
        ordered: dict[str, str] = {
            split: folder_of[split] for split in ("train", "val", "test") if split in folder_of
        }
        return read_splits("folder", root, ordered)
    if len(given) > 1:
        others = ", ".join(name for name in folders if name not in given)
        raise VggfeatError(
            f"{root.absolute()} holds the splits {', '.join(given)} beside {others}: move those elsewhere; "
            "if they are all classes, list the images in a CSV file instead"
        )
    images_of = class_images(root)
    classes = sorted(images_of)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(images_of[name]) for name in classes])
    names = [name for label in classes for name in images_of[label]]
    splits = random_splits(labels, n_train=TRAIN_FRACTION, max_test=None)
    return Items("folder", "single-label", root, names, labels, classes, splits)


def read_splits(dataset: str, root: Path, folder_of: dict[str, str]) -> Items:
    """Items of ROOT/SPLIT/CLASS/IMAGE: split after split, then by class and name.

    folder_of: split -> its folder's name under root. The classes are those of "train" if it is among them.
    Raises VggfeatError when another split has a class that "train" lacks.
    """
    images_of = {split: class_images(root, folder) for split, folder in folder_of.items()}
    classes = sorted(images_of["train"] if "train" in images_of else set().union(*images_of.values()))
    label_of = {name: label for label, name in enumerate(classes)}
    names: list[str] = []
    labels: list[int] = []
    splits: dict[str, np.ndarray] = {}
    for split, images_of_class in images_of.items():
        start = len(names)
        for name in sorted(images_of_class):
            if name not in label_of:
                where = (root / folder_of[split] / name).absolute()
                raise VggfeatError(
                    f"{where} has no class of the same name in {folder_of['train']}: rename or move it"
                )
            names += images_of_class[name]
            labels += [label_of[name]] * len(images_of_class[name])
        splits[split] = np.arange(start, len(names), dtype=np.int64)
    return Items(dataset, "single-label", root, names, np.array(labels, np.int32), classes, splits)


def class_images(root: Path, inside: str = "") -> dict[str, list[str]]:
    """Class -> its sorted image names, relative to `root`, from one folder a class in `root / inside`.

    Raises VggfeatError when there are no class folders, images lie beside them, one has no images or links upwards.
    """
    where = root / inside
    folders, images = children(where)
    if not folders:
        raise VggfeatError(f"no class folders in {where.absolute()}: put its images in one folder per class")
    if images:
        raise VggfeatError(
            f"{where.absolute()} holds images ({images[0]}) beside folders ({folders[0]}): "
            "move the images into a class folder or elsewhere"
        )
    images_of: dict[str, list[str]] = {}
    refuse_upwards(where, folders)
    for name in folders:
        prefix = f"{inside}/{name}" if inside else name
        images_of[name] = _images_under(where / name, prefix)
        if not images_of[name]:
            raise VggfeatError(
                f"no images in the class folder {(where / name).absolute()}: add some or remove it"
            )
    return images_of


def refuse_upwards(where: Path, folders: Sequence[str]) -> None:
    """Raise VggfeatError where one of the folders in `where` is a link to a folder that holds it.

    As a class it would have the images of all the others.
    """
    above = Path(os.path.realpath(where))
    for name in folders:
        if above.is_relative_to(os.path.realpath(where / name)):
            raise VggfeatError(f"{(where / name).absolute()} is a link to a folder that holds it: remove it")


def children(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the images directly in `folder`, each sorted; links are followed.

    Raises VggfeatError when `folder` is not a folder or can't be listed.
    """
    folders, images = [], []
    for entry in _entries(folder):
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            folders.append(entry.name)
        elif _is_image(entry):
            images.append(entry.name)
    return sorted(folders), sorted(images)


def _images_under(folder: Path, prefix: str) -> list[str]:
    """Sorted names, each `prefix`/…, of all images in `folder` and the folders inside it.

    Linked folders inside are not entered: they could lead back up for ever.
    """
    names = []
    stack: list[tuple[str | Path, str]] = [(folder, prefix)]
    while stack:
        where, prefix = stack.pop()
        for entry in _entries(where):
            if entry.is_dir(follow_symlinks=False):
                stack.append((entry.path, f"{prefix}/{entry.name}"))
            elif _is_image(entry):
                names.append(f"{prefix}/{entry.name}")
    return sorted(names)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except FileNotFoundError:
        raise VggfeatError(f"no folder {os.path.abspath(folder)}: check `root`") from None
    except OSError as error:
        raise VggfeatError(f"can't list the folder {os.path.abspath(folder)}: {reason(error)}") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    """A file, or a link to one, with an image's extension.

    A dangling link counts, so that extraction reports it; a pipe or a device doesn't: reading it could hang.
    """
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS:
        return False
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()
