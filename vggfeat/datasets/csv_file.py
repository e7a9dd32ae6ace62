"""Images listed in a CSV file, with one label each, or several.

    path,label,split          path,labels
    a/1.jpg,cat,train         a/1.jpg,person;dog
    a/2.jpg,dog,test          a/2.jpg,person;?horse     only difficult horses: left out for that class
    a/3.jpg,,                 a/3.jpg,;                 none of the classes
                              a/4.jpg,                  unknown

Paths are relative to the CSV file's folder, or absolute. The split column is optional: without it, or with
nothing in it, there are three random splits, 80% train (a fifth of it val). A row with an empty split, or of
unknown label, is in no split.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from vggfeat.checked import regular, shown
from vggfeat.datasets.download import need_root
from vggfeat.datasets.folder import TRAIN_FRACTION
from vggfeat.datasets.items import Items
from vggfeat.datasets.splits import random_splits
from vggfeat.errors import VggfeatError, reason

MOST_LABELS = 1 << 30  # bytes of a table of images and classes, a byte a cell: a short file may ask for much
_HEADERS = [["path", kind, *split] for kind in ("label", "labels") for split in ([], ["split"])]


@dataclass
class _Table:
    """The file's columns: N names, N label cells, N splits ("" where empty)."""

    several: bool = False
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)


def load(root: Path | None, download: bool = False) -> Items:
    """The images listed in the CSV file `root`, in its order; classes sorted.

    labels: (N,) int32 for a `label` column, (N, C) int8 for `labels`, None if every cell is empty.
    Raises VggfeatError naming the file and the line that is malformed.
    """
    if download:
        raise VggfeatError("there is nothing to download for a CSV file of your own: leave out `download`")
    path = need_root("csv", root, "the CSV file with the columns path,label[,split]")
    table = _read(path)
    if not any(table.labels):
        return Items("csv", "unlabelled", path.parent, table.names, None, [])
    labels, classes = _many(table.labels, path) if table.several else _one(table.labels)
    known = (labels != 0).any(axis=1) if table.several else labels >= 0
    if any(table.splits):
        given = np.array(table.splits)
        splits = {name: np.flatnonzero((given == name) & known) for name in ("train", "val", "test")}
        splits = {name: rows.astype(np.int64) for name, rows in splits.items() if len(rows)}
    else:
        splits = random_splits(labels, n_train=TRAIN_FRACTION, max_test=None)
    protocol = "multi-label" if table.several else "single-label"
    return Items("csv", protocol, path.parent, table.names, labels, classes, splits)


def _one(cells: list[str]) -> tuple[np.ndarray, list[str]]:
    """(N,) int32 class indices, -1 for an empty cell, and the classes."""
    classes = sorted(set(cells) - {""})
    label_of = {name: label for label, name in enumerate(classes)}
    return np.array([label_of.get(cell, -1) for cell in cells], np.int32), classes


def _many(cells: list[str], path: Path) -> tuple[np.ndarray, list[str]]:
    """(N, C) int8 of 1, -1 and 0 (difficult), zeros for an empty cell, and the classes."""
    words_of = [[word for part in cell.split(";") if (word := part.strip())] for cell in cells]
    classes = sorted({word.removeprefix("?").strip() for words in words_of for word in words})
    if not classes or "" in classes:
        raise VggfeatError(
            f"{path.absolute()}: {'a lone ? is no label' if classes else 'no row has a label'}"
        )
    if len(cells) * len(classes) > MOST_LABELS:
        raise VggfeatError(
            f"{path.absolute()}: {len(cells):,} images of {len(classes):,} classes are too many: "
            f"at most {MOST_LABELS:,} labels"
        )
    column_of = {name: column for column, name in enumerate(classes)}
    labels = np.full((len(cells), len(classes)), -1, np.int8)
    for row, (cell, words) in enumerate(zip(cells, words_of, strict=True)):
        if not cell:
            labels[row] = 0
        # Present after difficult: one ordinary object makes the class present, as in the VOC devkit.
        for word in sorted(words, key=lambda word: not word.startswith("?")):
            labels[row, column_of[word.removeprefix("?").strip()]] = 0 if word.startswith("?") else 1
    return labels, classes


def _read(path: Path) -> _Table:
    regular(path.absolute(), "CSV file", "give it with `root`")
    try:
        # utf-8-sig: spreadsheets write a byte-order mark. surrogateescape: a path need not be valid UTF-8.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return _parse(file, path)
    except OSError as error:
        raise VggfeatError(f"can't read {path.absolute()}: {reason(error)}") from error


def _parse(file: TextIO, path: Path) -> _Table:
    reader = csv.reader(file)
    where = path.absolute()
    table = _Table()
    line_of: dict[str, int] = {}
    header: list[str] | None = None
    try:
        for row in reader:
            at = f"{where}, line {reader.line_num}"
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if header is None:
                header = [cell.lower() for cell in cells]
                if header not in _HEADERS:
                    expected = "path,label[,split] or path,labels[,split]"
                    raise VggfeatError(f"{at}: the header must be {expected}, not {shown(','.join(cells))}")
                table.several = header[1] == "labels"
                continue
            if len(cells) != len(header):
                raise VggfeatError(f"{at}: {len(cells)} columns where the header has {len(header)}")
            name = Path(row[0]).as_posix()  # as written: a name may begin or end with a space
            if not cells[0] or "\0" in name:
                raise VggfeatError(f"{at}: no valid path in the first column")
            if name in line_of:
                raise VggfeatError(f"{at}: {shown(name)} is listed twice, first in line {line_of[name]}")
            line_of[name] = reader.line_num
            split = cells[2].lower() if len(cells) == 3 else ""
            if split not in ("", "train", "val", "test"):
                raise VggfeatError(
                    f"{at}: the split must be train, val, test or empty, not {shown(cells[2])}"
                )
            table.names.append(name)
            table.labels.append(cells[1])
            table.splits.append(split)
    except csv.Error as error:
        raise VggfeatError(f"{where}, line {reader.line_num}: {error}") from error
    if header is None:
        raise VggfeatError(f"{where}, line 1: the file is empty; it must start with path,label[,split]")
    if not table.names:
        raise VggfeatError(f"{where}, line {reader.line_num + 1}: no images are listed under the header")
    return table
