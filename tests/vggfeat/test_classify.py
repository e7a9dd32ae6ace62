"""`vggfeat svm`: what it reads of feature files, which it fuses, and what it says of the images."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vggfeat
from tests import prepared
from vggfeat.classify import _first_of_same
from vggfeat.datasets.voc import CLASSES
from vggfeat.machine import CORES
from vggfeat.model import open_model

from ..conftest import HANG, Command, photograph, vgg_of
from ..pretrain.conftest import environment
from .conftest import (
    NET,
    OTHER,
    SMALL,
    Made,
    assert_same_scores,
    cells,
    contents,
    feature_file,
    read_predictions,
    scores_by_hand,
    unit,
)


def test_svm_scores_by_the_protocol_and_says_how(made: Made) -> None:
    ran = made.svm
    assert ran.status == 0 and "unreadable" not in ran.out
    assert cells(ran.out, "scored on") == [
        "the test parts of 3 splits (4 images each; C was chosen on the val part of each split)"
    ]
    assert cells(ran.out, "trained on") == [
        "the rest of each split (20 images); the saved classifier on all labelled images"
    ]
    results = json.loads(made.results.read_text())
    assert {
        *("protocol", "dataset", "features", "pool", "solver", "C", "C_grid", "C_curve"),
        *("n_train", "n_test", "n_unreadable", "accuracy", "accuracy_std", "mean_class_recall"),
        *("mean_class_recall_std", "per_class", "seconds", "command", "versions"),
    } <= results.keys()
    assert not {"map_11point", "map_allpoint", "test_labels"} & results.keys()
    assert (results["protocol"], results["dataset"]) == ("single-label", "folder")
    assert (results["n_train"], results["n_test"], results["n_unreadable"]) == (20, 4, 0)
    assert results["C_grid"] == [2.0**k for k in (-5, -3, -1, 1, 3, 5, 7)]
    assert len(results["C_curve"]) == 7 and results["C"] in results["C_grid"]
    # the classes are equally large
    assert results["mean_class_recall"] == results["accuracy"] >= 0.75
    recalls = {name: scores["recall"] for name, scores in results["per_class"].items()}
    assert list(recalls) == ["blue", "red"]
    assert np.mean(list(recalls.values())) == pytest.approx(results["mean_class_recall"], abs=1e-12)
    [source] = results["features"]
    assert (
        source["file"] == str(made.features)
        and source["layer"] == "fc7"
        and source["mirror"] is True
    )
    assert source["fingerprint"] == vggfeat.load(NET).fingerprint and source["scales"] == [32, 48]
    assert results["command"].startswith("vggfeat svm --features")
    assert results["versions"]["vggfeat"] == vggfeat.__version__


def test_two_networks_are_fused(
    command: Command, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    second, model, report, table = (tmp_path / n for n in ("g.h5", "m.h5", "r.json", "p.csv"))
    other = ("--weights", OTHER, "--scales", "32", "--precision", "float32", "--device", "cpu")
    assert (
        command("extract", "--dataset", "folder", "--root", folder, *other, "--out", second).status
        == 0
    )
    both = ("--features", extracted, "--features", second)
    ran = command("svm", *both, "--C", 1, "--workers", 1, "--out", model, "--json", report)
    assert ran.status == 0
    results = json.loads(report.read_text())
    assert [f["weights"] for f in results["features"]] == [NET, OTHER]
    assert results["features"][0]["fingerprint"] != results["features"][1]["fingerprint"]
    assert command("info", model, "--overwrite", "--json", report).status == 0
    facts = json.loads(report.read_text())
    assert facts["descriptor"] == 2 * 512 and facts["network 2 weights"] == OTHER

    a, b = (
        vggfeat.open_features(p).descriptors.astype(np.float64).mean(1) for p in (extracted, second)
    )
    expected = scores_by_hand(model, np.concatenate([unit(a), unit(b)], axis=1) / np.sqrt(2))
    paths = [folder / name for name in vggfeat.open_features(second).names]
    assert command("predict", *paths, "--model", model, "--out", table, "--scores").status == 0
    assert_same_scores(read_predictions(table)[3], expected)

    ran = command("predict", paths[0], "--model", model, "--weights", NET)
    assert (ran.status, ran.err_lines) == (
        1,
        [f"vggfeat: {model} needs 2 --weights, in its order; 1 given"],
    )
    ran = command("predict", paths[0], "--model", model, "--weights", OTHER, "--weights", NET)
    assert ran.status == 1 and "not those that described the images" in ran.err
    ran = command("svm", *both, "--scales", "48")
    assert (ran.status, ran.err_lines) == (1, [f"vggfeat: {second} has no scale 48; it has 32"])


def test_a_part_that_is_not_test_is_never_called_that(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    """Folders train and val alone: val is scored, and C is chosen on a part of train."""
    for part, numbers in (("train", range(8)), ("val", range(8, 12))):
        for name in ("blue", "red"):
            (tmp_path / "parts" / part / name).mkdir(parents=True)
            for i in numbers:
                shutil.copy(folder / name / f"{i:02d}.jpg", tmp_path / "parts" / part / name)
    features, model, page = tmp_path / "f.h5", tmp_path / "m.h5", tmp_path / "page.html"
    line = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        tmp_path / "parts",
        *SMALL,
        "--out",
        features,
    )
    assert command(*line).status == 0
    ran = command(
        "svm", "--features", features, "--C", "1,4", "--class-weight", "balanced", "--out", model
    )
    assert ran.status == 0 and "test" not in ran.out + ran.err
    assert cells(ran.out, "mean class recall on val") == ["100.00 %"]
    assert cells(ran.out, "scored on") == ["val (8 images; C was chosen on 20 % of train)"]
    assert cells(ran.out, "trained on") == ["train (16 images)"]
    assert cells(ran.out, "class weights") == ["balanced"]
    assert cells(ran.out, "pool over scales") == ["average (the default)"]
    assert cells(ran.out, "class") == ["recall on val"] and cells(ran.out, "red") == ["100.00 %"]
    # what was tried, a row each, with the winner marked
    assert cells(ran.out, "C") == ["1"] and "mean class recall on 20 % of train" in ran.out
    assert cells(ran.out, "1") == ["100.00 %", "chosen"] and cells(ran.out, "4") == ["100.00 %", ""]
    assert ran.err == ""
    ran = command("info", model)
    assert ran.status == 0 and "test" not in ran.out.replace(str(tmp_path), "").replace(
        "pytest", ""
    )
    assert cells(ran.out, "scored on") == ["val (8 images; C was chosen on 20 % of train)"]
    assert cells(ran.out, "class weights") == ["balanced"]
    assert command("report", "--features", features, "--model", model, "--out", page).status == 0
    assert "on val (8 images; C was chosen on 20 % of train)" in page.read_text()


def test_caltech_is_stacked_and_the_rest_averaged(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    """Appendix B, where --pool doesn't say otherwise; the model and what is done with it follow."""
    (tmp_path / "101_ObjectCategories").symlink_to(folder)
    features, model, report = tmp_path / "f.h5", tmp_path / "m.h5", tmp_path / "r.json"
    line = ("extract", "--dataset", "caltech101", "--root", tmp_path, *SMALL, "--out", features)
    assert command(*line).status == 0
    outputs = ("--C", 1, "--workers", 1, "--out", model, "--json", report, "--overwrite")
    ran = command("svm", "--features", features, *outputs)
    assert ran.status == 0 and cells(ran.out, "pool over scales") == [
        "stack (the protocol of caltech101)"
    ]
    results = json.loads(report.read_text())
    assert (results["pool"], results["pool_by"]) == ("stack", "the protocol of caltech101")
    assert open_model(model).pool == "stack" and open_model(model).coef_KD.shape[1] == 2 * 512
    assert command("predict", folder / "red" / "00.jpg", "--model", model).status == 0
    ran = command("svm", "--features", features, "--pool", "max", *outputs)
    assert (
        cells(ran.out, "pool over scales") == ["max (as asked)"] and open_model(model).pool == "max"
    )
    ran = command("svm", "--features", features, "--scales", 48, *outputs)
    assert ran.status == 0 and "pool" not in ran.out + ran.err  # one scale: all are the same
    query = (
        "neighbours",
        "--features",
        features,
        "--query",
        "red/03.jpg",
        "--top",
        3,
        "--json",
        report,
    )
    ran = command(*query, "--overwrite")
    assert ran.err_lines == ["pool: stack (the protocol of caltech101)"]
    stacked = json.loads(report.read_text())
    assert command(*query, "--pool", "stack", "--overwrite").err == ""
    assert json.loads(report.read_text()) == stacked
    assert command(*query, "--pool", "average", "--overwrite").err == ""
    assert json.loads(report.read_text()) != stacked


def test_fusion_is_refused_for_other_images(
    command: Command, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    def extract(name: str, *options: object) -> Path:
        path = tmp_path / name
        ran = command(
            "extract", "--dataset", "folder", "--root", folder, *SMALL, *options, "--out", path
        )
        assert ran.status == 0
        return path

    def refusal(other: Path) -> str:
        ran = command("svm", "--features", extracted, "--features", other)
        assert ran.status == 1 and ran.out == ""
        [line] = ran.err_lines
        prefix = f"vggfeat: {extracted} and {other} can't be fused: "
        assert line.startswith(prefix)
        return line.removeprefix(prefix)

    assert refusal(extract("short.h5", "--limit", 20)) == "they have 24 and 20 images"
    (folder / "blue" / "03.jpg").rename(folder / "blue" / "03b.jpg")
    assert (
        refusal(extract("renamed.h5"))
        == "row 3 is 'blue/03.jpg' in the first and 'blue/03b.jpg' in the second"
    )
    (folder / "blue" / "03b.jpg").rename(folder / "blue" / "03.jpg")
    (folder / "red").rename(folder / "rosy")
    assert "row 12 is 'red/00.jpg'" in refusal(extract("classes.h5"))
    digits = tmp_path / "digits.h5"
    assert (
        command("extract", "--dataset", "digits", "--limit", 24, *SMALL, "--out", digits).status
        == 0
    )
    assert refusal(digits) == "one is of folder, the other of digits"


def test_fusion_is_refused_for_other_pictures_and_for_the_same_descriptors(
    command: Command, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    """Names and labels are equal; the files' checksums and the descriptions tell."""
    again = tmp_path / "again.h5"
    line = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder,
        "--weights",
        NET,
        "--scales",
        "48,64",
        "--out",
        again,
    )
    assert command(*line, "--precision", "float32").status == 0
    both = ("svm", "--features", extracted, "--features", again, "--C", 1)
    assert command(*both).status == 0  # other scales
    copy = tmp_path / "copy.h5"
    shutil.copy(extracted, copy)
    for other, *options in ((copy,), (again, "--scales", "48")):
        ran = command("svm", "--features", extracted, "--features", other, *options)
        assert ran.status == 1 and ran.out == ""
        assert re.search(
            r"can't be fused: both hold fc7 of net A \(\w{12}\) at the same scales; leave one out$",
            ran.err,
        )
    for i in (3, 7):
        shutil.copy(folder / "red" / "00.jpg", folder / "blue" / f"{i:02d}.jpg")
    assert command(*line, "--overwrite").status == 0
    ran = command(*both)
    told = (
        f"vggfeat: {extracted} and {again} can't be fused: blue/03.jpg is another image in the"
        " second, and 1 more"
    )
    assert (ran.status, ran.err_lines) == (1, [told])


def test_svm_warns_of_images_that_trained_the_net(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    """Of a folder of classes the net has learned from split0's train and val; also where it lies
    below train/.
    """
    from pretrain.loader import read_training_set
    from pretrain.recipe import read_recipe
    from vggfeat.datasets.items import name_digest
    from vggfeat.weights import save_weights

    recipe = read_recipe("mini", ["batch_size=8"])
    network = vggfeat.load(NET)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "train").symlink_to(folder)
    told = {}
    for root in (folder, parts):
        learned = read_training_set(root, recipe)
        rows = np.sort(np.concatenate([learned.train, learned.held_out]))
        history = json.dumps(
            [{"training_set": name_digest([learned.items.names[i] for i in rows])}]
        )
        save_weights(
            tmp_path / "w.safetensors", vgg_of(network), network.preprocessing, history=history
        )
        line = (
            "extract",
            "--dataset",
            "folder",
            "--root",
            parts / "train",
            "--scales",
            "32",
            "--overwrite",
        )
        ran = command(*line, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "t.h5")
        assert ran.status == 0, ran.err
        report = ("--json", tmp_path / "r.json", "--overwrite")
        ran = command("svm", "--features", tmp_path / "t.h5", "--C", 1, *report)
        results = json.loads((tmp_path / "r.json").read_text())
        seen = [split["n_test_seen"] for split in results["per_split"]]
        told[root] = (results["net_trained_on"], seen[0], min(seen[1:]) > 0)
        [warning] = [
            line for line in ran.err_lines if line.startswith("warning: the net was trained on")
        ]
        assert cells(ran.out, "the net was trained on") == [
            warning.removeprefix("warning: the net was trained on ")
        ]
        assert warning.endswith("only split0 is clean" if root == folder else "no figure is clean")
        if root == folder:
            assert "net fairly in split0 alone" in learned.items.remarks[-1]
    assert told == {folder: (20, 0, True), parts: (24, 4, True)}
    damaged = json.dumps([{"training_set": 3}])
    save_weights(
        tmp_path / "w.safetensors", vgg_of(network), network.preprocessing, history=damaged
    )
    assert (
        command(*line, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "t.h5").status
        == 0
    )
    ran = command("svm", "--features", tmp_path / "t.h5", "--C", 1)
    assert ran.status == 0 and "the net was trained" not in ran.out + ran.err


def test_scales_and_seed_of_the_svm(command: Command, extracted: Path, tmp_path: Path) -> None:
    def results(*options: object) -> dict[str, Any]:
        report = tmp_path / "r.json"
        ran = command(
            "svm",
            "--features",
            extracted,
            "--workers",
            1,
            "--overwrite",
            "--json",
            report,
            *options,
        )
        assert ran.status == 0, ran.err
        told: dict[str, Any] = json.loads(report.read_text())
        return told

    one = results("--C", "0.5", "--scales", "48")
    assert (one["features"][0]["scales"], one["C"], one["splits"]) == ([48], 0.5, "stored")
    assert "C_grid" not in one and "C_curve" not in one
    drawn = results("--C", "2,1", "--seed", 7, "--loss", "hinge")
    assert drawn["splits"] == "drawn with seed 7" and drawn["C_grid"] == [1.0, 2.0]
    assert drawn["C"] == 1.0 and drawn["C_curve"] == [1.0, 1.0]  # of equals the smallest
    assert drawn["solver"].endswith("hinge") and not drawn["solver"].endswith("squared_hinge")


def test_a_limited_extraction_is_told_wherever_it_is_used(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    path, report = tmp_path / "f.h5", tmp_path / "r.json"
    line = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder,
        *SMALL,
        "--out",
        path,
        "--overwrite",
    )
    ran = command(*line, "--limit", 20)
    assert ran.status == 0 and ran.err_lines[0].startswith(
        "images: 20, the first of 24, of 2 classes"
    )
    assert vggfeat.open_features(path).attributes["total"] == 24
    assert cells(command("info", path).out, "images") == ["20, the first of 24"]
    ran = command("svm", "--features", path, "--C", 1, "--json", report)
    assert ran.status == 0 and "folder, the first 20 of 24 images: linear SVM" in ran.out
    assert cells(ran.out, "images") == ["the first 20 of 24 images"]
    assert json.loads(report.read_text())["other_images"] == ["the first 20 of 24 images"]
    # the file's word would no longer be true
    Image.fromarray(photograph(7, 40, 48)).save(folder / "red" / "new.jpg")
    ran = command(*line[:-1], "--limit", 20, "--retry")
    assert ran.status == 1 and "the first of 24 images, not the first of 25 images" in ran.err
    assert command(*line, "--limit", 25).status == 0
    assert "total" not in vggfeat.open_features(path).attributes


def test_an_image_that_is_there_twice_is_told(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    """In train and in a scored part, or in two classes; not for images of one checksum that look
    otherwise.
    """
    line = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder,
        *SMALL,
        "--out",
        tmp_path / "f.h5",
        "--overwrite",
    )
    svm = (
        "svm",
        "--features",
        tmp_path / "f.h5",
        "--C",
        1,
        "--json",
        tmp_path / "r.json",
        "--overwrite",
    )
    assert command(*line).status == 0
    assert "warning" not in command(*svm).err
    assert "same_images" not in json.loads((tmp_path / "r.json").read_text())
    for i in range(12):
        shutil.copy(folder / "red" / f"{i:02d}.jpg", folder / "red" / f"copy{i:02d}.jpg")
    shutil.copy(folder / "red" / "00.jpg", folder / "blue" / "stray.jpg")
    assert command(*line).status == 0
    features = vggfeat.open_features(tmp_path / "f.h5")
    ran = command(*svm)
    results = json.loads((tmp_path / "r.json").read_text())
    crc = features.crc32
    expected = [
        int(
            np.isin(
                crc[features.splits[f"split{s}/test"]],
                crc[
                    np.union1d(features.splits[f"split{s}/train"], features.splits[f"split{s}/val"])
                ],
            ).sum()
        )
        for s in range(3)
    ]
    assert [split.get("n_test_in_train", 0) for split in results["per_split"]] == expected and max(
        expected
    ) > 0
    twice, labels = results["same_images"]
    assert f"{expected[0]} of the" in twice and twice.endswith(": the figures are too good")
    assert (
        labels == "2 images with other labels than the same image elsewhere, such as red/00.jpg and"
        " blue/stray.jpg"
    )
    assert [row for row in ran.err_lines if "warning" in row] == [
        f"warning: {twice}",
        f"warning: {labels}",
    ]
    assert twice in ran.out and labels in ran.out
    one = replace(features, crc32=np.full(len(crc), 7, np.uint32))
    _, kind = np.unique(crc, return_inverse=True)
    X, readable = np.eye(kind.max() + 1)[kind], features.readable
    assert (_first_of_same(one, X, readable) == _first_of_same(features, X, readable)).all()
    assert (_first_of_same(replace(one, crc32=0 * crc), X, readable) == np.arange(len(X))).all()


def test_descriptors_of_one_checksum_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 60 images are compared, in blocks; of boxes just those of one box."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((10, 8))[kind := rng.integers(0, 10, 90)]
    readable = np.arange(90) != 3
    crc32 = np.where(np.arange(90) < 61, 1 + kind // 5, 100 + np.arange(90)).astype(np.uint32)
    crc32[7] = 0
    boxes = np.stack([kind % 2, kind % 2, kind % 2 + 1, kind % 2 + 1], 1).astype(np.int32)
    times = np.zeros(90, int)

    class Read:
        shape, dtype = X.shape, X.dtype

        def __getitem__(self, rows: Any) -> np.ndarray:
            np.add.at(times, rows, 1)
            assert len(rows) <= 7
            some: np.ndarray = X[rows]
            return some

    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 7 * 8 * 8)
    compared = np.flatnonzero(readable & (crc32 != 0) & (np.arange(90) < 61))
    for of_boxes in (False, True):
        times[:] = 0
        own = boxes if of_boxes else None
        file = SimpleNamespace(crc32=crc32, boxes=own)
        found = _first_of_same(file, Read(), readable)  # type: ignore[arg-type]
        expected = np.arange(90)
        for i in compared:
            expected[i] = next(
                j
                for j in compared
                if (kind[j] == kind[i] and crc32[j] == crc32[i])
                and (not of_boxes or (boxes[j] == boxes[i]).all())
            )
        assert (found == expected).all() and (found != np.arange(90)).sum() > 40
        assert times.max() == 1 and (times[compared] == 1).all() and times.sum() == len(compared)


def test_what_does_not_fit_into_memory_is_read_at_each_pass(
    command: Command, extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, line = {}, ("svm", "--features", extracted, "--C", "1,4", "--workers", 1)
    for name, there in (("held", 1 << 30), ("read", 1 << 10)):
        monkeypatch.setattr("vggfeat.descriptors.memory", lambda there=there: there)
        report, model = tmp_path / f"{name}.json", tmp_path / f"{name}.h5"
        ran = command(*line, "--out", model, "--json", report)
        assert ran.status == 0
        results = json.loads(report.read_text())
        told[name] = (
            {k: v for k, v in results.items() if k not in ("seconds", "command")},
            open_model(model).coef_KD.tobytes(),
        )
        said = [line for line in ran.err_lines if "at each pass" in line]
        assert said == (
            [
                "the descriptors, 0.0 GB as float32, would take over 50 % of the memory: they are"
                " read from the files at each pass"
            ]
            if name == "read"
            else []
        )
    assert told["held"] == told["read"]


def test_digits(command: Command, tmp_path: Path) -> None:
    features, report = tmp_path / "digits.h5", tmp_path / "r.json"
    ran = command(
        *("extract", "--dataset", "digits", "--limit", 300, "--weights", NET, "--scales", 32),
        *("--layer", "pool3", "--out", features),
    )
    assert ran.status == 0
    ran = command("svm", "--features", features, "--C", 8, "--workers", 5000, "--json", report)
    # no more threads than cores, as each takes memory
    assert torch.get_num_threads() <= CORES
    assert ran.status == 0
    results = json.loads(report.read_text())
    assert list(results["per_class"]) == [str(d) for d in range(10)] and results["C"] == 8.0
    assert results["dataset"] == "digits" and results["n_train"] + results["n_test"] == 300
    assert 0.5 < results["mean_class_recall"] < 1  # chance is 0.1


def write_images(folder: Path, red: dict[str, bool]) -> None:
    """A JPEG of 33x40 for each id, reddish or bluish, four of each kind; hard links, so thousands
    are quick.
    """
    folder.mkdir(parents=True)
    for i, (name, is_red) in enumerate(red.items()):
        target, source = (
            folder / f"{name}.jpg",
            folder.parent / f"{'red' if is_red else 'blue'}{i % 4}.jpg",
        )
        if not source.exists():
            pixels = photograph(i, 33, 40)
            pixels[..., 2 if is_red else 0] //= 4
            pixels[..., 0 if is_red else 2] |= 128
            Image.fromarray(pixels).save(source, quality=95)
        os.link(source, target)


VOC_NET = (
    *("--weights", NET, "--layer", "pool2", "--scales", "32", "--no-mirror"),
    *("--precision", "float32", "--device", "cpu", "--batch-size", "8"),
)


def test_voc2007_with_the_real_lists(command: Command, data: Path, tmp_path: Path) -> None:
    lists = data / "voc2007_lists" / "VOC2007" / "ImageSets"
    truth = {
        part: dict(
            line.split()
            for line in (lists / "Main" / f"person_{part}.txt").read_text().splitlines()
        )
        for part in ("train", "val", "test")
    }
    red = {image: value == "1" for part in truth.values() for image, value in part.items()}
    assert len(red) == 9963
    root = tmp_path / "VOCdevkit" / "VOC2007"
    write_images(root / "JPEGImages", red)
    (root / "ImageSets").symlink_to(lists)
    features, report = tmp_path / "f.h5", tmp_path / "r.json"
    ran = command(
        "extract", "--dataset", "voc2007", "--root", tmp_path, *VOC_NET, "--out", features
    )
    assert ran.status == 0, ran.err
    ran = command("svm", "--features", features, "--C", 1, "--workers", 1, "--json", report)
    assert ran.status == 0 and "mAP (11-point)" in ran.out
    results = json.loads(report.read_text())
    assert (results["dataset"], results["protocol"]) == ("voc2007", "voc2007")
    assert (results["n_train"], results["n_test"], results["n_unreadable"]) == (5011, 4952, 0)
    assert results["model_trained_on"] == "train + val" and results["test_split"] == "test"
    assert list(results["per_class"]) == CLASSES and "accuracy" not in results
    person = results["per_class"]["person"]
    assert person["n_positive"] == list(truth["test"].values()).count("1") == 2007
    # the colour tells who is a person, and nothing else: about 42% of the test images are
    assert person["ap_11point"] > 0.99 and person["ap_allpoint"] > 0.99
    for name, scores in results["per_class"].items():
        assert set(scores) == {"ap_11point", "ap_allpoint", "n_positive"}
        assert name == "person" or 0 < scores["ap_allpoint"] < 0.3
        assert name in ran.out
    for kind in ("11point", "allpoint"):
        mean = np.mean([scores[f"ap_{kind}"] for scores in results["per_class"].values()])
        assert results[f"map_{kind}"] == pytest.approx(mean, abs=1e-12)


def test_voc2012_without_test_labels_gives_a_submission(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    ids = [f"2008_{i:06d}" for i in rng.permutation(100)[:80]]
    parts = {"train": ids[:30], "val": ids[30:60], "test": ids[60:]}
    red = {image: bool(rng.integers(2)) for image in ids}
    for part, names in parts.items():
        (lists / f"{part}.txt").write_text("".join(f"{n}\n" for n in names))
        for name in CLASSES if part != "test" else ():
            value = {n: red[n] if name == "person" else rng.integers(2) for n in names}
            rows = "".join(f"{n} {1 if value[n] else -1:2d}\n" for n in names)
            (lists / f"{name}_{part}.txt").write_text(rows)
    write_images(root / "JPEGImages", red)
    features, report, submission = (
        tmp_path / "f.h5",
        tmp_path / "r.json",
        tmp_path / "sub" / "comp2",
    )
    ran = command(
        "extract", "--dataset", "voc2012", "--root", tmp_path, *VOC_NET, "--out", features
    )
    assert ran.status == 0, ran.err
    line = ("svm", "--features", features, "--C", 10, "--workers", 1, "--submission", submission)
    ran = command(*line, "--json", report)
    assert ran.status == 0, ran.err
    results = json.loads(report.read_text())
    assert results["test_labels"] == "none" and results["n_train"] == 60
    assert not {"map_11point", "map_allpoint", "per_class", "accuracy"} & results.keys()
    assert results["validation"]["n"] == 30
    assert results["validation"]["per_class"]["person"]["ap_allpoint"] == pytest.approx(1)

    files = {p.name: p.read_text().splitlines() for p in submission.iterdir()}
    assert set(files) == {f"comp2_cls_test_{name}.txt" for name in CLASSES}
    for lines in files.values():
        assert sorted(line.split()[0] for line in lines) == sorted(parts["test"])
    score = {n: float(s) for n, s in (row.split() for row in files["comp2_cls_test_person.txt"])}
    for image in parts["test"]:
        assert (score[image] > 0) == red[image]

    before = contents(submission)
    ran = command(*line)
    assert ran.status == 1 and contents(submission) == before
    assert "isn't an empty folder" in ran.err_lines[-1] and "Traceback" not in ran.err


def test_an_unlabelled_folder_has_features_but_no_svm(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    features = tmp_path / "f.h5"
    ran = command(
        "extract", "--dataset", "folder", "--root", folder / "red", *SMALL, "--out", features
    )
    assert ran.status == 0 and vggfeat.open_features(features).labels is None
    ran = command("info", features)
    assert ran.status == 0 and "none" in ran.out
    ran = command("svm", "--features", features)
    assert (ran.status, ran.out) == (1, "")
    [line] = ran.err_lines
    assert line.startswith(f"vggfeat: {features} has no labels")


def test_a_submission_needs_an_official_test_part(
    command: Command, extracted: Path, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    ran = command(
        "svm", "--features", extracted, "--C", 1, "--workers", 1, "--submission", tmp_path / "sub"
    )
    assert (ran.status, ran.out) == (1, "") and contents(tmp_path) == before
    assert "--submission is of the test part, and these features have none" in ran.err_lines[-1]


def test_several_labels_with_random_splits(command: Command, folder: Path, tmp_path: Path) -> None:
    """A CSV without a split column: three random splits, mAP of each; red and blue images are
    easily told.
    """
    lines = [
        f"{path.relative_to(folder)},{path.parent.name};any"
        for path in sorted(folder.rglob("*.jpg"))
    ]
    lines[0] = lines[0].replace(";any", "")
    (folder / "list.csv").write_text("\n".join(["path,labels", *lines]) + "\n")
    features, report = tmp_path / "multi.h5", tmp_path / "multi.json"
    ran = command(
        "extract", "--dataset", "csv", "--root", folder / "list.csv", *SMALL, "--out", features
    )
    assert ran.status == 0, ran.err
    ran = command("svm", "--features", features, "--C", "1,4", "--workers", 1, "--json", report)
    assert ran.status == 0, ran.err
    results = json.loads(report.read_text())
    assert len(results["per_split"]) == 3 and results["per_class"]["red"]["ap_allpoint"] > 0.9
    assert "mAP (area) on the test parts" in ran.out and "split 2" in ran.out
    assert cells(ran.out, "class") == [
        "AP (11-point) on the test parts",
        "AP (area) on the test parts",
        "images",
    ]
    assert cells(ran.out, "difficult objects") == ["left out, in training and in scoring"]


def test_two_processes_give_one_processs_results_and_one_of_them_tells(tmp_path: Path) -> None:
    features = feature_file(tmp_path / "f.h5", 600, 300)  # not few: each trains on its rows
    told, files = [], []
    for processes in (1, 2):
        outputs = (tmp_path / f"{processes}.json", tmp_path / f"{processes}.h5")
        line = ["-m", "vggfeat", "svm", "--features", features, "--C", "0.1,1", "--device", "cpu"]
        line += ["--json", outputs[0], "--out", outputs[1]]
        ran = prepared.run(line, environment(), processes, timeout=HANG)
        assert ran.returncode == 0, ran.stderr
        told.append(ran.stderr.splitlines() + ran.stdout.splitlines())
        files.append(outputs)
    alone, together = (json.loads(results.read_text()) for results, _ in files)
    for key in ("C", "C_curve", "accuracy", "per_class", "n_train", "n_test"):
        assert together[key] == alone[key]
    assert len(told[0]) == len(told[1]) and told[1][0] == told[0][0]
    one, other = (open_model(model) for _, model in files)
    np.testing.assert_allclose(other.coef_KD, one.coef_KD, atol=2e-2 * np.abs(one.coef_KD).max())
