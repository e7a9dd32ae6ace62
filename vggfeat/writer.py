"""Writes the HDF5 feature file so that nothing can break it. N images, Q scales, D descriptor
length.

The structure is complete before the first row: every array has its place on the disk (`hdf5`). Rows
then go to their places by plain writes, first what was computed and later, in one byte a scale,
that it was: a kill at any moment leaves a sound `NAME.partial` that lacks the last rows. The same
command opens it again and goes on; the last of all are a look at the whole file, its seal and its
final name. Several processes (torchrun) write into the same file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vggfeat import hdf5
from vggfeat.checked import shown
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError, reason
from vggfeat.files import sync
from vggfeat.hdf5 import Damaged, Layout, Spec, damaged, decode, encode
from vggfeat.store import (
    DONE,
    FORMAT,
    FORMAT_VERSION,
    PENDING,
    REASON_BYTES,
    UNREADABLE,
    Description,
    Facts,
    arrays_of,
    differences,
    read_features,
    read_rows,
    read_seconds,
    read_status,
    row_status,
)

FLUSH_ROWS, FLUSH_SECONDS = 1000, 10.0
"""Descriptors kept in memory before they are written, each as of one image."""
STAMPS = ("bytes", "modified", "changed", "crc32")
VERSIONS = ("vggfeat", "torch", "timm", "PIL")
"""Packages that take part in what a descriptor is."""
EXISTS = "exists; give `overwrite`, or another `out` (`retry` describes what was unreadable in it)"
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""What a file system without locks answers."""
Stamp = tuple[int, int, int, int]


class _OutOfReachError(VggfeatError):
    """An image that a file describes can't be looked at: nothing is known against the file."""


def stamp(source: Any) -> Stamp:
    """Bytes, times of change (content, entry) in ns and CRC-32 of an image: to notice that another
    is in its place.

    A path; or an array, or the bytes of a file, whose times are 0. Zeros if it is no file. Raises
    OSError where it can't be read.
    """
    if isinstance(source, np.ndarray):
        return source.nbytes, 0, 0, zlib.crc32(np.ascontiguousarray(source).data)
    if isinstance(source, bytes):
        return len(source), 0, 0, zlib.crc32(source)
    if not stat.S_ISREG(os.stat(source).st_mode):
        return 0, 0, 0, 0
    with open(source, "rb") as file:
        status, checksum = os.fstat(file.fileno()), 0
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, checksum


class FeatureWriter:
    """Writes `path`.partial, or goes on where an earlier one stopped; `finish` gives it its name.

    `open` takes the job: items: the rows. dim: D; of several layers a tuple, each one's. dtype:
    "float16" or "float32". facts: further ones, JSON-able.
    overwrite: `path` may exist, and a `path`.partial of other images, weights or options is begun
    anew. retry: `path` may exist; its unreadable rows are to be described once more (it is
    `path`.partial until then). say: what is odd and no reason to stop, in a sentence. `described`
    (N, Q) bool: what is there.

    Leaving the `with` block early keeps what is there (`kept` says how much); a file without any
    row is removed. Raises VggfeatError when `path` exists, another process writes it, the disk
    refuses, or `path`.partial is of other images, weights or options (it is said which).
    """

    def __init__(
        self,
        file: hdf5.File,
        path: Path,
        say: Callable[[str], None],
        *,
        first: bool,
        replaces: bool = False,
        taken_back: bool = False,
        began: float,
    ) -> None:
        """Of a file that is laid out, and locked until it is closed: see `open` and `join`.

        began: the opening of it, by time.monotonic.
        """
        self.path, self.partial, self.say = path, partial_of(path), say
        self.first, self.replaces, self._taken_back = first, replaces, taken_back
        self._file, self._places, self._number = file.descriptor, file.arrays, file.number
        self._size = os.fstat(self._file).st_size
        self._layers: list[str] = file.document("facts", Facts)["layers"]
        image = self._places.get("rows/image")
        self._image_N = None if image is None else image.read(self._file)
        self._lost = ""  # what happened to the file while it was written
        self._values: dict[tuple[int, int], np.ndarray] = {}
        self._failures: dict[int, str] = {}
        self._stamps: dict[int, Stamp] = {}
        with damaged(self.partial):
            self._status_NQ = _stored_status(file)
            self._seconds = read_seconds(file)
        unreadable_N = row_status(self._status_NQ) == UNREADABLE
        self.described = (self._status_NQ == DONE) & ~unreadable_N[:, None]
        self._started = self._last_flush = began

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        items: Items,
        description: Description,
        dim: int | tuple[int, ...],
        dtype: str = "float32",
        facts: dict[str, Any] | None = None,
        overwrite: bool = False,
        retry: bool = False,
        images_here: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> FeatureWriter:
        """The file as of a job, begun, or gone on with, or taken back; see the class. images_here:
        whether they can be held against what is known of them, where it is gone on with.
        """
        began, path = time.monotonic(), behind_link(path)
        if bad := [name for name in items.names if "\0" in name]:
            raise VggfeatError(
                f"the name {bad[0]!r} of an image holds a zero byte, which no file's name can"
            )
        finished = os.path.lexists(path)
        if finished and not (overwrite or retry):
            raise VggfeatError(f"{path} {EXISTS}")
        if not path.parent.is_dir():
            raise VggfeatError(f"there is no folder {path.parent} to write {path.name} in")
        job = _Job(items, description, dim, np.dtype(dtype), facts or {}, images_here)
        make = partial(cls, path=path, say=say, first=True, replaces=overwrite, began=began)
        if finished and retry:
            return _taken_back(path, job, say, make)
        descriptor = locked(partial_of(path), os.O_CREAT, fcntl.LOCK_EX, say)
        with _closed_on_failure(descriptor):
            if os.path.lexists(path) and not (overwrite or retry):  # its writer has just ended
                if not os.fstat(descriptor).st_size:
                    partial_of(path).unlink()
                raise VggfeatError(f"{path} {EXISTS}")
            return _gone_on_with(descriptor, path, job, overwrite, make) or make(
                _begun(descriptor, path, job)
            )

    @classmethod
    def join(
        cls, path: str | os.PathLike[str], say: Callable[[str], None] = lambda line: None
    ) -> FeatureWriter:
        """A writer of some of the rows of a file that another process of the same extraction has
        made and shares.
        """
        began, path = time.monotonic(), behind_link(path)
        descriptor = locked(partial_of(path), 0, fcntl.LOCK_SH, say)
        with _closed_on_failure(descriptor), damaged(partial_of(path)):
            file = hdf5.File(partial_of(path), descriptor, unfinished=True)
            return cls(file, path, say, first=False, began=began)

    def share(self) -> None:
        """Let other processes of this extraction `join`."""
        _lock(self._file, fcntl.LOCK_SH, self.partial, self.say)

    # --- rows -------------------------------------------------------------------------------------

    def note_source(self, image: int, source: Any) -> None:
        """Note which image is about to be described, so that a later run can tell whether it is
        still the same. image: its number among the images; its row's, unless rows are boxes.
        """
        with suppress(OSError, ValueError):  # what is wrong with it is told by who decodes it
            self.note_stamp(image, stamp(source))

    def note_stamp(self, image: int, its: Stamp) -> None:
        """As `note_source`, by what is known of the image's file."""
        self._stamps[image] = its

    def write(self, row: int, scale: int, descriptor_D: np.ndarray) -> None:
        """Keep the descriptor of a row at its scale-th Q; it reaches the file with the next
        flush. Of several layers: theirs, one behind the other.
        """
        dtype, again = self._places["descriptors"].dtype, " and `overwrite`"
        self._values[row, scale] = stored(descriptor_D, dtype, f"row {row}", again)
        self._flush_if_due()

    def fail(self, row: int, why: str) -> None:
        """Mark row as unreadable, and why."""
        self._failures[row] = why
        for scale in range(self.described.shape[1]):
            self._values.pop((row, scale), None)
        self._flush_if_due()

    def _flush_if_due(self) -> None:
        rows = len(self._values) / self.described.shape[1] + len(self._failures)
        if rows >= FLUSH_ROWS or time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring what was written so far to the disk: first descriptors, and when they are there,
        that they are.
        """
        self._refuse_loss()
        try:
            self._flush()
        except OSError as error:
            raise VggfeatError(
                f"can't write {self.partial}: {reason(error)}; mend it, and the same command"
                " goes on"
            ) from error
        self._values.clear()
        self._failures.clear()
        self._last_flush = time.monotonic()

    def _flush(self) -> None:
        rows = sorted({row for row, _ in self._values} | self._failures.keys())
        # what is about to be replaced must not count as there meanwhile
        stale = [row for row in rows if row in self._failures or UNREADABLE in self._status_NQ[row]]
        if stale := [row for row in stale if self._status_NQ[row].any()]:
            for row in stale:
                self._set_status(row, np.full(self.described.shape[1], PENDING))
            os.fsync(self._file)
        places = [self._places[name] for name, _ in self._arrays()]
        nothing = np.full(sum(place.shape[2] for place in places), np.nan, places[0].dtype)
        for row, why in self._failures.items():
            for scale in range(self.described.shape[1]):
                self._put_descriptor(row, scale, nothing)
            self._put("errors", row, cut_reason(why).encode())
        for (row, scale), value in self._values.items():
            self._put_descriptor(row, scale, value)
        for row in {row for row, _ in self._values}:
            image = self._image_of(row)
            for name, fact in zip(STAMPS, self._stamps.get(image, ()), strict=False):
                self._put(f"images/{name}", image, fact)
            self._put("errors", row, b"")  # an earlier run may have been killed after it put one
        if self.first:
            self._put("seconds", 0, self.seconds)
        os.fsync(self._file)
        for row in rows:
            status_Q = self._status_NQ[row].copy()
            for scale in range(len(status_Q)):
                if row in self._failures:
                    status_Q[scale] = UNREADABLE
                elif (row, scale) in self._values:
                    status_Q[scale] = DONE
            self._set_status(row, status_Q)
            if PENDING not in status_Q:
                self._stamps.pop(self._image_of(row), None)

    def _image_of(self, row: int) -> int:
        return row if self._image_N is None else int(self._image_N[row])

    def _put(self, name: str, row: int, value: Any, position: int = 0) -> None:
        self._places[name].write(self._file, value, row, position)

    def _put_descriptor(self, row: int, scale: int, value_D: np.ndarray) -> None:
        for name, sums in self._arrays():
            dim = self._places[name].shape[2]
            its_D, value_D = value_D[:dim], value_D[dim:]
            self._put(name, row, its_D, scale * dim)
            self._put(sums, row, hdf5.checksums(its_D), scale)

    def _arrays(self) -> list[tuple[str, str]]:
        """The arrays of descriptors and of their checksums, a pair a layer."""
        return arrays_of(self._layers)

    def _set_status(self, row: int, status_Q: np.ndarray) -> None:
        self._put("status", row, status_Q)
        self._status_NQ[row] = status_Q
        self.described[row] = (status_Q == DONE) & (UNREADABLE not in status_Q)

    def _refuse_loss(self) -> None:
        """Raise VggfeatError when the file that is being written was removed, replaced, cut off or
        written over.
        """
        if not self._lost:
            status = os.fstat(self._file)
            if not _is_at(self._file, self.partial):
                moved = "removed" if status.st_nlink == 0 else "moved"
                self._lost = "replaced" if os.path.lexists(self.partial) else moved
            elif status.st_size != self._size:
                self._lost = "cut off" if status.st_size < self._size else "lengthened"
            elif os.pread(self._file, 16, 16) != self._number:
                self._lost = "written over"
        if self._lost:
            end = "what was in it is lost"
            if self._lost == "moved":
                end = "move it back, and the same command goes on"
            raise VggfeatError(
                f"{self.partial} was {self._lost} by another program while it was being written:"
                f" {end}"
            )

    @property
    def seconds(self) -> float:
        """Spent on the file so far, by earlier runs too."""
        return self._seconds + time.monotonic() - self._started

    @property
    def unreadable(self) -> dict[int, str]:
        """Row -> reason, by what is in the file."""
        status_NQ, reasons = (self._places[name].read(self._file) for name in ("status", "errors"))
        rows = np.flatnonzero(row_status(status_NQ) == UNREADABLE)
        return {int(i): decode(bytes(reasons[i])) for i in rows}

    def kept(self) -> str:
        """What is in the file, as part of a sentence; empty if that is nothing."""
        if not self._rows_there():
            return ""
        status_NQ = self._places["status"].read(self._file)
        done_NQ = (status_NQ == DONE) & (status_NQ != UNREADABLE).all(1, keepdims=True)
        complete, begun = int(done_NQ.all(1).sum()), int(done_NQ.any(1).sum())
        parts = f", and {begun - complete:,} at some of the scales" if begun > complete else ""
        return f"{complete:,} of {len(status_NQ):,} images are in {self.partial}{parts}"

    def _rows_there(self) -> bool:
        """Whether a descriptor of any process is in the file."""
        try:
            return not self._lost and bool((self._places["status"].read(self._file) == DONE).any())
        except (OSError, Damaged):
            return False

    # --- the end ----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Flush, look at the whole file once, and give it its name. Every process must have
        flushed.

        Raises VggfeatError: rows that no process has described; damage that came while it was
        written.
        """
        self.flush()
        if not self.replaces and os.path.lexists(self.path):
            raise VggfeatError(
                f"{self.path} has appeared meanwhile: move it away, and the same command goes on"
            )
        try:
            with damaged(self.partial):
                file = hdf5.File(self.partial, self._file, unfinished=True)
                status = row_status(self._places["status"].read(self._file))
                if pending := int((status == PENDING).sum()):
                    raise VggfeatError(f"{pending} rows of {self.partial} were never described")
                names = read_features(file, self._layers[0]).names
                if spoilt := self.undo_spoilt(file):
                    raise VggfeatError(
                        f"{self.partial} was damaged meanwhile, descriptors other than written:"
                        f" {len(spoilt)}, first that of {shown(names[spoilt[0]])}"
                    )
                file.seal()
            os.fsync(self._file)
            self._refuse_loss()
            os.replace(self.partial, self.path)
            with suppress(OSError):  # not every file system can sync a folder
                sync(self.path.parent)
        except OSError as error:
            raise VggfeatError(f"can't write {self.path}: {reason(error)}") from error
        os.close(self._file)
        self._file = -1

    def undo_spoilt(self, file: hdf5.File) -> list[int]:
        """Rows whose descriptors others have changed, or the disk: they are pending again."""
        status_NQ = self._places["status"].read(self._file)
        rows, scales = np.arange(len(status_NQ)), list(range(status_NQ.shape[1]))
        status_N, found = row_status(status_NQ), set[int]()
        for number in range(len(self._layers)):
            found |= set(read_rows(file, number, self._layers, rows, scales, status_N, None))
        spoilt = sorted(found)
        for row in spoilt:
            self._set_status(row, np.full(len(scales), PENDING))
        os.fsync(self._file)
        return spoilt

    def _close(self) -> None:
        """Let go of an unfinished file; remove it if it has no row, and was no finished one
        before.
        """
        if self.first and not self._lost and not self._taken_back and not self._rows_there():
            self.partial.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file >= 0:  # not finished
            with suppress(VggfeatError):  # the error that led here is told
                self.flush()
            self._close()


def stored(descriptor_D: np.ndarray, dtype: np.dtype, where: str, again: str) -> np.ndarray:
    """A row's descriptor as it is kept. again: how to keep it otherwise. Raises VggfeatError, which
    begins with `where`, where the type can't hold it.
    """
    with np.errstate(over="ignore"):
        values_D: np.ndarray = descriptor_D.astype(dtype)
    if not np.isfinite(values_D).all():
        remedy = (
            f"give `store` float32{again}" if dtype == np.float16 else "the weights are not usable"
        )
        raise VggfeatError(f"{where} has descriptors beyond the range of {dtype}; {remedy}")
    return values_D


def behind_link(path: str | os.PathLike[str]) -> Path:
    """What is written where a caller says `path`: through a link, the file behind it, as by
    `files.whole`.
    """
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def partial_of(path: Path) -> Path:
    """Where a feature file is until it is finished."""
    return Path(f"{path}.partial")  # also of ".", which with_name refuses


# --- opening --------------------------------------------------------------------------------------


def _gone_on_with(
    descriptor: int,
    path: Path,
    job: _Job,
    overwrite: bool,
    make: Callable[[hdf5.File], FeatureWriter],
) -> FeatureWriter | None:
    """A writer that goes on with the open file, where that is of this job; None where there is no
    row in it, or it may be begun anew. VggfeatError where that would lose rows.
    """
    place = partial_of(path)
    try:
        begun = hdf5.begun(descriptor)
        if begun is None:
            raise VggfeatError(
                f"{place} is no half-written feature file of this version of the program"
            )
        if begun:
            with damaged(place), hdf5.File(place, descriptor, unfinished=True) as file:
                _refuse_version(file)
                if (_stored_status(file) == DONE).any():
                    _refuse_others(file, job)
                    return make(file)
    except _OutOfReachError as error:
        raise VggfeatError(f"{error}, or move {place} away to begin anew") from error
    except VggfeatError as error:
        if not overwrite:
            raise VggfeatError(
                f"{error}; give `overwrite` to begin anew, or another `out`"
            ) from error
    return None


def _begun(descriptor: int, path: Path, job: _Job) -> hdf5.File:
    """The open file, laid out. A full disk is found here, not after hours of work."""
    arrays = job.arrays()
    specs = {name: (values.shape, values.dtype) for name, values in arrays.items()}
    checked = dict(arrays_of(job.description.layers))
    layout = Layout.of_arrays(FORMAT, FORMAT_VERSION, specs | job.row_specs(), checked)
    try:
        os.ftruncate(descriptor, 0)
        layout.write(descriptor)
        for name, values in arrays.items():
            layout.places[name].write(descriptor, values)
        os.fsync(descriptor)
    except OSError as error:
        with suppress(OSError):
            partial_of(path).unlink()
        raise VggfeatError(
            f"can't write {path} ({layout.size / 1e6:,.1f} MB): {reason(error)}"
        ) from error
    return hdf5.File(partial_of(path), descriptor, unfinished=True)


def _taken_back(
    path: Path, job: _Job, say: Callable[[str], None], make: Callable[..., FeatureWriter]
) -> FeatureWriter:
    """A writer of a finished file, made half-written, whose unreadable rows are described again."""
    descriptor, place = locked(path, 0, fcntl.LOCK_EX, say), partial_of(path)
    with _closed_on_failure(descriptor):
        try:
            if os.path.lexists(place):
                raise VggfeatError(
                    f"{path} and {place} are both there: move one away, then give `retry` again"
                )
            with damaged(path), hdf5.File(path, descriptor, "feature file") as file:
                try:
                    _refuse_others(file, job)
                except VggfeatError as error:
                    advice = "; give `overwrite` instead of `retry`, or another `out`"
                    if isinstance(error, _OutOfReachError):
                        advice = ", or give another `out`"
                    raise VggfeatError(f"{error}{advice}") from error
            os.rename(path, place)
            hdf5.unseal(descriptor)
            with damaged(place):
                begun = hdf5.File(place, descriptor, unfinished=True)
                writer = make(begun, taken_back=True)
                writer.undo_spoilt(begun)
        except OSError as error:
            raise VggfeatError(f"can't write {path}: {reason(error)}") from error
    return writer


@contextmanager
def _closed_on_failure(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def locked(path: Path, flags: int, kind: int, say: Callable[[str], None]) -> int:
    """A file descriptor that holds a lock on path until it is closed, which a kill does too.

    flags: of os.open, beside reading and writing. kind: of `fcntl.flock`. say: called where there
    are no locks. Raises VggfeatError: a link, no regular file, another process has it.
    """
    while True:
        try:
            # not through a link, which may lead anywhere, and not to wait for a pipe's reader
            mode = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(path, mode | flags, 0o666)
        except OSError as error:
            what = "it is a link; move it away" if error.errno == errno.ELOOP else reason(error)
            raise VggfeatError(f"can't write {path}: {what}") from error
        with _closed_on_failure(descriptor):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise VggfeatError(f"can't write {path}: it is no file; move it away")
            _lock(descriptor, kind, path, say)
            if _is_at(descriptor, path):
                return descriptor
        os.close(descriptor)  # its writer has just given it its name


def _lock(descriptor: int, kind: int, path: Path, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise VggfeatError(f"another process is writing {path}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise VggfeatError(f"can't lock {path}: {reason(error)}") from error
        say(
            f"warning: {path} can't be locked ({reason(error)}): start no other process"
            " that writes it"
        )


def _stored_status(file: hdf5.File) -> np.ndarray:
    """(N, Q) of an unfinished file, whatever N and Q are."""
    return read_status(file, *file.place("status", "u", (None, None)).shape)


def _refuse_others(file: hdf5.File, job: _Job) -> None:
    """Raise VggfeatError when a file is of another job, or an image has changed since, or isn't
    there to tell.
    """
    _refuse_version(file)
    difference = next(_differences(file, job), "")
    if not difference and job.images_here:
        difference = _changed_image(file, job)
    if difference:
        raise VggfeatError(f"{file.path} was begun with {difference}")


def is_finished(
    path: Path,
    items: Items,
    description: Description,
    dim: int | tuple[int, ...],
    dtype: str,
    facts: dict[str, Any],
) -> bool:
    """Whether a finished file is there, of a job as of `FeatureWriter.open`. Not where it can't be
    read, or an image isn't there to tell.
    """
    if not path.exists():
        return False
    try:
        with hdf5.open_file(path, FORMAT, FORMAT_VERSION) as file, damaged(path):
            _refuse_others(file, _Job(items, description, dim, np.dtype(dtype), facts))
    except VggfeatError:
        return False
    return True


class _Job:
    """What a file is to be of: the images, how they are described, and what else is to be known of
    them.
    """

    def __init__(
        self,
        items: Items,
        description: Description,
        dim: int | tuple[int, ...],
        dtype: np.dtype,
        facts: dict[str, Any],
        images_here: bool = True,
    ) -> None:
        self.items, self.description, self.dtype = items, description, dtype
        self.dims = (dim,) if isinstance(dim, int) else dim
        self.images_here = images_here
        self.images, self.image_N = items.by_file()
        self.facts = {
            "dataset": items.dataset,
            "protocol": items.protocol,
            "root": os.path.abspath(items.root) if items.images is None else "",
            "command": "",
            "layers": list(description.layers),
            "description": description.of_layer(description.layer).to_dict(),
            **({} if items.total is None else {"total": items.total}),
            **facts,
        }
        self.document = hdf5.document(self.facts)  # now, before there is a file

    def arrays(self) -> dict[str, np.ndarray]:
        """What is known before the first row."""
        items = self.items
        labels = {} if items.labels is None else {"labels": items.labels}
        splits = {
            f"splits/{name}": np.asarray(index, np.int64) for name, index in items.splits.items()
        }
        names = hdf5.column("names", self.images.names) | hdf5.column("classes", items.classes)
        rows = {}
        if items.boxes is not None:
            rows = {
                "rows/image": self.image_N,
                "rows/box": items.boxes.astype(np.int32),
                **hdf5.column("rows/name", items.names),
            }
        return {"facts": self.document, **names, **labels, **splits, **rows}

    def row_specs(self) -> dict[str, Spec]:
        """What is written while an extraction runs; its zeros say that no row is there."""
        count, scales, images = len(self.items), self.description.columns, len(self.images)
        of_layers: dict[str, Spec] = {}
        for (name, sums), dim in zip(arrays_of(self.description.layers), self.dims, strict=True):
            of_layers[sums] = (count, scales), np.dtype("<u4")
            of_layers[name] = (count, scales, dim), self.dtype
        return {
            "status": ((count, scales), np.dtype("u1")),
            "errors": ((count,), np.dtype(f"S{REASON_BYTES}")),
            "images/bytes": ((images,), np.dtype("<i8")),
            "images/modified": ((images,), np.dtype("<i8")),
            "images/changed": ((images,), np.dtype("<i8")),
            "images/crc32": ((images,), np.dtype("<u4")),
            "seconds": ((1,), np.dtype("<f8")),
            **of_layers,
        }


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _refuse_version(file: hdf5.File) -> None:
    if (file.format, file.version) != (FORMAT, FORMAT_VERSION):
        raise VggfeatError(f"{file.path} is no feature file of version {FORMAT_VERSION}")


def cut_reason(text: str) -> str:
    """As much of why an image is unreadable as a file keeps."""
    return encode(text)[:REASON_BYTES].decode("utf-8", "ignore")


def _differences(file: hdf5.File, job: _Job) -> Iterator[str]:
    """What an unfinished file has otherwise than the job that would go on with it, each in a few
    words.
    """
    facts: Facts = file.document("facts", Facts)
    items = job.items
    there = replace(facts["description"], further=tuple(facts["layers"][1:]))
    yield from differences(there, job.description)
    stored = file.arrays["descriptors"]
    if stored.dtype != job.dtype:
        yield f"`store` {stored.dtype}, not {job.dtype}"
    before, now = facts.get("versions", {}), job.facts.get("versions", {})
    for package in VERSIONS:
        if before.get(package) != now.get(package):
            yield f"{package} {before.get(package)}, not {now.get(package)}"
    if facts["dataset"] != items.dataset:
        yield f"dataset {facts['dataset']}, not {items.dataset}"
    listed = file.texts("names")
    if len(listed) != len(job.images):
        yield f"{len(listed):,} images, not {len(job.images):,}"
    if (total := facts.get("total")) != items.total:
        yield f"{_of(total)}, not {_of(items.total)}"
    for a, b in zip(listed, job.images.names, strict=False):
        if encode(a) != encode(b):
            yield f"an image {a} where there is {b} now"
    known = {name: values for name, values in job.arrays().items() if name != "facts"}
    specs = job.row_specs() | {name: (values.shape, values.dtype) for name, values in known.items()}
    for name in sorted((file.arrays.keys() | specs.keys()) - {"facts"}):
        place = file.arrays.get(name)
        if place is None or (place.shape, place.dtype) != specs.get(name):
            yield _what(name)
    for name, values in known.items():
        if not np.array_equal(file.arrays[name].read(file.descriptor), values):
            yield _what(name)


def _of(total: int | None) -> str:
    return "all images" if total is None else f"the first of {total:,} images"


def _what(name: str) -> str:
    kind, _, rest = name.partition("/")
    return {
        "labels": "other labels",
        "classes": "other classes",
        "splits": f"another split {rest}",
        "rows": "other boxes",
    }.get(kind, f"{name} of another shape")


def _changed_image(file: hdf5.File, job: _Job) -> str:
    done = (file.arrays["status"].read(file.descriptor) == DONE).any(1)
    described = np.zeros(len(job.images), bool)
    described[job.image_N[done]] = True
    columns = (file.arrays[f"images/{name}"].read(file.descriptor).tolist() for name in STAMPS)
    for i, there in enumerate(zip(*columns, strict=True)):
        try:
            if described[i] and not _same(job.images.source(i), there):
                return f"another image {job.images.names[i]}: it has changed since"
        except OSError as error:
            raise _OutOfReachError(
                f"{job.images.names[i]}, which is described in {file.path}, can't be read now"
                f" ({reason(error)}): bring it back, or the disk or share that it is on, and the"
                " same command goes on"
            ) from error
    return ""


def _same(source: Any, there: Stamp) -> bool:
    """Whether an image is the one that was stamped; new times alone don't make it another, a new
    checksum does.

    Raises OSError where its file can't be read.
    """
    if not any(there):  # of a converted file, which knows nothing of its images
        return True
    if not isinstance(source, np.ndarray):
        status = os.stat(source)
        if (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == there[:3]:
            return True
        if status.st_size != there[0]:
            return False
    size, _, _, checksum = stamp(source)
    return (size, checksum) == (there[0], there[3])
