"""How near liblinear's optimum ours is: relative difference of the objectives, both losses, C from
2^-7 to 2^7.

    python -m benchmarks.svm_objective --lists VOC2007/ImageSets/Main --features c256.h5 …

The peer is scikit-learn's LinearSVC at tol 1e-6, a fit a class, in one process a core; ours runs at
a gap of 1e-6. A difference of d is (ours - theirs) / theirs: at most our gap above it, below it
where liblinear itself stopped early (a limit of 20,000 iterations, or badly scaled features).
`--classes`: how many of Caltech's liblinear has to fit; of VOC's a quarter as many.

    python -m benchmarks.svm_objective --half --lists … --features …

compares what a GPU does, on the CPU, with float64 at a gap of 1e-7 in place of liblinear: (w, b) by
products of float16 with float32 sums, C = 2^-7, 2^-6, …, 2^7.

    OMP_NUM_THREADS=1 python -m benchmarks.svm_objective --cold --lists … --features …

times one fit at one C from nothing beside LinearSVC's, on one core each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from itertools import product
from pathlib import Path

import joblib
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from benchmarks.svm import made_descriptors, objective, voc_labels
from vggfeat.classify import problem_from
from vggfeat.solver import LOSSES, Solver
from vggfeat.terminal import columns, err, out

CS = (2.0**-7, 2.0**-3, 1.0, 2.0**3, 2.0**7)
POWERS = [2.0**k for k in range(-7, 8)]
ITERATIONS = 20_000


def fit(X: np.ndarray, t: np.ndarray, C: float, loss: str) -> tuple[float, bool]:
    """liblinear's objective, and whether it stopped by itself."""
    known = t != 0
    # the dual of the hinge only; of the squared hinge the primal, whose Newton steps don't crawl
    # where C is large
    svc = LinearSVC(
        C=C, loss=loss, tol=1e-6, max_iter=ITERATIONS, dual=loss == "hinge", random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        svc.fit(X[known], t[known])
    return objective(X, t, C, svc.coef_[0], float(svc.intercept_[0]), loss), bool(
        svc.n_iter_ < ITERATIONS
    )


def cases(options: argparse.Namespace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    made: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    rng = np.random.default_rng(0)
    if options.features:
        for count in {1, len(options.features)}:
            problem, _, _ = problem_from(options.features[:count], "stack", None)
            rows = problem.splits["split0/train"]
            labels = problem.labels[rows, None] == np.arange(len(problem.classes))
            every = np.arange(
                0, len(problem.classes), max(1, len(problem.classes) // options.classes)
            )
            T = np.where(labels, 1, -1).astype(np.int8)[:, every]
            made[f"Caltech-101, {count} scale{'s' if count > 1 else ''}"] = problem.X[rows], T
    if options.lists:
        targets = np.concatenate([voc_labels(options.lists, split) for split in ("train", "val")])
        every = np.arange(
            0, targets.shape[1], max(1, targets.shape[1] // max(1, options.classes // 4))
        )
        made["VOC-shaped"] = made_descriptors(targets, 4096, seed=0), targets[:, every]

    def blobs(N: int, D: int, K: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, K, N)
        X = np.maximum(rng.normal(0, 1, (N, D)) + 0.5 * rng.normal(0, 1, (K, D))[y], 0).astype(
            np.float32
        )
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        return X, np.where(y[:, None] == np.arange(K), 1, -1).astype(np.int8)

    X, T = blobs(400, 60, 4)
    made["badly scaled: columns from 1e-2 to 1e2"] = (
        X * np.logspace(-2, 2, 60).astype(np.float32),
        T,
    )
    made["not normalised: length 30"] = X * np.float32(30), T
    made["N much smaller than D"] = blobs(60, 4096, 4)
    made["N much larger than D"] = blobs(6000, 20, 4)
    made["every row three times"] = np.repeat(X, 3, axis=0), np.repeat(T, 3, axis=0)
    made["one positive"] = X, np.where(np.arange(400) == 7, 1, -1).astype(np.int8)[:, None]
    return made


def by_halves(options: argparse.Namespace) -> None:
    """What a GPU does (products of float16 with float32 sums) beside float64, on the CPU."""
    table = columns(
        "data", "loss", "N, D, classes", "halves - float64", "their gaps", "Newton steps"
    )
    for name, (X, T) in cases(options).items():
        reference, halves = Solver(X.astype(np.float64)), Solver(X, half=True)
        reference.dtype, reference.products = torch.float64, None
        reference.space.use(torch.float64)
        for loss in LOSSES:
            difference, gaps, steps = [], [], []
            for C in POWERS:
                a = reference.solve(T, C, loss=loss, tol=1e-7)
                b = halves.solve(T, C, loss=loss)
                difference.append(b.objective / a.objective - 1)
                gaps.append((float(b.gap.max()), float(a.gap.max())))
                steps.append(int(b.steps.max()))
            low, high = np.min(difference), np.max(difference)
            table.add_row(
                name,
                loss,
                f"{X.shape[0]}, {X.shape[1]}, {T.shape[1]}",
                f"{low:+.0e} to {high:+.0e}",
                f"{max(gaps)[0]:.0e}, {max(gap for _, gap in gaps):.0e}",
                f"{min(steps)} to {max(steps)}",
            )
            err.print(f"{name}, {loss}: {low:+.1e} to {high:+.1e}")
    out.print(table)


def cold(options: argparse.Namespace) -> None:
    """One fit at one C from nothing, Gram matrix or what takes its place included, beside LinearSVC
    as it comes: CPU seconds of one core, for all the classes that are fitted.
    """
    torch.set_num_threads(1)
    table = columns(
        *("data", "loss", "C", "N, D, classes", "ours, s", "LinearSVC, s", "ratio"),
        *("our gap", "their objective over ours"),
    )
    for name, (X, T) in cases(options).items():
        X64 = X.astype(np.float64)
        for loss, C in product(LOSSES, (0.125, 1.0, 8.0, 128.0)):
            ours, theirs = [], []
            for _ in range(options.repeats):
                began = time.process_time()
                found = Solver(X, solves=T.shape[1]).solve(T, C, loss=loss, scores=False)
                middle = time.process_time()
                values = [default_fit(X64, t, C, loss) for t in T.T]
                ours.append(middle - began)
                theirs.append(time.process_time() - middle)
            a, b = statistics.median(ours), statistics.median(theirs)
            over = np.array(values) / found.objective - 1
            table.add_row(
                name,
                loss,
                f"{C:g}",
                f"{X.shape[0]}, {X.shape[1]}, {T.shape[1]}",
                f"{a:.2f}",
                f"{b:.2f}",
                f"{b / a:.1f}",
                f"{found.gap.max():.0e}",
                f"{over.min():+.0e} to {over.max():+.0e}",
            )
            err.print(f"{name}, {loss}, C = {C:g}: {a:.2f} s, LinearSVC {b:.2f} s")
    out.print(table)


def default_fit(X: np.ndarray, t: np.ndarray, C: float, loss: str) -> float:
    """LinearSVC's objective, at its own tolerance."""
    known = t != 0
    svc = LinearSVC(C=C, loss=loss, dual="auto", max_iter=10_000, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        svc.fit(X[known], t[known])
    return objective(X, t, C, svc.coef_[0], float(svc.intercept_[0]), loss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lists", type=Path, help="VOC-2007's ImageSets/Main.")
    parser.add_argument(
        "--features", type=Path, action="append", help="Feature files of Caltech-101."
    )
    parser.add_argument("--classes", type=int, default=12)
    parser.add_argument(
        "--half", action="store_true", help="A GPU's way beside float64, at fifteen values of C."
    )
    parser.add_argument(
        "--cold", action="store_true", help="One fit at a time, in seconds, beside LinearSVC's."
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.half or options.cold:
        (by_halves if options.half else cold)(options)
        return
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    table = columns(
        "data",
        "loss",
        "N, D, classes",
        "ours - liblinear",
        "our gap",
        "ours, s",
        "liblinear, s",
        "liblinear stopped",
    )
    for name, (X, T) in cases(options).items():
        X64 = X.astype(np.float64)
        solver = Solver(X)
        for loss in LOSSES:
            began, start, mine, gap = time.perf_counter(), None, [], 0.0
            for C in CS:
                found = solver.solve(T, C, loss=loss, tol=1e-6, start=start)
                start, gap = found.state, max(gap, float(found.gap.max()))
                mine += [
                    objective(X64, T[:, k], C, found.coef[k], found.intercept[k], loss)
                    for k in range(T.shape[1])
                ]
            middle = time.perf_counter()
            theirs = joblib.Parallel(cores)(
                joblib.delayed(fit)(X64, T[:, k], C, loss) for C in CS for k in range(T.shape[1])
            )
            end = time.perf_counter()
            by_itself = np.array([done for _, done in theirs])
            difference = np.array(mine) / np.array([value for value, _ in theirs]) - 1
            table.add_row(
                name,
                loss,
                f"{X.shape[0]}, {X.shape[1]}, {T.shape[1]}",
                f"{difference.min():+.0e} to {difference.max():+.0e}",
                f"{gap:.0e}",
                f"{middle - began:.1f}",
                f"{end - middle:.1f}",
                f"{by_itself.sum()} of {len(by_itself)}",
            )
            err.print(f"{name}, {loss}: {difference.min():+.1e} to {difference.max():+.1e}")
    out.print(table)


if __name__ == "__main__":
    main()
