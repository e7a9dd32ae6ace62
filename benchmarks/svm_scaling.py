"""How the cost of K linear SVMs grows with images N, dimensions D and classes K: seconds and memory
beside LinearSVC's.

A line each, ours and the peer's in turn; ImageNet's shape, out of core, ours alone:

    python -m benchmarks.svm_scaling --out docs/svm-scaling.svg
    python -m benchmarks.svm_scaling --imagenet 1281167 --device cuda --file big.h5
    python -m benchmarks.svm_scaling --imagenet 6406 --check

Each measurement is a process of its own on one core, C = 1, descriptors as VGG's (not negative,
unit length, classes that overlap). Memory: the peak of the process less what it held before the
fit, X included in neither. The slope is that of log seconds over log size, by least squares.
LinearSVC fits its K classes one after the other.

`--imagenet N` writes N float16 descriptors of D = 4096, of 1,000 classes, into an HDF5 file, trains
`--classes` of them from blocks of its rows, and prints the seconds (reading: X onto the device, and
its second moment), the memory (on a GPU: the most that was allocated there) and what ImageNet's
1,281,167 would take at the same rate. `--check` trains them twice, by what a GPU does (products of
float16 with float32 sums), on `--device`, and by what a CPU does, and compares the objectives.
cuML, the peer on a GPU, has no duality gap to compare at, and isn't measured.
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


def made(N: int, file: Path) -> None:
    """N float16 descriptors of 4,096, of 1,000 classes."""
    part = 4000
    partial = file.with_suffix(".partial")
    with h5py.File(partial, "w") as h5:
        stored = h5.create_dataset("X", (N, 4096), "float16", chunks=(64, 4096))
        labels = h5.create_dataset("y", (N,), "int64")
        for start in range(0, N, part):
            X, y = descriptors(min(part, N - start), 4096, 1000, seed=start)
            stored[start : start + len(X)], labels[start : start + len(X)] = X, y
    partial.rename(file)


def imagenet(options: argparse.Namespace) -> None:
    import torch

    from vggfeat.devices import resolve_device
    from vggfeat.errors import VggfeatError
    from vggfeat.solver import Solver

    try:
        device = resolve_device(options.device)
    except VggfeatError as error:
        raise SystemExit(f"svm_scaling: {error}") from error
    N, file = options.imagenet, options.file
    if not file.exists():
        made(N, file)
    table = columns(
        *("by", "images", "classes", "reading, s", "seconds", "memory, GB"),
        *("Newton steps", "largest gap", "top-1, %"),
    )
    with h5py.File(file) as h5:
        stored, y = h5["X"], h5["y"][:]
        if len(y) != N:
            raise SystemExit(f"{file} has {len(y)} images, not {N}: give another --file")
        T = np.where(y[:, None] == np.arange(options.classes), 1, -1).astype(np.int8)
        own = y < options.classes
        memory = None if options.memory is None else options.memory * 1e9
        found = []
        ways: list[tuple[torch.device, bool | None]] = [(device, options.half or None)]
        if options.check:
            ways = [(device, True), (torch.device("cpu"), None)]
        for place, half in ways:
            gpu = place.type == "cuda"
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            before, began = peak(), time.perf_counter()
            solver = Solver(stored, place, memory, half=half)
            read = time.perf_counter()
            found.append(solver.solve(T, options.C, tol=options.tol))
            ended = time.perf_counter()
            taken = torch.cuda.max_memory_allocated() / 1e6 if gpu else peak() - before
            right = 100 * (found[-1].scores[own].argmax(1) == y[own]).mean()
            hours = (ended - began) / 3600 * IMAGENET / N * 1000 / options.classes
            table.add_row(
                f"{place}{', halves' if half else ''}",
                f"{N:,}",
                f"{options.classes:,}",
                f"{read - began:.1f}",
                f"{ended - read:.1f}",
                f"{taken / 1e3:.1f}" if gpu or len(found) == 1 else "",  # a peak is of both
                f"{found[-1].steps.min()} to {found[-1].steps.max()}",
                f"{found[-1].gap.max():.1e}",
                f"{right:.1f}",
            )
            del solver
    out.print(table)
    if options.check:
        difference = found[0].objective / found[1].objective - 1
        out.print(f"objectives: {difference.min():+.1e} to {difference.max():+.1e} of the CPU's")
    else:
        out.print(f"{IMAGENET:,} images and 1,000 classes at the same rate: {hours:.2f} h")


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
    parser.add_argument("--C", type=float, default=0.25)
    parser.add_argument("--tol", type=float, default=1e-5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", action="store_true", help="A GPU's way, on a CPU, too.")
    parser.add_argument(
        "--check", action="store_true", help="A GPU's way and a CPU's, with their objectives."
    )
    parser.add_argument(
        "--memory",
        type=float,
        help="GB for X and the problems solved at a time; default: 2, or a GPU's.",
    )
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], *map(int, options.measure[1:]))
        return
    if options.imagenet:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        imagenet(options)
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
