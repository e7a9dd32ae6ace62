"""Whether localisation is learned, beside constants that look at no image: the true boxes of
Caltech-101, and the same photographs placed where nobody photographs them.

    python -m benchmarks.localisation --data 101_ObjectCategories --boxes caltech101_boxes.csv \\
        --out build/localisation [--images pasted] [--splits 0,1,2] [--epochs 8]

Photographers put things in the middle, and large: on the images as they are, the mean box of a
class is right nine times of ten at IoU 0.5. So each photograph is also pasted, at a random scale
and offset, on one of another class, split by photograph before anything is pasted; its box goes
with it. The nets start from the package's mini weights (their S, crop and width); per split SCR and
PCR, FC1-2 and all layers, tested by protocol 1 of Appendix A. A figure's interval is Student's over
the splits, 95 %. What is made is kept in --out, and a second run goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.intervals import interval
from vggfeat.files import write_json
from vggfeat.tensors import metadata_of
from vggfeat.terminal import columns, out, say

CANVAS = 128  # pixels a side of a pasted image
SHARES = 0.35, 0.9  # of the canvas that the photograph's longer side takes
COPIES = {"train": 6, "val": 2}  # of each photograph, every one placed anew
TEST = 5  # one photograph of so many is for test
STAGE = "D-112"
KINDS = {
    "SCR, FC1-2": ("scr", "fc"),
    "PCR, FC1-2": ("pcr", "fc"),
    "SCR, all layers": ("scr", "all"),
    "PCR, all layers": ("pcr", "all"),
}
IMAGES = {"pasted": True, "as they are": False}
Row = dict[str, str]


def make(folder: Path, data: Path, rows: Sequence[Row], split: int, pasted: bool) -> None:
    """folder/{train,val}/CLASS/*.png and boxes.csv, of a split's photographs."""
    rng = np.random.default_rng([split, pasted])
    order = np.random.default_rng(split).permutation(len(rows))
    parts = {"val": order[: len(rows) // TEST], "train": order[len(rows) // TEST :]}
    lines = ["path,class,x1,y1,x2,y2"]
    for part, ids in parts.items():
        for i in ids:
            row = rows[i]
            corners = np.array([float(row[key]) for key in ("x1", "y1", "x2", "y2")])
            with Image.open(data / row["path"]) as file:
                photograph = file.convert("RGB")
            for copy in range(COPIES[part] if pasted else 1):
                name = f"{part}/{row['class']}/{Path(row['path']).stem}-{copy}.png"
                others = [rows[j] for j in ids if rows[j]["class"] != row["class"]]
                image, seen = photograph, corners
                if pasted:
                    under = others[rng.integers(len(others))]
                    image, seen = _pasted(photograph, corners, data / under["path"], rng)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(folder / name)
                lines.append(",".join([name, row["class"], *(f"{x:.2f}" for x in seen)]))
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")


def _pasted(
    photograph: Image.Image, corners: np.ndarray, under: Path, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    with Image.open(under) as file:
        canvas = file.convert("RGB").resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    scale = rng.uniform(*SHARES) * CANVAS / max(photograph.size)
    w, h = (max(8, round(side * scale)) for side in photograph.size)
    x, y = (int(rng.integers(CANVAS - side + 1)) for side in (w, h))
    canvas.paste(photograph.resize((w, h), Image.Resampling.BILINEAR), (x, y))
    factors = np.array([w / photograph.width, h / photograph.height] * 2)
    return canvas, corners * factors + np.array([x, y, x, y])


def command(*words: str | Path) -> None:
    """A command of ours, whose progress is seen."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def learned(
    folder: Path,
    data: Path,
    pasted: bool,
    boxes: str,
    learn: str,
    epochs: int,
    mean: str,
    workers: int,
) -> Path:
    """The weights of a net that learned from a folder; those that are there, if they are."""
    where = folder / f"{boxes}-{learn}"
    suffix = "-fc" if learn == "fc" else ""
    weights = where / f"{STAGE}-{boxes}{suffix}" / "weights.safetensors"
    if not weights.exists():
        command(
            *("pretrain.train", "--net", "D", "--recipe", "mini", "--data", data, "--out", where),
            *("--task", "localisation", "--boxes", boxes, "--annotations", data / "boxes.csv"),
            *("--from", "mini", "--stages", f"{STAGE}-{boxes}{suffix}"),
            *("--workers", str(workers)),
            *(
                "--set",
                f"{STAGE}-{boxes}.learn={learn}",
                "--set",
                f"{STAGE}-{boxes}.epochs={epochs}",
            ),
            *("--set", f"mean=[{mean}]"),
            # of 50 held-out images the plateau rule judges by noise: the rate falls by `drop_by`
            *(() if pasted else ("--set", "patience=1000000")),
        )
    return weights


def tested(weights: Path, data: Path) -> list[dict[str, Any]]:
    """The rows of protocol 1: the net's, then those of the constants."""
    target = weights.with_name("protocol1.json")
    if not target.exists():
        command(
            *("pretrain.localise", "--weights", weights, "--data", data, "--protocol", "1"),
            *("--annotations", data / "boxes.csv", "--json", target),
        )
    rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--boxes", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/localisation"))
    parser.add_argument("--splits", default="0,1,2", help="numbers; more can be added later")
    parser.add_argument("--images", choices=[*IMAGES], help="default: both kinds")
    parser.add_argument(
        "--epochs",
        type=int,
        default=8,
        help="of the pasted images; of the others six times as many",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that read images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with open(options.boxes, newline="") as file:
        rows = list(csv.DictReader(file))
    from vggfeat.sources import MINI

    mean = metadata_of(MINI["D"])["mean"]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    splits = [int(word) for word in options.splits.split(",")]
    for number, split in enumerate(splits):
        for images, pasted in IMAGES.items():
            if options.images not in (None, images):
                continue
            folder = options.out / f"split{split}-{'pasted' if pasted else 'plain'}"
            if not (folder / "images" / "boxes.csv").exists():
                make(folder / "images", options.data, rows, split, pasted)
            for kind, (boxes, learn) in KINDS.items():
                epochs = options.epochs * (1 if pasted else COPIES["train"])
                weights = learned(
                    folder, folder / "images", pasted, boxes, learn, epochs, mean, options.workers
                )
                net, *constants = tested(weights, folder / "images")
                for name, row in [(kind, net), *((c["constant"], c) for c in constants)]:
                    figures = {key: row[key] for key in ("error", "strict_error")}
                    its = found.setdefault((images, name), [])
                    if len(its) == number:
                        its.append(figures)
        say(f"split {split}: done")
    table = columns("images", "box", "right at IoU 0.5, %", "at 0.75, %", "splits")
    for (images, name), figures_ in found.items():
        right = [[100 - each[key] for each in figures_] for key in ("error", "strict_error")]
        table.add_row(images, name, *map(interval, right), str(len(figures_)))
    out.print(table)
    for (images, name), its in found.items():
        if name in KINDS:
            for key, at in (("error", 0.5), ("strict_error", 0.75)):
                rivals = {n: f for (i, n), f in found.items() if i == images and n not in KINDS}
                best = min(rivals, key=lambda n: sum(each[key] for each in rivals[n]))
                ahead = [c[key] - net[key] for net, c in zip(its, rivals[best], strict=True)]
                out.print(f"{images}, {name} at IoU {at}: {interval(ahead)} points ahead of {best}")
    if options.json:
        write_json(
            options.json, [{"images": i, "box": n, "splits": f} for (i, n), f in found.items()]
        )


if __name__ == "__main__":
    main()
