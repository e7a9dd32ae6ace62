"""Images listed in a CSV file, with one label each, or several.

    path,label,split          path,labels
    a/1.jpg,cat,train         a/1.jpg,person;dog
    a/2.jpg,dog,test          a/2.jpg,person;?horse   only difficult horses: left out for it
    a/3.jpg,,                 a/3.jpg,;               none of the classes
                              a/4.jpg,                unknown

    path,cat,dog              a column a class: 1 or True present, 0 or False absent;
                              unknown where all are empty
    a/1.jpg,1,0

    path,label,x1,y1,x2,y2      a row a box: edges in pixels from the image's top left corner
    a/1.jpg,cat,10,20,110.5,90

Paths are relative to the CSV file's folder, or absolute; or all are URLs, of images in stores. With
boxes a path may stand in several
rows; its items are "a/1.jpg#1", "a/1.jpg#2" … in their order. The columns stand in any order,
separated by commas, semicolons, tabs or bars. The split column is optional: without it, or with
nothing in it, there are three random splits, 80% train (a fifth of it val). A row with an empty
split, or of unknown label, is in no split.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np

from vggfeat.checked import first_few, number_of, regular, shown
from vggfeat.datasets.download import need_root
from vggfeat.datasets.folder import short
from vggfeat.datasets.items import Box, Items, covering, in_frame, known, remarks_on_classes
from vggfeat.datasets.protocol import PROTOCOLS
from vggfeat.datasets.splits import part_named
from vggfeat.decode import Frame, expected_frame
from vggfeat.errors import VggfeatError, reason
from vggfeat.place import is_url

# bytes of a table of images and classes, a byte a cell: a short file may ask for much
MOST_LABELS = 1 << 30
_HEADER = "path,label[,split] or path,labels[,split], or path and a column for each class"
_BOX = ("x1", "y1", "x2", "y2")
_BESIDE_BOX = ("width", "height")  # of the image: they may stand beside a box
_KNOWN = ("path", "label", "labels", "split", *_BOX)
# Other programs' words for these columns, in lower case and without what stands between words.
_MEANT = {
    "path": (
        "filename",
        "filepath",
        "file",
        "image",
        "img",
        "imagename",
        "imagepath",
        "imgpath",
        "filenames",
        "images",
        "paths",
        "imagefile",
        "imageid",
        "photo",
    ),
    "label": ("class", "category", "target", "classname", "labelname", "categoryname", "species"),
    "labels": ("classes", "tags", "categories", "targets"),
    "split": ("set", "subset", "partition", "phase", "splits"),
    "x1": ("xmin",),
    "y1": ("ymin",),
    "x2": ("xmax",),
    "y2": ("ymax",),
}
_COLUMN = {word: column for column, words in _MEANT.items() for word in words}
# Of images too, but no classes, though they may have 0 and 1.
_NO_CLASS = frozenset(
    (
        "id",
        "index",
        "idx",
        "width",
        "height",
        "classid",
        "classidx",
        "labelid",
        "categoryid",
        "name",
        "url",
        "size",
        "fold",
        "area",
        "score",
        "weight",
        "confidence",
        "iscrowd",
        "difficult",
        "truncated",
        "occluded",
    )
)
# in any case
_PRESENT = {
    "1": True,
    "1.0": True,
    "true": True,
    "0": False,
    "0.0": False,
    "false": False,
}
# What pandas and others write for a missing value.
_MISSING = frozenset(
    ("nan", "NaN", "None", "NULL", "null", "NA", "N/A", "n/a", "<NA>", "#N/A", "-", "?")
)
_ODD = re.compile(r"^$|^\s|\s$|[\\:\0]")  # a path that may have been meant otherwise
_SEP = re.compile(r"\W*sep=", re.IGNORECASE)  # a spreadsheet's line above the header
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_WINDOWS_DISK = re.compile(r"[A-Za-z]:[\\/]|\\\\")


@dataclass
class _Table:
    """The file's N rows.

    to_learn: as of `load`.
    kind: "label" or "labels", the column that there is, or "columns", one for each class.
    labels: N cells of it; of columns, the classes present in a row, as (numbers,), and None where
    unknown. splits: N of "train", "val", "test" and "". boxes: N, where there are columns of them.
    lines: N numbers. repeated: lines left out. frames: of the images that boxes are in, None where
    no header tells; urls: how many paths are; turned, cut_off: lines whose boxes were.
    """

    path: Path
    to_learn: bool = True
    kind: str = "label"
    classes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    present: list[tuple[int, ...] | None] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    frames: dict[str, Frame | None] = field(default_factory=dict)
    urls: int = 0
    turned: list[int] = field(default_factory=list)
    cut_off: list[int] = field(default_factory=list)

    def refuse(self, line: int, what: str) -> NoReturn:
        raise VggfeatError(f"{self.path.absolute()}, line {line}: {what}")


def load(root: Path | None, *, to_learn: bool = True) -> Items:
    """The images listed in the CSV file `root`, in its order; classes sorted, or as the columns
    are.

    labels: (N,) int32 for a `label` column, (N, C) int8 for `labels`, None if every cell is empty.
        Columns of classes are the former where each row has exactly one 1.
    to_learn: False for images that are only looked at: paths alone will do, no splits are drawn,
        and nothing is said of what can't be learned.
    Raises VggfeatError naming the file and the line that is malformed, or may mean two things.
    """
    path = need_root("csv", root, "the CSV file with the columns path,label[,split]")
    if path.is_dir():
        raise VggfeatError(
            f"{path.absolute()} is a folder: its images are read with `dataset` folder"
        )
    table = _read(path, to_learn)
    remarks: tuple[str, ...] = ()
    if n := len(table.repeated):
        rows = (
            f"{n:,} rows that repeat an earlier one, for example"
            if n > 1
            else "a row that repeats an earlier one:"
        )
        remarks = (f"left out: {rows} line {table.repeated[0]} of {path.name}",)
    if not any(table.labels) and not any(row is not None for row in table.present):
        items = Items("csv", "unlabelled", path.parent, table.names, None, [], remarks=remarks)
        return _in_boxes(_where_they_lie(items, table), table)
    if table.kind == "columns":
        labels, classes = _columns(table), table.classes
        remarks += (f"columns taken for classes: {first_few(classes, 20, short)}",)
        if labels.ndim == 1:
            remarks += (f"each row of {path.name} has one 1: read as one label an image",)
    else:
        _question(table)
        remarks += _with_spaces(table)
        labels, classes = (
            _many(table.labels, path) if table.kind == "labels" else _one(table.labels)
        )
    protocol = "multi-label" if labels.ndim == 2 else "single-label"
    if any(table.splits):
        given = np.array(table.splits)
        splits = {
            name: np.flatnonzero((given == name) & known(labels))
            for name in ("train", "val", "test")
        }
        splits = {name: rows.astype(np.int64) for name, rows in splits.items() if len(rows)}
    elif not to_learn:
        splits = {}
    else:
        splits = PROTOCOLS[protocol].splits(labels)
        if n := len(table.boxes) and len(table.names) - len(set(table.names)):
            remarks += (
                f"{n:,} of the boxes lie in the image of another: the random splits are drawn by"
                " box, so that an image may be in train and in test; a column split avoids it",
            )
    if to_learn:
        remarks += remarks_on_classes(labels, classes, splits)
    items = Items(
        "csv", protocol, path.parent, table.names, labels, classes, splits, remarks=remarks
    )
    return _in_boxes(_where_they_lie(items, table), table)


def _where_they_lie(items: Items, table: _Table) -> Items:
    """The items, in stores where their paths are URLs."""
    return replace(items, root=Path(), url="") if table.urls else items


def _in_boxes(items: Items, table: _Table) -> Items:
    """The items with their boxes, where there are some, and with names of their own."""
    if not table.boxes:
        return items
    count: Counter[str] = Counter()
    names = []
    for name in items.names:
        count[name] += 1
        names.append(f"{name}#{count[name]}")
    words = {
        "turned with the image, as EXIF has it seen": table.turned,
        "cut off at the image's edge": table.cut_off,
    }
    remarks = [
        f"{what}: {len(some):,} boxes, for example line {some[0]} of {table.path.name}"
        for what, some in words.items()
        if some
    ]
    return replace(
        items,
        names=names,
        files=items.names,
        boxes=np.array(table.boxes, np.int32),
        remarks=(*items.remarks, *remarks),
    )


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
    _refuse_too_many(len(cells), len(classes), path)
    column_of = {name: column for column, name in enumerate(classes)}
    labels = np.full((len(cells), len(classes)), -1, np.int8)
    for row, (cell, words) in enumerate(zip(cells, words_of, strict=True)):
        if not cell:
            labels[row] = 0
        # Present after difficult: one ordinary object makes the class present, as in the VOC
        # devkit.
        for word in sorted(words, key=lambda word: not word.startswith("?")):
            labels[row, column_of[word.removeprefix("?").strip()]] = (
                0 if word.startswith("?") else 1
            )
    return labels, classes


def _columns(table: _Table) -> np.ndarray:
    """(N,) int32, -1 where unknown, if all known rows have one class; else (N, C) int8: 1, -1, or
    zeros if unknown.
    """
    if all(row is None or len(row) == 1 for row in table.present):
        return np.array([-1 if row is None else row[0] for row in table.present], np.int32)
    _refuse_too_many(len(table.present), len(table.classes), table.path)
    labels = np.full((len(table.present), len(table.classes)), -1, np.int8)
    for i, row in enumerate(table.present):
        if row is None:
            labels[i] = 0
        else:
            labels[i, list(row)] = 1
    return labels


def _refuse_too_many(images: int, classes: int, path: Path) -> None:
    if images * classes > MOST_LABELS:
        raise VggfeatError(
            f"{path.absolute()}: {images:,} images of {classes:,} classes are too many: "
            f"at most {MOST_LABELS:,} labels"
        )


def _question(table: _Table) -> None:
    """Raise VggfeatError where a cell that would be one class looks like several, separated in
    another way.

    In a `labels` column a ";" anywhere says that the writer knows it, and nothing is questioned.
    """
    several = table.kind == "labels"
    # the first line of each
    cells = dict(zip(reversed(table.labels), reversed(table.lines), strict=True))
    if several and any(";" in cell for cell in cells):
        return
    for separator in "|,/+& " if several else ";|,/+&":
        words_of = {cell: {word.strip() for word in cell.split(separator)} - {""} for cell in cells}
        used = Counter(word for words in words_of.values() for word in words)
        for cell, line in sorted(cells.items(), key=lambda item: item[1]):
            words = words_of[cell]
            # "tench, Tinca tinca" is one name, and "traffic light": words that occur elsewhere are
            # labels
            again = [word for word in words if used[word] > 1]
            if separator in ";|":
                asked = separator in cell
            elif not several:
                # one label is the rule here, as "maillot, tank suit" beside "maillot": only if all
                # words are classes
                asked = len(words) > 1 and (
                    words <= cells.keys() or (separator == "," and len(again) == len(words))
                )
            else:
                asked = (
                    len(words) > 1
                    and bool(again)
                    and (separator != " " or len(again) == len(words))
                )
            if asked and several:
                table.refuse(
                    line,
                    f"{shown(cell)} is one label, since ';' stands between labels: write cat;dog"
                    f" for two, or {shown(cell + ';')} if it is one",
                )
            if asked:
                table.refuse(
                    line,
                    f"a label column has one label an image, not {shown(cell)}: write a labels"
                    " column, with ';' between labels, as"
                    f" {shown(';'.join(part.strip() for part in cell.split(separator)))}; or, if it"
                    " is one class, rename it",
                )
    for cell, line in cells.items():
        if cell[:1] + cell[-1:] in ("[]", "{}", "()"):
            table.refuse(
                line, f"{shown(cell)} would be one label: write cat;dog for two, in a column labels"
            )


def _with_spaces(table: _Table) -> tuple[str, ...]:
    """A remark where all of a `labels` column have spaces, and some a word in common: who wrote it
    may mean several.

    Of a `label` column where the words of one are classes, too; but "ski mask" is one beside "ski"
    and "mask".
    """
    labels = sorted(set(table.labels) - {""})
    if table.kind == "label":
        for label in labels:
            if len(words := label.split()) > 1 and set(words) <= set(labels):
                several = shown(";".join(words))
                return (
                    (
                        f"{shown(label)} is one class; for several an image write a labels column,"
                        f" as {several}"
                    ),
                )
    if table.kind != "labels" or any(";" in label or " " not in label for label in labels):
        return ()
    used = Counter(word for label in labels for word in set(label.split()))
    for label in labels:
        if any(used[word] > 1 for word in label.split()):
            return (
                f"labels with spaces are single classes: {shown(label)}; ';' stands between two",
            )
    return ()


class Rows:
    """The rows of a CSV file that aren't blank, each as its line's number and its cells as they are
    written; the first is the header, one of whose columns must be the path's.

    delimiter: what separates the columns. end: the last line that was read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.delimiter = ","
        self.end = 0

    def refuse(self, line: int, what: str) -> NoReturn:
        raise VggfeatError(f"{self.path.absolute()}, line {line}: {what}")

    def number(self, column: str, cell: str, line: int) -> float:
        """What a cell says. Raises VggfeatError where that is no number."""
        try:
            return number_of(cell, float)
        except ValueError:
            self.refuse(line, f"{column} must be a number, not {shown(cell)}")

    def size(self, cell_of: Mapping[str, str], line: int) -> tuple[float, float] | None:
        """(H, W) of the image, as it is told beside a box in cells width and height; None where
        they aren't there, or both are empty or 0. Raises VggfeatError for what is no size.
        """
        cells = {side: cell_of.get(side, "") for side in ("height", "width")}
        if not any(cells.values()):
            return None
        height, width = (self.number(side, cell, line) for side, cell in cells.items())
        if height == width == 0:
            return None
        if not (0 < height < float("inf") and 0 < width < float("inf")):
            self.refuse(
                line,
                f"an image has no {width:g}x{height:g} pixels: leave width and height empty where"
                " they aren't known",
            )
        return height, width

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Raises VggfeatError for what is no CSV file, and for rows of another length than the
        header's.
        """
        path, where = self.path, self.path.absolute()
        try:
            with path.open("rb") as raw:
                head = raw.read(1 << 16)
            encoding = _encoding(head, path)
            self.delimiter = _delimiter(head.decode(encoding, "replace"))
            # surrogateescape: a path need not be valid UTF-8.
            errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
            with path.open(encoding=encoding, errors=errors, newline="") as file:
                yield from self._rows(file)
        except csv.Error as error:
            self.refuse(self.end + 1, f"{error}; is a quote opened here and not closed?")
        except OSError as error:
            raise VggfeatError(f"can't read {where}: {reason(error)}") from error
        except UnicodeDecodeError as error:
            raise VggfeatError(
                f"{where} is not {error.encoding} text, as its first bytes say: save it as CSV"
                " UTF-8"
            ) from error

    def _rows(self, file: TextIO) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(file, delimiter=self.delimiter)
        n_columns = 0
        for row in reader:
            line, self.end = self.end + 1, reader.line_num
            if any("\n" in cell or "\r" in cell for cell in row):
                self.refuse(line, "a quote is opened here and not closed, or a cell has a line end")
            if not any(map(str.strip, row)) or (not n_columns and _SEP.match(row[0].strip())):
                continue
            if not n_columns:
                while not row[-1].strip():  # a spreadsheet's empty columns
                    row.pop()
                n_columns = len(row)
            elif len(row) < n_columns or any(map(str.strip, row[n_columns:])):
                what = f"{len(row)} columns where the header has {n_columns}"
                self.refuse(
                    line, f"{what}; a cell with {self.delimiter!r} in it needs quotes around it"
                )
            yield line, row[:n_columns]


def _encoding(head: bytes, path: Path) -> str:
    """By the byte-order mark, which spreadsheets write; UTF-8 without one."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head[:4] or head.startswith(b"PK\3\4"):
        what = (
            "a spreadsheet or an archive"
            if head.startswith(b"PK")
            else "UTF-16 without its mark, or no text"
        )
        raise VggfeatError(f"{path.absolute()} is {what}: save it as CSV UTF-8")
    return "utf-8-sig"


def _delimiter(head: str) -> str:
    """What the header separates its columns by."""
    first = next((line for line in head.splitlines() if line.strip() and not _SEP.match(line)), "")
    for delimiter in ",;\t|":
        cells = next(csv.reader([first], delimiter=delimiter), [])
        if len(cells) > 1 and any(column_meant(cell.strip()) == "path" for cell in cells):
            return delimiter
    return ","


def _read(path: Path, to_learn: bool) -> _Table:
    where = path.absolute()
    regular(where, "CSV file", "give it with `root`" if to_learn else "")
    table, rows = _Table(path, to_learn), Rows(path)
    row_of: dict[tuple[str, Box | None], int] = {}
    header: list[str] = []
    for line, row in rows:
        cells = [cell.strip() for cell in row]
        if not header:
            header = _header(cells, table, line)
            continue
        cell_of = dict(zip(header, cells, strict=True))
        # as written: spaces may belong to it
        name = _path(row[header.index("path")], table, line)
        split = _split(cell_of.get("split", ""), table, line)
        present = (
            _present([cell_of[name] for name in table.classes], table, line)
            if table.classes
            else None
        )
        label = cell_of.get(table.kind, "")
        if _NOT_UTF8.search(label):
            table.refuse(line, f"the label {shown(label)} is not UTF-8: save the file as CSV UTF-8")
        if label in _MISSING:
            table.refuse(
                line,
                f"{shown(label)} would be a class: an unknown label is an empty cell; if it is"
                " one, rename it",
            )
        box = _box(cell_of, rows, table, name, line)
        first = row_of.setdefault((_identity(name, where.parent), box), len(table.names))
        if first < len(table.names):
            _repeated(first, name, (label, present, split), table, line)
            continue
        if box is not None:
            table.boxes.append(box)
        table.names.append(name)
        table.labels.append(label)
        table.present.append(present)
        table.splits.append(split)
        table.lines.append(line)
    if not header:
        raise VggfeatError(f"{where}, line 1: the file is empty; it must start with {_HEADER}")
    if not table.names:
        raise VggfeatError(f"{where}, line {rows.end + 1}: no images are listed under the header")
    return table


def _box(cell_of: dict[str, str], rows: Rows, table: _Table, name: str, line: int) -> Box | None:
    """The whole pixels that cover a row's box in its image, upright; None where there are no
    columns of it.
    """
    if _BOX[0] not in cell_of:
        return None
    x1, y1, x2, y2 = (rows.number(side, cell_of[side], line) for side in _BOX)
    corners, where = (x1, y1, x2, y2), f"{rows.path.absolute()}, line {line}"
    told = rows.size({letters(column): cell for column, cell in cell_of.items()}, line)
    if name not in table.frames:
        table.frames[name] = expected_frame(rows.path.parent / name)
    frame = table.frames[name]
    if frame is None:
        return covering(corners, where, told)
    upright = in_frame(corners, frame, told)
    if upright is None:
        assert told is not None  # without it a box is of the image
        table.refuse(
            line,
            f"the box is of a picture of {told[1]:g}x{told[0]:g} pixels, and the image has"
            f" {frame.width}x{frame.height}: give the boxes of this one",
        )
    box, (tall, wide) = covering(upright, where, frame.upright), frame.upright
    if upright != corners:
        table.turned.append(line)
    if min(upright) < 0 or upright[2] > wide or upright[3] > tall:
        table.cut_off.append(line)
    return box


def _header(cells: list[str], table: _Table, line: int) -> list[str]:
    """The columns' names; sets what the table has of labels."""
    header = [cell.lower() if cell.lower() in _KNOWN else cell for cell in cells]
    if wrong := _wrong_column(header, table.to_learn) or _missing_side(header):
        found = shown(",".join(cells))
        table.refuse(line, f"{wrong}; the first line must be a header, {_HEADER}, not {found}")
    table.classes = _others(header)
    table.kind = next((name for name in ("label", "labels") if name in header), "columns")
    return header


def _others(header: list[str]) -> list[str]:
    """Columns that would be classes."""
    beside = _BESIDE_BOX if set(_BOX) <= set(header) else ()
    return [name for name in header if name not in _KNOWN and letters(name) not in beside]


def _missing_side(header: list[str]) -> str:
    """As `_wrong_column`, of a box."""
    there = [side for side in _BOX if side in header]
    if not there or len(there) == len(_BOX):
        return ""
    missing = next(side for side in _BOX if side not in header)
    return f"there is a column {there[0]} and none {missing}: a box takes x1,y1,x2,y2"


def _wrong_column(header: list[str], to_learn: bool) -> str:
    """What is wrong with which column, and what to do; nothing where all is right."""
    others = _others(header)
    # the first for each
    meant = {wanted: name for name in reversed(others) if (wanted := column_meant(name))}
    labelled = "label" in header or "labels" in header
    if "path" not in header:
        return (
            f"rename {shown(meant['path'])} to path"
            if "path" in meant
            else "there is no column path"
        )
    for column, name in enumerate(header):
        if not name or re.fullmatch(r"Unnamed: \d+", name):
            what = shown(name) if name else f"{column + 1}, which has no name"
            return f"leave out the column {what} (index=False in pandas)"
        if name in header[:column]:
            return f"there are two columns {shown(name)}: leave out one"
        if _NOT_UTF8.search(name):
            return f"the column {shown(name)} is not UTF-8: save the file as CSV UTF-8"
    if "label" in header and "labels" in header:
        return "there are both label and labels: leave out one"
    if to_learn and not labelled and not others:
        return "add a column label; it may be empty where nothing is known"
    for wanted, name in meant.items():
        if wanted not in header and not (labelled and wanted in ("label", "labels")):
            return f"rename {shown(name)} to {wanted}"
    if others and labelled:
        return (
            f"the column {shown(others[0])} is none of path, label, labels and split: leave it out"
        )
    if len(others) == 1:
        return (
            f"rename {shown(others[0])} to label, with the name of a class in each cell instead of"
            " 0 and 1"
        )
    parts = [name for name in others if (found := part_named(name)) and found[1] in ((), ("is",))]
    if parts and parts != ["train"]:  # which alone may be VOC's class
        return (
            f"{shown(parts[0])} would be a class: write a column split, with train, val and test,"
            " or leave it out; if it is a class, rename it"
        )
    for name in others:
        if letters(name) in _NO_CLASS or column_meant(name):
            return f"{shown(name)} would be a class: leave it out, or, if it is one, rename it"
    return ""


def letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def column_meant(name: str) -> str:
    """Which of the known columns a name stands for; nothing where none."""
    return name.lower() if name.lower() in _KNOWN else _COLUMN.get(letters(name), "")


def _split(cell: str, table: _Table, line: int) -> str:
    """ "train", "val", "test" or ""; a cell may have any word for it that a folder may have."""
    part, others = part_named(cell) or ("", (cell,) if cell else ())
    if others or part == "eval":
        table.refuse(line, f"the split must be train, val, test or empty, not {shown(cell)}")
    return part


def _present(cells: Sequence[str], table: _Table, line: int) -> tuple[int, ...] | None:
    """Which classes' columns have a 1; None where all are empty."""
    if not any(cells):
        return None
    for name, cell in zip(table.classes, cells, strict=True):
        if cell.lower() not in _PRESENT:
            table.refuse(
                line,
                f"the column {shown(name)} is none of path, label, labels and split, so it is a"
                f" class's and has 0 or 1, not {shown(cell)}: 1 (or True) where the class is"
                " present, 0 (or False) where not",
            )
    return tuple(i for i, cell in enumerate(cells) if _PRESENT[cell.lower()])


def _path(cell: str, table: _Table, line: int) -> str:
    """A path as `Items.names` has it: as it is written, or, where that is no file, as it must have
    been meant.

    Meant are: no spaces around it, Windows' backslashes, Windows' encoding of Western Europe.
    """
    if cell.isascii() and not _ODD.search(cell) and not table.urls:
        return Path(cell).as_posix()
    if not cell.strip() or "\0" in cell:
        table.refuse(line, "no valid path in the column path")
    if is_url(cell) or table.urls:
        if not is_url(cell) or table.urls < len(table.names):
            table.refuse(line, f"{shown(cell)}: either all paths are URLs, or none is")
        table.urls += 1
        return cell
    if os.sep == "/" and _WINDOWS_DISK.match(cell):
        table.refuse(
            line,
            f"{shown(cell)} is on a Windows disk: write paths relative to the CSV file's folder",
        )
    meant = [cell, cell.strip()]
    meant += [text.replace("\\", "/") for text in meant]
    if _NOT_UTF8.search(cell):
        meant += [
            text.encode("utf-8", "surrogateescape").decode("cp1252", "replace") for text in meant
        ]
    if len(set(meant)) > 1:
        there = [text for text in dict.fromkeys(meant) if os.path.isfile(table.path.parent / text)]
        cell = there[0] if there else cell.replace("\\", "/")
    return Path(cell).as_posix()


def _identity(name: str, folder: Path) -> str:
    """The same for all paths of one file, relative to the folder or not."""
    if os.path.isabs(name) or ".." in name:
        return os.path.normpath(folder / name).removeprefix(f"{folder}{os.sep}")
    return name


def _repeated(first: int, name: str, now: tuple[object, ...], table: _Table, line: int) -> None:
    """Note a row that says the same of an image as an earlier one. Raises VggfeatError where it
    says something else.
    """
    label, _, split = now
    if now == (table.labels[first], table.present[first], table.splits[first]):
        table.repeated.append(line)
        return
    what = f"{shown(name)} is listed twice, first in line {table.lines[first]}"
    if split != table.splits[first]:
        parts = [
            f"in {part}" if part else "in no split" for part in (table.splits[first], str(split))
        ]
        table.refuse(line, f"{what}: {parts[0]} there, {parts[1]} here; keep one of them")
    if table.kind == "label":
        both = shown(f"{table.labels[first]};{label}")
        table.refuse(
            line, f"{what}, with another label; for several, one row with {both} in a column labels"
        )
    table.refuse(line, f"{what}, with other labels; keep one of them")
