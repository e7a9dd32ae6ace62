"""Many linear SVMs over the same images, solved together: Newton's method on the examples inside
the margin.

N images, D descriptor length, P problems (a class, a fold: each a row). Problem p minimises
liblinear's

    0.5 |w, b|^2 + sum_i c_pi loss(s_pi),    s = 1 - t_pi (w x_i + b),

loss = max(0, s)^2 or max(0, s), with targets t_pi in {1, -1}; t_pi = 0 leaves image i out of
problem p (a fold, a difficult object). The bias b is the weight of a constant feature 1, so a state
(w, b) is one vector and x_i ends in 1.

The squared hinge is a parabola where s > 0, elsewhere 0: with H = diag(2 c) over those "active"
examples, a Newton step d solves (I + X' H X) d = -gradient. The steps of all problems share their
products with X, which are therefore as wide as there are problems. The system is solved exactly
where few examples are active (large C), and by conjugate gradients where many are (small C).

The hinge has a corner in place of the parabola. It is rounded by a parabola of curvature k, not
around the corner but around what is known of the dual variable there, alpha_0 (the augmented
Lagrangian of the dual):

    alpha_i = min(max(0, alpha_0 + k s_i), c_i),

which is the hinge's own alpha wherever alpha_0 is. Once a rounded problem is solved, its alpha is
the next alpha_0, and k grows.

States live in one of two spaces, whichever is smaller. `Examples`: (w, b) = v X with v (P, N), and
of X only the Gram matrix is needed. `Features`: (w, b) itself, (P, D + 1), with X read in blocks of
rows.

Any alpha between 0 and c (of the squared hinge: above 0) bounds, by the difference of primal and
dual objective, what a problem could still lose:

    gap = 0.5 |(w, b) - sum_i t_i alpha_i x_i|^2 + sum_i r_i,

r = c max(0, s) - alpha s, or (2 c s - alpha)^2 / 4 c; no term is negative. A problem is done when
this gap is at most tol times its objective. Steps are computed in float32 (on a GPU: see `rows`);
the gap that is told is measured in float64, on X itself. Problems that float32 doesn't bring there
are gone on with in float64. Deterministic: no random numbers are drawn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggfeat.devices import out_of_memory
from vggfeat.ranks import Ranks
from vggfeat.rows import FEW, Rows, full_sums
from vggfeat.spaces import Examples, Features, Space, cached

LOSSES = ("squared_hinge", "hinge")
# Newton steps at most; the squared hinge takes three to ten, the hinge twenty to forty. What takes
# longer in float32 lacks digits.
MAX_STEPS = {torch.float32: 60, torch.float64: 300}
# In what a problem is gone on with whose gap, measured in float64, is larger than it seemed. What
# seemed is of scores that many steps have added up; from measured ones a few more are enough.
PRECISIONS = (torch.float32, torch.float32, torch.float64)
LINE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # on the length of a step
LINE_STEPS = 40
SHARPER = 4.0  # factor on the curvature at the hinge's corner
SOLVED = 0.5  # of the gap: a rounded hinge is solved where the gradient has so little of it
INNER = 0.5  # of the tolerance: the rest is for what rounding adds when the gap is measured on X
NEARER, PATIENCE = 0.7, 15  # a gap that isn't so much smaller for so many steps stays where it is
GRAM_BYTES = 12.0  # a pair of images, in float32 and where need be in float64
EASY = 1000.0  # curvature of the loss from which a solve starts at zero
CLIMB = 16.0  # from a small C, whose solution is near, to the C asked for
MEMORY = 2e9  # of a Solver, on a CPU
FREE = 0.8  # of what is free on a GPU: a Solver's memory there
HELD_BYTES = 1 << 28  # of X, beside X itself, on a CPU


@dataclass
class Solution:
    """P solved problems.

    coef: (P, D) float64; intercept: (P,). scores: (N, P) of all images, also those that a problem
    leaves out; (0, P) where they aren't asked for. gap: (P,) duality gap over objective, converged
    where it is at most tol. objective: (P,). steps: (P,) Newton steps. state: where another solve,
    of another C, can start.
    """

    coef: np.ndarray
    intercept: np.ndarray
    scores: np.ndarray
    gap: np.ndarray
    objective: np.ndarray
    steps: np.ndarray
    state: Tensor


@dataclass
class At:
    """Of some rows of X, (P, n): alpha; c loss(s); by how much it is above what alpha proves,
    beside 0.5 |gradient|^2 (None: 0); and where the loss bends.
    """

    alpha: Tensor
    loss: Tensor
    beyond: Tensor | None
    bends: Tensor

    def sums(self) -> Tensor:
        """(2, P) float64 of loss and beyond."""
        loss = self.loss.sum(1)
        beyond = torch.zeros_like(loss) if self.beyond is None else self.beyond.sum(1)
        return torch.stack([loss, beyond]).double()


@dataclass
class Problems:
    """What is asked of P problems over N images, and how far the hinge's corner is rounded.

    T: (P, N) int8. C: (P, 1). weights: (1, N) or (P, N) factors on C, if there are some. gaps:
    whether T has zeros. alpha: (P, N) that a solve has found; the hinge's alpha_0; None: 0. sharp:
    (P, 1) the curvature k over c, of the hinge.
    """

    T: Tensor
    C: Tensor
    weights: Tensor | None
    gaps: bool
    hinge: bool
    sharp: Tensor
    alpha: Tensor | None = None

    def __len__(self) -> int:
        return len(self.T)

    def some(self, chosen: Tensor | slice) -> Problems:
        """Those chosen by a mask, by numbers, or a run of them."""
        weights = self.weights
        return replace(
            self,
            T=self.T[chosen],
            C=self.C[chosen],
            weights=weights if weights is None or len(weights) == 1 else weights[chosen],
            sharp=self.sharp[chosen],
            alpha=None if self.alpha is None else self.alpha[chosen],
        )

    def of(self, dtype: torch.dtype) -> Problems:
        """With costs of this type, and so all that is computed from them."""
        weights = None if self.weights is None else self.weights.to(dtype)
        return replace(self, C=self.C.to(dtype), weights=weights, sharp=self.sharp.to(dtype))

    def costs(self, rows: slice) -> Tensor:
        """c of some rows, which (P, n) can be multiplied by."""
        c = self.C if self.weights is None else self.C * self.weights[:, rows]
        return c * (self.T[:, rows] != 0) if self.gaps else c

    def at(self, rows: slice, F: Tensor) -> At:
        """What some rows come to at their scores F (P, n)."""
        c = self.costs(rows)
        s = 1 - self.T[:, rows] * F
        if not self.hinge:
            s.clamp_min_(0)
            alpha = 2 * c * s
            return At(alpha, 0.5 * alpha * s, None, s > 0)
        alpha = self.sharp * c * s
        if self.alpha is not None:
            alpha += self.alpha[:, rows]
        bends = (alpha > 0) & (alpha < c)
        return _hinged(torch.minimum(alpha.clamp_min_(0), c), s, c, bends)

    def measured(self, rows: slice, F: Tensor) -> At:
        """The same with the alpha that a solve has found, which is as good as any other between 0
        and c: what these scores would make of it, rounded otherwise, differs where curvatures are
        large.
        """
        assert self.alpha is not None
        s, c = 1 - self.T[:, rows] * F, self.costs(rows)
        alpha = self.alpha[:, rows].to(c.dtype)
        if self.hinge:
            return _hinged(torch.minimum(alpha, c), s, c, alpha > 0)
        s.clamp_min_(0)
        other = 2 * c * s - alpha
        beyond = torch.where(c > 0, other * other / (4 * c), 0)
        return At(alpha, c * s * s, beyond, alpha > 0)

    def bend(self, rows: slice, bends: Tensor) -> Tensor:
        """(P, n) second derivatives, of some rows where they bend."""
        return bends * ((self.sharp if self.hinge else 2) * self.costs(rows))

    def bend_by(self, bends: Tensor) -> Callable[[slice], Tensor]:
        """The same of any rows."""
        return lambda rows: self.bend(rows, bends[:, rows])

    def moved(self, F: Tensor) -> Tensor:
        """(P, N) alpha at the scores F."""
        alpha = torch.empty_like(F)
        for rows in cached(F.shape[1], F):
            alpha[:, rows] = self.at(rows, F[:, rows]).alpha
        return alpha

    def sharpen(self, chosen: Tensor, F: Tensor) -> None:
        """Round the corner of some problems (P,) around the alpha that they have at the scores F,
        and less.
        """
        before = torch.zeros_like(F) if self.alpha is None else self.alpha
        self.alpha = torch.where(chosen[:, None], self.moved(F), before)
        self.sharp = torch.where(chosen[:, None], SHARPER * self.sharp, self.sharp)


def _hinged(alpha: Tensor, s: Tensor, c: Tensor, bends: Tensor) -> At:
    loss = c * s.clamp_min(0)
    return At(alpha, loss, loss - alpha * s, bends)


def by_gram(N: int, D: int, memory: float = MEMORY) -> bool:
    """Whether problems over N images are solved by their Gram matrix."""
    return N <= 8 * D and memory >= GRAM_BYTES * N**2


class Solver:
    """Linear SVMs over the rows of X. What depends on X alone is computed once, for all that is
    solved.

    X: (N, D), finite. memory: bytes that the Gram matrix may take (beyond, or where N is over 8 D,
    states are (w, b)), and again the problems that are solved at a time; on a GPU of all together.
    None: MEMORY, or FREE of what a GPU has. half: to find (w, b), and by products of float16 (see
    `rows`); None: on a GPU, where the Gram matrix isn't used. ranks: the processes that share X's
    rows; each is given all of X, and all that is asked.
    """

    def __init__(
        self,
        X: Any,
        device: str | torch.device = "cpu",
        memory: float | None = None,
        *,
        half: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        place = torch.device(device)
        N, D = X.shape
        gpu = place.type == "cuda"
        if memory is None:
            memory = FREE * torch.cuda.mem_get_info(place)[0] if gpu else MEMORY
        self.memory = memory
        several = ranks is not None and ranks.world > 1
        by_examples = by_gram(N, D, memory) and not several and not half
        if half is None:
            half = gpu
        self.rows = Rows(
            X,
            place,
            half=half and not by_examples,
            # a GPU's takes both, and problems can be solved a part at a time
            memory=memory / 2 if gpu else min(memory, HELD_BYTES),
            ranks=ranks,
        )
        with full_sums():
            self.space: Space = Examples(self.rows) if by_examples else Features(self.rows)
            self.dtype = torch.float64 if N * D <= FEW and not half else torch.float32
            self.space.use(self.dtype)

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
        scores: bool = True,
    ) -> Solution:
        """targets: 1, -1 or 0. C: (P,) or one number. weights: (N, P) or (N, 1), factors on C.

        start: the `state` of another solution over the same rows; near: coef (P, D) and intercept
        (P,) of one over other rows, at about the same C. scores: whether the solution has them.
        """
        asked = self._asked(targets_NP, C_P, weights_NP, loss)
        left = self.memory - (self.rows.bytes if self.rows.device.type == "cuda" else 0)
        width = max(1, int(left / (self.space.state_bytes * max(1, self.rows.N))))
        parts: list[tuple[Tensor, ...]] = []
        done = 0
        with full_sums():
            while done < len(asked):
                some = slice(done, done + width)
                try:
                    w, F, *rest = self._solve(
                        asked.some(some),
                        tol,
                        None if start is None else start[some],
                        None if near is None else (near[0][some], near[1][some]),
                    )
                    F = self.rows.of_all_rows(F) if scores else F[:, :0].cpu()
                    parts.append((w, F, *rest))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error) or width == 1:
                        raise
                    width = (min(width, len(asked) - done) + 1) // 2
                    warnings.warn(
                        f"memory is short: {width:,} of {len(asked):,} SVMs are trained at a time",
                        stacklevel=2,
                    )
                else:
                    done += width
        W, gap, objective, steps = (
            torch.cat([part[i] for part in parts]).cpu().numpy() for i in (0, 2, 3, 4)
        )
        F_NP = torch.cat([part[1] for part in parts]).T.numpy()
        state = torch.cat([part[5] for part in parts])
        return Solution(W[:, :-1], W[:, -1], F_NP, gap, objective, steps, state)

    def _asked(
        self, targets_NP: np.ndarray, C_P: Any, weights_NP: np.ndarray | None, loss: str
    ) -> Problems:
        """Of this process's rows."""
        own = slice(self.rows.first, self.rows.first + self.rows.N)
        device, P = self.rows.device, targets_NP.shape[1]
        T = torch.from_numpy(np.array(targets_NP[own].T, dtype=np.int8, order="C")).to(device)
        C = torch.from_numpy(np.broadcast_to(np.asarray(C_P, np.float64), (P,)).copy()).to(device)
        weights = None
        if weights_NP is not None and not (weights_NP == 1).all():
            of_rows = weights_NP[own] if len(weights_NP) > 1 else weights_NP
            weights = torch.from_numpy(np.array(of_rows.T, dtype=np.float64, order="C")).to(device)
        gaps = bool((T == 0).any())
        return Problems(T, C[:, None], weights, gaps, loss == "hinge", torch.ones_like(C)[:, None])

    def _near(self, W: Tensor, asked: Problems) -> Tensor:
        W = W.to(self.rows.device, self.dtype)
        F = self.rows.scores(W)

        def full(rows: slice) -> Tensor:
            at = asked.at(rows, F[:, rows])
            return asked.T[:, rows] * torch.where(at.bends, 0, at.alpha)

        def h(rows: slice) -> Tensor:
            return asked.bend(rows, asked.at(rows, F[:, rows]).bends)

        return self.space.near(W, full, h, asked.T)

    def _solve(
        self,
        problems: Problems,
        tol: float,
        start: Tensor | None,
        near: tuple[np.ndarray, np.ndarray] | None,
    ) -> tuple[Tensor, ...]:
        """(w, b), scores, gap, objective, steps and state."""
        dtype = self.dtype
        asked = problems.of(dtype)
        if near is not None:
            start = self._near(torch.from_numpy(np.hstack([near[0], near[1][:, None]])), asked)
        steps = torch.zeros(len(asked), dtype=torch.int64, device=asked.C.device)
        if start is None:
            start = asked.C.new_zeros(len(asked), self.space.size)
            # From zero straight to a large C the active examples would have to be found among all;
            # so climb there.
            curvature = self._curvature(asked)  # beside the regulariser's 1, where |x| is 1
            factor = CLIMB ** -math.ceil(math.log(max(1.0, curvature / EASY), CLIMB))
            while factor < 1:
                easier = replace(asked, C=asked.C * factor)
                start, _, n = newton(self.space, easier, 1e-2, start, MAX_STEPS[dtype])
                steps += n
                factor *= CLIMB
        V, asked, n = newton(self.space, asked, INNER * tol, start, MAX_STEPS[dtype])
        steps += n
        w, scores, gap, objective = self._measured(asked, V)
        for dtype in PRECISIONS:
            if not (far := ~(gap <= tol)).any():
                break
            again = asked.some(far).of(dtype)
            begin, F = V[far].to(dtype), scores[far]
            lost = ~(begin.isfinite().all(1) & F.isfinite().all(1))
            begin[lost], F[lost] = 0, 0
            known = F if dtype == F.dtype else None
            with self._in(dtype):
                v, again, n = newton(self.space, again, INNER * tol, begin, MAX_STEPS[dtype], known)
                w[far], F, gap[far], objective[far] = self._measured(again, v)
            V[far], scores[far] = v.to(V.dtype), F.to(scores.dtype)
            steps[far] += n
        return w, scores, gap, objective, steps, V

    @contextmanager
    def _in(self, dtype: torch.dtype) -> Iterator[None]:
        self.space.use(dtype)
        try:
            yield
        finally:
            self.space.use(self.dtype)

    def _curvature(self, asked: Problems) -> float:
        """The largest of any problem's loss, summed over its images."""
        total = torch.zeros(len(asked), dtype=torch.float64, device=asked.C.device)
        for rows in cached(self.rows.N, asked.T):
            total += (asked.costs(rows) + torch.zeros_like(asked.T[:, rows])).sum(1)
        return 2 * float(self.rows.of_all(total).max())

    def _measured(self, asked: Problems, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(w, b), scores (kept as costs are), gaps and objectives in float64, on X itself."""
        w, fine = self.space.weights(V), asked.of(torch.float64)
        scores = asked.C.new_empty(len(fine), self.rows.N)
        pulled, sums = torch.zeros_like(w), w.new_zeros(2, len(fine))
        for rows, x in self.rows.plain(torch.float64):
            F = w[:, :-1] @ x.T + w[:, -1:]
            scores[:, rows] = F
            at = fine.measured(rows, F)
            sums += at.sums()
            beta = fine.T[:, rows] * at.alpha
            pulled[:, :-1] += beta @ x
            pulled[:, -1] += beta.sum(1)
        loss, beyond = self.rows.of_all(sums)
        objective = self.rows.agreed(0.5 * (w * w).sum(1) + loss)
        G = w - self.rows.of_all(pulled)
        gap = self.rows.agreed(0.5 * (G * G).sum(1) + beyond)
        return w, scores, torch.where(objective > 0, gap / objective, 0), objective


@dataclass
class _Gradient:
    """At a state: the gradient G and its scores, where they are needed; 0.5 |G|^2, gap and
    objective (P,); bends: (P, N), where the loss does.
    """

    G: Tensor
    scores: Tensor | None
    half_GG: Tensor
    gap: Tensor
    objective: Tensor
    bends: Tensor

    @classmethod
    def at(cls, space: Space, problems: Problems, V: Tensor, F: Tensor) -> _Gradient:
        sums = torch.zeros(2, len(problems), dtype=torch.float64, device=V.device)
        bends = torch.empty_like(F, dtype=torch.bool)

        def beta(rows: slice) -> Tensor:
            at = problems.at(rows, F[:, rows])
            bends[:, rows] = at.bends
            sums.add_(at.sums())
            return problems.T[:, rows] * at.alpha

        G = V - space.pull(beta, V)
        scores_G = space.scores_of(G)
        loss, beyond = space.rows.of_all(sums)
        half_GG = 0.5 * space.dot(G, G, scores_G)
        objective = space.rows.agreed(0.5 * space.dot(V, V, F) + loss)
        gap = space.rows.agreed(half_GG + beyond)
        return cls(G, scores_G, half_GG, gap, objective, bends)

    def put(self, chosen: Tensor, new: _Gradient) -> None:
        """New ones of some problems."""
        self.G[chosen], self.bends[chosen] = new.G, new.bends
        if self.scores is not None and new.scores is not None:
            self.scores[chosen] = new.scores

    def some(self, chosen: Tensor) -> _Gradient:
        scores = None if self.scores is None else self.scores[chosen]
        G, half_GG, gap, objective, bends = (
            part[chosen] for part in (self.G, self.half_GG, self.gap, self.objective, self.bends)
        )
        return _Gradient(G, scores, half_GG, gap, objective, bends)


def newton(
    space: Space,
    problems: Problems,
    tol: float,
    start: Tensor,
    most: int,
    scores: Tensor | None = None,
) -> tuple[Tensor, Problems, Tensor]:
    """From states and their scores: states, the problems with their corners as they are then, and
    steps; until the gap is at most
    tol of the objective, or it takes more steps than most, or gets no nearer in this precision.
    """
    V, F = start, space.scores(start) if scores is None else scores
    V_all, alpha_all = V.clone(), torch.empty_like(F)
    every = replace(problems, sharp=problems.sharp.clone(), alpha=alpha_all)
    steps = torch.zeros(len(V), dtype=torch.int64, device=V.device)
    live = torch.arange(len(V), device=V.device)
    best, since = V.new_full((len(V),), torch.inf, dtype=torch.float64), torch.zeros_like(steps)

    def leave(leaving: Tensor) -> None:
        nonlocal problems, live, V, F, best, since
        gone = live[leaving]
        V_all[gone] = V[leaving]
        every.sharp[gone] = problems.sharp[leaving]
        alpha_all[gone] = problems.some(leaving).moved(F[leaving])
        live, V, F, best, since = (part[~leaving] for part in (live, V, F, best, since))
        problems = problems.some(~leaving)

    for step in range(most + 1):
        g = _Gradient.at(space, problems, V, F)
        nearer = g.gap <= NEARER * best
        best, since = torch.where(nearer, g.gap, best), torch.where(nearer, 0, since + 1)
        done = (g.gap <= tol * g.objective) | ~g.objective.isfinite() | (since > PATIENCE)
        if step == most or done.all():
            leave(torch.ones_like(done))
            break
        if done.any():
            leave(done)
            g = g.some(~done)
        if problems.hinge and (blunt := g.half_GG <= SOLVED * g.gap).any():
            # solved up to what the rounded corner costs
            problems.sharpen(blunt, F)
            g.put(blunt, _Gradient.at(space, problems.some(blunt), V[blunt], F[blunt]))
        d, scores_d, good = space.newton(g.G, g.scores, problems.bend_by(g.bends))
        if not good.all():
            leave(~good)
            d, scores_d = d[good], scores_d[good]
            if not len(live):
                break
        length = line_search(space, problems, V, F, d, scores_d)
        V = V + length[:, None] * d
        for rows in cached(F.shape[1], F):
            F[:, rows] += length[:, None] * scores_d[:, rows]
        steps[live] += 1
    return V_all, every, steps


def line_search(
    space: Space, problems: Problems, V: Tensor, F: Tensor, d: Tensor, scores_d: Tensor
) -> Tensor:
    """(P,) the exact minimum along d: the root of an increasing, piecewise linear slope, by guarded
    Newton steps.
    """
    dd, vd = (space.dot(a, d, scores_d).double() for a in (d, V))
    low, high = torch.zeros_like(dd), torch.full_like(dd, torch.inf)
    lengths = length = torch.ones_like(dd)
    live = torch.arange(len(dd), device=dd.device)
    for _ in range(LINE_STEPS):
        sums = torch.zeros(2, len(dd), dtype=torch.float64, device=dd.device)
        short = length.to(F.dtype)[:, None]
        for rows in cached(F.shape[1], F):
            at = problems.at(rows, F[:, rows] + short * scores_d[:, rows])
            along = problems.T[:, rows] * scores_d[:, rows]
            bend = problems.bend(rows, at.bends)
            sums += torch.stack([(at.alpha * along).sum(1), (bend * along * along).sum(1)])
        pushed, bent = space.rows.of_all(sums)
        slope, bend = space.rows.agreed(torch.stack([vd + length * dd - pushed, dd + bent]))
        low, high = torch.where(slope < 0, length, low), torch.where(slope > 0, length, high)
        guess = length - slope / bend
        between = (guess > low) & (guess < high)
        guess = torch.where(between, guess, torch.where(high.isinf(), 2 * length, (low + high) / 2))
        guess = torch.where((slope == 0) | ~guess.isfinite(), length, guess)
        going = (guess - length).abs() > LINE_TOLERANCE[F.dtype] * length
        length = guess
        lengths[live] = length
        if not going.any():
            break
        if 2 * going.sum() <= len(going):  # the last few problems alone
            live, length, low, high, dd, vd, F, scores_d = (
                part[going] for part in (live, length, low, high, dd, vd, F, scores_d)
            )
            problems = problems.some(going)
    return lengths.to(V.dtype)
