"""What a coarser precision costs: descriptors and scores of two extractions of the same images, one
in float32.

    vggfeat extract --dataset caltech101 --layer pool5 --precision float32 --out exact.h5
    vggfeat extract --dataset caltech101 --layer pool5 --precision bfloat16 --out coarse.h5
    python -m benchmarks.precision exact.h5 coarse.h5

Prints the least and the median cosine of an image's descriptors at each scale, the rate of both
extractions, and, where the images have labels, the score of the data set's protocol on both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import vggfeat
from vggfeat import protocols
from vggfeat.classify import problem_from
from vggfeat.terminal import columns, out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exact", type=Path)
    parser.add_argument("coarse", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    exact, coarse = vggfeat.open_features(options.exact), vggfeat.open_features(options.coarse)
    if exact.names != coarse.names or exact.description.scales != coarse.description.scales:
        raise SystemExit("the two files describe other images or scales")
    done = exact.readable & coarse.readable
    a, b = exact.descriptors[done].astype(np.float64), coarse.descriptors[done].astype(np.float64)
    cosine_NQ = (a * b).sum(2) / np.linalg.norm(a, axis=2) / np.linalg.norm(b, axis=2)
    table = columns("scale", "images", "least cosine", "median")
    for q, values in zip(exact.description.scales, cosine_NQ.T, strict=True):
        table.add_row(str(q), f"{len(values):,}", f"{values.min():.6f}", f"{np.median(values):.6f}")
    out.print(table)
    found = {"least_cosine": cosine_NQ.min(0).tolist(), "images": int(done.sum())}
    table = columns("precision", "images/s", "score, %")
    for features in (exact, coarse):
        name = features.description.precision + f", stored as {features.dtype}"
        rate = len(done) / features.attributes["seconds"]
        score = ""
        if features.labels is not None:
            problem, _, _ = problem_from([features.path], "average", None)
            results = protocols.run(problem).results.to_json()
            keys = [key for key in ("map_11point", "mean_class_recall") if key in results]
            found[name] = {key: results[key] for key in keys} | {"images_per_s": rate}
            spread = (
                f" +- {100 * results[f'{keys[0]}_std']:.2f}" if f"{keys[0]}_std" in results else ""
            )
            score = f"{keys[0]} {100 * results[keys[0]]:.2f}{spread}"
        table.add_row(name, f"{rate:.1f}", score)
    out.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
