"""How the cost of K linear SVMs grows with images N, dimensions D and classes K: seconds and memory
beside LinearSVC's.

A line each, ours and the peer's in turn; ImageNet's shape, out of core, ours alone:

    python -m benchmarks.svm_scaling --out docs/svm-scaling.svg
    python -m benchmarks.svm_scaling --imagenet 64000 --file big.h5

Each measurement is a process of its own on one core, C = 1, descriptors as VGG's (not negative,
unit length, classes that overlap). Memory: the peak of the process less what it held before the
fit, X included in neither. The slope is that of log seconds over log size, by least squares.
LinearSVC fits its K classes one after the other.

`--imagenet N` writes N float16 descriptors of D = 4096, of 1,000 classes, into an HDF5 file, trains
`--classes` of them from blocks of its rows, and prints the seconds, the memory and what ImageNet's
1,281,167 would take at the same rate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vggfeat.terminal import columns, err, out

BASE = {"N": 4000, "D": 1024, "K": 20}
SIZES = {
    "N": (1000, 2000, 4000, 8000, 16000),
    "D": (256, 512, 1024, 2048, 4096),
    "K": (5, 20, 80, 320),
}
IMAGENET = 1_281_167


def descriptors(N: int, D: int, K: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) float32 and (N,) labels."""
    fixed, rng = np.random.default_rng(1), np.random.default_rng(seed)
    latent = 200
    mixing = fixed.standard_normal((latent, D)).astype(np.float32) / latent**0.5
    means = fixed.standard_normal((K, latent)).astype(np.float32)
    y = rng.integers(0, K, N)
    X = np.maximum((means[y] + rng.standard_normal((N, latent), np.float32)) @ mixing - 0.3, 0)
    return X / np.linalg.norm(X, axis=1, keepdims=True), y


def peak() -> float:
    """MB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(side: str, N: int, D: int, K: int) -> None:
    """Print seconds and MB of one fit as JSON."""
    X, y = descriptors(N, D, K)
    if side == "ours":
        from vggfeat.svm import LinearSVM

        model: Any = LinearSVM(C=1.0)
    else:
        from sklearn.svm import LinearSVC

        model = LinearSVC(C=1.0, dual="auto", max_iter=10000, random_state=0)
    before, began = peak(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, y)
    print(json.dumps({"seconds": time.perf_counter() - began, "memory": peak() - before}))


def slope(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def plot(measured: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vggfeat"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.4), layout="constrained", sharey="row")
    for column, letter in enumerate(SIZES):
        for row, (key, label) in enumerate((("seconds", "seconds"), ("memory", "peak memory, MB"))):
            axis = axes[row, column]
            for side, style in (("ours", "o-"), ("LinearSVC", "s--")):
                values = [max(run[key], 0.1) for run in measured[letter][side]]
                name = (
                    f"{side}, slope {slope(list(SIZES[letter]), values):.1f}"
                    if key == "seconds"
                    else side
                )
                axis.loglog(SIZES[letter], values, style, label=name)
            axis.set_xlabel(
                f"{letter}  ({', '.join(f'{k} = {v}' for k, v in BASE.items() if k != letter)})"
            )
            axis.set_xticks(SIZES[letter], [str(size) for size in SIZES[letter]])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
            if column == 0:
                axis.set_ylabel(label)
    figure.savefig(path, metadata={"Date": None})


def imagenet(N: int, classes: int, file: Path, tol: float, memory_GB: float) -> None:
    from vggfeat.solver import Solver

    D, K, part = 4096, 1000, 4000
    y = np.empty(N, np.int64)
    if not file.exists():
        with h5py.File(file, "w") as h5:
            stored = h5.create_dataset("X", (N, D), "float16", chunks=(64, D))
            labels = h5.create_dataset("y", (N,), "int64")
            for start in range(0, N, part):
                X, y = descriptors(min(part, N - start), D, K, seed=start)
                stored[start : start + len(X)], labels[start : start + len(X)] = X, y
    with h5py.File(file) as h5:
        stored, y = h5["X"], h5["y"][:]
        T = np.where(y[:, None] == np.arange(classes), 1, -1).astype(np.int8)
        before, began = peak(), time.perf_counter()
        solver = Solver(stored, memory=memory_GB * 1e9)
        err.print(f"second moments: {time.perf_counter() - began:.0f} s")
        found = solver.solve(T, 0.25, tol=tol)
        seconds = time.perf_counter() - began
        memory = peak() - before
    table = columns(
        "images",
        "classes",
        "seconds",
        "memory, GB",
        "Newton steps",
        "largest gap",
        "top-1 of them, %",
    )
    own = y < classes
    right = 100 * (found.scores[own].argmax(1) == y[own]).mean()
    table.add_row(
        f"{N:,}",
        f"{classes:,}",
        f"{seconds:.0f}",
        f"{memory / 1e3:.1f}",
        f"{found.steps.min()} to {found.steps.max()}",
        f"{found.gap.max():.0e}",
        f"{right:.1f}",
    )
    out.print(table)
    hours = seconds / 3600 * IMAGENET / N * K / classes
    out.print(f"{IMAGENET:,} images and {K:,} classes at the same rate: {hours:.1f} h")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="SVG to write.")
    parser.add_argument("--imagenet", type=int, metavar="N")
    parser.add_argument("--file", type=Path, default=Path("build/imagenet-size.h5"))
    parser.add_argument(
        "--classes", type=int, default=1000, help="How many of the 1,000 are trained."
    )
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument(
        "--memory", type=float, default=8, help="GB for the problems solved at a time."
    )
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], *map(int, options.measure[1:]))
        return
    if options.imagenet:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        imagenet(options.imagenet, options.classes, options.file, options.tol, options.memory)
        return
    one_core = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    table = columns("", "size", "ours, s", "LinearSVC, s", "ratio", "ours, MB", "LinearSVC, MB")
    for letter, sizes in SIZES.items():
        measured[letter] = {"ours": [], "LinearSVC": []}
        for size in sizes:
            shape = [str(value) for value in {**BASE, letter: size}.values()]
            for side, runs in measured[letter].items():
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.svm_scaling",
                    "--measure",
                    side,
                    *shape,
                ]
                done = subprocess.run(
                    command, env=one_core, capture_output=True, text=True, check=True
                )
                runs.append(json.loads(done.stdout))
            a, b = (measured[letter][side][-1] for side in ("ours", "LinearSVC"))
            table.add_row(
                letter,
                f"{size}",
                f"{a['seconds']:.2f}",
                f"{b['seconds']:.2f}",
                f"{b['seconds'] / a['seconds']:.1f}",
                f"{a['memory']:.0f}",
                f"{b['memory']:.0f}",
            )
            err.print(f"{letter} = {size}: {a['seconds']:.2f} s, LinearSVC {b['seconds']:.2f} s")
    out.print(table)
    for letter, sizes in SIZES.items():
        ours, theirs = (
            slope(list(sizes), [run["seconds"] for run in measured[letter][side]])
            for side in ("ours", "LinearSVC")
        )
        out.print(f"seconds grow as {letter}^{ours:.2f}, LinearSVC's as {letter}^{theirs:.2f}")
    if options.out:
        plot(measured, options.out)


if __name__ == "__main__":
    main()
