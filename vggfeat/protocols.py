"""How each dataset is scored: which rows train, validate and test, how C is chosen, what is
reported.

N images, D descriptor length, K classes. Paper, Appendix B; where it is silent, the results name
the rule.

1. C is chosen on the validation part: one C for all classes, by mean class recall (one label an
   image) or mean average precision (several; 11-point for VOC-2007, all-point otherwise). Of equals
   the smallest C wins.
2. The SVMs are fitted again with that C on train + val, and scored on test.
3. VOC: an image whose only objects of a class are difficult (label 0) is left out for that class,
   in training and in test. Caltech: several random splits, mean and standard deviation over them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from vggfeat import metrics
from vggfeat.aggregate import POOLINGS
from vggfeat.checked import OneOf, Range
from vggfeat.datasets.items import known
from vggfeat.datasets.protocol import Protocol, protocol_of
from vggfeat.datasets.splits import N_SPLITS, VAL_FRACTION
from vggfeat.errors import VggfeatError
from vggfeat.svm import C_GRID, LOSSES, SCORE_ROWS, SOLVERS, LinearSVM

C_STEP = 4.0  # the grid's ratio, and that of its extension
# of descriptors of length 1; far beyond it nothing can be solved in float64, and it takes hours
MOST_C = 1e12
MAX_EXTENSIONS = 3  # further values of C where the best is at the end of the grid

CUT = "20 % of train"


Rows = NDArray[np.int64]

# What results.json may hold: `run` and `classify.problem_from` say what each key is.
Fraction = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(0, 2**53)]
Cost = Annotated[float, Range(1e-300, 1e300)]


class ClassFigures(TypedDict, total=False):
    """Of one class. None: no such figure."""

    recall: Fraction | None
    ap_11point: Fraction | None
    ap_allpoint: Fraction | None
    n_positive: Count


class Figures(TypedDict, total=False):
    """Of some scored images."""

    accuracy: Fraction | None
    accuracy_std: Fraction | None
    mean_class_recall: Fraction | None
    mean_class_recall_std: Fraction | None
    map_11point: Fraction | None
    map_11point_std: Fraction | None
    map_allpoint: Fraction | None
    map_allpoint_std: Fraction | None
    n_classes: Count
    per_class: dict[str, ClassFigures]


class Validation(Figures, total=False):
    """Figures of the validation part, and how many images it has."""

    n: Count


class Choice(Figures, total=False):
    """Figures, and how their C was chosen."""

    name: str
    C: Cost
    C_grid: list[Cost]
    C_curve: list[Fraction]
    n_train: Count
    n_test: Count
    n_test_seen: Count
    n_test_in_train: Count


class _Part(TypedDict):
    net: str
    layer: str
    scales: list[Annotated[int, Range(1, 2**31)]]


class Part(_Part, total=False):
    """How the images were described, by one network."""

    weights: str
    fingerprint: str
    mirror: bool
    rows: str


class _Results(TypedDict):
    dataset: str
    protocol: str


class Results(_Results, Choice, total=False):
    """results.json."""

    C_grid_extended_by: list[Cost]
    selected_by: str
    C_chosen_on: str
    validated_on: str
    compared_by: str
    scored_on: str
    difficult: str
    solver: str
    class_weight: str
    splits: str
    test_split: str
    n_unreadable: Count
    net_trained_on: Count
    other_images: list[str]
    same_images: list[str]
    model_trained_on: str
    rules: list[str]
    seconds: float
    per_split: list[Choice]
    test_labels: str
    validation: Validation
    degenerate_classes: list[str]
    classes_without_ap: list[str]
    not_converged: list[str]
    features: list[Part]
    pool: Annotated[str, OneOf(POOLINGS)]
    pool_by: str
    versions: dict[str, str]
    command: str


@dataclass(frozen=True)
class Problem:
    """What is classified: one descriptor an image, with labels and splits as `datasets.Items` codes
    them.

    X: (N, D) float32, aggregated and normalised; rows of unreadable images are NaN.
    labels: (N,) int32, -1 where unknown; or (N, K) int8 of 1, -1, 0 (difficult), all zeros where
    unknown. classes: K names.
    splits: name -> rows: "train", "val", "test", or "split0/train", "split0/val", "split0/test", …
    readable: (N,) bool.
    protocol: one of `datasets.protocol.PROTOCOLS`.
    names: N image names.
    total: images of the data set, where these are the first of them; else None.
    seen: (N,) bool, the images that trained the network that described them; None: unknown.
    same: (N,) the first row that holds the same image file, of most rows their own; None: unknown.
    """

    X: np.ndarray
    labels: np.ndarray
    classes: list[str]
    splits: dict[str, np.ndarray]
    readable: np.ndarray
    protocol: str
    names: list[str]
    total: int | None = None
    seen: np.ndarray | None = None
    same: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.X)
        if self.X.ndim != 2 or not (len(self.labels) == len(self.readable) == len(self.names) == n):
            raise VggfeatError(
                f"descriptors {self.X.shape}, labels {self.labels.shape}, readable"
                f" {self.readable.shape} and {len(self.names)} names don't describe the same images"
            )
        if self.labels.ndim not in (1, 2) or (
            self.labels.ndim == 2 and self.labels.shape[1] != len(self.classes)
        ):
            raise VggfeatError(
                f"labels {self.labels.shape} don't match {len(self.classes)} classes"
            )
        if (
            self.labels.ndim == 1
            and n
            and not -1 <= self.labels.min() <= self.labels.max() < len(self.classes)
        ):
            raise VggfeatError(f"labels must lie within -1 … {len(self.classes) - 1}")
        for name, rows in self.splits.items():
            if len(rows) and not 0 <= np.min(rows) <= np.max(rows) < n:
                raise VggfeatError(f"split {name} names rows outside 0 … {n - 1}")

    @property
    def multilabel(self) -> bool:
        return self.labels.ndim == 2

    @property
    def known(self) -> NDArray[np.bool_]:
        """(N,) whether anything is known of an image's label."""
        return known(self.labels)

    @property
    def rules(self) -> Protocol:
        return protocol_of(self.protocol)

    @property
    def compared_by(self) -> str:
        """The figure that chooses C and is compared."""
        return self.rules.compared_by(self.multilabel)


@dataclass(frozen=True)
class Scored:
    """Some rows and their scores (n, K), by a classifier that was trained on none of them."""

    rows: Rows
    scores: NDArray[np.floating]


@dataclass
class Outcome:
    """What a protocol gives.

    results: the scores of results.json, plain Python values.
    model: the classifier to keep; results["model_trained_on"] says on what.
    scored: what the figures were computed from: "test" (or "val", where that is the part that is
        scored), or one a split: "split0", "split1", …; and "validation" where the test part has no
        labels.
    """

    results: dict[str, Any]
    model: LinearSVM
    scored: dict[str, Scored]


@dataclass(frozen=True)
class _Split:
    """Readable rows of one split. fit + val choose C; refit, then test, give the score."""

    name: str  # "" for the official split
    fit: Rows
    val: Rows
    refit: Rows
    test: Rows


def run(
    problem: Problem,
    *,
    C: str | float | Sequence[float] = "auto",
    seed: int | None = None,
    loss: str = "squared_hinge",
    solver: str = "newton",
    device: str = "cpu",
    class_weight: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Choose C, train and test by the problem's protocol.

    C: "auto" tries C_GRID, and up to three more values while the best is strictly better than all
        others and at an end of the grid; a list tries exactly its values; one value is used as it
        is.
    seed: None uses the stored splits; a number draws random splits anew (as many as are stored,
        else three). Official splits stay as they are; only a validation part that must be cut from
        train depends on it (None: 0).
    loss, solver, device: as `LinearSVM`. class_weight: None or "balanced", in choosing C, too.
    progress: called with one line for each fit that ended, and where the seed changes nothing.

    The results have the keys of results.json. Figures are fractions of 1; what a protocol lacks is
    absent.
    - protocol, solver, class_weight, C, C_grid, C_curve (validation score of each C; with several
      splits the mean, over the values that all of them tried), C_grid_extended_by, selected_by,
      C_chosen_on.
    - splits, test_split (which part was scored), n_train, n_test (of the first split, if several),
      n_unreadable (of all images), net_trained_on (how many of them), n_test_seen (of the scored
      images, how many the net has been trained on), other_images (in what they are not the
      protocol's), same_images (in words, which are there more than once), n_test_in_train (how many
      of the scored ones were trained on), model_trained_on, scored_on (in words), compared_by (the
      figure that is the protocol's), difficult ("left out"), rules (sentences), seconds.
    - accuracy and mean_class_recall, or map_11point and map_allpoint, n_classes (that have a
      score), and per_class (None: no such figure).
      Several splits: their means, with _std (ddof=1) beside them, and per_split.
    - test_labels "none", when no test image has a label: the only figures are then under
      validation, of the classifier trained without that part.
    - degenerate_classes lack positives or negatives in training, classes_without_ap lack positives
      in test, not_converged names the fits that did not reach the solver's tolerance.

    Raises VggfeatError when there is nothing to train, validate or test on, when a class of a
    one-label problem has no training image, or when a C is not positive.
    """
    started = time.perf_counter()
    grid = _grid(C)
    for name, given, allowed in (("loss", loss, LOSSES), ("solver", solver, SOLVERS)):
        if given not in allowed:
            raise VggfeatError(f"{name} must be {' or '.join(allowed)}, not {given}")
    if class_weight not in (None, "balanced"):
        raise VggfeatError(f"class_weight must be None or balanced, not {class_weight}")
    if len(problem.classes) < 2 and not problem.multilabel:
        raise VggfeatError(
            f"there is one class only, {', '.join(problem.classes)}; a classifier needs at"
            " least two"
        )
    select = len(grid) > 1
    splits, facts = _splits(problem, seed, select)
    _check(problem, splits)
    say = progress or (lambda line: None)
    drawn = CUT in (facts.get("C_chosen_on"), facts.get("validated_on"))
    if seed is not None and facts["splits"] == "official" and not drawn:
        say("the splits are the data set's own: `seed` changes nothing")
    svm = LinearSVM(loss=loss, solver=solver, device=device, class_weight=class_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # named once, in the results
        outcome = _choose_and_score(problem, splits, facts, grid, isinstance(C, str), svm, say)
    outcome.results["seconds"] = time.perf_counter() - started
    return outcome


# Which rows ---------------------------------------------------------------------------------------


def _splits(
    problem: Problem, seed: int | None, select: bool
) -> tuple[list[_Split], dict[str, Any]]:
    """The protocol's splits, without unreadable rows, and what the results say of them.

    select: whether C is to be chosen, which needs a validation part.
    """
    if "train" in problem.splits:
        return _official_split(problem, seed or 0, select)
    stored, facts = problem.splits, {"splits": "stored", "test_split": "test"}
    names = _split_names(stored)
    if seed is not None and (names or not stored):
        # Drawn over all images, so that an unreadable one doesn't change who else is where.
        stored = problem.rules.splits(problem.labels, len(names) or N_SPLITS, seed)
        names, facts["splits"] = _split_names(stored), f"drawn with seed {seed}"
    if not names:
        there = (
            f"there is {' and '.join(stored)}, but no train: describe images with that split, too"
        )
        raise VggfeatError(there if stored else "there are no splits: give `seed` to draw some")
    splits, chosen_on = [], "the val part of each split"
    for number, name in enumerate(names):
        for part in ("train", "test"):
            if f"{name}/{part}" not in stored:
                raise VggfeatError(f"{name} has no {part} part")
        train, test = (
            _usable(problem, stored[f"{name}/train"]),
            _readable(problem, stored[f"{name}/test"]),
        )
        if f"{name}/val" in stored:
            val = _usable(problem, stored[f"{name}/val"])
        elif select:
            val = _cut(problem, train, np.random.default_rng([seed or 0, number]))
            chosen_on = CUT
        else:
            val = train[:0]
        splits.append(_Split(name, np.setdiff1d(train, val), val, np.union1d(train, val), test))
    if select:
        facts["C_chosen_on"] = chosen_on
    facts["model_trained_on"] = "all labelled images"
    return splits, facts


def _split_names(splits: dict[str, np.ndarray]) -> list[str]:
    """split0, split1, … split10, in the order of their numbers."""
    return sorted(
        {name.split("/")[0] for name in splits if "/" in name}, key=lambda name: (len(name), name)
    )


def _official_split(
    problem: Problem, seed: int, select: bool
) -> tuple[list[_Split], dict[str, Any]]:
    stored = problem.splits
    if "test" not in stored and "val" not in stored:
        raise VggfeatError(
            "there is a train split, but neither val nor test to score on: describe labelled images"
            " with one of them"
        )
    train, test_split = _usable(problem, stored["train"]), "test" if "test" in stored else "val"
    test = _readable(problem, stored[test_split])
    facts = {"splits": "official", "test_split": test_split, "model_trained_on": "train"}
    # Without test labels the figures are those of the validation part, which even a single C then
    # needs.
    needs_val = select or not problem.known[test].any()
    val, chosen_on = train[:0], ""
    if "val" in stored and test_split == "test":
        val, chosen_on = _usable(problem, stored["val"]), "val"
        facts["model_trained_on"] = "train + val"
    elif needs_val:
        val, chosen_on = _cut(problem, train, np.random.default_rng(seed)), CUT
    if needs_val:
        facts["C_chosen_on" if select else "validated_on"] = chosen_on
    return [_Split("", np.setdiff1d(train, val), val, np.union1d(train, val), test)], facts


def _readable(problem: Problem, rows: np.ndarray) -> Rows:
    rows = np.asarray(rows, dtype=np.int64)
    return rows[problem.readable[rows]]


def _usable(problem: Problem, rows: np.ndarray) -> Rows:
    """Readable rows with a label, sorted: how a split lists them then doesn't change a bit of the
    result.
    """
    rows = np.unique(_readable(problem, rows))
    return rows[problem.known[rows]]


def _cut(problem: Problem, train: Rows, key: np.random.Generator) -> Rows:
    """20% of train, of each class where an image has one label; a class always keeps an image to
    train on.
    """
    if problem.multilabel:
        return np.sort(key.permutation(train)[: round(VAL_FRACTION * len(train))])
    val: list[Rows] = []
    for k in range(len(problem.classes)):
        rows = key.permutation(train[problem.labels[train] == k])
        val.append(
            rows[: min(max(1, round(VAL_FRACTION * len(rows))), len(rows) - 1)]
            if len(rows)
            else rows
        )
    return np.sort(np.concatenate(val))


def _check(problem: Problem, splits: list[_Split]) -> None:
    """No empty part, no image both trained and tested, no class untrained, no NaN in a readable
    row.
    """
    used = np.unique(
        np.concatenate([rows for split in splits for rows in (split.refit, split.test)])
    )
    for start in range(0, len(used), SCORE_ROWS):
        rows = used[start : start + SCORE_ROWS]
        bad = rows[~np.isfinite(problem.X[rows]).all(axis=1)]
        if len(bad):
            name = problem.names[bad[0]]
            raise VggfeatError(
                f"the descriptor of {name} (row {bad[0]}) holds NaN or infinity: extract it again"
            )
    for split in splits:
        where = f" in {split.name}" if split.name else ""
        for part, rows in (("train", split.fit), ("test", split.test)):
            if len(rows) == 0:
                why = ": a class needs two images or more to be split" if split.name else ""
                raise VggfeatError(f"there are no readable {part} images{where}{why}")
        both = np.intersect1d(split.refit, split.test)
        if len(both):
            raise VggfeatError(
                f"{len(both)} images are both trained and tested on{where}, first"
                f" {problem.names[both[0]]}"
            )
        if not problem.multilabel:
            counts = np.bincount(problem.labels[split.fit], minlength=len(problem.classes))
            missing = [problem.classes[k] for k in np.flatnonzero(counts == 0)]
            if missing:
                more = f" and {len(missing) - 10:,} more" if len(missing) > 10 else ""
                raise VggfeatError(
                    f"no readable training image{where} of: {', '.join(missing[:10])}{more}"
                    + (
                        f"; these are {_first(problem)}: describe all of them"
                        if problem.total
                        else ""
                    )
                )
            continue
        truth = problem.labels[split.fit]
        if not ((truth == 1).any(axis=0) & (truth == -1).any(axis=0)).any():
            raise VggfeatError(f"no class has both positive and negative training images{where}")


# Which C ------------------------------------------------------------------------------------------


def _grid(C: str | float | Sequence[float]) -> list[float]:
    """The values to try, ascending."""
    if isinstance(C, str):
        if C != "auto":
            raise VggfeatError(f"C must be auto or positive numbers, not {C}")
        return list(C_GRID)
    values = sorted({float(value) for value in np.atleast_1d(np.asarray(C, dtype=float))})
    if not values or not all(1 / MOST_C <= value <= MOST_C for value in values):
        raise VggfeatError(f"C must be auto or numbers from {1 / MOST_C:g} to {MOST_C:g}, not {C}")
    return values


def _winner(curve: dict[float, float]) -> float:
    """The C with the best validation score; of equals the smallest, the most regularised."""
    return max(sorted(curve), key=lambda C: curve[C])


def _extension(curve: dict[float, float]) -> float | None:
    """The next C to try when the best is at an end of the grid, else None.

    A plateau isn't followed: where the neighbour is as good, nothing says that a C further out is
    better.
    """
    order, best = sorted(curve), max(curve.values())
    if list(curve.values()).count(best) > 1:
        return None
    if curve[order[-1]] == best:
        return order[-1] * C_STEP
    return order[0] / C_STEP if curve[order[0]] == best else None


def _candidates(grid: list[float], curve: dict[float, float], extend: bool) -> Iterator[float]:
    """The grid, then what its curve, filled in meanwhile, asks for."""
    yield from grid
    for _ in range(MAX_EXTENSIONS if extend else 0):
        further = _extension(curve)
        if further is None:
            return
        yield further


def _curves(
    problem: Problem,
    splits: list[_Split],
    grid: list[float],
    extend: bool,
    svm: LinearSVM,
    say: Callable[[str], None],
) -> tuple[list[dict[float, float]], list[LinearSVM], list[str]]:
    """Each split's validation score of each C, its best classifier, and the fits that did not
    converge.
    """
    curves: list[dict[float, float]] = [{} for _ in splits]
    best: list[LinearSVM] = []
    broken_off: list[str] = []
    for split, curve in zip(splits, curves, strict=True):
        candidates = _candidates(grid, curve, extend)
        models: dict[float, LinearSVM] = {}
        for model in svm.path(problem.X[split.fit], problem.labels[split.fit], candidates):
            curve[model.C] = score = _validate(problem, model, split.val)
            winner = _winner(curve)
            models = {C: kept for C, kept in [*models.items(), (model.C, model)] if winner == C}
            if np.isnan(score):
                where = f" of {split.name}" if split.name else ""
                raise VggfeatError(
                    f"no class has a positive image in the validation part{where}: C can't be"
                    " chosen; give one as `C`"
                )
            label = f"{split.name} C={model.C:g}".strip()
            say(f"{label}: validation {metrics.FIGURES[problem.compared_by]} {100 * score:.2f} %")
            if not model.converged_:
                broken_off.append(f"{label} (choosing C)")
        best += models.values()
    return curves, best, sorted(broken_off)


# Fitting and scoring ------------------------------------------------------------------------------


def _scores(problem: Problem, model: LinearSVM, rows: Rows) -> NDArray[np.float64]:
    """(n, K) scores. Two classes have one SVM: the first class's score is minus the second's."""
    blocks = [
        model.decision_function(problem.X[rows[start : start + SCORE_ROWS]])
        for start in range(0, len(rows), SCORE_ROWS)
    ]
    scores = np.concatenate(blocks)
    return scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1)


def _validate(problem: Problem, model: LinearSVM, val: Rows) -> float:
    figures, _ = _figures(problem, _scores(problem, model, val), val)
    return figures[problem.compared_by]


def _figures(
    problem: Problem, scores_nK: NDArray[np.float64], rows: Rows
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """The figures of some scored rows that have labels: over all classes, and for each class."""
    truth = problem.labels[rows]
    if not problem.multilabel:
        pred = scores_nK.argmax(axis=1)
        recalls = metrics.class_recalls(pred, truth, len(problem.classes))
        overall = {
            "accuracy": metrics.accuracy(pred, truth),
            "mean_class_recall": float(np.nanmean(recalls)),
            "n_classes": int(np.isfinite(recalls).sum()),
        }
        return overall, {
            name: {"recall": float(r)} for name, r in zip(problem.classes, recalls, strict=True)
        }
    eleven = metrics.mean_average_precision(scores_nK, truth, "11point")
    allpoint = metrics.mean_average_precision(scores_nK, truth, "allpoint")
    per_class = {
        name: {
            "ap_11point": float(eleven.per_class[k]),
            "ap_allpoint": float(allpoint.per_class[k]),
            "n_positive": int((truth[:, k] == 1).sum()),
        }
        for k, name in enumerate(problem.classes)
    }
    n_classes = len(problem.classes) - len(allpoint.without)
    return {
        "map_11point": eleven.mean,
        "map_allpoint": allpoint.mean,
        "n_classes": n_classes,
    }, per_class


# The whole protocol -------------------------------------------------------------------------------


def _choose_and_score(
    problem: Problem,
    splits: list[_Split],
    facts: dict[str, Any],
    grid: list[float],
    extend: bool,
    svm: LinearSVM,
    say: Callable[[str], None],
) -> Outcome:
    several = splits[0].name != ""
    results: dict[str, Any] = {
        "protocol": problem.protocol,
        "solver": f"{svm.solver}, tol {svm.tol:g}, {svm.loss}",
        "compared_by": problem.compared_by,
    }
    if svm.class_weight is not None:
        results["class_weight"] = svm.class_weight
    if problem.multilabel:
        results["difficult"] = "left out"
    broken_off: list[str] = []
    curves: list[dict[float, float]] = []
    best: list[LinearSVM] = []
    if len(grid) > 1:
        for split in splits:
            if len(split.val) == 0:
                where = f" in {split.name}" if split.name else ""
                raise VggfeatError(
                    f"no readable images are left{where} to choose C on: give one as `C`"
                )
        curves, best, broken_off = _curves(problem, splits, grid, extend, svm, say)
    winners = [_winner(curve) for curve in curves] or [grid[0]] * len(splits)
    # The geometric median; of an even number the lower of the two in the middle, a value that was
    # tried.
    C = sorted(winners)[(len(winners) - 1) // 2]
    results["C"] = C
    if curves:
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        results["C_grid"] = shared
        results["C_curve"] = [
            float(np.mean([curve[value] for curve in curves])) for value in shared
        ]
        results["selected_by"] = problem.compared_by
        further = sorted(set().union(*curves) - set(grid))
        if further:
            results["C_grid_extended_by"] = further
    results |= facts

    # Refit and test every split; beside them the classifier to keep, or the one whose validation is
    # reported.
    final = facts["model_trained_on"]
    jobs = [
        (split.name or final, split.refit, split.test, winner)
        for split, winner in zip(splits, winners, strict=True)
    ]
    no_truth = not several and not problem.known[splits[0].test].any()
    if several:
        every = np.flatnonzero(problem.readable & problem.known)
        jobs.append((final, every, every[:0], C))
    elif no_truth and len(splits[0].val):
        jobs.append(("train", splits[0].fit, splits[0].val, C))
    fitted: list[tuple[LinearSVM, NDArray[np.float64] | None]] = []
    for i, (label, train, test, value) in enumerate(jobs):
        # the refit starts from the classifier that won, on part of the same images
        from_best = i < len(best)
        fit = best[i].set_params(warm_start=True) if from_best else clone(svm).set_params(C=value)
        fit.fit(problem.X[train], problem.labels[train])
        fitted.append((fit, _scores(problem, fit, test) if len(test) else None))
        say(f"{label} C={value:g}: trained ({len(fitted)}/{len(jobs)})")
        if not fit.converged_:
            broken_off.append(f"{label} C={value:g}")
    model = fitted[len(splits) if several else 0][0]

    scored = [_score_split(problem, split, fitted[i][1]) for i, split in enumerate(splits)]
    results |= {"n_train": len(splits[0].refit), "n_test": scored[0][0]["n_test"]}
    results["n_unreadable"] = int((~problem.readable).sum())
    if other := _other_images(problem, splits):
        results["other_images"] = other
    kept = {
        split.name or facts["test_split"]: Scored(split.test, scores)
        for split, (_, scores) in zip(splits, fitted[: len(splits)], strict=True)
        if scores is not None
    }
    if no_truth:
        results["test_labels"] = "none"
        if len(fitted) > len(splits):
            scores = fitted[len(splits)][1]
            assert scores is not None
            kept["validation"] = Scored(splits[0].val, scores)
            overall, per_class = _figures(problem, scores, splits[0].val)
            results["validation"] = {"n": len(splits[0].val), **overall, "per_class": per_class}
    elif not several:
        results |= scored[0][0] | {"per_class": scored[0][1]}
    else:
        results |= _over_splits(problem, splits, scored, winners, curves)
    if problem.seen is not None and problem.seen.any():
        results["net_trained_on"] = int(problem.seen.sum())
        tested = [
            split.val if no_truth else split.test[problem.known[split.test]] for split in splits
        ]
        for entry, rows in zip(results.get("per_split", [results]), tested, strict=True):
            entry["n_test_seen"] = int(problem.seen[rows].sum())
    results |= _same_images(problem, splits, no_truth, results.get("per_split", [results]))
    if problem.multilabel:
        _name_gaps(problem, results, model)
    if broken_off:
        results["not_converged"] = sorted(broken_off)
    results["rules"] = _rules(problem, several, bool(curves))
    results["scored_on"] = scored_part(results)[1]
    return Outcome(_plain(results), model, kept)


def _score_split(
    problem: Problem, split: _Split, scores: NDArray[np.float64] | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """n_test and the figures of one split's test rows that have labels; figures are absent when
    none has.
    """
    known = problem.known[split.test]
    if scores is None or not known.any():
        return {"n_test": 0}, {}
    overall, per_class = _figures(problem, scores[known], split.test[known])
    return {"n_test": int(known.sum()), **overall}, per_class


def _over_splits(
    problem: Problem,
    splits: list[_Split],
    scored: list[tuple[dict[str, Any], dict[str, dict[str, Any]]]],
    winners: list[float],
    curves: list[dict[float, float]],
) -> dict[str, Any]:
    """Mean and standard deviation (ddof=1: the splits are a sample) of each figure, and each
    split's own.
    """
    for split, (overall, _) in zip(splits, scored, strict=True):
        if overall["n_test"] == 0:
            raise VggfeatError(f"no test image of {split.name} has a label")
    out: dict[str, Any] = {}
    for key in scored[0][0]:
        if key in ("n_test", "n_classes"):
            continue
        values = [overall[key] for overall, _ in scored]
        out[key] = float(np.mean(values))
        if len(values) > 1:
            out[f"{key}_std"] = float(np.std(values, ddof=1))
    out["per_split"] = []
    for s, split in enumerate(splits):
        entry: dict[str, Any] = {"name": split.name, "C": winners[s]}
        if curves:
            entry["C_grid"] = sorted(curves[s])
            entry["C_curve"] = [curves[s][value] for value in sorted(curves[s])]
        out["per_split"].append(entry | {"n_train": len(split.refit)} | scored[s][0])
    out["per_class"] = {}
    for name in problem.classes:
        rows = [per_class[name] for _, per_class in scored]
        # A class that a split's test part lacks has no figure there: the mean is over the other
        # splits.
        out["per_class"][name] = {
            key: (
                sum(row[key] for row in rows)
                if key == "n_positive"
                else float(
                    np.mean([row[key] for row in rows if not np.isnan(row[key])] or [np.nan])
                )
            )
            for key in rows[0]
        }
    return out


def _other_images(problem: Problem, splits: list[_Split]) -> list[str]:
    """In what the images are not all, or not those of the paper's protocol."""
    other = [_first(problem)] if problem.total else []
    other += problem.rules.other_counts(len(problem.classes), problem.splits)
    wanted = problem.rules.n_train
    if isinstance(wanted, int):
        counts = [
            np.bincount(problem.labels[s.refit], minlength=len(problem.classes)) for s in splits
        ]
        if few := int((np.min(counts, axis=0) < wanted).sum()):
            other.append(f"{few:,} classes with fewer than {wanted} training images")
    return other


def _same_images(
    problem: Problem, splits: list[_Split], no_truth: bool, entries: list[dict[str, Any]]
) -> dict[str, Any]:
    """In words, which images are scored and trained on, or have two labels: one file, more than
    once among the images.

    Each split's entry gets the number of the former.
    """
    same = problem.same
    if same is None:
        return {}
    told: list[str] = []
    counts, pair = [], ""
    for split, entry in zip(splits, entries, strict=True):
        train, scored = (split.fit, split.val) if no_truth else (split.refit, split.test)
        scored = scored[problem.known[scored]]
        both = scored[np.isin(same[scored], same[train])]
        if len(both):
            entry["n_test_in_train"] = len(both)
            where = f" of {split.name}" if split.name else ""
            counts.append(f"{len(both):,} of the {_images(len(scored))} scored{where}")
            twin = train[same[train] == same[both[0]]][0]
            pair = pair or f"{problem.names[both[0]]} and {problem.names[twin]}"
    if counts:
        verb = "is" if counts[0].startswith("1 ") and len(counts) == 1 else "are"
        told.append(
            f"{', '.join(counts)} {verb} in train, too, such as {pair}: the figures are too good"
        )
    rows = np.flatnonzero(problem.readable & problem.known)
    other = rows[
        (problem.labels[rows] != problem.labels[same[rows]]).reshape(len(rows), -1).any(axis=1)
    ]
    other = other[problem.known[same[other]]]
    if len(other):
        pair = f"{problem.names[other[0]]} and {problem.names[same[other[0]]]}"
        told.append(
            f"{_images(len(other))} with other labels than the same image elsewhere, such as {pair}"
        )
    return {"same_images": told} if told else {}


def _first(problem: Problem) -> str:
    return f"the first {len(problem.X):,} of {problem.total:,} images"


def seen_by_net(results: Mapping[str, Any]) -> tuple[str, bool]:
    """Which of the images trained the net, in words, "" where none is known to; whether any of them
    was scored.
    """
    if not (n := results.get("net_trained_on")):
        return "", False
    splits = results.get("per_split")
    of = [
        (split.get("n_test_seen", 0), split.get("n_test", 0), f" of {split.get('name')}")
        for split in splits or ()
    ]
    if not splits:
        tested = results.get("validation", {}).get("n", results.get("n_test", 0))
        of = [(results.get("n_test_seen", 0), tested, "")]
    spoilt = [f"{seen:,} of the {tested:,} scored{where}" for seen, tested, where in of if seen]
    if not spoilt:
        return f"{_images(n)} of these, none of which is scored", False
    clean = [where.removeprefix(" of ") for seen, _, where in of if not seen]
    only = f"only {' and '.join(clean)} is clean" if clean else "no figure is clean"
    return f"{_images(n)} of these, among them {', '.join(spoilt)}: {only}", True


def scored_part(results: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The figures of results.json, and in words what they were computed from, beginning with the
    part's name.

    Where no test image has a label they are those of the validation part.
    """
    chosen = results.get("C_chosen_on")
    if results.get("test_labels") == "none":
        if "validation" not in results:
            return {}, "nothing: no test image has a label"
        part, n = chosen or results.get("validated_on", "val"), results["validation"].get("n", 0)
        why = "C was chosen on them, so this is optimistic" if chosen else "none of them trained on"
        return results["validation"], f"{part} ({_images(n)}; {why}); no test image has a label"
    how = f"C was chosen on {chosen}" if chosen else "C was given"
    if splits := results.get("per_split"):
        parts = (
            "the test part of 1 split"
            if len(splits) == 1
            else f"the test parts of {len(splits)} splits"
        )
        counts = [split.get("n_test", 0) for split in splits]
        return results, f"{parts} ({_images(*counts)} each; {how})"
    return (
        results,
        f"{results.get('test_split', 'test')} ({_images(results.get('n_test', 0))}; {how})",
    )


def trained_on(results: Mapping[str, Any]) -> str:
    """In words, what had been learned from where the figures come from, and by the classifier that
    is kept.
    """
    final, n = results.get("model_trained_on", "train"), results.get("n_train", 0)
    if splits := results.get("per_split"):
        counts = [split.get("n_train", 0) for split in splits]
        return f"the rest of each split ({_images(*counts)}); the saved classifier on {final}"
    if "validation" in results:
        fit = n - results["validation"].get("n", 0)
        return f"the rest of {final} ({_images(fit)}); the saved classifier on all {n:,}"
    return f"{final} ({_images(n)})"


def _images(*counts: int) -> str:
    low, high = min(counts), max(counts)
    return (
        f"{low:,} to {high:,} images" if low < high else f"{low:,} image{'s' if low != 1 else ''}"
    )


def _name_gaps(problem: Problem, results: dict[str, Any], model: LinearSVM) -> None:
    degenerate = [problem.classes[k] for k in model.degenerate_classes_]
    if degenerate:
        results["degenerate_classes"] = degenerate
    per_class = results.get("per_class") or results.get("validation", {}).get("per_class", {})
    without = [name for name, figures in per_class.items() if figures["n_positive"] == 0]
    if without:
        results["classes_without_ap"] = without


def _rules(problem: Problem, several: bool, chosen: bool) -> list[str]:
    rules = []
    if chosen:
        by = metrics.FIGURES[problem.compared_by]
        rules.append(f"one C for all classes, by {by} on the validation part; smallest of equals")
    if problem.multilabel:
        rules.append(
            "difficult: an image whose only objects of a class are difficult is left out for that"
            " class, in training and in scoring"
        )
        rules.append("mAP: over the classes that have a positive image among those that are scored")
    else:
        rules.append(
            "mean class recall: over the classes that occur among the images that are scored"
        )
    if several:
        rules.append(
            "+-: the standard deviation over the splits, as of a sample (divided by one less than"
            " them)"
        )
    return rules


def _plain(value: Any) -> Any:
    """The same as plain Python values, NaN as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
