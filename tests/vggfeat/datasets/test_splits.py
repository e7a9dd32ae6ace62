"""Random splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggfeat.datasets import random_splits
from vggfeat.errors import VggfeatError


@given(
    labels=st.lists(st.integers(-1, 5), min_size=1, max_size=120).filter(lambda x: max(x) >= 0),
    n_train=st.one_of(st.integers(1, 40), st.floats(0.01, 0.99)),
    max_test=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 2**40),
)
def test_random_splits_are_disjoint_sorted_and_sized(
    labels: list[int], n_train: float, max_test: int | None, seed: int
) -> None:
    y = np.array(labels, np.int32)
    splits = random_splits(y, n_train=n_train, max_test=max_test, seed=seed)
    assert len(splits) == 9
    for k in range(3):
        train, val, test = (splits[f"split{k}/{part}"] for part in ("train", "val", "test"))
        rows = np.concatenate([train, val, test])
        assert rows.dtype == np.int64 and len(np.unique(rows)) == len(rows) and (y[rows] >= 0).all()
        assert all((np.diff(part) > 0).all() for part in (train, val, test))
        for c in set(labels) - {-1}:
            n = labels.count(c)
            n_fit = (y[train] == c).sum() + (y[val] == c).sum()
            assert (y[train] == c).sum() >= 1 and (n_fit == 1 or (y[val] == c).sum() >= 1)
            if isinstance(n_train, int):
                assert n_fit == (1 if n == 1 else min(n_train, n - 1))
            n_test = (y[test] == c).sum()
            assert n_test == (n - n_fit if max_test is None else min(max_test, n - n_fit))
            assert n_test >= 1 or n == 1


def test_a_class_is_drawn_alike_whatever_the_others_hold() -> None:
    alone = random_splits(np.array([-1] * 50 + [1] * 40), n_train=30, max_test=None)
    beside = random_splits(np.array([0] * 50 + [1] * 40), n_train=30, max_test=None)
    for name, rows in alone.items():
        assert np.array_equal(rows, beside[name][beside[name] >= 50])
    one = random_splits(np.array([0] * 90), n_train=30, max_test=None, n_splits=1)
    three = random_splits(np.array([0] * 90), n_train=30, max_test=None)
    assert np.array_equal(one["split0/train"], three["split0/train"])
    other_seed = random_splits(np.array([0] * 90), n_train=30, max_test=None, seed=1)
    draws = {tuple(s[f"split{k}/train"]) for s in (three, other_seed) for k in range(3)}
    assert len(draws) == 6


def test_two_classes_of_one_size_are_not_drawn_alike() -> None:
    train = random_splits(np.repeat([0, 1], 60), n_train=30, max_test=None)["split0/train"]
    assert train[train < 60].tolist() != (train[train >= 60] - 60).tolist()


def test_random_splits_of_several_labels_are_one_pool() -> None:
    labels = np.array([[1, -1], [-1, 1], [0, 0], [-1, -1], [0, 1]] * 20, np.int8)
    splits = random_splits(labels, n_train=0.8, max_test=None, n_splits=1)
    assert [len(splits[f"split0/{part}"]) for part in ("train", "val", "test")] == [51, 13, 16]
    assert not any((rows % 5 == 2).any() for rows in splits.values())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"n_train": 1.5}, "1.5"),
        ({"n_train": 0}, "training image"),
        ({"n_train": 3, "max_test": 0}, "test image"),
        ({"n_train": 3, "val_fraction": 1.0}, "validation fraction"),
        ({"n_train": 3, "seed": -1}, "seed"),
    ],
)
def test_random_splits_reject_bad_settings(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(VggfeatError, match=said):
        random_splits(np.zeros(9, np.int32), **{"max_test": None, **setting})
    with pytest.raises(VggfeatError, match="no image has a label"):
        random_splits(np.full(9, -1, np.int32), n_train=3, max_test=None)
