"""Losses and what dual variables prove, beside their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vggfeat.losses import Problems, proven
from vggfeat.solver import LOSSES

ROWS = slice(0, 50)


def made(loss: str) -> tuple[Problems, torch.Tensor]:
    """Three problems over 50 images, some left out, each image with a weight; and scores."""
    rng = np.random.default_rng(0)
    T = torch.from_numpy(rng.choice([-1, 0, 1], (3, 50), p=(0.5, 0.1, 0.4)).astype(np.int8))
    C = torch.tensor([[0.5], [2.0], [8.0]], dtype=torch.float64)
    weights = torch.from_numpy(rng.uniform(0, 2, (1, 50)))
    problems = Problems(T, C, weights, True, loss == "hinge", torch.ones_like(C))
    return problems, torch.from_numpy(rng.normal(0, 1.5, (3, 50)))


def total(problems: Problems, F: torch.Tensor) -> torch.Tensor:
    """(3,) by the definition."""
    assert problems.weights is not None
    c = problems.C * problems.weights * (problems.T != 0)
    s = (1 - problems.T * F).clamp_min(0)
    return (c * (s if problems.hinge else s * s)).sum(1)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_slope_and_bend_are_one_function_and_its_derivatives(loss: str) -> None:
    problems, F = made(loss)
    at = problems.at(ROWS, F)
    torch.testing.assert_close(at.loss.sum(1), total(problems, F))
    F.requires_grad_()
    if loss == "squared_hinge":
        total(problems, F).sum().backward()
        torch.testing.assert_close(-problems.T * at.alpha, F.grad)
    moved = problems.at(ROWS, F.detach() + 1e-6 * problems.T)
    bend = problems.bend(ROWS, at.bends)
    steady = at.bends == moved.bends
    torch.testing.assert_close(
        (at.alpha - moved.alpha)[steady] / 1e-6, bend[steady], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_no_alpha_proves_more_than_there_is(loss: str) -> None:
    """The conjugate's inequality, image by image: equal at the loss's own alpha."""
    rng = np.random.default_rng(1)
    c = torch.from_numpy(rng.uniform(0, 3, 400))
    c[::7] = 0
    s, share = torch.from_numpy(rng.normal(0, 1, 400)), torch.from_numpy(rng.uniform(0, 1, 400))
    _, beyond = proven(share * c, s, c, loss == "hinge")
    assert (beyond >= -1e-12).all()
    own = torch.where(s > 0, c, 0) if loss == "hinge" else 2 * c * s.clamp_min(0)
    assert proven(own, s, c, loss == "hinge")[1].abs().max() < 1e-12


def test_a_sharper_corner_keeps_its_alpha_and_nears_the_hinge() -> None:
    problems, F = made("hinge")
    before = problems.moved(F)
    problems.sharpen(torch.tensor([True, False, True]), F)
    assert problems.sharp[:, 0].tolist() == [4, 1, 4]
    assert problems.alpha is not None
    torch.testing.assert_close(problems.alpha[0], before[0])
    assert not problems.alpha[1].any()
    # where s is 0 alpha is alpha_0, whatever the curvature
    on_corner = torch.where(problems.T != 0, problems.T.double(), F)
    torch.testing.assert_close(problems.moved(on_corner)[2], before[2])
    for _ in range(12):
        problems.sharpen(torch.tensor([True, True, True]), F)
    c = problems.costs(ROWS)
    off = (1 - problems.T * F).abs() > 1e-3
    own = torch.where(1 - problems.T * F > 0, c, 0)
    torch.testing.assert_close(problems.moved(F)[off], own[off])


def test_some_of_the_problems_are_those() -> None:
    problems, F = made("hinge")
    problems.sharpen(torch.tensor([True, True, True]), F)
    for chosen in (torch.tensor([False, True, True]), torch.tensor([2, 0]), slice(1, 3)):
        some = problems.some(chosen)
        torch.testing.assert_close(
            some.at(ROWS, F[chosen]).alpha, problems.at(ROWS, F).alpha[chosen]
        )
    rough = problems.of(torch.float32)
    assert rough.costs(ROWS).dtype == torch.float32
    torch.testing.assert_close(
        rough.measured(ROWS, F.float()).loss.double(),
        problems.measured(ROWS, F).loss,
        rtol=1e-5,
        atol=1e-5,
    )
