"""Make a file of each kind that the program keeps, by its own commands, on a few tiny images.

    python -m tests.formats.make FOLDER

`version2/` was made so. A file of a released format is never made again: it is what users have. Who
changes a format makes a folder for the new version, and leaves the old one, which must be read or
converted, or be refused in a sentence.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vggfeat.datasets import Items
from vggfeat.store import Description
from vggfeat.writer import FeatureWriter

CLASSES = ["bee", "caf\u00e9"]
COUNT, SCALES, D = 6, (32, 40), 4
RECIPE = """
width = 0.015625
crop = 32
batch_size = 4
chance_after = 0
random_layers = "glorot"
[stands_for]
36 = "256"
[[stages]]
net = "A"
train_scale = [36, 36]
learning_rate = 1e-2
iterations = 3
[[stages]]
net = "NET"
train_scale = [36, 36]
learning_rate = 1e-2
iterations = 3
"""
CPU = ["--device", "cpu", "--precision", "float32"]


def pixels(c: int, i: int) -> np.ndarray:
    """Of an image of class c."""
    noise = np.random.default_rng([c, i]).integers(0, 256, (36, 40, 3), np.uint8)
    noise[..., 2 * c] //= 4
    return noise


def begun(path: Path) -> FeatureWriter:
    """A feature file of COUNT images, new or to go on with."""
    images = np.stack([pixels(i % 2, i) for i in range(COUNT)])
    labels = np.arange(COUNT, dtype=np.int32) % 2
    names = [f"{i}.png" for i in range(COUNT)]
    items = Items(
        *("digits", "single-label", Path("/images"), names, labels, CLASSES), images=images
    )
    how = Description(
        *("A", "a.safetensors", "ab" * 32, "pool2", SCALES, True),
        *("floor", "bilinear, antialiased", "float32", "Pillow"),
    )
    return FeatureWriter.open(path, items, how, D)


def descriptor(row: int, scale: int) -> np.ndarray:
    """What stands in place of a net's: values that float32 has exactly."""
    return np.arange(D, dtype=np.float32) / 4 + row + 100 * scale


def write_rows(file: FeatureWriter, rows: range) -> None:
    """Describe some images, at all scales."""
    for row in rows:
        file.note_source(row, pixels(row % 2, row))
        for scale in range(len(SCALES)):
            file.write(row, scale, descriptor(row, scale))


def make(folder: Path) -> None:
    """All kinds, into a folder that there isn't."""
    folder.mkdir()
    for part, count in (("train", 6), ("val", 3)):
        for c, name in enumerate(CLASSES):
            Path("images", part, name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(pixels(c, 10 * count + i))
                image.save(Path("images", part, name, f"{i}.png"))
    Path("images/val/bee/9.png").touch()  # can't be read
    Path("small.toml").write_text(RECIPE)

    class Cut(Exception):  # noqa: N818 - named as what happens
        pass

    try:
        with begun(folder / "begun.h5") as file:
            write_rows(file, range(2))
            raise Cut
    except Cut:
        pass
    run(
        "pretrain.train", "--net", "A", "--recipe", "small.toml", "--data", "images", "--out", "run"
    )
    weights = "run/weights.safetensors"
    described = ["--dataset", "imagenet", "--root", "images", "--weights", weights, *CPU]
    run("vggfeat", "extract", *described, "--scales", "32,40", "--out", "features.h5")
    run(
        "vggfeat", "svm", "--features", "features.h5", "--out", "model.h5", "--json", "results.json"
    )
    data = ["--data", "images", *CPU, "--scales", "36", "--mode", "both"]
    run("pretrain.evaluate", "--weights", weights, *data, "--posteriors", "posteriors.h5")
    kept = ["--from", "posteriors.h5", "--table", "3", "--ledger", "results.md"]
    run("pretrain.evaluate", *kept)
    for name in ("features.h5", "model.h5", "results.json", "posteriors.h5", weights):
        shutil.copy(name, folder)
    for name in ("run/colours.json", "run/A-36/last.safetensors", "run/A-36/log.jsonl"):
        shutil.copy(name, folder)
    (ledger,) = Path().glob("ledger-small-*.json")
    shutil.copy(ledger, folder / "ledger.json")


def run(module: str, *words: str) -> None:
    """A command, here."""
    more = [*CPU, "--workers", "0"] if module == "pretrain.train" else []
    ran = subprocess.run([sys.executable, "-m", module, *words, *more])
    assert ran.returncode in (0, 3), words


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as room:
        os.chdir(room)
        make(target)
