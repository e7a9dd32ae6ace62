"""Boxes of a data set's images: real ones, and what doesn't fit."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.vggfeat.datasets.made import DATA, needs_data, touch, write
from vggfeat.datasets import Items, load, voc
from vggfeat.datasets.boxes import read_boxes
from vggfeat.errors import VggfeatError

HEADER = "path,class,x1,y1,x2,y2"
SIZED = f"{HEADER},width,height"


def items_of(tmp_path: Path, *names: str) -> Items:
    labels = np.zeros(len(names), np.int32)
    splits = {"train": np.arange(len(names) - 1), "val": np.array([len(names) - 1])}
    return Items("folder", "single-label", tmp_path, list(names), labels, ["cat", "dog"], splits)


def xml(*objects: str, size: tuple[int, int] = (50, 40)) -> str:
    """objects: "NAME xmin ymin xmax ymax"."""
    parts = []
    for each in objects:
        name, *numbers = each.split()
        sides = zip(("xmin", "ymin", "xmax", "ymax"), numbers, strict=True)
        box = "".join(f"<{side}>{n}</{side}>" for side, n in sides)
        parts.append(f"<object><name>{name}</name><bndbox>{box}</bndbox></object>")
    sized = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation>{sized}{''.join(parts)}</annotation>"


def annotate(folder: Path, **texts: str) -> Path:
    """Files by their paths without suffix, "__" for "/"."""
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_xml_in_imagenets_layout_with_flat_val(tmp_path: Path) -> None:
    items = items_of(tmp_path, "train/cat/cat_1.JPEG", "train/dog/dog_7.JPEG", "val/dog/val_3.JPEG")
    folder = annotate(
        tmp_path / "CLS-LOC",
        train__cat__cat_1=xml("cat 1 1 50 40"),
        val__val_3=xml("dog 2 3 10 20", "cat 11 12 13 14"),
        train__dog__dog_7=xml("dog 5 5 5 5"),
    )
    boxes, remarks = read_boxes(folder, items)
    assert boxes.rows_M.tolist() == [0, 1, 2, 2] and boxes.labels_M.tolist() == [0, 1, 1, 0]
    assert boxes.rows_M.dtype == np.int64 and boxes.labels_M.dtype == np.int32
    assert boxes.corners_M4.dtype == np.float64 and boxes.difficult_M.tolist() == [False] * 4
    # 1-based and inclusive: one pixel is a box
    assert boxes.corners_M4.tolist() == [
        [0, 0, 50, 40],
        [4, 4, 5, 5],
        [1, 2, 10, 20],
        [10, 11, 13, 14],
    ]
    assert remarks == ()


def test_xml_of_images_that_share_a_name_by_the_class_folder(tmp_path: Path) -> None:
    items = items_of(tmp_path, "cat/1.jpg", "dog/1.jpg", "dog/2.jpg")
    folder = annotate(
        tmp_path / "xml",
        cat__1=xml("cat 1 1 9 9"),
        dog__1=xml("dog 1 1 9 9"),
        fish__1=xml("cat 1 1 9 9"),
        a__2=xml("dog 1 1 9 9"),
        b__2=xml("dog 1 1 9 9"),
        b__3="not even read",
    )
    boxes, remarks = read_boxes(folder, items)
    assert boxes.rows_M.tolist() == [0, 1, 2] and boxes.labels_M.tolist() == [0, 1, 1]
    assert remarks == (
        "left out: 1 XML file of images that have one already: b/2.xml",
        "left out: 1 XML file of none of these images: b/3.xml",
        "left out: 1 XML file of several images: fish/1.xml",
    )


def test_csv_by_whole_names_and_by_their_endings(tmp_path: Path) -> None:
    items = items_of(tmp_path, "a/cat/1.jpg", "b/cat/1.jpg", "cat/1.jpg", "b/2.jpg", "b/12.jpg")
    rows = ["b/cat/1.jpg,cat,1,2,3,4", "cat/1.jpg,dog,0,0,5.5,5", "2.jpg,dog,1,1,2,2"]
    rows += ["1.jpg,cat,1,1,2,2", "12,cat,1,1,2,2", "9.jpg,cat,1,1,2,2"]
    path = write(tmp_path, "\n".join([SIZED, *(f"{row},9,8" for row in rows)]))
    boxes, remarks = read_boxes(path, items)
    assert boxes.rows_M.tolist() == [1, 2, 3, 4] and boxes.labels_M.tolist() == [0, 1, 1, 0]
    assert boxes.corners_M4[:2].tolist() == [[1, 2, 3, 4], [0, 0, 5.5, 5]]
    assert remarks == (
        "left out: 1 row of several images: data.csv, line 5",
        "left out: 1 row of none of these images: data.csv, line 7",
        "1 image without a box (1 of train): a/cat/1.jpg",
    )


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    items = items_of(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    rows = ["1.jpg,cat,1,1,5,5,9,8", "1.jpg,cat,5,1,5,5,9,8", "1.jpg,cat,6,1,5,5,9,8"]
    rows += ["1.jpg,cat,nan,1,5,5,9,8", "1.jpg,cat,0,1,inf,5,9,8", "1.jpg,dog,9,0,12,4,9,8"]
    rows += ["2.jpg,dog,-2,1,9.5,9,9,8", "2.jpg,fish,1,1,2,2,9,8", "2.jpg,cow,1,1,2,2,9,8"]
    rows += ["2.jpg,cow,1,1,2,2,9,8", "1.jpg,dog,3,3,4,4,9,8"]
    boxes, remarks = read_boxes(write(tmp_path, "\n".join([SIZED, *rows])), items)
    assert boxes.rows_M.tolist() == [0, 0, 1] and boxes.labels_M.tolist() == [0, 1, 1]
    assert boxes.corners_M4.tolist() == [[1, 1, 5, 5], [3, 3, 4, 4], [0, 1, 9, 8]]
    assert remarks == (
        "left out: 4 boxes without an area, or with a side that is no finite number: data.csv, line"
        " 3, data.csv, line 4, data.csv, line 5 and 1 more",
        "left out: 1 box outside of the image: data.csv, line 7",
        "cut off at the image's edge: 1 box, 2 pixels out at most: data.csv, line 8",
        "left out: 3 boxes of classes that the images don't have: 'cow' 2, 'fish' 1",
        "1 image without a box (1 of val): 3.jpg",
    )


def test_boxes_are_of_the_stored_pixels_unless_the_size_that_is_told_is_the_upright_one(
    tmp_path: Path,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8  # stored 30 wide, 20 high; upright 20 wide, 30 high: x is y, y 30 - x
    Image.new("RGB", (30, 20)).save(tmp_path / "1.jpg", exif=exif)
    items = items_of(tmp_path, "1.jpg")
    for size, corners in (
        ("30,20", [4, 20, 8, 28]),
        (",", [4, 20, 8, 28]),
        ("20,30", [2, 4, 10, 8]),
    ):
        text = f"path,class,x1,y1,x2,y2,width,height\n1.jpg,cat,2,4,10,8,{size}".replace(
            ",,", ",0,0"
        )
        boxes, _ = read_boxes(write(tmp_path, text), items)
        assert boxes.corners_M4.tolist() == [corners]
        read = load("csv", write(tmp_path, text.replace("class", "label")))
        assert read.boxes is not None and read.boxes.tolist() == [corners]
        assert any("as EXIF has it seen" in line for line in read.remarks) == (size != "20,30")
    other = write(tmp_path, "path,label,x1,y1,x2,y2,width,height\n1.jpg,cat,2,4,10,8,31,20")
    with pytest.raises(VggfeatError, match="line 2: the box is of a picture of 31x20 pixels, and"):
        load("csv", other)


def test_the_size_of_an_image_where_the_file_does_not_tell(tmp_path: Path) -> None:
    """By its header, upright; an image that can't be read is told."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "1.jpg", exif=exif)  # upright 20 wide, 30 high
    (tmp_path / "2.jpg").write_bytes(b"no image")
    items = items_of(tmp_path, "1.jpg", "2.jpg")
    rows = ["image,label,xmin,ymin,xmax,ymax,difficult", "1,cat,0,0,30,30,1", "2,dog,0,0,99,99,0"]
    boxes, remarks = read_boxes(write(tmp_path, "\n".join(rows)), items)
    assert boxes.corners_M4.tolist() == [[0, 0, 20, 30], [0, 0, 99, 99]]
    assert boxes.difficult_M.tolist() == [True, False]
    assert remarks == (
        "turned with the image, as EXIF has it seen: 1 box: data.csv, line 2",
        "cut off at the image's edge: 1 box, 10 pixels out at most: data.csv, line 2",
        "not held against the size of 1 image, which nothing tells: 2.jpg",
    )


def test_boxes_of_another_size_than_the_image_has_are_told(tmp_path: Path) -> None:
    """As those of photographs that were made smaller, and their boxes not."""
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (50, 40)).save(tmp_path / name)
    items = items_of(tmp_path, "1.jpg", "2.jpg")
    text = f"{SIZED}\n1.jpg,cat,10,10,40,30,100,80\n2.jpg,cat,10,10,40,30,50,40\n"
    boxes, remarks = read_boxes(write(tmp_path, text), items)
    assert boxes.rows_M.tolist() == [1]
    assert remarks[0] == (
        "left out: 1 box of images that have another size than is told there: data.csv, line 2"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: the file is empty; it must start with path,class,x1,y1,x2,y2"),
        ("path,class,x1,y1,x2\n1.jpg,cat,1,1,2", "line 1: there is no column y2"),
        (f"{HEADER},xmin\n", "line 1: there are two columns x1: leave out one"),
        (f"{HEADER}\n1.jpg,cat,1,1,2,two", "line 2: y2 must be a number, not 'two'"),
        (f"{HEADER}\n1.jpg,cat,1,1,2,1_0", "line 2: y2 must be a number, not '1_0'"),
        (f"{HEADER}\n1.jpg,cat,1,1,2,", "line 2: y2 must be a number, not ''"),
        (f"{HEADER}\n1.jpg,cat,1,1,2", "line 2: 5 columns where the header has 6"),
        (f"{HEADER},difficult\n1.jpg,cat,1,1,2,2,x", "line 2: difficult must be 0 or 1, not 'x'"),
        (f"{HEADER}\n2.jpg,cat,1,1,2,2", "data.csv has no box for any of the 1 images (left out"),
        (b"\x00\x01\x02", "save it as CSV UTF-8"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    touch(tmp_path, "1.jpg")
    path = write(tmp_path, text)
    with pytest.raises(VggfeatError) as caught:
        read_boxes(path, items_of(tmp_path, "1.jpg"))
    assert str(path) in str(caught.value) and said in str(caught.value), caught.value


def test_a_folder_or_file_that_is_not_there(tmp_path: Path) -> None:
    items = items_of(tmp_path, "1.jpg")
    with pytest.raises(VggfeatError, match="no XML file in"):
        read_boxes(tmp_path, items)
    with pytest.raises(VggfeatError, match="no CSV file, or folder of XML files"):
        read_boxes(tmp_path / "nowhere", items)
    annotate(tmp_path, **{"1": "<annotation><object></annotation>"})
    with pytest.raises(VggfeatError, match=r"1\.xml, line 1: no XML: mismatched tag"):
        read_boxes(tmp_path, items)


@needs_data
def test_caltechs_boxes() -> None:
    items, path = load("caltech101", DATA / "caltech101"), DATA / "caltech101_boxes.csv"
    boxes, remarks = read_boxes(path, items)
    assert len(boxes) == len(set(boxes.rows_M)) == 1209 and len(set(boxes.labels_M)) == 26
    assert items.labels is not None
    assert (items.labels[boxes.rows_M] == boxes.labels_M).all()
    (remark,) = remarks
    assert remark.startswith("3,563 images without a box: BACKGROUND_Google/image_0001.jpg, ")
    with path.open() as file:
        first = next(csv.DictReader(file))
    row = items.names.index(first["path"])
    (corners,) = boxes.corners_M4[boxes.rows_M == row]
    assert corners.tolist() == [float(first[name]) for name in ("x1", "y1", "x2", "y2")]


@needs_data
def test_vocs_annotations() -> None:
    folder = DATA / "voc2012_100" / "VOCdevkit" / "VOC2012"
    items = dataclasses.replace(load("folder", folder / "JPEGImages"), classes=voc.CLASSES)
    boxes, remarks = read_boxes(folder / "Annotations", items)
    assert (len(boxes), remarks) == (273, ())
    assert set(boxes.labels_M) == set(range(20)) and set(boxes.rows_M) == set(range(100))
    again, _ = read_boxes(folder, items)  # found below it, too
    assert (again.corners_M4 == boxes.corners_M4).all()


@needs_data
def test_vocs_boxes_as_csv_agree_with_its_lists() -> None:
    """An image's ordinary objects are the classes that its lists have as 1; difficult ones alone,
    0.
    """
    items = load("voc2007", DATA / "voc2007_lists")
    boxes, remarks = read_boxes(DATA / "voc2007_trainval_boxes.csv", items)
    assert len(boxes) == 15_662
    assert "4,952 images without a box (4,952 of test)" in remarks[-1]
    assert items.labels is not None
    found = np.full_like(items.labels, -1)
    for difficult in (True, False):
        these = boxes.difficult_M == difficult
        found[boxes.rows_M[these], boxes.labels_M[these]] = 0 if difficult else 1
    rows = np.unique(boxes.rows_M)
    assert (found[rows] == items.labels[rows]).all()


@pytest.mark.parametrize("size", ["0,20", "-5,20", "nan,20", "inf,20", ",20", "x,20"])
def test_a_size_that_is_none_is_refused_and_an_empty_one_is_unknown(
    tmp_path: Path, size: str
) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "1.jpg")
    items = Items("folder", "single-label", tmp_path, ["1.jpg"], np.array([0]), ["cat"])
    path = tmp_path / "boxes.csv"
    path.write_text(f"{SIZED}\n1.jpg,cat,2,4,10,8,{size}\n")
    with pytest.raises(VggfeatError, match=r"line 2: (an image has no|\S+ must be a number)"):
        read_boxes(path, items)
    path.write_text(f"{SIZED}\n1.jpg,cat,2,4,10,8,,\n")
    assert read_boxes(path, items)[0].corners_M4.tolist() == [[2, 4, 10, 8]]
