"""What linear classifiers share, by each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vggfeat.logistic import LogisticRegression
from vggfeat.svm import LinearSVM

BOTH = pytest.mark.parametrize(
    "estimator", [LinearSVM(), LogisticRegression()], ids=["svm", "logistic"]
)


def made() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    return rng.normal(0, 1, (60, 5)) + np.eye(3, 5)[y], y


@BOTH
def test_scoring_in_blocks_changes_nothing(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = made()
    model = estimator.fit(X, y)
    whole = model.decision_function(X)
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 7 * 8 * X.shape[1])
    np.testing.assert_allclose(model.decision_function(X), whole, rtol=1e-12, atol=1e-14)


@BOTH
def test_labels_may_be_words_or_columns(estimator: Any) -> None:
    X, y = made()
    words = np.array(["cat", "dog", "owl"])[y]
    np.testing.assert_array_equal(estimator.fit(X, words).predict(X[:1]).dtype, words.dtype)
    Y = np.where(y[:, None] == np.arange(3), 1, -1)
    predicted = estimator.fit(X, Y).predict(X)
    assert predicted.shape == (60, 3) and predicted.dtype == np.int8
    assert estimator.score(X, np.where(predicted == Y, Y, 0)) == 1.0


@BOTH
def test_a_class_without_weight_is_degenerate(estimator: Any) -> None:
    X, y = made()
    model = estimator.fit(X, y, (y != 1).astype(float))
    assert model.degenerate_classes_ == [1]
    assert not model.coef_[1].any()
    assert 1 not in model.predict(X) or model.intercept_[1] == -1


@BOTH
def test_what_labels_cant_be_is_said(estimator: Any) -> None:
    X, y = made()
    with pytest.raises(ValueError, match=r"one class only, 0: an? .* needs at least two"):
        estimator.fit(X, np.zeros(60, int))
    with pytest.raises(ValueError, match="where it is False give -1"):
        estimator.fit(X, y[:, None] == np.arange(3))
    with pytest.raises(ValueError, match="expecting 5 features"):
        estimator.fit(X, y).predict(X[:, :2])
