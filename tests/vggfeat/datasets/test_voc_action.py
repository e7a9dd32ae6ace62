"""VOC-2012's actions: lists and XML as the real ones are written, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.vggfeat.datasets.made import Persons, annotation, fails, make_action, sizes
from vggfeat.datasets import load
from vggfeat.datasets.voc_action import ACTIONS

TRAIN: Persons = {
    ("2010_000001", 2): ("jumping",),
    ("2010_000001", 3): ("phoning", "walking"),
    ("2011_000007", 1): ("other",),
}
VAL: Persons = {("2010_000003", 1): ("running",)}
TEST: Persons = {("2012_000009", 1): (), ("2012_000009", 10): ()}
BOXES = ((0, 0, 5, 5), (1, 2, 30, 40), (10, 0, 50, 40))


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Train and val with labels, test without; in the first image object 1 is no person of them."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    make_action(folder, {"train": TRAIN, "val": VAL, "test": TEST}, ("train", "val"))
    (folder / "Annotations").mkdir()
    for image, boxes in (
        ("2010_000001", BOXES),
        ("2011_000007", BOXES[:1]),
        ("2010_000003", BOXES[1:]),
        ("2012_000009", BOXES[:1] * 9 + BOXES[2:]),
    ):
        text = annotation(*boxes, size=(50, 40), name="person")
        (folder / "Annotations" / f"{image}.xml").write_text(text)
    return folder


def test_an_item_is_a_person(devkit: Path) -> None:
    items = load("voc2012action", devkit.parents[1])
    assert items.names == [
        "JPEGImages/2010_000001.jpg#2",
        "JPEGImages/2010_000001.jpg#3",
        "JPEGImages/2010_000003.jpg#1",
        "JPEGImages/2011_000007.jpg#1",
        "JPEGImages/2012_000009.jpg#1",
        "JPEGImages/2012_000009.jpg#10",
    ]
    assert items.classes == ACTIONS and len(ACTIONS) == 11 and ACTIONS[0] == "other"
    assert sizes(items) == {"train": 3, "val": 1, "test": 2}
    assert items.splits["train"].tolist() == [0, 1, 3]
    assert items.labels is not None and items.labels.dtype == np.int8 and items.boxes is not None
    done = [[ACTIONS[k] for k in np.flatnonzero(row == 1)] for row in items.labels]
    assert done == [["jumping"], ["phoning", "walking"], ["running"], ["other"], [], []]
    assert (items.labels[:4] != 0).all() and not items.labels[4:].any()
    # the number counts the XML's objects
    assert items.boxes.tolist() == [
        [*BOXES[1]],
        [*BOXES[2]],
        [*BOXES[1]],
        [*BOXES[0]],
        [*BOXES[0]],
        [*BOXES[2]],
    ]
    assert items.source(1) == devkit / "JPEGImages" / "2010_000001.jpg"
    assert load("voc2012action", devkit).names == items.names
    paths = [*items.paths()]
    assert len(paths) == len(set(paths))
    for name in ("Annotations/2010_000001.xml", "ImageSets/Action/train.txt"):
        assert devkit / name in paths


def test_whole_pixels_cover_a_box_inside_the_image(devkit: Path) -> None:
    path = devkit / "Annotations" / "2011_000007.xml"
    text = path.read_text().replace("<xmin>1<", "<xmin>2.7<").replace("<ymax>5<", "<ymax>99<")
    path.write_text(text)
    items = load("voc2012action", devkit)
    assert items.boxes is not None and items.boxes[3].tolist() == [1, 0, 5, 40]


def test_items_of_the_images(devkit: Path) -> None:
    items = load("voc2012action", devkit)
    images, file_N = items.by_file()
    assert images.names == list(dict.fromkeys(items.files or []))
    assert len(images) == 4 and file_N.tolist() == [0, 0, 1, 2, 3, 3]
    assert images.boxes is None and images.labels is None
    taken = items.take(np.array([5, 0]))
    assert taken.files == ["JPEGImages/2012_000009.jpg", "JPEGImages/2010_000001.jpg"]
    assert taken.boxes is not None and taken.boxes.tolist() == [[*BOXES[2]], [*BOXES[1]]]


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (
            "train.txt",
            "2010_000001 2",
            "2010_000001",
            "train.txt, line 1: expected an image id and",
        ),
        ("train.txt", "2010_000001 2", "2010_000001 0", "line 1: expected an image id and an obj"),
        ("train.txt", "2010_000001 2", f"2010_000001 {'9' * 5000}", "line 1: expected an image id"),
        ("train.txt", "2010_000001 3", "2010_000001 2", "line 2: object 2 of 2010_000001 is list"),
        ("train.txt", "2010_000001 3", "2010_000003 1", "a person is in two of train.txt, val.txt"),
        ("phoning_train.txt", "3  1", "3 yes", "phoning_train.txt, line 2: expected an image id"),
        (
            "phoning_train.txt",
            "2010_000001 3  1\n",
            "",
            "no label for 1 of the persons, the first is object 3 of",
        ),
        ("phoning_val.txt", "2010_000003 1", "2010_000003 2", "2 of 2010_000003 is not in val.txt"),
    ],
)
def test_lists_that_are_refused(devkit: Path, name: str, old: str, new: str, said: str) -> None:
    path = devkit / "ImageSets" / "Action" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    fails("voc2012action", devkit, said)


def test_xml_that_is_refused(devkit: Path) -> None:
    path = devkit / "Annotations" / "2011_000007.xml"
    text = path.read_text()
    path.write_text(text.replace("<xmin>1<", "<xmin>6<"))
    fails("voc2012action", devkit, f"{path}, line 1: the box 5,0,5,5 has no area")
    path.write_text(text.replace("<xmin>1<", "<xmin>61<").replace("<xmax>5<", "<xmax>70<"))
    fails("voc2012action", devkit, f"{path}, line 1: the box 60,0,70,5 lies outside of the image")
    path.write_text("<annotation/>")
    fails("voc2012action", devkit, "train.txt, line 3:", f"{path} has no object 1, but 0")
    path.unlink()
    fails("voc2012action", devkit, f"no {path}, of which", "train.txt, line 3 tells")
    (devkit / "ImageSets" / "Action" / "walking_train.txt").unlink()
    fails("voc2012action", devkit, "walking_train.txt")


def test_a_folder_without_the_action_lists(tmp_path: Path) -> None:
    (tmp_path / "VOC2012" / "ImageSets" / "Main").mkdir(parents=True)
    fails("voc2012action", tmp_path, str(tmp_path / "VOC2012" / "ImageSets" / "Action"))


def test_boxes_of_another_picture_are_refused(devkit: Path) -> None:
    (devkit / "JPEGImages").mkdir()
    Image.new("RGB", (50, 40)).save(devkit / "JPEGImages" / "2010_000001.jpg")
    load("voc2012action", devkit)
    Image.new("RGB", (100, 80)).save(devkit / "JPEGImages" / "2010_000001.jpg")
    fails("voc2012action", devkit, "of a picture of 50x40 pixels, and the image has 100x80")
