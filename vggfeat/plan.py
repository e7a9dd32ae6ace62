"""What an extraction will take, before it does it: its work counted from the images' headers, its
time by a trial on some of the images. N images, Q scales, H, W height and width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vggfeat.batches import Shape, by_shape, gathered, pixels_at_once
from vggfeat.datasets import Items
from vggfeat.describe import describe
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import MAX_RESCALED_PIXELS, smallest_side, smallest_side_shape
from vggfeat.look import Cheaper, Look, none_readable
from vggfeat.regions import picture_of
from vggfeat.store import Description
from vggfeat.weights import Network
from vggfeat.writer import stamp

PLANNED, FEW = 4096, 200
"""Images whose headers a plan reads; of which it counts the operations."""
TRIAL_SECONDS, TRIAL_SHARE = 15.0, 0.1
"""That a trial takes at most, of all; a fifth of those seconds in any case."""
READING = 0.3
"""The share of the time from which on an extraction waits for its images rather than the net."""


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


def plan(
    items: Items,
    seen: Look,
    network: Network,
    description: Description,
    store: str,
    *,
    rows: int | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    processes: int = 1,
) -> Plan:
    """The work and the file of an extraction, from image headers and a trial on some images; writes
    nothing.

    items: the views, where rows are of boxes (see `regions`). rows: of the file, if others.
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
        # one pass, to the last of the layers
        max(
            forward_flop(network, layer, *smallest_side_shape(height, width, q))
            for layer in description.layers
        )
        for height, width in few
        for q in description.scales
    )
    total = flop / len(few) * (2 if description.mirror else 1) * len(items)
    expected = _expected(items, network, description, seen, batch_size, workers)
    seconds, cheaper = (value / processes for value in expected)
    size = (
        (rows or len(items))
        * description.columns
        * sum(map(network.dim, description.layers))
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
    it. So what counts is how full the batches of all images will be, which follows from the shapes.
    A shape that is new takes longer, as its kernels are prepared: what the first pass took longer
    than the second.
    """
    most = pixels_at_once(batch_size, network.device)
    batches = list(gathered(seen.shapes, description.scales, most))
    pixels = float(sum(shape[1] * shape[2] * len(members) for shape, members in batches))
    trial = _Trial(items, network, description, seen, batch_size, workers)
    chosen = trial.choose(batches, pixels / len(seen.shapes))
    (first, _), (second, timed) = trial.run(chosen), trial.run(chosen)
    net = float(timed[:, 1].sum())
    # of an image: waiting for it to be read, and what is between batches
    each = (second - net) / len(chosen)
    if each * len(chosen) > READING * second or not len(timed):
        # fuller batches would wait longer for their images
        all_items = second / len(chosen) * len(items)
        return all_items, all_items
    alpha, beta = _fitted(np.vstack([timed, trial.of_blank]))
    in_trial = alpha * len(timed) + beta * timed[:, 0].sum()
    in_all = (alpha * len(batches) + beta * pixels) * len(items) / len(seen.shapes)
    kinds = {(shape, len(members)) for shape, members in batches}
    tried = set(timed[:, 0].tolist())
    new = min(len(kinds) / len(tried), in_all / in_trial)
    computing = net * in_all / in_trial + (first - second) * new
    return (
        computing + each * len(items),
        computing * Cheaper.than(description).share + each * len(items),
    )


class _Trial:
    """Describes some of the images as an extraction does, against the clock.

    of_blank: pixels and seconds of a batch of one blank image at the smallest scale.
    """

    def __init__(
        self,
        items: Items,
        network: Network,
        description: Description,
        seen: Look,
        batch_size: int | None,
        workers: int,
    ) -> None:
        self._items, self._network, self._shapes = items, network, seen.shapes
        self._scales, self._filter = description.scales, description.filter
        self._batch_size, self._workers = batch_size, workers
        self._compute: Callable[[torch.Tensor], torch.Tensor] = partial(
            describe, network, layer=description.layers, mirror=description.mirror
        )
        q = min(self._scales)
        blank = torch.zeros((1, q, q, 3), dtype=torch.uint8, device=network.device)
        self._compute(blank).cpu()  # starts threads, asks for memory
        began = time.perf_counter()
        self._compute(blank).cpu()
        self.of_blank = q**2, time.perf_counter() - began

    def choose(self, batches: list[tuple[Shape, list[int]]], pixels: float) -> list[int]:
        """Rows that can be described twice in the time there is. pixels: of an image, at all scales
        together.

        All images of a batch at the smallest scale: they share batches at the others, too, as among
        all images.
        """
        smallest = self._scales.index(min(self._scales))
        groups = [members for shape, members in batches if shape[0] == smallest]
        rough = self.of_blank[1] / self.of_blank[0] * pixels
        began = time.perf_counter()
        with suppress(UnreadableImage):
            for q in self._scales:
                smallest_side(self._read(groups[0][0]), q, self._filter)
        rough += (time.perf_counter() - began) / self._workers
        most = max(TRIAL_SECONDS / 5, TRIAL_SHARE * rough * len(self._items))
        budget = min(TRIAL_SECONDS, most)
        chosen: list[int] = []
        for group in np.random.default_rng(0).permutation(len(groups)):
            chosen += groups[group]
            if 2 * rough * len(chosen) > budget:
                break
        return chosen

    def run(self, chosen: list[int]) -> tuple[float, np.ndarray]:
        """Seconds that describing the chosen takes; pixels and seconds of each batch (n, 2)."""
        timed: list[tuple[float, float]] = []

        def timing(batch_NHWC: torch.Tensor) -> torch.Tensor:
            began = time.perf_counter()
            made = self._compute(batch_NHWC).cpu()
            timed.append((batch_NHWC[..., 0].numel(), time.perf_counter() - began))
            return made

        began = time.perf_counter()
        for _ in by_shape(
            self._read,
            self._shapes.get,
            chosen,
            self._scales,
            timing,
            self._network.device,
            filter=self._filter,
            batch_size=self._batch_size,
            workers=self._workers,
        ):
            pass
        return time.perf_counter() - began, np.array(timed).reshape(-1, 2)

    def _read(self, i: int) -> np.ndarray:
        image_HWC = picture_of(self._items, i)
        with suppress(OSError):
            stamp(self._items.source(i))  # as an extraction does
        return image_HWC


def _fitted(points: np.ndarray) -> tuple[float, float]:
    """Alpha, beta of a batch's seconds = alpha + beta x pixels. points: (n, 2) of those two."""
    if not np.ptp(points[:, 0]):
        return 0.0, 1.0
    beta, alpha = np.polyfit(points[:, 0], points[:, 1], 1)
    return (float(alpha), float(beta)) if min(alpha, beta) >= 0 else (0.0, 1.0)


_FLOP: dict[tuple[str, str, int, int], float] = {}


def forward_flop(network: Network, layer: str, height: int, width: int) -> float:
    """Operations of one image's forward pass to a layer; a multiply-add is two."""
    key = (network.fingerprint, layer, height, width)
    if key not in _FLOP:
        module = cast(nn.Module, network.module)
        # buffers that no file keeps, such as a transformer's table of positions, take part, too
        shapes = {
            k: torch.empty_like(v, device="meta")
            for k, v in (*module.named_parameters(), *module.named_buffers())
        }
        image = torch.empty(
            (1, 3, height, width), dtype=next(module.parameters()).dtype, device="meta"
        )
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            torch.func.functional_call(module, shapes, (image, layer))
        _FLOP[key] = float(counter.get_total_flops())
    return _FLOP[key]
