"""The parts train, val and test: the words that people have for them, and random ones (Appendix B
of the paper).

Random ones are drawn class by class. Every class of every split has its own random key, so the draw
inside one class does not change when another class gains or loses images, and split k is the same
however many splits are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vggfeat.datasets.items import known
from vggfeat.errors import VggfeatError

VAL_FRACTION = 0.2  # Appendix B: 20% of the training images choose the hyper-parameters
N_SPLITS = 3  # Appendix B: three random splits

# "eval" is said of val and of test: a name that is known, and has to be asked about.
_WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validate", "validation", "validations", "dev", "devel", "development"),
    "test": ("test", "tests", "testing", "tst", "holdout"),
    "eval": ("eval", "evaluation"),
}
# What may stand beside such a word and says no more: "training_set", "test images".
_PADDING = ("set", "data", "dataset", "images", "image", "imgs", "img", "split")
_PART_OF = {
    word + more: part
    for part, words in _WORDS.items()
    for word in words
    for more in ("", *_PADDING)
}


@lru_cache(maxsize=4096)  # a CSV file has a few words for a million rows
def part_named(name: str) -> tuple[str, tuple[str, ...]] | None:
    """ "train", "val", "test" or "eval" where a name has one word for it, in any case; and its
    other words.

    "Training" and "test_images" have no others, "seg_train" has ("seg",), "val2017" has ("2017",).
    """
    words = [word.lower() for word in re.findall(r"\d+|[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+", name)]
    if part := _PART_OF.get("".join(words)):  # "train_val", "hold-out"
        return part, ()
    spoken = [_PART_OF[word] for word in words if word in _PART_OF]
    others = tuple(word for word in words if word not in _PART_OF and word not in _PADDING)
    return (spoken[0], others) if len(spoken) == 1 else None


def parts_among(names: Sequence[str]) -> dict[str, str]:
    """Those of the folders' names that may stand for parts of a data set, each with its part: see
    `part_named`.

    Names of that one word, or else names that have all other words in common, as "seg_train" and
    "seg_test", among them train and another part; "steam train" and "test tube" are neither.
    """
    named = {name: found for name in names if (found := part_named(name))}
    alike: dict[tuple[str, ...], dict[str, str]] = {}
    for name, (part, others) in named.items():
        alike.setdefault(others, {})[name] = part
    if () in alike:
        return alike[()]
    for parts in alike.values():
        if "train" in parts.values() and len(set(parts.values())) > 1:
            return parts
    return {}


def random_splits(
    labels: np.ndarray,
    *,
    n_train: int | float,
    max_test: int | None,
    val_fraction: float = VAL_FRACTION,
    n_splits: int = N_SPLITS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Draw `n_splits` independent splits: "split0/train", "split0/val", "split0/test",
    "split1/train" …

    labels: (N,) class index, -1 where unknown, split within each class; or (N, C) of 1, -1 and 0,
        split as one pool, because an image of several classes can't be drawn class by class. Rows
        of unknown label (-1, or zeros throughout) are in no split.
    n_train: images per class for train and val together: a count (int), or a fraction of the class
        (float between 0 and 1).
    max_test: at most this many of the other images per class are for test; None takes them all.
    val_fraction: share of the `n_train` images that chooses hyper-parameters ("val"); "train" is
    the rest.

    Returns sorted int64 rows; the three parts of a split are disjoint.
    A class of n <= n_train images gives n - 1 of them to train and val and keeps one for test; a
    class of one image has it in train. "val" gets at least one image of a class where "train" keeps
    one too. Raises VggfeatError for settings out of range, or when no row has a label.
    """
    _check(n_train, max_test, val_fraction, n_splits, seed)
    rows_of_class = _rows_by_class(np.asarray(labels))
    if not rows_of_class:
        raise VggfeatError("there is nothing to split: no image has a label")
    splits: dict[str, np.ndarray] = {}
    for split in range(n_splits):
        parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
        for c, rows in rows_of_class.items():
            # a file may name a class for each of its images: there is nothing to draw from one, and
            # a generator is slow
            drawn = (
                rows
                if len(rows) == 1
                else np.random.default_rng([seed, split, c]).permutation(rows)
            )
            n_fit, n_val = _sizes(len(rows), n_train, val_fraction)
            end = None if max_test is None else n_fit + max_test
            parts["val"].append(drawn[:n_val])
            parts["train"].append(drawn[n_val:n_fit])
            parts["test"].append(drawn[n_fit:end])
        for part, rows_of_part in parts.items():
            splits[f"split{split}/{part}"] = np.sort(np.concatenate(rows_of_part)).astype(np.int64)
    return splits


def _rows_by_class(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Class index -> its rows in ascending order; several labels an image make one pool, class
    0.
    """
    if labels.ndim == 2:
        rows = np.flatnonzero(known(labels))
        return {0: rows} if len(rows) else {}
    # One stable sort instead of a comparison per class: 1.3 million rows of 1,000 classes stay
    # quick.
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(c): r for c, r in zip(classes, parts, strict=True) if c >= 0} if len(labels) else {}


def _sizes(n: int, n_train: int | float, val_fraction: float) -> tuple[int, int]:
    """Of a class of n images: how many are for train and val together, and how many of those for
    val.
    """
    wanted = round(n_train * n) if isinstance(n_train, float) else n_train
    n_fit = max(1, min(wanted, n - 1))
    n_val = round(val_fraction * n_fit)
    if val_fraction > 0:
        n_val = max(1, n_val)
    return n_fit, min(n_val, n_fit - 1)


def _check(
    n_train: int | float, max_test: int | None, val_fraction: float, n_splits: int, seed: int
) -> None:
    if isinstance(n_train, float) and not 0 < n_train < 1:
        raise VggfeatError(
            f"a training fraction is between 0 and 1, not {n_train}; a count is a whole number"
        )
    if not isinstance(n_train, float) and n_train < 1:
        raise VggfeatError(f"each class needs at least 1 training image, not {n_train}")
    if max_test is not None and max_test < 1:
        raise VggfeatError(f"each class needs at least 1 test image, not {max_test}")
    if not 0 <= val_fraction < 1:
        raise VggfeatError(f"the validation fraction is at least 0 and below 1, not {val_fraction}")
    if n_splits < 1 or seed < 0:
        raise VggfeatError(
            f"random splits need 1 split or more and a seed of 0 or more, not {n_splits}, {seed}"
        )
