"""Products with X in blocks: held or read again, whole or in halves, of one process or several."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests import prepared
from tests.conftest import HANG
from tests.pretrain.conftest import environment
from vggfeat import rows
from vggfeat.rows import Halves, Plain, Rows, full_sums

CPU = torch.device("cpu")


def made(N: int = 70, D: int = 30, P: int = 4) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """X, weights and numbers for each image, with signs."""
    rng = np.random.default_rng(0)
    X = rng.normal(0, 1, (N, D)).astype(np.float32)
    return (
        X,
        torch.from_numpy(rng.normal(0, 1, (P, D + 1))),
        torch.from_numpy(rng.normal(0, 1, (P, N))),
    )


def errors(held: Rows, X: np.ndarray, W: torch.Tensor, beta: torch.Tensor, rough: bool) -> float:
    """The largest error of either product, beside what the terms of its sum are at most."""
    x = np.hstack([X.astype(np.float64), np.ones((len(X), 1))])
    scores = held.scores(W.float(), rough).double().numpy()
    pulled = held.pull(beta.float(), len(beta), torch.float32, rough).double().numpy()
    w, b = W.numpy(), beta.numpy()
    of_scores = np.abs(scores - w @ x.T) / (np.abs(w) @ np.abs(x.T))
    of_pulled = np.abs(pulled - b @ x) / (np.abs(b) @ np.abs(x))
    return float(max(of_scores.max(), of_pulled.max()))


def test_halves_are_as_good_as_float32_and_rough_ones_good_enough() -> None:
    X, W, beta = made()
    whole, by_halves = Rows(X, CPU), Rows(X, CPU, half=True)
    assert errors(whole, X, W, beta, rough=False) < 3e-7
    assert errors(by_halves, X, W, beta, rough=False) < 1e-6
    assert 1e-5 < errors(by_halves, X, W, beta, rough=True) < 2e-3
    torch.testing.assert_close(by_halves.second(), whole.second(), rtol=1e-3, atol=1e-2)


def test_what_is_float16_is_held_once() -> None:
    X, W, beta = made()
    X16 = X.astype(np.float16)
    once, twice = Rows(X16, CPU, half=True).held[0], Rows(X, CPU, half=True).held[0]
    assert isinstance(once, Halves) and isinstance(twice, Halves)
    assert once.low is None and twice.low is not None
    assert once.bytes == X.size * 2 and twice.bytes == X.size * 4
    assert errors(Rows(X16, CPU, half=True), X16.astype(np.float32), W, beta, False) < 1e-6


@pytest.mark.parametrize("factor", [1e-20, 1e12])
def test_halves_take_any_range(factor: float) -> None:
    X, W, beta = made()
    X *= np.logspace(-12, 12, X.shape[1]).astype(np.float32) * np.float32(factor)
    X[:, 5] = 0
    largest = np.abs(X).max(0).astype(np.float64)
    W[:, :-1] *= torch.from_numpy(np.divide(1, largest, where=largest > 0, out=0 * largest))
    W[1], beta[2] = 0, 0
    held = Rows(X, CPU, half=True)
    x = np.hstack([X.astype(np.float64), np.ones((len(X), 1))])
    scores, pulled = (
        held.scores(W.float()).numpy(),
        held.pull(beta.float(), 4, torch.float32).numpy(),
    )
    terms = np.abs(W.numpy()) @ np.abs(x.T)
    assert (np.abs(scores - W.numpy() @ x.T) <= 2e-6 * terms).all()
    terms = np.abs(beta.numpy()) @ np.abs(x)
    assert (np.abs(pulled - beta.numpy() @ x) <= 2e-6 * terms + 1e-37).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("memory", [0, 3000, 1e9])
def test_blocks_that_are_read_again_give_the_same(
    half: bool, memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, W, beta = made()
    once = Rows(X, CPU, half=half)
    monkeypatch.setitem(rows.BLOCK_VALUES, "cpu", 11 * X.shape[1])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        again = Rows(file.create_dataset("x", data=X), CPU, half=half, memory=memory)
        assert len(again.held) + len(again.beyond) == 7
        assert (len(again.held) > 0) == (memory > 0) and (len(again.beyond) > 0) == (memory < 1e9)
        for dtype in (torch.float32, torch.float64):
            w, b = W.to(dtype), beta.to(dtype)

            def of_rows(own: slice, b: torch.Tensor = b) -> torch.Tensor:
                return b[:, own]

            a = (once.scores(w), once.pull(b, 4, dtype), once.second())
            c = (again.scores(w), again.pull(of_rows, 4, dtype), again.second())
            for one, other in zip(a, c, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_an_array_is_not_copied_and_what_torch_takes_no_view_of_is() -> None:
    X, W, _ = made()
    views = Rows(X, CPU, memory=0)
    assert not views.held or isinstance(views.held[0], Plain)
    read_only = X.copy()
    read_only.flags.writeable = False
    expected = Rows(X, CPU).scores(W.float())
    for same in (read_only, X[::-1][::-1], np.asfortranarray(X)):
        torch.testing.assert_close(Rows(same, CPU).scores(W.float()), expected)
    backwards = Rows(X[::-1], CPU).scores(W.float())
    torch.testing.assert_close(backwards, expected.flip(1))


class Broken:
    """Rows that can't be read a second time."""

    dtype = np.dtype(np.float32)

    def __init__(self, X: np.ndarray) -> None:
        self.X, self.shape, self.left = X, X.shape, 12

    def __getitem__(self, own: Any) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        some: np.ndarray = self.X[own]
        return some


def test_an_error_of_reading_ahead_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    X, W, _ = made()
    monkeypatch.setitem(rows.BLOCK_VALUES, "cpu", 11 * X.shape[1])
    held = Rows(Broken(X), CPU, memory=0)
    held.scores(W.float())
    with pytest.raises(OSError, match="the disk is gone"):
        held.scores(W.float())


def test_short_memory_takes_smaller_blocks_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    X, W, _ = made()
    expected, own = Rows(X, CPU, half=True).scores(W.float()), Rows._made

    def short(self: Rows, some: slice) -> Any:
        if some.stop - some.start > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return own(self, some)

    monkeypatch.setattr(Rows, "_made", short)
    monkeypatch.setitem(rows.BLOCK_VALUES, "cpu", 70 * X.shape[1])
    with pytest.warns(UserWarning, match="memory is short: X is read in blocks") as told:
        held = Rows(X, CPU, half=True)
    assert [re.findall(r"of (\d+) rows", str(one.message)) for one in told] == [["35"], ["18"]]
    torch.testing.assert_close(held.scores(W.float()), expected, rtol=1e-5, atol=1e-5)


def test_sums_are_full_and_what_was_set_comes_back() -> None:
    of_gpu = torch.backends.cuda.matmul
    before = of_gpu.allow_fp16_reduced_precision_reduction, of_gpu.allow_tf32
    try:
        of_gpu.allow_fp16_reduced_precision_reduction = of_gpu.allow_tf32 = True
        with pytest.raises(KeyError), full_sums():
            assert not of_gpu.allow_fp16_reduced_precision_reduction and not of_gpu.allow_tf32
            raise KeyError
        assert of_gpu.allow_fp16_reduced_precision_reduction and of_gpu.allow_tf32
    finally:
        of_gpu.allow_fp16_reduced_precision_reduction, of_gpu.allow_tf32 = before


JOB = """
import sys
import numpy as np
from vggfeat import ranks
from vggfeat.solver import Solver

found = {}
data = np.load(sys.argv[1])
with ranks.joined("cpu") as job:
    for way in (("squared_hinge", True, 0), ("hinge", True, 1e9), ("hinge", False, 1e9)):
        loss, half, memory = way
        solver = Solver(data["X"], memory=memory, half=half, ranks=job)
        assert len(data["X"]) // 3 <= solver.rows.N <= len(data["X"]) // 3 + 1
        assert bool(solver.rows.beyond) == (memory == 0 and half)
        state = solver.solve(data["T"], 0.5, weights_NP=data["weights"], loss=loss).state
        solved = solver.solve(data["T"], 2.0, weights_NP=data["weights"], loss=loss, start=state)
        found["{}, {}, {}".format(*way)] = np.column_stack(
            [solved.coef, solved.intercept, solved.gap]
        )
    np.savez(f"{sys.argv[2]}/{job.rank}.npz", **found)
"""


def test_several_processes_solve_what_one_does(tmp_path: Path) -> None:
    """Each its rows, held or read again, sums over all; the same bits on each."""
    from vggfeat.solver import Solver

    rng = np.random.default_rng(0)
    X = np.maximum(rng.normal(0, 1, (301, 20)), 0).astype(np.float32)
    T = np.where(rng.random((301, 3)) < 0.3, 1, -1).astype(np.int8)
    T[rng.random(T.shape) < 0.1] = 0
    weights = rng.uniform(0.5, 2, T.shape)
    np.savez(tmp_path / "data.npz", X=X, T=T, weights=weights)
    (tmp_path / "job.py").write_text(JOB)
    arguments = [tmp_path / "job.py", tmp_path / "data.npz", tmp_path]
    ended = prepared.run(arguments, environment(), 3, timeout=HANG)
    assert ended.returncode == 0, ended.stderr
    first, *others = (np.load(tmp_path / f"{rank}.npz") for rank in range(3))
    for way in first.files:
        loss = way.partition(",")[0]
        alone = Solver(X).solve(T, 2.0, weights_NP=weights, loss=loss, tol=1e-7)
        for other in others:
            np.testing.assert_array_equal(other[way], first[way])
        assert (first[way][:, -1] <= 1e-5).all()
        for p in range(3):
            w, b = first[way][p, :-2], first[way][p, -2]
            s = np.maximum(0, 1 - T[:, p] * (X @ w + b)) * (T[:, p] != 0)
            cost = 2.0 * weights[:, p] * (s if loss == "hinge" else s**2)
            objective = 0.5 * (w @ w + b * b) + cost.sum()
            assert objective == pytest.approx(alone.objective[p], rel=1.1e-5)
