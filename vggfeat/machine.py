"""What the machine has to work with, and how long that takes in words; without PyTorch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cores(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors that this process may use: those it may run on (`taskset`, slurm, a cpuset), or
    fewer where its control group has a quota of their time (`docker --cpus`, Kubernetes' limits).

    proc: what names this process's control groups. root: where they are mounted.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on this system
        allowed = os.cpu_count() or 1
    # a part of a processor is one that works part of the time
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(proc, root))]))


def _quotas(proc: Path, root: Path) -> Iterator[float]:
    """Processors' worth of time that each control group around this process may use, where that is
    limited; of version 2, and of version 1 with a hierarchy for processors.
    """
    for folder, first in _groups("cpu", proc, root):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if first:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if (share := float(quota) / float(period)) > 0:  # "max" and -1: no limit
                yield share


def memory(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may have: the machine's, or fewer where its control group has a limit
    of them. What others take of it now isn't left out: a plan is to hold an hour later, too.

    proc, root: as of `cores`.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder, first in _groups("memory", proc, root):
        with suppress(OSError, ValueError):  # "max": no limit; of version 1 a huge number
            name = "memory.limit_in_bytes" if first else "memory.max"
            limits.append(int((folder / name).read_text()))
    return min(limits)


def _groups(controller: str, proc: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """The folder of each control group around this process that such limits can be of, and whether
    it is one of version 1.
    """
    with suppress(OSError, ValueError):
        for line in proc.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            # in a container, the group's path may be that outside of it, and the root is its own
            for place in [Path(group), *Path(group).parents]:
                with suppress(ValueError):
                    yield root / controllers / place.relative_to("/"), bool(controllers)


CORES = cores()


def size(count: int) -> str:
    """Bytes in the unit that a person would say: "36 kB", "1.6 MB"."""
    return f"{count / 1e3:,.0f} kB" if count < 100_000 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would say: "90.0 s", "12.5 min", "3.4 h", "5.2 days"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
