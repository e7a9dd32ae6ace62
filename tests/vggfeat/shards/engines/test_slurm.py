"""Which shards a task of a job array describes, when it helps the others, and what is left of tasks
that are killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vggfeat.shards.made import SPEC, job, same
from vggfeat.errors import WrongUsage
from vggfeat.shards.engines.slurm import in_turn, place_in_array
from vggfeat.shards.sharded import open_set, seal


def array(monkeypatch: pytest.MonkeyPatch, **told: str) -> None:
    for key in ("ID", "MIN", "STEP", "COUNT"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{key}", raising=False)
    for key, text in told.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", text)


def test_a_task_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    array(monkeypatch, ID="7", MIN="3", STEP="2", COUNT="4")
    assert place_in_array() == (2, 4)
    array(monkeypatch, ID="0", MIN="0", STEP="1", COUNT="64")
    assert place_in_array() == (0, 64)
    array(monkeypatch)
    with pytest.raises(WrongUsage, match=r"is for a task of a job array: `sbatch --array=0-63"):
        place_in_array()


def test_every_shard_is_somebodys_and_then_everybodys() -> None:
    todo = [0, 1, 3, 4, 6, 7, 9]
    own = [list(in_turn(todo, i, 3, lambda k: True)) for i in range(3)]
    assert own == [[0, 3, 6, 9], [1, 4, 7], []]
    assert sorted(k for each in own for k in each) == todo
    there: set[int] = set()
    turn = in_turn(todo, 1, 3, there.__contains__)
    assert [next(turn), next(turn), next(turn)] == [1, 4, 7]
    there |= {9, 3}
    assert sorted(turn) == [0, 6]  # what isn't there yet


ARRAY = {"MIN": "0", "STEP": "1", "COUNT": "2"}
KILLS = int(os.environ.get("VGGFEAT_KILLS", "3"))
TASKS = """
import json, os, random, signal, sys, time
from tests.vggfeat.shards.made import SPEC
from vggfeat.place import place_of
from vggfeat.shards.engines.slurm import in_turn
from vggfeat.shards.plan import missing_of, read_plan, shard_name
from vggfeat.shards.worker import Work, attempt
from vggfeat.sources import load
import torch

where, kills = sys.argv[1], int(sys.argv[2])
enough = where + ".enough"
place, chance = place_of(where), random.Random(kills)
plan, work = read_plan(place), Work(where, "cpu", 1)
torch.set_num_threads(1)
network = load(SPEC, device="cpu", precision="float32")

def task(number):
    todo = missing_of(plan, list(place.names("data")))
    there = lambda k: place.size(shard_name(k)) is not None
    for k in in_turn(todo, number, 2, there):
        while k >= plan.shards - 2 and not os.path.exists(enough):  # there is time for all kills
            time.sleep(0.01)
        attempt(place, plan, network, k, work)

def started(number):
    child = os.fork()
    if child == 0:
        task(number)
        os._exit(0)
    return child

killed = 0
tasks = {started(number): number for number in (0, 1)}
while tasks:
    if killed < kills:
        time.sleep(chance.uniform(0, 0.08))
        os.kill(chance.choice(list(tasks)), signal.SIGKILL)
    child, status = os.wait()
    number = tasks.pop(child)
    if status:  # slurm starts it again
        assert status == signal.SIGKILL, status
        killed += 1
        if killed == kills:
            open(enough, "w").close()
        tasks[started(number)] = number
print(json.dumps({"killed": killed}))
"""


def test_tasks_that_are_killed_again_and_again_describe_each_image_once(tmp_path: Path) -> None:
    """VGGFEAT_KILLS=50 for longer."""
    made = job(tmp_path / "images", bad={4}, n=3 * KILLS + 10)
    whole = open_set(made.made(tmp_path / "one", 1)[0].name)
    place, plan = made.begun(tmp_path / "set", 1)
    ran = subprocess.run(
        [sys.executable, "-c", TASKS, str(tmp_path / "set"), str(KILLS)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == f'{{"killed": {KILLS}}}'
    seal(place, plan)
    opened = open_set(tmp_path / "set")
    assert list(opened.names) == made.items.names and opened.errors == whole.errors
    assert same(opened.read(), whole.read())
    left = [path.name for path in (tmp_path / "set" / "data").iterdir()]
    half = [name for name in left if not name.endswith(".parquet")]
    assert len(left) - len(half) == plan.shards and len(half) <= KILLS


def test_the_command_as_a_task_of_an_array(tmp_path: Path) -> None:
    """Its own part, and then the other's, who doesn't come."""
    made = job(tmp_path / "images", bad={4}, n=8)
    words = f"""-m vggfeat extract --dataset folder --root {tmp_path / "images"} --weights {SPEC}
        --scales 36,48 --precision float32 --device cpu --out {tmp_path / "set"}/ --shard-rows 2
        --engine slurm"""
    told = {f"SLURM_ARRAY_TASK_{key}": text for key, text in ARRAY.items()}
    ran = subprocess.run(
        [sys.executable, *words.split()],
        env={**os.environ, **told, "SLURM_ARRAY_TASK_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 3, ran.stderr
    opened = open_set(tmp_path / "set")
    assert list(opened.names) == made.items.names and list(opened.errors) == [2]
