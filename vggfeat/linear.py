"""What classifiers of frozen descriptors have in common: what labels, weights and settings mean,
and what is done with new images; and of these the linear ones.

N images, D descriptor length, K classes, P problems.
"""

from __future__ import annotations

import warnings
from numbers import Real
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning
from sklearn.utils import check_array
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from vggfeat.matrix import Matrix, row_blocks

FLOATS = (np.float64, np.float32, np.float16)


class Solved(Protocol):
    """What a solver finds: coef (P, D), intercept (P,); gap as a share of the objective; Newton
    steps.
    """

    coef: NDArray[Any]
    intercept: NDArray[Any]
    gap: NDArray[Any]
    steps: Any


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc, unused-ignore]
    """What labels mean at `fit`, and what a fitted classifier does with new images."""

    _name: str  # in messages
    class_weight: dict[Any, float] | str | None
    classes_: NDArray[Any]
    degenerate_classes_: list[int]
    converged_: bool

    def _read(
        self, X: ArrayLike | Matrix, y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[Matrix, NDArray[Any], NDArray[Any], NDArray[Any]]:
        """X (N, D), as it is where it is read by rows, targets (N, P) of 1, -1, 0, weights (N,) and
        with the classes' (N, P).
        """
        X_ND: Matrix
        if read_by_rows(X):
            validate_data(self, X, y, skip_check_array=True)
            y_N = check_array(y, ensure_2d=False, dtype=None, input_name="y", estimator=self)
            check_consistent_length(X, y_N)
            X_ND = X
        else:
            X_ND, y_N = validate_data(
                self, X, y, dtype=FLOATS, ensure_all_finite=False, multi_output=True
            )
        refuse_nan(X_ND)
        weights_N = _check_sample_weight(
            sample_weight, X_ND, dtype=np.float64, ensure_non_negative=True
        )
        targets_NP = self._targets(y_N, weights_N)
        return (
            X_ND,
            targets_NP,
            weights_N,
            weights_N[:, None] * self._class_weights(targets_NP, y_N, weights_N),
        )

    def _class_weights(
        self, targets_NP: NDArray[Any], y: NDArray[Any], weights_N: NDArray[Any]
    ) -> NDArray[np.float64]:
        """(N, P), or (1, 1) without."""
        if self.class_weight is None:
            return np.ones((1, 1))
        if self.multilabel_ and self.class_weight == "balanced":
            positive, negative = (
                np.maximum(weights_N @ (targets_NP == sign), np.finfo(float).tiny)
                for sign in (1, -1)
            )
            half = (positive + negative) / 2
            balanced: NDArray[np.float64]
            with np.errstate(over="ignore"):  # of a sign that isn't there
                balanced = np.where(targets_NP == 1, half / positive, half / negative)
            return balanced
        classes, labels = (
            (np.array([-1, 1]),) * 2 if self.multilabel_ else (self.classes_, y.ravel())
        )
        if self.multilabel_ and not (
            isinstance(self.class_weight, dict) and {*self.class_weight} <= {1, -1}
        ):
            raise ValueError(
                "class_weight must be None, 'balanced' or {1: present, -1: absent} for several"
                f" labels an image, not {self.class_weight!r}"
            )
        weight_K = compute_class_weight(
            self.class_weight,
            classes=classes,
            y=labels,
            sample_weight=None if self.multilabel_ else weights_N,
        )
        if not (np.isfinite(weight_K).all() and (weight_K >= 0).all()):
            raise ValueError(
                f"class_weight must be numbers that are not negative: {self.class_weight!r}"
            )
        if len(weight_K) > 2:
            return self._weights_of_labels(weight_K, targets_NP)
        weights_NP: NDArray[np.float64] = np.where(targets_NP == 1, weight_K[1], weight_K[0])
        return weights_NP

    def _weights_of_labels(
        self, weight_K: NDArray[np.float64], targets_NP: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Factors, of three classes and more: of an image the same for all, (N, 1)."""
        weights_N1: NDArray[np.float64] = weight_K[targets_NP.argmax(axis=1), None]
        return weights_N1

    def _targets(self, y: NDArray[Any], weights_N: NDArray[Any]) -> NDArray[np.int8]:
        self.multilabel_: bool = y.ndim == 2 and not (
            y.shape[1] == 1 and not np.isin(y, (1, -1, 0)).all()
        )
        if self.multilabel_:
            if y.dtype == bool or not np.isin(y, (1, -1, 0)).all():
                raise ValueError(
                    "a y of shape (N, K) must hold 1 (present), -1 (absent) or 0 (left out) only"
                    + (": where it is False give -1" if y.dtype == bool else "")
                )
            self.classes_ = np.arange(y.shape[1])
            targets = y.astype(np.int8)
            if not both_signs(targets[weights_N > 0]).any():
                zeros = (targets == 0).any() and not (targets == -1).any()
                raise ValueError(
                    "no class of y has both a positive (1) and a negative (-1) example"
                    + (": 0 means left out; where a class is absent give -1" if zeros else "")
                )
            return targets
        if y.ndim == 2:
            message = "A column-vector y was passed when a 1d array was expected; it is flattened."
            warnings.warn(message, DataConversionWarning, stacklevel=4)
        labels_N = y.ravel()
        check_classification_targets(labels_N)
        self.classes_ = np.unique(labels_N)
        if len(np.unique(labels_N[weights_N > 0])) < 2:
            which = (
                f", {self.classes_[0]}" if len(self.classes_) == 1 else " with a positive weight"
            )
            raise ValueError(f"y holds one class only{which}: {self._name} needs at least two")
        # two classes have one problem: the second against the first
        positive = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        return np.where(labels_N[:, None] == positive, np.int8(1), np.int8(-1))

    def decision_function(self, X: ArrayLike | Matrix) -> NDArray[np.float64]:
        """Scores of X (N, D): (N, K), or (N,) for two classes, where positive means `classes_[1]`.
        X is an array, or is read by rows, as at `fit`.

        Raises ValueError for NaN, infinity, or another D than at `fit`.
        """
        check_is_fitted(self)
        X_ND: Matrix
        if read_by_rows(X):
            validate_data(self, X, skip_check_array=True, reset=False)
            X_ND = X
        else:
            X_ND = validate_data(self, X, dtype=FLOATS, ensure_all_finite=False, reset=False)
        problems = len(self.classes_) if self.multilabel_ or len(self.classes_) > 2 else 1
        scores = np.empty((X_ND.shape[0], problems))
        bad: list[NDArray[np.int64]] = []
        for rows in row_blocks(*X_ND.shape):
            x = np.asarray(X_ND[rows])
            bad.append(rows.start + _bad_rows(x))
            if not len(bad[-1]):
                scores[rows] = self._scores(x)
        _refuse_rows(np.concatenate(bad), len(scores))
        return scores if self.multilabel_ or scores.shape[1] > 1 else scores[:, 0]

    def _scores(self, x_nD: NDArray[Any]) -> NDArray[np.float64]:
        """(n, P) of some finite rows."""
        raise NotImplementedError

    def predict(self, X: ArrayLike | Matrix) -> NDArray[Any]:
        """The best label of each image, (N,); for several labels an image (N, K) int8 of 1 and
        -1.
        """
        scores = self.decision_function(X)
        if self.multilabel_:
            return np.where(scores > 0, 1, -1).astype(np.int8)
        best = scores.argmax(axis=1) if scores.ndim == 2 else (scores > 0).astype(int)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    def score(
        self, X: ArrayLike | Matrix, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> float:
        """Accuracy; for several labels an image, over all (image, class) pairs whose y isn't 0."""
        check_is_fitted(self)
        if not self.multilabel_:
            return float(super().score(X, y, sample_weight))
        truth = np.asarray(y)
        predicted = self.predict(X)
        if truth.shape != predicted.shape:
            raise ValueError(f"y must be {predicted.shape}, not {truth.shape}")
        weights = (
            np.ones(len(truth)) if sample_weight is None else np.asarray(sample_weight, dtype=float)
        )
        weights = weights[:, None] * (truth != 0)
        return float(np.average(predicted == truth, weights=weights))


class LinearClassifier(Classifier):
    """One whose scores are x w + b."""

    _certain: (
        float  # the score of a class without negatives, and minus that of one without positives
    )
    tol: float
    solver: str
    coef_: NDArray[Any]
    intercept_: NDArray[Any]

    def _read(
        self, X: ArrayLike | Matrix, y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[Matrix, NDArray[Any], NDArray[Any], NDArray[Any]]:
        positive("tol", self.tol)
        return super()._read(X, y, sample_weight)

    def _scores(self, x_nD: NDArray[Any]) -> NDArray[np.float64]:
        scores: NDArray[np.float64]
        scores = x_nD.astype(np.float64, copy=False) @ self.coef_.T + self.intercept_
        return scores

    def _set(self, solution: Solved, targets_NP: NDArray[Any], present: NDArray[Any]) -> None:
        """Fitted attributes; a problem that lacks positives or negatives has a constant score."""
        solved = both_signs(targets_NP[present])
        self.degenerate_classes_: list[int] = np.flatnonzero(~solved).tolist()
        self.coef_ = np.zeros((len(solved), solution.coef.shape[1]))
        self.intercept_ = np.where(
            (targets_NP[present] == 1).any(axis=0), self._certain, -self._certain
        )
        self.coef_[solved], self.intercept_[solved] = solution.coef, solution.intercept
        self.n_iter_: int = int(np.max(solution.steps))
        self.converged_: bool = bool((solution.gap <= self.tol).all())
        if not self.converged_:
            message = (
                f"{self.solver} did not reach tol={self.tol:g}: a gap of {solution.gap.max():.1g}"
                " is left"
            )
            warnings.warn(message, ConvergenceWarning, stacklevel=3)


def both_signs(targets_NP: NDArray[Any]) -> NDArray[np.bool_]:
    both: NDArray[np.bool_] = (targets_NP == 1).any(axis=0) & (targets_NP == -1).any(axis=0)
    return both


def positive(name: str, value: Any) -> None:
    try:
        good = isinstance(value, Real) and 0 < float(value) < np.inf
    except OverflowError:  # an int needn't have a float
        good = False
    if not good:
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def read_by_rows(X: Any) -> TypeGuard[Matrix]:
    """Whether X isn't to be made an array: it needn't lie in memory, and is read by blocks of its
    rows. Raises ValueError where there is nothing in it, or no real numbers.
    """
    if (
        isinstance(X, np.ndarray)
        or issparse(X)
        or not isinstance(getattr(X, "dtype", None), np.dtype)
        or len(getattr(X, "shape", ())) != 2
        or not hasattr(X, "__getitem__")
    ):
        return False  # as scikit-learn has it
    if 0 in X.shape or X.dtype.kind not in "fiu":
        raise ValueError(f"X must hold numbers, not be {tuple(X.shape)} of {X.dtype}")
    return True


def _bad_rows(x_nD: NDArray[Any]) -> NDArray[np.int64]:
    # Row by row sums overflow nothing in float64 and need no boolean copy of x.
    odd = np.flatnonzero(~np.isfinite(x_nD.sum(axis=1, dtype=np.float64)))
    bad: NDArray[np.int64] = odd[~np.isfinite(x_nD[odd]).all(axis=1)]
    return bad


def refuse_nan(X: Matrix) -> None:
    """Once: what is known to be finite isn't read to know it."""
    if getattr(X, "finite", False):
        return
    blocks = row_blocks(*X.shape)
    bad = [rows.start + _bad_rows(np.asarray(X[rows])) for rows in blocks]
    _refuse_rows(np.concatenate(bad), X.shape[0])


def _refuse_rows(bad: NDArray[np.int64], count: int) -> None:
    if len(bad):
        raise ValueError(
            f"X holds NaN or infinity in {len(bad)} of {count} rows, first in row {bad[0]}: "
            "leave unreadable images out"
        )
