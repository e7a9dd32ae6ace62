"""What a process may use of the machine, and how long something takes in words."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path

import pytest

from vggfeat.machine import CORES, cores, duration, memory

UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "days": "days"}


@pytest.mark.parametrize("seconds", [0, 0.04, 90, 119.9, 120, 7199, 7200, 172_799, 172_800, 1e7])
def test_a_duration_is_a_number_between_1_and_120_of_its_unit(seconds: float) -> None:
    told = re.fullmatch(r"(\d+\.\d) (s|min|h|days)", duration(seconds))
    assert told is not None
    number, unit = float(told[1]), timedelta(**{UNITS[told[2]]: 1}).total_seconds()
    assert abs(number * unit - seconds) <= 0.05001 * unit
    assert number <= 120 and (number >= 2 or told[2] == "s")


def test_cores_are_those_of_the_affinity_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1 <= CORES <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})
    assert cores(tmp_path / "none", tmp_path) == 3


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "1000 100000"}, 1),
        ("0::/", {"cpu.max": "3200000 100000"}, 16),
        ("0::/", {"cpu.max": "a lot"}, 16),
        # the narrowest of all around it; a part of its path need not be there
        ("0::/a/b", {"cpu.max": "500000 100000", "a/b/cpu.max": "max 100000"}, 5),
        ("0::/a/b", {"a/cpu.max": "700000 100000", "a/b/cpu.max": "600000 100000"}, 6),
        ("0::/a/b", {"cpu.max": "500000 100000"}, 5),
        # version 1
        (
            "5:memory:/x\n4:cpu,cpuacct:/x",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("2:cpuacct:/", {"cpuacct/cpu.cfs_quota_us": "1", "cpuacct/cpu.cfs_period_us": "1"}, 16),
        ("nonsense", {}, 16),
    ],
)
def test_cores_are_no_more_than_the_control_groups_quota(
    groups: str,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert cores(*written(tmp_path, groups, files)) == expected


def written(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """What names a process's control groups, and where they are mounted."""
    (folder / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder / "cgroup", folder / "fs"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 1 << 36),
        ("0::/", {"memory.max": "max"}, 1 << 36),
        ("0::/", {"memory.max": "8589934592"}, 1 << 33),
        ("0::/", {"memory.max": str(1 << 40)}, 1 << 36),
        ("0::/a/b", {"memory.max": "max", "a/memory.max": "5000", "a/b/memory.max": "6000"}, 5000),
        ("0::/a", {"memory.max": "a lot"}, 1 << 36),
        # version 1
        ("4:memory:/x", {"memory/x/memory.limit_in_bytes": "7000"}, 7000),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 1 << 36),
        ("4:cpu:/", {"cpu/memory.limit_in_bytes": "7000"}, 1 << 36),
        ("nonsense", {}, 1 << 36),
    ],
)
def test_memory_is_no_more_than_the_control_groups_limit(
    groups: str,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {"SC_PAGE_SIZE": 1 << 12, "SC_PHYS_PAGES": 1 << 24}
    monkeypatch.setattr(os, "sysconf", told.get)
    assert memory(*written(tmp_path, groups, files)) == expected
