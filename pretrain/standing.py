"""How a run stands: which stages its last command trains, how it ended, and whether a process is at
work in it now; as its folder tells.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from vggfeat.checked import OneOf, Range, Sparse, fitted, parse_json, read_text
from vggfeat.files import write_json

RUN, LOCK = "run.json", "lock"  # in a run's folder
DONE, INTERRUPTED, FAILED = "done", "interrupted", "failed"
_Count = Annotated[int, Range(0, 2**53)]


@dataclass(frozen=True, kw_only=True)
class Planned(Sparse):
    """A stage that is to be trained. iterations: the most that it takes."""

    name: str
    iterations: _Count


@dataclass(frozen=True, kw_only=True)
class End(Sparse):
    """How a command ended: in which stage, after which of its iterations; why it failed."""

    how: Annotated[str, OneOf((DONE, INTERRUPTED, FAILED))]
    stage: str
    iteration: _Count
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Standing(Sparse):
    """The stages of the last command, in their order. end: None while it is at work, and of one
    that was killed.
    """

    stages: list[Planned] = field(default_factory=list)
    end: End | None = None

    def write(self, folder: Path) -> None:
        """Into a run's folder. Raises CantWrite."""
        write_json(folder / RUN, self.to_json())


def standing_of(folder: Path) -> Standing:
    """Of a run's folder; without stages, where nothing is written of it, as by older versions.
    Raises VggfeatError for a file that says something else.
    """
    path = folder / RUN
    if not os.path.lexists(path):
        return Standing()
    standing: Standing = fitted(
        parse_json(read_text(path, "record of a run"), path), Standing, path
    )
    return standing


def at_work(folder: Path) -> bool:
    """Whether another process holds the run's folder. A process that holds it itself mustn't ask:
    closing the file would give the lock up.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    # asked for, not tried: a run that begins now would find a lock that is tried. As <fcntl.h> has
    # it: type, whence, start, length, process
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        lock = os.open(folder / LOCK, flags)
    except OSError:
        return False
    try:
        kind = struct.unpack_from("h", fcntl.fcntl(lock, fcntl.F_GETLK, asked))[0]
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(lock)
    return bool(kind != fcntl.F_UNLCK)
