"""Commands that write, killed at each call by which they change a file; then they must end as if
nothing had been.

`kills.c` is preloaded into a process that has imported everything. It forks a child for each trial,
which runs the command in a fresh folder until SIGKILL ends its process group: before its n-th call,
after half of the bytes that this call writes, or after the last call. Then what has its final name
must be whole, and the same command must end with its usual status, the same files, no other ones,
and the same content; where it says that the output exists, it is whole and --overwrite ends so. Of
several processes one is killed, and the others must end by themselves.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open

from vggfeat.errors import VggfeatError

SOURCE = Path(__file__).with_suffix(".c")
BEFORE, AFTER, HALF = range(3)
HOW = ("before", "after", "half of")
BOUND = 300.0
"""Seconds after which a process counts as one that hangs; a thousand times what one takes."""
PATIENCE = 5.0
"""Seconds that a process has to notice that another of its job was killed, before it is asked to
leave.
"""
TIMES = {
    *("seconds", "command", "time", "images_per_second", "data_wait"),
    *("matrix_flops", "matrix_share"),
}
"""Of JSON: what differs from run to run."""
_HEAD, _CALL = struct.Struct("4q"), struct.Struct("q248s")


# --- one run --------------------------------------------------------------------------------------


class Page:
    """What a run and `kills.c` share: how many calls there were, which ones, and at which the run
    is killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def reset(self, at: int, how: int) -> None:
        with open(self.path, "wb") as file:
            file.write(_HEAD.pack(0, at, how, 0))
            file.truncate(_HEAD.size + 4096 * _CALL.size)

    def attach(self) -> None:
        """Count this process's calls, and those of what it starts; its group dies with it."""
        os.setpgid(0, 0)
        with open(self.path, "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
            shared[24:32] = struct.pack("q", os.getpid())
        os.environ["KILLS_PAGE"] = str(self.path)
        if ctypes.CDLL(None).attach(os.fsencode(self.path)):
            raise OSError(f"can't map {self.path}")

    @property
    def calls(self) -> list[tuple[str, int]]:
        """(call and path, bytes that it writes) of each."""
        raw = self.path.read_bytes()
        count = _HEAD.unpack_from(raw)[0]
        found = [
            _CALL.unpack_from(raw, _HEAD.size + i * _CALL.size) for i in range(min(count, 4096))
        ]
        return [(os.fsdecode(text.split(b"\0")[0]), size) for size, text in found]


@dataclass(frozen=True)
class Ended:
    """How a process ended. status: negative for a signal; None: it hung. text: what it printed.
    modules: all it had.
    """

    status: int | None
    text: str
    modules: list[str]

    @classmethod
    def from_log(cls, status: int | None, log: Path) -> Ended:
        text, _, modules = log.read_text().partition("\0")
        return cls(status, text, modules.split())

    def __str__(self) -> str:
        last = (self.text.strip().splitlines() or [""])[-1]
        return f"hangs: {last}" if self.status is None else f"ended with {self.status}: {last}"


@dataclass(frozen=True)
class Job:
    """A command. Its words are relative to the folder that it runs in.

    before: what lies in the folder at first. status: of a run that nobody interrupts. steps: its
    files are replaced several times, each time whole. overwrite: the option exists.
    """

    name: str
    main: Callable[[], None]
    words: Sequence[object]
    before: dict[str, Path] = field(default_factory=dict)
    status: int = 0
    ranks: int = 1
    steps: bool = False
    overwrite: bool = True


def start(
    job: Job, words: Sequence[str], folder: Path, page: Page, log: Path, environment: dict[str, str]
) -> int:
    """Fork a process that runs the command and counts in page; its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for fd in (1, 2):
            os.dup2(printed, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = ["program", *words]
        page.attach()
        job.main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(1, ("\0" + " ".join(sys.modules)).encode())
    os._exit(status)


def wait(pid: int, patience: float | None = None) -> int | None:
    """How a process ended; None where it had to be killed. All that it has started is gone then,
    too.

    patience: seconds after which it gets a SIGTERM.
    """
    handle = os.pidfd_open(pid)
    if patience is not None and not select.select([handle], [], [], patience)[0]:
        os.kill(pid, signal.SIGTERM)
    ended = bool(select.select([handle], [], [], BOUND)[0])
    os.close(handle)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-pid, 0)
    return status if ended else None


def store() -> tuple[int, int]:
    """A process that keeps what ranks tell one another at first, as torchrun does; its number and
    port.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(kept.port).encode())
        signal.pause()
    os.close(writing)
    port = int(os.read(reading, 20))
    os.close(reading)
    return pid, port


class Room:
    """Where trials take place: folders, pages and logs in a folder that is removed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        PR_SET_CHILD_SUBREAPER = 36
        # orphans of a killed command are waited for
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def fresh(self, job: Job, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, source in job.before.items():
            if source.is_dir():
                shutil.copytree(source, folder / name, symlinks=True)
            else:
                shutil.copy2(source, folder / name)
        return folder

    def page(self, rank: int = 0) -> Page:
        return Page(self.folder / f"page{rank}")

    def run(
        self, job: Job, folder: Path, at: int = 0, how: int = BEFORE, rank: int = 0, *more: str
    ) -> list[Ended]:
        """Run a command once, each of its ranks; one of them is killed at a call, if at isn't 0."""
        words = [*map(str, job.words), *more]
        for r in range(job.ranks):
            self.page(r).reset(at if r == rank else 0, how)
        pids, kept = [], None
        for r in range(job.ranks):
            environment: dict[str, str] = {}
            if job.ranks > 1:
                kept = kept or store()
                environment = {
                    **{name: str(job.ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
                    **{name: str(r) for name in ("RANK", "LOCAL_RANK")},
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(kept[1]),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                }
            log = self.folder / f"log{r}"
            pids.append(start(job, words, folder, self.page(r), log, environment))
        # the one that dies first; torchrun, too, asks the others to leave then, if a little sooner
        order = sorted(range(job.ranks), key=lambda r: r != rank)
        statuses = {r: wait(pids[r], PATIENCE if at and r != rank else None) for r in order}
        if kept:
            os.kill(kept[0], signal.SIGKILL)
            os.waitpid(kept[0], 0)
        return [
            Ended.from_log(status, self.folder / f"log{r}")
            for r, status in sorted(statuses.items())
        ]


# --- what is left ---------------------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    """All that is in a folder, hidden too; but not TensorBoard's files, of which each run begins
    one more.
    """
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if "events.out.tfevents" not in name}


def timeless(value: Any) -> Any:
    """A JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """What a file says, in values that can be compared. Raises whatever its reader does where it
    isn't whole.
    """
    from vggfeat import hdf5
    from vggfeat.features import open_features
    from vggfeat.store import FORMAT

    if path.is_dir():
        return None
    if path.suffix == ".h5":
        format = hdf5.format_of(path)
        if format is None:
            raise VggfeatError(f"{path.name} is no file of ours")
        if format == FORMAT:
            open_features(path).read()
        with hdf5.open_file(path, format, 2) as file:
            arrays = {name: place.read(file.descriptor) for name, place in file.arrays.items()}
        arrays.pop("seconds", None)
        arrays.pop("crc32", None)
        return {**arrays, "facts": timeless(json.loads(arrays["facts"].tobytes()))}
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            metadata = {key: _parsed(value) for key, value in (file.metadata() or {}).items()}
            return {
                **{key: file.get_tensor(key) for key in file.keys()},  # noqa: SIM118
                "metadata": metadata,
            }
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix in (".html", ".md"):
        text = path.read_text()
        if path.suffix == ".html" and not text.rstrip().endswith("</html>"):
            raise VggfeatError(f"{path.name} is cut off")
        text = re.sub(r"<svg[^>]*images/s.*?</svg>", "TIMES", text, flags=re.DOTALL)
        text = text.replace(" --overwrite", "")  # of a command that was given again
        return re.sub(r"\d{4}-\d\d-\d\d( \d\d:\d\d)?|[\d.,]+ (s|min|h|images/s)\b", "TIME", text)
    return path.read_bytes()


def _parsed(text: str) -> Any:
    try:
        return timeless(json.loads(text))
    except ValueError:
        return text


def unlike(one: Any, other: Any, name: str = "") -> str:
    """Where two contents differ, "" if nowhere; descriptors may by what a batch of another size
    rounds otherwise.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{name}: {sorted(one.keys() ^ other.keys())} in one of the two"
        return next((told for key in one if (told := unlike(one[key], other[key], key))), "")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        parts = enumerate(zip(one, other, strict=True))
        return next((told for i, (a, b) in parts if (told := unlike(a, b, f"{name}[{i}]"))), "")
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{name}: {one.shape} {one.dtype}, not {other.shape} {other.dtype}"
        if name != "descriptors":
            return "" if one.tobytes() == other.tobytes() else f"{name}: other values"
        largest = np.abs(np.nan_to_num(other)).max(-1, keepdims=True)
        near = (np.isnan(one) == np.isnan(other)).all() and not (
            np.abs(one - other) > 1e-4 * largest
        ).any()
        return "" if near else f"{name}: other values"
    if type(one) is type(other) and one == other:
        return ""
    a, b = str(one), str(other)
    at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return f"{name}: ...{a[max(0, at - 40) : at + 60]!r}, not ...{b[max(0, at - 40) : at + 60]!r}"


def growing(name: str) -> bool:
    """What is written on and on: not whole until a run has ended well."""
    return name.endswith((".partial", "log.jsonl", "lock"))


class Sweep:
    """A command and the kills that it is to survive."""

    def __init__(self, room: Room, job: Job) -> None:
        self.room, self.job = room, job
        self.whole = room.fresh(job, f"whole-{job.name}")
        self.before = {
            name: content(self.whole / name) for name in names(self.whole) if not growing(name)
        }
        ended = room.run(job, self.whole)
        if any(part.status != job.status for part in ended):
            raise AssertionError(f"{job.name}: {', '.join(map(str, ended))}")
        self.calls = [room.page(rank).calls for rank in range(job.ranks)]
        if not self.calls[0]:
            raise AssertionError(
                f"{job.name}: no call was counted: kills.c doesn't see what changes files here"
            )
        for name in {name for part in ended for name in part.modules} - sys.modules.keys():
            with suppress(Exception):
                import_module(name)  # so that the runs that follow needn't: half of their time
        self.after = {name: content(self.whole / name) for name in names(self.whole)}

    def points(self, most: int | None, halves: bool) -> list[tuple[int, int, int]]:
        """(rank, n, how) of all kills, or of so many of them. halves: amidst each write, too."""
        every = []
        for rank, calls in enumerate(self.calls):
            for n, (call, size) in enumerate(calls, 1):
                every.append((rank, n, BEFORE))
                if halves and size > 1:
                    every.append((rank, n, HALF))
                # after a call is before the next one; but safetensors renames its `.tmp` without
                # asking libc
                if n == len(calls) or ("/.tmp" in call and "/.tmp" not in calls[n][0]):
                    every.append((rank, n, AFTER))
        if most is None or most >= len(every):
            return every
        return sorted(random.Random(self.job.name).sample(every, most))  # the same ones each time

    def fault(self, rank: int, n: int, how: int) -> str | None:
        """What is wrong after a kill; "" is nothing; None: the run came to its end before that
        call.
        """
        job, room = self.job, self.room
        folder = room.fresh(job, "trial")
        first = room.run(job, folder, n, how, rank)
        hit = self.room.page(rank).calls
        where = f"{HOW[how]} {hit[n - 1][0].replace(str(folder), '.')}" if len(hit) >= n else ""
        if first[rank].status != -signal.SIGKILL:
            if not where and first[rank].status == job.status:
                return None
            return f"{where}: not killed, but {first[rank]}"
        for other, ended in enumerate(first):
            if other != rank and (
                ended.status is None or ended.status < 0 or "unexpected" in ended.text
            ):
                return f"{where}: then rank {other} {ended}"
        try:
            self._look(folder, "after the kill")
            second = room.run(job, folder)
            more: list[str] = []
            while any(part.status == 1 and "exists" in part.text for part in second):
                # the first run got as far as this output, which must be whole; it is replaced or
                # moved away
                self._look(folder, "where the output is said to exist")
                filled = re.search(
                    r"(\S+) already exists and isn't an empty folder", second[0].text
                )
                if filled:
                    shutil.rmtree(folder / filled[1])
                elif job.overwrite and not more:
                    more = ["--overwrite"]
                else:
                    break
                second = room.run(job, folder, 0, BEFORE, 0, *more)
            for part in second:
                if part.status != job.status:
                    return f"{where}: then {part}"
            self._compare(folder)
        except _Fault as error:
            return f"{where}: {error}"
        return ""

    def _look(self, folder: Path, when: str) -> None:
        """What has its name is whole: as it was before the run, or after one."""
        for name in sorted(names(folder) & (self.before.keys() | self.after.keys())):
            if growing(name):
                continue
            try:
                found = content(folder / name)
            except Exception as error:
                raise _Fault(f"{when} {name} is not whole: {error}") from error
            known = [part[name] for part in (self.before, self.after) if name in part]
            if not self.job.steps and all(unlike(found, part) for part in known):
                raise _Fault(f"{when} {name} is neither the old one nor the new one")

    def _compare(self, folder: Path) -> None:
        there = names(folder)
        if there != self.after.keys():
            left, lacking = sorted(there - self.after.keys()), sorted(self.after.keys() - there)
            raise _Fault(f"at the end there is also {left}, and {lacking} is not there")
        for name, value in self.after.items():
            try:
                found = content(folder / name)
            except Exception as error:
                raise _Fault(f"at the end {name} can't be read: {error}") from error
            if told := unlike(found, value):
                raise _Fault(f"at the end {name} has another content: {told}")


class _Fault(Exception):  # noqa: N818 - it ends a trial
    pass


# --- the process that all this takes place in -----------------------------------------------------


def prepare() -> None:
    """Import what commands import, so that their children needn't; no thread may be there when they
    are forked.
    """
    import sklearn.svm  # noqa: F401
    import timm  # noqa: F401
    import torch.utils.tensorboard
    import torchvision  # noqa: F401

    from vggfeat import writer

    Image.init()
    torch.set_num_threads(1)
    writer.FLUSH_ROWS = 4  # several flushes a run


def preloaded(words: Sequence[str]) -> int:
    """Run `python -m benchmarks.reliability` with words in a process that has `kills.c` in it; its
    status.
    """
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        library = Path(folder) / "kills.so"
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            raise VggfeatError("there is no C compiler (cc, or $CC)")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "KILLS_FOLDER": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": folder,
        }
        command = [sys.executable, "-m", "benchmarks.reliability", *words]
        return subprocess.run(command, env=environment).returncode
