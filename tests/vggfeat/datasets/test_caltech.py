"""Caltech-101 and -256: the real folder first, then made-up ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.vggfeat.datasets.made import DATA, fails, needs_data, touch
from vggfeat.datasets import load


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
    # 60 train, 39 train, its only image
    assert np.bincount(test, minlength=3).tolist() == [
        70,
        1,
        0,
    ]
    (folder / "198.spider" / "198_0001.jpg").unlink()
    fails("caltech256", tmp_path, str(folder / "198.spider"))


def test_caltech_faults(tmp_path: Path) -> None:
    where = str(tmp_path / "caltech101" / "101_ObjectCategories")
    fails("caltech101", tmp_path, where, "give `root`", "add `download`")
    fails("caltech101", None, "needs `root`")
    (tmp_path / "101_ObjectCategories").mkdir()
    fails("caltech101", tmp_path, "no class folders", str(tmp_path / "101_ObjectCategories"))
