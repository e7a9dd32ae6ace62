"""Where localisation nets say that things are in whole images, by A.2's two protocols: from a
central crop, of the true class; or densely, of the likeliest classes, merged.

A position (i, j) of a net's dense map stands for the crop whose top left corner is row 32 i, column
32 j of the rescaled image, and what is said there of a box is counted from that crop's centre. The
boxes of the mirror image are mirrored back; all come to pixels of the image as it is stored
(upright), each axis by its own factor, and are cut off at its edges.

N images, C classes an image, K all classes, M windows, V views (the image, and its mirror image).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.box_figures import Located
from pretrain.boxes import decoded, mirrored
from pretrain.kept import KeptPosteriors
from pretrain.merging import MERGED_ABOVE, merged
from pretrain.posteriors import class_order, facts_of, imagenet_synsets, own_scales
from vggfeat.batches import by_shape
from vggfeat.datasets import Items
from vggfeat.decode import expected_shape, read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError, reason
from vggfeat.images import grid_crops, mirror, smallest_side_shape
from vggfeat.ranks import Ranks
from vggfeat.weights import Network
from vggfeat.writer import stamp

STRIDE = 32  # pixels between two positions of a dense map: five poolings
UNLIKE = "merge_above=", "mirror="
"""How it begins, in a cell, that merging wasn't the default one."""


@dataclass(frozen=True)
class Guessed:
    """What a classification says of N images: the classes whose boxes are asked for.

    classes: K names. labels_NC: of them, the likeliest first. posteriors_NC: theirs; NaN where the
    image is unreadable. crc32: (N,) of the images' files, 0 unknown. told_by: which nets, by their
    weights, at which Q, in which mode.
    """

    classes: list[str]
    labels_NC: np.ndarray
    posteriors_NC: np.ndarray
    crc32: np.ndarray
    told_by: str = ""


@dataclass
class Seen:
    """What is met of N images on the way. sizes_N2: height and width, 0 of unreadable ones.
    failures: row -> reason.
    """

    sizes_N2: np.ndarray
    failures: dict[int, str] = field(default_factory=dict)


def fitting_scales(network: Network, scales: Sequence[int]) -> tuple[int, ...]:
    """The Q to localise at: those given, or the S that the net was trained at. Raises VggfeatError
    for a net or Q that can't be.
    """
    crop = network.vgg("localisation needs its dense map").crop
    if not network.boxes:
        raise VggfeatError(
            f"{network.spec} says classes, not boxes: give weights of a localisation net"
        )
    network.require("fc8")
    chosen = tuple(scales) or own_scales(network, multi=False)
    if min(chosen) < crop:
        raise VggfeatError(
            f"Q={min(chosen)} is smaller than the crop of {crop} that {network.spec} was trained on"
        )
    return chosen


def facts(network: Network) -> dict[str, str]:
    """What is told of a localisation net: as of any, and how it says a box."""
    return {
        **facts_of(network),
        "boxes": network.boxes,
        "box_unit": network.metadata.get("box_unit", ""),
    }


def columns_of(network: Network, classes: Sequence[str]) -> list[int] | None:
    """For each class, its place among the boxes that a net says; None where one is for all. Raises
    VggfeatError where the net has no box of a class.
    """
    return class_order(network, classes) if network.boxes == "pcr" else None


def central(
    network: Network,
    items: Items,
    labels_N: np.ndarray,
    Q: int,
    ranks: Ranks,
    *,
    batch_size: int | None = None,
    workers: int = 2,
    advance: Callable[[float, int], None] = lambda done, total: None,
) -> tuple[Located, Seen]:
    """Protocol 1: the box of each image's own class, from its central crop alone.

    labels_N: index into `items.classes`, -1 unknown: such an image has none where boxes are per
    class. Complete in the first process; each takes its part of the images.
    """
    columns = columns_of(network, items.classes)
    images = _Images(items, ranks, np.zeros(0, np.uint32))
    corners_N14 = np.full((images.count, 1, 4), np.nan)

    def compute(images_NHWC: Tensor) -> Tensor:
        crop = network.vgg().crop
        return _said(network, grid_crops(images_NHWC, crop, 1)[0], mirrored_too=False)

    for i, _, said_Vhwo in images.through(
        compute, (Q,), network, batch_size=batch_size, workers=workers, advance=advance
    ):
        frame = images.frame(i, Q)
        crop = network.vgg().crop
        margin = (frame.rescaled[0] - crop) // 2, (frame.rescaled[1] - crop) // 2
        chosen = None if columns is None else [columns[labels_N[i]]]
        if chosen is None or labels_N[i] >= 0:
            corners_N14[i - images.low] = _corners(network, said_Vhwo, chosen, frame, margin)[0]
    located = Located(
        [facts(network)],
        [(Q,)],
        items.classes,
        labels_N[:, None],
        ranks.collect(corners_N14, axis=0),
        np.ones((len(items), 1)),
    )
    return located, images.collected()


def dense(
    networks: Sequence[Network],
    scales: Sequence[Sequence[int]],
    items: Items,
    guessed: Guessed,
    classifiers: Sequence[Network],
    ranks: Ranks,
    *,
    above: float = MERGED_ABOVE,
    mirror_too: bool = True,
    batch_size: int | None = None,
    workers: int = 2,
    advance: Callable[[float, int], None] = lambda done, total: None,
) -> tuple[list[Located], Seen]:
    """Protocol 2: of each net alone, and, where there are several, of all together, the boxes of
    the classes that are guessed, merged over positions, views, Q and nets.

    scales: of each net. classifiers: whose posteriors at a window, averaged, rate its box; without
    one every window weighs the same, and a box's rating is its share of them times the image's
    posterior. above: see `merging`. Complete in the first process.
    """
    own = [columns_of(network, guessed.classes) for network in networks]
    theirs = [class_order(network, guessed.classes) for network in classifiers]
    alone = [[n] for n in range(len(networks))]
    groups = alone + ([list(range(len(networks)))] if len(networks) > 1 else [])
    union = sorted({q for each in scales for q in each})
    unlike = (
        *(() if above == MERGED_ABOVE else (f"{UNLIKE[0]}{above:g}",)),
        *(() if mirror_too else (f"{UNLIKE[1]}no",)),
    )
    images = _Images(items, ranks, guessed.crc32)
    C = guessed.labels_NC.shape[1]
    corners_GNC4 = np.full((len(groups), images.count, C, 4), np.nan)
    ratings_GNC = np.full((len(groups), images.count, C), np.nan)
    layout: dict[tuple[int, int], list[torch.Size]] = {}

    def of_scale(q: int) -> list[int]:
        return [n for n in range(len(networks)) if q in scales[n]]

    def compute(images_NHWC: Tensor) -> Tensor:
        height, width = images_NHWC.shape[1:3]
        said = [_said(networks[n], images_NHWC, mirror_too) for n in of_scale(min(height, width))]
        said += [_said(each, images_NHWC, mirror_too).softmax(-1) for each in classifiers]
        layout[height, width] = [each.shape[1:] for each in said]
        return torch.cat([each.flatten(1) for each in said], 1)

    def candidates(i: int, q: int, said: np.ndarray) -> Iterator[tuple[int, int, _Windows]]:
        """(net, Q, what it says), of each net that is run at this Q."""
        frame, wanted = images.frame(i, q), guessed.labels_NC[i]
        shapes = layout[frame.rescaled]
        ends = np.cumsum([shape.numel() for shape in shapes])[:-1]
        parts = [
            part.reshape(shape) for part, shape in zip(np.split(said, ends), shapes, strict=True)
        ]
        nets = of_scale(q)
        scores = [
            part[..., [order[k] for k in wanted]].reshape(-1, C)
            for part, order in zip(parts[len(nets) :], theirs, strict=True)
        ]
        for n, part in zip(nets, parts, strict=False):
            columns = own[n]
            chosen = None if columns is None else [columns[k] for k in wanted]
            corners_MC4 = _corners(networks[n], part, chosen, frame)
            flat = np.ones((len(corners_MC4), C))
            yield n, q, _Windows(corners_MC4, np.mean(scores, axis=0) if scores else flat)

    coming: dict[int, list[tuple[int, int, _Windows]]] = {}
    left = {i: len(union) for i in range(images.low, images.high)}
    for i, s, said in images.through(
        compute,
        union,
        networks[0],
        batch_size=batch_size,
        workers=workers,
        advance=advance,
    ):
        if np.isnan(guessed.posteriors_NC[i]).any():
            continue
        coming.setdefault(i, []).extend(candidates(i, union[s], said))
        left[i] -= 1
        if left[i]:
            continue
        windows = sorted(coming.pop(i), key=lambda each: each[:2])  # whichever Q came first
        weight = np.ones(C) if classifiers else guessed.posteriors_NC[i]
        for g, nets in enumerate(groups):
            corners_C4, ratings_C = best([each for n, _, each in windows if n in nets], above)
            corners_GNC4[g, i - images.low] = corners_C4
            ratings_GNC[g, i - images.low] = ratings_C * weight
    everywhere = ranks.collect(corners_GNC4, axis=1), ranks.collect(ratings_GNC, axis=1)
    located = [
        Located(
            [facts(networks[n]) for n in nets],
            [tuple(scales[n]) for n in nets],
            guessed.classes,
            guessed.labels_NC,
            corners_NC4,
            ratings_NC,
            told_by=guessed.told_by,
            unlike=unlike,
        )
        for nets, corners_NC4, ratings_NC in zip(groups, *everywhere, strict=True)
    ]
    seen = images.collected()
    for i in np.flatnonzero(np.isnan(guessed.posteriors_NC).any(1)).tolist():
        seen.failures.setdefault(i, "it had no posteriors")
    return located, seen


class _Windows(NamedTuple):
    """What is said at M windows. corners_MC4: or (M, 1, 4), a box for all classes. scores_MC: of
    the classes there.
    """

    corners_MC4: np.ndarray
    scores_MC: np.ndarray


def best(windows: Sequence[_Windows], above: float) -> tuple[np.ndarray, np.ndarray]:
    """(C, 4) the merged box of each class with the highest rating, the first of equals; and (C,)
    that rating, the mean over all windows of the scores of those that the box was merged of.
    """
    scores_MC = np.concatenate([each.scores_MC for each in windows])
    M, C = scores_MC.shape
    shared = all(each.corners_MC4.shape[1] == 1 for each in windows)
    kinds = 1 if shared else C
    corners_MC4 = np.concatenate(
        [np.broadcast_to(w.corners_MC4, (len(w.corners_MC4), kinds, 4)) for w in windows]
    )
    chosen, ratings = np.empty((C, 4)), np.empty(C)
    for k in range(kinds):
        classes = slice(None) if shared else slice(k, k + 1)
        boxes_G4, sums_GC = merged(corners_MC4[:, k], scores_MC[:, classes], above)
        first = sums_GC.argmax(0)
        chosen[classes], ratings[classes] = boxes_G4[first], sums_GC.max(0) / M
    return chosen, ratings


@dataclass(frozen=True)
class _Frame:
    """Height and width of an image as it is stored, and rescaled."""

    stored: tuple[int, int]
    rescaled: tuple[int, int]


class _Images:
    """This process's part of the images, as they are read, and what is met on the way.

    crc32: (N,) that their files are to have, 0 unknown; or (0,).
    """

    def __init__(self, items: Items, ranks: Ranks, crc32: np.ndarray) -> None:
        self.low, self.high = ranks.share(0, len(items))
        self._items, self._ranks, self._crc32 = items, ranks, crc32
        self._sizes = np.zeros((self.count, 2), np.int64)
        self._failures: dict[int, str] = {}
        self._done = 0.0

    @property
    def count(self) -> int:
        return self.high - self.low

    def frame(self, i: int, q: int) -> _Frame:
        """Of an image that has been read."""
        height, width = map(int, self._sizes[i - self.low])
        return _Frame((height, width), smallest_side_shape(height, width, q))

    def through(
        self,
        compute: Callable[[Tensor], Tensor],
        scales: Sequence[int],
        network: Network,
        *,
        batch_size: int | None,
        workers: int,
        advance: Callable[[float, int], None],
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(row, number of the scale, what is computed of it), of those that can be read."""

        def count(images: float) -> None:
            self._done += images
            advance(self._done, self.count)

        for i, s, result in by_shape(
            self._read,
            lambda i: expected_shape(self._items.source(i)),
            range(self.low, self.high),
            scales,
            compute,
            network.device,
            filter=network.filter,
            batch_size=batch_size,
            workers=workers,
            advance=count,
        ):
            if isinstance(result, UnreadableImage):
                self._failures[i] = str(result)
            else:
                yield i, s, result

    def collected(self) -> Seen:
        """Of all processes, complete in the first."""
        seen = Seen(self._ranks.collect(self._sizes, axis=0))
        for others in self._ranks.gather(self._failures):
            seen.failures |= others
        return seen

    def _read(self, i: int) -> np.ndarray:
        source = self._items.source(i)
        pixels = read_rgb(source)
        if len(self._crc32) and self._crc32[i]:
            try:
                crc32 = stamp(source)[3]
            except OSError as error:  # gone meanwhile
                raise UnreadableImage(reason(error)) from error
            if crc32 != self._crc32[i]:
                raise VggfeatError(
                    f"{self._items.names[i]} is another picture than the one of that name that the"
                    " posteriors are of: give posteriors of these images"
                )
        self._sizes[i - self.low] = pixels.shape[:2]
        return pixels


@torch.inference_mode()
def _said(network: Network, images_NHWC: Tensor, mirrored_too: bool) -> Tensor:
    """(N, V, h, w, outputs) float32: fc8's map, which is computed in float32 whatever the net's
    precision.
    """
    views = torch.cat([images_NHWC, mirror(images_NHWC)]) if mirrored_too else images_NHWC
    said = network.scores(network.maps_of(views, "fc7").permute(0, 2, 3, 1))
    return said.view(-1, len(images_NHWC), *said.shape[1:]).transpose(0, 1)


def _corners(
    network: Network,
    said_Vhwo: np.ndarray,
    columns: Sequence[int] | None,
    frame: _Frame,
    margin: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """(M, C, 4), or (M, 1, 4) without columns: the boxes that are said, in the image as it is
    stored. margin: above and left of the map's first window, in the rescaled image.
    """
    V, h, w, _ = said_Vhwo.shape
    said = said_Vhwo.reshape(V, h, w, -1, 4)
    said = said if columns is None else said[..., list(columns), :]
    unit, crop = float(network.metadata["box_unit"]), network.vgg().crop
    corners = decoded(said.astype(np.float64), crop, unit)
    top, left = np.mgrid[:h, :w] * STRIDE + np.array(margin)[:, None, None]
    corners += np.stack([left, top, left, top], -1)[:, :, None]
    (height, width), (tall, wide) = frame.stored, frame.rescaled
    corners[1:] = mirrored(corners[1:], wide)
    corners *= np.array([width / wide, height / tall] * 2)
    inside: np.ndarray = np.clip(corners, 0, np.array([width, height] * 2))
    return inside.reshape(V * h * w, -1, 4)


def refuse_unboxed(network: Network, classes: Sequence[str], where: str) -> None:
    """Raise VggfeatError where a net that says a box for each class has none of one that may be
    guessed. where: who guesses.
    """
    if network.boxes != "pcr" or network.classes is None:
        return
    known = {*network.classes, *imagenet_synsets(network.classes)}
    if unknown := [name for name in classes if name not in known]:
        raise VggfeatError(
            f"{where} may say {len(unknown):,} classes that {network.spec} has no box of, such as"
            f" {unknown[0]!r}: give a classification among the {len(network.classes):,} classes of"
            " that net, or a net with one box for all (scr)"
        )


def refuse_other_windows(classifier: Network, nets: Sequence[Mapping[str, str]]) -> None:
    """Raise VggfeatError where a classifier's map is of other windows than the boxes, by the nets'
    facts.
    """
    own = {"crop": str(classifier.vgg().crop), "pool": classifier.vgg().pool}
    words = {"crop": "crops of {} pixels", "pool": "max-pooling by {}"}
    for net in nets:
        for fact, word in words.items():
            if net[fact] != own[fact]:
                raise VggfeatError(
                    f"{classifier.spec} has {word.format(own[fact])} and {net['weights']}"
                    f" {word.format(net[fact])}: its scores are of other windows than the boxes;"
                    " give its kept `posteriors` instead"
                )


def guesses(kept: KeptPosteriors, mode: str, items: Items, where: str, most: int = 5) -> Guessed:
    """The likeliest classes of these images, by posteriors that may be of more, all nets and Q
    fused; of equals the first in order.

    where: what the posteriors are from. Raises VggfeatError where they aren't of all these images,
    or don't know one of their classes.
    """
    place = {name: i for i, name in enumerate(kept.names)}
    if missing := [name for name in items.names if name not in place]:
        raise VggfeatError(
            f"{where}: no posteriors of {len(missing):,} of the {len(items):,} images, such as"
            f" {missing[0]}: give posteriors of these images"
        )
    known = set(kept.classes)
    if unknown := [name for name in items.classes if name not in known]:
        raise VggfeatError(
            f"{where}: no posteriors of {len(unknown):,} of the {len(items.classes):,} classes,"
            f" such as {unknown[0]!r}: give posteriors of these classes"
        )
    rows = [place[name] for name in items.names]
    posteriors_nK = kept.fused(mode)[rows]
    labels_nC = (-posteriors_nK).argsort(1, kind="stable")[:, :most]
    return Guessed(
        kept.classes,
        labels_nC,
        np.take_along_axis(posteriors_nK, labels_nC, 1),
        kept.crc32[rows] if len(kept.crc32) else kept.crc32,
        told_by([(net.facts, net.scales) for net in kept.nets], mode),
    )


def rated_by(fingerprints: Iterable[str]) -> str:
    """What is added to that where other nets rate the boxes than tell the classes."""
    return f"; rated by {' + '.join(each[:12] for each in fingerprints)}"


def told_by(nets: Sequence[tuple[Mapping[str, str], Sequence[int]]], mode: str) -> str:
    """Which nets, by their facts, at which Q and in which mode tell classes, in words."""
    words = [
        f"{facts['net']} {facts['fingerprint'][:12]} at {','.join(map(str, scales))}"
        for facts, scales in nets
    ]
    return f"{' + '.join(words)}, {mode}"
