"""Make a file of each kind that the program keeps, by its own commands, on a few tiny images.

    python -m tests.formats.make FOLDER         # what lies in version2
    python -m tests.formats.make FOLDER more    # what lies in version2/more, made later
    python -m tests.formats.make FOLDER centre  # what lies in version2/centre, made after that
    python -m tests.formats.make FOLDER sets    # the sets of shards in version1
    python -m tests.formats.make FOLDER index   # what lies in version2/index

A file of a released format is never made again: it is what users have. Who changes a format makes a
folder for the new version, and leaves the old one, which must be read or converted, or be refused
in a sentence. Who finds a case that no file has adds a file, as `make_more` did.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vggfeat import index
from vggfeat.datasets import Items
from vggfeat.features import open_features
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


def begun(path: Path, facts: dict[str, Any] | None = None) -> FeatureWriter:
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
    return FeatureWriter.open(path, items, how, D, facts=facts)


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

    cut(folder / "begun.h5")
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


def cut(path: Path, facts: dict[str, Any] | None = None) -> None:
    """A feature file of which two images are described."""

    class Cut(Exception):  # noqa: N818 - named as what happens
        pass

    try:
        with begun(path, facts) as file:
            write_rows(file, range(2))
            raise Cut
    except Cut:
        pass


def run(module: str, *words: str) -> None:
    """A command, here."""
    more = [*CPU, "--workers", "0"] if module == "pretrain.train" else []
    ran = subprocess.run([sys.executable, "-m", module, *words, *more])
    assert ran.returncode in (0, 3), words


# --- made later -----------------------------------------------------------------------------------

STOPPED = "run-b"  # the run that was interrupted
TRAINING = (
    *("--net", "B", "--recipe", "recipe.toml", "--data", "images", "--out", STOPPED),
    *(*CPU, "--workers", "0", "--log-every", "1"),
)
MADE_WITH = {"vggfeat": "0.1.0", "torch": "2.14.1+cu130", "timm": "1.0.31", "PIL": "13.0.0"}
# A user's own, with every number that there is
OWN = """
width = 0.0078125
crop = 32
batch_size = 4
momentum = 0.8
weight_decay = 1e-3
caffe_biases = true
dropout = 0.25
random_layers = "glorot"
init_std = 0.02
rate_divisor = 5.0
rate_drops = 2
patience = 9
drop_by = [0.5, 0.75]
held_out = 0.2
flip = false
colour_std = 0.05
chance_after = 0
seed = 7

[stands_for]
36 = "256"

[[stages]]
net = "A"
train_scale = [36, 36]
learning_rate = 1e-2
epochs = 1.5

[[stages]]
net = "NET"
train_scale = [36, 40]
learning_rate = 1e-3
iterations = 9
learn = "all"
nets = ["A", "B", "D"]
"""
# in the midst of B's sixth iteration, in its second epoch; the next one ends with a checkpoint
STOP = """
import os, signal, time
from pretrain import train, trainer
from vggfeat import terminal
step = trainer.Trainer.step
def stopped(self, batch, images):
    if (self.stage.name, self.state.iteration) == ("B-36-40", 5):
        os.kill(os.getpid(), signal.SIGTERM)
        while not self.stop.signal:
            time.sleep(0.01)
    return step(self, batch, images)
trainer.Trainer.step = stopped
terminal.run(train.app, "pretrain.train")
"""


def draw(folder: Path, parts: dict[str, int], classes: Sequence[str] = ("ant", "bee")) -> None:
    """So many images a class in each part, the same bytes everywhere: no library writes them."""
    for part, count in parts.items():
        for c, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                grey = [(7 * x * (c + 1) + 13 * i + len(part)) % 256 for x in range(36 * 40)]
                rows = b"".join(bytes((v, 255 - v, v // 2 + 90 * c)) for v in grey)
                (folder / part / name / f"{i}.ppm").write_bytes(b"P6 40 36 255\n" + rows)


def make_sets(folder: Path) -> None:
    """Sets of shards: of images in a folder, and of two tars, into a folder that there isn't."""
    folder.mkdir()
    draw(Path("images"), {"train": 6, "val": 2})
    Path("images/train/ant/6.ppm").touch()  # can't be read
    for part in ("train", "val"):
        with tarfile.open(f"{part}.tar", "w") as tar:
            for path in sorted(Path("images", part).rglob("*.ppm")):
                told = tarfile.TarInfo(f"{path.parent.name}{path.stem}.cls")
                told.size = len(path.parent.name)
                tar.add(path, f"{path.parent.name}{path.name}")
                tar.addfile(told, io.BytesIO(path.parent.name.encode()))
    described = ["--weights", "random:A,width=0.015625,crop=32", *CPU, "--scales", "32,40"]
    rows = ["--shard-rows", "8", "--store", "float16"]
    for dataset, root, more in (("imagenet", "images", rows), ("webdataset", "*.tar", [])):
        words = ["--dataset", dataset, "--root", root, "--out", f"{dataset}.set/"]
        run("vggfeat", "extract", *words, *described, *more)
        shutil.copytree(f"{dataset}.set", folder / f"{dataset}.set")


def make_more(folder: Path) -> None:
    """What `make` has none of, into a folder that there isn't: a recipe of one's own, a run that
    was interrupted, features without labels, with random splits and with several labels an image;
    results and models of these, and of two layers together.
    """
    folder.mkdir()
    cut(folder / "begun.h5", {"versions": MADE_WITH, "command": "vggfeat extract"})
    Path("recipe.toml").write_text(OWN)
    draw(Path("images"), {"train": 10, "val": 2})
    stopped = subprocess.run([sys.executable, "-c", STOP, *TRAINING])
    assert stopped.returncode == 128 + signal.SIGTERM
    weights = f"{STOPPED}/A-36/weights.safetensors"
    described = ["--weights", weights, "--scales", "32", *CPU]

    def extract(dataset: str, root: str, out: str, *more: str) -> None:
        run(
            "vggfeat",
            "extract",
            "--dataset",
            dataset,
            "--root",
            root,
            "--out",
            out,
            *described,
            *more,
        )

    names = [f"images/train/{name}/{i}.ppm" for name in ("ant", "bee") for i in range(10)]
    labels = ["ant", "ant;bee", "bee", "ant;?bee", ";"]
    parts = ["train", "val", "test"]
    lines = [f"{n},{labels[i % 5]},{parts[i % 3]}" for i, n in enumerate(names)]
    Path("several.csv").write_text("\n".join(["path,labels,split", *lines]) + "\n")
    shutil.copytree("images/train/ant", "flat")
    extract("folder", "images/train", "splits.h5")
    extract("folder", "flat", "unlabelled.h5")
    extract("csv", "several.csv", "several.h5")
    extract("csv", "several.csv", "several-fc6.h5", "--layer", "fc6")
    for name, more in (("splits", []), ("several", ["--features", "several-fc6.h5"])):
        words = ["--features", f"{name}.h5", *more, "--device", "cpu"]
        run("vggfeat", "svm", *words, "--out", f"{name}-model.h5", "--json", f"{name}.json")
        for made in (f"{name}.h5", f"{name}-model.h5", f"{name}.json"):
            shutil.copy(made, folder)
    for made in ("unlabelled.h5", "recipe.toml"):
        shutil.copy(made, folder)
    for path in Path(STOPPED).rglob("*.*"):
        if path.suffix in (".json", ".jsonl", ".safetensors"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path)


def make_centre(folder: Path) -> None:
    """Kept posteriors of central crops, into a folder that there isn't."""
    folder.mkdir()
    draw(Path("images"), {"val": 3}, CLASSES)
    shutil.copy(Path(__file__).parent / "version2" / "weights.safetensors", ".")
    words = ["--weights", "weights.safetensors", "--data", "images", *CPU, "--mode", "centre"]
    run("pretrain.evaluate", *words, "--posteriors", str(folder / "posteriors.h5"))


def make_index(folder: Path) -> None:
    """An index with lists, of made descriptors, into a folder that there isn't."""
    folder.mkdir()
    index.LISTED_FROM, index.TRIED = 100, 40
    values = np.random.default_rng(0).integers(0, 64, (300, len(SCALES), 8)) / np.float32(8)
    labels = np.arange(300, dtype=np.int32) % 2
    names = [f"caf\u00e9/{i}.png" for i in range(300)]
    items = Items("folder", "single-label", Path("/images"), names, labels, CLASSES)
    how = Description(
        *("A", "a.safetensors", "ab" * 32, "pool2", SCALES, True),
        *("floor", "bilinear, antialiased", "float32", "Pillow"),
    )
    with FeatureWriter.open(Path("f.h5"), items, how, 8) as file:
        for row, value_QD in enumerate(values):
            if row == 9:
                file.fail(row, "empty file (0 bytes)")
                continue
            for scale, value_D in enumerate(value_QD):
                file.write(row, scale, value_D)
        file.finish()
    source = index.index_of(open_features("f.h5"), pool="max")
    index.build_index(folder / "small.index", source, command="vggfeat index")


if __name__ == "__main__":
    makers = {"index": make_index, "more": make_more, "centre": make_centre, "sets": make_sets}
    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as room:
        os.chdir(room)
        makers.get("".join(sys.argv[2:]), make)(target)
