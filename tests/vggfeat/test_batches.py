"""Images share batches of one shape; a device's memory, and ours, hold as many as they can."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import vggfeat
from vggfeat.batches import (
    AHEAD,
    Buckets,
    OnCPU,
    OnGPU,
    Sides,
    by_shape,
    gathered,
    work_shares,
)
from vggfeat.describe import describe_all, description_of
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import BILINEAR, FILTERS
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
    buckets = Buckets[str]((2, 4))
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


def shapes_of(images: list[np.ndarray]) -> dict[int, tuple[int, int]]:
    return {i: (len(image), len(image[0])) for i, image in enumerate(images)}


def test_plan_knows_the_batches_that_there_will_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full ones, those that memory sends on, and the rest, by the shapes alone."""
    monkeypatch.setattr("vggfeat.batches.WAITING_BYTES", 20_000)
    images = [photograph(i, 40 + i % 3, 40 + 2 * (i % 2)) for i in range(30)]
    real = []

    def compute(batch_NHWC: torch.Tensor) -> torch.Tensor:
        real.append(tuple(batch_NHWC.shape[:3]))
        return batch_NHWC.float().mean((1, 2))

    shapes = shapes_of(images)
    for _ in by_shape(
        images.__getitem__,
        shapes.get,
        range(30),
        SCALES,
        compute,
        torch.device("cpu"),
        batch_size=1,
        workers=1,
    ):
        pass
    told = list(gathered(shapes, SCALES, 224 * 224))
    assert [(len(members), *shape[1:]) for shape, members in told] == real
    assert sum(n for n, _, _ in real) == 60 and len({n for n, _, _ in real}) > 2


def passes(
    images: list[np.ndarray], sides: Callable[[int], Sides], **settings: Any
) -> tuple[list[tuple[int, ...]], dict[tuple[int, int], float]]:
    """The shape of each batch, and (image, scale) -> its first pixel."""
    batches: list[tuple[int, ...]] = []

    def compute(batch_NHWC: torch.Tensor) -> torch.Tensor:
        batches.append(tuple(batch_NHWC.shape[:3]))
        return batch_NHWC[:, 0, 0, :1].float()

    cpu = torch.device("cpu")
    found = {}
    rows = range(len(images))
    for i, s, value in by_shape(images.__getitem__, sides, rows, SCALES, compute, cpu, **settings):
        assert isinstance(value, np.ndarray)
        found[i, s] = float(value[0])
    return batches, found


MIXED = [np.full((64 + 8 * (i * i % 3), 64 + 8 * (i % 5), 3), i, np.uint8) for i in range(60)]
"""Fifteen shapes, mixed, each image of one colour."""


def test_batches_are_as_full_as_there_are_images_of_a_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many wait at most: images of one shape come one after the other."""
    expected = {(i, s): float(i) for i in range(60) for s in range(2)}
    shapes = shapes_of(MIXED)
    few, found = passes(MIXED, shapes.get)
    assert found == expected
    # one for each shape that an aspect has at a scale
    assert len(few) == len({batch[1:] for batch in few}) == len(set(gathered_shapes(shapes)))
    monkeypatch.setattr("vggfeat.batches.WAITING_BYTES", 18 * 3 * 64 * 80)
    assert passes(MIXED, shapes.get) == (few, expected)
    many, found = passes(MIXED, lambda i: None)
    assert found == expected and len(many) > 1.2 * len(few)
    # windows, of which the headers of the next are known when one ends
    monkeypatch.setattr("vggfeat.batches.WINDOW", 20)
    some, found = passes(MIXED, shapes.get)
    assert found == expected and len(few) < len(some)


def gathered_shapes(shapes: dict[int, tuple[int, int]]) -> list[tuple[int, int, int]]:
    return [shape for shape, _ in gathered(shapes, SCALES, 1 << 30)]


def test_a_bucket_is_closed_with_its_last_image() -> None:
    """Also where that one can't be read, or turns out to be of another shape."""
    buckets = Buckets[str]((8,))
    wide, square = (0, 8, 16), (0, 8, 8)
    window: dict[int, Sides] = {0: (10, 20), 1: (9, 9), 2: None, 3: (20, 40), 4: (30, 60)}
    assert buckets.expect(window) == [2, 1, 0, 3, 4]
    most = 1 << 20
    assert buckets.put(square, "2", most) is None and list(buckets.came(2)) == []
    assert buckets.put(square, "1", most) is None
    assert list(buckets.came(1)) == [(square, ["2", "1"])]
    assert buckets.put(wide, "0", most) is None and list(buckets.came(0)) == []
    assert list(buckets.came(3)) == []
    assert buckets.put(square, "4", most) is None  # its header said that it is wide
    assert list(buckets.came(4)) == [(wide, ["0"])]
    assert list(buckets.rest()) == [(square, ["4"])] and buckets.waiting == 0


def test_a_header_is_a_hint() -> None:
    """What it says wrongly, or not at all, costs fullness and nothing else."""
    expected = {(i, s): float(i) for i in range(60) for s in range(2)}
    rng = np.random.default_rng(0)
    for sides in (
        lambda i: (1, 60_000),
        lambda i: (int(rng.integers(1, 99)), 64),
        lambda i: None if i % 2 else (64, 72),
        lambda i: (0, i % 3),
    ):
        assert passes(MIXED, sides)[1] == expected


def test_headers_of_a_window_are_read_before_its_images_and_the_next_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vggfeat.batches.WINDOW", 16)
    looked: set[int] = set()
    at_read: dict[int, set[int]] = {}
    shapes = shapes_of(MIXED)

    def sides(i: int) -> Sides:
        looked.add(i)
        return shapes[i]

    class Images(list[np.ndarray]):
        def __getitem__(self, i: Any) -> Any:
            at_read[i] = set(looked)
            return super().__getitem__(i)

    passes(Images(MIXED), sides, workers=1)
    assert all(
        set(range(i // 16 * 16, i // 16 * 16 + 16)) <= at_read[i] | {60, 61, 62, 63}
        for i in range(60)
    )
    assert max(max(at_read[i]) for i in range(8)) < 48


class ImagesOnGPU(OnGPU):
    """`OnGPU` on the CPU, where there is no pinned memory and no event."""

    def __init__(self, room: int = 1 << 60) -> None:
        super().__init__(torch.device("cpu"))
        self.room, self.freed, self.asked, self.waited, self.most = room, 0, 0, 0, 0

    def _pinned(self, image_HWC: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image_HWC.copy())

    def _up(self, pinned_HWC: torch.Tensor) -> torch.Tensor:
        if pinned_HWC.nbytes > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pinned_HWC

    def result(self, computed: torch.Tensor) -> Callable[[], np.ndarray]:
        self.asked += 1
        self.most = max(self.most, self.asked - self.waited)

        def wait() -> np.ndarray:
            self.waited += 1
            assert self.waited <= self.asked
            return computed.numpy()

        return wait

    def free(self) -> None:
        self.freed += 1


def means_of(images: list[np.ndarray], filter: str = BILINEAR) -> Iterator[Any]:
    """(image, scale, mean colour), of images that go one by one."""
    return by_shape(
        images.__getitem__,
        shapes_of(images).get,
        range(len(images)),
        SCALES,
        lambda batch_NHWC: batch_NHWC.float().mean((1, 2)),
        torch.device("cpu"),
        filter=filter,
        batch_size=1,
    )


@pytest.mark.parametrize("filter", FILTERS)
def test_on_a_gpu_images_are_rescaled_there_and_results_awaited_later(
    monkeypatch: pytest.MonkeyPatch, filter: str
) -> None:
    """The order of things, by a CPU: the values are `test_images`' and `test_describe`'s."""
    images = [photograph(i, 96 + i % 2, 120) for i in range(24)]

    def run(place: OnCPU) -> dict[tuple[int, int], np.ndarray]:
        monkeypatch.setattr("vggfeat.batches.place_of", lambda device: place)
        found: dict[tuple[int, int], np.ndarray] = {}
        for i, s, value in means_of(images, filter):
            assert isinstance(value, np.ndarray)
            found[i, s] = value
        return found

    on_cpu, gpu = run(OnCPU()), ImagesOnGPU()
    on_gpu = run(gpu)
    assert on_gpu.keys() == on_cpu.keys() == {(i, s) for i in range(24) for s in range(2)}
    assert gpu.waited == gpu.asked > AHEAD and gpu.most == AHEAD + 1
    difference = max(float(np.abs(on_gpu[key] - on_cpu[key]).max()) for key in on_cpu)
    assert 0 < difference < 0.5  # levels, of the mean: rescaled by PyTorch, and to Pillow's values
    # what can't go up whole, or is very large there, is rescaled by Pillow
    for place in (ImagesOnGPU(room=images[0].nbytes - 1), ImagesOnGPU()):
        if place.room > images[0].nbytes:
            place.LARGEST = 96 * 120 - 1
        found = run(place)
        assert all(np.array_equal(found[key], on_cpu[key]) for key in on_cpu)


def test_on_a_gpu_one_thread_asks_for_all_of_it_and_the_others_hand_on_the_lock_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asking, turns, before = set[int](), set[float](), sys.getswitchinterval()

    class Asked(ImagesOnGPU):
        def _up(self, pinned_HWC: torch.Tensor) -> torch.Tensor:
            asking.add(threading.get_ident())
            turns.add(round(sys.getswitchinterval(), 6))
            return super()._up(pinned_HWC)

    monkeypatch.setattr("vggfeat.batches.place_of", lambda device: Asked())
    images = [photograph(i, 64, 64) for i in range(8)]

    first, second = means_of(images), means_of(images)
    next(first), next(second)
    assert len(list(first)) == 15
    assert sys.getswitchinterval() < before  # the other goes on
    second.close()  # type: ignore[attr-defined]
    assert sys.getswitchinterval() == before
    assert asking == {threading.get_ident()} and turns == {OnGPU.turn}


def test_a_gpu_that_is_too_small_has_its_batches_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    place, told = ImagesOnGPU(room=3 * 64 * 64 - 1), list[str]()
    monkeypatch.setattr("vggfeat.batches.place_of", lambda device: place)
    images = [photograph(i, 64, 64) for i in range(4)]
    results = by_shape(
        images.__getitem__,
        shapes_of(images).get,
        range(4),
        (64,),
        lambda batch_NHWC: batch_NHWC.float().mean((1, 2)),
        torch.device("cpu"),
        say=told.append,
    )
    with pytest.raises(VggfeatError, match="with 1 x 64x64 pixels; free some of its memory"):
        list(results)
    assert [line.partition(" with ")[2] for line in told] == [
        f"{n} x 64x64 pixels: batches are half as large from here on" for n in (4, 2)
    ]
    assert place.freed == 3


@pytest.mark.parametrize("where", ["read", "compute"])
def test_a_gpu_that_fails_is_one_line(where: str) -> None:
    lost = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be")

    def fail(*_: Any) -> Any:
        raise lost

    image = np.zeros((9, 9, 3), np.uint8)
    results = by_shape(
        fail if where == "read" else [image].__getitem__,
        lambda i: None,
        [0],
        (9,),
        fail,
        torch.device("cpu"),
    )
    with pytest.raises(VggfeatError) as failed:
        list(results)
    assert str(failed.value) == (
        "cpu has failed (CUDA error: unspecified launch failure); give another `device`"
    )


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
        images.__getitem__,
        shapes_of(images).get,
        range(40),
        (32,),
        compute,
        torch.device("cpu"),
        say=told.append,
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
        list(
            by_shape(
                images.__getitem__,
                lambda i: None,
                range(40),
                (32,),
                too_small,
                torch.device("cpu"),
            )
        )


def test_one_huge_image_that_does_not_fit_is_left_out() -> None:
    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        if images_NHWC.shape[2] > 1000:
            raise torch.OutOfMemoryError
        return images_NHWC[:, 0, 0, :1].float()

    images = [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((64, 64 * 784 + 1, 3), np.uint8),
        np.ones((64, 64, 3), np.uint8),
    ]
    found = {
        i: result
        for i, _, result in by_shape(
            images.__getitem__,
            shapes_of(images).get,
            range(3),
            (64,),
            compute,
            torch.device("cpu"),
            batch_size=1,
        )
    }
    assert isinstance(found[1], UnreadableImage)
    assert str(found[1]) == "out of memory on cpu with 1 x 64x50177 pixels, at Q=64"
    assert isinstance(found[0], np.ndarray) and isinstance(found[2], np.ndarray)


def test_other_errors_of_the_network_are_not_taken_for_memory() -> None:
    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        list(
            by_shape(
                [np.zeros((9, 9, 3), np.uint8)].__getitem__,
                lambda i: None,
                [0],
                (9,),
                compute,
                torch.device("cpu"),
            )
        )
