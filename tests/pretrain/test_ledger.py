"""The ledger of Tables 3 to 10: means and spreads, rows of several seeds, its page, its files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vggfeat.transfer
from pretrain.claims import claims_markdown
from pretrain.kept import KeptPosteriors
from pretrain.ledger import (
    ILSVRC,
    check_ledger,
    read_cells,
    section_markdown,
    sections,
    table_markdown,
    with_new,
    with_section,
)
from pretrain.loader import read_training_set
from pretrain.posteriors import images_of
from pretrain.recipe import read_recipe
from pretrain.runs import write_tables
from pretrain.tables import Cell
from tests.pretrain.conftest import cell, verdicts
from vggfeat.datasets.items import name_digest
from vggfeat.errors import VggfeatError
from vggfeat.ledger import content
from vggfeat.writer import stamp


def test_cells_of_few_classes_have_no_top_5_error(tmp_path: Path) -> None:
    few = [cell("A 256", 20, seed, classes=5, top5=None) for seed in range(2)]
    assert "| A 256 | dense | 20.0 +- 0.0 / - | 2 |" in table_markdown(3, few)
    (tmp_path / "c.json").write_text(json.dumps(content(few)))
    assert read_cells(tmp_path / "c.json") == few
    one = KeptPosteriors(
        "imagenet", "images", "val", ["val/a/0.png"], np.zeros(1, int), ["a"], {}, []
    )
    with pytest.raises(VggfeatError, match="know one class only"):
        write_tables((3,), one, tmp_path / "results.md")


def test_tables_have_means_and_spreads_and_claims_the_seeds_that_both_have() -> None:
    cells = [cell("A 256", 20 + 2 * seed, seed, 1) for seed in range(3)]
    cells += [cell("A-LRN 256", 30, seed, 2) for seed in (1, 2, 5)]
    ordered = with_new([], cells)
    again = with_new(ordered, [cell("A 256", 40, 1, 3)])
    assert len(again) == len(ordered) == 6
    table = table_markdown(3, ordered)
    assert (
        "| A 256 | dense | 22.0 +- 2.0 / 5.5 +- 0.5 | 3 | S 36; Q 36 | 20 | 2026-01-01 | 29.6 /"
        " 10.4 |" in table
    )
    assert (
        "Not run: B 256; C 256; C 384; C 256-512; D 256;" in table and table.count("Not run") == 1
    )
    claims = claims_markdown(ordered)
    line = next(line for line in claims.splitlines() if "LRN" in line)
    assert "| 23.0, 30.0 |" in line and line.endswith("| holds | 2 |")  # seeds 1 and 2
    alone = table_markdown(3, [cell("A 256", 20)])
    assert "| A 256 | dense | 20.0 / 5.0 | 1 |" in alone


def test_nets_that_differ_in_more_than_the_seed_are_rows_of_their_own() -> None:
    def made(seed: int, **others: Any) -> Cell:
        made = cell("A 256", 20 + seed, seed)
        return replace(made, nets=[replace(made.nets[0], **others)])

    def table(*cells: Cell) -> list[str]:
        lines = section_markdown("x", cells).splitlines()
        found = [line for line in lines if line.startswith(("| A 256", "- ["))]
        return [line.partition(" / ")[0] if line[0] == "|" else line[2:] for line in found]

    # as the plateau rule may end it
    assert table(made(0), made(1, epochs=21)) == ["| A 256 | dense | 20.5 +- 0.7"]
    assert table(made(0, epochs=1.0), made(1, epochs=2.0), made(2, epochs=2.0)) == [
        "[1]: the recipe with 1 epoch of training",
        "[2]: the recipe with 2 epochs of training",
        "| A 256 [1] | dense | 20.0",
        "| A 256 [2] | dense | 21.5 +- 0.7",
    ]
    assert table(made(0), made(1, epochs=None))[:2] == [
        "[1]: the recipe with 20 epochs of training",
        "[2]: the recipe with unknown epochs of training",
    ]
    assert table(made(0), made(1, training_set="ef56"))[:2] == [
        "[1]: the recipe with training images cd34",
        "[2]: the recipe with training images ef56",
    ]
    assert table(made(0), made(1, precision="bfloat16"))[:2] == [
        "[1]: the recipe with bfloat16",
        "[2]: the recipe with float32",
    ]
    # a recipe of the same name whose numbers have changed
    elsewhere = replace(made(1), S="73", Q="73")
    assert table(made(0), elsewhere)[:2] == [
        "[1]: the recipe with S 36, tested at 36",
        "[2]: the recipe with S 73, tested at 73",
    ]
    assert with_new([made(1)], [elsewhere]) == [made(1), elsewhere]
    # nor does one seed's net of other images take the other's place
    other = made(0, training_set="ef56")
    assert with_new([made(0)], [other]) == [made(0), other]
    against = [
        replace(cell("A-LRN 256", 30, seed, key=1), nets=made(seed, epochs=2.0).nets)
        for seed in (0, 1)
    ]
    said = verdicts(made(0, epochs=1.0), made(1, epochs=2.0), *against)
    assert list(said) == ["A 256 [1] against A-LRN 256", "A 256 [2] against A-LRN 256"]
    assert said["A 256 [1] against A-LRN 256"].startswith("confounded: 1 epochs against 2")


def test_a_page_whose_cells_are_missing_keeps_its_rows(tmp_path: Path) -> None:
    """The page's rows were replaced by the fewer ones of the next command."""
    page, own = tmp_path / "results.md", tmp_path / "ledger-mini-images.json"
    (heading,) = sections([cell("A 256", 20)])
    text = with_section("# Results\n", ILSVRC, [])
    page.write_text(with_section(text, heading, [cell("A 256", 20)]))
    with pytest.raises(
        VggfeatError, match=r"cells are missing, .*/ledger-mini-images.json: bring that file back"
    ):
        check_ledger(page)
    own.write_text(json.dumps(content([cell("A 256", 20)])))
    check_ledger(page)  # the empty section of the paper's own data has no cells
    page.write_text(with_section(page.read_text(), ILSVRC, [cell("A 256", 20)]))
    with pytest.raises(VggfeatError, match=r"ledger-ilsvrc\.json: bring that file back"):
        check_ledger(page)
    own.write_text(own.read_text()[:100])
    with pytest.raises(
        VggfeatError, match=r"is not JSON: .*: bring it back from .* or give another `ledger`"
    ):
        check_ledger(page)


def test_what_nobody_ran_is_one_line_and_another_task_is_called_one() -> None:
    text = section_markdown(ILSVRC, [])
    missing = [line for line in text.splitlines() if "ot run" in line and line[0] != "|"]
    assert missing == ["Not run: all 44 rows of Tables 3 to 6, 8 and 9."]
    assert re.findall(r"\*\*Table (\d+)\*\*", text) == ["7", "10"]  # the others' rows are there
    standin = section_markdown("x", [cell("A 256", 20)])
    assert (
        "The last column is of another task" in standin
        and "| the paper, ILSVRC's 1,000 classes |" in standin
    )
    assert standin.count("Not run: all 10 rows.") == 1  # Table 4
    ours = section_markdown(ILSVRC, [cell("A 256", 20)])
    assert "another task" not in ours and "| the paper |" in ours


def test_other_images_and_other_recipes_have_sections_of_their_own() -> None:
    cells = [
        cell("A 256", 20, key=1),
        cell("A-LRN 256", 30, key=2, image_set="ef56"),
        cell("A-LRN 256", 30, key=3, recipe="mine"),
    ]
    assert len(with_new([], cells)) == 3
    found = sections(cells)
    assert [len(part) for part in found.values()] == [1, 1, 1]
    assert (
        next(iter(found))
        == "Tables 3 to 10, stand-in: recipe mini on images val, 400 images of 7 classes (ab12)"
    )
    text = "# Results\n"
    for heading, part in found.items():
        text = with_section(text, heading, part)
        assert with_section(text, heading, part) == text  # again: not twice
        assert verdicts(*part) == {}
    assert text.count("## Tables 3 to 10, stand-in") == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"row": None}, r"cells\[0\].row must be text, not None"),
        ({"depth": 3}, r"\[0\] can't have 'depth': a Cell has"),
        ({"top1": "x"}, r"\[0\].top1 must be a finite number, not 'x'"),
        ({"top1": 101}, r"\[0\].top1 must lie in 0..100, not 101"),
        ({"images": 0}, r"\[0\].images must lie in 1..1e\+08, not 0"),
        ({"nets": [1]}, r"\[0\].nets\[0\] must be a record, not 1"),
        ({"split": "train"}, r"\[0\].split must be one of val, not 'train'"),
        ({"top1": 21}, "`wrong` is not of 21.0 % errors"),
        ({"wrong": "abc"}, "`wrong` is not of 400 images"),
        ({"wrong": "00"}, "`wrong` is not of 400 images"),
        ({"seed": -1}, r"\[0\].seed must lie in"),
    ],
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "ledger-x.json"
    sound = content([cell("A 256", 20)])
    path.write_text(json.dumps({**sound, "cells": [asdict(cell("A 256", 20)) | change]}))
    with pytest.raises(VggfeatError, match=says):
        check_ledger(tmp_path / "results.md")
    path.write_text(json.dumps(sound))
    assert read_cells(path) == [cell("A 256", 20)]
    short = replace(cell("B 256", 20), images=8, wrong="00", top1=0.0)
    path.write_text(json.dumps(content([cell("A 256", 20), short])))
    with pytest.raises(
        VggfeatError, match="cells of one set of images are of other numbers of them"
    ):
        check_ledger(tmp_path / "results.md")


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b"[" + b"9" * 5000 + b"]"]
)
def test_what_is_no_ledger_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "ledger-x.json").write_bytes(text)
    with pytest.raises(
        VggfeatError, match=r"ledger-x.json is (not|no ledger of cells of version 2)"
    ):
        check_ledger(tmp_path / "results.md")


DOCS = Path(__file__).parents[2] / "docs"


def test_the_results_page_is_made_of_the_cells() -> None:
    text = (DOCS / "results.md").read_text()
    files = sorted(DOCS.glob("ledger-*.json"))
    assert files and section_markdown(ILSVRC, []) in text
    for path in files:
        for heading, part in sections(read_cells(path)).items():
            assert section_markdown(heading, part) in text


def test_the_cells_are_of_the_images_that_they_say(data: Path) -> None:
    root = data / "imagenette144"
    cells = read_cells(DOCS / "ledger-tables-imagenette144.json")
    items = images_of(root, "val", 0)
    assert items.labels is not None
    files = np.array([stamp(items.source(i))[3] for i in range(len(items))], np.uint32)
    whole = KeptPosteriors(
        items.dataset, root.name, "val", items.names, items.labels, items.classes, {}, [], files
    )
    assert {(c.image_set, c.images, c.classes) for c in cells} == {
        (whole.image_set, len(items), len(items.classes))
    }
    learned = read_training_set(root, read_recipe("tables"))
    rows = np.sort(np.concatenate([learned.train, learned.held_out]))
    digest = name_digest([learned.items.names[i] for i in rows])
    assert {net.training_set for c in cells for net in c.nets} == {digest}


def test_the_servers_column_is_the_papers_and_ours_is_empty() -> None:
    pair = "D 256-512 + E 256-512"
    nets = [cell(f"{net} 256-512", 0).nets[0] for net in "DE"]
    both = cell(pair, 22, table=6, nets=nets, S="36 + 36")
    text = table_markdown(6, [both], ilsvrc=True)
    assert (
        "| mode | ours | ours, test | seeds | S; Q | epochs | date | the paper | the paper, test |"
        in text
    )
    ours = "| 22.0 / 5.5 | - | 1 | S 36 + 36; Q 36 | 20 + 20 | 2026-01-01 | 24.0 / 7.1 | 7.0 |"
    assert f"| {pair} | dense {ours}" in text
    assert text.count("Not run: ") == 1 and f"; {pair} (crops); {pair} (both)." in text


def test_table_7_has_our_own_rows_beside_the_papers_and_the_others() -> None:
    seeds = [
        replace(cell("E 256-512", 20 + 2 * seed, seed, table=5), mode="both") for seed in range(3)
    ]
    whole = table_markdown(7, seeds, ilsvrc=True)
    ours = "24.4 | 7.1 | 7.0 | 22.0 +- 2.0 | 5.5 +- 0.5 | - |"
    own = f"| VGG, 1 net, multi-crop and dense | the paper | {ours}"
    assert own in whole
    none = "23.7 | 6.8 | 6.8 | not run | not run | - |"
    other = f"| VGG, 2 nets, multi-crop and dense | the paper | {none}"
    assert other in whole
    assert "| GoogLeNet, 7 nets | others | - | 6.7 | 6.7 | - | - | - |" in whole
    assert "| Zeiler & Fergus, 6 nets | others | 36.0 | 14.7 | 14.8 | - | - | - |" in whole
    assert whole.count("| others |") == 12
    # among ten classes nothing of theirs stands beside ours
    part = table_markdown(7, seeds)
    assert own in part and "| others |" not in part and other not in part
    assert "stand in its section" in part and table_markdown(7, [cell("A 256", 20)]) == ""


def test_tables_8_to_10_read_like_the_papers() -> None:
    scr, fused = "D 384, SCR, FC1-2", "D 256 at 256 + D 384 at 352,384"
    nets = [cell(f"D {S}", 0).nets[0] for S in ("256", "384")]
    one = replace(cell(scr, 40, table=8), mode="centre", top5=None, box_set="b0")
    two = cell(fused, 30, table=9, nets=nets, S="36 + 48", Q="36 + 44,48")
    two = replace(two, top1=50.0, top5=30.0, judged="top5", box_set="b0", classifier="c0")
    eight = table_markdown(8, [one, two], ilsvrc=True)
    assert "| net, the paper's S; boxes; what learned | ours | seeds | S; Q | epochs |" in eight
    assert f"| {scr} | 40.0 | 1 | S 36; Q 36 | 20 | 2026-01-01 | 36.4 |" in eight
    assert "Not run: D 384, PCR, FC1-2; D 384, PCR, all layers." in eight
    nine = table_markdown(9, [one, two], ilsvrc=True)
    figures = "| 50.0 / 30.0 | - | 1 | S 36 + 48; Q 36 + 44,48 | 20 + 20 | 2026-01-01 | - / 26.9 |"
    assert f"| {fused} {figures} 25.3 |" in nine
    assert "Not run: D 256 at 256; D 384 at 384; D 384 at 352,384." in nine
    ten = table_markdown(10, [one, two], ilsvrc=True)
    assert "| VGG | the paper | 26.9 | 25.3 | 30.0 | - |" in ten
    assert "| OverFeat | others | 30.0 | 29.9 | - | - |" in ten
    text = section_markdown(ILSVRC, [one, two])
    assert re.findall(r"\*\*Table (\d+)\*\*", text) == [str(n) for n in range(3, 11)]


def test_cells_of_boxes_are_read_as_they_were_written(tmp_path: Path) -> None:
    """And the keys of theirs aren't in others' cells, which are as they were before."""
    path = tmp_path / "ledger-x.json"
    boxed = replace(cell("D 256 at 256", 20, table=9), box_set="b0", classifier="c0")
    boxed = replace(boxed, top1=40.0, top5=20.0, judged="top5")
    path.write_text(json.dumps(content([cell("A 256", 20), boxed])))
    plain, more = json.loads(path.read_text())["cells"]
    assert more.keys() - plain.keys() == {"box_set", "classifier", "judged"}
    assert read_cells(path) == [cell("A 256", 20), boxed]
    # what is measured again takes the place of the same boxes, told by the same classifier
    other = replace(boxed, box_set="b1")
    assert with_new([boxed], [other]) == [boxed, other] and with_new([boxed], [boxed]) == [boxed]


def test_the_formats_page_has_every_key_of_a_cell() -> None:
    text = (DOCS / "formats.md").read_text().partition("\n## The ledger's cells\n")[2]
    text = text.partition("\n## ")[0]
    own, transfer = re.split(r"\| key \| meaning \|", text)[1:]
    for kind, part in ((Cell, own), (vggfeat.transfer.Cell, transfer)):
        rows = [line.split(" | ")[0] for line in part.splitlines() if line.startswith("| `")]
        named = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
        assert named == {field.name for field in fields(kind)}, kind


def test_a_page_of_an_earlier_version_has_its_sections_once() -> None:
    """Their headings said "Tables 3 to 6"."""
    for heading, part in ((ILSVRC, []), *sections([cell("A 256", 20)]).items()):
        former = heading.replace("Tables 3 to 10", "Tables 3 to 6")
        text = with_section("# Results\n", heading, part).replace(heading, former)
        assert with_section(text, heading, part) == with_section("# Results\n", heading, part)
