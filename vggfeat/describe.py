"""Images -> descriptors, in memory: how images are described, one batch, many images, `embed`.

N images, Q scales, H, W height and width, D descriptor length, the channels of the layer's map.
`describe` is the one computation that extraction, the library and evaluation share.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from io import IOBase
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from vggfeat import sources, terminal
from vggfeat.aggregate import POOLINGS, aggregate
from vggfeat.batches import by_shape
from vggfeat.checked import MAX_Q, MAX_SCALES, shown, sides
from vggfeat.decode import IMAGE_TYPES, IMAGES, expected_shape, kind_of, read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError, WrongUsage
from vggfeat.images import mirror as mirrored
from vggfeat.machine import CORES
from vggfeat.store import MAX_LAYERS, REGIONS, Description
from vggfeat.vgg import VGG
from vggfeat.weights import Network, refuse_small

DECODER = "Pillow"
LARGE = 3 * 4_000_000
"""Values of an image whose mirror image had better not be in memory beside it."""


def description_of(
    network: Network,
    layer: str | list[str] | tuple[str, ...] | None,
    scales: Sequence[int] | None,
    mirror: bool,
    regions: tuple[str, ...] = REGIONS[:1],
) -> Description:
    """A checked Description; layer and scales None are the network's defaults. layer: one, or
    several that are described in one pass.

    Raises VggfeatError: a layer that the weights don't reach, or there twice; a repeated scale, a Q
    that is too small for one of the layers.
    """
    layer = network.default_layer if layer is None else layer
    layers = tuple(layer) if isinstance(layer, list | tuple) else (layer,)
    for name in layers:
        network.require(name)
    if not layers or len(set(layers)) != len(layers):
        raise VggfeatError(f"`layer` {layers} must be one or more different names")
    if len(layers) > MAX_LAYERS:
        raise WrongUsage(f"{len(layers)} layers are more than {MAX_LAYERS}")
    scales = sides(network.default_scales if scales is None else scales)
    if not isinstance(mirror, bool | np.bool_):
        raise VggfeatError(f"`mirror` must be True or False, not {shown(mirror)}")
    if not scales or len(set(scales)) != len(scales):
        raise VggfeatError(f"scales {scales} must be one or more different numbers")
    if len(scales) > MAX_SCALES:
        raise WrongUsage(f"{len(scales)} scales are more than {MAX_SCALES}")
    if max(scales) > MAX_Q:
        raise WrongUsage(f"scale {max(scales)} is beyond {MAX_Q:,} pixels")
    for name in layers:
        refuse_small(scales, network.name, network, name)
    return Description(
        net=network.name,
        weights=network.spec,
        fingerprint=network.fingerprint,
        layer=layers[0],
        scales=scales,
        mirror=bool(mirror),
        pool=network.metadata.get("pool", "none"),
        filter=network.filter,
        precision=network.precision,
        decoder=DECODER,
        regions=regions,
        preprocessing=preprocessing_of(network),
        further=layers[1:],
    )


def description_of_one(
    network: Network, layer: str | None, scales: Sequence[int] | None, mirror: bool
) -> Description:
    """`description_of` one layer, where descriptors are one matrix. Raises VggfeatError for
    several.
    """
    if isinstance(layer, list | tuple):
        raise VggfeatError(f"`layer` must be the name of one layer, not {shown(layer)}")
    return description_of(network, layer, scales, mirror)


def preprocessing_of(network: Network) -> str:
    """What is done to pixels before the net, in words; "" of a net of Table 1.

    timm's configuration of a model has it: another name of the same weights, or another version of
    timm, may have another. That of a net of Table 1 belongs to its source.
    """
    if isinstance(network.module, VGG):
        return ""
    facts = network.preprocessing.to_metadata()
    return "; ".join(f"{key} {value}" for key, value in facts.items())


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
    network = sources.load(spec, device=device, precision=description.precision)
    if network.fingerprint != description.fingerprint:
        raise VggfeatError(
            f"weights {spec} are not those that described the images (sha256"
            f" {network.fingerprint[:12]}, not {description.fingerprint[:12]}); give the right file"
            " with `weights`"
        )
    for what, there, here in (
        ("filter", description.filter, network.filter),
        ("preprocessing", description.preprocessing, preprocessing_of(network)),
    ):
        if there and there != here:  # older files don't tell the preprocessing
            raise VggfeatError(
                f"weights {spec} ask for {what} {here}, and the images were described with {there}:"
                " give them by the name that described the images, with `weights`"
            )
    if description.pool != network.metadata.get("pool", description.pool):
        network.set_pool(description.pool)
    for layer in description.layers:
        network.require(layer)
        refuse_small(description.scales, network.name, network, layer)
    return network


@torch.inference_mode()
def describe(
    network: Network, images_NHWC: Tensor, layer: str | Sequence[str], mirror: bool
) -> Tensor:
    """Descriptors (N, D) float32: the layer's map averaged over positions (and what the net's own
    head does to that mean, `Backbone.pooled`), and that averaged with the mirror image's. Of
    several layers, in one pass: theirs one behind the other, D the sum of their lengths.

    images_NHWC: uint8 RGB of one shape, on the network's device. The mirror image goes through in
    the same batch, unless it is large. The average over positions is taken in float32 whatever the
    network's precision (Appendix B: global average pooling, average with the mirror image's
    descriptor; not normalised here).
    """
    if mirror and images_NHWC[0].numel() > LARGE:
        return (
            describe(network, images_NHWC, layer, False)
            + describe(network, mirrored(images_NHWC), layer, False)
        ) / 2
    if mirror:
        images_NHWC = torch.cat([images_NHWC, mirrored(images_NHWC)])
    layers = (layer,) if isinstance(layer, str) else layer
    maps = network.each_map_of(images_NHWC, layers)
    pooled = {name: network.module.pooled(map_NDHW, name) for name, map_NDHW in maps}
    pooled_ND = torch.cat([pooled[name] for name in layers], dim=1)
    return pooled_ND.view(2, -1, pooled_ND.shape[1]).mean(0) if mirror else pooled_ND


def describe_all(
    network: Network,
    images: Sequence[Any],
    description: Description,
    *,
    batch_size: int | None = None,
    workers: int = 2,
    advance: Callable[[float], None] = lambda images: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
    """Yield (i, descriptors (Q, D) float32) for every image, or (i, UnreadableImage); in no set
    order.

    images: anything `decode.read_rgb` takes. See `batches.by_shape`.
    """
    rows: dict[int, dict[int, np.ndarray]] = {}
    for i, s, result in by_shape(
        lambda i: read_rgb(images[i]),
        lambda i: expected_shape(images[i]),
        range(len(images)),
        description.scales,
        partial(describe, network, layer=description.layers, mirror=description.mirror),
        network.device,
        filter=description.filter,
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
    `network.default_scales`. layer: by its name; by default `network.default_layer`. mirror:
    average with the mirror image's descriptor. pool: over the scales, one of `aggregate.POOLINGS`.
    batch_size: images of 224x224 a forward pass, larger ones in proportionally smaller batches; by
    default 32, on a GPU 128. workers: threads that decode and rescale. progress: show it on stderr,
    as the commands do.
    return_unreadable: return also {index: reason} of the images that can't be read, whose rows are
    NaN. Without it the first that is met raises UnreadableImage. Raises VggfeatError for what isn't
    an image, and for settings that don't fit the network.
    """
    if not isinstance(network, Network):
        raise VggfeatError(f"`network` must be one that vggfeat.load returns, not {shown(network)}")
    refuse_pool(pool)
    images = list_of_images(images)
    description = description_of_one(network, layer, scales, mirror)
    raw_NQD, unreadable = described(
        network, images, description, batch_size, workers, progress, return_unreadable
    )
    x_ND = aggregate(raw_NQD, pool)
    return (x_ND, unreadable) if return_unreadable else x_ND


def refuse_pool(pool: Any) -> None:
    """Raise VggfeatError for what is no pooling over scales."""
    if pool not in POOLINGS:
        raise VggfeatError(f"`pool` must be one of {', '.join(POOLINGS)}, not {shown(pool)}")


def list_of_images(images: Iterable[Any], argument: str = "`images`") -> list[Any]:
    """images as a list, of what `decode.read_rgb` takes: paths, bytes of files, PIL images, arrays
    (H, W, 3).

    images: a list or tuple, an array (N, H, W, 3), or an iterator, which is read to its end first.
    argument: how they are called where they were given. Raises VggfeatError, which says what to
    give: one image alone, none, tensors, anything else.
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
        raise VggfeatError(f"{argument} is {kind_of(images)}: {hint}")
    listed = list(images)
    if not listed:
        raise VggfeatError(f"{argument} is empty: there is nothing to describe")
    for i, image in enumerate(listed):
        if not isinstance(image, IMAGE_TYPES):
            raise VggfeatError(f"image {i} of {argument} is {kind_of(image)}: give {IMAGES}")
    return listed


def described(
    network: Network,
    images: Sequence[Any],
    description: Description,
    batch_size: int | None,
    workers: int,
    progress: bool,
    keep_going: bool,
    name: Callable[[int], str] = "image {}".format,
) -> tuple[np.ndarray, dict[int, str]]:
    """Descriptors (N, Q, D) float32 of images, neither pooled nor normalised; and index -> reason
    of unreadable ones.

    keep_going: the unreadable ones are rows of NaN; else the first that is met raises
    UnreadableImage, which begins with its name. progress: show it on stderr. The others as of
    `batches.by_shape`.
    """
    refuse_counts(batch_size, workers)
    N, done = len(images), 0.0
    with terminal.progress("describe", quiet=not progress) as show:

        def advance(more: float) -> None:
            nonlocal done
            done += more
            show(min(done, N), N)

        show(0, N)
        return gathered(
            network,
            images,
            description,
            batch_size=batch_size,
            workers=workers,
            keep_going=keep_going,
            advance=advance,
            say=terminal.say if progress else lambda line: None,
            name=name,
        )


def refuse_counts(batch_size: int | None, workers: int) -> None:
    """Raise VggfeatError for what are no numbers of images and threads."""
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        counts = isinstance(value, numbers.Integral) and value >= 1
        if not counts and (value is not None or name == "workers"):
            raise VggfeatError(f"`{name}` must be a whole number from 1 up, not {shown(value)}")


def gathered(
    network: Network,
    images: Sequence[Any],
    description: Description,
    *,
    batch_size: int | None,
    workers: int,
    keep_going: bool,
    advance: Callable[[float], None],
    say: Callable[[str], None],
    name: Callable[[int], str] = "image {}".format,
) -> tuple[np.ndarray, dict[int, str]]:
    """As `described`, told by advance and say (see `batches.by_shape`) instead of on stderr."""
    raw_NQD = np.full(
        (len(images), len(description.scales), network.dim(description.layer)), np.nan, np.float32
    )
    unreadable: dict[int, str] = {}
    for i, result in describe_all(
        network,
        images,
        description,
        batch_size=batch_size,
        workers=workers,
        advance=advance,
        say=say,
    ):
        if not isinstance(result, UnreadableImage):
            raw_NQD[i] = result
        elif keep_going:
            unreadable[i] = str(result)
        else:
            raise UnreadableImage(f"{name(i)}: {result}")
    return raw_NQD, dict(sorted(unreadable.items()))
