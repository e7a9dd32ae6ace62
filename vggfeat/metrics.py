"""The scores that are reported: average precision as the VOC devkit computes it, class recall,
top-k error.

N images, K classes. Everything is a fraction of 1, computed in float64.

Scikit-learn's `average_precision_score` is neither of the devkit's two figures: it has no precision
envelope (a dip in precision is not filled by what follows), and it makes one step of tied scores
instead of ranking them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

APKind = Literal["11point", "allpoint"]
AP_KINDS: tuple[APKind, ...] = ("11point", "allpoint")
# What a figure of the results is called, over all classes and of each class.
FIGURES = {
    "mean_class_recall": "mean class recall",
    "accuracy": "accuracy",
    "map_11point": "mAP (11-point)",
    "map_allpoint": "mAP (area)",
    "map_every_class": "mAP (area), all classes",
}
CLASS_FIGURES = {"recall": "recall", "ap_11point": "AP (11-point)", "ap_allpoint": "AP (area)"}


class MeanAP(NamedTuple):
    """The mean over classes that have an AP, (K,) each class's AP (NaN: none), and which classes
    have none."""

    mean: float
    per_class: NDArray[np.float64]
    without: list[int]


def _ranked_counts(
    scores: ArrayLike, truth: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many positives and how many negatives are among the first 1, 2, … ranked images."""
    scores_N, truth_N = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if scores_N.ndim != 1 or truth_N.shape != scores_N.shape:
        raise ValueError(
            f"scores and truth must both be (N,), not {scores_N.shape} and {truth_N.shape}"
        )
    if np.isnan(scores_N).any():
        raise ValueError("scores hold NaN, which has no rank: leave unreadable images out first")
    if truth_N.dtype == bool or not np.isin(truth_N, (1, -1, 0)).all():
        raise ValueError("truth must be 1 (present), -1 (absent) or 0 (difficult)")
    known = truth_N != 0
    scores_N, truth_N = scores_N[known], truth_N[known]
    # MATLAB's sort(-out) is stable: images with the same score stay in the order of the image list.
    order = np.argsort(-scores_N, kind="stable")
    positive = truth_N[order] > 0
    return np.cumsum(positive, dtype=np.int64), np.cumsum(~positive, dtype=np.int64)


def precision_recall(
    scores: ArrayLike, truth: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall after each image of the ranking, as VOCevalcls.m of the VOC devkit.

    scores: (N,), higher is more confident; tied images keep their given order (MATLAB's sort is
    stable). truth: (N,) of 1 present, -1 absent, 0 difficult; difficult images are taken out of the
    ranking.

    Returns two arrays, as long as there are images that aren't difficult. Recall is NaN without a
    positive. Raises ValueError for other shapes, other truth values, or a NaN score.
    """
    tp, fp = _ranked_counts(scores, truth)
    n_positive = tp[-1] if len(tp) else 0
    recall = tp / n_positive if n_positive else np.full(len(tp), np.nan)
    return tp / (tp + fp), recall


def average_precision(scores: ArrayLike, truth: ArrayLike, kind: APKind = "allpoint") -> float:
    """Average precision of one class, by the VOC devkit's arithmetic; NaN when no image is
    positive.

    scores, truth: as in `precision_recall`, which also says what is raised.
    kind: "11point" (devkit of 2007): the mean over recall t = 0, 0.1, … 1 of the best precision at
        recall >= t; "allpoint" (VOCap.m, 2010 on): the area under the falling precision envelope.
    """
    if kind not in AP_KINDS:
        raise ValueError(f"kind of average precision must be 11point or allpoint, not {kind!r}")
    tp, fp = _ranked_counts(scores, truth)
    if len(tp) == 0 or tp[-1] == 0:
        return float("nan")
    # The best precision from each rank on: precision at recall >= that rank's recall.
    envelope = np.maximum.accumulate((tp / (tp + fp))[::-1])[::-1]
    if kind == "11point":
        # recall >= t is asked in whole numbers, 10 tp >= k positives. In floats, t = 3 * 0.1 lies
        # above 0.3, and NumPy and MATLAB round other members of 0:0.1:1 differently, so that a
        # ranking which reaches a recall of exactly t would or would not count it, by rounding
        # alone. Recall never falls, so the first such rank decides.
        first = np.searchsorted(10 * tp, np.arange(11) * tp[-1], side="left")
        return float(envelope[first].sum() / 11)
    recall = np.concatenate(([0.0], tp / tp[-1]))
    return float((np.diff(recall) * envelope).sum())


def mean_average_precision(
    scores_NK: ArrayLike, truth_NK: ArrayLike, kind: APKind = "allpoint"
) -> MeanAP:
    """Mean average precision over the classes that have a positive image; the others are named.

    scores_NK, truth_NK: (N, K); each column as in `precision_recall`. The mean is NaN when no
    class has an AP.
    """
    scores, truth = np.asarray(scores_NK), np.asarray(truth_NK)
    if scores.ndim != 2 or scores.shape != truth.shape:
        raise ValueError(
            f"scores and truth must both be (N, K), not {scores.shape} and {truth.shape}"
        )
    per_class = np.array(
        [average_precision(scores[:, k], truth[:, k], kind) for k in range(scores.shape[1])]
    )
    has_one = ~np.isnan(per_class)
    mean = float(per_class[has_one].mean()) if has_one.any() else float("nan")
    return MeanAP(mean, per_class, [int(k) for k in np.flatnonzero(~has_one)])


def _labels(name: str, values: ArrayLike, n: int | None = None) -> NDArray[np.integer]:
    labels = np.asarray(values)
    if labels.ndim != 1 or labels.size == 0 or (n is not None and len(labels) != n):
        wanted = "(N,) with N > 0" if n is None else f"({n},)"
        raise ValueError(f"{name} must be {wanted}, not {labels.shape}")
    return labels


def accuracy(pred: ArrayLike, truth: ArrayLike) -> float:
    """Share of images whose predicted label is the true one. Both (N,); ValueError when empty or
    unequal.
    """
    truth_N = _labels("truth", truth)
    return float((_labels("pred", pred, len(truth_N)) == truth_N).mean())


def class_recalls(pred: ArrayLike, truth: ArrayLike, n_classes: int) -> NDArray[np.float64]:
    """Share of each class's images that are predicted as that class: (n_classes,), NaN for absent
    classes.

    pred, truth: (N,) integers; truth within 0 … n_classes - 1, else ValueError.
    """
    truth_N = _labels("truth", truth)
    pred_N = _labels("pred", pred, len(truth_N))
    if truth_N.min() < 0 or truth_N.max() >= n_classes:
        raise ValueError(
            f"truth must lie within 0 … {n_classes - 1}: leave unknown labels out first"
        )
    images = np.bincount(truth_N, minlength=n_classes)
    right = np.bincount(truth_N[pred_N == truth_N], minlength=n_classes)
    recalls = np.full(n_classes, np.nan)
    np.divide(right, images, out=recalls, where=images > 0)
    return recalls


def mean_class_recall(pred: ArrayLike, truth: ArrayLike, n_classes: int) -> float:
    """Mean of `class_recalls` over the classes that occur in truth: the Caltech score."""
    return float(np.nanmean(class_recalls(pred, truth, n_classes)))


def tells(k: int, classes: int) -> bool:
    """Whether a top-k error says anything: among k classes or fewer it is 0 for every net, whatever
    it knows.
    """
    return k < classes


def error_text(error: float | None) -> str:
    """An error in per cent as it is printed; "-" for None, one that tells nothing (see `tells`)."""
    return "-" if error is None else f"{error:.2f}"


def top_k_wrong(scores_NK: ArrayLike, truth: ArrayLike, k: int = 5) -> NDArray[np.bool_]:
    """(N,): whether an image's true class is not among the k best scored.

    scores_NK: (N, K). truth: (N,) in 0 … K-1. Tied classes rank in their own order, so that a
    constant score doesn't count as right for every class. ValueError for other shapes, labels out
    of range, NaN, or k < 1.
    """
    scores, truth_N = np.asarray(scores_NK), _labels("truth", truth)
    if scores.ndim != 2 or len(scores) != len(truth_N):
        raise ValueError(f"scores must be (N, K) with N = {len(truth_N)}, not {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN, which has no rank: leave unreadable images out first")
    if truth_N.min() < 0 or truth_N.max() >= scores.shape[1]:
        raise ValueError(
            f"truth must lie within 0 … {scores.shape[1] - 1}: leave unknown labels out first"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    own = np.take_along_axis(scores, truth_N[:, None], axis=1)  # (N, 1)
    tied_before = (scores == own) & (np.arange(scores.shape[1]) < truth_N[:, None])
    ranks: NDArray[np.int64] = ((scores > own) | tied_before).sum(axis=1)
    return ranks >= k
