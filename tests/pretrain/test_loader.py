"""Which images train, which are held out and which validate; what is no training set."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.colour import Colours
from pretrain.loader import held_out_slice, read_training_set
from pretrain.recipe import chain, read_recipe
from tests.conftest import Command
from tests.pretrain.conftest import FEW, Train, losses, one_line, training
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError


@pytest.fixture
def command(run_main: Command) -> Command:
    return training(run_main)


@pytest.mark.parametrize(("train", "val"), [("Training", "Validation"), ("train_set", "val_set")])
def test_other_words_for_train_and_val(
    train: str, val: str, command: Command, drawings: Path, tmp_path: Path
) -> None:
    for part, word in (("train", train), ("val", val)):
        (drawings / part).rename(drawings / word)
    (drawings / train / "red" / "IMG.heic").touch()
    ran = command("--net", "A", *FEW, "--data", drawings, "--out", tmp_path / "run", "--dry-run")
    assert ran.status == 0, ran.err
    assert "76 training images" in ran.out
    assert (
        f"left out: 1 file without an image's ending (.heic 1), for example {train}/red/IMG.heic"
        in ran.err
    )


@pytest.mark.parametrize("inside", ["", "ILSVRC/Data/CLS-LOC"])
def test_a_training_set_as_it_is_downloaded(
    inside: str, command: Command, drawings: Path, tmp_path: Path
) -> None:
    """Flat validation images; in Kaggle's folders, too."""
    recipe = read_recipe("mini", ["batch_size=16", "held_out=0.05"], "A")
    reference = read_training_set(drawings, recipe)
    base = tmp_path / "data" / inside
    (base / "val").mkdir(parents=True)
    lines = ["ImageId,PredictionString"]
    for i, path in enumerate(sorted((drawings / "val").glob("*/*.jpg")), 1):
        (base / "val" / f"ILSVRC2012_val_{i:08d}.jpg").symlink_to(path)
        lines.append(f"ILSVRC2012_val_{i:08d},{path.parent.name} 1 2 3 4 ")
    (base / "train").symlink_to(drawings / "train")
    (tmp_path / "data" / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    found = read_training_set(tmp_path / "data", recipe)
    assert found.items.labels is not None and reference.items.labels is not None
    assert found.items.labels.tolist() == reference.items.labels.tolist()
    assert found.classes == reference.classes and found.items.root == base
    for own, theirs in zip(
        (found.train, found.held_out, found.val),
        (reference.train, reference.held_out, reference.val),
        strict=True,
    ):
        assert own.tolist() == theirs.tolist() != []
    assert [found.items.names[i] for i in found.train] == [
        reference.items.names[i] for i in reference.train
    ]
    words = ["--net", "A", *FEW, "--data", tmp_path / "data", "--out", tmp_path / "run"]
    ran = command(*words, "--dry-run")
    assert ran.status == 0 and "76 training images" in ran.out, ran.err
    (tmp_path / "data" / "LOC_val_solution.csv").unlink()
    told = one_line(command(*words, "--dry-run").err)
    assert "nothing beside it that tells the classes" in told and str(base / "val") in told


def test_a_class_may_be_called_train(command: Command, drawings: Path, tmp_path: Path) -> None:
    (drawings / "train" / "red").rename(drawings / "train" / "train")
    words = [
        "--net",
        "A",
        *FEW,
        "--data",
        drawings / "train",
        "--out",
        tmp_path / "run",
        "--dry-run",
    ]
    ran = command(*words)
    assert ran.status == 0, ran.err
    assert "taken for classes: train" in ran.err
    (drawings / "train" / "train").rename(drawings / "fold1")
    shutil.copytree(drawings / "fold1", drawings / "parts" / "fold1" / "red")
    for part in ("fold1/blue", "fold2/red", "fold2/blue"):
        shutil.copytree(drawings / "val" / "red", drawings / "parts" / part)
    words[words.index("--data") + 1] = drawings / "parts"
    assert "hold the same folders, blue, red" in one_line(command(*words).err)


def test_unreadable_images_are_left_out_the_same_by_every_process(
    drawings: Path, tmp_path: Path, command: Command, train: Train
) -> None:
    bad = [drawings / "train" / "blue" / "00.jpg", drawings / "train" / "red" / "39.jpg"]
    bad[0].write_bytes(b"nothing")
    bad[1].write_bytes(bad[1].read_bytes()[:100])
    whole, later = tmp_path / "whole", tmp_path / "later"
    words = ["--net", "A", *FEW[:-1], "float64", "--data", drawings]
    ran = command(*words, "--out", whole)
    assert ran.status == 3
    named = Colours.read(whole / "colours.json").unreadable
    assert list(named) == ["train/blue/00.jpg", "train/red/39.jpg"]
    for name in named:
        assert name in ran.err
    assert "2 training images can't be read and are left out" in ran.err
    done = train(*words, "--out", later, processes=2)
    assert list(Colours.read(later / "colours.json").unreadable) == list(named)
    assert "train/blue/00.jpg" in done.stderr
    assert losses(later) == pytest.approx(losses(whole), rel=1e-9)

    # one that breaks after the colours were measured: its row doesn't count
    out = tmp_path / "broken"
    out.mkdir()
    shutil.copy(whole / "colours.json", out)
    for name in ("train/red/07.jpg", "val/blue/00.jpg"):
        (drawings / name).write_bytes(b"nothing")
    ran = command(*words, "--out", out, "--set=held_out=0.05", "--set=A-112.iterations=10")
    assert "unreadable, left out: train/red/07.jpg" in ran.err
    assert "unreadable, counted as an error: val/blue/00.jpg" in ran.err
    assert all(math.isfinite(loss) for loss in losses(out))


def test_what_is_no_imagenet(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--net", "A", *FEW, "--out", tmp_path / "run"]
    nowhere = command(*words, "--data", tmp_path / "nowhere")
    assert nowhere.status == 1
    assert str(tmp_path / "nowhere") in one_line(nowhere.err)
    (tmp_path / "empty").mkdir()
    empty = command(*words, "--data", tmp_path / "empty")
    assert empty.status == 1
    assert "train/WNID" in one_line(empty.err)
    monkeypatch.chdir(tmp_path)
    without = command(*words)  # ./data, where vggfeat looks, too
    assert without.status == 1
    assert f"{tmp_path}/data/train" in one_line(without.err)
    monkeypatch.setenv("VGGFEAT_DATA", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in one_line(command(*words).err)
    (drawings / "train" / "green").mkdir()
    assert "no images in the class folder" in one_line(command(*words, "--data", drawings).err)
    (drawings / "train" / "green").rmdir()
    (drawings / "val" / "red").rename(drawings / "val" / "green")
    assert "has no class of the same name" in one_line(command(*words, "--data", drawings).err)
    few = command(*words, "--data", drawings, "--set=batch_size=256")
    assert few.status == 1
    assert not (tmp_path / "run").exists()


def test_boxes_of_other_classes_and_classes_without_boxes_are_named(
    drawings: Path, tmp_path: Path
) -> None:
    """One image has a box of the other class alone; red has boxes in val alone."""
    rows = [f"train/blue/{i:02d}.jpg,blue,2,2,20,20" for i in range(1, 40)]
    rows += ["train/blue/00.jpg,red,2,2,20,20", "val/red/00.jpg,red,2,2,20,20"]
    (tmp_path / "boxes.csv").write_text("\n".join(["path,class,x1,y1,x2,y2", *rows]) + "\n")
    recipe = chain(read_recipe("mini", ["batch_size=8"], "A"), "A", task="localisation")
    images = read_training_set(drawings, recipe).with_boxes(tmp_path / "boxes.csv")
    told = images.items.remarks
    assert (
        "left out: 1 boxes of another class than their image's (train/blue/00.jpg); 1 of these"
        " images have no box of their own (train/blue/00.jpg)"
    ) in told
    assert any("no training image with a box of the class red: a net that" in line for line in told)
    its = images.of_stage(recipe.stages[-1], 8)
    row = images.items.names.index("train/blue/00.jpg")
    assert row not in {*its.train, *its.held_out} and len(its.train) + len(its.held_out) == 39
    assert images.of_stage(recipe.stages[0], 8).boxes is None
    with pytest.raises(VggfeatError, match="training images with a box are fewer"):
        images.of_stage(recipe.stages[-1], 64)


def test_a_share_of_each_class_is_held_out() -> None:
    """Of the training images, at least one a class; an image that is added or removed leaves the
    others' places.
    """
    labels = np.repeat([0, 1, 2], [1300, 732, 40]).astype(np.int32)
    names = [f"{i}.jpg" for i in range(len(labels))]
    items = Items("imagenet", "single-label", Path("."), names, labels, ["a", "b", "c"])
    train = np.arange(0, len(labels), 2)
    held_out = held_out_slice(items, train, 0.01, seed=0)
    assert np.isin(held_out, train).all()
    assert np.bincount(labels[held_out]).tolist() == [6, 4, 1]
    assert not np.array_equal(held_out, held_out_slice(items, train, 0.01, seed=1))
    fewer = held_out_slice(items, np.setdiff1d(train, held_out[:1]), 0.01, seed=0)
    assert np.isin(held_out[1:], fewer).all()
    assert len(held_out_slice(items, train, 0, seed=0)) == 0
