"""Ridge classification beside scikit-learn's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.linear_model import RidgeClassifier as Theirs
from sklearn.utils.estimator_checks import check_estimator

from vggfeat.matrix import Selected
from vggfeat.ridge import RidgeClassifier


def made(N: int, D: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(N) % K
    X = np.maximum(rng.normal(0, 1, (N, D)) + rng.normal(0, 1, (K, D))[y], 0)
    return X.astype(np.float32), y


@pytest.mark.parametrize("weight", [None, "balanced", {0: 5.0, 1: 0.2}])
@pytest.mark.parametrize("shape", [(200, 20, 4), (40, 90, 3), (200, 20, 2)])
def test_coefficients_are_scikit_learns(shape: tuple[int, int, int], weight: Any) -> None:
    X, y = made(*shape)
    r = np.random.default_rng(1).integers(0, 3, len(y)).astype(float)
    if weight == "balanced":  # scikit-learn's counts images, ours their weights
        r[:] = 1
    ours = RidgeClassifier(C=0.5, class_weight=weight).fit(X, y, r)
    theirs = Theirs(alpha=2.0, class_weight=weight).fit(X.astype(np.float64), y, r)
    np.testing.assert_allclose(ours.coef_, np.atleast_2d(theirs.coef_), atol=1e-9)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-9)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


def test_what_is_left_out_for_a_label_is_no_part_of_its_problem() -> None:
    X, y = made(120, 15, 3)
    Y = np.where(y[:, None] == np.arange(3), 1, -1).astype(np.int8)
    Y[np.random.default_rng(0).random(Y.shape) < 0.2] = 0
    Y[:, 2] = np.where(Y[:, 2] == 1, -1, Y[:, 2])  # without positives
    ours = RidgeClassifier(C=2.0).fit(X, Y)
    for k in range(2):
        known = Y[:, k] != 0
        alone = Ridge(alpha=0.5).fit(X[known].astype(np.float64), Y[known, k])
        np.testing.assert_allclose(ours.coef_[k], alone.coef_, atol=1e-9)
        assert ours.intercept_[k] == pytest.approx(alone.intercept_, abs=1e-9)
    assert ours.degenerate_classes_ == [2] and not ours.coef_[2].any()
    assert ours.intercept_[2] == -1


def test_rows_are_read_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = made(200, 20, 4)
    whole = RidgeClassifier().fit(X, y)
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 8 * 20 * 30)
    parts = RidgeClassifier().fit(Selected(X, np.arange(200)), y)
    np.testing.assert_allclose(parts.coef_, whole.coef_, atol=1e-12)


def test_ridge_is_a_scikit_learn_estimator() -> None:
    results = check_estimator(RidgeClassifier(), on_skip=None, on_fail="raise")
    assert sum(result["status"] == "passed" for result in results) > 50
