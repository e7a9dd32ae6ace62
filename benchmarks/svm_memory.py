"""How much memory `vggfeat svm` takes, beside what `--dry-run` says and what its descriptors are.

    python -m benchmarks.svm_memory --images 1000000 --dim 256 --file build/svm-memory.h5

Writes a feature file of images that don't exist, where there is none, and trains on it: C = 0.01,
on one core. Peaks are the kernel's (VmHWM) of a process each, less that of `--dry-run`, which is
the program's own with the images' names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from vggfeat.datasets.items import Items
from vggfeat.store import Description
from vggfeat.terminal import columns, out
from vggfeat.writer import FeatureWriter

MEASURED = """
import sys
from vggfeat.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
[told] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(told.split()[1], file=sys.__stderr__)
"""
AT_ONCE = 4096


def write(path: Path, N: int, D: int, K: int, Q: int) -> None:
    """N rows of length D at Q scales, of K classes that overlap."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, N).astype(np.int32)
    parts = np.split(rng.permutation(N), [7 * N // 10, 8 * N // 10])
    splits = dict(zip(("train", "val", "test"), map(np.sort, parts), strict=True))
    names, classes = [f"{i:08d}.jpg" for i in range(N)], [f"c{k}" for k in range(K)]
    items = Items("folder", "single-label", Path("/x"), names, labels, classes, splits)
    scales = tuple(range(32, 32 + 16 * Q, 16))
    description = Description(
        *("A", "random:A", "ab" * 32, "fc7", scales, True),
        *("floor", "bilinear", "float32", "none"),
    )
    mixing = rng.standard_normal((40, D), np.float32) / 40**0.5
    means = rng.standard_normal((K, 40), np.float32)
    with FeatureWriter.open(path, items, description, D) as file:
        for start in range(0, N, AT_ONCE):
            its = labels[start : start + AT_ONCE]
            for q in range(Q):
                latent = means[its] + 1.5 * rng.standard_normal((len(its), 40), np.float32)
                for i, x_D in enumerate(np.maximum(latent @ mixing - 0.3, 0), start):
                    file.write(i, q, x_D)
        file.finish()


def peak(*words: object) -> float:
    """MB of a process of the command."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, "svm", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return int(ran.stderr.split()[-1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--scales", type=int, default=1, help="How many.")
    parser.add_argument("--file", type=Path, default=Path("build/svm-memory.h5"))
    options = parser.parse_args()
    if not options.file.exists():
        options.file.parent.mkdir(parents=True, exist_ok=True)
        write(options.file, options.images, options.dim, options.classes, options.scales)
    words = ("--features", options.file, "--C", 0.01, "--device", "cpu", "--workers", 1)
    with tempfile.TemporaryDirectory() as folder:
        program = peak(*words, "--dry-run", "--json", Path(folder, "plan.json"))
        planned = json.loads(Path(folder, "plan.json").read_text())
    table = columns("images", "descriptors, MB", "planned, MB", "taken, MB", "program, MB")
    told = (planned["X"] / 1e6, planned["bytes"] / 1e6, peak(*words) - program, program)
    table.add_row(f"{planned['images']:,}", *(f"{value:,.0f}" for value in told))
    out.print(table)


if __name__ == "__main__":
    main()
