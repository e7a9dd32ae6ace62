"""timm's backbones from photographs to predictions, with random weights: does all of it run, and
does `predict` say the same of photographs as of their features?

    python -m benchmarks.backbones --data flowers --out build/backbones [NAME ...]

--data is a folder a class. Of each model of timm weights of seed 0 are written as a file; `extract`
at one scale, `svm`, and `predict` of the photographs and of the feature file are run as commands.
The first figure is of test images, by the data set's protocol; the accuracies of `predict` are of
all images, which the classifier has learned from.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch

from vggfeat.features import open_features
from vggfeat.terminal import columns, out

NAMES = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "vgg11",
)


def command(*words: str | Path) -> None:
    """One of ours, whose results are in files."""
    words = (sys.executable, "-m", "vggfeat", *words)
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{ran.stderr}")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def right(rows: list[dict[str, str]]) -> float:
    """Share of the images in the folder of their class, %."""
    return 100 * float(np.mean([row["class"] in row["image"].split("/") for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/backbones"))
    parser.add_argument("--scale", default="224")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    heads = ("timm's model", "numbers", "mean class recall, %", "photographs, %", "features, %")
    table = columns(*heads, "largest difference of a score")
    for name in options.names:
        torch.manual_seed(0)
        weights = options.out / f"{name}.safetensors"
        safetensors.torch.save_file(timm.create_model(name, pretrained=False).state_dict(), weights)
        features, model, results, seen, stored = (
            options.out / f"{name}{end}"
            for end in (".h5", ".model.h5", ".json", ".csv", ".features.csv")
        )
        command(
            *("extract", "--dataset", "folder", "--root", options.data, "--no-mirror"),
            *("--weights", f"timm:{name}@{weights}", "--scales", options.scale),
            *("--out", features, "--overwrite"),
        )
        command(
            *("svm", "--features", features, "--out", model, "--json", results, "--overwrite"),
        )
        for source, rows in ((options.data, seen), (features, stored)):
            command("predict", source, "--model", model, "--out", rows, "--overwrite")
        one, other = rows_of(seen), rows_of(stored)
        assert [row["image"] for row in one] == [
            str(options.data / row["image"]) for row in other
        ], "rows are in the features' order"
        scores = [np.array([float(row["score"]) for row in rows]) for rows in (one, other)]
        told = json.loads(results.read_text())
        recall, deviation = (
            100 * told[key] for key in ("mean_class_recall", "mean_class_recall_std")
        )
        table.add_row(
            name,
            f"{open_features(features).shape[2]:,}",
            f"{recall:.1f} ± {deviation:.1f}",
            f"{right(one):.2f}",
            f"{right(other):.2f}",
            f"{np.abs(scores[0] - scores[1]).max():.1e}",
        )
    out.print(table)


if __name__ == "__main__":
    main()
