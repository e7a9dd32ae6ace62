"""The solver of logistic regressions by itself: its certificate, its spaces, its preconditioner."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vggfeat import softmax
from vggfeat.rows import Rows
from vggfeat.softmax import Binomial, Examples, Features, Loss, Preconditioner, Softmax, solve


def made(N: int, D: int, C: float, several: bool) -> tuple[np.ndarray, Loss]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, N)
    X = np.maximum(rng.normal(0, 1, (N, D)) + 0.7 * rng.normal(0, 1, (4, D))[y], 0)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    c = C * torch.as_tensor(rng.uniform(0.5, 2, N))
    if not several:
        return X.astype(np.float32), Softmax(torch.as_tensor(y), c)
    t = torch.as_tensor(np.where(y[:, None] == np.arange(4), 1.0, -1.0))
    t[::7, 1] = 0
    return X.astype(np.float32), Binomial(t, c[:, None] * (t != 0))


def objective(X: np.ndarray, loss: Loss, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    losses, _ = loss.at(torch.as_tensor(X.astype(np.float64) @ coef.T + intercept))
    found: np.ndarray
    found = (losses + 0.5 * loss.total(torch.as_tensor(coef).square().sum(1))).numpy()
    return found


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("shape", [(120, 20), (40, 60)])
@pytest.mark.parametrize("C", [2.0**-7, 1.0, 2.0**7, 2.0**14])
def test_no_more_is_lost_than_the_gap_says(shape: tuple[int, int], several: bool, C: float) -> None:
    X, loss = made(*shape, C, several)
    best = solve(X, loss, 1e-12)
    least = objective(X, loss, best.coef, best.intercept)
    assert (best.gap <= 1e-12).all()
    for tol in (1e-1, 1e-3, 1e-5):
        found = solve(X, loss, tol)
        own = objective(X, loss, found.coef, found.intercept)
        np.testing.assert_allclose(found.objective, own, rtol=1e-12)
        assert (found.gap <= tol).all()
        assert (own - least <= found.gap * own + 1e-11 * own).all()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("shape", [(120, 20), (40, 60)])
def test_few_components_and_a_stream_lead_there_too(
    shape: tuple[int, int], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, loss = made(*shape, 8.0, several)
    best = solve(X, loss, 1e-10)
    monkeypatch.setattr(softmax, "ALL_COMPONENTS", 5)
    monkeypatch.setattr(softmax, "COMPONENTS", 5)
    monkeypatch.setattr(softmax, "HARDEST", 3)
    monkeypatch.setattr("vggfeat.rows.BLOCK_VALUES", {"cpu": 7 * shape[1]})
    for copy, gram in ((4e9, 2e9), (0, 0)):
        monkeypatch.setattr(softmax, "COPY_BYTES", copy)
        monkeypatch.setattr(softmax, "GRAM_BYTES", gram)
        found = solve(X, loss, 1e-10)
        assert (found.gap <= 1e-10).all()
        np.testing.assert_allclose(found.coef, best.coef, atol=1e-4)


def test_the_preconditioner_is_a_classs_own_system() -> None:
    # one curvature for all images but the hardest, all components: the inverse, but for b's share
    X, _ = made(60, 9, 1.0, True)
    h = torch.full((60, 4), 0.1, dtype=torch.float64)
    h[:20] = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)).double() + 0.2
    space = Features(Rows(X, torch.device("cpu")), torch.ones(60, 1, dtype=torch.float64))
    x = torch.as_tensor(X).double() - space.mean[:, 0]
    x = torch.cat([x, torch.ones(60, 1)], 1)
    solve_with = Preconditioner(space, h)
    R = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    for k in range(4):
        system = x.T @ (h[:, k, None] * x)
        system.diagonal()[:-1] += 1
        expected = torch.linalg.solve(system, R[:, k].double())
        near = solve_with(R)[:, k].double()
        assert (near - expected).norm() < 0.02 * expected.norm()


def test_a_gram_matrix_has_the_same_scores() -> None:
    X, loss = made(40, 60, 1.0, False)
    rows, r = Rows(X, torch.device("cpu")), torch.ones(40, 1, dtype=torch.float64)
    S = torch.randn(41, 4, generator=torch.Generator().manual_seed(0)).double()
    space = Examples(rows, r)
    exact = rows.scores(space.weights(S).T.contiguous()).T
    np.testing.assert_allclose(space.scores(S).double(), exact, atol=1e-4)
    features = Features(rows, r)
    np.testing.assert_allclose(
        features.scores(features.near(space.weights(S), loss)).double(), exact, atol=1e-4
    )
