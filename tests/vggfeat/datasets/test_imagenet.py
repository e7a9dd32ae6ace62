"""ImageNet's layout: real folders first, then made-up ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.vggfeat.datasets.made import DATA, fails, needs_data, sizes, touch
from vggfeat.datasets import load


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
        assert Path(str(items.source(row))).is_file()


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
    # train's classes number val
    assert items.labels is not None and items.labels.tolist() == [
        0,
        1,
        2,
        1,
        2,
        2,
    ]


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
