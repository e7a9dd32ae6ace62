"""Logistic regression for frozen descriptors: a scikit-learn estimator with the objective of
scikit-learn's own.

N images, D descriptor length, K classes. The objective is
    0.5 |W|^2 + C sum_i r_i loss_i
with r_i the sample's weight, times its class's; the intercepts are not regularised. The loss is
that of the softmax over the classes; of two classes, and of each of several labels an image, the
binomial one. `vggfeat.softmax` minimises it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit, log_softmax, softmax

from vggfeat.devices import resolve_device
from vggfeat.linear import LinearClassifier, both_signs, positive
from vggfeat.matrix import Selected
from vggfeat.softmax import Binomial, Loss, Softmax, solve


class LogisticRegression(LinearClassifier):
    """Multinomial logistic regression for classes (one label an image), or a logistic regression
    for each of several labels an image.

    Parameters
    ----------
    C: weight of the losses against the norm; larger fits the training set closer.
    tol: how much lower than what is found the objective may be, at most, as a share of it.
    device: "cpu", "cuda", "cuda:N", or "auto", the first GPU or else the CPU.
    warm_start: start from what the last `fit` found, where it was of the same classes.
    class_weight: a class's factor on the C of its images, {label: factor}; "balanced": n_samples /
    (n_classes n_k). For several labels an image each class is a problem of two: {1: of the images
    that have it, -1: of the others}, and "balanced" gives both sides of it the same weight.

    Fitted attributes
    -----------------
    coef_: (K, D); intercept_: (K,), of mean 0 for more than two classes. For two classes K is 1, as
    in scikit-learn.
    classes_: the sorted labels; for several labels an image, 0 … K-1.
    multilabel_: whether y was (N, K).
    degenerate_classes_: classes all of whose images have the weight 0; for several labels an image,
    those that lack positives or negatives. They have a coef_ of 0 and the probability that the
    objective tends to, 0 without positives and 1 without negatives: an intercept_ of -inf or inf.
    n_iter_: Newton steps; converged_: whether tol was reached.
    n_features_in_: D.

    Notes
    -----
    Deterministic. Holds X centred in float32 (up to `softmax.COPY_BYTES`; on a GPU `COPY_SHARE`
    of what is free), for N <= D 4 N^2 bytes instead (8 where float32 leads nowhere), and some dozen
    numbers for each image and class.
    """

    solver = "newton"
    _name, _certain = "a logistic regression", np.inf

    def __init__(
        self,
        C: float = 1.0,
        tol: float = 1e-5,
        device: str = "cpu",
        warm_start: bool = False,
        class_weight: dict[Any, float] | str | None = None,
    ) -> None:
        self.C = C
        self.tol = tol
        self.device = device
        self.warm_start = warm_start
        self.class_weight = class_weight

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> LogisticRegression:
        """Fit on X (N, D) and y: (N,) labels, or (N, K) of 1 present, -1 absent, 0 left out for
        that class.

        Warns once (ConvergenceWarning) where tol was not reached.
        Raises ValueError for NaN or infinity in X, unequal lengths, other values in a (N, K) y (a
        0/1 indicator is refused: its 0 would mean "left out"), a single class, negative weights, or
        parameters out of range.
        """
        positive("C", self.C)
        before = None
        if self.warm_start and hasattr(self, "coef_"):
            before = self.classes_, self.coef_, self.intercept_
        X_ND, targets_NP, _, costs_NP = self._read(X, y, sample_weight)
        costs_NP = self.C * np.broadcast_to(costs_NP, targets_NP.shape) * (targets_NP != 0)
        targets_NP = np.where(costs_NP > 0, targets_NP, 0).astype(np.int8)
        solved = both_signs(targets_NP)
        if not solved.any():
            raise ValueError("class_weight leaves one class only with a weight")
        # what weighs nothing is nowhere in the problem
        used = costs_NP[:, solved].any(axis=1)
        loss = self._loss(targets_NP[used][:, solved], costs_NP[used][:, solved])
        near = None
        if (
            before
            and np.array_equal(before[0], self.classes_)
            and before[1].shape == (len(solved), X_ND.shape[1])
            and np.isfinite(before[2][solved]).all()
        ):
            near = before[1][solved], before[2][solved]
        solution = solve(
            X_ND if used.all() else Selected(X_ND, np.flatnonzero(used)), loss, self.tol, near
        )
        if isinstance(loss, Softmax):
            solution.intercept -= solution.intercept.mean()  # the losses don't know their sum
        self._set(solution, targets_NP, used)
        return self

    def _loss(self, targets_nP: NDArray[np.int8], costs_nP: NDArray[np.float64]) -> Loss:
        device = resolve_device(self.device)
        if self.multilabel_ or targets_nP.shape[1] == 1:
            targets, costs = (
                torch.as_tensor(part, dtype=torch.float64).to(device)
                for part in (targets_nP, costs_nP)
            )
            return Binomial(targets, costs)
        y_n = torch.as_tensor(targets_nP.argmax(axis=1)).to(device)
        return Softmax(y_n, torch.as_tensor(costs_nP[:, 0].copy()).to(device))

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """(N, K) probabilities of the classes, of sum 1, (N, 2) for two; for several labels an
        image, (N, K) of each label by itself. Raises as `decision_function`.
        """
        return self._by_scores(X, expit, softmax)

    def predict_log_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """The logarithms of `predict_proba`, also where that rounds to 0."""
        return self._by_scores(X, log_expit, log_softmax)

    def _by_scores(
        self, X: ArrayLike, of_one: Callable[..., Any], of_several: Callable[..., Any]
    ) -> NDArray[np.float64]:
        """(N, K) of what is made of a label's score by itself, or of all the classes'."""
        scores = self.decision_function(X)
        values: NDArray[np.float64]
        if self.multilabel_:
            values = of_one(scores)
        elif scores.ndim == 1:
            values = of_one(np.stack([-scores, scores], axis=1))
        else:
            values = of_several(scores, axis=1)
        return values
