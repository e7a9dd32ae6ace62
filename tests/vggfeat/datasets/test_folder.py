"""Folders of images: classes, splits, what is left out, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.vggfeat.datasets.made import CLASSES_IN, fails, sizes, touch, tree
from vggfeat.datasets import load


def test_folder_of_classes(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "dog/b.JPG",
        "dog/a.png",
        "dog/more/x y/ü.webp",
        "dog/notes.txt",
        "dog/.hidden.jpg",
    )
    touch(tmp_path, "cat/1.jpg", ".cache/1.jpg", "readme.md", "dog/.thumbs/1.jpg")
    touch(tmp_path, "dog/folder.jpg/in.tif")
    items = load("folder", tmp_path)
    assert items.classes == ["cat", "dog"] and items.protocol == "single-label"
    assert items.names == [
        "cat/1.jpg",
        "dog/a.png",
        "dog/b.JPG",
        "dog/folder.jpg/in.tif",
        "dog/more/x y/ü.webp",
    ]
    assert (
        items.labels is not None
        and items.labels.tolist() == [0, 1, 1, 1, 1]
        and items.labels.dtype == np.int32
    )
    assert all(Path(str(items.source(row))).is_file() for row in range(5))


def test_folder_random_splits_are_eighty_twenty(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(100)))
    items = load("folder", tmp_path)
    assert {k: v for k, v in sizes(items).items() if "split1" in k} == {
        "split1/train": 128,
        "split1/val": 32,
        "split1/test": 40,
    }


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folder_with_given_splits(tmp_path: Path, val: str) -> None:
    touch(
        tmp_path,
        "train/cat/1.jpg",
        "train/dog/1.jpg",
        f"{val}/dog/2.jpg",
        "test/cat/3.jpg",
        "test/dog/3.jpg",
    )
    items = load("folder", tmp_path)
    assert {k: v.tolist() for k, v in items.splits.items()} == {
        "train": [0, 1],
        "val": [2],
        "test": [3, 4],
    }
    assert items.labels is not None and items.labels.tolist() == [0, 1, 1, 0, 1]
    assert items.names[2] == f"{val}/dog/2.jpg"


@pytest.mark.parametrize(
    "folders",
    [
        {"training": "train", "testing": "test"},
        {"Train": "train", "TEST": "test", "Validation": "val"},
        {"train": "train", "validate": "val", "tests": "test"},
        {"train": "train", "Validations": "val"},
        {"trn": "train", "dev": "val", "tst": "test"},
        {"trainval": "train", "hold-out": "test"},
        {"train_images": "train", "images_test": "test"},
        {"TrainingSet": "train", "test set": "test"},
        {"trainset": "train", "valset": "val"},
        {"train2017": "train", "val2017": "val"},
        {"seg_train/seg_train": "train", "seg_test/seg_test": "test"},
    ],
)
def test_the_words_for_splits_are_no_classes(tmp_path: Path, folders: dict[str, str]) -> None:
    items = load("folder", tree(tmp_path, *folders))
    assert items.classes == ["cat", "dog"] and items.remarks == ()
    assert set(items.splits) == set(folders.values())
    for folder, part in folders.items():
        assert [items.names[row] for row in items.splits[part]] == [
            f"{folder}/{name}" for name in CLASSES_IN
        ]


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["train", "eval"], ["eval may be for validation or for test"]),
        (["Train", "training"], ["both Train and training, for train"]),
        (
            ["train", "annotations"],
            ["holds train, as a split data set does, beside annotations", "rename what is a split"],
        ),
        (["train2017", "test2017", "extra"], ["holds test2017, train2017", "beside extra"]),
        (["fold1", "fold2"], ["fold1, fold2 in", "the same folders, cat, dog", "CSV file"]),
        (["2019", "2020", "2021"], ["2019, 2020, 2021 in", "the same folders"]),
        (
            ["train/fold1", "train/fold2", "test/fold1"],
            ["fold1, fold2 in", "the same folders, cat, dog"],
        ),
        (["photos"], ["only photos has images, in the folders cat, dog", "give `root`"]),
    ],
)
def test_parts_by_other_names_are_no_classes_either(
    tmp_path: Path, folders: list[str], said: list[str]
) -> None:
    tree(tmp_path, *folders)
    (
        touch(tmp_path, f"{folders[-1]}/owl/1.jpg")
        if len(folders) > 1
        else touch(tmp_path, "notes/x.txt")
    )
    fails("folder", tmp_path, str(tmp_path), *said)


def test_splits_inside_the_classes_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, "cat", "dog", names=("train/1.jpg", "test/2.jpg"))
    fails(
        "folder", tmp_path, "cat, dog in", "hold the same folders, test, train", "above the classes"
    )


def test_a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/1.jpg" for name in ("bus", "cat", "train")))  # VOC's
    items = load("folder", tmp_path)
    assert (
        items.classes == ["bus", "cat", "train"] and "taken for classes: train" in items.remarks[0]
    )
    touch(tmp_path, "dev/more/1.jpg")  # a part of a data set would hold folders and no images
    fails("folder", tmp_path, "holds dev, train", "beside bus, cat", "CSV file")
    touch(tmp_path, "steam/steam train/1.jpg", "steam/bullet train/1.jpg", "steam/test tube/1.jpg")
    items = load("folder", tmp_path / "steam")
    assert items.classes == ["bullet train", "steam train", "test tube"] and items.remarks == ()
    touch(tmp_path, "both/bus/1.jpg", "both/train/1.jpg", "both/test/1.jpg")
    fails("folder", tmp_path / "both", "holds test, train", "beside bus")


def test_a_folder_that_every_class_has_is_no_class(tmp_path: Path) -> None:
    tree(tmp_path, "train/n01", "train/n02", "val/n01", names=("images/1.jpg",))  # Tiny ImageNet's
    assert load("folder", tmp_path).classes == ["n01", "n02"]


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    touch(
        tmp_path, "cat/1.jpg", "dog/2.jpg", "cat/a.HEIC", "dog/sub/b.heic", "cat/x.txt", "all.zip"
    )
    (remark,) = load("folder", tmp_path).remarks
    assert (
        remark
        == "left out: 4 files without an image's ending (.heic 2, .txt 1, .zip 1), for example"
        " cat/a.HEIC; to have pictures of .heic described, save them as JPEG or PNG"
    )
    touch(
        tmp_path,
        "cat/.h.jpg",
        ".DS_Store",
        "cat/IMG",
        "cat/1.jpg.part",
        "cat/3.JPG ",
        "cat/4." + "x" * 99,
    )
    (tmp_path / "dog" / "up").symlink_to(tmp_path)
    (remark,) = load("folder", tmp_path).remarks
    assert "8 files without an image's ending (.heic 2, no ending 1, '.jpg ' 1" in remark
    assert "2 hidden files or folders, for example .DS_Store; 1 linked folder: dog/up" in remark
    assert "a CSV file may list pictures of any ending" in remark and len(remark) < 500
    assert load("folder", tmp_path / "cat").remarks[0].startswith("left out: 6 files")


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.heic", "cat/b.HEIC", "dog/1.jpg")
    fails(
        "folder",
        tmp_path,
        f"class folder {tmp_path}/cat",
        "2 files",
        "(.heic 2)",
        "save them as JPEG",
    )
    fails("folder", tmp_path / "cat", "no images", "(.heic 2)", "save them as JPEG")


def test_one_folder_under_two_names_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "train")
    (tmp_path / "test").symlink_to("train")
    fails("folder", tmp_path, "train and test", "the same folder")
    (tmp_path / "train" / "cow").symlink_to("dog")
    fails("folder", tmp_path / "train", "cow and dog", "the same folder")


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a b.PNG", "x.txt")
    items = load("folder", tmp_path)
    assert (items.names, items.labels, items.protocol) == (["a b.PNG", "b.jpg"], None, "unlabelled")
    assert items.splits == {} and items.classes == []


def test_folder_faults_say_what_to_do(tmp_path: Path) -> None:
    fails("folder", None, "needs `root`")
    fails("folder", tmp_path / "none", str(tmp_path / "none"))
    fails("folder", tmp_path, "no images", str(tmp_path))
    touch(tmp_path, "file", "mixed/cat/1.jpg", "mixed/2.jpg")
    fails("folder", tmp_path / "file", str(tmp_path / "file"))
    fails("folder", tmp_path / "mixed", "2.jpg", "cat", "move")
    touch(tmp_path, "gap/cat/1.jpg", "gap/dog/x.txt")
    fails("folder", tmp_path / "gap", str(tmp_path / "gap" / "dog"))
    touch(tmp_path, "flat/train/cat/1.jpg", "flat/test/1.jpg")
    fails("folder", tmp_path / "flat", str(tmp_path / "flat" / "test"), "one folder per class")
    touch(tmp_path, "new/train/cat/1.jpg", "new/test/dog/1.jpg")
    fails("folder", tmp_path / "new", str(tmp_path / "new" / "test" / "dog"), "train")
    touch(tmp_path, "twice/train/cat/1.jpg", "twice/val/cat/1.jpg", "twice/valid/cat/1.jpg")
    fails("folder", tmp_path / "twice", "val", "valid")
    touch(tmp_path, "extra/train/cat/1.jpg", "extra/test/cat/1.jpg", "extra/annotations/1.jpg")
    fails("folder", tmp_path / "extra", "annotations")


@pytest.mark.skipif(os.name == "nt", reason="POSIX file names, links and pipes")
def test_folder_links_pipes_and_odd_names(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/1.jpg", "root/a/1.jpg")
    root = tmp_path / "root"
    (root / "b").symlink_to(tmp_path / "elsewhere")  # a linked class is followed
    (tmp_path / "elsewhere" / "up").symlink_to(root)  # a loop is not
    (root / "a" / "dangling.jpg").symlink_to("nowhere")
    (root / "a" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (root / "a" / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(root / "a" / "pipe.jpg")
    latin1 = os.fsencode(root / "a") + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(latin1)).touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    items = load("folder", root)
    assert items.names == [
        "a/1.jpg",
        "a/caf\udce9.jpg",
        "a/dangling.jpg",
        "a/linked.jpg",
        "a/self.jpg",
        "b/1.jpg",
    ]
    assert os.fsencode(str(items.source(1))) == latin1


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [("folder", ""), ("caltech101", "101_ObjectCategories"), ("imagenet", "train")],
)
@pytest.mark.parametrize("target", [".", ".."])
def test_a_class_that_links_upwards_is_refused(
    tmp_path: Path, dataset: str, folder: str, target: str
) -> None:
    """It would hold the images of all the others, under a second label."""
    root = tmp_path / "root" / folder
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.jpg").touch()
    load(dataset, tmp_path / "root")
    (root / "c").symlink_to(target)
    fails(dataset, tmp_path / "root", str(root / "c"), "is a link to a folder that holds it")
