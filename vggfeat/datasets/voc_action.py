"""PASCAL VOC 2012 action classification: persons in boxes, and what each of them does.

    VOCdevkit/VOC2012/ImageSets/Action/train.txt            2010_006215 1
    VOCdevkit/VOC2012/ImageSets/Action/jumping_train.txt    2010_006215 1 -1
    VOCdevkit/VOC2012/Annotations/2010_006215.xml           the boxes

A line is an image, the number of an object in it (from 1, over all objects of the image's XML, as
the devkit's `rec.objects(objid)`), and whether that person does it: 1, -1, or 0, left out. An item
is a person; its name is the image's with the number behind it, "JPEGImages/2010_006215.jpg#1". The
test lists have no labels (they are on the server): those rows are zeros.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vggfeat.checked import shown
from vggfeat.datasets.annotation import Annotation, Object, read_annotation
from vggfeat.datasets.download import need_root
from vggfeat.datasets.items import Box, Items, covering, in_frame
from vggfeat.datasets.voc import devkit, lines
from vggfeat.decode import Frame, expected_frame
from vggfeat.errors import VggfeatError

# As the devkit's VOCinit.m has them; "other" does none of the ten.
ACTIONS = [
    *("other", "jumping", "phoning", "playinginstrument", "reading", "ridingbike"),
    *("ridinghorse", "running", "takingphoto", "usingcomputer", "walking"),
]
SETS = Path("ImageSets", "Action")
Person = tuple[str, int]
"""An image's id, and the number of the object in it."""


def load(root: Path | None) -> Items:
    """All persons sorted by image and number, with splits "train", "val" and, where listed, "test".

    root: the folder that holds VOCdevkit, or VOCdevkit, or the VOC2012 folder in it.
    labels: (N, 11) int8. Test rows are zeros when there is no CLASS_test.txt at all.
    Raises VggfeatError naming the list and the line, or the XML file, that is missing, malformed or
    contradicts another; a box without an area.
    """
    folder = devkit(need_root("voc2012action", root, "the folder that holds VOCdevkit"), 2012, SETS)
    lists = folder / SETS
    persons_of = {split: _read_persons(lists / f"{split}.txt") for split in ("train", "val")}
    if (lists / "test.txt").exists():
        persons_of["test"] = _read_persons(lists / "test.txt")
    persons = sorted(set().union(*persons_of.values()))
    if len(persons) != sum(map(len, persons_of.values())):
        raise VggfeatError(
            f"{lists}: a person is in two of {', '.join(f'{s}.txt' for s in persons_of)}; they must"
            " differ"
        )
    row_of = {person: row for row, person in enumerate(persons)}
    labels = np.zeros((len(persons), len(ACTIONS)), np.int8)
    for split, listed in persons_of.items():
        if split == "test" and not any((lists / f"{name}_test.txt").exists() for name in ACTIONS):
            continue
        for column, name in enumerate(ACTIONS):
            for person, value in _read_labels(lists / f"{name}_{split}.txt", listed).items():
                labels[row_of[person], column] = value
    splits = {
        split: np.array(sorted(row_of[person] for person in part), np.int64)
        for split, part in persons_of.items()
    }
    where = {person: at for part in persons_of.values() for person, at in part.items()}
    files = [f"JPEGImages/{image}.jpg" for image, _ in persons]
    return Items(
        dataset="voc2012action",
        protocol="voc2012action",
        root=folder,
        names=[f"{file}#{number}" for file, (_, number) in zip(files, persons, strict=True)],
        labels=labels,
        classes=list(ACTIONS),
        splits=splits,
        boxes=_boxes(folder / "Annotations", persons, where),
        files=files,
        lists=[
            *(str(path.relative_to(folder)) for path in sorted(lists.glob("*.txt"))),
            *dict.fromkeys(f"Annotations/{image}.xml" for image, _ in persons),
        ],
    )


def _boxes(folder: Path, persons: list[Person], where: dict[Person, str]) -> np.ndarray:
    """(N, 4) int32: whole pixels that cover each person's box. where: the list's line, in words."""
    boxes = np.zeros((len(persons), 4), np.int32)
    read: tuple[str, Annotation] | None = None
    frame: Frame | None = None
    for row, (image, number) in enumerate(persons):
        path = folder / f"{image}.xml"
        if read is None or read[0] != image:
            if not path.is_file():
                raise VggfeatError(
                    f"no {path.absolute()}, of which {where[image, number]} tells: the copy is"
                    " incomplete; unpack the archive again"
                )
            read = image, read_annotation(path)
            frame = expected_frame(folder.parent / "JPEGImages" / f"{image}.jpg")
        objects = read[1].objects
        if number > len(objects):
            raise VggfeatError(
                f"{where[image, number]}: {path.absolute()} has no object {number}, but"
                f" {len(objects)}"
            )
        person = objects[number - 1]
        boxes[row] = _box(person, read[1].size, f"{path.absolute()}, line {person.line}", frame)
    return boxes


def _box(person: Object, told: tuple[float, float] | None, where: str, frame: Frame | None) -> Box:
    """The whole pixels that cover a person. frame: the image's, where it is there."""
    if frame is None:
        return covering(person.corners, where, told)
    corners = in_frame(person.corners, frame, told)
    if corners is None and told is not None:
        raise VggfeatError(
            f"{where}: the XML is of a picture of {told[1]:g}x{told[0]:g} pixels, and the image has"
            f" {frame.width}x{frame.height}: unpack the archive's own again"
        )
    return covering(corners or person.corners, where, frame.upright)


def _read_persons(path: Path) -> dict[Person, str]:
    """Those of a split's list, each with its line, in words."""
    persons: dict[Person, str] = {}
    for n, words in lines(path):
        where = f"{path}, line {n}"
        if len(words) != 2:
            raise VggfeatError(
                f"{where}: expected an image id and an object's number, found"
                f" {shown(' '.join(words))}"
            )
        person = _person(words, where)
        if person in persons:
            raise VggfeatError(f"{where}: object {person[1]} of {person[0]} is listed twice")
        persons[person] = where
    return persons


def _person(words: list[str], where: str) -> Person:
    image, number = words[:2]
    # ten digits hold all numbers that fit; Python refuses to read thousands
    fits = number.isdecimal() and len(number) <= 10 and 0 < int(number) < 1 << 31
    if "/" in image or "\0" in image or not fits:
        raise VggfeatError(
            f"{where}: expected an image id and an object's number from 1, found"
            f" {shown(' '.join(words))}"
        )
    return image, int(number)


def _read_labels(path: Path, listed: dict[Person, str]) -> dict[Person, int]:
    """Person -> 1, 0 or -1, for exactly those of the split's own list."""
    value_of: dict[Person, int] = {}
    for n, words in lines(path):
        where = f"{path}, line {n}"
        if len(words) != 3 or words[2] not in ("1", "0", "-1"):
            raise VggfeatError(
                f"{where}: expected an image id, an object's number and 1, 0 or -1, found"
                f" {shown(' '.join(words))}"
            )
        person = _person(words, where)
        if person in value_of or person not in listed:
            wrong = (
                "is listed twice"
                if person in value_of
                else f"is not in {path.name.rsplit('_', 1)[1]}"
            )
            raise VggfeatError(f"{where}: object {person[1]} of {person[0]} {wrong}")
        value_of[person] = int(words[2])
    if len(value_of) < len(listed):
        image, number = min(listed.keys() - value_of.keys())
        raise VggfeatError(
            f"{path}: no label for {len(listed) - len(value_of)} of the persons, the first is"
            f" object {number} of {image}"
        )
    return value_of
