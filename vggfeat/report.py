"""What people would rather look at than read: one page of a classifier's figures, curves, mistakes
and descriptors.

N images, K classes. Everything is optional: figures come from the results, curves and mistakes need
the model's scores and the feature file's labels, thumbnails need the images, the map needs the
descriptors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from threadpoolctl import threadpool_limits

from vggfeat import datasets, metrics
from vggfeat.aggregate import aggregate, fuse
from vggfeat.checked import fitted, parse_json, read_text
from vggfeat.classify import refuse_other_rows
from vggfeat.datasets.items import known
from vggfeat.datasets.protocol import pool_of, protocol_of
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError, WrongUsage
from vggfeat.metrics import CLASS_FIGURES, FIGURES
from vggfeat.model import Model
from vggfeat.page import (
    Section,
    Series,
    bars,
    chart,
    html,
    join,
    matrix_picture,
    page,
    picture,
    scatter,
    table,
    thumbnail,
)
from vggfeat.protocols import Results, Scored, scored_part, seen_by_net, trained_on
from vggfeat.store import Features

MANY = 40  # classes; of more, the best and the worst are shown
PICTURES = 800  # thumbnails of a page, about 3 kB each
MAPPED = 1500  # descriptors on the map
TABLE_CLASSES = 20  # of a confusion matrix with numbers in it


def summary(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the figures in results.json, as a person reads them."""
    figures, scored_on = scored_part(results)
    rows = []
    for key, name in FIGURES.items():
        if figures.get(key) is not None:
            std = figures.get(f"{key}_std")
            shown = percent(figures[key]) + ("" if std is None else f" +- {100 * std:.2f}")
            rows.append((f"{name} on {_part(results)}{over_classes(results, key)}", shown))
    if "other_images" in results:
        rows.append(("images", "; ".join(results["other_images"])))
    rows += [("the same images", line) for line in results.get("same_images", ())]
    if seen := seen_by_net(results)[0]:
        rows.append(("the net was trained on", seen))
    rows += [("scored on", scored_on), ("trained on", trained_on(results))]
    splits = results.get("per_split", [])
    median = ", the median of the splits'" if len({split.get("C") for split in splits}) > 1 else ""
    rows.append(("C", f"{_number(results.get('C'))}{median}"))
    for i, split in enumerate(splits):
        score = split.get("mean_class_recall", split.get("map_allpoint"))
        rows.append((f"split {i}", f"{percent(score)}, C {_number(split.get('C'))}"))
    if "class_weight" in results:
        rows.append(("class weights", results["class_weight"]))
    if "pool" in results and any(len(part["scales"]) > 1 for part in results.get("features", [])):
        by = f" ({results['pool_by']})" if "pool_by" in results else ""
        rows.append(("pool over scales", f"{results['pool']}{by}"))
    if "difficult" in results:
        rows.append(("difficult objects", f"{results['difficult']}, in training and in scoring"))
    if results.get("n_unreadable"):
        rows.append(("unreadable images", f"{results['n_unreadable']:,}, left out"))
    per_class = figures.get("per_class") or {}
    rows += [
        (name, _several(names))
        for name, names in (
            (
                "classes without score",
                [name for name, of in per_class.items() if not _has_score(of)],
            ),
            ("classes not learned", results.get("degenerate_classes", [])),
            ("not converged", results.get("not_converged", [])),
        )
        if names
    ]
    rows.append(("protocol", str(results.get("protocol"))))
    return rows


def title(results: dict[str, Any]) -> str:
    """Of a table or a page of these results."""
    other = results.get("other_images", [])
    return f"{results['dataset']}{', ' if other else ''}{''.join(other[:1])}: linear SVM"


def over_classes(results: dict[str, Any], key: str) -> str:
    """ ", over 9 of 20 classes" for a mean over classes that some have no score for; else ""."""
    figures = scored_part(results)[0]
    per_class = figures.get("per_class") or {}
    counts = [
        part["n_classes"] for part in results.get("per_split", [figures]) if "n_classes" in part
    ]
    counts = counts or [sum(map(_has_score, per_class.values()))]  # an older version's don't say
    low, high, K = min(counts), max(counts), len(per_class)
    if key == "accuracy" or low >= K:
        return ""
    return f", over {low:,}{f' to {high:,}' if high > low else ''} of {K:,} classes"


def _has_score(of_class: dict[str, Any]) -> bool:
    return any(of_class.get(key) is not None for key in CLASS_FIGURES)


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")


def choice(results: dict[str, Any]) -> tuple[tuple[str, str, str], list[tuple[str, str, str]]]:
    """Head and rows of the values of C that were tried, with the score that chose; no rows where
    none was chosen.
    """
    by = FIGURES.get(results.get("selected_by", ""), "score")
    head = ("C", f"{by} on {results.get('C_chosen_on', 'validation')}", "")
    tried = zip(results.get("C_grid", []), results.get("C_curve", []), strict=True)
    return head, [
        (_number(C), percent(score), "chosen" if results.get("C") == C else "")
        for C, score in tried
    ]


def class_columns(results: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows of the figures of each class; no rows where there are none."""
    per_class = scored_part(results)[0].get("per_class") or {}
    kinds = [
        key for key in CLASS_FIGURES if any(key in of_class for of_class in per_class.values())
    ]
    counted = any("n_positive" in of_class for of_class in per_class.values())
    rows = [
        (
            name,
            *(percent(of_class.get(key)) for key in kinds),
            *([f"{of_class.get('n_positive', 0):,}"] if counted else []),
        )
        for name, of_class in per_class.items()
    ]
    head = [
        "class",
        *(f"{CLASS_FIGURES[key]} on {_part(results)}" for key in kinds),
        *(["images"] if counted else []),
    ]
    return head, rows


def _part(results: dict[str, Any]) -> str:
    """What was scored, in two or three words."""
    return (
        "the test parts" if "per_split" in results else scored_part(results)[1].partition(" (")[0]
    )


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction of 1 in per cent; none, or NaN, as "-"."""
    return "-" if fraction is None or np.isnan(fraction) else f"{100 * fraction:.{digits}f} %"


def _number(value: Any) -> str:
    """A value of C in four digits, or all of an integer; None as "-"."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@dataclass(frozen=True)
class Ranking:
    """The scored images whose labels are known: rows of the feature file, scores (n, K), truth (n,
    K) of 1, -1, 0.

    predicted: (n,) the best-scored class; None where an image has several labels. aps: (K,) AP, of
    the protocol's kind.
    """

    rows: np.ndarray
    scores: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray | None
    aps: np.ndarray


def write_report(
    results: dict[str, Any] | None,
    features: Sequence[Features],
    model: Model | None,
    items: datasets.Items | None,
    why_no_images: str = "",
) -> tuple[str, list[str]]:
    """The page, and a line for each thing that had to be left out.

    results: of `vggfeat svm --json`; the model's own if None. features: the files that the model
    was trained on, or none. items: where the images are, or None and why not.
    Raises VggfeatError where they are not of one run: other images, classes, networks, scores.
    """
    if results is None:
        if model is None:
            raise WrongUsage("a report needs `results` or `model`")
        results = model.results
    results = checked_results(results, "these results")
    left_out: list[str] = []
    left_out += _refuse_others(results, features, model)
    lead = _lead(results)
    sections = [_figures(results), *_per_class(results), *_choice_of_c(results)]
    made = _how_made(results)
    rankings = {}
    curves = "curves, confusions and mistakes"
    if model is None:
        left_out.append(f"{curves}: they need `model`, written by `vggfeat svm --out`")
    elif not model.scored:
        left_out.append(
            f"{curves}: the model file has no scores; write it again with `vggfeat svm --out`"
        )
    elif not features:
        left_out.append(f"{curves}: they need `features`, for the labels")
    else:
        rankings = _rankings(model.scored, features[0], results)
        if not rankings:
            left_out.append(f"{curves}: the scored images have no labels")
    if rankings:
        first = features[0]
        ap = CLASS_FIGURES[protocol_of(results["protocol"]).class_ap]
        sections += _curves(rankings, first.classes, ap)
        if first.labels is not None and first.labels.ndim == 1:
            sections += _confusions(rankings, first.classes)
        sections += _mistakes(rankings, first, items, why_no_images, left_out)
    if features:
        sections += _map(features, model, results)
    else:
        left_out.append("the map of the descriptors: it needs `features`")
    if left_out:
        made += html(
            "<h3>Left out</h3><ul>{items}</ul>",
            items=join(html("<li>{x}</li>", x=x) for x in left_out),
        )
    sections.append(Section("made", "How it was made", made))
    return page(title(results), lead, sections), left_out


def _lead(results: dict[str, Any]) -> str:
    figures, scored_on = scored_part(results)
    scores = [
        f"{name} {percent(figures[key], 1)}{over_classes(results, key)}"
        for key, name in FIGURES.items()
        if isinstance(figures.get(key), float)
    ]
    nets = [
        f"net {part['net']}, {part['layer']}, Q = {', '.join(map(str, part['scales']))}"
        for part in results.get("features", [])
    ]
    return f"{', '.join(scores) or 'no figures'} on {scored_on}; {' and '.join(nets)}"


def _refuse_others(
    results: dict[str, Any], features: Sequence[Features], model: Model | None
) -> list[str]:
    """Figures of one run beside curves of another would be a lie. A line for each thing that can't
    be checked.
    """
    if model is not None:
        for key in ("dataset", "C", "n_test", *FIGURES):
            ours, theirs = results.get(key), model.results.get(key)
            if ours != theirs:
                raise VggfeatError(
                    f"the results and the model are of two runs: {key} is {ours} and {theirs}"
                )
        for key in ("rows", "fingerprint", "layer", "scales"):
            ours, theirs = (
                [part.get(key) for part in of.get("features", [])]
                for of in (results, model.results)
            )
            if ours != theirs:
                raise VggfeatError(
                    "the results and the model are of two runs: they have other feature files"
                    f" ({key})"
                )
    for file in features:
        if file.attributes.get("dataset") != results["dataset"]:
            raise VggfeatError(
                f"{file.path} is of {file.attributes.get('dataset')}, the results are of"
                f" {results['dataset']}"
            )
    if not features:
        return []
    refuse_other_rows(features)
    parts = results.get("features", [])
    if parts and len(parts) != len(features):
        raise VggfeatError(f"the results are of {len(parts)} feature files; {len(features)} given")
    for file, part in zip(features, parts, strict=False):  # results may lack them
        of = file.description
        if (of.fingerprint, of.layer) != (part.get("fingerprint"), part.get("layer")):
            raise VggfeatError(
                f"{file.path} is not the feature file of these results: it holds {of.layer} of net"
                f" {of.net} ({of.fingerprint[:12]}), they are of {part.get('layer')} of net"
                f" {part.get('net')} ({str(part.get('fingerprint'))[:12]})"
            )
        if part.get("rows", file.rows_digest) != file.rows_digest:
            raise VggfeatError(
                f"{file.path} is not the feature file of these results: it has other images, labels"
                " or splits; give the one that they were made of, or train again with this one"
            )
    if model is not None and len(model.parts) != len(features):
        raise VggfeatError(
            f"the model is of {len(model.parts)} feature files; {len(features)} given"
        )
    if model is not None and model.classes != features[0].classes:
        raise VggfeatError(f"{features[0].path} has other classes than the model")
    for name, scored in (model.scored if model else {}).items():
        if len(scored.rows) and not 0 <= scored.rows.min() <= scored.rows.max() < len(
            features[0].names
        ):
            raise VggfeatError(f"the model's {name} has rows that {features[0].path} hasn't")
    unknown = [file for i, file in enumerate(features) if i >= len(parts) or "rows" not in parts[i]]
    return [
        f"the check that {file.path} has the images that these results are of: they are an older"
        " version's and don't say; `vggfeat svm` makes them anew"
        for file in unknown
    ]


def _rankings(
    scored: dict[str, Scored], features: Features, results: dict[str, Any]
) -> dict[str, Ranking]:
    """By the part that was scored, in words."""
    ap = protocol_of(results["protocol"]).ap
    labels, K = features.labels, len(features.classes)
    out = {}
    for name, part in scored.items():
        if labels is None:
            continue
        own = labels[part.rows]
        told = known(own) & np.isfinite(part.scores).all(axis=1)
        if not told.any():
            continue
        own, scores = own[told], np.asarray(part.scores[told], np.float64)
        truth = own if own.ndim == 2 else np.where(np.arange(K) == own[:, None], 1, -1)
        predicted = None if own.ndim == 2 else scores.argmax(axis=1)
        aps = metrics.mean_average_precision(scores, truth, ap).per_class
        words = _part(results) if name == "validation" else name
        words = f"the test part of {name}" if name.startswith("split") else words
        out[words] = Ranking(part.rows[told], scores, truth, predicted, aps)
    return out


# --- sections -------------------------------------------------------------------------------------


def _figures(results: dict[str, Any]) -> Section:
    body = table(("", ""), summary(results), numbers=())
    return Section("figures", "Figures", body, "; ".join(results.get("rules", [])))


def _class_figure(results: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The figure of each class that the protocol compares by."""
    per_class = scored_part(results)[0].get("per_class") or {}
    for key in (protocol_of(results["protocol"]).class_ap, *CLASS_FIGURES):
        values = {name: figures.get(key) for name, figures in per_class.items()}
        if any(value is not None for value in values.values()):
            return key, {n: float("nan") if v is None else float(v) for n, v in values.items()}
    return "", {}


def _per_class(results: dict[str, Any]) -> list[Section]:
    key, values = _class_figure(results)
    if not values:
        return []
    order = sorted(values, key=lambda name: -np.nan_to_num(values[name], nan=-1.0))
    rows = [(name, values[name], percent(values[name], 1)) for name in order]
    name = f"{CLASS_FIGURES[key]} on {_part(results)}"
    if len(rows) <= MANY:
        body = bars(rows)
    else:
        half = MANY // 2
        body = html("<h3>Best</h3>{a}<h3>Worst</h3>{b}", a=bars(rows[:half]), b=bars(rows[-half:]))
        body += html(
            "<details><summary>All {n} classes</summary>{rows}</details>",
            n=len(rows),
            rows=table(("class", name), [(n, text) for n, _, text in rows]),
        )
    return [Section("classes", f"Classes: {name}", body)]


def _choice_of_c(results: dict[str, Any]) -> list[Section]:
    series = [
        Series(
            str(split.get("name", i)),
            np.array(split["C_grid"]),
            100 * np.array(split["C_curve"], float),
            True,
        )
        for i, split in enumerate(results.get("per_split", []))
        if "C_curve" in split
    ]
    if not series and "C_curve" in results:
        series = [
            Series(
                "validation",
                np.array(results["C_grid"]),
                100 * np.array(results["C_curve"], float),
                True,
            )
        ]
    if not series:
        return []
    head, rows = choice(results)
    by = FIGURES.get(results.get("selected_by", ""), "score")
    splits = " (the median of the splits')" if len(series) > 1 else ""
    about = f"C = {_number(results.get('C'))}{splits}, by {head[1]}; of equals the smallest."
    drawn = html('<div class="charts">{c}</div>', c=chart(series, "C", f"{by}, %", log_x=True))
    return [Section("c", "The choice of C", drawn + table(head, rows, numbers=(0, 1)), about)]


def _curves(rankings: dict[str, Ranking], classes: list[str], ap: str) -> list[Section]:
    name, ranking = next(iter(rankings.items()))
    shown, how = _chosen(ranking.aps)
    figures = []
    for k in shown:
        precision, recall = metrics.precision_recall(ranking.scores[:, k], ranking.truth[:, k])
        caption = html("{name}<br>{ap} {x}", name=classes[k], ap=ap, x=percent(ranking.aps[k], 1))
        figures.append(
            chart(
                [Series(classes[k], recall, precision)],
                "recall",
                "precision",
                x_range=(0, 1),
                y_range=(0, 1),
                size=(220, 200),
                caption=caption,
                small=True,
            )
        )
    about = f"Of the {len(ranking.rows)} images of {name}. {how}"
    return [
        Section(
            "curves",
            "Precision and recall",
            html('<div class="charts">{f}</div>', f=join(figures)),
            about,
        )
    ]


def _chosen(values_K: np.ndarray) -> tuple[list[int], str]:
    """All classes, or of many those with the highest and lowest values, and a sentence that says
    so.
    """
    K = len(values_K)
    if K <= MANY:
        return list(range(K)), ""
    order = [int(k) for k in np.argsort(-values_K, kind="stable") if not np.isnan(values_K[k])]
    half = min(MANY // 2, len(order) // 2)
    return (
        order[:half] + order[len(order) - half :],
        f"The {half} best and the {half} worst of {K} classes.",
    )


def _confusions(rankings: dict[str, Ranking], classes: list[str]) -> list[Section]:
    K = len(classes)
    counts = np.zeros((K, K), np.int64)
    for ranking in rankings.values():
        assert ranking.predicted is not None  # one label an image
        np.add.at(counts, (ranking.truth.argmax(axis=1), ranking.predicted), 1)
    images = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, images, out=np.zeros((K, K)), where=images > 0)
    if K <= TABLE_CLASSES:
        columns = join(html('<th scope="col">{name}</th>', name=name) for name in classes)
        lines = []
        for k, name in enumerate(classes):
            cells = join(
                html(
                    '<td style="background: rgb(59 130 246 / {alpha:.2f})">{n}</td>',
                    alpha=0.75 * share[k, j] ** 0.5,
                    n=counts[k, j] or "",
                )
                for j in range(K)
            )
            lines.append(
                html('<tr><th scope="row">{name}</th>{cells}</tr>', name=name, cells=cells)
            )
        body = html(
            '<div class="scroll"><table'
            ' class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>'
            "</table></div>",
            head=columns,
            rows=join(lines),
        )
    else:
        body = matrix_picture(share, f"confusion matrix of {K} classes")
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    often = [divmod(int(i), K) for i in np.argsort(-wrong, axis=None, kind="stable")[:15]]
    rows = [
        (classes[k], classes[j], wrong[k, j], percent(share[k, j], 1))
        for k, j in often
        if wrong[k, j]
    ]
    if rows:
        head = ("label", "taken for", "images", "of the label's")
        body += html("<h3>Most frequent</h3>{t}", t=table(head, rows, numbers=(2, 3)))
    about = (
        f"Rows are labels, columns the best-scored class; images of {', '.join(rankings)} together."
    )
    return [Section("confusions", "Confusions", body, about)]


def _mistakes(
    rankings: dict[str, Ranking],
    features: Features,
    items: datasets.Items | None,
    why_no_images: str,
    left_out: list[str],
) -> list[Section]:
    name, ranking = next(iter(rankings.items()))
    classes = features.classes
    shown, how = _chosen(ranking.aps)
    each = max(2, min(6, PICTURES // (2 * len(shown) or 1)))
    picture_of = _pictures(features, items)
    absent: list[int] = []
    blocks = []
    for k in shown:
        of_class = ranking.truth[:, k] == 1
        chosen = (
            np.ones(len(of_class), bool) if ranking.predicted is None else ranking.predicted == k
        )
        lines = []
        for kind, title, wanted in (
            ("right", "best-scored right", of_class & chosen),
            ("wrong", "best-scored wrong", (ranking.truth[:, k] == -1) & chosen),
        ):
            best = np.flatnonzero(wanted)
            best = best[np.argsort(-ranking.scores[best, k], kind="stable")][:each]
            figures = []
            for i in best:
                row = int(ranking.rows[i])
                uri = picture_of(row)
                absent += [row] if uri is None else []
                figures.append(
                    picture(uri, features.names[row], _caption(ranking, i, k, classes, kind))
                )
            none = html('<p class="soft">none</p>')
            lines.append(
                html(
                    '<p class="soft">{title}</p><div class="pictures {kind}">{figures}</div>',
                    title=title,
                    kind=kind,
                    figures=join(figures) if figures else none,
                )
            )
        blocks.append(html("<h3>{name}</h3>{lines}", name=classes[k], lines=join(lines)))
    about = f"Of the images of {name}, by the class's score. {how}"
    if items is None:
        left_out.append(f"thumbnails: {why_no_images}")
        about += f" Thumbnails are left out: {why_no_images}."
    elif absent:
        there = set(items.names)
        elsewhere = sum(features.names[row] not in there for row in absent)
        for n, why in (
            (elsewhere, f"are not under {items.root}"),
            (len(absent) - elsewhere, "can't be read any more"),
        ):
            if n:
                left_out.append(f"{n} thumbnails: the images {why}")
                about += f" {n} images {why}."
    return [Section("images", "Right and wrong", join(blocks), about)]


def _caption(ranking: Ranking, i: Any, k: int, classes: list[str], kind: str) -> str:
    score = f"{ranking.scores[i, k]:+.2f}"
    if kind == "right":
        return score
    labels = [classes[j] for j in np.flatnonzero(ranking.truth[i] == 1)[:3]]
    return f"{score}; is {', '.join(labels) or 'none of the classes'}"


def _pictures(features: Features, items: datasets.Items | None) -> Callable[[int], str | None]:
    """row -> thumbnail, or None where the image isn't there."""
    if items is None:
        return lambda row: None
    place = {name: i for i, name in enumerate(items.names)}

    def of(row: int) -> str | None:
        i = place.get(features.names[row])
        if i is None:
            return None
        try:
            return thumbnail(read_rgb(items.source(i)))
        except UnreadableImage:
            return None

    return of


def _map(
    features: Sequence[Features], model: Model | None, results: dict[str, Any]
) -> list[Section]:
    readable = np.flatnonzero(np.logical_and.reduce([file.readable for file in features]))
    if len(readable) < 3:
        return []
    picked = readable
    if len(picked) > MAPPED:
        picked = np.sort(np.random.default_rng(0).choice(readable, MAPPED, replace=False))
    parts = [part.get("scales") for part in results.get("features", [])] or [None] * len(features)
    scales = [part.scales for part in model.parts] if model else [q and tuple(q) for q in parts]
    pool = model.pool if model else results.get("pool", pool_of(results["protocol"])[0])
    X = fuse(
        [aggregate(file.read(q, picked), pool) for file, q in zip(features, scales, strict=True)]
    )
    xy, how = _plane(X)
    first = features[0]
    if first.labels is None:
        groups, names = np.zeros(len(picked), int), ["images"]
    elif first.labels.ndim == 1:
        groups, names = np.maximum(first.labels[picked], 0), first.classes
    else:
        groups, names = (first.labels[picked] == 1).argmax(axis=1), first.classes
    titles = [
        first.names[row] + ("" if first.labels is None else f": {names[g]}")
        for row, g in zip(picked, groups, strict=True)
    ]
    of = (
        f"{len(picked)} of {len(readable)} images"
        if len(picked) < len(readable)
        else f"{len(picked)} images"
    )
    many = first.labels is not None and first.labels.ndim == 2
    several = " Of an image with several labels the first gives the colour." if many else ""
    caption = f"{how} of {of}; a pointer on a dot shows its name and class.{several}"
    body = html('<div class="charts">{s}</div>', s=scatter(xy, groups, titles, names, caption))
    return [Section("map", "Map of the descriptors", body)]


def _plane(X: np.ndarray) -> tuple[np.ndarray, str]:
    """(n, 2) for the eye: principal components, and t-SNE on 50 of them where there are enough
    images.
    """
    from sklearn.decomposition import PCA

    if not np.ptp(X, axis=0).any():  # nothing varies, and all that follows would divide by that
        return np.zeros((len(X), 2)), "The first two principal components"
    few = len(X) < 60
    components = PCA(min(2 if few else 50, *X.shape), random_state=0).fit_transform(X)
    if few or components.shape[1] < 3:
        flat = components[:, :2]
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "The first two principal components"
    from sklearn.manifold import TSNE

    tsne = TSNE(2, perplexity=30 if len(X) > 120 else 10, random_state=0, init="pca")
    with threadpool_limits(1):  # its threads wait for one another in so many short loops
        return tsne.fit_transform(components), "t-SNE, from the first principal components,"


def _how_made(results: dict[str, Any]) -> Markup:
    rows = []
    for part in results.get("features", []):
        rows += [
            (
                f"net {part.get('net')}",
                f"{part.get('weights')}, sha256 {str(part.get('fingerprint'))[:12]}",
            )
        ]
        mirror = "with mirror images" if part.get("mirror") else "without mirror images"
        scales = ", ".join(map(str, part.get("scales", [])))
        rows += [("descriptor", f"{part.get('layer')}, Q = {scales}, {mirror}")]
    rows += [("solver", str(results.get("solver")).replace("_", " "))]
    rows += [
        ("versions", ", ".join(f"{k} {v}" for k, v in (results.get("versions") or {}).items()))
    ]
    body = table(("", ""), rows, numbers=())
    if results.get("command"):
        body += html("<p><code>{c}</code></p>", c=results["command"])
    return body


def read_results(path: Path) -> dict[str, Any]:
    """results.json of `vggfeat svm --json`. Raises VggfeatError when it isn't one."""
    text = read_text(path, "results", "write them with `vggfeat svm --json`")
    return checked_results(parse_json(text, path), path)


def checked_results(results: Any, where: Any) -> dict[str, Any]:
    """The results, where they are what `vggfeat svm` writes. Raises VggfeatError, which begins with
    `where`.
    """
    results = fitted(results, Results, where)
    for choice in (results, *results.get("per_split", [])):
        if len(choice.get("C_grid", [])) != len(choice.get("C_curve", [])):
            raise VggfeatError(f"{where}: C_grid and C_curve have different lengths")
    return results
