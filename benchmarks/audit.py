"""Whether `vggfeat report` finds problems that are known, as they were planted: near duplicates and
swapped labels, in real photographs with real descriptors.

    python -m benchmarks.audit FEATURES             # of images that lie where they were described
    python -m benchmarks.audit FEATURES --seeds 5 --copies 105

Copies are made of images drawn at random, described by the file's own net, and put into train or
test at random. Beside what is found, the controls: the cosine alone that finds as many copies;
labels ranked by chance, by the nearest neighbours, and by an SVM's scores of held-out images.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from sklearn.metrics import average_precision_score

from benchmarks.intervals import interval
from vggfeat import audit
from vggfeat.aggregate import aggregate
from vggfeat.audit import Neighbours, Pair
from vggfeat.decode import read_rgb
from vggfeat.describe import describe_all, network_of
from vggfeat.features import open_features
from vggfeat.store import Features
from vggfeat.svm import LinearSVM

BLIND = 100  # the first seed that nothing was chosen by looking at
Random = np.random.Generator
Shown = dict[str, list[float]]


# --- near duplicates ------------------------------------------------------------------------------


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _resized(image: Image.Image, factor: float) -> Image.Image:
    width, height = (max(1, round(factor * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, share: float, key: Random) -> Image.Image:
    width, height = (max(1, round(share * side)) for side in image.size)
    left = int(key.integers(0, image.width - width + 1))
    top = int(key.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _bright(image: Image.Image, key: Random) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(float(key.choice([0.7, 1.3])))


KINDS: dict[str, Callable[[Image.Image, Random], Image.Image]] = {
    "JPEG of quality 30": lambda image, key: _jpeg(image, 30),
    "half the size, JPEG": lambda image, key: _jpeg(_resized(image, 0.5), 90),
    "90 % of each side": lambda image, key: _cropped(image, 0.9, key),
    "mirrored": lambda image, key: ImageOps.mirror(image),
    "brightness 0.7 or 1.3": _bright,
    "grey": lambda image, key: ImageOps.grayscale(image).convert("RGB"),
    "mirrored, 95 %, brightness, 0.7 of the size, JPEG 60": lambda image, key: _jpeg(
        _resized(_cropped(_bright(ImageOps.mirror(image), key), 0.95, key), 0.7), 60
    ),
}


def natural_groups(pairs: list[Pair], N: int) -> np.ndarray:
    """(N,) a number for each group of images that were near duplicates before any was planted."""
    group = np.arange(N)
    for rows in audit.groups_of([pair for pair in pairs if pair.duplicates and pair.second < N]):
        group[rows] = rows[0]
    return group


def duplicates(
    features: Features, X: np.ndarray, folder: Path, copies: int, seed: int, told: Shown
) -> None:
    """Plant copies, look for them, and add figures to `told`."""
    key, N = np.random.default_rng(seed), len(X)
    sources = key.choice(N, copies, replace=False)
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(copies)]
    planted = []
    for row, kind in zip(sources.tolist(), kinds, strict=True):
        original = Image.fromarray(read_rgb(folder / features.names[row]))
        planted.append(np.asarray(KINDS[kind](original, key)))
    description = features.description
    network = network_of(description, None, "cpu")
    described: list[np.ndarray] = [np.zeros(0)] * copies
    for i, result in describe_all(network, planted, description):
        assert isinstance(result, np.ndarray), result
        described[i] = result
    every = np.concatenate([X, aggregate(np.stack(described))])

    started = time.perf_counter()
    near = audit.neighbours_of(every)
    pairs = audit.compared(
        audit.candidates(every, near),
        lambda row: planted[row - N] if row >= N else read_rgb(folder / features.names[row]),
    )
    told.setdefault("seconds of the search", []).append(time.perf_counter() - started)
    group = natural_groups(pairs, N)
    group = np.concatenate([group, group[sources]])
    found = [pair for pair in pairs if pair.duplicates]
    told.setdefault("natural pairs", []).append(sum(pair.second < N for pair in found))

    def figures(name: str, taken: list[tuple[int, int]]) -> None:
        """Of pairs that have a copy in them."""
        mine = [pair for pair in taken if pair[1] >= N]
        right = sum(group[first] == group[second] for first, second in mine)
        got = {second for first, second in mine if first == sources[second - N]}
        told.setdefault(f"{name}: recall", []).append(len(got) / copies)
        told.setdefault(f"{name}: precision", []).append(right / max(len(mine), 1))
        if name == "found":
            for kind in KINDS:
                own = [N + i for i, other in enumerate(kinds) if other == kind]
                told.setdefault(f"    {kind}", []).append(len(got & {*own}) / len(own))

    figures("found", [(pair.first, pair.second) for pair in found])
    sure = [pair for pair in pairs if pair.ratio < audit.BY_DESCRIPTOR]
    figures("without pixels", [(pair.first, pair.second) for pair in sure])
    recall = told["found: recall"][-1]
    cosines = np.sort((every[N:] * X[sources]).sum(axis=1))[::-1]
    least = cosines[max(round(recall * copies) - 1, 0)]
    alone = [(int(a), int(b)) for a, b in np.argwhere(np.triu(every @ every.T, 1) >= least)]
    figures("the cosine alone, as many copies", alone)

    test = np.zeros(N, bool)
    test[features.splits.get("split0/test", features.splits.get("test", []))] = True
    tested = np.concatenate([test, key.random(copies) < 0.5])
    splits = {"train": np.flatnonzero(~tested), "test": np.flatnonzero(tested)}
    leaked = audit.leaks_of(found, audit.parts_of(splits, len(every)))[""].rows
    across = [
        i if tested[i] else int(row)
        for i, row in zip(range(N, N + copies), sources, strict=True)
        if tested[i] != tested[row]
    ]
    told.setdefault("test images with a planted twin in train that are told", []).append(
        float(np.isin(across, leaked).mean())
    )


# --- labels ---------------------------------------------------------------------------------------


def swapped(
    labels: np.ndarray, X: np.ndarray, share: float, similar: bool, key: Random
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a share is another class's, any or one of the three most similar ones, and
    which they are.
    """
    K = int(labels.max()) + 1
    means = np.stack([X[labels == k].mean(axis=0) for k in range(K)])
    products = means @ means.T
    np.fill_diagonal(products, -1)
    nearest = np.argsort(-products, axis=1)[:, :3]
    bad = key.choice(len(labels), round(share * len(labels)), replace=False)
    new = labels.copy()
    if similar:
        new[bad] = nearest[labels[bad], key.integers(3, size=len(bad))]
    else:
        new[bad] = (labels[bad] + key.integers(1, K, len(bad))) % K
    wrong = np.zeros(len(labels), bool)
    wrong[bad] = True
    return new, wrong


def labels_found(
    features: Features,
    X: np.ndarray,
    near: Neighbours,
    wrong: np.ndarray,
    y: np.ndarray,
    told: Shown,
    name: str,
) -> None:
    """Judge labels of which some are known to be wrong, and add figures to `told`."""
    K = len(features.classes)
    started = time.perf_counter()
    (doubts,) = audit.doubts(X, y, K)
    told.setdefault(f"{name}: seconds", []).append(time.perf_counter() - started)
    hits = wrong[doubts.rows[: doubts.likely]]
    margins = np.empty(len(X))
    margins[doubts.rows] = doubts.margins
    ranked: dict[str, np.ndarray] = {
        "by chance": np.random.default_rng(0).random(len(X)),
        "nearest neighbour disagrees": (y[near.rows[:, 0]] != y).astype(float),
        f"votes of {audit.NEAR} nearest": (y[near.rows] != y[:, None]).mean(axis=1),
        "leave one out": margins,
    }
    figures = {
        "likely wrong": doubts.likely,
        "precision": hits.mean() if len(hits) else np.nan,
        "recall": hits.sum() / wrong.sum() if wrong.any() else np.nan,
        "at most": doubts.at_most,
        "found, as told": doubts.found,
    }
    if wrong.any():
        for how, doubt in ranked.items():
            figures[f"average precision, {how}"] = average_precision_score(wrong, doubt)
        scored, of_svm = _svm_margins(features, X, y)
        for how, doubt in (("an SVM, held out", of_svm), ("leave one out", margins[scored])):
            figures[f"average precision on {len(scored)} images, {how}"] = average_precision_score(
                wrong[scored], doubt
            )
    for what, value in figures.items():
        told.setdefault(f"{name}: {what}", []).append(float(value))


def _svm_margins(features: Features, X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The test images of split0, and by how much an SVM that is trained on the others contradicts
    their labels.
    """
    test = features.splits["split0/test"]
    train = np.setdiff1d(np.arange(len(X)), test)
    scores = LinearSVM(C=1.0).fit(X[train], y[train]).decision_function(X[test])
    at = np.arange(len(test))
    own = scores[at, y[test]]
    scores[at, y[test]] = -np.inf
    return test, scores.max(axis=1) - own


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=105, help="of a seed; 0: labels alone")
    options = parser.parse_args()
    features = open_features(options.features)
    assert features.labels is not None and features.labels.ndim == 1, "one label an image"
    X = aggregate(features.read(features.description.scales))
    folder, near = Path(features.attributes["root"]), audit.neighbours_of(X)
    told: Shown = {}
    for share, similar in ((0.0, False), (0.01, False), (0.05, False), (0.05, True), (0.1, False)):
        name = f"{100 * share:g} % swapped{' for similar classes' if similar else ''}"
        for seed in range(options.seeds if share else 1):
            key = np.random.default_rng(BLIND + seed)
            y, wrong = swapped(features.labels, X, share, similar, key)
            labels_found(features, X, near, wrong, y, told, name)
    _print(told)
    told = {}
    for seed in range(options.seeds if options.copies else 0):
        duplicates(features, X, folder, options.copies, BLIND + seed, told)
    _print(told)


def _print(told: Shown) -> None:
    for name, values in told.items():
        form = ".3f" if max(values) <= 1 else ".1f"
        print(f"{name:75} {interval(values, form)}", flush=True)


if __name__ == "__main__":
    main()
