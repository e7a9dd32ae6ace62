"""Search at size: what an index of a million descriptors takes to make, how fast it answers, and
how many of the ten nearest it finds, beside the comparison of all.

    python -m benchmarks.index --features c256.h5 --features c384.h5 --rows 1000000 --folder /tmp

The files are of real photographs, the same in each; their descriptors are L2-normalised, stacked
and centred, and relu(W x - 0.5) of them, W a fixed Gaussian matrix, scaled to a variance of 1,
stands for 4,096 values of fc7: about 30 % of them are positive. A row is that of a photograph drawn
at random, plus Gaussian noise: along the 128 first principal directions of the photographs, as
large in each as they vary there (together: --noise times the photographs' root mean square distance
from their mean), and of the same size / 5 in all directions alike; then relu, and length 1.
1,000 photographs have no rows. Half of them tune the index; the other half, without noise, are the
queries, and so are as many rows of the same kind that aren't in it (the nearest of these are mostly
others of the same photograph: an easier search). Recall is the share of the 10 nearest rows that
the comparison of all rows finds.

The index is written to --folder and removed. Memory is the kernel's VmHWM of a process that only
makes it. Each figure is of one run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import vggfeat
from vggfeat.aggregate import l2_normalise
from vggfeat.index import Index, build_index, index_of, open_index
from vggfeat.terminal import columns, out

D, DIRECTIONS, HELD, AT_ONCE = 4096, 128, 1000, 4096


class Made:
    """(N, D): rows that are made when they are asked for, in blocks that begin at multiples of
    AT_ONCE. seconds: that this took.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, features: list[str], rows: int, noise: float) -> None:
        rng = np.random.default_rng(0)
        files = [vggfeat.open_features(path) for path in features]
        x = np.hstack([l2_normalise(file.descriptors[:, 0]) for file in files])
        z = (x - x.mean(0)) @ rng.standard_normal((x.shape[1], D), np.float32)
        self._all = np.maximum(z / z.std() - 0.5, 0).astype(np.float32)
        order = rng.permutation(len(self._all))
        self.held, self._used = self._all[order[:HELD]], order[HELD:]
        centred = self._all[self._used] - self._all[self._used].mean(0)
        _, S, Vt = np.linalg.svd(centred[:1500], full_matrices=False)
        spread = np.sqrt(np.square(centred).sum(1).mean())
        directions = S[:DIRECTIONS, None] * Vt[:DIRECTIONS]
        self._directions = directions * (noise * spread / np.linalg.norm(directions))
        self._everywhere = noise / 5 * spread / D**0.5
        self.shape: tuple[int, ...] = (rows, D)
        self.seconds = 0.0

    def some(self, count: int, seed: int) -> np.ndarray:
        """Rows (count, D) of one seed."""
        rng = np.random.default_rng([1, seed])
        x = self._all[rng.choice(self._used, count)]
        x += rng.standard_normal((count, DIRECTIONS), np.float32) @ self._directions
        x += self._everywhere * rng.standard_normal((count, D), np.float32)
        return l2_normalise(np.maximum(x, 0, out=x))

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        begun = time.perf_counter()
        assert rows.start % AT_ONCE == 0 and rows.stop - rows.start <= AT_ONCE
        made = self.some(rows.stop - rows.start, rows.start)
        self.seconds += time.perf_counter() - begun
        return made


def make(options: argparse.Namespace) -> None:
    """The index alone, and what it took."""
    rows = Made(options.features, options.rows, options.noise)
    like = index_of(vggfeat.open_features(options.features[0]))
    source = Index(
        path="made",
        names=[f"{i:08d}.jpg" for i in range(options.rows)],
        labels=None,
        classes=[],
        readable=np.ones(options.rows, bool),
        errors={},
        description=like.description,
        pool=like.pool,
        dataset="folder",
        root="",
        rows_digest="0" * 64,
        rows=rows,
    )
    Path("/proc/self/clear_refs").write_text("5")  # what made the photographs is no part of it
    before, begun = _peak(), time.perf_counter()
    queries_MD = None if options.by_rows else l2_normalise(rows.held[::2])
    build_index(options.make, source, queries_MD=queries_MD, recall=options.recall)
    took = time.perf_counter() - begun
    print(took - rows.seconds, rows.seconds, _peak(), before, file=sys.__stdout__)


def _peak() -> float:
    """MB that this process has taken at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [told] = [line for line in lines if line.startswith("VmHWM:")]
    return int(told.split()[1]) * 1024 / 1e6


def measure(options: argparse.Namespace) -> None:
    """Make an index in a process of its own, search it, and print both."""
    rows = Made(options.features, options.rows, options.noise)
    queries = {
        "photographs": l2_normalise(rows.held[1::2]),
        "rows": rows.some(HELD // 4, 1 << 40),
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "rows.index")
        words = [*sys.argv[1:], "--make", str(path)]
        command = [sys.executable, "-m", "benchmarks.index", *words]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, making, peak, before = map(float, ran.stdout.split()[-4:])
        begun = time.perf_counter()
        index = open_index(path)
        opened, size = time.perf_counter() - begun, path.stat().st_size
        assert index.lists is not None and index.tuning is not None
        index.search(queries["rows"][:2])  # faiss builds its own from our arrays
        table = columns("queries", "how", "queries/s", "one at a time, ms", "recall at 10")
        for name, queries_MD in queries.items():
            exact, _ = _timed(table, index, name, queries_MD, None, exact=True)
            _timed(table, index, name, queries_MD, exact)
    for line in (
        f"{options.rows:,} rows of {D:,}, noise {options.noise}: made in {seconds:,.0f} s, beside"
        f" {making:,.0f} s for the rows themselves",
        f"memory {peak:,.0f} MB at most, {before:,.0f} before; file {size / 1e9:.2f} GB, opened in"
        f" {opened:.1f} s",
        f"{index.tuning['probes']} of {len(index.lists.ends):,} lists, {index.tuning['candidates']}"
        f" candidates: recall {index.tuning['recall']:.3f} of its own"
        f" {index.tuning['queries']} queries",
    ):
        out.print(line, soft_wrap=True)
    out.print(table)


def _timed(
    table: Any,
    index: Index,
    name: str,
    queries_MD: np.ndarray,
    nearest_MK: np.ndarray | None,
    exact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    begun = time.perf_counter()
    found = index.search(queries_MD, exact=exact)
    rate = len(queries_MD) / (time.perf_counter() - begun)
    alone = 1 if exact else 100
    begun = time.perf_counter()
    for query_D in queries_MD[:alone]:
        index.search(query_D[None], exact=exact)
    one = 1000 * (time.perf_counter() - begun) / alone
    recall = 1.0
    if nearest_MK is not None:
        pairs = zip(nearest_MK, found[0], strict=True)
        recall = float(np.mean([np.isin(wanted, rows).mean() for wanted, rows in pairs]))
    how = "all rows" if exact else "lists"
    table.add_row(name, how, f"{rate:,.1f}", f"{one:,.1f}", f"{recall:.3f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", action="append", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--by-rows", action="store_true", help="tune it by its own rows")
    parser.add_argument("--folder", type=Path, default=Path("build"))
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
