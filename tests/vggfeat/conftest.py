"""A feature file and a classifier of small images by a small net; what a command has printed; files
of weights.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.conftest import Command, Nets, Ran, ran
from vggfeat import cli, weights
from vggfeat.datasets import Items
from vggfeat.images import Preprocessing
from vggfeat.store import Description
from vggfeat.vgg import VGG
from vggfeat.writer import FeatureWriter

NET = "random:A,width=0.125,crop=32"  # fc7 has 512 dimensions
OTHER = f"{NET},seed=1"
SMALL = ("--weights", NET, "--scales", "32,48", "--precision", "float32", "--device", "cpu")

Tensors = dict[str, torch.Tensor]
# a weights file, and the net that is in it
Ours = tuple[Path, VGG]


@pytest.fixture
def command(run_main: Command) -> Command:
    """`command("svm", "--features", path)`: what it printed, and its exit status."""
    return functools.partial(run_main, cli.main)


@pytest.fixture
def extracted(command: Command, folder: Path, tmp_path: Path) -> Path:
    """The feature file of `folder`: 24 images at 32 and 48 pixels."""
    path = tmp_path / "feats.h5"
    ran = command("extract", "--dataset", "folder", "--root", folder, *SMALL, "--out", path)
    assert ran.status == 0, ran.err
    return path


@dataclass(frozen=True)
class Made:
    """What `made` has made, in a folder that its tests leave as it is, and what was printed."""

    root: Path
    extract: Ran
    svm: Ran

    @property
    def folder(self) -> Path:
        return self.root / "images"

    @property
    def features(self) -> Path:
        return self.root / "feats.h5"

    @property
    def facts(self) -> Path:
        return self.root / "extract.json"

    @property
    def model(self) -> Path:
        return self.root / "model.h5"

    @property
    def results(self) -> Path:
        return self.root / "svm.json"


@pytest.fixture(scope="module")
def made(made_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A feature file of `made_folder`'s 24 images at 32 and 48 pixels, and a model, once for all
    tests that only read them.
    """
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(made_folder, root / "images")

    images = ("--dataset", "folder", "--root", root / "images")
    files = ("--out", root / "feats.h5", "--json", root / "extract.json")
    extract = ran(cli.main, "extract", *images, *SMALL, *files)
    files = ("--out", root / "model.h5", "--json", root / "svm.json")
    svm = ran(cli.main, "svm", "--features", root / "feats.h5", "--workers", 1, *files)
    return Made(root, extract, svm)


def feature_file(
    path: Path,
    n: int,
    dim: int,
    *,
    classes: int = 4,
    scales: tuple[int, ...] = (32,),
    bad: Collection[int] = (),
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """A feature file of n images that don't exist, without a net: those of a class lie
    around one point, and there are official splits. seed: of another net.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    labels = fixed.integers(0, classes, n).astype(np.int32)
    parts = np.split(fixed.permutation(n), [7 * n // 10, 8 * n // 10])
    splits = dict(zip(("train", "val", "test"), map(np.sort, parts), strict=True))
    names = [f"{i:07d}.jpg" for i in range(n)]
    items = Items(
        *("folder", "single-label", Path("/x"), names, labels),
        *([f"c{k}" for k in range(classes)], splits),
    )
    description = Description(
        *(f"A{seed}", "random:A", "ab" * 32, "fc7", scales, True),
        *("floor", "bilinear", "float32", "Pillow"),
    )
    means = rng.standard_normal((classes, dim), np.float32)
    with FeatureWriter.open(path, items, description, dim, dtype) as file:
        for i in range(n):
            for s in range(len(scales)):
                noise = rng.standard_normal(dim, np.float32)
                file.write(i, s, np.maximum(means[labels[i]] + 2 * noise, 0))
            if i in bad:
                file.fail(i, "no picture")
        file.finish()
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file under folder with its bytes, every folder with None."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def cells(printed: str, name: str) -> list[str]:
    """What stands beside a name in the first column of a table."""
    rows = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        for line in printed.splitlines()
    ]
    return next(row[1:] for row in rows if row[0] == name)


@pytest.fixture
def trained(command: Command, extracted: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.h5"
    ran = command("svm", "--features", extracted, "--C", 1, "--workers", 1, "--out", path)
    assert ran.status == 0, ran.err
    return path


def read_predictions(path: Path) -> tuple[list[str], list[str], list[dict[str, str]], np.ndarray]:
    """Header, images, cells of the rows, and scores (N, K) of all classes, NaN where a cell is
    empty; of a CSV file.
    """
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    rows, header = list(reader), [*(reader.fieldnames or ())]
    scores = np.array([[float(row[name] or "nan") for name in header[5:]] for row in rows])
    return header, [row["image"] for row in rows], rows, scores


def unit(x: np.ndarray) -> np.ndarray:
    normed: np.ndarray = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return normed


def assert_same_scores(ours: np.ndarray, expected: np.ndarray) -> None:
    """Of descriptors that are the same but for rounding; a score is a sum in which much cancels
    out.
    """
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def scores_by_hand(model: Path, x_ND: np.ndarray) -> np.ndarray:
    with h5py.File(model, "r") as file:
        scores_NK: np.ndarray = x_ND @ file["coef"][:].T + file["intercept"][:]
    return scores_NK


@pytest.fixture
def ours(tmp_path: Path, he: Nets, plain: Preprocessing) -> Ours:
    path = tmp_path / "a.safetensors"
    module = he("A", num_classes=3, width=0.125, crop=32)
    weights.save_weights(
        path, module, plain, classes=["x", "y", "z"], train_scale="36", source="test", recipe="{}"
    )
    return path, module


def zeros(path: Path, shapes: Tensors, metadata: dict[str, str]) -> None:
    """A .safetensors file of zeros, which takes no room on the disk. shapes: name -> a tensor of
    that shape.
    """
    at, header = 0, dict[str, Any](__metadata__=metadata)
    for key, like in shapes.items():
        n = 4 * like.numel()
        header[key] = {"dtype": "F32", "shape": list(like.shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)
