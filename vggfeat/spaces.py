"""Where the SVMs of `solver` are solved, and how a Newton step is: Gram matrix or features,
whichever is smaller.

N images, D descriptor length, P problems. A state is (w, b) of every problem: in `Examples` as (w,
b) = v X with v (P, N), in `Features` as itself, (P, D + 1). States are float32 or float64, and what
is computed from them is as precise, but for the products of halves within a direction.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from vggfeat.rows import Rows, add_moment

CG_STEPS = 100  # of one Newton step
CG_TOLERANCE = 1e-3  # on the residual; the next Newton step mends the rest
PRODUCT_ROWS = 1024  # of the Gram matrix at a time
# Largest condition number of a system that is factorised in float32, and of one that conjugate
# gradients solve there, whose preconditioner takes a difference; the same in float64.
EXACT_CONDITION = {torch.float32: 3e6, torch.float64: torch.inf}
CG_CONDITION = {torch.float32: 3e4, torch.float64: 1e9}
RANK = 128  # of the images that the preconditioner goes by
LARGEST_SQUARE = 1e30  # of an image, beside the constant feature 1 in float64; float32 holds it
MOST_COST = 1e16  # of an image, times the square of its length: beyond float64 has no digits left
FACTOR_VALUES = 1 << 26  # of the factors held at a time
SLACK = {"cpu": 1.0, "cuda": 1.3}  # largest over smallest of the systems factorised together
EXACT_COST = 120.0  # of (w, b): conjugate gradients cost as much as so many products with X
GATHER_COST = 120.0  # multiplications in whose time one number of an active system is gathered
# (P, N) numbers that are looked at together: on a CPU they stay in the cache
CACHED_VALUES = {"cpu": 1 << 17, "cuda": 1 << 25}
FACTORS = 8  # of the second moment, each for another curvature, that are kept


class Space(Protocol):
    """Where states live. V, W: states (P, …); T, h, beta: (P, N), or what gives them by rows of
    X.
    """

    size: int
    rows: Rows
    squares: Tensor
    """(N,) of the images' lengths, the constant feature 1 included."""
    exact_cost: float
    """Multiplications of a Newton step by a system of (w, b), where that is possible."""
    state_bytes: int
    """Of an image in a problem that is being solved: targets, scores, directions."""

    def scores(self, V: Tensor) -> Tensor:
        """(P, N) of all images."""
        ...

    def pull(self, beta: Callable[[slice], Tensor], like: Tensor) -> Tensor:
        """The states of beta X, of like's type and P."""
        ...

    def scores_of(self, G: Tensor) -> Tensor | None:
        """Scores, where `dot` and `newton` need them."""
        ...

    def dot(self, V: Tensor, W: Tensor, scores_W: Tensor | None) -> Tensor:
        """(P,) inner products of states."""
        ...

    def newton(
        self, G: Tensor, scores_G: Tensor | None, h: Callable[[slice], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """d with (I + X' diag(h) X) d = -G, its scores, and (P,) whether d is as precise as it
        needs to be.
        """
        ...

    def weights(self, V: Tensor) -> Tensor:
        """(P, D + 1) float64: w and b."""
        ...

    def near(
        self, W: Tensor, full: Callable[[slice], Tensor], h: Callable[[slice], Tensor], T: Tensor
    ) -> Tensor:
        """A state near the (w, b) W, at whose scores the images of T are at their cap (full: with
        which coefficient), or bend their loss (h: how much), or neither.
        """
        ...

    def use(self, dtype: torch.dtype) -> None:
        """Take states of this type from now on."""
        ...


class Products(Protocol):
    """K = X X' + 1, the products of the images with each other. B: (P, N), a number for each
    problem and image; a, b: numbers of images.

    read: multiplications for a number of K. cost: of a product with K, for each problem. A sum S
    holds B's products while B changes; its form is its own.
    """

    diagonal: Tensor
    read: float
    cost: float
    rank: int

    def times(self, B: Tensor) -> Tensor:
        """B K, (P, N)."""
        ...

    def among(self, a: Tensor, b: Tensor) -> Tensor:
        """K of some images and others, (len(a), len(b))."""
        ...

    def sum(self, B: Tensor) -> Tensor: ...

    def of(self, S: Tensor, a: Tensor) -> Tensor:
        """B K of some images, (P, len(a))."""
        ...

    def add(self, S: Tensor, a: Tensor, d: Tensor) -> None:
        """d (P, len(a)) to B; in place."""
        ...


class Gram:
    """K as a matrix. A sum is B K."""

    def __init__(self, K: Tensor) -> None:
        self.K, self.diagonal = K, K.diagonal()
        self.read, self.cost, self.rank = GATHER_COST, float(len(K)) ** 2, RANK

    def times(self, B: Tensor) -> Tensor:
        return B @ self.K

    def among(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.take(self.K, a[:, None] * len(self.K) + b)

    def sum(self, B: Tensor) -> Tensor:
        return self.times(B)

    def of(self, S: Tensor, a: Tensor) -> Tensor:
        return S.index_select(1, a)

    def add(self, S: Tensor, a: Tensor, d: Tensor) -> None:
        S.addmm_(d, self.K.index_select(0, a))


class ByFeatures:
    """K by X (N, D) itself. A sum is B X, (P, D + 1)."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.diagonal = x, (x * x).sum(1) + 1
        self.read, self.cost, self.rank = float(x.shape[1]), 2.0 * x.numel(), RANK // 16

    def times(self, B: Tensor) -> Tensor:
        return (B @ self.x) @ self.x.T + B.sum(1, keepdim=True)

    def among(self, a: Tensor, b: Tensor) -> Tensor:
        return self.x.index_select(0, a) @ self.x.index_select(0, b).T + 1

    def sum(self, B: Tensor) -> Tensor:
        return torch.cat([B @ self.x, B.sum(1, keepdim=True)], 1)

    def of(self, S: Tensor, a: Tensor) -> Tensor:
        return S[:, :-1] @ self.x.index_select(0, a).T + S[:, -1:]

    def add(self, S: Tensor, a: Tensor, d: Tensor) -> None:
        S[:, :-1] += d @ self.x.index_select(0, a)
        S[:, -1] += d.sum(1)


class _LowRank:
    """What conjugate gradients go by: L (N, RANK) with K ~ L L', and what that leaves out."""

    def __init__(self, K: Products) -> None:
        self.mean_square, N = float(K.diagonal.mean()), len(K.diagonal)
        every = torch.arange(N, device=K.diagonal.device)
        self.L = partial_cholesky(K.diagonal, lambda i: K.among(every[i : i + 1], every)[0], K.rank)
        self.rest = max(0.0, self.mean_square - float((self.L**2).sum()) / N)


class Examples:
    """States are coefficients of the examples. Memory: 4 bytes a pair of examples, 8 more where
    float64 is needed, and factors of the active ones.

    by_features: K in float32, by X itself, where few problems don't pay for the matrix.
    """

    state_bytes = 100
    exact_cost = math.inf

    def __init__(self, rows: Rows, by_features: ByFeatures | None = None) -> None:
        self.rows, self.size = rows, rows.N
        self.products: dict[torch.dtype, Products] = {}
        self.low_rank: dict[torch.dtype, _LowRank] = {}
        if by_features is not None:
            self.products[torch.float32] = by_features
        self.use(torch.float32)
        self.squares = self.K.diagonal
        _refuse_huge(rows, self.squares)

    def use(self, dtype: torch.dtype) -> None:
        if dtype not in self.products:
            K = self.rows.products(dtype, min(self.rows.block, PRODUCT_ROWS))
            self.products[dtype] = Gram(K)
        self.K, self.dtype = self.products[dtype], dtype

    def scores(self, V: Tensor) -> Tensor:
        return self.K.times(V)

    def pull(self, beta: Callable[[slice], Tensor], like: Tensor) -> Tensor:
        return _whole(beta, self.size, like)

    def scores_of(self, G: Tensor) -> Tensor:
        return self.K.times(G)

    def dot(self, V: Tensor, W: Tensor, scores_W: Tensor | None) -> Tensor:
        assert scores_W is not None
        return (V * scores_W).sum(1)

    def weights(self, V: Tensor) -> Tensor:
        return self.rows.pull(V.double(), len(V), torch.float64)

    def near(
        self, W: Tensor, full: Callable[[slice], Tensor], h: Callable[[slice], Tensor], T: Tensor
    ) -> Tensor:
        # the Newton step's end, which depends on where the step begins only by which examples are
        # active there
        at_cap = _whole(full, self.size, W)
        return at_cap + self._solve(T - self.K.times(at_cap), _whole(h, self.size, W))[0]

    def newton(
        self, G: Tensor, scores_G: Tensor | None, h: Callable[[slice], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        # d = eta - G with eta = 0 off the active examples; there (K + 1/h) eta = K G
        assert scores_G is not None
        eta, scores_eta, good = self._solve(scores_G, _whole(h, self.size, G))
        return eta - G, scores_eta - scores_G, good

    def _solve(self, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """eta with (K + 1/h) eta = b over the active examples, where h > 0, and 0 elsewhere; its
        scores; and of which problems the condition number allows that in this precision.
        """
        eta = torch.zeros_like(b)
        mask = (h > 0).to(b.dtype)
        ridge = torch.where(h > 0, 1 / h, 0)
        b = mask * b
        n = mask.sum(1)
        smallest = torch.where(h > 0, ridge, torch.inf).amin(1)
        if self.dtype not in self.low_rank:
            self.low_rank[self.dtype] = _LowRank(self.K)
        low_rank = self.low_rank[self.dtype]
        condition = low_rank.mean_square * n / smallest
        # what conjugate gradients will take, by what the preconditioner leaves out; seen on VGG
        # descriptors
        steps = 3 + 9 * (low_rank.rest / smallest).sqrt()
        cheap = (n <= RANK) | (n**3 / 3 + self.K.read * n**2 <= steps * self.K.cost)
        exact = cheap | (steps > CG_STEPS) | (condition > CG_CONDITION[self.dtype])
        some = (~exact).nonzero()[:, 0]
        if len(some):
            eta[some] = self._iterative(b[some], mask[some], ridge[some])
        for some in _alike(exact.nonzero()[:, 0], n):
            eta[some] = self._exact(b[some], mask[some], ridge[some])
        scores = self.K.times(eta)
        return eta, scores, condition <= EXACT_CONDITION[self.dtype]

    def _exact(self, b: Tensor, mask: Tensor, ridge: Tensor) -> Tensor:
        """By the Cholesky factors of the active examples, refined once. Where a problem has fewer
        than another, its system ends in rows of the identity.
        """
        m = int(mask.sum(1).max())
        a = mask.argsort(dim=1, descending=True, stable=True)[:, :m]  # the active ones, in order
        there = mask.gather(1, a)
        system = torch.stack([self.K.among(own, own) for own in a])
        system *= there[:, :, None] * there[:, None, :]
        diagonal = system.diagonal(dim1=-2, dim2=-1)
        diagonal += torch.where(there > 0, ridge.gather(1, a), 1)
        factor, right = cholesky(system), b.gather(1, a)[:, :, None]
        solved = torch.cholesky_solve(right, factor)
        solved += torch.cholesky_solve(right - system @ solved, factor)
        return torch.zeros_like(b).scatter_(1, a, solved[:, :, 0] * there)

    def _iterative(self, b: Tensor, mask: Tensor, ridge: Tensor) -> Tensor:
        """By conjugate gradients. The preconditioner is (L L' + ridge)^-1 over the active examples,
        with K ~ L L'.
        """
        L, inverse = self.low_rank[self.dtype].L, torch.where(mask > 0, 1 / ridge, 0)
        inner = b.new_empty(len(b), L.shape[1], L.shape[1])
        for system, scale in zip(inner, inverse, strict=True):
            torch.mm(L.T * scale, L, out=system)
        inner.diagonal(dim1=-2, dim2=-1).add_(1)
        factors = cholesky(inner)

        def precondition(r: Tensor) -> Tensor:
            r = inverse * r
            solved = torch.cholesky_solve((r @ L)[:, :, None], factors)[:, :, 0]
            return r - inverse * (solved @ L.T)

        return conjugate_gradients(lambda p: mask * self.K.times(p) + ridge * p, precondition, b)


def _whole(beta: Callable[[slice], Tensor], size: int, like: Tensor) -> Tensor:
    """(P, N) of what is given by rows of X, of like's type."""
    whole = like.new_empty(len(like), size)
    for rows in cached(size, like):
        whole[:, rows] = beta(rows)
    return whole


def cached(size: int, like: Tensor) -> list[slice]:
    """Rows of X whose numbers (P, n) are looked at together."""
    step = max(1, CACHED_VALUES[like.device.type] // max(1, len(like)))
    return [slice(at, min(at + step, size)) for at in range(0, size, step)]


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


def partial_cholesky(diagonal: Tensor, row: Callable[[int], Tensor], rank: int) -> Tensor:
    """L (N, rank or fewer) with K - L L' positive and small, of K's diagonal (N,) and what gives
    its rows: the next column is where most is left on the diagonal.
    """
    left, N = diagonal.clone(), len(diagonal)
    enough = 1e-10 * float(left.mean())
    L = diagonal.new_zeros(N, rank)
    for j in range(min(rank, N)):
        i = int(left.argmax())
        if left[i] <= enough:
            return L[:, : max(1, j)]
        column = row(i) - L[:, :j] @ L[i, :j]
        L[:, j] = column / left[i].sqrt()
        left = (left - L[:, j] ** 2).clamp_min(0)
        left[i] = 0
    return L[:, :N]


def _alike(problems: Tensor, n: Tensor) -> Iterator[Tensor]:
    """Problems whose systems of n examples are factorised together: of about one size, as many as
    fit into FACTOR_VALUES. On a CPU one after the other is as quick.
    """
    problems = problems[n[problems].argsort(descending=True, stable=True)]
    sizes, slack = n[problems].tolist(), SLACK[n.device.type]
    start = 0
    for i, size in enumerate(sizes):
        most = sizes[start]
        if size * slack < most or (i - start + 1) * most**2 > FACTOR_VALUES:
            if i > start:
                yield problems[start:i]
            start = i
    if len(problems):
        yield problems[start:]


class Features:
    """States are (w, b). Memory: 8 (D + 1)^2 bytes of the second moment, as many or half of each
    factor of it, of which there are FACTORS at most; for an exact solve, of each problem.
    """

    state_bytes = 40

    def __init__(self, rows: Rows) -> None:
        self.rows, self.size = rows, rows.D + 1
        self.squares = rows.squares() + 1
        _refuse_huge(rows, self.squares)
        self.exact_cost = rows.N * self.size**2 + self.size**3 / 3
        self.factors: OrderedDict[tuple[int, torch.dtype], Tensor] = OrderedDict()

    @cached_property
    def second(self) -> Tensor:
        return self.rows.second()

    def use(self, dtype: torch.dtype) -> None:
        pass

    def scores(self, V: Tensor) -> Tensor:
        return self.rows.scores(V)

    def pull(self, beta: Callable[[slice], Tensor], like: Tensor) -> Tensor:
        return self.rows.pull(beta, len(like), like.dtype)

    def scores_of(self, G: Tensor) -> None:
        return None

    def dot(self, V: Tensor, W: Tensor, scores_W: Tensor | None) -> Tensor:
        return (V * W).sum(1)

    def weights(self, V: Tensor) -> Tensor:
        return V.double()

    def near(
        self, W: Tensor, full: Callable[[slice], Tensor], h: Callable[[slice], Tensor], T: Tensor
    ) -> Tensor:
        return W

    def newton(
        self, G: Tensor, scores_G: Tensor | None, h: Callable[[slice], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = torch.zeros(2, len(G), dtype=torch.float64, device=G.device)
        for part in cached(self.rows.N, G):
            of_part = h(part)
            sums += torch.stack([of_part.sum(1), (of_part > 0).sum(1)])
        total, n = self.rows.of_all(sums)
        N = self.rows.N_of_all
        d = torch.zeros_like(G)
        exact = n * self.size**2 + self.size**3 / 3 <= EXACT_COST * N * self.size
        if self.rows.half and G.dtype == torch.float32:
            exact &= False  # halves are there for products
        for some in _alike(exact.nonzero()[:, 0], torch.full_like(n, self.size)):
            d[some] = self._exact(-G[some], _of(h, some))
        some = (~exact).nonzero()[:, 0]
        if len(some):
            # problems of about the same curvature share a factorisation
            level = (total[some] / N).clamp_min(1e-30).log2().round().long()
            factors = [
                (self._factor(value, G.dtype), (level == value).nonzero()[:, 0])
                for value in level.unique().tolist()
            ]

            def precondition(r: Tensor) -> Tensor:
                z = torch.empty_like(r)
                for factor, own in factors:
                    z[own] = torch.cholesky_solve(r[own].T, factor).T
                return z

            bend = h if len(some) == len(G) else _of(h, some)
            d[some] = conjugate_gradients(
                lambda p: p + self.rows.bent(bend, p), precondition, -G[some], self.rows.agreed
            )
        return d, self.scores(d), torch.ones_like(exact)

    def _factor(self, level: int, dtype: torch.dtype) -> Tensor:
        """Of I + 2^level X'X."""
        key = level, dtype
        if key not in self.factors:
            system = 2.0**level * self.second
            system.diagonal().add_(1)
            self.factors[key] = cholesky(system).to(dtype)
            while len(self.factors) > FACTORS:
                self.factors.popitem(last=False)
        self.factors.move_to_end(key)
        return self.factors[key]

    def _exact(self, b: Tensor, h: Callable[[slice], Tensor]) -> Tensor:
        systems = torch.zeros(len(b), self.size, self.size, dtype=b.dtype, device=b.device)
        for rows, x in self.rows.plain(b.dtype):
            for system, weight_n in zip(systems, h(rows), strict=True):
                a = weight_n.nonzero()[:, 0]
                active, weight = x[a], weight_n[a]
                weighted = active * weight[:, None]
                add_moment(system, active.T @ weighted, weighted.sum(0), weight.sum())
        systems = self.rows.of_all(systems)
        systems.diagonal(dim1=-2, dim2=-1).add_(1)
        return torch.cholesky_solve(b[:, :, None], cholesky(systems))[:, :, 0]


def _of(h: Callable[[slice], Tensor], some: Tensor) -> Callable[[slice], Tensor]:
    return lambda rows: h(rows)[some]


def refuse_large(largest: float) -> None:
    """The largest of an image's cost times the square of its length."""
    if not largest <= MOST_COST:
        raise ValueError(
            f"C, times an image's weight and the square of its length, is {largest:.2g}, and"
            f" nothing is solved beyond {MOST_COST:g}: scale X, or give less"
        )


def _refuse_huge(rows: Rows, squares: Tensor) -> None:
    if rows.of_all((~(squares < LARGEST_SQUARE)).sum()):
        raise ValueError(
            "X holds values of 1e15 and more, beside which the constant feature 1 is lost: scale it"
        )


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    b: Tensor,
    agreed: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """A x = b for each row of b (P, …), to CG_TOLERANCE of the residual in the preconditioner's
    norm, in CG_STEPS at most. agreed: makes numbers the same for all processes; see `Rows.agreed`.
    """
    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz = z, agreed((r * z).sum(1, keepdim=True))
    enough = CG_TOLERANCE**2 * rz
    for _ in range(CG_STEPS):
        q = product(p)
        step = torch.where(rz > enough, rz / (p * q).sum(1, keepdim=True), 0)
        x += step * p
        r -= step * q
        z = precondition(r)
        before, rz = rz, agreed((r * z).sum(1, keepdim=True))
        if not (rz > enough).any():
            break
        p = z + torch.where(before > 0, rz / before, 0) * p
    return x
