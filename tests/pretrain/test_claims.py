"""Verdicts over images and seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from pretrain.claims import claims_markdown, difference, holm
from pretrain.ledger import section_markdown, with_new
from pretrain.tables import Cell
from tests.pretrain.conftest import IMAGES, cell, verdicts


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


def test_one_image_decides_nothing() -> None:
    few = [
        replace(cell("A 256", 0), images=1, wrong=wrong, top1=top1)
        for wrong, top1 in (("00", 0.0), ("80", 100.0))
    ]
    by = difference([few[0]], [few[1]])
    assert (by.points, by.half, by.p) == (100.0, math.inf, 1.0)
