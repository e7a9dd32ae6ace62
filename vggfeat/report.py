"""What people would rather look at than read: one page of a classifier's figures, curves, mistakes and descriptors.

N images, K classes. Everything is optional: figures come from the results, curves and mistakes need the model's scores
and the feature file's labels, thumbnails need the images, the map needs the descriptors.
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
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError
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
from vggfeat.protocols import Results, Scored
from vggfeat.store import Features

MANY = 40  # classes; of more, the best and the worst are shown
PICTURES = 800  # thumbnails of a page, about 3 kB each
MAPPED = 1500  # descriptors on the map
TABLE_CLASSES = 20  # of a confusion matrix with numbers in it

FIGURES = {
    "mean_class_recall": "mean class recall",
    "accuracy": "accuracy",
    "map_11point": "mAP (11-point)",
    "map_allpoint": "mAP (all-point)",
}
CLASS_FIGURES = {"recall": "recall", "ap_11point": "11-point AP", "ap_allpoint": "all-point AP"}


def summary(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the figures in results.json, as a person reads them."""
    rows = []
    for key, name in FIGURES.items():
        if results.get(key) is not None:
            std = results.get(f"{key}_std")
            rows.append(
                (name, f"{100 * results[key]:.2f} %" + (f" +- {100 * std:.2f}" if std is not None else ""))
            )
    rows.append(("C", plain(results.get("C"))))
    if "C_curve" in results:
        rows += [("C grid", plain(results["C_grid"])), ("validation score", plain(results["C_curve"]))]
    for i, split in enumerate(results.get("per_split", [])):
        score = split.get("mean_class_recall", split.get("map_allpoint"))
        shown = "-" if score is None else f"{100 * score:.2f} %"
        rows.append((f"split {i}", f"{shown}, C {plain(split.get('C'))}"))
    counts = [("n_train", "train"), ("n_test", "test"), ("n_unreadable", "unreadable left out")]
    known = [f"{results[key]} {what}" for key, what in counts if key in results]
    if known:
        rows.append(("images", ", ".join(known)))
    rows.append(("protocol", str(results.get("protocol"))))
    return rows


def plain(value: Any) -> str:
    """A figure, or several, in four digits; None as "-"."""
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@dataclass(frozen=True)
class Ranking:
    """The scored images whose labels are known: rows of the feature file, scores (n, K), truth (n, K) of 1, -1, 0.

    predicted: (n,) the best-scored class; None where an image has several labels. aps: (K,) all-point AP.
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

    results: of `vggfeat svm --json`; the model's own if None. features: the files that the model was trained on, or
    none. items: where the images are, or None and why not.
    Raises VggfeatError where they are not of one run: other images, classes, networks, scores.
    """
    if results is None:
        if model is None:
            raise VggfeatError("a report needs `results` or `model`")
        results = model.results
    results = checked_results(results, "these results")
    left_out: list[str] = []
    _refuse_others(results, features, model)
    lead = _lead(results)
    sections = [_figures(results), *_per_class(results), *_choice_of_c(results)]
    made = _how_made(results)
    rankings = {}
    curves = "curves, confusions and mistakes"
    if model is None:
        left_out.append(f"{curves}: they need `model`, written by `vggfeat svm --out`")
    elif not model.scored:
        left_out.append(f"{curves}: the model file has no scores; write it again with `vggfeat svm --out`")
    elif not features:
        left_out.append(f"{curves}: they need `features`, for the labels")
    else:
        rankings = _rankings(model.scored, features[0])
        if not rankings:
            left_out.append(f"{curves}: the scored images have no labels")
    if rankings:
        first = features[0]
        sections += _curves(rankings, first.classes)
        if first.labels is not None and first.labels.ndim == 1:
            sections += _confusions(rankings, first.classes)
        sections += _mistakes(rankings, first, items, why_no_images, left_out)
    if features:
        sections += _map(features, model)
    else:
        left_out.append("the map of the descriptors: it needs `features`")
    if left_out:
        made += html(
            "<h3>Left out</h3><ul>{items}</ul>", items=join(html("<li>{x}</li>", x=x) for x in left_out)
        )
    sections.append(Section("made", "How it was made", made))
    return page(f"{results['dataset']}: linear SVM", lead, sections), left_out


def _lead(results: dict[str, Any]) -> str:
    scores = [
        f"{name} {100 * results[key]:.1f} %"
        for key, name in FIGURES.items()
        if isinstance(results.get(key), float)
    ]
    nets = [
        f"net {part['net']}, {part['layer']}, Q = {', '.join(map(str, part['scales']))}"
        for part in results.get("features", [])
    ]
    return f"{', '.join(scores) or 'no figures'}; {' and '.join(nets)}"


def _refuse_others(results: dict[str, Any], features: Sequence[Features], model: Model | None) -> None:
    """Figures of one run beside curves of another would be a lie."""
    if model is not None:
        for key in ("dataset", "C", "n_test", *FIGURES):
            ours, theirs = results.get(key), model.results.get(key)
            if ours != theirs:
                raise VggfeatError(f"the results and the model are of two runs: {key} is {ours} and {theirs}")
    for file in features:
        if file.attributes.get("dataset") != results["dataset"]:
            raise VggfeatError(
                f"{file.path} is of {file.attributes.get('dataset')}, the results are of {results['dataset']}"
            )
        if len(file.names) != len(features[0].names) or file.names != features[0].names:
            raise VggfeatError(f"{features[0].path} and {file.path} are not of the same images")
    if not features:
        return
    parts = results.get("features", [])
    if parts and len(parts) != len(features):
        raise VggfeatError(f"the results are of {len(parts)} feature files; {len(features)} given")
    for file, part in zip(features, parts, strict=False):  # results may lack them
        of = file.description
        if (of.fingerprint, of.layer) != (part.get("fingerprint"), part.get("layer")):
            raise VggfeatError(
                f"{file.path} is not the feature file of these results: it holds {of.layer} of net {of.net} "
                f"({of.fingerprint[:12]}), they are of {part.get('layer')} of net {part.get('net')} "
                f"({str(part.get('fingerprint'))[:12]})"
            )
    if model is not None and len(model.parts) != len(features):
        raise VggfeatError(f"the model is of {len(model.parts)} feature files; {len(features)} given")
    if model is not None and model.classes != features[0].classes:
        raise VggfeatError(f"{features[0].path} has other classes than the model")
    for name, scored in (model.scored if model else {}).items():
        if len(scored.rows) and not 0 <= scored.rows.min() <= scored.rows.max() < len(features[0].names):
            raise VggfeatError(f"the model's {name} has rows that {features[0].path} hasn't")


def _rankings(scored: dict[str, Scored], features: Features) -> dict[str, Ranking]:
    labels, K = features.labels, len(features.classes)
    out = {}
    for name, part in scored.items():
        if labels is None:
            continue
        own = labels[part.rows]
        known = (own != 0).any(axis=1) if own.ndim == 2 else own >= 0
        known &= np.isfinite(part.scores).all(axis=1)
        if not known.any():
            continue
        own, scores = own[known], np.asarray(part.scores[known], np.float64)
        truth = own if own.ndim == 2 else np.where(np.arange(K) == own[:, None], 1, -1)
        predicted = None if own.ndim == 2 else scores.argmax(axis=1)
        aps = metrics.mean_average_precision(scores, truth).per_class
        out[name] = Ranking(part.rows[known], scores, truth, predicted, aps)
    return out


# --- sections ----------------------------------------------------------------------------------------------


def _figures(results: dict[str, Any]) -> Section:
    body = table(("", ""), summary(results), numbers=())
    notes = []
    for key, text in (
        ("test_labels", "The test part has no labels: the figures are of the validation part."),
        ("not_converged", "Not converged: "),
        ("degenerate_classes", "Without positive or negative training images: "),
        ("classes_without_ap", "Without a positive image, so without AP: "),
    ):
        if key in results:
            names = results[key] if key != "test_labels" else []
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            notes.append(html("<p>{text}{shown}</p>", text=text, shown=shown))
    rules = "; ".join(results.get("rules", []))
    return Section("figures", "Figures", body + join(notes), rules)


def _class_figure(results: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The figure of each class that the protocol compares by."""
    per_class = results.get("per_class") or results.get("validation", {}).get("per_class") or {}
    for key in (("ap_11point",) if results.get("protocol") == "voc2007" else ()) + tuple(CLASS_FIGURES)[::-1]:
        values = {name: figures.get(key) for name, figures in per_class.items()}
        if any(value is not None for value in values.values()):
            return key, {n: float("nan") if v is None else float(v) for n, v in values.items()}
    return "", {}


def _per_class(results: dict[str, Any]) -> list[Section]:
    key, values = _class_figure(results)
    if not values:
        return []
    order = sorted(values, key=lambda name: -np.nan_to_num(values[name], nan=-1.0))
    rows = [(name, values[name], plain_percent(values[name])) for name in order]
    name = CLASS_FIGURES[key]
    if len(rows) <= MANY:
        body = bars(rows)
    else:
        half = MANY // 2
        body = html("<h3>Best</h3>{a}<h3>Worst</h3>{b}", a=bars(rows[:half]), b=bars(rows[-half:]))
        body += html(
            "<details><summary>All {n} classes</summary>{rows}</details>",
            n=len(rows),
            rows=table(("class", f"{name}, %"), [(n, text) for n, _, text in rows]),
        )
    return [Section("classes", f"Classes: {name}, %", body)]


def plain_percent(fraction: float) -> str:
    """A fraction of 1 in per cent; NaN as "-"."""
    return "-" if np.isnan(fraction) else f"{100 * fraction:.1f}"


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
            Series("validation", np.array(results["C_grid"]), 100 * np.array(results["C_curve"], float), True)
        ]
    if not series:
        return []
    by = FIGURES.get(results.get("selected_by", ""), "score")
    about = f"C = {plain(results.get('C'))} won, by {by} on the validation part; of equals the smallest."
    body = chart(series, "C", f"{by}, %", log_x=True)
    return [Section("c", "The choice of C", html('<div class="charts">{c}</div>', c=body), about)]


def _curves(rankings: dict[str, Ranking], classes: list[str]) -> list[Section]:
    name, ranking = next(iter(rankings.items()))
    shown, how = _chosen(ranking.aps)
    figures = []
    for k in shown:
        precision, recall = metrics.precision_recall(ranking.scores[:, k], ranking.truth[:, k])
        caption = html("{name}<br>AP {ap}", name=classes[k], ap=plain_percent(ranking.aps[k]))
        figures.append(
            chart(
                [Series(classes[k], recall, precision)], "recall", "precision", x_range=(0, 1), y_range=(0, 1),
                size=(220, 200), caption=caption, small=True,
            )
        )  # fmt: skip
    about = f"Of the {len(ranking.rows)} images of {name}; AP is all-point, in per cent. {how}"
    return [
        Section(
            "curves", "Precision and recall", html('<div class="charts">{f}</div>', f=join(figures)), about
        )
    ]


def _chosen(values_K: np.ndarray) -> tuple[list[int], str]:
    """All classes, or of many those with the highest and lowest values, and a sentence that says so."""
    K = len(values_K)
    if K <= MANY:
        return list(range(K)), ""
    order = [int(k) for k in np.argsort(-values_K, kind="stable") if not np.isnan(values_K[k])]
    half = min(MANY // 2, len(order) // 2)
    return order[:half] + order[len(order) - half :], f"The {half} best and the {half} worst of {K} classes."


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
            lines.append(html('<tr><th scope="row">{name}</th>{cells}</tr>', name=name, cells=cells))
        body = html(
            '<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>'
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
        (classes[k], classes[j], wrong[k, j], plain_percent(share[k, j])) for k, j in often if wrong[k, j]
    ]
    if rows:
        head = ("label", "taken for", "images", "% of the label's")
        body += html("<h3>Most frequent</h3>{t}", t=table(head, rows, numbers=(2, 3)))
    about = f"Rows are labels, columns the best-scored class; images of {', '.join(rankings)} together."
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
    missing = 0
    blocks = []
    for k in shown:
        of_class = ranking.truth[:, k] == 1
        chosen = np.ones(len(of_class), bool) if ranking.predicted is None else ranking.predicted == k
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
                missing += uri is None
                figures.append(picture(uri, features.names[row], _caption(ranking, i, k, classes, kind)))
            none = html('<p class="soft">none</p>')
            lines.append(
                html(
                    '<p class="soft">{title}</p><div class="pictures {kind}">{figures}</div>',
                    title=title, kind=kind, figures=join(figures) if figures else none,
                )
            )  # fmt: skip
        blocks.append(html("<h3>{name}</h3>{lines}", name=classes[k], lines=join(lines)))
    about = f"Of the images of {name}, by the class's score. {how}"
    if items is None:
        left_out.append(f"thumbnails: {why_no_images}")
        about += f" Thumbnails are left out: {why_no_images}."
    elif missing:
        left_out.append(f"{missing} thumbnails: the images can't be read any more")
        about += f" {missing} images can't be read any more."
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


def _map(features: Sequence[Features], model: Model | None) -> list[Section]:
    readable = np.flatnonzero(np.logical_and.reduce([file.readable for file in features]))
    if len(readable) < 3:
        return []
    picked = readable
    if len(picked) > MAPPED:
        picked = np.sort(np.random.default_rng(0).choice(readable, MAPPED, replace=False))
    pool = model.pool if model else "average"
    parts = model.parts if model else [file.description for file in features]
    X = fuse(
        [aggregate(file.read(part.scales, picked), pool) for file, part in zip(features, parts, strict=True)]
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
        f"{len(picked)} of {len(readable)} images" if len(picked) < len(readable) else f"{len(picked)} images"
    )
    many = first.labels is not None and first.labels.ndim == 2
    several = " Of an image with several labels the first gives the colour." if many else ""
    caption = f"{how} of {of}; a pointer on a dot shows its name and class.{several}"
    body = html('<div class="charts">{s}</div>', s=scatter(xy, groups, titles, names, caption))
    return [Section("map", "Map of the descriptors", body)]


def _plane(X: np.ndarray) -> tuple[np.ndarray, str]:
    """(n, 2) for the eye: principal components, and t-SNE on 50 of them where there are enough images."""
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
            (f"net {part.get('net')}", f"{part.get('weights')}, sha256 {str(part.get('fingerprint'))[:16]}")
        ]
        mirror = "with mirror images" if part.get("mirror") else "without mirror images"
        scales = ", ".join(map(str, part.get("scales", [])))
        rows += [("descriptor", f"{part.get('layer')}, Q = {scales}, {mirror}")]
    rows += [("over the scales", str(results.get("pool"))), ("solver", str(results.get("solver")))]
    rows += [("versions", ", ".join(f"{k} {v}" for k, v in (results.get("versions") or {}).items()))]
    body = table(("", ""), rows, numbers=())
    if results.get("command"):
        body += html("<p><code>{c}</code></p>", c=results["command"])
    return body


def read_results(path: Path) -> dict[str, Any]:
    """results.json of `vggfeat svm --json`. Raises VggfeatError when it isn't one."""
    text = read_text(path, "results", "write them with `vggfeat svm --json`")
    return checked_results(parse_json(text, path), path)


def checked_results(results: Any, where: Any) -> dict[str, Any]:
    """The results, where they are what `vggfeat svm` writes. Raises VggfeatError, which begins with `where`."""
    results = fitted(results, Results, where)
    for choice in (results, *results.get("per_split", [])):
        if len(choice.get("C_grid", [])) != len(choice.get("C_curve", [])):
            raise VggfeatError(f"{where}: C_grid and C_curve have different lengths")
    return results
