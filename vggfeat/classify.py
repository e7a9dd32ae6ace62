"""Feature files -> a classification problem: what `vggfeat svm` reads before a protocol runs.

N images, Q scales, D descriptor length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vggfeat.aggregate import aggregate, fuse
from vggfeat.errors import VggfeatError
from vggfeat.extract import versions
from vggfeat.protocols import Problem, pool_of
from vggfeat.store import Description, Features, open_features


def problem_from(
    paths: Sequence[str | Path], pool: str | None = None, scales: tuple[int, ...] | None = None
) -> tuple[Problem, tuple[Description, ...], dict[str, Any]]:
    """The problem of one or several feature files, the descriptions behind it, and the facts for results.json.

    Several files (nets, layers) of the same images are stacked; an image that is unreadable in one is left out
    of all. pool: over the scales; None: as the protocol has it. scales: a subset of the stored ones.
    Raises VggfeatError: see `open_features`; files whose images, labels or splits differ; no labels.
    """
    files = [open_features(path) for path in paths]
    first = files[0]
    for other in files[1:]:
        _refuse_other_items(first, other)
    if first.labels is None:
        raise VggfeatError(f"{first.path} has no labels (an unlabelled dataset): there is nothing to learn")
    parts = tuple(_with_scales(file, scales) for file in files)
    protocol = str(first.attributes["protocol"])
    pool, pool_by = (pool, "as asked") if pool else pool_of(protocol)
    problem = Problem(
        X=fuse([aggregate(file.read(part.scales), pool) for file, part in zip(files, parts, strict=True)]),
        labels=first.labels,
        classes=first.classes,
        splits=first.splits,
        readable=np.logical_and.reduce([file.readable for file in files]),
        protocol=protocol,
        names=first.names,
    )
    about = {
        "dataset": first.attributes["dataset"],
        "features": [
            {
                "file": str(file.path),
                "net": part.net,
                "weights": part.weights,
                "fingerprint": part.fingerprint,
                "layer": part.layer,
                "mirror": part.mirror,
                "scales": list(part.scales),
            }
            for file, part in zip(files, parts, strict=True)
        ],
        "pool": pool,
        "pool_by": pool_by,
        "scales": list(parts[0].scales),
        "versions": versions(),
    }
    return problem, parts, about


def _with_scales(file: Features, scales: tuple[int, ...] | None) -> Description:
    return file.description if scales is None else replace(file.description, scales=scales)


def _refuse_other_items(a: Features, b: Features) -> None:
    what = f"{a.path} and {b.path} can't be fused:"
    if a.attributes["dataset"] != b.attributes["dataset"]:
        raise VggfeatError(
            f"{what} one is of {a.attributes['dataset']}, the other of {b.attributes['dataset']}"
        )
    if len(a.names) != len(b.names):
        raise VggfeatError(f"{what} they have {len(a.names)} and {len(b.names)} images")
    for i, (name, other) in enumerate(zip(a.names, b.names, strict=True)):
        if name != other:
            raise VggfeatError(f"{what} row {i} is {name!r} in the first and {other!r} in the second")
    if a.classes != b.classes or not np.array_equal(
        a.labels if a.labels is not None else [], b.labels if b.labels is not None else []
    ):
        raise VggfeatError(f"{what} their labels differ")
    if a.splits.keys() != b.splits.keys() or any(
        not np.array_equal(a.splits[k], b.splits[k]) for k in a.splits
    ):
        raise VggfeatError(f"{what} their splits differ")
