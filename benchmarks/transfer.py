"""How far features carry to other data: the score of one protocol on several weights, beside raw
pixels and chance.

    python -m benchmarks.transfer --dataset digits --scales 96,128
    python -m benchmarks.transfer --dataset caltech101 --root caltech101 --scales 112,160 \
        --weights mini --weights mini:A --weights random:D,width=0.21875,crop=96

Each row is the data set's own protocol (its splits, C chosen on the validation part), the scales
stacked. Raw pixels: the image squashed to 32x32. Feature files are kept in --folder, so that a
second run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vggfeat
from vggfeat import datasets, protocols
from vggfeat.aggregate import l2_normalise
from vggfeat.classify import problem_from
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage
from vggfeat.extract import extract
from vggfeat.machine import duration
from vggfeat.problem import Problem
from vggfeat.terminal import columns, out, progress

SIDE = 32  # of raw pixels


def raw_pixels(items: datasets.Items, side: int = SIDE) -> Problem:
    """The same protocol on the pixels themselves, minus their mean, of length 1."""
    x = np.full((len(items), side * side * 3), np.nan, np.float32)
    for i in range(len(items)):
        try:
            image = Image.fromarray(read_rgb(items.source(i)))
        except UnreadableImage:
            continue
        x[i] = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32).ravel()
    readable = np.isfinite(x[:, 0])
    assert items.labels is not None
    return Problem(
        l2_normalise(x - x[readable].mean(axis=0)),
        items.labels,
        items.classes,
        items.splits,
        readable,
        items.protocol,
        items.names,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--scales", default="112,136,160")
    parser.add_argument(
        "--weights", action="append", help="SPEC or SPEC/LAYER; several, mini by default"
    )
    parser.add_argument("--no-mirror", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build/transfer"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    scales = tuple(map(int, options.scales.split(",")))
    items = datasets.load(options.dataset, options.root)
    table = columns("features", "descriptor", "C", "score, %", "extraction")
    records: list[dict[str, Any]] = []

    def row(name: str, descriptor: str, problem: Problem, seconds: float | None) -> None:
        results = protocols.run(problem).results.to_json()
        key = "mean_class_recall" if "mean_class_recall" in results else "map_allpoint"
        score = f"{100 * results[key]:.2f} +- {100 * results.get(f'{key}_std', 0):.2f}"
        table.add_row(
            name,
            descriptor,
            f"{results['C']:g}",
            score,
            "" if seconds is None else duration(seconds),
        )
        records.append({"features": name, "descriptor": descriptor, **results})

    K = len(items.classes)
    table.add_row("chance", "", "", f"{100 / K:.2f}", "")
    row("raw pixels", f"{SIDE} x {SIDE} x 3", raw_pixels(items), None)
    for given in options.weights or ["mini", "mini/pool5"]:
        # a layer's name has no slash and no dot, a path's last part has one or the other
        spec, slash, layer = given.rpartition("/")
        spec, layer = (spec, layer) if slash and "." not in layer else (given, "")
        network = vggfeat.load(spec, device="cpu")
        path = (
            options.folder
            / f"{options.dataset}-{''.join(c if c.isalnum() else '-' for c in given)}.h5"
        )
        if not path.exists():
            with progress(given) as advance:
                extract(
                    items,
                    network,
                    path,
                    scales=scales,
                    layer=layer or None,
                    mirror=not options.no_mirror,
                    workers=2,
                    progress=advance,
                )
        file = vggfeat.open_features(path)
        if file.description.fingerprint != network.fingerprint or file.description.scales != scales:
            raise SystemExit(f"{path} is of other weights or scales: delete it")
        problem, _, _ = problem_from([path], "stack")
        row(
            spec,
            f"{file.description.layer}, {problem.X.shape[1]}",
            problem,
            file.attributes.get("seconds"),
        )
    out.print(table)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
