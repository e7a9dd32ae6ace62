"""What fine-tuning on few images brings: against SVMs on the same net's features, and against the
same net trained on them from nothing.

    python -m benchmarks.finetune --data flowers --out build/finetune [--seeds 0,1,2,3,4] \\
        [--epochs 30,20] [--json finetune.json]

--data is a folder a class. A seed draws a split, four fifths of each class for training, and all
that is random in training. The net is the package's mini D. "fine-tuned": recipe `finetune`,
--epochs of fc8 and then of all layers; "from nothing": its numbers in one stage of as many epochs
in all, Glorot's weights and the rate of 1e-2 that the recipe mini has for them. Neither holds
images out, so that both see as many; the rate falls by `drop_by` alone. Both are tested densely
at three Q. "SVM": fc7 of mini D at these Q with mirror images, averaged, C chosen on a part of
the training images. The figure is the share of right test images; intervals are Student's over
the seeds, 95 %. What is made is kept in --out, and a second run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.intervals import interval
from pretrain.recipe import RECIPES
from vggfeat import datasets, protocols
from vggfeat.classify import problem_from
from vggfeat.datasets import Items, random_splits
from vggfeat.extract import extract
from vggfeat.files import write_json
from vggfeat.sources import load
from vggfeat.terminal import columns, out, say

SCALES = "112,136,160"
S = "[112, 160]"  # that mini D learned at
FINE_TUNED, SVM, SCRATCH = "fine-tuned", "SVM", "from nothing"
Figures = dict[str, float]


def command(*words: str | Path) -> None:
    """A command of ours, whose progress is seen."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def make(folder: Path, items: Items, seed: int) -> dict[str, np.ndarray]:
    """folder/{train,val}/CLASS, links to a split's images; the split as `protocols` has it."""
    assert items.labels is not None
    splits = random_splits(items.labels, n_train=0.8, max_test=None, n_splits=1, seed=seed)
    parts = {"split0/train": "train", "split0/val": "train", "split0/test": "val"}
    for split, part in parts.items():
        for row in splits[split]:
            link = folder / part / items.names[row]
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to((items.root / items.names[row]).resolve())
    return splits


def trained(folder: Path, *words: str | Path, seed: int) -> float:
    """Share of right test images, %, of the net that `words` train on a folder's images."""
    net = load("mini", device="cpu").vgg()
    command(
        *("pretrain.train", "--data", folder.parent / "images", "--out", folder, "--workers", "1"),
        *("--set", f"width={net.width}", "--set", f"crop={net.crop}", "--set", "held_out=0"),
        *("--set", f"*.train_scale={S}", "--seed", str(seed), *words),
    )
    target = folder / "errors.json"
    command(
        *("pretrain.evaluate", "--weights", folder / "weights.safetensors", "--overwrite"),
        *("--data", folder.parent / "images", "--scales", SCALES, "--json", target),
    )
    return 100 - float(json.loads(target.read_text())["rows"][0]["top1_error"])


def figures(folder: Path, items: Items, features: Path, seed: int, epochs: list[int]) -> Figures:
    """Shares of right test images, %, of the three ways."""
    splits = make(folder / "images", items, seed)
    lengths = (f"D-256-512-fc8.epochs={epochs[0]}", f"D-256-512.epochs={epochs[1]}")
    shares = {
        FINE_TUNED: trained(
            *(folder / "tuned", "--recipe", "finetune", "--from", "mini"),
            *("--set", lengths[0], "--set", lengths[1]),
            seed=seed,
        )
    }
    numbers = (RECIPES / "finetune.toml").read_text().partition("[[stages]]")[0]
    recipe = folder / "nothing.toml"
    recipe.write_text(
        f'{numbers}[[stages]]\nnet = "NET"\ntrain_scale = [256, 512]\n'
        f"learning_rate = 1e-2\nepochs = {sum(epochs)}\n"
    )
    shares[SCRATCH] = trained(folder / "nothing", "--recipe", recipe, "--init", "glorot", seed=seed)
    problem = problem_from([features], "average")[0]
    assert problem.names == items.names, "the rows are the features'"
    scored = protocols.run(replace(problem, splits=splits)).scored["split0"]
    right = np.argmax(scored.scores, axis=1) == problem.labels[scored.rows]
    return shares | {SVM: 100 * float(right.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/finetune"))
    parser.add_argument("--seeds", default="0,1,2,3,4", help="numbers; more can be added later")
    parser.add_argument("--epochs", default="30,20", help="of fc8 alone, and of all layers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    epochs = [int(word) for word in options.epochs.split(",")]
    items = datasets.load("folder", options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    features = options.out / "mini.h5"
    if not features.exists():
        scales = tuple(map(int, SCALES.split(",")))
        extract(items, load("mini", device="cpu"), features, scales=scales, mirror=True)
    found: list[Figures] = []
    for seed in map(int, options.seeds.split(",")):
        kept = options.out / f"seed{seed}.json"
        if not kept.exists():
            began = time.monotonic()
            its = figures(options.out / f"seed{seed}", items, features, seed, epochs)
            seconds = time.monotonic() - began
            write_json(kept, {"epochs": epochs, "seconds": seconds, "right": its})
        record = json.loads(kept.read_text())
        if record["epochs"] != epochs:
            raise SystemExit(f"{kept} is of epochs {record['epochs']}: give another --out")
        found.append(record["right"])
        say(f"seed {seed}: {', '.join(f'{k} {v:.1f} %' for k, v in record['right'].items())}")
    table = columns("mini D on the images", "right, %", "seeds")
    for way in (FINE_TUNED, SVM, SCRATCH):
        table.add_row(way, interval([its[way] for its in found]), str(len(found)))
    out.print(table)
    for other in (SVM, SCRATCH):
        ahead = interval([its[FINE_TUNED] - its[other] for its in found])
        out.print(f"{FINE_TUNED} minus {other}, points, of pairs: {ahead}")
    if options.json:
        write_json(options.json, {"epochs": epochs, "seeds": options.seeds, "right": found})


if __name__ == "__main__":
    main()
