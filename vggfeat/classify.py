"""Feature files -> a classification problem: what `vggfeat svm` reads before a protocol runs.

N images, Q scales, D descriptor length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TypedDict

import numpy as np

from vggfeat.checked import fitted, parse_json
from vggfeat.datasets.folder import class_splits
from vggfeat.datasets.items import known, name_digest
from vggfeat.datasets.protocol import pool_of
from vggfeat.descriptors import Descriptors
from vggfeat.errors import VggfeatError
from vggfeat.features import open_features
from vggfeat.matrix import Matrix, row_blocks
from vggfeat.problem import Problem
from vggfeat.results import Made, Part
from vggfeat.store import Description, Features
from vggfeat.versions import versions

# of a descriptor's length: far above what rounding, to bfloat16 too, makes of one image
SAME = 0.02


def problem_from(
    paths: Sequence[str | Path],
    pool: str | None = None,
    scales: tuple[int, ...] | None = None,
    *,
    layers: Sequence[str] = (),
    read: bool = True,
    say: Callable[[str], None] = lambda line: None,
    processes: int = 1,
) -> tuple[Problem, tuple[Description, ...], Made]:
    """The problem of one or several feature files, the descriptions behind it, and what the results
    say of them.

    Several files (nets, layers) of the same images are stacked; an image that is unreadable in one
    is left out of all. pool: over the scales; None: as the protocol has it. scales: a subset of the
    stored ones. layers: the one that is read of all files, or one for each. read: False leaves the
    descriptors in the files, and doesn't know which images are the same. say: called with a line
    where they stay there since they don't fit into memory, of which each of so many processes of
    this machine has its part.

    Raises VggfeatError: see `open_features`, `refuse_other_rows`; descriptors that are the same
    twice; no labels.
    """
    files = _opened(paths, layers)
    first = files[0]
    refuse_other_rows(files)
    if first.labels is None:
        raise VggfeatError(
            f"{first.path} has no labels (an unlabelled dataset): there is nothing to learn"
        )
    parts = tuple(_with_scales(file, scales) for file in files)
    _refuse_repeats(files, parts)
    protocol = str(first.attributes["protocol"])
    pool, pool_by = (pool, "as asked") if pool else pool_of(protocol)
    descriptors = Descriptors(files, parts, pool, processes)
    X: Matrix = descriptors
    if read and descriptors.fits:
        X = descriptors.held()
    elif read:
        say(
            f"the descriptors, {descriptors.nbytes / 1e9:,.1f} GB as float32, would take over"
            f" {100 * descriptors.share:.3g} % of the memory: they are read from the files at each"
            " pass"
        )
    readable = np.logical_and.reduce([file.readable for file in files])
    problem = Problem(
        X=X,
        labels=first.labels,
        classes=first.classes,
        splits=first.splits,
        readable=readable,
        protocol=protocol,
        names=first.names,
        total=first.attributes.get("total"),
        seen=np.logical_or.reduce([trained_the_net(file) for file in files]),
        same=_first_of_same(first, X, readable) if read else None,
        dataset=first.attributes["dataset"],
    )
    features = [
        Part(
            file=str(file.path),
            net=part.net,
            weights=part.weights,
            fingerprint=part.fingerprint,
            layer=part.layer,
            mirror=part.mirror,
            scales=list(part.scales),
            regions=list(part.regions) if part.of_boxes else [],
            rows=file.rows_digest,
        )
        for file, part in zip(files, parts, strict=True)
    ]
    return problem, parts, Made(features, pool, pool_by, versions())


def _opened(paths: Sequence[str | Path], layers: Sequence[str]) -> list[Features]:
    """Raises VggfeatError where the layers are neither one nor as many as the files."""
    if len(layers) not in (0, 1, len(paths)):
        raise VggfeatError(
            f"{len(layers)} layers of {len(paths)} feature files: give `layer` one, or one a file"
            " (a file whose layers are to be stacked is given once for each)"
        )
    chosen: list[str | None] = [*layers] if layers else [None]
    chosen *= len(paths) // len(chosen)
    return [open_features(path, layer) for path, layer in zip(paths, chosen, strict=True)]


def _first_of_same(file: Features, X: Matrix, readable: np.ndarray) -> np.ndarray:
    """(N,) the first row of the same image (and box): by the checksum of its file, and its
    descriptor.

    Of a million images some hundred pairs have one CRC-32 by chance; of these none has one
    descriptor, too. One file's descriptors differ a little by what else was in the batch.
    """
    same = np.arange(X.shape[0])
    rows = np.flatnonzero(readable & (file.crc32 != 0))
    keys = file.crc32[rows, None].astype(np.int64)
    if file.boxes is not None:
        keys = np.hstack([keys, file.boxes[rows]])
    _, first, group, counts = np.unique(
        keys, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    group = group.reshape(-1)
    # candidates, those of one key one after the other: each row is read once
    rows, start = rows[counts[group] > 1], first[group][counts[group] > 1]
    order = np.argsort(start, kind="stable")
    rows, start = rows[order], start[order]
    firsts: list[tuple[int, np.ndarray]] = []
    for part in row_blocks(len(rows), X.shape[1]):
        for at, x_D in enumerate(X[rows[part]].astype(np.float64), part.start):
            if at == 0 or start[at] != start[at - 1]:
                firsts = []
            near = SAME * np.linalg.norm(x_D)
            found = (j for j, y_D in firsts if np.linalg.norm(x_D - y_D) <= near)
            same[rows[at]] = j = next(found, rows[at])
            if j == rows[at]:
                firsts.append((j, x_D.copy()))  # not all of its block
    return same


def _with_scales(file: Features, scales: tuple[int, ...] | None) -> Description:
    return file.description if scales is None else replace(file.description, scales=scales)


def _refuse_repeats(files: Sequence[Features], parts: Sequence[Description]) -> None:
    """Raise VggfeatError where two descriptions are the same: stacked twice, a descriptor is no
    fusion.
    """
    # where the weights lie, and how they are rounded, makes no other descriptor
    keys = [
        replace(part, weights="", precision="", scales=tuple(sorted(part.scales))) for part in parts
    ]
    for (a, one), (b, other) in combinations(zip(files, keys, strict=True), 2):
        if one == other:
            raise VggfeatError(
                f"{a.path} and {b.path} can't be fused: both hold {one.layer} of net {one.net} "
                f"({one.fingerprint[:12]}) at the same scales; leave one out"
            )


def refuse_other_rows(files: Sequence[Features]) -> None:
    """Raise VggfeatError unless all files are of the same images, with the same labels and
    splits.
    """
    for a, b in combinations(files, 2):
        _refuse_others(a, b)


def _refuse_others(a: Features, b: Features) -> None:
    what = f"{a.path} and {b.path} can't be fused:"
    if a.attributes["dataset"] != b.attributes["dataset"]:
        raise VggfeatError(
            f"{what} one is of {a.attributes['dataset']}, the other of {b.attributes['dataset']}"
        )
    if len(a.names) != len(b.names):
        raise VggfeatError(f"{what} they have {len(a.names)} and {len(b.names)} images")
    for i, (name, other) in enumerate(zip(a.names, b.names, strict=True)):
        if name != other:
            raise VggfeatError(
                f"{what} row {i} is {name!r} in the first and {other!r} in the second"
            )
    if a.classes != b.classes or not np.array_equal(
        a.labels if a.labels is not None else [], b.labels if b.labels is not None else []
    ):
        raise VggfeatError(f"{what} their labels differ")
    if a.splits.keys() != b.splits.keys() or any(
        not np.array_equal(a.splits[k], b.splits[k]) for k in a.splits
    ):
        raise VggfeatError(f"{what} their splits differ")
    both = (a.crc32 != 0) & (b.crc32 != 0)
    if len(changed := np.flatnonzero(both & (a.crc32 != b.crc32))):
        more = f", and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        raise VggfeatError(f"{what} {a.names[changed[0]]} is another image in the second{more}")


class _Stage(TypedDict):
    training_set: str


def trained_the_net(features: Features) -> np.ndarray:
    """(N,) bool: the images that trained the net, as far as the weights' history tells; see
    `pretrain.train`.

    A stage of it has a digest of the names that it learned from: in a folder of classes, its
    split0's train and val; below train/, all. Those that couldn't be read are not among them, where
    the stage had met them before.
    """
    stages: list[_Stage] = []
    metadata = features.attributes.get("weights_metadata")
    with suppress(VggfeatError):  # what others write there tells nothing
        history = metadata.get("history") if isinstance(metadata, dict) else None
        stages = fitted(parse_json(str(history or "[]"), "history"), list[_Stage], "history")
    learned = {stage["training_set"] for stage in stages}
    seen = np.zeros(len(features.names), bool)
    if (
        not learned
        or features.labels is None
        or features.labels.ndim == 2
        or not known(features.labels).any()
    ):
        return seen
    drawn = class_splits(features.labels)
    every = np.arange(len(seen))
    below = f"{Path(str(features.attributes['root'])).name}/"
    for rows, folder in (
        (np.union1d(drawn["split0/train"], drawn["split0/val"]), ""),
        (features.splits.get("train", every[:0]), ""),
        (every, below),
    ):
        for these in (rows, rows[features.readable[rows]]):
            if name_digest([folder + features.names[i] for i in these.tolist()]) in learned:
                seen[these] = True
    return seen
