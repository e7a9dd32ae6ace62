"""Caltech-101 and Caltech-256: one folder a class, the background class included (102 and 257
classes).

    101_ObjectCategories/accordion/image_0001.jpg
    256_ObjectCategories/001.ak47/001_0001.jpg

Three random splits, as in Appendix B of the paper: 30 training images a class and up to 50 test
images for Caltech-101, 60 and the rest for Caltech-256; 20% of the training images choose
hyper-parameters.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from vggfeat.datasets.download import downloading, need_root
from vggfeat.datasets.folder import LeftOut, children, refuse_links
from vggfeat.datasets.items import Items
from vggfeat.datasets.protocol import PROTOCOLS, remarks_on
from vggfeat.errors import NoData, VggfeatError

_CATEGORIES = {"caltech101": "101_ObjectCategories", "caltech256": "256_ObjectCategories"}


def load(root: Path | None, *, dataset: str) -> Items:
    """`dataset` ("caltech101" or "caltech256"): classes sorted by name, images by name within a
    class.

    root: holds 101_ObjectCategories (256_ObjectCategories), holds torchvision's caltech101
        (caltech256) folder, or is the ObjectCategories folder itself; names are relative to that
        one.
    labels: (N,) int32.
    Raises VggfeatError naming the folder that is missing or has no images.
    """
    root = need_root(dataset, root, f"the folder that holds {_CATEGORIES[dataset]}")
    folder = _find(root, dataset)
    left = LeftOut()
    classes, beside = children(folder, left)
    refuse_links(folder, classes)
    for image in beside:
        left.add("image{s} outside the class folders", image)
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        # Only the class's own .jpg files: the archives hold strays (a `greg` folder, `RENAME2`,
        # `tmp`).
        inner, found = children(folder / name, left, name)
        images = [image for image in found if image.lower().endswith(".jpg")]
        for stray in inner:
            left.add("folder{s} inside a class", f"{name}/{stray}")
        for stray in found:
            if not stray.lower().endswith(".jpg"):
                left.add("image{s} other than .jpg", f"{name}/{stray}")
        if not images:
            where = folder.absolute() / name
            raise VggfeatError(f"no .jpg images in {where}: remove it, or unpack the archive again")
        names += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    if not names:
        raise VggfeatError(f"no class folders in {folder.absolute()}: unpack the archive again")
    label_array = np.array(labels, np.int32)
    splits = PROTOCOLS[dataset].splits(label_array)
    remarks = (*left.remarks(), *remarks_on(dataset, len(classes), splits))
    return Items(dataset, dataset, folder, names, label_array, classes, splits, remarks=remarks)


def _find(root: Path, dataset: str) -> Path:
    """The ObjectCategories folder at or under root."""
    categories = _CATEGORIES[dataset]
    candidates = [root / categories, root / dataset / categories]
    if root.absolute().name == categories:
        candidates.append(root)
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = " or ".join(str(folder.absolute()) for folder in candidates)
    raise NoData(
        f"no folder {looked}: give `root` the folder that holds {categories}, or add `download`"
    )


def fetch(root: Path, *, dataset: str) -> None:
    """Leave ROOT/caltech101/101_ObjectCategories (or 256), unless it is found already.

    torchvision takes any ObjectCategories folder for a complete one, even half unpacked. So it
    unpacks in a folder of its own, and the finished one is moved into place at once.
    """
    try:
        _find(root, dataset)
        return
    except VggfeatError:
        pass
    categories = _CATEGORIES[dataset]
    partial = root / f"{dataset}.partial"
    with downloading(dataset, root):
        from torchvision.datasets import Caltech101, Caltech256

        shutil.rmtree(partial / dataset / categories, ignore_errors=True)
        if dataset == "caltech101":
            Caltech101(partial, download=True)
        else:
            Caltech256(str(partial), download=True)
        (root / dataset).mkdir(exist_ok=True)
        os.replace(partial / dataset / categories, root / dataset / categories)
        shutil.rmtree(partial)
