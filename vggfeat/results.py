"""results.json: what `vggfeat svm` found, as types, and in words.

Each field is a key of the file, by its name; `docs/formats.md` says what it means. Figures are
fractions of 1: one that can't be computed is NaN, and `null` in the file; what a protocol doesn't
have is None or empty, and absent there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from vggfeat.aggregate import POOLINGS
from vggfeat.checked import Inline, OneOf, Range, Sparse, first_few, fitted, parse_json, read_text
from vggfeat.datasets.protocol import pool_of, protocol_of
from vggfeat.errors import VggfeatError
from vggfeat.metrics import CLASS_FIGURES, FIGURES
from vggfeat.notebook import Displayed, Table

HEAD_NAMES = {
    "svm": "linear SVM",
    "logistic": "logistic regression",
    "ridge": "ridge regression",
    "knn": "nearest neighbours",
}
"""Of classifiers, in words."""
K_NEAREST, TEMPERATURE = 20, 0.07  # of nearest neighbours; DINO's
Fraction = Annotated[float, Range(0, 1)]
Figure = Annotated[float, Range(0, 1, null=math.nan)]
Count = Annotated[int, Range(0, 2**53)]
Cost = Annotated[float, Range(1e-300, 1e300)]


@dataclass(frozen=True)
class Scored:
    """Some rows (n,) and their scores (n, K), by a classifier that was trained on none of them."""

    rows: NDArray[np.int64]
    scores: NDArray[np.floating]


@dataclass(frozen=True)
class ClassFigures(Sparse):
    """Of one class."""

    recall: Figure | None = None
    ap_11point: Figure | None = None
    ap_allpoint: Figure | None = None
    n_positive: Count | None = None

    def figure(self, key: str) -> float | None:
        """The figure of a key of `metrics.CLASS_FIGURES`."""
        value: float | None = getattr(self, key)
        return value

    @property
    def exist(self) -> bool:
        """Whether the class has a score."""
        return any(told(self.figure(key)) is not None for key in CLASS_FIGURES)


@dataclass(frozen=True)
class Figures(Sparse):
    """Over all classes; of several splits the means, and the deviation (ddof=1) beside each.

    n_classes: how many classes have a score, over which the means are; of several splits each says.
    """

    accuracy: Figure | None = None
    accuracy_std: Figure | None = None
    mean_class_recall: Figure | None = None
    mean_class_recall_std: Figure | None = None
    map_11point: Figure | None = None
    map_11point_std: Figure | None = None
    map_allpoint: Figure | None = None
    map_allpoint_std: Figure | None = None
    map_every_class: Figure | None = None
    map_every_class_std: Figure | None = None
    n_classes: Count | None = None

    def mean(self, key: str) -> float | None:
        """The figure of a key of `metrics.FIGURES`."""
        value: float | None = getattr(self, key)
        return value

    def std(self, key: str) -> float | None:
        value: float | None = getattr(self, f"{key}_std")
        return value


@dataclass(frozen=True)
class ScoredPart(Sparse):
    """Figures of n images; in the file those of the validation part, where no test image has a
    label.
    """

    n: Count = 0
    figures: Annotated[Figures, Inline()] = field(default_factory=Figures)
    per_class: dict[str, ClassFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice(Sparse):
    """C, and where it was chosen the values that were tried, with the validation score of each; of
    nearest neighbours k.
    """

    C: Cost | None = None
    k: Count | None = None
    C_grid: list[Cost] = field(default_factory=list)
    C_curve: list[Fraction] = field(default_factory=list)
    selected_by: str | None = None
    C_grid_extended_by: list[Cost] = field(default_factory=list)

    @property
    def knob(self) -> str:
        """What is set: C or k."""
        return "C" if self.k is None else "k"

    @property
    def words(self) -> str:
        """The value."""
        return cost(self.C) if self.k is None else str(self.k)


@dataclass(frozen=True)
class Split(Sparse):
    """One of several splits: its own choice, images and figures."""

    name: str | None = None
    choice: Annotated[Choice, Inline()] = field(default_factory=Choice)
    n_train: Count = 0
    n_test: Count = 0
    figures: Annotated[Figures, Inline()] = field(default_factory=Figures)
    n_test_seen: Count | None = None
    n_test_in_train: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Part(Sparse):
    """How the images were described, by one network."""

    file: str | None = None
    net: str
    weights: str | None = None
    fingerprint: str | None = None
    layer: str
    mirror: bool | None = None
    scales: list[Annotated[int, Range(1, 2**31)]]
    regions: list[str] = field(default_factory=list)
    rows: str | None = None


@dataclass(frozen=True)
class Made(Sparse):
    """Of which feature files, pooled how and by whose word, with which programs."""

    features: list[Part] = field(default_factory=list)
    pool: Annotated[str, OneOf(POOLINGS)] | None = None
    pool_by: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Results(Displayed, Sparse):
    """results.json. `made` is what the protocol doesn't know."""

    protocol: str
    head: Annotated[str, OneOf(tuple(HEAD_NAMES))] = "svm"
    solver: str | None = None
    compared_by: str | None = None
    class_weight: str | None = None
    difficult: str | None = None
    choice: Annotated[Choice, Inline()] = field(default_factory=Choice)
    splits: str | None = None
    test_split: str = "test"
    model_trained_on: str = "train"
    C_chosen_on: str | None = None
    validated_on: str | None = None
    n_train: Count = 0
    n_test: Count = 0
    n_unreadable: Count = 0
    other_images: list[str] = field(default_factory=list)
    test_labels: str | None = None
    validation: ScoredPart | None = None
    figures: Annotated[Figures, Inline()] = field(default_factory=Figures)
    per_split: list[Split] = field(default_factory=list)
    per_class: dict[str, ClassFigures] = field(default_factory=dict)
    net_trained_on: Count | None = None
    n_test_seen: Count | None = None
    n_test_in_train: Count | None = None
    same_images: list[str] = field(default_factory=list)
    degenerate_classes: list[str] = field(default_factory=list)
    classes_without_ap: list[str] = field(default_factory=list)
    not_converged: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    scored_on: str | None = None
    seconds: float | None = None
    dataset: str
    made: Annotated[Made, Inline()] = field(default_factory=Made)

    @property
    def scored(self) -> Results | ScoredPart:
        """What has the figures: where no test image has a label, the validation part."""
        if self.test_labels == "none":
            return self.validation or ScoredPart()
        return self

    @property
    def pool(self) -> str:
        """Over the scales; where they don't say, as the protocol has it."""
        return self.made.pool or pool_of(self.protocol)[0]

    def _title(self) -> str:
        return f"Results of {title(self)}"

    def _rows(self) -> list[tuple[str, str]]:
        return summary(self)

    def _folded(self) -> list[Table]:
        choice, classes = choice_columns(self), class_columns(self)
        return [
            Table("The choice of C", *choice, range(len(choice[0]) - 1)),
            Table("Each class", *classes, range(1, len(classes[0]))),
        ]

    def in_brief(self) -> dict[str, Any]:
        """Those keys of the file that say which run it was."""
        record = self.to_json()
        keys = ("dataset", "protocol", "C", "class_weight", "model_trained_on", "command")
        return {key: record[key] for key in keys if key in record}


def results_from(value: Any, where: Any) -> Results:
    """The results in a JSON value. Raises VggfeatError, which begins with `where`."""
    results: Results = fitted(value, Results, where)
    for choice in (results.choice, *(split.choice for split in results.per_split)):
        if len(choice.C_grid) != len(choice.C_curve):
            raise VggfeatError(f"{where}: C_grid and C_curve have different lengths")
    return results


def read_results(path: Path) -> Results:
    """results.json of `vggfeat svm --json`. Raises VggfeatError when it isn't one."""
    text = read_text(path, "results", "write them with `vggfeat svm --json`")
    return results_from(parse_json(text, path), path)


def refuse_other_run(ours: Results, theirs: Results) -> None:
    """Raise VggfeatError where results, and those of a model, are of two runs."""
    of_two = "the results and the model are of two runs:"
    for key, one, other in (
        ("dataset", ours.dataset, theirs.dataset),
        ("head", ours.head, theirs.head),
        ("C", ours.choice.C, theirs.choice.C),
        ("n_test", ours.n_test, theirs.n_test),
        *((key, told(ours.figures.mean(key)), told(theirs.figures.mean(key))) for key in FIGURES),
    ):
        if one != other:
            raise VggfeatError(f"{of_two} {key} is {one} and {other}")
    for key in ("rows", "fingerprint", "layer", "scales", "regions"):
        if [getattr(part, key) for part in ours.made.features] != [
            getattr(part, key) for part in theirs.made.features
        ]:
            raise VggfeatError(f"{of_two} they have other feature files ({key})")


# In words -----------------------------------------------------------------------------------------


def figure_rows(results: Results) -> list[tuple[str, str]]:
    """(name, value) of the figures over all classes."""
    figures = results.scored.figures
    rows = []
    for key, name in FIGURES.items():
        if (mean := told(figures.mean(key))) is not None:
            std = told(figures.std(key))
            shown = in_percent(mean) + ("" if std is None else f" +- {100 * std:.2f}")
            rows.append((f"{name} on {part_scored(results)}{over_classes(results, key)}", shown))
    return rows


def summary(results: Results) -> list[tuple[str, str]]:
    """(name, value) of the figures, and of what they come from, as a person reads them."""
    rows = figure_rows(results)
    if results.other_images:
        rows.append(("images", "; ".join(results.other_images)))
    rows += [("the same images", line) for line in results.same_images]
    if seen := seen_by_net(results)[0]:
        rows.append(("the net was trained on", seen))
    rows += [("scored on", scored_on(results)), ("trained on", trained_on(results))]
    rows += _choice_rows(results)
    if results.class_weight is not None:
        rows.append(("class weights", results.class_weight))
    if results.made.pool and any(len(part.scales) > 1 for part in results.made.features):
        by = f" ({results.made.pool_by})" if results.made.pool_by is not None else ""
        rows.append(("pool over scales", f"{results.made.pool}{by}"))
    if results.difficult is not None:
        rows.append(("difficult objects", f"{results.difficult}, in training and in scoring"))
    if results.n_unreadable:
        rows.append(("unreadable images", f"{results.n_unreadable:,}, left out"))
    without = [name for name, figures in results.scored.per_class.items() if not figures.exist]
    rows += [
        (name, first_few(names, 20))
        for name, names in (
            ("classes without score", without),
            ("classes not learned", results.degenerate_classes),
            ("not converged", results.not_converged),
        )
        if names
    ]
    rows.append(("protocol", results.protocol))
    return rows


def _choice_rows(results: Results) -> list[tuple[str, str]]:
    splits = results.per_split
    median = ", the median of the splits'" if len({split.choice.C for split in splits}) > 1 else ""
    further = ", ".join(map(cost, results.choice.C_grid_extended_by))
    extended = f"; the grid was extended by {further}" if further else ""
    rows = [(results.choice.knob, f"{results.choice.words}{median}{extended}")]
    for i, split in enumerate(splits):
        compared = results.compared_by  # an older version's don't say it
        if compared is None:
            one_label = split.figures.mean_class_recall is not None
            compared = "mean_class_recall" if one_label else "map_allpoint"
        score = split.figures.mean(compared)
        rows.append(
            (f"split {i}", f"{in_percent(score)}, {split.choice.knob} {split.choice.words}")
        )
    return rows


def title(results: Results) -> str:
    """Of a table or a page of these results."""
    other = results.other_images
    return (
        f"{results.dataset}{', ' if other else ''}{''.join(other[:1])}: {HEAD_NAMES[results.head]}"
    )


def over_classes(results: Results, key: str) -> str:
    """ ", over 9 of 20 classes" for a mean over classes that some have no score for, and which the
    protocol leaves out; else "".
    """
    parts: Sequence[Split | Results | ScoredPart] = results.per_split or [results.scored]
    per_class = results.scored.per_class
    counts = [n for part in parts if (n := part.figures.n_classes) is not None]
    counts = counts or [sum(of_class.exist for of_class in per_class.values())]  # an older version
    left_out = [name for name in protocol_of(results.protocol).left_out if name in per_class]
    low, high, K = min(counts), max(counts), len(per_class) - len(left_out)
    if key in ("accuracy", "map_every_class"):
        return ""
    without = f", without {', '.join(left_out)}" if left_out else ""
    if low >= K:
        return without
    return f"{without}, over {low:,}{f' to {high:,}' if high > low else ''} of {K:,} classes"


def choice_columns(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows of the values of C that were tried, with the score that chose, of several
    splits the mean and that of each; numbers all but the last column. No rows where none was
    chosen.
    """
    chosen = results.choice
    by = FIGURES.get(chosen.selected_by or "", "score")
    splits = [split.choice for split in results.per_split if split.choice.C_grid]
    curves = [dict(zip(choice.C_grid, choice.C_curve, strict=True)) for choice in (chosen, *splits)]
    head = ["C", f"{by} on {results.C_chosen_on or 'validation'}"]
    head += [f"split {i}" for i in range(len(splits))]
    return [*head, ""], [
        (cost(C), *(in_percent(curve.get(C)) for curve in curves), "chosen" * (chosen.C == C))
        for C in sorted(set().union(*curves))
    ]


def class_columns(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows of the figures of each class, numbers all but the first column; no rows where
    there are none.
    """
    per_class = results.scored.per_class
    kinds = [
        key
        for key in CLASS_FIGURES
        if any(figures.figure(key) is not None for figures in per_class.values())
    ]
    counted = any(figures.n_positive is not None for figures in per_class.values())
    rows = [
        (
            name,
            *(in_percent(figures.figure(key)) for key in kinds),
            *([f"{figures.n_positive or 0:,}"] if counted else []),
        )
        for name, figures in per_class.items()
    ]
    head = [
        "class",
        *(f"{CLASS_FIGURES[key]} on {part_scored(results)}" for key in kinds),
        *(["images"] if counted else []),
    ]
    return head, rows


def part_scored(results: Results) -> str:
    """What was scored, in two or three words."""
    return "the test parts" if results.per_split else scored_on(results).partition(" (")[0]


def scored_on(results: Results) -> str:
    """In words what the figures were computed from, beginning with the part's name."""
    chosen = results.C_chosen_on
    if results.test_labels == "none":
        if results.validation is None:
            return "nothing: no test image has a label"
        part = chosen or results.validated_on or "val"
        why = "C was chosen on them, so this is optimistic" if chosen else "none of them trained on"
        return f"{part} ({images(results.validation.n)}; {why}); no test image has a label"
    how = f"C was chosen on {chosen}" if chosen else f"{results.choice.knob} was given"
    if splits := results.per_split:
        parts = (
            "the test part of 1 split"
            if len(splits) == 1
            else f"the test parts of {len(splits)} splits"
        )
        return f"{parts} ({images(*(split.n_test for split in splits))} each; {how})"
    return f"{results.test_split} ({images(results.n_test)}; {how})"


def trained_on(results: Results) -> str:
    """In words, what had been learned from where the figures come from, and by the classifier that
    is kept.
    """
    final, n = results.model_trained_on, results.n_train
    if splits := results.per_split:
        counts = [split.n_train for split in splits]
        return f"the rest of each split ({images(*counts)}); the saved classifier on {final}"
    if results.validation is not None:
        fit = n - results.validation.n
        return f"the rest of {final} ({images(fit)}); the saved classifier on all {n:,}"
    return f"{final} ({images(n)})"


def seen_by_net(results: Results) -> tuple[str, bool]:
    """Which of the images trained the net, in words, "" where none is known to; whether any of them
    was scored.
    """
    if not (n := results.net_trained_on):
        return "", False
    scored = [
        (split.n_test_seen or 0, split.n_test, f" of {split.name}") for split in results.per_split
    ]
    if not scored:
        tested = results.validation.n if results.validation else results.n_test
        scored = [(results.n_test_seen or 0, tested, "")]
    spoilt = [f"{seen:,} of the {tested:,} scored{where}" for seen, tested, where in scored if seen]
    if not spoilt:
        return f"{images(n)} of these, none of which is scored", False
    clean = [where.removeprefix(" of ") for seen, _, where in scored if not seen]
    only = f"only {' and '.join(clean)} is clean" if clean else "no figure is clean"
    return f"{images(n)} of these, among them {', '.join(spoilt)}: {only}", True


def images(*counts: int) -> str:
    """ "1 image", "24 images", or "20 to 24 images"."""
    low, high = min(counts), max(counts)
    return (
        f"{low:,} to {high:,} images" if low < high else f"{low:,} image{'s' if low != 1 else ''}"
    )


def in_percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction of 1 in per cent; none, or NaN, as "-"."""
    return "-" if (figure := told(fraction)) is None else f"{100 * figure:.{digits}f} %"


def told(figure: float | None) -> float | None:
    """The figure; None, too, where it can't be computed."""
    return None if figure is None or math.isnan(figure) else figure


def cost(C: float | None) -> str:
    """A value of C in four digits; None as "-"."""
    return "-" if C is None else f"{C:.4g}"
