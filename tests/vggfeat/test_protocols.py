"""Protocols on small synthetic problems: which rows are used, which C wins, what is reported, what
is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from vggfeat import dual, metrics, protocols, solver
from vggfeat.datasets.protocol import pool_of
from vggfeat.datasets.splits import random_splits
from vggfeat.errors import VggfeatError
from vggfeat.knn import NearestNeighbours
from vggfeat.logistic import LogisticRegression
from vggfeat.problem import Problem
from vggfeat.protocols import Fits, fits_of, run
from vggfeat.results import scored_on, seen_by_net, summary, trained_on
from vggfeat.ridge import RidgeClassifier
from vggfeat.svm import C_GRID, LinearSVM


def single_label(n_per_class: int = 30, K: int = 4, noise: float = 0.3, seed: int = 0) -> Problem:
    """Class k lies around the k-th axis of an 8-D space; official train, val, test of 50, 20 and
    30%.
    """
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(K), n_per_class).astype(np.int32)
    N = len(labels)
    X = np.eye(8)[labels] + noise * rng.standard_normal((N, 8))
    X = (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32)
    rows = np.arange(N)
    splits = {
        "train": rows[: N // 2],
        "val": rows[N // 2 : 7 * N // 10],
        "test": rows[7 * N // 10 :],
    }
    names = [f"{'abcdefgh'[k]}/{i:04d}.jpg" for i, k in enumerate(labels)]
    classes = list("abcdefgh"[:K])
    return Problem(X, labels, classes, splits, np.ones(N, dtype=bool), "single-label", names)


def multi_label(
    n: int = 200, protocol: str = "voc2007", noise: float = 0.3, seed: int = 0
) -> Problem:
    """Three classes, each present in 30% of the images, 10% of all pairs difficult."""
    rng = np.random.default_rng(seed)
    present = rng.random((n, 3)) < 0.3
    X = (present @ np.eye(3, 8) + 0.5 + noise * rng.standard_normal((n, 8))).astype(np.float32)
    labels = np.where(present, 1, -1).astype(np.int8)
    labels[rng.random((n, 3)) < 0.1] = 0
    labels[:, 0][(labels == 0).all(axis=1)] = -1  # a row of zeros would mean unknown
    rows = np.arange(n)
    splits = {"train": rows[: n // 2], "val": rows[n // 2 : 3 * n // 4], "test": rows[3 * n // 4 :]}
    names = [f"JPEGImages/{i:06d}.jpg" for i in range(n)]
    return Problem(
        X, labels, ["cat", "cow", "dog"], splits, np.ones(n, dtype=bool), protocol, names
    )


def with_random_splits(problem: Problem, n_splits: int = 3) -> Problem:
    return replace(
        problem,
        splits=random_splits(problem.labels, n_train=10, max_test=8, n_splits=n_splits, seed=5),
    )


def without_time(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "seconds"}


def test_official_splits_choose_on_val_refit_and_test() -> None:
    problem = single_label(noise=0.5)
    outcome = run(problem, C=[0.01, 1.0, 100.0])
    results, splits = outcome.results.to_json(), problem.splits

    def recall(C: float, train: np.ndarray, test: np.ndarray) -> float:
        model = LinearSVM(C=C).fit(problem.X[train], problem.labels[train])
        return metrics.mean_class_recall(model.predict(problem.X[test]), problem.labels[test], 4)

    curve = [recall(C, splits["train"], splits["val"]) for C in (0.01, 1.0, 100.0)]
    assert results["C_grid"] == [0.01, 1.0, 100.0]
    assert results["C_curve"] == pytest.approx(curve)
    assert results["C"] == results["C_grid"][int(np.argmax(curve))]
    both = np.concatenate([splits["train"], splits["val"]])
    assert results["mean_class_recall"] == pytest.approx(recall(results["C"], both, splits["test"]))
    assert (results["n_train"], results["n_test"], results["n_unreadable"]) == (84, 36, 0)
    assert (results["C_chosen_on"], results["test_split"]) == ("val", "test")
    assert results["model_trained_on"] == "train + val"
    recalls = [figures["recall"] for figures in results["per_class"].values()]
    assert np.mean(recalls) == pytest.approx(results["mean_class_recall"])
    scored = outcome.scored["test"]
    np.testing.assert_array_equal(scored.rows, splits["test"])
    np.testing.assert_array_equal(
        scored.scores, outcome.model.decision_function(problem.X[splits["test"]])
    )
    assert not {"map_11point", "per_split", "accuracy_std", "test_labels"} & set(results)


def test_voc_reports_both_aps_and_leaves_difficult_out() -> None:
    problem = multi_label()
    outcome = run(problem)
    results, test = outcome.results.to_json(), problem.splits["test"]
    both = np.concatenate([problem.splits["train"], problem.splits["val"]])
    aps = []
    for k, name in enumerate(problem.classes):
        rows = both[problem.labels[both, k] != 0]
        model = LinearSVM(C=results["C"]).fit(problem.X[rows], problem.labels[rows, k])
        asked = test[problem.labels[test, k] != 0]
        scores, truth = model.decision_function(problem.X[asked]), problem.labels[asked, k]
        figures = results["per_class"][name]
        assert figures["ap_11point"] == pytest.approx(
            metrics.average_precision(scores, truth, "11point")
        )
        assert figures["ap_allpoint"] == pytest.approx(
            metrics.average_precision(scores, truth, "allpoint")
        )
        assert figures["n_positive"] == (truth == 1).sum()
        aps.append(figures["ap_11point"])
    assert results["map_11point"] == pytest.approx(np.mean(aps))
    assert results["selected_by"] == "map_11point"
    assert any("difficult" in rule for rule in results["rules"])
    assert "accuracy" not in results
    assert (
        run(replace(problem, protocol="voc2012"), C=[1, 2]).results.choice.selected_by
        == "map_allpoint"
    )


def test_random_splits_mean_std_and_median_c() -> None:
    problem = with_random_splits(single_label(noise=0.6))
    outcome = run(problem, C=[0.01, 0.1, 1.0, 10.0])
    results = outcome.results.to_json()
    per_split = results["per_split"]
    assert [entry["name"] for entry in per_split] == ["split0", "split1", "split2"]
    for key in ("accuracy", "mean_class_recall"):
        values = [entry[key] for entry in per_split]
        assert results[key] == pytest.approx(np.mean(values))
        assert results[f"{key}_std"] == pytest.approx(np.std(values, ddof=1))
        assert len(set(values)) > 1
    assert results["C"] == sorted(entry["C"] for entry in per_split)[1]
    curves = [entry["C_curve"] for entry in per_split]
    assert results["C_curve"] == pytest.approx(np.mean(curves, axis=0))
    assert (results["n_train"], results["n_test"]) == (40, 32)
    # The classifier to keep has seen every labelled image.
    everything = LinearSVM(C=results["C"]).fit(problem.X, problem.labels)
    np.testing.assert_array_equal(outcome.model.coef_, everything.coef_)
    assert results["model_trained_on"] == "all labelled images"
    assert sorted(outcome.scored) == ["split0", "split1", "split2"]
    recalls = [
        metrics.mean_class_recall(part.scores.argmax(1), problem.labels[part.rows], 4)
        for part in outcome.scored.values()
    ]
    assert results["mean_class_recall"] == pytest.approx(np.mean(recalls))


def test_a_seed_draws_random_splits_anew() -> None:
    problem = with_random_splits(single_label(noise=0.6))
    stored = run(problem, C=1.0).results.to_json()
    drawn = [run(problem, C=1.0, seed=seed).results.to_json() for seed in (1, 1, 2)]
    assert stored["splits"] == "stored"
    assert drawn[0]["splits"] == "drawn with seed 1"
    assert without_time(drawn[0]) == without_time(drawn[1])
    assert drawn[0]["accuracy"] != drawn[2]["accuracy"]
    # Without a name of its own a dataset gives 80% of each class of 30 to train + val; Caltech-101
    # 30 images.
    assert (drawn[0]["n_train"], drawn[0]["n_test"]) == (96, 24)
    caltech = replace(single_label(n_per_class=90), protocol="caltech101", splits={})
    results = run(caltech, C=1.0, seed=0).results.to_json()
    assert (results["n_train"], results["n_test"], len(results["per_split"])) == (120, 200, 3)


class Read:
    """X as what makes its rows when they are asked for; notes how often each was."""

    def __init__(self, X: np.ndarray) -> None:
        self.shape, self.dtype, self._X = X.shape, X.dtype, X
        self.times = np.zeros(len(X), int)

    def __getitem__(self, rows: Any) -> np.ndarray:
        np.add.at(self.times, np.arange(len(self._X))[rows], 1)
        some: np.ndarray = self._X[rows].copy()
        return some


@pytest.mark.parametrize("solver", ["newton", "liblinear"])
@pytest.mark.parametrize("kind", ["one label", "several labels", "random splits", "rows mixed"])
def test_where_descriptors_lie_changes_nothing(
    kind: str, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = multi_label() if kind == "several labels" else single_label(noise=0.5)
    if kind == "random splits":
        problem = with_random_splits(problem)
    if kind == "rows mixed":  # as a list of test images may be
        mixed = np.random.default_rng(0).permutation(problem.splits["test"])
        problem.splits["test"] = mixed
    problem.readable[[1, 70, 118]] = False
    X = np.array(problem.X[:])
    X[~problem.readable] = np.nan
    held = replace(problem, X=X)
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 8 * 8 * 9)
    expected = run(held, C=[0.1, 1.0, 10.0], solver=solver)
    read = Read(X)
    found = run(replace(problem, X=read), C=[0.1, 1.0, 10.0], solver=solver)
    assert without_time(found.results.to_json()) == without_time(expected.results.to_json())
    np.testing.assert_array_equal(found.model.coef_, expected.model.coef_)
    assert found.scored.keys() == expected.scored.keys()
    for name, scored in found.scored.items():
        np.testing.assert_array_equal(scored.rows, expected.scored[name].rows)
        np.testing.assert_array_equal(scored.scores, expected.scored[name].scores)
    assert not read.times[~problem.readable].any()
    if kind == "rows mixed":
        test = found.scored["test"]
        np.testing.assert_array_equal(test.rows, mixed[problem.readable[mixed]])
        np.testing.assert_allclose(test.scores, found.model.decision_function(X[test.rows]))
    if kind != "random splits":  # seen to be finite, and scored
        np.testing.assert_array_equal(read.times[found.scored["test"].rows], 2)


@pytest.mark.parametrize(
    ("make", "C", "expected"),
    [
        (single_label, "auto", Fits(7, 10, 1, 84, 4)),
        (single_label, 1.0, Fits(0, 0, 1, 84, 4)),
        (partial(single_label, K=2), [1, 2], Fits(2, 2, 1, 42, 1)),
        (multi_label, [1, 2, 3], Fits(3, 3, 1, 150, 3)),
        (lambda: with_random_splits(single_label()), "auto", Fits(21, 30, 4, 120, 4)),
    ],
)
def test_fits_are_counted_as_they_are_done(
    make: Callable[[], Problem], C: Any, expected: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make()
    assert fits_of(replace(problem, X=Unread(problem.X.shape)), C=C) == expected
    told: list[tuple[int, int, str]] = []
    sizes: list[tuple[int, int]] = []
    solve = solver.Solver.solve

    def noted(self: solver.Solver, targets_NP: np.ndarray, *args: Any, **more: Any) -> Any:
        sizes.append(targets_NP.shape)
        return solve(self, targets_NP, *args, **more)

    monkeypatch.setattr(solver.Solver, "solve", noted)
    run(problem, C=C, progress=lambda *now: told.append(now))
    begun = [what for (done, _, what), (after, _, _) in pairwise(told) if after > done]
    tried = sum("choosing C" in what for what in begun)
    assert expected.to_choose <= tried <= expected.at_most
    assert sum("training" in what for what in begun) == expected.final
    assert told[0][:2] == (0, expected.to_choose + expected.final)  # the grid may be extended
    assert told[-1][:2] == (tried + expected.final, tried + expected.final)
    assert max(sizes) == (expected.images, expected.problems)


class Unread:
    """A matrix that is never to be read."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        raise AssertionError(f"rows {rows} are read")


def test_official_splits_ignore_the_seed() -> None:
    problem = single_label(noise=0.5)
    said: list[str] = []
    first, second = (
        without_time(run(problem, C=[0.1, 1], seed=s, say=said.append).results.to_json())
        for s in (None, 7)
    )
    assert first == second
    line = "the splits are the data set's own: `seed` changes nothing"
    assert said.count(line) == 1
    run(with_random_splits(problem), C=1.0, seed=7, say=said.append)
    del problem.splits["val"]  # what is cut from train follows the seed
    run(problem, C=[0.1, 1], seed=7, say=said.append)
    assert said.count(line) == 1


def test_images_that_are_not_the_protocols_are_told() -> None:
    def other(problem: Problem) -> list[str]:
        return run(problem, C=1.0).results.other_images

    problem = with_random_splits(single_label())
    assert other(problem) == []
    assert other(replace(problem, total=200)) == ["the first 120 of 200 images"]
    caltech = replace(problem, protocol="caltech101")
    assert other(caltech) == [
        "4 classes instead of 102",
        "4 classes with fewer than 30 training images",
    ]
    assert other(replace(caltech, splits=random_splits(problem.labels, n_train=29, max_test=None)))
    parts = [
        f"{n} {part} images instead of {official}"
        for n, part, official in (
            (100, "train", "2,501"),
            (50, "val", "2,510"),
            (50, "test", "4,952"),
        )
    ]
    assert other(multi_label()) == parts
    lacking = replace(problem, total=200, labels=np.where(problem.labels == 3, -1, problem.labels))
    with pytest.raises(
        VggfeatError, match="of: d; these are the first 120 of 200 images: describe all of them"
    ):
        run(lacking, C=1.0)


def test_scored_images_that_trained_the_net_are_counted() -> None:
    def words(problem: Problem, rows: Any) -> tuple[str, bool]:
        seen = np.isin(np.arange(len(problem.labels)), rows)
        return seen_by_net(run(replace(problem, seen=seen), C=1.0).results)

    problem = with_random_splits(single_label())
    first = np.concatenate([problem.splits["split0/train"], problem.splits["split0/val"]])
    told, scored = words(problem, first)
    n = [np.isin(problem.splits[f"split{s}/test"], first).sum() for s in (1, 2)]
    assert scored and min(n) > 0
    assert (
        told
        == f"40 images of these, among them {n[0]} of the 32 scored of split1, {n[1]} of the 32"
        " scored of split2: only split0 is clean"
    )
    assert words(problem, np.arange(120))[0].endswith(
        "32 of the 32 scored of split2: no figure is clean"
    )
    one = single_label()
    assert words(one, one.splits["train"]) == ("60 images of these, none of which is scored", False)
    assert (
        words(one, one.splits["test"][:5])[0]
        == "5 images of these, among them 5 of the 36 scored: no figure is clean"
    )
    assert words(one, []) == ("", False)
    voc = multi_label(protocol="voc2012")
    voc.labels[voc.splits["test"]] = 0
    assert words(voc, voc.splits["val"]) == (
        "50 images of these, among them 50 of the 50 scored: no figure is clean",
        True,
    )


def test_classes_without_a_score_are_counted() -> None:
    problem = single_label()
    gone = problem.splits["test"][problem.labels[problem.splits["test"]] == 2]
    problem.readable[gone] = False
    assert run(problem, C=1.0).results.figures.n_classes == 3
    voc = multi_label()
    voc.labels[voc.splits["test"], 1] = -1
    results = run(voc, C=1.0).results.to_json()
    assert results["n_classes"] == 2 and results["classes_without_ap"] == ["cow"]
    drawn = with_random_splits(single_label())
    drawn.readable[drawn.splits["split1/test"][drawn.labels[drawn.splits["split1/test"]] == 0]] = (
        False
    )
    per_split = run(drawn, C=1.0).results.per_split
    assert [split.figures.n_classes for split in per_split] == [4, 3, 4]


@pytest.mark.parametrize("solver", ["newton", "liblinear"])
def test_balanced_weights_choose_c_and_train(solver: str) -> None:
    """On val, on train + val, in every random split and in the classifier that is kept:
    scikit-learn's scores.
    """
    uneven = single_label(noise=0.6)
    keep = np.flatnonzero((uneven.labels != 1) | (np.arange(len(uneven.labels)) % 12 == 1))
    uneven = replace(
        uneven,
        X=uneven.X[keep],
        labels=uneven.labels[keep],
        names=[uneven.names[i] for i in keep.tolist()],
        readable=uneven.readable[keep],
        splits={name: np.flatnonzero(np.isin(keep, rows)) for name, rows in uneven.splits.items()},
    )

    def scores(problem: Problem, C: float, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        y = problem.labels[train]
        columns = (
            y.T
            if problem.multilabel
            else np.where(np.arange(len(problem.classes))[:, None] == y, 1, -1)
        )
        out = []
        for k, column in enumerate(columns):
            svc = LinearSVC(C=C, class_weight="balanced", dual=False, tol=1e-9, max_iter=100_000)
            if not problem.multilabel:  # the rest weighs 1
                weight = len(y) / (len(problem.classes) * (y == k).sum())
                svc.set_params(class_weight={1: weight, -1: 1.0})
            known = column != 0
            svc.fit(problem.X[train][known], column[known])
            out.append(svc.decision_function(problem.X[test]))
        return np.stack(out, axis=1)

    for problem in (uneven, with_random_splits(uneven), multi_label(noise=0.6)):
        outcome = run(problem, C=[0.1, 10.0], class_weight="balanced", solver=solver)
        results, splits = outcome.results.to_json(), problem.splits
        assert results["class_weight"] == "balanced"
        for name, part in outcome.scored.items():
            own = {
                key.rpartition("/")[2]: rows
                for key, rows in splits.items()
                if name in key or "/" not in key
            }
            record = next(
                (split for split in results.get("per_split", []) if split["name"] == name), results
            )
            for C, score in zip(record["C_grid"], record["C_curve"], strict=True):
                part_of_val = protocols._figures(
                    problem, scores(problem, C, own["train"], own["val"]), own["val"]
                )
                figure = part_of_val.figures.mean(results["selected_by"])
                assert score == pytest.approx(figure, abs=0.03)
            both = np.concatenate([own["train"], own["val"]])
            np.testing.assert_allclose(
                part.scores, scores(problem, record["C"], both, part.rows), atol=0.02
            )
        plain = run(problem, C=results["C"], solver=solver)
        assert plain.results.class_weight is None
        assert np.abs(plain.model.coef_ - outcome.model.coef_).max() > 0.05
    with pytest.raises(VggfeatError, match="class_weight must be None or balanced, not even"):
        run(uneven, class_weight="even")


def test_what_was_scored_is_said() -> None:
    def told(problem: Problem, *without: str, C: Any = (0.1, 1.0)) -> tuple[str, str]:
        left = {name: rows for name, rows in problem.splits.items() if name not in without}
        results = run(replace(problem, splits=left), C=C).results
        assert results.scored_on == scored_on(results)
        return results.scored_on, trained_on(results)

    one = single_label(noise=0.5)
    assert told(one) == ("test (36 images; C was chosen on val)", "train + val (84 images)")
    assert told(one, "val")[0] == "test (36 images; C was chosen on 20 % of train)"
    val_alone = told(one, "test")
    assert val_alone == ("val (24 images; C was chosen on 20 % of train)", "train (60 images)")
    assert told(one, "test", C=1.0)[0] == "val (24 images; C was given)"
    assert told(with_random_splits(one)) == (
        "the test parts of 3 splits (32 images each; C was chosen on the val part of each split)",
        "the rest of each split (40 images); the saved classifier on all labelled images",
    )
    voc = multi_label(protocol="voc2012")
    voc.labels[voc.splits["test"]] = 0
    assert told(voc) == (
        "val (50 images; C was chosen on them, so this is optimistic); no test image has a label",
        "the rest of train + val (100 images); the saved classifier on all 150",
    )
    assert (
        told(voc, C=1.0)[0] == "val (50 images; none of them trained on); no test image has a label"
    )
    results = run(voc, C=1.0).results.to_json()
    assert (results["compared_by"], results["difficult"]) == ("map_allpoint", "left out")
    assert run(multi_label(), C=1.0).results.compared_by == "map_11point"


def test_the_classifier_that_is_trained_is_named_as_it_is() -> None:
    def doing(problem: Problem) -> list[str]:
        told: list[str] = []
        run(problem, C=[0.1, 1.0], progress=lambda done, total, what: told.append(what))
        return list(dict.fromkeys(told))

    problem = single_label(noise=0.5)
    assert doing(problem)[1:] == ["choosing C", "training on train + val"]
    del problem.splits["test"]
    assert doing(problem)[1:] == ["choosing C", "training on train"]
    assert doing(with_random_splits(problem, 2))[1:] == [
        "split0, 1 of 2, choosing C",
        "split1, 2 of 2, choosing C",
        "split0, 1 of 2, training",
        "split1, 2 of 2, training",
        "training on all labelled images",
    ]


@pytest.mark.parametrize(
    ("protocol", "pool", "why"),
    [
        ("caltech101", "stack", "the protocol of caltech101"),
        ("caltech256", "stack", "the protocol of caltech256"),
        ("voc2007", "average", "the protocol of voc2007"),
        ("voc2012", "average", "the protocol of voc2012"),
        ("single-label", "average", "the default"),
        ("multi-label", "average", "the default"),
    ],
)
def test_each_protocol_pools_in_its_way(protocol: str, pool: str, why: str) -> None:
    assert pool_of(protocol) == (pool, why)


def test_without_val_it_is_cut_from_train() -> None:
    problem = single_label(noise=0.5)
    del problem.splits["val"]
    outcome = run(problem, C=[0.1, 1.0])
    assert outcome.results.C_chosen_on == "20 % of train"
    assert outcome.results.n_train == 60  # all of train is used in the end
    assert outcome.results.model_trained_on == "train"


def test_without_test_val_is_the_test_part() -> None:
    problem = single_label(noise=0.5)
    del problem.splits["test"]
    outcome = run(problem, C=[0.1, 1.0])
    results = outcome.results.to_json()
    assert (results["test_split"], results["C_chosen_on"]) == ("val", "20 % of train")
    assert (results["n_train"], results["n_test"]) == (60, 24)
    np.testing.assert_array_equal(outcome.scored["val"].rows, problem.splits["val"])


def test_the_cut_is_a_fifth_of_each_class() -> None:
    problem = single_label(n_per_class=20)
    val = protocols._cut(problem, problem.splits["train"], np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(problem.labels[val]), [2, 2, 2, 2])
    one_each = np.arange(4)
    # a class's only image trains
    assert len(protocols._cut(problem, one_each, np.random.default_rng(0))) == 0


@pytest.mark.parametrize("make", [single_label, multi_label])
def test_unreadable_rows_are_left_out_and_counted(make: Any) -> None:
    problem = make()
    # one of train, of val, of test
    bad = np.array([0, len(problem.labels) * 6 // 10, len(problem.labels) - 1])
    problem.X[bad] = np.nan
    problem.readable[bad] = False
    results = run(problem).results.to_json()
    assert results["n_unreadable"] == 3
    kept = {name: np.setdiff1d(rows, bad) for name, rows in problem.splits.items()}
    clean = run(replace(problem, splits=kept)).results.to_json()
    for record in (results, clean):
        record.pop("other_images", None)
    assert without_time(results) == without_time(clean)
    assert results["n_test"] == len(problem.splits["test"]) - 1


@pytest.mark.parametrize("C", ["auto", 1.0])
def test_without_test_labels_val_is_reported_and_test_scored(C: Any) -> None:
    problem = multi_label(protocol="voc2012")
    problem.labels[problem.splits["test"]] = 0
    outcome = run(problem, C=C)
    results = outcome.results.to_json()
    assert results["test_labels"] == "none"
    assert results["n_test"] == 0
    assert "map_allpoint" not in results and "per_class" not in results
    train, val = problem.splits["train"], problem.splits["val"]
    model = LinearSVM(C=results["C"]).fit(problem.X[train], problem.labels[train])
    figure = metrics.mean_average_precision(
        model.decision_function(problem.X[val]), problem.labels[val]
    ).mean
    assert results["validation"]["map_allpoint"] == pytest.approx(figure)
    assert results["validation"]["n"] == len(val)
    assert results["n_train"] == len(train) + len(val)
    assert outcome.scored["test"].scores.shape == (50, 3)
    np.testing.assert_array_equal(outcome.scored["test"].rows, problem.splits["test"])
    np.testing.assert_array_equal(outcome.scored["validation"].rows, val)


def test_unknown_single_labels_are_not_scored() -> None:
    problem = single_label()
    problem.labels[problem.splits["test"][:6]] = -1
    problem.labels[problem.splits["train"][:4]] = -1
    outcome = run(problem, C=1.0)
    assert (outcome.results.n_train, outcome.results.n_test) == (80, 30)
    assert len(outcome.scored["test"].scores) == 36


@pytest.mark.parametrize("problem", [with_random_splits(single_label(noise=0.6)), multi_label()])
def test_twice_the_same(problem: Problem) -> None:
    one, two = run(problem), run(problem)
    assert without_time(one.results.to_json()) == without_time(two.results.to_json())
    np.testing.assert_array_equal(one.model.coef_, two.model.coef_)


@pytest.mark.parametrize("loss", ["squared_hinge", "hinge"])
@pytest.mark.parametrize("problem", [with_random_splits(single_label(noise=0.6)), multi_label()])
def test_liblinear_is_the_reference(problem: Problem, loss: str) -> None:
    ours, reference = (
        run(problem, loss=loss, solver=solver).results.to_json()
        for solver in ("newton", "liblinear")
    )
    assert ours["solver"].startswith("newton") and reference["solver"].startswith("liblinear")
    np.testing.assert_allclose(ours["C_curve"], reference["C_curve"], atol=0.02)
    figure = "map_allpoint" if problem.multilabel else "accuracy"
    assert ours[figure] == pytest.approx(reference[figure], abs=0.02)


def curve_of(peak: float) -> Any:
    """A validation score that falls with the distance from a peak: the grid's search, without its
    noise.
    """

    def validate(problem: Problem, model: LinearSVM, val: Any) -> float:
        return -abs(float(np.log2(model.C / peak)))

    return validate


@pytest.mark.parametrize(
    ("peak", "winner", "further"),
    [
        (2.0, 2.0, None),
        (2.0**9, 2.0**9, [2.0**9, 2.0**11]),  # one more to see that it falls again
        (2.0**20, 2.0**13, [2.0**9, 2.0**11, 2.0**13]),  # three steps at most
        (2.0**-7, 2.0**-7, [2.0**-9, 2.0**-7]),
        (4.0, 2.0, None),  # as far from 2 as from 8: the smaller
    ],
)
def test_a_winner_at_the_edge_extends_the_grid(
    peak: float, winner: float, further: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "_validate", curve_of(peak))
    results = run(single_label()).results.to_json()
    assert results["C"] == winner
    assert results.get("C_grid_extended_by") == further
    assert results["C_grid"] == sorted([*C_GRID, *(further or [])])
    assert len(results["C_curve"]) == len(results["C_grid"])


def test_a_grid_of_ones_own_is_not_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "_validate", curve_of(2.0**20))
    results = run(single_label(), C=[4.0, 1.0]).results.to_json()
    assert (results["C"], results["C_grid"]) == (4.0, [1.0, 4.0])


def test_a_plateau_gives_the_smallest_c_and_no_extension() -> None:
    results = run(single_label(noise=0.01)).results.to_json()  # separable: every C is right
    assert results["C_curve"] == [1.0] * len(C_GRID)
    assert results["C"] == C_GRID[0]
    assert (results["accuracy"], results["mean_class_recall"]) == (1.0, 1.0)


def test_one_c_needs_no_validation() -> None:
    results = run(single_label(), C=3.0).results.to_json()
    assert results["C"] == 3.0
    assert not {"C_curve", "C_grid", "C_chosen_on", "selected_by"} & set(results)
    assert results["n_train"] == 84  # val is trained on all the same


def test_two_classes_have_two_columns_of_scores() -> None:
    problem = single_label(K=2, noise=0.5)
    outcome = run(problem, C=1.0)
    scored = outcome.scored["test"]
    assert scored.scores.shape == (18, 2)
    np.testing.assert_array_equal(
        scored.scores.argmax(axis=1), outcome.model.predict(problem.X[scored.rows])
    )


def test_voc_class_without_positives_is_named() -> None:
    problem = multi_label()
    everything_but_test = np.concatenate([problem.splits["train"], problem.splits["val"]])
    problem.labels[everything_but_test, 1] = -1
    test = problem.splits["test"]
    problem.labels[test, 2] = -1
    results = json.loads(json.dumps(run(problem, C=1.0).results.to_json(), allow_nan=False))
    assert results["degenerate_classes"] == ["cow"]
    assert results["classes_without_ap"] == ["dog"]
    assert results["per_class"]["dog"] == {"ap_11point": None, "ap_allpoint": None, "n_positive": 0}
    two = [results["per_class"][name]["ap_allpoint"] for name in ("cat", "cow")]
    assert results["map_allpoint"] == pytest.approx(np.mean(two))


@pytest.mark.parametrize("head", ["logistic", "ridge"])
@pytest.mark.parametrize("made", [single_label, multi_label])
def test_other_heads_choose_c_and_are_scored_alike(made: Callable[[], Problem], head: str) -> None:
    problem = made()
    outcome = run(problem, C=[0.1, 1.0, 10.0], head=head)
    results, splits = outcome.results.to_json(), problem.splits
    estimator = {"logistic": LogisticRegression, "ridge": RidgeClassifier}[head]
    both = np.concatenate([splits["train"], splits["val"]])
    alone = estimator(C=results["C"]).fit(problem.X[both], problem.labels[both])
    scored = outcome.scored["test"].scores
    own = alone.decision_function(problem.X[splits["test"]])
    np.testing.assert_allclose(scored, own, atol=2e-2 * np.abs(own).max())
    assert results["head"] == head and results["C_grid"] == [0.1, 1.0, 10.0]
    assert "mean_class_recall" in results or "map_11point" in results


@pytest.mark.parametrize("made", [single_label, multi_label])
def test_neighbours_have_a_k_and_no_c(made: Callable[[], Problem]) -> None:
    problem = made()
    outcome = run(problem, head="knn", k=5)
    results, splits = outcome.results.to_json(), problem.splits
    assert results["k"] == 5 and "C" not in results
    assert results["solver"] == "exact, temperature 0.07"
    both = np.concatenate([splits["train"], splits["val"]])
    alone = NearestNeighbours(5).fit(problem.X[both], problem.labels[both])
    np.testing.assert_allclose(
        outcome.scored["test"].scores, alone.decision_function(problem.X[splits["test"]])
    )
    assert dict(summary(outcome.results))["k"] == "5"
    with pytest.raises(VggfeatError, match="`k` 5000 neighbours are more than"):
        run(problem, head="knn", k=5000)
    with pytest.raises(VggfeatError, match="knn has no C"):
        run(problem, head="knn", C=1.0)
    with pytest.raises(VggfeatError, match="head must be svm or logistic or ridge or knn, not x"):
        run(problem, head="x")


@pytest.mark.parametrize("head", ["svm", "logistic", "ridge", "knn"])
def test_class_weights_help_small_classes_with_every_head(head: str) -> None:
    problem = single_label(n_per_class=60, noise=0.6)
    few = np.flatnonzero((problem.labels != 3) | (np.arange(len(problem.labels)) % 3 == 0))
    splits = {name: np.intersect1d(rows, few) for name, rows in problem.splits.items()}
    splits["test"] = problem.splits["test"]
    problem = replace(problem, splits=splits)
    plain, weighed = (
        run(problem, C="auto" if head == "knn" else 1.0, head=head, class_weight=weight)
        for weight in (None, "balanced")
    )
    before, after = (one.results.to_json()["per_class"]["d"]["recall"] for one in (plain, weighed))
    assert after >= before and weighed.results.class_weight == "balanced"


def test_fits_that_were_broken_off_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "MAX_STEPS", dict.fromkeys(solver.MAX_STEPS, 1))
    monkeypatch.setattr(dual, "ROUNDS", 0)
    results = run(single_label(noise=0.5), C=[1.0, 128.0], loss="hinge").results.to_json()
    assert "C=128 (choosing C)" in results["not_converged"]
    assert "hinge" in results["solver"]


def test_results_are_plain_json() -> None:
    for problem in (with_random_splits(single_label()), multi_label(), single_label()):
        results = run(problem, C=[0.1, 1.0]).results.to_json()
        assert json.loads(json.dumps(results, allow_nan=False)) == results


def broken(problem: Problem, **changes: Any) -> Problem:
    return replace(problem, splits={**problem.splits, **changes})


def test_refusals() -> None:
    problem = single_label()
    train, test = problem.splits["train"], problem.splits["test"]
    no_b = train[problem.labels[train] != 1]
    cases: list[tuple[Problem, dict[str, Any], str]] = [
        (replace(problem, splits={}), {}, "there are no splits: give `seed` to draw some$"),
        (replace(problem, splits={"train": train}), {}, "neither val nor test"),
        (
            replace(problem, splits={"test": test}),
            {"seed": 1},
            "there is test, but no train: describe",
        ),
        (broken(problem, test=train[:0]), {"C": 1.0}, "no readable test images"),
        (
            broken(problem, test=np.append(test, train[0])),
            {"C": 1.0},
            "both trained and tested on.*0000.jpg",
        ),
        (broken(problem, train=no_b), {}, "no readable training image of: b$"),
        (
            replace(problem, classes=[*problem.classes, *map(str, range(50))]),
            {},
            "no readable training image of: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 40 more$",
        ),
        (
            broken(problem, val=train[:0]),
            {},
            "no readable images are left to choose C on: give one as `C`",
        ),
        (replace(problem, splits={"split0/train": train}), {}, "split0 has no test part"),
        (problem, {"C": "best"}, "C must be auto or positive"),
        (problem, {"C": [1.0, -1.0]}, "C must be auto or numbers from 1e-12 to"),
        (problem, {"C": 1e20}, "C must be auto or numbers from 1e-12 to"),
        (problem, {"C": []}, "C must be auto or numbers from 1e-12 to"),
        (problem, {"loss": "log"}, "loss must be"),
    ]
    for given, options, message in cases:
        with pytest.raises(VggfeatError, match=message):
            run(given, **options)
    no_positive = multi_label()
    no_positive.labels[no_positive.splits["val"]] = -1
    tried: list[int] = []
    with pytest.raises(
        VggfeatError, match=r"positive image in the validation part: .* give one as `C`"
    ):
        run(no_positive, progress=lambda done, total, what: tried.append(done))
    assert max(tried) == 1  # the first value tells
    once = replace(single_label(n_per_class=1), splits={})
    with pytest.raises(
        VggfeatError, match="no readable test images in split0: a class needs two images"
    ):
        run(once, C=1.0, seed=0)
    one = replace(single_label(), labels=np.zeros(120, np.int32), classes=["ant"])
    with pytest.raises(VggfeatError, match="there is one class only, ant; a classifier needs"):
        run(one)
    X = np.array(single_label().X[:])
    X[3] = np.nan
    nan = replace(single_label(), X=X)
    with pytest.raises(VggfeatError, match=r"d/0003.jpg \(row 3\) holds NaN"):
        run(nan)


def test_problems_that_contradict_themselves() -> None:
    problem = single_label()
    for changes in (
        {"names": problem.names[:-1]},
        {"labels": np.full(len(problem.labels), 4)},
        {"labels": np.ones((len(problem.labels), 3), dtype=np.int8)},
        {"splits": {"train": np.array([len(problem.labels)])}},
    ):
        with pytest.raises(VggfeatError):
            replace(problem, **changes)
