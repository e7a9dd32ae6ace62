"""Extraction as the number of images grows: images per second and memory must not change.

    python -m benchmarks.growth [--images 100,1000,10000,100000] [--folder DIR]

Generated photographs (JPEG, 60x40 to 72x48 pixels, each different), in folders of 1,000; a small
net (A at an eighth of the width), so that reading, waiting and writing are what is measured. Each
extraction is a process of its own, with the command's own defaults. Memory: the peak of the whole
process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from vggfeat.terminal import columns, out

EXTRACT = """
import resource, sys
from vggfeat import cli
sys.argv = ["vggfeat", *sys.argv[1:]]
try:
    cli.main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def generate(folder: Path, count: int) -> None:
    """count different photographs under folder; those that are there stay."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (64, 5, 5, 3), dtype=np.uint8)

    def write(i: int) -> None:
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        if path.exists():
            return
        own = np.random.default_rng(i)
        size = (60 + 4 * int(own.integers(4)), 40 + 4 * int(own.integers(3)))
        image = Image.fromarray(patches[i % 64]).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image, np.int16) + own.integers(-20, 21, (size[1], size[0], 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)

    for k in range((count + 999) // 1000):
        (folder / f"{k:03d}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(write, range(count), chunksize=100):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", default="100,1000,10000,100000")
    parser.add_argument("--folder", type=Path, help="Keep the generated images here.")
    parser.add_argument("--weights", default="random:A,width=0.125,crop=32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = [int(count) for count in options.images.split(",")]
    rows = []
    table = columns("images", "seconds", "images/s", "peak memory, MB", "file, MB")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "images"
        generate(folder, max(counts))
        for count in counts:
            target, told = Path(temporary) / "f.h5", Path(temporary) / "f.json"
            words = [
                "extract",
                "--dataset",
                "folder",
                "--root",
                folder,
                "--weights",
                options.weights,
                "--scales",
                "40,64",
            ]
            words += [
                "--scales",
                "40,64",
                "--limit",
                count,
                "--out",
                target,
                "--overwrite",
                "--json",
                told,
            ]
            ran = subprocess.run(
                [sys.executable, "-c", EXTRACT, *map(str, words)], capture_output=True, text=True
            )
            if ran.returncode:
                raise SystemExit(ran.stderr)
            seconds = json.loads(told.read_text())["seconds"]
            peak = int(ran.stderr.split()[-1]) / (1e3 if sys.platform != "darwin" else 1e6)
            rows.append(
                {"images": count, "seconds": seconds, "rate": count / seconds, "peak_MB": peak}
            )
            size = target.stat().st_size / 1e6
            table.add_row(
                f"{count:,}",
                f"{seconds:.1f}",
                f"{count / seconds:.0f}",
                f"{peak:.0f}",
                f"{size:.0f}",
            )
    out.print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
