"""Ridge classification of frozen descriptors: least squares on targets 1 and -1, a scikit-learn
estimator.

N images, D descriptor length, P problems (a class, one against the rest). The objective is
    0.5 |w|^2 + 0.5 C sum_i r_i (t_i - w x_i - b)^2
with r_i the sample's weight, times its class's; the intercept b is free. It is that of
scikit-learn's RidgeClassifier with alpha = 1 / C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve

from vggfeat.linear import LinearClassifier, both_signs, positive
from vggfeat.matrix import Matrix, row_blocks


@dataclass
class _Solution:
    """coef: (P, D); intercept, gap: (P,). One step, and exact."""

    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    gap: NDArray[np.float64]
    steps: int = 1


class RidgeClassifier(LinearClassifier):
    """A ridge regression onto 1 and -1 for each class (one label an image) or for each of several
    labels an image.

    Parameters
    ----------
    C: weight of the errors against the norm, 1 / alpha of scikit-learn; larger fits closer.
    class_weight: a class's factor on the C of its images, {label: factor}; "balanced": n_samples /
    (n_classes n_k). For several labels an image each class is a problem of two: {1: of the images
    that have it, -1: of the others}, and "balanced" gives both sides of it the same weight.

    Fitted attributes
    -----------------
    coef_: (K, D); intercept_: (K,). For two classes K is 1, as in scikit-learn.
    classes_: the sorted labels; for several labels an image, 0 … K-1.
    multilabel_: whether y was (N, K).
    degenerate_classes_: problems that lack positives or negatives. Their score is constant: -1
    without positives, +1 without negatives.
    n_iter_, converged_: 1, True. n_features_in_: D.

    Notes
    -----
    Deterministic, float64. Reads X in blocks of rows. Memory: 16 D^2 bytes; where N < D instead
    16 N^2, and X as float64.
    """

    solver = "cholesky"
    tol = 1e-5
    _name, _certain = "a ridge regression", 1.0

    def __init__(self, C: float = 1.0, class_weight: dict[Any, float] | str | None = None) -> None:
        self.C = C
        self.class_weight = class_weight

    def fit(
        self, X: ArrayLike | Matrix, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> RidgeClassifier:
        """Fit on X (N, D) and y: (N,) labels, or (N, K) of 1 present, -1 absent, 0 left out for
        that class. Raises ValueError as `LinearSVM.fit`.
        """
        positive("C", self.C)
        X_ND, targets_NP, weights_N, weights_NP = self._read(X, y, sample_weight)
        weights_NP = np.broadcast_to(weights_NP, targets_NP.shape) * (targets_NP != 0)
        present = weights_N > 0
        solved = np.flatnonzero(both_signs(targets_NP[present]))
        coef, intercept = np.zeros((len(solved), X_ND.shape[1])), np.zeros(len(solved))
        # problems with the same weights share a factorisation
        same: dict[bytes, list[int]] = {}
        for place, p in enumerate(solved):
            same.setdefault(weights_NP[:, p].tobytes(), []).append(place)
        for places in same.values():
            own = solved[places]
            r_N = weights_NP[:, own[0]]
            by = _by_images if (r_N > 0).sum() < X_ND.shape[1] else _by_features
            coef[places], intercept[places] = by(X_ND, r_N, targets_NP[:, own], 1 / self.C)
        self._set(_Solution(coef, intercept, np.zeros(len(solved))), targets_NP, present)
        return self


def _by_features(
    X_ND: Matrix, r_N: NDArray[np.float64], T_NP: NDArray[np.int8], alpha: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """coef (P, D) and intercept (P,) by the features' second moment, centred."""
    mean_D, mean_P = _means(X_ND, r_N, T_NP)
    D = X_ND.shape[1]
    second_DD, first_DP = np.zeros((D, D)), np.zeros((D, T_NP.shape[1]))
    for rows in row_blocks(*X_ND.shape):
        x = np.asarray(X_ND[rows], dtype=np.float64) - mean_D
        weighted = r_N[rows, None] * x
        second_DD += x.T @ weighted
        first_DP += weighted.T @ (T_NP[rows] - mean_P)
    second_DD[np.diag_indices(D)] += alpha
    coef = cho_solve(cho_factor(second_DD, overwrite_a=True), first_DP).T
    return coef, mean_P - coef @ mean_D


def _by_images(
    X_ND: Matrix, r_N: NDArray[np.float64], T_NP: NDArray[np.int8], alpha: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same by the images' products with each other."""
    mean_D, mean_P = _means(X_ND, r_N, T_NP)
    used = np.flatnonzero(r_N > 0)
    root = np.sqrt(r_N[used, None])
    x = root * (np.asarray(X_ND[used], dtype=np.float64) - mean_D)
    products = x @ x.T
    products[np.diag_indices(len(used))] += alpha
    dual = cho_solve(cho_factor(products, overwrite_a=True), root * (T_NP[used] - mean_P))
    coef = dual.T @ x
    return coef, mean_P - coef @ mean_D


def _means(
    X_ND: Matrix, r_N: NDArray[np.float64], T_NP: NDArray[np.int8]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(D,) and (P,) weighted means."""
    total = np.zeros(X_ND.shape[1])
    for rows in row_blocks(*X_ND.shape):
        total += r_N[rows] @ np.asarray(X_ND[rows], dtype=np.float64)
    return total / r_N.sum(), r_N @ T_NP / r_N.sum()
