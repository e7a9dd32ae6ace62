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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from vggfeat import metrics
from vggfeat.checked import first_few
from vggfeat.datasets.splits import N_SPLITS, VAL_FRACTION
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.knn import NearestNeighbours
from vggfeat.linear import Classifier
from vggfeat.logistic import LogisticRegression
from vggfeat.matrix import Selected, row_blocks
from vggfeat.problem import Problem
from vggfeat.results import (
    HEAD_NAMES,
    K_NEAREST,
    TEMPERATURE,
    Choice,
    ClassFigures,
    Figures,
    Results,
    Scored,
    ScoredPart,
    Split,
    images,
    scored_on,
)
from vggfeat.ridge import RidgeClassifier
from vggfeat.solver import LOSSES
from vggfeat.svm import C_GRID, SOLVERS, LinearSVM, RegularisationPath

HEADS = tuple(HEAD_NAMES)
C_STEP = 4.0  # the grid's ratio, and that of its extension
# of descriptors of length 1; far beyond it nothing can be solved in float64, and it takes hours
MOST_C = 1e12
MAX_EXTENSIONS = 3  # further values of C where the best is at the end of the grid

CUT = f"{100 * VAL_FRACTION:g} % of train"


Rows = NDArray[np.int64]
Scores = NDArray[np.float64]


@dataclass
class Outcome:
    """What a protocol gives.

    results: of results.json all but `made`.
    model: the classifier to keep; `results.model_trained_on` says on what.
    scored: what the figures were computed from: "test" (or "val", where that is the part that is
        scored), or one a split: "split0", "split1", …; and "validation" where the test part has no
        labels.
    """

    results: Results
    model: Classifier
    scored: dict[str, Scored]


@dataclass(frozen=True)
class _Split:
    """Readable rows of one split. fit + val choose C; refit, then test, give the score."""

    name: str  # "" for the official split
    fit: Rows
    val: Rows
    refit: Rows
    test: Rows


@dataclass(frozen=True)
class _Drawn:
    """The protocol's splits, without unreadable rows, and in words: how they come, which part is
    scored, what the classifier to keep is trained on, and what val is, where one is used.

    select: whether val chooses C. no_truth: no test image has a label.
    """

    splits: list[_Split]
    how: str
    test_split: str
    model_trained_on: str
    val_is: str | None
    select: bool
    no_truth: bool = False

    @property
    def several(self) -> bool:
        return self.splits[0].name != ""

    @property
    def validates(self) -> bool:
        """Whether val is scored by a classifier of its own."""
        return self.no_truth and len(self.splits[0].val) > 0

    @property
    def final_fits(self) -> int:
        """One a split, and the classifier to keep, or the one that val is scored by."""
        return len(self.splits) + (self.several or self.validates)


def solver_words(model: Any) -> str:
    """How a classifier is trained, as results tell it."""
    settings = model.get_params()
    words = [model.solver]
    words += [f"tol {model.tol:g}"] if "tol" in settings else []
    words += [model.loss] if "loss" in settings else []
    words += [f"temperature {model.temperature:g}"] if "temperature" in settings else []
    return ", ".join(words)


def _classifier(
    head: str, loss: str, solver: str, device: str, class_weight: str | None, k: int, heat: float
) -> Classifier:
    """What is trained, with all its settings but C."""
    if head == "svm":
        return LinearSVM(loss=loss, solver=solver, device=device, class_weight=class_weight)
    if head == "logistic":
        return LogisticRegression(device=device, class_weight=class_weight)
    if head == "ridge":
        return RidgeClassifier(class_weight=class_weight)
    return NearestNeighbours(k=k, temperature=heat, class_weight=class_weight)


class _Refits:
    """Classifiers on the same images, of one C after the other."""

    def __init__(self, model: Classifier, X: Selected, y: NDArray[Any]) -> None:
        self.model, self.X, self.y = model, X, y

    def fit(self, C: float) -> Classifier:
        model = _warm(copy(self.model)).set_params(C=C)
        self.model = model.fit(self.X, self.y)
        return self.model


def _warm(model: Classifier) -> Any:
    """It, set to start where it ended, where it can."""
    return model.set_params(warm_start=True) if "warm_start" in model.get_params() else model


def run(
    problem: Problem,
    *,
    C: str | float | Sequence[float] = "auto",
    seed: int | None = None,
    loss: str = "squared_hinge",
    solver: str = "newton",
    device: str = "cpu",
    class_weight: str | None = None,
    head: str = "svm",
    k: int = K_NEAREST,
    temperature: float = TEMPERATURE,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Choose C, train and test by the problem's protocol.

    C: "auto" tries C_GRID, and up to three more values while the best is strictly better than all
        others and at an end of the grid; a list tries exactly its values; one value is used as it
        is.
    seed: None uses the stored splits; a number draws random splits anew (as many as are stored,
        else three). Official splits stay as they are; only a validation part that must be cut from
        train depends on it (None: 0).
    loss, solver, device: as `LinearSVM`. class_weight: None or "balanced", in choosing C, too.
    head: the classifier, one of HEADS: "svm", "logistic" (`LogisticRegression`), "ridge"
        (`RidgeClassifier`), "knn" (`NearestNeighbours`, of k and temperature, which has no C).
    progress: called before and after each fit, with how many are done, how many there are in all,
        which are more where the grid is extended, and what this one is. say: called with a line
        where the seed changes nothing.

    What the results say is in `docs/formats.md`, under results.json; `made` is left to the caller.

    Raises VggfeatError when there is nothing to train, validate or test on, when a class of a
    one-label problem has no training image, or when a C is not positive.
    """
    started = time.perf_counter()
    grid = grid_of(C) if head != "knn" else []
    for name, given, allowed in (
        ("loss", loss, LOSSES),
        ("solver", solver, SOLVERS),
        ("head", head, HEADS),
    ):
        if given not in allowed:
            raise VggfeatError(f"{name} must be {' or '.join(allowed)}, not {given}")
    if head == "knn" and C != "auto":
        raise VggfeatError("knn has no C: leave it out, or choose another `head`")
    if class_weight not in (None, "balanced"):
        raise VggfeatError(f"class_weight must be None or balanced, not {class_weight}")
    drawn = _prepared(problem, seed, len(grid) > 1)
    if head == "knn":
        _refuse_neighbours(k, drawn)
    work = _Work(len(grid) * len(drawn.splits) * drawn.select + drawn.final_fits, progress)
    progress(0, work.total, "reading descriptors")
    _refuse_nan(problem, drawn)
    if seed is not None and drawn.how == "official" and drawn.val_is != CUT:
        say("the splits are the data set's own: `seed` changes nothing")
    svm = _classifier(head, loss, solver, device, class_weight, k, temperature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # named once, in the results
        chosen = _choose(problem, drawn.splits, grid, isinstance(C, str), svm, work)
        fitted = _fit(problem, drawn, chosen, svm, work)
    results = _results(problem, drawn, chosen, fitted, svm, head)
    scored = {
        split.name or drawn.test_split: Scored(split.test, scores)
        for split, scores in zip(drawn.splits, fitted.tests, strict=True)
    }
    if fitted.validation is not None:
        scored["validation"] = Scored(drawn.splits[0].val, fitted.validation)
    results = replace(results, seconds=time.perf_counter() - started)
    return Outcome(results, fitted.model, scored)


@dataclass
class _Work:
    """How many fits there are, how many of them are done, and who is told."""

    total: int
    tell: Callable[[int, int, str], None]
    done: int = 0

    @contextmanager
    def fit(self, what: str) -> Iterator[None]:
        """One more of them, and what it is."""
        self.tell(self.done, self.total, what)
        yield
        self.done += 1
        self.tell(self.done, self.total, what)


@dataclass(frozen=True)
class Fits:
    """How often a protocol trains: `to_choose` C, and with those values that are tried only where
    the best is at an end of the grid `at_most`; and `final`, with the C. images: of the largest
    fit. problems: the SVMs that each of them is.
    """

    to_choose: int
    at_most: int
    final: int
    images: int
    problems: int


def fits_of(
    problem: Problem, *, C: str | float | Sequence[float] = "auto", seed: int | None = None
) -> Fits:
    """What `run` will train, by the same splits. No descriptor is read. Raises as `run`, but for
    what descriptors hold.
    """
    grid = grid_of(C)
    drawn = _prepared(problem, seed, len(grid) > 1)
    each = len(grid) if len(grid) > 1 else 0
    further = MAX_EXTENSIONS if isinstance(C, str) else 0
    trained = [len(split.refit) for split in drawn.splits]
    if drawn.several:
        trained.append(len(_labelled(problem)))
    K = len(problem.classes)
    return Fits(
        to_choose=each * len(drawn.splits),
        at_most=(each + further) * len(drawn.splits),
        final=drawn.final_fits,
        images=max(trained),
        problems=K if problem.multilabel or K > 2 else 1,
    )


def _refuse_neighbours(k: int, drawn: _Drawn) -> None:
    least = min(len(part) for split in drawn.splits for part in (split.refit, split.fit))
    if k > least:
        raise VggfeatError(f"`k` {k} neighbours are more than {least} training images: give fewer")


# Which rows ---------------------------------------------------------------------------------------


def _prepared(problem: Problem, seed: int | None, select: bool) -> _Drawn:
    """The splits, of which nothing is wrong."""
    if len(problem.classes) < 2 and not problem.multilabel:
        raise VggfeatError(
            f"there is one class only, {', '.join(problem.classes)}; a classifier needs at"
            " least two"
        )
    drawn = _drawn(problem, seed, select)
    _check(problem, drawn)
    return drawn


def _drawn(problem: Problem, seed: int | None, select: bool) -> _Drawn:
    """The splits. select: whether C is to be chosen, which needs a validation part."""
    if "train" in problem.splits:
        return _official_split(problem, seed or 0, select)
    stored, how = problem.splits, "stored"
    names = _split_names(stored)
    if seed is not None and (names or not stored):
        # Drawn over all images, so that an unreadable one doesn't change who else is where.
        stored = problem.rules.splits(problem.labels, len(names) or N_SPLITS, seed)
        names, how = _split_names(stored), f"drawn with seed {seed}"
    if not names:
        there = (
            f"there is {' and '.join(stored)}, but no train: describe images with that split, too"
        )
        raise VggfeatError(there if stored else "there are no splits: give `seed` to draw some")
    splits, val_is = [], "the val part of each split"
    for number, name in enumerate(names):
        for part in ("train", "test"):
            if f"{name}/{part}" not in stored:
                raise VggfeatError(f"{name} has no {part} part")
        train = _usable(problem, stored[f"{name}/train"])
        test = _readable(problem, stored[f"{name}/test"])
        if f"{name}/val" in stored:
            val = _usable(problem, stored[f"{name}/val"])
        elif select:
            val = _cut(problem, train, np.random.default_rng([seed or 0, number]))
            val_is = CUT
        else:
            val = train[:0]
        splits.append(_Split(name, np.setdiff1d(train, val), val, np.union1d(train, val), test))
    return _Drawn(splits, how, "test", "all labelled images", val_is if select else None, select)


def _split_names(splits: dict[str, np.ndarray]) -> list[str]:
    """split0, split1, … split10, in the order of their numbers."""
    return sorted(
        {name.split("/")[0] for name in splits if "/" in name}, key=lambda name: (len(name), name)
    )


def _official_split(problem: Problem, seed: int, select: bool) -> _Drawn:
    stored = problem.splits
    if "test" not in stored and "val" not in stored:
        raise VggfeatError(
            "there is a train split, but neither val nor test to score on: describe labelled images"
            " with one of them"
        )
    train, test_split = _usable(problem, stored["train"]), "test" if "test" in stored else "val"
    test = _readable(problem, stored[test_split])
    no_truth = not problem.known[test].any()
    # Without test labels the figures are those of the validation part, which even a single C then
    # needs.
    needs_val = select or no_truth
    val, val_is, final = train[:0], "", "train"
    if "val" in stored and test_split == "test":
        val, val_is, final = _usable(problem, stored["val"]), "val", "train + val"
    elif needs_val:
        val, val_is = _cut(problem, train, np.random.default_rng(seed)), CUT
    split = _Split("", np.setdiff1d(train, val), val, np.union1d(train, val), test)
    used = val_is if needs_val else None
    return _Drawn([split], "official", test_split, final, used, select, no_truth)


def _readable(problem: Problem, rows: np.ndarray) -> Rows:
    listed: Rows = np.asarray(rows, dtype=np.int64)
    readable: Rows = listed[problem.readable[listed]]
    return readable


def _usable(problem: Problem, rows: np.ndarray) -> Rows:
    """Readable rows with a label, sorted: how a split lists them then doesn't change a bit of the
    result.
    """
    usable: Rows = np.unique(_readable(problem, rows))
    return usable[problem.known[usable]]


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


def _check(problem: Problem, drawn: _Drawn) -> None:
    """No empty part, no image both trained and tested, no class untrained, something to choose C
    on.
    """
    for split in drawn.splits:
        where = f" in {split.name}" if split.name else ""
        for part, rows in (("train", split.fit), ("test", split.test)):
            if len(rows) == 0:
                why = ": a class needs two images or more to be split" if split.name else ""
                raise VggfeatError(f"there are no readable {part} images{where}{why}")
        if drawn.select and len(split.val) == 0:
            raise VggfeatError(
                f"no readable images are left{where} to choose C on: give one as `C`"
            )
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
                first = (
                    f"; these are {_first(problem)}: describe all of them" if problem.total else ""
                )
                raise VggfeatError(
                    f"no readable training image{where} of: {first_few(missing)}{first}"
                )
            continue
        truth = problem.labels[split.fit]
        if not ((truth == 1).any(axis=0) & (truth == -1).any(axis=0)).any():
            raise VggfeatError(f"no class has both positive and negative training images{where}")


def _labelled(problem: Problem) -> Rows:
    """All that can be trained on."""
    return np.flatnonzero(problem.readable & problem.known)


def _refuse_nan(problem: Problem, drawn: _Drawn) -> None:
    """No NaN in a row that is used. They are read once for it, and are known from then on."""
    used = [rows for split in drawn.splits for rows in (split.refit, split.test)]
    every = np.unique(np.concatenate([*used, *([_labelled(problem)] if drawn.several else [])]))
    X = Selected(problem.X, every)
    for part in row_blocks(*X.shape):
        bad = every[part][~np.isfinite(X[part]).all(axis=1)]
        if len(bad):
            name = problem.names[bad[0]]
            raise VggfeatError(
                f"the descriptor of {name} (row {bad[0]}) holds NaN or infinity: extract it again"
            )


def _finite(problem: Problem, rows: Rows) -> Selected:
    """Their descriptors, which `_refuse_nan` has seen."""
    return Selected(problem.X, rows, finite=True)


# Which C ------------------------------------------------------------------------------------------


def grid_of(C: str | float | Sequence[float]) -> list[float]:
    """The values to try, ascending."""
    if isinstance(C, str):
        if C != "auto":
            raise WrongUsage(f"C must be auto or positive numbers, not {C}")
        return list(C_GRID)
    values = sorted({float(value) for value in np.atleast_1d(np.asarray(C, dtype=float))})
    if not values or not all(1 / MOST_C <= value <= MOST_C for value in values):
        raise WrongUsage(f"C must be auto or numbers from {1 / MOST_C:g} to {MOST_C:g}, not {C}")
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


@dataclass(frozen=True)
class _Chosen:
    """choice: of all splits together; per_split: of each. best: each split's classifier with its C,
    none where one C was given. broken_off: the fits that did not converge.
    """

    choice: Choice
    per_split: list[Choice]
    best: list[Any]
    broken_off: list[str]


def _choose(
    problem: Problem,
    splits: list[_Split],
    grid: list[float],
    extend: bool,
    svm: Classifier,
    work: _Work,
) -> _Chosen:
    if len(grid) < 2:
        given = Choice(C=grid[0]) if grid else Choice(k=svm.get_params()["k"])
        return _Chosen(given, [given] * len(splits), [], [])
    curves, best, broken_off = [], [], []
    for i, split in enumerate(splits):
        what = _doing("choosing C", splits, i)
        curve, model, stopped = _curve(problem, split, grid, extend, svm, work, what)
        curves.append(curve)
        best.append(model)
        broken_off += stopped
    winners = sorted(model.C for model in best)
    shared = sorted(set.intersection(*map(set, curves)))
    choice = Choice(
        # The geometric median; of an even number the lower of the two in the middle, a value that
        # was tried.
        C=winners[(len(winners) - 1) // 2],
        C_grid=shared,
        C_curve=[float(np.mean([curve[C] for curve in curves])) for C in shared],
        selected_by=problem.compared_by,
        C_grid_extended_by=sorted(set().union(*curves) - set(grid)),
    )
    per_split = [
        Choice(C=model.C, C_grid=sorted(curve), C_curve=[curve[C] for C in sorted(curve)])
        for model, curve in zip(best, curves, strict=True)
    ]
    return _Chosen(choice, per_split, best, broken_off)


def _doing(what: str, splits: list[_Split], i: int) -> str:
    """What is being done with a split, and of several which one it is."""
    name = splits[i].name
    return f"{name}, {i + 1} of {len(splits)}, {what}" if name else what


def _curve(
    problem: Problem,
    split: _Split,
    grid: list[float],
    extend: bool,
    svm: Classifier,
    work: _Work,
    what: str,
) -> tuple[dict[float, float], Classifier, list[str]]:
    """A split's validation score of each C, its best classifier, and the fits that did not
    converge.
    """
    of_several = RegularisationPath if isinstance(svm, LinearSVM) else _Refits
    path = of_several(svm, _finite(problem, split.fit), problem.labels[split.fit])
    curve: dict[float, float] = {}
    best = svm
    broken_off = []

    def try_one(C: float) -> None:
        nonlocal best
        with work.fit(what):
            model = path.fit(C)
            curve[C] = score = _validate(problem, model, split.val)
        if np.isnan(score):
            where = f" of {split.name}" if split.name else ""
            raise VggfeatError(
                f"no class has a positive image in the validation part{where}: C can't be"
                " chosen; give one as `C`"
            )
        if _winner(curve) == C:
            best = model
        if not model.converged_:
            broken_off.append(f"{split.name} C={C:g} (choosing C)".strip())

    for C in grid:
        try_one(C)
    for _ in range(MAX_EXTENSIONS if extend else 0):
        if (further := _extension(curve)) is None:
            break
        work.total += 1
        try_one(further)
    return curve, best, broken_off


# Fitting and scoring ------------------------------------------------------------------------------


def _scores(problem: Problem, model: Classifier, rows: Rows) -> Scores:
    """(n, K) scores. Two classes have one: the first class's score is minus the second's."""
    order = np.argsort(rows, kind="stable")  # what lies together in a file is read together
    scores = model.decision_function(_finite(problem, rows[order]))
    if (np.diff(order) < 0).any():
        scores = scores[np.argsort(order)]
    return scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1)


def _validate(problem: Problem, model: Classifier, val: Rows) -> float:
    figure = _figures(problem, _scores(problem, model, val), val).figures.mean(problem.compared_by)
    assert figure is not None  # what is compared is computed
    return figure


def _figures(problem: Problem, scores_nK: Scores, rows: Rows) -> ScoredPart:
    """The figures of some scored rows that have labels: over all classes, and for each class."""
    truth = problem.labels[rows]
    if not problem.multilabel:
        pred = scores_nK.argmax(axis=1)
        recalls = metrics.class_recalls(pred, truth, len(problem.classes))
        overall = Figures(
            accuracy=metrics.accuracy(pred, truth),
            mean_class_recall=metrics.mean_class_recall(pred, truth, len(problem.classes)),
            n_classes=int(np.isfinite(recalls).sum()),
        )
        named = zip(problem.classes, recalls, strict=True)
        per_class = {name: ClassFigures(recall=float(recall)) for name, recall in named}
        return ScoredPart(len(rows), overall, per_class)
    eleven = metrics.mean_average_precision(scores_nK, truth, "11point")
    allpoint = metrics.mean_average_precision(scores_nK, truth, "allpoint")
    compared = np.array([name not in problem.rules.left_out for name in problem.classes])
    per_class = {
        name: ClassFigures(
            ap_11point=float(eleven.per_class[k]),
            ap_allpoint=float(allpoint.per_class[k]),
            n_positive=int((truth[:, k] == 1).sum()),
        )
        for k, name in enumerate(problem.classes)
    }
    overall = Figures(
        map_11point=_mean(eleven.per_class[compared]),
        map_allpoint=_mean(allpoint.per_class[compared]),
        map_every_class=None if compared.all() else allpoint.mean,
        n_classes=int(np.isfinite(allpoint.per_class[compared]).sum()),
    )
    return ScoredPart(len(rows), overall, per_class)


def _mean(aps_K: np.ndarray) -> float:
    """Over the classes that have an AP; NaN where none has."""
    aps = aps_K[~np.isnan(aps_K)]
    return float(aps.mean()) if len(aps) else float("nan")


@dataclass(frozen=True)
class _Fitted:
    """model: the classifier to keep. tests: each split's scores of its test rows. validation: the
    scores of val, where the test part has no labels. broken_off: the fits that did not converge.
    """

    model: Classifier
    tests: list[Scores]
    validation: Scores | None
    broken_off: list[str]


def _fit(problem: Problem, drawn: _Drawn, chosen: _Chosen, svm: Classifier, work: _Work) -> _Fitted:
    """Refit and score every split; beside them the classifier to keep, or the one whose validation
    is reported.
    """
    final = drawn.model_trained_on
    first = drawn.splits[0]
    broken_off: list[str] = []

    def of(choice: Choice) -> Any:
        return clone(svm) if choice.C is None else clone(svm).set_params(C=choice.C)

    def fit(label: str, rows: Rows, model: Any) -> Classifier:
        model.fit(_finite(problem, rows), problem.labels[rows])
        if not model.converged_:
            broken_off.append(f"{label} C={model.C:g}")
        trained: Classifier = model
        return trained

    # the refit starts from the classifier that won, on part of the same images
    starts = [_warm(model) for model in chosen.best] or [of(one) for one in chosen.per_split]
    tests = []
    for i, (split, start) in enumerate(zip(drawn.splits, starts, strict=True)):
        what = _doing("training", drawn.splits, i) if drawn.several else f"training on {final}"
        with work.fit(what):
            model = fit(split.name or final, split.refit, start)
            tests.append(_scores(problem, model, split.test))
    if drawn.several:
        with work.fit(f"training on {final}"):
            model = fit(final, _labelled(problem), of(chosen.choice))
    validation = None
    if drawn.validates:
        with work.fit("training on train"):
            without = fit("train", first.fit, of(chosen.choice))
            validation = _scores(problem, without, first.val)
    return _Fitted(model, tests, validation, broken_off)


# What is said of it -------------------------------------------------------------------------------


def _results(
    problem: Problem, drawn: _Drawn, chosen: _Chosen, fitted: _Fitted, svm: Any, head: str
) -> Results:
    splits, seen = drawn.splits, problem.seen
    parts = [
        _score_split(problem, split, scores)
        for split, scores in zip(splits, fitted.tests, strict=True)
    ]
    validation = None
    if fitted.validation is not None:
        validation = _figures(problem, fitted.validation, splits[0].val)
    overall = _over_splits(problem, splits, parts) if drawn.several else parts[0]
    same_images, twice = _same_images(problem, drawn)
    each = [
        Split(split.name, choice, len(split.refit), part.n, part.figures, n_seen, n_twice)
        for split, choice, part, n_seen, n_twice in zip(
            splits, chosen.per_split, parts, _seen(problem, drawn), twice, strict=True
        )
    ]
    per_class = (validation or overall).per_class
    degenerate = [problem.classes[k] for k in fitted.model.degenerate_classes_]
    results = Results(
        protocol=problem.protocol,
        head=head,
        solver=solver_words(svm),
        compared_by=problem.compared_by,
        class_weight=svm.class_weight if isinstance(svm.class_weight, str) else None,
        difficult="left out" if problem.multilabel else None,
        choice=chosen.choice,
        splits=drawn.how,
        test_split=drawn.test_split,
        model_trained_on=drawn.model_trained_on,
        C_chosen_on=drawn.val_is if drawn.select else None,
        validated_on=None if drawn.select else drawn.val_is,
        n_train=each[0].n_train,
        n_test=each[0].n_test,
        n_unreadable=int((~problem.readable).sum()),
        other_images=_other_images(problem, splits),
        test_labels="none" if drawn.no_truth else None,
        validation=validation,
        figures=overall.figures,
        per_split=each if drawn.several else [],
        per_class=overall.per_class,
        net_trained_on=None if seen is None or not seen.any() else int(seen.sum()),
        n_test_seen=None if drawn.several else each[0].n_test_seen,
        n_test_in_train=None if drawn.several else each[0].n_test_in_train,
        same_images=same_images,
        degenerate_classes=degenerate if problem.multilabel else [],
        classes_without_ap=[
            name for name, of_class in per_class.items() if of_class.n_positive == 0
        ],
        not_converged=sorted([*chosen.broken_off, *fitted.broken_off]),
        rules=_rules(problem, drawn.several, bool(chosen.best)),
        dataset=problem.dataset,
    )
    return replace(results, scored_on=scored_on(results))


def _seen(problem: Problem, drawn: _Drawn) -> list[int | None]:
    """Of each split, how many of the scored images trained the net; None where none is known to."""
    seen = problem.seen
    if seen is None or not seen.any():
        return [None] * len(drawn.splits)
    return [int(seen[_tested(problem, drawn, split)].sum()) for split in drawn.splits]


def _tested(problem: Problem, drawn: _Drawn, split: _Split) -> Rows:
    """The rows that figures are computed from."""
    rows = split.val if drawn.no_truth else split.test
    return rows[problem.known[rows]]


def _score_split(problem: Problem, split: _Split, scores: Scores) -> ScoredPart:
    """How many of a split's test rows have labels, and their figures, if there are some."""
    known = problem.known[split.test]
    return _figures(problem, scores[known], split.test[known]) if known.any() else ScoredPart()


def _over_splits(problem: Problem, splits: list[_Split], parts: list[ScoredPart]) -> ScoredPart:
    """Mean and standard deviation (ddof=1: the splits are a sample) of each figure."""
    for split, part in zip(splits, parts, strict=True):
        if part.n == 0:
            raise VggfeatError(f"no test image of {split.name} has a label")
    overall: dict[str, Any] = {}
    for key in metrics.FIGURES:
        values = [value for part in parts if (value := part.figures.mean(key)) is not None]
        if values:
            overall[key] = float(np.mean(values))
        if len(values) > 1:
            overall[f"{key}_std"] = float(np.std(values, ddof=1))
    per_class = {
        name: _mean_of_class([part.per_class[name] for part in parts]) for name in problem.classes
    }
    return ScoredPart(0, replace(Figures(), **overall), per_class)


def _mean_of_class(parts: list[ClassFigures]) -> ClassFigures:
    """A class that a split's test part lacks has no figure there: the mean is over the other
    splits.
    """
    mean: dict[str, Any] = {}
    for key in metrics.CLASS_FIGURES:
        values = [value for part in parts if (value := part.figure(key)) is not None]
        if values:
            there = [value for value in values if not np.isnan(value)]
            mean[key] = float(np.mean(there or [np.nan]))
    counts = [part.n_positive for part in parts if part.n_positive is not None]
    return replace(ClassFigures(n_positive=sum(counts) if counts else None), **mean)


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


def _same_images(problem: Problem, drawn: _Drawn) -> tuple[list[str], list[int | None]]:
    """In words, which images are scored and trained on, or have two labels: one file, more than
    once among the images; and of each split the number of the former, None where there are none.
    """
    same = problem.same
    if same is None:
        return [], [None] * len(drawn.splits)
    told: list[str] = []
    twice: list[int | None] = []
    counts, pair = [], ""
    for split in drawn.splits:
        train = split.fit if drawn.no_truth else split.refit
        scored = _tested(problem, drawn, split)
        both = scored[np.isin(same[scored], same[train])]
        twice.append(len(both) or None)
        if len(both):
            where = f" of {split.name}" if split.name else ""
            counts.append(f"{len(both):,} of the {images(len(scored))} scored{where}")
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
            f"{images(len(other))} with other labels than the same image elsewhere, such as {pair}"
        )
    return told, twice


def _first(problem: Problem) -> str:
    return f"the first {len(problem.labels):,} of {problem.total:,} images"


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
        if left_out := [name for name in problem.classes if name in problem.rules.left_out]:
            rules.append(
                f"mAP: without {', '.join(left_out)}, as the devkit; the mean with it is beside it"
            )
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
