"""The report: what is on the page, what is left out and said, and what is refused. `test_browser`
looks at it.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import html
import json
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from vggfeat import cli, datasets, exhibits, metrics, report
from vggfeat.aggregate import POOLINGS
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.exhibits import _plane
from vggfeat.features import open_features
from vggfeat.mistakes import COLUMNS
from vggfeat.model import Model
from vggfeat.report import wilson
from vggfeat.results import Scored, results_from, summary
from vggfeat.store import Description, Features
from vggfeat.writer import FeatureWriter

from ..conftest import Command, photograph

Three = tuple[Features, Model, dict[str, Any]]

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
    with FeatureWriter.open(path, items, PART, x_NQD.shape[2], overwrite=True) as file:
        for i, row_QD in enumerate(x_NQD):
            for s, descriptor_D in enumerate(row_QD):
                file.write(i, s, descriptor_D)
        file.finish()
    return open_features(path)


def results_of(**more: Any) -> dict[str, Any]:
    parts = [
        {
            "net": "A",
            "weights": "random:A",
            "fingerprint": "ab" * 32,
            "layer": "fc7",
            "scales": [32, 48],
        }
    ]
    return {
        "dataset": "folder",
        "protocol": "single-label",
        "C": 1.0,
        "n_train": 8,
        "n_test": 4,
        "n_unreadable": 0,
        "features": parts,
        "pool": "average",
        **more,
    }


def summary_of(results: dict[str, Any]) -> list[tuple[str, str]]:
    return summary(results_from(results, ""))


def made_of(features: Features, results: dict[str, Any]) -> dict[str, Any]:
    """Results of the rows of a feature file."""
    results["features"] = [{**part, "rows": features.rows_digest} for part in results["features"]]
    return results


def model_of(classes: list[str], scored: dict[str, Scored], results: dict[str, Any]) -> Model:
    K, own = len(classes), results_from(results, "")
    return Model(classes, np.zeros((K, 16)), np.zeros(K), (PART,), "average", False, own, scored)


def write_report(results: dict[str, Any] | None, *more: Any) -> tuple[str, list[str]]:
    """The report of results as they lie in a file."""
    own = None if results is None else results_from(results, "these results")
    return report.write_report(own, *more)


@pytest.fixture
def three(tmp_path: Path) -> Three:
    """30 images of three classes, 12 of them scored; image 3 of class 0 is taken for class 2."""
    labels = np.arange(30, dtype=np.int32) % 3
    rows = np.arange(12)
    scores = (
        np.where(np.arange(3) == labels[rows][:, None], 1.0, -1.0) + np.arange(12)[:, None] / 100
    )
    scores[3] = [-0.5, -0.6, 2.0]
    per_class = {"ant": {"recall": 0.75}, "bee": {"recall": 1.0}, NASTY: {"recall": 1.0}}
    results = results_of(
        mean_class_recall=11 / 12,
        accuracy=11 / 12,
        per_class=per_class,
        C_grid=[0.5, 1.0, 2.0],
        C_curve=[0.8, 0.9, 0.85],
        selected_by="mean_class_recall",
    )
    features = features_of(tmp_path / "f.h5", labels, ["ant", "bee", NASTY])
    made_of(features, results)
    return features, model_of(features.classes, {"test": Scored(rows, scores)}, results), results


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="(\w+)"[^>]*>(.*?)</section>', page, re.S))


def data_of(text: str) -> dict[str, Any]:
    """What the script is given."""
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    data: dict[str, Any] = json.loads(found)
    return data


class _Check(HTMLParser):
    """Every tag that is opened is closed, in order; nothing points out of the page; the only script
    is ours, which the page's policy allows by its hash.
    """

    VOID = ("meta", "img", "br", "wbr", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert not self.open
        scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
        assert page.count("<script") == 2 and len(scripts) == 1
        digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}';" in page and "default-src 'none';" in page
        data_of(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "base", "form"), tag
        for name, value in attrs:
            assert name != "href" or str(value).startswith("#")
            assert not name.startswith("on")
            assert name != "src" or str(value).startswith("data:image/")
        if tag not in self.VOID and tag not in ("line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_is_on_the_page(three: Three, tmp_path: Path) -> None:
    features, model, results = three
    pixels = np.stack([photograph(i, 40, 50) for i in range(30)])
    items = Items("folder", "single-label", Path(), list(features.names), None, [], images=pixels)
    page, left_out = write_report(results, [features], model, items)
    _Check(page)
    assert left_out == []
    shown = sections(page)
    assert list(shown) == [
        *("figures", "mistakes", "images", "confusions", "curves", "classes", "c", "map", "made")
    ]
    score, strip, facts = (
        shown["figures"].index(each) for each in ("<b>91.7 %</b>", "pictures strip", "91.67 %")
    )
    assert score < strip < facts and "alert" in shown["classes"]
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "{braces}" in page
    assert features.labels is not None
    truth = np.where(features.labels[:12] == 2, 1, -1)
    ap = metrics.average_precision(model.scored["test"].scores[:, 2], truth)
    assert f"AP (area) {100 * ap:.1f} %" in shown["curves"] and ap < 1
    assert shown["curves"].count("<svg") == 3
    # the one mistake: in the matrix, in the list, and among the wrong images of the class that it
    # was taken for
    assert re.search(
        r"<td>ant</td>\s*<td>&lt;script[^<]*</td>\s*<td[^>]*>1</td>",
        shown["confusions"].replace("<wbr>", ""),
    )
    for key in ("mistakes", "images"):
        told = f"ant , taken for {NASTY}; {NASTY} +2.00, ant -0.50"
        assert told.replace("\udcff", "\\udcff") in html.unescape(text_of(shown[key])), key
    assert shown["mistakes"].count("<img") == 1 and "0003.jpg" in text_of(shown["mistakes"])
    assert shown["images"].count("<img") == 11 + 1
    assert shown["map"].count("<circle") == 30
    data = data_of(page)
    assert data["mistakes"]["rows"] == [["3", "0003.jpg", 0, 0, 2, 2.0, -0.5, 1]]
    assert data["mistakes"]["classes"] == ["ant", "bee", NASTY]
    cells = {"cells": [[0, 2, 1, 1]], "labels": [[3, 4, 3], [4, 4, 4], [4, 4, 4]]}
    assert data["confusions"] == cells
    assert (
        "A pointer on a dot, or an arrow key, shows the image, its name and class" in shown["map"]
    )
    assert data["map"]["count"] == 30 and data["map"]["tiles"].startswith("data:image/jpeg;base64,")
    [chart] = re.findall(r'<g [^>]*data-name="all values" data-values="([^"]*)"', shown["c"])
    assert chart == "0.5,80 1,90 2,85" and 'class="ring"' in shown["c"]


def text_of(page: str) -> str:
    """What a person reads."""
    read = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"</?span>|<wbr>", "", read)).split())


def test_what_was_scored_stands_wherever_a_figure_does(three: Three) -> None:
    """Without a test part val is scored: no line of the page may pass it off as test."""
    features, model, results = three
    results |= {"test_split": "val", "C_chosen_on": "20 % of train", "model_trained_on": "train"}
    model.scored["val"] = model.scored.pop("test")
    page, _ = write_report(results, [features], model, None, "gone")
    text = text_of(page)
    assert (
        "91.7 % mean class recall accuracy 91.7 %, 95 % interval 43.1 to 99.4 % on val (4 images; C"
        " was chosen on 20 % of train)" in text
    )
    for line in (
        "mean class recall on val 91.67 %",
        "scored on val (4 images; C was chosen on 20 % of train)",
        "trained on train (8 images)",
        "Classes: recall on val",
        "C = 1, by mean class recall on 20 % of train",
        "Of the 12 images of val.",
        "images of val together",
        "1 of 12 images of val: the worst first, by how far the score of the class",
    ):
        assert line in text, line
    assert "test" not in text.lower()


def test_of_several_splits_tests_are_told_from_images(three: Three) -> None:
    features, model, results = three
    model.scored["split0"] = again = model.scored.pop("test")
    model.scored["split1"] = Scored(again.rows, again.scores + 1)
    model.scored["split2"] = Scored(again.rows[4:], again.scores[4:])
    pixels = np.stack([photograph(i, 40, 50) for i in range(30)])
    items = Items("folder", "single-label", Path(), list(features.names), None, [], images=pixels)
    page, _ = write_report(results, [features], model, items)
    shown, data = sections(page), data_of(page)
    told = text_of(shown["mistakes"])
    assert "2 mistakes in 32 tests of 3 splits: 1 image, the worst first, by how far" in told
    assert "in 2 of its 2 tests" in told and shown["mistakes"].count("<img") == 1
    assert "the tests of 3 splits together" in shown["confusions"]
    assert data["confusions"]["cells"] == [[0, 2, 2, 1]]
    assert data["confusions"]["labels"][0] == [8, 10, 3]
    assert [row[-1] for row in data["mistakes"]["rows"]] == [2, 2]


def test_validation_in_place_of_test_labels_is_called_that(tmp_path: Path) -> None:
    """VOC-2012's test labels are kept by its server: what is shown is of val, by which C was
    chosen.
    """
    labels = np.where(np.arange(24).reshape(12, 2) % 3 == 0, 1, -1).astype(np.int8)
    scored = {
        name: Scored(rows, np.random.default_rng(0).standard_normal((len(rows), 2)))
        for name, rows in (("test", np.arange(6, 12)), ("validation", np.arange(6)))
    }
    labels[6:] = 0
    per_class = {
        name: {"ap_11point": 0.5, "ap_allpoint": 0.4, "n_positive": 2} for name in ("ant", "bee")
    }
    validation = {"n": 6, "map_11point": 0.5, "map_allpoint": 0.4, "per_class": per_class}
    results = results_of(
        protocol="voc2012",
        test_labels="none",
        test_split="test",
        C_chosen_on="val",
        model_trained_on="train + val",
        validation=validation,
        C_grid=[1.0, 2.0],
        C_curve=[0.4, 0.3],
        selected_by="map_allpoint",
        difficult="left out",
    )
    features = features_of(tmp_path / "f.h5", labels, ["ant", "bee"])
    page, _ = write_report(
        results, [features], model_of(features.classes, scored, results), None, "gone"
    )
    text = text_of(page)
    assert (
        "40.0 % mAP (area) mAP (11-point) 50.0 % on val (6 images; C was chosen on them, so this is"
        " optimistic)" in text
    )
    assert "no test image has a label" in text
    assert "Classes: AP (area) on val" in text and "Of the 6 images of val." in text


@pytest.mark.parametrize(("protocol", "kind"), [("voc2007", "11point"), ("voc2012", "allpoint")])
def test_the_words_of_the_page_are_those_of_the_field(
    tmp_path: Path, protocol: str, kind: Literal["11point", "allpoint"]
) -> None:
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((30, 2)) < 0.4, 1, -1).astype(np.int8)
    scored = {"test": Scored(np.arange(30), rng.standard_normal((30, 2)) + 0.5 * labels)}
    per_class = {
        name: {"ap_11point": 0.5, "ap_allpoint": 0.4, "n_positive": 2} for name in ("ant", "bee")
    }
    results = results_of(
        protocol=protocol,
        map_11point=0.5,
        map_allpoint=0.4,
        per_class=per_class,
        difficult="left out",
        class_weight="balanced",
        pool="stack",
        pool_by="the protocol of x",
        solver="newton, tol 1e-05, squared_hinge",
        C_grid=[0.03125, 1.0],
        C_curve=[0.5241, 0.6],
        selected_by=f"map_{kind}",
        C_chosen_on="val",
        test_split="test",
    )
    features = features_of(tmp_path / "f.h5", labels, ["ant", "bee"])
    model = model_of(features.classes, scored, made_of(features, results))
    page, _ = write_report(results, [features], model, None, "gone")
    text = text_of(page)
    assert "mAP (11-point) on test 50.00 %" in text and "mAP (area) on test 40.00 %" in text
    name = {"11point": "AP (11-point)", "allpoint": "AP (area)"}[kind]
    assert f"Classes: {name} on test" in text
    assert f"C = 1, by m{name} on val; of equals the smallest." in text
    assert '"0.03125,52.41 1,60"' in sections(page)["c"]
    assert "class weights balanced" in text and "pool over scales stack (the protocol of x)" in text
    assert "difficult objects left out, in training and in scoring" in text
    ap = metrics.average_precision(scored["test"].scores[:, 0], labels[:, 0], kind)
    assert f"ant {name} {100 * ap:.1f} %" in text
    assert not re.search(r"[a-z]_[a-z0-9]|ddof|11point|allpoint|unreadable|[0-9a-f]{13}", text)


def test_the_map_is_of_the_descriptors_that_the_results_are_of(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model, too: pooled as they say, at the scales that they used."""
    features, _, results = three
    asked: list[tuple[tuple[int, ...], str]] = []

    def aggregate(x_NQD: np.ndarray, pool: str, regions: int) -> np.ndarray:
        assert regions == 1
        asked.append((x_NQD.shape, pool))
        return x_NQD[:, 0]

    monkeypatch.setattr("vggfeat.exhibits.aggregate", aggregate)
    part = {**results["features"][0], "scales": [48]}
    write_report({**results, "pool": "max", "features": [part]}, [features], None, None)
    write_report({**results, "pool": "stack"}, [features], None, None)
    del results["pool"]
    write_report({**results, "protocol": "caltech101"}, [features], None, None)
    assert asked == [((30, 1, 16), "max"), ((30, 2, 16), "stack"), ((30, 2, 16), "stack")]
    pools = ", ".join(POOLINGS)
    with pytest.raises(
        VggfeatError, match=f"these results: pool must be one of {pools}, not 'median'"
    ):
        write_report({**results, "pool": "median"}, [features], None, None)


def test_no_name_of_a_file_leads_out_of_its_folder(tmp_path: Path) -> None:
    """Names and root are a stranger's word: only images below the root are looked at, however they
    are named.
    """
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    for path in (tmp_path / "secret.jpg", root / "in.jpg", root / "a" / "b.jpg"):
        Image.fromarray(photograph(0, 40, 50)).save(path)
    os.mkfifo(root / "pipe.jpg")
    outside = ["../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg", "nul\0.jpg"]
    inside = ["in.jpg", "a/b.jpg", "pipe.jpg", "gone.jpg"]
    for stored in (str(root), str(root / "a" / "..")):
        items, why = datasets.at_hand("folder", [*outside, *inside], None, stored)
        assert items is not None and why == "" and items.names == inside
    assert items is not None
    labels = np.arange(7, dtype=np.int32) % 2
    features = features_of(tmp_path / "f.h5", labels, ["x", "y"], [*outside[:3], *inside])
    scored = {"test": Scored(np.arange(7), np.where(np.arange(2) == labels[:, None], 1.0, -1.0))}
    model = model_of(["x", "y"], scored, made_of(features, results_of()))
    page, left_out = write_report(None, [features], model, items)
    shown = sections(page)
    assert [shown[key].count("data:image/jpeg") for key in ("figures", "images")] == [2, 2]
    assert left_out == [
        f"thumbnails: 3 images are not under {items.root}",
        "thumbnails: 2 images can't be read any more",
    ]
    for names, stored in (
        (outside, str(root)),
        (inside, str(tmp_path / "gone")),
        (inside, "x" * 5000),
        (inside, "\0"),
    ):
        items, why = datasets.at_hand("folder", names, None, stored)
        assert items is None and why.startswith("the images are not at hand (none is left in '")
        assert why.endswith(": `root` says where they are)") and len(why) < 200


def test_without_images_the_page_says_so(three: Three) -> None:
    features, model, _ = three
    page, left_out = write_report(
        None, [features], model, None, "the images are not at hand (gone)"
    )
    _Check(page)
    assert left_out == ["thumbnails: the images are not at hand (gone)"]
    shown = sections(page)
    assert "Thumbnails are left out: the images are not at hand (gone)." in shown["images"]
    assert "<img" not in page and "0003.jpg" in shown["images"] and "0003.jpg" in shown["mistakes"]
    assert "thumbnails: the images are not at hand" in shown["made"]


def test_images_that_are_gone_or_broken_keep_their_place(three: Three, tmp_path: Path) -> None:
    features, model, results = three
    for i in range(0, 30, 2):
        Image.fromarray(photograph(i, 40, 50)).save(tmp_path / f"{i:04d}.jpg")
    (tmp_path / "0002.jpg").write_bytes(b"no image")
    items = Items("folder", "unlabelled", tmp_path, list(features.names), None, [])
    page, left_out = write_report(results, [features], model, items)
    assert left_out == ["thumbnails: 7 images can't be read any more"]
    assert sections(page)["images"].count("<img") == 12 - 7


@pytest.mark.parametrize("given", ["results", "features", "model"])
def test_what_is_not_given_is_left_out_and_said(three: Three, given: str) -> None:
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
def test_any_number_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, K: int) -> None:
    monkeypatch.setattr(exhibits, "_plane", lambda X: (X[:, :2], "Two values"))  # t-SNE takes long
    rng = np.random.default_rng(0)
    classes = [f"n{k:04d}" for k in range(K)]
    labels = np.where(rng.random((2 * K + 8, K)) < 1 / K, 1, -1).astype(np.int8)
    labels[0, 0], labels[1, 0] = 1, -1
    if K > 2:  # one label an image
        labels = (np.arange(K + 8) % K).astype(np.int32)
    rows = np.arange(len(labels))
    scored = {"test": Scored(rows, rng.standard_normal((len(labels), K)))}
    figure = "recall" if labels.ndim == 1 else "ap_allpoint"
    per_class = {name: {figure: float(rng.random())} for name in classes}
    results = results_of(per_class=per_class)
    features = features_of(tmp_path / "f.h5", labels, classes)
    model = model_of(classes, scored, made_of(features, results))
    page, left_out = write_report(results, [features], model, None, "none at hand")
    _Check(page)
    assert len(page.encode()) < 2e6 and len(left_out) == 1
    shown = sections(page)
    assert ("confusions" in shown) == (labels.ndim == 1)
    assert shown["curves"].count("<svg") == min(K, 40)
    if K == 1000:
        assert "The 20 best and the 20 worst of 1000 classes." in shown["curves"]
        assert "All 1,000 classes" in shown["classes"] and shown["confusions"].count("<img") == 1
        assert len(data_of(page)["confusions"]["cells"]) > 900
        assert shown["images"].count("<h3>") == 20


def test_a_page_of_any_pictures_and_names_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is what a JPEG is largest of; first pictures shrink, then they are fewer, and that is
    said; names of 4,000 letters leave room for none of them.
    """
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 160, 160, 3), dtype=np.uint8)
    labels = (np.arange(200) % 5).astype(np.int32)
    scored = {"test": Scored(np.arange(200), rng.standard_normal((200, 5)))}
    results, classes = results_of(accuracy=0.2), list("abcde")
    monkeypatch.setattr(exhibits, "_plane", lambda X: (X[:, :2], "Two values"))
    for letters, pictures in ((40, True), (4000, False)):
        names = [f"{i}-{'x' * letters}.jpg" for i in range(200)]
        features = features_of(tmp_path / f"{letters}.h5", labels, classes, names)
        items = Items("folder", "single-label", Path(), names, None, [], images=noise)
        model = model_of(classes, scored, made_of(features, results))
        text, left_out = write_report(results, [features], model, items)
        assert len(text.encode()) < 2_000_000
        assert (text.count("data:image/jpeg") > 20) == pictures
        assert bool(left_out) == (not pictures)
    assert left_out[0].endswith(" thumbnails: a page under 2 MB has no room for them")
    shrunk = exhibits.Pictures(names, {0: Image.fromarray(noise[0])}, 5000)
    assert shrunk._side == exhibits.SIDES[-1]


def test_an_interval_of_a_share() -> None:
    """The first two are in R. G. Newcombe, Two-sided confidence intervals for the single
    proportion (1998).
    """
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (0, 20, 0.0, 0.1611),
        (29, 29, 29 / (29 + 1.959964**2), 1),
    ):
        assert wilson(hits / n, n) == pytest.approx((low, high), abs=6e-5)


def test_labels_unknown_or_none(tmp_path: Path, three: Three) -> None:
    _, model, results = three
    unknown = features_of(tmp_path / "u.h5", np.full(30, -1, np.int32), model.classes)
    made_of(unknown, results)
    model = dataclasses.replace(model, results=results_from(results, ""))
    page, left_out = write_report(results, [unknown], model, None, "")
    assert left_out == ["curves, confusions and mistakes: the scored images have no labels"]
    assert "map" in sections(page)


def test_another_run_is_refused(three: Three, tmp_path: Path) -> None:
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
    assert features.labels is not None
    short = features_of(tmp_path / "s.h5", features.labels[:9], features.classes)
    unknown = {key: value for key, value in results.items() if key != "features"}
    older = dataclasses.replace(model, results=results_from(unknown, ""))
    with pytest.raises(VggfeatError, match="has rows that"):
        write_report(unknown, [short], older, None)
    fused = dataclasses.replace(model, parts=model.parts * 3)
    with pytest.raises(VggfeatError, match="the model is of 3 feature files; 1 given"):
        write_report(results, [features], fused, None)


def test_rows_that_have_shifted_are_refused_and_what_does_not_tell_is_said(
    three: Three, tmp_path: Path
) -> None:
    """One image more, other pictures under the same names, other labels: confusions would be of
    another set.
    """
    features, model, results = three
    labels, names = features.labels, features.names
    assert labels is not None
    more = features_of(
        tmp_path / "m.h5", np.append(labels[:1], labels), features.classes, ["new.jpg", *names]
    )
    others = features_of(tmp_path / "o.h5", labels[::-1].copy(), features.classes, list(names))
    pictures = dataclasses.replace(features, crc32=np.arange(30, dtype=np.uint32) + 1)
    for file in (more, others, pictures):
        for given in ((results, None), (None, model), (results, model)):
            with pytest.raises(
                VggfeatError, match="it has other images, labels or splits; give the one"
            ):
                write_report(given[0], [file], given[1], None)
    again = features_of(tmp_path / "again.h5", labels, features.classes, list(names))
    assert write_report(results, [again], model, None, "gone")[1] == ["thumbnails: gone"]
    elsewhere = {**results, "features": [{**results["features"][0], "rows": "ef" * 32}]}
    with pytest.raises(VggfeatError, match=r"of two runs: they have other feature files \(rows\)"):
        write_report(elsewhere, [], model, None)
    for part in results["features"]:
        del part["rows"]
    model = dataclasses.replace(model, results=results_from(results, ""))
    page, left_out = write_report(None, [features], model, None, "gone")
    assert left_out[0].startswith(
        f"the check that {features.path} has the images that these results are of: they are"
    )
    assert "an older version&#39;s" in page and "confusions" in sections(page)


def test_what_is_not_all_and_what_the_net_has_seen_stands_beside_the_figures() -> None:
    per_class = {"ant": {"recall": None}, **{f"c{i}": {"recall": 1.0} for i in range(4)}}
    splits = [
        {"name": f"split{i}", "n_test": 6, "n_test_seen": 6 * (i > 0), "n_classes": 5 - i}
        for i in range(3)
    ]
    results = results_of(
        accuracy=0.5,
        mean_class_recall=0.5,
        per_class=per_class,
        per_split=splits,
        net_trained_on=24,
        other_images=["the first 60 of 90 images", "20 classes instead of 102"],
    )
    rows = dict(summary_of(results))
    assert rows["mean class recall on the test parts, over 3 to 5 of 5 classes"] == "50.00 %"
    assert rows["accuracy on the test parts"] == "50.00 %"
    assert rows["images"] == "the first 60 of 90 images; 20 classes instead of 102"
    assert (
        rows["the net was trained on"]
        == "24 images of these, among them 6 of the 6 scored of split1, 6 of the 6 scored of"
        " split2: only split0 is clean"
    )
    page, _ = write_report(results, [], None, None)
    assert "<title>folder, the first 60 of 90 images: linear SVM" in page
    told = "50.0 % mean class recall, over 3 to 5 of 5 classes accuracy 50.0 % on the test parts of"
    assert told in text_of(page)
    older = results_of(mean_class_recall=0.5, per_class=per_class)
    assert "mean class recall on test, over 4 of 5 classes" in dict(summary_of(older))


def test_the_command(run_main: Command, folder: Path, tmp_path: Path) -> None:
    command = functools.partial(run_main, cli.main)
    small = ("--weights", "random:A,width=0.125,crop=32", "--scales", "32,48", "--device", "cpu")
    f, m, r, page = (tmp_path / name for name in ("f.h5", "m.h5", "r.json", "report.html"))
    assert (
        command("extract", "--dataset", "folder", "--root", folder, *small, "--out", f).status == 0
    )
    assert command("svm", "--features", f, "--C", "1,4", "--out", m, "--json", r).status == 0
    wrong = tmp_path / "wrong.csv"
    given = ("--features", f, "--model", m, "--results", r)
    everything = ("report", *given, "--out", page, "--mistakes", wrong)
    ran = command(*everything)  # the images are where they were described
    assert (ran.status, ran.err) == (0, ""), ran.err
    _Check(page.read_text())
    images = sections(page.read_text())["images"]
    assert images.count("data:image/jpeg") == 4 == images.count("data:image/png")
    assert "show the evidence" in images and "at Q = 32, 48 all of the smallest side" in images
    assert wrong.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert command(*everything).status == 1  # it exists
    ran = command(*everything, "--root", tmp_path / "gone", "--overwrite")
    assert ran.status == 0 and ran.err.startswith(
        "left out: thumbnails: the images are not at hand (no folder"
    )
    folder.rename(tmp_path / "moved")
    ran = command(*everything, "--root", tmp_path / "moved", "--overwrite", "--no-evidence")
    assert (ran.status, ran.err) == (0, "")
    images = sections(page.read_text())["images"]
    assert images.count("data:image/jpeg") == 4 and "data:image/png" not in images
    ran = command(*everything, "--overwrite")
    assert ran.status == 0 and page.read_text().count("data:image/jpeg") == 0
    [line] = ran.err_lines
    assert line.startswith("left out: thumbnails: the images are not at hand (none is left in '/")
    assert line.endswith(": --root says where they are)")
    ran = command("report", "--out", tmp_path / "n.html")
    assert ran.status == 2
    line = "vggfeat report: a report needs --results or --model; see vggfeat report --help\n"
    assert ran.err == line
    (tmp_path / "bad.json").write_text(json.dumps([1]))
    ran = command("report", "--results", tmp_path / "bad.json", "--out", tmp_path / "n.html")
    assert ran.status == 1 and "must be a record" in ran.err and not (tmp_path / "n.html").exists()


def test_a_map_of_equal_descriptors_is_one_point() -> None:
    """Principal components and t-SNE divide by how much they vary."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xy, _ = _plane(np.ones((70, 16), np.float32))
    assert (xy == 0).all() and xy.shape == (70, 2)


def test_a_model_names_the_length_that_it_needs(three: Three) -> None:
    model = three[1]
    with pytest.raises(VggfeatError, match=r"shape \(2, 5\); the model needs \(N, [0-9]+\)"):
        model.decision_function(np.zeros((2, 5)))
