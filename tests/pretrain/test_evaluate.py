"""The evaluating command: figures, submissions, two processes; and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from scipy.io import savemat

import vggfeat
from pretrain.kept import KeptPosteriors
from pretrain.runs import Trained, roles
from tests import prepared
from tests.conftest import HANG, Command, Nets, torchrun, vgg_of
from tests.pretrain.conftest import CLASSES, FAST, SHORT, environment, evaluating, training
from vggfeat.images import Preprocessing
from vggfeat.weights import save_weights


@pytest.fixture
def command(run_main: Command) -> Command:
    return evaluating(run_main)


def test_figures_kept_and_fused(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    d, e = weights["D-36-64"], weights["E-36-64"]
    words = ["--data", images, *FAST, "--scales", "36,50,64", "--mode", "both", "--json"]
    ran = command(
        "--weights",
        d,
        "--weights",
        e,
        *words,
        tmp_path / "r.json",
        "--posteriors",
        tmp_path / "de.h5",
    )
    assert ran.status == 0, ran.err
    result = json.loads((tmp_path / "r.json").read_text())
    rows = {(len(row["nets"]), row["nets"][0]["net"], row["mode"]): row for row in result["rows"]}
    assert len(rows) == 9  # D, E and both nets fused, each dense, crops and both
    assert rows[2, "D", "both"]["images"] == 42
    fused = rows[2, "D", "both"]
    kept = KeptPosteriors.read(tmp_path / "de.h5")
    posteriors = kept.fused("both")
    truth = np.repeat(np.arange(7), 6)
    assert fused["top1_error"] == pytest.approx(100 * np.mean(posteriors.argmax(1) != truth))
    best = np.argsort(-posteriors, 1)[:, :5]
    assert fused["top5_error"] == pytest.approx(
        100 * np.mean([t not in b for t, b in zip(truth, best, strict=True)])
    )
    recall = fused["per_class"]["n03"]
    assert recall["images"] == 6
    assert recall["top1_error"] == pytest.approx(100 * np.mean(posteriors.argmax(1)[18:24] != 3))
    assert (
        sum(pair["images"] for pair in fused["confusions"]) == (posteriors.argmax(1) != truth).sum()
    )

    # again from what was kept, and from two files, with no net at hand
    for path in weights.values():
        path.unlink()
    again = command(
        "--from", tmp_path / "de.h5", "--mode", "both", "--json", tmp_path / "again.json"
    )
    assert again.status == 0
    assert again.out == ran.out
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == result["rows"]
    subset = command("--from", tmp_path / "de.h5", "--scales", "50")
    assert subset.status == 0
    assert "no Q=51" in command("--from", tmp_path / "de.h5", "--scales", "51").err


def test_a_central_crop_gives_trainings_own_error(
    command: Command, run_main: Command, photos: Path, tmp_path: Path
) -> None:
    """S is the photographs' own smallest side, so that neither of the two rescales them."""
    S = "--set=NET-112-160.train_scale=[144,144]"
    trained = training(run_main)(
        *("--net", "A", "--data", photos, "--out", tmp_path / "run", *SHORT, S),
        *("--set=*.iterations=12", "--workers", "0", "--precision", "float32"),
    )
    assert trained.status == 0, trained.err
    weights = tmp_path / "run" / "weights.safetensors"
    own = json.loads(vggfeat.load(weights).metadata["errors"])["validation"]
    words = ["--weights", weights, "--data", photos, *FAST, "--mode", "centre"]
    kept = tmp_path / "kept.h5"
    ran = command(*words, "--posteriors", kept, "--json", tmp_path / "r.json")
    assert ran.status == 0, ran.err
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (row["mode"], row["scales"], row["images"]) == ("centre", ["144"], 50)
    assert {"top1": row["top1_error"], "top5": row["top5_error"]} == pytest.approx(own)
    assert 0 < own["top5"] < own["top1"]
    again = command("--from", kept, "--mode", "centre")
    assert again.status == 0 and again.out == ran.out
    assert "are centre only, not dense" in command("--from", kept).err
    assert "are centre only, not dense" in command("--from", kept, "--mode", "both").err
    # several Q by option, a further mode beside others
    several = command(*words, "--scales", "144,160")
    assert several.status == 0 and "144,160" in several.out


def test_two_processes_give_the_same_table(
    images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [
        "--weights",
        weights["D-36-64"],
        "--data",
        images,
        *FAST,
        "--mode",
        "both",
        "--batch-size",
        "3",
    ]
    tables = []
    for processes in (1, 2):
        words = ["-m", "pretrain.evaluate", *arguments]
        words += ["--posteriors", tmp_path / f"{processes}.h5"]
        done = prepared.run(words, environment(), processes, timeout=HANG)
        assert done.returncode == 0, done.stderr[-3000:]
        tables.append(done.stdout)
    assert tables[0] == tables[1]
    one, two = (KeptPosteriors.read(tmp_path / f"{n}.h5") for n in (1, 2))
    for mode in ("dense", "crops"):
        assert np.abs(one.nets[0].modes[mode] - two.nets[0].modes[mode]).max() < 1e-4


def test_torchrun_gives_the_figures_of_one_process(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """Started as docs/gpus.md says."""
    words = ["--weights", weights["D-36"], "--data", images, *FAST, "--batch-size", "3"]
    one, two = (
        ["--posteriors", tmp_path / f"{n}.h5", "--json", tmp_path / f"{n}.json"] for n in "12"
    )
    alone = command(*words, *one)
    assert alone.status == 0, alone.err
    line = [*torchrun(2), "-m", "pretrain.evaluate", *map(str, [*words, *two])]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("42 images") == 1  # one of the two tells it
    rows = [json.loads((tmp_path / f"{n}.json").read_text())["rows"] for n in "12"]
    assert rows[0] == rows[1]
    kept = [KeptPosteriors.read(tmp_path / f"{n}.h5") for n in "12"]
    assert kept[0].names == kept[1].names and kept[0].image_set == kept[1].image_set
    assert np.abs(kept[0].fused("dense") - kept[1].fused("dense")).max() < 1e-4


def test_unreadable_images_count_as_errors(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--weights", weights["A-36"], "--data", images, *FAST, "--json"]
    assert command(*words, tmp_path / "good.json").status == 0
    (images / "val" / "n02" / "1.png").write_bytes(b"nothing")
    ran = command(*words, tmp_path / "bad.json")
    assert ran.status == 3
    assert "unreadable: val/n02/1.png" in ran.err
    good, bad = (
        json.loads((tmp_path / f"{n}.json").read_text())["rows"][0] for n in ("good", "bad")
    )
    assert bad["images"] == 42
    assert bad["unreadable"] == 1
    gained = bad["per_class"]["n02"]["top5_error"] - good["per_class"]["n02"]["top5_error"]
    assert gained in (0, pytest.approx(100 / 6))
    assert bad["per_class"]["n02"]["top5_error"] >= 100 / 6
    assert bad["per_class"]["n03"] == good["per_class"]["n03"]


def test_other_words_for_the_splits(
    command: Command, images: Path, weights: dict[str, Path]
) -> None:
    (images / "val").rename(images / "Validation")
    (images / "test").rename(images / "Testing")
    (images / "Validation" / CLASSES[0] / "a.heic").touch()
    words = ["--weights", weights["A-36"], "--data", images, "--scales", "36", *FAST]
    ran = command(*words, "--limit", "4")
    assert ran.status == 0, ran.err
    assert "imagenet val: 4 images" in ran.out
    assert ran.err_lines[0].startswith("left out: 1 file without an image's ending (.heic 1)")
    ran = command(*words, "--split", "test")
    assert ran.status == 0, ran.err
    assert "folder test: 4 images" in ran.out


def test_submission(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    numbers = {name: 100 - i for i, name in enumerate(CLASSES)}
    synsets = [(number, name, 0) for name, number in numbers.items()] + [(1001, "n99", 3)]
    record = np.array(
        synsets, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    )
    (tmp_path / "devkit" / "data").mkdir(parents=True)
    savemat(tmp_path / "devkit" / "data" / "meta.mat", {"synsets": record})
    (images / "test" / "ILSVRC2012_test_00000002.png").write_bytes(b"nothing")
    words = [
        "--weights",
        weights["D-36"],
        "--data",
        images,
        "--split",
        "test",
        *FAST,
        "--submission",
        tmp_path / "s.txt",
    ]
    ran = command(*words, "--devkit", tmp_path / "devkit", "--posteriors", tmp_path / "p.h5")
    assert ran.status == 3
    lines = [list(map(int, line.split())) for line in (tmp_path / "s.txt").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[2] == [0] * 5
    best = np.argsort(-KeptPosteriors.read(tmp_path / "p.h5").fused("dense"), 1)[:, :5]
    for i in (0, 1, 3):
        assert lines[i] == [numbers[CLASSES[k]] for k in best[i]]
    assert "--devkit" in command(*words, "--overwrite").err
    assert "meta.mat" in command(*words, "--overwrite", "--devkit", tmp_path).err


def test_pooling_of_odd_sides_by_option(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    d = ["--weights", weights["D-36"], "--data", images, *FAST, "--scales", "50", "--posteriors"]
    for pool in ("floor", "ceil"):
        assert command(*d, tmp_path / f"{pool}.h5", "--max-pool", pool).status == 0
    assert command(*d, tmp_path / "own.h5").status == 0
    floor, ceil, own = (
        KeptPosteriors.read(tmp_path / f"{n}.h5").nets[0] for n in ("floor", "ceil", "own")
    )
    assert (floor.facts, ceil.facts) == (own.facts, {**own.facts, "pool": "ceil"})
    assert np.array_equal(floor.mean("dense"), own.mean("dense"))
    assert not np.allclose(ceil.mean("dense"), own.mean("dense"), atol=1e-6)
    # it isn't the same net: it can be fused, has a name of its own, and in a table a mark
    assert (
        "there twice" in command("--from", tmp_path / "own.h5", "--from", tmp_path / "floor.h5").err
    )
    both = ["--from", tmp_path / "own.h5", "--from", tmp_path / "ceil.h5"]
    assert "D (max-pool floor) + D (max-pool ceil)" in command(*both).out
    trained = [Trained.from_facts(net.facts) for net in (own, ceil)]
    assert [net.changes for net in trained] == [(), ("max_pool=ceil",)] and len(roles(trained)) == 2
    assert "--max-pool is for --weights" in command(*both, "--max-pool", "ceil").err


def test_what_cannot_be_evaluated(
    command: Command, images: Path, weights: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    def says(*words: object, status: int = 1) -> str:
        ran = command(*words, *([] if "--from" in words else FAST))
        assert ran.status == status, ran.err
        assert len(ran.err_lines) == 1, ran.err
        return ran.err

    a = weights["A-36"]
    assert "smaller than the crop of 32" in says("--weights", a, "--data", images, "--scales", "31")
    assert "give one of --weights, --from and --table" in says("--data", images, status=2)
    assert "no folder" in says("--weights", a, "--data", tmp_path / "nowhere")
    assert "'--scales': '3x'" in says("--weights", a, "--data", images, "--scales", "3x", status=2)
    assert "reach pool5" in says(
        "--weights", data / "vgg16_conv_caffe.safetensors", "--data", images
    )
    backbone = timm.create_model("resnet10t")
    safetensors.torch.save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    named = f"timm:resnet10t@{tmp_path / 'backbone.safetensors'}"
    assert "is no net of Table 1" in says("--weights", named, "--data", images, status=2)
    tensors = safetensors.torch.load_file(a)
    with safetensors.safe_open(a, "pt") as file:
        metadata = file.metadata()
    tensors["classifier.6.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "nan.safetensors", metadata=metadata)
    assert "of fc8 is not finite" in says(
        "--weights", tmp_path / "nan.safetensors", "--data", images
    )
    (tmp_path / "x.h5").write_bytes(b"no")
    assert "x.h5" in says("--from", tmp_path / "x.h5")
    assert "no --scales" in says("--table", "3", "--scales", "36", "--data", images, status=2)
    command("--weights", a, "--data", images, *FAST, "--posteriors", tmp_path / "a.h5")
    command(
        "--weights",
        a,
        "--data",
        images,
        *FAST,
        "--split",
        "test",
        "--posteriors",
        tmp_path / "t.h5",
    )
    assert "have no labels" in says("--table", "3", "--from", tmp_path / "t.h5")
    network = vggfeat.load("B", weights=weights["B-36"])
    save_weights(
        tmp_path / "b.safetensors",
        vgg_of(network),
        network.preprocessing,
        classes=CLASSES,
        train_scale="36",
    )
    command(
        "--weights",
        tmp_path / "b.safetensors",
        "--data",
        images,
        *FAST,
        "--posteriors",
        tmp_path / "b.h5",
    )
    assert "doesn't tell by which recipe it was trained" in says(
        "--table", "3", "--from", tmp_path / "b.h5"
    )
    (tmp_path / "copy.h5").write_bytes((tmp_path / "a.h5").read_bytes())
    assert "both stand for A at 256" in says(
        "--table", "3", "--from", tmp_path / "a.h5", "--from", tmp_path / "copy.h5"
    )
    assert "no trained nets under" in says(
        "--table", "3", "--runs", tmp_path / "devkit", "--data", images
    )
    # --table updates its ledger in place, and that only
    picture = next((images / "val").rglob("*.png"))
    before = picture.read_bytes()
    for ledger, why, status in (
        (picture, "is not UTF-8 text", 1),
        (tmp_path / "a.h5", "is what the command reads", 2),
        (tmp_path / "no" / "results.md", "there is no folder", 1),
    ):
        words = ["--table", "3", "--from", tmp_path / "a.h5", "--ledger", ledger]
        assert why in says(*words, status=status)
    assert picture.read_bytes() == before


def test_classes_are_matched_by_name(
    command: Command,
    images: Path,
    weights: dict[str, Path],
    he: Nets,
    plain: Preprocessing,
    tmp_path: Path,
) -> None:
    ours = vgg_of(vggfeat.load("A", weights=weights["A-36"]))
    wide = he("A", num_classes=9, width=0.05, crop=32)
    order = [8, 1, 3, 0, 2, 5, 7]  # where the wide net has the seven classes
    names = [f"other{i}" for i in range(9)]
    with torch.no_grad():
        fc8 = {
            key: value for key, value in wide.state_dict().items() if key.startswith("classifier.6")
        }
        wide.load_state_dict({**ours.state_dict(), **fc8})
        for key, elsewhere in (("classifier.6.weight", 0.0), ("classifier.6.bias", -50.0)):
            wide.get_parameter(key).fill_(elsewhere)[order] = ours.get_parameter(key)
    for i, place in enumerate(order):
        names[place] = CLASSES[i]
    save_weights(tmp_path / "wide.safetensors", wide, plain, classes=names, train_scale="36")
    for path in (weights["A-36"], tmp_path / "wide.safetensors"):
        ran = command(
            "--weights", path, "--data", images, *FAST, "--json", tmp_path / f"{path.stem}.json"
        )
        assert ran.status == 0, ran.err
    narrow, wide_rows = (
        json.loads((tmp_path / f"{n}.json").read_text())["rows"][0] for n in ("weights", "wide")
    )
    assert narrow["per_class"] == wide_rows["per_class"]
    (images / "val" / "n06").rename(images / "val" / "n99")
    ran = command("--weights", weights["A-36"], "--data", images, *FAST)
    assert ran.status == 1
    assert "doesn't know 1 of the data's 7 classes, such as 'n99'" in ran.err
