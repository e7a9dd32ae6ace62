"""What P linear SVMs ask over N images: their costs and losses, and what dual variables prove.

A problem is a row. s = 1 - t (w x + b); loss = max(0, s)^2 or max(0, s); alpha the dual variable of
an image, between 0 and c (of the squared hinge: above 0). See `solver`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vggfeat.spaces import cached

SHARPER = 4.0  # factor on the curvature at the hinge's corner
SOLVED = 0.5  # of the gap: a rounded hinge is solved where the gradient has so little of it


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
    whether T has zeros. alpha: (P, N) that a solve has found; the hinge's alpha_0; None: 0. The
    hinge's curvature k is sharp (P, 1) times c, or times an image's blunt (N,) where that is less.
    """

    T: Tensor
    C: Tensor
    weights: Tensor | None
    gaps: bool
    hinge: bool
    sharp: Tensor
    alpha: Tensor | None = None
    blunt: Tensor | None = None

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
        blunt = None if self.blunt is None else self.blunt.to(dtype)
        sharp = self.sharp.to(dtype)
        return replace(self, C=self.C.to(dtype), weights=weights, sharp=sharp, blunt=blunt)

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
        alpha = self.curvature(rows, c) * s
        if self.alpha is not None:
            alpha += self.alpha[:, rows]
        bends = (alpha > 0) & (alpha < c)
        alpha = torch.minimum(alpha.clamp_min_(0), c)
        return At(alpha, *proven(alpha, s, c, True), bends)

    def measured(self, rows: slice, F: Tensor) -> At:
        """The same with the alpha that a solve has found, which is as good as any other between 0
        and c: what these scores would make of it, rounded otherwise, differs where curvatures are
        large.
        """
        assert self.alpha is not None
        c = self.costs(rows)
        alpha = self.alpha[:, rows].to(c.dtype)
        alpha = torch.minimum(alpha, c) if self.hinge else torch.where(c > 0, alpha, 0)
        return At(alpha, *proven(alpha, 1 - self.T[:, rows] * F, c, self.hinge), alpha > 0)

    def curvature(self, rows: slice, c: Tensor) -> Tensor:
        """The second derivatives where the losses bend, of some rows with these costs."""
        if not self.hinge:
            return 2 * c
        return self.sharp * (c if self.blunt is None else torch.minimum(c, self.blunt[rows]))

    def bend(self, rows: slice, bends: Tensor) -> Tensor:
        """(P, n) second derivatives, of some rows where they bend."""
        return bends * self.curvature(rows, self.costs(rows))

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


def proven(alpha: Tensor, s: Tensor, c: Tensor, hinge: bool) -> tuple[Tensor, Tensor]:
    """Of each image: c loss(s), and by how much it is above what alpha proves; no term of that is
    negative.
    """
    above = s.clamp_min(0)
    if hinge:
        loss = c * above
        return loss, loss - alpha * s
    other = 2 * c * above - alpha
    return c * above * above, torch.where(c > 0, other * other / (4 * c), 0) + alpha * (above - s)
