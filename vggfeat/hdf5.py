"""HDF5 files that are written and read by plain writes and reads; libhdf5 never opens one that is
not its own.

libhdf5 trusts what it reads: a damaged or crafted file leads it into endless loops, out of memory,
into crashes, and a full disk makes it crash as it closes. So it only draws up the structure of a
file here, in memory. The values go to their places by plain writes; and a table in front of the
file, in HDF5's user block, says where each array lies, for a reader that needs nothing else. Any
program with HDF5 reads the same arrays: `docs/formats.md`.

    0 magic | 8 length of the table, its CRC-32 | 16 a number that is this file's own
    32 seal | 64 the table, JSON

The seal is a SHA-256 of the whole file but for itself and the arrays that have checksums of their
own, row by row; it is written last, and zeros say that the file is not finished. Nothing is
allocated, read or trusted before its place and size are known to lie within the file: opening one
takes at most 16 times the bytes of its arrays, those with checksums of their own left out, and 400
MB for its documents; reading an array takes its own bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vggfeat.checked import fitted
from vggfeat.errors import VggfeatError, reason
from vggfeat.files import whole

MAGIC = b"vggfeat2"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HEAD = struct.Struct("<8sII16s32s")
SEAL_AT, UNSEALED = 32, bytes(32)
TABLE_BYTES = 1 << 22
JSON_BYTES = 1 << 24
BLOCK = 1 << 22
TYPES = {"|u1", "|i1", "<u4", "<i4", "<i8", "<f2", "<f4", "<f8"}
TEXT_BYTES = 1 << 12  # of the longest text of fixed length
Spec = tuple[tuple[int, ...], np.dtype]
"""Shape and type of an array."""


class Damaged(VggfeatError):  # noqa: N818 - named as what is wrong
    """What a file holds is not what it was written as."""


@contextmanager
def damaged(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, whatever goes wrong with values that were read from path is told as damage of that
    file.
    """
    try:
        yield
    except Damaged as error:
        if str(error).startswith(f"{path} is damaged: "):  # told already, further in
            raise
        raise Damaged(f"{path} is damaged: {error}") from error
    except VggfeatError:
        raise
    except OSError as error:
        raise VggfeatError(f"can't read {path}: {reason(error)}") from error
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise Damaged(f"{path} is damaged: {type(error).__name__} {error}") from error


@dataclass(frozen=True)
class Place:
    """Where an array's values lie in a file, in C order."""

    at: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return _count(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return _count(self.shape[1:]) * self.dtype.itemsize

    def write(self, file: int, value: Any, row: int = 0, position: int = 0) -> None:
        """value, from the position-th value of a row on."""
        data = np.ascontiguousarray(value, self.dtype).reshape(-1).view(np.uint8).data
        write_at(file, data, self.at + row * self.row_bytes + position * self.dtype.itemsize)

    def read(self, file: int, low: int = 0, high: int | None = None) -> np.ndarray:
        """Rows low to high; all of a scalar's."""
        if not self.shape:
            return np.frombuffer(read_at(file, self.nbytes, self.at), self.dtype).reshape(())
        high = self.shape[0] if high is None else high
        data = read_at(file, (high - low) * self.row_bytes, self.at + low * self.row_bytes)
        return np.frombuffer(data, self.dtype).reshape(high - low, *self.shape[1:])


def _count(shape: Sequence[int]) -> int:
    product = 1  # Python's integers don't overflow
    for n in shape:
        product *= n
    return product


def write_at(file: int, data: bytes | memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


def read_at(file: int, count: int, at: int) -> bytearray:
    """Raises Damaged where the file ends before."""
    values = bytearray(count)
    read_into(file, memoryview(values), at)
    return values


def read_into(file: int, left: memoryview, at: int) -> None:
    """Fill bytes from a place in a file. Raises Damaged where it ends before."""
    while left:
        got = os.preadv(file, [left], at)
        if not got:
            raise Damaged("it ends too early")
        left, at = left[got:], at + got


def checksums(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of the last axis's values, (...,) uint32 of (..., D)."""
    flat = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
    return np.array([zlib.crc32(row.data) for row in flat], np.uint32).reshape(rows.shape[:-1])


def encode(text: str) -> bytes:
    """File names need not be valid Unicode; their bytes are kept."""
    return text.encode("utf-8", "surrogateescape")


def decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def column(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as two arrays, so that one long text doesn't widen all: their bytes, and where each
    begins and ends.
    """
    raw = [encode(text) for text in texts]
    offsets = np.zeros(len(raw) + 1, np.int64)
    np.cumsum([len(text) for text in raw], out=offsets[1:])
    return {f"{name}/bytes": np.frombuffer(b"".join(raw), np.uint8), f"{name}/offsets": offsets}


def document(value: Any) -> np.ndarray:
    """A JSON value as bytes; ASCII, so that every text comes back as it was.

    Raises VggfeatError for one that would be too long to be read again.
    """
    raw = json.dumps(value).encode()
    if len(raw) > JSON_BYTES:
        raise VggfeatError(
            f"what the file is to say of itself has {len(raw):,} bytes, more than the"
            f" {JSON_BYTES:,} that are read: shorten the weights' metadata, or the names of classes"
        )
    return np.frombuffer(raw, np.uint8)


def parse(raw: bytes | bytearray) -> Any:
    """The JSON value in raw. Raises Damaged where it is none."""
    try:
        return json.loads(bytes(raw).decode())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"a text is no JSON ({error})") from error


# --- writing --------------------------------------------------------------------------------------


class _Drawing(io.RawIOBase):
    """What libhdf5 writes, piece by piece; it is never asked for anything back."""

    def __init__(self) -> None:
        self.pieces: dict[int, bytes] = {}
        self.at = self.size = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def write(self, data: Any) -> int:
        self.pieces[self.at] = bytes(data)
        self.at += len(data)
        self.size = max(self.size, self.at)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        raise AssertionError("libhdf5 reads a file that it only writes")

    def truncate(self, size: int | None = None) -> int:
        self.size = self.at if size is None else size
        return self.size


@dataclass(frozen=True)
class Layout:
    """A file that is drawn up and not written yet.

    places: name -> where its values go. size: of the file in bytes.
    """

    places: dict[str, Place]
    size: int
    _pieces: dict[int, bytes]
    _table: bytes

    @classmethod
    def of_arrays(
        cls,
        format: str,
        version: int,
        specs: Mapping[str, Spec],
        checked: Mapping[str, str] | None = None,
    ) -> Layout:
        """The layout of arrays, in their order.

        checked: arrays whose rows have checksums of their own, and the array that these are: it
        lies behind what HDF5 knows of, as no reader but ours has a use for it.
        """
        # the table's length must be known before places are, and places are its content: no number
        # has 19 digits
        widest = {name: Place(10**18, shape, dtype) for name, (shape, dtype) in specs.items()}
        needed = _HEAD.size + len(_table_of(format, version, 10**18, 0, widest, checked or {}))
        block = 1 << max(12, (needed - 1).bit_length())
        hidden = set((checked or {}).values())
        drawing = _Drawing()
        places = {}
        with h5py.File(drawing, "w", libver=("v108", "v108"), userblock_size=block) as file:
            # of fixed length: no heap, which would have no checksum
            file.attrs["format"] = np.bytes_(format)
            file.attrs["format_version"] = version
            for name, (shape, dtype) in specs.items():
                if name in hidden:
                    continue
                plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                plan.set_layout(h5py.h5d.CONTIGUOUS)
                plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                plan.set_obj_track_times(False)
                kind = h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype
                at = file.create_dataset(name, shape, kind, dcpl=plan).id.get_offset()
                places[name] = Place(int(at) if _count(shape) else 0, shape, dtype)
        size = drawing.size
        for name in hidden:
            places[name] = Place(size, *specs[name])
            size += places[name].nbytes
        table = _table_of(format, version, size, block, places, checked or {})
        return cls(places, size, drawing.pieces, table)

    def write(self, file: int) -> None:
        """Take the room for the file, and write its structure; the values may follow. OSError where
        the disk refuses.

        A kill before the end leaves a file that says of itself that nothing is in it (`begun`).
        """
        write_at(file, MAGIC, 0)
        reserve(file, self.size)
        for at, piece in self._pieces.items():
            write_at(file, piece, at)
        os.fsync(file)
        head = _HEAD.pack(
            MAGIC, len(self._table), zlib.crc32(self._table), os.urandom(16), UNSEALED
        )
        write_at(file, head[len(MAGIC) :] + self._table, len(MAGIC))


def reserve(file: int, size: int) -> None:
    """Take size bytes of the disk for an open file; OSError when it doesn't have them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def _table_of(
    format: str,
    version: int,
    size: int,
    block: int,
    places: Mapping[str, Place],
    checked: Mapping[str, str],
) -> bytes:
    arrays = {name: [place.dtype.str, place.shape, place.at] for name, place in places.items()}
    table = {
        "format": format,
        "version": version,
        "size": size,
        "block": block,
        "checked": dict(checked),
    }
    return json.dumps({**table, "arrays": arrays}).encode()


def begun(file: int) -> bool | None:
    """Whether an open file has a table; None for a file that is neither empty nor one of ours."""
    head = os.pread(file, _HEAD.size, 0)
    if not head or head == MAGIC[: len(head)] or head[:16] == MAGIC + bytes(8):
        return False
    return True if head.startswith(MAGIC) else None


def unseal(file: int) -> None:
    """Say that an open file is not finished."""
    write_at(file, UNSEALED, SEAL_AT)


def write_file(
    path: Path,
    format: str,
    version: int,
    arrays: Mapping[str, np.ndarray],
    checked: Mapping[str, str] | None = None,
) -> None:
    """Write a whole file; it appears when it is on the disk. Raises CantWrite where the disk
    refuses.
    """
    arrays = {name: _stored(values) for name, values in arrays.items()}
    specs = {name: (values.shape, values.dtype) for name, values in arrays.items()}
    layout = Layout.of_arrays(format, version, specs, checked)
    with whole(path, durable=True) as partial:
        file = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        try:
            layout.write(file)
            for name, values in arrays.items():
                layout.places[name].write(file, values)
            with File(partial, file, unfinished=True) as made:
                made.seal()
        finally:
            os.close(file)


def _stored(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values)
    return values.astype(values.dtype.newbyteorder("<"))


# --- reading --------------------------------------------------------------------------------------


class File:
    """An open file of ours: its table, checked. Values are read when they are asked for.

    number: its own; another file in its place has another. Raises VggfeatError: see `open_file`.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        what: str = "file of this program",
        *,
        unfinished: bool = False,
    ) -> None:
        self.path, self.descriptor, self._what = path, descriptor, what
        self._owned = False
        with damaged(path):
            self._read_table()
            if not unfinished:
                if self.seal_there == UNSEALED:
                    raise VggfeatError(
                        f"{path} is half-written: run what was writing it to the end"
                    )
                if self.seal_there != self._seal():
                    raise Damaged("its checksum is another: it has changed since it was written")

    def _read_table(self) -> None:
        size = os.fstat(self.descriptor).st_size
        head = os.pread(self.descriptor, _HEAD.size, 0)
        if head.startswith(HDF5_SIGNATURE):
            raise VggfeatError(
                f"{self.path} is an HDF5 file of another program, or of this one before version 2"
                f" of its formats: `vggfeat convert {self.path} NEW` reads the latter"
            )
        if len(head) < _HEAD.size or not head.startswith(MAGIC):
            raise VggfeatError(f"{self.path} is not a {self._what}: damaged, or another format")
        _, length, checksum, self.number, self.seal_there = _HEAD.unpack(head)
        if not length:
            raise VggfeatError(f"{self.path} is half-written: nothing is in it yet")
        if length > min(TABLE_BYTES, size):
            raise Damaged("its table of contents is longer than the file")
        raw = read_at(self.descriptor, length, _HEAD.size)
        if zlib.crc32(raw) != checksum:
            raise Damaged("its table of contents has another checksum")
        table = parse(raw)
        self.format, self.version = str(table["format"]), table["version"]
        if table["size"] != size:
            raise Damaged(f"it has {size:,} bytes, not {table['size']:,}")
        self.arrays = {str(name): _place(str(name), row) for name, row in table["arrays"].items()}
        end = _HEAD.size + length
        for place in sorted((p for p in self.arrays.values() if p.nbytes), key=lambda p: p.at):
            if place.at < end:
                raise Damaged("its arrays overlap")
            end = place.at + place.nbytes
        if end > size:
            raise Damaged("an array reaches beyond its end")
        self.checked = {str(name): str(sums) for name, sums in table["checked"].items()}
        for name, sums in self.checked.items():
            if (self.arrays[sums].shape, self.arrays[sums].dtype.str) != (
                self.arrays[name].shape[:-1],
                "<u4",
            ):
                raise Damaged(f"the checksums of {name} are not one a row")

    def _seal(self) -> bytes:
        """SHA-256 of all that has no checksum of its own."""
        skipped = sorted((self.arrays[name].at, self.arrays[name].nbytes) for name in self.checked)
        digest, at = hashlib.sha256(), 0
        size = os.fstat(self.descriptor).st_size
        for low, count in [(SEAL_AT, len(UNSEALED)), *skipped, (size, 0)]:
            while at < low:
                block = read_at(self.descriptor, min(BLOCK, low - at), at)
                digest.update(block)
                at += len(block)
            at = max(at, low + count)
        return digest.digest()

    def seal(self) -> None:
        """Say that the file is finished."""
        write_at(self.descriptor, self._seal(), SEAL_AT)

    def array(self, name: str, kind: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """All values of an array. kind: NumPy's letters of its type, e.g. "iu". shape: None where
        any length is right.

        Raises Damaged when it isn't there, or is something else.
        """
        place = self.place(name, kind, shape)
        return place.read(self.descriptor)

    def place(self, name: str, kind: str, shape: tuple[int | None, ...]) -> Place:
        """Where an array lies; otherwise as `array`."""
        if name not in self.arrays:
            raise Damaged(f"it has no {name}")
        place = self.arrays[name]
        fits = len(place.shape) == len(shape) and all(
            want in (None, n) for want, n in zip(shape, place.shape, strict=True)
        )
        if place.dtype.kind not in kind or not fits:
            wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
            raise Damaged(
                f"{name} is {place.dtype} of shape {place.shape}, where {wanted} is expected"
            )
        return place

    def texts(self, name: str) -> list[str]:
        """The texts of a `column`. Raises Damaged."""
        offsets = self.array(f"{name}/offsets", "i", (None,))
        raw = self.array(f"{name}/bytes", "u", (None,)).tobytes()
        if (
            not len(offsets)
            or offsets[0] != 0
            or offsets[-1] != len(raw)
            or (np.diff(offsets) < 0).any()
        ):
            raise Damaged(f"the offsets of {name} are wrong")
        ends = offsets.tolist()
        return [decode(raw[a:b]) for a, b in pairwise(ends)]

    def document(self, name: str, kind: Any) -> Any:
        """The value of a `document`, as a type of `checked.fitted`. Raises Damaged."""
        if self.place(name, "u", (None,)).nbytes > JSON_BYTES:
            raise Damaged(f"{name} is longer than {JSON_BYTES:,} bytes")
        try:
            return fitted(parse(self.array(name, "u", (None,)).tobytes()), kind, name)
        except VggfeatError as error:
            raise Damaged(str(error)) from error

    def under(self, prefix: str) -> list[str]:
        """The names of arrays that begin with prefix, less it."""
        return [name.removeprefix(prefix) for name in self.arrays if name.startswith(prefix)]

    def close(self) -> None:
        if self._owned:
            self._owned = False
            os.close(self.descriptor)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _place(name: str, row: Any) -> Place:
    kind, shape, at = row
    numbers = [at, *shape]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or len(shape) > 4:
        raise Damaged(f"{name} has an impossible place")
    if not (kind in TYPES or (kind.startswith("|S") and 0 < int(kind[2:]) <= TEXT_BYTES)):
        raise Damaged(f"{name} has the unknown type {kind[:20]!r}")
    return Place(at, tuple(shape), np.dtype(kind))


def open_file(path: Path, format: str, version: int, *, unfinished: bool = False) -> File:
    """Open one of our files for reading, after checking that it is one, whole, and what it was
    written as.

    unfinished: also one that is being written. Raises VggfeatError: missing, unreadable just now,
    half-written, another format or version, damaged.
    """
    what = format.removeprefix("vggfeat-").rstrip("s") + " file"
    if path.name.endswith(".partial") and not unfinished and os.path.lexists(path):
        raise VggfeatError(
            f"{path} is half-written: its extraction has not finished; run it to the end"
        )
    try:
        # not to wait for a pipe's writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        partial = Path(f"{path}.partial")
        hint = (
            f" (there is {partial.name}: its extraction has not finished)"
            if os.path.exists(partial)
            else ""
        )
        raise VggfeatError(f"no {what} at {path}{hint}") from None
    except (OSError, ValueError) as error:
        raise VggfeatError(f"can't read {path}: {reason(error)}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise VggfeatError(f"{path} is not a {what}: a folder, a pipe or a device")
        file = File(path, descriptor, what, unfinished=unfinished)
        if file.format != format:
            raise VggfeatError(f"{path} is not a {what} (its format is {file.format[:40]!r})")
        if file.version != version:
            raise VggfeatError(
                f"{path} has version {file.version} of the format of a {what}; this program reads"
                f" version {version}: take the program that wrote it, or make the file again"
            )
    except BaseException:
        os.close(descriptor)
        raise
    file._owned = True
    return file


def format_of(path: Path) -> str | None:
    """The format of a file of ours; None for any other file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        return File(path, descriptor, unfinished=True).format
    except VggfeatError:  # whoever reads the file says what is wrong with it
        return None
    finally:
        os.close(descriptor)
