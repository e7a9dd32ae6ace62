"""The dual alone, without the Newton method that goes on from what it leaves; and with it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from vggfeat import dual
from vggfeat import solver as solver_module
from vggfeat.solver import Solver
from vggfeat.spaces import ByFeatures, Gram

from .test_solver import CASES, LOSSES, liblinear, made, objective

MANY = float("inf")


@pytest.fixture(autouse=True)
def of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images are solved as many are, and few of them count as near a margin."""
    monkeypatch.setattr(solver_module, "FEW", 0)
    monkeypatch.setattr(dual, "LEAST", 20)
    monkeypatch.setattr(dual, "ITERATED", np.inf)
    monkeypatch.setattr(dual, "EXACT", dict.fromkeys(dual.EXACT, np.inf))
    monkeypatch.setattr(solver_module, "SMALL", 0)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Solver, "_ways", lambda self: ())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("solves", [1, MANY])
@pytest.mark.parametrize("case", CASES)
def test_by_duals_the_objective_is_liblinears(
    case: str, solves: float, loss: str, alone: None
) -> None:
    X, T = CASES[case]()
    solver = Solver(X, solves=solves)
    for C in (2.0**-7, 0.3, 8.0):
        found = solver.solve(T, C, loss=loss)
        assert (found.gap <= 1e-5).all()
        for k in range(T.shape[1]):
            ours = objective(X, T[:, k], C, loss, found.coef[k], found.intercept[k])
            assert found.objective[k] == pytest.approx(ours, rel=1e-9)
            assert ours <= liblinear(X, T[:, k], C, loss) * (1 + 1e-5)


def test_few_problems_do_without_a_gram_matrix() -> None:
    X, T = made(200, 100, 3)
    few, many = Solver(X, solves=1), Solver(X, solves=1000)
    assert isinstance(few.products, ByFeatures) and isinstance(many.products, Gram)
    a, b = (s.solve(T, 2.0, tol=1e-6) for s in (few, many))
    np.testing.assert_allclose(a.objective, b.objective, rtol=2e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("solves", [1, MANY])
def test_weights_left_out_images_and_C_of_each_problem(
    loss: str, solves: float, alone: None
) -> None:
    X, T = made(150, 40, 3)
    T[:, 1] = 0  # a problem without images
    weights = np.random.default_rng(1).uniform(0, 2, T.shape)
    weights[:20] = 0
    Cs = [0.1, 1.0, 3.3]
    together = Solver(X, solves=solves).solve(T, Cs, weights_NP=weights, loss=loss)
    assert not together.coef[1].any() and together.gap[1] == 0
    assert (together.gap <= 1e-5).all()
    for k in (0, 2):
        ours = objective(
            X, T[:, k], Cs[k] * weights[:, k], loss, together.coef[k], together.intercept[k]
        )
        assert together.objective[k] == pytest.approx(ours, rel=1e-9)
        there = weights[:, k] > 0
        theirs = liblinear(X[there], T[there, k], Cs[k], loss, weights[there, k])
        assert ours <= theirs * (1 + 1e-5)


def test_a_path_starts_where_the_last_one_ended(alone: None) -> None:
    """The hinge's state says what is at its cap: at another C it is at that one's."""
    X, T = made(200, 50, 4)
    solver, start = Solver(X), None
    for C in (0.03, 0.1, 0.4, 1.5):
        warm, cold = solver.solve(T, C, loss="hinge", start=start), solver.solve(T, C, loss="hinge")
        np.testing.assert_allclose(warm.objective, cold.objective, rtol=2e-5)
        start = warm.state
        # far from its margin on the wrong side an image is at its cap, on the right side 0
        s = 1 - T.T * warm.scores.T
        assert start[torch.as_tensor((s > 0.1) & (T.T != 0))].isinf().all()
        assert not start[torch.as_tensor((s < -0.1) & (T.T != 0))].any()
    again = solver.solve(T, 1.5, loss="hinge", start=start)
    assert again.steps.sum() < cold.steps.sum() / 2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sweep_is_coordinate_ascent(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, T = made(70, 20, 3)
    monkeypatch.setitem(dual.SWEEPS, True, 2)
    monkeypatch.setattr(dual, "ROUNDS", 0)
    solver, C = Solver(X), 0.7
    problems = solver._asked(T, C, None, loss)
    assert solver.products is not None
    alpha, _ = dual.solve(solver.products, problems, 1e-9, None, lambda beta: beta)
    K = X.astype(np.float64) @ X.T + 1
    slow = np.zeros(T.T.shape)
    order = [i for first in range(2) for i in range(first, 70, 2)]
    for a, t in zip(slow, T.T.astype(float), strict=True):
        for i in order * 2:
            if t[i]:
                ridge = 0 if loss == "hinge" else 0.5 / C
                step = (1 - t[i] * (K[i] @ (t * a)) - ridge * a[i]) / (K[i, i] + ridge)
                a[i] = np.clip(a[i] + step, 0, C if loss == "hinge" else np.inf)
    np.testing.assert_allclose(alpha, slow, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_it_leaves_is_gone_on_with(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, T = made(300, 40, 3)
    reference = Solver(X).solve(T, 4.0, loss=loss)
    limits: list[tuple[str, Any]] = [("MOST", 30), ("ROUNDS", 0), ("STEPS", 1), ("ITERATED", 0.0)]
    for name, value in limits:
        with monkeypatch.context() as patch:
            patch.setattr(dual, name, value)
            for solves in (1, MANY):
                found = Solver(X, solves=solves).solve(T, 4.0, loss=loss)
                assert (found.gap <= 1e-5).all()
                np.testing.assert_allclose(found.objective, reference.objective, rtol=2e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("spread", [2, 7])
def test_features_far_apart_make_no_noise(loss: str, spread: int) -> None:
    X, T = made(150, 12, 3)
    X = X * np.logspace(-spread, spread, 12).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Solver(X, memory=2e9).solve(T, 10.0, loss=loss)
    assert np.isfinite(found.coef).all() and np.isfinite(found.gap).all()
    if spread == 2:
        assert (found.gap <= 1e-5).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_bits_twice_and_the_same_in_parts(loss: str) -> None:
    X, T = made(200, 60, 5)
    a, b = (Solver(X).solve(T, 2.0, loss=loss) for _ in range(2))
    np.testing.assert_array_equal(a.coef, b.coef)
    assert torch.equal(a.state, b.state)
    parted = Solver(X)
    parted.memory = 1e5
    np.testing.assert_allclose(parted.solve(T, 2.0, loss=loss).objective, a.objective, rtol=2e-5)
