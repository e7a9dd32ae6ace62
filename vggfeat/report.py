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
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from threadpoolctl import threadpool_limits

from vggfeat import datasets, metrics
from vggfeat.aggregate import aggregate, fuse
from vggfeat.audit_page import Audit, sections_of
from vggfeat.classify import refuse_other_rows
from vggfeat.datasets.items import known
from vggfeat.datasets.protocol import protocol_of
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError, WrongUsage
from vggfeat.features import open_features
from vggfeat.metrics import CLASS_FIGURES, FIGURES
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
from vggfeat.regions import cut
from vggfeat.results import (
    Part,
    Results,
    Scored,
    choice_columns,
    cost,
    in_percent,
    over_classes,
    part_scored,
    refuse_other_run,
    scored_on,
    summary,
    title,
    told,
)
from vggfeat.store import REGIONS, Description, Features

if TYPE_CHECKING:
    from vggfeat.model import Model

MANY = 40  # classes; of more, the best and the worst are shown
PICTURES = 800  # thumbnails of a page, about 3 kB each
MAPPED = 1500  # descriptors on the map
TABLE_CLASSES = 20  # of a confusion matrix with numbers in it


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
    results: Results | None,
    features: Sequence[Features],
    model: Model | None,
    items: datasets.Items | None,
    why_no_images: str = "",
    look_for_problems: Callable[[], Audit] | None = None,
) -> tuple[str, list[str]]:
    """The page, and a line for each thing that had to be left out.

    results: of `vggfeat svm --json`; the model's own if None. features: the files that the model
    was trained on, or none. items: where the images are, or None and why not.
    Raises VggfeatError where they are not of one run: other images, classes, networks, scores.
    """
    if results is None:
        if model is None:
            raise WrongUsage("a report needs `results` or `model`")
        if model.results is None:
            raise VggfeatError("the model has no results: give them as `results`")
        results = model.results
    left_out = _refuse_others(results, features, model)
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
        ap = CLASS_FIGURES[protocol_of(results.protocol).class_ap]
        sections += _curves(rankings, first.classes, ap)
        if first.labels is not None and first.labels.ndim == 1:
            sections += _confusions(rankings, first.classes)
        sections += _mistakes(rankings, first, items, why_no_images, left_out)
    if features and look_for_problems is not None:
        sections += sections_of(look_for_problems(), features[0], items)
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


def _lead(results: Results) -> str:
    scores = [
        f"{name} {in_percent(mean, 1)}{over_classes(results, key)}"
        for key, name in FIGURES.items()
        if (mean := told(results.scored.figures.mean(key))) is not None
    ]
    nets = [
        f"net {part.net}, {part.layer}, Q = {', '.join(map(str, part.scales))}"
        for part in results.made.features
    ]
    return f"{', '.join(scores) or 'no figures'} on {scored_on(results)}; {' and '.join(nets)}"


def _refuse_others(
    results: Results, features: Sequence[Features], model: Model | None
) -> list[str]:
    """Figures of one run beside curves of another would be a lie. A line for each thing that can't
    be checked.
    """
    if model is not None:
        if model.results is None:
            raise VggfeatError("the results and the model are of two runs: the model has none")
        refuse_other_run(results, model.results)
    for file in features:
        if file.attributes.get("dataset") != results.dataset:
            raise VggfeatError(
                f"{file.path} is of {file.attributes.get('dataset')}, the results are of"
                f" {results.dataset}"
            )
    if not features:
        return []
    refuse_other_rows(features)
    parts = results.made.features
    if parts and len(parts) != len(features):
        raise VggfeatError(f"the results are of {len(parts)} feature files; {len(features)} given")
    for file, part in zip(features, parts, strict=False):  # results may lack them
        _refuse_other_file(file, part)
    if model is not None:
        _refuse_other_model(model, features)
    unknown = [file for i, file in enumerate(features) if i >= len(parts) or parts[i].rows is None]
    return [
        f"the check that {file.path} has the images that these results are of: they are an older"
        " version's and don't say; `vggfeat svm` makes them anew"
        for file in unknown
    ]


def open_described(
    paths: Sequence[str | Path], results: Results | None, model: Model | None
) -> list[Features]:
    """The feature files of results, or of a model, each with the layer that was learned from.

    Raises VggfeatError: see `open_features`; one file twice, with the same layer.
    """
    parts: Sequence[Part | Description] = results.made.features if results else ()
    parts = parts or (model.parts if model else ())
    layers: list[str | None] = [part.layer for part in parts] or [None] * len(paths)
    if len(layers) != len(paths):
        raise VggfeatError(f"the results are of {len(layers)} feature files; {len(paths)} given")
    given = list(zip(map(str, paths), layers, strict=True))
    for i, (path, layer) in enumerate(given):
        if (path, layer) in given[:i]:
            raise VggfeatError(f"`features` {path} is given twice")
    return [open_features(path, layer) for path, layer in given]


def _refuse_other_file(file: Features, part: Part) -> None:
    own = file.description
    if (own.fingerprint, own.layer) != (part.fingerprint, part.layer):
        raise VggfeatError(
            f"{file.path} is not the feature file of these results: it holds {own.layer} of net"
            f" {own.net} ({own.fingerprint[:12]}), they are of {part.layer} of net"
            f" {part.net} ({str(part.fingerprint)[:12]})"
        )
    if own.regions != (regions := tuple(part.regions) or REGIONS[:1]):
        raise VggfeatError(
            f"{file.path} is not the feature file of these results: it describes"
            f" {' and '.join(own.regions)}, they are of {' and '.join(regions)}"
        )
    if part.rows not in (None, file.rows_digest):
        raise VggfeatError(
            f"{file.path} is not the feature file of these results: it has other images, labels"
            " or splits; give the one that they were made of, or train again with this one"
        )


def _refuse_other_model(model: Model, features: Sequence[Features]) -> None:
    first = features[0]
    if len(model.parts) != len(features):
        raise VggfeatError(
            f"the model is of {len(model.parts)} feature files; {len(features)} given"
        )
    if model.classes != first.classes:
        raise VggfeatError(f"{first.path} has other classes than the model")
    for name, scored in model.scored.items():
        rows = scored.rows
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(first.names):
            raise VggfeatError(f"the model's {name} has rows that {first.path} hasn't")


def _rankings(
    scored: dict[str, Scored], features: Features, results: Results
) -> dict[str, Ranking]:
    """By the part that was scored, in words."""
    ap = protocol_of(results.protocol).ap
    labels, K = features.labels, len(features.classes)
    out = {}
    for name, part in scored.items():
        if labels is None:
            continue
        own = labels[part.rows]
        labelled = known(own) & np.isfinite(part.scores).all(axis=1)
        if not labelled.any():
            continue
        own, scores = own[labelled], np.asarray(part.scores[labelled], np.float64)
        truth = own if own.ndim == 2 else np.where(np.arange(K) == own[:, None], 1, -1)
        predicted = None if own.ndim == 2 else scores.argmax(axis=1)
        aps = metrics.mean_average_precision(scores, truth, ap).per_class
        words = part_scored(results) if name == "validation" else name
        words = f"the test part of {name}" if name.startswith("split") else words
        out[words] = Ranking(part.rows[labelled], scores, truth, predicted, aps)
    return out


# --- sections -------------------------------------------------------------------------------------


def _figures(results: Results) -> Section:
    body = table(("", ""), summary(results), numbers=())
    return Section("figures", "Figures", body, "; ".join(results.rules))


def _class_figure(results: Results) -> tuple[str, dict[str, float]]:
    """The figure of each class that the protocol compares by."""
    per_class = results.scored.per_class
    for key in (protocol_of(results.protocol).class_ap, *CLASS_FIGURES):
        values = {name: told(figures.figure(key)) for name, figures in per_class.items()}
        if any(value is not None for value in values.values()):
            return key, {n: float("nan") if v is None else v for n, v in values.items()}
    return "", {}


def _per_class(results: Results) -> list[Section]:
    key, values = _class_figure(results)
    if not values:
        return []
    order = sorted(values, key=lambda name: -np.nan_to_num(values[name], nan=-1.0))
    rows = [(name, values[name], in_percent(values[name], 1)) for name in order]
    name = f"{CLASS_FIGURES[key]} on {part_scored(results)}"
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


def _choice_of_c(results: Results) -> list[Section]:
    curves = [
        (str(i) if split.name is None else split.name, split.choice)
        for i, split in enumerate(results.per_split)
    ]
    series = [
        Series(name, np.array(choice.C_grid), 100 * np.array(choice.C_curve), True)
        for name, choice in curves or [("validation", results.choice)]
        if choice.C_curve
    ]
    if not series:
        return []
    head, rows = choice_columns(results)
    by = FIGURES.get(results.choice.selected_by or "", "score")
    splits = " (the median of the splits')" if len(series) > 1 else ""
    about = f"C = {cost(results.choice.C)}{splits}, by {head[1]}; of equals the smallest."
    drawn = html('<div class="charts">{c}</div>', c=chart(series, "C", f"{by}, %", log_x=True))
    return [Section("c", "The choice of C", drawn + table(head, rows, numbers=(0, 1)), about)]


def _curves(rankings: dict[str, Ranking], classes: list[str], ap: str) -> list[Section]:
    name, ranking = next(iter(rankings.items()))
    shown, how = _chosen(ranking.aps)
    figures = []
    for k in shown:
        precision, recall = metrics.precision_recall(ranking.scores[:, k], ranking.truth[:, k])
        caption = html(
            "{name}<br>{ap} {x}", name=classes[k], ap=ap, x=in_percent(ranking.aps[k], 1)
        )
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
        (classes[k], classes[j], wrong[k, j], in_percent(share[k, j], 1))
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
        for kind, caption, wanted in (
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
                    title=caption,
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

    def picture_of(row: int) -> str | None:
        i = place.get(features.names[row])
        if i is None:
            return None
        try:
            return thumbnail(cut(read_rgb(items.source(i)), items, i))
        except UnreadableImage:
            return None

    return picture_of


def _map(features: Sequence[Features], model: Model | None, results: Results) -> list[Section]:
    readable = np.flatnonzero(np.logical_and.reduce([file.readable for file in features]))
    if len(readable) < 3:
        return []
    picked = readable
    if len(picked) > MAPPED:
        picked = np.sort(np.random.default_rng(0).choice(readable, MAPPED, replace=False))
    scales: list[tuple[int, ...] | None] = [tuple(part.scales) for part in results.made.features]
    scales = [part.scales for part in model.parts] if model else scales or [None] * len(features)
    pool = model.pool if model else results.pool
    X = fuse(
        [
            aggregate(file.read(q, picked), pool, len(file.description.regions))
            for file, q in zip(features, scales, strict=True)
        ]
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
        first.names[int(row)] + ("" if first.labels is None else f": {names[g]}")
        for row, g in zip(picked, groups, strict=True)
    ]
    shown = (
        f"{len(picked)} of {len(readable)} images"
        if len(picked) < len(readable)
        else f"{len(picked)} images"
    )
    many = first.labels is not None and first.labels.ndim == 2
    several = " Of an image with several labels the first gives the colour." if many else ""
    caption = f"{how} of {shown}; a pointer on a dot shows its name and class.{several}"
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


def _how_made(results: Results) -> Markup:
    rows = []
    for part in results.made.features:
        rows += [(f"net {part.net}", f"{part.weights}, sha256 {str(part.fingerprint)[:12]}")]
        mirror = "with mirror images" if part.mirror else "without mirror images"
        scales = ", ".join(map(str, part.scales))
        rows += [("descriptor", f"{part.layer}, Q = {scales}, {mirror}")]
    rows += [("solver", str(results.solver).replace("_", " "))]
    rows += [("versions", ", ".join(f"{k} {v}" for k, v in results.made.versions.items()))]
    body = table(("", ""), rows, numbers=())
    if results.made.command:
        body += html("<p><code>{c}</code></p>", c=results.made.command)
    return body
