"""Dataset x network x scales -> feature file. N images, Q scales, D descriptor length, H, W height
and width.

An image is decoded once, in a thread, and rescaled to every Q. Images wait in buckets of exactly
one shape; a full bucket goes through the network as one batch, so that batching never pads and
never changes a result. What is described is in the file ten seconds later (`writer`), and isn't
described again after a kill.
"""

from __future__ import annotations

import math
import numbers
import os
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from io import IOBase
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import h5py
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vggfeat import __version__, terminal, weights
from vggfeat.aggregate import POOLINGS, aggregate
from vggfeat.checked import shown, sides
from vggfeat.datasets import Items
from vggfeat.datasets.items import images_of_classes
from vggfeat.decode import IMAGE_TYPES, IMAGES, kind_of, read_rgb, upright_shape
from vggfeat.describe import describe
from vggfeat.errors import (
    Interrupted,
    UnreachableImage,
    UnreadableImage,
    VggfeatError,
    out_of_memory,
)
from vggfeat.images import MAX_RESCALED_PIXELS, smallest_side, smallest_side_shape
from vggfeat.look import MISSING, Cheaper, Look, foreword, look, none_readable
from vggfeat.ranks import Ranks
from vggfeat.store import MAX_Q, MAX_SCALES, Description
from vggfeat.terminal import CORES, duration
from vggfeat.weights import Network
from vggfeat.writer import FeatureWriter, stamp

FILTER, DECODER = "bilinear, antialiased", "Pillow"
WAITING_BYTES = (
    512 << 20
)  # pixels that may wait in buckets; beyond it the fullest bucket goes on as it is
CROP_PIXELS = 224 * 224
BATCH_SIZE = {"cpu": 8, "cuda": 64, "mps": 16}
Shape = tuple[int, int, int]  # the number of a scale, height and width there
T = TypeVar("T")
PLANNED, FEW = 4096, 200  # images whose headers a plan reads; of which it counts the operations
TRIAL_SECONDS, TRIAL_SHARE = (
    15.0,
    0.1,
)  # that a trial takes at most, of all; a fifth of those seconds in any case
# the share of the time from which on an extraction waits for its images rather than for the net
READING = 0.3
ADVICE_SECONDS, ADVICE_SHARE = (
    10.0,
    0.01,
)  # of the work, after which an extraction that is long tells how long
HUGE = 4  # times a batch: an image that may be left out where it doesn't fit the device


@dataclass(frozen=True)
class Plan:
    """What an extraction will do, before it does it.

    images: N. sampled: the images whose headers tell their sizes. smallest_sides: the least, the
    median and the largest of them, in pixels. enlarged: by Q, how many of them are smaller than it.
    gflop: of all forward passes (a multiply-add is two operations). seconds: by a trial on some of
    the images. cheaper: options that would take much less, about cheaper_seconds; None where they
    aren't worth a word. bytes: of the feature file.
    """

    images: int
    sampled: int
    smallest_sides: tuple[int, int, int]
    enlarged: dict[int, int]
    gflop: float
    seconds: float
    cheaper: str | None
    cheaper_seconds: float | None
    bytes: int


@dataclass(frozen=True)
class Report:
    """What an extraction did, in how many seconds, with those of earlier runs into the same file.

    earlier: images that were there before this run. run_seconds, rate: of this run, in images a
    second. unreadable: name -> reason, in the order of the rows.
    """

    images: int
    seconds: float
    unreadable: dict[str, str]
    earlier: int
    run_seconds: float
    rate: float


def description_of(
    network: Network, layer: str | None, scales: Sequence[int] | None, mirror: bool
) -> Description:
    """A checked Description; layer and scales None are the network's defaults.

    Raises VggfeatError: a layer that the weights don't reach, a repeated scale, a Q that is too
    small for it.
    """
    layer = network.default_layer if layer is None else layer
    network.require(layer)
    scales = sides(network.default_scales if scales is None else scales)
    if not isinstance(mirror, bool | np.bool_):
        raise VggfeatError(f"`mirror` must be True or False, not {shown(mirror)}")
    if not scales or len(set(scales)) != len(scales):
        raise VggfeatError(f"scales {scales} must be one or more different numbers")
    if len(scales) > MAX_SCALES or max(scales) > MAX_Q:
        raise VggfeatError(f"scales {scales} are more than {MAX_SCALES}, or beyond {MAX_Q} pixels")
    _refuse_small(network, layer, scales)
    return Description(
        net=network.name,
        weights=network.spec,
        fingerprint=network.fingerprint,
        layer=layer,
        scales=scales,
        mirror=bool(mirror),
        pool=network.metadata.get("pool", "none"),
        filter=FILTER,
        precision=network.precision,
        decoder=DECODER,
    )


def network_of(
    description: Description,
    spec: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
) -> Network:
    """The network that described images so, in its precision. spec: where its weights lie, if they
    moved.

    Raises VggfeatError when the weights are missing or are not the same, or no network can describe
    images so.
    """
    spec = spec or description.weights
    network = weights.load(spec, device=device, precision=description.precision)
    if network.fingerprint != description.fingerprint:
        raise VggfeatError(
            f"weights {spec} are not those that described the images (sha256"
            f" {network.fingerprint[:12]}, not {description.fingerprint[:12]}); give the right file"
            " with `weights`"
        )
    if description.pool != network.metadata.get("pool", description.pool):
        network.set_pool(description.pool)
    _refuse_small(network, description.layer, description.scales)
    return network


def _refuse_small(network: Network, layer: str, scales: Sequence[int]) -> None:
    smallest = network.min_side(layer)
    if min(scales) < smallest:
        raise VggfeatError(
            f"scale {min(scales)} is too small: {layer} of net {network.name} needs at least"
            f" {smallest}"
        )


def describe_all(
    network: Network,
    sources: Sequence[Any],
    description: Description,
    *,
    batch_size: int | None = None,
    workers: int = 2,
    advance: Callable[[float], None] = lambda images: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
    """Yield (i, descriptors (Q, D) float32) for every source, or (i, UnreadableImage); in no set
    order.

    sources: anything `decode.read_rgb` takes. See `by_shape`.
    """
    rows: dict[int, dict[int, np.ndarray]] = {}
    for i, s, result in by_shape(
        lambda i: read_rgb(sources[i]),
        range(len(sources)),
        description.scales,
        partial(describe, network, layer=description.layer, mirror=description.mirror),
        network.device,
        batch_size=batch_size,
        workers=workers,
        advance=advance,
        say=say,
    ):
        if isinstance(result, UnreadableImage):
            rows.pop(i, None)
            yield i, result
            continue
        row = rows.setdefault(i, {})
        row[s] = result
        if len(row) == len(description.scales):
            yield i, np.stack([row[s] for s in range(len(row))])
            del rows[i]


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
    share = np.square(scales) / np.square(scales).sum()
    most_pixels = (batch_size or BATCH_SIZE[device.type]) * CROP_PIXELS
    # On a GPU the next batch is on its way before the last one's result is asked for.
    running: deque[tuple[int, list[int], torch.Tensor]] = deque()
    ahead = 1 if device.type == "cuda" else 0

    def prepared(i: int) -> list[tuple[int, np.ndarray]]:
        image_HWC = read(i)
        return [
            (s, smallest_side(image_HWC, q))
            for s, q in enumerate(scales)
            if done is None or not done[i, s]
        ]

    def decoded() -> Iterator[tuple[Shape | None, tuple[int, Any]]]:
        """(shape, (i, image at a scale)) in the order of indices; (None, (i, error)) for an
        unreadable one.
        """
        queue: deque[tuple[int, Future[list[tuple[int, np.ndarray]]]]] = deque()
        upcoming = iter(indices)
        while True:
            while len(queue) < 4 * workers and (item := next(upcoming, None)) is not None:
                queue.append((item, pool.submit(prepared, item)))
            if not queue:
                return
            i, future = queue.popleft()
            try:
                images = future.result()
            except UnreadableImage as error:
                yield None, (i, error)
                continue
            for s, image in images:
                yield (s, *image.shape[:2]), (i, image)

    def start(
        shape: Shape, members: list[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[int, int, np.ndarray | UnreadableImage]]:
        nonlocal most_pixels
        s, height, width = shape
        while members:
            n = max(1, most_pixels // (height * width))
            batch_NHWC = torch.from_numpy(np.stack([image for _, image in members[:n]]))
            try:
                if ahead:
                    batch_NHWC = batch_NHWC.pin_memory().to(device, non_blocking=True)
                computed = compute(batch_NHWC)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                computed = None
            if computed is not None:
                running.append((s, [i for i, _ in members[:n]], computed))
                members = members[n:]
                continue
            yield from finish(0)  # what is running holds memory as well
            if ahead:
                torch.cuda.empty_cache()
            n = len(batch_NHWC)
            what = f"out of memory on {device} with {n} x {height}x{width} pixels"
            if n > 1:
                most_pixels = n // 2 * height * width
                say(f"{what}: batches are half as large from here on")
            elif height * width > HUGE * (batch_size or BATCH_SIZE[device.type]) * CROP_PIXELS:
                yield members[0][0], 0, UnreadableImage(f"{what}, at Q={scales[s]}")
                advance(float(share[s]))
                members = members[1:]
            else:
                raise VggfeatError(f"{what}; free some of its memory, or give another `device`")

    def finish(but: int) -> Iterator[tuple[int, int, np.ndarray]]:
        while len(running) > but:
            s, members, computed = running.popleft()
            for i, value in zip(members, computed.cpu().numpy(), strict=True):
                yield i, s, value
            advance(len(members) * float(share[s]))

    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode")
    try:
        for shape, members in gathered(decoded(), lambda: most_pixels):
            if shape is None:
                i, error = members[0]
                advance(1.0 if done is None else float(share[~done[i]].sum()))
                yield i, 0, error
                continue
            yield from start(shape, members)
            yield from finish(ahead)
        yield from finish(0)
    finally:
        pool.shutdown(cancel_futures=True)


def gathered(
    images: Iterable[tuple[Shape | None, T]], most_pixels: Callable[[], int]
) -> Iterator[tuple[Shape | None, list[T]]]:
    """Gather images, each with its shape, into batches of one shape: (shape, images).

    A batch goes on when one image more would be more than most_pixels, or when WAITING_BYTES wait
    and it is the fullest, or at the end; what has no shape at once.
    """
    buckets: dict[Shape, list[T]] = defaultdict(list)
    waiting = 0
    for shape, image in images:
        if shape is None:
            yield None, [image]
            continue
        _, height, width = shape
        buckets[shape].append(image)
        waiting += 3 * height * width
        due = shape if (len(buckets[shape]) + 1) * height * width > most_pixels() else None
        if due is None and waiting > WAITING_BYTES:
            due = max(buckets, key=lambda of: len(buckets[of]) * of[1] * of[2])
        if due is not None:
            batch = buckets.pop(due)
            waiting -= 3 * len(batch) * due[1] * due[2]
            yield due, batch
    yield from buckets.items()


def extract(
    items: Items,
    network: Network,
    out: str | Path,
    *,
    scales: Sequence[int] | None = None,
    layer: str | None = None,
    mirror: bool = True,
    batch_size: int | None = None,
    workers: int = 2,
    store: str = "float32",
    overwrite: bool = False,
    retry: bool = False,
    command: str = "",
    ranks: Ranks | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Describe every item and write the feature file `out` (contract 3), or go on with
    `out`.partial.

    An extraction that ends early, by whatever, leaves `out`.partial; the same call goes on from
    there. An unreadable image is no error, but a row of the Report; it is tried again by a call
    that goes on, and by one with retry where the file is finished. If no image can be read, or
    their disk or share goes away meanwhile, that is an error, and nothing is finished.
    ranks: of the processes that share the work; all of them call this, each gets the same Report.
    progress: called with (work done in images, images in all). say: what is about to be done, what
    happens on the way, in a sentence.
    Raises VggfeatError: see `look`, `description_of`, `FeatureWriter`; Interrupted for Ctrl-C.
    """
    seen = look(items)
    ranks = ranks or Ranks(network.device)
    description = description_of(network, layer, scales, mirror)
    facts = {
        "weights_metadata": {k: v for k, v in sorted(network.metadata.items()) if k != "classes"},
        "versions": versions(),
        "command": command,
    }
    dim = network.dim(description.layer)
    make = partial(
        FeatureWriter,
        out,
        items,
        description,
        dim,
        store,
        facts,
        overwrite=overwrite,
        retry=retry,
        say=say,
    )
    with _writer(ranks, make, partial(FeatureWriter.join, out, say)) as writer:
        try:
            share = np.square(description.scales) / np.square(description.scales).sum()
            earlier = work = float((writer.described @ share).sum())
            there, before = int(writer.described.all(1).sum()), writer.seconds
            if ranks.first:
                for line in items.remarks:
                    say(line)
                for what, words in foreword(items, seen, network, description, layer, scales):
                    say(f"{what}: {words}")
                if earlier:
                    say(f"going on: {writer.kept()}; {len(items) - there:,} are left")
            mine = np.flatnonzero(~writer.described.all(1))[ranks.rank :: ranks.world]
            ranks.barrier()  # all have seen the same file; from here on it changes
            reader = _Reader(items, seen, ranks.world)

            def read(i: int) -> np.ndarray:
                writer.note_source(i, items.source(i))
                return reader(i)

            advised = not ranks.first

            def advance(images: float) -> None:
                nonlocal work, advised
                work += images * ranks.world  # the others are about as far
                progress(min(work, len(items)), len(items))
                now = writer.seconds - before
                enough = work - earlier > ADVICE_SHARE * len(items) or now > 6 * ADVICE_SECONDS
                if not advised and now > ADVICE_SECONDS and enough and work > earlier:
                    advised = True
                    seconds = now / (work - earlier)  # of an image
                    left, cheaper = seconds * (len(items) - work), Cheaper.than(description)
                    if cheaper.worth_saying(left, whole := cheaper.share * seconds * len(items)):
                        say(
                            f"this will take about {duration(left)} more; with {cheaper.options}"
                            f" all images would take about {duration(whole)}"
                        )

            advance(0)
            compute = partial(describe, network, layer=description.layer, mirror=description.mirror)
            for i, s, result in by_shape(
                read,
                mine.tolist(),
                description.scales,
                compute,
                network.device,
                done=writer.described,
                batch_size=batch_size,
                workers=workers,
                advance=advance,
                say=say,
            ):
                if isinstance(result, UnreadableImage):
                    writer.fail(i, str(result))
                else:
                    writer.write(i, s, result)
            writer.flush()
            ranks.barrier()
            unreadable = {items.names[i]: why for i, why in sorted(writer.unreadable.items())}
            seconds = writer.seconds
            ranks.barrier()  # all have read it; now it may get its name
            if len(unreadable) == len(items):
                raise VggfeatError(none_readable(len(items), items, unreadable))
            if ranks.first:
                writer.finish()
        except (KeyboardInterrupt, VggfeatError) as error:
            with suppress(VggfeatError):  # a disk that failed fails again
                writer.flush()
            kept = (
                f"; {writer.kept()}, and the same command goes on from there"
                if writer.kept()
                else ""
            )
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"interrupted{kept}", *(error.args or [signal.SIGINT])) from error
            raise VggfeatError(f"{error}{kept}") from error
    rate = (len(items) - earlier) / max(seconds - before, 1e-9)
    return Report(len(items), seconds, unreadable, there, seconds - before, rate)


class _Reader:
    """Reads images, and tells one that is missing from a disk or share that has gone away."""

    def __init__(self, items: Items, seen: Look, step: int) -> None:
        self._items, self._step = items, step  # step: this process reads every so many-th row
        self._missing: set[int] = set()
        # One that could be read, of each folder and of all: part of a data set may lie on a share
        # of its own.
        self._good: dict[Path | None, Path] = {}
        for i in seen.shapes:
            self._note(items.source(i))

    def _note(self, source: Path | np.ndarray) -> None:
        if isinstance(source, Path):
            self._good[source.parent] = self._good[None] = source

    def __call__(self, i: int) -> np.ndarray:
        """Image i. Raises UnreadableImage; VggfeatError if one that was read before can't be opened
        any more, either, or if none in a long run of rows can.

        That one's row and those after it are to be described later, not to be marked as unreadable.
        """
        source = self._items.source(i)
        try:
            image_HWC = read_rgb(source)
        except UnreachableImage as error:
            before = (
                self._good.get(source.parent, self._good.get(None))
                if isinstance(source, Path)
                else None
            )
            if before is not None:
                try:
                    upright_shape(before)
                except UnreachableImage:
                    raise VggfeatError(
                        f"the images in {before.parent} can't be read any more ({error}): bring"
                        " back the disk or share that they are on"
                    ) from error
                except UnreadableImage:
                    pass  # it is within reach
            self._missing.add(i)
            self._refuse_run(i, error)
            raise
        self._note(source)
        return image_HWC

    def _refuse_run(self, i: int, error: UnreachableImage) -> None:
        """Raise VggfeatError where MISSING rows around row i, and nothing between them, can't be
        opened.
        """
        first = last = i
        while first - self._step in self._missing and last - first < MISSING:
            first -= self._step
        while last + self._step in self._missing and last - first < MISSING:
            last += self._step
        if last - first + self._step >= MISSING:
            ends = f"{self._items.root / self._items.names[first]} to {self._items.names[last]}"
            raise VggfeatError(
                f"no image from {ends} can be opened ({error}): bring back the disk or share that"
                " they are on, or take them off the list"
            ) from error


def _writer(
    ranks: Ranks, make: Callable[[], FeatureWriter], join: Callable[[], FeatureWriter]
) -> FeatureWriter:
    """The file, made or opened by the first process, then shared with the others."""
    if ranks.world == 1:
        return make()
    writer, refusal = None, None
    if ranks.first:
        try:
            writer = make()
            writer.share()
        except VggfeatError as error:
            refusal = error
    if ranks.same(refusal is not None):
        raise refusal or VggfeatError("the first process could not open the file")
    return writer or join()


@overload
def embed(
    network: Network,
    images: Iterable[Any],
    scales: Sequence[int] | None = None,
    *,
    layer: str | None = None,
    mirror: bool = True,
    pool: str = "average",
    batch_size: int | None = None,
    workers: int = CORES,
    progress: bool = False,
    return_unreadable: Literal[False] = False,
) -> np.ndarray: ...


@overload
def embed(
    network: Network,
    images: Iterable[Any],
    scales: Sequence[int] | None = None,
    *,
    layer: str | None = None,
    mirror: bool = True,
    pool: str = "average",
    batch_size: int | None = None,
    workers: int = CORES,
    progress: bool = False,
    return_unreadable: Literal[True],
) -> tuple[np.ndarray, dict[int, str]]: ...


def embed(
    network: Network,
    images: Iterable[Any],
    scales: Sequence[int] | None = None,
    *,
    layer: str | None = None,
    mirror: bool = True,
    pool: str = "average",
    batch_size: int | None = None,
    workers: int = CORES,
    progress: bool = False,
    return_unreadable: bool = False,
) -> np.ndarray | tuple[np.ndarray, dict[int, str]]:
    """L2-normalised descriptors (N, D) float32 of images, (N, Q * D) with pool="stack".

    images: see `list_of_images`. scales: smallest sides Q in pixels; by default
    `network.default_scales`. layer: the paper's name; by default `network.default_layer`. mirror:
    average with the mirror image's descriptor. pool: over the scales, "average", "stack" or "max".
    batch_size: images of 224x224 a forward pass, larger ones in proportionally smaller batches; by
    default 8, on a GPU 64. workers: threads that decode and rescale. progress: show it on stderr,
    as the commands do.
    return_unreadable: return also {index: reason} of the images that can't be read, whose rows are
    NaN. Without it the first that is met raises UnreadableImage. Raises VggfeatError for what isn't
    an image, and for settings that don't fit the network.
    """
    if not isinstance(network, Network):
        raise VggfeatError(f"`network` must be one that vggfeat.load returns, not {shown(network)}")
    if pool not in POOLINGS:
        raise VggfeatError(f"`pool` must be one of {', '.join(POOLINGS)}, not {shown(pool)}")
    images = list_of_images(images)
    description = description_of(network, layer, scales, mirror)
    raw_NQD, unreadable = described(
        network, images, description, batch_size, workers, progress, return_unreadable
    )
    x_ND = aggregate(raw_NQD, pool)
    return (x_ND, unreadable) if return_unreadable else x_ND


def list_of_images(images: Iterable[Any]) -> list[Any]:
    """images as a list, of what `decode.read_rgb` takes: paths, bytes of files, PIL images, arrays
    (H, W, 3).

    images: a list or tuple, an array (N, H, W, 3), or an iterator, which is read to its end first.
    Raises VggfeatError, which says what to give: one image alone, none, tensors, anything else.
    """
    hint = "give a list of images, and for one image [image]"
    one = isinstance(images, IMAGE_TYPES) and not (
        isinstance(images, np.ndarray) and images.ndim in (1, 4)
    )
    if (
        one
        or isinstance(images, Mapping | Set | torch.Tensor | IOBase)
        or not isinstance(images, Iterable)
    ):
        raise VggfeatError(f"`images` is {kind_of(images)}: {hint}")
    listed = list(images)
    if not listed:
        raise VggfeatError("`images` is empty: there is nothing to describe")
    for i, image in enumerate(listed):
        if not isinstance(image, IMAGE_TYPES):
            raise VggfeatError(f"image {i} of `images` is {kind_of(image)}: give {IMAGES}")
    return listed


def described(
    network: Network,
    images: Sequence[Any],
    description: Description,
    batch_size: int | None,
    workers: int,
    progress: bool,
    keep_going: bool,
) -> tuple[np.ndarray, dict[int, str]]:
    """Descriptors (N, Q, D) float32 of images, neither pooled nor normalised; and index -> reason
    of unreadable ones.

    keep_going: the unreadable ones are rows of NaN; else the first that is met raises
    UnreadableImage. progress: show it on stderr. The others as of `by_shape`.
    """
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        whole = isinstance(value, numbers.Integral) and value >= 1
        if not whole and (value is not None or name == "workers"):
            raise VggfeatError(f"`{name}` must be a whole number from 1 up, not {shown(value)}")
    N, done = len(images), 0.0
    raw_NQD = np.full(
        (N, len(description.scales), network.dim(description.layer)), np.nan, np.float32
    )
    unreadable: dict[int, str] = {}
    with terminal.progress("describe", quiet=not progress) as show:

        def advance(more: float) -> None:
            nonlocal done
            done += more
            show(min(done, N), N)

        show(0, N)
        for i, result in describe_all(
            network,
            images,
            description,
            batch_size=batch_size,
            workers=workers,
            advance=advance,
            say=terminal.say if progress else lambda line: None,
        ):
            if not isinstance(result, UnreadableImage):
                raw_NQD[i] = result
            elif keep_going:
                unreadable[i] = str(result)
            else:
                raise UnreadableImage(f"image {i}: {result}")
    return raw_NQD, dict(sorted(unreadable.items()))


def plan(
    items: Items,
    seen: Look,
    network: Network,
    description: Description,
    store: str,
    *,
    batch_size: int | None = None,
    workers: int = 2,
    processes: int = 1,
) -> Plan:
    """The work and the file of an extraction, from image headers and a trial on some images; writes
    nothing.

    processes: how many share the work, each with a device of its own; the trial is of one.

    Raises VggfeatError where no image that was looked at can be read.
    """
    if not seen.shapes:
        raise VggfeatError(none_readable(seen.looked, items, seen.unreadable))
    largest = max(description.scales)
    fitting = {  # a longer strip is unreadable, and takes no time
        i: shape
        for i, shape in seen.shapes.items()
        if math.prod(smallest_side_shape(*shape, largest)) <= MAX_RESCALED_PIXELS
    }
    seen = replace(seen, shapes=fitting or seen.shapes)
    few = list(seen.shapes.values())[:: -(-len(seen.shapes) // FEW)]
    flop = sum(
        forward_flop(network, description.layer, *smallest_side_shape(height, width, q))
        for height, width in few
        for q in description.scales
    )
    total = flop / len(few) * (2 if description.mirror else 1) * len(items)
    expected = _expected(items, network, description, seen, batch_size, workers)
    seconds, cheaper = (value / processes for value in expected)
    size = (
        len(items)
        * len(description.scales)
        * network.dim(description.layer)
        * np.dtype(store).itemsize
    )
    worth = Cheaper.than(description).worth_saying(seconds, cheaper)
    return Plan(
        images=len(items),
        sampled=len(seen.shapes),
        smallest_sides=seen.smallest_sides,
        enlarged={q: seen.enlarged(q) for q in description.scales},
        gflop=total / 1e9,
        seconds=seconds,
        cheaper=Cheaper.than(description).options if worth else None,
        cheaper_seconds=cheaper if worth else None,
        bytes=size,
    )


def _expected(
    items: Items,
    network: Network,
    description: Description,
    seen: Look,
    batch_size: int | None,
    workers: int,
) -> tuple[float, float]:
    """Seconds that describing all items will take, and with `Cheaper` settings, by describing some
    of them twice.

    A batch takes alpha + beta x pixels seconds, as it reads all weights, however few images are in
    it. So what counts is how full the batches of the whole will be, which follows from the shapes.
    A shape that is new takes longer, as its kernels are prepared: what the first pass took longer
    than the second.
    """
    scales, smallest = description.scales, int(np.argmin(description.scales))
    most_pixels = (batch_size or BATCH_SIZE[network.device.type]) * CROP_PIXELS
    rescaled = (
        ((s, *smallest_side_shape(height, width, q)), i)
        for i, (height, width) in seen.shapes.items()
        for s, q in enumerate(scales)
    )
    batches = list(gathered(rescaled, lambda: most_pixels))
    # Whole batches at the smallest scale: their images share batches at the others as in the whole.
    groups = [members for shape, members in batches if shape and shape[0] == smallest]
    pixels = float(sum(shape[1] * shape[2] * len(members) for shape, members in batches if shape))
    compute = partial(describe, network, layer=description.layer, mirror=description.mirror)

    def read(i: int) -> np.ndarray:
        image_HWC = read_rgb(items.source(i))
        with suppress(OSError):
            stamp(items.source(i))  # as an extraction does
        return image_HWC

    blank = torch.zeros(
        (1, scales[smallest], scales[smallest], 3), dtype=torch.uint8, device=network.device
    )
    compute(blank).cpu()  # starts threads, asks for memory
    began = time.perf_counter()
    compute(blank).cpu()
    of_blank = scales[smallest] ** 2, time.perf_counter() - began
    rough = of_blank[1] / of_blank[0] * pixels / len(seen.shapes)
    began = time.perf_counter()
    with suppress(UnreadableImage):
        for q in scales:
            smallest_side(read(groups[0][0]), q)
    rough += (time.perf_counter() - began) / workers
    budget = min(TRIAL_SECONDS, max(TRIAL_SECONDS / 5, TRIAL_SHARE * rough * len(items)))
    chosen: list[int] = []
    for group in np.random.default_rng(0).permutation(len(groups)):
        chosen += groups[group]
        if 2 * rough * len(chosen) > budget:
            break

    def once() -> tuple[float, np.ndarray]:
        """Seconds that describing the chosen takes; pixels and seconds of each batch (n, 2)."""
        timed: list[tuple[float, float]] = []

        def timing(batch_NHWC: torch.Tensor) -> torch.Tensor:
            began = time.perf_counter()
            made = compute(batch_NHWC).cpu()
            timed.append((batch_NHWC[..., 0].numel(), time.perf_counter() - began))
            return made

        began = time.perf_counter()
        for _ in by_shape(
            read, chosen, scales, timing, network.device, batch_size=batch_size, workers=workers
        ):
            pass
        return time.perf_counter() - began, np.array(timed).reshape(-1, 2)

    (first, _), (second, timed) = once(), once()
    net = float(timed[:, 1].sum())
    each = (second - net) / len(
        chosen
    )  # of an image: waiting for it to be read, and what is between batches
    if each * len(chosen) > READING * second or not len(timed):
        whole = (
            second / len(chosen) * len(items)
        )  # fuller batches would wait longer for their images
        return whole, whole
    points = np.vstack([timed, of_blank])
    beta, alpha = np.polyfit(points[:, 0], points[:, 1], 1) if np.ptp(points[:, 0]) else (1.0, 0.0)
    if min(alpha, beta) < 0:
        beta, alpha = 1.0, 0.0
    in_trial = alpha * len(timed) + beta * timed[:, 0].sum()
    in_whole = (alpha * len(batches) + beta * pixels) * len(items) / len(seen.shapes)
    kinds = len({(shape, len(members)) for shape, members in batches}) / len(
        set(timed[:, 0].tolist())
    )
    computing = net * in_whole / in_trial + (first - second) * min(kinds, in_whole / in_trial)
    return (
        computing + each * len(items),
        computing * Cheaper.than(description).share + each * len(items),
    )


_FLOP: dict[tuple[str, str, int, int], float] = {}


def forward_flop(network: Network, layer: str, height: int, width: int) -> float:
    """Operations of one image's forward pass to a layer; a multiply-add is two."""
    key = (network.fingerprint, layer, height, width)
    if key not in _FLOP:
        shapes = {
            k: torch.empty_like(v, device="meta") for k, v in network.module.state_dict().items()
        }
        image = torch.empty(
            (1, 3, height, width), dtype=next(iter(shapes.values())).dtype, device="meta"
        )
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            torch.func.functional_call(network.module, shapes, (image, layer))
        _FLOP[key] = float(counter.get_total_flops())
    return _FLOP[key]


def limited(items: Items, limit: int) -> Items:
    """The first `limit` items, and how many there are; splits keep the rows that remain."""
    if limit >= len(items):
        return items
    kept, remarks = limit, items.remarks
    if items.labels is not None:
        n = np.count_nonzero(images_of_classes(items.labels[:kept], len(items.classes)))
        if n < len(items.classes):
            remarks += (
                (
                    f"`limit` {kept:,} takes the first images, of {n:,} of the"
                    f" {len(items.classes):,} classes"
                ),
            )
    return replace(
        items,
        names=items.names[:kept],
        labels=None if items.labels is None else items.labels[:kept],
        splits={name: rows[rows < kept] for name, rows in items.splits.items()},
        images=None if items.images is None else items.images[:kept],
        remarks=remarks,
        total=items.total or len(items),
    )


def versions() -> dict[str, str]:
    """Versions of what takes part in a result."""
    import PIL
    import sklearn
    import timm
    import torchvision

    modules = (torch, torchvision, timm, np, h5py, sklearn, PIL)
    return {
        "vggfeat": __version__,
        "python": sys.version.split()[0],
        **{module.__name__: module.__version__ for module in modules},
    }
