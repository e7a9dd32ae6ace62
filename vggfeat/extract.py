"""Dataset x network x scales -> feature file. N images, Q scales, D descriptor length, H, W height and width.

An image is decoded once, in a thread, and rescaled to every Q. Images wait in buckets of exactly one shape;
a full bucket goes through the network as one batch, so that batching never pads and never changes a result. What is
described is in the file ten seconds later (`writer`), and isn't described again after a kill.
"""

from __future__ import annotations

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
from typing import Any, Literal, overload

import h5py
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vggfeat import __version__, terminal, weights
from vggfeat.aggregate import POOLINGS, aggregate
from vggfeat.checked import shown, sides
from vggfeat.datasets import Items
from vggfeat.decode import IMAGE_TYPES, IMAGES, kind_of, read_rgb
from vggfeat.describe import describe
from vggfeat.errors import Interrupted, UnreadableImage, VggfeatError, out_of_memory
from vggfeat.images import smallest_side, smallest_side_shape
from vggfeat.ranks import Ranks
from vggfeat.store import MAX_Q, MAX_SCALES, Description
from vggfeat.terminal import CORES
from vggfeat.weights import Network
from vggfeat.writer import FeatureWriter

FILTER, DECODER = "bilinear, antialiased", "Pillow"
WAITING_BYTES = 512 << 20  # pixels that may wait in buckets; beyond it the fullest bucket goes on as it is
CROP_PIXELS = 224 * 224
BATCH_SIZE = {"cpu": 8, "cuda": 64, "mps": 16}
HUGE = 4  # times a batch: an image that may be left out where it doesn't fit the device


@dataclass(frozen=True)
class Plan:
    """What an extraction will do, before it does it.

    images: N. gflop: of all forward passes, estimated from the headers of `sampled` images (a multiply-add is
    two operations). seconds: gflop over the rate of a short trial on this device. bytes: of the feature file.
    """

    images: int
    sampled: int
    gflop: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Report:
    """What an extraction did. unreadable: name -> reason, in the order of the rows."""

    images: int
    seconds: float
    unreadable: dict[str, str]


def description_of(
    network: Network, layer: str | None, scales: Sequence[int] | None, mirror: bool
) -> Description:
    """A checked Description; layer and scales None are the network's defaults.

    Raises VggfeatError: a layer that the weights don't reach, a repeated scale, a Q that is too small for it.
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
    description: Description, spec: str | os.PathLike[str] | None = None, device: str | torch.device = "auto"
) -> Network:
    """The network that described images so, in its precision. spec: where its weights lie, if they moved.

    Raises VggfeatError when the weights are missing or are not the same, or no network can describe images so.
    """
    spec = spec or description.weights
    network = weights.load(spec, device=device, precision=description.precision)
    if network.fingerprint != description.fingerprint:
        raise VggfeatError(
            f"weights {spec} are not those that described the images (sha256 {network.fingerprint[:12]}, "
            f"not {description.fingerprint[:12]}); give the right file with `weights`"
        )
    if description.pool != network.metadata.get("pool", description.pool):
        network.set_pool(description.pool)
    _refuse_small(network, description.layer, description.scales)
    return network


def _refuse_small(network: Network, layer: str, scales: Sequence[int]) -> None:
    smallest = network.min_side(layer)
    if min(scales) < smallest:
        raise VggfeatError(
            f"scale {min(scales)} is too small: {layer} of net {network.name} needs at least {smallest}"
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
    """Yield (i, descriptors (Q, D) float32) for every source, or (i, UnreadableImage); in no set order.

    sources: anything `decode.read_rgb` takes. See `by_shape`.
    """
    rows: dict[int, dict[int, np.ndarray]] = {}
    for i, s, result in by_shape(
        lambda i: read_rgb(sources[i]), range(len(sources)), description.scales,
        partial(describe, network, layer=description.layer, mirror=description.mirror), network.device,
        batch_size=batch_size, workers=workers, advance=advance, say=say,
    ):  # fmt: skip
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
    """Yield (i, s, what `compute` makes of image i at scales[s]), in no set order; (i, 0, error) for an unreadable one.

    read: i -> (H, W, 3) uint8 RGB, or UnreadableImage; called in threads. compute: uint8 RGB (n, H, W, 3) of one shape,
    on the device -> (n, ...). done: (N, Q) bool, what is not wanted. batch_size: images of 224 x 224 pixels at once
    (by default 8 on a CPU, 64 on a GPU); larger images go in proportionally smaller batches, so that memory stays the
    same. advance: called after each batch with the work done in images, a scale counting as its Q^2 (images end late,
    while their buckets fill). say: a batch didn't fit the device; it and those after it are halved.
    """
    share = np.square(scales) / np.square(scales).sum()
    most_pixels = (batch_size or BATCH_SIZE[device.type]) * CROP_PIXELS
    buckets: dict[tuple[int, int, int], list[tuple[int, np.ndarray]]] = defaultdict(list)
    waiting = 0
    # On a GPU the next batch is on its way before the last one's result is asked for.
    running: deque[tuple[int, list[int], torch.Tensor]] = deque()
    ahead = 1 if device.type == "cuda" else 0

    def prepared(i: int) -> list[tuple[int, np.ndarray]]:
        image_HWC = read(i)
        return [
            (s, smallest_side(image_HWC, q)) for s, q in enumerate(scales) if done is None or not done[i, s]
        ]

    def start(key: tuple[int, int, int]) -> Iterator[tuple[int, int, np.ndarray | UnreadableImage]]:
        nonlocal waiting, most_pixels
        members = buckets.pop(key)
        waiting -= sum(image.nbytes for _, image in members)
        s, height, width = key
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

    queue: deque[tuple[int, Future[list[tuple[int, np.ndarray]]]]] = deque()
    upcoming = iter(indices)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode")
    try:
        while True:
            while len(queue) < 4 * workers and (item := next(upcoming, None)) is not None:
                queue.append((item, pool.submit(prepared, item)))
            if not queue:
                break
            i, future = queue.popleft()
            try:
                images = future.result()
            except UnreadableImage as error:
                advance(1.0 if done is None else float(share[~done[i]].sum()))
                yield i, 0, error
                continue
            for s, image in images:
                key = (s, *image.shape[:2])
                buckets[key].append((i, image))
                waiting += image.nbytes
                if (len(buckets[key]) + 1) * image.shape[0] * image.shape[1] > most_pixels:
                    yield from start(key)
                    yield from finish(ahead)
            while waiting > WAITING_BYTES:
                yield from start(max(buckets, key=lambda k: len(buckets[k]) * k[1] * k[2]))
                yield from finish(ahead)
        for key in list(buckets):
            yield from start(key)
            yield from finish(ahead)
        yield from finish(0)
    finally:
        pool.shutdown(cancel_futures=True)


def extract(
    items: Items,
    network: Network,
    out: str | Path,
    *,
    scales: Sequence[int],
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
    """Describe every item and write the feature file `out` (contract 3), or go on with `out`.partial.

    An extraction that ends early, by whatever, leaves `out`.partial; the same call goes on from there. An unreadable
    image is no error, but a row of the Report; it is tried again by a call that goes on, and by one with
    retry where the file is finished.
    ranks: of the processes that share the work; all of them call this, each gets the same Report.
    progress: called with (work done in images, images in all). say: what happened on the way, in a sentence.
    Raises VggfeatError: see `description_of`, `FeatureWriter`; Interrupted for Ctrl-C.
    """
    if not len(items):
        raise VggfeatError(f"{items.root} has no images to extract")
    ranks = ranks or Ranks(network.device)
    description = description_of(network, layer, scales, mirror)
    facts = {
        "weights_metadata": {k: v for k, v in sorted(network.metadata.items()) if k != "classes"},
        "versions": versions(),
        "command": command,
    }
    dim = network.dim(description.layer)
    make = partial(
        FeatureWriter, out, items, description, dim, store, facts, overwrite=overwrite, retry=retry, say=say
    )
    with _writer(ranks, make, partial(FeatureWriter.join, out, say)) as writer:
        try:
            share = np.square(description.scales) / np.square(description.scales).sum()
            earlier = work = float((writer.described @ share).sum())
            if earlier and ranks.first:
                say(f"going on: {writer.kept()}")
            mine = np.flatnonzero(~writer.described.all(1))[ranks.rank :: ranks.world]
            ranks.barrier()  # all have seen the same file; from here on it changes

            def read(i: int) -> np.ndarray:
                source = items.source(i)
                writer.note_source(i, source)
                return read_rgb(source)

            def advance(images: float) -> None:
                nonlocal work
                work += images * ranks.world  # the others are about as far
                progress(min(work, len(items)), len(items))

            advance(0)
            compute = partial(describe, network, layer=description.layer, mirror=description.mirror)
            for i, s, result in by_shape(
                read, mine.tolist(), description.scales, compute, network.device, done=writer.described,
                batch_size=batch_size, workers=workers, advance=advance, say=say,
            ):  # fmt: skip
                if isinstance(result, UnreadableImage):
                    writer.fail(i, str(result))
                else:
                    writer.write(i, s, result)
            writer.flush()
            ranks.barrier()
            failures, seconds = writer.unreadable, writer.seconds
            ranks.barrier()  # all have read it; now it may get its name
            if ranks.first:
                writer.finish()
        except (KeyboardInterrupt, VggfeatError) as error:
            with suppress(VggfeatError):  # a disk that failed fails again
                writer.flush()
            kept = f"; {writer.kept()}, and the same command goes on from there" if writer.kept() else ""
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"interrupted{kept}", *(error.args or [signal.SIGINT])) from error
            raise VggfeatError(f"{error}{kept}") from error
    return Report(len(items), seconds, {items.names[i]: failures[i] for i in sorted(failures)})


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
    network: Network, images: Iterable[Any], scales: Sequence[int] | None = None, *, layer: str | None = None,
    mirror: bool = True, pool: str = "average", batch_size: int | None = None, workers: int = CORES,
    progress: bool = False, return_unreadable: Literal[False] = False,
) -> np.ndarray: ...  # fmt: skip


@overload
def embed(
    network: Network, images: Iterable[Any], scales: Sequence[int] | None = None, *, layer: str | None = None,
    mirror: bool = True, pool: str = "average", batch_size: int | None = None, workers: int = CORES,
    progress: bool = False, return_unreadable: Literal[True],
) -> tuple[np.ndarray, dict[int, str]]: ...  # fmt: skip


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

    images: see `list_of_images`. scales: smallest sides Q in pixels; by default `network.default_scales`.
    layer: the paper's name; by default `network.default_layer`. mirror: average with the mirror image's descriptor.
    pool: over the scales, "average", "stack" or "max". batch_size: images of 224x224 a forward pass, larger ones in
    proportionally smaller batches; by default 8, on a GPU 64. workers: threads that decode and rescale.
    progress: show it on stderr, as the commands do.
    return_unreadable: return also {index: reason} of the images that can't be read, whose rows are NaN. Without it the
    first that is met raises UnreadableImage. Raises VggfeatError for what isn't an image, and for settings that don't
    fit the network.
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
    """images as a list, of what `decode.read_rgb` takes: paths, bytes of files, PIL images, arrays (H, W, 3).

    images: a list or tuple, an array (N, H, W, 3), or an iterator, which is read to its end first.
    Raises VggfeatError, which says what to give: one image alone, none, tensors, anything else.
    """
    hint = "give a list of images, and for one image [image]"
    one = isinstance(images, IMAGE_TYPES) and not (isinstance(images, np.ndarray) and images.ndim in (1, 4))
    if one or isinstance(images, Mapping | Set | torch.Tensor | IOBase) or not isinstance(images, Iterable):
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
    """Descriptors (N, Q, D) float32 of images, neither pooled nor normalised; and index -> reason of unreadable ones.

    keep_going: the unreadable ones are rows of NaN; else the first that is met raises UnreadableImage.
    progress: show it on stderr. The others as of `by_shape`.
    """
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        whole = isinstance(value, numbers.Integral) and value >= 1
        if not whole and (value is not None or name == "workers"):
            raise VggfeatError(f"`{name}` must be a whole number from 1 up, not {shown(value)}")
    N, done = len(images), 0.0
    raw_NQD = np.full((N, len(description.scales), network.dim(description.layer)), np.nan, np.float32)
    unreadable: dict[int, str] = {}
    with terminal.progress("describe", quiet=not progress) as show:

        def advance(more: float) -> None:
            nonlocal done
            done += more
            show(min(done, N), N)

        show(0, N)
        for i, result in describe_all(
            network, images, description, batch_size=batch_size, workers=workers, advance=advance,
            say=terminal.say if progress else lambda line: None,
        ):  # fmt: skip
            if not isinstance(result, UnreadableImage):
                raw_NQD[i] = result
            elif keep_going:
                unreadable[i] = str(result)
            else:
                raise UnreadableImage(f"image {i}: {result}")
    return raw_NQD, dict(sorted(unreadable.items()))


def plan(
    items: Items, network: Network, scales: Sequence[int], layer: str | None, mirror: bool, store: str
) -> Plan:
    """The work and the file of an extraction, from image headers and one short trial; writes nothing."""
    description = description_of(network, layer, scales, mirror)
    step = max(1, len(items) // 200)
    shapes = [shape for i in range(0, len(items), step) if (shape := _shape(items.source(i)))]
    flop = 0.0
    for height, width in shapes:
        for q in description.scales:
            flop += forward_flop(network, description.layer, *smallest_side_shape(height, width, q))
    per_image = flop / max(1, len(shapes)) * (2 if mirror else 1)
    side = description.scales[0]
    trial = torch.zeros((1, side, side, 3), dtype=torch.uint8, device=network.device)
    describe(network, trial, description.layer, mirror).cpu()  # warm
    started = time.perf_counter()
    describe(network, trial, description.layer, mirror).cpu()
    rate = (
        forward_flop(network, description.layer, side, side)
        * (2 if mirror else 1)
        / (time.perf_counter() - started)
    )
    size = len(items) * len(description.scales) * network.dim(description.layer) * np.dtype(store).itemsize
    total = per_image * len(items)
    return Plan(len(items), len(shapes), total / 1e9, total / rate, size)


def _shape(source: Any) -> tuple[int, int] | None:
    from PIL import Image

    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    try:
        with Image.open(source) as image:
            return image.height, image.width
    except Exception:  # an estimate: whatever is wrong with this file is told by the extraction itself
        return None


_FLOP: dict[tuple[str, str, int, int], float] = {}


def forward_flop(network: Network, layer: str, height: int, width: int) -> float:
    """Operations of one image's forward pass to a layer; a multiply-add is two."""
    key = (network.fingerprint, layer, height, width)
    if key not in _FLOP:
        shapes = {k: torch.empty_like(v, device="meta") for k, v in network.module.state_dict().items()}
        image = torch.empty((1, 3, height, width), dtype=next(iter(shapes.values())).dtype, device="meta")
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            torch.func.functional_call(network.module, shapes, (image, layer))
        _FLOP[key] = float(counter.get_total_flops())
    return _FLOP[key]


def limited(items: Items, limit: int) -> Items:
    """The first `limit` items; splits keep the rows that remain."""
    kept = min(limit, len(items))
    return replace(
        items,
        names=items.names[:kept],
        labels=None if items.labels is None else items.labels[:kept],
        splits={name: rows[rows < kept] for name, rows in items.splits.items()},
        images=None if items.images is None else items.images[:kept],
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
