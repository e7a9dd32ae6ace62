"""What is searched for the nearest images: an index file, or a feature file as if it were one; and
how an index is made.

N rows, one an image, M queries, D length of a row: pooled over the scales and L2-normalised, so
that a product of two is their cosine. An index file has the rows as float16, is read block by block
or row by row (memory doesn't grow with it) and holds each row against its checksum. Of many rows it
also has `lists`, which name candidates: their cosines are then computed from the rows themselves.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch

from vggfeat.aggregate import POOLINGS, aggregate
from vggfeat.checked import OneOf, Range, path_of, shown
from vggfeat.describe import described, list_of_images, network_of
from vggfeat.descriptors import Descriptors
from vggfeat.errors import VggfeatError
from vggfeat.files import whole
from vggfeat.hdf5 import (
    Damaged,
    File,
    Layout,
    Place,
    Spec,
    checksums,
    column,
    damaged,
    document,
    open_file,
    read_into,
)
from vggfeat.lists import PART, Lists, load_faiss, specs
from vggfeat.machine import CORES
from vggfeat.matrix import Matrix
from vggfeat.store import DONE, UNREADABLE, Description, Features, differences, read_labels, runs
from vggfeat.versions import versions

FORMAT = "vggfeat-index"
FORMAT_VERSION = 2
TOP = 10  # neighbours, of which recall is told
RECALL = 0.95
LISTED_FROM = 50_000  # rows: fewer are compared in a moment
BLOCK_BYTES = 1 << 24  # of stored rows that are compared at a time: memory that is used again
MADE_BYTES = 1 << 26  # of rows that are made of a feature file: whole row groups of a set
BATCH = 4096  # queries that are answered together
TRIED = 1000  # queries by which recall is measured
LEAST_QUERIES = 20  # that a recall is measured with
PROBES = 8  # the fewest lists that are looked through
CANDIDATES = (100, 200, 400, 800, 1600)
FACTS_BYTES = 1 << 12  # of a document, for what is known last
GRAIN = 1 << 15  # values that PyTorch converts in one thread


class Tuning(TypedDict):
    """How an index is searched: `probes` lists, `candidates` of them compared, for TOP neighbours;
    recall of these against all rows, over so many `queries` that had no part in the choice.
    """

    probes: Annotated[int, Range(1, 2**31)]
    candidates: Annotated[int, Range(TOP, 2**31)]
    recall: Annotated[float, Range(0, 1)]
    asked: Annotated[float, Range(0, 1)]
    queries: Annotated[int, Range(1, 2**31)]


class Facts(TypedDict):
    """What is used of an index's facts."""

    dataset: str
    root: str
    description: Description
    pool: Annotated[str, OneOf(POOLINGS)]
    rows: str
    tuning: Tuning | None


class Stored:
    """(N, D): the rows of an index file as float32, read when they are asked for; `X[slice]`, or
    rising indices. The file is held open: what takes its place is another's.

    Raises Damaged for a row that has another checksum, or isn't finite.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, path: Path, file: int, place: Place, sums_N: np.ndarray) -> None:
        self.shape: tuple[int, ...] = place.shape
        self._path, self._place, self._sums_N = path, place, sums_N
        self._file = os.dup(file)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        if isinstance(rows, slice):
            wanted = np.arange(*rows.indices(self.shape[0]))
        else:
            wanted = np.asarray(rows, np.int64)
        raw_nD = np.empty((len(wanted), self.shape[1]), np.float16)
        memory, row = raw_nD.view(np.uint8).reshape(-1).data, self._place.row_bytes
        with damaged(self._path):
            for start, low, high in runs(wanted, self.shape[0]):
                part = memory[start * row : (start + high - low) * row]
                read_into(self._file, part, self._place.at + low * row)
            other = checksums(raw_nD) != self._sums_N[wanted]
            if other.any():
                spoilt = wanted[other.argmax()]
                raise Damaged(f"the descriptor of row {spoilt} is other than written: index again")
        made_nD = np.empty(raw_nD.shape, np.float32)
        source, target = torch.from_numpy(raw_nD), torch.from_numpy(made_nD)
        step = max(1, GRAIN // self.shape[1])  # searches have threads of their own
        for low in range(0, len(wanted), step):  # ten times as fast as NumPy's
            target[low : low + step].copy_(source[low : low + step])
        return made_nD


@dataclass(frozen=True)
class Index:
    """Rows to search. names (N), labels, classes, boxes, files as `Features` has them. readable
    (N,) bool: rows that have descriptors; errors: row -> why it has none. description, pool: how
    the images were described, with the scales that are in the rows: a new image is described so.
    rows_digest: of the features. rows: (N, D) float32 when asked for, zeros or NaN where
    unreadable. lists, tuning: of an index of many rows; None: all rows are compared.
    """

    path: Path | str
    names: Sequence[str]
    labels: np.ndarray | None
    classes: list[str]
    readable: np.ndarray
    errors: dict[int, str]
    description: Description
    pool: str
    dataset: str
    root: str
    rows_digest: str
    rows: Matrix
    boxes: np.ndarray | None = None
    files: list[str] | None = None
    lists: Lists | None = None
    tuning: Tuning | None = None

    def search(
        self,
        queries_MD: np.ndarray,
        top: int = TOP,
        *,
        without: np.ndarray | None = None,
        exact: bool = False,
        probes: int | None = None,
        candidates: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `top` rows with the highest cosine for each query: (M, top) int64 and float32, best
        first, of equals the first row first; -1 and NaN where there are no more rows.

        queries_MD: described, pooled and L2-normalised as the rows were. without: (M,) rows that
        are left out, one a query; -1: none. exact: compare all rows, which is what is done where
        there are no lists. probes, candidates: instead of the index's own (`tuning`); more than TOP
        neighbours have as many times more candidates. Where the lists that are looked through hold
        fewer than `top` rows, all are compared.
        Raises VggfeatError for queries of another length, settings without lists, no faiss;
        Damaged.
        """
        queries_MD = np.asarray(queries_MD, np.float32)
        if queries_MD.ndim != 2 or queries_MD.shape[1] != self.rows.shape[1]:
            raise VggfeatError(
                f"queries have shape {queries_MD.shape}: {self.path} takes (M,"
                f" {self.rows.shape[1]}), a row each"
            )
        for name, value in (("top", top), ("probes", probes), ("candidates", candidates)):
            if value is not None and (type(value) is not int or value < 1):
                raise VggfeatError(f"`{name}` must be a whole number from 1 up, not {shown(value)}")
        if (probes or candidates) and (exact or self.tuning is None):
            why = "`exact` compares all rows" if exact else f"{self.path} has no lists"
            raise VggfeatError(f"{why}: leave out `probes` and `candidates`")
        M = len(queries_MD)
        without_M = np.full(M, -1) if without is None else np.asarray(without)
        if without_M.shape != (M,):
            raise VggfeatError(f"`without` must have one row a query, not be {without_M.shape}")
        rows_MK = np.full((M, top), -1)
        cosines_MK = np.full((M, top), np.nan, np.float32)
        for low in range(0, M, BATCH):
            part = slice(low, low + BATCH)
            if exact or self.tuning is None:
                found = self._exact(queries_MD[part], top, without_M[part])
            else:
                count = max(candidates or self.tuning["candidates"] * -(-top // TOP), top)
                its = probes or self.tuning["probes"]
                found = self._by_lists(queries_MD[part], top, without_M[part], its, count)
            rows_MK[part], cosines_MK[part] = found
        return rows_MK, cosines_MK

    def _exact(
        self, queries_MD: np.ndarray, top: int, without_M: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A block of rows at a time, kept where it is nearer than the last of those before."""
        M = len(queries_MD)
        rows_MK, cosines_MK = np.full((M, top), -1), np.full((M, top), -np.inf, np.float32)
        for block in row_blocks(self.rows):
            cosines_MB = queries_MD @ self.rows[block].T
            cosines_MB[:, ~self.readable[block]] = -np.inf
            own = np.flatnonzero((without_M >= block.start) & (without_M < block.stop))
            cosines_MB[own, without_M[own] - block.start] = -np.inf
            nearer_MB = cosines_MB > cosines_MK[:, -1:]
            for m in np.flatnonzero(nearer_MB.any(1)).tolist():
                new = np.flatnonzero(nearer_MB[m])
                cosines = np.concatenate([cosines_MK[m], cosines_MB[m, new]])
                rows = np.concatenate([rows_MK[m], block.start + new])
                best = np.argsort(-cosines, kind="stable")[:top]  # rows rise: the first of equals
                rows_MK[m], cosines_MK[m] = rows[best], cosines[best]
        cosines_MK[rows_MK < 0] = np.nan
        return rows_MK, cosines_MK

    def _by_lists(
        self, queries_MD: np.ndarray, top: int, without_M: np.ndarray, probes: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best of the candidates, by the rows themselves."""
        assert self.lists is not None
        rows_MC = self.lists.candidates(queries_MD, probes, count + bool((without_M >= 0).any()))
        M = len(queries_MD)
        rows_MK, cosines_MK = np.full((M, top), -1), np.full((M, top), np.nan, np.float32)

        def compare(m: int) -> None:
            rows = np.sort(rows_MC[m][(rows_MC[m] >= 0) & (rows_MC[m] != without_M[m])])
            # one thread a query: those of BLAS would wait for one another
            cosines = np.einsum("nd,d->n", self.rows[rows], queries_MD[m])
            best = np.argsort(-cosines, kind="stable")[:top]
            rows_MK[m, : len(best)], cosines_MK[m, : len(best)] = rows[best], cosines[best]

        with ThreadPoolExecutor(CORES) as pool:
            for _ in pool.map(compare, range(M)):
                pass
        short = np.flatnonzero(rows_MK[:, -1] < 0)
        if len(short):
            rows_MK[short], cosines_MK[short] = self._exact(
                queries_MD[short], top, without_M[short]
            )
        return rows_MK, cosines_MK

    def embed(
        self,
        images: Iterable[Any],
        *,
        weights: str | os.PathLike[str] | None = None,
        device: str = "auto",
        workers: int = CORES,
        progress: bool = False,
    ) -> np.ndarray:
        """(M, D) float32: images described as the rows were, to be searched for. weights: where
        those of the rows lie, if they moved; they are loaded at each call. The rest is as of
        `vggfeat.embed`. Raises VggfeatError, also where rows are of boxes in images.
        """
        self.refuse_images("`images`")
        listed = list_of_images(images)
        network = network_of(self.description, weights, device)
        raw_MQD, _ = described(network, listed, self.description, None, workers, progress, False)
        return aggregate(raw_MQD, self.pool)

    def refuse_images(self, what: str) -> None:
        """Raise VggfeatError where it takes more than an image to describe it as the rows."""
        if self.description.of_boxes:
            raise VggfeatError(
                f"{self.path} is of boxes in images, and nothing tells where that of {what} is:"
                " give a name in the file"
            )

    def verify(self) -> None:
        """Hold every row against its checksum, in little memory. Raises Damaged."""
        for block in row_blocks(self.rows):
            self.rows[block]

    def like(self, features: Features) -> Matrix:
        """(N', D): the rows of features as queries. Raises VggfeatError where they were described
        otherwise.
        """
        there = features.description
        if set(self.description.scales) <= set(there.scales):
            there = replace(there, scales=self.description.scales)
        there = replace(there, precision=self.description.precision)  # it only rounds
        if told := ", ".join(differences(there, self.description)):
            raise VggfeatError(
                f"{features.path} was described otherwise than the rows of {self.path}: {told}"
            )
        return Descriptors([features], [self.description], self.pool)


def row_blocks(rows: Matrix) -> Iterator[slice]:
    """All rows, a power of two at a time, as `Descriptors` and shards read them."""
    count, D = rows.shape
    size = BLOCK_BYTES if isinstance(rows, Stored) else MADE_BYTES
    step = 1 << (max(1, size // (4 * D)).bit_length() - 1)
    for low in range(0, count, step):
        yield slice(low, min(low + step, count))


def index_of(
    features: Features, *, pool: str = "average", scales: tuple[int, ...] | None = None
) -> Index:
    """A feature file as an index without lists: its rows are read, pooled over these of its scales
    (all) and normalised whenever they are compared. Raises VggfeatError for a scale that it lacks.
    """
    description = features.description
    if scales is not None:
        description = replace(description, scales=scales)
    return Index(
        path=features.path,
        names=features.names,
        labels=features.labels,
        classes=features.classes,
        readable=features.readable,
        errors=features.errors,
        description=description,
        pool=pool,
        dataset=features.attributes["dataset"],
        root=features.attributes["root"],
        rows_digest=features.rows_digest,
        rows=Descriptors([features], [description], pool),
        boxes=features.boxes,
        files=features.files,
    )


def open_index(path: str | os.PathLike[str]) -> Index:
    """Open an index of `vggfeat index`. Raises VggfeatError when it isn't one, or is damaged or
    half-written.
    """
    path = path_of(path, "an index")
    with open_file(path, FORMAT, FORMAT_VERSION) as file, damaged(path):
        facts: Facts = file.document("facts", Facts)
        description = facts["description"]
        place = file.place("descriptors", "f", (None, None))
        N, D = place.shape
        if place.dtype.itemsize != 2 or not D or file.checked.get("descriptors") != "crc32":
            raise Damaged(f"descriptors are {place.dtype} of length {D}, or have no checksums")
        names, classes = file.texts("names"), file.texts("classes")
        status_N = file.array("status", "u", (N,))
        bad = file.array("unreadable/rows", "i", (None,))
        reasons = file.texts("unreadable/reasons")
        boxes = file.array("boxes", "i", (N, 4)) if "boxes" in file.arrays else None
        files = file.texts("files") if "files/bytes" in file.arrays else None
        if len(names) != N or (files is not None and len(files) != N):
            raise Damaged(f"it has {len(names)} names of {N} rows")
        if not np.isin(status_N, (DONE, UNREADABLE)).all():
            raise Damaged("it has a row of a status that there isn't")
        if description.further or (boxes is None and description.of_boxes):
            raise Damaged("its description has what an index hasn't")
        readable_N = status_N == DONE
        if not np.array_equal(bad, np.flatnonzero(~readable_N)) or len(bad) != len(reasons):
            raise Damaged("its reasons are not those of the unreadable rows")
        tuning, lists = facts["tuning"], None
        if tuning is not None:
            lists = Lists.read(file, np.flatnonzero(readable_N), D)
        return Index(
            path=path,
            names=names,
            labels=read_labels(file, N, len(classes)),
            classes=classes,
            readable=readable_N,
            errors=dict(zip(bad.tolist(), reasons, strict=True)),
            description=description,
            pool=facts["pool"],
            dataset=facts["dataset"],
            root=facts["root"],
            rows_digest=facts["rows"],
            rows=Stored(path, file.descriptor, place, file.array("crc32", "u", (N,))),
            boxes=boxes,
            files=files,
            lists=lists,
            tuning=tuning,
        )


# --- making one -----------------------------------------------------------------------------------


def build_index(
    out: str | os.PathLike[str],
    source: Index,
    *,
    recall: float = RECALL,
    exact: bool = False,
    queries_MD: np.ndarray | None = None,
    command: str = "",
    progress: Callable[[float, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Index:
    """Write an index of a feature file (`index_of`); it appears whole or not at all. Rows are read
    once, block by block.

    From LISTED_FROM readable rows on it has lists, unless exact, and is tuned: the `probes` and
    `candidates` with which it reads least and finds the share `recall` of the TOP nearest rows that
    exact search finds, on the half of TRIED queries; the recall that is told is that on the others.
    queries_MD: such as will come, aggregated as the rows; default: rows, each without itself. Where
    the recall isn't reached all rows are compared, and that is said.
    progress: called with (rows read, in all). Raises VggfeatError: a recall beyond 0..1, no faiss,
    fewer queries than LEAST_QUERIES; CantWrite.
    """
    if not isinstance(recall, int | float) or not 0 < recall <= 1:
        raise VggfeatError(f"`recall` must lie in 0..1, not {shown(recall)}")
    N, D = source.rows.shape
    rows_n = np.flatnonzero(source.readable)
    listed = not exact and len(rows_n) >= LISTED_FROM and D >= PART
    if not listed and not exact and (queries_MD is not None or recall != RECALL):
        say(
            f"no lists are made below {LISTED_FROM:,} readable images: each search compares all,"
            " whatever the recall"
        )
    if listed:
        load_faiss()
    if listed and queries_MD is not None and len(queries_MD) < LEAST_QUERIES:
        raise VggfeatError(
            f"`queries` has {len(queries_MD)} readable rows: give {LEAST_QUERIES} or more, half of"
            " which choose how is searched, and half tell the recall"
        )
    done, total = 0, N + 2 * len(rows_n) * listed

    def seen(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done, total)

    facts = {
        "dataset": source.dataset,
        "root": source.root,
        "description": source.description.to_dict(),
        "pool": source.pool,
        "rows": source.rows_digest,
        "command": command,
        "versions": versions(),
    }
    small = _small_arrays(source)
    facts_spec = ((len(document(facts)) + FACTS_BYTES,), np.dtype("u1"))
    layout_of: dict[str, Spec] = {
        "descriptors": ((N, D), np.dtype("<f2")),
        **{name: (values.shape, values.dtype) for name, values in small.items()},
        **{f"lists/{name}": spec for name, spec in specs(len(rows_n), D).items() if listed},
        "facts": facts_spec,
        "crc32": ((N,), np.dtype("<u4")),
    }
    layout = Layout.of_arrays(FORMAT, FORMAT_VERSION, layout_of, {"descriptors": "crc32"})
    with whole(Path(out), durable=True) as partial:
        file = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        try:
            layout.write(file)
            for name, values in small.items():
                layout.places[name].write(file, values)
            sums_N = _write_rows(file, layout.places["descriptors"], source, seen)
            layout.places["crc32"].write(file, sums_N)
            rows = Stored(Path(out), file, layout.places["descriptors"], sums_N)
            made = replace(source, path=Path(out), rows=rows, lists=None, tuning=None)
            tuning = None
            if listed:
                lists = Lists.learned(rows_n, D, _blocks_of(rows), seen)
                for name, values in lists.arrays().items():
                    layout.places[f"lists/{name}"].write(file, values)
                tuning = _tuned(replace(made, lists=lists), recall, queries_MD, seen, say)
            told = document({**facts, "tuning": tuning})
            padded = np.full(facts_spec[0], ord(" "), np.uint8)
            padded[: len(told)] = told
            layout.places["facts"].write(file, padded)
            with File(partial, file, unfinished=True) as finished:
                finished.seal()
        finally:
            os.close(file)
    progress(total, total)
    return open_index(out)


def _small_arrays(source: Index) -> dict[str, np.ndarray]:
    """All but the rows, the lists and the facts."""
    bad = np.flatnonzero(~source.readable)
    arrays: dict[str, np.ndarray] = {
        **column("names", list(source.names)),
        **column("classes", source.classes),
        "status": np.where(source.readable, DONE, UNREADABLE).astype(np.uint8),
        "unreadable/rows": bad.astype(np.int64),
        **column("unreadable/reasons", [source.errors.get(i, "") for i in bad.tolist()]),
    }
    if source.labels is not None:
        arrays["labels"] = source.labels
    if source.boxes is not None:
        arrays["boxes"] = source.boxes
    if source.files is not None:
        arrays |= column("files", source.files)
    return arrays


def _write_rows(file: int, place: Place, source: Index, seen: Callable[[int], None]) -> np.ndarray:
    """Bring the rows to their place as float16, unreadable ones as zeros; their checksums (N,)."""
    sums_N = np.zeros(place.shape[0], np.uint32)
    for block in row_blocks(source.rows):
        x_bD = np.where(source.readable[block, None], source.rows[block], 0).astype(np.float16)
        place.write(file, x_bD, block.start)
        sums_N[block] = checksums(x_bD)
        seen(len(x_bD))
    return sums_N


def _blocks_of(rows: Matrix) -> Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]:
    """Rising rows, block by block; see `lists.Blocks`."""
    step = max(1, BLOCK_BYTES // (4 * rows.shape[1]))

    def blocks(wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for low in range(0, len(wanted), step):
            part = wanted[low : low + step]
            yield part, rows[part]

    return blocks


def _tuned(
    index: Index,
    recall: float,
    queries_MD: np.ndarray | None,
    seen: Callable[[int], None],
    say: Callable[[str], None],
) -> Tuning | None:
    """The cheapest way to search that reaches a recall; None, and said, where there is none."""
    assert index.lists is not None
    rng, rows_n = np.random.default_rng(0), np.flatnonzero(index.readable)
    if queries_MD is None:
        without_M = np.sort(rng.choice(rows_n, min(TRIED, len(rows_n)), replace=False))
        queries_MD = np.asarray(index.rows[without_M])
    else:
        some = np.sort(rng.choice(len(queries_MD), min(TRIED, len(queries_MD)), replace=False))
        queries_MD, without_M = queries_MD[some], np.full(len(some), -2)
    nearest_MK, _ = index.search(queries_MD, without=without_M, exact=True)
    seen(len(rows_n))
    n, L = len(rows_n), len(index.lists.ends)
    code, row = index.lists.codes.shape[1], 2 * index.rows.shape[1]  # bytes
    best: tuple[float, Tuning] | None = None
    reached, probes = 0.0, min(PROBES, L)
    while best is None or probes * n / L * code < best[0]:
        found_MC = index.lists.candidates(queries_MD, probes, min(CANDIDATES[-1], n) + 1)
        # without itself, or without the last; -1 is none
        others = found_MC != without_M[:, None]
        others[others.all(1), -1] = False
        found_MC = found_MC[others].reshape(len(queries_MD), -1)
        for candidates in CANDIDATES:
            shares_M = _shares(nearest_MK, found_MC[:, :candidates])
            choose, tell = shares_M[::2], shares_M[1::2]
            error = 2 * choose.std() / len(choose) ** 0.5
            reached = max(reached, float(tell.mean()))
            cost = probes * n / L * code + candidates * row
            if choose.mean() - error >= recall and (best is None or cost < best[0]):
                best = (
                    cost,
                    Tuning(
                        probes=probes,
                        candidates=candidates,
                        recall=round(float(tell.mean()), 4),
                        asked=float(recall),
                        queries=len(tell),
                    ),
                )
        if probes == L:
            break
        probes = min(2 * probes, L)
    if best is None:
        say(f"lists reach a recall of {reached:.3f}, not {recall}: all rows are compared")
        return None
    return best[1]


def _shares(wanted_MK: np.ndarray, found_MC: np.ndarray) -> np.ndarray:
    """(M,) which part of each query's wanted rows is among those found."""
    there = [
        np.isin(wanted[wanted >= 0], found).mean() if (wanted >= 0).any() else 1.0
        for wanted, found in zip(wanted_MK, found_MC, strict=True)
    ]
    return np.array(there)


def told_of(index: Index) -> dict[str, Any]:
    """What `vggfeat index` and `info` tell of one."""
    return {
        "rows": len(index.names),
        "unreadable": len(index.errors),
        "dim": index.rows.shape[1],
        "pool": index.pool,
        "rows_digest": index.rows_digest,
        "lists": 0 if index.lists is None else len(index.lists.ends),
        "tuning": index.tuning and dict(index.tuning),
        "dataset": index.dataset,
        "root": index.root,
        **asdict(index.description),
    }
