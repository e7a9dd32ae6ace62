"""Dataset x network x scales -> feature file. N images, Q scales, D descriptor length, H, W height and width.

An image is decoded once, in a thread, and rescaled to every Q. Images wait in buckets of exactly one shape;
a full bucket goes through the network as one batch, so that batching never pads and never changes a result.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vggfeat import __version__
from vggfeat.aggregate import aggregate
from vggfeat.datasets import Items
from vggfeat.describe import describe
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import read_rgb, smallest_side, smallest_side_shape
from vggfeat.store import Description, FeatureWriter
from vggfeat.weights import Network

FILTER = "bilinear, antialiased"
WAITING_BYTES = 512 << 20  # pixels that may wait in buckets; beyond it the fullest bucket goes on as it is
CROP_PIXELS = 224 * 224


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


def description_of(network: Network, layer: str | None, scales: Sequence[int], mirror: bool) -> Description:
    """A checked Description; layer None is fc7, or a timm backbone's features.

    Raises VggfeatError: a layer that the weights don't reach, a repeated scale, a Q that is too small for it.
    """
    layer = layer or network.default_layer
    smallest = network.min_side(layer)
    scales = tuple(int(q) for q in scales)
    if not scales or len(set(scales)) != len(scales):
        raise VggfeatError(f"scales {scales} must be one or more different numbers")
    if min(scales) < smallest:
        raise VggfeatError(
            f"scale {min(scales)} is too small: {layer} of net {network.name} needs at least {smallest}"
        )
    return Description(
        net=network.name,
        weights=network.spec,
        fingerprint=network.fingerprint,
        layer=layer,
        scales=scales,
        mirror=mirror,
        pool=network.metadata.get("pool", "none"),
        filter=FILTER,
        precision=network.precision,
    )


def describe_all(
    network: Network,
    sources: Sequence[Any],
    description: Description,
    *,
    batch_size: int = 8,
    workers: int = 2,
    advance: Callable[[float], None] = lambda images: None,
) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
    """`by_shape` with `describe`: (i, descriptors (Q, D) float32) for every source, or (i, UnreadableImage)."""

    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        return describe(network, images_NHWC, description.layer, description.mirror)

    return by_shape(
        sources, description.scales, compute, network.device,
        batch_size=batch_size, workers=workers, advance=advance,
    )  # fmt: skip


def by_shape(
    sources: Sequence[Any],
    scales: Sequence[int],
    compute: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    *,
    batch_size: int = 8,
    workers: int = 2,
    advance: Callable[[float], None] = lambda images: None,
) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
    """Yield (i, what `compute` makes of the image at each scale (Q, ...)), or (i, UnreadableImage); in no set order.

    sources: anything `images.read_rgb` takes. compute: uint8 RGB (n, H, W, 3) of one shape, on the device -> (n, ...).
    batch_size: images of 224 x 224 pixels at once; larger images go in proportionally smaller batches, so that
    memory stays the same. advance: called after each batch with the work done in images, a scale counting as its Q^2
    (images end late, while their buckets fill).
    """
    share = np.square(scales) / np.square(scales).sum()
    rows: dict[int, np.ndarray] = {}
    left: dict[int, int] = {}
    buckets: dict[tuple[int, int, int], list[tuple[int, np.ndarray]]] = defaultdict(list)
    waiting = 0

    def read(source: Any) -> list[np.ndarray]:
        image_HWC = read_rgb(source)
        return [smallest_side(image_HWC, q) for q in scales]

    def run(key: tuple[int, int, int]) -> Iterator[tuple[int, np.ndarray]]:
        nonlocal waiting
        members = buckets.pop(key)
        waiting -= sum(image.nbytes for _, image in members)
        batch_NHWC = torch.from_numpy(np.stack([image for _, image in members])).to(device)
        try:
            computed = compute(batch_NHWC).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise VggfeatError(
                f"out of memory on {device} with {tuple(batch_NHWC.shape)}; give a smaller --batch-size"
            ) from error
        advance(len(members) * float(share[key[0]]))
        for (i, _), value in zip(members, computed, strict=True):
            row = rows.setdefault(i, np.empty((len(scales), *value.shape), value.dtype))
            row[key[0]] = value
            left[i] -= 1
            if not left[i]:
                del left[i]
                yield i, rows.pop(i)

    queue: deque[tuple[int, Future[list[np.ndarray]]]] = deque()
    upcoming = iter(enumerate(sources))
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode")
    try:
        while True:
            while len(queue) < 4 * workers and (item := next(upcoming, None)) is not None:
                queue.append((item[0], pool.submit(read, item[1])))
            if not queue:
                break
            i, future = queue.popleft()
            try:
                images = future.result()
            except UnreadableImage as error:
                advance(1.0)
                yield i, error
                continue
            left[i] = len(scales)
            for s, image in enumerate(images):
                key = (s, *image.shape[:2])
                buckets[key].append((i, image))
                waiting += image.nbytes
                if len(buckets[key]) >= max(1, batch_size * CROP_PIXELS // (image.shape[0] * image.shape[1])):
                    yield from run(key)
            while waiting > WAITING_BYTES:
                yield from run(max(buckets, key=lambda k: len(buckets[k]) * k[1] * k[2]))
        for key in list(buckets):
            yield from run(key)
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
    batch_size: int = 8,
    workers: int = 2,
    store: str = "float32",
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> Report:
    """Describe every item and write the feature file `out` (contract 3); all rows or no file.

    progress: called with (work done in images, images in all). Raises VggfeatError: see `description_of`,
    `FeatureWriter`; an unreadable image is no error, but a row of the Report.
    """
    if not len(items):
        raise VggfeatError(f"{items.root} has no images to extract")
    description = description_of(network, layer, scales, mirror)
    attributes = {
        "weights_metadata": {k: v for k, v in network.metadata.items() if k != "classes"},
        "versions": versions(),
        "command": command,
    }
    started = time.monotonic()
    dim = network.dim(description.layer)
    failures: dict[int, str] = {}
    done = 0.0

    def advance(images: float) -> None:
        nonlocal done
        done += images
        progress(done, len(items))

    with FeatureWriter(out, items, description, dim, store, attributes, overwrite) as writer:
        sources = _Sources(items)
        described = describe_all(
            network, sources, description, batch_size=batch_size, workers=workers, advance=advance
        )
        for i, result in described:
            if isinstance(result, UnreadableImage):
                failures[i] = str(result)
                writer.fail(i, str(result))
            else:
                writer.write(i, result)
        seconds = time.monotonic() - started
        writer.finish({"seconds": seconds})
    return Report(len(items), seconds, {items.names[i]: failures[i] for i in sorted(failures)})


class _Sources(Sequence[Any]):
    """Items as a sequence of what `read_rgb` takes, made one by one."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self.items):
            raise IndexError(i)
        return self.items.source(i)


def embed(
    network: Network,
    images: Sequence[Any],
    scales: Sequence[int] = (256, 384, 512),
    *,
    layer: str | None = None,
    mirror: bool = True,
    pool: str = "average",
    batch_size: int = 8,
    workers: int = 2,
) -> np.ndarray:
    """L2-normalised descriptors (N, D) float32 of images, (N, Q * D) with pool="stack".

    images: paths, bytes, PIL images or arrays (H, W, 3) uint8 RGB. Raises UnreadableImage for the first that
    can't be read, VggfeatError for settings that don't fit the network.
    """
    if isinstance(images, str | bytes | Path):
        raise VggfeatError("embed takes a list of images; for one image give [image]")
    description = description_of(network, layer, scales, mirror)
    rows: dict[int, np.ndarray] = {}
    for i, result in describe_all(network, images, description, batch_size=batch_size, workers=workers):
        if isinstance(result, UnreadableImage):
            raise UnreadableImage(f"image {i}: {result}")
        rows[i] = result
    if not rows:
        raise VggfeatError("embed got no images")
    return aggregate(np.stack([rows[i] for i in range(len(rows))]), pool)


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
