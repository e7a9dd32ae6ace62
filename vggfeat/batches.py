"""Images -> batches of exactly one shape -> what a computation makes of them, on a device that has
only so much memory. N images, Q scales, H, W height and width.

An image is read and rescaled once to every Q, in a thread. It waits in a bucket of its shape
(`Buckets`: which images share a batch is decided there and nowhere else); a full bucket goes
through the device (`Runner`). So batching never pads and never changes a result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from vggfeat.devices import BATCH_SIZE, out_of_memory
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import smallest_side

WAITING_BYTES = 512 << 20
"""Pixels that may wait in buckets; beyond it the fullest bucket goes on as it is."""
CROP_PIXELS = 224 * 224
HUGE = 4
"""Times a batch: an image that may be left out where it doesn't fit the device."""
Shape = tuple[int, int, int]
"""The number of a scale, height and width there."""
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
    """Images that wait until they are enough for a batch, those of one shape in one bucket."""

    def __init__(self) -> None:
        self.waiting = 0
        """Bytes of all pixels in the buckets."""
        self._buckets: dict[Shape, list[T]] = {}

    def put(self, shape: Shape, image: T, most_pixels: int) -> tuple[Shape, list[T]] | None:
        """Add an image; the batch that goes on now, if one does.

        It is the image's own bucket where one image more would be more than most_pixels, or the
        fullest one where more than WAITING_BYTES wait.
        """
        self._add(shape, image)
        if self._full(shape, most_pixels):
            return self._take(shape)
        return self._take(self._fullest()) if self.waiting > WAITING_BYTES else None

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
    images: Iterable[tuple[Shape, T]], most_pixels: int
) -> Iterator[tuple[Shape, list[T]]]:
    """The batches that images, each with its shape, will share."""
    buckets = Buckets[T]()
    for shape, image in images:
        if batch := buckets.put(shape, image, most_pixels):
            yield batch
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


class Runner:
    """Runs batches on a device. Where one doesn't fit its memory, it and all after it are halved.

    most_pixels: of a batch, as far as is known by now. The others as of `by_shape`.
    """

    def __init__(
        self,
        compute: Callable[[torch.Tensor], torch.Tensor],
        scales: Sequence[int],
        device: torch.device,
        batch_size: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.most_pixels = pixels_at_once(batch_size, device)
        self._huge = HUGE * self.most_pixels
        self._compute, self._scales, self._device, self._say = compute, scales, device, say
        # On a GPU the next batch is on its way before the last one's result is asked for.
        self._ahead = 1 if device.type == "cuda" else 0
        self._running: deque[tuple[int, list[int], torch.Tensor]] = deque()

    def run(self, shape: Shape, members: list[tuple[int, np.ndarray]]) -> Iterator[Done]:
        """Take (row, image) of one shape; what is done by now.

        Raises VggfeatError where not even one image of common size fits.
        """
        s, height, width = shape
        while members:
            n = max(1, self.most_pixels // (height * width))
            rows = [i for i, _ in members[:n]]
            computed = self._computed(np.stack([image for _, image in members[:n]]))
            if computed is not None:
                self._running.append((s, rows, computed))
                members = members[n:]
                continue
            yield from self._finish(0)  # what is running holds memory as well
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            n = len(rows)
            what = f"out of memory on {self._device} with {n} x {height}x{width} pixels"
            if n > 1:
                self.most_pixels = n // 2 * height * width
                self._say(f"{what}: batches are half as large from here on")
            elif height * width > self._huge:
                yield Done(s, rows, UnreadableImage(f"{what}, at Q={self._scales[s]}"))
                members = members[1:]
            else:
                raise VggfeatError(f"{what}; free some of its memory, or give another `device`")
        yield from self._finish(self._ahead)

    def rest(self) -> Iterator[Done]:
        """What is still running, when no batch comes any more."""
        yield from self._finish(0)

    def _computed(self, images_NHWC: np.ndarray) -> torch.Tensor | None:
        """On its way, on a GPU; None where there is too little memory for it."""
        batch_NHWC = torch.from_numpy(images_NHWC)
        try:
            if self._ahead:
                batch_NHWC = batch_NHWC.pin_memory().to(self._device, non_blocking=True)
            return self._compute(batch_NHWC)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        return None

    def _finish(self, but: int) -> Iterator[Done]:
        while len(self._running) > but:
            s, rows, computed = self._running.popleft()
            yield Done(s, rows, computed.cpu().numpy())


def by_shape(
    read: Callable[[int], np.ndarray],
    indices: Iterable[int],
    scales: Sequence[int],
    compute: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    *,
    done: np.ndarray | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    advance: Callable[[float], None] = lambda images: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, int, np.ndarray | UnreadableImage]]:
    """Yield (i, s, what `compute` makes of image i at scales[s]), in no set order; (i, 0, error)
    for an unreadable one.

    read: i -> (H, W, 3) uint8 RGB, or UnreadableImage; called in threads. compute: uint8 RGB (n, H,
    W, 3) of one shape, on the device -> (n, ...). done: (N, Q) bool, what is not wanted.
    batch_size: images of 224 x 224 pixels at once (by default 8 on a CPU, 64 on a GPU); larger
    images go in proportionally smaller batches, so that memory stays the same. advance: called
    after each batch with the work done in images, a scale counting as its Q^2 (images end late,
    while their buckets fill). say: a batch didn't fit the device; it and those after it are halved.
    """
    shares = work_shares(scales)
    runner = Runner(compute, scales, device, batch_size, say)
    buckets = Buckets[tuple[int, np.ndarray]]()

    def rescaled(i: int) -> list[tuple[int, np.ndarray]]:
        image_HWC = read(i)
        return [
            (s, smallest_side(image_HWC, q))
            for s, q in enumerate(scales)
            if done is None or not done[i, s]
        ]

    def results(batches: Iterator[Done]) -> Iterator[tuple[int, int, np.ndarray | UnreadableImage]]:
        for batch in batches:
            yield from batch.results()
            advance(len(batch.rows) * float(shares[batch.s]))

    with _threads(workers) as pool:
        for i, images in _in_order(pool, rescaled, indices, 4 * workers):
            if isinstance(images, UnreadableImage):
                advance(1.0 if done is None else float(shares[~done[i]].sum()))
                yield i, 0, images
                continue
            for s, image in images:
                shape = (s, image.shape[0], image.shape[1])
                if batch := buckets.put(shape, (i, image), runner.most_pixels):
                    yield from results(runner.run(*batch))
        for batch in buckets.rest():
            yield from results(runner.run(*batch))
        yield from results(runner.rest())


@contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that read; who leaves early waits for what they are at, and for nothing else."""
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
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
