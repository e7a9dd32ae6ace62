"""What a report shows of images: pictures at random, mistakes, the best of each class, and the map
of the descriptors; which, in which order, and how each becomes a picture.

N images, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from threadpoolctl import threadpool_limits

from vggfeat import datasets
from vggfeat.aggregate import aggregate, fuse
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.machine import cores
from vggfeat.mistakes import Mistake, Ranking, mistakes_of
from vggfeat.page import (
    MOST_BYTES,
    as_uri,
    html,
    overlaid,
    picture,
    tiles,
    transparent,
    within,
    wrapping,
)
from vggfeat.regions import picture_of
from vggfeat.results import Results
from vggfeat.store import Features

if TYPE_CHECKING:
    from vggfeat.model import Model

STRIP = 18  # pictures at the top
WORST = 96  # mistakes with a picture
OF_CLASSES, EACH = 20, 6  # classes whose best pictures are shown, right and wrong ones of each
EXPLAINED = 16, 24  # pictures with evidence: mistakes; and of classes, at least two of each
MAPPED = 800  # descriptors on the map
SIDES = (160, 128, 104, 88, 72, 56)  # of a picture, in pixels: the largest that the bytes allow
TILE_SIDES = (64, 48, 40, 32)  # of one on the map
PICTURE_BYTES, TILE_BYTES = 900_000, 450_000  # of a page: its pictures, and those of the map


@dataclass(frozen=True)
class Shown:
    """A picture to be shown. row: of the feature file. k: the class whose score it is shown for.
    kind: right, wrong or "".
    """

    row: int
    k: int
    caption: Markup
    kind: str = ""


class Found:
    """What the scores tell, in the order in which it is shown: images and mistakes, without the
    pictures.
    """

    def __init__(
        self, results: Results, features: Features, rankings: Mapping[str, Ranking]
    ) -> None:
        self.results, self.features, self.rankings = results, features, rankings
        self.classes = features.classes
        self.name, self.first = next(iter(rankings.items()))
        self.mistakes = mistakes_of(rankings)
        self.one_label = features.labels is not None and features.labels.ndim == 1
        self.parts = len(rankings)
        # row -> how many parts test it
        self.times = Counter(row for part in rankings.values() for row in part.rows.tolist())
        self.of_all = self.name if self.parts == 1 else f"the test parts of {self.parts} splits"
        self.strip = list(self._strip())
        self.worst = self._worst()
        self.by_class = {k: self._best(k) for k in self._hardest()}

    def shown(self) -> list[Shown]:
        """Every picture, the first the most important."""
        best = (shown for right, wrong in self.by_class.values() for shown in (*right, *wrong))
        return [*self.strip, *(shown for shown, _ in self.worst[:WORST]), *best]

    def explained(self) -> list[Shown]:
        """The pictures that get evidence, for the class whose score is told: the worst mistakes,
        and the best right and wrong ones of each class that is shown.
        """
        of_mistakes, of_classes = EXPLAINED
        worst = [shown for shown, _ in self.worst[:of_mistakes]]
        each = max(1, of_classes // (2 * len(self.by_class) or 1))
        sides = (side[:each] for both in self.by_class.values() for side in both)
        return [*worst, *(shown for side in sides for shown in side)]

    def _strip(self) -> Iterator[Shown]:
        """Scored images at random, of each class in turn."""
        ranking = self.first
        order = np.random.default_rng(0).permutation(len(ranking.rows))
        own = ranking.truth.argmax(axis=1)
        turns: dict[int, list[int]] = {}
        for i in order:
            turns.setdefault(int(own[i]), []).append(int(i))
        each = [turns[k] for k in sorted(turns)]
        if len(each) > STRIP:  # classes from all over the list
            each = [each[n * len(each) // STRIP] for n in range(STRIP)]
        deepest = max(map(len, each))
        chosen = [part[n] for n in range(deepest) for part in each if n < len(part)][:STRIP]
        for i in chosen:
            labels = [self.classes[j] for j in np.flatnonzero(ranking.truth[i] == 1)]
            k, kind, caption = int(own[i]), "", ", ".join(labels) or "none of the classes"
            if ranking.predicted is not None:
                right = int(ranking.predicted[i]) == k
                kind = "right" if right else "wrong"
                said = self.classes[int(ranking.predicted[i])]
                caption = f"{labels[0]}, right" if right else f"{labels[0]}, taken for {said}"
            yield Shown(int(ranking.rows[i]), k, wrapping(caption), kind)

    def _worst(self) -> list[tuple[Shown, Mistake]]:
        """Mistakes, the worst first; of an image that several parts have got wrong alike once."""
        parts: dict[tuple[object, ...], list[Mistake]] = {}
        for each in self.mistakes:
            parts.setdefault((each.row, each.labels, each.taken_for), []).append(each)
        found = []
        for alike in parts.values():
            worst = alike[0]
            k = worst.labels[0] if worst.taken_for is None else worst.taken_for
            caption = _told(worst, self.classes)
            if (times := self.times[worst.row]) > 1:
                caption += html(" <span>in {n} of its {t} tests</span>", n=len(alike), t=times)
            caption += html(
                ' <span class="name">{name}</span>', name=wrapping(self.features.names[worst.row])
            )
            found.append((Shown(worst.row, k, caption, "wrong"), worst))
        return found

    def _hardest(self) -> list[int]:
        """At most `OF_CLASSES` of the classes, those with the lowest AP first."""
        order = np.argsort(np.nan_to_num(self.first.aps, nan=2.0), kind="stable")
        return [int(k) for k in order[:OF_CLASSES]]

    def _best(self, k: int) -> tuple[list[Shown], list[Shown]]:
        """The best-scored right and wrong images of a class."""
        ranking = self.first
        chosen = True if ranking.predicted is None else ranking.predicted == k
        found = []
        for kind, value in (("right", 1), ("wrong", -1)):
            best = np.flatnonzero((ranking.truth[:, k] == value) & chosen)
            best = best[np.argsort(-ranking.scores[best, k], kind="stable")][:EACH]
            found.append([self._of_class(int(i), k, kind) for i in best])
        return found[0], found[1]

    def _of_class(self, i: int, k: int, kind: str) -> Shown:
        ranking, classes = self.first, self.classes
        row, score = int(ranking.rows[i]), float(ranking.scores[i, k])
        caption = html("{name} {score:+.2f}", name=wrapping(classes[k]), score=score)
        if kind == "wrong":
            labels = tuple(np.flatnonzero(ranking.truth[i] == 1).tolist())
            own = float(ranking.scores[i, labels[0]]) if self.one_label else None
            caption = _told(Mistake(self.name, row, labels, k, score, own), classes)
        return Shown(row, k, caption, kind)


def _told(mistake: Mistake, classes: Sequence[str]) -> Markup:
    """A mistake in words: each score with the class whose it is."""
    labels = ", ".join(classes[k] for k in mistake.labels[:3]) or "none of the classes"
    said = ""
    if mistake.taken_for is not None:
        said = classes[mistake.taken_for]
    told = ((said, mistake.score), (labels, mistake.label_score))
    scores = [f"{name} {score:+.2f}" for name, score in told if score is not None]
    lines = [*(f"{text}," for text in scores[:-1]), scores[-1]]
    return html(
        "<b>{labels}</b>, {what}; {scores}",
        labels=wrapping(labels),
        what=wrapping(f"taken for {said}" if said else "missed"),
        scores=Markup(" ").join(html("<span>{x}</span>", x=wrapping(text)) for text in lines),
    )


class Overlays:
    """Evidence on the pictures of a report: maps, by row and class, as data URIs; about: how they
    are read; why_none: where there are none.
    """

    def __init__(self) -> None:
        self.maps: dict[tuple[int, int], str] = {}
        self.about = self.why_none = ""

    @classmethod
    def of(
        cls,
        model: Model,
        found: Found,
        items: datasets.Items,
        show: Callable[[float, int, str], None] = lambda done, total, doing: None,
    ) -> Overlays:
        """By a saved classifier, of images that are at hand. show: as of `write_report`."""
        from vggfeat.explain import Explainer

        overlays, place = cls(), {name: i for i, name in enumerate(items.names)}
        try:
            explainer = Explainer(model)
        except VggfeatError as error:
            overlays.why_none = f"the evidence for classes: {error}"
            return overlays
        classes: dict[int, dict[int, None]] = {}  # of each row, in order
        for shown in found.explained():
            classes.setdefault(shown.row, {})[shown.k] = None
        for n, (row, ks) in enumerate(classes.items()):
            show(n, len(classes), "evidence")
            i = place.get(found.features.names[row])
            with suppress(UnreadableImage):  # its picture is missing, too, and that is told
                if i is not None:
                    evidence = explainer(picture_of(items, i), [found.classes[k] for k in ks])
                    for number, k in enumerate(ks):
                        overlays.maps[row, k] = transparent(evidence.heat(number))
                    overlays.about = evidence.sees()
        return overlays


class Pictures:
    """The pictures of the page, each read once: `figure` makes every one that is shown."""

    def __init__(
        self,
        names: Sequence[str],
        small: Mapping[int, Image.Image],
        uses: int,
        overlays: Mapping[tuple[int, int], str] = MappingProxyType({}),
    ) -> None:
        """small: of rows, at most `SIDES[0]` a side. uses: how many pictures are to be shown.
        overlays: `Overlays.maps`.
        """
        self._names, self._small, self._uses, self.overlays = names, small, uses, overlays
        self._uris: dict[int, str] = {}
        self.absent: list[tuple[int, str]] = []  # of how many images, and what is with them
        self.allow(1.0)

    @classmethod
    def of(
        cls,
        features: Sequence[Features],
        items: datasets.Items | None,
        shown: Sequence[Shown],
        mapped: Mapped | None,
        overlays: Mapping[tuple[int, int], str] = MappingProxyType({}),
    ) -> Pictures:
        """Read what is there of them. items: where they are; None: nowhere. overlays: by row and
        class.
        """
        if items is None or not features:
            return cls(features[0].names if features else [], {}, 0)
        names = features[0].names
        due = list(dict.fromkeys(each.row for each in shown))
        place = {name: i for i, name in enumerate(items.names)}
        every = dict.fromkeys([*due, *(mapped.rows.tolist() if mapped else ())])
        small = _read_all(items, {row: place[names[row]] for row in every if names[row] in place})
        pictures = cls(names, small, sum(each.row in small for each in shown), overlays)
        elsewhere = sum(names[row] not in place for row in due)
        gone = sum(row not in small for row in due) - elsewhere
        for n, why in (
            (elsewhere, f"{'is' if elsewhere == 1 else 'are'} not under {items.root}"),
            (gone, "can't be read any more"),
        ):
            if n:
                pictures.absent.append((n, why))
        return pictures

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return bool(self._small)

    def allow(self, share: float) -> None:
        """Begin anew, with a share of the bytes that pictures may take."""
        self._left, self._over, self._uris = PICTURE_BYTES * share, 0, {}
        self._tile_bytes = TILE_BYTES * share
        sample = list(self._small)[:: max(1, len(self._small) // 12)]
        for self._side in SIDES:
            cost_of = [len(as_uri(within(self._small[row], self._side))) for row in sample]
            # of a sample: the others may be larger
            if not sample or self._uses * sum(cost_of) / len(sample) <= 0.9 * self._left:
                break

    def figure(self, shown: Shown, evidence: bool = False) -> Markup:
        """The picture of an image, shown for the score of class k, with its caption; with the
        evidence for that class over it where there is such a map.
        """
        uri = self._uri(shown.row)
        over = self.overlays.get((shown.row, shown.k)) if evidence else None
        name, key = self._names[shown.row], f"{shown.row}/{shown.k}"
        if uri is None or over is None or len(over) > self._left:
            return picture(uri, name, shown.caption, key=key)
        self._left -= len(over)
        return overlaid(uri, over, name, shown.caption, key=key)

    def of_row(self, row: int, caption: str) -> Markup:
        """The picture of an image by its row, without a class whose score it is shown for."""
        return self.figure(Shown(row, -1, wrapping(caption)))

    def _uri(self, row: int) -> str | None:
        """None where the image isn't there, or the page has no room for it."""
        if row not in self._small:
            return None
        if row not in self._uris:
            self._uris[row] = as_uri(within(self._small[row], self._side))
        uri = self._uris[row]
        if len(uri) > self._left:
            self._over += 1
            return None
        self._left -= len(uri)
        return uri

    def too_many(self) -> list[str]:
        """A line, where the page has no room for all of them."""
        if not self._over:
            return []
        size, one = f"{MOST_BYTES / 1e6:.0f} MB", self._over == 1
        what = f"{self._over} thumbnail{'s' * (not one)}"
        return [f"{what}: a page under {size} has no room for {'it' if one else 'them'}"]

    def tiles(self, rows: Sequence[int]) -> dict[str, Any]:
        """Those of a map, in one picture, as the script takes them; {} where there are none."""
        small = [self._small.get(row) for row in rows]
        if not any(small):
            return {}
        for side in TILE_SIDES:
            uri, across = tiles(small, side)
            if len(uri) <= self._tile_bytes:
                return {"tiles": uri, "across": across, "count": len(small)}
        return {}


def _read_all(items: datasets.Items, places: Mapping[int, int]) -> dict[int, Image.Image]:
    """Row -> its picture, made small, of those that can be read. places: of each in `items`."""

    def read(i: int) -> Image.Image | None:
        try:
            return within(Image.fromarray(picture_of(items, i)), SIDES[0])
        except UnreadableImage:
            return None

    with ThreadPoolExecutor(cores()) as pool:
        found = zip(places, pool.map(read, places.values()), strict=True)
        return {row: small for row, small in found if small is not None}


# --- the map --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapped:
    """Descriptors in the plane. rows: of the feature file; xy: (n, 2); groups: the class of each,
    of `names`.
    """

    rows: np.ndarray
    xy: np.ndarray
    groups: np.ndarray
    titles: list[str]
    names: list[str]
    caption: str

    @classmethod
    def of(
        cls, features: Sequence[Features], model: Model | None, results: Results
    ) -> Mapped | None:
        """Of the readable images, or some of them; None of fewer than three."""
        readable = np.flatnonzero(np.logical_and.reduce([file.readable for file in features]))
        if len(readable) < 3:
            return None
        picked = readable
        if len(picked) > MAPPED:
            picked = np.sort(np.random.default_rng(0).choice(readable, MAPPED, replace=False))
        scales: list[tuple[int, ...] | None] = [
            tuple(part.scales) for part in results.made.features
        ]
        scales = [part.scales for part in model.parts] if model else scales
        pool = model.pool if model else results.pool
        X = fuse(
            [
                aggregate(file.read(q, picked), pool, len(file.description.regions))
                for file, q in zip(features, scales or [None] * len(features), strict=True)
            ]
        )
        xy, how = _plane(X)
        first = features[0]
        if first.labels is None:
            groups, names = np.zeros(len(picked), int), ["images"]
        elif first.labels.ndim == 1:
            groups, names = np.maximum(first.labels[picked], 0), first.classes
        else:
            groups, names = (first.labels[picked] == 1).argmax(axis=1), first.classes
        titles = [
            first.names[int(row)] + ("" if first.labels is None else f": {names[g]}")
            for row, g in zip(picked, groups, strict=True)
        ]
        of = f" of {len(readable):,}" if len(picked) < len(readable) else ""
        many = first.labels is not None and first.labels.ndim == 2
        several = " Of an image with several labels the first gives the colour." if many else ""
        caption = f"{how} of {len(picked)}{of} images.{several}"
        return cls(picked, xy, groups, titles, names, caption)


def _plane(X: np.ndarray) -> tuple[np.ndarray, str]:
    """(n, 2) for the eye: principal components, and t-SNE on 50 of them where there are enough
    images.
    """
    from sklearn.decomposition import PCA

    if not np.ptp(X, axis=0).any():  # nothing varies, and all that follows would divide by that
        return np.zeros((len(X), 2)), "The first two principal components"
    few = len(X) < 60
    components = PCA(min(2 if few else 50, *X.shape), random_state=0).fit_transform(X)
    if few or components.shape[1] < 3:
        flat = components[:, :2]
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "The first two principal components"
    from sklearn.manifold import TSNE

    tsne = TSNE(2, perplexity=30 if len(X) > 120 else 10, random_state=0, init="pca")
    with threadpool_limits(1):  # its threads wait for one another in so many short loops
        return tsne.fit_transform(components), "t-SNE, from the first principal components,"
