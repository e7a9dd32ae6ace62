"""The command, end to end: tables, JSON, CSV and exit statuses on small nets and small images.

A few cases run a process of their own; the rest call `main` in this one, which saves the imports.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.core import TyperGroup

import vggfeat
from vggfeat import cli, terminal
from vggfeat.aggregate import aggregate
from vggfeat.classify import _first_of_same
from vggfeat.datasets import Items
from vggfeat.datasets.voc import CLASSES
from vggfeat.machine import CORES
from vggfeat.model import open_model
from vggfeat.writer import FeatureWriter

from ..conftest import (
    HANG,
    Command,
    Ran,
    assert_same_descriptors,
    photograph,
    vgg_of,
    without_clock,
)
from .test_report import PART

NET = "random:A,width=0.125,crop=32"  # fc7 has 512 dimensions
OTHER = f"{NET},seed=1"
FOREWORD = ["images", "smallest side", "descriptor"]  # what extraction tells before it starts
SMALL = ("--weights", NET, "--scales", "32,48", "--precision", "float32", "--device", "cpu")


@pytest.fixture
def command(run_main: Command) -> Command:
    """`command("svm", "--features", path)`: what it printed, and its exit status."""
    return functools.partial(run_main, cli.main)


@pytest.fixture
def extracted(command: Command, folder: Path, tmp_path: Path) -> Path:
    """The feature file of `folder`: 24 images at 32 and 48 pixels."""
    path = tmp_path / "feats.h5"
    ran = command("extract", "--dataset", "folder", "--root", folder, *SMALL, "--out", path)
    assert ran.status == 0, ran.err
    return path


@pytest.fixture
def trained(command: Command, extracted: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.h5"
    ran = command("svm", "--features", extracted, "--C", 1, "--workers", 1, "--out", path)
    assert ran.status == 0, ran.err
    return path


@dataclass(frozen=True)
class Made:
    """What `made` has made, in a folder that its tests leave as it is, and what was printed."""

    root: Path
    extract: Ran
    svm: Ran

    @property
    def folder(self) -> Path:
        return self.root / "images"

    @property
    def features(self) -> Path:
        return self.root / "feats.h5"

    @property
    def facts(self) -> Path:
        return self.root / "extract.json"

    @property
    def model(self) -> Path:
        return self.root / "model.h5"

    @property
    def results(self) -> Path:
        return self.root / "svm.json"


@pytest.fixture(scope="module")
def made(made_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A feature file of `made_folder`'s 24 images at 32 and 48 pixels, and a model, once for all
    tests that only read them.
    """
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(made_folder, root / "images")

    def run(*words: object) -> Ran:
        printed, told = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(told),
        ):
            without_clock(patch)
            patch.setattr(terminal.out, "width", 240)
            patch.setattr(sys, "argv", ["program", *map(str, words)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return Ran(int(ended.value.code or 0), printed.getvalue(), told.getvalue())

    images = ("--dataset", "folder", "--root", root / "images")
    files = ("--out", root / "feats.h5", "--json", root / "extract.json")
    extract = run("extract", *images, *SMALL, *files)
    files = ("--out", root / "model.h5", "--json", root / "svm.json")
    svm = run("svm", "--features", root / "feats.h5", "--workers", 1, *files)
    return Made(root, extract, svm)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file under folder with its bytes, every folder with None."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def read_csv(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Header, images, and scores (N, K), NaN where a cell is empty."""
    header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    scores = np.array([[float(cell) if cell else np.nan for cell in row[1:]] for row in rows])
    return header, [row[0] for row in rows], scores


def cells(printed: str, name: str) -> list[str]:
    """What stands beside a name in the first column of a table."""
    rows = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        for line in printed.splitlines()
    ]
    return next(row[1:] for row in rows if row[0] == name)


def unit(x: np.ndarray) -> np.ndarray:
    normed: np.ndarray = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return normed


def assert_same_scores(ours: np.ndarray, expected: np.ndarray) -> None:
    """Of descriptors that are the same but for rounding; a score is a sum in which much cancels
    out.
    """
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def scores_by_hand(model: Path, x_ND: np.ndarray) -> np.ndarray:
    with h5py.File(model, "r") as file:
        scores_NK: np.ndarray = x_ND @ file["coef"][:].T + file["intercept"][:]
    return scores_NK


# --- from images to predictions -------------------------------------------------------------------


def test_processes_from_a_folder_to_predictions(folder: Path, tmp_path: Path) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "vggfeat.cli", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=HANG)

    ran = run("extract", "--dataset", "folder", "--root", "images", *SMALL)
    assert ran.returncode == 0
    # what is described; where it takes more than ten seconds, how far it is; and nothing else
    told = [line.partition(": ")[0] for line in ran.stderr.splitlines()]
    assert told[:3] == FOREWORD and set(told[3:]) <= {"extract"}, ran.stderr
    assert "feats.h5" in ran.stdout and "fc7, 2 x 512" in ran.stdout
    # two processes, as the results must not depend on how many there are
    ran = run(
        "svm",
        "--features",
        "feats.h5",
        "--C",
        "1,4",
        "--workers",
        2,
        "--out",
        "m.h5",
        "--json",
        "r.json",
    )
    assert ran.returncode == 0 and "mean class recall" in ran.stdout
    assert "validation mean class recall" in ran.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["mean_class_recall"] == 1.0 and results["C_grid"] == [1.0, 4.0]
    ran = run(
        "predict", "images/red/00.jpg", "images/blue/00.jpg", "--model", "m.h5", "--json", "p.json"
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    tops = [record["top"][0]["class"] for record in json.loads((tmp_path / "p.json").read_text())]
    assert tops == ["red", "blue"]


def test_extract_tells_what_it_describes_and_what_it_did(made: Made) -> None:
    ran = made.extract
    assert ran.status == 0
    assert ran.err_lines == [
        "images: 24 of 2 classes; 3 random splits of 16 train, 4 val, 4 test",
        "smallest side: 40 to 48 pixels, median 40; enlarged, of the 24: 16 at Q = 48",
        "descriptor: fc7, 2 x 512: Q = 32, 48, with mirror images",
    ]
    assert "images/s" in ran.out and "unreadable" not in ran.out
    facts = json.loads(made.facts.read_text())
    assert (facts["images"], facts["unreadable"], facts["out"]) == (24, {}, str(made.features))
    assert facts["command"].startswith("vggfeat extract --dataset folder --root")


def test_info_of_a_feature_file(command: Command, made: Made, tmp_path: Path) -> None:
    report = tmp_path / "info.json"
    ran = command("info", made.features, "--json", report)
    assert (ran.status, ran.err) == (0, "")
    facts = json.loads(report.read_text())
    assert (facts["kind"], facts["images"], facts["classes"], facts["unreadable"]) == (
        "features",
        24,
        2,
        0,
    )
    assert facts["descriptors"] == "(24, 2, 512) float32" and facts["labels"] == "one an image"
    # 80% of 12 are 10, of which a fifth validates
    assert facts["splits"] == {
        f"split{s}/{part}": n
        for s in range(3)
        for part, n in (("test", 4), ("train", 16), ("val", 4))
    }
    assert facts["fingerprint"] == vggfeat.load(NET).fingerprint
    assert f"sha256 {facts['fingerprint'][:12]} " in ran.out and facts["fingerprint"] not in ran.out


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


def test_info_of_a_model(command: Command, made: Made, tmp_path: Path) -> None:
    report = tmp_path / "info.json"
    ran = command("info", made.model, "--json", report)
    facts = json.loads(report.read_text())
    assert ran.status == 0 and (facts["kind"], facts["descriptor"], facts["classes"]) == (
        "model",
        512,
        2,
    )
    assert facts["network 1 weights"] == NET and facts["multi_label"] is False


def test_predict_names_the_classes_that_were_trained(
    command: Command, made: Made, tmp_path: Path
) -> None:
    images = sorted(made.folder.rglob("*.jpg"))
    ran = command(
        "predict",
        *images,
        "--model",
        made.model,
        "--json",
        tmp_path / "p.json",
        "--csv",
        tmp_path / "p.csv",
        "--top",
        1,
    )
    assert (ran.status, ran.err) == (0, "")
    header, names, scores = read_csv(tmp_path / "p.csv")
    assert header == ["image", "blue", "red"] and names == [str(p) for p in images]
    np.testing.assert_array_equal(scores[:, 0], -scores[:, 1])  # two classes share one hyperplane
    right = 0
    for path, record, row in zip(
        images, json.loads((tmp_path / "p.json").read_text()), scores, strict=True
    ):
        [best] = record["top"]
        assert record["image"] == str(path) and str(path) in ran.out
        assert best == {"class": header[1 + row.argmax()], "score": row.max()}
        right += best["class"] == path.parent.name
    assert right >= 22


@pytest.mark.parametrize("pool", ["average", "stack", "max"])
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
        "predict", *paths, "--model", model, "--csv", table, "--batch-size", 3, "--device", "cpu"
    )
    assert ran.status == 0
    assert_same_scores(read_csv(table)[2], expected[order])


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
    assert command("predict", *paths, "--model", model, "--csv", table).status == 0
    assert_same_scores(read_csv(table)[2], expected)

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
    # what was tried, a line each, with the winner marked
    assert cells(ran.out, "C") == ["1"] and "mean class recall on 20 % of train" in ran.out
    assert cells(ran.out, "1") == ["100.00 %", "chosen"] and cells(ran.out, "4") == ["100.00 %", ""]
    assert ran.err_lines[0] == "C=1: validation mean class recall 100.00 %"
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


def test_info_is_a_plain_table_and_all_is_asked_for(
    command: Command, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.out, "width", 5000)
    features, report = tmp_path / "f.h5", tmp_path / "r.json"
    line = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder,
        "--weights",
        "mini",
        "--scales",
        "96",
    )
    assert command(*line, "--layer", "pool2", "--store", "float16", "--out", features).status == 0
    ran = command("info", features, "--json", report)
    facts = json.loads(report.read_text())
    assert ran.status == 0 and not re.search(
        r"[{}\[\]]|[0-9a-f]{13}", ran.out.replace(str(tmp_path), "")
    )
    table = {
        "data set": f"folder, in {folder}",
        "images": "24",
        "classes": "2",
        "labels": "one an image",
        "split2": "train 16, val 4, test 4",
        "net": "D",
        "layer": "pool2, 28 values",
        "scales": "96",
        "mirror images": "averaged in",
        "weights": f"mini:D, sha256 {facts['fingerprint'][:12]}",
        "trained at S": "112-160",
        "error, held-out images": "top-1 18.11 %, top-5 1.47 %",
        "stored as": "float16",
        "checked": "all but the descriptors (--verify)",
        "command": facts["command"],
    }
    for name, value in table.items():
        assert cells(ran.out, name) == [value]
    [made] = cells(ran.out, "made")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d \S+, in [\d.]+ s, by vggfeat \S+", made)
    everything = command("info", features, "--all", "--verify")
    assert everything.status == 0 and not re.search(
        r"[{}\[\]]", everything.out.replace(str(tmp_path), "")
    )
    assert cells(everything.out, "fingerprint") == [facts["fingerprint"]]
    assert cells(everything.out, "weights_metadata recipe stages 2 train_scale") == ["112, 112"]
    assert cells(everything.out, "splits split0/train") == ["16"]
    assert cells(everything.out, "mirror") == ["true"]
    for key in facts:
        assert f" {key} " in everything.out


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        3,
        [1],
        {"errors": 5, "source": {"a": 1}},
        {"errors": '{"val": {"top1": "x"}}'},
        json.loads(200 * '{"a": ' + "1" + 200 * "}"),
    ],
)
def test_info_of_weights_that_tell_nonsense(
    command: Command, tmp_path: Path, metadata: object
) -> None:
    """A stranger's metadata are whatever JSON can be."""
    items = Items("folder", "single-label", tmp_path, ["a.jpg"], None, [])
    path = tmp_path / "f.h5"
    facts = {"weights_metadata": metadata}
    with FeatureWriter.open(path, items, PART, 4, facts=facts) as file:
        for scale in range(2):
            file.write(0, scale, np.ones(4, np.float32))
        file.finish()
    for option in ((), ("--all",)):
        ran = command("info", path, *option)
        assert (ran.status, ran.err) == (0, "")


def test_info_says_who_reads_kept_posteriors(command: Command, tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "formats" / "version1" / "posteriors.h5"
    assert command("convert", old, tmp_path / "p.h5").status == 0
    ran = command("info", tmp_path / "p.h5")
    assert (ran.status, ran.out) == (1, "")
    assert (
        ran.err == f"vggfeat: {tmp_path}/p.h5 holds kept posteriors: "
        f"`python -m pretrain.evaluate --from {tmp_path}/p.h5` looks at them\n"
    )


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


def test_limit_store_and_overwrite(
    command: Command, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "five.h5"
    line = ("extract", "--dataset", "folder", "--root", folder, *SMALL, "--out", path)
    assert command(*line, "--limit", 5, "--store", "float16").status == 0
    whole, five = vggfeat.open_features(extracted), vggfeat.open_features(path)
    assert five.shape == (5, 2, 512) and five.dtype == np.float16
    assert five.names == whole.names[:5]
    np.testing.assert_allclose(five.descriptors, whole.descriptors[:5], rtol=2e-3, atol=1e-3)

    before = path.read_bytes()
    ran = command(*line)
    assert (ran.status, ran.out) == (1, "") and path.read_bytes() == before
    assert ran.err_lines == [f"vggfeat: {path} exists; give --overwrite, or another --out"]
    assert command(*line, "--overwrite", "--limit", 1000).status == 0
    assert vggfeat.open_features(path).shape == (24, 2, 512)

    model = tmp_path / "model.h5"
    model.write_text("mine")
    ran = command("svm", "--features", extracted, "--out", model, "--C", 1)
    assert ran.status == 1 and model.read_text() == "mine"
    assert ran.err_lines == [f"vggfeat: {model} exists; give --overwrite, or another --out"]
    ran = command(
        "svm", "--features", extracted, "--out", model, "--C", 1, "--overwrite", "--workers", 1
    )
    assert ran.status == 0 and h5py.is_hdf5(model)


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


def test_dry_run_writes_nothing(command: Command, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "feats.h5"
    line = ("extract", "--dataset", "folder", "--root", folder, *SMALL, "--out", out, "--dry-run")
    before = contents(tmp_path)
    ran = command(*line)
    assert (ran.status, ran.err) == (0, "") and contents(tmp_path) == before
    assert "plan" in ran.out and "0.1 MB" in ran.out and "cpu in float32" in ran.out
    ran = command(*line, "--overwrite", "--json", tmp_path / "plan.json", "--no-mirror")
    once = json.loads((tmp_path / "plan.json").read_text())
    assert (once["images"], once["sampled"], once["bytes"]) == (24, 24, 24 * 2 * 512 * 4)
    command(*line, "--overwrite", "--json", tmp_path / "plan.json")
    twice = json.loads((tmp_path / "plan.json").read_text())
    assert twice["gflop"] == pytest.approx(2 * once["gflop"]) and once["gflop"] > 0
    assert not out.exists()
    out.write_bytes(b"")
    for refused, why in ((out, "exists; give --overwrite"), (tmp_path / "none" / "f.h5", "folder")):
        told = command(*(refused if word == out else word for word in line))
        assert told.status == 0 and "expected time" in told.out
        assert "without --dry-run this would be refused: " in told.err and why in told.err
    said = command(
        *line, "--overwrite", "--limit", 3
    ).err_lines  # what the library says of it, in the option's name
    assert "--limit 3 takes the first images, of 1 of the 2 classes" in said
    assert once["smallest_sides"] == [40, 40, 48] and once["enlarged"] == {"32": 0, "48": 16}
    assert "24 of 2 classes; 3 random splits of 16 train, 4 val, 4 test" in ran.out
    assert "40 to 48 pixels, median 40; enlarged, of the 24: 16 at Q = 48" in ran.out


def test_a_long_extraction_says_what_would_take_less(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plan, and once it has gone on for some time; not where nothing is cheaper, or all is
    quick.
    """
    line = ("extract", "--dataset", "folder", "--root", folder, *SMALL)
    assert "cheaper" not in command(*line, "--dry-run").out
    ran = command(*line, "--out", tmp_path / "a.h5")
    assert ran.status == 0 and "would take" not in ran.err
    monkeypatch.setattr("vggfeat.look.LONG", 0.0)
    monkeypatch.setattr("vggfeat.look.WORTH", 1e-9)
    monkeypatch.setattr("vggfeat.extract.ADVICE_SECONDS", 0.0)
    ran = command(*line, "--dry-run", "--json", tmp_path / "plan.json")
    assert "--scales 32 --no-mirror: about " in ran.out
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["cheaper"] == "--scales 32 --no-mirror" and told["cheaper_seconds"] > 0
    ran = command(*line, "--out", tmp_path / "b.h5")
    [advice] = [row for row in ran.err_lines if "would take" in row]
    assert advice.startswith("this will take about ")
    assert " more; with --scales 32 --no-mirror all images would take about " in advice


def test_settings_that_are_not_given_fit_the_net(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    """S of the training; where the weights don't tell it, the paper's; and it is said which."""
    line = ("extract", "--dataset", "folder", "--root", folder, "--limit", 2, "--device", "cpu")
    ran = command(*line, "--weights", "mini:A", "--out", tmp_path / "a.h5")
    assert ran.status == 0
    assert "fc7, 1 x 896: Q = 112 (the net's training scales), with mirror images" in ran.err
    assert vggfeat.open_features(tmp_path / "a.h5").description.scales == (112,)
    ran = command(*line, "--weights", NET, "--no-mirror", "--dry-run")
    assert ran.status == 0
    assert (
        "Q = 256, 384, 512 (the paper's; the weights don't tell theirs), without mirror images"
        in ran.out
    )


def test_root_comes_from_the_environment(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGGFEAT_DATA", str(folder))
    assert command("extract", "--dataset", "folder", *SMALL, "--out", tmp_path / "f.h5").status == 0
    monkeypatch.delenv("VGGFEAT_DATA")
    monkeypatch.chdir(tmp_path)
    ran = command("extract", "--dataset", "folder", *SMALL, "--out", tmp_path / "g.h5")
    assert ran.status == 1 and f"{tmp_path / 'data'}: check --root" in ran.err


def test_digits(command: Command, tmp_path: Path) -> None:
    features, report = tmp_path / "digits.h5", tmp_path / "r.json"
    ran = command(
        *("extract", "--dataset", "digits", "--limit", 300, "--weights", NET, "--scales", 32),
        *("--layer", "pool3", "--out", features),
    )
    assert ran.status == 0
    ran = command("svm", "--features", features, "--C", 8, "--workers", 5000, "--json", report)
    # each takes memory: of a thousand million there is none
    assert torch.get_num_threads() <= CORES
    assert ran.status == 0
    results = json.loads(report.read_text())
    assert list(results["per_class"]) == [str(d) for d in range(10)] and results["C"] == 8.0
    assert results["dataset"] == "digits" and results["n_train"] + results["n_test"] == 300
    assert 0.5 < results["mean_class_recall"] < 1  # chance is 0.1


def test_the_library_as_in_its_docstring(command: Command, folder: Path, extracted: Path) -> None:
    net = vggfeat.load("A", weights=NET)
    feats = vggfeat.open_features(extracted)
    paths = [str(folder / name) for name in feats.names]
    with Image.open(paths[1]) as image:
        pixels = np.asarray(image)
        three = vggfeat.embed(net, [paths[0], image, pixels], scales=(32, 48))
    assert three.shape == (3, 512) and three.dtype == np.float32
    expected = unit(feats.descriptors.astype(np.float64).mean(1))
    assert_same_descriptors(three, expected[[0, 1, 1]].astype(np.float32))
    train, test = feats.splits["split0/train"], feats.splits["split0/test"]
    assert feats.labels is not None
    svm = vggfeat.LinearSVM(C=4.0).fit(expected[train], feats.labels[train])
    assert svm.score(expected[test], feats.labels[test]) == 1.0
    assert feats.classes == ["blue", "red"] and feats.readable.all()


# --- VOC ------------------------------------------------------------------------------------------


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


# --- bad images -----------------------------------------------------------------------------------


def huge_png() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    header = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


BAD = ("empty.jpg", "gone.jpg", "huge.png", "text.jpg", "truncated.jpg")


def add_bad_images(folder: Path) -> None:
    whole = (folder / "00.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image\n")
    (folder / "huge.png").write_bytes(huge_png())
    (folder / "gone.jpg").symlink_to("nowhere.jpg")


def test_unreadable_images_are_listed_and_left_out(
    command: Command, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    add_bad_images(folder / "red")
    features, report, model = tmp_path / "bad.h5", tmp_path / "r.json", tmp_path / "m.h5"
    line = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder,
        *SMALL,
        "--out",
        features,
        "--json",
        report,
    )
    ran = command(*line)
    assert ran.status == 3 and "29 (5 unreadable)" in ran.out
    assert (
        "can't be read: 4 of the 29, the first is red/empty.jpg: empty file (0 bytes)"
        in ran.err_lines
    )
    *listed, hint = ran.err_lines[-6:]
    assert [row.split(": ")[:2] for row in listed] == [["unreadable", f"red/{n}"] for n in BAD]
    assert hint == "the same command with --retry describes just these again"
    reasons = json.loads(report.read_text())["unreadable"]
    assert list(reasons) == [f"red/{n}" for n in BAD]
    assert (
        reasons["red/empty.jpg"] == "empty file (0 bytes)"
        and reasons["red/gone.jpg"] == "no such file"
    )
    assert "60000" in reasons["red/huge.png"].replace(",", "")

    # rows stay where they are; what is readable is as without its bad neighbours
    clean, dirty = vggfeat.open_features(extracted), vggfeat.open_features(features)
    assert dirty.shape == (29, 2, 512)
    assert [dirty.names[i] for i in np.flatnonzero(~dirty.readable)] == [f"red/{n}" for n in BAD]
    assert np.isnan(dirty.descriptors[~dirty.readable]).all()
    assert [n for n, good in zip(dirty.names, dirty.readable, strict=True) if good] == clean.names
    assert_same_descriptors(dirty.descriptors[dirty.readable], clean.descriptors)

    ran = command("info", features)
    assert ran.status == 0 and len(ran.err_lines) == 5

    ran = command(
        "svm",
        "--features",
        features,
        "--C",
        1,
        "--workers",
        1,
        "--overwrite",
        "--json",
        report,
        "--out",
        model,
    )
    assert ran.status == 0 and cells(ran.out, "unreadable images") == ["5, left out"]
    results = json.loads(report.read_text())
    assert results["n_unreadable"] == 5 and results["mean_class_recall"] == 1.0
    used = [
        np.concatenate([dirty.splits[f"split0/{p}"] for p in parts])
        for parts in (("train", "val"), ("test",))
    ]
    assert [results["n_train"], results["n_test"]] == [
        int(dirty.readable[rows].sum()) for rows in used
    ]

    images = [folder / "red" / n for n in ("00.jpg", "text.jpg", "01.jpg", "missing.jpg")]
    table = tmp_path / "p.csv"
    ran = command(
        "predict", *images, "--model", model, "--overwrite", "--json", report, "--csv", table
    )
    assert ran.status == 3
    assert [row.split(": ")[:2] for row in ran.err_lines] == [
        ["unreadable", str(images[i])] for i in (1, 3)
    ]
    records = json.loads(report.read_text())
    assert ["error" in record for record in records] == [False, True, False, True]
    assert [records[i]["top"][0]["class"] for i in (0, 2)] == ["red", "red"]
    _, names, scores = read_csv(table)
    assert names == [str(p) for p in images] and np.isnan(scores).all(axis=1).tolist() == [
        0,
        1,
        0,
        1,
    ]


def test_predict_draws_no_table_of_nothing(command: Command, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    images = [tmp_path / "bad.jpg", tmp_path / "gone.jpg"]
    ran = command("predict", *images, "--model", trained, "--json", tmp_path / "p.json")
    assert (ran.status, ran.out) == (3, "")
    assert ran.err_lines == [
        f"unreadable: {images[0]}: empty file (0 bytes)",
        f"unreadable: {images[1]}: no such file",
    ]
    told = [
        (record["image"], record["error"])
        for record in json.loads((tmp_path / "p.json").read_text())
    ]
    assert told == [(str(images[0]), "empty file (0 bytes)"), (str(images[1]), "no such file")]


def test_names_in_brackets_and_in_bytes_are_printed_as_they_are(
    command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    """Square brackets and colons are no markup, and a name need not be UTF-8."""
    odd = tmp_path / "odd[bold][final]:smile:.jpg"
    shutil.copy(folder / "red" / "00.jpg", odd)
    ran = command("predict", odd, "--model", trained)
    assert (ran.status, ran.err) == (0, "") and odd.name in ran.out
    latin = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    shutil.copy(folder / "red" / "00.jpg", latin)
    ran = command("predict", latin, "--model", trained, "--csv", tmp_path / "p.csv")
    assert (ran.status, ran.err) == (0, "") and "caf" in ran.out and "red" in ran.out


def test_nothing_is_cut_off_where_the_terminal_is_narrow(
    command: Command, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.out, "width", 60)
    fingerprint = vggfeat.load(NET).fingerprint
    ran = command("info", extracted, "--all")
    assert "…" not in ran.out
    second = "".join(
        line.split("│")[2].strip() for line in ran.out.splitlines() if line.startswith("│")
    )
    assert fingerprint in second


# --- requests that can't be done ------------------------------------------------------------------

IN = "{tmp}"
EXTRACT = (
    f"extract --dataset folder --root {IN}/images --weights {NET} --scales 32 --out {IN}/new.h5"
)

FAILURES = {
    "no folder": (
        f"extract --dataset folder --root {IN}/nowhere --weights {NET} --out {IN}/new.h5",
        f"no folder {IN}/nowhere: check --root",
    ),
    "no voc": (
        f"extract --dataset voc2007 --root {IN}/images --weights {NET} --out {IN}/new.h5",
        f"{IN}/images/VOCdevkit/VOC2007/ImageSets/Main",
    ),
    "voc in a name too long": (
        f"extract --dataset voc2007 --root {IN}/{'n' * 300} --weights {NET} --out {IN}/new.h5",
        f"{'n' * 300}/VOCdevkit/VOC2007/ImageSets/Main: File name too long",
    ),
    "out is the folder": (f"extract --dataset digits --weights {NET} --out .", " is a folder"),
    "out is the root": (f"extract --dataset digits --weights {NET} --out /", "/ is a folder"),
    "query too long": (
        f"neighbours --features {IN}/feats.h5 --query {'n' * 300}",
        f"there is no image {'n' * 300}: neither a file nor a name in {IN}/feats.h5",
    ),
    "features almost too long": (f"info {IN}/{'n' * 250}", f"no feature file at {IN}/{'n' * 250}"),
    "no weights file": (
        EXTRACT.replace(NET, f"{IN}/w.safetensors"),
        f"no weights file at {IN}/w.safetensors",
    ),
    "text weights": (
        EXTRACT.replace(NET, f"{IN}/text.safetensors"),
        f"{IN}/text.safetensors is text, not weights",
    ),
    "out folder": (
        EXTRACT.replace("new.h5", "no/new.h5"),
        f"there is no folder {IN}/no to write new.h5 in",
    ),
    "no features": (f"svm --features {IN}/no.h5", f"no feature file at {IN}/no.h5"),
    "partial": (
        f"svm --features {IN}/half.h5.partial",
        "is half-written: its extraction has not finished",
    ),
    "only partial": (
        f"svm --features {IN}/half.h5",
        f"no feature file at {IN}/half.h5 (there is half.h5.partial",
    ),
    "text features": (
        f"svm --features {IN}/text.safetensors",
        f"{IN}/text.safetensors is not a feature file",
    ),
    "model as features": (f"svm --features {IN}/model.h5", f"{IN}/model.h5 is not a feature file"),
    "scale not stored": (
        f"svm --features {IN}/feats.h5 --scales 48,64",
        f"{IN}/feats.h5 has no scale 64; it has 32, 48",
    ),
    "no model": (
        f"predict {IN}/images/red/00.jpg --model {IN}/no.h5",
        f"no model file at {IN}/no.h5",
    ),
    "features as model": (
        f"predict {IN}/images/red/00.jpg --model {IN}/feats.h5",
        f"{IN}/feats.h5 is not a model file",
    ),
    "other weights": (
        f"predict {IN}/images/red/00.jpg --model {IN}/model.h5 --weights {OTHER} --csv {IN}/p.csv",
        f"weights {OTHER} are not those that described the images",
    ),
    "info of nothing": (f"info {IN}/no.h5", f"no feature file at {IN}/no.h5"),
    "info of text": (f"info {IN}/text.safetensors", f"{IN}/text.safetensors is not a feature file"),
}


@pytest.fixture(scope="module")
def odd(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What was made in a folder of its own, and beside it text and a file that is half-written."""
    root = tmp_path_factory.mktemp("odd") / "made"
    shutil.copytree(made.root, root)
    (root / "text.safetensors").write_text("not weights\n")
    shutil.copy(made.features, root / "half.h5.partial")
    return replace(made, root=root)


@pytest.mark.parametrize(("line", "why"), FAILURES.values(), ids=FAILURES)
def test_failures_say_why_in_one_line_and_leave_nothing(
    line: str, why: str, command: Command, odd: Made
) -> None:
    before = contents(odd.root)
    ran = command(*(word.replace(IN, str(odd.root)) for word in line.split()))
    assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1), ran.err
    assert ran.err.startswith("vggfeat: ") and why.replace(IN, str(odd.root)) in ran.err
    assert "unexpected" not in ran.err and "Traceback" not in ran.err
    assert contents(odd.root) == before


def test_weights_that_stop_before_fc7_go_as_far_as_they_reach(
    command: Command, data: Path, folder: Path, tmp_path: Path
) -> None:
    weights, out = data / "vgg16_conv_caffe.safetensors", tmp_path / "f.h5"
    line = ("extract", "--dataset", "folder", "--root", folder, "--weights", weights, "--out", out)
    ran = command(*line, "--scales", 32, "--layer", "fc7")
    assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1) and not out.exists()
    assert "have no layer 'fc7': they reach pool5; give " in ran.err and "layer" in ran.err
    ran = command(*line, "--scales", 32, "--dry-run")
    assert ran.status == 0 and "; the weights reach pool5: that layer is taken" in ran.out, ran.err
    assert command(*line, "--scales", 32, "--layer", "conv1_2", "--limit", 2).status == 0
    assert vggfeat.open_features(out).shape == (2, 1, 64)


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
    assert ran.err_lines[-1] == "vggfeat: --submission needs an official test part, as VOC has"


def test_results_that_can_not_be_written(command: Command, extracted: Path, tmp_path: Path) -> None:
    report = tmp_path / "no" / "r.json"
    ran = command("info", extracted, "--json", report)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err_lines == [f"vggfeat: there is no folder {report.parent} to write r.json in"]


def test_results_appear_whole_or_the_old_ones_stay(
    command: Command, extracted: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    kept, link = tmp_path / "there" / "r.json", tmp_path / "r.json"
    kept.write_text("before")
    link.symlink_to(kept)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a disk that fills up
    try:
        ran = command("info", extracted, "--overwrite", "--json", link)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ran.status == 1 and ran.err_lines[0].startswith(f"vggfeat: can't write {link}: ")
    assert kept.read_text() == "before" and os.listdir(kept.parent) == ["r.json"]
    assert command("info", extracted, "--overwrite", "--json", link).status == 0
    assert link.is_symlink() and json.loads(kept.read_text())["images"]
    assert command("info", extracted, "--json", "/dev/null").status == 0


def test_debug_shows_the_traceback(command: Command, tmp_path: Path) -> None:
    line = ("svm", "--features", tmp_path / "no.h5")
    assert "Traceback" not in command(*line).err
    ran = command(*line, "--debug")
    assert ran.status == 1 and ran.err.startswith("Traceback (most recent call last)")
    assert ran.err_lines[-1].startswith(f"vggfeat: no feature file at {tmp_path / 'no.h5'}")


def test_an_unexpected_error_is_one_line_too(
    command: Command, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("vggfeat.store.open_features", broken)
    ran = command("info", extracted)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err == "vggfeat: unexpected RuntimeError: first second (--debug shows where)\n"


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 7 GiB"), RuntimeError("can't allocate memory: 7")]
)
def test_too_little_memory_is_not_unexpected(
    command: Command, extracted: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("vggfeat.store.open_features", broken)
    ran = command("info", extracted)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith(f"vggfeat: not enough memory: {error}; free some, or ")


# --- lists ----------------------------------------------------------------------------------------


def test_datasets_and_weights_are_listed(command: Command) -> None:
    ran = command("datasets")
    assert (ran.status, ran.err) == (0, "")
    for name in (
        "voc2007",
        "voc2012",
        "caltech101",
        "caltech256",
        "imagenet",
        "folder",
        "csv",
        "digits",
    ):
        assert any(
            line.split("│")[1].strip() == name for line in ran.out.splitlines() if "│" in line
        )
    assert "9,963 images" in ran.out and "path,label[,split]" in ran.out
    ran = command("weights")
    assert (ran.status, ran.err) == (0, "")
    for spec in (
        "oxford:D",
        "oxford:E",
        "oxford:D@FILE",
        "torchvision:vgg16",
        "timm:NAME",
        "FILE.safetensors",
    ):
        assert any(
            line.split("│")[1].strip() == spec for line in ran.out.splitlines() if "│" in line
        )


def test_help_needs_no_torch() -> None:
    code = "import sys; from vggfeat import cli; sys.argv = ['vggfeat', '--help']\n"
    code += (
        "try: cli.main()\nexcept SystemExit as e: print('status', e.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert ran.stderr == "" and "status 0 False" in ran.stdout
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    for name in group.commands:
        assert f" {name} " in ran.stdout


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
