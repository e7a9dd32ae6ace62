"""Datasets: real VOC-2007 lists, Caltech-101 and ImageNet folders first, then made-up trees and
faults.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Command
from vggfeat import cli, look
from vggfeat.datasets import Items, at_hand, describe_datasets, load, random_splits, refuse_absent
from vggfeat.datasets.protocol import PROTOCOLS
from vggfeat.datasets.voc import CLASSES, check_submission, write_submission
from vggfeat.errors import VggfeatError

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data")


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def fails(name: str, root: Path | None, *expected: str, download: bool = False) -> None:
    """Loading fails with one line that holds every expected piece."""
    with pytest.raises(VggfeatError) as caught:
        load(name, root, download=download)
    message = str(caught.value)
    assert "\n" not in message
    for piece in expected:
        assert piece in message, message


def sizes(items: Items) -> dict[str, int]:
    return {name: len(rows) for name, rows in items.splits.items()}


# --- numeric truths on real files -----------------------------------------------------------------


@needs_data
def test_voc2007_has_the_devkit_counts() -> None:
    items = load("voc2007", DATA / "voc2007_lists")
    assert sizes(items) == {"train": 2501, "val": 2510, "test": 4952}
    assert (
        items.labels is not None
        and items.labels.shape == (9963, 20)
        and items.labels.dtype == np.int8
    )
    assert items.classes == sorted(items.classes) and items.names == sorted(items.names)
    # The devkit numbers its 9,963 images without a gap.
    assert [items.names[0], items.names[-1]] == ["JPEGImages/000001.jpg", "JPEGImages/009963.jpg"]
    assert np.array_equal(np.sort(np.concatenate(list(items.splits.values()))), np.arange(9963))
    trainval = np.concatenate([items.splits["train"], items.splits["val"]])
    aeroplane = items.labels[:, items.classes.index("aeroplane")]
    assert ((aeroplane[trainval] == 1).sum(), (aeroplane[items.splits["test"]] == 1).sum()) == (
        238,
        204,
    )
    assert items.protocol == "voc2007"


@needs_data
@pytest.mark.parametrize("name", ["aeroplane", "diningtable", "tvmonitor"])
def test_voc2007_labels_are_the_lists_own_values(name: str) -> None:
    items = load("voc2007", DATA / "voc2007_lists" / "VOC2007")
    assert items.labels is not None
    row_of = {Path(n).stem: row for row, n in enumerate(items.names)}
    column = items.labels[:, items.classes.index(name)]
    # trainval.txt is not what the reader uses, so this compares two sources.
    for split in ("trainval", "test"):
        lines = (items.root / "ImageSets" / "Main" / f"{name}_{split}.txt").read_text().split()
        pairs = dict(zip(lines[::2], map(int, lines[1::2]), strict=True))
        assert len(pairs) == {"trainval": 5011, "test": 4952}[split]
        assert {image: int(column[row_of[image]]) for image in pairs} == pairs
    assert {-1, 0, 1} == set(column.tolist())


@needs_data
def test_caltech101_protocol_sizes() -> None:
    items = load("caltech101", DATA / "caltech101")
    assert items.labels is not None and len(items.classes) == 102 and len(items) == 4772
    assert items.classes[:4] == ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards"]
    n_of_class = np.bincount(items.labels)
    for split in range(3):
        count = {
            part: np.bincount(items.labels[items.splits[f"split{split}/{part}"]], minlength=102)
            for part in ("train", "val", "test")
        }
        assert (count["train"] == 24).all() and (count["val"] == 6).all()
        assert np.array_equal(count["test"], np.minimum(50, n_of_class - 30))
    assert (
        items.source(0) == DATA / "caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg"
    )
    assert load("caltech101", DATA / "caltech101" / "101_ObjectCategories").names == items.names
    assert load("caltech101", DATA).names == items.names


@needs_data
def test_imagenette_in_the_ilsvrc_layout() -> None:
    items = load("imagenet", DATA / "imagenette144")
    assert sizes(items) == {"train": 9469, "val": 1000} and items.labels is not None
    assert (
        items.classes[0] == "n01440764"
        and len(items.classes) == 10
        and items.protocol == "single-label"
    )
    assert np.bincount(items.labels[items.splits["val"]]).tolist() == [100] * 10
    for row in (0, 5000, 9469, 10468):
        assert items.names[row].split("/")[1] == items.classes[items.labels[row]]
        assert Path(items.source(row)).is_file()


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    items = load("digits")
    assert items.images is not None and items.labels is not None
    assert items.images.shape == (1797, 8, 8) and items.images.dtype == np.uint8
    assert items.images.min() == 0 and items.images.max() == 255
    assert np.abs(items.images * (16 / 255) - load_digits().images).max() < 0.04
    assert np.bincount(items.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (items.names[7], items.classes[3]) == ("digits/0007", "3")
    assert np.shares_memory(items.source(5), items.images[5])


# --- random splits --------------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(-1, 5), min_size=1, max_size=120).filter(lambda x: max(x) >= 0),
    n_train=st.one_of(st.integers(1, 40), st.floats(0.01, 0.99)),
    max_test=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 2**40),
)
def test_random_splits_are_disjoint_sorted_and_sized(
    labels: list[int], n_train: float, max_test: int | None, seed: int
) -> None:
    y = np.array(labels, np.int32)
    splits = random_splits(y, n_train=n_train, max_test=max_test, seed=seed)
    assert len(splits) == 9
    for k in range(3):
        train, val, test = (splits[f"split{k}/{part}"] for part in ("train", "val", "test"))
        rows = np.concatenate([train, val, test])
        assert rows.dtype == np.int64 and len(np.unique(rows)) == len(rows) and (y[rows] >= 0).all()
        assert all((np.diff(part) > 0).all() for part in (train, val, test))
        for c in set(labels) - {-1}:
            n = labels.count(c)
            n_fit = (y[train] == c).sum() + (y[val] == c).sum()
            assert (y[train] == c).sum() >= 1 and (n_fit == 1 or (y[val] == c).sum() >= 1)
            if isinstance(n_train, int):
                assert n_fit == (1 if n == 1 else min(n_train, n - 1))
            n_test = (y[test] == c).sum()
            assert n_test == (n - n_fit if max_test is None else min(max_test, n - n_fit))
            assert n_test >= 1 or n == 1


def test_a_class_is_drawn_alike_whatever_the_others_hold() -> None:
    alone = random_splits(np.array([-1] * 50 + [1] * 40), n_train=30, max_test=None)
    beside = random_splits(np.array([0] * 50 + [1] * 40), n_train=30, max_test=None)
    for name, rows in alone.items():
        assert np.array_equal(rows, beside[name][beside[name] >= 50])
    one = random_splits(np.array([0] * 90), n_train=30, max_test=None, n_splits=1)
    three = random_splits(np.array([0] * 90), n_train=30, max_test=None)
    assert np.array_equal(one["split0/train"], three["split0/train"])
    other_seed = random_splits(np.array([0] * 90), n_train=30, max_test=None, seed=1)
    draws = {tuple(s[f"split{k}/train"]) for s in (three, other_seed) for k in range(3)}
    assert len(draws) == 6


def test_two_classes_of_one_size_are_not_drawn_alike() -> None:
    train = random_splits(np.repeat([0, 1], 60), n_train=30, max_test=None)["split0/train"]
    assert train[train < 60].tolist() != (train[train >= 60] - 60).tolist()


def test_random_splits_of_several_labels_are_one_pool() -> None:
    labels = np.array([[1, -1], [-1, 1], [0, 0], [-1, -1], [0, 1]] * 20, np.int8)
    splits = random_splits(labels, n_train=0.8, max_test=None, n_splits=1)
    assert [len(splits[f"split0/{part}"]) for part in ("train", "val", "test")] == [51, 13, 16]
    assert not any((rows % 5 == 2).any() for rows in splits.values())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"n_train": 1.5}, "1.5"),
        ({"n_train": 0}, "training image"),
        ({"n_train": 3, "max_test": 0}, "test image"),
        ({"n_train": 3, "val_fraction": 1.0}, "validation fraction"),
        ({"n_train": 3, "seed": -1}, "seed"),
    ],
)
def test_random_splits_reject_bad_settings(setting: dict, said: str) -> None:
    with pytest.raises(VggfeatError, match=said):
        random_splits(np.zeros(9, np.int32), **{"max_test": None, **setting})
    with pytest.raises(VggfeatError, match="no image has a label"):
        random_splits(np.full(9, -1, np.int32), n_train=3, max_test=None)


# --- VOC ------------------------------------------------------------------------------------------


def make_voc(
    folder: Path, lists: dict[str, list[str]], labelled: tuple[str, ...] = ("train", "val")
) -> Path:
    """A small devkit: every image shows class number (its own number modulo 20). Gives
    ImageSets/Main.
    """
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True)
    for split, ids in lists.items():
        (main / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for c, name in enumerate(CLASSES):
            if split in labelled:
                lines = (f"{i} {' 1' if int(i[-6:]) % 20 == c else '-1'}\r\n" for i in ids)
                (main / f"{name}_{split}.txt").write_text("".join(lines))
    return main


LISTS_2012 = {
    "train": ["2009_000003", "2008_000021"],
    "val": ["2008_000002"],
    "test": ["2008_000001"],
}


@pytest.mark.parametrize("root", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc2012_from_any_of_three_roots(tmp_path: Path, root: str) -> None:
    make_voc(tmp_path / "VOCdevkit" / "VOC2012", LISTS_2012)
    items = load("voc2012", tmp_path / root)
    assert items.root == tmp_path / "VOCdevkit" / "VOC2012" and items.protocol == "voc2012"
    ids = ["2008_000001", "2008_000002", "2008_000021", "2009_000003"]
    assert items.names == [f"JPEGImages/{i}.jpg" for i in ids]
    assert {k: v.tolist() for k, v in items.splits.items()} == {
        "train": [2, 3],
        "val": [1],
        "test": [0],
    }
    assert items.labels is not None
    assert items.labels[0].tolist() == [0] * 20  # the server knows
    assert [items.labels[row].tolist().index(1) for row in (1, 2, 3)] == [2, 1, 3]
    assert (items.labels[1:].sum(axis=1) == -18).all()


def test_voc_without_a_test_list(tmp_path: Path) -> None:
    make_voc(tmp_path / "mine", {"train": ["000001"], "val": ["000002"]})
    items = load("voc2007", tmp_path / "mine")
    assert sizes(items) == {"train": 1, "val": 1}
    # all that was read is known as that, so that no command writes there
    assert set((tmp_path / "mine").rglob("*.txt")) < set(items.paths())
    assert items.remarks == (
        (
            "voc2007 with 1 train images instead of 2,501, 1 val images instead of 2,510, 0 test"
            " images instead of 4,952: no figure of these is its protocol's"
        ),
    )
    (tmp_path / "mine" / "ImageSets" / "Main" / "cow_test.txt").touch()
    assert "no test.txt" in load("voc2007", tmp_path / "mine").remarks[0]


def test_voc_faults_name_the_file_and_the_line(tmp_path: Path) -> None:
    fails(
        "voc2007",
        tmp_path,
        str(tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"),
        "add `download`",
    )
    main = make_voc(tmp_path / "VOC2012", LISTS_2012, labelled=("train", "val", "test"))
    fails("voc2007", tmp_path / "VOC2012", "VOCdevkit")  # another year's folder
    good = {path: path.read_text() for path in main.iterdir()}

    def broken(file: str, text: str | None, *expected: str) -> None:
        (main / file).unlink() if text is None else (main / file).write_text(text)
        fails("voc2012", tmp_path, str(main / file), *expected)
        (main / file).write_text(good[main / file])

    broken("train.txt", None, "no file")
    broken("cow_val.txt", None, "no file")
    broken("cow_test.txt", None, "no file")  # the other classes have theirs
    broken("train.txt", "2009_000003\n\n2008_000021 1\n", "line 3")
    broken("val.txt", "2008_000002\n2008_000002\n", "line 2", "twice")
    broken("cow_train.txt", "2009_000003 -1\n2008_000021 2\n", "line 2", "1, 0 or -1")
    broken("cow_train.txt", "2009_000003 -1\n2008_000021\n", "line 2")
    broken("cow_train.txt", "2009_000003 -1\n", "no label for 1 images", "2008_000021")
    broken(
        "cow_train.txt", "2009_000003 -1\n2008_000099 -1\n", "line 2", "2008_000099", "train.txt"
    )
    (main / "val.txt").write_text("2009_000003\n")
    fails("voc2012", tmp_path, "train.txt, val.txt, test.txt")


# --- Caltech --------------------------------------------------------------------------------------


def test_caltech256_takes_only_a_class_folders_own_jpegs(tmp_path: Path) -> None:
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    touch(folder, *(f"001.ak47/001_{i:04d}.jpg" for i in range(1, 131)))
    touch(folder, *(f"056.dog/056_{i:04d}.jpg" for i in range(1, 41)))
    touch(
        folder,
        "056.dog/greg/vision309/x.jpg",
        "198.spider/198_0001.jpg",
        "198.spider/RENAME2",
        "readme.jpg",
    )
    touch(folder, "198.spider/._198_0001.jpg", "198.spider/x.png")
    (folder / "198.spider" / "d.jpg").mkdir()
    items = load("caltech256", tmp_path)
    remark, counts = items.remarks
    assert (
        counts == "caltech256 with 3 classes instead of 257: no figure of these is its protocol's"
    )
    for piece in (
        "(no ending 1)",
        "198.spider/RENAME2",
        "2 folders inside a class",
        "other than .jpg",
        "readme.jpg",
    ):
        assert piece in remark
    assert items.classes == ["001.ak47", "056.dog", "198.spider"] and items.labels is not None
    assert np.bincount(items.labels).tolist() == [130, 40, 1]
    test = items.labels[items.splits["split2/test"]]
    assert np.bincount(test, minlength=3).tolist() == [
        70,
        1,
        0,
    ]  # 60 train, 39 train, its only image
    (folder / "198.spider" / "198_0001.jpg").unlink()
    fails("caltech256", tmp_path, str(folder / "198.spider"))


def test_caltech_faults(tmp_path: Path) -> None:
    where = str(tmp_path / "caltech101" / "101_ObjectCategories")
    fails("caltech101", tmp_path, where, "give `root`", "add `download`")
    fails("caltech101", None, "needs `root`")
    (tmp_path / "101_ObjectCategories").mkdir()
    fails("caltech101", tmp_path, "no class folders", str(tmp_path / "101_ObjectCategories"))


# --- ImageNet -------------------------------------------------------------------------------------


def test_imagenet_with_one_of_its_parts(tmp_path: Path) -> None:
    fails("imagenet", tmp_path, str(tmp_path / "train"), str(tmp_path / "val"))
    touch(tmp_path, "val/n02/b.JPEG", "val/n02/a.JPEG", "val/n01/c.JPEG")
    items = load("imagenet", tmp_path)
    assert items.names == ["val/n01/c.JPEG", "val/n02/a.JPEG", "val/n02/b.JPEG"] and sizes(
        items
    ) == {"val": 3}
    touch(tmp_path, "train/n00/d.JPEG", "train/n02/e.JPEG")
    fails("imagenet", tmp_path, str(tmp_path / "val" / "n01"))
    touch(tmp_path, "train/n01/f.JPEG")
    items = load("imagenet", tmp_path)
    assert items.labels is not None and items.labels.tolist() == [
        0,
        1,
        2,
        1,
        2,
        2,
    ]  # train's classes number val


def test_imagenet_by_other_words_and_beside_other_things(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "Training/n01/a.JPEG",
        "Validation/n01/b.JPEG",
        "test/1.JPEG",
        "devkit/a.txt",
        "x.tar",
        "y.jpg",
    )
    items = load("imagenet", tmp_path)
    assert items.names == ["Training/n01/a.JPEG", "Validation/n01/b.JPEG"] and sizes(items) == {
        "train": 1,
        "val": 1,
    }
    (remark,) = items.remarks
    for piece in ("(.tar 1)", "1 folder beside Training and Validation: devkit", "y.jpg"):
        assert piece in remark
    touch(tmp_path, "test/n01/1.JPEG")  # ILSVRC's own are flat
    assert (
        "2 folders beside Training and Validation, for example devkit"
        in load("imagenet", tmp_path).remarks[0]
    )
    touch(tmp_path, "train/n01/a.JPEG")  # the plain word goes before
    assert load("imagenet", tmp_path).names == ["train/n01/a.JPEG", "Validation/n01/b.JPEG"]
    touch(tmp_path, "valid/n01/b.JPEG")
    fails("imagenet", tmp_path, "both Validation and valid, for val")


def test_imagenet_with_the_flat_official_val(tmp_path: Path) -> None:
    touch(tmp_path, "train/n01/a.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    fails("imagenet", tmp_path, str(tmp_path / "val"), "synset id")


# --- folder ---------------------------------------------------------------------------------------


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
    assert all(Path(items.source(row)).is_file() for row in range(5))


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


CLASSES_IN = ("cat/1.jpg", "dog/2.jpg")


def tree(root: Path, *folders: str, names: tuple[str, ...] = CLASSES_IN) -> Path:
    touch(root, *(f"{folder}/{name}" for folder in folders for name in names))
    return root


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


def test_lists_without_images_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    make_voc(tmp_path / "VOC2007", {"train": ["000001"], "val": ["000002"]})
    items = load("voc2007", tmp_path)
    with pytest.raises(
        VggfeatError, match=r"none of the 2 images of voc2007 is there.*000001.jpg.*`download`"
    ):
        refuse_absent(items)
    assert at_hand("voc2007", items.names, tmp_path, "")[0] is None
    touch(tmp_path / "VOC2007", "JPEGImages/000002.jpg")
    refuse_absent(items)  # some are: the others are told of one by one
    text = "path,label\n" + "".join(f"{i}.jpg,cat\n" for i in range(3))
    items = load("csv", write(tmp_path, text))
    with pytest.raises(
        VggfeatError, match=r"none of the 3 images.*0.jpg: paths are relative to the CSV file's"
    ):
        refuse_absent(items)
    tree(tmp_path / "links", "a")
    (tmp_path / "links" / "b").mkdir()
    (tmp_path / "links" / "b" / "1.jpg").symlink_to("nowhere")
    with pytest.raises(VggfeatError, match="links that lead nowhere"):
        refuse_absent(load("folder", tmp_path / "links" / "b"))


def test_extract_begins_nothing_without_images(tmp_path: Path, run_main: Command) -> None:
    make_voc(tmp_path / "VOC2007", {"train": ["000001"], "val": ["000002"]})
    words = (
        "--weights",
        "random:A,width=0.03125,crop=32",
        "--scales",
        "32",
        "--out",
        tmp_path / "f.h5",
    )
    ran = run_main(cli.main, "extract", "--dataset", "voc2007", "--root", tmp_path, *words)
    assert ran.status == 1 and "none of the 2 images of voc2007 is there" in ran.err
    assert len(ran.err_lines) == 1 and not list(tmp_path.glob("f.h5*"))


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
    assert os.fsencode(items.source(1)) == latin1


# --- CSV ------------------------------------------------------------------------------------------


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "data.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_csv_single_label_with_splits(tmp_path: Path) -> None:
    rows = ['"a, b.jpg", dog ,train', "./x/1.jpg,cat,Val", "", "/abs.jpg,,test", "z.jpg,cat,"]
    text = "\r\n".join(["\ufeffPath, Label,split", *rows])
    items = load("csv", write(tmp_path, text))
    assert items.names == ["a, b.jpg", "x/1.jpg", "/abs.jpg", "z.jpg"]
    assert items.labels is not None and items.labels.tolist() == [1, 0, -1, 0]
    assert items.labels.dtype == np.int32 and items.classes == ["cat", "dog"]
    # Row 2 has no label and row 3 no split.
    assert {k: v.tolist() for k, v in items.splits.items()} == {"train": [0], "val": [1]}
    assert items.source(1) == tmp_path / "x/1.jpg" and items.source(2) == Path("/abs.jpg")


def test_csv_several_labels(tmp_path: Path) -> None:
    text = "path,labels\na.jpg,dog; person\nb.jpg,?dog\nc.jpg,\nd.jpg,;\ne.jpg,dog;?dog;?cat\n"
    items = load("csv", write(tmp_path, text))
    assert items.protocol == "multi-label" and items.classes == ["cat", "dog", "person"]
    assert items.labels is not None and items.labels.dtype == np.int8
    assert items.labels.tolist() == [[-1, 1, 1], [-1, 0, -1], [0, 0, 0], [-1, -1, -1], [0, 1, -1]]
    assert sizes(items) == {
        f"split{k}/{p}": n for k in range(3) for p, n in (("train", 2), ("val", 1), ("test", 1))
    }


def test_csv_without_splits_is_split_class_by_class(tmp_path: Path) -> None:
    rows = "".join(f"{c}{i}.jpg,{c},\n" for c in "ab" for i in range(50))
    items = load("csv", write(tmp_path, "path,label,split\n" + rows))
    assert items.labels is not None and items.protocol == "single-label"
    for part, n in (("train", 32), ("val", 8), ("test", 10)):
        assert np.bincount(items.labels[items.splits[f"split0/{part}"]]).tolist() == [n, n]


def test_csv_without_labels_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    items = load("csv", write(tmp_path, b"path,label\ncaf\xe9.jpg,\n a.jpg ,\n"))
    assert (items.labels, items.protocol, items.splits) == (None, "unlabelled", {})
    assert items.names == ["caf\udce9.jpg", " a.jpg "]  # spaces belong to a file's name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["line 1", "empty"]),
        ("path,label\n", ["line 2", "no images"]),
        ("a.jpg,cat\n", ["line 1", "header", "a.jpg,cat"]),
        ("file;label\na;b\n", ["line 1", "header"]),
        ("path,label,width\na.jpg,cat,3\n", ["line 1", "header"]),
        ("path,label\na.jpg,cat,train\n", ["line 2", "3 columns"]),
        ("path,label\na.jpg,cat\nb.jpg\n", ["line 3", "1 columns"]),
        ("path,label\na.jpg,cat\n./a.jpg,dog\n", ["line 3", "a.jpg", "twice", "line 2"]),
        ("path,label,split\na.jpg,cat,fold1\n", ["line 2", "train, val, test", "fold1"]),
        ("path,label,split\na.jpg,cat,eval\n", ["line 2", "train, val, test", "eval"]),
        ("path,label\nC:\\a.jpg,cat\n", ["line 2", "on a Windows disk"]),
        ("path,label\nhttps://x.org/a.jpg,cat\n", ["line 2", "is an address"]),
        (
            "path,label\nd/../a.jpg,cat\na.jpg,dog\n",
            ["line 3", "twice", "'cat;dog' in a column labels"],
        ),
        (
            "path,label,split\na.jpg,cat,train\na.jpg,cat,test\n",
            ["line 3", "in train there, in test here"],
        ),
        ("path,labels,split\na.jpg,cat;dog,\na.jpg,cat,\n", ["line 3", "twice", "other labels"]),
        ("path,label\na.jpg,cat|dog\n", ["line 2", "'cat|dog'", "write a labels column"]),
        (
            "path,label\na.jpg,cat\nb.jpg,cat;dog\n",
            ["line 3", "'cat;dog'", "write a labels column"],
        ),
        (
            'path,label\na.jpg,cat\nb.jpg,dog\nc.jpg,"cat,dog"\n',
            ["line 4", "not 'cat,dog'", "a labels column", "as 'cat;dog'", "rename it"],
        ),
        (
            "path,label\na.jpg,cat/dog\nb.jpg,dog\nc.jpg,cat\n",
            ["line 2", "not 'cat/dog'", "as 'cat;dog'"],
        ),
        (
            'path,label\na.jpg,"a,b"\nb.jpg,"b,c"\nc.jpg,"a,c"\n',
            ["line 2", "not 'a,b'", "as 'a;b'"],
        ),
        (
            "path,label\na.jpg,cat\nb.jpg,NaN\n",
            ["line 3", "'NaN' would be a class", "an empty cell"],
        ),
        ("path,label\na.jpg,None\n", ["line 2", "'None' would be a class", "an empty cell"]),
        (
            "path,labels\na.jpg,cat;dog\nb.jpg,NULL\n",
            ["line 3", "'NULL' would be a class", "an empty cell"],
        ),
        ("path,label\na.jpg,N/A\n", ["line 2", "'N/A' would be a class", "an empty cell"]),
        (
            "path,labels\na.jpg,cat\nb.jpg,cat|dog\n",
            ["line 3", "'cat|dog' is one label", "cat;dog", "'cat|dog;'"],
        ),
        ('path,labels\na.jpg,"cat, dog"\nb.jpg,dog\n', ["line 2", "'cat, dog' is one label"]),
        (
            "path,labels\na.jpg,cat dog\nb.jpg,dog\nc.jpg,cat\n",
            ["line 2", "'cat dog' is one label"],
        ),
        ("path,labels\na.jpg,\"['cat', 'owl']\"\n", ["line 2", "would be one label"]),
        (
            "path,cat,dog\na.jpg,1,0\nb.jpg,2,1\n",
            ["line 3", "'cat' is none of path, label", "0 or 1, not '2'"],
        ),
        (
            "path,cat,dog\na.jpg,1,-1\n",
            ["line 2", "not '-1': 1 (or True) where the class is present, 0 (or False)"],
        ),
        ("path,cat,dog\na.jpg,yes,1\n", ["line 2", "0 or 1, not 'yes'"]),
        ("path,cat,dog\na.jpg,1,\n", ["line 2", "'dog'", "0 or 1, not ''"]),
        ("path,label\n,cat\n", ["line 2", "path"]),
        ("path,labels\na.jpg,cat;?\n", ["lone ?"]),
        ("path,labels\na.jpg,;\n", ["no row has a label"]),
        ('path,label\n"' + "x" * 200_000 + '",cat\n', ["line 2", "field", "a quote"]),
        (
            'path,label\na.jpg,"cat\nb.jpg,dog\nc.jpg,owl\n',
            ["line 2", "a quote is opened here and not closed"],
        ),
        ('path,label\na.jpg,cat\n"b.jpg,dog\n\nc.jpg,"owl"\n', ["line 3", "a quote is opened"]),
        ('path,"label\na.jpg,cat\n', ["line 1", "a quote is opened"]),
        ('path,label\r\n\r\na.jpg,"cat\r\n"\r\n', ["line 3", "a cell has a line end"]),
    ],
)
def test_csv_faults_name_the_file_and_the_line(tmp_path: Path, text: str, said: list[str]) -> None:
    path = write(tmp_path, text)
    fails("csv", path, str(path), *said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("path,label\na.jpg,cat\n".encode("utf-16-le"), "UTF-16 without its mark"),
        (b"PK\3\4 and so on", "a spreadsheet or an archive: save it as CSV"),
        ("path,label\na.jpg,c\xe4t\n".encode("cp1252"), "line 2: the label"),
        ("path,label\na.jpg,cat\n".encode("utf-16") + b"\0", "is not utf-16"),
    ],
)
def test_csv_that_is_not_utf8_says_so(tmp_path: Path, content: bytes, said: str) -> None:
    fails("csv", write(tmp_path, content), str(tmp_path / "data.csv"), said, "UTF-8")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_as_spreadsheets_save_it(tmp_path: Path, separator: str, encoding: str) -> None:
    rows = [
        ["Split", "Path", "Label", ""],
        ["Training", "\xe4.jpg", "c\xe4t", ""],
        ["TEST", "b.jpg", "dog", ""],
    ]
    text = "\r\n".join(separator.join(row) for row in rows)
    items = load("csv", write(tmp_path, text.encode(encoding)))
    assert items.names == ["\xe4.jpg", "b.jpg"] and items.classes == ["c\xe4t", "dog"]
    assert {k: v.tolist() for k, v in items.splits.items()} == {"train": [0], "test": [1]}
    assert len(items.remarks) == 1 and items.remarks[0].startswith("no training image of 'dog'")


def test_csv_words_for_splits(tmp_path: Path) -> None:
    words = ["training", "Train_Set", "validate", "dev", "testing", "TST", ""]
    text = "path,label,split\n" + "".join(f"{i}.jpg,cat,{word}\n" for i, word in enumerate(words))
    splits = load("csv", write(tmp_path, text)).splits
    assert {k: v.tolist() for k, v in splits.items()} == {
        "train": [0, 1],
        "val": [2, 3],
        "test": [4, 5],
    }


def test_csv_names_of_one_label_are_not_questioned(tmp_path: Path) -> None:
    labels = ["tench, Tinca tinca", "traffic light", "great white shark"]
    text = "path,labels\n" + "".join(f'{i}.jpg,"{label}"\n' for i, label in enumerate(labels))
    assert load("csv", write(tmp_path, text)).classes == sorted(labels)
    several = (  # the ; says that it is known
        'path,labels\na.jpg,"crane, bird;"\nb.jpg,"crane, machine"\n'
    )
    assert load("csv", write(tmp_path, several)).classes == ["crane, bird", "crane, machine"]
    one = (  # all ImageNet's
        'path,label\na.jpg,"maillot, tank suit"\nb.jpg,maillot\nc.jpg,ski pole\nd.jpg,ski\n'
    )
    assert load("csv", write(tmp_path, one)).classes == [
        "maillot",
        "maillot, tank suit",
        "ski",
        "ski pole",
    ]


def test_csv_with_a_column_a_class(tmp_path: Path) -> None:
    text = "path,dog,Cat,split\na.jpg,1,0,train\nb.jpg,1.0,1,train\nc.jpg,0,0,test\nd.jpg,,,test\n"
    items = load("csv", write(tmp_path, text))
    assert items.protocol == "multi-label" and items.classes == ["dog", "Cat"]
    assert items.remarks == ("columns taken for classes: dog, Cat",)
    assert items.labels is not None and items.labels.dtype == np.int8
    assert items.labels.tolist() == [[1, -1], [1, 1], [-1, -1], [0, 0]]
    assert {k: v.tolist() for k, v in items.splits.items()} == {"train": [0, 1], "test": [2]}
    items = load("csv", write(tmp_path, "path,dog,cat\na.jpg,0,1\nb.jpg,1,0\nc.jpg,,\n"))
    assert items.protocol == "single-label" and items.labels is not None
    assert items.labels.tolist() == [1, 0, -1] and items.labels.dtype == np.int32
    assert items.remarks[1:] == ("each row of data.csv has one 1: read as one label an image",)
    many = ",".join(f"c{i}" for i in range(22))
    items = load("csv", write(tmp_path, f"path,{many}\na.jpg{',1' * 22}\n"))
    assert items.remarks[0].endswith("c18, c19 and 2 more")
    assert load("csv", write(tmp_path, "path,cat,train\na.jpg,1,1\n")).classes == [
        "cat",
        "train",
    ]  # as VOC's
    assert load("csv", write(tmp_path, "path,class1,class2\na.jpg,1,1\n")).classes == [
        "class1",
        "class2",
    ]


def test_csv_line_that_names_the_separator_is_no_header(tmp_path: Path) -> None:
    for mark in ("sep=;", '"sep=;"', "\ufeffSEP=;"):
        items = load("csv", write(tmp_path, f"{mark}\r\npath;label\r\na.jpg;cat\r\n"))
        assert (items.names, items.classes) == (["a.jpg"], ["cat"])


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (",path,label", "leave out the column 1, which has no name (index=False in pandas)"),
        ("Unnamed: 0,path,label", "leave out the column 'Unnamed: 0' (index=False in pandas)"),
        ("filename,label", "rename 'filename' to path"),
        ("Image;label", "rename 'Image' to path"),
        ("img_path,class", "rename 'img_path' to path"),
        ("path,class", "rename 'class' to label"),
        ("path,category,split", "rename 'category' to label"),
        ("path,tags", "rename 'tags' to labels"),
        ("path,label,subset", "rename 'subset' to split"),
        (
            "path,label,width,height",
            "the column 'width' is none of path, label, labels and split: leave it out",
        ),
        ("path,label,class", "the column 'class' is none of"),
        ("path,label,label", "two columns 'label'"),
        ("path,label,labels", "both label and labels"),
        ("path,split", "add a column label"),
        ("a,b", "there is no column path"),
        ("path,is_valid,daisy,roses", "'is_valid' would be a class: write a column split"),
        ("path,train,test,daisy", "'train' would be a class: write a column split"),
        ("path,isTest,daisy,roses", "'isTest' would be a class"),
        ("path,fold,daisy,roses", "'fold' would be a class: leave it out"),
        ("path,id,daisy,roses", "'id' would be a class: leave it out"),
        ("path,daisy,roses,width", "'width' would be a class: leave it out"),
        ("path,target,daisy,roses", "rename 'target' to label"),
        ("path,target", "rename 'target' to label"),
        (
            "path,daisy",
            "rename 'daisy' to label, with the name of a class in each cell instead of 0 and 1",
        ),
    ],
)
def test_csv_header_says_which_column_is_wrong(tmp_path: Path, header: str, said: str) -> None:
    separator = ";" if ";" in header else ","
    row = separator.join(["a.jpg"] + ["1"] * header.count(separator))
    fails("csv", write(tmp_path, f"{header}\n{row}\n"), "line 1: ", said, "header")


def test_csv_with_a_column_a_class_of_booleans(tmp_path: Path) -> None:
    """As pandas' get_dummies writes them, and spreadsheets."""
    items = load(
        "csv",
        write(tmp_path, "path,dog,cat\na.jpg,True,False\nb.jpg,TRUE,true\nc.jpg,false,FALSE\n"),
    )
    assert items.labels is not None and items.labels.tolist() == [[1, -1], [1, 1], [-1, -1]]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["flower white", "flower red", ""], ("'flower red'",)),
        (["traffic light", "flower red", "flower red"], ()),
        (["flower white", "flower red", "dog"], ()),
        (["flower white;", "flower red"], ()),
    ],
)
def test_csv_labels_that_may_be_two_are_told(
    tmp_path: Path, labels: list[str], told: tuple[str, ...]
) -> None:
    text = "path,labels\n" + "".join(f"{i}.jpg,{label}\n" for i, label in enumerate(labels))
    says = "labels with spaces are single classes: {}; ';' stands between two"
    remarks = load("csv", write(tmp_path, text)).remarks
    assert [line for line in remarks if "spaces" in line] == [says.format(label) for label in told]
    one = load("csv", write(tmp_path, text.replace("labels", "label").replace(";", "")))
    assert not any("spaces" in line for line in one.remarks)


def test_csv_class_of_two_words_that_are_classes_is_told(tmp_path: Path) -> None:
    items = load("csv", write(tmp_path, "path,label\n0.jpg,ski mask\n1.jpg,ski\n2.jpg,mask\n"))
    assert items.classes == ["mask", "ski", "ski mask"]
    assert (
        "'ski mask' is one class; for several an image write a labels column, as 'ski;mask'"
        in items.remarks
    )


def test_csv_rows_that_repeat_are_left_out_and_told(tmp_path: Path) -> None:
    text = f"path,label\na.jpg,cat\nb.jpg,dog\n./a.jpg,cat\n{tmp_path}/b.jpg,dog\n"
    items = load("csv", write(tmp_path, text))
    assert items.names == ["a.jpg", "b.jpg"]
    assert items.remarks == (
        "left out: 2 rows that repeat an earlier one, for example line 4 of data.csv",
    )


@pytest.mark.skipif(os.name == "nt", reason="there a backslash is what / is here")
def test_csv_paths_as_they_were_meant(tmp_path: Path) -> None:
    touch(tmp_path, "photos/cat/1.jpg", "a.jpg", "b.jpg ", "caf\xe9.jpg", "back\\slash.jpg")
    names = [
        "photos\\cat\\1.jpg",
        "gone\\1.jpg",
        " a.jpg ",
        "b.jpg ",
        "caf\xe9.jpg",
        "back\\slash.jpg",
    ]
    text = "path,label\n" + "".join(f"{name},cat\n" for name in names)
    items = load("csv", write(tmp_path, text.encode("cp1252")))
    assert items.names == [
        "photos/cat/1.jpg",
        "gone/1.jpg",
        "a.jpg",
        "b.jpg ",
        "caf\xe9.jpg",
        "back\\slash.jpg",
    ]


def test_classes_that_differ_in_case_or_cant_be_learned_are_named(tmp_path: Path) -> None:
    def remarks(text: str) -> tuple[str, ...]:
        return load("csv", write(tmp_path, text)).remarks

    twins = "names of classes that differ only in case: 'Daisy', 'daisy'"
    assert remarks("path,label\na.jpg,Daisy\nb.jpg,daisy\nc.jpg,rose\n") == (twins,)
    touch(
        tmp_path,
        *(
            f"{part}/{name}/1.jpg"
            for part in ("train", "val")
            for name in ("Daisy", "daisy", "rose")
        ),
    )
    assert load("folder", tmp_path / "train").remarks == (twins,)
    (tmp_path / "data.csv").unlink()
    assert load("folder", tmp_path).remarks == (twins,)
    refused = ": svm will refuse, since it can't learn a class without one"
    assert (
        remarks("path,cat,dog,lily\na.jpg,1,0,0\nb.jpg,0,1,0\n")[-1]
        == f"no image of 'lily'{refused}"
    )
    assert remarks("path,cat,dog,lily\na.jpg,1,1,0\nb.jpg,0,1,0\n")[-1] == "no image of 'lily'"
    text = "path,label,split\na.jpg,cat,train\nb.jpg,dog,train\nc.jpg,tulip,test\nd.jpg,cat,test\n"
    assert remarks(text) == (f"no training image of 'tulip'{refused}",)
    text = "path,labels,split\na.jpg,cat;,train\nb.jpg,tulip,test\n"
    assert remarks(text) == ("no training image of 'tulip'",)


def test_few_of_the_classes_in_a_limited_set_are_told(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "train",
        names=tuple(f"{name}/{i}.jpg" for name in ("cat", "dog", "owl") for i in range(3)),
    )
    items = load("folder", tmp_path / "train")
    assert items.first(4).remarks == ("`limit` 4 takes the first images, of 2 of the 3 classes",)
    assert items.first(7).remarks == items.first(100).remarks == ()
    items = load("csv", write(tmp_path, "path,labels\na.jpg,cat;\nb.jpg,dog\n"))
    assert items.first(1).remarks[1:] == (
        "`limit` 1 takes the first images, of 1 of the 2 classes",
    )


def test_items_are_taken_in_any_order(tmp_path: Path) -> None:
    items = load(
        "csv",
        write(
            tmp_path,
            "path,label,split\n"
            + "".join(
                f"{i}.jpg,{'cat' if i % 2 else 'dog'},{'test' if i > 3 else 'train'}\n"
                for i in range(6)
            ),
        ),
    )
    taken = items.take(np.array([5, 0, 3]))
    assert taken.names == ["5.jpg", "0.jpg", "3.jpg"] and taken.classes == items.classes
    assert items.labels is not None and taken.labels is not None
    assert taken.labels.tolist() == items.labels[[5, 0, 3]].tolist()
    assert {name: rows.tolist() for name, rows in taken.splits.items()} == {
        "train": [1, 2],
        "test": [0],
    }
    assert taken.total is None and items.first(2).total == 6
    digits = load("digits")
    assert digits.images is not None
    pixels = digits.take(np.array([9, 4])).images
    assert pixels is not None and (pixels == digits.images[[9, 4]]).all()


def test_one_class_is_said_in_the_singular(tmp_path: Path) -> None:
    items = load("csv", write(tmp_path, "path,label\na.jpg,cat\nb.jpg,cat\n"))
    assert look._of_classes(items).startswith("2 of 1 class; 3 random splits")


def test_the_other_kind_of_root_names_its_dataset(tmp_path: Path) -> None:
    fails("folder", write(tmp_path, "path,label\na.jpg,cat\n"), "is a file", "`dataset` csv")
    fails("csv", tmp_path, str(tmp_path), "is a folder", "`dataset` folder")


def test_csv_root_must_be_a_file(tmp_path: Path) -> None:
    fails("csv", tmp_path / "no.csv", str(tmp_path / "no.csv"))


# --- downloads ------------------------------------------------------------------------------------


def make_tar(path: Path, files: dict[str, str]) -> str:
    """Write a tar archive of `files`; gives its MD5."""
    with tarfile.open(path, "w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.md5(path.read_bytes()).hexdigest()


def voc2007_files(split_ids: dict[str, str]) -> dict[str, str]:
    base, files = "VOCdevkit/VOC2007", {}
    for split, image in split_ids.items():
        files[f"{base}/ImageSets/Main/{split}.txt"] = f"{image}\n"
        files |= {f"{base}/ImageSets/Main/{name}_{split}.txt": f"{image} -1\n" for name in CLASSES}
        files[f"{base}/JPEGImages/{image}.jpg"] = "pixels"
    return files


@pytest.mark.parametrize("root", [".", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc_download_through_torchvision(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import voc as torchvision_voc

    trainval = voc2007_files({"train": "000001", "val": "000002"})
    trainval["VOCdevkit/VOC2007/ImageSets/Main/trainval.txt"] = "000001\n000002\n"
    data = tmp_path / "data"
    data.mkdir()
    # The archives lie where an earlier try left them, so torchvision checks and unpacks them;
    # nothing listens at the address, so fetching one fails.
    archives = {"2007": trainval, "2007-test": voc2007_files({"test": "000003"})}
    for key, files in archives.items():
        entry = torchvision_voc.DATASET_YEAR_DICT[key]
        monkeypatch.setitem(entry, "url", f"http://127.0.0.1:9/{key}.tar")
        monkeypatch.setitem(entry, "md5", make_tar(data / entry["filename"], files))
    items = load("voc2007", data / root, download=True)
    assert sizes(items) == {"train": 1, "val": 1, "test": 1}
    assert items.root == data / "VOCdevkit" / "VOC2007"
    assert capsys.readouterr().out == ""

    # A second time nothing is fetched or unpacked, unless an image is missing.
    (data / "VOCtest_06-Nov-2007.tar").unlink()
    assert load("voc2007", data / root, download=True).names == items.names
    Path(items.source(0)).unlink()
    fails("voc2007", data / root, "could not download voc2007", "refused", download=True)
    assert (
        Path(items.source(0)).read_text() == "pixels"
    )  # the archive still there was unpacked again


@pytest.mark.parametrize(
    ("name", "categories"),
    [("caltech101", "101_ObjectCategories"), ("caltech256", "256_ObjectCategories")],
)
def test_caltech_download_is_all_or_nothing(
    tmp_path: Path, name: str, categories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import caltech as torchvision_caltech

    def unpack(stop: bool) -> None:
        def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
            folder = Path(download_root) / ("caltech-101" if name == "caltech101" else "")
            touch(folder, "a/1.jpg", "b/1.jpg")
            Path(download_root, filename).touch()
            touch(
                Path(download_root),
                f"{categories}/BACKGROUND_Google/1.jpg",
                f"{categories}/b/1.jpg",
            )
            if stop:
                raise OSError("No space left\non device")
            touch(Path(download_root), f"{categories}/b/2.jpg")

        monkeypatch.setattr(torchvision_caltech, "download_and_extract_archive", fetch)

    unpack(stop=True)
    fails(name, tmp_path, f"could not download {name}", "No space left on device", download=True)
    fails(name, tmp_path, "no folder")  # the half-unpacked folder is not taken for the dataset
    unpack(stop=False)
    items = load(name, tmp_path, download=True)
    assert items.names == ["BACKGROUND_Google/1.jpg", "b/1.jpg", "b/2.jpg"]
    assert items.root == tmp_path / name / categories
    assert [path.name for path in tmp_path.iterdir()] == [name]
    unpack(stop=True)
    assert load(name, tmp_path, download=True).names == items.names


@pytest.mark.parametrize("name", ["imagenet", "folder", "csv", "digits"])
def test_what_has_no_download_says_so(tmp_path: Path, name: str) -> None:
    fails(
        name,
        tmp_path,
        "leave out `download`" if name != "imagenet" else "no open download",
        download=True,
    )


# --- the registry ---------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones() -> None:
    names = [
        "voc2007",
        "voc2012",
        "caltech101",
        "caltech256",
        "imagenet",
        "folder",
        "csv",
        "digits",
    ]
    fails("voc2077", None, "'voc2077'", *names)
    assert [name for name, _, _ in describe_datasets()] == names
    assert all(
        about and files and "\n" not in about + files for _, about, files in describe_datasets()
    )


def test_voc_submission_files(tmp_path: Path) -> None:
    names = [
        "JPEGImages/2008_000001.jpg",
        "JPEGImages/2008_000002.jpg",
        "JPEGImages/2008_000004.jpg",
    ]
    scores = np.array([[0.5, -1.25], [1 / 3, 2e-7]])
    files = write_submission(tmp_path / "out", [2, 0], scores, ["cat", "dog"], names)
    main = tmp_path / "out"
    assert files == [main / "comp2_cls_test_cat.txt", main / "comp2_cls_test_dog.txt"]
    assert files[0].read_text() == "2008_000004 0.500000\n2008_000001 0.333333\n"
    assert files[1].read_text() == "2008_000004 -1.250000\n2008_000001 0.000000\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left

    with pytest.raises(VggfeatError, match="isn't an empty folder"):
        write_submission(tmp_path / "out", [2, 0], scores, ["cat", "dog"], names)
    (tmp_path / "empty").mkdir()
    assert write_submission(tmp_path / "empty", [2, 0], scores, ["cat", "dog"], names)[0].exists()


@pytest.mark.parametrize(
    ("rows", "scores", "names", "message"),
    [
        ([0, 1], [[0.1]], ["a.jpg", "b.jpg"], "don't match"),
        ([0, 1], [[0.1], [np.nan]], ["a.jpg", "b.jpg"], "NaN"),
        ([0, 1], [[0.1], [0.2]], ["x/a.jpg", "y/a.jpg"], "same name"),
    ],
)
def test_a_refused_submission_leaves_nothing(
    rows: list[int], scores: list, names: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(VggfeatError, match=message):
        write_submission(tmp_path / "out", rows, np.array(scores), ["cat"], names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("classes", "names", "says"),
    [
        (["cat", "no/dog"], ["a.jpg"], "'no/dog' can't be a file's name"),
        (["../../cat", "dog"], ["a.jpg"], "can't be a file's name"),
        (["cat", "d" * 250], ["a.jpg"], "can't be a file's name"),
        (["cat", "dog"], ["x/a b.jpg"], "'a b' has a space in it"),
        (["cat", "dog"], ["a\nb.jpg"], "has a space in it"),
    ],
)
def test_names_that_a_submission_cant_hold(
    classes: list[str], names: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(VggfeatError, match=says):
        check_submission(tmp_path / "in" / "out", [0], classes, names)
    with pytest.raises(VggfeatError, match=says):
        write_submission(tmp_path / "in" / "out", [0], np.ones((1, 2)), classes, names)
    assert list(tmp_path.iterdir()) == []


def test_a_submission_keeps_names_that_are_not_unicode(tmp_path: Path) -> None:
    (file,) = write_submission(tmp_path / "out", [0], np.ones((1, 1)), ["k\udcff"], ["ü\udcfe.jpg"])
    assert file.read_bytes() == "ü".encode() + b"\xfe 1.000000\n"
    assert os.fsencode(file).endswith(b"comp2_cls_test_k\xff.txt")


def test_a_failed_submission_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", full_disk)
    with pytest.raises(VggfeatError, match=r"can't write .*No space left"):
        write_submission(tmp_path / "out", [0], np.ones((1, 1)), ["cat"], ["a.jpg"])
    assert list(tmp_path.iterdir()) == []


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


# --- files and folders from strangers -------------------------------------------------------------


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


def test_a_short_csv_file_doesnt_fill_the_memory(tmp_path: Path) -> None:
    """A class of its own for each image: 1.6 MB of text would be a table of 10 GB."""
    (tmp_path / "a.csv").write_text(
        "path,labels\n" + "".join(f"{i}.jpg,c{i}\n" for i in range(100_000))
    )
    fails("csv", tmp_path / "a.csv", "100,000 images of 100,000 classes are too many")


def test_lists_are_regular_files_of_a_sane_length(tmp_path: Path) -> None:
    lists = tmp_path / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    os.mkfifo(lists / "train.txt")
    fails("voc2007", tmp_path, "train.txt is no regular file")
    (lists / "train.txt").unlink()
    (lists / "train.txt").symlink_to("/dev/zero")
    fails("voc2007", tmp_path, "train.txt is no regular file")
    (lists / "train.txt").unlink()
    (lists / "train.txt").symlink_to("train.txt")
    fails("voc2007", tmp_path, "can't read", "train.txt")
    (lists / "train.txt").unlink()
    with open(lists / "train.txt", "wb") as file:
        file.truncate(1 << 40)
    fails("voc2007", tmp_path, "train.txt is longer than")
    os.mkfifo(tmp_path / "a.csv")
    fails("csv", tmp_path / "a.csv", "a.csv is no regular file")


@pytest.mark.parametrize("line", ["../../etc/passwd", "a\0b", "x" * 1_000_000 + " y", "a b"])
def test_a_line_that_is_no_image_id_is_told_in_short(tmp_path: Path, line: str) -> None:
    lists = tmp_path / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text(f"000012\n{line}\n")
    with pytest.raises(
        VggfeatError, match=r"train.txt, line 2: expected one image id, found '"
    ) as refused:
        load("voc2007", tmp_path)
    assert len(str(refused.value)) < len(str(tmp_path)) + 200


def test_the_table_of_protocols_is_what_is_drawn_and_documented() -> None:
    labels = np.repeat(np.arange(3, dtype=np.int32), 70)
    for name, train, test in (
        ("caltech101", 30, 40),
        ("caltech256", 60, 10),
        ("single-label", 56, 14),
    ):
        splits = PROTOCOLS[name].splits(labels)
        drawn = [len(splits[f"split0/{part}"]) for part in ("train", "val", "test")]
        assert (drawn[0] + drawn[1], drawn[2]) == (3 * train, 3 * test)
    compared = {name: rules.compared_by(several=True) for name, rules in PROTOCOLS.items()}
    assert compared.pop("voc2007") == "map_11point" and {*compared.values()} == {"map_allpoint"}
    assert {rules.compared_by(several=False) for rules in PROTOCOLS.values()} == {
        "mean_class_recall"
    }
    formats = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    listed = formats.partition("rule of scoring: ")[2].partition(" |")[0]
    assert re.findall(r"`([^`]+)`", listed) == [*PROTOCOLS, "unlabelled"]
