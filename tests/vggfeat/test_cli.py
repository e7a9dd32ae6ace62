"""The command, end to end: tables, JSON, CSV and exit statuses on small nets and small images.

A few cases run a process of their own; the rest call `main` in this one, which saves the imports.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import typer
from typer.core import TyperGroup

import vggfeat
from vggfeat import cli, terminal
from vggfeat.datasets import Items
from vggfeat.writer import FeatureWriter

from ..conftest import HANG, Command
from .conftest import NET, OTHER, SMALL, Made, cells, contents
from .test_report import PART

FOREWORD = ["images", "smallest side", "descriptor"]  # what extraction tells before it starts


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
    assert ran.stderr == ""  # progress is a bar, or after ten seconds a line
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["mean_class_recall"] == 1.0 and results["C_grid"] == [1.0, 4.0]
    ran = run(
        "predict", "images/red/00.jpg", "images/blue/00.jpg", "--model", "m.h5", "--out", "p.jsonl"
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    tops = [json.loads(line)["class"] for line in lines]
    assert tops == ["red", "blue"]


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


def test_info_of_a_net_of_the_paper(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "info.json"
    Path("D").mkdir()  # a run's folder, which isn't meant
    ran = command("info", "D", "--json", report)
    assert (ran.status, ran.err) == (0, "") and max(map(len, ran.out.splitlines()[:25])) <= 80
    assert cells(ran.out, "conv3_3") == ["3x3", "256", "56", "590,080", "1,849.7", "40", "4"]
    assert cells(ran.out, "fc6") == ["7x7", "4096", "1", "102,764,544", "102.8", "404", "32"]
    assert "parameters: 138,357,544; Table 2: 138 million\nmultiply-adds: 15.47 billion" in ran.out
    assert (
        "3x3 + 3x3 + 3x3 (stages 3, 4, 5): a field of 7x7, 27 C^2 weights; one 7x7 layer: 49 C^2,"
        " 81 % more"
    ) in ran.out
    facts = json.loads(report.read_text())
    assert (facts["kind"], facts["weight_layers"], facts["parameters"]) == ("net", 16, 138_357_544)
    assert [layer["name"] for layer in facts["layers"]][-2:] == ["fc7", "fc8"]
    ran = command("info", "B-5x5")
    assert "25 C^2 weights; 2 layers of 3x3: 18 C^2, 28 % fewer" in ran.out
    assert "-" in cells(command("info", "A-LRN").out, "lrn1")
    assert cells(command("info", "A", "--all").out, "table_2_millions") == ["133"]
    # a file of the name comes first, as elsewhere
    Path("E").write_text("no features")
    assert command("info", "E").status == 1
    assert "no feature file at F; the nets of Table 1 are A, A-LRN, B" in command("info", "F").err


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


def test_root_comes_from_the_environment(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGGFEAT_DATA", str(folder))
    assert command("extract", "--dataset", "folder", *SMALL, "--out", tmp_path / "f.h5").status == 0
    monkeypatch.delenv("VGGFEAT_DATA")
    monkeypatch.chdir(tmp_path)
    ran = command("extract", "--dataset", "folder", *SMALL, "--out", tmp_path / "g.h5")
    assert ran.status == 1 and f"{tmp_path / 'data'}: check --root" in ran.err


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
    "out is the root": (
        f"extract --dataset digits --weights {NET} --out /",
        "/ is a folder with other files",
    ),
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
        f"predict {IN}/images/red/00.jpg --model {IN}/model.h5 --weights {OTHER} --out {IN}/p.csv",
        f"weights {OTHER} are not those that described the images",
    ),
    "info of nothing": (f"info {IN}/no.h5", f"no feature file at {IN}/no.h5"),
    "info of text": (f"info {IN}/text.safetensors", f"{IN}/text.safetensors is text, not weights"),
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

    monkeypatch.setattr("vggfeat.features.open_layers", broken)
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

    monkeypatch.setattr("vggfeat.features.open_layers", broken)
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
