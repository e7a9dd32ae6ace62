"""Writes the HDF5 feature file so that nothing can break it. N images, Q scales, D descriptor length.

The structure is complete before the first row: every data set has its place on the disk, and HDF5 is done with the
file. Rows then go to their places by plain writes, first what was computed and later that it was, so that a kill at
any moment leaves a sound `NAME.partial` that lacks the last rows. The same command opens it again and goes on; the
last of all is the final name. Several processes (torchrun) write their rows into the same file.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.store import (
    DONE,
    FORMAT,
    FORMAT_VERSION,
    PENDING,
    REASON_BYTES,
    TEXT,
    UNREADABLE,
    Description,
    create_hdf5,
    encode,
    open_hdf5,
    texts,
)

FLUSH_ROWS, FLUSH_SECONDS = (
    1000,
    10.0,
)  # descriptors kept in memory before they are written, each as of one image
STAMPED_BYTES = 1 << 16  # at either end of an image's file, of which its checksum is
SLACK_BYTES = 1 << 20  # for what HDF5 itself needs
STAMPS = ("bytes", "modified", "crc32")
VERSIONS = ("vggfeat", "torch", "timm", "PIL")  # that take part in what a descriptor is


def stamp(source: Any) -> tuple[int, int, int]:
    """Bytes, time of change in ns and CRC-32 of an image, to notice that another lies in its place; zeros if none does.

    The checksum is of the first and last 64 KiB. A path, or an array (whose time is 0).
    """
    if isinstance(source, np.ndarray):
        return source.nbytes, 0, zlib.crc32(np.ascontiguousarray(source).data)
    try:
        if not os.path.isfile(source):
            return 0, 0, 0
        with open(source, "rb") as file:
            status = os.fstat(file.fileno())
            checksum = zlib.crc32(file.read(STAMPED_BYTES))
            if status.st_size > STAMPED_BYTES:
                file.seek(max(STAMPED_BYTES, status.st_size - STAMPED_BYTES))
                checksum = zlib.crc32(file.read(STAMPED_BYTES), checksum)
        return status.st_size, status.st_mtime_ns, checksum
    except (OSError, ValueError):
        return 0, 0, 0


class _Place:
    """A data set's values in the file, one row after another, written and read without HDF5."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        offset = dataset.id.get_offset()
        if offset is None:
            raise VggfeatError(f"{dataset.name} is not in one piece")
        self.offset, self.dtype, self.shape = int(offset), dataset.dtype, dataset.shape
        self.row_bytes = int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize

    def write(self, descriptor: int, row: int, value: Any, position: int = 0) -> None:
        """value into a row, from its position-th value on."""
        data = np.asarray(value, self.dtype).tobytes()
        at = self.offset + row * self.row_bytes + position * self.dtype.itemsize
        while data:
            written = os.pwrite(descriptor, data, at)
            data, at = data[written:], at + written

    def read(self, descriptor: int) -> np.ndarray:
        values = bytearray(int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize)
        left, at = memoryview(values), self.offset
        while left:
            got = os.preadv(descriptor, [left], at)
            if not got:
                raise VggfeatError("the file ends too early")
            left, at = left[got:], at + got
        return np.frombuffer(values, self.dtype).reshape(self.shape)


class FeatureWriter:
    """Writes `path`.partial, or goes on where an earlier one stopped; `finish` gives it its name.

    items: the rows. dim: D. dtype: "float16" or "float32". attributes: further facts (strings or JSON-able).
    overwrite: `path` may exist, and a `path`.partial of other images, weights or options is begun anew.
    `described` (N, Q) bool: what is there.

    Leaving the `with` block early keeps what is there (`kept` says how much); a file without any row is removed.
    Raises VggfeatError when `path` exists, another process writes it, the disk refuses, or `path`.partial is of other
    images, weights or options (it is said which).
    """

    def __init__(
        self, path: str | os.PathLike[str], items: Items, description: Description, dim: int, dtype: str = "float32",
        attributes: dict[str, Any] | None = None, overwrite: bool = False,
    ) -> None:  # fmt: skip
        self._name(path)
        if bad := [name for name in items.names if "\0" in name]:
            raise VggfeatError(f"the name {bad[0]!r} of an image holds a zero byte, which no file's name can")
        if self.path.exists() and not overwrite:
            raise VggfeatError(f"{self.path} exists; give --overwrite, or another --out")
        if not self.path.parent.is_dir():
            raise VggfeatError(f"there is no folder {self.path.parent} to write {self.path.name} in")
        self.first = True
        self._file = _locked(self.partial, os.O_CREAT, fcntl.LOCK_EX)
        facts = {**asdict(description), "description": description.to_json(), **(attributes or {})}
        try:
            begun = os.fstat(self._file).st_size > 0
            if not (begun and self._continues(items, facts, dim, dtype, overwrite)):
                self._begin(items, facts, dim, dtype)
        except BaseException:
            self._close()
            raise

    @classmethod
    def join(cls, path: str | os.PathLike[str]) -> FeatureWriter:
        """A writer of some of the rows of a file that another process of the same extraction has made and shares."""
        writer = cls.__new__(cls)
        writer._name(path)
        writer.first = False
        writer._file = _locked(writer.partial, 0, fcntl.LOCK_SH)
        with _opened(writer.partial) as file:
            writer._find(file)
        return writer

    def share(self) -> None:
        """Let other processes of this extraction `join`."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VggfeatError(f"another process is writing {self.partial}") from error

    def _name(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._values: dict[tuple[int, int], np.ndarray] = {}
        self._failures: dict[int, str] = {}
        self._stamps: dict[int, tuple[int, int, int]] = {}
        self._started = self._last_flush = time.monotonic()

    def _begin(self, items: Items, facts: dict[str, Any], dim: int, dtype: str) -> None:
        """Lay the file out beside its place, take the room for it, and put it there."""
        new = self.partial.with_name(self.partial.name + ".new")
        row_bytes = len(facts["scales"]) * (dim * np.dtype(dtype).itemsize + 1) + REASON_BYTES + 64
        size = len(items) * row_bytes + SLACK_BYTES + sum(len(encode(name)) for name in items.names)
        size += 0 if items.labels is None else items.labels.nbytes
        size += sum(rows.nbytes for rows in items.splits.values())
        try:
            # A full disk is found now, not after hours of work; HDF5 would crash on one.
            with open(new, "wb") as probe:
                _reserve(probe.fileno(), size)
            with create_hdf5(new) as file:
                _lay_out(file, items, facts, dim, dtype)
            taken = _locked(new, 0, fcntl.LOCK_EX)
            _reserve(taken, os.fstat(taken).st_size)
            os.fsync(taken)
            os.replace(new, self.partial)
        except OSError as error:
            raise VggfeatError(
                f"can't write {self.path} ({size / 1e6:,.1f} MB): {error.strerror or error}"
            ) from error
        finally:
            new.unlink(missing_ok=True)
        os.close(self._file)
        self._file = taken
        with _opened(self.partial) as file:
            self._find(file)

    def _continues(self, items: Items, facts: dict[str, Any], dim: int, dtype: str, overwrite: bool) -> bool:
        """Whether the file that is there is of this extraction; VggfeatError if it isn't and may not be replaced."""
        try:
            with _opened(self.partial) as file:
                try:
                    if not file["described"][:].any():
                        return False  # nothing is lost
                    difference = next(_differences(file, items, facts, dim, dtype), "")
                    if not difference:
                        self._find(file)
                except VggfeatError:
                    raise
                except Exception as error:  # h5py meets damage in many ways
                    raise VggfeatError(f"{self.partial} is damaged: {error}") from error
                difference = difference or self._changed_image(items)
            if difference:
                raise VggfeatError(f"{self.partial} was begun with {difference}")
        except VggfeatError as error:
            if overwrite:
                return False
            raise VggfeatError(f"{error}; give --overwrite to begin anew, or another --out") from error
        return True

    def _changed_image(self, items: Items) -> str:
        stamps = zip(
            *(self._places[f"images/{name}"].read(self._file).tolist() for name in STAMPS), strict=True
        )
        for i, (there, described) in enumerate(zip(stamps, self.described.any(1), strict=True)):
            if described and not _same(items.source(i), there):
                return f"another image {items.names[i]}: it has changed since"
        return ""

    def _find(self, file: h5py.File) -> None:
        stored = file["descriptors"]
        count, scales, dim = stored.shape
        parts = _parts(count, scales, dim, stored.dtype)
        for name, (shape, kind) in parts.items():
            if not isinstance(file[name], h5py.Dataset) or (file[name].shape, file[name].dtype) != (
                shape,
                kind,
            ):
                raise VggfeatError(f"{self.partial} is damaged: {name} is not what it was made as")
        self._places = {name: _Place(file[name]) for name in parts}
        self.described = self._places["described"].read(self._file) == 1
        self._status = self._places["status"].read(self._file)
        self._seconds = float(self._places["seconds"].read(self._file)[0])

    def read(self, row: int, source: Any) -> None:
        """Note which image is about to be described, so that a later run can tell whether it is still the same."""
        self._stamps[row] = stamp(source)

    def write(self, row: int, scale: int, descriptor_D: np.ndarray) -> None:
        """Keep the descriptor of a row at its scale-th Q; it reaches the file with the next flush."""
        target = self._places["descriptors"].dtype
        with np.errstate(over="ignore"):
            stored = descriptor_D.astype(target)
        if not np.isfinite(stored).all():
            raise VggfeatError(
                f"row {row} has descriptors beyond the range of {target}; "
                + (
                    "give --store float32 --overwrite"
                    if target == np.float16
                    else "the weights are not usable"
                )
            )
        self._values[row, scale] = stored
        self._flush_if_due()

    def fail(self, row: int, reason: str) -> None:
        """Mark row as unreadable, with the reason."""
        self._failures[row] = reason
        for scale in range(self.described.shape[1]):
            self._values.pop((row, scale), None)
        self._flush_if_due()

    def _flush_if_due(self) -> None:
        rows = len(self._values) / self.described.shape[1] + len(self._failures)
        if rows >= FLUSH_ROWS or time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring what was written so far to the disk: first descriptors, and when they are there, that they are."""
        put = partial(self._put, self._file)
        try:
            for (row, scale), value in self._values.items():
                put("descriptors", row, value, scale * len(value))
            for row, reason in self._failures.items():
                put("descriptors", row, np.full(self._places["descriptors"].shape[1:], np.nan))
                put("errors", row, _cut(reason))
                put("described", row, np.zeros(self.described.shape[1]))
                self.described[row] = False
            for row in {row for row, _ in self._values}:
                for name, fact in zip(STAMPS, self._stamps.get(row, (0, 0, 0)), strict=True):
                    put(f"images/{name}", row, fact)
                if self._status[row] == UNREADABLE:  # in an earlier run
                    put("errors", row, b"")
            os.fsync(self._file)
            for row, scale in self._values:
                put("described", row, 1, scale)
                self.described[row, scale] = True
            for row in sorted({row for row, _ in self._values} | self._failures.keys()):
                status = (
                    UNREADABLE if row in self._failures else DONE if self.described[row].all() else PENDING
                )
                self._status[row] = status
                put("status", row, status)
                if status != PENDING:
                    self._stamps.pop(row, None)
            if self.first:
                put("seconds", 0, self.seconds)
        except OSError as error:
            raise VggfeatError(
                f"can't write {self.partial}: {error.strerror}; mend it, and the same command goes on"
            ) from error
        self._values.clear()
        self._failures.clear()
        self._last_flush = time.monotonic()

    def _put(self, file: int, name: str, row: int, value: Any, position: int = 0) -> None:
        self._places[name].write(file, row, value, position)

    @property
    def seconds(self) -> float:
        """Spent on the file so far, by earlier runs too."""
        return self._seconds + time.monotonic() - self._started

    @property
    def unreadable(self) -> dict[int, str]:
        """Row -> reason, by what is in the file."""
        status, reasons = (self._places[name].read(self._file) for name in ("status", "errors"))
        return {
            int(i): reasons[i].decode("utf-8", "surrogateescape")
            for i in np.flatnonzero(status == UNREADABLE)
        }

    def kept(self) -> str:
        """What is in the file, as part of a sentence; empty if that is nothing."""
        count = int((self._status != PENDING).sum())
        if not self.described.any():
            return ""
        return f"{count:,} of {len(self._status):,} images are in {self.partial}"

    def finish(self) -> None:
        """Flush, check that no row of any process is pending, and give the file its name."""
        self.flush()
        pending = int((self._places["status"].read(self._file) == PENDING).sum())
        if pending:
            raise VggfeatError(f"{pending} rows of {self.partial} were never described")
        try:
            os.fsync(self._file)
            os.replace(self.partial, self.path)
        except OSError as error:
            raise VggfeatError(f"can't write {self.path}: {error.strerror}") from error
        os.close(self._file)
        self._file = -1

    def _close(self) -> None:
        """Let go of an unfinished file; remove it if it has no row."""
        if self.first:
            refused = os.fstat(self._file).st_size > 0 and not hasattr(self, "described")
            if not refused and not (hasattr(self, "described") and self.described.any()):
                self.partial.unlink(missing_ok=True)
        os.close(self._file)

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:  # not finished
            with suppress(VggfeatError):  # the error that led here is told
                self.flush()
            self._close()


def _reserve(descriptor: int, size: int) -> None:
    """Take size bytes of the disk for an open file; OSError when it doesn't have them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def _locked(path: Path, flags: int, kind: int) -> int:
    """A file descriptor that holds a lock on path until it is closed, which a kill does too."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
        except OSError as error:
            raise VggfeatError(f"can't write {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
            os.close(descriptor)  # its writer has just given it its name
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise VggfeatError(f"another process is writing {path}") from error
            raise VggfeatError(f"can't lock {path}: {error.strerror}") from error


def _opened(path: Path) -> h5py.File:
    return open_hdf5(path, FORMAT, FORMAT_VERSION, unfinished=True)


def _cut(reason: str) -> bytes:
    return encode(reason)[:REASON_BYTES].decode("utf-8", "ignore").encode()


def _parts(count: int, scales: int, dim: int, dtype: np.dtype) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of what is written while an extraction runs."""
    return {
        "descriptors": ((count, scales, dim), dtype),
        "described": ((count, scales), np.dtype(np.uint8)),
        "status": ((count,), np.dtype(np.uint8)),
        "errors": ((count,), h5py.string_dtype("utf-8", REASON_BYTES)),
        "seconds": ((1,), np.dtype(np.float64)),
        "images/bytes": ((count,), np.dtype(np.int64)),
        "images/modified": ((count,), np.dtype(np.int64)),
        "images/crc32": ((count,), np.dtype(np.uint32)),
    }


def _lay_out(file: h5py.File, items: Items, facts: dict[str, Any], dim: int, dtype: str) -> None:
    """Everything that a finished file has, no row described."""
    count, scales = len(items), len(facts["scales"])
    for name, (shape, kind) in _parts(count, scales, dim, np.dtype(dtype)).items():
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        if name == "descriptors":
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # every row is written once, its status says when
        file.create_dataset(name, shape, kind, dcpl=plist)
    file.create_dataset("names", data=[encode(name) for name in items.names], dtype=TEXT)
    file.create_dataset("classes", data=[encode(name) for name in items.classes], dtype=TEXT)
    if items.labels is not None:
        file.create_dataset("labels", data=items.labels)
    splits = file.create_group("splits")
    for name, index in items.splits.items():
        splits.create_dataset(name, data=np.asarray(index, np.int64))
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["dataset"] = items.dataset
    file.attrs["protocol"] = items.protocol
    file.attrs["root"] = encode(str(items.root))
    for key, value in facts.items():
        file.attrs[key] = value if isinstance(value, str | int | float | bool | tuple) else json.dumps(value)


def _differences(file: h5py.File, items: Items, facts: dict[str, Any], dim: int, dtype: str) -> Iterator[str]:
    """What an unfinished file has otherwise than an extraction that would go on with it, each in a few words."""
    there = asdict(Description.from_json(file.attrs["description"]))
    names = {"fingerprint": "other weights, sha256", "pool": "max-pooling"}
    for key in ("net", "fingerprint", "layer", "scales", "mirror", "pool", "filter", "precision"):
        if there[key] != facts[key]:
            yield f"{names.get(key, key)} {_short(there[key])}, not {_short(facts[key])}"
    stored = file["descriptors"]
    if stored.dtype != np.dtype(dtype):
        yield f"--store {stored.dtype}, not {dtype}"
    before, now = json.loads(file.attrs.get("versions", "{}")), facts.get("versions", {})
    for package in VERSIONS:
        if before.get(package) != now.get(package):
            yield f"{package} {before.get(package)}, not {now.get(package)}"
    if file.attrs["dataset"] != items.dataset:
        yield f"dataset {file.attrs['dataset']}, not {items.dataset}"
    listed = texts(file["names"])
    if len(listed) != len(items):
        yield f"{len(listed):,} images, not {len(items):,}"
    for a, b in zip(listed, items.names, strict=False):
        if encode(a) != encode(b):
            yield f"an image {a} where there is {b} now"
    if stored.shape != (len(items), len(facts["scales"]), dim):
        yield f"descriptors of shape {stored.shape}"
    if texts(file["classes"]) != list(items.classes):
        yield "other classes"
    before_rows: dict[str, Any] = {"labels": file["labels"][:]} if "labels" in file else {}
    file["splits"].visititems(
        lambda name, item: before_rows.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None
    )
    rows = ({} if items.labels is None else {"labels": items.labels}) | items.splits
    for name in sorted(before_rows.keys() | rows.keys()):
        if not (name in before_rows and name in rows and np.array_equal(before_rows[name], rows[name])):
            yield "other labels" if name == "labels" else f"another split {name}"


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _same(source: Any, there: tuple[int, int, int]) -> bool:
    """Whether an image is the one that was stamped; a new time of change alone does not make it another."""
    if not isinstance(source, np.ndarray):
        try:
            status = os.stat(source)
        except OSError:
            return False
        if (status.st_size, status.st_mtime_ns) == there[:2]:
            return True
    size, _, checksum = stamp(source)
    return (size, checksum) == (there[0], there[2])
