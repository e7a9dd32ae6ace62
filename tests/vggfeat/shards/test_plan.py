"""A plan is written once; another in its place is refused, and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.vggfeat.shards.made import Job, job
from vggfeat.errors import VggfeatError
from vggfeat.shards.plan import items_of, settle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job(tmp_path_factory.mktemp("images"), bad={3, 8})


def test_another_plan_in_the_folder_is_named_and_nothing_changes(made: Job, tmp_path: Path) -> None:
    place, plan = made.begun(tmp_path / "set", 5)
    assert settle(place, made.plan(5), made.items) == plan
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fewer = replace(made, items=made.items.take(np.arange(10)))
    told = {
        "`shard_rows` 5, not 4": made.plan(4),
        "`store` float32, not float16": made.plan(5, "float16"),
        "12 images, not 10": fewer.plan(5),
        "torch .*, not 0.1": replace(
            made.plan(5), versions={**made.plan(5).versions, "torch": "0.1"}
        ),
        "scales 36,48, not 36": replace(
            made.plan(5), description=replace(made.plan(5).description, scales=(36,))
        ),
        "other images, labels or splits": replace(made.plan(5), listing="0" * 64),
        "`root` .*images0, not /elsewhere": replace(made.plan(5), root="/elsewhere"),
        "another protocol": replace(made.plan(5), protocol="multi-label"),
    }
    for words, other in told.items():
        with pytest.raises(
            VggfeatError, match=f"was begun with {words}.*: give the same, or another"
        ):
            settle(place, other, made.items)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "set" / "plan.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(VggfeatError, match=r"plan.json is no plan of version 1"):
        settle(place, plan, made.items)


def test_too_many_shards_are_refused(made: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vggfeat.shards.plan.MOST_SHARDS", 2)
    with pytest.raises(VggfeatError, match="3 shards are more than 2: give more `shard_rows`"):
        made.plan(5)


def test_weights_that_lie_elsewhere_are_the_same(made: Job, tmp_path: Path) -> None:
    place, plan = made.begun(tmp_path / "set", 5)
    moved = replace(plan, description=replace(plan.description, weights="/elsewhere/w.pth"))
    assert moved.identity == plan.identity and settle(place, moved, made.items) == plan


def test_listings_that_are_left_of_another_division_are_not_read(made: Job, tmp_path: Path) -> None:
    place, _ = made.begun(tmp_path / "set", 4)
    (tmp_path / "set" / "plan.json").unlink()  # as if it had been killed just before
    _, plan = made.begun(tmp_path / "set", 5)
    rows = [name for k in range(plan.shards) for name in items_of(place, plan, k).names]
    assert rows == made.items.names
