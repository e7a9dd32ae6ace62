"""The solver's Newton step: the same in both spaces, exactly or by conjugate gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vggfeat import rows, spaces
from vggfeat.solver import Solver
from vggfeat.spaces import Examples, Features

from .test_solver import LOSSES, made


def test_the_preconditioner_is_below_the_gram_matrix_and_near() -> None:
    X, _ = made(200, 60, 4)
    K = torch.as_tensor(X.astype(np.float64) @ X.T + 1)
    for rank in (5, 30):
        rest = K - (L := spaces.partial_cholesky(K.diagonal(), K.__getitem__, rank)) @ L.T
        assert L.shape == (200, rank)
        assert torch.linalg.eigvalsh(rest).min() > -1e-9
        # within twice of what the best low-rank matrix leaves
        assert rest.trace() < 2 * torch.linalg.eigvalsh(K)[:-rank].sum()
    every = spaces.partial_cholesky(K.diagonal(), K.__getitem__, 128)
    assert every.shape[1] == 61  # the rank of X and the constant feature


def test_systems_that_rounding_broke_are_factorised() -> None:
    X = torch.ones(2, 5, 1, dtype=torch.float64)
    X[1] *= 1e3
    broken = X @ X.mT - 1e-13 * torch.eye(5, dtype=torch.float64)
    factors = spaces.cholesky(broken)
    torch.testing.assert_close(factors @ factors.mT, broken, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="scale its features"):
        spaces.cholesky(-torch.eye(3))


@pytest.mark.parametrize("loss", LOSSES)
def test_both_spaces_give_the_same(loss: str) -> None:
    X, T = made(90, 40, 3)
    by_examples, by_features = Solver(X), Solver(X, memory=0)
    assert isinstance(by_examples.space, Examples)
    assert isinstance(by_features.space, Features)
    for C in (0.05, 20.0):
        a, b = (s.solve(T, C, loss=loss, tol=1e-8) for s in (by_examples, by_features))
        np.testing.assert_allclose(a.objective, b.objective, rtol=1e-7)
        np.testing.assert_allclose(a.coef, b.coef, atol=2e-3 * np.abs(a.coef).max())


@pytest.mark.parametrize("memory", [2e9, 0])
def test_conjugate_gradients_and_blocks_and_parts_change_nothing(
    memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, T = made(150, 60, 5)
    exact = Solver(X, memory=memory).solve(T, 3.0, tol=1e-8)
    monkeypatch.setattr(spaces, "EXACT_COST", 0.0)
    monkeypatch.setattr(spaces, "GATHER_COST", np.inf)
    monkeypatch.setattr(spaces, "RANK", 12)
    monkeypatch.setitem(spaces.CACHED_VALUES, "cpu", 5 * 40)
    monkeypatch.setitem(rows.BLOCK_VALUES, "cpu", 60 * 40)
    for space in (Examples, Features):
        monkeypatch.setattr(space, "state_bytes", max(memory, 1) / 300)
    parts = Solver(X, memory=memory).solve(T, 3.0, tol=1e-8)
    np.testing.assert_allclose(parts.objective, exact.objective, rtol=1e-7)
    np.testing.assert_allclose(parts.coef, exact.coef, atol=1e-3 * np.abs(exact.coef).max())
