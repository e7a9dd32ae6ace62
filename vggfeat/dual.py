"""Linear SVMs by their duals, on a CPU: sweeps over all images, then exact solutions over those
near the margin.

N images, D descriptor length, P problems. Of problem p the dual variables alpha maximise

    sum_i alpha_i - 0.5 |sum_i t_i alpha_i x_i|^2 [- sum_i alpha_i^2 / 4 c_i],  0 <= alpha_i <= c_i

(the hinge; the squared hinge has the part in brackets, and no upper bound: its cap is infinite).
With (w, b) = sum_i t_i alpha_i x_i the derivative is s_i = 1 - t_i (w x_i + b) [- alpha_i / 2 c_i],
so most alpha are 0 or at their cap, and the others lie near the margin.

- A sweep gives each alpha in turn the best value beside the others (liblinear's method, of all
  problems at once). Few of them find about which images matter.
- A round solves each problem over the images near its margin, the rest of alpha being held: a small
  dense quadratic problem in a box. Then the scores of all images are known anew, and those that
  contradict their alpha join.

What can't be solved so to the tolerance is left as near as it came; the caller's Newton method goes
on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vggfeat.losses import SOLVED, Problems, proven
from vggfeat.spaces import Products

SWEEPS = {True: 2, False: 1}  # from zero, or from a start
BLOCK = 64  # images of a sweep whose products are read together
ROUNDS = 12  # at most; three to six are enough
LEAST, FREE_SHARE = 200, 1.2  # images near a margin: at least, and times those free after sweeps
# What Newton's method takes instead: products with K, times the curvature, by conjugate gradients;
# steps by exact systems, of the hinge or its square.
ITERATED, EXACT = 10.0, {True: 50.0, False: 10.0}
BOX = 10.0  # times the cube of a box's images: its multiplications
STEPS = 30  # of one problem in a box
MOST = 4096  # images near a margin, whose products are kept for each problem
# The hinge's curvature, times the mean of |x|^2: at first and at most, as float32 has its factors;
# and how fast it grows.
SHARP, SHARPEST, GROWTH = 8.0, 6e3, 2.5
LENGTH = 0.1  # of the slope where a step begins, what is left where it ends
ROUGH, ROUGHER = 1e-3, 3e-2  # gaps at which scores are computed anew, in float64
CLOSER = 0.02  # of a problem's gap, what its box may leave


def solve(
    K: Products,
    problems: Problems,
    tol: float,
    start: Tensor | None,
    exact: Callable[[Tensor], Tensor],
    step: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """alpha (P, N) float64, and (P,) steps, of problems in float64.

    start: alpha, inf where it is at its cap. exact: t alpha (P, N) -> scores in float64. step:
    multiplications of an exact Newton step on (w, b); what takes fewer by those is left to them.
    """
    c = problems.costs(slice(0, len(K.diagonal))).expand(problems.T.shape).contiguous()
    cap = c if problems.hinge else torch.where(c > 0, torch.inf, 0.0)
    alpha = torch.zeros_like(c) if start is None else start.double().minimum(cap)
    alpha[~alpha.isfinite()] = 0
    F = _swept(K, problems, c, cap, alpha, SWEEPS[start is None])
    return alpha, _rounds(K, problems, c, cap, alpha, F, tol, exact, step)


def _swept(
    K: Products, problems: Problems, c: Tensor, cap: Tensor, alpha: Tensor, sweeps: int
) -> Tensor:
    """Scores (P, N) after the sweeps, float64; alpha in place."""
    N = alpha.shape[1]
    T, a, top = problems.T.float(), alpha.float(), cap.float()
    ridge = torch.zeros_like(a)
    if not problems.hinge:
        ridge = torch.where(c > 0, 0.5 / c, 0).float()
    S, count = K.sum(T * a), -(-N // BLOCK)
    blocks = [torch.arange(first, N, count) for first in range(count)]  # of any class, each
    within = [K.among(block, block) for block in blocks]
    for _ in range(sweeps):
        for block, products in zip(blocks, within, strict=True):
            rows = slice(int(block[0]), N, count)
            t, before, high, r = (part[:, rows] for part in (T, a, top, ridge))
            f = K.of(S, block) + r * before * t
            s = 1 - t * f
            if not (((s > 0) & (before < high)) | ((s < 0) & (before > 0))).any():
                continue
            inverse = 1 / (K.diagonal[block] + r)
            d = _one_by_one(products, f, t, before, high, inverse)
            a[:, rows] = torch.minimum((before + t * d).clamp_min(0), high)
            K.add(S, block, d)
    alpha.copy_(torch.where(a >= top, cap, a.double()))
    return K.of(S, torch.arange(N)).double()


def _one_by_one(K: Tensor, f: Tensor, t: Tensor, a: Tensor, cap: Tensor, inverse: Tensor) -> Tensor:
    """Steps of t alpha (P, n), of some images one after the other. NumPy, whose small operations
    are quicker than PyTorch's.
    """
    F, signs, of, top, inverses, products = (
        np.ascontiguousarray(part.numpy().T) for part in (f, t, a, cap, inverse, K)
    )
    d = np.empty_like(F)
    with np.errstate(all="ignore"):  # what overflows is found by its scores
        low, high = -of * signs, (top - of) * signs
        low, high = np.minimum(low, high), np.maximum(low, high)
        left = signs - F
        for i, (x, row) in enumerate(zip(d, products, strict=True)):
            np.dot(row[:i], d[:i], out=x)
            np.subtract(left[i], x, out=x)
            np.multiply(x, inverses[i], out=x)
            np.maximum(x, low[i], out=x)
            np.minimum(x, high[i], out=x)
    return torch.from_numpy(np.ascontiguousarray(d.T))


def _rounds(
    K: Products,
    problems: Problems,
    c: Tensor,
    cap: Tensor,
    alpha: Tensor,
    F: Tensor,
    tol: float,
    exact: Callable[[Tensor], Tensor],
    step: float,
) -> Tensor:
    """(P,) steps, from the scores F; alpha in place."""
    T, hinge, P = problems.T, problems.hinge, len(problems)
    mean = float(K.diagonal.mean())
    free = ((alpha > 0) & (alpha < cap)).sum(1)
    near = FREE_SHARE * free
    possible = BOX * near.clamp_min(LEAST) ** 3 <= EXACT[hinge] * step
    if not hinge:
        possible &= near**3 + K.read * near**2 <= ITERATED * (1 + mean * c.amax(1)) * K.cost
    boxes = [_Box(K, T[p].float(), c[p], hinge, mean) for p in range(P)]
    steps, rough = torch.zeros(P, dtype=torch.int64), torch.ones(P, dtype=torch.bool)
    for turn in range(ROUNDS + 1):
        s = 1 - T * F
        loss, beyond = proven(alpha, s, c, hinge)
        objective, gap = 0.5 * (T * alpha * F).sum(1) + loss.sum(1), beyond.sum(1)
        live = possible & (gap > tol * objective) & gap.isfinite()
        if (rough & (gap <= ROUGH * objective)).any():
            again = rough & (gap <= ROUGHER * objective)  # together, as each reads all of X
            F[again] = exact((T * alpha)[again])
            rough &= ~again
            continue
        if turn == ROUNDS or not live.any():
            break
        change = torch.zeros(int(live.sum()), c.shape[1], dtype=c.dtype)
        for row, p in zip(change, live.nonzero()[:, 0].tolist(), strict=True):
            box = boxes[p]
            if not box.admit(alpha[p], s[p], cap[p]):
                possible[p] = False
                continue
            enough = max(0.3 * tol * float(objective[p]), CLOSER * float(gap[p]))
            a, n = box.solve(alpha[p, box.M], s[p, box.M], enough)
            row[box.M] = a - alpha[p, box.M]
            steps[p] += n
            possible[p] = bool(row.any())
        alpha[live] += change
        F[live] += K.times((T[live] * change).float())
    alpha[~(gap <= objective)] = 0  # no better than nothing, or no number
    return steps


class _Box:
    """A problem over the images M near its margin, Q = t t' K of them."""

    def __init__(self, K: Products, t: Tensor, c: Tensor, hinge: bool, mean: float) -> None:
        self.K, self.t, self.c, self.hinge = K, t, c, hinge
        self.blunt, self.sharpest = min(2 * float(c.max()), SHARP / mean), SHARPEST / mean
        self.M = torch.zeros(0, dtype=torch.int64)
        self.Q = torch.zeros(0, 0)

    def admit(self, alpha: Tensor, s: Tensor, cap: Tensor) -> bool:
        """Take those near the margin; later those that contradict their alpha. Whether they are few
        enough.
        """
        possible = self.c > 0
        free = (alpha > 0) & (alpha < cap)
        if len(self.M):
            chosen = free | ((s > 0) & (alpha < cap)) | ((s < 0) & (alpha > 0))
            chosen[self.M] = False
        else:
            k = min(int(possible.sum()), max(LEAST, int(FREE_SHARE * int(free.sum())) + 64))
            distance = torch.where(possible, s.abs() if self.hinge else -s, torch.inf)
            chosen = free | (distance <= distance.kthvalue(k)[0])
        new, m = (chosen & possible).nonzero()[:, 0], len(self.M)
        self.M = torch.cat([self.M, new])
        if len(self.M) > MOST:
            return False
        Q = torch.empty(len(self.M), len(self.M))
        Q[:m, :m] = self.Q
        Q[m:] = self.K.among(new, self.M) * self.t[new, None] * self.t[self.M]
        Q[:m, m:] = Q[m:, :m].T
        self.Q = Q
        return True

    def solve(self, before: Tensor, s_before: Tensor, enough: float) -> tuple[Tensor, int]:
        """alpha over M, (m,), whose gap there is at most enough, and steps: Newton's method on
        v, by which t (w, b) x changes to Q v, with the hinge's corner rounded as in `solver`.
        """
        Q, c, hinge = self.Q, self.c[self.M], self.hinge
        cap = c if hinge else torch.full_like(c, torch.inf)
        v, Qv = torch.zeros_like(c), torch.zeros_like(c)
        anchor = before if hinge else torch.zeros_like(c)
        k = torch.full_like(c, self.blunt) if hinge else 2 * c
        best, least = before, float(proven(before, s_before, c, hinge)[1].sum())

        def at(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            a = torch.minimum(z.clamp_min(0), cap)
            G = v - (a - before)
            return a, G, (Q @ G.float()).double()

        for step in range(STEPS + 1):
            s = s_before - Qv
            a, G, QG = at(z := k * s + anchor)
            gap = float(proven(a, s + QG, c, hinge)[1].sum())  # of alpha's own (w, b)
            if gap < least:
                best, least = a, gap
            if least <= enough or step == STEPS:
                break
            half, rest = 0.5 * float(G @ QG), float(proven(a, s, c, hinge)[1].sum())
            if hinge and 2 * rest > enough and half <= SOLVED * (half + rest):
                k, anchor = (k * GROWTH).clamp(max=max(self.blunt, self.sharpest)), a
                a, G, QG = at(z := k * s + anchor)
            inside = ((z > 0) & (z < cap)).nonzero()[:, 0]
            d, Qd = -G, -QG
            if len(inside):
                rows = Q.index_select(0, inside)  # three times as quick as Q[inside]
                system = rows.index_select(1, inside)
                system.diagonal().add_((1 / k[inside]).float())
                factor, failed = torch.linalg.cholesky_ex(system)
                if failed:
                    break
                e = torch.cholesky_solve(QG[inside, None].float(), factor)[:, 0]
                Qd = Qd + (e @ rows).double()
                d[inside] += e.double()
            length = _length(z, k * Qd, cap, float(v @ Qd) + float(before @ Qd), float(d @ Qd), Qd)
            v, Qv = v + length * d, Qv + length * Qd
        return best, step


def _length(z: Tensor, bent: Tensor, cap: Tensor, begin: float, dd: float, Qd: Tensor) -> float:
    """About where along a step the slope is 0: begin + length dd - alpha Qd, alpha = z - length
    bent between 0 and cap.
    """
    length, low, high = 1.0, 0.0, math.inf
    first = begin - float(torch.minimum(z.clamp_min(0), cap) @ Qd)
    for _ in range(STEPS):
        y = z - length * bent
        slope = begin + length * dd - float(torch.minimum(y.clamp_min(0), cap) @ Qd)
        if not abs(slope) > LENGTH * abs(first):
            break
        low, high = (length, high) if slope < 0 else (low, length)
        bend = dd + float(((y > 0) & (y < cap)).double() @ (Qd * bent))
        guess = length - slope / bend if bend > 0 else math.inf
        middle = 2 * length if math.isinf(high) else 0.5 * (low + high)
        length = guess if low < guess < high else middle
    return length
