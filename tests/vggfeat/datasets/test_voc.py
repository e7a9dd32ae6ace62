"""VOC: the lists of the devkit, real ones first, and the files of a submission."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vggfeat.datasets.made import DATA, fails, make_voc, needs_data, sizes
from vggfeat.datasets import load
from vggfeat.datasets.voc import check_submission, write_submission
from vggfeat.errors import VggfeatError


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
    rows: list[int], scores: list[Any], names: list[str], message: str, tmp_path: Path
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
