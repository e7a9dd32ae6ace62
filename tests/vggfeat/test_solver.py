"""The batched solver against liblinear's objective, in both spaces, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from vggfeat import solver as solver_module
from vggfeat import spaces
from vggfeat.matrix import Selected
from vggfeat.rows import Halves, Rows
from vggfeat.solver import Solver
from vggfeat.spaces import Examples, Features

LOSSES = ["squared_hinge", "hinge"]


def objective(X: np.ndarray, t: np.ndarray, C: Any, loss: str, w: np.ndarray, b: float) -> float:
    """liblinear's, in float64; C: a number, or one an example."""
    known = t != 0
    s = np.maximum(0, 1 - t * (X.astype(np.float64) @ w + b))
    per = np.broadcast_to(C, t.shape)[known]
    return 0.5 * float(w @ w + b * b) + float(
        (per * (s[known] ** 2 if loss == "squared_hinge" else s[known])).sum()
    )


def liblinear(
    X: np.ndarray, t: np.ndarray, C: float, loss: str, weights: np.ndarray | None = None
) -> float:
    known = t != 0
    svc = LinearSVC(
        C=C, loss=loss, tol=1e-6, max_iter=1_000_000, dual=loss == "hinge", random_state=0
    )
    svc.fit(X[known].astype(np.float64), t[known], None if weights is None else weights[known])
    c = C if weights is None else C * weights
    return objective(X, t, c, loss, svc.coef_[0], svc.intercept_[0])


def made(N: int, D: int, K: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors as VGG's: not negative, of unit length; K classes that overlap, as columns of 1,
    -1 and some 0.
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, N)
    X = np.maximum(rng.normal(0, 1, (N, D)) + 0.7 * rng.normal(0, 1, (K, D))[y], 0).astype(
        np.float32
    )
    X /= np.linalg.norm(X, axis=1, keepdims=True) + 1e-9
    T = np.where(y[:, None] == np.arange(K), 1, -1).astype(np.int8)
    T[rng.random(T.shape) < 0.05] = 0
    return X, T


CASES: dict[str, Callable[[], Any]] = {
    "more images than dimensions": lambda: made(300, 20, 4),
    "far more": lambda: made(600, 5, 3),
    "more dimensions than images": lambda: made(60, 400, 4),
    "duplicated rows": lambda: tuple(np.repeat(a, 3, axis=0) for a in made(50, 30, 3)),
    "a class with one positive": lambda: (
        made(120, 40, 2)[0],
        np.where(np.arange(120) == 7, 1, -1).astype(np.int8)[:, None],
    ),
}


@pytest.fixture(params=["float32", "float64"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a solve begins in: as with many images, or as with few."""
    if request.param == "float32":
        monkeypatch.setattr(solver_module, "FEW", 0)
    return str(request.param)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_the_objective_is_liblinears(case: str, loss: str, precision: str) -> None:
    X, T = CASES[case]()
    solver = Solver(X)
    for C in (2.0**-7, 1.0, 2.0**7):
        found = solver.solve(T, C, loss=loss)
        assert (found.gap <= 1e-5).all()
        for k in range(T.shape[1]):
            ours = objective(X, T[:, k], C, loss, found.coef[k], found.intercept[k])
            assert found.objective[k] == pytest.approx(ours, rel=1e-5)
            theirs = liblinear(X, T[:, k], C, loss)
            assert ours <= theirs * (1 + 1e-5)
            assert ours == pytest.approx(theirs, rel=1e-3)  # liblinear's own end is rough
        scores = X.astype(np.float64) @ found.coef.T + found.intercept
        np.testing.assert_allclose(found.scores, scores, atol=1e-6 * np.abs(scores).max())


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("loss", LOSSES)
def test_badly_scaled_features(loss: str, precision: str) -> None:
    X, T = made(150, 12, 3)
    X = X * np.logspace(-3, 3, 12).astype(np.float32)
    found = Solver(X).solve(T, 1.0, loss=loss)
    assert (found.gap <= 1e-5).all()
    for k in range(3):
        # liblinear itself does not get there: the gap is the proof
        ours = objective(X, T[:, k], 1.0, loss, found.coef[k], found.intercept[k])
        assert ours <= liblinear(X, T[:, k], 1.0, loss) * (1 + 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("duals", [True, False])
@pytest.mark.parametrize("shape", [(90, 120), (300, 20)])
def test_descriptors_that_are_not_normalised(
    shape: tuple[int, int], duals: bool, loss: str, precision: str
) -> None:
    # beside the regulariser their losses bend a million times and more
    X, T = made(*shape, 3)
    for length in (30, 300):
        solver = Solver(X * np.float32(length))
        if not duals:  # as on a GPU
            solver.products = None
        for C in (1.0, 2.0**7):
            found = solver.solve(T, C, loss=loss)
            assert (found.gap <= 1e-5).all()
            w, b = found.coef[0], found.intercept[0]
            ours = objective(X * np.float32(length), T[:, 0], C, loss, w, b)
            assert found.objective[0] == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("memory", [2e9, 0])
@pytest.mark.parametrize("iterative", [False, True])
def test_features_twelve_orders_apart_are_solved_or_said(
    memory: float, iterative: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the gap says whether a solution is one: no error of a factorisation, no NaN."""
    if iterative:
        monkeypatch.setattr(spaces, "EXACT_COST", 0.0)
        monkeypatch.setattr(spaces, "GATHER_COST", np.inf)
        monkeypatch.setattr(spaces, "RANK", 6)
    X, T = made(150, 12, 3)
    X = X * np.logspace(-6, 6, 12).astype(np.float32)
    found = Solver(X, memory=memory).solve(T, 100.0)
    assert np.isfinite(found.coef).all()
    assert np.isfinite(found.gap).all()
    assert (found.objective <= 100.0 * (T != 0).sum(0)).all()  # no worse than w = 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gap_is_a_bound(loss: str, precision: str) -> None:
    """What a loosely solved problem could still lose is at most its gap, and is not nothing."""
    X, T = made(200, 30, 4)
    solver = Solver(X)
    exact = solver.solve(T, 8.0, loss=loss, tol=1e-9)
    loose = solver.solve(T, 8.0, loss=loss, tol=0.3)
    assert (loose.objective - exact.objective <= loose.gap * loose.objective).all()
    assert (loose.objective > exact.objective * (1 + 1e-9)).any()
    assert (loose.gap <= 0.3).all()


def test_a_warm_start_takes_fewer_steps_to_the_same_place(precision: str) -> None:
    X, T = made(200, 50, 4)
    solver = Solver(X)
    before = solver.solve(T, 4.0)
    cold, warm = solver.solve(T, 8.0), solver.solve(T, 8.0, start=before.state)
    np.testing.assert_allclose(warm.objective, cold.objective, rtol=2e-5)
    assert warm.steps.sum() < cold.steps.sum()


@pytest.mark.parametrize("memory", [2e9, 0])
def test_left_out_images_and_weights(memory: float) -> None:
    X, T = made(120, 30, 3)
    weights = np.random.default_rng(1).integers(0, 4, 120).astype(float)
    weighted = Solver(X, memory=memory).solve(T, 2.0, weights_NP=weights[:, None], tol=1e-9)
    repeated = Solver(np.repeat(X, weights.astype(int), axis=0), memory=memory).solve(
        np.repeat(T, weights.astype(int), axis=0), 2.0, tol=1e-9
    )
    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-8)
    for k in range(3):
        assert weighted.objective[k] == pytest.approx(
            liblinear(X, T[:, k], 2.0, "squared_hinge", weights), rel=1e-5
        )
    wild = X.copy()
    wild[T[:, 0] == 0] = 50.0
    a, b = (Solver(x, memory=memory).solve(T[:, :1], 2.0, tol=1e-9) for x in (X, wild))
    np.testing.assert_allclose(a.coef, b.coef, rtol=1e-6, atol=1e-8)


def test_each_problem_has_its_own_C() -> None:
    X, T = made(120, 30, 3)
    solver = Solver(X)
    together = solver.solve(T, [0.1, 1.0, 10.0], tol=1e-9)
    for k, C in enumerate((0.1, 1.0, 10.0)):
        alone = solver.solve(T[:, k : k + 1], C, tol=1e-9)
        assert together.objective[k] == pytest.approx(alone.objective[0], rel=1e-8)


@pytest.mark.parametrize("memory", [2e9, 0])
def test_a_problem_without_images_weighs_nothing(memory: float) -> None:
    X, T = made(60, 20, 2)
    T[:, 1] = 0
    found = Solver(X, memory=memory).solve(T, 4.0)
    assert not found.coef[1].any() and found.intercept[1] == 0
    assert found.gap[1] == 0 and (found.gap <= 1e-5).all()


@pytest.mark.parametrize("memory", [2e9, 0])
def test_huge_values_are_refused(memory: float, precision: str) -> None:
    X, _ = made(40, 30, 2)
    for huge in ((X * np.float32(1e25)).astype(np.float32), X.astype(np.float64) * 1e200):
        with pytest.raises(ValueError, match="scale it"):
            Solver(huge, memory=memory)


@pytest.mark.parametrize("memory", [2e9, 0])
def test_costs_beyond_all_digits_are_refused(memory: float) -> None:
    X, T = made(40, 30, 2)
    for factor, C in ((1, 1e17), (1e9, 1.0)):
        with pytest.raises(ValueError, match="nothing is solved beyond"):
            Solver(X * factor, memory=memory).solve(T, C)


@pytest.mark.parametrize("loss", LOSSES)
def test_more_images_than_features_and_a_large_cost(loss: str) -> None:
    # their Gram matrix has no inverse, and the dual variables are large
    X, T = made(150, 25, 3)
    X = X * np.float32(100)
    X[:, :3] = 1, 100, -1000
    found = Solver(X).solve(T, 2.0**12, loss=loss)
    assert isinstance(Solver(X).space, Examples) and (found.gap <= 1e-5).all()
    for k in range(3):
        ours = objective(X, T[:, k], 2.0**12, loss, found.coef[k], found.intercept[k])
        assert found.objective[k] == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_worse_than_nothing_is_told(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, T = made(60, 90, 2)
    solver = Solver(X)
    monkeypatch.setattr(Solver, "_ways", lambda self: ())
    asked = solver._asked(T, 1.0, None, loss).of(torch.float64)
    V = torch.full((2, 60), 1e6, dtype=torch.float64)
    asked.alpha = torch.zeros_like(V)
    w, scores, gap, told, state, _ = solver._finished(asked, V, torch.zeros(2), 1e-5)
    assert not any(part.any() for part in (w, scores, state)) and (gap == 1).all()
    np.testing.assert_array_equal(told, (T != 0).sum(0))


def test_twice_the_same() -> None:
    X, T = made(150, 60, 5)
    a, b = (Solver(X).solve(T, 2.0) for _ in range(2))
    np.testing.assert_array_equal(a.coef, b.coef)


def test_what_it_could_not_reach_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    X, T = made(150, 60, 5)
    monkeypatch.setattr(solver_module, "MAX_STEPS", dict.fromkeys(solver_module.MAX_STEPS, 1))
    assert (Solver(X).solve(T, 1e3).gap > 1e-5).any()


def test_half_precision_is_read_as_it_is() -> None:
    X, T = made(80, 30, 2)
    half = X.astype(np.float16)
    a, b = (Solver(x).solve(T, 2.0, tol=1e-7) for x in (half, half.astype(np.float64)))
    np.testing.assert_allclose(a.objective, b.objective, rtol=1e-6)
    # X itself is another
    assert np.abs(a.objective / Solver(X).solve(T, 2.0, tol=1e-7).objective - 1).max() > 1e-6


def test_what_float32_is_too_rough_for_is_solved_in_float64() -> None:
    rng = np.random.default_rng(0)
    # 1e6 a product, and 1 that tells two images apart
    X = (1000 + rng.normal(0, 1, (80, 120))).astype(np.float32)
    T = np.where(rng.random((80, 1)) < 0.5, 1, -1).astype(np.int8)
    solver = Solver(X)
    found = solver.solve(T, 1.0)
    assert isinstance(solver.space, Examples) and torch.float64 in solver.space.products
    assert found.gap[0] <= 1e-5
    reference = Solver(X.astype(np.float64)).solve(T, 1.0, tol=1e-9)
    np.testing.assert_allclose(found.objective, reference.objective, rtol=1e-5)


def test_a_start_near_the_solution(precision: str) -> None:
    X, T = made(300, 60, 4)
    part, whole = Solver(X[:150]), Solver(X)
    before = part.solve(T[:150], 8.0)
    for loss in LOSSES:
        cold = whole.solve(T, 8.0, loss=loss)
        near = whole.solve(T, 8.0, loss=loss, near=(before.coef, before.intercept))
        np.testing.assert_allclose(near.objective, cold.objective, rtol=2e-5)
        assert whole.products or near.steps.sum() < cold.steps.sum()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("length", [1.0, 30.0])
def test_halves_find_what_float64_finds(loss: str, length: float) -> None:
    """The way of a GPU, on the CPU: products of float16 with float32 sums."""
    X, T = made(300, 40, 4)
    X *= np.float32(length)
    reference, by_halves = Solver(X.astype(np.float64)), Solver(X, memory=1e6, half=True)
    assert isinstance(by_halves.rows.held[0], Halves)
    for C in (2.0**-7, 1.0, 2.0**7):
        a, b = reference.solve(T, C, loss=loss, tol=1e-7), by_halves.solve(T, C, loss=loss)
        assert (b.gap <= 1e-5).all()
        np.testing.assert_allclose(b.objective, a.objective, rtol=1e-5)


def test_halves_of_features_beyond_float16() -> None:
    """Columns far above what float16 holds, and far below; weights a class and an image."""
    X, T = made(300, 20, 3)
    X = X * np.logspace(-7, 7, 20).astype(np.float32)
    X[:, 3] = 0
    assert np.abs(X).max() > np.finfo(np.float16).max
    weights = np.random.default_rng(0).uniform(0.5, 2, T.shape)
    a, b = (
        Solver(X, memory=1e6, half=half).solve(T, 1e-3, weights_NP=weights, tol=1e-3)
        for half in (False, True)
    )
    assert (b.gap <= 1e-3).all()
    np.testing.assert_allclose(b.objective, a.objective, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:memory is short")
def test_short_memory_takes_fewer_problems_at_a_time_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    X, T = made(120, 30, 5)
    whole = Solver(X).solve(T, 2.0)
    solver, own = Solver(X), Solver._solve

    def short(self: Solver, problems: Any, *rest: Any) -> Any:
        if len(problems) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return own(self, problems, *rest)

    monkeypatch.setattr(Solver, "_solve", short)
    with pytest.warns(UserWarning, match="memory is short: 1 of 5 SVMs are trained at a time"):
        parts = solver.solve(T, 2.0)
    np.testing.assert_allclose(parts.coef, whole.coef, rtol=1e-6, atol=1e-9)
    assert parts.scores.shape == whole.scores.shape

    def none(self: Solver, *asked: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Solver, "_solve", none)
    with pytest.raises(MemoryError), pytest.warns(UserWarning, match="memory is short"):
        solver.solve(T, 2.0)


def test_no_memory_for_the_gram_matrix_does_without_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    X, T = made(120, 30, 2)
    expected = Solver(X).solve(T, 2.0, tol=1e-9)

    def none(self: Rows, dtype: torch.dtype, size: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Rows, "products", none)
    with pytest.warns(UserWarning, match="memory is short: 120 images have no Gram matrix"):
        solver = Solver(X)
    assert isinstance(solver.space, Features)
    np.testing.assert_allclose(solver.solve(T, 2.0, tol=1e-9).coef, expected.coef, atol=1e-5)


def test_rows_of_an_array_that_follow_each_other_are_where_they_are() -> None:
    X, T = made(90, 30, 2)
    some = Solver(Selected(X, np.arange(20, 80)), solves=1)
    assert np.shares_memory(some.rows.X, X) and some.products is not None
    expected = Solver(X[20:80].copy(), solves=1).solve(T[20:80], 2.0)
    np.testing.assert_array_equal(some.solve(T[20:80], 2.0).coef, expected.coef)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", ["Gram matrix", "halves", "read again"])
def test_a_gpus_objective_is_the_cpus(gpu: torch.device, way: str, loss: str) -> None:
    X, T = made(700, 150, 4)
    X, memory = X.astype(np.float16), {"Gram matrix": None, "halves": None, "read again": 4e5}[way]
    solver = Solver(X, gpu, memory, half=None if way == "Gram matrix" else True)
    assert isinstance(solver.space, Examples) == (way == "Gram matrix")
    assert bool(solver.rows.beyond) == (way == "read again")
    for C in (2.0**-7, 1.0, 2.0**7):
        found = solver.solve(T, C, loss=loss)
        assert (found.gap <= 1e-5).all()
        exact = Solver(X.astype(np.float64)).solve(T, C, loss=loss, tol=1e-7)
        np.testing.assert_allclose(found.objective, exact.objective, rtol=1e-5)
        np.testing.assert_allclose(found.scores, exact.scores, atol=0.02)
