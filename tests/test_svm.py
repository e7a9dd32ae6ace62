"""LinearSVM against scikit-learn's LinearSVC, against fits on the subset, and as an estimator."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from vggfeat.svm import LinearSVM


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    X, y = make_blobs(120, n_features=10, centers=4, cluster_std=6.0, random_state=0)
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), y


def columns(y: np.ndarray) -> np.ndarray:
    return np.where(y[:, None] == np.arange(y.max() + 1), 1, -1).astype(np.int8)


@pytest.mark.parametrize(("loss", "rows"), [("squared_hinge", 120), ("squared_hinge", 8), ("hinge", 120)])
def test_equals_linear_svc(blobs: tuple[np.ndarray, np.ndarray], loss: str, rows: int) -> None:
    X, y = blobs[0][:rows], np.resize(np.arange(4), rows) if rows == 8 else blobs[1][:rows]
    ours = LinearSVM(C=3.0, loss=loss).fit(X, y)
    theirs = LinearSVC(C=3.0, loss=loss, random_state=0, max_iter=10000, dual=loss == "hinge")
    theirs.fit(X, y)
    np.testing.assert_array_equal(ours.coef_, theirs.coef_)
    np.testing.assert_array_equal(ours.intercept_, theirs.intercept_)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    assert ours.coef_.shape == (4, 10)
    assert ours.n_features_in_ == 10
    assert ours.converged_


def test_the_bias_is_regularised_as_a_weight() -> None:
    # Points 1 (positive) and -1 (negative), C large: w = 1, b = 0. Moved by 1, points 2 and 0: the smallest
    # w^2 + b^2 with 2w + b >= 1 and b <= -1 is w = 1, b = -1. A free bias would give the same w here; at points
    # 3 and 2 it would give w = 2, b = -5, ours must pay for b: still w = 2, b = -5, the only feasible corner.
    model = LinearSVM(C=1e6, tol=1e-8).fit([[2.0], [0.0]], [1, 0])
    np.testing.assert_allclose([model.coef_[0, 0], model.intercept_[0]], [1, -1], atol=1e-4)
    # With C = 0.5 all is soft: d/dw and d/db of 0.5(w^2+b^2) + 0.5(1-2w-b)^2 + 0.5(1+b)^2 are zero where
    # 5w + 2b = 2 and 2w + 3b = 0, that is w = 6/11, b = -4/11. A bias for free would have b = -w.
    model = LinearSVM(C=0.5, tol=1e-8).fit([[2.0], [0.0]], [1, 0])
    np.testing.assert_allclose([model.coef_[0, 0], model.intercept_[0]], [6 / 11, -4 / 11], atol=1e-6)


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
    model = LinearSVM(C=2.0).fit(X, Y)
    for k in range(4):
        known = Y[:, k] != 0
        alone = LinearSVC(C=2.0, dual=False, random_state=0, max_iter=10000).fit(X[known], Y[known, k])
        np.testing.assert_array_equal(model.coef_[k], alone.coef_[0])
        assert model.intercept_[k] == alone.intercept_[0]
    assert model.decision_function(X).shape == (120, 4)
    np.testing.assert_array_equal(model.predict(X) > 0, model.decision_function(X) > 0)


def test_left_out_rows_have_no_influence(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, Y = blobs[0].copy(), columns(blobs[1])
    Y[:10] = 0
    before = LinearSVM().fit(X, Y).coef_
    X[:10] = 100
    np.testing.assert_array_equal(LinearSVM().fit(X, Y).coef_, before)


def test_processes_change_nothing(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, Y = blobs[0], columns(blobs[1])
    one, two = LinearSVM(loss="hinge").fit(X, Y), LinearSVM(loss="hinge", n_jobs=2).fit(X, Y)
    np.testing.assert_array_equal(one.coef_, two.coef_)
    np.testing.assert_array_equal(one.intercept_, two.intercept_)


def test_degenerate_classes_score_a_constant(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, Y = blobs[0], columns(blobs[1])
    Y[Y[:, 1] == 1, 1] = 0  # no positive
    Y[Y[:, 2] == -1, 2] = 0  # no negative
    Y[:, 3] = 0  # nothing known
    model = LinearSVM().fit(X, Y)
    assert model.degenerate_classes_ == [1, 2, 3]
    np.testing.assert_array_equal(model.decision_function(X[:2])[:, 1:], [[-1, 1, -1]] * 2)
    assert not model.coef_[1:].any()


def test_scoring_in_blocks_changes_nothing(
    blobs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs
    model = LinearSVM().fit(X, y)
    whole = model.decision_function(X)
    monkeypatch.setattr("vggfeat.svm.SCORE_ROWS", 7)
    np.testing.assert_allclose(model.decision_function(X), whole, rtol=1e-12, atol=1e-14)


def test_score_leaves_unknown_pairs_out(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, Y = blobs[0], columns(blobs[1])
    model = LinearSVM().fit(X, Y)
    wrong = model.predict(X) != Y
    assert model.score(X, Y) == pytest.approx(1 - wrong.mean())
    assert model.score(X, np.where(wrong, 0, Y)) == 1.0
    single = LinearSVM().fit(X, blobs[1])
    assert single.score(X, blobs[1]) == pytest.approx((single.predict(X) == blobs[1]).mean())


def test_not_converged_is_recorded_and_said_once(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    model = LinearSVM(C=1e4, loss="hinge", max_iter=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(blobs[0], columns(blobs[1]))
    assert [w.category for w in caught] == [ConvergenceWarning]
    assert not model.converged_
    assert model.n_iter_ == 2


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


@pytest.mark.parametrize("params", [{"C": 0}, {"C": np.nan}, {"loss": "log"}, {"tol": -1}, {"max_iter": 0}])
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
    # A column vector of labels is one class's 1, -1, 0 here, not labels to be flattened.
    expected = {"check_supervised_y_2d": "a y of shape (N, 1) is multi-label"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(LinearSVM(), expected_failed_checks=expected, on_skip=None, on_fail="raise")
    assert sum(result["status"] == "passed" for result in results) > 30
