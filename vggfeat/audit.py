"""What is wrong with the data themselves, as far as descriptors tell: images that are there twice,
labels that are likely wrong, images that are like no other.

N images, D descriptor length, K classes. Descriptors are rows of length 1 (`aggregate`); a pair's
cosine is their product. Nothing here reads a file: pixels come from a function that is given.

1. Near duplicates. A cosine alone doesn't tell them: in a class of similar pictures the nearest
   neighbours are as near as a cropped copy is elsewhere. So a pair is a candidate by its `ratio`:
   its distance (1 - cosine) against that of one's NEAR-th neighbour (Lowe's test, IJCV 2004, with a
   later neighbour, as a picture may have several copies). Candidates are compared by pixels
   (`agreement`): a copy's details lie where the original's do, a similar picture's don't.
2. Labels. Each image is scored by the ridge regression of all other images, of the descriptors'
   signed square roots, which has a closed form (`_LeaveOneOut`), so nothing learned from the label
   that is judged. How far such scores may be trusted, labels that are swapped here on purpose tell
   (`_threshold`).
3. Odd ones out: images whose nearest neighbours are far for an image of their class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vggfeat.datasets.items import known
from vggfeat.errors import UnreadableImage
from vggfeat.machine import CORES
from vggfeat.matrix import row_blocks

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_PRODUCTS = 1e13  # N^2 D of a search for neighbours: 100,000 images of 1,000 values
NEAR = 10  # the neighbour that a pair's distance is measured against
CLOSEST = 5  # neighbours that may be copies; and those whose mean cosine says how odd an image is
CANDIDATE = 0.6  # the ratio below which pixels are compared
BY_DESCRIPTOR = 0.1  # the ratio that makes duplicates where there are no pixels
MOST_PAIRS = 5000  # that are compared by pixels, of the lowest ratios

SIDE = 32  # of a thumbnail that is compared, in pixels
PARTS = (32, 30, 28, 26)  # of SIDE, what a crop may have left of a picture
BLUR = 3.0  # pixels of a thumbnail: what is smoother than this isn't compared
AGREE, PER_RATIO = 0.65, 0.5  # duplicates agree by AGREE + PER_RATIO * ratio

SWAPPED = 0.05  # of the labels, swapped on purpose in a round
SWAPS, ROUNDS = 500, 20  # rounds go on to so many swapped labels, or so many rounds
PRECISE = 0.9  # share of wrong ones among the likely wrong labels, where the bound is reached
SEEN = 0.5  # share of the swapped labels that a bound on the wrong ones is read at, at least
# Shares of labels, beyond which wrong ones can't be told from those that are hard to predict: the
# bound, and those that scores contradict.
TOO_MANY, CONTRADICTED = 0.15, 0.5
OF_CLASS = 5  # images of a class, from which on its labels are judged
LEAST = 40  # images, likewise
LENGTH = 2048  # of descriptors that labels are judged by; longer ones are projected
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge regression, of which LOO chooses

ODD = 3.0  # deviations beyond its class's median that make an image odd


# Near duplicates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbours:
    """Of each row the k nearest others, best first: rows (N, k), cosines (N, k)."""

    rows: Rows
    cosines: NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """Two images, first < second. ratio: see the module. agreement: of their pixels, -1 to 1; None
    where they weren't compared. mirrored: whether they agree as mirror images. same_file: whether
    their files have one checksum.
    """

    first: int
    second: int
    cosine: float
    ratio: float
    agreement: float | None = None
    mirrored: bool = False
    same_file: bool = False

    @property
    def duplicates(self) -> bool:
        """Whether they are near duplicates; without pixels only the surest are."""
        if self.same_file:
            return True
        if self.agreement is None:
            return self.ratio < BY_DESCRIPTOR
        return self.agreement >= AGREE + PER_RATIO * self.ratio


def neighbours_of(X_ND: NDArray[np.float32], k: int = NEAR, block: int = 2048) -> Neighbours:
    """The k nearest others of each row, by cosine; fewer where there are fewer.

    Memory: 4 block^2 bytes a few times over, and 12 N k. Time: N^2 D multiply-adds in float32, and
    about as much again to look through the N^2 cosines of 512 values.
    """
    N = len(X_ND)
    k = min(k, max(N - 1, 0))
    near, cosines = np.zeros((N, k), np.int64), np.full((N, k), -np.inf, np.float32)
    for start in range(0, N if k else 0, block):
        own = slice(start, min(start + block, N))
        for other in range(0, N, block):
            found = X_ND[own] @ X_ND[other : other + block].T
            if other == start:
                np.fill_diagonal(found, -np.inf)
            if other == 0 and k < found.shape[1]:  # of equals any: later they are told apart
                least = -np.partition(-found, k - 1, axis=1)[:, k - 1 : k]
                row, column = np.nonzero(found >= least)
            else:
                row, column = np.nonzero(found > cosines[own, -1:])
            _merge(near[own], cosines[own], row, other + column, found[row, column])
    return Neighbours(near, np.minimum(cosines, np.float32(1)))


def _merge(
    near_nk: Rows, cosines_nk: NDArray[np.float32], row: Rows, others: Rows, found: NDArray[Any]
) -> None:
    """Put those that were found for rows among their k nearest; of equals the first is nearer."""
    n, k = near_nk.shape
    row = np.concatenate([np.repeat(np.arange(n), k), row])
    others = np.concatenate([near_nk.reshape(-1), others])
    found = np.concatenate([cosines_nk.reshape(-1), found])
    order = np.lexsort((others, -found, row))
    starts = np.searchsorted(row[order], np.arange(n))
    best = order[starts[:, None] + np.arange(k)]
    near_nk[:], cosines_nk[:] = others[best], found[best]


def candidates(
    X_ND: NDArray[np.float32], near: Neighbours, crc32_N: NDArray[np.uint32] | None = None
) -> list[Pair]:
    """Pairs that may be near duplicates, the lowest ratio first. crc32_N: of the images' files, 0
    where unknown.
    """
    N, k = near.rows.shape
    crc32_N = np.zeros(N, np.uint32) if crc32_N is None else crc32_N
    first = np.repeat(np.arange(N), min(k, CLOSEST))
    second = near.rows[:, :CLOSEST].reshape(-1)
    # those of equal rows, which may be more than neighbours are looked at, with the first of them
    _, start, group = np.unique(X_ND, axis=0, return_index=True, return_inverse=True)
    head = start[group.reshape(-1)]
    equal = np.flatnonzero(head != np.arange(N))
    ends = np.hstack([[first, second], [head[equal], equal]])
    low, high = np.unique(np.sort(ends, axis=0), axis=1)
    cosine = np.einsum("nd,nd->n", X_ND[low], X_ND[high], dtype=np.float64)
    far = 1 - near.cosines[:, -1].astype(np.float64) if k else np.ones(N)
    widest = np.maximum(np.maximum(far[low], far[high]), 1e-6)
    # float32 sums are that exact; equal rows are at no distance
    distance = np.where(1 - cosine < 1e-6, 0, 1 - cosine)
    ratio = distance / widest
    chosen = np.flatnonzero(ratio < CANDIDATE)
    chosen = chosen[np.argsort(ratio[chosen], kind="stable")]
    return [
        Pair(
            int(low[i]),
            int(high[i]),
            float(min(cosine[i], 1.0)),
            float(ratio[i]),
            same_file=bool(crc32_N[low[i]] == crc32_N[high[i]] != 0) and cosine[i] > 0.99,
        )
        for i in chosen
    ]


@dataclass(frozen=True)
class Details:
    """What is compared of a picture: its thumbnail without what is smooth, whole, and of other
    sides, which are what a crop of it would look like.
    """

    whole: Floats
    parts: tuple[Floats, ...]


def details_of(rgb_HWC: NDArray[np.uint8]) -> Details:
    """Of an image (H, W, 3)."""
    grey = Image.fromarray(rgb_HWC).convert("L")

    def sharp(side: int) -> Floats:
        small = np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR), np.float64)
        filtered: Floats = small - gaussian_filter(small, BLUR, mode="nearest")
        return filtered

    parts = tuple(map(sharp, PARTS))
    return Details(parts[0], parts)


def agreement(one: Details, other: Details) -> tuple[float, bool]:
    """The highest correlation of a part of one picture and all of the other, or the other way
    around, and whether it is that of mirror images. A picture without details agrees by 0.
    """
    best, mirrored = 0.0, False
    for a, b in ((one, other), (other, one)):
        for part in b.parts:
            for flipped, template in ((False, part), (True, part[:, ::-1])):
                found = _correlation(a.whole, template)
                if found > best:
                    best, mirrored = found, flipped
    return best, mirrored


def _correlation(whole: Floats, part: Floats) -> float:
    """The highest of all places of the part in the whole."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, part.shape)
    flat = windows.reshape(-1, part.size)
    flat = flat - flat.mean(axis=1, keepdims=True)
    template = part.ravel() - part.mean()
    lengths = np.linalg.norm(flat, axis=1) * np.linalg.norm(template)
    # a grey level a pixel is noise
    told = lengths > part.size
    return float(np.max((flat @ template)[told] / lengths[told], initial=0.0))


def compared(
    pairs: Sequence[Pair], pixels: Callable[[int], NDArray[np.uint8] | None]
) -> list[Pair]:
    """Those pairs with the agreement of their pixels, where both images are there; of one file no
    pixels are needed.

    pixels: row -> (H, W, 3), or None; called by several threads.
    """
    rows = sorted({row for p in pairs if not p.same_file for row in (p.first, p.second)})

    def details(row: int) -> Details | None:
        try:
            image = pixels(row)
        except UnreadableImage:
            return None
        return None if image is None else details_of(image)

    with ThreadPoolExecutor(CORES) as threads:
        of_row = dict(zip(rows, threads.map(details, rows), strict=True))
    told = []
    for pair in pairs:
        one, other = of_row.get(pair.first), of_row.get(pair.second)
        if one is not None and other is not None:
            found, mirrored = agreement(one, other)
            pair = replace(pair, agreement=found, mirrored=mirrored)
        told.append(pair)
    return told


def groups_of(pairs: Sequence[Pair]) -> list[list[int]]:
    """The rows that pairs connect, the largest groups first."""
    if not pairs:
        return []
    ends = np.array([(pair.first, pair.second) for pair in pairs])
    rows, place = np.unique(ends, return_inverse=True)
    place = place.reshape(ends.shape)
    graph = coo_array((np.ones(len(ends)), (place[:, 0], place[:, 1])), shape=(len(rows),) * 2)
    _, group = connected_components(graph, directed=False)
    groups = [rows[group == g].tolist() for g in range(group.max() + 1)]
    return sorted(groups, key=lambda members: (-len(members), members))


@dataclass(frozen=True)
class Leak:
    """Of one split: how many images are tested, and the rows of those that have a near duplicate
    among those that are trained on.
    """

    tested: int
    rows: Rows


def parts_of(splits: Mapping[str, Rows], N: int) -> dict[str, NDArray[np.str_]]:
    """Of each split, "" the official one, in which part each row is: "train" (which trains, or
    chooses C), "test", or "". Without test images those of val are tested, as `protocols` has it.
    """
    parts: dict[str, NDArray[np.str_]] = {}
    for prefix in sorted({name.rpartition("/")[0] for name in splits}):
        own = {name.rpartition("/")[2]: rows for name, rows in splits.items()
               if name.rpartition("/")[0] == prefix}  # fmt: skip
        tested = "test" if "test" in own else "val"
        if "train" not in own or tested not in own:
            continue
        part = np.full(N, "", "<U5")
        for name in ("train", "val"):
            part[own.get(name, [])] = "train"
        part[own[tested]] = "test"
        parts[prefix] = part
    return parts


def leaks_of(pairs: Sequence[Pair], parts: Mapping[str, NDArray[np.str_]]) -> dict[str, Leak]:
    """By split. Images of one group are duplicates of each other."""
    groups = groups_of(pairs)
    leaks = {}
    for name, part in parts.items():
        group = np.full(len(part), -1)
        for g, rows in enumerate(groups):
            group[rows] = g
        tested, learned = part == "test", part == "train"
        twins = np.flatnonzero(tested & (group >= 0) & np.isin(group, group[learned]))
        leaks[name] = Leak(int(tested.sum()), twins)
    return leaks


# Labels -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubts:
    """Labels that were judged, the most doubtful first. (M,) each:

    rows: the images. classes: the class that a label says, or of several labels an image the class
    whose label it is. better: the class with the best score among the others (of several labels an
    image the same as `classes`). margins: by how much the scores contradict the label; below 0 they
    agree.
    threshold: from here on labels are likely wrong (infinity: of none that can be said). found:
    share of the labels swapped on purpose that lie beyond. at_most: how many of the labels are
    wrong, at most, if wrong ones look like swapped ones. unjudged: labels of classes with too few
    images.
    """

    rows: Rows
    classes: Rows
    better: Rows
    margins: Floats
    threshold: float
    found: float
    at_most: float
    unjudged: int = 0

    @property
    def likely(self) -> int:
        """How many of them, the first, are likely wrong."""
        return int((self.margins >= self.threshold).sum())


class _LeaveOneOut:
    """Scores of each row by the ridge regression of all other rows.

    Weighted, with an intercept, and the same penalty for all classes: with w_i, and h_i = w_i x_i'
    (X'WX + penalty)^-1 x_i, the score without row i is (score_i - h_i y_i) / (1 - h_i) exactly. In
    the eigenvectors of X'WX every penalty, and every change of a label, costs little.

    X_nD: (n, D). w_n: (n,). Time: 2 n D^2 + 10 D^3 multiply-adds, in float64; memory: 8 n D bytes.
    """

    def __init__(self, X_nD: NDArray[np.floating], w_n: Floats) -> None:
        n, D = X_nD.shape
        mean = w_n @ X_nD / w_n.sum()
        second = np.zeros((D, D))
        for rows in row_blocks(n, D):
            x = X_nD[rows] - mean
            second += x.T @ (w_n[rows, None] * x)
        values, vectors = np.linalg.eigh(second)
        self.values, self.w = np.maximum(values, 0), w_n
        self.z = np.empty((n, D))
        for rows in row_blocks(n, D):
            self.z[rows] = (X_nD[rows] - mean) @ vectors

    def choose_penalty(
        self, first_DP: Floats, mean_P: Floats, targets: Callable[[slice], Floats]
    ) -> None:
        """Keep the one of PENALTIES with the least square error of `scores`.

        first_DP: z'WY of all rows. mean_P: the weighted mean of the targets Y (n, P), of which
        `targets` gives some rows.
        """
        n, D = self.z.shape
        inverses = 1 / (self.values + np.array(PENALTIES)[:, None])
        h = np.empty((len(PENALTIES), n))
        errors = np.zeros(len(PENALTIES))
        for rows in row_blocks(n, D + first_DP.shape[1]):
            z, y, w = self.z[rows], targets(rows), self.w[rows]
            for i, inverse in enumerate(inverses):
                own = w * (np.square(z) @ inverse + 1 / self.w.sum())
                h[i, rows] = np.minimum(own, 1 - 1e-9)
                wrong = z @ (first_DP * inverse[:, None]) + mean_P - y
                errors[i] += (w[:, None] * np.square(wrong / (1 - h[i, rows, None]))).sum()
        best = int(errors.argmin())
        self.inverse, self.h = inverses[best], h[best]

    def scores(self, first_DP: Floats, mean_P: Floats, targets_mP: Floats, rows: Rows) -> Floats:
        """(m, P) of some rows without each itself. targets_mP: those of these rows."""
        h = self.h[rows, None]
        fitted = self.z[rows] @ (first_DP * self.inverse[:, None]) + mean_P
        found: Floats = (fitted - h * targets_mP) / (1 - h)
        return found


def _shortened(X_nD: NDArray[np.floating]) -> NDArray[np.floating]:
    """The same products between rows by fewer values, where there are fewer rows; else, of long
    rows, nearly the same by LENGTH of them.
    """
    n, D = X_nD.shape
    if n < D and n <= LENGTH:
        values, vectors = np.linalg.eigh(X_nD.astype(np.float64) @ X_nD.T)
        exact: Floats = vectors * np.sqrt(np.maximum(values, 0))
        return exact
    if D <= LENGTH:
        return X_nD
    directions = np.random.default_rng(0).standard_normal((D, LENGTH), np.float32)
    short: NDArray[np.floating] = X_nD @ (directions / np.float32(np.sqrt(LENGTH)))
    return short


def _rooted(X_nD: NDArray[np.floating]) -> NDArray[np.floating]:
    """Signed square roots, of length 1, in which no few large values decide (Perronnin et al., ECCV
    2010).
    """
    roots: NDArray[np.floating] = np.sign(X_nD) * np.sqrt(np.abs(X_nD))
    roots /= np.maximum(np.linalg.norm(roots, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return roots


def projected(X_nD: NDArray[np.floating]) -> bool:
    """Whether labels are judged by random projections of the descriptors, for the time it takes."""
    return bool(min(X_nD.shape) > LENGTH)


def doubts(X_ND: NDArray[np.floating], labels: NDArray[np.integer], K: int) -> list[Doubts]:
    """How doubtful labels are: one record; of several labels an image two, first of those that say
    that a class is there, then of those that say it is not.

    X_ND: finite. labels: (N,), -1 unknown; (N, K) of 1, -1, 0. None where there are fewer than
    LEAST images with labels, or fewer than two classes of OF_CLASS images.
    """
    rows = np.flatnonzero(known(labels))
    if len(rows) < LEAST:
        return []
    x, y = _shortened(_rooted(X_ND[rows])), labels[rows]
    found = _of_one_label(x, y, K) if y.ndim == 1 else _of_several(x, y)
    return [replace(each, rows=rows[each.rows]) for each in found]


def _rounds(swaps: int) -> int:
    return min(ROUNDS, -(-SWAPS // max(swaps, 1)))


def _of_one_label(X_nD: NDArray[np.floating], y: NDArray[np.integer], K: int) -> list[Doubts]:
    n = len(y)
    counts = np.bincount(y, minlength=K)
    judged = np.flatnonzero(counts[y] >= OF_CLASS)
    if (counts >= OF_CLASS).sum() < 2:
        return []
    w = n / ((counts > 0).sum() * counts[y])  # each class counts the same
    loo = _LeaveOneOut(X_nD, w)
    sums_DK = np.zeros((X_nD.shape[1], K))
    np.add.at(sums_DK.T, y, w[:, None] * loo.z)
    shares = np.bincount(y, w, K) / w.sum()

    def targets(classes: NDArray[np.integer]) -> Floats:
        return np.where(np.arange(K) == classes[:, None], 1.0, -1.0)

    # rows of z have the weighted mean 0, so the targets' -1 add nothing
    loo.choose_penalty(2 * sums_DK, 2 * shares - 1, lambda part: targets(y[part]))
    absent = counts == 0

    def judge(
        sums: Floats, share: Floats, of: Rows, own: NDArray[np.integer]
    ) -> tuple[Floats, Rows]:
        """Margin and best other class."""
        margin, best = np.empty(len(of)), np.empty(len(of), np.int64)
        for part in row_blocks(len(of), K + X_nD.shape[1]):
            at = np.arange(len(of[part]))
            scores = loo.scores(2 * sums, 2 * share - 1, targets(own[part]), of[part])
            said = scores[at, own[part]]
            scores[:, absent] = -np.inf
            scores[at, own[part]] = -np.inf
            best[part] = scores.argmax(axis=1)
            margin[part] = scores.max(axis=1) - said
        return margin, best

    margins, better = judge(sums_DK, shares, judged, y[judged])
    key, present = np.random.default_rng(0), np.flatnonzero(counts)
    swaps = max(1, round(SWAPPED * len(judged)))
    planted = []
    for _ in range(_rounds(swaps)):
        of = key.choice(judged, swaps, replace=False)
        place = np.searchsorted(present, y[of])
        other = present[(place + key.integers(1, len(present), swaps)) % len(present)]
        sums, share = sums_DK.copy(), shares.copy()
        moved = w[of, None] * loo.z[of]
        np.add.at(sums.T, y[of], -moved)
        np.add.at(sums.T, other, moved)
        np.add.at(share, y[of], -w[of] / w.sum())
        np.add.at(share, other, w[of] / w.sum())
        planted.append(judge(sums, share, of, other)[0])
    order = np.argsort(-margins, kind="stable")
    own = y[judged].astype(np.int64)
    return [
        Doubts(
            judged[order],
            own[order],
            better[order],
            margins[order],
            *_threshold(margins, np.concatenate(planted)),
            unjudged=n - len(judged),
        )
    ]


def _of_several(X_nD: NDArray[np.floating], y: NDArray[np.integer]) -> list[Doubts]:
    n = len(y)
    least = np.minimum((y == 1).sum(axis=0), (y == -1).sum(axis=0))
    classes = np.flatnonzero(least >= OF_CLASS)
    if not len(classes):
        return []
    unjudged = [int((np.delete(y, classes, axis=1) == sign).sum()) for sign in (1, -1)]
    targets = y[:, classes].astype(np.float64)  # an unsure label, 0, is between both
    loo = _LeaveOneOut(X_nD, np.ones(n))
    first, mean = loo.z.T @ targets, targets.mean(axis=0)
    loo.choose_penalty(first, mean, lambda part: targets[part])
    every = np.arange(n)
    scores = loo.scores(first, mean, targets, every)
    there, not_there = targets == 1, targets == -1
    up, down = (
        np.where(mask, scores, 0).sum(axis=0) / mask.sum(axis=0) for mask in (there, not_there)
    )
    # of all classes alike: 1 is the mean of images that have it, -1 of those that don't
    middle, half = (up + down) / 2, np.maximum((up - down) / 2, 1e-9)

    key = np.random.default_rng(0)
    flips = np.maximum(1, np.round(SWAPPED * there.sum(axis=0)).astype(int))
    planted: dict[int, list[Floats]] = {1: [], -1: []}
    for _ in range(_rounds(int(flips.sum()))):
        said = targets.copy()
        for k, count in enumerate(flips):
            for mask in (there, not_there):
                said[key.choice(np.flatnonzero(mask[:, k]), count, replace=False), k] *= -1
        new = loo.scores(loo.z.T @ said, said.mean(axis=0), said, every)
        new = (new - middle) / half
        for sign, kept in planted.items():
            kept.append(-sign * new[(said == sign) & (targets == -sign)])
    scores = (scores - middle) / half
    found = []
    for sign, mask, rest in ((1, there, unjudged[0]), (-1, not_there, unjudged[1])):
        rows, columns = np.nonzero(mask)
        margins = -sign * scores[rows, columns]
        order = np.argsort(-margins, kind="stable")
        own = classes[columns[order]]
        told = _threshold(margins, np.concatenate(planted[sign]))
        found.append(Doubts(rows[order], own, own, margins[order], *told, unjudged=rest))
    return found


def _threshold(margins: Floats, planted: Floats) -> tuple[float, float, float]:
    """`threshold`, `found` and `at_most` of `Doubts`.

    Of the labels that were swapped on purpose a share s(t) lies beyond t; of W wrong ones that look
    like these as many, so beyond t lie n(t) >= W s(t) labels, whence a bound on W for each t, to
    which the deviation of a count n(t) is added. The least is nearly reached where hardly a right
    label lies beyond. If it is reached, PRECISE of the n(t) are wrong as long as W s(t) >= PRECISE
    n(t); the threshold is the lowest such t.
    """
    t = np.sort(margins)[::-1]
    n = np.searchsorted(-t, -t, side="right")  # equal ones lie beyond together
    s = 1 - np.searchsorted(np.sort(planted), t, side="left") / len(planted)
    seen = s >= SEEN
    if not seen.any():
        return np.inf, 0.0, np.inf
    at_most = float(((n[seen] + np.sqrt(n[seen])) / s[seen]).min())
    beyond = np.flatnonzero((at_most * s >= PRECISE * n) & (t > 0))
    hopeless = at_most > TOO_MANY * len(t) or (t > 0).mean() > CONTRADICTED
    if not len(beyond) or hopeless:
        return np.inf, 0.0, at_most
    return float(t[beyond[-1]]), float(s[beyond[-1]]), at_most


# Odd ones out -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """An image like no other. nearness: the mean cosine of its CLOSEST nearest. deviations: how far
    the logarithm of that distance lies beyond the median of its class, in robust standard
    deviations of the class (distances themselves have long tails).
    """

    row: int
    nearness: float
    deviations: float


def odd_ones(near: Neighbours, labels: NDArray[np.integer] | None) -> list[Odd]:
    """The images that lie ODD deviations beyond, the furthest first.

    labels: (N,), or None: the class is then all images; so it is with several labels an image, and
    for classes of fewer than NEAR images.
    """
    N = len(near.rows)
    if N <= NEAR:
        return []
    nearness = near.cosines[:, :CLOSEST].mean(axis=1, dtype=np.float64)
    distance = np.log(np.maximum(1 - nearness, 1e-6))
    group = np.full(N, -1) if labels is None or labels.ndim == 2 else labels.astype(np.int64)
    deviations = np.empty(N)
    for k in np.unique(group):
        own = group == k
        of = distance[own] if k >= 0 and own.sum() >= NEAR else distance
        middle = np.median(of)
        # where most are equal any other would be odd
        spread = max(1.4826 * np.median(np.abs(of - middle)), 0.05)
        deviations[own] = (distance[own] - middle) / spread
    order = np.argsort(-deviations, kind="stable")
    return [
        Odd(int(i), float(nearness[i]), float(deviations[i]))
        for i in order[deviations[order] >= ODD]
    ]
