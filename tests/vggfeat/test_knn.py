"""Votes of nearest neighbours, held against a loop over all images."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

from vggfeat.knn import NearestNeighbours

rng = np.random.default_rng(0)
X = rng.normal(0, 1, (60, 8)).astype(np.float32)
Y = rng.integers(0, 3, 60)
NEW = rng.normal(0, 1, (10, 8)).astype(np.float32)


def votes(k: int, temperature: float) -> np.ndarray:
    """(10, 60) by the definition."""
    a, b = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (NEW, X))
    cosine: np.ndarray = a @ b.T
    weights: np.ndarray = np.zeros_like(cosine)
    for i, row in enumerate(cosine):
        for j in sorted(range(60), key=lambda j: -row[j])[:k]:
            weights[i, j] = np.exp(row[j] / temperature)
    return weights


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (60, 1.0)])
def test_scores_are_shares_of_the_votes(k: int, temperature: float) -> None:
    weights = votes(k, temperature)
    shares = np.stack([weights[:, c == Y].sum(1) for c in range(3)], axis=1)
    model = NearestNeighbours(k, temperature).fit(X, Y)
    found = model.decision_function(NEW)
    np.testing.assert_allclose(found, shares / shares.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(model.predict(NEW), shares.argmax(1))
    two = NearestNeighbours(k, temperature).fit(X, Y == 1)
    np.testing.assert_allclose(two.decision_function(NEW), 2 * found[:, 1] - 1, atol=1e-6)


def test_of_several_labels_those_who_do_not_know_do_not_vote() -> None:
    labels = np.where(Y[:, None] == np.arange(3), 1, -1).astype(np.int8)
    labels[rng.random(labels.shape) < 0.3] = 0
    weights = votes(9, 0.07)
    found = NearestNeighbours(9).fit(X, labels).decision_function(NEW)
    for c in range(3):
        yes, no = (weights[:, labels[:, c] == sign].sum(1) for sign in (1, -1))
        np.testing.assert_allclose(found[:, c], (yes - no) / (yes + no), atol=1e-6)


def test_blocks_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NearestNeighbours(5).fit(X, Y).decision_function(NEW)
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 8 * 60 * 3)
    np.testing.assert_allclose(NearestNeighbours(5).fit(X, Y).decision_function(NEW), whole)
    heavy = NearestNeighbours(60, class_weight={0: 1e9}).fit(X, Y)
    assert (heavy.predict(NEW) == 0).all()
    without = NearestNeighbours(5).fit(X, Y, (np.arange(60) >= 20).astype(float))
    same = NearestNeighbours(5).fit(X[20:], Y[20:])
    np.testing.assert_allclose(without.decision_function(NEW), same.decision_function(NEW))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"k": 0}, "k must be a whole number from 1 up, not 0"),
        ({"k": 61}, "k=61 are more than the 60 training images"),
        ({"temperature": 0}, "temperature must be a positive number, not 0"),
    ],
)
def test_settings_that_no_vote_has(settings: dict[str, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        NearestNeighbours(**settings).fit(X, Y)  # type: ignore[arg-type]


def test_neighbours_are_a_scikit_learn_estimator() -> None:
    # a weight is of a vote, and no more neighbours; and one neighbour has the only vote
    expected = {
        "check_sample_weight_equivalence_on_dense_data": "weights are of votes, not of places",
        "check_class_weight_classifiers": "where all k are of one class, weights change nothing",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            NearestNeighbours(k=2),
            on_skip=None,
            on_fail="raise",
            expected_failed_checks=expected,
        )
    assert sum(result["status"] == "passed" for result in results) > 50
