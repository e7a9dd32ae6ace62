"""The paper's tables as data, and cells."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pretrain.tables import (
    BOXES,
    COMPARED,
    PAPER,
    ROWS,
    Member,
    PaperRow,
    box_q,
    box_scales,
    by_row,
    paper_scales,
)
from tests.pretrain.conftest import cell
from tests.vggfeat.datasets.made import DATA, needs_data
from vggfeat.errors import VggfeatError


@pytest.mark.parametrize(
    ("S", "crop", "one", "several"),
    [
        ((256, 256), 224, (256,), (224, 256, 288)),  # Table 4: S - 32, S, S + 32
        ((384, 384), 224, (384,), (352, 384, 416)),
        ((256, 512), 224, (384,), (256, 384, 512)),
        ((112, 112), 96, (112,), (98, 112, 126)),
        ((240, 240), 224, (240,), (224, 240, 272)),  # not below the crop
        # and none twice, which would count twice in the mean
        (
            (224, 224),
            224,
            (224,),
            (224, 256),
        ),
        ((256, 257), 224, (256,), (256, 257)),
    ],
)
def test_test_scales_follow_from_s(
    S: tuple[int, int], crop: int, one: tuple[int, ...], several: tuple[int, ...]
) -> None:
    assert paper_scales(S, crop, multi=False) == one
    assert paper_scales(S, crop, multi=True) == several


def test_boxes_are_looked_for_at_s_and_below() -> None:
    """Table 9: 256/256, 384/384, 384/352,384."""
    assert box_scales((384, 384), 224, lower=False) == (384,)
    assert box_scales((384, 384), 224, lower=True) == (352, 384)
    assert box_scales((144, 144), 96, lower=True) == (130, 144)
    assert box_scales((224, 224), 224, lower=True) == (224,)
    assert (box_q("384", lower=False), box_q("384", lower=True)) == ("384", "352,384")


def test_each_row_has_its_place_and_its_figures() -> None:
    assert len(ROWS) == len(PAPER) + len(BOXES) == 44
    counts = {table: sum(row.table == table for row in ROWS.values()) for table in range(3, 10)}
    assert counts == {3: 15, 4: 10, 5: 8, 6: 4, 7: 0, 8: 3, 9: 4}  # and controls
    assert [row.test5 for row in PAPER if row.table == 6] == [7.3, 7.0, None, 6.8]
    assert {row.test5 for row in PAPER if row.table != 6} == {None}
    eight = {row.name: row.beside for row in BOXES if row.table == 8}
    assert eight == {
        "D 384, SCR, FC1-2": "36.4",
        "D 384, PCR, FC1-2": "34.3",
        "D 384, PCR, all layers": "33.1",
    }
    nine = {row.name: (row.error, row.test5) for row in BOXES if row.table == 9}
    assert nine == {
        "D 256 at 256": (29.5, None),
        "D 384 at 384": (28.2, 26.7),
        "D 384 at 352,384": (27.5, None),
        "D 256 at 256 + D 384 at 352,384": (26.9, 25.3),
    }


def test_tables_7_and_10_take_their_own_rows_from_others() -> None:
    """The same figures, which aren't measured twice."""
    own = [row for row in COMPARED if row.key is not None]
    assert [row.table for row in own] == [7, 7, 7, 10]
    for row in own:
        assert row.key is not None
        theirs = ROWS[row.key]
        top1 = "-" if row.top1 is None else row.top1
        assert theirs.beside == f"{top1} / {row.top5}"
        assert theirs.test5 in (None, row.test5)  # Table 5 has no test set
    assert {row.method.partition(",")[0] for row in COMPARED if row.key is None} == {
        *("GoogLeNet", "MSRA", "Clarifai", "Zeiler & Fergus", "OverFeat", "Krizhevsky et al.")
    }


def test_a_member_is_called_what_it_is() -> None:
    assert Member("D", "256", control=True).name == "D 256 (control)"
    assert Member("D", "256-512", "fc").name == "D 256-512 (FC layers only)"


def test_a_cell_of_table_9_is_judged_by_its_top_5_error() -> None:
    made = cell("D 256 at 256", 20, table=9)
    five = replace(made, top1=40.0, top5=20.0, judged="top5")
    assert five.error == 20 and made.error == 20
    with pytest.raises(VggfeatError, match=r"`wrong` is not of 40\.0 % errors"):
        replace(five, judged="top1")
    with pytest.raises(VggfeatError, match="`wrong` is not of nan % errors"):
        replace(five, top5=None)


def test_other_boxes_or_classes_make_a_row_of_its_own() -> None:
    one = replace(cell("D 256 at 256", 20, table=9), box_set="b0", classifier="c0")
    other = replace(one, seed=1, box_set="b1"), replace(one, seed=2, classifier="c1")
    told = [changes for _, changes in by_row([one, *other])]
    assert sorted(told) == [
        ("boxes b0", "classes by c0"),
        ("boxes b0", "classes by c1"),
        ("boxes b1", "classes by c0"),
    ]
    assert len(by_row([one, replace(one, seed=1)])) == 1


@needs_data
def test_the_papers_figures_are_those_of_the_paper() -> None:
    lines = (DATA.parent / "paper.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    def below(title: str) -> list[list[str]]:
        (first,) = (i for i, row in enumerate(cells) if row[0].startswith(title))
        last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
        return cells[first + 2 : last]

    def numbers(*texts: str) -> list[float | None]:
        return [None if text == "-" else float(text) for text in texts]

    for row in below("Table 3"):
        for table, part in ((3, row[:5]), (4, row[6:])):
            if part[0]:
                ours = ROWS[table, f"{part[0]} {part[1]}", "dense"]
                assert isinstance(ours, PaperRow)
                assert [ours.top1, ours.top5] == numbers(*part[3:])
    for net, *each in below("Table 5"):
        for mode, text in zip(("dense", "crops", "both"), each, strict=True):
            assert ROWS[5, f"{net} 256-512", mode].beside == text
    six = [row for row in PAPER if row.table == 6]
    for ours, (_, *each) in zip(six, below("Table 6"), strict=True):
        assert [ours.top1, ours.top5, ours.test5] == numbers(*each)
    seven = [row for row in COMPARED if row.table == 7]
    for other, (name, *each) in zip(seven, below("Table 7"), strict=True):
        assert other.method.split(",")[0] == name.split(",")[0]
        assert [other.top1, other.top5, other.test5] == numbers(*each)
    (ten,) = (line for line in lines if line.startswith("Table 10"))
    told = [f"{row.method} {row.top5 or '-'} / {row.test5}" for row in COMPARED if row.table == 10]
    assert ten.partition(": ")[2].rstrip(".").split("; ") == told
    (eight,) = (line for line in lines if "Table 8 (S=384" in line)
    for own in BOXES:
        if own.table == 8:
            layers = "FC1-2" if own.nets[0].learn == "fc" else "all layers"
            assert f"{own.nets[0].boxes.upper()} {layers} {own.error}" in eight
    (nine,) = (line for line in lines if line.startswith("Table 9"))
    assert re.findall(r" (\d+\.\d)/(-|\d+\.\d)", nine) == [
        (str(row.error), "-" if row.test5 is None else str(row.test5))
        for row in BOXES
        if row.table == 9
    ]
