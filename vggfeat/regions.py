"""What of an image is described: all of it, a box in it, or both (Table 12 of the paper).

A view is one picture that goes through the net: an image, or what lies in a box. An image that
several items lie in is one view for all of them. The descriptor of a box is that of the image cut
there, at whole pixels, and rescaled as any image; each view reads its file by itself, since images
of one shape are described together, and the views of one file have different shapes.

N items, V views, R regions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vggfeat.datasets import Items
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.store import REGIONS


@dataclass(frozen=True)
class Views:
    """What is to be described of some items, in the order of their images.

    items: V items, each a view, with its box (zeros: the whole image), without labels. region_V:
    which of the regions. file_V: which of the images. view_NR: the view of each item's region.
    """

    items: Items
    region_V: np.ndarray
    file_V: np.ndarray
    view_NR: np.ndarray

    def __len__(self) -> int:
        return len(self.region_V)

    def rows(self) -> Callable[[int], list[int]]:
        """view -> the items that it is of."""
        order = np.argsort(self.view_NR.ravel(), kind="stable")
        starts = np.searchsorted(self.view_NR.ravel()[order], np.arange(len(self) + 1))
        rows = order // self.view_NR.shape[1]
        return lambda view: rows[starts[view] : starts[view + 1]].tolist()

    def done(self, described: np.ndarray) -> np.ndarray:
        """(V, Q) bool: views that all their items have. described: (N, R * Q) bool."""
        n, regions = self.view_NR.shape
        done_VQ = np.ones((len(self), described.shape[1] // regions), bool)
        by_region = described.reshape(n, regions, -1)
        for r in range(regions):
            np.logical_and.at(done_VQ, self.view_NR[:, r], by_region[:, r])
        return done_VQ


def regions_of(items: Items, asked: str | None) -> tuple[str, ...]:
    """The regions to describe, in the order of `REGIONS`. asked: "image", "box" or "image,box";
    None: both where the items have boxes, as the paper's best row has it.

    Raises VggfeatError for boxes that there aren't.
    """
    if asked is None:
        return REGIONS if items.boxes is not None else REGIONS[:1]
    words = asked.split(",")
    if not set(words) <= set(REGIONS) or len(set(words)) < len(words):
        raise VggfeatError(f"`regions` must be image, box or image,box, not {asked}")
    if "box" in words and items.boxes is None:
        raise VggfeatError(
            f"`regions` {asked} needs a box of each item, and {items.dataset} has none here: leave"
            " it out, or describe voc2012action or a CSV file with the columns x1,y1,x2,y2"
        )
    return tuple(region for region in REGIONS if region in words)


def views_of(items: Items, regions: tuple[str, ...]) -> Views:
    """The views of these regions of all items."""
    images, file_N = items.by_file()
    n, every = len(items), np.arange(len(items))
    if regions == REGIONS[:1]:
        return Views(
            images, np.zeros(len(images), np.int64), np.arange(len(images)), file_N[:, None]
        )
    assert items.boxes is not None  # `regions_of` has asked
    # file, region, item of each view; -1: an image's
    keys = [(file_N, np.full(n, regions.index("box")), every)]
    if "image" in regions:
        files = np.arange(len(images))
        keys.insert(0, (files, np.zeros(len(files), np.int64), np.full(len(files), -1)))
    file_V, region_V, item_V = (np.concatenate(parts) for parts in zip(*keys, strict=True))
    order = np.lexsort((item_V, region_V, file_V))
    file_V, region_V, item_V = file_V[order], region_V[order], item_V[order]
    boxes = np.zeros((len(order), 4), np.int32)
    boxes[item_V >= 0] = items.boxes[item_V[item_V >= 0]]
    names = [
        images.names[f] if i < 0 else items.names[i] for f, i in zip(file_V, item_V, strict=True)
    ]
    view_NR = np.empty((n, len(regions)), np.int64)
    view_NR[item_V[item_V >= 0], regions.index("box")] = np.flatnonzero(item_V >= 0)
    if "image" in regions:
        view_NR[:, 0] = np.flatnonzero(item_V < 0)[file_N]
    views = replace(
        images,
        names=names,
        boxes=boxes,
        files=[images.names[f] for f in file_V],
        images=None if images.images is None else images.images[file_V],
    )
    return Views(views, region_V, file_V, view_NR)


def cut(image_HWC: np.ndarray, items: Items, i: int) -> np.ndarray:
    """What item i is of its image, (H, W, 3): the box, where the image has it.

    Raises UnreadableImage for a box that lies outside.
    """
    place = _inside(items, i, image_HWC.shape[:2])
    if place is None:
        return image_HWC
    left, top, right, bottom = place
    return np.ascontiguousarray(image_HWC[top:bottom, left:right])


def picture_of(items: Items, i: int) -> np.ndarray:
    """What is seen of item i, (H, W, 3), read from where it lies. Raises UnreadableImage."""
    return cut(read_rgb(items.source(i)), items, i)


def cut_shape(shape: tuple[int, int], items: Items, i: int) -> tuple[int, int]:
    """(H, W) of `cut`, of an image of that shape. Raises UnreadableImage as it does."""
    place = _inside(items, i, shape)
    return shape if place is None else (place[3] - place[1], place[2] - place[0])


def _inside(items: Items, i: int, shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """The part of item i's box that its image (H, W) has; None: all of the image."""
    if items.boxes is None or not items.boxes[i].any():
        return None
    left, top, right, bottom = items.boxes[i].tolist()
    height, width = shape
    place = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if place[0] >= place[2] or place[1] >= place[3]:
        raise UnreadableImage(
            f"its box {left},{top},{right},{bottom} lies outside of the image of {width}x{height}"
            " pixels"
        )
    return place
