"""Table 1 against Table 2's counts, and its arithmetic against nets that are built."""

from __future__ import annotations

import pytest
import torch

from vggfeat.table1 import NETS, layer_names, parameter_count
from vggfeat.vgg import VGG

PARAMETERS = {  # Table 2 counts millions; these are the exact counts
    "A": 132_863_336,
    "A-LRN": 132_863_336,
    "B": 133_047_848,
    "C": 133_638_952,
    "D": 138_357_544,
    "E": 143_667_240,
}


@pytest.mark.parametrize("net", PARAMETERS)
def test_parameters_of_table_2(net: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in VGG(net).parameters()) == PARAMETERS[net]


def test_weight_layers_of_table_1() -> None:
    layers = {net: sum(1 for name in layer_names(net) if name[:2] in ("co", "fc")) for net in NETS}
    assert layers == {"A": 11, "A-LRN": 11, "B": 13, "B-5x5": 8, "C": 16, "D": 16, "E": 19}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("classes", "width", "crop"), [(1000, 1.0, 224), (3, 0.21875, 96), (10, 1.9, 256)]
)
def test_parameters_are_counted_without_building(
    net: str, classes: int, width: float, crop: int
) -> None:
    with torch.device("meta"):
        built = sum(p.numel() for p in VGG(net, classes, width, crop).parameters())
    assert parameter_count(net, classes, width, crop) == built
