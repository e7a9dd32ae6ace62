"""Whether the evidence for a class lies on the object: the pointing game on Caltech-101's boxes.

    python -m benchmarks.evidence --features c256.h5 --root DIR --boxes caltech101_boxes.csv

An SVM is trained on the training images of each split (at `--C`), and the evidence for the label is
taken of its test images that have a box. Of each: the share of the positive evidence inside the
box, and whether the strongest place lies inside ("pointing"). Beside it what says nothing of the
class, on the same images: the box's share of the image (evidence spread evenly), the evidence for
another class that is drawn at random, the map's own strength (the evidence that the descriptor is
itself), and, of pointing, the middle of the image. Means over images; 95 % intervals (Student's t)
over the splits. Also the largest difference between the sums and the scores.

CSV: path,class,x1,y1,x2,y2 in pixels, paths under DIR/101_ObjectCategories.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.intervals import interval
from vggfeat import LinearSVM
from vggfeat.classify import problem_from
from vggfeat.explain import Evidence, Explainer
from vggfeat.model import Model
from vggfeat.terminal import columns, err, out, progress
from vggfeat.weights import Network

FOLDER, ITSELF = "101_ObjectCategories", "the descriptor itself"
Box = tuple[int, int, int, int]
NAMES = {
    "label": "evidence for the label",
    "other": "evidence for another class",
    "map": "the map's strength",
    "even": "spread evenly",
    "middle": "the middle",
}


def boxes_of(path: Path) -> dict[str, Box]:
    """By the path of the image."""
    with open(path, newline="") as file:
        return {
            row["path"]: tuple(int(row[key]) for key in ("x1", "y1", "x2", "y2"))  # type: ignore[misc]
            for row in csv.DictReader(file)
        }


def inside(density_HW: np.ndarray, box: Box) -> tuple[float, float]:
    """The share of what is positive in a box, and 1 where the strongest place is in it; of several
    equal ones, as the pixels of a position are, the share of them that is.
    """
    left, top, right, bottom = box
    positive = np.maximum(density_HW, 0)
    strongest = np.isclose(density_HW, density_HW.max(), 1e-9, 0)
    part = np.s_[max(top, 0) : bottom, max(left, 0) : right]
    share = positive[part].sum() / positive.sum() if positive.any() else 0.0
    return float(share), float(strongest[part].sum() / strongest.sum())


def figures(of_image: Evidence, box: Box) -> dict[str, tuple[float, float]]:
    """By what is looked at: (share inside, pointing). of_image: for the label, another class, and
    the descriptor itself.
    """
    H, W = of_image.pixels_HWC.shape[:2]
    middle = np.zeros((H, W))
    middle[H // 2, W // 2] = 1
    densities = {
        **{key: of_image.on_pixels(k) for k, key in enumerate(("label", "other", "map"))},
        "even": np.ones((H, W)),
        "middle": middle,
    }
    return {key: inside(density, box) for key, density in densities.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", nargs="+", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--boxes", type=Path, required=True)
    parser.add_argument("--pool", default=None)
    parser.add_argument("--C", type=float, default=8.0)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="of the test images, each so-many-th")
    given = parser.parse_args(arguments)
    boxes = boxes_of(given.boxes)
    problem, parts, made = problem_from(given.features, given.pool, None, say=err.print)
    X, labels = problem.X, problem.labels
    rng = np.random.default_rng(0)
    networks: list[Network] | None = None
    by_split: list[np.ndarray] = []  # (keys, 2), means
    apart, images, right = 0.0, 0, 0
    for split in range(given.splits):
        train, test = (problem.splits[f"split{split}/{part}"] for part in ("train", "test"))
        svm = LinearSVM(C=given.C).fit(X[train], labels[train])
        model = Model(
            problem.classes, svm.coef_, svm.intercept_, parts, str(made.pool), False, None
        )
        if networks is not None:
            model.__dict__["networks"] = networks  # loaded once
        networks = model.networks
        explainer = Explainer(model)
        explainer.classes = [*problem.classes, ITSELF]
        rows = [row for row in test if problem.names[row] in boxes][:: given.every]
        scores_NK = svm.decision_function(X[rows])
        each = []
        with progress(f"split {split}") as show:
            for i, (row, scores_K) in enumerate(zip(rows, scores_NK, strict=True)):
                show(i, len(rows))
                label, name = int(labels[row]), problem.names[row]
                other = int(rng.choice(np.delete(np.arange(len(scores_K)), label)))
                explainer.coef_KD = np.concatenate([svm.coef_, X[row][None]])
                explainer.intercept_K = np.append(svm.intercept_, 0.0)
                chosen = [explainer.classes[k] for k in (label, other, -1)]
                of_image = explainer(given.root / FOLDER / name, chosen, name=name)
                summed = of_image.sums_K + of_image.constants_K
                apart = max(apart, float(np.abs(summed[:2] - scores_K[[label, other]]).max()))
                right += int(scores_K.argmax()) == label
                each.append(list(figures(of_image, boxes[name]).values()))
        images += len(each)
        by_split.append(100 * np.mean(each, axis=0))
    table = columns(
        "", "inside the box, %", "label's minus this", "pointing, %", "label's minus this"
    )
    values = np.array(by_split)  # (splits, keys, 2)
    for k, words in enumerate(NAMES.values()):
        cells = []
        for what in range(2):
            less = values[:, 0, what] - values[:, k, what]
            cells += [interval(values[:, k, what]), interval(less) if k else ""]
        if words == NAMES["middle"]:
            cells[:2] = "", ""
        if words == NAMES["even"]:
            cells[2:] = "", ""
        table.add_row(words, *cells)
    out.print(table)
    out.print(
        f"{images:,} test images of {given.splits} splits, {100 * right / images:.1f} % of them"
        f" classified right; sums differ from scores by at most {apart:.1g}"
    )


if __name__ == "__main__":
    main()
