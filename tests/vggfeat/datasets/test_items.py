"""Items: some of them, and what they say of their classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.vggfeat.datasets.made import touch, tree, write
from vggfeat.datasets import load
from vggfeat.datasets.items import counted


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
    words = counted(len(items), None, items.labels, items.classes, items.splits)
    assert words.startswith("2 of 1 class; 3 random splits")
