"""Made-up trees and lists, and what a test says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vggfeat.datasets import Items, load
from vggfeat.datasets.voc import CLASSES
from vggfeat.datasets.voc_action import ACTIONS
from vggfeat.errors import VggfeatError

DATA = Path(__file__).parents[4] / "shared" / "data"
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


CLASSES_IN = ("cat/1.jpg", "dog/2.jpg")


def tree(root: Path, *folders: str, names: tuple[str, ...] = CLASSES_IN) -> Path:
    touch(root, *(f"{folder}/{name}" for folder in folders for name in names))
    return root


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "data.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def annotation(*boxes: tuple[int, int, int, int], size: tuple[int, int], name: str) -> str:
    """XML of an image (width, height) with objects of one name. boxes: left, top, right, bottom in
    whole pixels, which VOC counts from 1 and with both ends.
    """
    objects = (
        f"<object><name>{name}</name><bndbox><xmax>{r}</xmax><xmin>{x + 1}</xmin>"
        f"<ymax>{b}</ymax><ymin>{y + 1}</ymin></bndbox></object>"
        for x, y, r, b in boxes
    )
    sides = f"<width>{size[0]}</width><height>{size[1]}</height><depth>3</depth>"
    return f"<annotation><size>{sides}</size>{''.join(objects)}</annotation>"


Persons = dict[tuple[str, int], tuple[str, ...]]
"""(image, object's number) -> what that person does."""


def make_action(folder: Path, lists: dict[str, Persons], labelled: tuple[str, ...]) -> Path:
    """The lists of an action devkit, as the real ones are written. Gives ImageSets/Action."""
    sets = folder / "ImageSets" / "Action"
    sets.mkdir(parents=True)
    for split, persons in lists.items():
        (sets / f"{split}.txt").write_text("".join(f"{i} {n}\n" for i, n in persons))
        for action in ACTIONS if split in labelled else ():
            lines = (
                f"{i} {n} {' 1' if action in done else '-1'}\n" for (i, n), done in persons.items()
            )
            (sets / f"{action}_{split}.txt").write_text("".join(lines))
    return sets
