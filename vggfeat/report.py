"""What people would rather look at than read: one page of a classifier's score, mistakes, curves
and descriptors, what is looked for first at the top.

N images, K classes. Everything is optional: figures come from the results, curves and mistakes need
the model's scores and the feature file's labels, thumbnails need the images, the map needs the
descriptors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from vggfeat import datasets, metrics
from vggfeat.audit_page import Audit, rows_of, sections_of
from vggfeat.datasets.protocol import protocol_of
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.exhibits import WORST, Found, Mapped, Overlays, Pictures, Shown
from vggfeat.metrics import CLASS_FIGURES, FIGURES
from vggfeat.mistakes import COLUMNS, Ranking, rankings_of
from vggfeat.page import (
    MOST_BYTES,
    SMALL,
    Section,
    Series,
    bars,
    button,
    chart,
    coded,
    html,
    join,
    matrix_picture,
    overlay_switch,
    page,
    scatter,
    table,
    wrapping,
)
from vggfeat.results import (
    Results,
    cost,
    images,
    in_percent,
    over_classes,
    part_scored,
    scored_on,
    seen_by_net,
    summary,
    title,
    told,
)
from vggfeat.same_run import refuse_others
from vggfeat.store import Features

if TYPE_CHECKING:
    from vggfeat.model import Model

MANY = 40  # classes; of more, the best and the worst are shown
MOST_LISTED = 2000  # classes in a list, or in a confusion matrix
TABLE_CLASSES = 20  # of a confusion matrix with numbers in it
OFTEN, MOST_CELLS = 15, 3000  # confusions: in the list, and known to the script
FEW = 6  # classes whose best pictures are seen at once
FIRST, LISTED = 24, 300  # mistakes: those seen at once, and names without a picture
MISTAKE_BYTES = 200_000  # of a page: the list of mistakes for the script


def write_report(
    results: Results | None,
    features: Sequence[Features],
    model: Model | None,
    items: datasets.Items | None,
    why_no_images: str = "",
    *,
    look_for_problems: Callable[[], Audit] | None = None,
    explain: bool = False,
    show: Callable[[float, int, str], None] = lambda done, total, doing: None,
) -> tuple[str, list[str]]:
    """The page, under 2 MB, and a line for each thing that had to be left out.

    results: of `vggfeat svm --json`; the model's own if None. features: the files that the model
    was trained on, or none. items: where the images are, or None and why not. look_for_problems: in
    the data, see `audit_page.audit_features`; called once it is known that all are of one run.
    explain: with the evidence for classes over their best pictures, for which the model's networks
    are run. show: called with how much is done, of how much, and what is being done.
    Raises VggfeatError where they are not of one run: other images, classes, networks, scores.
    """
    if results is None:
        if model is None:
            raise WrongUsage("a report needs `results` or `model`")
        if model.results is None:
            raise VggfeatError("the model has no results: give them as `results`")
        results = model.results
    left_out = refuse_others(results, features, model)
    rankings = _rankings(results, features, model, left_out)
    if not features:
        left_out.append("the map of the descriptors: it needs `features`")
    mapped = Mapped.of(features, model, results) if features else None
    found = Found(results, features[0], rankings) if rankings else None
    overlays = Overlays()
    if explain and model and found and items is not None:
        overlays = Overlays.of(model, found, items, show)
        left_out += [overlays.why_none] if overlays.why_none else []
    problems = None
    if features and look_for_problems:
        show(0, 1, "problems in the data")
        problems = look_for_problems()
    shown = found.shown() if found else []
    if problems:
        shown += [Shown(row, -1, Markup("")) for row in rows_of(problems, features[0])]
    pictures = Pictures.of(features, items, shown, mapped, overlays.maps)
    if found and items is None:
        left_out.append(f"thumbnails: {why_no_images}")
    elif found:
        left_out += [f"thumbnails: {images(n)} {why}" for n, why in pictures.absent]
    for share in (1.0, 0.5, 0.2, 0.0):  # long names take room, too
        pictures.allow(share)
        sections = [_score(results, found, pictures)]
        if found:
            without = why_no_images if items is None else ""
            sections += _of_scores(found, pictures, share, without, overlays.about)
        if problems:
            sections += sections_of(problems, features[0], pictures.of_row)
        sections += _side_by_side(_per_class(results), _choice_of_c(results))
        own = [*left_out, *pictures.too_many()]
        drawn = [_map(mapped, pictures)] if mapped and share else []
        if mapped and not share:
            own.append("the map of the descriptors: the images' names are too long")
        sections += _side_by_side(drawn, [_how_made(results, own)])
        text = page(title(results), _lead(results), sections)
        if len(text.encode()) < MOST_BYTES:
            break
    return text, own


def _rankings(
    results: Results, features: Sequence[Features], model: Model | None, left_out: list[str]
) -> dict[str, Ranking]:
    """Of the model's scored images; none where something is missing, which is then left out."""
    if model is None:
        why = "they need `model`, written by `vggfeat svm --out`"
    elif not model.scored:
        why = "the model file has no scores; write it again with `vggfeat svm --out`"
    elif not features:
        why = "they need `features`, for the labels"
    elif rankings := rankings_of(model.scored, features[0], results):
        return rankings
    else:
        why = "the scored images have no labels"
    left_out.append(f"curves, confusions and mistakes: {why}")
    return {}


def _side_by_side(*parts: list[Section]) -> list[Section]:
    """Sections that share a wide screen, where there are two."""
    sections = [section for part in parts for section in part]
    if len(sections) < 2:
        return sections
    return [replace(section, half=True) for section in sections]


def _lead(results: Results) -> str:
    nets = [
        f"net {part.net}, {part.layer}, Q = {', '.join(map(str, part.scales))}"
        for part in results.made.features
    ]
    return " and ".join(nets)


# --- sections -------------------------------------------------------------------------------------


def _score(results: Results, found: Found | None, pictures: Pictures) -> Section:
    """What is looked for first: the figure that the protocol compares by, of what it is, and
    pictures.
    """
    figures = results.scored.figures
    there = [key for key in FIGURES if told(figures.mean(key)) is not None]
    there.sort(key=lambda key: key != (results.compared_by or results.choice.selected_by))
    lines = []
    for i, key in enumerate(there):
        mean = in_percent(figures.mean(key), 1)
        first = '<p class="score"><b>{mean}</b> <span>{name}{over}{spread}</span></p>'
        other = "<p>{name} {mean}{over}{spread}</p>"
        lines.append(
            html(
                first if i == 0 else other,
                mean=mean,
                name=FIGURES[key],
                over=over_classes(results, key),
                spread=_spread(results, key),
            )
        )
    if not there:
        lines.append(html('<p class="state">no figures</p>'))
    lines.append(html("<p>on {part}</p>", part=scored_on(results)))
    seen, spoilt = seen_by_net(results)
    if spoilt:
        lines.append(html("<p><b>The net was trained on {seen}.</b></p>", seen=seen))
    strip = Markup("")
    if found and pictures.any:
        shown = [
            html('<div class="{kind}">{f}</div>', kind=each.kind, f=pictures.figure(each))
            for each in found.strip
        ]
        strip = html(
            '<div><div class="pictures strip">{shown}</div><p class="soft">Some of the {all} of'
            " {name}, at random, of each class in turn.</p></div>",
            shown=join(shown),
            all=images(len(found.first.rows)),
            name=found.name,
        )
    facts = html(
        '<div class="facts">{t}{rules}</div>',
        t=table(("", ""), summary(results), numbers=()),
        rules=_rules(results),
    )
    body = html(
        '<div class="hero"><div>{lines}</div>{strip}{facts}</div>',
        lines=join(lines),
        facts=facts,
        strip=strip,
    )
    return Section("figures", "", body)


def _rules(results: Results) -> Markup:
    if not results.rules:
        return Markup("")
    return html('<p class="soft">{rules}</p>', rules="; ".join(results.rules))


def _spread(results: Results, key: str) -> str:
    """Of several splits the deviation; of an accuracy on one test set its interval."""
    std = told(results.scored.figures.std(key))
    if std is not None:
        n = len(results.per_split)
        return f" +- {100 * std:.1f} (standard deviation of {n} splits)"
    n = results.validation.n if results.test_labels == "none" and results.validation else 0
    n = n or results.n_test
    if key != "accuracy" or results.per_split or not n:
        return ""
    low, high = wilson(told(results.scored.figures.accuracy) or 0.0, n)
    return f", 95 % interval {100 * low:.1f} to {100 * high:.1f} %"


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n images that were drawn at random (E. B. Wilson, 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _of_scores(
    found: Found, pictures: Pictures, share: float, why_no_images: str, sees: str
) -> Iterator[Section]:
    """The sections that need scores and labels."""
    without = f" Thumbnails are left out: {why_no_images}." if why_no_images else ""
    for n, why in pictures.absent:
        without += f" {images(n)} {why}."
    sections = [_mistakes(found, pictures, share, without), _by_class(found, pictures, without)]
    if sees:
        first = 0 if found.mistakes else 1
        shown = sections[first]
        body = overlay_switch("show the evidence") + shown.body
        about = f"{shown.about} {_of_evidence(found)} {sees}"
        sections[first] = replace(shown, body=body, about=about)
    yield from sections
    if found.one_label:
        yield _confusions(found)
    yield _curves(found)


def _mistakes(found: Found, pictures: Pictures, share: float, without: str) -> Section:
    """The worst with pictures, more by name, and as many as fit as data for the script."""
    worst, names = found.worst, found.features.names
    rows, n = _as_rows(found, share), len(found.mistakes)
    data = {
        "columns": COLUMNS,
        "classes": found.classes,
        "parts": list(found.rankings),
        "rows": rows,
    }
    if not n:
        body = html("<p>None among the images of {of}.</p>", of=found.of_all)
        return Section("mistakes", "Mistakes", body, data=data)
    pictured = worst[: round(WORST * share)] if pictures.any else []
    figures = [pictures.figure(shown, evidence=True) for shown, _ in pictured]
    gallery = html('<div class="pictures wrong">{f}</div>', f=join(figures[:FIRST]))
    rest = [(names[each.row], each) for _, each in worst[len(pictured) :]]
    listed = [
        (
            name,
            ", ".join(found.classes[k] for k in each.labels) or "none of the classes",
            "-" if each.taken_for is None else found.classes[each.taken_for],
            *("-" if x is None else f"{x:+.2f}" for x in (each.score, each.label_score)),
        )
        for name, each in rest[: round(LISTED * max(share, 0.1))]
    ]
    head = ("image", "label", "taken for", "its score", "the label's")
    more = Markup("")
    if figures[FIRST:]:
        more += html('<div class="pictures wrong">{f}</div>', f=join(figures[FIRST:]))
    if listed:
        more += table(head, listed, numbers=(3, 4))
    if len(rest) > len(listed):
        left = len(rest) - len(listed)
        are = "is" if left == 1 else "are"
        more += html("<p>{n:,} more {are} not on this page.</p>", n=left, are=are)
    if len(rows) < n:
        save = button("csv", f"Save the first {len(rows):,} of {n:,} as CSV")
    else:
        save = button("csv", "Save as CSV")
    body = gallery if pictured else Markup("")
    if more:
        count = len(worst) - min(FIRST, len(pictured))
        body += html("<details><summary>{n:,} more</summary>{more}</details>", n=count, more=more)
        if not pictured:
            body = more
    about = f"{_counted(found)} All of them: `vggfeat report --mistakes FILE.csv`."
    return Section("mistakes", "Mistakes", body + save, about + without, data=data)


def _counted(found: Found) -> str:
    """How many mistakes there are of how much, and how they are ordered, in sentences."""
    n, tests = len(found.mistakes), sum(found.times.values())
    of, how = "of", ""
    by = "how far the score of the class that it was taken for lies above the label's"
    if not found.one_label:
        of, how = "on", ", a class being named where its score is above 0"
        by = "how far the score is from that"
    if found.parts == 1:
        return f"{n:,} {of} {images(tests)} of {found.name}{how}: the worst first, by {by}."
    wrong = images(len({each.row for each in found.mistakes}))
    return (
        f"{n:,} mistake{'s' * (n != 1)} in {tests:,} tests of {found.parts} splits{how}: {wrong},"
        f' the worst first, by {by}. Several splits may test an image: "in 1 of its 2 tests" says'
        " how often it was mistaken so."
    )


def _as_rows(found: Found, share: float) -> list[tuple[Any, ...]]:
    """Mistakes for the script, as many as their bytes allow: image's key, name, part, label, taken
    for, score, the label's score, how many parts test the image; parts and classes by their
    numbers, several labels as text.
    """
    parts = {name: i for i, name in enumerate(found.rankings)}
    room, rows = MISTAKE_BYTES * share, []
    for each in found.mistakes:
        labels: int | str = ";".join(found.classes[k] for k in each.labels)
        room -= 50 + 2 * len(found.features.names[each.row])
        if len(each.labels) == 1:
            labels = each.labels[0]
        else:
            room -= 2 * len(str(labels))
        if room < 0:
            break
        rows.append(
            (
                str(each.row),
                found.features.names[each.row],
                parts[each.part],
                labels,
                each.taken_for,
                *(None if x is None else float(f"{x:.9g}") for x in (each.score, each.label_score)),
                found.times[each.row],
            )
        )
    return rows


def _of_evidence(found: Found) -> str:
    """How the colours on pictures are read, and whose they are."""
    whose = "the saved classifier"
    if found.results.per_split or found.results.validation is not None:
        whose += ", which has learned from these images, too (the scores are of one that hasn't)"
    return (
        "On the first pictures, here and of each class: what speaks for the class whose score is"
        " told in orange, of a mistake the one that it was taken for; against it in blue; by"
        f" {whose}."
    )


def _by_class(found: Found, pictures: Pictures, without: str) -> Section:
    blocks = []
    for k, sides in found.by_class.items():
        lines = []
        for kind, shown in zip(("right", "wrong"), sides, strict=True):
            figures = [pictures.figure(each, evidence=True) for each in shown]
            lines.append(
                html(
                    '<div><p class="soft">best-scored {kind}</p><div class="pictures {kind}">'
                    "{figures}</div></div>",
                    kind=kind,
                    figures=join(figures) if figures else html('<p class="soft">none</p>'),
                )
            )
        blocks.append(
            html(
                '<h3>{name}</h3><div class="sides">{lines}</div>',
                name=wrapping(found.classes[k]),
                lines=join(lines),
            )
        )
    body = join(blocks[:FEW])
    if blocks[FEW:]:
        body += html(
            "<details><summary>{n} more classes</summary>{rest}</details>",
            n=len(blocks[FEW:]),
            rest=join(blocks[FEW:]),
        )
    about = (
        f"Of the images of {found.name}, by the class's score; classes with the lowest AP first."
    )
    if len(found.classes) > len(blocks):
        about += f" {len(blocks)} of {len(found.classes):,} classes."
    return Section("images", "Right and wrong by class", body, about + without)


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
        worst, best = bars(rows[-half:][::-1]), bars(rows[:half])
        body = html("<h3>Worst</h3>{worst}<h3>Best</h3>{best}", worst=worst, best=best)
        body += html(
            "<details><summary>{all} classes</summary>{rows}</details>",
            all=f"All {len(rows):,}" if len(rows) <= MOST_LISTED else f"The best {MOST_LISTED:,}",
            rows=table(("class", name), [(n, text) for n, _, text in rows[:MOST_LISTED]]),
        )
    return [Section("classes", f"Classes: {name}", body)]


def _choice_of_c(results: Results) -> list[Section]:
    choices = [
        (str(i) if split.name is None else split.name, split.choice)
        for i, split in enumerate(results.per_split)
        if split.choice.C_curve
    ] or [("all values", results.choice)]
    series, chosen = [], []
    for name, choice in choices:
        grid, scores = np.array(choice.C_grid), 100 * np.array(choice.C_curve)
        series.append(Series(name, grid, scores, dots=True))
        chosen += [(C, y) for C, y in zip(grid, scores, strict=True) if C == choice.C]
    if not any(len(each.x) for each in series):
        return []
    at, heights = np.array(chosen, float).reshape(-1, 2).T
    series.append(Series("chosen", at, heights, style="rings", colour=7))
    by = FIGURES.get(results.choice.selected_by or "", "score")
    splits = " (the median of the splits')" if len(choices) > 1 else ""
    about = (
        f"C = {cost(results.choice.C)}{splits}, by {by} on {results.C_chosen_on or 'validation'};"
        " of equals the smallest."
    )
    drawn = html('<div class="charts few">{c}</div>', c=chart(series, "C", f"{by}, %", log_x=True))
    return [Section("c", "The choice of C", drawn, about)]


def _curves(found: Found) -> Section:
    ranking, classes = found.first, found.classes
    ap = CLASS_FIGURES[protocol_of(found.results.protocol).class_ap]
    shown, how = _chosen(ranking.aps)
    figures = []
    for k in shown:
        precision, recall = metrics.precision_recall(ranking.scores[:, k], ranking.truth[:, k])
        caption = html(
            "{name}<br>{ap} {x}", name=wrapping(classes[k]), ap=ap, x=in_percent(ranking.aps[k], 1)
        )
        figures.append(
            chart(
                [Series(classes[k], recall, precision)],
                "recall",
                "precision",
                x_range=(0, 1),
                y_range=(0, 1),
                size=SMALL,
                caption=caption,
                small=True,
            )
        )
    about = f"Of the {images(len(ranking.rows))} of {found.name}. {how}"
    body = html('<div class="charts small-ones">{f}</div>', f=join(figures))
    return Section("curves", "Precision and recall", body, about)


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


def _confusions(found: Found) -> Section:
    """The whole matrix, as a table or a picture, and its largest cells."""
    classes, K = found.classes, len(found.classes)
    tests: list[tuple[int, int, int]] = []
    for ranking in found.rankings.values():
        assert ranking.predicted is not None  # one label an image
        own = ranking.truth.argmax(axis=1).tolist()
        tests += zip(own, ranking.predicted.tolist(), ranking.rows.tolist(), strict=True)
    counts = Counter((k, j) for k, j, _ in tests)
    different = Counter((k, j) for k, j, _ in set(tests))  # images: several splits test one
    of_label = Counter(k for k, _, _ in tests)
    share = {(k, j): n / of_label[k] for (k, j), n in counts.items()}
    often = sorted((-n, k, j) for (k, j), n in counts.items() if k != j)
    rows = [
        (classes[k], classes[j], f"{-n:,}", in_percent(share[k, j], 1)) for n, k, j in often[:OFTEN]
    ]
    data = {
        "cells": [(k, j, -n, different[k, j]) for n, k, j in often[:MOST_CELLS]],
        "labels": [(counts[k, k], of_label[k], different[k, k]) for k in range(K)],
    }
    what = f"confusion matrix of {K:,} classes"
    if K <= TABLE_CLASSES:
        body = _confusion_table(classes, counts, share)
        how = " A click, or Enter, on a cell shows its images."
    elif K <= MOST_LISTED:
        share_KK = np.zeros((K, K))
        for (k, j), value in share.items():
            share_KK[k, j] = value
        body = matrix_picture(share_KK, what)
        how = " Pointer and arrow keys tell a cell's classes; a click, or Enter, shows its images."
    else:
        body, how, data = html("<p>{what}: too many to draw.</p>", what=what), "", {}
    frequent = Markup("")
    if rows:
        head = ("label", "taken for", "images" if found.parts == 1 else "times", "of the label's")
        frequent = html("<div><h3>Most frequent</h3>{t}</div>", t=table(head, rows, (2, 3)))
    together = f"images of {found.of_all} together."
    if found.parts > 1:
        together = (
            f"the tests of {found.parts} splits together, an image counting in each that tests it."
        )
    about = f"Rows are labels, columns the best-scored class; {together}{how}"
    body = html(
        '<div class="confused"><div>{body}</div>{frequent}</div>'
        '<div class="panel" role="region" aria-label="Images of a cell" tabindex="-1" hidden>'
        "</div>",
        body=body,
        frequent=frequent,
    )
    return Section("confusions", "Confusions", body, about, data=data)


def _confusion_table(
    classes: Sequence[str],
    counts: Mapping[tuple[int, int], int],
    share: Mapping[tuple[int, int], float],
) -> Markup:
    columns = join(html('<th scope="col">{name}</th>', name=name) for name in classes)
    lines = []
    for k, name in enumerate(classes):
        cells = join(
            html(
                '<td style="background: rgb(59 130 246 / {alpha:.2f})">{n}</td>',
                alpha=0.75 * share.get((k, j), 0) ** 0.5,
                n=f"{counts[k, j]:,}" if (k, j) in counts else "",
            )
            for j in range(len(classes))
        )
        lines.append(html('<tr><th scope="row">{name}</th>{cells}</tr>', name=name, cells=cells))
    return html(
        '<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        "<tbody>{rows}</tbody></table></div>",
        head=columns,
        rows=join(lines),
    )


def _map(mapped: Mapped, pictures: Pictures) -> Section:
    data = pictures.tiles(mapped.rows.tolist())
    tells = "the image, its name and class" if data else "its image's name and class"
    caption = f"{mapped.caption} A pointer on a dot, or an arrow key, shows {tells}."
    drawn = scatter(mapped.xy, mapped.groups, mapped.titles, mapped.names, caption)
    body = html('<div class="charts few">{s}</div>', s=drawn)
    return Section("map", "Map of the descriptors", body, data=data)


def _how_made(results: Results, left_out: Sequence[str]) -> Section:
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
    if left_out:
        lines = join(html("<li>{x}</li>", x=coded(x)) for x in left_out)
        body += html("<h3>Left out</h3><ul>{x}</ul>", x=lines)
    return Section("made", "How it was made", body)
