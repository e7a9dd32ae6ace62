"""A shard knows no engine: twice is once, and a machine that would describe otherwise refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.vggfeat.shards.made import Job, job
from vggfeat import datasets
from vggfeat.errors import VggfeatError
from vggfeat.shards.shard import describe_shard


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job(tmp_path_factory.mktemp("images"), bad={3, 8})


def test_a_shard_twice_is_one_file(made: Job, tmp_path: Path) -> None:
    place, plan = made.begun(tmp_path / "set", 5)
    first = describe_shard(place, plan, made.network, 1, workers=1)
    content = place.read("data/00001.parquet")
    again = describe_shard(place, plan, made.network, 1, workers=1)
    assert (first.put, again.put, first.rows) == (True, False, 5)
    assert place.read("data/00001.parquet") == content


def test_a_machine_with_another_version_describes_nothing(
    made: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, plan = made.begun(tmp_path / "set", 5)
    monkeypatch.setattr("vggfeat.shards.shard.versions", lambda: {**plan.versions, "torch": "9"})
    with pytest.raises(VggfeatError, match=r"with torch .*, and this machine \(.*\) has 9"):
        describe_shard(place, plan, made.network, 0, workers=1)
    assert place.names("data") == {}


def test_a_machine_without_the_images_marks_none(made: Job, tmp_path: Path) -> None:
    shutil.copytree(made.items.root, tmp_path / "images")
    there = Job(datasets.load("folder", tmp_path / "images"), made.network)
    place, plan = there.begun(tmp_path / "set", 4)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    why = r"no image of shard 1 can be opened on \S+, nor the first of 2 other shards .*: bring"
    with pytest.raises(VggfeatError, match=why):
        describe_shard(place, plan, made.network, 1, workers=1)
    assert place.names("data") == {}
    # those of one shard alone are gone: it is their own fault
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    for row in plan.rows_of(1):
        there.items.source(row).unlink()  # type: ignore[union-attr]
    assert describe_shard(place, plan, made.network, 1, workers=1).unreadable == 4
