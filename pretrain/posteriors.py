"""Class posteriors of whole images as Sect. 3.2 takes them: dense or multi-crop, several Q, several
nets; or of a central crop, as Sect. 4.1 does once.

N images, Q test scales, K classes, H, W height and width. A posterior is kept for each net, mode
and Q; everything that the paper averages (mirror and positions first; then Q, modes, nets) is an
average of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.kept import KeptPosteriors, Posteriors
from pretrain.recipe import CLASSIFICATION, UNKNOWN, Recipe, history_of, identity
from pretrain.tables import RELEASED, paper_scales
from vggfeat import datasets
from vggfeat.batches import by_shape
from vggfeat.checked import fitted, parse_json
from vggfeat.datasets import Items, imagenet
from vggfeat.decode import expected_shape, read_rgb
from vggfeat.describe import describe
from vggfeat.devices import BATCH_SIZE
from vggfeat.errors import UnreadableImage, VggfeatError, reason
from vggfeat.images import grid_crops, mirror
from vggfeat.ranks import Ranks
from vggfeat.sources import OXFORD
from vggfeat.weights import Network, trained_at
from vggfeat.writer import stamp

GRID = 5  # a side: 50 crops a scale with their mirror images


@torch.inference_mode()
def dense(network: Network, images_NHWC: Tensor) -> Tensor:
    """Posteriors (N, K) float32: the score map's mean over positions, softmax, mean with the mirror
    image's.

    images_NHWC: uint8 RGB of one shape. The mean of the score map is fc8 of the mean fc7
    descriptor, which is what extraction computes; only the softmax stands between the two views.
    """
    views_VHWC = torch.cat([images_NHWC, mirror(images_NHWC)])
    scores_VK = network.scores(describe(network, views_VHWC, "fc7", mirror=False))
    return scores_VK.softmax(1).view(2, -1, scores_VK.shape[1]).mean(0)


@torch.inference_mode()
def crops(network: Network, images_NHWC: Tensor, batch_size: int) -> Tensor:
    """Posteriors (N, K) float32: mean of the softmax over a 5x5 grid of crops and their mirror
    images.

    images_NHWC: uint8 RGB of one shape, on the device: the crops are cut there. batch_size: crops
    at once.
    """
    grid_NHWC = grid_crops(images_NHWC, network.vgg().crop, GRID).flatten(0, 1)  # 25 x N
    views_NHWC = torch.cat([grid_NHWC, mirror(grid_NHWC)])
    posteriors = [
        network.crop_scores_of(part).float().softmax(1)
        for part in torch.split(views_NHWC, batch_size)
    ]
    return torch.cat(posteriors).view(2 * GRID * GRID, len(images_NHWC), -1).mean(0)


@torch.inference_mode()
def centre(network: Network, images_NHWC: Tensor) -> Tensor:
    """Posteriors (N, K) float32 of the central crop, without its mirror image: what a training's
    own errors are of (`readers.CentreCrops`).

    images_NHWC: uint8 RGB of one shape.
    """
    (crop_NHWC,) = grid_crops(images_NHWC, network.vgg().crop, n=1)
    return network.crop_scores_of(crop_NHWC).float().softmax(1)


def fitting_scales(
    network: Network, scales: Sequence[int], modes: Sequence[str]
) -> tuple[int, ...]:
    """The Q to evaluate a net at: those given, or the net's own; of a central crop alone, the one
    Q of Table 3. Raises VggfeatError for a net or Q that can't be.
    """
    crop = network.vgg("evaluation needs its score map").crop
    if network.layers[-1] != "fc8":
        raise VggfeatError(
            f"{network.spec} has no usable class scores: its weights (finite ones) reach"
            f" {network.layers[-1]}; give weights of the whole net"
        )
    if network.boxes:
        raise VggfeatError(
            f"{network.spec} says boxes, not classes: give weights of a net of classes;"
            " `python -m pretrain.localise --weights` takes those of boxes"
        )
    chosen = tuple(scales) or own_scales(network, tuple(modes) != ("centre",))
    if len(set(chosen)) != len(chosen):
        raise VggfeatError(f"scales {chosen} must be different numbers")
    if min(chosen) < crop:
        raise VggfeatError(
            f"Q={min(chosen)} is smaller than the crop of {crop} that {network.spec} was trained on"
        )
    return chosen


def measure(
    network: Network,
    items: Items,
    scales: Sequence[int],
    modes: Sequence[str],
    ranks: Ranks,
    *,
    batch_size: int | None = None,
    workers: int = 2,
    advance: Callable[[float, int], None] = lambda done, total: None,
) -> tuple[Posteriors, dict[int, str], np.ndarray]:
    """A net's posteriors of all items, row -> reason of unreadable ones, and the CRC-32 of each
    item's file, (N,).

    Complete in the first process. The checksum of an unreadable image is 0.

    Each process takes its part of the images; an image is decoded once for all scales and modes.
    """
    low, high = ranks.share(0, len(items))
    at_once = batch_size or BATCH_SIZE[network.device.type]
    K = network.vgg().num_classes
    mine_QMNK = np.full((len(scales), len(modes), high - low, K), np.nan, np.float32)
    failures: dict[int, str] = {}
    crc32 = np.zeros(high - low, np.uint32)
    done = 0.0

    def read(i: int) -> np.ndarray:
        pixels = read_rgb(items.source(i))
        try:
            crc32[i - low] = stamp(items.source(i))[3]
        except OSError as error:  # gone meanwhile
            raise UnreadableImage(reason(error)) from error
        return pixels

    def compute(images_NHWC: Tensor) -> Tensor:
        of_mode = {
            "dense": lambda: dense(network, images_NHWC),
            "crops": lambda: crops(network, images_NHWC, at_once),
            "centre": lambda: centre(network, images_NHWC),
        }
        return torch.stack([of_mode[mode]() for mode in modes], 1)  # (N, modes, K)

    def count(images: float) -> None:
        nonlocal done
        done += images
        advance(done, high - low)

    described = by_shape(
        read,
        lambda i: expected_shape(items.source(i)),
        range(low, high),
        scales,
        compute,
        network.device,
        filter=network.filter,
        batch_size=batch_size,
        workers=workers,
        advance=count,
    )
    for i, s, result in described:
        if isinstance(result, UnreadableImage):
            failures[i] = str(result)
            mine_QMNK[:, :, i - low] = np.nan
            crc32[i - low] = 0
        else:
            mine_QMNK[s, :, i - low] = result
    all_QMNK = ranks.collect(mine_QMNK, axis=2)
    for others in ranks.gather(failures):
        failures |= others
    kept = {mode: all_QMNK[:, m] for m, mode in enumerate(modes)}
    posteriors = Posteriors(facts_of(network), tuple(scales), kept)
    return posteriors, dict(sorted(failures.items())), ranks.collect(crc32, axis=0)


def facts_of(network: Network) -> dict[str, str]:
    """What is kept of a net beside its posteriors: `FACTS`."""
    return {
        "net": network.name,
        "train_scale": network.metadata.get("train_scale", ""),
        "crop": str(network.vgg().crop),
        **how_trained(network.metadata),
        "weights": network.spec,
        "fingerprint": network.fingerprint,
        "pool": network.vgg().pool,
        "precision": network.precision,
    }


def how_trained(metadata: dict[str, str]) -> dict[str, str]:
    """Which layers learned last, of which recipe, for how many epochs in all its stages, on which
    images.

    changes: what is not the recipe's own, one a line (`recipe.identity`). "" is unknown: all of it,
    unless we or the paper's authors trained the net.
    """
    facts = dict.fromkeys(
        ("learn", "task", "recipe", "changes", "stands_for", "seed", "epochs", "training_set"), ""
    )
    source = metadata.get("source", "")
    if source in OXFORD.values():
        # they learned by the paper's recipe, which doesn't tell for how long
        S = metadata.get("train_scale", "")
        return facts | {
            "learn": "all",
            "task": CLASSIFICATION,
            "recipe": "paper",
            "changes": RELEASED,
            "stands_for": S,
            "seed": "0",
        }
    where = "the metadata's recipe"
    try:
        recipe: Recipe = fitted(parse_json(metadata.get("recipe") or "{}", where), Recipe, where)
        stage = source.removeprefix(f"pretrain {recipe.name} ")
        told = identity(recipe, stage)
        past = history_of(metadata)
        past = () if UNKNOWN in past else past  # nothing is made up
    except VggfeatError:  # of another program, or a file of one's own before its numbers were kept
        return facts
    names = [each.name for each in recipe.stages]
    number = names.index(stage)
    changes = [*told.changes]
    chain = [
        each.stage
        + (f" of {each.recipe}" if each.recipe != recipe.name else "")
        + (f" of seed {each.seed}" if each.seed != recipe.seed else "")
        for each in past
    ]
    if past and chain != [names[place] for place in recipe.path(number)]:
        changes.append(f"chain={' > '.join(chain)}")
    return {
        "learn": recipe.stages[number].learn,
        "task": recipe.stages[number].task,
        "recipe": told.recipe,
        "changes": "\n".join(changes),
        "stands_for": told.stands_for,
        "seed": str(recipe.seed),
        "epochs": f"{sum(each.epochs for each in past):.2f}" if past else "",
        "training_set": " ".join(dict.fromkeys(each.training_set for each in past)),
    }


def images_of(root: Path, split: str, limit: int) -> Items:
    """The images of one split of ImageNet's layout (`imagenet`); "test" is a flat folder without
    labels.

    limit: at most so many images, evenly spread over the split; 0 for all. Raises VggfeatError:
    another layout.
    """
    if split == "test":
        base = imagenet.with_parts(root, ["test"])
        tests = base / imagenet.part_folders(base, wanted=["test"]).get("test", "test")
        items = datasets.load("folder", tests)
        if items.labels is not None:
            raise VggfeatError(
                f"{tests} has class folders: the test images are expected in it directly"
            )
        rows = np.arange(len(items))
    else:
        items = datasets.load("imagenet", root)
        if split not in items.splits:
            raise VggfeatError(
                f"no folder {(root / split).absolute()}: expected {split}/CLASS/IMAGE"
            )
        rows = items.splits[split]
    if 0 < limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(np.int64)]
    return replace(items.take(rows), splits={})


def evaluate(
    networks: Iterable[Network],
    scales: Sequence[int],
    modes: Sequence[str],
    items: Items,
    split: str,
    ranks: Ranks,
    *,
    batch_size: int | None,
    workers: int,
    advance: Callable[[float, int], None],
) -> KeptPosteriors:
    """`measure` for one net after another, matched by class with the data and with each other.

    scales: Q for all nets; none: each net's own (`fitting_scales`).
    """

    def kept(network: Network) -> KeptPosteriors:
        own = fitting_scales(network, scales, modes)
        classes = imagenet_synsets(network.classes or [])
        order = class_order(network, items.classes)
        labels = np.full(len(items), -1) if items.labels is None else np.array(order)[items.labels]
        net, failures, crc32 = measure(
            network,
            items,
            own,
            modes,
            ranks,
            batch_size=batch_size,
            workers=workers,
            advance=advance,
        )
        folder = items.root.absolute().name
        return KeptPosteriors(
            items.dataset, folder, split, items.names, labels, classes, failures, [net], crc32
        )

    return KeptPosteriors.joined((network.spec, kept(network)) for network in networks)


def own_scales(network: Network, multi: bool) -> tuple[int, ...]:
    """Q of Sect. 4 for the S that the weights were trained at; weights that don't say it count as S
    = 8/7 crop.
    """
    crop = network.vgg().crop
    S = trained_at(network.metadata.get("train_scale", "")) or (crop * 8 // 7,) * 2
    return paper_scales(S, crop, multi)


def class_order(network: Network, classes: Sequence[str]) -> list[int]:
    """For each class of the data, the net's output for it. Raises VggfeatError where the two can't
    be matched.

    Nets of ImageNet's 1,000 classes name them in words; they are matched by synset, in the order of
    sorted ids.
    """
    names = network.classes
    if names is None:
        raise VggfeatError(
            f"{network.spec} doesn't name its classes, so they can't be matched with the data's"
        )
    synsets = imagenet_synsets(names)
    for own in (names, synsets):
        place = {name: i for i, name in enumerate(own)}
        if len(place) == len(names) and all(name in place for name in classes):
            return [place[name] for name in classes]
    unknown = [name for name in classes if name not in names and name not in synsets]
    raise VggfeatError(
        f"{network.spec} doesn't know {len(unknown)} of the data's {len(classes)} classes, such as"
        f" {unknown[0]!r}"
        if unknown
        else f"{network.spec} names several classes alike: they can't be matched"
    )


def imagenet_synsets(names: Sequence[str]) -> list[str]:
    """Synset ids of ILSVRC's classes where `names` are torchvision's words for them in that order;
    else names.
    """
    from timm.data.imagenet_info import ImageNetInfo
    from torchvision.models import VGG16_Weights

    if list(names) == list(VGG16_Weights.IMAGENET1K_V1.meta["categories"]):
        info: Any = ImageNetInfo("imagenet-1k")  # untyped
        return list(info.label_names())
    return list(names)
