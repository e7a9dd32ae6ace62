"""The ledger's arithmetic: verdicts over images and seeds, means and spreads, rows of several seeds."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.stats

from pretrain.runs import Trained, roles
from pretrain.tables import (
    Cell,
    Member,
    check_ledger,
    claims_markdown,
    decide,
    pack,
    paper_scales,
    table_markdown,
    update_cells,
)
from vggfeat.errors import VggfeatError

IMAGES = 400


def cell(row: str, errors: float, seed: int = 0, key: int = 0, table: int = 3) -> Cell:
    """A cell with this many per cent of wrong images, drawn by key."""
    wrong = np.zeros(IMAGES, bool)
    wrong[np.random.default_rng([key, seed]).permutation(IMAGES)[: round(errors / 100 * IMAGES)]] = True
    top1 = 100 * float(wrong.mean())
    return Cell(
        table, row, "dense", "36", "36", top1, top1 / 4, IMAGES, "images", [], "cmd", "2026-01-01",
        pack(wrong), seed,
    )  # fmt: skip


def test_one_seed_is_decided_by_the_images_alone():
    a, b = cell("A 256", 20, key=1), cell("B 256", 30, key=2)
    paired = b.wrong_images().astype(float) - a.wrong_images()
    verdict, difference, half = decide([a], [b])
    assert difference == pytest.approx(10)
    interval = scipy.stats.ttest_1samp(100 * paired, 0).confidence_interval(0.95)
    assert (difference - half, difference + half) == pytest.approx(interval)
    assert verdict == "holds" and decide([b], [a])[0] == "does not hold"
    assert decide([a], [a]) == ("not decided", 0.0, 0.0)


def variances(better: list[Cell], worse: list[Cell]) -> tuple[float, float]:
    """Of the mean difference in points: the images' part and the seeds'."""
    paired = np.array(
        [b.wrong_images() * 100.0 - a.wrong_images() * 100.0 for a, b in zip(better, worse, strict=True)]
    )
    return paired.mean(0).var(ddof=1) / IMAGES, paired.mean(1).var(ddof=1) / len(better)


def test_seeds_that_disagree_undo_what_one_seed_decides():
    better = [cell("A 256", errors, seed, 1) for seed, errors in enumerate((20, 30, 26))]
    worse = [cell("B 256", errors, seed, 2) for seed, errors in enumerate((30, 24, 28))]
    assert decide(better[:1], worse[:1])[0] == "holds"
    verdict, difference, half = decide(better, worse)
    assert verdict == "not decided" and difference == pytest.approx((10 - 6 + 2) / 3)
    of_images, of_seeds = variances(better, worse)
    assert of_seeds == pytest.approx(np.var([10, -6, 2], ddof=1) / 3)
    freedom = (of_images + of_seeds) ** 2 / (of_images**2 / (IMAGES - 1) + of_seeds**2 / 2)
    assert half == pytest.approx(math.sqrt(of_images + of_seeds) * scipy.stats.t.ppf(0.975, freedom))


def test_three_seeds_that_disagree_are_three_measurements_and_not_a_thousand():
    """Differences of 18, 8 and 4 points: more than two standard errors, but of few degrees of freedom."""
    better = [cell("A 256", 20, seed, 1) for seed in range(3)]
    worse = [cell("B 256", 20 + more, seed, 2) for seed, more in enumerate((18, 8, 4))]
    verdict, difference, _ = decide(better, worse)
    assert difference == pytest.approx(10) and difference > 2 * math.sqrt(sum(variances(better, worse)))
    assert verdict == "not decided"
    same = [cell("B 256", 30, seed, 2) for seed in range(3)]
    assert decide(better, same)[0] == "holds"


def test_tables_have_means_and_spreads_and_claims_the_seeds_that_both_have(tmp_path):
    cells = [cell("A 256", 20 + 2 * seed, seed, 1) for seed in range(3)]
    cells += [cell("A-LRN 256", 30, seed, 2) for seed in (1, 2, 5)]
    ordered = update_cells(tmp_path / "cells.json", cells)
    again = update_cells(tmp_path / "cells.json", [cell("A 256", 40, 1, 3)])
    assert len(again) == len(ordered) == 6
    table = table_markdown(3, ordered)
    assert "| A 256 | dense | 22.0 +- 2.0 / 5.5 +- 0.5 | 3 | S 36; Q 36 |" in table
    assert "| B 256 | dense | not run |" in table
    claims = claims_markdown(ordered)
    line = next(line for line in claims.splitlines() if "LRN" in line)
    assert "| 23.0, 30.0 |" in line and line.endswith("| holds | 400 | 2 |")  # seeds 1 and 2
    alone = table_markdown(3, [cell("A 256", 20)])
    assert "| A 256 | dense | 20.0 / 5.0 | 1 |" in alone


@pytest.mark.parametrize(
    ("S", "crop", "one", "several"),
    [
        ((256, 256), 224, (256,), (224, 256, 288)),  # Table 4: S - 32, S, S + 32
        ((384, 384), 224, (384,), (352, 384, 416)),
        ((256, 512), 224, (384,), (256, 384, 512)),
        ((112, 112), 96, (112,), (98, 112, 126)),
        ((240, 240), 224, (240,), (224, 240, 272)),  # not below the crop
        ((224, 224), 224, (224,), (224, 256)),  # and none twice, which would count twice in the mean
        ((256, 257), 224, (256,), (256, 257)),
    ],
)
def test_test_scales_follow_from_s(S, crop, one, several):
    assert paper_scales(S, crop, multi=False) == one
    assert paper_scales(S, crop, multi=True) == several


def test_roles_of_several_seeds():
    def net(seed: int, S: int) -> Trained:
        return Trained("A", (S, S), 32, "all", "mini", f"{seed}-{S}", seed)

    nets = [net(1, 36), net(0, 36), net(1, 48)]
    assert roles(nets) == {0: {Member("A", "256"): 1}, 1: {Member("A", "256"): 0, Member("A", "384"): 2}}
    with pytest.raises(VggfeatError, match="both stand for A at 256"):
        roles([*nets, net(0, 36)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"row": None}, r"\[0\].row must be text, not None"),
        ({"depth": 3}, r"\[0\] can't have 'depth': a Cell has"),
        ({"top1": "x"}, r"\[0\].top1 must be a finite number, not 'x'"),
        ({"top1": 101}, r"\[0\].top1 must lie in 0..100, not 101"),
        ({"images": 0}, r"\[0\].images must lie in 1..1e\+08, not 0"),
        ({"nets": [1]}, r"\[0\].nets\[0\] must be text, not 1"),
        ({"wrong": "abc"}, "`wrong` is not of 400 images"),
        ({"wrong": "00"}, "`wrong` is not of 400 images"),
        ({"seed": -1}, r"\[0\].seed must lie in"),
    ],
)
def test_a_damaged_ledger_is_refused_and_left_as_it_is(tmp_path, change, says):
    path = tmp_path / "ledger-x.json"
    path.write_text(json.dumps([asdict(cell("A 256", 20)) | change]))
    before = path.read_bytes()
    with pytest.raises(VggfeatError, match=says):
        update_cells(path, [cell("B 256", 20)])
    with pytest.raises(VggfeatError, match=says):
        check_ledger(tmp_path / "results.md")
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b"[" + b"9" * 5000 + b"]"])
def test_what_is_no_ledger_is_refused(tmp_path, text):
    (tmp_path / "ledger-x.json").write_bytes(text)
    with pytest.raises(VggfeatError, match=r"ledger-x.json(:| is not| must be)"):
        check_ledger(tmp_path / "results.md")


def test_claims_are_decided_on_the_same_images():
    """Cells of two data sets, or of two numbers of images, were compared bit by bit."""
    better = [cell("A 256", 20, seed, 1) for seed in range(3)]
    worse = [cell("A-LRN 256", 30, seed, 2) for seed in range(3)]
    few = replace(worse[2], images=8, wrong="00", data="8 images")
    assert "| 400 | 2 |" in claims_markdown([*better, *worse[:2], few])
    assert claims_markdown([better[2], few]) == ""
    one = replace(better[0], images=1, wrong="00"), replace(worse[0], images=1, wrong="80")
    assert decide(*([c] for c in one)) == ("not decided", 100.0, math.inf)
