"""Shards as Ray's tasks, on a cluster of this machine: one job, since Ray takes ten seconds to
start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vggfeat.shards.made import SPEC, Job, job
from vggfeat.errors import VggfeatError
from vggfeat.shards.engines import ray as engine
from vggfeat.shards.plan import missing_of, shard_name
from vggfeat.shards.run import Told, finish
from vggfeat.shards.sharded import open_set
from vggfeat.shards.worker import Work

ROOT = Path(__file__).parents[4]
POISON = """
import builtins, os, time
real = builtins.open
def opened(path, *words, **more):
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if name.endswith("c1/03.png"):
        os.kill(os.getpid(), 9)
    if name.endswith("c1/07.png"):  # there is time to kill who reads it
        time.sleep(3)
    return real(path, *words, **more)
builtins.open = opened
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes of one slot each, whose processes an image of a name ends."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(POISON)
    before = {key: os.environ.get(key) for key in ("PYTHONPATH", "RAY_worker_niceness")}
    os.environ |= {"PYTHONPATH": f"{site}:{ROOT}", "RAY_worker_niceness": "0"}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    for end in (ray.shutdown, made.shutdown):
        end()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def set_of(made: Job, folder: Path, rows: int) -> tuple[Any, Any, Work]:
    place, plan = made.begun(folder, rows)
    return place, plan, Work(str(folder), "cpu", 1)


def test_workers_nodes_and_drivers_that_die_and_an_image_that_ends_them(
    cluster: Any, tmp_path: Path
) -> None:
    """One test: a cluster takes ten seconds to start, for each process that runs tests. With KILLS
    the driver dies, too, which takes half a minute.
    """
    _workers_and_nodes(cluster, tmp_path / "first")
    if "KILLS" in os.environ:
        _driver(cluster, tmp_path / "second")
    _refusal(cluster, tmp_path / "third")


def _workers_and_nodes(cluster: Any, tmp_path: Path) -> None:
    made = job(tmp_path / "images", bad={2}, n=8)  # c1/03.png ends whoever reads it
    place, plan, work = set_of(made, tmp_path / "set", 1)
    done: list[int] = []
    lost = [cluster.list_all_nodes()[-1]]

    def run(todo: list[int]) -> Iterator[Any]:
        for result in engine.run(work, todo, 4, cluster.address):
            done.append(result.shard)
            if len(done) == 2:  # a node goes in the middle, and another comes
                cluster.remove_node(lost.pop())
                cluster.add_node(num_cpus=1)
            if len(done) == 4:
                _kill_one_worker(os.getpid())
            yield result

    report = finish(place, plan, run, Told())
    assert sorted(done) == list(range(8)) and report.images == 8
    assert report.unreadable == {
        "c0/02.png": "not an image that Pillow can read",
        "c1/03.png": "it ends the process that reads it (SIGKILL)",
    }
    opened = open_set(tmp_path / "set")
    assert list(opened.names) == made.items.names and len(opened.errors) == 2


def _kill_one_worker(cluster: int) -> None:
    """Of the cluster's processes one that describes; there will be one. cluster: who started it."""
    while True:
        parent_of: dict[int, int] = {}
        describing: list[int] = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError, IndexError):  # it has just ended
                    status = (entry / "stat").read_text().rpartition(")")[2].split()
                    parent_of[int(entry.name)] = int(status[1])
                    if (entry / "cmdline").read_bytes().startswith(b"ray::_shard"):
                        describing.append(int(entry.name))
        for process in describing:
            above = process
            while above in parent_of and above != cluster:
                above = parent_of[above]
            if above == cluster:
                os.kill(process, signal.SIGKILL)
                return
        time.sleep(0.05)


DRIVER = """
import sys
from vggfeat.shards.engines import ray
from vggfeat.shards.plan import missing_of, read_plan
from vggfeat.place import place_of
from vggfeat.shards.worker import Work
where, address = sys.argv[1:]
place = place_of(where)
todo = missing_of(read_plan(place), list(place.names("data")))
for result in ray.run(Work(where, "cpu", 1), todo, 2, address):
    print(result.shard, flush=True)
"""


def _driver(cluster: Any, tmp_path: Path) -> None:
    all_images = job(tmp_path / "images", n=12)
    made = Job(all_images.items.take(_all_but("c1/03.png", all_images)), all_images.network)
    place, plan, work = set_of(made, tmp_path / "set", 1)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, work.where, cluster.address],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    told = [driver.stdout.readline() for _ in range(3)]
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert all(told)
    # what was under way may still be put by Ray's processes, which end soon
    deadline, there = time.monotonic() + 60, -1
    while there != (there := len(place.names("data"))) and time.monotonic() < deadline:
        time.sleep(2)
    before = {
        name: (tmp_path / "set" / "data" / name).stat().st_mtime_ns for name in place.names("data")
    }
    assert len(before) >= 3
    todo: list[int] = []

    def run(missing: list[int]) -> Iterator[Any]:
        todo.extend(missing)
        return engine.run(work, missing, 2, cluster.address)

    report = finish(place, plan, run, Told())
    assert report.images == 11 and not {shard_name(k)[5:] for k in todo} & before.keys()
    after = {name: (tmp_path / "set" / "data" / name).stat().st_mtime_ns for name in before}
    assert after == before and missing_of(plan, list(place.names("data"))) == []


def _all_but(name: str, made: Job) -> np.ndarray:
    names = np.array(made.items.names)
    return np.flatnonzero(names != name)


def _refusal(cluster: Any, tmp_path: Path) -> None:
    made = job(tmp_path / "images", n=4)
    place, plan, _ = set_of(made, tmp_path / "set", 2)
    other = Work(str(tmp_path / "set"), "cpu", 1, weights=SPEC.replace("0.05", "0.06"))
    with pytest.raises(VggfeatError, match="are not those"):
        finish(place, plan, lambda todo: engine.run(other, todo, 2, cluster.address), Told())
