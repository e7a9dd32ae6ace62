"""Where the objects are in a data set's images: ground truth for localisation (Appendix A).

It is read from a folder of XML files, those of ILSVRC's CLS-LOC data or of VOC's Annotations (see
`annotation`), or from a CSV file, whose numbers are edges in pixels as they stand:

    path,class,x1,y1,x2,y2,width,height          image,class,xmin,ymin,xmax,ymax,difficult
    Faces/image_0001.jpg,Faces,251,15,444,300,510,337

Of a CSV file's columns width, height (of the image) and difficult (0 or 1) may be left out; others
are ignored. An XML file is about the image of its own name, without folder and suffix; where two
have it, about that in a folder of the same name, too. A CSV file's path is an image's whole name,
or a unique ending of it at a "/", with or without the suffix. A box belongs to the file as it lies
there: where images have been rescaled, their boxes must have been, too.

What doesn't fit is left out and named, see `read_boxes`; a file that is malformed is refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vggfeat.checked import first_few, regular, shown
from vggfeat.datasets.annotation import read_annotation
from vggfeat.datasets.csv_file import Rows, column_meant, letters
from vggfeat.datasets.folder import short
from vggfeat.datasets.items import Items, in_frame
from vggfeat.decode import Frame, expected_frame
from vggfeat.errors import VggfeatError

_HEADER = "path,class,x1,y1,x2,y2"
# A CSV file's columns by their names' letters.
_COLUMNS = {
    **dict.fromkeys(("class", "label", "name"), "class"),
    **{name: name for name in ("x1", "y1", "x2", "y2", "width", "height", "difficult")},
    **dict(zip(("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), strict=True)),
}
_NEEDED = ("path", "class", "x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class Boxes:
    """M boxes of a data set's images, in the images' order; of one image in the file's.

    rows_M: int64, rising: the item of each. labels_M: int32, its class among `Items.classes`.
    corners_M4: float64 x1, y1, x2, y2: edges in pixels from the top left corner of the image as it
        is read, upright, and inside it. difficult_M: bool, what VOC marks so.
    """

    rows_M: np.ndarray
    labels_M: np.ndarray
    corners_M4: np.ndarray
    difficult_M: np.ndarray

    def __len__(self) -> int:
        return len(self.rows_M)


class _Entry(NamedTuple):
    """A box as a file tells it. row: the item. size: (H, W) of the image, where the file tells.
    where: the place in the file, in words.
    """

    row: int
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool
    size: tuple[float, float] | None
    where: str


def read_boxes(
    source: str | Path, items: Items, others: Sequence[str] = ()
) -> tuple[Boxes, tuple[str, ...]]:
    """The boxes of these images, and what is to be said of them, as `Items.remarks`.

    source: a folder, with XML files in it or below it, or a CSV file; see the top of this file.
    Left out, and told with their number and the first few: boxes without an area, with a side that
    is not finite, outside their image, of an image of another size than the file tells, or of a
    class that the images don't have; entries of no image, or of several; a further XML file of an
    image. A box that reaches out of its image is cut off there. Images without a box are told, too.
    An image's size is its header's, or else the file's word. Boxes are of the image as it is
    stored, or, where the size that is told says so, as EXIF has it seen; see `in_frame`. others:
    names of images that the source may be of, too, and that aren't asked for.
    Raises VggfeatError for a file that is malformed, and where no box is left.
    """
    source, unfit = Path(source), _Unfit()
    if source.is_dir():
        entries = _of_xml(source, items, {*map(_stem, others)}, unfit)
    else:
        entries = _of_csv(source, items, _Places(others), unfit)
    boxes = _fitting(entries, items, unfit)
    remarks = (*unfit.remarks(), *_without(boxes, items))
    if not len(boxes):
        why = f" ({'; '.join(unfit.remarks())})" if unfit.remarks() else ""
        raise VggfeatError(
            f"{source.absolute()} has no box for any of the {len(items):,} images{why}"
        )
    return boxes, remarks


class _Unfit:
    """What doesn't fit: in words, "{s}" or "{es}" where the plural has them -> each that is so."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}
        self._unknown: Counter[str] = Counter()
        self._furthest = 0.0

    def add(self, kind: str, name: str) -> None:
        self._kinds.setdefault(kind, []).append(name)

    def of_class(self, name: str) -> None:
        """A box of a class that the images don't have."""
        self._unknown[name] += 1

    def clipped(self, pixels: float, name: str) -> None:
        """A box that reached so far out of its image."""
        self._furthest = max(self._furthest, pixels)
        self.add("cut off at the image's edge: {n} box{es}, {far:g} pixels out at most", name)

    def remarks(self) -> tuple[str, ...]:
        told = [
            _sentence(kind, len(names), names, self._furthest)
            for kind, names in self._kinds.items()
        ]
        if n := self._unknown.total():
            names = [f"{shown(name)} {count:,}" for name, count in self._unknown.most_common()]
            told.append(
                _sentence("left out: {n} box{es} of classes that the images don't have", n, names)
            )
        return tuple(told)


def _sentence(kind: str, n: int, names: list[str], far: float = 0.0) -> str:
    s, es = ("", "") if n == 1 else ("s", "es")
    return f"{kind.format(n=f'{n:,}', s=s, es=es, far=far)}: {first_few(names, 3, short)}"


def _fitting(entries: Iterable[_Entry], items: Items, unfit: _Unfit) -> Boxes:
    """Those that fit."""
    label_of = {name: label for label, name in enumerate(items.classes)}
    frames: dict[int, Frame | None] = {}
    taken: set[tuple[int, str, tuple[float, float, float, float]]] = set()
    rows, labels, kept, difficult = [], [], [], []
    for entry in entries:
        if entry.name not in label_of:
            unfit.of_class(entry.name)
            continue
        x1, y1, x2, y2 = entry.corners
        if not (np.isfinite(entry.corners).all() and x1 < x2 and y1 < y2):
            unfit.add(
                "left out: {n} box{es} without an area, or with a side that is no finite number",
                entry.where,
            )
            continue
        if entry.row not in frames:
            frames[entry.row] = expected_frame(items.source(entry.row))
            if frames[entry.row] is None and entry.size is None:
                name = items.names[entry.row]
                unfit.add("not held against the size of {n} image{s}, which nothing tells", name)
        frame, corners = frames[entry.row], entry.corners
        if frame is not None:
            placed = in_frame(corners, frame, entry.size)
            if placed is None:
                unfit.add(
                    "left out: {n} box{es} of images that have another size than is told there",
                    entry.where,
                )
                continue
            if placed != corners:
                unfit.add("turned with the image, as EXIF has it seen: {n} box{es}", entry.where)
            corners = placed
        size = None if frame is None else frame.upright
        height, width = size or entry.size or (np.inf, np.inf)
        x1, y1, x2, y2 = corners
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            unfit.add("left out: {n} box{es} outside of the image", entry.where)
            continue
        if inside != corners:
            out = max(abs(a - b) for a, b in zip(inside, corners, strict=True))
            unfit.clipped(out, entry.where)
        known = entry.row, entry.name, inside
        if known in taken:
            unfit.add("left out: {n} box{es} that repeat an earlier one", entry.where)
            continue
        taken.add(known)
        rows.append(entry.row)
        labels.append(label_of[entry.name])
        kept.append(inside)
        difficult.append(entry.difficult)
    order = np.argsort(np.array(rows, np.int64), kind="stable")
    return Boxes(
        np.array(rows, np.int64)[order],
        np.array(labels, np.int32)[order],
        np.array(kept, np.float64).reshape(-1, 4)[order],
        np.array(difficult, np.bool_)[order],
    )


def _without(boxes: Boxes, items: Items) -> tuple[str, ...]:
    """How many images have no box, and in which official parts."""
    bare = np.ones(len(items), np.bool_)
    bare[boxes.rows_M] = False
    if not bare.any():
        return ()
    parts = [
        f"{np.count_nonzero(bare[rows]):,} of {part}"
        for part, rows in items.splits.items()
        if "/" not in part and bare[rows].any()
    ]
    names = [items.names[row] for row in np.flatnonzero(bare)]
    split = f" ({', '.join(parts)})" if parts else ""
    return (_sentence(f"{{n}} image{{s}} without a box{split}", len(names), names),)


def _of_xml(folder: Path, items: Items, others: set[str], unfit: _Unfit) -> Iterator[_Entry]:
    """Of each XML file in the folder or below it, sorted by path. others: stems that aren't asked
    for.
    """
    files = [
        Path(inside, name)
        for inside, names in _walked(folder)
        for name in names
        if name.lower().endswith(".xml")
    ]
    if not files:
        raise VggfeatError(f"no XML file in {folder.absolute()}: give the folder of annotations")
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(items.names):
        rows_of.setdefault(_stem(name), []).append(row)
    taken: set[int] = set()
    for path in sorted(files):
        rows, where = rows_of.get(path.stem, []), path.relative_to(folder).as_posix()
        if not rows and path.stem in others:
            continue
        if len(rows) > 1:
            ending = f"/{path.parent.name}/{path.stem}"
            rows = [
                row for row in rows if f"/{os.path.splitext(items.names[row])[0]}".endswith(ending)
            ] or rows
        if len(rows) != 1:
            what = "of several images" if rows else "of none of these images"
            unfit.add(f"left out: {{n}} XML file{{s}} {what}", where)
        elif rows[0] in taken:
            unfit.add("left out: {n} XML file{s} of images that have one already", where)
        else:
            taken.add(rows[0])
            annotation = read_annotation(path)
            for each in annotation.objects:
                place = f"{where}, line {each.line}"
                yield _Entry(
                    rows[0], each.name, each.corners, each.difficult, annotation.size, place
                )


def _walked(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder and its files, through links, too, once."""
    seen: set[tuple[int, int]] = set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        there = os.stat(inside)
        if (there.st_dev, there.st_ino) in seen:
            folders.clear()
            continue
        seen.add((there.st_dev, there.st_ino))
        yield inside, names


def _stem(name: str) -> str:
    """Without folder and suffix."""
    return os.path.splitext(os.path.basename(name))[0]


def _of_csv(path: Path, items: Items, others: _Places, unfit: _Unfit) -> Iterator[_Entry]:
    """Of each row. others: images that aren't asked for."""
    regular(path.absolute(), "CSV file, or folder of XML files, with boxes")
    rows, places, column_of = Rows(path), _Places(items.names), dict[str, int]()
    for line, row in rows:
        cells = [cell.strip() for cell in row]
        if not column_of:
            column_of = _columns(cells, rows, line)
            continue
        cell_of = {name: cells[column] for name, column in column_of.items()}
        number_of = {
            name: rows.number(name, cell, line)
            for name, cell in cell_of.items()
            if name in ("x1", "y1", "x2", "y2")
        }
        if (difficult := cell_of.get("difficult", "0")) not in ("0", "1", ""):
            rows.refuse(line, f"difficult must be 0 or 1, not {shown(difficult)}")
        found, where = places.find(cell_of["path"]), f"{path.name}, line {line}"
        if len(found) != 1:
            what = "of several images" if found else "of none of these images"
            if found or not others.find(cell_of["path"]):
                unfit.add(f"left out: {{n}} row{{s}} {what}", where)
            continue
        corners = (number_of["x1"], number_of["y1"], number_of["x2"], number_of["y2"])
        size = rows.size(cell_of, line)
        yield _Entry(found[0], cell_of["class"], corners, difficult == "1", size, where)
    if not column_of:
        rows.refuse(1, f"the file is empty; it must start with {_HEADER}")


def _columns(cells: list[str], rows: Rows, line: int) -> dict[str, int]:
    """Of each column that is read its place in the header."""
    column_of: dict[str, int] = {}
    for column, cell in enumerate(cells):
        name = "path" if column_meant(cell) == "path" else _COLUMNS.get(letters(cell), "")
        if name in column_of:
            rows.refuse(line, f"there are two columns {name}: leave out one")
        if name:
            column_of[name] = column
    if missing := [name for name in _NEEDED if name not in column_of]:
        found = shown(",".join(cells))
        rows.refuse(
            line, f"there is no column {missing[0]}; the header must be {_HEADER}, not {found}"
        )
    return column_of


class _Places:
    """Which images a path may be of."""

    def __init__(self, names: Sequence[str]) -> None:
        self._row_of = {name: row for row, name in enumerate(names)}
        # by the last part of a name, with and without its suffix
        self._ending: dict[str, list[tuple[str, int]]] = {}
        for row, name in enumerate(names):
            for spelt in {name, os.path.splitext(name)[0]}:
                self._ending.setdefault(os.path.basename(spelt), []).append((spelt, row))

    def find(self, path: str) -> list[int]:
        """Rows of the images with that name, or else of those whose names end in it."""
        if path in self._row_of:
            return [self._row_of[path]]
        there = self._ending.get(os.path.basename(path), [])
        return [row for spelt, row in there if f"/{spelt}".endswith(f"/{path}")]
