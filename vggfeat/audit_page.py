"""What `audit` finds in feature files: looked for, as a section of the report, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from vggfeat import audit
from vggfeat.audit import Doubts, Leak, Odd, Pair
from vggfeat.checked import first_few
from vggfeat.datasets import Items
from vggfeat.datasets.items import class_names, known
from vggfeat.descriptors import Descriptors
from vggfeat.machine import memory
from vggfeat.page import Section, html, join, table
from vggfeat.regions import picture_of
from vggfeat.results import Results, images, in_percent
from vggfeat.store import Features

if TYPE_CHECKING:
    from vggfeat.model import Model

# On the page; all but the further doubtful labels are in the JSON.
PAIRS, DOUBTFUL, FURTHER, ODDEST = 24, 24, 12, 12


@dataclass(frozen=True)
class Audit:
    """What was found, by rows of the feature files.

    audited: how many images were looked at. pairs: near duplicates, the surest first. by_pixels:
    how many candidates were compared by pixels, by_descriptor those that couldn't be. parts, leaks:
    by split, "" the official one; accuracies: of the scored images of a split, of all and of those
    without a near duplicate in train. doubts: see `audit.doubts`. odd: see `audit.odd_ones`.
    left_out: a line for each thing that wasn't looked for, and why.
    """

    audited: int
    pairs: list[Pair]
    by_pixels: int
    by_descriptor: int
    parts: dict[str, np.ndarray]
    leaks: dict[str, Leak]
    accuracies: dict[str, tuple[float, float]]
    doubts: list[Doubts]
    odd: list[Odd]
    left_out: list[str]


def audit_features(
    features: Sequence[Features],
    results: Results | None,
    model: Model | None,
    items: Items | None,
    why_no_images: str = "",
) -> Audit:
    """Look for problems in the images, labels and splits of feature files of the same images.

    results, model: of these files, for the pooling over scales; the model's scores also tell what
    near duplicates do to the accuracy. items: where the images are, or None and why not.
    """
    first = features[0]
    left_out: list[str] = []
    described: Sequence[Any] = model.parts if model else results.made.features if results else ()
    parts = [
        replace(file.description, scales=tuple(part.scales)) if part else file.description
        for file, part in zip(features, described or [None] * len(features), strict=True)
    ]
    pool = model.pool if model else results.pool if results else "average"
    matrix = Descriptors(features, parts, pool)
    N = len(matrix)
    nothing = Audit(0, [], 0, 0, {}, {}, {}, [], [], left_out)
    if 2 * matrix.nbytes > matrix.share * memory():
        left_out.append(
            f"anything: the descriptors, {matrix.nbytes / 1e9:,.1f} GB, are too large for the"
            " memory"
        )
        return nothing
    X = matrix.held()
    used = np.logical_and.reduce([file.readable for file in features])
    used &= np.isfinite(X).all(axis=1) & X.any(axis=1)
    rows = np.flatnonzero(used)
    if len(rows) < 2:
        left_out.append("anything: fewer than two images are described")
        return nothing
    X = X if len(rows) == N else X[rows]
    labels = None if first.labels is None else first.labels[rows]
    pairs, odd, counts = _of_neighbours(X, rows, labels, features, items, left_out)
    if items is None and counts[1]:
        left_out.append(f"near duplicates by their pixels: {why_no_images}")
    split = audit.parts_of(first.splits, N)
    leaks = audit.leaks_of(pairs, split)
    found: list[Doubts] = []
    if labels is not None:
        found = audit.doubts(X, labels, len(first.classes))
        found = [replace(each, rows=rows[each.rows]) for each in found]
    if found and audit.projected(X):
        left_out.append(
            f"wrong labels by the descriptors' full length: {audit.LENGTH:,} random projections"
            " stand for it"
        )
    if not found:
        left_out.append(
            f"likely wrong labels: they need {audit.LEAST} images with labels, and two classes of"
            f" {audit.OF_CLASS} images (of several labels an image one class)"
        )
    return Audit(
        len(rows),
        pairs,
        *counts,
        split,
        leaks,
        _accuracies(first, model, leaks),
        found,
        odd,
        left_out,
    )


def _of_neighbours(
    X: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray | None,
    features: Sequence[Features],
    items: Items | None,
    left_out: list[str],
) -> tuple[list[Pair], list[Odd], tuple[int, int]]:
    """Near duplicates, images like no other, and how many pairs were compared by pixels, and how
    many could not be.
    """
    n, D = X.shape
    if n * n * D > audit.MOST_PRODUCTS:
        left_out.append(
            f"near duplicates and odd ones out: {n:,} images of {D:,} values take too long to"
            " compare with each other"
        )
        return [], [], (0, 0)
    near = audit.neighbours_of(X)
    pairs = audit.candidates(X, near, features[0].crc32[rows])
    if len(pairs) > audit.MOST_PAIRS:
        left_out.append(
            f"near duplicates among {len(pairs) - audit.MOST_PAIRS:,} of {len(pairs):,} pairs that"
            " may be, those that are least alike"
        )
        pairs = pairs[: audit.MOST_PAIRS]
    pairs = [
        replace(pair, first=int(rows[pair.first]), second=int(rows[pair.second])) for pair in pairs
    ]
    if items is not None:
        pairs = audit.compared(pairs, pixels_of(features[0], items))
    open_ones = [pair for pair in pairs if not pair.same_file]
    by_pixels = sum(pair.agreement is not None for pair in open_ones)
    odd = [replace(each, row=int(rows[each.row])) for each in audit.odd_ones(near, labels)]
    found = [pair for pair in pairs if pair.duplicates]
    return found, odd, (by_pixels, len(open_ones) - by_pixels)


def pixels_of(features: Features, items: Items) -> Callable[[int], np.ndarray | None]:
    """row -> the image (H, W, 3), or None where it isn't there. Raises UnreadableImage."""
    place = {name: i for i, name in enumerate(items.names)}

    def pixels(row: int) -> np.ndarray | None:
        i = place.get(features.names[row])
        return None if i is None else picture_of(items, i)

    return pixels


def _accuracies(
    features: Features, model: Model | None, leaks: dict[str, Leak]
) -> dict[str, tuple[float, float]]:
    """Of the splits that have near duplicates in test and train: of all scored images, and of the
    others; of one label an image.
    """
    labels = features.labels
    if model is None or labels is None or labels.ndim == 2:
        return {}
    told = {}
    for name, leak in leaks.items():
        part = model.scored.get(name or "test") or model.scored.get(name or "val")
        if part is None or not len(leak.rows):
            continue
        judged = known(labels[part.rows]) & np.isfinite(part.scores).all(axis=1)
        right = (part.scores.argmax(axis=1) == labels[part.rows])[judged]
        others = ~np.isin(part.rows[judged], leak.rows)
        if others.any():
            told[name] = float(right.mean()), float(right[others].mean())
    return told


def _labels(features: Features, row: int) -> list[str]:
    """Names of the classes of an image."""
    return class_names(features.labels, features.classes, row)


def _parts(found: Audit, pair: Pair) -> dict[str, list[str]]:
    """By split, the parts of the two images; of splits that have both."""
    both = {
        name: [str(part[pair.first]), str(part[pair.second])] for name, part in found.parts.items()
    }
    return {name: parts for name, parts in both.items() if all(parts)}


def leaks_by(found: Audit, pair: Pair) -> list[str]:
    """The splits in which one of the two is trained on, and the other tested."""
    return [
        name or "the split" for name, parts in _parts(found, pair).items() if len({*parts}) == 2
    ]


# As JSON ------------------------------------------------------------------------------------------


def record_of(found: Audit, features: Features) -> dict[str, Any]:
    """What `report --json` writes; see `docs/formats.md`."""
    names, classes = features.names, features.classes
    groups = audit.groups_of(found.pairs)
    splits: dict[str, dict[str, Any]] = {}
    for name, leak in found.leaks.items():
        own: dict[str, Any] = {
            "test": leak.tested,
            "twins_in_train": [names[row] for row in leak.rows],
        }
        if name in found.accuracies:
            own["accuracy"], own["accuracy_without"] = found.accuracies[name]
        splits[name or "official"] = own
    pairs = [
        {
            "images": [names[pair.first], names[pair.second]],
            "labels": [_labels(features, pair.first), _labels(features, pair.second)],
            "cosine": pair.cosine,
            "ratio": pair.ratio,
            "agreement": pair.agreement,
            "mirrored": pair.mirrored,
            "same_file": pair.same_file,
            "parts": {name or "official": parts for name, parts in _parts(found, pair).items()},
        }
        for pair in found.pairs
    ]
    return {
        "images": len(names),
        "audited": found.audited,
        "compared_by_pixels": found.by_pixels,
        "compared_by_descriptor": found.by_descriptor,
        "duplicates": pairs,
        "groups": [[names[row] for row in rows] for rows in groups],
        "splits": splits,
        "labels": [_doubts_record(each, kind, names, classes) for each, kind in _kinds(found)],
        "odd": [
            {
                "image": names[each.row],
                "labels": _labels(features, each.row),
                "nearness": each.nearness,
                "deviations": each.deviations,
            }
            for each in found.odd
        ],
        "left_out": found.left_out,
    }


def _kinds(found: Audit) -> list[tuple[Doubts, str]]:
    """Each record of doubts with what its labels say: a class, or that it is there, or not."""
    kinds = ["class"] if len(found.doubts) == 1 else ["present", "absent"]
    return list(zip(found.doubts, kinds, strict=False))


def _doubts_record(
    each: Doubts, kind: str, names: Sequence[str], classes: Sequence[str]
) -> dict[str, Any]:
    likely = slice(0, each.likely)
    columns = (each.rows[likely], each.classes[likely], each.better[likely], each.margins[likely])
    return {
        "says": kind,
        "judged": len(each.rows),
        "unjudged": each.unjudged,
        "threshold": each.threshold,
        "found": each.found if np.isfinite(each.threshold) else None,
        "at_most": each.at_most if np.isfinite(each.threshold) else None,
        "likely_wrong": [
            {
                "image": names[row],
                "label": classes[own],
                **({"better": classes[better]} if kind == "class" else {}),
                "margin": margin,
            }
            for row, own, better, margin in zip(*columns, strict=True)
        ],
    }


# On the page --------------------------------------------------------------------------------------


Shown = Callable[[int, str], Markup]
"""(row, caption) -> the picture of an image."""


def rows_of(found: Audit, features: Features) -> list[int]:
    """Whose pictures the section of the report shows."""
    noted: dict[int, Markup] = {}
    sections_of(found, features, lambda row, caption: noted.setdefault(row, Markup()))
    return list(noted)


def sections_of(found: Audit, features: Features, shown: Shown) -> list[Section]:
    """The section of the report."""
    body = [_duplicates(found, features, shown)] if found.audited else []
    body += [_doubtful(each, kind, features, shown) for each, kind in _kinds(found)]
    if found.odd:
        body.append(_odd(found.odd, features, shown))
    if found.left_out:
        lines = join(html("<li>{x}</li>", x=line) for line in found.left_out)
        body.append(html("<h3>Not looked for</h3><ul>{lines}</ul>", lines=lines))
    about = (
        "What may be wrong with the data, for a person to look at: nothing was changed or left out"
        " for it. A pointer on a picture shows its name; `vggfeat report --json` writes all."
    )
    return [Section("problems", "Data problems", join(body), about)]


def _duplicates(found: Audit, features: Features, shown: Shown) -> Markup:
    groups = audit.groups_of(found.pairs)
    group_of = {row: g for g, rows in enumerate(groups) for row in rows}
    other = {group_of[pair.first] for pair in found.pairs if _other_labels(features, pair)}
    compared = []
    if found.by_pixels:
        compared.append(f"{found.by_pixels:,} pairs that are near were compared by pixels")
    if found.by_descriptor:
        compared.append(
            f"{found.by_descriptor:,} pairs that are near were judged by descriptors alone, which"
            " tell the surest only, less than half of them"
        )
    several = "groups" if len(groups) > 1 else "group"
    told = (
        f"{images(sum(map(len, groups)))} in {len(groups):,} {several}, of {found.audited:,}:"
        " copies, also cropped, resized, mirrored or of another brightness, or nearly the same"
        " picture."
        if groups
        else f"None among {images(found.audited)}."
    )
    told += f" {'; '.join(compared).capitalize()}." if compared else ""
    if other:
        have = "group has" if len(other) == 1 else "groups have"
        told += f" {len(other):,} {have} different labels: not all of them can be right."
    parts = [html("<h3>Near duplicates</h3><p>{told}</p>", told=told)]
    leaks = {name: leak for name, leak in found.leaks.items() if len(leak.rows)}
    if leaks:
        rows = []
        for name, leak in leaks.items():
            scores = [in_percent(x, 1) for x in found.accuracies.get(name, ())] or ["-", "-"]
            rows.append((name or "official", f"{len(leak.rows):,} of {leak.tested:,}", *scores))
        head = ("split", "test images with one in train", "accuracy", "without them")
        parts.append(table(head, rows, numbers=(1, 2, 3)))
    order = sorted(
        found.pairs,
        key=lambda pair: (not _other_labels(features, pair), not leaks_by(found, pair), pair.ratio),
    )
    firsts: dict[int, Pair] = {}
    for pair in order:
        firsts.setdefault(group_of[pair.first], pair)
    pictures = []
    for g, pair in list(firsts.items())[:PAIRS]:
        facts = [f"2 of {len(groups[g])}"] if len(groups[g]) > 2 else []
        facts += [f"cosine {pair.cosine:.3f}"]
        facts += ["one file"] if pair.same_file else []
        facts += [f"pixels {pair.agreement:.2f}"] if pair.agreement is not None else []
        facts += ["mirrored"] if pair.mirrored else []
        if across := leaks_by(found, pair):
            facts.append(f"train and test of {first_few(across, 3)}")
        figures = [
            shown(row, f"{features.names[row]}; {', '.join(_labels(features, row)[:3])}")
            for row in (pair.first, pair.second)
        ]
        pictures.append(
            html(
                '<div class="pair"><div class="pictures">{both}</div><p class="soft">{facts}</p>'
                "</div>",
                both=join(figures),
                facts=", ".join(facts),
            )
        )
    if pictures:
        parts.append(html('<div class="pairs">{pictures}</div>', pictures=join(pictures)))
    return join([*parts, *_rest(len(groups), PAIRS, "groups, two images of each")])


def _other_labels(features: Features, pair: Pair) -> bool:
    if features.labels is None:
        return False
    one, other = features.labels[pair.first], features.labels[pair.second]
    both = known(features.labels[[pair.first, pair.second]]).all()
    return bool(both and (one * other < 0).any() if one.ndim else both and one != other)


def _rest(count: int, most: int, what: str) -> list[Markup]:
    """A line where only some are shown."""
    if count <= most:
        return []
    return [
        html('<p class="soft">The first {n} of {all} {what}.</p>', n=most, all=count, what=what)
    ]


def _doubtful(each: Doubts, kind: str, features: Features, shown: Shown) -> Markup:
    what = {"class": "", "present": ": classes said to be there", "absent": ": classes not said"}
    told = (
        f"{len(each.rows):,} labels were judged, each by a ridge regression of all other images"
        + (f"; {each.unjudged:,} of classes with few images were not" if each.unjudged else "")
        + ". "
    )
    if np.isfinite(each.threshold):
        told += (
            f"Of labels swapped on purpose {in_percent(each.found, 0)} lie beyond the threshold, as"
            f" do {each.likely:,} of these; at most about {each.at_most:,.0f} are wrong, if wrong"
            " ones look like swapped ones. Right labels of unusual pictures are among them, too."
        )
    else:
        told += (
            "None is likely wrong, or these descriptors don't tell wrong labels from those that are"
            " hard to predict."
        )
    further = int((each.margins[each.likely :] > 0).sum())
    rows = [("", range(min(each.likely, DOUBTFUL)))]
    if each.likely < DOUBTFUL and further:
        rows.append(
            (
                "The most doubtful of the others",
                range(each.likely, each.likely + min(further, FURTHER)),
            )
        )
    title = html("<h3>Likely wrong labels{x}</h3><p>{told}</p>", x=what[kind], told=told)
    lines = [title]
    for heading, places in rows:
        figures = [
            shown(int(each.rows[i]), _doubt(each, i, kind, features.classes)) for i in places
        ]
        lines += [html('<p class="soft">{x}</p>', x=heading)] if heading else []
        lines += [html('<div class="pictures">{f}</div>', f=join(figures))] if figures else []
        lines += [] if heading else _rest(each.likely, DOUBTFUL, "labels")
    return join(lines)


def _doubt(each: Doubts, i: int, kind: str, classes: Sequence[str]) -> str:
    own, better = classes[each.classes[i]], classes[each.better[i]]
    asked = {"class": f"{own}: or {better}?", "present": f"no {own}?", "absent": f"also {own}?"}
    return f"{asked[kind]} {each.margins[i]:+.2f}"


def _odd(odd: Sequence[Odd], features: Features, shown: Shown) -> Markup:
    figures = [
        shown(
            each.row,
            f"{', '.join(_labels(features, each.row)[:3])}: cosine {each.nearness:.2f},"
            f" {each.deviations:.1f} deviations",
        )
        for each in odd[:ODDEST]
    ]
    told = (
        f"{images(len(odd))} with no other near, as it is usual in the class. Beside each the mean"
        f" cosine of its {audit.CLOSEST} nearest, and how far that is from the class's usual one:"
        f" more than {audit.ODD:g} deviations (robust ones, of the logarithm of the distance)."
    )
    drawn = html('<div class="pictures">{figures}</div>', figures=join(figures))
    title = html("<h3>Odd ones out</h3><p>{told}</p>", told=told)
    return join([title, drawn, *_rest(len(odd), ODDEST, "images")])
