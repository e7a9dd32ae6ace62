"""The ledger's arithmetic: verdicts over images and seeds, means and spreads, rows of several
seeds.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from pretrain.kept import KeptPosteriors
from pretrain.loader import read_training_set
from pretrain.posteriors import images_of
from pretrain.recipe import read_recipe
from pretrain.runs import write_tables
from pretrain.tables import (
    ILSVRC,
    Cell,
    Learned,
    check_ledger,
    claims_markdown,
    difference,
    holm,
    ledger_content,
    pack,
    paper_scales,
    read_cells,
    section_markdown,
    sections,
    table_markdown,
    with_new,
    with_section,
)
from vggfeat.datasets.items import name_digest
from vggfeat.errors import VggfeatError

IMAGES = 400


def cell(
    row: str,
    errors: float,
    seed: int = 0,
    key: int = 0,
    table: int = 3,
    epochs: float | None = 20.0,
    **others: Any,
) -> Cell:
    """A cell with this many per cent of wrong images, drawn by key; of one net, known by row and
    seed.
    """
    wrong = np.zeros(IMAGES, bool)
    wrong[
        np.random.default_rng([key, seed]).permutation(IMAGES)[: round(errors / 100 * IMAGES)]
    ] = True
    top1 = 100 * float(wrong.mean())
    made = Cell(
        table,
        row,
        "dense",
        "36",
        "36",
        top1,
        top1 / 4,
        "images",
        "val",
        IMAGES,
        7,
        "ab12",
        "mini",
        [],
        seed,
        [Learned(f"{row} {seed}", epochs, "cd34", "float32")],
        "cmd",
        "2026-01-01",
        pack(wrong),
    )
    return replace(made, **others)


def verdicts(*cells: Cell) -> dict[str, str]:
    """The pair -> its verdict."""
    lines = [
        line.split("|")
        for line in claims_markdown(cells).splitlines()
        if " against " in line and line[0] == "|"
    ]
    return {line[2].strip(): line[5].strip() for line in lines}


def test_one_seed_is_decided_by_the_images_alone() -> None:
    a, b = cell("A 256", 20, key=1), cell("A-LRN 256", 30, key=2)
    paired = b.wrong_images().astype(float) - a.wrong_images()
    by = difference([a], [b])
    assert by.points == pytest.approx(10)
    theirs = scipy.stats.ttest_1samp(100 * paired, 0)
    assert (by.points - by.half, by.points + by.half) == pytest.approx(
        theirs.confidence_interval(0.95)
    )
    assert by.p == pytest.approx(theirs.pvalue)
    assert verdicts(a, b) == {"A 256 against A-LRN 256": "holds"}
    assert verdicts(replace(a, row="A-LRN 256"), replace(b, row="A 256")) == {
        "A 256 against A-LRN 256": "does not hold"
    }
    same = difference([a], [a])
    assert (same.points, same.half, same.p) == (0.0, 0.0, 1.0)


def test_cells_of_few_classes_have_no_top_5_error(tmp_path: Path) -> None:
    few = [cell("A 256", 20, seed, classes=5, top5=None) for seed in range(2)]
    assert "| A 256 | dense | 20.0 +- 0.0 / - | 2 |" in table_markdown(3, few)
    (tmp_path / "c.json").write_text(json.dumps(ledger_content(few)))
    assert read_cells(tmp_path / "c.json") == few
    one = KeptPosteriors(
        "imagenet", "images", "val", ["val/a/0.png"], np.zeros(1, int), ["a"], {}, []
    )
    with pytest.raises(VggfeatError, match="know one class only"):
        write_tables((3,), one, tmp_path / "results.md")


def test_the_same_nets_that_pool_otherwise_decide_no_claim() -> None:
    several, one = cell("D 256", 20, key=1, table=4), cell("D 256", 30, key=2)
    assert verdicts(several, one).popitem()[1] == "holds"
    odd = "confounded: max_pool=ceil in one of them"
    assert verdicts(replace(several, changes=["max_pool=ceil"]), one).popitem()[1] == odd


def variances(better: list[Cell], worse: list[Cell]) -> tuple[float, float]:
    """Of the mean difference in points: the images' part and the seeds'."""
    paired = np.array(
        [
            b.wrong_images() * 100.0 - a.wrong_images() * 100.0
            for a, b in zip(better, worse, strict=True)
        ]
    )
    return paired.mean(0).var(ddof=1) / IMAGES, paired.mean(1).var(ddof=1) / len(better)


def test_seeds_that_disagree_undo_what_one_seed_decides() -> None:
    better = [cell("A 256", errors, seed, 1) for seed, errors in enumerate((20, 30, 26))]
    worse = [cell("B 256", errors, seed, 2) for seed, errors in enumerate((30, 24, 28))]
    assert difference(better[:1], worse[:1]).p < 0.05
    by = difference(better, worse)
    assert by.p > 0.05 and by.points == pytest.approx((10 - 6 + 2) / 3)
    of_images, of_seeds = variances(better, worse)
    assert of_seeds == pytest.approx(np.var([10, -6, 2], ddof=1) / 3)
    freedom = (of_images + of_seeds) ** 2 / (of_images**2 / (IMAGES - 1) + of_seeds**2 / 2)
    error = math.sqrt(of_images + of_seeds)
    assert by.half == pytest.approx(error * scipy.stats.t.ppf(0.975, freedom))
    assert by.p == pytest.approx(2 * scipy.stats.t.sf(by.points / error, freedom))


def test_three_seeds_that_disagree_are_three_measurements_and_not_a_thousand() -> None:
    """Differences of 18, 8 and 4 points: more than two standard errors, but of few degrees of
    freedom.
    """
    better = [cell("A 256", 20, seed, 1) for seed in range(3)]
    worse = [cell("B 256", 20 + more, seed, 2) for seed, more in enumerate((18, 8, 4))]
    by = difference(better, worse)
    assert by.points == pytest.approx(10) and by.points > 2 * math.sqrt(
        sum(variances(better, worse))
    )
    assert by.p > 0.05
    assert difference(better, [cell("B 256", 30, seed, 2) for seed in range(3)]).p < 0.05


def test_many_verdicts_are_corrected_together() -> None:
    assert holm([0.04, 0.001, 0.02]) == [True, True, True]  # 0.001 < 1/60, 0.02 < 1/40, 0.04 < 1/20
    assert holm([0.03, 0.001, 0.03]) == [False, True, False]
    assert holm([0.02]) == [True] and holm([]) == []
    # a pair that alone is decided, with a probability of chance of 3 %
    alone = cell("A 256", 20, key=1), cell("A-LRN 256", 26.5, key=2)
    assert 0.02 < difference([alone[0]], [alone[1]]).p < 0.05
    assert verdicts(*alone) == {"A 256 against A-LRN 256": "holds"}
    others = [cell(f"{net} 256", 30, key=i, epochs=40) for i, net in enumerate("BCD")]
    many = verdicts(*alone, *others)
    assert many["A 256 against A-LRN 256"] == "holds, taken alone"
    assert many["C 256 against B 256"] == many["D 256 against C 256"] == "not decided"
    text = claims_markdown([*alone, *others])
    # B, A: epochs
    assert "3 of these 4 pairs differ in nothing but what the claim is of" in text.replace(
        "\n", " "
    )
    assert "0.2 of the 3 verdicts would be expected by chance" in text.replace("\n", " ")


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "holds"),
        ({"epochs": 21.0}, "holds"),  # the plateau rule
        ({"epochs": 42.0}, "confounded: 42 epochs against 20"),
        ({"epochs": None}, "confounded: training of unknown length"),
        ({"training_set": "ef56"}, "confounded: other training images"),
        ({"training_set": ""}, "confounded: unknown training images"),
        ({"precision": "bfloat16"}, "confounded: bfloat16 against float32"),
    ],
)
def test_nets_that_learned_otherwise_are_confounded(change: dict[str, Any], says: str) -> None:
    a, b = cell("A 256", 20, key=1), cell("A-LRN 256", 30, key=2)
    net = replace(a.nets[0], **change)
    assert verdicts(replace(a, nets=[net]), b) == {"A 256 against A-LRN 256": says}


def test_a_changed_recipe_is_a_row_of_its_own_and_confounds_unless_it_controls_length() -> None:
    fixed, jittered = cell("D 256", 30, key=1, epochs=40), cell("D 256-512", 20, key=2, epochs=62)
    control = cell("D 256", 30, key=3, epochs=62, changes=["NET-112.epochs=42.0"])
    slow = cell(
        "D 256",
        30,
        key=3,
        epochs=62,
        changes=["NET-112.epochs=42.0", "NET-112.learning_rate=0.002"],
    )
    cells = with_new([], [fixed, jittered, control, slow])
    assert len(cells) == 4
    assert verdicts(*cells) == {
        "D 256-512 against D 256": "confounded: 62 epochs against 40",
        "D 256-512 against D 256 [1]": "holds",
        "D 256-512 against D 256 [2]": "confounded: NET-112.learning_rate=0.002 in one of them",
    }
    text = section_markdown("x", cells)
    assert "- [1]: the recipe with NET-112.epochs=42.0\n" in text
    assert "| D 256 [1] | dense | 30.0 / 7.5 | 1 | S 36; Q 36 | 62 |" in text
    # both changed alike: of the same recipe; changed differently: not beside each other
    both = [
        replace(c, changes=["width=0.25"]) for c in (replace(fixed, nets=jittered.nets), jittered)
    ]
    assert verdicts(*both) == {"D 256-512 [1] against D 256 [1]": "holds"}
    assert verdicts(control, replace(jittered, changes=["width=0.25"])) == {}


def test_claims_of_the_same_nets_are_of_the_same_nets() -> None:
    """Table 4 of a net that was trained again, beside Table 3 of the old one."""
    one, several = cell("D 256", 30, key=1), cell("D 256", 20, key=2, table=4)
    several = replace(several, Q="32,36,41")
    pair = "D 256, dense, 3 Q against D 256, dense, 1 Q"
    assert verdicts(one, several) == {pair: "holds"}
    # how long doesn't matter between the same nets
    unknown = [replace(c, nets=[replace(c.nets[0], epochs=None)]) for c in (one, several)]
    assert verdicts(*unknown) == {pair: "holds"}
    other = replace(several, nets=[replace(several.nets[0], fingerprint="another")])
    assert verdicts(one, other) == {pair: "confounded: other nets"}


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
    own.write_text(json.dumps(ledger_content([cell("A 256", 20)])))
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
    assert "Not run: all 32 rows." in text and len(text.splitlines()) == 6
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
        == "Tables 3 to 6, stand-in: recipe mini on images val, 400 images of 7 classes (ab12)"
    )
    text = "# Results\n"
    for heading, part in found.items():
        text = with_section(text, heading, part)
        assert with_section(text, heading, part) == text  # again: not twice
        assert verdicts(*part) == {}
    assert text.count("## Tables 3 to 6, stand-in") == 3


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
    content = ledger_content([cell("A 256", 20)])
    path.write_text(json.dumps({**content, "cells": [asdict(cell("A 256", 20)) | change]}))
    with pytest.raises(VggfeatError, match=says):
        check_ledger(tmp_path / "results.md")
    path.write_text(json.dumps(content))
    assert read_cells(path) == [cell("A 256", 20)]
    short = replace(cell("B 256", 20), images=8, wrong="00", top1=0.0)
    path.write_text(json.dumps(ledger_content([cell("A 256", 20), short])))
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


def test_one_image_decides_nothing() -> None:
    few = [
        replace(cell("A 256", 0), images=1, wrong=wrong, top1=top1)
        for wrong, top1 in (("00", 0.0), ("80", 100.0))
    ]
    by = difference([few[0]], [few[1]])
    assert (by.points, by.half, by.p) == (100.0, math.inf, 1.0)


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
    whole = KeptPosteriors(
        items.dataset, root.name, "val", items.names, items.labels, items.classes, {}, []
    )
    assert {(c.image_set, c.images, c.classes) for c in cells} == {
        (whole.image_set, len(items), len(items.classes))
    }
    learned = read_training_set(root, read_recipe("tables"))
    rows = np.sort(np.concatenate([learned.train, learned.held_out]))
    digest = name_digest([learned.items.names[i] for i in rows])
    assert {net.training_set for c in cells for net in c.nets} == {digest}
