"""LinearSVM against scikit-learn's LinearSVC, against fits on the subset, and as an estimator."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, PredefinedSplit
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from vggfeat.matrix import Selected
from vggfeat.metrics import mean_average_precision, mean_class_recall
from vggfeat.solver import LOSSES, MAX_STEPS
from vggfeat.svm import SOLVERS, LinearSVM, LinearSVMCV


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    X, y = make_blobs(120, n_features=10, centers=4, cluster_std=6.0, random_state=0)
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), y


def columns(y: np.ndarray) -> np.ndarray:
    return np.where(y[:, None] == np.arange(y.max() + 1), 1, -1).astype(np.int8)


@pytest.mark.parametrize(
    ("loss", "rows"), [("squared_hinge", 120), ("squared_hinge", 8), ("hinge", 120)]
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_equals_linear_svc(
    blobs: tuple[np.ndarray, np.ndarray], loss: str, rows: int, solver: str
) -> None:
    X, y = blobs[0][:rows], np.resize(np.arange(4), rows) if rows == 8 else blobs[1][:rows]
    ours = LinearSVM(C=3.0, loss=loss, solver=solver, tol=1e-9).fit(X, y)
    theirs = LinearSVC(
        C=3.0, loss=loss, random_state=0, max_iter=1_000_000, dual=loss == "hinge", tol=1e-9
    )
    theirs.fit(X, y)
    near: Any = {"rtol": 1e-3, "atol": 1e-3} if loss == "hinge" else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(ours.coef_, theirs.coef_, **near)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, **near)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), **near)
    assert (
        ours.predict(X) == theirs.predict(X)
    ).mean() > 0.99  # hinge: scores of two classes may be equal to 1e-3
    assert ours.coef_.shape == (4, 10)
    assert ours.n_features_in_ == 10
    assert ours.converged_


def test_the_bias_is_regularised_as_a_weight() -> None:
    # Points 1 (positive) and -1 (negative), C large: w = 1, b = 0. Moved by 1, points 2 and 0: the
    # smallest w^2 + b^2 with 2w + b >= 1 and b <= -1 is w = 1, b = -1. A free bias would give the
    # same w here; at points 3 and 2 it would give w = 2, b = -5, ours must pay for b: still w = 2,
    # b = -5, the only feasible corner.
    model = LinearSVM(C=1e6, tol=1e-8).fit([[2.0], [0.0]], [1, 0])
    np.testing.assert_allclose([model.coef_[0, 0], model.intercept_[0]], [1, -1], atol=1e-4)
    # With C = 0.5 all is soft: d/dw and d/db of 0.5(w^2+b^2) + 0.5(1-2w-b)^2 + 0.5(1+b)^2 are zero
    # where 5w + 2b = 2 and 2w + 3b = 0, that is w = 6/11, b = -4/11. A bias for free would have b =
    # -w.
    model = LinearSVM(C=0.5, tol=1e-8).fit([[2.0], [0.0]], [1, 0])
    np.testing.assert_allclose(
        [model.coef_[0, 0], model.intercept_[0]], [6 / 11, -4 / 11], atol=1e-6
    )


def test_two_classes_follow_sklearn(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs[0], np.where(blobs[1] > 1, "dog", "cat")
    model = LinearSVM().fit(X, y)
    scores = model.decision_function(X)
    assert model.coef_.shape == (1, 10)
    assert scores.shape == (120,)
    np.testing.assert_array_equal(model.predict(X), np.where(scores > 0, "dog", "cat"))


def test_multilabel_column_equals_fit_on_its_rows(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, Y = blobs[0], columns(blobs[1])
    Y[np.random.default_rng(0).random(Y.shape) < 0.2] = 0
    model = LinearSVM(C=2.0, tol=1e-9).fit(X, Y)
    for k in range(4):
        known = Y[:, k] != 0
        alone = LinearSVC(C=2.0, dual=False, random_state=0, max_iter=100_000, tol=1e-9).fit(
            X[known], Y[known, k]
        )
        np.testing.assert_allclose(model.coef_[k], alone.coef_[0], atol=1e-3)
        assert model.intercept_[k] == pytest.approx(alone.intercept_[0], abs=1e-3)
    assert model.decision_function(X).shape == (120, 4)
    np.testing.assert_array_equal(model.predict(X) > 0, model.decision_function(X) > 0)


def test_left_out_rows_have_no_influence(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, Y = blobs[0].copy(), columns(blobs[1])
    Y[:10] = 0
    before = LinearSVM().fit(X, Y).coef_
    X[:10] = 100
    np.testing.assert_array_equal(LinearSVM().fit(X, Y).coef_, before)


def test_a_path_gives_what_single_fits_give(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    Cs = (0.1, 1.0, 10.0, 0.5)
    for C, model in zip(Cs, LinearSVM(tol=1e-9).path(X, y, Cs), strict=True):
        assert model.C == C
        np.testing.assert_allclose(
            model.coef_, LinearSVM(C=C, tol=1e-9).fit(X, y).coef_, rtol=1e-5, atol=1e-6
        )


def test_weights_are_repetitions(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    weights = np.random.default_rng(0).integers(0, 3, len(y))
    for solver in SOLVERS:
        weighted = LinearSVM(solver=solver, tol=1e-9).fit(X, y, weights)
        repeated = LinearSVM(solver=solver, tol=1e-9).fit(
            np.repeat(X, weights, axis=0), np.repeat(y, weights)
        )
        np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weight", ["balanced", {0: 5.0, 1: 0.2}])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_class_weights_are_liblinears(
    blobs: tuple[np.ndarray, np.ndarray], classes: int, weight: Any, solver: str, loss: str
) -> None:
    X, y = blobs[0], blobs[1] % classes
    keep = np.flatnonzero((y != 1) | (np.arange(len(y)) % 4 == 0))  # classes of unequal size
    X, y = X[keep], y[keep]
    ours = LinearSVM(C=2.0, class_weight=weight, solver=solver, loss=loss, tol=1e-9).fit(X, y)
    theirs = LinearSVC(
        C=2.0, class_weight=weight, loss=loss, dual=loss == "hinge", tol=1e-9, max_iter=1_000_000
    ).fit(X, y)
    near: Any = {"rtol": 1e-3, "atol": 1e-3} if loss == "hinge" else {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(ours.coef_, theirs.coef_, **near)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), **near)
    plain = LinearSVM(C=2.0, loss=loss, tol=1e-9).fit(X, y)
    assert np.abs(plain.coef_ - ours.coef_).max() > 0.05
    chosen = LinearSVMCV(Cs=[2.0], cv=2, class_weight=weight, loss=loss, tol=1e-9).fit(X, y)
    np.testing.assert_allclose(chosen.coef_, theirs.coef_, **near)


@pytest.mark.parametrize("weight", ["balanced", {1: 3.0}, {1: 3.0, -1: 0.5}])
@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_of_several_labels_are_those_of_two_class_fits(
    blobs: tuple[np.ndarray, np.ndarray], weight: Any, solver: str
) -> None:
    X, Y = blobs[0], columns(blobs[1])
    Y[np.random.default_rng(0).random(Y.shape) < 0.2] = 0
    model = LinearSVM(C=2.0, class_weight=weight, solver=solver, tol=1e-9).fit(X, Y)
    for k in range(4):
        known = Y[:, k] != 0
        alone = LinearSVC(C=2.0, class_weight=weight, dual=False, tol=1e-9).fit(
            X[known], Y[known, k]
        )
        np.testing.assert_allclose(model.coef_[k], alone.coef_[0], rtol=1e-4, atol=1e-5)
    for wrong in ({0: 2.0}, "even"):
        with pytest.raises(
            ValueError, match=r"'balanced' or \{1: present, -1: absent\} for several labels"
        ):
            LinearSVM(class_weight=wrong).fit(X, Y)
    with pytest.raises(ValueError, match="class_weight must be numbers"):
        LinearSVM(class_weight={0: -2.0}).fit(X, blobs[1])


@pytest.mark.parametrize("layout", ["columns first", "every second row", "float16", "read only"])
def test_how_x_lies_in_memory_changes_nothing(
    blobs: tuple[np.ndarray, np.ndarray], layout: str
) -> None:
    X, y = blobs
    if layout == "columns first":
        other = np.asfortranarray(X)
    elif layout == "every second row":
        other = np.repeat(X, 2, axis=0)[::2]
    elif layout == "float16":
        other = X.astype(np.float16)
        X = other.astype(np.float64)
    else:
        other = X.copy()
        other.flags.writeable = False
    for model in (LinearSVM(tol=1e-9), LinearSVMCV(Cs=[1.0], cv=3, tol=1e-9)):
        expected = clone(model).fit(X, y).coef_
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(model.fit(other, y).coef_, expected, rtol=1e-5, atol=1e-7)


class Read:
    """X as what gives rows by slices alone, and how many it gave at most and in all."""

    def __init__(self, X: np.ndarray) -> None:
        self.shape, self.dtype, self._X = X.shape, X.dtype, X
        self.most = self.rows = 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        assert isinstance(rows, slice)
        block = self._X[rows]
        self.most, self.rows = max(self.most, len(block)), self.rows + len(block)
        return block


@pytest.mark.parametrize("kind", ["HDF5", "memory map", "rows of an array", "rows alone"])
def test_x_need_not_lie_in_memory(
    blobs: tuple[np.ndarray, np.ndarray],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    X, y = blobs
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 7 * 8 * X.shape[1])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        there: Any = file.create_dataset("X", data=X)
        if kind == "memory map":
            X.tofile(tmp_path / "x")
            there = np.memmap(tmp_path / "x", X.dtype, "r", shape=X.shape)
        elif kind == "rows of an array":
            order = np.random.default_rng(0).permutation(len(X))
            there = Selected(X[order], np.argsort(order))
        elif kind == "rows alone":
            there = Read(X)
        models = (LinearSVM(), LinearSVM(solver="liblinear"), LinearSVMCV(Cs=[1.0, 4.0], cv=3))
        for model in models:
            held = clone(model).fit(X, y)
            read = model.fit(there, y)
            np.testing.assert_array_equal(read.coef_, held.coef_)
            np.testing.assert_array_equal(read.intercept_, held.intercept_)
            assert (read.n_features_in_, read.n_iter_) == (10, held.n_iter_)
            np.testing.assert_array_equal(read.decision_function(there), held.decision_function(X))
            np.testing.assert_array_equal(read.predict(there), held.predict(X))
            assert read.score(there, y) == held.score(X, y)
            with pytest.raises(ValueError, match="expecting 10 features"):
                read.predict(Selected(X[:, :3], np.arange(4)))


def test_what_is_read_by_rows_is_refused_as_an_array_is(
    blobs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 7 * 8 * X.shape[1])
    model = LinearSVM().fit(X, y)
    bad = X.copy()
    bad[[20, 90], 3] = np.nan, -np.inf
    for call in (lambda X: clone(model).fit(X, y), model.decision_function):
        with pytest.raises(ValueError, match="NaN or infinity in 2 of 120 rows, first in row 20"):
            call(Read(bad))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        clone(model).fit(Read(X), y[:-1])
    with pytest.raises(ValueError, match="requires y to be passed"):
        clone(model).fit(Read(X), None)
    with pytest.raises(ValueError, match=r"must hold numbers, not be \(0, 10\) of float32"):
        clone(model).fit(Read(X[:0]), y[:0])
    with pytest.raises(ValueError, match="of complex64"):
        model.predict(Read(X.astype(np.complex64)))


def test_no_more_is_read_at_once_than_a_block_and_nothing_to_know_what_is_known(
    blobs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 7 * 8 * X.shape[1])
    model = LinearSVM().fit(X, y)
    scored = Read(X)
    model.decision_function(scored)
    assert (scored.most, scored.rows) == (7, len(X))
    every, read = np.arange(len(X)), []
    for finite in (False, True):
        there = Read(X)
        clone(model).fit(Selected(there, every, finite=finite), y)
        read.append(there.rows)
    assert read[0] - read[1] == len(X)


@pytest.mark.parametrize("multilabel", [False, True])
def test_cross_validation_is_what_single_fits_give(
    blobs: tuple[np.ndarray, np.ndarray], multilabel: bool
) -> None:
    X, y = blobs
    y = columns(y) if multilabel else y
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
    Cs = [0.05, 1.0, 20.0]
    chosen = LinearSVMCV(Cs=Cs[::-1], cv=folds).fit(X, y)
    expected = np.empty((3, 3))
    for c, C in enumerate(Cs):
        for f, (train, val) in enumerate(folds):
            model = LinearSVM(C=C).fit(X[train], y[train])
            if multilabel:
                expected[c, f] = mean_average_precision(
                    model.decision_function(X[val]), y[val]
                ).mean
            else:
                expected[c, f] = mean_class_recall(model.predict(X[val]), y[val], 4)
    np.testing.assert_allclose(chosen.scores_, expected, atol=0.03)
    best = chosen.scores_.mean(1).argmax()
    assert sorted(Cs)[best] == chosen.C_
    np.testing.assert_allclose(
        chosen.coef_, LinearSVM(C=chosen.C_).fit(X, y).coef_, rtol=1e-3, atol=1e-4
    )


def test_a_validation_part_chooses_c(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = blobs
    part = np.where(np.arange(len(y)) < 80, -1, 0)  # -1: always in training
    chosen = LinearSVMCV(Cs=[0.01, 10.0], cv=PredefinedSplit(part)).fit(X, y)
    assert chosen.scores_.shape == (2, 1)
    with pytest.raises(ValueError, match="fold 0 of cv is empty"):
        LinearSVMCV(cv=[(np.arange(80), np.arange(0))]).fit(X, y)
    with pytest.raises(ValueError, match="each of Cs must be a positive number"):
        LinearSVMCV(Cs=[1.0, 0.0]).fit(X, y)


def test_degenerate_classes_score_a_constant(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, Y = blobs[0], columns(blobs[1])
    Y[Y[:, 1] == 1, 1] = 0  # no positive
    Y[Y[:, 2] == -1, 2] = 0  # no negative
    Y[:, 3] = 0  # nothing known
    model = LinearSVM().fit(X, Y)
    assert model.degenerate_classes_ == [1, 2, 3]
    np.testing.assert_array_equal(model.decision_function(X[:2])[:, 1:], [[-1, 1, -1]] * 2)
    assert not model.coef_[1:].any()


def test_score_leaves_unknown_pairs_out(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, Y = blobs[0], columns(blobs[1])
    model = LinearSVM().fit(X, Y)
    wrong = model.predict(X) != Y
    assert model.score(X, Y) == pytest.approx(1 - wrong.mean())
    assert model.score(X, np.where(wrong, 0, Y)) == 1.0
    single = LinearSVM().fit(X, blobs[1])
    assert single.score(X, blobs[1]) == pytest.approx((single.predict(X) == blobs[1]).mean())


def test_not_converged_is_recorded_and_said_once(
    blobs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vggfeat.solver.MAX_STEPS", dict.fromkeys(MAX_STEPS, 1))
    model = LinearSVM(C=1e4, loss="hinge")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(blobs[0], columns(blobs[1]))
    assert [w.category for w in caught] == [ConvergenceWarning]
    assert not model.converged_


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([[0.0], [np.nan]], [0, 1], "X holds NaN or infinity in 1 of 2 rows, first in row 1"),
        ([[np.inf], [0.0]], [0, 1], "first in row 0"),
        ([[0.0], [1.0]], [0, 0], "one class only"),
        ([[0.0], [1.0]], [0, 1, 2], "inconsistent numbers of samples"),
        ([0.0, 1.0], [0, 1], "2D array"),
        ([[0.0], [1.0]], [[1, 2], [0, -1]], r"must hold 1 \(present\)"),
        ([[0.0], [1.0]], [[True, False], [False, True]], r"must hold 1 \(present\)"),
        ([[0.0], [1.0]], [[1, 0], [0, 1]], "both a positive"),  # a 0/1 indicator
        ([[0.0], [1.0]], [[[1]], [[0]]], "dim"),
    ],
)
def test_fit_refuses(X: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSVM().fit(X, y)


@pytest.mark.parametrize(
    "params", [{"C": 0}, {"C": np.nan}, {"loss": "log"}, {"tol": -1}, {"solver": "cvx"}]
)
def test_parameters_out_of_range(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        LinearSVM(**params).fit([[0.0], [1.0]], [0, 1])


def test_predict_refuses(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(NotFittedError):
        LinearSVM().predict(blobs[0])
    model = LinearSVM().fit(*blobs)
    with pytest.raises(ValueError, match="expecting 10 features"):
        model.predict(blobs[0][:, :3])
    with pytest.raises(ValueError, match="NaN"):
        model.predict(np.full((1, 10), np.nan))


def test_is_a_scikit_learn_estimator(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    search = GridSearchCV(clone(LinearSVM()), {"C": [0.01, 1.0]}, cv=2).fit(*blobs)
    assert search.best_params_["C"] in (0.01, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for estimator in (LinearSVM(), LinearSVMCV()):
            # nothing is excluded
            results = check_estimator(estimator, on_skip=None, on_fail="raise")
            assert sum(result["status"] == "passed" for result in results) > 50


def test_what_labels_cant_be_is_said_plainly() -> None:
    X = np.eye(4)
    with pytest.raises(ValueError, match="one class only, 0: an SVM"):
        LinearSVM().fit(X, np.zeros(4, int))
    with pytest.raises(ValueError, match="0 means left out; where a class is absent give -1"):
        LinearSVM().fit(X, np.eye(4, 2, dtype=int))
    with pytest.raises(ValueError, match="where it is False give -1"):
        LinearSVM().fit(X, np.eye(4, 2, dtype=bool))


@pytest.mark.parametrize("loss", LOSSES)
def test_costs_beyond_float64_are_refused_and_no_nan_is_a_solution(
    blobs: tuple[np.ndarray, np.ndarray], loss: str
) -> None:
    X, y = blobs
    with pytest.raises(ValueError, match="nothing is solved beyond"):
        LinearSVM(C=1e300, loss=loss).fit(X, y)
    with pytest.raises(ValueError, match="nothing is solved beyond"):
        LinearSVM(C=1e10, loss=loss).fit(X, y, np.full(len(y), 1e10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LinearSVM(C=1e12, loss=loss).fit(X, y)
    assert np.isfinite(model.coef_).all()


def test_folds_of_one_class_each_are_refused_in_a_sentence() -> None:
    X, y = np.random.default_rng(0).random((20, 5)), np.repeat([0, 1], 10)
    with pytest.raises(ValueError, match="no fold of cv has a class"):
        LinearSVMCV(cv=KFold(2)).fit(X, y)
