"""The images in one tar, Parquet or Arrow file, in its order: a shard of an open plan."""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from vggfeat.datasets import Items
from vggfeat.datasets.containers import columns_of, label_texts
from vggfeat.datasets.folder import IMAGE_EXTENSIONS
from vggfeat.errors import VggfeatError, not_read
from vggfeat.parquet import columns_of_file
from vggfeat.place import place_of
from vggfeat.shards.fetch import MOST_ALL, MOST_BYTES, as_objects

_AHEAD = 1 << 23  # bytes that a store is asked for at once
_MOST_LABEL = 1 << 12  # bytes of a label in a tar


@dataclass(frozen=True)
class Inside:
    """N images. labels: N texts, "" where unknown. classes: in the order that the file tells, if it
    does. reasons: row -> why its image isn't read.
    """

    items: Items
    labels: list[str]
    classes: tuple[str, ...]
    reasons: dict[int, str]


@dataclass
class _Rows:
    """What is taken, row by row. wanted: rows whose images are; None: all."""

    where: str
    wanted: range | None
    names: list[str] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    held: int = 0

    def add(self, name: str, label: str, size: int | None, read: Callable[[], bytes]) -> None:
        """size: of the image's file; None: it isn't there. read: what it holds."""
        row, image = len(self.names), b""
        if size is None:
            self.reasons[row] = "its bytes are not in the file"
        elif size > MOST_BYTES:
            self.reasons[row] = f"larger than {MOST_BYTES:,} bytes"
        elif self.wanted is None or row in self.wanted:
            image = read()
        self.names.append(name)
        self.images.append(image)
        self.labels.append(label)
        self.held += len(image)
        if self.held > MOST_ALL:
            raise VggfeatError(
                f"{self.where} has more than {MOST_ALL:,} bytes of images: divide it"
            )


def count_inside(kind: str, part: str, address: str) -> int:
    """How many images one file has; see `read_inside`."""
    return len(_inside(kind, part, address, range(0)).items)


def read_inside(kind: str, part: str, address: str, rows: range | None = None) -> Inside:
    """The images of one file, or some of its rows. kind: the data set's name. part: the file's
    name, before its images'. address: its path or URL.

    Raises VggfeatError where the file is damaged: how many images it should have nobody knows;
    AbsentError, StorageError.
    """
    every = _inside(kind, part, address, rows)
    if rows is None:
        return every
    its = np.array(rows, np.int64)
    return Inside(
        every.items.take(its),
        [every.labels[i] for i in rows],
        every.classes,
        {i - rows.start: why for i, why in every.reasons.items() if i in rows},
    )


def _inside(kind: str, part: str, address: str, wanted: range | None) -> Inside:
    """All rows of one file, with the images of those that are wanted."""
    rows = _Rows(address, wanted)
    classes: tuple[str, ...] = ()
    if kind == "webdataset":
        above, _, name = address.rpartition("/")
        with place_of(above or "/").open(name, _AHEAD) as file:
            _tar(file, rows)
    else:
        classes = _table(rows)
    items = Items(
        kind,
        "unlabelled",
        Path(),
        _different(f"{part}/{name}" for name in rows.names),
        None,
        [],
        images=as_objects(rows.images),
    )
    return Inside(items, rows.labels, classes, rows.reasons)


def _different(names: Iterable[str]) -> list[str]:
    """The names, each once: a later one of the same has #2 behind it, or #3."""
    seen: dict[str, int] = {}
    made = []
    for name in names:
        count = seen[name] = seen.get(name, 0) + 1
        made.append(name if count == 1 else f"{name}#{count}")
    return made


class _Header(tarfile.TarInfo):
    """A tar ends with two blocks of zeros; `tarfile` takes any header that it can't read for the
    end, but for the first one.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error


def _tar(file: BinaryIO, rows: _Rows) -> None:
    """Samples as WebDataset has them: files one after the other whose names are the same up to the
    first dot; the image is what ends as one, its label what ends in .cls.
    """
    key: str | None = None
    first, label = 0, ""

    def close_sample() -> None:
        rows.labels[first:] = [label] * (len(rows.labels) - first)

    try:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                if os.path.join(folder, stem) != key:
                    close_sample()
                    key, first, label = os.path.join(folder, stem), len(rows.labels), ""
                if ending.lower() == "cls":
                    label = _label(tar, member, rows.where)
                elif os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
                    read = partial(_content, tar, member)
                    rows.add(member.name.removeprefix("./"), "", member.size, read)
            _refuse_more(tar)
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, VggfeatError):
            raise
        raise not_read(rows.where, "tar", error) from error
    close_sample()


def _refuse_more(tar: tarfile.TarFile) -> None:
    """Raise tarfile.ReadError where something stands behind a tar's end: a header that was
    overwritten with zeros, or another tar.
    """
    stream: Any = tar.fileobj
    while block := stream.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more stands behind its end")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) < member.size:
        raise EOFError(f"it ends within {member.name}")
    return data


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    if member.size > _MOST_LABEL:
        raise VggfeatError(
            f"{where}: {member.name} has {member.size:,} bytes, and is to be a label"
        )
    return _content(tar, member).decode("utf-8", "replace").strip()


def _table(rows: _Rows) -> tuple[str, ...]:
    columns = columns_of(rows.where)
    if not columns.image:
        raise VggfeatError(f"{rows.where} has no column of images, as the first of the files has")
    names = [name for name in (columns.image, columns.label, columns.name) if name]
    for values in columns_of_file(rows.where, list(dict.fromkeys(names))):
        images = values[columns.image]
        told = values[columns.label] if columns.label else [None] * len(images)
        labels = label_texts(told, columns.classes, rows.where)
        own = values[columns.name] if columns.name else [None] * len(images)
        for cell, label, name in zip(images, labels, own, strict=True):
            its_name, image = _picture(cell)
            if not isinstance(image, bytes | None):
                raise VggfeatError(
                    f"{rows.where}: the column {columns.image} holds {type(image).__name__}, not"
                    " the bytes of images"
                )
            called = its_name or name
            row = len(rows.names)
            rows.add(
                str(row if called in (None, "") else called),
                label,
                None if image is None else len(image),
                partial(bytes, image or b""),
            )
    return columns.classes


def _picture(cell: Any) -> tuple[str, Any]:
    """Of a cell: the image's own name, its file's bytes, None where there are none."""
    if isinstance(cell, dict):
        return str(cell.get("path") or ""), cell.get("bytes")
    return "", cell
