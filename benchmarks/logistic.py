"""How long a logistic regression takes, beside scikit-learn's own (lbfgs), and whose objective is
lower.

    python -m benchmarks.logistic --features c256.h5
    python -m benchmarks.logistic --features c256.h5 --features c384.h5 --pool stack

One fit of all classes a C, on the training part of split 0, and its accuracy on the test part.
scikit-learn at its own tol, and at the largest of ever smaller ones that brings its objective to
ours but for 1e-5, which is looked for outside the time. Interleaved; the medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as Theirs

from vggfeat.classify import problem_from
from vggfeat.logistic import LogisticRegression
from vggfeat.terminal import columns, err, out

TOLS: tuple[float, ...] = tuple(10.0 ** (-k / 2) for k in range(8, 17))  # scikit-learn's own first
EQUAL = 1e-5


def objective(model: Any, X: np.ndarray, y: np.ndarray) -> float:
    """scikit-learn's, float64."""
    F = X.astype(np.float64) @ model.coef_.T.astype(np.float64) + model.intercept_
    own = F[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    losses = float((logsumexp(F, axis=1) - own).sum())
    squares = float((model.coef_.astype(np.float64) ** 2).sum())
    return float(model.C) * losses + 0.5 * squares


def fitted(model: Any, X: np.ndarray, y: np.ndarray) -> float:
    """Seconds."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    return time.perf_counter() - began


def peer(C: float, tol: float) -> Any:
    return Theirs(C=C, tol=tol, solver="lbfgs", max_iter=1_000_000)


def equal_tol(C: float, least: float, X: np.ndarray, y: np.ndarray) -> float:
    for tol in TOLS:
        model = peer(C, tol)
        fitted(model, X, y)
        if objective(model, X, y) <= least * (1 + EQUAL):
            break
    return tol


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=Path, action="append", required=True)
    parser.add_argument("--pool", help="Default: the data set's own.")
    parser.add_argument("--C", type=float, nargs="+", default=[2.0**k for k in (-2, 2, 7, 12)])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.cores)
    problem, _, _ = problem_from(options.features, options.pool)
    train, test = (problem.splits[f"split0/{part}"] for part in ("train", "test"))
    X, y = problem.X[train], problem.labels[train]
    heads = (
        "C",
        "solver",
        "tol",
        "steps",
        "seconds",
        "ratio",
        "objective",
        "over ours",
        "accuracy",
    )
    table = columns(*heads)
    for C in options.C:
        first = LogisticRegression(C=C).fit(X, y)
        least = objective(first, X, y)
        matched = equal_tol(C, least, X, y)
        makers: list[tuple[str, Callable[[], Any]]] = [
            ("ours", partial(LogisticRegression, C=C)),
            ("lbfgs", partial(peer, C, TOLS[0])),
            ("lbfgs", partial(peer, C, matched)),
        ]
        seconds: list[list[float]] = [[] for _ in makers]
        models: list[Any] = [None] * len(makers)
        for _ in range(options.repeats):
            for i, (_, make) in enumerate(makers):
                models[i] = make()
                seconds[i].append(fitted(models[i], X, y))
        err.print(f"C {C:g}: {seconds}")
        medians = [statistics.median(times) for times in seconds]
        for (name, _), model, median in zip(makers, models, medians, strict=True):
            found = objective(model, X, y)
            table.add_row(
                f"{C:g}",
                name,
                f"{model.tol:.0e}",
                str(int(np.max(model.n_iter_))),
                f"{median:.2f}",
                f"{median / medians[0]:.1f}",
                f"{found:.6g}",
                f"{found / least - 1:+.1e}",
                f"{np.mean(model.predict(problem.X[test]) == problem.labels[test]):.4f}",
            )
    out.print(table)
    out.print(f"N, D, K: {len(X)}, {X.shape[1]}, {len(problem.classes)}; {options.cores} cores")


if __name__ == "__main__":
    main()
