"""Which row of Tables 8 and 9 what was found stands in, and on which images."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.box_cells import Boxed, Images, box_cell, images_with_boxes, write_box_tables
from pretrain.kept import KeptPosteriors
from pretrain.ledger import read_cells
from pretrain.posteriors import images_of
from pretrain.tables import ROWS
from vggfeat.datasets.boxes import Boxes
from vggfeat.errors import VggfeatError
from vggfeat.writer import stamp

CLASSIFIER = hashlib.sha256(b"c0").hexdigest()
FACTS = {
    "net": "D",
    "boxes": "pcr",
    "crop": "224",
    "learn": "all",
    "recipe": "paper",
    "changes": "",
    "seed": "0",
    "epochs": "100.00",
    "training_set": "cd34",
    "weights": "w",
    "pool": "floor",
    "precision": "float32",
}


def boxed(*nets: tuple[str, str, tuple[int, ...]], five: bool, **facts: str) -> Boxed:
    """Of these S, learned layers and Q; of four images the first has another box, and the second
    another class, too.
    """
    return Boxed(
        [
            {**FACTS, "train_scale": S, "stands_for": S, "learn": learn, "fingerprint": S, **facts}
            for S, learn, _ in nets
        ],
        [Q for _, _, Q in nets],
        np.array([True, True, False, False]),
        np.array([True, False, False, False]) if five else None,
        "c0" if five else "",
    )


PLACE = Images("val", "val", "ab12", "b0", 1000)


def test_what_found_boxes_stands_in_the_papers_row_or_in_its_own() -> None:
    small, large = ("256", "all", (256,)), ("384", "all", (352, 384))
    found = {
        (8, "D 384, PCR, FC1-2", "centre"): boxed(("384", "fc", (384,)), five=False),
        (9, "D 384 at 384", "dense"): boxed(("384", "all", (384,)), five=True),
        (9, "D 256 at 256 + D 384 at 352,384", "dense"): boxed(small, large, five=True),
    }
    for key, each in found.items():
        made = box_cell(each, PLACE, "cmd")
        assert made.key == key and key in ROWS
        five = key[0] == 9
        assert (made.top1, made.top5) == (50.0, 25.0 if five else None)
        assert made.wrong_images().tolist() == [True, not five, False, False]
        assert (made.box_set, made.classifier) == ("b0", CLASSIFIER if five else "")
    assert (made.S, made.Q) == ("256 + 384", "256 + 352,384")
    assert [net.fingerprint for net in made.nets] == ["256", "384"]
    odd = box_cell(boxed(("384", "fc", (384, 512)), five=True), PLACE, "cmd")
    assert odd.row == "D 384, PCR, FC1-2 at Q=384,512"
    other = boxed(("96", "all", (96,)), five=False, stands_for="")
    assert box_cell(other, PLACE, "cmd").row == "D S=96, PCR, all layers"
    # another Q, or other merging, is another row
    enlarged = boxed(("384", "fc", (512,)), five=False)
    assert box_cell(enlarged, PLACE, "cmd").row == "D 384, PCR, FC1-2 at Q=512"
    loose = replace(boxed(small, five=True), unlike=("merge_above=0.95",))
    assert box_cell(loose, PLACE, "cmd").changes == ["merge_above=0.95"]
    with pytest.raises(VggfeatError, match="boxes are of the test images"):
        box_cell(odd_images := boxed(small, five=True), replace(PLACE, split="test"), "cmd")
    apart = replace(odd_images, facts=[*odd_images.facts, {**odd_images.facts[0], "seed": "1"}])
    with pytest.raises(VggfeatError, match="w and w are of different recipes or seeds"):
        box_cell(apart, PLACE, "cmd")


def test_boxes_and_classes_of_the_same_images_have_one_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "results.md"
    one = boxed(("384", "fc", (384,)), five=False)
    two = boxed(("384", "all", (384,)), five=True)
    write_box_tables([one, two], PLACE, "cmd", page)
    (path,) = tmp_path.glob("ledger-*.json")
    assert path.name == "ledger-paper-val.json" and len(read_cells(path)) == 2
    text = page.read_text()
    assert "| D 384, PCR, FC1-2 | 50.0 | 1 |" in text and "| D 384 at 384 | 50.0 / 25.0 |" in text
    printed = capsys.readouterr().out
    assert "**Table 8**" in printed and "**Table 9**" in printed and "**Table 3**" not in printed
    # on the paper's own images: in its own tables
    write_box_tables([one, two], replace(PLACE, ilsvrc=True), "cmd", page)
    assert len(read_cells(tmp_path / "ledger-ilsvrc.json")) == 2
    part = page.read_text().partition("## Tables 3 to 10, ILSVRC-2012\n")[2]
    assert "| D 384, PCR, FC1-2 | 50.0 | 1 | S 384; Q 384 | 100 |" in part.partition("<!-- end")[0]


def test_images_are_told_as_their_classes_errors_tell_them(images: Path) -> None:
    """By names, classes and files: the same section of the page. Boxes by themselves."""
    items = images_of(images, "val", 0)
    assert items.labels is not None
    n = len(items)
    corners = np.tile([1.0, 2.0, 30.0, 40.0], (n, 1))
    boxes = Boxes(np.arange(n), np.asarray(items.labels, np.int32), corners, np.zeros(n, bool))
    every = np.ones(n, bool)
    crc32 = np.array([stamp(items.source(i))[3] for i in range(n)], np.uint32)
    classes = items.classes[::-1]  # as a net may have them
    kept = KeptPosteriors(
        items.dataset, "images", "val", items.names, items.labels, items.classes, {}, [], crc32
    )
    told = images_with_boxes(items, "val", classes, boxes, every)
    assert (told.image_set, told.data, told.classes) == (kept.image_set, "images", 7)
    assert not told.ilsvrc
    corners[3, 0] = 1.5
    moved = images_with_boxes(items, "val", classes, boxes, every)
    assert moved.image_set == told.image_set and moved.box_set != told.box_set
    # without the image of that box: other images
    some = every & (np.arange(n) != 3)
    fewer = images_with_boxes(items, "val", classes, boxes, some)
    assert fewer.image_set != told.image_set
    # an image that can't be read is not the one that was
    lost = images_with_boxes(items, "val", classes, boxes, every, {5})
    assert lost.image_set != moved.image_set and lost.box_set == moved.box_set
