"""Images share batches of one shape; a device's memory, and ours, hold as many as they can."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vggfeat
from vggfeat.batches import Buckets, by_shape, gathered, work_shares
from vggfeat.describe import describe_all, description_of
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import smallest_side
from vggfeat.weights import Network

from ..conftest import all_read, photograph

SCALES = (40, 64)


@pytest.fixture(scope="module")
def network() -> Network:
    return vggfeat.load("random:B,width=0.125,crop=32,classes=4")


def test_a_bucket_goes_on_when_it_is_full_or_the_fullest_of_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vggfeat.batches.WAITING_BYTES", 3 * 100)
    buckets = Buckets[str]()
    small, large = (0, 2, 5), (1, 4, 10)
    assert buckets.put(small, "a", 25) is None and buckets.waiting == 30
    assert buckets.put(small, "b", 25) == (small, ["a", "b"]) and buckets.waiting == 0
    assert buckets.put(large, "c", 119) is None
    assert buckets.put(small, "d", 119) is None and buckets.waiting == 150
    assert buckets.put(large, "e", 119) == (large, ["c", "e"]) and buckets.waiting == 30
    assert buckets.put(large, "f", 900) is None and buckets.put(small, "g", 900) is None
    assert buckets.put(large, "h", 900) is None and buckets.waiting == 300
    assert buckets.put(small, "i", 900) == (large, ["f", "h"])
    assert list(buckets.rest()) == [(small, ["d", "g", "i"])] and buckets.waiting == 0


def test_a_scale_is_as_much_work_as_its_pixels() -> None:
    assert work_shares((1, 2, 3)).tolist() == [1 / 14, 4 / 14, 9 / 14]


def test_full_buckets_are_run_before_memory_is(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vggfeat.batches.WAITING_BYTES", 40_000)
    images = [photograph(i, 40, 40 + i) for i in range(12)]
    description = description_of(network, "pool3", SCALES, False)
    got = dict(describe_all(network, images, description, batch_size=1000))
    assert sorted(got) == list(range(12))


def test_plan_knows_the_batches_that_there_will_be(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full ones, those that memory sends on, and the rest, by the shapes alone."""
    monkeypatch.setattr("vggfeat.batches.WAITING_BYTES", 60_000)
    images = [photograph(i, 40 + i % 3, 40 + 2 * (i % 2)) for i in range(30)]
    real = []

    def compute(batch_NHWC: torch.Tensor) -> torch.Tensor:
        real.append(tuple(batch_NHWC.shape[:3]))
        return batch_NHWC.float().mean((1, 2))

    for _ in by_shape(
        images.__getitem__, range(30), SCALES, compute, torch.device("cpu"), batch_size=1
    ):
        pass
    shapes = (
        ((s, *smallest_side(image, q).shape[:2]), i)
        for i, image in enumerate(images)
        for s, q in enumerate(SCALES)
    )
    told = list(gathered(shapes, 224 * 224))
    assert [(len(members), *shape[1:]) for shape, members in told] == real
    assert sum(n for n, _, _ in real) == 60 and len({n for n, _, _ in real}) > 2


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_batch_and_says_so(kind: type[Exception]) -> None:
    """A device that holds three images of one size; the order and number of results stay."""
    told: list[str] = []
    sizes: list[int] = []

    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images_NHWC))
        if len(images_NHWC) > 3:
            raise kind(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
                " bytes"
            )
        return images_NHWC[:, 0, 0, :1].float()

    images = [np.full((32, 32, 3), i, np.uint8) for i in range(40)]
    results = by_shape(
        images.__getitem__, range(40), (32,), compute, torch.device("cpu"), say=told.append
    )
    first = all_read((i, value) for i, _, value in results)
    assert {i: int(value[0]) for i, value in first.items()} == {i: i for i in range(40)}
    assert (
        told[0]
        == "out of memory on cpu with 40 x 32x32 pixels: batches are half as large from here on"
    )
    assert sizes[:5] == [40, 20, 10, 5, 2] and set(sizes[5:]) == {2} and len(told) == 4

    def too_small(images_NHWC: torch.Tensor) -> torch.Tensor:
        raise kind("can't allocate memory")

    with pytest.raises(VggfeatError, match="out of memory on cpu with 1 x 32x32 pixels; free some"):
        list(by_shape(images.__getitem__, range(40), (32,), too_small, torch.device("cpu")))


def test_one_huge_image_that_does_not_fit_is_left_out() -> None:
    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        if images_NHWC.shape[2] > 1000:
            raise torch.OutOfMemoryError
        return images_NHWC[:, 0, 0, :1].float()

    images = [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((64, 6400, 3), np.uint8),
        np.ones((64, 64, 3), np.uint8),
    ]
    found = {
        i: result
        for i, _, result in by_shape(
            images.__getitem__, range(3), (64,), compute, torch.device("cpu"), batch_size=1
        )
    }
    assert isinstance(found[1], UnreadableImage)
    assert str(found[1]) == "out of memory on cpu with 1 x 64x6400 pixels, at Q=64"
    assert isinstance(found[0], np.ndarray) and isinstance(found[2], np.ndarray)


def test_other_errors_of_the_network_are_not_taken_for_memory() -> None:
    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        list(
            by_shape(
                [np.zeros((9, 9, 3), np.uint8)].__getitem__, [0], (9,), compute, torch.device("cpu")
            )
        )
