"""Average precision against arithmetic done by hand and a literal transcription of the devkit;
other scores.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from vggfeat import metrics

# Ranking + - + - -, as gt: tp 1 1 2 2 2, precision 1 1/2 2/3 2/4 2/5, recall 1/2 1/2 1 1 1.
SCORES, TRUTH = [0.9, 0.8, 0.7, 0.6, 0.5], [1, -1, 1, -1, -1]


def devkit_ap(scores: list[float], truth: list[int], kind: str) -> float:
    """VOCevalcls.m and VOCap.m, line by line; recall >= t is asked of rounded numbers (see the test
    of 0.3).
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable, as MATLAB's sort
    tp = fp = 0
    rec, prec = [], []
    n_positive = sum(t > 0 for t in truth)
    for i in order:
        tp, fp = tp + (truth[i] > 0), fp + (truth[i] < 0)
        rec.append(tp / n_positive)
        prec.append(tp / (tp + fp) if tp + fp else math.nan)
    if kind == "11point":
        best = [
            [
                p
                for p, r in zip(prec, rec, strict=True)
                if round(r, 9) >= round(t / 10, 9) and p == p
            ]
            for t in range(11)
        ]
        return sum(max(p, default=0.0) for p in best) / 11
    mrec, mpre = [0.0, *rec, 1.0], [0.0, *[0.0 if p != p else p for p in prec], 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i + 1] - mrec[i]) * mpre[i + 1] for i in range(len(mrec) - 1))


def test_precision_and_recall_by_hand() -> None:
    precision, recall = metrics.precision_recall(SCORES, TRUTH)
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3, 2 / 4, 2 / 5])
    np.testing.assert_allclose(recall, [1 / 2, 1 / 2, 1, 1, 1])


def test_both_kinds_of_ap_by_hand() -> None:
    # t = 0 … 0.5 (six points): best precision 1; t = 0.6 … 1 (five): 2/3.
    assert metrics.average_precision(SCORES, TRUTH, "11point") == pytest.approx(
        (6 + 5 * 2 / 3) / 11
    )
    # recall 0 to 1/2 at precision 1, 1/2 to 1 at 2/3.
    assert metrics.average_precision(SCORES, TRUTH, "allpoint") == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_sklearn_differs_where_precision_rises_again() -> None:
    # + - - + + +: precision at the positives is 1, 2/4, 3/5, 4/6. Scikit-learn takes their mean;
    # the devkit's envelope gives 1, 4/6, 4/6, 4/6, for at those recalls a better precision can be
    # had further down.
    scores, truth = [6.0, 5, 4, 3, 2, 1], [1, -1, -1, 1, 1, 1]
    assert metrics.average_precision(scores, truth) == pytest.approx((1 + 3 * 4 / 6) / 4)
    sklearn_ap = average_precision_score(np.array(truth) > 0, scores)
    assert sklearn_ap == pytest.approx((1 + 2 / 4 + 3 / 5 + 4 / 6) / 4)


def test_ties_keep_the_order_of_the_image_list() -> None:
    # All equal: the ranking is the list itself, as with MATLAB's stable sort of -out.
    assert metrics.average_precision([0.5, 0.5], [1, -1]) == 1.0
    assert metrics.average_precision([0.5, 0.5], [-1, 1]) == 0.5
    # Scikit-learn makes one step of a tie, whichever way round: precision 1/2.
    assert average_precision_score([1, 0], [0.5, 0.5]) == 0.5


def test_many_ties_are_stable() -> None:
    # NumPy's default sort is stable only for few values; 1000 positives before 1000 negatives show
    # another.
    truth = np.repeat([1, -1], 1000)
    assert metrics.average_precision(np.zeros(2000), truth) == 1.0


def test_difficult_images_leave_the_ranking() -> None:
    # Without the two difficult images it is SCORES, TRUTH again.
    scores, truth = [0.95, *SCORES, 0.1], [0, *TRUTH, 0]
    for kind in metrics.AP_KINDS:
        assert metrics.average_precision(scores, truth, kind) == metrics.average_precision(
            SCORES, TRUTH, kind
        )
    assert len(metrics.precision_recall(scores, truth)[0]) == 5


@pytest.mark.parametrize("truth", [[-1, -1], [0, -1], [0, 0], []])
def test_no_positive_has_no_ap(truth: list[int]) -> None:
    for kind in metrics.AP_KINDS:
        assert math.isnan(metrics.average_precision(np.arange(len(truth)), truth, kind))
    assert np.isnan(metrics.precision_recall(np.arange(len(truth)), truth)[1]).all()


@pytest.mark.parametrize("k", range(1, 11))
def test_recall_of_exactly_a_tenth_counts(k: int) -> None:
    # k of 10 positives come first, then 90 negatives, then the rest: precision is 1 up to recall
    # k/10 exactly, and at most 0.1 after it. So k+1 points (t = 0 … k/10) have precision 1,
    # although 3/10 < 3 * 0.1 in floats.
    truth = [1] * k + [-1] * 90 + [1] * (10 - k)
    tail = (10 - k) * 0.1  # the last positive's precision, 10/100, is the best of the tail
    ap = metrics.average_precision(-np.arange(100), truth, "11point")
    assert ap == pytest.approx((k + 1 + tail) / 11, abs=1e-12)


rankings = st.lists(
    st.tuples(st.integers(-5, 5), st.sampled_from([1, -1, 0])), min_size=1, max_size=40
).filter(lambda pairs: any(truth == 1 for _, truth in pairs))


@given(rankings, st.sampled_from(metrics.AP_KINDS))
def test_ap_equals_the_devkits_lines(pairs: list[tuple[int, int]], kind: metrics.APKind) -> None:
    scores, truth = [float(s) for s, _ in pairs], [t for _, t in pairs]
    ap = metrics.average_precision(scores, truth, kind)
    assert ap == pytest.approx(devkit_ap(scores, truth, kind), abs=1e-12)
    assert 0 < ap <= 1 + 1e-12
    # Only the ranking matters.
    assert metrics.average_precision(np.exp(scores), truth, kind) == ap


def test_mean_ap_is_over_classes_that_have_one() -> None:
    scores = np.array([SCORES, SCORES, SCORES]).T
    truth = np.array([TRUTH, [-1, -1, -1, -1, 0], [1, -1, -1, -1, -1]]).T
    result = metrics.mean_average_precision(scores, truth)
    assert result.mean == pytest.approx((5 / 6 + 1) / 2)
    assert result.without == [1]
    np.testing.assert_allclose(result.per_class, [5 / 6, np.nan, 1])
    assert math.isnan(metrics.mean_average_precision(scores[:, 1:2], truth[:, 1:2]).mean)


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        ([0.1, 0.2], [1], "both be"),
        ([[0.1]], [[1]], "both be"),
        ([np.nan, 0.2], [1, -1], "NaN"),
        ([0.1, 0.2], [1, 2], "truth must be"),
        ([0.1, 0.2], [True, False], "truth must be"),
    ],
)
def test_ap_refuses(scores: list[Any], truth: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.average_precision(scores, truth)


def test_ap_refuses_another_kind() -> None:
    with pytest.raises(ValueError, match="101point"):
        metrics.average_precision(SCORES, TRUTH, "101point")  # type: ignore[arg-type]


def test_recall_and_accuracy_by_hand() -> None:
    truth, pred = [0, 0, 0, 0, 1, 1, 3], [0, 0, 0, 1, 1, 0, 3]
    assert metrics.accuracy(pred, truth) == pytest.approx(5 / 7)
    np.testing.assert_allclose(metrics.class_recalls(pred, truth, 4), [3 / 4, 1 / 2, np.nan, 1])
    # Class 2 doesn't occur: the mean is over three classes, and big classes weigh no more than
    # small ones.
    assert metrics.mean_class_recall(pred, truth, 4) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=50))
def test_mean_class_recall_is_balanced_accuracy(pairs: list[tuple[int, int]]) -> None:
    pred, truth = np.array(pairs).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes that don't occur
        expected = balanced_accuracy_score(truth, pred)
    assert metrics.mean_class_recall(pred, truth, 5) == pytest.approx(expected)


def test_top_k_wrong_by_hand() -> None:
    scores = [[0.1, 0.5, 0.4], [0.1, 0.5, 0.4], [0.1, 0.5, 0.4]]
    truth = [1, 2, 0]  # ranked first, second, third
    assert metrics.top_k_wrong(scores, truth, 1).tolist() == [False, True, True]
    assert metrics.top_k_wrong(scores, truth, 2).tolist() == [False, False, True]
    # among three classes the true one is always one of the three best: no figure, and not a perfect
    # one
    assert [metrics.tells(k, 3) for k in (1, 2, 3, 5)] == [True, True, False, False]


def test_top_k_wrong_of_constant_scores_is_chance() -> None:
    # A network that says nothing must not be right for everyone.
    assert metrics.top_k_wrong(np.zeros((10, 10)), np.arange(10), 3).mean() == pytest.approx(0.7)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.accuracy([], []),
        lambda: metrics.accuracy([1], [1, 2]),
        lambda: metrics.mean_class_recall([0, 1], [0, -1], 2),
        lambda: metrics.mean_class_recall([0, 1], [0, 2], 2),
        lambda: metrics.top_k_wrong([[0.1, 0.2]], [2], 1),
        lambda: metrics.top_k_wrong([[np.nan, 0.2]], [1], 1),
        lambda: metrics.top_k_wrong([[0.1, 0.2]], [1], 0),
        lambda: metrics.top_k_wrong([0.1, 0.2], [1, 0], 1),
        lambda: metrics.mean_average_precision([[0.1]], [[1, 1]]),
    ],
)
def test_other_scores_refuse(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has words of its own
        call()
