"""Saved classifiers: what they name and score, in Python and by `vggfeat predict`; what a file may
hold.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vggfeat
from vggfeat import cli
from vggfeat.aggregate import POOLINGS, aggregate
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.model import Model, open_model
from vggfeat.store import Description

from ..conftest import Command, vgg_of
from .conftest import (
    NET,
    SMALL,
    Made,
    assert_same_scores,
    feature_file,
    read_predictions,
    scores_by_hand,
    unit,
)
from .test_hdf5 import crafted, model_at, refused
from .test_library import HINT


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"coef": np.full((2, 8), np.nan)}, "coef has values that are not finite"),
        ({"intercept": [np.inf, 0]}, "intercept has values that are not finite"),
        ({"scored__test__rows": [-1, 0, 1, 2]}, "has the row -1"),
        ({"scored__test__scores": np.full((4, 2), np.nan)}, "not finite"),
    ],
)
def test_what_a_model_holds_is_checked(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    path = model_at(tmp_path / "m.h5")
    crafted(path, **values)
    assert told in refused("model", path)


def test_a_model_of_another_length_than_its_descriptors_is_refused(tmp_path: Path) -> None:
    spec = "random:A,width=0.125,crop=32,classes=3"
    network = vggfeat.load(spec)
    part = Description(
        "A",
        spec,
        network.fingerprint,
        "pool5",
        (32,),
        False,
        "floor",
        "bilinear, antialiased",
        "float32",
        "Pillow",
    )
    model = Model(["a"], np.ones((1, 9)), np.zeros(1), (part,), "average", False, None)
    with pytest.raises(VggfeatError, match="weighs 9 values, its descriptors have 64"):
        model.scores([np.zeros((40, 40, 3), np.uint8)])


# --- in Python ------------------------------------------------------------------------------------


@pytest.fixture
def stacking(folder: Path, run_main: Command) -> Path:
    """feats.h5 of `folder`'s reddish and bluish images, and model.h5."""
    f, m = folder.parent / "feats.h5", folder.parent / "model.h5"
    ran = run_main(cli.main, "extract", "--dataset", "folder", "--root", folder, *SMALL, "--out", f)
    assert ran.status == 0, ran.err
    ran = run_main(cli.main, "svm", "--features", f, "--pool", "stack", "--C", 8, "--out", m)
    assert ran.status == 0, ran.err
    return m


def test_a_model_names_and_scores_images(
    stacking: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    real = vggfeat.sources.load

    def load(spec: str, **how: Any) -> vggfeat.Network:
        loaded.append(spec)
        return real(spec, **how)

    monkeypatch.setattr(vggfeat.sources, "load", load)
    model = vggfeat.open_model(stacking)
    assert not loaded and model.classes == ["blue", "red"]
    paths = [folder / name / f"{i:02d}.jpg" for i in range(3) for name in ("red", "blue")]
    images = [
        paths[0],
        Image.open(paths[1]),
        np.asarray(Image.open(paths[2])),
        paths[3].read_bytes(),
        *paths[4:],
    ]
    assert model.predict(images) == ["red", "blue"] * 3
    scores = model.scores(images)
    assert scores.shape == (6, 2) and (scores.argmax(1) == [1, 0] * 3).all()
    assert loaded == [NET]  # once
    features = vggfeat.open_features(stacking.parent / "feats.h5")
    rows = [features.names.index(f"{path.parent.name}/{path.name}") for path in paths]
    stacked = vggfeat.aggregate.aggregate(features.descriptors[rows], "stack")
    np.testing.assert_allclose(scores, model.decision_function(stacked), rtol=1e-3, atol=1e-4)


def test_a_model_keeps_the_place_of_what_it_cannot_read(stacking: Path, folder: Path) -> None:
    model = vggfeat.open_model(stacking, device="cpu")
    images: list[Any] = [folder / "gone.jpg", folder / "red/00.jpg", b"no image"]
    names, unreadable = model.predict(images, return_unreadable=True)
    assert names == [None, "red", None]
    assert unreadable == {0: "no such file", 2: unreadable[2]} and unreadable[2].startswith(
        ("not an", "damaged")
    )
    scores, told = model.scores(images, return_unreadable=True)
    assert told == unreadable and np.isnan(scores[[0, 2]]).all() and np.isfinite(scores[1]).all()
    scores, told = model.scores(images[:1], return_unreadable=True)
    assert np.isnan(scores).all() and scores.shape == (1, 2) and list(told) == [0]
    for method in (model.predict, model.scores):
        with pytest.raises(UnreadableImage, match="image 0: no such file"):
            method(images[:1])
        with pytest.raises(VggfeatError, match=HINT):
            method(str(images[1]))


def test_a_multi_label_model_names_all_that_is_present(
    stacking: Path, folder: Path, run_main: Command, tmp_path: Path
) -> None:
    rows = [
        f"images/{c}/{i:02d}.jpg,{c if i % 3 else c + ';small'}"
        for c in ("red", "blue")
        for i in range(12)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,labels", *rows]) + "\n")
    f, m = tmp_path / "several.h5", tmp_path / "several-model.h5"
    words = ("extract", "--dataset", "csv", "--root", tmp_path / "list.csv", *SMALL, "--out", f)
    assert run_main(cli.main, *words).status == 0
    assert run_main(cli.main, "svm", "--features", f, "--C", 1000, "--out", m).status == 0
    model = vggfeat.open_model(m)
    assert model.multi_label and set(model.classes) == {"red", "blue", "small"}
    images = [folder / "red/00.jpg", folder / "blue/01.jpg"]
    names, scores = model.predict(images), model.scores(images)
    for own, row in zip(names, scores, strict=True):
        assert sorted(own) == sorted(c for c, s in zip(model.classes, row, strict=True) if s > 0)
        assert [row[model.classes.index(c)] for c in own] == sorted(row[row > 0], reverse=True)
    assert "red" in names[0] and "blue" in names[1]


def test_a_models_weights_that_have_moved(stacking: Path, folder: Path) -> None:
    images = [folder / "red/00.jpg"]
    expected = vggfeat.open_model(stacking).scores(images)
    for weights in (NET, [NET]):
        np.testing.assert_array_equal(
            vggfeat.open_model(stacking, weights=weights).scores(images), expected
        )
    with pytest.raises(VggfeatError, match="needs 1 `weights`, in its order; 2 given"):
        vggfeat.open_model(stacking, weights=[NET, NET])
    with pytest.raises(VggfeatError, match="are not those that described the images"):
        vggfeat.open_model(stacking, weights=f"{NET},seed=1").scores(images)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regressions_scores_are_probabilities(
    classes: int, command: Command, tmp_path: Path
) -> None:
    path, saved = feature_file(tmp_path / "f.h5", 60, 8, classes=classes), tmp_path / "m.h5"
    line = ("classify", "--features", path, "--C", 4, "--out", saved, "--overwrite")
    assert command(*line).status == 0
    model = vggfeat.open_model(saved)
    with pytest.raises(VggfeatError, match="linear SVM has no probabilities: train one by"):
        model.probabilities(np.zeros((1, classes)))
    ran = command(*line, "--head", "logistic")
    assert ran.status == 0 and "logistic regression" in ran.out
    model = vggfeat.open_model(saved)
    features = vggfeat.open_features(path)
    x = vggfeat.aggregate.aggregate(features.descriptors, model.pool)
    found = model.probabilities(model.decision_function(x))
    np.testing.assert_allclose(found.sum(1), 1)
    assert model.results is not None and model.results.splits == "official"
    rows = np.union1d(features.splits["train"], features.splits["val"])
    again = vggfeat.LogisticRegression(C=4.0).fit(x[rows], np.asarray(features.labels)[rows])
    np.testing.assert_allclose(found, again.predict_proba(x), atol=1e-3)
    assert command("info", saved).out.count("logistic regression") == 1
    out = tmp_path / "p.csv"
    assert command("predict", "--model", saved, path, "--out", out).status == 0
    header, _, cells, _ = read_predictions(out)
    assert header == ["image", "class", "score", "probability", "margin", "error"]
    told = [(cell["class"], float(cell["probability"])) for cell in cells]
    best = found.argmax(1)
    assert [name for name, _ in told] == [model.classes[k] for k in best]
    np.testing.assert_allclose([chance for _, chance in told], found.max(1), rtol=1e-12)
    printed = command("predict", "--model", saved, path, "--top", 1).out
    assert "probability" in printed and f"{100 * found[0].max():.1f} %" in printed


# --- vggfeat predict ------------------------------------------------------------------------------


def test_predict_names_the_classes_that_were_trained(
    command: Command, made: Made, tmp_path: Path
) -> None:
    images, table = sorted(made.folder.rglob("*.jpg")), tmp_path / "p.csv"
    ran = command("predict", *images, "--model", made.model, "--out", table, "--scores")
    assert (ran.status, ran.err) == (0, "")
    header, names, rows, scores = read_predictions(table)
    assert header[5:] == ["blue", "red"] and names == [str(p) for p in images]
    np.testing.assert_array_equal(scores[:, 0], -scores[:, 1])  # two classes share one hyperplane
    right = 0
    for path, cells, row in zip(images, rows, scores, strict=True):
        assert cells["class"] == header[5 + row.argmax()] and float(cells["score"]) == row.max()
        right += cells["class"] == path.parent.name
    assert right >= 22
    ran = command("predict", *images, "--model", made.model, "--top", 1)
    assert (ran.status, ran.err) == (0, "") and all(str(path) in ran.out for path in images)


@pytest.mark.parametrize("pool", POOLINGS)
def test_predict_describes_images_as_the_features_were_made(
    command: Command, folder: Path, tmp_path: Path, pool: str
) -> None:
    """A subset of the scales, in another order, no mirror, fc6, other batches: the scores still
    agree.
    """
    features, model, table = tmp_path / "f.h5", tmp_path / "m.h5", tmp_path / "p.csv"
    options = (
        "--weights",
        NET,
        "--precision",
        "float32",
        "--device",
        "cpu",
        "--layer",
        "fc6",
        "--no-mirror",
    )
    ran = command(
        *("extract", "--dataset", "folder", "--root", folder, *options),
        *("--scales", "32,48,64", "--out", features),
    )
    assert ran.status == 0
    ran = command(
        *("svm", "--features", features, "--pool", pool, "--scales", "64,32", "--C", 2),
        *("--workers", 1, "--out", model),
    )
    assert ran.status == 0
    stored = vggfeat.open_features(features)
    chosen = stored.descriptors[:, [2, 0]].astype(np.float64)
    if pool == "stack":
        expected_x = unit(unit(chosen).reshape(24, -1))
    else:
        expected_x = unit(chosen.mean(1) if pool == "average" else chosen.max(1))
    expected = scores_by_hand(model, expected_x)
    assert np.abs(expected).min() > 1e-3  # no agreement by being near zero
    order = np.random.default_rng(0).permutation(24)
    paths = [folder / stored.names[i] for i in order]
    ran = command(
        "predict",
        *paths,
        "--model",
        model,
        "--out",
        table,
        "--scores",
        "--batch-size",
        3,
        "--device",
        "cpu",
    )
    assert ran.status == 0
    assert_same_scores(read_predictions(table)[3], expected[order])


def test_weights_in_a_file_are_found_from_another_folder(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of weights are kept so that a model can be used wherever it is called from."""
    from vggfeat.weights import save_weights

    network = vggfeat.load(NET)
    save_weights(tmp_path / "w.safetensors", vgg_of(network), network.preprocessing)
    monkeypatch.chdir(tmp_path)
    ran = command(
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder,
        "--weights",
        "w.safetensors",
        "--scales",
        "32",
    )
    assert ran.status == 0 and (tmp_path / "feats.h5").is_file()
    ran = command("svm", "--features", "feats.h5", "--C", 1, "--workers", 1, "--out", "model.h5")
    assert ran.status == 0
    monkeypatch.chdir(folder)
    ran = command("predict", "red/00.jpg", "--model", "../model.h5")
    assert (ran.status, ran.err) == (0, "") and "red" in ran.out
    shutil.move(tmp_path / "w.safetensors", tmp_path / "moved.safetensors")
    assert command("predict", "red/00.jpg", "--model", "../model.h5").status == 1
    ran = command(
        "predict", "red/00.jpg", "--model", "../model.h5", "--weights", "../moved.safetensors"
    )
    assert ran.status == 0


def test_predict_draws_no_table_of_nothing(command: Command, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    images = [tmp_path / "bad.jpg", tmp_path / "gone.jpg"]
    ran = command("predict", *images, "--model", trained)
    assert (ran.status, ran.out) == (3, "")
    assert ran.err_lines == [
        f"unreadable: {images[0]}: empty file (0 bytes)",
        f"unreadable: {images[1]}: no such file",
    ]


def test_max_pooling_by_option_is_kept_by_the_model(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    """Q=33 is odd at pool1, so floor and ceil differ; predict uses what the features were made
    with.
    """
    x = {}
    for rounding in ("floor", "ceil"):
        path = tmp_path / f"{rounding}.h5"
        line = (
            "extract",
            "--dataset",
            "folder",
            "--root",
            folder,
            "--weights",
            NET,
            "--scales",
            "33",
        )
        ran = command(
            *line,
            "--layer",
            "pool1",
            "--precision",
            "float32",
            "--max-pool",
            rounding,
            "--out",
            path,
        )
        assert ran.status == 0, ran.err
        features = vggfeat.open_features(path)
        assert features.description.pool == rounding
        x[rounding] = features.descriptors[:, 0]
    assert np.abs(x["floor"] - x["ceil"]).max() > 1e-3 * np.abs(x["floor"]).max()
    model = tmp_path / "m.h5"
    assert command("svm", "--features", path, "--C", 8, "--workers", 1, "--out", model).status == 0
    classifier = open_model(model)
    images = [folder / name for name in features.names[:3]]
    scores = classifier.scores(images)
    expected = classifier.decision_function(aggregate(x["ceil"][:3, None], "average"))
    assert_same_scores(scores, expected)
