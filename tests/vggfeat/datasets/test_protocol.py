"""The table of protocols, beside what is drawn by it and what the documents say."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np

from vggfeat.datasets.protocol import PROTOCOLS
from vggfeat.metrics import CLASS_FIGURES, FIGURES
from vggfeat.results import Figures


def test_the_table_of_protocols_is_what_is_drawn_and_documented() -> None:
    labels = np.repeat(np.arange(3, dtype=np.int32), 70)
    for name, train, test in (
        ("caltech101", 30, 40),
        ("caltech256", 60, 10),
        ("single-label", 56, 14),
    ):
        splits = PROTOCOLS[name].splits(labels)
        drawn = [len(splits[f"split0/{part}"]) for part in ("train", "val", "test")]
        assert (drawn[0] + drawn[1], drawn[2]) == (3 * train, 3 * test)
    for rules in PROTOCOLS.values():
        for key in (rules.compared_by(several=False), rules.compared_by(several=True)):
            assert key in FIGURES and key in {each.name for each in fields(Figures)}
        assert rules.class_ap in CLASS_FIGURES
    # Appendix B, and the common rules
    one = {
        name: PROTOCOLS[name].compared_by(several=False)
        for name in ("caltech101", "caltech256", "single-label")
    }
    assert {*one.values()} == {"mean_class_recall"}
    several = {
        name: PROTOCOLS[name].compared_by(several=True)
        for name in ("voc2007", "voc2012", "multi-label")
    }
    assert several.pop("voc2007") == "map_11point" and {*several.values()} == {"map_allpoint"}
    formats = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    listed = formats.partition("rule of scoring: ")[2].partition(" |")[0]
    assert re.findall(r"`([^`]+)`", listed) == [*PROTOCOLS, "unlabelled"]
