"""What is about to be described, before it is: sizes from the images' headers, classes and splits,
in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vggfeat.datasets import Items
from vggfeat.datasets.items import counted
from vggfeat.decode import read_rgb, upright_shape
from vggfeat.errors import UnreachableImage, UnreadableImage, VggfeatError
from vggfeat.regions import cut, cut_shape
from vggfeat.store import Description
from vggfeat.table1 import NETS
from vggfeat.weights import Network

LOOKED_AT = 256  # images whose headers are read before an extraction
LOOK_BYTES = 512 << 20  # of files that are read for that
# so many files that can't be opened are no accident: in a row, or as more than half of some
MISSING = 100
DECODED = 4  # of those whose headers don't tell their size
LONG = 120.0  # seconds, from which on a cheaper setting is worth a word
WORTH = 2.0  # times as fast, at least


@dataclass(frozen=True)
class Look:
    """What the headers of some of the images tell.

    images: N. looked: how many headers were asked for. shapes: row -> (H, W) upright, in the order
    of the rows, of those that tell it. unreadable: name -> reason.
    """

    images: int
    looked: int
    shapes: dict[int, tuple[int, int]]
    unreadable: dict[str, str]

    @property
    def sides(self) -> list[int]:
        """The smallest sides in pixels, rising."""
        return sorted(map(min, self.shapes.values()))

    @property
    def smallest_sides(self) -> tuple[int, int, int]:
        """The least, the median and the largest of them."""
        sides = self.sides
        return sides[0], sides[len(sides) // 2], sides[-1]

    def enlarged(self, Q: int) -> int:
        """How many of the images get larger at this Q."""
        return sum(side < Q for side in self.sides)


def look(items: Items, most: int = LOOKED_AT) -> Look:
    """Read the headers of up to `most` of the images (or views of them, see `regions`), evenly
    spread; fewer where their files are large.

    Raises VggfeatError: there are no images; none can be read; most of those that were looked at
    aren't there.
    """
    if not len(items):
        raise VggfeatError(f"{items.root} has no images to extract")
    rows = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))
    shapes: dict[int, tuple[int, int]] = {}
    failures: dict[int, str] = {}
    missing, looked, n_bytes = 0, 0, 0
    # in an order of their own, so that those that are read before LOOK_BYTES are evenly spread, too
    for i in np.random.default_rng(0).permutation(rows).tolist():
        source = items.source(i)
        try:
            if isinstance(source, Path) and n_bytes > LOOK_BYTES:
                break
            looked += 1
            if shape := upright_shape(source):
                shapes[i] = cut_shape(shape, items, i)
            elif len(shapes) < DECODED:
                shapes[i] = cut(read_rgb(source), items, i).shape[:2]
            n_bytes += source.stat().st_size if isinstance(source, Path) else 0
        except UnreadableImage as error:
            failures[i] = str(error)
            missing += isinstance(error, UnreachableImage)
        except OSError:
            continue  # it has gone since
    unreadable = {items.names[i]: failures[i] for i in sorted(failures)}
    if missing == looked or (missing >= MISSING and 2 * missing > looked):
        name, why = next(iter(unreadable.items()))
        raise VggfeatError(
            f"{missing:,} of {looked:,} images that were looked at can't be opened, the first is"
            f" {items.root / name}: {why}; unpack the images there, or bring back the disk or share"
            " that they are on"
        )
    if len(unreadable) == len(items):
        raise VggfeatError(none_readable(len(items), items, unreadable))
    return Look(len(items), looked, {i: shapes[i] for i in sorted(shapes)}, unreadable)


def none_readable(looked: int, items: Items, unreadable: dict[str, str]) -> str:
    """That not one image can be read of so many that were looked at. unreadable: name -> reason."""
    name, why = next(iter(unreadable.items()))
    what = f"{looked:,} images"
    if looked < len(items):
        what += f" that were looked at, of {len(items):,},"
    return f"none of the {what} can be read, the first is {items.root / name}: {why}"


@dataclass(frozen=True)
class Cheaper:
    """Settings that take less time: the smallest of the scales alone, without mirror images.

    share: of the time, where reading takes none of it: work goes by the number of pixels.
    """

    options: str
    share: float

    @classmethod
    def than(cls, description: Description) -> Cheaper:
        """Those that are cheaper than a description's; its own, of share 1, where there are
        none.
        """
        smallest, scales = min(description.scales), np.square(np.asarray(description.scales, float))
        return cls(
            f"`scales` {smallest} `no_mirror`",
            float(smallest**2 / scales.sum()) / (2 if description.mirror else 1),
        )

    def worth_saying(self, seconds: float, cheaper_seconds: float) -> bool:
        """Whether somebody who waits so long would like to know it."""
        return seconds > LONG and seconds > WORTH * cheaper_seconds


def foreword(
    items: Items,
    seen: Look,
    network: Network,
    description: Description,
    layer: str | Sequence[str] | None,
    scales: Sequence[int] | None,
) -> list[tuple[str, str]]:
    """What is about to be described and how, as (what, words). layer, scales: as they were given,
    None by default.
    """
    told = counted(len(items), items.total, items.labels, items.classes, items.splits)
    rows = [("images" if items.boxes is None else "boxes", told)]
    if items.boxes is not None:
        images, files = " and ".join(description.regions), len(items.by_file()[0])
        rows.append(("regions", f"{images}, {seen.images:,} pictures of {files:,} images"))
    among = (
        f"{seen.looked:,} that were looked at" if seen.looked < seen.images else f"{seen.images:,}"
    )
    if seen.unreadable:
        name, why = next(iter(seen.unreadable.items()))
        rows.append(
            (
                "can't be read",
                f"{len(seen.unreadable):,} of the {among}, the first is {name}: {why}",
            ),
        )
    if seen.shapes:
        least, median, most = seen.smallest_sides
        larger = [
            f"{seen.enlarged(q):,} at Q = {q}" for q in description.scales if seen.enlarged(q)
        ]
        enlarged = f"; enlarged, of the {among}: {', '.join(larger)}" if larger else ""
        sides = (
            f"{least:,} pixels"
            if least == most
            else f"{least:,} to {most:,} pixels, median {median:,}"
        )
        rows.append(("smallest side", sides + enlarged))
    why_scales = (
        "the net's training scales"
        if network.metadata.get("train_scale")
        else "the paper's; the weights don't tell theirs"
    )
    fc7 = "fc7" in network.layers or network.name not in NETS
    rows.append(
        (
            "descriptor",
            description.in_words(
                {name: network.dim(name) for name in description.layers},
                f" ({why_scales})" if scales is None else "",
            )
            + (
                ""
                if layer or fc7
                else f"; the weights reach {description.layer}: that layer is taken"
            ),
        )
    )
    return rows
