"""The figures of kept posteriors: errors of each net and mode and of all nets fused, of each class,
and what is confused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vggfeat.metrics import error_text, tells

if TYPE_CHECKING:
    from pretrain.kept import KeptPosteriors

CONFUSIONS = 20  # pairs of classes that the JSON file lists


def report(
    kept: KeptPosteriors, modes: tuple[str, ...], scales: tuple[int, ...]
) -> tuple[dict[str, Any], list[list[str]], str]:
    """The content of the JSON file; and what is printed: a table, its head first, with a row for
    each net and mode and for all nets fused, and a line.
    """
    labelled = int((kept.labels >= 0).sum())
    counted = ["unreadable"] if kept.unreadable else []
    table = [["nets", "S", "Q", "mode", "top-1 error, %", "top-5 error, %", *counted]]
    names = told_apart([net.facts for net in kept.nets])
    figures: list[dict[str, Any]] = []
    kinds = (*modes, "both") if len(modes) == 2 else modes
    every = list(zip(names, kept.nets, strict=True))
    for named in [[one] for one in every] + ([every] if len(every) > 1 else []):
        nets = [net for _, net in named]
        for kind in kinds:
            posteriors_NK = np.mean([net.mean(kind, scales or None) for net in nets], axis=0)
            used = [",".join(map(str, scales or net.scales)) for net in nets]
            figure: dict[str, Any] = {
                "nets": [net.facts for net in nets],
                "scales": used,
                "mode": kind,
                "images": labelled,
                "unreadable": int(np.isnan(posteriors_NK).any(1).sum()),
            }
            shown = "-", "-"
            if labelled:
                top1, top5 = kept.errors(posteriors_NK)
                figure |= {"top1_error": top1, "top5_error": top5, **by_class(kept, posteriors_NK)}
                shown = error_text(top1), error_text(top5)
            figures.append(figure)
            row = [
                " + ".join(name for name, _ in named),
                " + ".join(net.facts["train_scale"] or "?" for net in nets),
                " + ".join(dict.fromkeys(used)),
                kind,
                *shown,
                *[str(figure["unreadable"]) for _ in counted],
            ]
            table.append(row)
    bad = f", {len(kept.unreadable)} of them unreadable" if kept.unreadable else ""
    bad += ", an error in each row that counts it" if bad and labelled else ""
    unreadable = {kept.names[i]: reason for i, reason in kept.unreadable.items()}
    content = {
        "rows": figures,
        "dataset": kept.dataset,
        "split": kept.split,
        "unreadable": unreadable,
    }
    line = f"{kept.dataset} {kept.split}: {len(kept.names)} images{bad}"
    return content, table, line


def told_apart(nets: Sequence[Mapping[str, str]]) -> list[str]:
    """What a row calls each net: its letter, and of nets of one letter and S what they differ in
    first.
    """
    words = {
        "pool": "max-pool {}",
        "seed": "seed {}",
        "weights": "{}",
        "fingerprint": "sha256 {:.12}",
    }
    found = []
    for net in nets:
        alike = [
            other
            for other in nets
            if (other["net"], other["train_scale"]) == (net["net"], net["train_scale"])
        ]
        told = next(
            (
                f" ({word.format(net[fact])})"
                for fact, word in words.items()
                if all(other[fact] for other in alike)
                and len({other[fact] for other in alike}) == len(alike)
            ),
            "",
        )
        found.append(net["net"] + (told if len(alike) > 1 else ""))
    return found


def by_class(kept: KeptPosteriors, posteriors_NK: np.ndarray) -> dict[str, Any]:
    """Errors of each class that occurs, and the pairs of classes that are confused most."""
    labels = kept.labels[kept.labels >= 0]
    scores = posteriors_NK[kept.labels >= 0]
    wrong = {k: kept.wrong(posteriors_NK, k) for k in (1, 5)}
    per_class = {}
    for label in np.unique(labels):
        own = labels == label
        errors = {
            f"top{k}_error": (
                100 * float(wrong[k][own].mean()) if tells(k, len(kept.classes)) else None
            )
            for k in (1, 5)
        }
        per_class[kept.classes[label]] = {"images": int(own.sum()), **errors}
    readable = ~np.isnan(scores).any(1)
    guesses = scores[readable].argmax(1)
    pairs, counts = np.unique(np.stack([labels[readable], guesses]), axis=1, return_counts=True)
    mistakes = [
        {"is": kept.classes[i], "taken_for": kept.classes[j], "images": int(n)}
        for (i, j), n in zip(pairs.T, counts, strict=True)
        if i != j
    ]
    mistakes.sort(key=lambda pair: -pair["images"])
    return {"per_class": per_class, "confusions": mistakes[:CONFUSIONS]}
