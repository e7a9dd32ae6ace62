"""Images -> batches of exactly one shape -> what a computation makes of them, on a device that has
only so much memory. N images, Q scales, H, W height and width.

Headers are read ahead of the images, a window of them at a time, and images of one shape are then
read one after the other (`Buckets`: which images share a batch is decided there and nowhere else).
An image is read once, in a thread, and rescaled to every Q where it is described: by Pillow for a
CPU; on a GPU, to which it goes up once. It waits in a bucket of its shape; a full bucket, or one
that no image is left for, goes through the device (`Runner`). So batching never pads and never
changes a result.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vggfeat.devices import BATCH_SIZE, device_failed, first_sentence, out_of_memory
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import BICUBIC, BILINEAR, smallest_side, smallest_side_shape

WINDOW = 8192
"""Images whose headers are read before the first of them is: those of one shape among them share
batches.
"""
WAITING_BYTES = 512 << 20
"""Pixels that may wait in buckets; beyond it the fullest bucket goes on as it is."""
CROP_PIXELS = 224 * 224
HUGE = 64 * CROP_PIXELS
"""Pixels, beyond which an image may be left out where it doesn't fit the device: at Q = 512 it is
twelve times as long as wide.
"""
AHEAD = 3
"""Batches that a GPU has before it while the results of the one before them are waited for."""
Shape = tuple[int, int, int]
"""The number of a scale, height and width there."""
Sides = tuple[int, int] | None
"""Height and width of an image as it is stored, by its header; None where that doesn't tell."""
Image = np.ndarray | Tensor
"""(H, W, 3) uint8 RGB in memory, or on the device."""
T = TypeVar("T")


def work_shares(scales: Sequence[int]) -> np.ndarray:
    """(Q,) float64: the share of each scale in an image's work, which goes by its pixels, Q^2."""
    squares = np.square(scales)
    shares: np.ndarray = squares / squares.sum()
    return shares


def pixels_at_once(batch_size: int | None, device: torch.device) -> int:
    """Of a batch's images together. batch_size: images of 224 x 224; None: the device's own."""
    return (batch_size or BATCH_SIZE[device.type]) * CROP_PIXELS


class Buckets(Generic[T]):
    """Images that wait until they are enough for a batch, those of one shape in one bucket.

    scales: the Q, by their numbers.
    """

    def __init__(self, scales: Sequence[int]) -> None:
        self.waiting = 0
        """Bytes of all pixels in the buckets."""
        self._scales = scales
        self._buckets: dict[Shape, list[T]] = {}
        self._expected: dict[int, list[Shape]] = {}
        self._coming: Counter[Shape] = Counter()

    def expect(self, window: Mapping[int, Sides], done: np.ndarray | None = None) -> list[int]:
        """That these images, by their numbers, come next; the order that fills the batches best.

        It is that of the aspect, in which images of one shape follow each other at every scale at
        once, so that a bucket waits for a batch's worth of images and no longer. First come those
        whose headers don't tell it, so that what is wrong with them is soon known.
        done: (N, Q) bool, what is not wanted.
        """
        aspects = dict.fromkeys(window, 0.0)
        for i, sides in window.items():
            if sides is None or min(sides) < 1:  # nothing is told, or nothing is in it
                continue
            aspects[i] = sides[1] / sides[0]
            self._expected[i] = [
                (s, *smallest_side_shape(*sides, q))
                for s, q in enumerate(self._scales)
                if done is None or not done[i, s]
            ]
            self._coming.update(self._expected[i])
        return sorted(window, key=aspects.__getitem__)

    def put(self, shape: Shape, image: T, most_pixels: int) -> tuple[Shape, list[T]] | None:
        """Add an image; the batch that goes on now, if one does.

        It is the image's own bucket where one image more would be more than most_pixels, or the
        fullest one where more than WAITING_BYTES wait.
        """
        self._add(shape, image)
        if self._full(shape, most_pixels):
            return self._take(shape)
        return self._take(self._fullest()) if self.waiting > WAITING_BYTES else None

    def came(self, i: int) -> Iterator[tuple[Shape, list[T]]]:
        """That an image which was expected has been put, in whatever shapes, or can't be; the
        batches that no image is left for.
        """
        for shape in self._expected.pop(i, []):
            self._coming[shape] -= 1
            if not self._coming[shape]:
                del self._coming[shape]
                if shape in self._buckets:
                    yield self._take(shape)

    def rest(self) -> Iterator[tuple[Shape, list[T]]]:
        """The batches that are left, when no image comes any more."""
        while self._buckets:
            yield self._take(next(iter(self._buckets)))

    def _add(self, shape: Shape, image: T) -> None:
        self._buckets.setdefault(shape, []).append(image)
        self.waiting += 3 * shape[1] * shape[2]

    def _full(self, shape: Shape, most_pixels: int) -> bool:
        return (len(self._buckets[shape]) + 1) * shape[1] * shape[2] > most_pixels

    def _fullest(self) -> Shape:
        return max(self._buckets, key=lambda shape: len(self._buckets[shape]) * shape[1] * shape[2])

    def _take(self, shape: Shape) -> tuple[Shape, list[T]]:
        batch = self._buckets.pop(shape)
        self.waiting -= 3 * len(batch) * shape[1] * shape[2]
        return shape, batch


def gathered(
    images: Mapping[int, tuple[int, int]], scales: Sequence[int], most_pixels: int
) -> Iterator[tuple[Shape, list[int]]]:
    """The batches that images, each with its height and width, will share."""
    buckets = Buckets[int](scales)
    for window in _parts(images, WINDOW):
        for i in buckets.expect({i: images[i] for i in window}):
            for s, q in enumerate(scales):
                if batch := buckets.put((s, *smallest_side_shape(*images[i], q)), i, most_pixels):
                    yield batch
            yield from buckets.came(i)
    yield from buckets.rest()


class Done(NamedTuple):
    """What was made of rows at the s-th scale, one value each; or why one row can't be done."""

    s: int
    rows: list[int]
    values: np.ndarray | UnreadableImage

    def results(self) -> Iterator[tuple[int, int, np.ndarray | UnreadableImage]]:
        """As `by_shape` yields them."""
        if isinstance(self.values, UnreadableImage):
            yield self.rows[0], 0, self.values
            return
        for i, value in zip(self.rows, self.values, strict=True):
            yield i, self.s, value


class OnCPU:
    """How images and results come and go where a CPU computes: they are there."""

    ahead = 0
    """Batches that go on while the results of the one before them are waited for."""
    turn: float | None = None
    """Seconds after which who has Python's lock hands it on; None: as it is set."""

    def staged(
        self, image_HWC: np.ndarray, scales: Sequence[int], filter: str
    ) -> list[Image] | Tensor:
        """In a thread that reads: what `rescaled` takes."""
        return [smallest_side(image_HWC, q, filter) for q in scales]

    def rescaled(
        self, staged: list[Image] | Tensor, scales: Sequence[int], filter: str
    ) -> list[Image]:
        """In the thread that describes: the image at each Q, as `smallest_side` rescales."""
        assert isinstance(staged, list)
        return staged

    def batch(self, images: list[Image]) -> Tensor:
        """(n, H, W, 3), where they are described."""
        return torch.from_numpy(np.stack([np.asarray(image) for image in images]))

    def result(self, computed: Tensor) -> Callable[[], np.ndarray]:
        """What waits for the values and gives them."""
        return computed.numpy

    def free(self) -> None:
        """Give back what memory is kept."""


class OnGPU(OnCPU):
    """On a GPU all of it is one queue, and nothing but a result is waited for: a copy to or from it
    goes through pinned memory, which PyTorch keeps for the next, and behind the work before it.
    """

    ahead = AHEAD
    turn = 5e-5
    LARGEST = 16_000_000
    """Pixels of an image that is rescaled here: as many as one may have afterwards; rescaling
    computes in float32.
    """
    SHRINKS = 32
    """Times: beyond that the filter's weights may not fit the memory that a GPU's threads share;
    half of it where the filter is bicubic, which reaches twice as far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def staged(
        self, image_HWC: np.ndarray, scales: Sequence[int], filter: str
    ) -> list[Image] | Tensor:
        height, width = image_HWC.shape[:2]
        shrinks = self.SHRINKS // (2 if filter == BICUBIC else 1)
        if height * width > self.LARGEST or min(height, width) > shrinks * min(scales):
            return super().staged(image_HWC, scales, filter)
        return self._pinned(image_HWC)

    def rescaled(
        self, staged: list[Image] | Tensor, scales: Sequence[int], filter: str
    ) -> list[Image]:
        # One thread asks for all that a GPU does. Where those that read do, too, each of their
        # calls waits for Python's lock: a dozen an image and scale
        if isinstance(staged, list):
            return staged
        try:
            uploaded_HWC = self._up(staged)
            return [smallest_side(uploaded_HWC, q, filter) for q in scales]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # the batches, which can be halved, have all of it
            return [smallest_side(staged.numpy(), q, filter) for q in scales]

    def batch(self, images: list[Image]) -> Tensor:
        return torch.stack(
            [
                image if isinstance(image, Tensor) else self._up(self._pinned(image))
                for image in images
            ]
        )

    def result(self, computed: Tensor) -> Callable[[], np.ndarray]:
        values = torch.empty(computed.shape, dtype=computed.dtype, pin_memory=True)
        values.copy_(computed, non_blocking=True)
        there = torch.cuda.Event(blocking=True)  # who waits leaves its core to those that decode
        there.record(torch.cuda.current_stream(self._device))

        def wait() -> np.ndarray:
            there.synchronize()
            return values.numpy()

        return wait

    def free(self) -> None:
        torch.cuda.empty_cache()

    def _pinned(self, image_HWC: np.ndarray) -> Tensor:
        return torch.from_numpy(image_HWC).pin_memory()

    def _up(self, pinned_HWC: Tensor) -> Tensor:
        return pinned_HWC.to(self._device, non_blocking=True)


class _Turns:
    """How long a thread keeps Python's lock while others wait, for all of this process: shorter
    while one of them feeds a GPU, which otherwise waits for those that read, a few milliseconds for
    each of its calls. With sixteen that read, and 0.5 ms, an H200's descriptors came 1.15 to 1.2
    times as fast.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, 0.0

    @contextmanager
    def of(self, place: OnCPU) -> Iterator[None]:
        if place.turn is None:
            yield
            return
        with self._lock:
            if not self._users:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(place.turn, self._before))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    sys.setswitchinterval(self._before)


_turns = _Turns()


def place_of(device: torch.device) -> OnCPU:
    """How images come to a device, and results from it."""
    return OnGPU(device) if device.type == "cuda" else OnCPU()


class Runner:
    """Runs batches on a device. Where one doesn't fit its memory, it and all after it are halved.

    most_pixels: of a batch, as far as is known by now. The others as of `by_shape`.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        scales: Sequence[int],
        device: torch.device,
        place: OnCPU,
        batch_size: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.most_pixels = pixels_at_once(batch_size, device)
        self._compute, self._scales, self._device, self._say = compute, scales, device, say
        self._place = place
        self._running: deque[tuple[int, list[int], Callable[[], np.ndarray]]] = deque()

    def run(self, shape: Shape, members: list[tuple[int, Image]]) -> Iterator[Done]:
        """Take (row, image) of one shape; what is done by now.

        Raises VggfeatError where not even one image of common size fits.
        """
        s, height, width = shape
        while members:
            n = max(1, self.most_pixels // (height * width))
            rows = [i for i, _ in members[:n]]
            result = self._computed([image for _, image in members[:n]])
            if result is not None:
                self._running.append((s, rows, result))
                members = members[n:]
                continue
            yield from self._finish(0)  # what is running holds memory as well
            self._place.free()
            n = len(rows)
            what = f"out of memory on {self._device} with {n} x {height}x{width} pixels"
            if n > 1:
                self.most_pixels = n // 2 * height * width
                self._say(f"{what}: batches are half as large from here on")
            elif height * width > HUGE:
                yield Done(s, rows, UnreadableImage(f"{what}, at Q={self._scales[s]}"))
                members = members[1:]
            else:
                raise VggfeatError(f"{what}; free some of its memory, or give another `device`")
        yield from self._finish(self._place.ahead)

    def rest(self) -> Iterator[Done]:
        """What is still running, when no batch comes any more."""
        yield from self._finish(0)

    def _computed(self, images: list[Image]) -> Callable[[], np.ndarray] | None:
        """On its way, on a GPU; None where there is too little memory for it."""
        try:
            return self._place.result(self._compute(self._place.batch(images)))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        return None

    def _finish(self, but: int) -> Iterator[Done]:
        while len(self._running) > but:
            s, rows, result = self._running.popleft()
            yield Done(s, rows, result())


Result = tuple[int, int, np.ndarray | UnreadableImage]


def by_shape(
    read: Callable[[int], np.ndarray],
    sides: Callable[[int], Sides],
    indices: Iterable[int],
    scales: Sequence[int],
    compute: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    filter: str = BILINEAR,
    done: np.ndarray | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    advance: Callable[[float], None] = lambda images: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Result]:
    """Yield (i, s, what `compute` makes of image i at scales[s]), in no set order; (i, 0, error)
    for an unreadable one.

    read: i -> (H, W, 3) uint8 RGB, or UnreadableImage. sides: i -> what (H, W) will be, as far as
    is known without reading it; a hint, by which images are put in order. Both are called in
    threads. compute: uint8 RGB (n, H, W, 3) of one shape, on the device -> (n, ...). filter: of the
    rescale, as of `smallest_side`. done: (N, Q) bool, what is not wanted.
    batch_size: images of 224 x 224 pixels at once (by default 32 on a CPU, 128 on a GPU); larger
    images go in proportionally smaller batches, so that memory stays the same. workers: threads
    that read, and as many that look at headers. advance: called after each batch with the work done
    in images, a scale counting as its Q^2 (images end late, while their buckets fill). say: a batch
    didn't fit the device; it and those after it are halved.
    Raises VggfeatError where the device fails, or has too little memory for one image.
    """
    shares, place = work_shares(scales), place_of(device)
    runner = Runner(compute, scales, device, place, batch_size, say)
    buckets = Buckets[tuple[int, Image]](scales)

    def results(batches: Iterator[Done]) -> Iterator[Result]:
        for batch in batches:
            yield from batch.results()
            advance(len(batch.rows) * float(shares[batch.s]))

    def in_order(pool: ThreadPoolExecutor) -> Iterator[int]:
        for window in _windows(pool, sides, indices):
            yield from buckets.expect(window, done)

    try:
        with (
            _threads("decode", workers) as pool,
            _threads("headers", workers) as looking,
            _turns.of(place),
        ):
            for i, images in _images(
                read, pool, place, in_order(looking), 4 * workers, scales, filter, done
            ):
                if isinstance(images, UnreadableImage):
                    advance(1.0 if done is None else float(shares[~done[i]].sum()))
                    yield i, 0, images
                else:
                    for s, image in images:
                        shape = (s, image.shape[0], image.shape[1])
                        if batch := buckets.put(shape, (i, image), runner.most_pixels):
                            yield from results(runner.run(*batch))
                for batch in buckets.came(i):
                    yield from results(runner.run(*batch))
            for batch in buckets.rest():
                yield from results(runner.run(*batch))
            yield from results(runner.rest())
    except RuntimeError as error:
        if not device_failed(error):
            raise
        why = first_sentence(error)
        raise VggfeatError(f"{device} has failed ({why}); give another `device`") from error


@contextmanager
def _threads(name: str, workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that read; who leaves early waits for what they are at, and for nothing else."""
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _parts(values: Iterable[int], n: int) -> Iterator[list[int]]:
    """The values, up to n at a time."""
    upcoming = iter(values)
    while part := list(islice(upcoming, n)):
        yield part


_TOGETHER = 32  # headers that a thread looks at before it asks for more, or leaves


def _windows(
    pool: ThreadPoolExecutor, sides: Callable[[int], Sides], indices: Iterable[int]
) -> Iterator[dict[int, Sides]]:
    """Up to WINDOW of the indices at a time, each with what its header tells; those of the next
    window are read meanwhile.
    """

    def look(part: list[int]) -> list[Sides]:
        return [sides(i) for i in part]

    def begun(window: list[int]) -> list[tuple[list[int], Future[list[Sides]]]]:
        return [(part, pool.submit(look, part)) for part in _parts(window, _TOGETHER)]

    windows = map(begun, _parts(indices, WINDOW))
    coming = next(windows, None)
    while (window := coming) is not None:
        known: dict[int, Sides] = {}
        for part, looked in window:
            known.update(zip(part, looked.result(), strict=True))
        coming = next(windows, None)
        yield known


def _images(
    read: Callable[[int], np.ndarray],
    pool: ThreadPoolExecutor,
    place: OnCPU,
    indices: Iterable[int],
    most: int,
    scales: Sequence[int],
    filter: str,
    done: np.ndarray | None,
) -> Iterator[tuple[int, list[tuple[int, Image]] | UnreadableImage]]:
    """(i, (s, the image at scales[s]) for each s that is wanted; or that it is unreadable), in the
    order of indices. most: as of `_read_ahead`.
    """

    def wanted(i: int) -> list[int]:
        return [s for s in range(len(scales)) if done is None or not done[i, s]]

    def staged(i: int) -> list[Image] | Tensor:
        return place.staged(read(i), [scales[s] for s in wanted(i)], filter)

    for i, ready in _read_ahead(pool, staged, indices, most):
        if isinstance(ready, UnreadableImage):
            yield i, ready
            continue
        chosen = wanted(i)
        try:
            with torch.inference_mode():
                images = place.rescaled(ready, [scales[s] for s in chosen], filter)
        except UnreadableImage as error:
            yield i, error
        else:
            yield i, list(zip(chosen, images, strict=True))


def _read_ahead(
    pool: ThreadPoolExecutor, make: Callable[[int], T], indices: Iterable[int], most: int
) -> Iterator[tuple[int, T | UnreadableImage]]:
    """(i, what `make` makes of it, or that it is unreadable), in the order of indices. most: at
    work or waiting at a time.
    """
    queue: deque[tuple[int, Future[T]]] = deque()
    upcoming = iter(indices)
    while True:
        while len(queue) < most and (i := next(upcoming, None)) is not None:
            queue.append((i, pool.submit(make, i)))
        if not queue:
            return
        i, future = queue.popleft()
        try:
            made = future.result()
        except UnreadableImage as error:
            yield i, error
            continue
        yield i, made
