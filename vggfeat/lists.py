"""Which rows may be the nearest to a query, by faiss: lists of rows with similar descriptors, each
row in them by a short code (IVF-PQ: Jegou et al., Product Quantization for Nearest Neighbor Search,
2011).

n rows, D their length, d of what is left of it, L lists, m bytes of a code, M queries. A row is
first projected onto the d directions in which rows are longest, in a random rotation, so that all
parts of a code say alike much. faiss is asked here alone; what it has made is kept as arrays, and
it is built of them again: its own files can make it crash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from vggfeat.errors import VggfeatError
from vggfeat.hdf5 import Damaged, File, Spec

INSTALL = "pip install 'vggfeat[search]'"
AXES = 256  # d, where rows are as long
PART = 4  # of these values are a byte of a code
WORDS = 256  # that a byte has
SAMPLE_BYTES = 1 << 28  # of rows that directions are learned of
PER_LIST = 40  # rows that lists are learned of
ROUNDS = 10  # of k-means
SEED = 0
Blocks = Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Rising rows -> (rows (b,), their descriptors (b, D) float32), block by block."""


def load_faiss() -> Any:
    """Raises VggfeatError where it isn't there."""
    try:
        import faiss
    except ImportError as error:
        raise VggfeatError(f"lists need faiss ({INSTALL}); without it give `exact`") from error
    return faiss


def specs(n: int, D: int) -> dict[str, Spec]:
    """Shape and type of the arrays of `Lists` of n rows of length D."""
    m = max(1, min(AXES, D) // PART)
    d, L = m * PART, 1 << max(0, round(math.log2(2 * math.sqrt(max(n, 1)))))
    float32, byte, int64 = np.dtype("<f4"), np.dtype("u1"), np.dtype("<i8")
    return {
        "axes": ((D, d), float32),
        "centroids": ((L, d), float32),
        "codebooks": ((m, WORDS, PART), float32),
        "codes": ((n, m), byte),
        "rows": ((n,), int64),
        "ends": ((L,), int64),
    }


@dataclass(frozen=True)
class Lists:
    """axes (D, d): a descriptor x is x @ axes here. centroids (L, d): of the lists. codebooks (m,
    256, d / m): what each byte of a code stands for, of a row less its centroid. codes (n, m)
    uint8, rows (n,): of the first list, then of the second …; ends (L,): where each list ends.
    """

    axes: np.ndarray
    centroids: np.ndarray
    codebooks: np.ndarray
    codes: np.ndarray
    rows: np.ndarray
    ends: np.ndarray

    @classmethod
    def learned(
        cls, rows_n: np.ndarray, D: int, blocks: Blocks, seen: Callable[[int], None]
    ) -> Lists:
        """Lists of these rows (rising), from a sample of them; memory holds the sample, a block and
        the codes. seen: told how many rows were coded. Raises VggfeatError without faiss.
        """
        faiss, rng = load_faiss(), np.random.default_rng(SEED)
        (_, d), (L, _) = (specs(len(rows_n), D)[name][0] for name in ("axes", "centroids"))

        def some(count: int) -> np.ndarray:
            return np.sort(rng.choice(rows_n, min(len(rows_n), count), replace=False))

        least = max(4 * d, SAMPLE_BYTES // (4 * D))
        axes_Dd = _directions(np.concatenate([x for _, x in blocks(some(least))]), d, rng)
        sample = some(max(PER_LIST * L, 2 * PER_LIST * WORDS))
        sample_Sd = np.concatenate([x @ axes_Dd for _, x in blocks(sample)])
        index = _empty(faiss, L, d)
        index.cp.niter = index.pq.cp.niter = ROUNDS
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
        index.cp.seed = index.pq.cp.seed = 1 + SEED
        index.train(sample_Sd)
        for rows_b, x_bD in blocks(rows_n):
            index.add_with_ids(x_bD @ axes_Dd, rows_b)
            seen(len(rows_b))
        lists, m = index.invlists, d // PART
        sizes = [lists.list_size(k) for k in range(L)]
        own = [(lists.get_ids(k), lists.get_codes(k)) for k in range(L)]
        return cls(
            axes=axes_Dd,
            centroids=index.quantizer.reconstruct_n(0, L),
            codebooks=faiss.vector_to_array(index.pq.centroids).reshape(m, WORDS, PART),
            codes=np.concatenate(
                [
                    faiss.rev_swig_ptr(codes, size * m).reshape(size, m)
                    for (_, codes), size in zip(own, sizes, strict=True)
                    if size
                ]
            ),
            rows=np.concatenate(
                [
                    faiss.rev_swig_ptr(ids, size).copy()
                    for (ids, _), size in zip(own, sizes, strict=True)
                    if size
                ]
            ),
            ends=np.cumsum(sizes, dtype=np.int64),
        )

    @classmethod
    def read(cls, file: File, rows_n: np.ndarray, D: int) -> Lists:
        """Those of a file, of these rows (rising). Raises Damaged where they can't be."""
        n = len(rows_n)
        axes_Dd = file.array("lists/axes", "f", (D, None))
        d = axes_Dd.shape[1]
        codebooks = file.array("lists/codebooks", "f", (None, WORDS, PART))
        m = len(codebooks)
        made = cls(
            axes=axes_Dd,
            centroids=file.array("lists/centroids", "f", (None, d)),
            codebooks=codebooks,
            codes=file.array("lists/codes", "u", (n, m)),
            rows=file.array("lists/rows", "i", (n,)),
            ends=file.array("lists/ends", "i", (None,)),
        )
        if not 0 < m * PART == d or not 0 < len(made.centroids) == len(made.ends) < 2**31:
            raise Damaged("the sizes of its lists don't fit together")
        if made.ends[0] < 0 or (np.diff(made.ends) < 0).any() or made.ends[-1] != n:
            raise Damaged("the ends of its lists are wrong")
        if not np.array_equal(np.sort(made.rows), rows_n):
            raise Damaged("its lists have other rows than it has descriptors of")
        for values in (made.axes, made.centroids, made.codebooks):
            if values.dtype != np.float32 or not np.isfinite(values).all():
                raise Damaged("its lists have numbers that are not finite, or not float32")
        return made

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of `specs`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def candidates(self, queries_MD: np.ndarray, probes: int, most: int) -> np.ndarray:
        """(M, most) int64: the rows whose codes are the nearest, best first, -1 behind the last, in
        the `probes` lists that are nearest to each query.
        """
        faiss = load_faiss()
        how = faiss.SearchParametersIVF(nprobe=min(probes, len(self.ends)))
        _, rows_MC = self._index.search(queries_MD @ self.axes, most, params=how)
        found: np.ndarray = rows_MC
        return found

    @cached_property
    def _index(self) -> Any:
        faiss = load_faiss()
        index = _empty(faiss, *self.centroids.shape)
        index.quantizer.add(np.ascontiguousarray(self.centroids))
        faiss.copy_array_to_vector(self.codebooks.reshape(-1), index.pq.centroids)
        index.is_trained = True
        index.precompute_table()
        for k, (low, high) in enumerate(zip([0, *self.ends[:-1]], self.ends, strict=True)):
            if high > low:
                ids, codes = (np.ascontiguousarray(x[low:high]) for x in (self.rows, self.codes))
                index.invlists.add_entries(
                    k, int(high - low), faiss.swig_ptr(ids), faiss.swig_ptr(codes)
                )
        index.ntotal = len(self.rows)
        return index


def _empty(faiss: Any, L: int, d: int) -> Any:
    return faiss.IndexIVFPQ(faiss.IndexFlatL2(d), d, L, d // PART, WORDS.bit_length() - 1)


def _directions(x_SD: np.ndarray, d: int, rng: np.random.Generator) -> np.ndarray:
    """(D, d) float32 with orthonormal columns: of the span in which rows are longest, by subspace
    iteration (Halko et al., 2011), in a random rotation.
    """
    V = rng.standard_normal((x_SD.shape[1], min(d + 32, x_SD.shape[1])), np.float32)
    for _ in range(3):
        V, _ = np.linalg.qr(x_SD.T @ (x_SD @ V))
    y = x_SD @ V
    _, turned = np.linalg.eigh(y.T @ y)  # the largest last
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d), np.float32))
    axes_Dd: np.ndarray = V @ turned[:, -d:] @ rotation
    return np.ascontiguousarray(axes_Dd, np.float32)
