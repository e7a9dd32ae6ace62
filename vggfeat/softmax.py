"""Logistic regression over many images: Newton's method, its steps by conjugate gradients whose
products with X all classes share.

N images, D descriptor length, K classes, P problems. What is minimised is scikit-learn's

    f(W, b) = 0.5 |W|^2 + sum_i loss_i(F_i),    F = X W + b  (N, K),

with the intercept b free. `Softmax` is one problem of K classes, loss_i = c_i (log sum_k exp F_ik -
F_iy). `Binomial` is a problem a class (P = K), loss_ik = c_ik log(1 + exp(-t_ik F_ik)); t_ik = 0
leaves image i out.

The losses have slopes beta = c (p - y) and curvatures H: U -> c p (U - p.U), or c p (1 - p) U,
with p (N, K) the probabilities. So a Newton step d solves (I + X' H X) d = -gradient, whose product
takes X twice. The preconditioner is of each class alone: (I + h_k X'X + X_k' a_k X_k)^-1, with one
curvature h_k for all images, and those above it of the few where it is largest: the class's own and
the most like them. The principal components of X, which are found once, diagonalise the first two
terms for all classes and steps; the third has a low rank.

X is centred, which b makes up for: then b and W hardly meet in that system. A state S holds b in
its last row. Above it is W itself in `Features`; in `Examples`, for N <= D, V (N, K) with W = X'V,
so that of X only the Gram matrix is needed.

With beta for a dual point, primal minus dual objective is 0.5 |gradient by W|^2 where b is at its
minimum: no more can f still lose. A problem is done when this gap is at most tol f, in float64 on X
itself. Deterministic: the components begin with random numbers of a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vggfeat.devices import free_memory
from vggfeat.rows import FEW, Rows, full_sums
from vggfeat.spaces import cholesky, refuse_large

MAX_STEPS = 100  # Newton steps; two for a small C, a dozen for a large one
CG_STEPS = 100  # of one Newton step
LEFT = 0.1, 0.5  # of the residual, in the preconditioner's norm, what a Newton step may leave
HARDEST = 32  # images whose own curvature a class's preconditioner knows, where HARDEST_BYTES allow
HARDEST_BYTES = 5e8
FREE = 1e-3  # share of the curvature of b that remains to it where all images are among the hardest
LINE_STEPS = 40
FLAT = 0.1  # of the slope, what a line search may leave
STUCK = 1e-3  # gap below which each step at least halves it, unless rounding forbids
LOWER = 1e-9  # of the objective: what a step lowers that helps, where the gap is larger
ALL_COMPONENTS = 128  # features or examples up to which every principal component is found
COMPONENTS = 64  # of more
ROUNDS = 2  # of the subspace iteration that finds those
SEED = 0
# Of the centred float32 copy of X; a larger X is read for each product.
COPY_BYTES = 4e9
COPY_SHARE = 0.4  # on a GPU: of the memory that is free there
GRAM_BYTES = 2e9
GRAM_ROWS = 1024  # of the Gram matrix at a time: of what is symmetric about half is computed
CLIMB = 4.0  # from costs so small that zero is near the minimum to the costs asked for
NEAR = 1.0  # gap on that way
INTERCEPT_STEPS = 20
PATIENCE = 6  # steps that don't help after which a minimum is given up
ROUNDED = 1e-14  # of the losses, what rounding may change
TINY = 1e-300
ALL_DIGITS = 1e-18  # gap of few numbers, which cost nothing
# Unknowns of a Newton step that is solved exactly: at once, or where float32 led nowhere.
EXACT, EXACT_LATER = 300, 2000
EXACT_VALUES = 1 << 27  # unknowns times images, at most


class Loss(Protocol):
    """c: (N, K) or (N, 1) costs. p, U: (N, K)."""

    c: Tensor
    K: int
    tied: bool
    """Whether the same number added to an image's scores changes nothing."""

    def times(self, factor: float) -> Loss:
        """With other costs."""
        ...

    def total(self, of_classes: Tensor) -> Tensor:
        """(P,) from (K,)."""
        ...

    def at(self, F: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) losses, and the probabilities p."""
        ...

    def slope(self, p: Tensor) -> Tensor:
        """beta, (N, K)."""
        ...

    def bend(self, p: Tensor, c: Tensor, U: Tensor) -> Tensor:
        """H U, (N, K)."""
        ...

    def intercept_step(self, p: Tensor, slope: Tensor) -> Tensor:
        """(K,) the Newton step of b alone; slope: (K,)."""
        ...


class Softmax:
    """One problem of K classes. y: (N,) the class of each image; c: (N,) its cost."""

    tied = True

    def __init__(self, y: Tensor, c: Tensor) -> None:
        self.y, self.c, self.K = y[:, None], c[:, None], int(y.max()) + 1

    def times(self, factor: float) -> Softmax:
        return Softmax(self.y[:, 0], self.c[:, 0] * factor)

    def total(self, of_classes: Tensor) -> Tensor:
        return of_classes.sum(0, keepdim=True)

    def at(self, F: Tensor) -> tuple[Tensor, Tensor]:
        shifted = F - F.amax(1, keepdim=True)
        own = shifted.gather(1, self.y)
        p = shifted.exp_()
        sums = p.sum(1, keepdim=True)
        return (self.c * (sums.log() - own)).sum(0), p.div_(sums)

    def slope(self, p: Tensor) -> Tensor:
        return (self.c * p).scatter_add_(1, self.y, -self.c)

    def bend(self, p: Tensor, c: Tensor, U: Tensor) -> Tensor:
        mean = torch.einsum("nk,nk->n", p, U)[:, None]
        return (U - mean).mul_(p).mul_(c)

    def intercept_step(self, p: Tensor, slope: Tensor) -> Tensor:
        weighted = self.c * p
        H = torch.diag(weighted.sum(0) + TINY) - p.T @ weighted
        # The same added to every intercept changes nothing; a curvature in that direction makes H
        # positive.
        H += H.diagonal().mean()
        return -torch.cholesky_solve(slope[:, None], cholesky(H))[:, 0]


class Binomial:
    """A problem a class. t: (N, K) targets 1, -1, 0; c: (N, K) costs, 0 where t is."""

    tied = False

    def __init__(self, t: Tensor, c: Tensor) -> None:
        self.t, self.c, self.y, self.K = t, c, (t > 0).to(c), t.shape[1]

    def times(self, factor: float) -> Binomial:
        return Binomial(self.t, self.c * factor)

    def total(self, of_classes: Tensor) -> Tensor:
        return of_classes

    def at(self, F: Tensor) -> tuple[Tensor, Tensor]:
        return (self.c * torch.nn.functional.softplus(-self.t * F)).sum(0), torch.sigmoid(F)

    def slope(self, p: Tensor) -> Tensor:
        return self.c * (p - self.y)

    def bend(self, p: Tensor, c: Tensor, U: Tensor) -> Tensor:
        return (c * p).mul_(1 - p).mul_(U)

    def intercept_step(self, p: Tensor, slope: Tensor) -> Tensor:
        return -slope / ((self.c * p * (1 - p)).sum(0) + TINY)


class Space(Protocol):
    """Where states live. S, R: (…, K), b last. r: (N, 1) the mean cost of each image, of mean 1.

    X' r X has the eigenvalues `values` and, in the coordinates of the space, the eigenvectors
    `left`, with `right` their dual basis: I + h X' r X is about (1 + h rest) (I - left right') +
    left (1 + h values) right'; without its first part where `whole`. `seen`: X left; `told`: the
    rows of right' X'.
    """

    plain: bool
    size: int
    kind: torch.dtype
    values: Tensor
    left: Tensor
    right: Tensor
    seen: Tensor
    told: Tensor
    rest: float
    whole: bool
    r: Tensor

    def scores(self, S: Tensor) -> Tensor:
        """X S, (N, K); of kind float32 until sharpened, as `pull`."""
        ...

    def pull(self, beta: Tensor) -> Tensor:
        """The state X' beta."""
        ...

    def exact_pull(self, beta: Tensor) -> Tensor:
        """The same in float64, of X itself."""
        ...

    def dot(self, S: Tensor, R: Tensor, scores_R: Tensor | None) -> Tensor:
        """(K,) inner products of W, without b; X R isn't needed where `plain`."""
        ...

    def squares(self, S: Tensor) -> Tensor:
        """dot(S, S, X S), from S alone."""
        ...

    def images(self, which: Tensor) -> Tensor:
        """The rows of images (K, m), with which states have their scores: (K, m, size)."""
        ...

    def products(self, which: Tensor, rows: Tensor) -> Tensor:
        """The inner products of these images, (K, m, m)."""
        ...

    def pull_images(self, which: Tensor, rows: Tensor, beta: Tensor) -> Tensor:
        """`pull` without b, where beta (K, m) is of these images alone."""
        ...

    def weights(self, S: Tensor) -> Tensor:
        """(D + 1, K): W, and the b that X itself needs."""
        ...

    def near(self, W: Tensor, loss: Loss) -> Tensor:
        """The direction (a state) of `weights` W, to be gone from zero."""
        ...

    def sharpen(self) -> None:
        """Compute in float64 from now on."""
        ...


class Features:
    """States are (W, b). Memory: a centred float32 copy of X, where COPY_BYTES or COPY_SHARE
    allow one.
    """

    plain = True

    def __init__(self, rows: Rows, r: Tensor) -> None:
        self.rows, self.r, self.size = rows, r, rows.D
        self.mean = _pull(rows, r)[:-1] / r.sum()
        self.kept: Tensor | None = None
        self._set_kind(torch.float32)

    def _set_kind(self, kind: torch.dtype) -> None:
        self.kind, self.kept = kind, None
        device = self.rows.device
        most = COPY_SHARE * free_memory(device) if device.type == "cuda" else COPY_BYTES
        if kind == torch.float32 and 4.0 * self.rows.N * self.size <= most:
            self.kept = torch.cat([x for _, x in self._blocks()])

        def second_moment(Q: Tensor | None) -> Tensor:
            total = self.r.new_zeros(self.size, self.size if Q is None else Q.shape[1])
            for rows, x in self._blocks():
                weighted = self.r[rows].to(kind) * (x if Q is None else x @ Q.to(kind))
                total += x.T @ weighted
            return total

        squares = sum(
            float((self.r[rows] * x.double().square().sum(1, True)).sum())
            for rows, x in self._blocks()
        )
        self.values, Q, self.rest, self.whole = components(
            second_moment, self.size, squares, self.rows.device
        )
        self.left = self.right = Q.to(kind)
        self.seen = self.told = self.scores(_state(Q))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Centred."""
        if self.kept is not None:
            yield slice(0, self.rows.N), self.kept
            return
        for rows, x in self.rows.plain(torch.float64):
            yield rows, (x - self.mean[:, 0]).to(self.kind)

    def scores(self, S: Tensor) -> Tensor:
        S = S.to(self.kind)
        return torch.cat([x @ S[:-1] + S[-1] for _, x in self._blocks()])

    def pull(self, beta: Tensor) -> Tensor:
        beta = beta.to(self.kind)
        total = beta.new_zeros(self.size, beta.shape[1])
        for rows, x in self._blocks():
            total += x.T @ beta[rows]
        return _state(total, beta.sum(0))

    def exact_pull(self, beta: Tensor) -> Tensor:
        S = _pull(self.rows, beta)
        return _state(S[:-1] - self.mean * S[-1], S[-1])

    def dot(self, S: Tensor, R: Tensor, scores_R: Tensor | None) -> Tensor:
        return (S[:-1] * R[:-1]).sum(0)

    def squares(self, S: Tensor) -> Tensor:
        return S[:-1].square().sum(0)

    def images(self, which: Tensor) -> Tensor:
        flat = which.flatten()
        found = self.seen.new_empty(len(flat), self.size)
        for rows, x in self._blocks():
            inside = (flat >= rows.start) & (flat < rows.stop)
            found[inside] = x[flat[inside] - rows.start]
        return found.view(*which.shape, self.size)

    def products(self, which: Tensor, rows: Tensor) -> Tensor:
        return rows @ rows.transpose(1, 2)

    def pull_images(self, which: Tensor, rows: Tensor, beta: Tensor) -> Tensor:
        return (beta[:, None] @ rows)[:, 0].T

    def weights(self, S: Tensor) -> Tensor:
        return _state(S[:-1], S[-1] - (self.mean * S[:-1]).sum(0))

    def near(self, W: Tensor, loss: Loss) -> Tensor:
        return _state(W[:-1], W[-1] + (self.mean * W[:-1]).sum(0))

    def sharpen(self) -> None:
        self._set_kind(torch.float64)


class Examples:
    """States are V with W = X' V, and b. Memory: the Gram matrix, float32 until sharpened."""

    plain = False

    def __init__(self, rows: Rows, r: Tensor) -> None:
        self.rows, self.r, self.size = rows, r, rows.N
        self.mean = _pull(rows, r)[:-1] / r.sum()
        self._set_kind(torch.float32)

    def _set_kind(self, kind: torch.dtype) -> None:
        self.kind = kind
        self.K = torch.empty(self.size, self.size, dtype=kind, device=self.rows.device)
        for own, x in self._blocks():
            for other, y in self._blocks():
                if other.start > own.start:
                    break
                product = x @ y.T
                self.K[own, other] = product
                self.K[other, own] = product.T

        root = self.r.sqrt()

        def gram(U: Tensor | None) -> Tensor:
            return root * (self.K * root.T if U is None else self.K @ (root * U).to(kind)).double()

        squares = float((self.r[:, 0] * self.K.diagonal()).sum())
        self.values, U, self.rest, self.whole = components(
            gram, self.size, squares, self.rows.device
        )
        # the eigenvectors of sqrt(r) K sqrt(r); those of r K, which aren't orthogonal, by them
        self.left, self.right = (root * U).to(kind), (U / root).to(kind)
        self.seen, self.told = self.K @ self.left, self.right

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, x in self.rows.plain(torch.float64):
            for start in range(rows.start, rows.stop, GRAM_ROWS):
                part = slice(start, min(start + GRAM_ROWS, rows.stop))
                own = x[start - rows.start : part.stop - rows.start]
                yield part, (own - self.mean[:, 0]).to(self.kind)

    def scores(self, S: Tensor) -> Tensor:
        S = S.to(self.kind)
        return self.K @ S[:-1] + S[-1]

    def pull(self, beta: Tensor) -> Tensor:
        return _state(beta, beta.sum(0))

    def exact_pull(self, beta: Tensor) -> Tensor:
        return self.pull(beta)

    def dot(self, S: Tensor, R: Tensor, scores_R: Tensor | None) -> Tensor:
        assert scores_R is not None
        return (S[:-1] * (scores_R - R[-1])).sum(0)

    def squares(self, S: Tensor) -> Tensor:
        return self.dot(S, S, self.scores(S).double())

    def images(self, which: Tensor) -> Tensor:
        return self.K[which]

    def products(self, which: Tensor, rows: Tensor) -> Tensor:
        return self.K[which[:, :, None], which[:, None]]

    def pull_images(self, which: Tensor, rows: Tensor, beta: Tensor) -> Tensor:
        return beta.new_zeros(self.size, len(which)).scatter_(0, which.T, beta.T)

    def weights(self, S: Tensor) -> Tensor:
        W = _pull(self.rows, S[:-1])
        W[:-1] -= self.mean * W[-1]
        W[-1] = S[-1] - (self.mean * W[:-1]).sum(0)
        return W

    def near(self, W: Tensor, loss: Loss) -> Tensor:
        beta = loss.slope(loss.at(_scores(self.rows, W))[1])
        # at a minimum V = -beta
        return _state(-beta, W[-1] + (self.mean * W[:-1]).sum(0))

    def sharpen(self) -> None:
        self._set_kind(torch.float64)


def _state(W: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.cat([W, W.new_zeros(1, W.shape[1]) if b is None else b[None]])


def _scores(rows: Rows, W: Tensor) -> Tensor:
    """X W + b, (N, K) float64, of X itself."""
    return rows.scores(W.T.contiguous()).T


def _pull(rows: Rows, beta: Tensor) -> Tensor:
    """X' beta with the constant feature, (D + 1, K) float64, of X itself."""
    return rows.pull(beta.T.contiguous(), beta.shape[1], torch.float64).T


class Preconditioner:
    """About the inverse of I + X' diag(h) X, each class for itself; of the intercept by itself.

    h: (N, K) curvatures.
    """

    def __init__(self, space: Space, h: Tensor) -> None:
        self.space, kind, (N, K) = space, space.kind, h.shape
        m = int(min(HARDEST, N, HARDEST_BYTES / (8 * K * space.size)))
        largest, which = h.topk(m, 0)
        sums = h.sum(0).clamp_min(TINY)
        mean = ((sums - largest.sum(0)) / max(1, N - m)).clamp_min(TINY)
        rest = torch.zeros_like(mean) if space.whole else 1 / (1 + mean * space.rest)
        inner = 1 / (1 + mean * space.values[:, None]) - rest
        self.rest, self.inner = rest.to(kind), inner.to(kind)
        # centred, the images' mean curvature leaves b alone; that of the hardest ties it to W
        self.inverse_b = 1 / torch.maximum(mean * N, FREE * sums).to(kind)
        self.which = which.T
        excess = (largest - mean * space.r[which, 0]).clamp_min(0).T
        self.root = excess.sqrt().to(kind)
        self.rows = space.images(self.which)
        # a product of each class's rows with one vector is quick from this side alone
        self.columns = self.rows.transpose(1, 2).contiguous()
        known = space.seen[self.which] * self.inner.T[:, None]
        system = known @ space.told[self.which].transpose(1, 2)
        if not space.whole:
            system += self.rest[:, None, None] * space.products(self.which, self.rows)
        system = (
            self.root[:, :, None] * (system + self.inverse_b[:, None, None]) * self.root[:, None]
        )
        system.diagonal(dim1=1, dim2=2).add_(1)
        self.solved = torch.cholesky_inverse(cholesky(system))

    def __call__(self, R: Tensor) -> Tensor:
        Z = self._without_hardest(R)
        scores = (Z[:-1].T[:, None] @ self.columns)[:, 0] + Z[-1, :, None]
        beta = self.root * ((self.root * scores)[:, None] @ self.solved)[:, 0]
        pulled = self.space.pull_images(self.which, self.rows, beta)
        return Z - self._without_hardest(_state(pulled, beta.sum(1)))

    def _without_hardest(self, R: Tensor) -> Tensor:
        W, b = R[:-1], self.inverse_b * R[-1]
        known = self.inner * (self.space.right.T @ W)
        return _state(self.rest * W + self.space.left @ known, b)


def components(
    product: Callable[[Tensor | None], Tensor], size: int, trace: float, device: torch.device
) -> tuple[Tensor, Tensor, float, bool]:
    """(r,) eigenvalues and (size, r) eigenvectors of a positive matrix, the mean of the other
    eigenvalues, and whether there are no others: the largest ones, where the matrix is large.

    product: the matrix times what is given, or the matrix itself.
    """
    if size <= ALL_COMPONENTS:
        values, Q = torch.linalg.eigh(product(None))
        return values.clamp_min(0), Q, 0.0, True
    start = np.random.default_rng(SEED).standard_normal((size, COMPONENTS))
    Q = torch.as_tensor(start, device=device)
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(product(Q))[0]
    values, R = torch.linalg.eigh(Q.T @ product(Q))
    values = values.clamp_min(0)
    rest = max(0.0, trace - float(values.sum())) / (size - COMPONENTS)
    return values, Q @ R, rest, False


@dataclass
class Solution:
    """coef: (K, D) float64; intercept: (K,). gap: (P,) of the objective, converged where it is at
    most tol. objective: (P,). steps: of Newton's method.
    """

    coef: np.ndarray
    intercept: np.ndarray
    gap: np.ndarray
    objective: np.ndarray
    steps: int


def solve(
    X: Any, loss: Loss, tol: float = 1e-5, near: tuple[np.ndarray, np.ndarray] | None = None
) -> Solution:
    """The minimum over the rows of X (N, D), all of which have a cost, on the costs' device.

    near: coef (K, D) and intercept (K,) of a like minimum, to start from.
    """
    with full_sums():
        return _solved(X, loss, tol, near)


def _solved(X: Any, loss: Loss, tol: float, near: tuple[np.ndarray, np.ndarray] | None) -> Solution:
    rows = Rows(X, loss.c.device, memory=0)  # a space keeps what it needs of X
    refuse_large(float((loss.c.amax(1) * (rows.squares() + 1)).max()))
    if rows.N * rows.D <= FEW:
        tol = min(tol, ALL_DIGITS)
    r = loss.c.mean(1, keepdim=True)
    r = r / r.mean()
    by_examples = rows.N <= rows.D and 4.0 * rows.N**2 <= GRAM_BYTES
    space: Space = Examples(rows, r) if by_examples else Features(rows, r)
    zero = r.new_zeros(space.size + 1, loss.K), r.new_zeros(rows.N, loss.K)
    if near is None:
        at, steps = _climb(rows, space, loss, *zero)
    else:
        d = space.near(torch.as_tensor(np.vstack([near[0].T, near[1]])).to(r), loss)
        at, steps = _along(space, loss, _At(*zero, loss), d, space.scores(d).double()), 0
    at, gap, objective, more = _newton(rows, space, loss, tol, at, measure=True)
    W, steps = space.weights(at.S), steps + more
    if not space.plain and float(gap.max()) > tol and _few(rows.N, rows.D, loss, EXACT_LATER):
        space = Features(rows, r)
        space.sharpen()
        S = space.near(W, loss)
        at = _At(S, space.scores(S), loss)
        at, gap, objective, more = _newton(rows, space, loss, tol, at, measure=True)
        W, steps = space.weights(at.S), steps + more
    coef, intercept = W[:-1].T.contiguous().cpu().numpy(), W[-1].cpu().numpy()
    return Solution(coef, intercept, gap.cpu().numpy(), objective.cpu().numpy(), steps)


def _climb(rows: Rows, space: Space, loss: Loss, S: Tensor, F: Tensor) -> tuple[_At, int]:
    """Where the costs asked for are begun with, and Newton steps to there.

    From zero straight to large costs steps are short, as the losses bend most where they matter
    least. At zero the gap grows with the costs' square: with a share of them it is near enough.
    """
    losses, p = loss.at(F)
    half_squares = 0.5 * loss.total(space.squares(space.pull(loss.slope(p)).double()))
    factor = float((NEAR * losses / half_squares.clamp_min(TINY)).min().clamp_max(1))
    steps = 0
    for rise in range(-math.ceil(-math.log(max(factor, TINY), CLIMB)), 0):
        lower = loss.times(CLIMB**rise)
        at, _, _, more = _newton(rows, space, lower, NEAR, _At(S, F, lower), measure=False)
        S, F, steps = at.S, at.F, steps + more
    return _At(S, F, loss), steps


class _At:
    """A state S, its scores F, and there the losses (P,) and the probabilities."""

    def __init__(self, S: Tensor, F: Tensor, loss: Loss) -> None:
        self.S, self.F = S, F
        self.losses, self.p = loss.at(F)


def _newton(
    rows: Rows, space: Space, loss: Loss, tol: float, at: _At, measure: bool
) -> tuple[_At, Tensor, Tensor, int]:
    """Where the gap is at most tol; the gaps and objectives there, and the steps to there."""
    # Float32 finds the way. Whether that ends at the minimum is measured in float64 on X itself, as
    # is every step from there; and where directions from float32 no longer help, they are found in
    # float64, too.
    measured, stuck, before, steps = False, 0, math.inf, 0
    lowest = torch.full_like(at.losses, math.inf)
    while True:
        W: Tensor | None = None
        open_b = torch.zeros_like(at.losses)
        if measured:
            W = space.weights(at.S)
            F = _scores(rows, W)
            b, open_b = _free_intercepts(loss, F)
            at.S[-1] += b
            at = _At(at.S, F + b, loss)
        G = (space.exact_pull if measured else space.pull)(loss.slope(at.p)).double()
        G[:-1] += at.S[:-1]
        if W is None:
            squares, left = space.dot(at.S, at.S, at.F), space.squares(G)
        else:
            squares, left = (V[:-1].square().sum(0) for V in (W, space.weights(G)))
        objective = at.losses + 0.5 * loss.total(squares)
        gap = (0.5 * loss.total(left) + open_b) / objective.clamp_min(TINY)
        worst = float(gap.max())
        falls = bool((objective < (1 - LOWER) * lowest).any())
        helped = worst <= 0.5 * before or (falls and STUCK < worst < math.inf)
        ended = worst <= tol or steps == MAX_STEPS
        if measured == measure and (ended or stuck == PATIENCE):
            return at, gap, objective, steps
        if not measured and measure and (ended or not helped):
            measured, before, lowest = True, math.inf, torch.full_like(lowest, math.inf)
            continue
        if not helped:
            stuck += 1
            if stuck == 1:
                space.sharpen()
        before, lowest = worst, objective
        # the gap goes with the residual's square: no more of it than tol asks for
        left = 0.5 * (tol / gap.clamp_min(TINY)).sqrt()
        unknowns = EXACT_LATER if space.kind == torch.float64 else EXACT
        if isinstance(space, Features) and _few(rows.N, rows.D, loss, unknowns):
            d, scores_d = _exact_direction(space, loss, at.p, -G)
        else:
            d, scores_d = _direction(space, loss, at.p, -G, left.clamp(*LEFT))
        at = _along(space, loss, at, d, scores_d)
        steps += 1


def _free_intercepts(loss: Loss, F: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) what b lacks to its minimum, and (P,) what it could lose there still."""
    b = F.new_zeros(F.shape[1])
    losses, p = loss.at(F)
    for _ in range(INTERCEPT_STEPS):
        slope = loss.slope(p).sum(0)
        step = loss.intercept_step(p, slope)
        lost = -loss.total(slope * step)
        losses_there, p_there = loss.at(F + b + step)
        better = losses_there < losses - ROUNDED * losses
        if not better.any():
            break
        b = b + better * step
        losses, p = torch.where(better, losses_there, losses), torch.where(better, p_there, p)
    return b, lost


def _few(N: int, D: int, loss: Loss, unknowns: int) -> bool:
    """Whether a Newton step has so few unknowns, and as few images as that takes."""
    size = loss.K * (D + 1)
    return size <= unknowns and N * size <= EXACT_VALUES


def _exact_direction(space: Features, loss: Loss, p: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """d with (I + X' H X) d = b, where I leaves the intercepts out, and X d; in float64."""
    x = torch.cat([x for _, x in space._blocks()]).double()
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    K, size = loss.K, x.shape[1]
    system = x.new_zeros(K, size, K, size)
    for k in range(K):
        bent = loss.bend(p, loss.c, torch.zeros_like(p).index_fill_(1, p.new_tensor([k]).long(), 1))
        for other in range(K):
            system[other, :, k] = x.T @ (bent[:, other, None] * x)
    if loss.tied:  # curvature also where nothing changes
        intercepts = system[:, -1, :, -1]
        intercepts += intercepts.diagonal().mean()
    matrix = system.view(K * size, K * size)
    regular = x.new_ones(K, size)
    regular[:, -1] = 0
    matrix.diagonal().add_(regular.flatten())
    d = torch.cholesky_solve(b.T.reshape(-1, 1), cholesky(matrix)).view(K, size).T
    return d, x @ d


def _direction(
    space: Space, loss: Loss, p: Tensor, b: Tensor, left: Tensor
) -> tuple[Tensor, Tensor]:
    """About d with (I + X' H X) d = b, where I leaves the intercepts out, and X d: by conjugate
    gradients, to the share `left` (P,) of the residual.
    """
    precondition = Preconditioner(space, loss.c * p * (1 - p))
    size = loss.total(b.square().sum(0)).sqrt().clamp_min(TINY)  # in float32 squares overflow
    c, p = loss.c.to(space.kind), p.to(space.kind)

    def dot(S: Tensor, R: Tensor, scores_R: Tensor | None) -> Tensor:
        return loss.total(space.dot(S, R, scores_R) + S[-1] * R[-1])

    R = (b / size).to(space.kind)
    Z = precondition(R)
    scores_Z = space.scores(Z)
    S, scores_S, rz = Z, scores_Z, dot(R, Z, scores_Z)
    d, scores_d = torch.zeros_like(R), torch.zeros_like(scores_Z)
    least = left.to(space.kind) ** 2 * rz
    for _ in range(CG_STEPS):
        bent = loss.bend(p, c, scores_S)
        curvature = loss.total(space.dot(S, S, scores_S) + (scores_S * bent).sum(0))
        length = torch.where(rz > least, rz / curvature, 0)
        d += length * S
        scores_d += length * scores_S
        product = space.pull(bent)
        product[:-1] += S[:-1]
        R = R - length * product
        Z = precondition(R)
        known = None if space.plain else space.scores(Z)
        before, rz = rz, dot(R, Z, known)
        if not (rz > least).any():
            break
        scores_Z = space.scores(Z) if known is None else known
        turn = torch.where(before > 0, rz / before, 0)
        S, scores_S = Z + turn * S, scores_Z + turn * scores_S
    return size * d.double(), size * scores_d.double()


def _along(space: Space, loss: Loss, at: _At, d: Tensor, scores_d: Tensor) -> _At:
    """The state near the minimum along d: by interpolation of the slope, which rises, between
    guards.
    """
    sd, dd = (loss.total(space.dot(S, d, scores_d)) for S in (at.S, d))

    def slope(there: _At, length: Tensor) -> Tensor:
        return loss.total((loss.slope(there.p) * scores_d).sum(0)) + sd + length * dd

    low, high = torch.zeros_like(dd), torch.full_like(dd, torch.inf)
    first = slope_low = slope(at, low)
    slope_high, length = torch.zeros_like(dd), (first < 0).to(dd)
    for _ in range(LINE_STEPS):
        there = _At(at.S + length * d, at.F + length * scores_d, loss)
        here = slope(there, length)
        gain = at.losses - there.losses - length * (sd + 0.5 * length * dd)
        going = (here.abs() > -FLAT * first) | (gain < -ROUNDED * at.losses)
        going &= first < 0
        if not going.any():
            return there
        falls = here < 0
        low, slope_low = torch.where(falls, length, low), torch.where(falls, here, slope_low)
        high, slope_high = torch.where(falls, high, length), torch.where(falls, slope_high, here)
        between = low - slope_low * (high - low) / (slope_high - slope_low)
        margin = 0.1 * (high - low)
        between = torch.minimum(torch.maximum(between, low + margin), high - margin)
        beyond = (length * first / (first - here)).clamp(1.5 * length, 4 * length)
        guess = torch.where(high.isinf(), beyond, between)
        length = torch.where(going, guess, length)
    # the lower end still falls, so that it is no higher than where the line begins
    length = torch.where(going, low, length)
    return _At(at.S + length * d, at.F + length * scores_d, loss)
