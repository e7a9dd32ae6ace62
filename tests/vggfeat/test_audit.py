"""What is found of problems that were planted: among descriptors that are drawn at random, and in a
folder of images by the command.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup, escape
from PIL import Image, ImageOps

from vggfeat import audit, cli
from vggfeat.audit import Pair
from vggfeat.audit_page import audit_features, record_of, sections_of
from vggfeat.results import results_from
from vggfeat.store import UNREADABLE

from ..conftest import Command
from .test_report import features_of, made_of, results_of, write_features

K = 5


def unit(x_ND: np.ndarray) -> np.ndarray:
    made: np.ndarray = (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)
    return made


@functools.cache
def clusters(n: int = 300, D: int = 24, spread: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors of K classes, and their labels."""
    key = np.random.default_rng(0)
    labels = np.arange(n, dtype=np.int32) % K
    centres = np.abs(key.standard_normal((K, D)))
    return unit(centres[labels] + spread * np.abs(key.standard_normal((n, D)))), labels


def test_neighbours_are_those_of_all_products_whatever_the_block() -> None:
    X, _ = clusters()
    products = X.astype(np.float64) @ X.T
    np.fill_diagonal(products, -1)
    whole = audit.neighbours_of(X)
    assert (whole.rows == np.argsort(-products, axis=1)[:, : audit.NEAR]).all()
    for block in (7, 64):
        parts = audit.neighbours_of(X, block=block)
        assert (parts.rows == whole.rows).all()
        np.testing.assert_allclose(parts.cosines, whole.cosines, rtol=1e-6)
    assert audit.neighbours_of(X[:1]).rows.shape == (1, 0)
    assert audit.neighbours_of(X[:3]).rows.shape == (3, 2)


def test_planted_copies_are_candidates_and_many_equal_rows_are_one_group() -> None:
    X, _ = clusters()
    key = np.random.default_rng(1)
    near = unit(X[:20] + 0.01 * key.standard_normal((20, X.shape[1])))
    all_equal = np.repeat(X[30:31], 40, axis=0)
    every = np.concatenate([X, near, all_equal])
    pairs = audit.candidates(every, audit.neighbours_of(every))
    found = {(pair.first, pair.second) for pair in pairs if pair.duplicates}
    assert {(i, 300 + i) for i in range(20)} <= found
    largest = audit.groups_of([pair for pair in pairs if pair.duplicates])[0]
    assert set(largest) >= {30, *range(320, 360)}
    assert {a % 300 for a, b in found if b < 320} - {*range(20)} == set()  # and nothing else


def test_one_file_twice_needs_no_pixels() -> None:
    X, _ = clusters()
    every = np.concatenate([X, X[:1]])
    crc32 = np.arange(1, 302, dtype=np.uint32)
    crc32[-1] = 1
    [pair] = [p for p in audit.candidates(every, audit.neighbours_of(every), crc32) if p.same_file]
    assert (pair.first, pair.second) == (0, 300)
    assert audit.compared([pair], lambda row: pytest.fail("read")) == [pair]


def picture(seed: int) -> np.ndarray:
    """Smooth noise: what pictures are to a correlation."""
    small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC))


def test_pixels_tell_copies_from_other_pictures() -> None:
    one = Image.fromarray(picture(0))
    details = audit.details_of(picture(0))

    def told(image: Image.Image) -> tuple[float, bool]:
        return audit.agreement(details, audit.details_of(np.asarray(image.convert("RGB"))))

    for copy in (one, one.resize((80, 60)), one.convert("L"), one.point(lambda v: v * 0.7)):
        agree, mirrored = told(copy)
        assert agree > 0.95 and not mirrored
    assert told(one.crop((10, 5, 154, 113)))[0] > 0.85
    agree, mirrored = told(ImageOps.mirror(one))
    assert agree > 0.99 and mirrored
    assert told(Image.fromarray(picture(1)))[0] < 0.6
    assert told(Image.new("RGB", (50, 50), "white")) == (0.0, False)


def test_leaks_are_of_groups_in_each_split() -> None:
    pairs = [Pair(0, 1, 1, 0), Pair(1, 2, 1, 0), Pair(4, 5, 1, 0)]
    splits = {
        "split0/train": np.array([0, 4, 5]),
        "split0/test": np.array([2, 3]),
        "split1/train": np.array([3]),
        "split1/val": np.array([5]),
        "split1/test": np.array([0, 1, 4]),
    }
    leaks = audit.leaks_of(pairs, audit.parts_of(splits, 6))
    assert {name: (leak.tested, leak.rows.tolist()) for name, leak in leaks.items()} == {
        "split0": (2, [2]),  # by way of 1
        "split1": (3, [4]),
    }
    assert audit.parts_of({"train": np.array([0]), "val": np.array([1])}, 2)[""][1] == "test"


def test_left_out_scores_are_those_of_a_ridge_regression_without_the_row() -> None:
    X, labels = clusters(40)
    w = np.linspace(0.5, 2, 40)
    targets = np.where(np.arange(K) == labels[:, None], 1.0, -1.0)
    loo = audit._LeaveOneOut(X, w)
    first, mean = loo.z.T @ (w[:, None] * targets), w @ targets / w.sum()
    loo.choose_penalty(first, mean, lambda rows: targets[rows])
    [penalty] = [
        p for p in audit.PENALTIES if np.allclose(1 / (loo.values + p), loo.inverse, rtol=1e-9)
    ]
    rows = np.array([3, 17])
    for row, scores in zip(rows, loo.scores(first, mean, targets[rows], rows), strict=True):
        rest = np.arange(40) != row
        centre = w[rest] @ X[rest] / w[rest].sum()
        x, y = X[rest] - centre, targets[rest]
        own = w[rest] @ y / w[rest].sum()
        ridge = x.T @ (w[rest, None] * x) + penalty * np.eye(X.shape[1])
        coef = np.linalg.solve(ridge, x.T @ (w[rest, None] * (y - own)))
        np.testing.assert_allclose(scores, (X[row] - centre) @ coef + own, rtol=1e-6)


def test_swapped_labels_are_likely_wrong_and_right_ones_are_not() -> None:
    X, labels = clusters()
    wrong = np.arange(0, 300, 23)
    told = labels.copy()
    told[wrong] = (told[wrong] + 2) % K
    [doubts] = audit.doubts(X, told, K)
    likely = set(doubts.rows[: doubts.likely].tolist())
    assert {*wrong} <= likely and len(likely) <= len(wrong) + 2
    assert (doubts.better[: len(wrong)] == labels[doubts.rows[: len(wrong)]]).all()
    assert len(wrong) <= doubts.at_most <= len(wrong) + 6 and doubts.found > 0.9
    [clean] = audit.doubts(X, labels, K)
    assert clean.likely <= 2
    # more values than images, which are as many as there are images then
    long = np.hstack([X, np.zeros((300, 400), np.float32)])
    [same] = audit.doubts(long, told, K)
    np.testing.assert_allclose(same.margins, doubts.margins, atol=1e-5)


def test_of_labels_that_cannot_be_predicted_none_is_likely_wrong() -> None:
    X, _ = clusters()
    labels = np.random.default_rng(0).integers(0, K, 300)
    [doubts] = audit.doubts(X, labels, K)
    assert doubts.likely == 0 and doubts.threshold == np.inf


def test_labels_that_are_too_few_are_not_judged() -> None:
    X, labels = clusters()
    assert audit.doubts(X[:30], labels[:30], K) == []
    assert audit.doubts(X, np.zeros(300, np.int32), K) == []
    assert audit.doubts(X, np.full(300, -1, np.int32), K) == []
    some = labels.copy()
    some[labels == 4] = -1
    some[[4, 9]] = 4
    [doubts] = audit.doubts(X, some, K + 1)  # a class without an image, too
    assert doubts.unjudged == 2 and not {4, 9} & {*doubts.rows.tolist()}
    assert len(doubts.rows) == (labels != 4).sum() and not (doubts.better == K).any()


def test_of_several_labels_an_image_each_is_judged_for_itself() -> None:
    X, labels = clusters()
    several = np.where(np.arange(K) == labels[:, None], 1, -1).astype(np.int8)
    several[::7, 1] = 0
    right = several.copy()
    gone, there = np.arange(0, 300, 61), np.arange(1, 300, 61)
    several[gone, labels[gone]] = -1
    other = (labels[there] + 1) % K
    several[there, other] = 1
    present, absent = audit.doubts(X, several, K)
    for doubts, sign, rows in ((present, 1, there), (absent, -1, gone)):
        said = several[doubts.rows, doubts.classes]
        assert (said == sign).all() and len(said) == (several == sign).sum()
        likely = doubts.rows[: doubts.likely]
        assert {*rows[right[rows].any(axis=1)].tolist()} & {*likely.tolist()} == {*rows.tolist()}
        assert doubts.likely <= len(rows) + 4


def test_an_image_like_no_other_is_odd() -> None:
    X, labels = clusters()
    X = X.copy()
    X[77] = -X[77]
    near = audit.neighbours_of(X)
    for own in (labels, None, np.where(np.arange(K) == labels[:, None], 1, -1)):
        found = audit.odd_ones(near, own)
        assert found[0].row == 77 and len(found) <= 3
    assert audit.odd_ones(audit.neighbours_of(X[:5]), labels[:5]) == []


def text_alone(row: int, caption: str) -> Markup:
    return escape(caption)


# --- in a feature file ----------------------------------------------------------------------------


def test_unreadable_rows_and_unlabelled_images_are_said(tmp_path: Path) -> None:
    X, _ = clusters(60)
    x_NQD = np.repeat(X[:, None, :16], 2, axis=1) + 1
    x_NQD[1] = x_NQD[0]
    x_NQD[5] = 0
    features = write_features(tmp_path / "f.h5", x_NQD, None, [], [f"{i}.jpg" for i in range(60)])
    features.status[7] = UNREADABLE
    found = audit_features([features], results_from(results_of(), ""), None, None, "gone")
    record = json.loads(json.dumps(record_of(found, features)))
    assert record["images"] == 60 and record["audited"] == 58
    assert record["groups"] == [["0.jpg", "1.jpg"]] and record["labels"] == []
    [pair] = record["duplicates"]
    assert pair["agreement"] is None and pair["labels"] == [[], []] and pair["parts"] == {}
    assert record["left_out"][-1].startswith("likely wrong labels: they need 40 images")
    [section] = sections_of(found, features, text_alone)
    assert "2 images in 1 group," in section.body and "pixels: gone" in section.body


def test_several_labels_an_image_are_on_the_page(tmp_path: Path) -> None:
    X, labels = clusters()
    several = np.where(np.arange(K) == labels[:, None], 1, -1).astype(np.int8)
    several[8, labels[8]] = -1
    several[8, (labels[8] + 1) % K] = 1
    names = [f"{i}.jpg" for i in range(300)]
    features = write_features(
        tmp_path / "f.h5", np.repeat(X[:, None, :16], 2, axis=1), several, list("abcde"), names
    )
    found = audit_features([features], None, None, None)
    record = record_of(found, features)
    assert [kind["says"] for kind in record["labels"]] == ["present", "absent"]
    assert [kind["likely_wrong"][0]["image"] for kind in record["labels"]] == ["8.jpg", "8.jpg"]
    [section] = sections_of(found, features, text_alone)
    own, other = "abcde"[labels[8]], "abcde"[(labels[8] + 1) % K]
    assert f"no {other}?" in section.body and f"also {own}?" in section.body


def test_one_image_is_nothing_to_compare(tmp_path: Path) -> None:
    labels = np.zeros(1, np.int32)
    features = features_of(tmp_path / "f.h5", labels, ["ant"])
    found = audit_features([features], None, None, None)
    [section] = sections_of(found, features, text_alone)
    assert found.audited == 0 and "fewer than two images" in section.body


def test_the_command_writes_what_it_finds(run_main: Command, tmp_path: Path) -> None:
    """Two copies, one of them in another class and mirrored; pixels tell them from an image with
    nearly the same descriptor.
    """
    X, labels = clusters(44)
    x, labels = np.maximum(X[:, :16], 0.01), labels % 2
    names = [f"{'ab'[label]}/{i}.png" for i, label in enumerate(labels)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for i, name in enumerate(names):
        Image.fromarray(picture(i)).save(tmp_path / name)
    Image.fromarray(picture(0)).resize((90, 70)).save(tmp_path / names[10])
    ImageOps.mirror(Image.fromarray(picture(1))).save(tmp_path / names[11])
    for row, copied in ((10, 0), (11, 1), (12, 2)):
        x[row] = x[copied] + 0.001
    labels[11] = 1 - labels[1]
    features = write_features(
        tmp_path / "f.h5", np.repeat(x[:, None], 2, axis=1), labels, ["a", "b"], names
    )
    results = tmp_path / "r.json"
    results.write_text(json.dumps(made_of(features, results_of())))
    page, found = tmp_path / "p.html", tmp_path / "p.json"
    words = ("--results", results, "--features", features.path, "--out", page, "--json", found)
    ran = run_main(cli.main, "report", *words)
    assert ran.status == 0, ran.err
    record: dict[str, Any] = json.loads(found.read_text())
    by_name = {tuple(pair["images"]): pair for pair in record["duplicates"]}
    assert by_name.keys() == {(names[0], names[10]), (names[1], names[11])}
    other = by_name[names[1], names[11]]
    assert other["mirrored"] and other["labels"][0] != other["labels"][1]
    assert other["agreement"] > 0.9 and record["compared_by_pixels"] >= 3
    text = page.read_text()
    assert (
        'id="problems"' in text
        and "1 group has different labels" in text
        and text.count("data:image/jpeg") >= 4
    )
    assert run_main(cli.main, "report", *words).status == 1  # they exist
