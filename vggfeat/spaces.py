"""Where the SVMs of `solver` are solved, and how a Newton step is: Gram matrix or features,
whichever is smaller.

N images, D descriptor length, P problems. A state is (w, b) of every problem: in `Examples` as (w,
b) = X' v with v (N, P), in `Features` as itself, (D + 1, P). The constant feature 1 is never
stored: it adds 1 to an inner product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

CG_STEPS = 100  # of one Newton step
CG_TOLERANCE = 1e-3  # on the residual; the next Newton step mends the rest
BLOCK_VALUES = 1 << 25  # of X at a time, as float64: 256 MiB
PRODUCT_ROWS = 1024  # of the Gram matrix at a time
LOW_CONDITION = 3e5  # largest condition number of a system that is factorised in float32
# The same for conjugate gradients, whose preconditioner takes a difference, in float32 and in
# float64.
CG_CONDITION = 3e4, 1e9
RANK = 128  # of the images that the preconditioner goes by
LARGEST_SQUARE = 1e30  # of an image or a feature, beside the constant feature 1 in float64
FACTOR_VALUES = 1 << 26  # of the factors held at a time
EXACT_COST = 120.0  # of (w, b): conjugate gradients cost as much as so many products with X
GATHER_COST = 120.0  # multiplications in whose time one number of an active system is gathered


class Space(Protocol):
    """Where states live. V, W: states (…, P); h, beta: (N, P)."""

    size: int

    def scores(self, V: Tensor) -> Tensor:
        """X V, (N, P)."""
        ...

    def pull(self, beta: Tensor) -> Tensor:
        """The states X' beta."""
        ...

    def dot(self, V: Tensor, W: Tensor, scores_W: Tensor) -> Tensor:
        """(P,) inner products of states."""
        ...

    def newton(self, G: Tensor, scores_G: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """d with (I + X' diag(h) X) d = -G, and X d."""
        ...

    def weights(self, V: Tensor) -> Tensor:
        """(D + 1, P): w and b."""
        ...

    def state(self, W: Tensor, T: Tensor, curvature: Tensor, cap: Tensor) -> Tensor:
        """A state near the (w, b) W."""
        ...

    def sharpen(self) -> bool:
        """Compute more precisely from now on, if that can be."""
        ...


class Rows:
    """X (N, D) of any float kind (an array, a memory map, an HDF5 data set), read in blocks, with a
    constant feature 1.

    States of (w, b) have b last.
    """

    def __init__(self, X: Any, device: torch.device) -> None:
        self.X, self.device = X, device
        self.N, self.D = X.shape
        self.block = max(1, BLOCK_VALUES // self.D)
        self.only_block: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Float64 blocks (n, D), without the constant; kept where there is one only."""
        if self.only_block is None and self.block >= self.N:
            self.only_block = next(self.blocks(np.float64, self.block))[1]
        return (
            self.blocks(np.float64, self.block)
            if self.only_block is None
            else iter([(slice(0, self.N), self.only_block)])
        )

    def blocks(self, kind: type, size: int) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.N, size):
            rows = slice(start, min(start + size, self.N))
            yield rows, torch.as_tensor(np.asarray(self.X[rows], dtype=kind)).to(self.device)

    def products(self, kind: type) -> Tensor:
        """X X' + 1, (N, N) float64 of products in float32 or float64."""
        K = torch.empty(self.N, self.N, dtype=torch.float64, device=self.device)
        size = min(self.block, PRODUCT_ROWS)
        for own, x in self.blocks(kind, size):
            for other, y in self.blocks(kind, size):
                if other.start > own.start:
                    break
                product = (x @ y.T).double() + 1
                K[own, other] = product
                K[other, own] = product.T
        return K

    def scores(self, W: Tensor) -> Tensor:
        """X w + b, (N, P)."""
        return torch.cat([x @ W[:-1] + W[-1] for _, x in self])

    def pull(self, beta: Tensor) -> Tensor:
        """X' beta, (D + 1, P)."""
        total = beta.new_zeros(self.D + 1, beta.shape[1])
        for rows, x in self:
            total[:-1] += x.T @ beta[rows]
        total[-1] = beta.sum(0)
        return total


class Examples:
    """States are coefficients of the examples. Memory: 16 bytes a pair of examples, and factors of
    the active ones.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows, self.size = rows, rows.N
        self.precise = np.dtype(rows.X.dtype).itemsize > 4
        self._set_products(np.float64 if self.precise else np.float32)
        if not self.K.diagonal().isfinite().all():
            self.sharpen()  # squares beyond float32
        _refuse_huge(self.K.diagonal())

    def _set_products(self, kind: type) -> None:
        self.K = self.rows.products(kind)
        self.K32 = self.K.float()
        self.mean_square = float(self.K.diagonal().mean())
        self.low_rank = partial_cholesky(self.K, RANK)
        self.rest = max(0.0, self.mean_square - float((self.low_rank**2).sum()) / self.size)

    def sharpen(self) -> bool:
        """Take the products of float32 images in float64; False where they are already."""
        if self.precise:
            return False
        self.precise = True
        self._set_products(np.float64)
        return True

    def scores(self, V: Tensor) -> Tensor:
        return self.K @ V

    def pull(self, beta: Tensor) -> Tensor:
        return beta

    def dot(self, V: Tensor, W: Tensor, scores_W: Tensor) -> Tensor:
        return (V * scores_W).sum(0)

    def weights(self, V: Tensor) -> Tensor:
        return self.rows.pull(V)

    def state(self, W: Tensor, T: Tensor, curvature: Tensor, cap: Tensor) -> Tensor:
        # the Newton step's end, which depends on where the step begins only by which examples are
        # active there
        s = (1 - T * self.rows.scores(W)).clamp_min(0)
        full = torch.where(curvature * s >= cap, T * cap, 0)
        active = (s > 0) & (curvature * s < cap)
        return full + self._solve(T - self.K @ full, torch.where(active, curvature, 0))[0]

    def newton(self, G: Tensor, scores_G: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        # d = eta - G with eta = 0 off the active examples; there (K + 1/h) eta = K G
        eta, scores_eta = self._solve(scores_G, h)
        return eta - G, scores_eta - scores_G

    def _solve(self, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """eta with (K + 1/h) eta = b over the active examples, where h > 0, and 0 elsewhere; and K
        eta.
        """
        eta, scores = torch.zeros_like(b), torch.zeros_like(b)
        mask = (h > 0).double()
        ridge = torch.where(h > 0, 1 / h, 0)
        b = mask * b
        n = mask.sum(0)
        smallest = torch.where(h > 0, ridge, torch.inf).amin(0)
        condition = self.mean_square * n / smallest
        # what conjugate gradients will take, by what the preconditioner leaves out; seen on VGG
        # descriptors
        steps = 3 + 9 * (self.rest / smallest).sqrt()
        cheap = (n <= RANK) | (n**3 / 3 + GATHER_COST * n**2 <= steps * self.size**2)
        exact = cheap | (steps > CG_STEPS) | (condition > CG_CONDITION[1])
        low = condition < torch.where(exact, LOW_CONDITION, CG_CONDITION[0])
        for chosen, K in ((low, self.K32), (~low, self.K)):
            for some in _parts((chosen & exact).nonzero()[:, 0], n):
                eta[:, some], scores[:, some] = self._exact(
                    K, b[:, some], mask[:, some], ridge[:, some]
                )
            some = (chosen & ~exact).nonzero()[:, 0]
            if len(some):
                eta[:, some] = self._iterative(K, b[:, some], mask[:, some], ridge[:, some])
                scores[:, some] = self.K @ eta[:, some]
        return eta, scores

    def _exact(self, K: Tensor, b: Tensor, mask: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """By the Cholesky factor of each problem's active examples, refined once with products in
        float64.
        """
        eta = torch.zeros_like(b)
        factors: list[tuple[Tensor, Tensor]] = []
        for p in range(b.shape[1]):
            a = mask[:, p].nonzero()[:, 0]
            system = torch.take(K, a[:, None] * self.size + a)
            system.diagonal().add_(ridge[a, p].to(K.dtype))
            factor = cholesky(system)
            factors.append((a, factor))
            eta[a, p] = torch.cholesky_solve(b[a, p, None].to(factor.dtype), factor)[:, 0].double()
        scores = self.K @ eta
        residual = b - mask * scores - ridge * eta
        change = torch.zeros_like(b, dtype=K.dtype)
        for p, (a, factor) in enumerate(factors):
            change[a, p] = torch.cholesky_solve(residual[a, p, None].to(factor.dtype), factor)[
                :, 0
            ].to(K.dtype)
        return eta + change, scores + K @ change

    def _iterative(self, K: Tensor, b: Tensor, mask: Tensor, ridge: Tensor) -> Tensor:
        """By conjugate gradients. The preconditioner is (L L' + ridge)^-1 over the active examples,
        with K ~ L L'.
        """
        L, mask, ridge = self.low_rank.to(K.dtype), mask.to(K.dtype), ridge.to(K.dtype)
        inverse = torch.where(mask > 0, 1 / ridge, 0)
        inner = torch.eye(L.shape[1], dtype=K.dtype, device=K.device).repeat(b.shape[1], 1, 1)
        for p, system in enumerate(inner):
            a = mask[:, p].nonzero()[:, 0]
            system += L[a].T @ (L[a] * inverse[a, p, None])
        factors = cholesky(inner)

        def precondition(r: Tensor) -> Tensor:
            r = inverse * r
            return r - inverse * (
                L @ torch.cholesky_solve((L.T @ r).T[:, :, None], factors)[:, :, 0].T
            )

        return conjugate_gradients(
            lambda p: mask * (K @ p) + ridge * p, precondition, b.to(K.dtype)
        ).to(b.dtype)


def cholesky(systems: Tensor) -> Tensor:
    """Factors of (…, n, n). Where one isn't positive by rounding, all get a larger diagonal:
    shorter steps.
    """
    factors: Tensor
    factors, failed = torch.linalg.cholesky_ex(systems)
    more = torch.finfo(systems.dtype).eps
    while failed.any():
        if more > 1:
            raise ValueError("X holds values too far apart for this C: scale its features")
        diagonal = systems.diagonal(dim1=-2, dim2=-1)
        shift = (more * diagonal.mean(-1, keepdim=True)).expand_as(diagonal)
        factors, failed = torch.linalg.cholesky_ex(systems + torch.diag_embed(shift))
        more *= 8
    return factors


def partial_cholesky(K: Tensor, rank: int) -> Tensor:
    """L (N, rank or fewer) with K - L L' positive and small: the next column is where most is left
    on the diagonal.
    """
    left = K.diagonal().clone()
    enough = 1e-10 * float(left.mean())
    L = K.new_zeros(len(K), rank)
    for j in range(min(rank, len(K))):
        i = int(left.argmax())
        if left[i] <= enough:
            return L[:, : max(1, j)]
        column = K[i] - L[:, :j] @ L[i, :j]
        L[:, j] = column / left[i].sqrt()
        left = (left - L[:, j] ** 2).clamp_min(0)
        left[i] = 0
    return L[:, : len(K)]


def _parts(problems: Tensor, n: Tensor) -> Iterator[Tensor]:
    """Problems, as many at a time as factors of n examples each fit into FACTOR_VALUES."""
    start = total = 0
    for i, p in enumerate(problems.tolist()):
        total += int(n[p]) ** 2
        if total > FACTOR_VALUES and i > start:
            yield problems[start:i]
            start, total = i, int(n[p]) ** 2
    if len(problems):
        yield problems[start:]


class Features:
    """States are (w, b). Memory: a block of rows, and (D + 1)^2 numbers twice; for an exact solve,
    of each problem.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows, self.size = rows, rows.D + 1
        # X'X with the constant feature
        self.second = torch.zeros(self.size, self.size, dtype=torch.float64, device=rows.device)
        for _, x in rows:
            _add_second_moment(self.second, x, x, float(len(x)))
        _refuse_huge(self.second.diagonal())
        self.mean_square = float(self.second.diagonal().mean()) * self.size / rows.N

    def scores(self, V: Tensor) -> Tensor:
        return self.rows.scores(V)

    def pull(self, beta: Tensor) -> Tensor:
        return self.rows.pull(beta)

    def dot(self, V: Tensor, W: Tensor, scores_W: Tensor) -> Tensor:
        return (V * W).sum(0)

    def weights(self, V: Tensor) -> Tensor:
        return V

    def state(self, W: Tensor, T: Tensor, curvature: Tensor, cap: Tensor) -> Tensor:
        return W

    def sharpen(self) -> bool:
        return False

    def newton(self, G: Tensor, scores_G: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        d = torch.zeros_like(G)
        n = (h > 0).sum(0).double()
        exact = n * self.size**2 + self.size**3 / 3 <= EXACT_COST * self.rows.N * self.size
        for some in _parts(exact.nonzero()[:, 0], torch.full_like(n, self.size)):
            d[:, some] = self._exact(-G[:, some], h[:, some])
        # problems of about the same curvature share a factorisation
        level = h.mean(0).log2().round()
        low = self.mean_square * h.sum(0) < CG_CONDITION[0]
        identity = torch.eye(self.size, dtype=G.dtype, device=G.device)
        for value in sorted(set(level[~exact].tolist())):
            factor = cholesky(identity + 2.0**value * self.second)
            for chosen, kind in ((low, torch.float32), (~low, torch.float64)):
                some = (~exact & chosen & (level == value)).nonzero()[:, 0]
                if len(some):
                    product = partial(self._system, h[:, some].to(kind))
                    precondition = partial(_solve_with, factor.to(kind))
                    d[:, some] = conjugate_gradients(
                        product, precondition, -G[:, some].to(kind)
                    ).double()
        return d, self.scores(d)

    def _exact(self, b: Tensor, h: Tensor) -> Tensor:
        systems = torch.eye(self.size, dtype=b.dtype, device=b.device).repeat(b.shape[1], 1, 1)
        for rows, x in self.rows:
            for p, system in enumerate(systems):
                a = h[rows, p].nonzero()[:, 0]
                active, weight = x[a], h[rows, p][a]
                _add_second_moment(system, active, active * weight[:, None], float(weight.sum()))
        return torch.cholesky_solve(b.T[:, :, None], cholesky(systems))[:, :, 0].T

    def _system(self, h: Tensor, p: Tensor) -> Tensor:
        q = p.clone()
        blocks = (
            self.rows if h.dtype == torch.float64 else self.rows.blocks(np.float32, self.rows.block)
        )
        for rows, x in blocks:
            pulled = h[rows] * (x @ p[:-1] + p[-1])
            q[:-1] += x.T @ pulled
            q[-1] += pulled.sum(0)
        return q


def _refuse_huge(squares: Tensor) -> None:
    if not (squares < LARGEST_SQUARE).all():
        raise ValueError(
            "X holds values of 1e15 and more, beside which the constant feature 1 is lost: scale it"
        )


def _solve_with(factor: Tensor, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b, factor)


def _add_second_moment(total: Tensor, x: Tensor, weighted: Tensor, weight: float) -> None:
    """Add x' diag(weights) x, with the constant feature; weighted: x times its weights, weight:
    their sum.
    """
    total[:-1, :-1] += x.T @ weighted
    edge = weighted.sum(0)
    total[-1, :-1] += edge
    total[:-1, -1] += edge
    total[-1, -1] += weight


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], b: Tensor
) -> Tensor:
    """A x = b for each column, to CG_TOLERANCE of the residual in the preconditioner's norm, in
    CG_STEPS at most.
    """
    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz = z, (r * z).sum(0)
    enough = CG_TOLERANCE**2 * rz
    for _ in range(CG_STEPS):
        q = product(p)
        step = torch.where(rz > enough, rz / (p * q).sum(0), 0)
        x += step * p
        r -= step * q
        z = precondition(r)
        before, rz = rz, (r * z).sum(0)
        if not (rz > enough).any():
            break
        p = z + torch.where(before > 0, rz / before, 0) * p
    return x
