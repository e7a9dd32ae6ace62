"""What `vggfeat svm` will take, before it does it: its fits, by the protocol's splits, and its
memory, by arithmetic. N images, D descriptor length, P problems (a class is one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vggfeat.descriptors import READING, Descriptors
from vggfeat.problem import Problem
from vggfeat.protocols import Fits, fits_of
from vggfeat.rows import BLOCK_VALUES
from vggfeat.solver import GRAM_BYTES, HELD_BYTES, MEMORY, by_gram, problem_bytes
from vggfeat.spaces import FACTOR_VALUES, FACTORS
from vggfeat.store import READ_BYTES


@dataclass(frozen=True)
class SvmMemory:
    """Bytes that a fit takes beside X. gram: whether `products` are the Gram matrix of the images,
    else the features' second moment. states: of the problems that are solved at a time, and the
    scores of all. factors: of their exact systems. blocks: of rows, as float64.
    """

    gram: bool
    products: int
    states: int
    factors: int
    blocks: int

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.products + self.states + self.factors + self.blocks


def svm_memory(N: int, D: int, P: int) -> SvmMemory:
    """What `solver.Solver` takes on a CPU, as it, `spaces` and `rows` say of themselves. On a GPU
    it takes what is free there.
    """
    gram = by_gram(N, D)
    size = N if gram else D + 1
    each = problem_bytes(N, gram, by_dual=gram or 4 * N * D <= HELD_BYTES)
    at_once = min(P, max(1, int(MEMORY // each)))
    rows = min(N, max(1, BLOCK_VALUES["cpu"] // D))
    return SvmMemory(
        gram=gram,
        # of the second moment a few factors, too
        products=int(GRAM_BYTES) * N**2 if gram else (4 * 8 + 4 * FACTORS) * size**2,
        # scores, and states, of each part and of all together
        states=int(each) * at_once + 2 * 8 * P * (N + size),
        factors=2 * 8 * min(at_once * size**2, max(size**2, FACTOR_VALUES)),
        # as they are read, as float64, twice, and what is held; and for each of their numbers a
        # problem
        blocks=(8 + 8 + 4 + 4) * rows * D + min(4 * N * D, HELD_BYTES) + 6 * 8 * rows * at_once,
    )


@dataclass(frozen=True)
class SvmPlan:
    """What `vggfeat svm` will do, before it does it.

    images: N, of them `unreadable`. descriptor: D. fits: how often it trains, and each time an SVM
    a problem of it. held: whether X stays in memory, of which it may take a share; else it is read
    from the files at each pass.
    X, reading: bytes of it as float32, and of what reading takes. solver: of the largest fit.
    bytes: of memory in all, beside the program itself and the images' names.
    """

    images: int
    unreadable: int
    classes: int
    descriptor: int
    fits: Fits
    held: bool
    share: float
    X: int
    reading: int
    solver: SvmMemory
    bytes: int


def svm_plan(
    problem: Problem, *, C: str | float | Sequence[float] = "auto", seed: int | None = None
) -> SvmPlan:
    """Of a problem whose X is `Descriptors`, in files; none is read. C, seed: as `protocols.run`,
    and it raises as that, but for what descriptors hold.
    """
    descriptors = problem.X
    assert isinstance(descriptors, Descriptors)
    fits = fits_of(problem, C=C, seed=seed)
    N, D = descriptors.shape
    solver = svm_memory(fits.images, D, fits.problems)
    reading = READING * min(READ_BYTES, descriptors.stored)
    held = descriptors.fits
    return SvmPlan(
        images=N,
        unreadable=int((~problem.readable).sum()),
        classes=len(problem.classes),
        descriptor=D,
        fits=fits,
        held=held,
        share=descriptors.share,
        X=descriptors.nbytes,
        reading=reading,
        solver=solver,
        # what is held is read before the first fit
        bytes=descriptors.nbytes + max(reading, solver.bytes) if held else reading + solver.bytes,
    )
