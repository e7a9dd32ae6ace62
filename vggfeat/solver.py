"""Many linear SVMs over the same images, solved together: Newton's method on the examples inside
the margin.

N images, D descriptor length, P problems (a class, a fold: each a column). Problem p minimises
liblinear's

    0.5 |w, b|^2 + sum_i c_ip loss(s_ip),    s = 1 - t_ip (w x_i + b),

loss = max(0, s)^2 or max(0, s), with targets t_ip in {1, -1}; t_ip = 0 leaves image i out of
problem p (a fold, a difficult object). The bias b is the weight of a constant feature 1, so a state
(w, b) is one vector and x_i ends in 1.

Where s > 0 the squared hinge is a parabola, elsewhere 0: with H = diag(2 c) over those "active"
examples, a Newton step d solves (I + X' H X) d = -gradient. The steps of all problems share their
products with X, which are therefore as wide as there are problems. The system is solved exactly
where few examples are active (large C), and by conjugate gradients where many are (small C). Their
preconditioner is the system of a low-rank X, which is found once for all problems and all C. The
hinge is approached by parabolas of growing curvature next to its corner.

States live in one of two spaces, whichever is smaller. `Examples`: (w, b) = X' v with v (N, P), and
of X only the Gram matrix is needed. `Features`: (w, b) itself, (D + 1, P), with X read in blocks of
rows.

With alpha_i = -c loss'(s_i) the difference of primal and dual objective bounds what a problem could
still lose; for the squared hinge it is 0.5 |gradient|^2. A problem is done when this gap is at most
tol times its objective. Deterministic: no random numbers are drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggfeat.spaces import Examples, Features, Rows, Space

LOSSES = ("squared_hinge", "hinge")
# Newton steps of one solve; the squared hinge takes three to ten, the hinge some dozens
MAX_STEPS = 300
# of an image in a problem that are looked at together: they stay in the cache
CACHED_VALUES = 1 << 17
LINE_TOLERANCE = 1e-9  # on the length of a step
SHARPER = 8.0  # factor on the curvature at the hinge's corner
EASY = 1000.0  # curvature of the loss from which a solve starts at zero
CLIMB = 16.0  # from a small C, whose solution is near, to the C asked for
STATE_BYTES = 100  # of an image in a problem that is being solved: targets, scores, directions


@dataclass
class Solution:
    """P solved problems.

    coef: (P, D) float64; intercept: (P,). scores: (N, P) of all images, also those that a problem
    leaves out. gap: (P,) duality gap over objective, converged where it is at most tol. objective:
    (P,). steps: (P,) Newton steps. state: where another solve, of another C, can start.
    """

    coef: np.ndarray
    intercept: np.ndarray
    scores: np.ndarray
    gap: np.ndarray
    objective: np.ndarray
    steps: np.ndarray
    state: Tensor


class Solver:
    """Linear SVMs over the rows of X. What depends on X alone is computed once, for all that is
    solved.

    X: (N, D), finite. memory: bytes that the Gram matrix may take (beyond, or where N is over 8 D,
    states are (w, b)), and again the problems that are solved at a time.
    """

    def __init__(self, X: Any, device: str | torch.device = "cpu", memory: float = 2e9) -> None:
        rows = Rows(X, torch.device(device))
        gram = 16.0 * rows.N**2
        by_examples = rows.N <= 8 * rows.D and gram <= memory
        self.space: Space = Examples(rows) if by_examples else Features(rows)
        self.rows, self.memory = rows, memory

    def solve(
        self,
        targets_NP: np.ndarray,
        C_P: Any,
        *,
        weights_NP: np.ndarray | None = None,
        loss: str = "squared_hinge",
        tol: float = 1e-5,
        start: Tensor | None = None,
        near: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Solution:
        """targets: 1, -1 or 0. C: (P,) or one number. weights: (N, P) or (N, 1), factors on C.

        start: the `state` of another solution over the same rows; near: coef (P, D) and intercept
        (P,) of one over other rows, at about the same C.
        """
        N, P = targets_NP.shape
        C = np.broadcast_to(np.asarray(C_P, dtype=np.float64), (P,))
        width = max(1, int(self.memory / (STATE_BYTES * N)))
        parts = []
        for first in range(0, P, width):
            some = slice(first, first + width)
            T = torch.as_tensor(np.ascontiguousarray(targets_NP[:, some])).to(
                self.rows.device, torch.float64
            )
            c = torch.as_tensor(C[some].copy(), device=self.rows.device) * (T != 0)
            if weights_NP is not None:
                c *= torch.as_tensor(
                    weights_NP if weights_NP.shape[1] == 1 else weights_NP[:, some]
                ).to(c)
            first_state = None if start is None else start[:, some]
            if near is not None:
                W = torch.as_tensor(np.vstack([near[0][some].T, near[1][some]])).to(T)
                first_state = self.space.state(W, T, *_parabolas(c, loss))
            parts.append(self._solve(T, c, loss, tol, first_state))
        coef, intercept, scores, gap, objective, steps = (
            np.concatenate([part[i].cpu().numpy() for part in parts], axis=axis)
            for i, axis in enumerate((0, 0, 1, 0, 0, 0))
        )
        return Solution(
            coef,
            intercept,
            scores,
            gap,
            objective,
            steps,
            torch.cat([part[6] for part in parts], 1),
        )

    def _solve(
        self, T: Tensor, c: Tensor, loss: str, tol: float, start: Tensor | None
    ) -> tuple[Tensor, ...]:
        steps = torch.zeros(T.shape[1], dtype=torch.int64)
        if start is None:
            start = torch.zeros(self.space.size, T.shape[1], dtype=T.dtype, device=T.device)
            # From zero straight to a large C the active examples would have to be found among all;
            # so climb there.
            curvature = 2 * float(c.sum(0).max())  # beside the regulariser's 1, where |x| is 1
            factor = CLIMB ** -math.ceil(math.log(max(1.0, curvature / EASY), CLIMB))
            while factor < 1:
                start, _, _, _, n = newton(self.space, T, c * factor, loss, 1e-2, start)
                steps += n
                factor *= CLIMB
        inner = 0.9 * tol  # the rest is for what rounding adds when it is measured on X
        V, F, gap, objective, n = newton(self.space, T, c, loss, inner, start)
        w, scores, gap, objective = self._measured(T, c, loss, V, F, gap, objective)
        if (gap > tol).any() and self.space.sharpen():
            V, F, gap, objective, more = newton(self.space, T, c, loss, inner, V)
            w, scores, gap, objective = self._measured(T, c, loss, V, F, gap, objective)
            n = n + more
        return w[:-1].T.contiguous(), w[-1], scores, gap, objective, steps + n, V

    def _measured(
        self, T: Tensor, c: Tensor, loss: str, V: Tensor, F: Tensor, gap: Tensor, objective: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(w, b), scores, gaps and objectives on X itself: those of a solution carry the rounding
        of its products.
        """
        w = self.space.weights(V)
        scores = self.rows.scores(w)
        s = (1 - T * scores).clamp_min(0)
        measured = 0.5 * (w * w).sum(0) + (c * (s if loss == "hinge" else s * s)).sum(0)
        dual = objective * (1 - gap)
        if isinstance(self.space, Examples):
            dual = dual - 0.5 * (V * (scores - F)).sum(0).abs()  # of its |w, b|^2
        gap = torch.where(measured > 0, (measured - dual).clamp_min(0) / measured, 0)
        return w, scores, gap, measured


def newton(
    space: Space, T: Tensor, c: Tensor, loss: str, tol: float, start: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States, scores, gaps over objectives, objectives and steps of problems with targets T and
    costs c (N, P).
    """
    hinge = loss == "hinge"
    V, F = start.clone(), space.scores(start)
    V_all, F_all = V.clone(), F.clone()
    gap_all, objective_all = T.new_zeros(T.shape[1]), T.new_zeros(T.shape[1])
    steps = torch.zeros(T.shape[1], dtype=torch.int64)
    live = torch.arange(T.shape[1], device=T.device)
    curvature, cap = _parabolas(c, loss)
    for step in range(MAX_STEPS + 1):
        s = (1 - T * F).clamp_min(0)
        alpha = torch.minimum(curvature * s, cap)
        G = V - space.pull(T * alpha)
        scores_G = space.scores(G)
        half_GG = 0.5 * space.dot(G, G, scores_G)
        objective = 0.5 * space.dot(V, V, F) + (c * (s if hinge else s * s)).sum(0)
        gap = half_GG
        if hinge:
            dual = alpha.sum(0) - 0.5 * space.dot(V - G, V - G, F - scores_G)
            gap = objective - dual
        V_all[:, live], F_all[:, live], objective_all[live] = V, F, objective
        # 0: a problem without images
        gap_all[live] = torch.where(objective > 0, gap / objective, 0)
        going = ~(gap <= tol * objective)
        if step == MAX_STEPS or not going.any():
            break
        live, V, F, T, c, curvature, cap, s, G, scores_G, half_GG, gap = (
            part[..., going]
            for part in (live, V, F, T, c, curvature, cap, s, G, scores_G, half_GG, gap)
        )
        if hinge and (blunt := half_GG <= 0.5 * gap).any():
            # solved up to what the rounded corner costs
            curvature = torch.where(blunt, SHARPER * curvature, curvature)
            alpha = torch.minimum(curvature * s, cap)
            G = V - space.pull(T * alpha)
            scores_G = space.scores(G)
        d, scores_d = space.newton(
            G, scores_G, torch.where((s > 0) & (curvature * s < cap), curvature, 0)
        )
        length = line_search(space, V, F, T, curvature, cap, d, scores_d)
        V, F = V + length * d, F + length * scores_d
        steps[live.cpu()] += 1
    return V_all, F_all, gap_all, objective_all, steps


def _parabolas(c: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """alpha = min(curvature s, cap): 2 c s; for the hinge, whose corner is rounded by a parabola,
    at most c.
    """
    return (c, c) if loss == "hinge" else (2 * c, torch.full_like(c, torch.inf))


def line_search(
    space: Space,
    V: Tensor,
    F: Tensor,
    T: Tensor,
    curvature: Tensor,
    cap: Tensor,
    d: Tensor,
    scores_d: Tensor,
) -> Tensor:
    """(P,) the exact minimum along d: the root of an increasing, piecewise linear slope, by guarded
    Newton steps.
    """
    dd, vd = space.dot(d, d, scores_d), space.dot(V, d, scores_d)
    margin, slope_s = 1 - T * F, T * scores_d
    low, high = torch.zeros_like(dd), torch.full_like(dd, torch.inf)
    lengths = length = torch.ones_like(dd)
    live = torch.arange(len(dd), device=dd.device)
    for _ in range(40):
        block = max(1, CACHED_VALUES // len(dd))
        slope, bend = vd + length * dd, dd.clone()
        for first in range(0, len(margin), block):
            rows = slice(first, first + block)
            s = (margin[rows] - length * slope_s[rows]).clamp_min_(0)
            active = curvature[rows] * slope_s[rows]
            alpha = curvature[rows] * s
            inside = (s > 0) & (alpha < cap[rows])
            slope -= (torch.minimum(alpha, cap[rows]) * slope_s[rows]).sum(0)
            bend += (inside * active * slope_s[rows]).sum(0)
        low, high = torch.where(slope < 0, length, low), torch.where(slope > 0, length, high)
        guess = length - slope / bend
        between = (guess > low) & (guess < high)
        guess = torch.where(between, guess, torch.where(high.isinf(), 2 * length, (low + high) / 2))
        guess = torch.where((slope == 0) | ~guess.isfinite(), length, guess)
        going = (guess - length).abs() > LINE_TOLERANCE * length
        length = guess
        lengths[live] = length
        if not going.any():
            break
        if 2 * going.sum() <= len(going):  # the last few problems alone
            live, length, low, high, dd, vd, margin, slope_s, curvature, cap = (
                part[..., going]
                for part in (live, length, low, high, dd, vd, margin, slope_s, curvature, cap)
            )
    return lengths
