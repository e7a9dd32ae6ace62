"""Many linear SVMs over the same images, solved together: Newton's method on the examples inside
the margin. On a CPU, of X that is at hand, the hinge and a squared hinge of which nothing is known
yet first by their duals (see `dual`), whose solutions are measured, and where need be gone on with,
as Newton's own are.

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
the next alpha_0, and k grows: from c_i, or from BLUNT / |x_i|^2 where that is less; from a part of
that where the losses of all images together bend far more than the regulariser.

States live in one of two spaces, whichever is smaller. `Examples`: (w, b) = v X with v (P, N), and
of X only the Gram matrix is needed. `Features`: (w, b) itself, (P, D + 1), with X read in blocks of
rows.

Any alpha between 0 and c (of the squared hinge: above 0) bounds, by the difference of primal and
dual objective, what a problem could still lose:

    gap = 0.5 |(w, b) - sum_i t_i alpha_i x_i|^2 + sum_i r_i,

r = c max(0, s) - alpha s, or (2 c max(0, s) - alpha)^2 / 4 c + alpha max(0, -s); no term is
negative. A problem is done when this gap is at most tol times its objective. Steps are computed in
float32 (on a GPU: see `rows`), of few numbers in float64; the gap that is told is measured in
float64, on X itself. Problems that float32 doesn't bring there are gone on with in float64.
Deterministic: no random numbers are drawn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggfeat import dual
from vggfeat.devices import free_memory, out_of_memory
from vggfeat.losses import SOLVED, Problems
from vggfeat.ranks import Ranks
from vggfeat.rows import FEW, Rows, full_sums
from vggfeat.spaces import (
    ByFeatures,
    Examples,
    Features,
    Products,
    Space,
    cached,
    refuse_large,
)

LOSSES = ("squared_hinge", "hinge")
# Newton steps at most. Of descriptors of length 1 the squared hinge takes three to ten, the hinge
# twenty to forty, and what takes longer in float32 lacks digits.
MAX_STEPS = {torch.float32: 60, torch.float64: 500}
NEAR = 0.1  # a gap that is gone on from; from a larger one it takes longer than from nothing
LINE_TOLERANCE = 1e-2  # on the length of a step, which is 1 where the active examples stay
LINE_STEPS = 40
INNER = 0.8  # of the tolerance: the rest is for what rounding adds when the gap is measured on X
# A gap that isn't so much smaller for so many steps stays where it is. In float64 it comes down
# also where it rises for long, while the active examples are sought.
NEARER, PATIENCE = 0.7, {torch.float32: 15, torch.float64: 200}
GRAM_BYTES = 12.0  # a pair of images, in float32 and where need be in float64
EASY = 2e4  # of the losses' curvatures in all, beside the regulariser's: a solve starts at zero
CLIMB = 16.0  # from a small C, whose solution is near, to the C asked for
BLUNT = 8.0  # curvature of the hinge's corner at most at first, where |x| is 1
LEAST_TOL = 1e-14  # what float64 can prove
MEMORY = 2e9  # of a Solver, on a CPU
FREE = 0.8  # of what is free on a GPU: a Solver's memory there
HELD_BYTES = 1 << 28  # of X, beside X itself, on a CPU
SMALL = 128  # w and b, or images: a Newton step of the squared hinge costs less than a sweep
DUAL_PRODUCTS = 20.0  # products with X that one problem takes by its dual
NEAR_MARGIN = 0.25  # of the images, whose products with each other it needs
DUAL_BYTES = 80  # of an image in a problem that is solved by its dual


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


def by_gram(N: int, D: int, memory: float = MEMORY) -> bool:
    """Whether problems over N images are solved by their Gram matrix."""
    return N <= 8 * D and memory >= GRAM_BYTES * N**2


def problem_bytes(N: int, gram: bool, by_dual: bool) -> float:
    """That a problem over N images takes while it is solved."""
    each = float((Examples if gram else Features).state_bytes * N)
    if by_dual:
        near = min(dual.MOST, NEAR_MARGIN * N)
        each = max(each, DUAL_BYTES * N + 4 * near**2)
    return each


class Solver:
    """Linear SVMs over the rows of X. What depends on X alone is computed once, for all that is
    solved.

    X: (N, D), finite. memory: bytes that the Gram matrix may take (beyond, or where N is over 8 D,
    states are (w, b)), and again the problems that are solved at a time; on a GPU of all together.
    None: MEMORY, or FREE of what a GPU has. half: to find (w, b), and by products of float16 (see
    `rows`); None: on a GPU, where the Gram matrix isn't used. ranks: the processes that share X's
    rows; each is given all of X, and all that is asked. solves: how many problems will be solved,
    of all calls together: few don't pay for a Gram matrix.
    """

    def __init__(
        self,
        X: Any,
        device: str | torch.device = "cpu",
        memory: float | None = None,
        *,
        half: bool | None = None,
        ranks: Ranks | None = None,
        solves: float = math.inf,
    ) -> None:
        place = torch.device(device)
        N, D = X.shape
        gpu = place.type == "cuda"
        if memory is None:
            memory = FREE * free_memory(place) if gpu else MEMORY
        self.memory = memory
        several = ranks is not None and ranks.world > 1
        self.dtype = torch.float64 if N * D <= FEW and not half else torch.float32
        alone = not (gpu or several or half)

        def read(halved: bool) -> Rows:
            # a GPU's memory takes both, and problems can be solved a part at a time
            most = memory / 2 if gpu else min(memory, HELD_BYTES)
            return Rows(X, place, half=halved, memory=most, ranks=ranks)

        space: Space | None = None
        with full_sums():
            if by_gram(N, D, memory) and not several and not half:
                self.rows = read(halved=False)
                by_features = self._by_features(N, D, solves, alone)
                try:
                    space = Examples(self.rows, by_features)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    warnings.warn(
                        f"memory is short: {N:,} images have no Gram matrix, which would take"
                        f" {GRAM_BYTES * N**2 / 1e9:.1f} GB; it takes longer without",
                        stacklevel=2,
                    )
                    del self.rows
                else:
                    self.products: Products | None = space.K if alone else None
            if space is None:
                self.rows = read(halved=gpu if half is None else half)
                self.products = self._by_features(N, D, 0, alone)
                space = Features(self.rows)
            space.use(self.dtype)
        self.space = space

    def _by_features(self, N: int, D: int, solves: float, alone: bool) -> ByFeatures | None:
        """What takes the place of the Gram matrix where duals are solved without it: X at hand."""
        if not alone or not self.rows.at_hand(HELD_BYTES) or _pays(N, D, solves):
            return None
        return ByFeatures(self.rows.read(slice(0, N), torch.float32))

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

        start: the `state` of another solution over the same rows, of the same loss; near: coef
        (P, D) and intercept (P,) of one over other rows, at about the same C. (It says little of
        the dual variables: `dual` does without.) scores: whether the solution has them.
        """
        tol = max(tol, LEAST_TOL)
        asked = self._asked(targets_NP, C_P, weights_NP, loss)
        self._refuse_large(asked)
        width = self._width(asked)
        parts: list[tuple[Tensor, ...]] = []
        done = 0
        with full_sums():
            while done < len(asked):
                some = slice(done, done + width)
                try:
                    w, F, *rest = self._part(
                        asked.some(some),
                        tol,
                        None if start is None else start[some],
                        None if near is None else (near[0][some], near[1][some]),
                    )
                    # a view of none would keep them all
                    F = self.rows.of_all_rows(F) if scores else F.new_empty(len(F), 0).cpu()
                    parts.append((w, F, *rest))
                except (RuntimeError, MemoryError) as error:
                    # of several processes the others would wait for this one
                    if not out_of_memory(error) or width == 1 or self.rows.ranks.world > 1:
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

    def _width(self, asked: Problems) -> int:
        """Problems that the memory takes at a time."""
        N, left, gram = self.rows.N, self.memory, isinstance(self.space, Examples)
        if self.rows.device.type == "cuda":  # whose memory is of all together
            left -= self.rows.bytes + (GRAM_BYTES * N**2 if gram else 8 * self.space.size**2)
            left -= asked.T.nbytes + (0 if asked.weights is None else asked.weights.nbytes)
        each = problem_bytes(N, gram, self.products is not None)
        return self.rows.fewest(max(1, int(left / max(1, each))))

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
        gaps, sharp = bool((T == 0).any()), torch.ones_like(C)[:, None]
        blunt = BLUNT / self.space.squares
        return Problems(T, C[:, None], weights, gaps, loss == "hinge", sharp, blunt=blunt)

    def _refuse_large(self, asked: Problems) -> None:
        largest = torch.zeros((), dtype=torch.float64, device=asked.C.device)
        for rows in cached(self.rows.N, asked.T):
            cost = asked.costs(rows) * self.space.squares[rows]
            largest = torch.maximum(largest, cost.max()) if cost.numel() else largest
        refuse_large(float(self.rows.largest(largest)))

    def _near(self, W: Tensor, asked: Problems) -> Tensor:
        W = W.to(self.rows.device, self.dtype)
        F = self.rows.scores(W)

        def full(rows: slice) -> Tensor:
            at = asked.at(rows, F[:, rows])
            return asked.T[:, rows] * torch.where(at.bends, 0, at.alpha)

        def h(rows: slice) -> Tensor:
            return asked.bend(rows, asked.at(rows, F[:, rows]).bends)

        return self.space.near(W, full, h, asked.T)

    def _part(
        self,
        problems: Problems,
        tol: float,
        start: Tensor | None,
        near: tuple[np.ndarray, np.ndarray] | None,
    ) -> tuple[Tensor, ...]:
        """(w, b), scores, gap, objective, steps and state."""
        # From another C's solution Newton's steps are fewest, and where X is small they cost the
        # least. Of the hinge they never are few.
        few = start is not None or self.dtype == torch.float64 or self.space.size <= SMALL
        if self.products is None or (few and not problems.hinge):
            return self._solve(problems, tol, start, near if start is None else None)
        return self._by_duals(problems, tol, start)

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
        steps, begun = torch.zeros(len(asked), dtype=torch.int64, device=asked.C.device), None
        if start is None:
            start, asked, steps = self._begun(self.space, asked)
            begun = self.space, dtype
        V, asked, n = newton(self.space, asked, INNER * tol, start, MAX_STEPS[dtype])
        steps += n
        # with the costs asked for, not as this precision has them
        asked = replace(problems, alpha=asked.alpha, sharp=asked.sharp)
        *found, V, _ = self._finished(asked, V, steps, tol, begun)
        return *found, steps, V

    def _begun(self, space: Space, asked: Problems) -> tuple[Tensor, Problems, Tensor]:
        """States to start from, where nothing is known, the problems with their corners there, and
        steps.

        From zero straight to a large C the active examples would have to be found among all. So
        climb there; the hinge by the roundness of its corner.
        """
        V = asked.C.new_zeros(len(asked), space.size)
        asked = replace(asked, alpha=None, sharp=torch.ones_like(asked.sharp))
        steps = torch.zeros(len(asked), dtype=torch.int64, device=V.device)

        def bend(rows: slice) -> Tensor:
            return asked.curvature(rows, asked.costs(rows)) * space.squares[rows]

        curvature = float(self._sums(asked, bend).max())
        factor = CLIMB ** -math.ceil(math.log(max(1.0, curvature / EASY), CLIMB))
        if asked.hinge:
            return V, replace(asked, sharp=asked.sharp * factor), steps
        while factor < 1:
            easier = replace(asked, C=asked.C * factor)
            V, _, n = newton(space, easier, 1e-2, V, MAX_STEPS[V.dtype])
            steps += n
            factor *= CLIMB
        return V, asked, steps

    def _by_duals(self, problems: Problems, tol: float, start: Tensor | None) -> tuple[Tensor, ...]:
        """The same by `dual`. The hinge's state is alpha, infinite at its cap, as that is another
        number for another C.
        """
        assert self.products is not None
        rows, T = self.rows, problems.T

        def exact(beta: Tensor) -> Tensor:
            return rows.scores(rows.pull(beta, len(beta), torch.float64))

        step = self.space.exact_cost
        alpha, steps = dual.solve(self.products, problems, INNER * tol, start, exact, step)
        asked = replace(problems, alpha=alpha)
        V = self.space.pull(lambda part: T[:, part] * alpha[:, part], alpha)
        *found, V, alpha = self._finished(asked, V, steps, tol)
        if not problems.hinge:
            return *found, steps, V
        for part in cached(rows.N, alpha):
            alpha[:, part][alpha[:, part] >= problems.costs(part)] = torch.inf
        return *found, steps, alpha.to(self.dtype)

    def _finished(
        self,
        asked: Problems,
        V: Tensor,
        steps: Tensor,
        tol: float,
        begun: tuple[Space, torch.dtype] | None = None,
    ) -> tuple[Tensor, ...]:
        """(w, b), scores, gap, objective, state and alpha of what was found; what isn't solved is
        gone on with, or, where it is far off, begun where it wasn't yet. The best of all is told.
        steps: in place. begun: where it was.
        """
        w, scores, gap, objective = self._measured(asked, self.space.weights(V))
        assert asked.alpha is not None
        # rounded states don't have the scores that were measured
        V, alpha = V.double(), asked.alpha
        for space, dtype in self._ways():
            far, near, own = ~(gap <= tol), gap < NEAR, space is self.space
            if not far.any():
                break
            for anew, some in ((False, far & near), (True, far & ~near)):
                if not some.any() or (anew and (space, dtype) == begun):
                    continue
                again, known = asked.some(some).of(dtype), None
                with self._in(dtype):
                    if anew:
                        begin, again, n = self._begun(space, again)
                        steps[some] += n
                    else:
                        begin = (V if own else w)[some].to(dtype)
                        if torch.finfo(scores.dtype).eps <= torch.finfo(dtype).eps:
                            known = scores[some].to(dtype)
                    v, again, n = newton(space, again, INNER * tol, begin, MAX_STEPS[dtype], known)
                steps[some] += n
                assert again.alpha is not None
                found = replace(asked.some(some), alpha=again.alpha)
                parts = self._measured(found, space.weights(v))
                nearer = parts[2] < gap[some]
                taken = some.nonzero()[:, 0][nearer]
                for whole, part in zip((w, scores, gap, objective), parts, strict=True):
                    whole[taken] = part[nearer].to(whole.dtype)
                alpha[taken] = again.alpha[nearer].to(alpha.dtype)
                V[taken] = (v if own else asked.T[some] * again.alpha)[nearer].double()
            begun = space, dtype
        nothing = self._sums(asked, asked.costs)
        if (worse := ~(objective <= nothing)).any():
            # (w, b) = 0 is as far from the optimum as alpha = 0 tells
            w[worse], scores[worse], V[worse], alpha[worse] = 0, 0, 0, 0
            gap[worse], objective[worse] = 1, nothing[worse]
        return w, scores, gap, objective, V.to(self.dtype), alpha

    def _ways(self) -> list[tuple[Space, torch.dtype]]:
        """Where a problem is gone on with whose gap, measured in float64, is larger than it seemed:
        what seemed is of scores that many steps have added up, and from measured ones a few more
        are enough; or float32 lacks digits. Of more images than features the Gram matrix has no
        inverse: there even float64 lacks them where C is large, and (w, b) takes its place.
        """
        own, last = self.space, self.space
        if isinstance(own, Examples) and self.rows.N > self.rows.D:
            last = self._by_weights
        return [
            (own, torch.float32),
            (own, torch.float32),
            (own, torch.float64),
            (last, torch.float64),
        ]

    @cached_property
    def _by_weights(self) -> Features:
        return Features(self.rows)

    def _sums(self, asked: Problems, of_rows: Callable[[slice], Tensor]) -> Tensor:
        """(P,) float64 sums over all images."""
        total = torch.zeros(len(asked), dtype=torch.float64, device=asked.C.device)
        for rows in cached(self.rows.N, asked.T):
            total += (of_rows(rows) + torch.zeros_like(asked.T[:, rows])).sum(1)
        return self.rows.agreed(self.rows.of_all(total))

    @contextmanager
    def _in(self, dtype: torch.dtype) -> Iterator[None]:
        self.space.use(dtype)
        try:
            yield
        finally:
            self.space.use(self.dtype)

    def _measured(self, asked: Problems, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(w, b), scores (kept as costs are), gaps and objectives in float64, on X itself."""
        fine = asked.of(torch.float64)
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
        # 0: a problem without images; what overflowed is no solution
        gap = torch.where(objective == 0, 0, gap / objective)
        return w, scores, torch.where(gap.isfinite(), gap, torch.inf), objective


def _pays(N: int, D: int, solves: float) -> bool:
    """Whether the Gram matrix of (N, D) costs fewer multiplications than it spares."""
    near = NEAR_MARGIN * N
    with_it = N**2 * D / 2 + solves * DUAL_PRODUCTS / 2 * N**2
    return with_it <= solves * (DUAL_PRODUCTS * N * D + near**2 * D)


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
        half_GG = space.rows.agreed(0.5 * space.dot(G, G, scores_G))
        objective = space.rows.agreed(0.5 * space.dot(V, V, F) + loss)
        return cls(G, scores_G, half_GG, half_GG + beyond, objective, bends)

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
    steps; until the gap is at most tol of the objective, or it takes more steps than most, or gets
    no nearer in this precision.
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
        done = (g.gap <= tol * g.objective) | ~g.objective.isfinite() | (since > PATIENCE[V.dtype])
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
        going = (guess - length).abs() > LINE_TOLERANCE * length
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
