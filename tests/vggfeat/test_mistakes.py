"""Mistakes of one label an image and of several, of all parts, as rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from vggfeat.errors import VggfeatError
from vggfeat.mistakes import COLUMNS, all_mistakes, as_csv
from vggfeat.results import Scored, results_from

from .test_report import features_of, model_of, results_of


def rows_of(text: str) -> list[list[str]]:
    head, *rows = csv.reader(io.StringIO(text))
    assert tuple(head) == COLUMNS
    return rows


def test_those_of_all_splits_the_worst_first(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
    names = ["a.jpg", 'b, "c".jpg', "d.jpg", "e.jpg", "f.jpg", "g.jpg"]
    features = features_of(tmp_path / "f.h5", labels, ["ant", "bee", "cat"], names)
    right = np.where(np.arange(3) == labels[:, None], 1.0, -1.0)
    once, again = right[:3].copy(), right[1:4].copy()
    once[1] = [0.25, -0.5, 0.0]  # b, a bee, taken for an ant by 0.75
    again[0] = [0.0, -1.0, 0.5]  # and for a cat, by 1.5
    scored = {"split0": Scored(np.arange(3), once), "split1": Scored(np.arange(1, 4), again)}
    model = model_of(features.classes, scored, results_of())
    found = all_mistakes(None, [features], model)
    assert rows_of(as_csv(found, features)) == [
        ['b, "c".jpg', "the test part of split1", "bee", "cat", "0.5", "-1.0"],
        ['b, "c".jpg', "the test part of split0", "bee", "ant", "0.25", "-0.5"],
    ]


def test_of_several_labels_what_is_named_and_what_is_missed(tmp_path: Path) -> None:
    labels = np.array([[1, -1, 1], [-1, 1, 0], [-1, -1, -1]], np.int8)
    scores = np.array([[1.0, 2.0, -0.5], [-1.0, 0.5, 3.0], [-1.0, -1.0, 0.125]])
    features = features_of(tmp_path / "f.h5", labels, ["ant", "bee", "cat"])
    model = model_of(features.classes, {"test": Scored(np.arange(3), scores)}, results_of())
    found = all_mistakes(results_from(results_of(), ""), [features], model)
    assert rows_of(as_csv(found, features)) == [
        ["0000.jpg", "test", "ant;cat", "bee", "2.0", ""],
        ["0000.jpg", "test", "cat", "", "", "-0.5"],
        ["0002.jpg", "test", "", "cat", "0.125", ""],  # the difficult one is none
    ]


def test_without_scores_or_labels_there_are_none(tmp_path: Path) -> None:
    unlabelled = features_of(tmp_path / "u.h5", np.full(6, -1, np.int32), ["ant", "bee"])
    model = model_of(["ant", "bee"], {}, results_of())
    with pytest.raises(VggfeatError, match="the model file has no scores"):
        all_mistakes(None, [unlabelled], model)
    model = model_of(["ant", "bee"], {"test": Scored(np.arange(6), np.eye(6, 2))}, results_of())
    with pytest.raises(VggfeatError, match="the scored images have no labels"):
        all_mistakes(None, [unlabelled], model)
