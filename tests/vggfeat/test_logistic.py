"""LogisticRegression against scikit-learn's, and as an estimator."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression as Theirs
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from vggfeat import softmax
from vggfeat.logistic import LogisticRegression

Data = tuple[np.ndarray, np.ndarray]


def made(N: int, D: int, K: int) -> Data:
    """Descriptors as VGG's: not negative, of unit length; classes that overlap, of unequal size."""
    rng = np.random.default_rng(0)
    y = np.sort((K * rng.random(N) ** 1.5).astype(int))
    X = np.maximum(rng.normal(0, 1, (N, D)) + 0.7 * rng.normal(0, 1, (K, D))[y], 0)
    return (X / (np.linalg.norm(X, axis=1, keepdims=True) + 1e-9)).astype(np.float32), y


@pytest.fixture(scope="module")
def blobs() -> Data:
    X, y = make_blobs(120, n_features=10, centers=4, cluster_std=6.0, random_state=0)
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), y


def columns(y: np.ndarray) -> np.ndarray:
    return np.where(y[:, None] == np.arange(y.max() + 1), 1, -1).astype(np.int8)


def objective(model: Any, X: np.ndarray, y: np.ndarray, r: Any = 1.0) -> float:
    """scikit-learn's, in float64; r: weights of the samples."""
    F = X.astype(np.float64) @ model.coef_.T.astype(np.float64) + model.intercept_
    F = np.hstack([np.zeros_like(F), F]) if F.shape[1] == 1 else F
    own = np.searchsorted(model.classes_, y)
    losses = logsumexp(F, axis=1) - F[np.arange(len(y)), own]
    return float(model.C * (r * losses).sum() + 0.5 * (model.coef_.astype(np.float64) ** 2).sum())


def theirs(X: np.ndarray, y: np.ndarray, r: Any = None, **settings: Any) -> Any:
    """scikit-learn's minimum, as exactly as it goes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = Theirs(tol=1e-9, max_iter=100_000, solver="newton-cholesky", **settings)
        return model.fit(X.astype(np.float64), y, r)


def scaled() -> Data:
    X, y = made(150, 12, 3)
    return X * 10.0 ** np.linspace(-2, 2, 12), y


def repeated(X: np.ndarray, y: np.ndarray) -> Data:
    return np.repeat(X, 3, axis=0), np.repeat(y, 3)


CASES: dict[str, Callable[[], Data]] = {
    "more images than dimensions": lambda: made(300, 20, 4),
    "two classes": lambda: made(300, 20, 2),
    "more dimensions than images": lambda: made(60, 90, 4),
    "two classes, more dimensions": lambda: made(40, 60, 2),
    "duplicated rows": lambda: repeated(*made(30, 45, 3)),
    "a class with one image": lambda: (
        made(80, 20, 3)[0],
        np.where(np.arange(80) == 7, 5, np.arange(80) % 2),
    ),
    "badly scaled columns": scaled,
}


@pytest.mark.parametrize("exact_steps", [True, False])
@pytest.mark.parametrize("C", [2.0**-7, 1.0, 2.0**7])
@pytest.mark.parametrize("case", CASES)
def test_the_minimum_is_scikit_learns(
    case: str, C: float, exact_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact_steps:  # as where there are many unknowns
        monkeypatch.setattr(softmax, "EXACT_VALUES", 0)
    X, y = CASES[case]()
    best = theirs(X, y, C=C)
    least = objective(best, X, y)
    model = LogisticRegression(C=C).fit(X, y)
    assert model.converged_
    assert -1e-9 <= objective(model, X, y) / least - 1 <= 1e-5
    exact = LogisticRegression(C=C, tol=1e-10).fit(X, y)
    assert exact.converged_
    size = np.abs(best.coef_).max()
    np.testing.assert_allclose(exact.coef_, best.coef_, rtol=0, atol=1e-3 * size)
    assert exact.coef_.shape == best.coef_.shape
    np.testing.assert_allclose(exact.predict_proba(X), best.predict_proba(X), atol=1e-3)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weight", [None, "balanced", {0: 5.0, 1: 0.2}])
def test_weights_are_scikit_learns(blobs: Data, classes: int, weight: Any) -> None:
    X, y = blobs[0], blobs[1] % classes
    keep = np.flatnonzero((y != 1) | (np.arange(len(y)) % 4 == 0))  # classes of unequal size
    X, y = X[keep], y[keep]
    r = np.random.default_rng(0).integers(0, 3, len(y)).astype(float)
    best = theirs(X, y, r, C=2.0, class_weight=weight)
    ours = LogisticRegression(C=2.0, class_weight=weight, tol=1e-11).fit(X, y, r)
    np.testing.assert_allclose(ours.coef_, best.coef_, atol=1e-5)
    np.testing.assert_allclose(ours.predict_proba(X), best.predict_proba(X), atol=1e-5)
    if weight is None:
        times = r.astype(int)
        repeated = LogisticRegression(C=2.0, tol=1e-11).fit(
            np.repeat(X, times, 0), np.repeat(y, times)
        )
        np.testing.assert_allclose(ours.coef_, repeated.coef_, atol=1e-5)


@pytest.mark.parametrize("weight", [None, "balanced", {1: 3.0, -1: 0.5}])
def test_several_labels_are_fits_on_each_ones_rows(blobs: Data, weight: Any) -> None:
    X, Y = blobs[0], columns(blobs[1])
    Y[np.random.default_rng(0).random(Y.shape) < 0.2] = 0
    model = LogisticRegression(C=2.0, class_weight=weight, tol=1e-11).fit(X, Y)
    for k in range(4):
        known = Y[:, k] != 0
        alone = theirs(X[known], Y[known, k], C=2.0, class_weight=weight)
        np.testing.assert_allclose(model.coef_[k], alone.coef_[0], atol=1e-5)
        assert model.intercept_[k] == pytest.approx(alone.intercept_[0], abs=1e-5)
        np.testing.assert_allclose(
            model.predict_proba(X)[:, k], alone.predict_proba(X)[:, 1], atol=1e-5
        )
    np.testing.assert_array_equal(model.predict(X) > 0, model.decision_function(X) > 0)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X))


def test_left_out_rows_have_no_influence(blobs: Data) -> None:
    X, y = blobs[0].copy(), blobs[1]
    weights = np.where(np.arange(len(y)) < 10, 0.0, 1.0)
    Y = columns(y)
    Y[:10] = 0
    before = [LogisticRegression().fit(X, *rest).coef_ for rest in ((y, weights), (Y,))]
    X[:10] = 100
    for coef, rest in zip(before, ((y, weights), (Y,)), strict=True):
        np.testing.assert_array_equal(LogisticRegression().fit(X, *rest).coef_, coef)


@pytest.mark.parametrize("shape", [(120, 20), (40, 60)])
def test_two_runs_give_the_same_bits(shape: tuple[int, int]) -> None:
    X, y = made(*shape, 4)
    one, two = (LogisticRegression(C=10.0).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(one.coef_, two.coef_)
    np.testing.assert_array_equal(one.intercept_, two.intercept_)


@pytest.mark.parametrize("shape", [(120, 20), (40, 60)])
@pytest.mark.parametrize("several", [False, True])
def test_a_warm_start_takes_fewer_steps_to_the_same(shape: tuple[int, int], several: bool) -> None:
    X, y = made(*shape, 4)
    y = columns(y) if several else y
    cold = LogisticRegression(C=30.0, tol=1e-9).fit(X, y)
    warm = LogisticRegression(C=29.0, tol=1e-9, warm_start=True).fit(X, y)
    warm.set_params(C=30.0).fit(X, y)
    assert warm.n_iter_ < cold.n_iter_
    np.testing.assert_allclose(warm.coef_, cold.coef_, atol=1e-3)
    warm.fit(X[:, :7], y)  # another D: from zero
    assert warm.coef_.shape == (4, 7)


def test_probabilities(blobs: Data) -> None:
    X, y = blobs
    for labels in (y, y % 2):
        model = LogisticRegression(C=100.0).fit(X, labels)
        p = model.predict_proba(X)
        np.testing.assert_allclose(p.sum(axis=1), 1)
        np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), p)
        np.testing.assert_array_equal(model.classes_[p.argmax(axis=1)], model.predict(X))
    assert model.intercept_.shape == (1,)
    far = model.predict_log_proba(1e4 * X)
    assert np.isfinite(far).all() and far.min() < -1000


def test_degenerate_classes_are_certain(blobs: Data) -> None:
    X, Y = blobs[0], columns(blobs[1])
    Y[Y[:, 1] == 1, 1] = 0  # no positive
    Y[Y[:, 2] == -1, 2] = 0  # no negative
    Y[:, 3] = 0  # nothing known
    model = LogisticRegression().fit(X, Y)
    assert model.degenerate_classes_ == [1, 2, 3]
    np.testing.assert_array_equal(model.predict_proba(X[:2])[:, 1:], [[0, 1, 0]] * 2)
    assert not model.coef_[1:].any()
    assert model.predict(X).shape == Y.shape
    # of one label an image, a class without any weight has no part in the others'
    y = blobs[1]
    weights = (y != 2).astype(float)
    model = LogisticRegression(tol=1e-10).fit(X, y, weights)
    assert model.degenerate_classes_ == [2]
    np.testing.assert_array_equal(model.predict_proba(X)[:, 2], 0)
    alone = theirs(X[y != 2], y[y != 2])
    np.testing.assert_allclose(
        model.predict_proba(X)[:, [0, 1, 3]], alone.predict_proba(X), atol=1e-4
    )
    without = LogisticRegression(class_weight={2: 0.0}).fit(X, y)
    assert without.degenerate_classes_ == [2]
    with pytest.raises(ValueError, match="class_weight leaves one class only"):
        LogisticRegression(class_weight={0: 0.0}).fit(X, y % 2)


@pytest.mark.parametrize("shape", [(300, 20, 4), (60, 90, 4), (300, 20, 2)])
def test_large_costs_of_long_descriptors(shape: tuple[int, int, int]) -> None:
    X, y = made(*shape)
    model = LogisticRegression(C=1e4).fit(X * 300, y)
    least = objective(theirs(X * 300, y, C=1e4), X * 300, y)
    assert model.converged_ and objective(model, X * 300, y) <= least * (1 + 1e-5)


@pytest.mark.parametrize(("factor", "C"), [(1e39, 1.0), (1e10, 1.0), (1.0, 1e300)])
def test_costs_beyond_all_digits_are_refused_here_too(factor: float, C: float) -> None:
    X, y = made(60, 20, 3)
    with pytest.raises(ValueError, match="nothing is solved beyond"):
        LogisticRegression(C=C).fit(X.astype(np.float64) * factor, y)


def test_values_far_apart_end_right_or_are_said() -> None:
    X, y = made(150, 12, 3)
    X64 = X.astype(np.float64) * 10.0 ** np.linspace(-5, 5, 12) + 1e3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = LogisticRegression(C=100.0).fit(X64, y)
    assert model.converged_ or [w.category for w in caught] == [ConvergenceWarning]
    if model.converged_:
        assert objective(model, X64, y) <= objective(theirs(X64, y, C=100.0), X64, y) * (1 + 1e-5)


def test_not_converged_is_recorded_and_said_once(
    blobs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "MAX_STEPS", 1)
    model = LogisticRegression(C=1e4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(*blobs)
    assert [w.category for w in caught] == [ConvergenceWarning]
    assert not model.converged_


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([[0.0], [np.nan]], [0, 1], "X holds NaN or infinity in 1 of 2 rows, first in row 1"),
        ([[0.0], [1.0]], [0, 0], "one class only, 0: a logistic regression needs at least two"),
        ([[0.0], [1.0]], [0, 1, 2], "inconsistent numbers of samples"),
        ([[0.0], [1.0]], [[1, 0], [0, 1]], "both a positive"),  # a 0/1 indicator
    ],
)
def test_fit_refuses(X: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogisticRegression().fit(X, y)


@pytest.mark.parametrize("params", [{"C": 0}, {"C": np.nan}, {"C": 10**400}, {"tol": -1}])
def test_parameters_out_of_range(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(params))} must be a positive number"):
        LogisticRegression(**params).fit([[0.0], [1.0]], [0, 1])


def test_a_gpus_classifier_is_the_cpus(blobs: Data, gpu: torch.device) -> None:
    for data in (blobs, (np.repeat(blobs[0][:, :2], 2, axis=0), np.repeat(blobs[1], 2))):
        cpu, device = (LogisticRegression(device=name).fit(*data) for name in ("cpu", str(gpu)))
        assert device.converged_
        np.testing.assert_allclose(device.predict_proba(data[0]), cpu.predict_proba(data[0]), 1e-3)


def test_negative_weights_are_refused(blobs: Data) -> None:
    with pytest.raises(ValueError, match="Negative values"):
        LogisticRegression().fit(*blobs, sample_weight=-np.ones(120))
    with pytest.raises(ValueError, match="class_weight must be numbers"):
        LogisticRegression(class_weight={0: -2.0}).fit(*blobs)
    with pytest.raises(NotFittedError):
        LogisticRegression().predict_proba(blobs[0])


def test_is_a_scikit_learn_estimator(blobs: Data) -> None:
    search = GridSearchCV(clone(LogisticRegression()), {"C": [0.01, 1.0]}, cv=2).fit(*blobs)
    assert search.best_params_["C"] in (0.01, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # nothing is excluded; two ways to give the same weights must agree to 1e-7
        results = check_estimator(LogisticRegression(), on_skip=None, on_fail="raise")
        assert sum(result["status"] == "passed" for result in results) > 50
