"""The rules of scoring."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from vggfeat.datasets.protocol import PROTOCOLS


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
    compared = {name: rules.compared_by(several=True) for name, rules in PROTOCOLS.items()}
    assert compared.pop("voc2007") == "map_11point" and {*compared.values()} == {"map_allpoint"}
    assert {rules.compared_by(several=False) for rules in PROTOCOLS.values()} == {
        "mean_class_recall"
    }
    formats = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    listed = formats.partition("rule of scoring: ")[2].partition(" |")[0]
    assert re.findall(r"`([^`]+)`", listed) == [*PROTOCOLS, "unlabelled"]
