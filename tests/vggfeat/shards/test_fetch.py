"""Images in a store: no row is lost, none is marked for what is the store's fault."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import photograph
from tests.vggfeat.shards.faulty import FAULTS, FaultyFileSystem
from tests.vggfeat.shards.made import SPEC, Job
from tests.vggfeat.shards.test_sharded import equal
from vggfeat import datasets, place
from vggfeat.errors import VggfeatError
from vggfeat.place import StorageError
from vggfeat.shards import fetch, shard
from vggfeat.shards.shard import describe_shard
from vggfeat.shards.sharded import open_set
from vggfeat.sources import load


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyFileSystem]:
    monkeypatch.setattr(place, "FIRST_WAIT", 0.0)
    FAULTS.__init__()  # type: ignore[misc]
    files = FaultyFileSystem()
    files.store.clear()
    for i in range(6):
        made = io.BytesIO()
        Image.fromarray(photograph(i, 40 + 5 * (i % 2), 50)).save(made, "PNG")
        files.pipe_file(f"/b/photos/c{i % 2}/{i}.png", made.getvalue())
    files.pipe_file("/b/photos/c0/bad.png", b"no picture")
    yield files
    files.store.clear()


def job() -> Job:
    items = datasets.load("folder", "faulty://b/photos")
    return Job(items, load(SPEC, device="cpu", precision="float32"))


def test_a_store_that_fails_gives_the_set_of_one_that_does_not(store: FaultyFileSystem) -> None:
    quiet = job()
    quiet.made("faulty://b/one", 3)
    FAULTS.every, FAULTS.late = 4, True
    shaken = job()
    assert shaken.items.names == quiet.items.names
    shaken.made("faulty://b/two", 3)
    assert FAULTS.failed > 20
    one, two = open_set("faulty://b/one"), open_set("faulty://b/two")
    equal(two, one)
    assert list(one.errors.values()) == ["not an image that Pillow can read"]
    assert list(one.errors) == [list(one.names).index("c0/bad.png")]


def test_a_store_that_never_answers_fails_the_shard_and_marks_nothing(
    store: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job()
    where, plan = made.begun("faulty://b/set", 4)
    FAULTS.every = 10**9
    monkeypatch.setattr(shard, "items_of", lambda *_: made.items.take(np.arange(4)))
    with pytest.raises(StorageError, match=r"can't read faulty://b/photos/\S+: .*, 6 times"):
        describe_shard(place.place_of("faulty://b/set"), plan, made.network, 0, workers=1)
    FAULTS.every = 1
    assert where.names("data") == {} and plan.shards == 2
    monkeypatch.setattr(fetch, "MOST_ALL", 1000)
    with pytest.raises(VggfeatError, match="more than 1,000 bytes: give fewer `shard_rows`"):
        fetch.fetched(made.items)


def test_what_a_store_says_is_not_there_is_the_images_fault(
    store: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job()
    store.rm("/b/photos/c1/1.png")
    monkeypatch.setattr(fetch, "MOST_BYTES", 3000)
    large = [n for n, i in store.find("/b/photos", detail=True).items() if i["size"] > 3000]
    items, reasons = fetch.fetched(made.items)
    assert items.images is not None and isinstance(items.source(0), bytes)
    row = made.items.names.index("c1/1.png")
    assert reasons.pop(row) == "no such file"
    assert set(reasons.values()) == {"larger than 3,000 bytes"} and len(reasons) == len(large)


def test_the_images_of_boxes_are_fetched_once(store: FaultyFileSystem) -> None:
    items = job().items.take(np.array([0, 1]))
    two = replace(
        items,
        names=["a#1", "b#1", "a#2"],
        files=[items.names[0], items.names[1], items.names[0]],
        labels=None,
        splits={},
        boxes=np.array([[0, 0, 9, 9]] * 3, np.int32),
    )
    FAULTS.asked.clear()
    here, reasons = fetch.fetched(two)
    assert not reasons and here.source(0) == here.source(2) != here.source(1)
    assert sum(FAULTS.asked.values()) == 2
    images, image_N = here.by_file()
    assert image_N.tolist() == [0, 1, 0] and images.source(1) == here.source(1)


def test_items_that_are_here_stay_as_they_are(tmp_path: Path) -> None:
    items = datasets.Items("folder", "unlabelled", tmp_path, ["a.png"], None, [])
    assert fetch.fetched(items) == (items, {})
