"""The report: what is on the page, what is left out and said, and what is refused. `test_browser` looks at it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vggfeat import cli, metrics
from vggfeat.checked import MOST_BYTES
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.model import Model
from vggfeat.page import Series, chart
from vggfeat.protocols import Scored
from vggfeat.report import _plane, read_results, write_report
from vggfeat.store import Description, Features, open_features
from vggfeat.writer import FeatureWriter

from .conftest import Command, photograph

PART = Description(
    "A", "random:A", "ab" * 32, "fc7", (32, 48), True, "floor", "bilinear", "float32", "Pillow"
)
NASTY = '<script>alert("x")</script> & {braces} ü\udcff'


def features_of(
    path: Path, labels: np.ndarray | None, classes: list[str], names: list[str] | None = None
) -> Features:
    """A feature file of random descriptors, each class around its own centre."""
    rng = np.random.default_rng(0)
    n = 12 if labels is None else len(labels)
    x = rng.random((n, 2, 16), dtype=np.float32)
    if labels is not None:
        k = labels if labels.ndim == 1 else labels.argmax(1)
        x += 3 * np.eye(max(len(classes), 1), 16, dtype=np.float32)[k][:, None]
    return write_features(path, x, labels, classes, names or [f"{i:04d}.jpg" for i in range(n)])


def write_features(
    path: Path, x_NQD: np.ndarray, labels: np.ndarray | None, classes: list[str], names: list[str]
) -> Features:
    items = Items("folder", "single-label", path.parent, names, labels, classes)
    with FeatureWriter(path, items, PART, x_NQD.shape[2], overwrite=True) as file:
        for i, row_QD in enumerate(x_NQD):
            for s, descriptor_D in enumerate(row_QD):
                file.write(i, s, descriptor_D)
        file.finish()
    return open_features(path)


def results_of(**more: Any) -> dict[str, Any]:
    parts = [
        {"net": "A", "weights": "random:A", "fingerprint": "ab" * 32, "layer": "fc7", "scales": [32, 48]}
    ]
    return {
        "dataset": "folder", "protocol": "single-label", "C": 1.0, "n_train": 8, "n_test": 4, "n_unreadable": 0,
        "features": parts, "pool": "average", **more,
    }  # fmt: skip


def model_of(classes: list[str], scored: dict[str, Scored], results: dict[str, Any]) -> Model:
    K = len(classes)
    return Model(classes, np.zeros((K, 16)), np.zeros(K), (PART,), "average", False, results, scored)


@pytest.fixture
def three(tmp_path: Path) -> tuple[Features, Model, dict[str, Any]]:
    """30 images of three classes, 12 of them scored; image 3 of class 0 is taken for class 2."""
    labels = np.arange(30, dtype=np.int32) % 3
    rows = np.arange(12)
    scores = np.where(np.arange(3) == labels[rows][:, None], 1.0, -1.0) + np.arange(12)[:, None] / 100
    scores[3] = [-0.5, -0.6, 2.0]
    per_class = {"ant": {"recall": 0.75}, "bee": {"recall": 1.0}, NASTY: {"recall": 1.0}}
    results = results_of(
        mean_class_recall=11 / 12, accuracy=11 / 12, per_class=per_class, C_grid=[0.5, 1.0, 2.0],
        C_curve=[0.8, 0.9, 0.85], selected_by="mean_class_recall",
    )  # fmt: skip
    features = features_of(tmp_path / "f.h5", labels, ["ant", "bee", NASTY])
    return features, model_of(features.classes, {"test": Scored(rows, scores)}, results), results


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.S))


class _Check(HTMLParser):
    """Every tag that is opened is closed, in order; nothing points out of the page."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "base"), tag
        for name, value in attrs:
            assert name != "href" and not name.startswith("on")
            assert name != "src" or str(value).startswith("data:image/")
        if tag not in self.VOID and tag not in ("line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_is_on_the_page(three, tmp_path):
    features, model, results = three
    pixels = np.stack([photograph(i, 40, 50) for i in range(30)])
    items = Items("folder", "single-label", Path(), features.names, None, [], images=pixels)
    page, left_out = write_report(results, [features], model, items)
    _Check(page)
    assert left_out == []
    shown = sections(page)
    assert list(shown) == ["figures", "classes", "c", "curves", "confusions", "images", "map", "made"]
    assert "91.67 %" in shown["figures"] and "alert" in shown["classes"]
    assert "<script" not in page and "&lt;script&gt;" in page and "{braces}" in page
    truth = np.where(features.labels[:12] == 2, 1, -1)
    ap = metrics.average_precision(model.scored["test"].scores[:, 2], truth)
    assert f"AP {100 * ap:.1f}" in shown["curves"] and ap < 1
    assert shown["curves"].count("<svg") == 3
    # the one mistake: in the matrix, in the list, and among the wrong images of the class that it was taken for
    assert re.search(r"<td>ant</td>\s*<td>&lt;script[^<]*</td>\s*<td[^>]*>1</td>", shown["confusions"])
    assert "+2.00; is ant" in shown["images"]
    assert shown["images"].count("<img") == 11 + 1
    assert shown["map"].count("<circle") == 30


def test_without_images_the_page_says_so(three):
    features, model, _ = three
    page, left_out = write_report(None, [features], model, None, "the images are not at hand (gone)")
    _Check(page)
    assert left_out == ["thumbnails: the images are not at hand (gone)"]
    shown = sections(page)
    assert "Thumbnails are left out: the images are not at hand (gone)." in shown["images"]
    assert "<img" not in shown["images"] and "0003.jpg" in shown["images"]
    assert "thumbnails: the images are not at hand" in shown["made"]


def test_images_that_are_gone_or_broken_keep_their_place(three, tmp_path):
    features, model, results = three
    for i in range(0, 30, 2):
        Image.fromarray(photograph(i, 40, 50)).save(tmp_path / f"{i:04d}.jpg")
    (tmp_path / "0002.jpg").write_bytes(b"no image")
    items = Items("folder", "unlabelled", tmp_path, features.names, None, [])
    page, left_out = write_report(results, [features], model, items)
    assert left_out == ["7 thumbnails: the images can't be read any more"]
    assert sections(page)["images"].count("<img") == 12 - 7


@pytest.mark.parametrize("given", ["results", "features", "model"])
def test_what_is_not_given_is_left_out_and_said(three, given):
    features, model, results = three
    page, left_out = write_report(
        results if given != "model" else None,
        [features] if given == "features" else [],
        model if given == "model" else None,
        None,
    )
    _Check(page)
    assert "91.67 %" in page and "confusions" not in sections(page)
    need = {"results": "`model`", "features": "`model`", "model": "`features`"}[given]
    assert left_out[0].startswith("curves, confusions and mistakes: ") and need in left_out[0]
    assert ("map" in sections(page)) == (given == "features")


@pytest.mark.parametrize("K", [1, 2, 25, 1000])
def test_any_number_of_classes(tmp_path, K):
    rng = np.random.default_rng(0)
    classes = [f"n{k:04d}" for k in range(K)]
    labels = np.where(rng.random((2 * K + 8, K)) < 1 / K, 1, -1).astype(np.int8)
    labels[0, 0], labels[1, 0] = 1, -1
    if K > 2:  # one label an image
        labels = (np.arange(3 * K) % K).astype(np.int32)
    rows = np.arange(len(labels))
    scored = {"test": Scored(rows, rng.standard_normal((len(labels), K)))}
    figure = "recall" if labels.ndim == 1 else "ap_allpoint"
    per_class = {name: {figure: float(rng.random())} for name in classes}
    results = results_of(per_class=per_class)
    features = features_of(tmp_path / "f.h5", labels, classes)
    page, left_out = write_report(
        results, [features], model_of(classes, scored, results), None, "none at hand"
    )
    _Check(page)
    assert len(page) < 2e6 and len(left_out) == 1
    shown = sections(page)
    assert ("confusions" in shown) == (labels.ndim == 1)
    assert shown["curves"].count("<svg") == min(K, 40)
    if K == 1000:
        assert "The 20 best and the 20 worst of 1000 classes." in shown["curves"]
        assert "All 1000 classes" in shown["classes"] and shown["confusions"].count("<img") == 1


def test_labels_unknown_or_none(tmp_path, three):
    _, model, results = three
    unknown = features_of(tmp_path / "u.h5", np.full(30, -1, np.int32), model.classes)
    page, left_out = write_report(results, [unknown], model, None, "")
    assert left_out == ["curves, confusions and mistakes: the scored images have no labels"]
    assert "map" in sections(page)


def test_another_run_is_refused(three, tmp_path):
    features, model, results = three
    for other, match in (
        ({**results, "accuracy": 0.5}, "two runs: accuracy is 0.5 and 0.91"),
        ({**results, "dataset": "digits"}, "two runs: dataset"),
    ):
        with pytest.raises(VggfeatError, match=match):
            write_report(other, [features], model, None)
    digits = features_of(tmp_path / "d.h5", features.labels, features.classes)
    digits.attributes["dataset"] = "digits"
    with pytest.raises(VggfeatError, match="is of digits, the results are of folder"):
        write_report(results, [digits], model, None)
    with pytest.raises(VggfeatError, match="are of 1 feature files; 2 given"):
        write_report(results, [features, features], model, None)
    wrong = {**results, "features": [{**results["features"][0], "fingerprint": "cd" * 32}]}
    with pytest.raises(VggfeatError, match="is not the feature file of these results"):
        write_report(wrong, [features], None, None)
    short = features_of(tmp_path / "s.h5", features.labels[:9], features.classes)
    for known in (results, {key: value for key, value in results.items() if key != "features"}):
        with pytest.raises(VggfeatError, match="has rows that"):
            write_report(known, [short], model, None)
    fused = dataclasses.replace(model, parts=model.parts * 3)
    with pytest.raises(VggfeatError, match="the model is of 3 feature files; 1 given"):
        write_report(results, [features], fused, None)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"dataset": None}, "dataset must be text, not None"),
        ({"per_class": 3}, "per_class must be a record of names, not 3"),
        ({"per_class": {"ant": []}}, "per_class.ant must be a record, not a list of 0"),
        ({"per_class": {"ant": {"recall": 1.5}}}, r"per_class.ant.recall must lie in 0..1, not 1.5"),
        ({"per_split": ["a"]}, r"per_split\[0\] must be a record, not 'a'"),
        ({"per_split": [{"C": -1.0}]}, r"per_split\[0\].C must lie in 1e-300..1e\+300, not -1.0"),
        ({"C_curve": "x", "C_grid": None}, "C_grid must be a list, not None"),
        ({"C_grid": [1.0], "C_curve": []}, "C_grid and C_curve have different lengths"),
        ({"C": float("nan")}, "C must be a finite number, not nan"),
        ({"C": True}, "C must be a finite number, not True"),
        ({"n_test": 10**400}, r"n_test must be less than 2\^63, not a huge number"),
        ({"features": 7}, "features must be a list, not 7"),
        ({"features": ["a"]}, r"features\[0\] must be a record, not 'a'"),
        ({"features": [{"net": "A", "layer": "fc7"}]}, r"features\[0\].scales is missing"),
        ({"rules": 4}, "rules must be a list, not 4"),
        ({"validation": {"per_class": {"ant": None}}}, "validation.per_class.ant must be a record, not None"),
    ],
)
def test_results_that_are_none(three, damage, says):
    with pytest.raises(VggfeatError, match=f"^these results: {says}$"):
        write_report({**three[2], **damage}, [three[0]], None, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b'{"dataset": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"dataset": "\xff"}', "is not UTF-8 text"),
        (b"[1]", "must be a record, not a list of 1"),
        (b" " * (MOST_BYTES + 1), "is longer than the 16,384 KiB that results may have"),
    ],
)
def test_a_file_that_holds_no_results(tmp_path, text, says):
    (tmp_path / "r.json").write_bytes(text)
    with pytest.raises(VggfeatError, match=says) as refused:
        read_results(tmp_path / "r.json")
    assert str(refused.value).startswith(str(tmp_path / "r.json")) and len(str(refused.value)) < 300


def test_results_are_a_regular_file(tmp_path):
    """A pipe without a writer would be waited for, /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(VggfeatError, match="is no regular file"):
            read_results(path)
    with pytest.raises(VggfeatError, match="is a folder"):
        read_results(tmp_path)
    with pytest.raises(VggfeatError, match=r"no results at .*: write them with `vggfeat svm --json`"):
        read_results(tmp_path / "none.json")


def test_curves_are_thinned_but_keep_their_shape():
    y = np.zeros(100_000)
    y[54_321] = 1.0
    svg = str(chart([Series("s", np.arange(100_000), y)], "x", "y", y_range=(0, 1)))
    assert len(svg) < 20_000
    points = re.search(r'points="([^"]*)"', svg)
    assert points and min(float(point.split(",")[1]) for point in points[1].split()) == 8.0
    # precision falls only after the last positive, however many images follow
    recall, precision = np.minimum(np.arange(1, 5001) / 10, 1), np.minimum(10 / np.arange(1, 5001), 1)
    svg = str(chart([Series("s", recall, precision)], "recall", "precision", x_range=(0, 1), y_range=(0, 1)))
    points = re.search(r'points="([^"]*)"', svg)
    drawn = [tuple(map(float, point.split(","))) for point in points[1].split()] if points else []
    right = max(x for x, _ in drawn)
    assert {y for x, y in drawn if x < right} == {8.0} and (right, 8.0) in drawn


@pytest.mark.parametrize("value", [1e308, -1e300, 1e-320, 1e300, 5e-324])
@pytest.mark.parametrize("log", [False, True])
def test_no_value_breaks_a_chart(value, log):
    svg = str(
        chart([Series("s", np.array([value, value]), np.array([1.0, value]))], "x", "y", log_x=log, log_y=log)
    )
    assert "nan" not in svg and "inf" not in svg


def test_values_that_are_not_finite_draw_nothing():
    svg = str(chart([Series("s", np.array([np.nan, 1.0]), np.array([1.0, np.inf]))], "x", "y", log_x=True))
    assert "nan" not in svg and "inf" not in svg


def test_the_command(run_main: Command, folder: Path, tmp_path: Path) -> None:
    command = functools.partial(run_main, cli.main)
    small = ("--weights", "random:A,width=0.125,crop=32", "--scales", "32,48", "--device", "cpu")
    f, m, r, page = (tmp_path / name for name in ("f.h5", "m.h5", "r.json", "report.html"))
    assert command("extract", "--dataset", "folder", "--root", folder, *small, "--out", f).status == 0
    assert command("svm", "--features", f, "--C", "1,4", "--out", m, "--json", r).status == 0
    everything = ("report", "--features", f, "--model", m, "--results", r, "--out", page)
    ran = command(*everything, "--root", folder)
    assert (ran.status, ran.err) == (0, ""), ran.err
    _Check(page.read_text())
    assert page.read_text().count("data:image/jpeg") == 4
    assert command(*everything).status == 1  # it exists
    ran = command(*everything, "--root", tmp_path / "gone", "--overwrite")
    assert ran.status == 0 and ran.err.startswith(
        "left out: thumbnails: the images are not at hand (no folder"
    )
    ran = command("report", "--out", tmp_path / "n.html")
    assert ran.status == 1 and ran.err == "vggfeat: a report needs --results or --model\n"
    (tmp_path / "bad.json").write_text(json.dumps([1]))
    ran = command("report", "--results", tmp_path / "bad.json", "--out", tmp_path / "n.html")
    assert ran.status == 1 and "must be a record" in ran.err and not (tmp_path / "n.html").exists()


def test_a_map_of_equal_descriptors_is_one_point():
    """Principal components and t-SNE divide by how much they vary."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xy, _ = _plane(np.ones((70, 16), np.float32))
    assert (xy == 0).all() and xy.shape == (70, 2)
