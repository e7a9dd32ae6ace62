"""How long a protocol's SVMs take: all classes, C and folds at once, beside scikit-learn's
LinearSVC on every core.

Made descriptors and real labels; 20 classes, 14 costs and 3 folds; Caltech-101's three splits:

    python -m benchmarks.svm --protocol voc --lists VOC2007/ImageSets/Main
    python -m benchmarks.svm --protocol vissl --lists VOC2007/ImageSets/Main
    python -m benchmarks.svm --protocol splits --features c256.h5 --pool stack

The peer fits one LinearSVC a class and C, as the published scripts do, in one process a core, from
a memory-mapped float64 X. Both choose C by the same score on the same rows and refit. Interleaved;
the medians of `--repeats`, and beside them the winners, the scores and the relative differences of
the objectives (positive: ours is above the peer's).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold
from sklearn.svm import LinearSVC

from vggfeat.classify import problem_from
from vggfeat.metrics import mean_average_precision, mean_class_recall
from vggfeat.solver import Solver
from vggfeat.terminal import columns, err, out


@dataclass
class Task:
    """X (N, D); targets (N, K) of 1, -1, 0; of each fold the rows that fit and that judge; then
    refit and test.
    """

    name: str
    X: np.ndarray
    targets: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    refit: np.ndarray
    test: np.ndarray
    Cs: list[float]
    single: bool

    def judge(self, scores_nK: np.ndarray, rows: np.ndarray) -> float:
        truth = self.targets[rows]
        if self.single:
            return mean_class_recall(scores_nK.argmax(1), truth.argmax(1), truth.shape[1])
        return mean_average_precision(scores_nK, truth, "11point").mean


@dataclass
class Ran:
    """seconds; validation score of each C; the winner; test score; objectives (len(Cs), folds,
    K).
    """

    seconds: float
    curve: np.ndarray
    C: float
    test: float
    objectives: np.ndarray


def objective(
    X: np.ndarray, t: np.ndarray, C: float, w: np.ndarray, b: float, loss: str = "squared_hinge"
) -> float:
    """liblinear's, float64."""
    known = t != 0
    s = np.maximum(0, 1 - t[known] * (X[known] @ w + b))
    return float(0.5 * (w @ w + b * b) + C * (s if loss == "hinge" else s**2).sum())


def ours(task: Task) -> Ran:
    began = time.perf_counter()
    curve = np.zeros((len(task.Cs), len(task.folds)))
    objectives = np.zeros((len(task.Cs), len(task.folds), task.targets.shape[1]))
    same_rows = len(task.folds) > 1 and all(
        len(fit) + len(val) == len(task.refit) and np.isin(fit, task.refit).all()
        for fit, val in task.folds
    )
    if same_rows:  # cross-validation: the folds are masks on the same images
        masks = []
        for fit, _ in task.folds:
            mask = np.zeros_like(task.targets)
            mask[fit] = task.targets[fit]
            masks.append(mask[task.refit])
        solver, start, near = Solver(task.X[task.refit]), None, None
        place = np.searchsorted(task.refit, np.arange(len(task.X)))
        for c, C in enumerate(task.Cs):
            found = solver.solve(np.concatenate(masks, axis=1), C, start=start)
            start = found.state
            objectives[c] = found.objective.reshape(len(task.folds), -1)
            for f, (_, val) in enumerate(task.folds):
                K = task.targets.shape[1]
                curve[c, f] = task.judge(found.scores[place[val], f * K : (f + 1) * K], val)
    else:
        for f, (fit, val) in enumerate(task.folds):
            solver, start = Solver(task.X[fit]), None
            X_val = task.X[val].astype(np.float64)
            for c, C in enumerate(task.Cs):
                found = solver.solve(task.targets[fit], C, start=start)
                start = found.state
                objectives[c, f] = found.objective
                curve[c, f] = task.judge(X_val @ found.coef.T + found.intercept, val)
                if curve[c, f] > curve[:c, f].max(initial=-1):
                    near = found.coef, found.intercept
        solver = Solver(task.X[task.refit])
    C = task.Cs[int(curve.mean(1).argmax())]
    final = solver.solve(task.targets[task.refit], C, near=near)
    test = task.judge(task.X[task.test] @ final.coef.T + final.intercept, task.test)
    return Ran(time.perf_counter() - began, curve.mean(1), C, test, objectives)


def one_fit(X: np.ndarray, t: np.ndarray, rows: np.ndarray, C: float) -> tuple[np.ndarray, float]:
    known = rows[t[rows] != 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        svc = LinearSVC(C=C, dual="auto", max_iter=10000, random_state=0).fit(X[known], t[known])
    return svc.coef_[0], float(svc.intercept_[0])


def peer(task: Task, cores: int) -> Ran:
    began = time.perf_counter()
    X = task.X.astype(np.float64)
    K = task.targets.shape[1]
    with (
        joblib.parallel_config(backend="loky", inner_max_num_threads=1),
        joblib.Parallel(cores) as parallel,
    ):
        jobs = [
            (c, f, k)
            for c in reversed(range(len(task.Cs)))
            for f in range(len(task.folds))
            for k in range(K)
        ]
        fits = parallel(
            joblib.delayed(one_fit)(X, task.targets[:, k], task.folds[f][0], task.Cs[c])
            for c, f, k in jobs
        )
        fitted = dict(zip(jobs, fits, strict=True))
        curve = np.zeros((len(task.Cs), len(task.folds)))
        for c in range(len(task.Cs)):
            for f, (_, val) in enumerate(task.folds):
                scores = np.stack(
                    [X[val] @ fitted[c, f, k][0] + fitted[c, f, k][1] for k in range(K)], 1
                )
                curve[c, f] = task.judge(scores, val)
        C = task.Cs[int(curve.mean(1).argmax())]
        final = parallel(
            joblib.delayed(one_fit)(X, task.targets[:, k], task.refit, C) for k in range(K)
        )
    test = task.judge(np.stack([X[task.test] @ w + b for w, b in final], 1), task.test)
    seconds = time.perf_counter() - began
    objectives = np.zeros((len(task.Cs), len(task.folds), K))
    for (c, f, k), (w, b) in fitted.items():
        rows = task.folds[f][0]
        objectives[c, f, k] = objective(X[rows], task.targets[rows, k], task.Cs[c], w, b)
    return Ran(seconds, curve.mean(1), C, test, objectives)


def voc_labels(lists: Path, split: str) -> np.ndarray:
    """(n, 20) of 1, 0 (difficult), -1, in the order of the list files."""
    files = sorted(lists.glob(f"*_{split}.txt"))
    if len(files) != 20:
        raise SystemExit(
            f"{lists} has {len(files)} lists *_{split}.txt, not 20; give VOC2007/ImageSets/Main"
        )
    return np.array(
        [[int(line.split()[1]) for line in file.read_text().splitlines()] for file in files],
        np.int8,
    ).T


def made_descriptors(labels: np.ndarray, D: int, seed: int) -> np.ndarray:
    """Not negative, of unit length, with a falling spectrum, as fc7's; classes that overlap. (N, D)
    float32.
    """
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    latent = 300
    directions = fixed.standard_normal((labels.shape[1], latent)) * 0.25
    mixing = (
        fixed.standard_normal((latent, D)) / latent**0.5 * np.exp(0.5 * fixed.standard_normal(D))
    )
    hidden = (labels == 1) @ directions + rng.standard_normal((len(labels), latent))
    hidden /= np.sqrt(1 + np.arange(latent) / 10)
    X = np.maximum(hidden @ mixing + 0.15 * rng.standard_normal((len(labels), D)) - 0.3, 0).astype(
        np.float32
    )
    normalised: np.ndarray = X / np.linalg.norm(X, axis=1, keepdims=True)
    return normalised


def tasks(options: argparse.Namespace) -> list[Task]:
    if options.protocol == "splits":
        problem, _, _ = problem_from(options.features, options.pool, None)
        targets = np.where(
            problem.labels[:, None] == np.arange(len(problem.classes)), 1, -1
        ).astype(np.int8)
        names = sorted({name.split("/")[0] for name in problem.splits})
        made = []
        for name in names:
            train, val, test = (
                problem.splits[f"{name}/{part}"] for part in ("train", "val", "test")
            )
            fit, refit = np.setdiff1d(train, val), np.union1d(train, val)
            Cs = [2.0**k for k in range(-5, 14, 2)]
            made.append(Task(name, problem.X[:], targets, [(fit, val)], refit, test, Cs, True))
        return made
    labels = {split: voc_labels(options.lists, split) for split in ("train", "val", "test")}
    targets = np.concatenate(list(labels.values()))
    X = made_descriptors(targets, options.dimensions, seed=0)
    n, m = len(labels["train"]), len(labels["val"])
    train, val, both, test = (
        np.arange(n),
        np.arange(n, n + m),
        np.arange(n + m),
        np.arange(n + m, len(X)),
    )
    if options.protocol == "voc":
        return [
            Task(
                "VOC-2007",
                X,
                targets,
                [(train, val)],
                both,
                test,
                [2.0**k for k in range(-7, 12, 2)],
                False,
            )
        ]
    folds = [(both[a], both[b]) for a, b in KFold(3, shuffle=True, random_state=0).split(both)]
    return [Task("VISSL", X, targets, folds, both, test, [2.0**k for k in range(-7, 7)], False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", choices=("voc", "vissl", "splits"), default="voc")
    parser.add_argument("--lists", type=Path, help="VOC-2007's ImageSets/Main, for voc and vissl.")
    parser.add_argument("--dimensions", type=int, default=4096)
    parser.add_argument("--features", type=Path, action="append", help="Feature files, for splits.")
    parser.add_argument("--pool", default="average")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.cores)
    heads = (
        "task",
        "N, D, problems",
        "ours, s",
        "LinearSVC, s",
        "ratio",
        "C",
        "validation",
        "test",
        "objective",
    )
    table = columns(*heads)
    for task in tasks(options):
        pairs = []
        for _ in range(options.repeats):
            pairs.append((ours(task), peer(task, options.cores)))
            err.print(
                f"{task.name}: ours {pairs[-1][0].seconds:.1f} s, LinearSVC"
                f" {pairs[-1][1].seconds:.1f} s"
            )
        mine, theirs = pairs[0]
        seconds = [statistics.median(pair[i].seconds for pair in pairs) for i in (0, 1)]
        difference = mine.objectives / theirs.objectives - 1
        fits = len(task.Cs) * len(task.folds) * task.targets.shape[1]
        table.add_row(
            task.name,
            f"{len(task.refit)}, {task.X.shape[1]}, {fits}",
            f"{seconds[0]:.1f}",
            f"{seconds[1]:.1f}",
            f"{seconds[1] / seconds[0]:.1f}",
            f"{mine.C:g}, {theirs.C:g}",
            f"{mine.curve.max():.4f}, {theirs.curve.max():.4f}",
            f"{mine.test:.4f}, {theirs.test:.4f}",
            f"{difference.min():+.1e} to {difference.max():+.1e}",
        )
    out.print(table)
    out.print(
        f"{options.cores} cores for each side; LinearSVC at its own tol, 1e-4; ours at a gap of"
        " 1e-5"
    )


if __name__ == "__main__":
    main()
