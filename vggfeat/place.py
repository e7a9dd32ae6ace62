"""Where a set of shards, or the images of a data set, lie: a folder, or what a URL names.

Files are put there whole, once, and never changed: of two processes that put one name the first
wins, and the other is told so. Nothing needs a lock or a clock. What a store refuses for a moment
(503, a timeout, a body cut short) is asked for again; what it refuses for good is StorageError,
which is never an image's fault. URLs go through fsspec, which is imported for them alone.
"""

from __future__ import annotations

import errno
import io
import os
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from vggfeat.errors import CantWrite, VggfeatError, reason
from vggfeat.files import scratch, sync

TRIES, FIRST_WAIT, LONGEST_WAIT = 6, 0.5, 30.0
"""How often a store is asked, and seconds between: doubled each time, times 0.5 to 1.5."""
WAIT = 30.0
"""Seconds that a web server may take to answer, and between two parts of an answer."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# of a file system that is a network's: it may be there again in a moment. s3fs says EBUSY for 503,
# EREMOTEIO (121, on Linux alone by name) for 500
_PASSING = {
    *(errno.EBUSY, getattr(errno, "EREMOTEIO", 121)),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EHOSTDOWN),
    *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET),
}
_FOR_GOOD = (
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError),
    *(PermissionError, NotImplementedError, MemoryError),
)
# whose bodies come with their length, which aiohttp holds them against: one request is enough
_COUNTED = {"s3", "s3a", "gs", "gcs"}
# statuses of HTTP: that there is no such file; that asking again won't help, unlike 408, 425, 429
_GONE = {404, 410}
_REFUSED = set(range(400, 500)) - _GONE - {408, 425, 429}
_OF_A_DISK = {"file", "local"}
# object stores: names there have no folders, and who makes one makes a bucket
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2", "hf"}
Answer = TypeVar("Answer")


class StorageError(VggfeatError):
    """A store that refused after all tries, or for want of credentials: nothing is known of what is
    in it.
    """


class AbsentError(VggfeatError):
    """A store that works says that there is no such file."""


class Place(Protocol):
    """Files by names, with forward slashes between folders."""

    name: str
    """As a user would write it."""

    def names(self, folder: str) -> dict[str, int]:
        """The files in a folder, without what is below: name -> bytes. Empty where it isn't
        there.
        """

    def below(self) -> dict[str, int]:
        """All files, in folders of folders too: name -> bytes. Empty where there is none."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def read(self, name: str, most: int | None = None) -> bytes:
        """A file, or its first bytes. Raises AbsentError."""

    def open(self, name: str, ahead: int = 1 << 16) -> BinaryIO:
        """A file to read from at any place, which the caller closes. ahead: bytes that are asked
        for at once. Raises AbsentError.
        """

    def put_new(self, name: str, content: bytes) -> bool:
        """Put a file there, whole, unless one of the name is there; whether it was put. Raises
        CantWrite.
        """


def is_url(text: str | os.PathLike[str]) -> bool:
    return bool(_URL.match(os.fspath(text)))


def local(names: Sequence[str]) -> list[Path]:
    """Those of some files and sets that aren't at URLs."""
    return [Path(name) for name in names if not is_url(name)]


def of_disk(url: str) -> bool:
    """Whether a URL is of this machine's files."""
    return url.partition("://")[0].lower() in _OF_A_DISK


def place_of(where: str | os.PathLike[str]) -> Place:
    """The place that a folder's path or a URL names; it needn't be there yet.

    Raises VggfeatError where nothing here can reach such a URL.
    """
    text = os.fspath(where)
    if not is_url(text):
        return _Folder(Path(text))
    return _Folder(Path(text.partition("://")[2])) if of_disk(text) else _Store(text)


def patiently(what: str, ask: Callable[[], Answer]) -> Answer:
    """What a store answers, asked again while it fails in a passing way. Raises StorageError."""
    for attempt in range(TRIES):
        try:
            return ask()
        except Exception as raised:  # every library has failures of its own
            error = _meant(raised)
            if isinstance(error, (*_FOR_GOOD, VggfeatError)):
                raise error from raised.__cause__
            told = reason(error) or type(error).__name__
            if "Credentials" in type(error).__name__:
                raise StorageError(f"{what}: no credentials ({told})") from error
            if _status(error) in _REFUSED:
                raise StorageError(f"{what}: {told}") from error
            number = error.errno if type(error) is OSError else None
            if number is not None and number not in _PASSING:
                raise
            if attempt + 1 == TRIES:
                raise StorageError(f"{what}: {told}, {TRIES} times") from error
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            time.sleep(wait * random.uniform(0.5, 1.5))
    raise AssertionError("the last try returns or raises")


def _meant(error: Exception) -> Exception:
    """What a library's error is of: fsspec tells every failure of an HTTP server as a file that
    isn't there, and one that has gone (410) as another failure.
    """
    cause = error.__cause__
    of_http = isinstance(cause, Exception) and type(cause).__module__.startswith("aiohttp")
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        late = isinstance(cause, TimeoutError | ConnectionError)
        return cause if late or (of_http and _status(cause) not in _GONE) else error
    return FileNotFoundError(str(error)) if _status(error) in _GONE else error


def _status(error: Exception) -> int:
    """Of HTTP; 0 where an error has none. gcsfs calls it code, and tells 403 by a word."""
    if type(error) is OSError and str(error).startswith("Forbidden"):
        return 403
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else 0


class _Folder:
    """On a file system, a network's too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def names(self, folder: str) -> dict[str, int]:
        def ask() -> dict[str, int]:
            with os.scandir(self.folder / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

        try:
            return self._asked(folder, ask)
        except AbsentError:
            return {}

    def below(self) -> dict[str, int]:
        found: dict[str, int] = {}
        folders = [""]
        while folders:
            folder = folders.pop()
            prefix = f"{folder}/" if folder else ""
            found |= {prefix + name: size for name, size in self.names(folder).items()}
            with suppress(OSError), os.scandir(self.folder / folder) as entries:
                folders += [
                    prefix + entry.name for entry in entries if entry.is_dir(follow_symlinks=False)
                ]
        return found

    def size(self, name: str) -> int | None:
        try:
            return self._asked(name, lambda: (self.folder / name).stat().st_size)
        except AbsentError:
            return None

    def read(self, name: str, most: int | None = None) -> bytes:
        def ask() -> bytes:
            with open(self.folder / name, "rb") as file:
                return file.read(-1 if most is None else most)

        return self._asked(name, ask)

    def open(self, name: str, ahead: int = 1 << 16) -> BinaryIO:
        return self._asked(name, lambda: open(self.folder / name, "rb", ahead))

    def _asked(self, name: str, ask: Callable[[], Answer]) -> Answer:
        path = self.folder / name
        try:
            return patiently(f"can't read {path}", ask)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AbsentError(f"there is no {path}") from error
        except OSError as error:
            raise VggfeatError(f"can't read {path}: {reason(error)}") from error

    def put_new(self, name: str, content: bytes) -> bool:
        target = self.folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                return False
            # not in target's own folder, which may have 10^5 files: scratch lists where it is
            with scratch(self.folder) as folder:
                made = folder / f"f{target.suffix}"
                made.write_bytes(content)
                sync(made)
                put = _linked(made, target)
            with suppress(OSError):  # not every file system can sync a folder
                sync(target.parent)
        except OSError as error:
            raise CantWrite(f"can't write {target}: {reason(error)}") from error
        return put


def _linked(made: Path, target: Path) -> bool:
    """Give a complete file its name, unless that is taken; whether it was free."""
    try:
        os.link(made, target)
    except FileExistsError:
        if not target.exists():
            raise OSError(errno.ELOOP, "") from None  # a link that leads nowhere
        return False
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
            raise
        # Without hard links the last wins. Of a shard either is right, and a shard of another plan
        # is told when the set is sealed.
        os.replace(made, target)
    return True


class _Store:
    """Of fsspec: s3://, gs://, https://, memory:// and what else is installed."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._kind = kind = url.partition("://")[0].lower()
        self._of_http = kind in {"http", "https"}
        try:
            import fsspec

            # not url_to_fs, to which "::" in a URL is another URL
            files = fsspec.get_filesystem_class(kind)
            told = dict(files._get_kwargs_from_urls(url))
            if self._of_http:
                import aiohttp

                waits = aiohttp.ClientTimeout(total=None, sock_connect=WAIT, sock_read=WAIT)
                told["client_kwargs"] = {"timeout": waits}
            self._files, self._path = files(**told), files._strip_protocol(url)
        except (ImportError, ValueError) as error:
            extra = "" if kind in {"s3", "gs", "http", "https"} else f", and what reads {kind}://"
            raise VggfeatError(
                f"{url} can't be reached here ({reason(error)}): pip install"
                f" 'vggfeat[cloud]'{extra}"
            ) from error

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}" if name else self._path

    def names(self, folder: str) -> dict[str, int]:
        path = self._at(folder).rstrip("/")

        def ask() -> list[dict[str, Any]]:
            self._files.invalidate_cache()
            found: list[dict[str, Any]] = self._files.ls(path, detail=True)
            return found

        try:
            found = self._asked(folder, ask)
        except AbsentError:
            return {}
        return {
            each["name"].rpartition("/")[2]: int(each["size"] or 0)
            for each in found
            if each["type"] == "file" and each["name"].strip("/") != path.strip("/")
        }

    def below(self) -> dict[str, int]:
        path = self._path.rstrip("/")

        def ask() -> dict[str, Any]:
            self._files.invalidate_cache()
            found: dict[str, Any] = self._files.find(path, detail=True)
            return found

        try:
            found = self._asked("", ask)
        except AbsentError:
            return {}
        start = len(path.lstrip("/")) + 1
        return {
            name.lstrip("/")[start:]: int(each["size"] or 0)
            for name, each in found.items()
            if each["type"] == "file" and len(name.lstrip("/")) > start
        }

    def size(self, name: str) -> int | None:
        try:
            return self._told(name) or 0
        except AbsentError:
            return None

    def _told(self, name: str) -> int | None:
        """Bytes of a file; None where the store doesn't tell them. Raises AbsentError."""

        def ask() -> int | None:
            self._files.invalidate_cache()
            told = self._files.info(self._at(name))
            if told["type"] != "file":
                raise FileNotFoundError(name)
            return None if told["size"] is None else int(told["size"])

        return self._asked(name, ask)

    def read(self, name: str, most: int | None = None) -> bytes:
        path = self._at(name)

        def ask() -> bytes:
            if self._of_http:
                return self._streamed(path, most)
            size = None if self._kind in _COUNTED else self._files.info(path)["size"]
            try:
                data: bytes = self._files.cat_file(path, end=most)
            except OSError as error:
                if error.errno == errno.EINVAL and self._told(name) == 0:
                    return b""  # S3: an empty file has no first byte to ask for
                raise
            if size is not None and len(data) < min(size, size if most is None else most):
                raise OSError(f"{len(data):,} of {size:,} bytes came")
            return data

        return self._asked(name, ask)

    def _streamed(self, path: str, most: int | None) -> bytes:
        """Of a web server: the whole is asked for, since some give less than a range that is."""
        blocks: list[bytes] = []
        left = sys.maxsize if most is None else most
        with self._files.open(path, block_size=0, size=1) as file:  # size: it isn't asked for
            while left and (block := file.read(min(left, 1 << 20))):
                blocks.append(block)
                left -= len(block)
        return b"".join(blocks)

    def open(self, name: str, ahead: int = 1 << 16) -> BinaryIO:
        size = self._told(name)
        if size is None:  # its parts can't be asked for, either
            return io.BytesIO(self.read(name))
        return io.BufferedReader(_Ranges(self, name, size), ahead)

    def part(self, name: str, start: int, stop: int) -> bytes:
        """Some bytes of a file, all that are asked for."""

        def ask() -> bytes:
            data: bytes = self._files.cat_file(self._at(name), start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data):,} of {stop - start:,} bytes came")
            return data

        return self._asked(name, ask)

    def _asked(self, name: str, ask: Callable[[], Answer]) -> Answer:
        path = f"{self.name}/{name}" if name else self.name
        try:
            return patiently(f"can't read {path}", ask)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AbsentError(f"there is no {path}") from error
        except (*_FOR_GOOD, OSError) as error:
            raise StorageError(f"can't read {path}: {reason(error)}") from error

    def put_new(self, name: str, content: bytes) -> bool:
        path, what = self._at(name), f"{self.name}/{name}"

        def ask() -> None:
            if self._kind not in _BUCKETS:
                with suppress(FileExistsError, NotImplementedError):
                    self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(path, content, mode="create")

        try:
            if self.size(name) is not None:
                return False
            patiently(f"can't write {what}", ask)
        except (VggfeatError, *_FOR_GOOD, OSError) as error:
            # each library has another word for a name that is taken: s3fs says EINVAL
            with suppress(VggfeatError):
                if self.size(name) is not None:
                    return False
            told = str(error) if isinstance(error, VggfeatError) else reason(error)
            raise CantWrite(told if what in told else f"can't write {what}: {told}") from error
        return True


class _Ranges(io.RawIOBase):
    """A file in a store, a range a request."""

    def __init__(self, store: _Store, name: str, size: int) -> None:
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._store.part(self._name, self._at, stop)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)
