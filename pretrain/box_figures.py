"""The figures of boxes: localisation errors of nets beside those of constants, and a page that
draws what was said and what is true (Appendix A).

N images, C predictions for each, the likeliest class first; K classes. Boxes are corners in pixels
of the image as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pretrain.boxes import CORRECT, iou
from pretrain.figures import told_apart
from vggfeat.checked import first_few
from vggfeat.datasets import Items
from vggfeat.datasets.boxes import Boxes
from vggfeat.decode import expected_shape, read_rgb
from vggfeat.errors import UnreadableImage
from vggfeat.metrics import error_text, tells
from vggfeat.page import Outlined, Section, html, join, outlined, page, table, thumbnail
from vggfeat.results import images

STRICT = 0.75  # of an IoU: a second column, as in COCO's figures
PICTURES = 24  # on the page: of the worst, and of the best
SIDE = 208  # of one, in pixels


@dataclass(frozen=True)
class Truth:
    """What is true of N images. labels_N: the class of each, -1 unknown. boxes: with `rows_M` of
    these images and `labels_M` of the same classes.
    """

    labels_N: np.ndarray
    boxes: Boxes

    @property
    def judged(self) -> np.ndarray:
        """(N,) bool: the images that an error is of, those with a true box of their class."""
        own = self.boxes.labels_M == self.labels_N[self.boxes.rows_M]
        judged = np.zeros(len(self.labels_N), bool)
        judged[self.boxes.rows_M[own]] = True
        judged &= self.labels_N >= 0
        return judged

    def overlap(self, labels_NC: np.ndarray, corners_NC4: np.ndarray) -> np.ndarray:
        """(N, C): the IoU of each predicted box with the true box of its class that it fits best; 0
        where the image has none.
        """
        rows = self.boxes.rows_M
        each_MC = iou(corners_NC4[rows], self.boxes.corners_M4[:, None])[..., 0]
        each_MC[labels_NC[rows] != self.boxes.labels_M[:, None]] = 0
        found = np.zeros(labels_NC.shape)
        np.maximum.at(found, rows, each_MC)
        return found

    def named_as(self, order: Sequence[int]) -> Truth:
        """The same with other numbers for the classes: order[k] for k."""
        place = np.array([*order, -1])  # the last is what is unknown
        boxes = replace(self.boxes, labels_M=place[self.boxes.labels_M])
        return Truth(place[self.labels_N], boxes)


@dataclass(frozen=True)
class Located:
    """Where nets, one or several together, or a constant, say that things are in N images.

    nets: facts of each; none of a constant. scales: Q of each. classes: K names. labels_NC: of
    them, the likeliest first; the true one alone by protocol 1, -1 where it is unknown.
    corners_NC4: NaN where an image is unreadable. ratings_NC: of each box, 0 to 1. name: of a
    constant. told_by: by protocol 2, what told the classes; unlike: in what its merging isn't the
    default one.
    """

    nets: list[dict[str, str]]
    scales: list[tuple[int, ...]]
    classes: list[str]
    labels_NC: np.ndarray
    corners_NC4: np.ndarray
    ratings_NC: np.ndarray
    name: str = ""
    told_by: str = ""
    unlike: tuple[str, ...] = ()

    def wrong(self, truth: Truth, k: int = 1, above: float = CORRECT) -> np.ndarray:
        """(N,) bool: none of the first k predictions has the right class and an IoU above that with
        a true box of it. So are images that are unreadable, and those that aren't `truth.judged`.

        Of protocol 1, k is 1. Source: A.2.
        """
        overlap_NC = truth.overlap(self.labels_NC, self.corners_NC4)
        right = (self.labels_NC == truth.labels_N[:, None]) & (overlap_NC > above)
        wrong: np.ndarray = ~(right[:, :k].any(1) & truth.judged)
        return wrong


def constants(
    found: Located, sizes_N2: np.ndarray, shares: Mapping[int, np.ndarray]
) -> list[Located]:
    """What is said without looking at the images: for the classes and images of `found`, the whole
    image, and the mean boxes of training images.

    sizes_N2: height and width. shares: class -> (n, 4) boxes of training images as shares of
    width and height; {}: no such boxes are known. A class without one has the mean of all.
    """
    frames_N4 = np.tile(sizes_N2[:, ::-1], 2).astype(np.float64)
    unseen = np.isnan(found.corners_NC4).all((1, 2))
    said = {"the whole image": np.tile([0.0, 0, 1, 1], (*found.labels_NC.shape, 1))}
    if shares:
        every = np.concatenate([*shares.values()]).mean(0)
        means_K4 = np.tile(every, (len(found.classes) + 1, 1))
        for label, boxes in shares.items():
            means_K4[label] = boxes.mean(0)
        said["the mean box"] = np.tile(every, (*found.labels_NC.shape, 1))
        said["the class's mean box"] = means_K4[found.labels_NC]
    return [
        replace(
            found,
            nets=[],
            scales=[],
            name=name,
            corners_NC4=np.where(unseen[:, None, None], np.nan, share_NC4 * frames_N4[:, None]),
            ratings_NC=np.ones(found.labels_NC.shape),
        )
        for name, share_NC4 in said.items()
    ]


def shares_of(boxes: Boxes, items: Items) -> dict[int, np.ndarray]:
    """Class -> (n, 4): its boxes as shares of their images' width and height, where headers tell
    them.
    """
    sizes = {int(row): expected_shape(items.source(int(row))) for row in np.unique(boxes.rows_M)}
    found: dict[int, list[np.ndarray]] = {}
    for row, label, corners in zip(boxes.rows_M, boxes.labels_M, boxes.corners_M4, strict=True):
        if size := sizes[int(row)]:
            found.setdefault(int(label), []).append(corners / np.array([size[1], size[0]] * 2))
    return {label: np.stack(each) for label, each in sorted(found.items())}


def left_out(truth: Truth, items: Items, classes: Sequence[str]) -> list[str]:
    """Sentences: which labelled images no error is of, and which of their classes have no true box
    at all.
    """
    labelled, judged = truth.labels_N >= 0, truth.judged
    without = [items.names[i] for i in np.flatnonzero(labelled & ~judged)]
    bare = np.setdiff1d(truth.labels_N[labelled], truth.labels_N[judged])
    told = []
    if without:
        told.append(
            f"no error is of {len(without):,} of {labelled.sum():,} images, which have no true box"
            f" of their class: {first_few(without, 3)}"
        )
    if len(bare):
        told.append(f"classes without any true box: {first_few([classes[k] for k in bare], 3)}")
    return told


# --- errors ---------------------------------------------------------------------------------------

# Of a protocol: key -> head of its column, k, and the IoU that is too little.
ERRORS = {
    1: {
        "error": (f"error at IoU {CORRECT}, %", 1, CORRECT),
        "strict_error": (f"at IoU {STRICT}, %", 1, STRICT),
    },
    2: {
        "top1_error": ("top-1 error, %", 1, CORRECT),
        "top5_error": ("top-5 error, %", 5, CORRECT),
    },
}


def report(
    protocol: int, found: Sequence[Located], baselines: Sequence[Located], truth: Truth
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The rows of the JSON file; and what is printed, its head first: a row for each net, for all
    together, and for each constant.
    """
    classes = ["top-1, of classes", "top-5, of classes"] if protocol == 2 else []
    heads = [head for head, _, _ in ERRORS[protocol].values()]
    shown = [["nets", "S", "boxes", "learned", "Q", *heads, *classes]]
    rows = []
    names = _names([one for one in found if len(one.nets) == 1])
    for one in [*found, *baselines]:
        figures = _figures(protocol, one, truth)
        used = [",".join(map(str, each)) for each in one.scales]
        rows.append(
            {
                "nets": one.nets,
                "constant": one.name,
                "scales": used,
                "protocol": protocol,
                "classes_told_by": one.told_by,
                "images": int(truth.judged.sum()),
                **figures,
                "per_class": _by_class(protocol, one, truth),
            }
        )
        told = [names[n] for n in _places(one, found)]
        shown.append(
            [
                " + ".join(told) or one.name,
                *(_joined(one.nets, fact) for fact in ("train_scale", "boxes", "learn")),
                " + ".join(used) or "-",
                *(error_text(figures[key]) for key in figures),
            ]
        )
    return rows, shown


def _names(alone: Sequence[Located]) -> list[str]:
    """What a row calls each net: nets of one letter, S, kind of boxes and layers that learned are
    told apart.
    """
    kinds = [{**one.nets[0], "net": _kind(one.nets[0])} for one in alone]
    told = told_apart(kinds)
    return [
        one.nets[0]["net"] + name.removeprefix(kind["net"])
        for one, name, kind in zip(alone, told, kinds, strict=True)
    ]


def _kind(net: Mapping[str, str]) -> str:
    return "/".join((net["net"], net["boxes"], net["learn"]))


def _places(one: Located, found: Sequence[Located]) -> list[int]:
    """Of each of its nets, which of those that stand alone it is."""
    alone = [each.nets[0] for each in found if len(each.nets) == 1]
    return list(range(len(alone))) if len(one.nets) > 1 else [alone.index(n) for n in one.nets]


def _joined(nets: Sequence[Mapping[str, str]], fact: str) -> str:
    return " + ".join(dict.fromkeys(net[fact] or "?" for net in nets)) or "-"


def _figures(protocol: int, one: Located, truth: Truth) -> dict[str, float | None]:
    """Errors in per cent, of the images that are judged; None where one would tell nothing."""
    judged = truth.judged
    if not judged.any():
        keys = [*ERRORS[protocol]]
        return dict.fromkeys(keys)
    figures: dict[str, float | None] = {
        key: 100 * float(one.wrong(truth, k, above)[judged].mean())
        for key, (_, k, above) in ERRORS[protocol].items()
    }
    if protocol == 2:
        unseen = np.isnan(one.corners_NC4).all((1, 2))
        for k in (1, 5):
            right = (one.labels_NC[:, :k] == truth.labels_N[:, None]).any(1) & ~unseen
            error = 100 * float((~right)[judged].mean())
            figures[f"top{k}_class_error"] = error if tells(k, len(one.classes)) else None
    return figures


def _by_class(protocol: int, one: Located, truth: Truth) -> dict[str, Any]:
    """Of each class that is judged: its images, and the errors over them."""
    judged = truth.judged
    wrong = {key: one.wrong(truth, k, above) for key, (_, k, above) in ERRORS[protocol].items()}
    figures = {}
    for label in np.unique(truth.labels_N[judged]):
        own = judged & (truth.labels_N == label)
        errors = {key: 100 * float(each[own].mean()) for key, each in wrong.items()}
        figures[one.classes[label]] = {"images": int(own.sum()), **errors}
    return figures


# --- the page -------------------------------------------------------------------------------------


def write_page(
    protocol: int, one: Located, truth: Truth, items: Items, shown: Sequence[Sequence[str]]
) -> str:
    """A page of the figures, and of what `one` says: images with the true boxes of their class and
    the predicted one, the worst and the best.
    """
    overlap_NC = truth.overlap(one.labels_NC, one.corners_NC4)
    own = one.labels_NC == truth.labels_N[:, None]
    fit = np.where(own, overlap_NC, 0).max(1)
    seen = np.flatnonzero(truth.judged & ~np.isnan(one.corners_NC4).all((1, 2)))
    seen = np.random.default_rng(0).permutation(seen)  # of equals some of each class
    order = seen[np.argsort(fit[seen], kind="stable")]
    half = min(PICTURES, -(-len(order) // 2))
    draw = _drawer(one, truth, items, fit)
    sections = [Section("figures", "Errors", table(shown[0], shown[1:], numbers=range(5, 9)))]
    for key, title, rows in (
        ("worst", "Worst first", order[:half]),
        ("best", "Best first", order[::-1][: min(half, len(order) - half)]),
    ):
        pictures = html(
            '<div class="pictures boxed">{all}</div>', all=join([draw(int(i)) for i in rows])
        )
        about = (
            f"{len(rows)} of {images(len(seen))}, by the IoU of the box that is said for the true"
            " class. True boxes are green, the one that is said is orange and dashed."
        )
        if protocol == 2:
            about += " Where the true class is not among the likeliest, the first one's is drawn."
        sections.append(Section(key, title, pictures, about))
    lead = f"{items.dataset}: {images(int(truth.judged.sum()))} with a true box"
    return page("Localisation", lead, sections)


def _drawer(one: Located, truth: Truth, items: Items, fit: np.ndarray) -> Callable[[int], Any]:
    """Image -> its picture with boxes."""

    def draw(i: int) -> Any:
        label = int(truth.labels_N[i])
        here = (truth.boxes.rows_M == i) & (truth.boxes.labels_M == label)
        places = np.flatnonzero(one.labels_NC[i] == label)
        c = int(places[0]) if len(places) else 0
        said = one.classes[one.labels_NC[i, c]]
        rating = f"{one.ratings_NC[i, c]:.2f}"
        boxes = [Outlined(corners, "true", "true") for corners in truth.boxes.corners_M4[here]]
        boxes.append(Outlined(one.corners_NC4[i, c], "said", f"{said} {rating}"))
        caption = f"{one.classes[label]}: IoU {fit[i]:.2f}"
        if one.labels_NC.shape[1] > 1:
            caption += f", rated {rating}" if len(places) else ", not among the likeliest"
            first = one.classes[one.labels_NC[i, 0]]
            caption += f"; likeliest is {first}" if c or not len(places) else ""
        try:
            pixels = read_rgb(items.source(i))
        except UnreadableImage:  # gone meanwhile
            return outlined(None, (1, 1), (), items.names[i], caption)
        return outlined(thumbnail(pixels, SIDE), pixels.shape[:2], boxes, items.names[i], caption)

    return draw
