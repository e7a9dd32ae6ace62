"""Linear support vector machines for frozen descriptors, one against the rest: scikit-learn
estimators.

N images, D descriptor length, K SVM problems (one a class). The objective is liblinear's,
    0.5 |(w, b)|^2 + C sum_i r_i max(0, 1 - t_i (w x_i + b))^p,
p = 2 "squared_hinge", p = 1 "hinge", with r_i the sample's weight; the bias b is regularised as the
weight of a constant feature 1 (`intercept_scaling=1`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import check_cv
from sklearn.svm import LinearSVC
from torch import Tensor

from vggfeat.devices import resolve_device
from vggfeat.linear import LinearClassifier, both_signs, positive
from vggfeat.matrix import Matrix
from vggfeat.metrics import mean_average_precision
from vggfeat.ranks import job
from vggfeat.solver import LOSSES, Solution, Solver
from vggfeat.spaces import refuse_large

SOLVERS = ("newton", "liblinear")
C_GRID = tuple(2.0**k for k in range(-5, 8, 2))
SEED = 0  # liblinear visits the examples in a random order; fixed: same data, same classifier
LIBLINEAR_ITERATIONS = 100_000


class _OneAgainstTheRest(LinearClassifier):
    """The settings that only SVMs have, and what a weight of a class is one against the rest."""

    loss: str
    _name, _certain = "an SVM", 1.0

    def _read(
        self, X: ArrayLike | Matrix, y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[Matrix, NDArray[Any], NDArray[Any], NDArray[Any]]:
        for name, allowed in (("loss", LOSSES), ("solver", SOLVERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}, not {getattr(self, name)!r}"
                )
        return super()._read(X, y, sample_weight)

    def _weights_of_labels(
        self, weight_K: NDArray[np.float64], targets_NP: NDArray[Any]
    ) -> NDArray[np.float64]:
        weights_NP: NDArray[np.float64] = np.where(targets_NP == 1, weight_K, 1.0)
        return weights_NP


class LinearSVM(_OneAgainstTheRest):
    """One-against-the-rest linear SVMs for classes (one label an image) or for several labels an
    image.

    Parameters
    ----------
    C: weight of the errors against the norm; larger fits the training set closer.
    loss: "squared_hinge" or "hinge".
    tol: duality gap, as a share of the objective, at which a class is done; liblinear's own
    tolerance with it.
    solver: "newton" (`vggfeat.solver`, all classes at once), or "liblinear", scikit-learn's, for
    reference.
    device: where "newton" computes: "cpu", "cuda", "cuda:N", or "auto", the first GPU or else the
    CPU.
    warm_start: start from what the last `fit` found, where it was of the same classes: as at a like
    C, on more images. It changes nothing where a CPU solves by dual variables, of which a
    classifier tells little.
    class_weight: a class's factor on the C of its own images, {label: factor}, as in liblinear: in
    the problem "class k against the rest" the rest has 1; of two classes each has its own.
    "balanced": n_samples / (n_classes n_k). For several labels an image each class is a problem of
    two: {1: of the images that have it, -1: of the others}, and "balanced" gives both sides of it
    the same weight.

    Fitted attributes
    -----------------
    coef_: (K, D); intercept_: (K,). For two classes K is 1, as in scikit-learn.
    classes_: the sorted labels; for several labels an image, 0 … K-1.
    multilabel_: whether y was (N, K).
    degenerate_classes_: problems that lack positives or negatives. Their score is constant: -1
    without positives, +1 without negatives.
    n_iter_: most steps of any class; converged_: whether all classes reached tol.
    n_features_in_: D.

    Notes
    -----
    Deterministic. "newton" reads X in blocks of rows, and holds what `svm_plan.svm_memory` tells;
    liblinear copies X as float64.
    """

    def __init__(
        self,
        C: float = 1.0,
        loss: str = "squared_hinge",
        tol: float = 1e-5,
        solver: str = "newton",
        device: str = "cpu",
        warm_start: bool = False,
        class_weight: dict[Any, float] | str | None = None,
    ) -> None:
        self.warm_start = warm_start
        self.class_weight = class_weight
        self.C = C
        self.loss = loss
        self.tol = tol
        self.solver = solver
        self.device = device

    def fit(
        self, X: ArrayLike | Matrix, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> LinearSVM:
        """Fit on X (N, D) and y: (N,) labels, or (N, K) of 1 present, -1 absent, 0 left out for
        that class. X is an array, or what has `shape`, `dtype` and gives rows by `X[slice]`, as an
        HDF5 data set, which "newton" reads a block at a time.

        Warns once (ConvergenceWarning) when a class did not reach tol.
        Raises ValueError for NaN or infinity in X, unequal lengths, other values in a (N, K) y (a
        0/1 indicator is refused: its 0 would mean "left out"), a single class, negative weights, or
        parameters out of range.
        """
        return RegularisationPath(self, X, y, sample_weight, fits=1).into(self)

    def path(self, X: ArrayLike | Matrix, y: ArrayLike, Cs: Iterable[float]) -> Iterator[LinearSVM]:
        """A fitted classifier for each C in turn, each started from the one before. Raises as
        `fit`.
        """
        path = RegularisationPath(self, X, y)
        return (path.fit(C) for C in Cs)


class RegularisationPath:
    """Classifiers on the same images, each started from the one before.

    svm: has their settings but C, and with warm_start where the first one starts. fits: about how
    many there will be.
    """

    def __init__(
        self,
        svm: LinearSVM,
        X: ArrayLike | Matrix,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        fits: int = len(C_GRID),
    ) -> None:
        warm = svm.warm_start and hasattr(svm, "coef_")
        before = (svm.classes_, svm.coef_, svm.intercept_) if warm else None
        X_ND, targets_NP, weights_N, costs_NP = svm._read(X, y, sample_weight)
        self.svm, self.X_ND, self.targets_NP, self.present = svm, X_ND, targets_NP, weights_N > 0
        possible = both_signs(targets_NP[self.present])
        self.solved, self.costs_NP = targets_NP[:, possible], _costs_of(possible, costs_NP)
        self.near: tuple[NDArray[Any], NDArray[Any]] | None = None
        if (
            before
            and np.array_equal(before[0], svm.classes_)
            and before[1].shape[1] == X_ND.shape[1]
        ):
            self.near = before[1][possible], before[2][possible]
        self.solver: Solver | None = None
        if svm.solver == "newton":
            solves = fits * self.solved.shape[1]
            self.solver = Solver(X_ND, resolve_device(svm.device), ranks=job(), solves=solves)
        else:
            self.X_ND = np.asarray(X_ND[:])
        self.start: Tensor | None = None

    def fit(self, C: float) -> LinearSVM:
        """The next one. Raises ValueError for a C that is not positive."""
        model: LinearSVM = clone(self.svm)
        return self.into(model.set_params(C=C))

    def into(self, model: LinearSVM) -> LinearSVM:
        """The next one, with its own C, as attributes of model. Raises as `fit`."""
        positive("C", model.C)
        svm = self.svm
        if self.solver is None:
            solution = _liblinear(self.X_ND, self.solved, self.costs_NP, model.C, svm.loss, svm.tol)
        else:
            solution = self.solver.solve(
                self.solved,
                model.C,
                weights_NP=self.costs_NP,
                loss=svm.loss,
                tol=svm.tol,
                start=self.start,
                near=self.near,
                scores=False,
            )
            self.start, self.near = solution.state, None
        model.n_features_in_, model.classes_ = self.X_ND.shape[1], svm.classes_
        model.multilabel_ = svm.multilabel_
        model._set(solution, self.targets_NP, self.present)
        return model


class LinearSVMCV(_OneAgainstTheRest):
    """`LinearSVM` that chooses C by a validation part or by cross-validation: all folds and classes
    at once.

    Parameters
    ----------
    Cs: the values to try.
    cv: number of stratified folds, a scikit-learn splitter (`PredefinedSplit` for a validation
    part), or the splits. loss, tol, device, class_weight: as `LinearSVM`; "balanced" over all
    images, not anew for each fold.

    Fitted attributes
    -----------------
    C_: the winner, of equals the smallest. Cs_: the values, rising. scores_: (len(Cs), folds).
    The others as `LinearSVM`; the classifier is the one with C_ on all of X.

    Notes
    -----
    The score is mean class recall (classes that the fold lacks are left out); for
    several labels an image mean average precision, all-point.
    """

    solver = "newton"

    def __init__(
        self,
        Cs: Sequence[float] = C_GRID,
        cv: Any = 5,
        loss: str = "squared_hinge",
        tol: float = 1e-5,
        device: str = "cpu",
        class_weight: dict[Any, float] | str | None = None,
    ) -> None:
        self.Cs = Cs
        self.class_weight = class_weight
        self.cv = cv
        self.loss = loss
        self.tol = tol
        self.device = device

    def fit(
        self, X: ArrayLike | Matrix, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> LinearSVMCV:
        """Choose C, then fit on all of X. Warns and raises as `LinearSVM.fit`; ValueError for an
        empty fold, too.
        """
        if np.size(self.Cs) == 0:
            raise ValueError("Cs is empty: give at least one value of C")
        for C in np.ravel(self.Cs).tolist():
            positive("each of Cs", C)
        self.Cs_ = np.unique(np.asarray(self.Cs, dtype=float))
        X_ND, targets_NP, weights_N, costs_NP = self._read(X, y, sample_weight)
        present = weights_N > 0
        labels = np.asarray(y)
        truth = targets_NP if self.multilabel_ else np.searchsorted(self.classes_, labels.ravel())
        splits = list(
            check_cv(self.cv, None if self.multilabel_ else labels.ravel(), classifier=True).split(
                X_ND, truth
            )
        )
        if (ranks := job()) is not None:
            splits = ranks.same(splits)  # a splitter may draw anew in each process
        folds = _folds(splits, targets_NP, present)
        if not any(fold.solved.any() for fold in folds):
            raise ValueError(
                "no fold of cv has a class with images in and others: the images are sorted, say;"
                " give a cv that shuffles them"
            )
        # the problems of all folds side by side: they share their products with X
        all_targets = np.concatenate([fold.targets_NP for fold in folds], axis=1)
        all_costs = costs_NP
        if costs_NP.shape[1] > 1:
            all_costs = np.concatenate([costs_NP[:, fold.solved] for fold in folds], axis=1)
        solves = len(self.Cs_) * all_targets.shape[1]
        solver = Solver(X_ND, resolve_device(self.device), ranks=job(), solves=solves)
        start: Tensor | None = None
        self.scores_ = np.empty((len(self.Cs_), len(folds)))
        for c, C in enumerate(self.Cs_):
            solution = solver.solve(
                all_targets, C, weights_NP=all_costs, loss=self.loss, tol=self.tol, start=start
            )
            start = solution.state
            self.scores_[c] = self._score_folds(solution, folds, truth, weights_N)
        self.C_ = float(self.Cs_[np.nanmean(self.scores_, axis=1).argmax()])
        possible = both_signs(targets_NP[present])
        final, own = targets_NP[:, possible], _costs_of(possible, costs_NP)
        solution = solver.solve(
            final, self.C_, weights_NP=own, loss=self.loss, tol=self.tol, scores=False
        )
        self._set(solution, targets_NP, present)
        return self

    def _score_folds(
        self,
        solution: Solution,
        folds: list[_Fold],
        truth: NDArray[Any],
        weights_N: NDArray[np.float64],
    ) -> list[float]:
        """Of each fold, whose problems are columns of the solution, one fold after another."""
        ends = np.cumsum([fold.solved.sum() for fold in folds])
        scores_of = np.split(solution.scores, ends[:-1], axis=1)
        judged = []
        for fold, scores_NP in zip(folds, scores_of, strict=True):
            scores = np.full((len(fold.val), len(fold.solved)), -1.0)
            scores[:, fold.solved] = scores_NP[fold.val]
            judged.append(self._judge(scores, truth[fold.val], weights_N[fold.val]))
        return judged

    def _judge(self, scores: NDArray[Any], truth: NDArray[Any], weights: NDArray[Any]) -> float:
        if self.multilabel_:
            return mean_average_precision(scores, truth, "allpoint").mean
        guess = scores.argmax(axis=1) if scores.shape[1] > 1 else (scores[:, 0] > 0).astype(int)
        right = np.bincount(truth, weights * (guess == truth), len(self.classes_))
        seen = np.bincount(truth, weights, len(self.classes_))
        return float(np.mean(right[seen > 0] / seen[seen > 0]))


@dataclass(frozen=True)
class _Fold:
    """val: the rows that it scores. solved: (P,) its problems with positives and negatives;
    targets_NP: theirs, 0 outside its training rows.
    """

    val: NDArray[np.int64]
    solved: NDArray[np.bool_]
    targets_NP: NDArray[np.int8]


def _folds(
    splits: Iterable[tuple[NDArray[Any], NDArray[Any]]],
    targets_NP: NDArray[Any],
    present: NDArray[np.bool_],
) -> list[_Fold]:
    """present: (N,) images with a weight. Raises ValueError for an empty fold."""
    folds = []
    for number, (train, val) in enumerate(splits):
        if not present[train].any() or not present[val].any():
            raise ValueError(
                f"fold {number} of cv is empty: it has {len(train)} training and {len(val)}"
                " other images"
            )
        targets = np.zeros_like(targets_NP)
        targets[train] = targets_NP[train]
        solved = both_signs(targets[present])
        folds.append(_Fold(val[present[val]], solved, targets[:, solved]))
    return folds


def _liblinear(
    X: Any,
    targets_NP: NDArray[Any],
    weights_NP: NDArray[Any],
    C: float,
    loss: str,
    tol: float,
) -> Solution:
    """The reference, a problem at a time. liblinear doesn't tell its gap: tol where it stopped by
    itself.
    """
    refuse_large(C * float(np.max(weights_NP, initial=0)))
    coef, intercept, steps = [], [], []
    for targets_N, weights_N in zip(
        targets_NP.T, np.broadcast_to(weights_NP, targets_NP.shape).T, strict=True
    ):
        rows = (targets_N != 0) & (weights_N > 0)
        # The hinge loss has only the dual. For the squared hinge, coordinate descent on the dual is
        # quick while C is small and N <= D, and needs thousands of passes for a large C on classes
        # that overlap.
        dual = loss == "hinge" or (rows.sum() <= X.shape[1] and C < 1)
        svc = LinearSVC(
            C=C, loss=loss, tol=tol, max_iter=LIBLINEAR_ITERATIONS, dual=dual, random_state=SEED
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said once, for all problems
            svc.fit(X[rows], targets_N[rows], weights_N[rows])
        coef.append(svc.coef_[0])
        intercept.append(svc.intercept_[0])
        steps.append(int(svc.n_iter_))
    gap = np.where(np.array(steps) < LIBLINEAR_ITERATIONS, tol, np.inf)
    nothing = np.zeros(0)
    return Solution(
        np.array(coef), np.array(intercept), nothing, gap, nothing, np.array(steps), Tensor()
    )


def _costs_of(problems: NDArray[np.bool_], costs_NP: NDArray[np.float64]) -> NDArray[np.float64]:
    """The costs of some of the problems; where all have the same, one column stands for all."""
    return costs_NP[:, problems] if costs_NP.shape[1] > 1 else costs_NP
