"""Files that appear whole: until a file is complete, what was there before stays; and what may lie
at their paths.

A file is made in a folder of its own beside its place (`scratch`), whose name nobody can guess and
which nobody else can write in; then it is moved. Only feature files (`writer`) grow in their own
way.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from vggfeat.errors import CantWrite, VggfeatError, WrongUsage, reason
from vggfeat.hub import on_hub

_PREFIX, _SUFFIX, _UNHELD = ".vggfeat-", ".partial", "unheld"


@contextmanager
def whole(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path to write to, with this one's ending: an empty file. It takes this one's place at the
    end, or is gone.

    A file that is there keeps its mode, a new one has what the umask says, however the body made
    it. Through a link, the file behind it is replaced. durable: the file is on the disk, not only
    in the system's memory, before it takes its place; for results that took hours.
    Raises CantWrite: a link to nothing, a folder, a device, a disk that refuses (also in the body).
    """
    try:
        target, before = place_of(path)
        with scratch(target.parent) as folder:
            # never longer than the name itself, and mostly ASCII
            partial = folder / f"f{target.suffix}"
            fd = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = stat.S_IMODE(os.fstat(fd).st_mode if before is None else before.st_mode)
            _own(partial, 0o600)
            os.close(fd)
            yield partial
            if durable:
                sync(partial)
            if stat.S_IMODE(partial.stat().st_mode) != mode:
                with suppress(OSError):  # file systems without modes refuse
                    partial.chmod(mode)
            os.replace(partial, target)
            if durable:
                with suppress(OSError):  # not every file system can sync a folder
                    sync(target.parent)
    except CantWrite:
        raise
    except OSError as error:
        raise CantWrite(f"can't write {path}: {reason(error)}") from error


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that only this process knows and only this user can enter; gone at the
    end.

    It is held by a lock while it is in use: what a killed process left in `parent` is removed by
    the next call, what others are making there stays. Folders of another machine are never touched,
    nor any where there are no locks. Raises OSError.
    """
    _sweep(parent)
    folder, held = _make(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path`, absent or an empty folder, at the end, or
    is gone. Raises CantWrite where the disk refuses (also in the body).
    """
    target = path.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(target.parent) as private:
            complete = private / "complete"
            complete.mkdir()
            yield complete
            os.rename(complete, target)  # in place of an empty folder, too
    except OSError as error:
        raise CantWrite(f"can't write {path}: {reason(error)}") from error


def _make(parent: Path) -> tuple[Path, int | None]:
    """A new folder, and the descriptor that holds it; None where the file system has no locks."""
    machine = _machine()
    while True:
        folder = parent / f"{_PREFIX}{machine}-{secrets.token_hex(8)}{_SUFFIX}"
        os.mkdir(folder, 0o700)
        fd = None
        try:
            _own(folder, 0o700)
            if machine == _UNHELD:
                return folder, None
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(folder)):
                return folder, fd
        except (BlockingIOError, FileNotFoundError):
            pass  # another process swept it away between the two calls
        except OSError:
            machine = _UNHELD
            os.rmdir(folder)
        if fd is not None:
            os.close(fd)


def _own(path: Path, mode: int) -> None:
    """Let this user write there, whatever the umask takes away: a new file's own mode comes
    last.
    """
    if path.stat().st_mode & mode != mode:
        with suppress(OSError):  # file systems without modes refuse
            path.chmod(mode)


def _sweep(parent: Path) -> None:
    """Remove the folders that dead processes of this machine and user left."""
    own = f"{_PREFIX}{_machine()}-"
    with suppress(OSError), os.scandir(parent) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(own)]
        for path in left if _machine() != _UNHELD else []:
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(fd).st_uid == os.geteuid():
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(fd)


@cache
def _machine() -> str:
    """What tells this machine, since it was started, from any other that shares the folder."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return _UNHELD
    return hashlib.sha256(boot.encode()).hexdigest()[:8]


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- what lies at a path --------------------------------------------------------------------------


def _stat(path: Path) -> os.stat_result | None:
    """Of what lies at a path, behind links; None where nothing does. Raises CantWrite for a path
    that can't be.
    """
    try:
        return os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise CantWrite(
                f"{path} is a link to nothing: remove it, or give another name"
            ) from None
        return None
    except NotADirectoryError:
        return None  # there is no such folder, as its sentence says
    except ValueError as error:  # a byte 0
        raise CantWrite(f"can't write {path}: {error}") from error
    except OSError as error:
        raise CantWrite(f"can't write {path}: {reason(error)}") from error


def place_of(path: Path) -> tuple[Path, os.stat_result | None]:
    """The file that stands behind a path, and what is there now. Raises CantWrite where no file can
    take its place.
    """
    there = _stat(path)
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise CantWrite(f"{path} is a folder; give the name of a file")
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise CantWrite(f"{path} is no regular file; give another name")
    target = Path(os.path.realpath(path)) if os.path.islink(path) else path
    if not target.parent.is_dir():
        raise CantWrite(f"there is no folder {target.parent} to write {target.name} in")
    return target, there


def _is_stream(there: os.stat_result | None) -> bool:
    """Whether text is written into what is there, and nothing put in its place: a device, a pipe,
    stdout's own file.
    """
    if there is None:
        return False
    return (
        stat.S_ISCHR(there.st_mode) or stat.S_ISFIFO(there.st_mode) or _standard(there) is not None
    )


def _standard(there: os.stat_result) -> int | None:
    """The descriptor of stdout or stderr, where this is its file: /dev/stdout can be a socket, or a
    file half full.
    """
    for fd in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(there, os.fstat(fd)):
                return fd
    return None


def check_outputs(
    files: Mapping[str, Path | None],
    *,
    texts: Mapping[str, Path | None] | None = None,
    folders: Mapping[str, Path | None] | None = None,
    inputs: Iterable[Path | None] = (),
    overwrite: bool = False,
) -> None:
    """Refuse, before the work, what a command can't or mustn't write. The one rule for whatever
    lies at a path:

    What the command reads is never written, nor one path twice. What exists stays, unless
    `overwrite`. Folders, links to nothing, sockets and disks are refused; pipes and devices take
    text only. A file is written there now, under the name that is asked for but in a folder of its
    own, and removed: no folder, no permission, no space, no such name.

    files, texts, folders: the outputs, by the options that name them. Texts can go to a pipe; a
    folder must be absent or empty, and may lack its parents. inputs: what the command reads, files
    or folders, there or not. Raises VggfeatError; WrongUsage where two have one name.
    """
    texts, folders, inputs = texts or {}, folders or {}, list(inputs)
    own = {option: path for option, path in texts.items() if path and not _is_stream(_stat(path))}
    refuse_same_names({**files, **own, **folders}, inputs)
    refuse_inputs({**files, **texts, **folders}, inputs)
    seen: dict[str, Path] = {}
    for source in inputs:  # a set of shards is one thing
        if source is not None and os.path.isfile(source / "plan.json"):
            refuse_inside({**files, **own, **folders}, source)
    for option, path in [*files.items(), *texts.items(), *folders.items()]:
        if path is None or (option in texts and _is_stream(_stat(path))):
            continue
        for other, taken in seen.items():
            if _same(path, taken):
                raise VggfeatError(f"{other} and {option} are one file, {path}: give two names")
        seen[option] = path
        if option in folders:
            refuse_filled(path)
            _try(path, path)
            continue
        target, there = place_of(path)
        if there is not None and not overwrite:
            raise VggfeatError(f"{path} exists; give `overwrite`, or another {option}")
        _try(target, path)


def refuse_same_names(
    outputs: Mapping[str, Path | None], inputs: Iterable[Path | None] = ()
) -> None:
    """Raise WrongUsage where an output has the name of another, or of what the command reads:
    whatever lies there.
    """
    read = {path.absolute() for path in inputs if path is not None}
    written: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        name = path.absolute()
        if name in read:
            raise WrongUsage(f"{option} {path} is what the command reads: give another name")
        if name in written:
            raise WrongUsage(f"{written[name]} and {option} are one file, {path}: give two names")
        written[name] = option


def refuse_inputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path | None]) -> None:
    """Refuse to write what the command reads: by another name, by links, or what isn't there
    yet.
    """
    wanted: dict[Any, str] = {}
    for option, path in outputs.items():
        there = None if path is None else _stat(path)
        if path is not None and not stat.S_ISCHR(there.st_mode if there else 0):
            wanted[os.path.realpath(path)] = f"{option} {path}"
            if there is not None:
                wanted[there.st_dev, there.st_ino] = f"{option} {path}"
    for source in inputs if wanted else ():
        if source is not None:
            try:
                there = os.stat(source)
                found = wanted.get((there.st_dev, there.st_ino))
            except OSError:
                found = wanted.get(os.path.realpath(source))
            if found:
                raise VggfeatError(f"{found} is what the command reads: give another name")


def refuse_unwritable(folder: Path, option: str) -> None:
    """Refuse a folder that can't be made, or be written in, before the work; it leaves nothing."""
    if not (there := _nearest(folder)).is_dir():
        raise VggfeatError(f"{option} {folder}: {there} is no folder: give another name")
    _try(folder / "any", folder)


def refuse_inside(outputs: Mapping[str, Path | None], folder: Path | None) -> None:
    """Refuse to replace a file in a folder all of whose files the command may read."""
    if folder is None or not folder.is_dir():
        return
    for option, path in outputs.items():
        if path is not None and Path(os.path.realpath(path)).is_relative_to(folder.resolve()):
            raise VggfeatError(
                f"{option} {path} lies in {folder}, which the command reads: give another name"
            )


def weights_files(*specs: str | None) -> list[Path]:
    """The files, for `inputs`, that sources of weights may name: FILE, which can have an @ in it,
    or oxford:D@FILE.
    """
    local = [spec for spec in specs if spec and not on_hub(spec)]
    names = {name for spec in local for name in (spec, spec.partition("@")[2])}
    return [Path(name) for name in names if name and not on_hub(name)]


def absolute_source(spec: str) -> str:
    """A source of weights, as of `weights_files`, for a process in another folder."""
    kind, at, path = spec.partition("@")
    if at and not os.path.isfile(spec) and os.path.isfile(path):
        return f"{kind}@{os.path.abspath(path)}"
    return os.path.abspath(spec) if os.path.isfile(spec) else spec


def refuse_filled(folder: Path) -> None:
    """Raise VggfeatError unless this is free for a new folder: absent, or an empty folder."""
    if _stat(folder) is not None and (not folder.is_dir() or any(folder.iterdir())):
        raise VggfeatError(f"{folder} already exists and isn't an empty folder: give another one")


def _nearest(path: Path) -> Path:
    """It, or the first above it that is there."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def _try(target: Path, asked: Path) -> None:
    """Write where target will be, under its name and those of the folders that it lacks, and leave
    nothing.
    """
    there = _nearest(target.parent)
    try:
        with scratch(there) as folder:
            trial = folder / target.relative_to(there)
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(bytes(4096))
    except OSError as error:
        raise CantWrite(f"can't write {asked}: {reason(error)}") from error


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file or folder, by links too, or would be."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def try_each(*writes: Callable[[], object]) -> None:
    """Make each output of hours of work, though another failed; then raise the first error."""
    errors: list[Exception] = []
    for write in writes:
        try:
            write()
        except Exception as error:  # whatever a library makes of a full disk
            errors.append(error)
    if errors:
        raise errors[0]


# --- texts ----------------------------------------------------------------------------------------


def write_json(path: Path | None, value: Any) -> None:
    """Write value as JSON to path, if there is one; see `plain` for what JSON doesn't know."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """value in JSON's own types: NumPy's as numbers and lists, NaN and infinity as null, what JSON
    lacks as text.
    """
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else _word(key): plain(part) for key, part in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):  # NumPy's, PyTorch's
        return plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return os.fsdecode(value) if isinstance(value, bytes | os.PathLike) else str(value)


def _word(key: Any) -> str:
    """A key of a JSON object, as JSON itself writes numbers, true, false and null."""
    value = plain(key)
    return value if isinstance(value, str) else json.dumps(value)


def write_text(path: Path | None, text: str) -> None:
    """Write text to path, if there is one, a file, a pipe or a device. Raises CantWrite where the
    disk refuses.
    """
    if path is None:
        return
    content = text.encode("utf-8", "backslashreplace")
    there = _stat(path)
    if not _is_stream(there):
        with whole(path) as partial:
            partial.write_bytes(content)
        return
    assert there is not None
    try:
        own = _standard(there)
        with open(
            os.open(path, os.O_WRONLY | os.O_NOCTTY) if own is None else os.dup(own), "wb"
        ) as stream:
            stream.write(content)
    except OSError as error:
        raise CantWrite(f"can't write {path}: {reason(error)}") from error
