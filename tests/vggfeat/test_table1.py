"""Table 1 against Table 2's counts, and its arithmetic against nets that are built and run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vggfeat.table1 import NETS, TABLE_2, layer_names, layers, parameter_count, stacks
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
    assert round(PARAMETERS[net] / 1e6) == TABLE_2[net] and [*TABLE_2] == [*PARAMETERS]


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


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("width", "crop"), [(1.0, 224), (0.1, 96)])
def test_layers_in_numbers_are_those_of_the_net_that_is_built(
    net: str, width: float, crop: int
) -> None:
    with torch.device("meta"):
        built, image = VGG(net, 7, width, crop), torch.empty(1, 3, crop, crop)
    every = {layer.name: layer for layer in layers(net, 7, width, crop)}
    assert [*every] == built.layers
    own = built.state_dict()
    with torch.inference_mode():
        for name, layer in every.items():
            assert built(image, name).shape == (1, layer.channels, layer.side, layer.side)
    weights = [layer for layer in every.values() if layer.parameters]
    sizes = [own[key].numel() for key in own]
    assert [layer.parameters for layer in weights] == [
        a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)
    ]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        built.crop_scores(image)
    counted = counter.get_total_flops() // 2
    if net == "A-LRN":  # the sum over neighbouring channels, a 1x1 convolution here
        counted -= every["lrn1"].channels ** 2 * crop**2
    assert sum(layer.multiply_adds for layer in every.values()) == counted


def test_operations_at_224() -> None:
    billions = {net: sum(layer.multiply_adds for layer in layers(net)) / 1e9 for net in NETS}
    expected = {"A": 7.61, "A-LRN": 7.61, "B": 11.31, "C": 11.77, "D": 15.47, "E": 19.63}
    assert {net: round(billions[net], 2) for net in expected} == expected


def seen(net: VGG, side: int) -> dict[str, list[tuple[int, int]]]:
    """Layer -> of two neighbouring positions in its middle, the first and last row of the image
    that they see: where the gradient isn't zero.
    """
    outputs: dict[str, Tensor] = {}
    image = torch.ones(1, 3, side, net.crop, dtype=torch.float64, requires_grad=True)
    x, names = image, iter(net.layers)
    for module in net.features:
        if isinstance(module, nn.MaxPool2d):  # whose gradient would be of one of the four
            x = outputs[next(names)] = F.avg_pool2d(x, module.kernel_size, module.stride)
        elif not isinstance(module, nn.ReLU):
            x = outputs[next(names)] = module(x)  # no weight is negative
    kernel = net.fc6_kernel
    fc6, fc7, fc8 = (net.classifier[i].get_parameter("weight") for i in (0, 3, 6))
    for weight, side_of in ((fc6, kernel), (fc7, 1), (fc8, 1)):
        x = F.conv2d(x, weight.view(len(weight), -1, side_of, side_of))
        outputs[next(names)] = x
    found = {}
    for name, output in outputs.items():
        row, column = output.shape[2] // 2 - 1, output.shape[3] // 2
        pairs = []
        for i in (row, row + 1):
            (gradient,) = torch.autograd.grad(
                output[0, :, i, column].sum(), image, retain_graph=True
            )
            rows = gradient[0].abs().sum((0, 2)).nonzero().flatten().tolist()
            pairs.append((rows[0], rows[-1]))
        found[name] = pairs
    return found


@pytest.mark.parametrize("net", NETS)
def test_receptive_fields_by_gradients(net: str) -> None:
    crop, width = 64, 1 / 64
    module = VGG(net, 2, width, crop).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.3 if parameter.ndim > 1 else 0.0)
    every = layers(net, 2, width, crop)
    for layer, ((first, last), (after, _)) in zip(every, seen(module, 448).values(), strict=True):
        assert (last - first + 1, after - first) == (layer.field, layer.stride), layer.name


def test_receptive_fields_of_the_paper() -> None:
    fields = {x.name: (x.field, x.stride) for x in layers("D")}
    assert (fields["conv1_1"], fields["conv1_2"], fields["pool5"]) == ((3, 1), (5, 1), (212, 32))
    assert fields["fc6"] == fields["fc8"] == (404, 32)  # 7x7 of pool5's: more than the crop
    assert {x.name: x.field for x in layers("B-5x5")}["pool5"] == (
        {x.name: x.field for x in layers("B")}["pool5"]
    )


def test_stacks_of_section_2_3() -> None:
    """A stack of three 3x3 layers sees 7x7 and has 3 (3^2 C^2) = 27 C^2 weights; one of 7x7 has
    49 C^2, 81 % more.
    """
    _, three = stacks("D")
    assert (three.stages, three.kernels) == ((3, 4, 5), (3, 3, 3))
    assert (three.field, three.weights, three.one_layer) == (7, 27, 49)
    assert round(100 * (three.one_layer / three.weights - 1)) == 81
    (five,), (two,) = stacks("B-5x5"), stacks("B")
    assert (five.field, five.weights, five.of_3x3) == (two.field, two.one_layer, two.weights)
    assert (two.field, two.weights, two.one_layer) == (5, 18, 25)
    C = 6  # channels, of layers that are built
    layer = [nn.Conv2d(C, C, k, bias=False).weight.numel() for k in (3, 5, 7)]
    assert (3 * layer[0], 2 * layer[0], layer[1], layer[2]) == (
        27 * C**2,
        18 * C**2,
        25 * C**2,
        49 * C**2,
    )
    assert [(x.kernels, x.field, x.weights, x.of_3x3) for x in stacks("C")] == [
        ((3, 3), 5, 18, 18),
        ((3, 3, 1), 5, 19, 18),
    ]
    assert stacks("A-LRN") == stacks("A") and stacks("E")[1].field == 9
