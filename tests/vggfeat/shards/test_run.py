"""A set from its plan to its seal, whatever engine: what fails is told, what is there is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vggfeat.shards.made import SCALES, Job, job
from vggfeat.describe import description_of
from vggfeat.errors import VggfeatError
from vggfeat.place import Place
from vggfeat.shards.engines.failed import Failed
from vggfeat.shards.plan import Plan
from vggfeat.shards.run import Settings, Told, extract_set, finish
from vggfeat.shards.shard import Facts, describe_shard
from vggfeat.shards.sharded import open_set
from vggfeat.shards.worker import Work

Engine = Callable[[list[int]], Iterator[Facts | Failed]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job(tmp_path_factory.mktemp("images"), bad={3})


def engine(
    made: Job, place: Place, plan: Plan, failing: dict[int, Failed], asked: list[int]
) -> Engine:
    """Describes shards here; of those that fail it says so."""

    def run(todo: list[int]) -> Iterator[Facts | Failed]:
        for k in todo:
            asked.append(k)
            if k in failing:
                yield failing[k]
            else:
                yield describe_shard(place, plan, made.network, k, workers=1)

    return run


def test_it_goes_on_where_it_was_ended_and_seals_in_the_end(made: Job, tmp_path: Path) -> None:
    place, plan = made.begun(tmp_path / "set", 2)
    said: list[str] = []
    asked: list[int] = []
    told = Told(say=said.append)
    failing = {k: Failed(k, "503", False) for k in (1, 4)}
    with pytest.raises(VggfeatError, match=r"2 of 6 shards failed, the first is 1: 503; what was"):
        finish(place, plan, engine(made, place, plan, failing, asked), told)
    assert asked == list(range(6)) and said == ["shard 1 failed: 503", "shard 4 failed: 503"]
    with pytest.raises(VggfeatError, match="half-written: 2 of 6 shards"):
        open_set(tmp_path / "set")
    asked.clear()
    report = finish(place, plan, engine(made, place, plan, {}, asked), told)
    assert asked == [1, 4] and (report.images, report.earlier) == (12, 8)
    assert said[-1] == "going on: 4 of 6 shards are there, 4 images are left"
    assert report.unreadable == {"c1/03.png": "not an image that Pillow can read"}
    asked.clear()
    again = finish(place, plan, engine(made, place, plan, {}, asked), told)
    assert asked == [] and again.unreadable == report.unreadable and again.earlier == 12


def test_a_machine_that_refuses_and_too_many_failures_stop_the_run(
    made: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, plan = made.begun(tmp_path / "set", 1)
    asked: list[int] = []
    refused = {2: Failed(2, "other weights", True)}
    with pytest.raises(VggfeatError, match=r"^other weights$"):
        finish(place, plan, engine(made, place, plan, refused, asked), Told())
    assert asked == [0, 1, 2]
    asked.clear()
    monkeypatch.setattr("vggfeat.shards.run.MOST_FAILED", 2)
    failing = {k: Failed(k, "no space", False) for k in range(12)}
    with pytest.raises(VggfeatError, match="3 of 12 shards failed, the first is 2: no space"):
        finish(place, plan, engine(made, place, plan, failing, asked), Told())
    assert asked == [2, 3, 4]


def test_a_shard_that_another_task_describes_after_all_has_not_failed(
    made: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, plan = made.begun(tmp_path / "set", 2)
    monkeypatch.setattr("vggfeat.shards.run.MOST_FAILED", 2)

    def run(todo: list[int]) -> Iterator[Facts | Failed]:
        for k in todo:
            yield Failed(k, "503", False)
            describe_shard(place, plan, made.network, k, workers=1)

    said: list[str] = []
    report = finish(place, plan, run, Told(say=said.append))
    assert report.images == 12 and len(said) == 6
    assert open_set(tmp_path / "set").errors == {7: "not an image that Pillow can read"}


def test_no_image_at_all_is_an_error(tmp_path: Path) -> None:
    made = job(tmp_path / "images", bad=range(4), n=4)
    place, plan = made.begun(tmp_path / "set", 3)
    with pytest.raises(VggfeatError, match="none of the 4 images can be read, the first is c0/00"):
        finish(place, plan, engine(made, place, plan, {}, []), Told())
    assert place.size("set.json") is None


def test_rays_processes_are_told_whole_paths(
    made: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    asked: list[Work] = []

    def run(work: Work, todo: list[int], *_: object) -> Iterator[Facts | Failed]:
        asked.append(work)
        place, plan = made.begun("its.set", 5)
        yield from (describe_shard(place, plan, made.network, k, workers=1) for k in todo)

    monkeypatch.setattr("vggfeat.shards.run.ray.run", run)
    description = description_of(made.network, None, SCALES, True, ("image",))
    how = Settings("ray", shard_rows=5, weights="oxford:A@w.pth", command="cmd")
    extract_set(made.items, made.network, description, "its.set", how, Told())
    (work,) = asked
    assert (work.where, work.weights) == (f"{tmp_path}/its.set", f"oxford:A@{tmp_path}/w.pth")
