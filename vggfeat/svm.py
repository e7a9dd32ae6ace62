"""Linear support vector machines for frozen descriptors, one against the rest: a scikit-learn estimator.

N images, D descriptor length, K SVM problems (one a class). The objective is liblinear's,
    0.5 |(w, b)|^2 + C sum_i max(0, 1 - t_i (w x_i + b))^p,    p = 2 "squared_hinge", p = 1 "hinge",
so the bias b is regularised as a weight of a constant feature 1 (`intercept_scaling=1`).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

LOSSES = ("squared_hinge", "hinge")
SOLVER = "liblinear via scikit-learn LinearSVC"

# liblinear visits the examples in a random order. The order is fixed: same data, same classifier.
SEED = 0

# Rows scored at a time: X @ coef.T is float64, and a float64 copy of all of X would be twice its size.
SCORE_ROWS = 1024


def _liblinear(X: NDArray, y: NDArray, settings: dict[str, Any]) -> tuple[NDArray, NDArray, int]:
    """Coefficients, intercepts and iterations of one call of liblinear: all its classes one against the
    rest."""
    # The hinge loss has only the dual. For the squared hinge, coordinate descent on the dual is quick while C is
    # small and N <= D, and needs thousands of passes for a large C on classes that overlap (measured: 1,151 x
    # 2,048, ten classes, C=128: 31 s against 1.3 s); the primal's Newton steps stay about a dozen.
    dual = settings["loss"] == "hinge" or (X.shape[0] <= X.shape[1] and settings["C"] < 1)
    solver = LinearSVC(**settings, dual=dual, intercept_scaling=1, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # LinearSVM.fit says it once for all classes
        solver.fit(X, y)
    return solver.coef_, solver.intercept_, int(solver.n_iter_)


def _one_class(X: NDArray, truth: NDArray, settings: dict[str, Any]) -> tuple[NDArray, float, int]:
    """One class of a multi-label problem, truth (N,) in {1, -1, 0}: fitted without the rows that are 0."""
    known = truth != 0
    coef, intercept, n_iter = _liblinear(X if known.all() else X[known], truth[known], settings)
    return coef[0], float(intercept[0]), n_iter


class LinearSVM(ClassifierMixin, BaseEstimator):
    """One-against-the-rest linear SVMs for classes (one label an image) or for several labels an image.

    Parameters
    ----------
    C: weight of the errors against the norm; larger fits the training set closer.
    loss: "squared_hinge" or "hinge".
    tol: liblinear's stopping tolerance.
    max_iter: liblinear's limit on iterations, for each class.
    n_jobs: processes for a multi-label fit, one class each; None or 1 works in this process. Never threads:
        liblinear's random state is one per process, so threads would change each other's order of examples.
        One label an image is one call of liblinear, which holds X once for all classes and ignores n_jobs.

    Fitted attributes
    -----------------
    coef_: (K, D); intercept_: (K,). For two classes K is 1, as in scikit-learn.
    classes_: the sorted labels; for several labels an image, 0 … K-1.
    multilabel_: whether y was (N, K).
    degenerate_classes_: columns of y that lack positives or negatives. Their score is constant: -1 without
        positives, +1 without negatives.
    n_iter_: most iterations of any class; converged_: whether that stayed below max_iter.
    n_features_in_: D.

    Notes
    -----
    Deterministic: the order of examples is seeded with 0, and n_jobs doesn't change a bit of the result.
    X may be float32; liblinear works on its own float64 copy (24 bytes a value while it fits).
    """

    def __init__(
        self,
        C: float = 1.0,
        loss: str = "squared_hinge",
        tol: float = 1e-4,
        max_iter: int = 10000,
        n_jobs: int | None = None,
    ) -> None:
        self.C = C
        self.loss = loss
        self.tol = tol
        self.max_iter = max_iter
        self.n_jobs = n_jobs

    def fit(self, X: ArrayLike, y: ArrayLike) -> LinearSVM:
        """Fit on X (N, D) and y: (N,) labels, or (N, K) of 1 present, -1 absent, 0 left out for that class.

        Warns once (ConvergenceWarning) when max_iter ended a class before it converged.
        Raises ValueError for NaN or infinity in X, unequal lengths, other values in a (N, K) y (a 0/1
        indicator
        is refused: its 0 would mean "left out"), a single class, or parameters out of range.
        """
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be squared_hinge or hinge, not {self.loss!r}")
        for name, value in (("C", self.C), ("tol", self.tol), ("max_iter", self.max_iter)):
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        X_ND, y_N = validate_data(
            self, X, y, dtype=(np.float64, np.float32), ensure_all_finite=False, multi_output=True
        )
        _refuse_nan(X_ND)
        settings = {"C": self.C, "loss": self.loss, "tol": self.tol, "max_iter": self.max_iter}
        self.multilabel_: bool = y_N.ndim == 2
        self.degenerate_classes_: list[int] = []
        if self.multilabel_:
            self._fit_columns(X_ND, y_N, settings)
        else:
            check_classification_targets(y_N)
            self.classes_, index_N = np.unique(y_N, return_inverse=True)
            if len(self.classes_) < 2:
                raise ValueError(f"y holds one class only, {self.classes_[0]!r}: an SVM needs at least two")
            self.coef_, self.intercept_, self.n_iter_ = _liblinear(X_ND, index_N, settings)
        self.converged_: bool = self.n_iter_ < self.max_iter
        if not self.converged_:
            warnings.warn(
                f"liblinear stopped at max_iter={self.max_iter} before it converged (C={self.C:g})",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _fit_columns(self, X_ND: NDArray, y_NK: NDArray, settings: dict[str, Any]) -> None:
        """Fit the K columns of a multi-label y, n_jobs of them at a time."""
        if y_NK.dtype == bool or not np.isin(y_NK, (1, -1, 0)).all():
            raise ValueError("a y of shape (N, K) must hold 1 (present), -1 (absent) or 0 (left out) only")
        n_classes = y_NK.shape[1]
        has_positive, has_negative = (y_NK == 1).any(axis=0), (y_NK == -1).any(axis=0)
        fitted = np.flatnonzero(has_positive & has_negative)
        if len(fitted) == 0:
            raise ValueError("no class of y has both a positive (1) and a negative (-1) example")
        self.classes_ = np.arange(n_classes)
        self.degenerate_classes_ = [k for k in range(n_classes) if k not in set(fitted.tolist())]
        self.coef_ = np.zeros((n_classes, X_ND.shape[1]))
        self.intercept_ = np.where(has_positive, 1.0, -1.0)
        if self.n_jobs in (None, 1):
            results = [_one_class(X_ND, y_NK[:, k], settings) for k in fitted]
        else:
            results = Parallel(n_jobs=self.n_jobs, backend="loky")(
                delayed(_one_class)(X_ND, y_NK[:, k], settings) for k in fitted
            )
        for k, (coef, intercept, _) in zip(fitted, results, strict=True):
            self.coef_[k], self.intercept_[k] = coef, intercept
        self.n_iter_ = max(n_iter for _, _, n_iter in results)

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Scores of X (N, D): (N, K), or (N,) for two classes, where positive means `classes_[1]`.

        Raises ValueError for NaN, infinity, or another D than at `fit`.
        """
        check_is_fitted(self)
        X_ND = validate_data(self, X, dtype=(np.float64, np.float32), ensure_all_finite=False, reset=False)
        _refuse_nan(X_ND)
        scores = np.empty((len(X_ND), len(self.intercept_)))
        for start in range(0, len(X_ND), SCORE_ROWS):
            rows = slice(start, start + SCORE_ROWS)
            scores[rows] = X_ND[rows].astype(np.float64, copy=False) @ self.coef_.T + self.intercept_
        return scores if self.multilabel_ or scores.shape[1] > 1 else scores[:, 0]

    def predict(self, X: ArrayLike) -> NDArray:
        """The best label of each image, (N,); for several labels an image (N, K) int8 of 1 and -1."""
        scores = self.decision_function(X)
        if self.multilabel_:
            return np.where(scores > 0, 1, -1).astype(np.int8)
        return self.classes_[scores.argmax(axis=1) if scores.ndim == 2 else (scores > 0).astype(int)]

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Accuracy; for several labels an image, over all (image, class) pairs whose y isn't 0."""
        check_is_fitted(self)
        if not self.multilabel_:
            return float(super().score(X, y, sample_weight))
        truth = np.asarray(y)
        predicted = self.predict(X)
        if truth.shape != predicted.shape:
            raise ValueError(f"y must be {predicted.shape}, not {truth.shape}")
        weights = np.ones(len(truth)) if sample_weight is None else np.asarray(sample_weight, dtype=float)
        weights = weights[:, None] * (truth != 0)
        return float(np.average(predicted == truth, weights=weights))


def _refuse_nan(X_ND: NDArray) -> None:
    # Row by row sums would overflow nothing in float64 and need no boolean copy of X.
    bad = np.flatnonzero(~np.isfinite(X_ND.sum(axis=1, dtype=np.float64)))
    bad = bad[~np.isfinite(X_ND[bad]).all(axis=1)]
    if len(bad):
        raise ValueError(
            f"X holds NaN or infinity in {len(bad)} of {len(X_ND)} rows, first in row {bad[0]}: "
            "leave unreadable images out"
        )
