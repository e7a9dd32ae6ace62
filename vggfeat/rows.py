"""X, the descriptors that linear classifiers learn from, in blocks of rows: its products with the
weights of many problems, and with numbers for each of its images.

N images, D descriptor length, P problems. What belongs to a problem is a row: products of a few
rows are quicker than those of a few columns. Weights (w, b) are (P, D + 1), b last: the weight of a
constant feature 1, which is never stored. A product is as precise as the type of what X is
multiplied by asks:

- float64: of X as it is.
- float32: of X as float32; or, where X is held in halves (a GPU multiplies float16 some ten times
  as fast), of X and the weights as sums of two float16 each, with float32 sums: 22 bits.
- float32, rough: there, of the upper halves alone. Enough for a direction that the next step mends,
  at a third of the cost, or half where X has no lower ones.

Before a block of rows is halved its columns are multiplied by powers of two, and their weights are
divided by them: no column is lost to float16's range, which is 2^-24 to 2^16. (Of numbers far below
the largest of their column digits are.)

With several processes each holds its share of the rows, and sums over images are those of all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vggfeat.devices import out_of_memory
from vggfeat.matrix import Selected
from vggfeat.ranks import Ranks, telling_of_others

# of X at a time: 128 MiB as float32; a GPU takes four times as much
BLOCK_VALUES = {"cpu": 1 << 25, "cuda": 1 << 27}
LOW = 2.0**11  # the bits of a float16's significand: what its rounding leaves is multiplied by it
MOST = 120  # exponent of a scale that float32 holds
TOP = 8  # the largest of a column is 2^8 to 2^9 as float16
FEW = 1 << 17  # numbers in X that cost nothing in float64
KINDS: dict[torch.dtype, type[np.floating[Any]]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
}
SENT = (np.float16, np.float32, np.float64)  # to a GPU as they are
T = TypeVar("T")
Beta = Tensor | Callable[[slice], Tensor]
"""(P, N) numbers for each problem and image, or what gives those of some rows of X."""


@dataclass(frozen=True)
class Plain:
    """Rows of X, (n, D) float32 or float64."""

    rows: slice
    x: Tensor

    def times(self, w: Tensor, rough: bool) -> Tensor:
        """w X', (P, n), of (P, D)."""
        return w @ self.x.T

    def pull(self, beta: Tensor, rough: bool) -> Tensor:
        """beta X, (P, D), of (P, n)."""
        return beta @ self.x

    def second(self) -> Tensor:
        return self.x.T @ self.x

    def squares(self) -> Tensor:
        return (self.x * self.x).sum(1)

    def sums(self) -> Tensor:
        return self.x.sum(0)


@dataclass(frozen=True)
class Halves:
    """Rows of X, (n, D), as (high + low / 2^11) / scale of float16; low is None where it is 0.

    scale: (D,) powers of two.
    """

    rows: slice
    high: Tensor
    low: Tensor | None
    scale: Tensor

    @classmethod
    def of(cls, rows: slice, x: Tensor) -> Halves:
        """Of float32 (n, D)."""
        scale = _to_range(x, 0)[0]
        x = x * scale
        high = x.half()
        low = _below(x, high)
        return cls(rows, high, low if low.any() else None, scale)

    @property
    def bytes(self) -> int:
        return 2 * self.high.numel() * (1 if self.low is None else 2)

    def times(self, w: Tensor, rough: bool) -> Tensor:
        low = None if self.low is None else self.low.T
        return _product(w / self.scale, self.high.T, low, rough)

    def pull(self, beta: Tensor, rough: bool) -> Tensor:
        return _product(beta, self.high, self.low, rough) / self.scale

    def second(self) -> Tensor:
        return _mm(self.high.T, self.high) / self.scale[:, None] / self.scale

    def squares(self) -> Tensor:
        x = self.high.float() / self.scale
        return (x * x).sum(1)

    def sums(self) -> Tensor:
        return self.high.sum(0, dtype=torch.float32) / self.scale


Block = Plain | Halves


def _to_range(a: Tensor, dim: int) -> Tensor:
    """Powers of two that bring the largest along dim to 2^TOP, or up to twice that."""
    peak = torch.linalg.vector_norm(a, torch.inf, dim, keepdim=True)
    exponent = (TOP + 1 - torch.frexp(peak).exponent).clamp_max(MOST)
    # by its bits: a GPU's own powers needn't be exact
    power = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(peak > 0, power, 1)


def _below(a: Tensor, high: Tensor) -> Tensor:
    """low in a = high + low / 2^11, float16."""
    return ((a - high) * LOW).half()


def _product(a: Tensor, high: Tensor, low: Tensor | None, rough: bool) -> Tensor:
    """a (high + low / 2^11) of float32 a. Of the four products that of the lower halves is below
    float32's rounding.
    """
    scale = _to_range(a, 1)
    a = a * scale
    above = a.half()
    total = _mm(above, high)
    if not rough:
        rest = _mm(_below(a, above), high)
        if low is not None:
            rest += _mm(above, low)
        total += rest / LOW
    return total / scale


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a b of float16 with float32 sums, as a GPU's matrix units do it; on a CPU by float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_moment(total: Tensor, moment: Tensor, sums: Tensor, weight: Tensor | int) -> None:
    """Add a second moment of features (D, D) to (D + 1, D + 1), where the constant feature's are
    the features' sums and the weight.
    """
    total[:-1, :-1] += moment
    total[-1, :-1] += sums
    total[:-1, -1] += sums
    total[-1, -1] += weight


@contextmanager
def full_sums() -> Iterator[None]:
    """On a GPU products of float16 sum up in float32, and those of float32 aren't of TF32: either
    would cost three of seven digits. What was set before comes back.
    """
    of_gpu = torch.backends.cuda.matmul
    before = of_gpu.allow_fp16_reduced_precision_reduction, of_gpu.allow_tf32
    of_gpu.allow_fp16_reduced_precision_reduction = of_gpu.allow_tf32 = False
    try:
        yield
    finally:
        of_gpu.allow_fp16_reduced_precision_reduction, of_gpu.allow_tf32 = before


class Rows:
    """X (N, D) of any float kind (an array, a memory map, an HDF5 data set, a selection of
    rows), and a constant feature 1.

    half: whether float32 products are of halves. memory: bytes that X may take on the device once
    more; rows beyond are read again for each product. ranks: the processes that share the rows;
    each is given all of X, and N is its own.
    """

    def __init__(
        self,
        X: Any,
        device: torch.device,
        *,
        half: bool = False,
        memory: float = 2e9,
        ranks: Ranks | None = None,
    ) -> None:
        if isinstance(X, Selected) and (array := X.array()) is not None:
            X = array
        self.X, self.device, self.half, self.memory = X, device, half, memory
        self.N_of_all, self.D = X.shape
        self.ranks = ranks or Ranks(device)
        self.first, last = self.ranks.share(0, self.N_of_all)
        self.N = last - self.first
        self.block = max(1, BLOCK_VALUES[device.type] // max(1, self.D))
        self.held: list[Block] = []
        self.beyond: list[slice] = []
        self.bytes = 0
        """That are held."""
        # one for all passes: what is freed on it is there for the next
        self.aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hold()

    # --- blocks -----------------------------------------------------------------------------------

    def slices(self, size: int | None = None) -> list[slice]:
        """This process's rows, a block at a time."""
        step = size or self.block
        return [slice(at, min(at + step, self.N)) for at in range(0, self.N, step)]

    def read(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some of this process's rows from X itself, (n, D) on the device."""
        own, kind = self.X[self.first + rows.start : self.first + rows.stop], KINDS[dtype]
        # a GPU is sent what takes the fewest bytes
        if self.device.type == "cpu" or own.dtype not in SENT or own.dtype.itemsize > kind().nbytes:
            with np.errstate(over="ignore"):  # the solver refuses what is infinite then
                own = np.asarray(own, dtype=kind)
        if not own.flags.writeable or min(own.strides, default=1) < 0:
            own = own.copy()  # PyTorch takes no other
        block = torch.from_numpy(own)
        if self.device.type == "cuda":
            block = block.pin_memory().to(self.device, non_blocking=True)
        return block.to(dtype)

    def at_hand(self, most: float) -> bool:
        """Whether all of X as float32 takes no more than so many bytes beside X itself."""
        X = self.X
        return most >= 4.0 * self.N * self.D or (
            isinstance(X, np.ndarray) and X.dtype == np.float32 and X.flags.writeable
        )

    def _made(self, rows: slice) -> Block:
        x = self.read(rows, torch.float32)
        return Halves.of(rows, x) if self.half else Plain(rows, x)

    def _hold(self) -> None:
        """Keep as many blocks as the memory takes; on a CPU those of an array are where it is.
        Where the device has less than that, half of what it took, and smaller blocks.
        """
        while True:
            self.held, self.beyond, self.bytes = [], [], 0
            try:
                for rows in self.slices():
                    self._hold_rows(rows)
                return
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.block == 1:
                    raise
            if self.held:
                self.memory = self.bytes / 2
            self.block, self.held = (self.block + 1) // 2, []
            warnings.warn(
                f"memory is short: X is read in blocks of {self.block:,} rows, and"
                f" {self.memory / 1e9:.1f} GB of it are held at most",
                stacklevel=2,
            )

    def _hold_rows(self, rows: slice) -> None:
        if not self.beyond:
            block = self._made(rows)
            size = self._copied(block)
            if self.bytes + size <= self.memory:
                self.held.append(block)
                self.bytes += size
                return
        self.beyond.append(rows)

    def _copied(self, block: Block) -> int:
        """Bytes of a block that aren't X's own."""
        if isinstance(block, Halves):
            return block.bytes
        on_cpu = self.device.type == "cpu" and isinstance(self.X, np.ndarray)
        if on_cpu and np.may_share_memory(block.x.numpy(), self.X):
            return 0
        return block.x.numel() * block.x.element_size()

    def plain(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """All rows as they are, (n, D) at a time."""
        done = 0
        if dtype == torch.float32 and not self.half:
            done = len(self.held)
            for block in self.held:
                assert isinstance(block, Plain)
                yield block.rows, block.x
        yield from self._ahead(self.slices()[done:], lambda rows: (rows, self.read(rows, dtype)))

    def blocks(self, dtype: torch.dtype) -> Iterator[Block]:
        """All rows, in blocks that multiply float32, or float64."""
        if dtype == torch.float64:
            yield from (Plain(rows, x) for rows, x in self.plain(dtype))
            return
        yield from self.held
        yield from self._ahead(self.beyond, self._made)

    def _ahead(self, slices: list[slice], made: Callable[[slice], T]) -> Iterator[T]:
        """What is made of rows; of the next ones while those before are worked on."""
        if len(slices) < 2 or (self.aside is None and isinstance(self.X, np.ndarray)):
            yield from map(made, slices)
            return
        aside = self.aside

        def begun(rows: slice) -> tuple[T, Any]:
            if aside is None:
                return made(rows), None
            with torch.cuda.stream(aside):
                block = made(rows)
                return block, aside.record_event()

        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(begun, slices[0])]
            for following in [*slices[1:], None]:
                block, there = coming.pop().result()
                if following is not None:
                    coming.append(reader.submit(begun, following))
                if there is not None:
                    torch.cuda.current_stream(self.device).wait_event(there)
                yield block
                if there is not None:
                    # its memory isn't given to another copy before this one is used up
                    torch.cuda.current_stream(self.device).synchronize()

    # --- products ---------------------------------------------------------------------------------

    def scores(self, W: Tensor, rough: bool = False) -> Tensor:
        """w x + b, (P, N)."""
        F = W.new_empty(len(W), self.N)
        for block in self.blocks(W.dtype):
            F[:, block.rows] = block.times(W[:, :-1], rough) + W[:, -1:]
        return F

    def pull(self, beta: Beta, P: int, dtype: torch.dtype, rough: bool = False) -> Tensor:
        """beta X with the constant feature, (P, D + 1)."""
        total = torch.zeros(P, self.D + 1, dtype=dtype, device=self.device)
        for block in self.blocks(dtype):
            of_block = beta(block.rows) if callable(beta) else beta[:, block.rows]
            total[:, :-1] += block.pull(of_block, rough)
            total[:, -1] += of_block.sum(1)
        return self.of_all(total)

    def bent(self, h: Callable[[slice], Tensor], W: Tensor) -> Tensor:
        """X' diag(h) X w of each problem, (P, D + 1): rough."""
        total = torch.zeros_like(W)
        for block in self.blocks(W.dtype):
            q = h(block.rows) * (block.times(W[:, :-1], rough=True) + W[:, -1:])
            total[:, :-1] += block.pull(q, rough=True)
            total[:, -1] += q.sum(1)
        return self.of_all(total)

    def squares(self) -> Tensor:
        """(N,) of the images' lengths, float32."""
        found = torch.empty(self.N, device=self.device)
        for block in self.blocks(torch.float32):
            found[block.rows] = block.squares()
        return found

    def second(self) -> Tensor:
        """X'X with the constant feature, (D + 1, D + 1) float64 of products in float32."""
        total = torch.zeros(self.D + 1, self.D + 1, dtype=torch.float64, device=self.device)
        for block in self.blocks(torch.float32):
            add_moment(total, block.second(), block.sums(), block.rows.stop - block.rows.start)
        return self.of_all(total)

    def products(self, dtype: torch.dtype, size: int) -> Tensor:
        """X X' + 1, (N, N)."""
        K = torch.empty(self.N, self.N, dtype=dtype, device=self.device)
        for own in self.slices(size):
            x = self.read(own, dtype)
            for other in self.slices(size):
                if other.start > own.start:
                    break
                product = x @ self.read(other, dtype).T + 1
                K[own, other] = product
                K[other, own] = product.T
        return K

    # --- processes --------------------------------------------------------------------------------

    def of_all(self, sums: Tensor) -> Tensor:
        """Sums over this process's images -> over those of all; in place."""
        if self.ranks.world > 1:
            with telling_of_others():
                dist.all_reduce(sums)
        return sums

    def largest(self, number: Tensor) -> Tensor:
        """The largest of all processes' numbers; in place."""
        if self.ranks.world > 1:
            with telling_of_others():
                dist.all_reduce(number, dist.ReduceOp.MAX)
        return number

    def agreed(self, values: Tensor) -> Tensor:
        """The first process's values, so that all go the same way; in place."""
        if self.ranks.world > 1:
            with telling_of_others():
                dist.broadcast(values, 0)
        return values

    def fewest(self, number: int) -> int:
        """The least of all processes' numbers."""
        return int(min(self.ranks.gather(number))) if self.ranks.world > 1 else number

    def of_all_rows(self, F: Tensor) -> Tensor:
        """(P, N) of this process's rows -> (P, N_of_all) of all, on the CPU."""
        if self.ranks.world == 1:
            return F.cpu()
        every = torch.zeros(len(F), self.N_of_all, dtype=F.dtype)
        every[:, self.first : self.first + self.N] = F.cpu()
        return self.of_all(every)
