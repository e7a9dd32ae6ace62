"""Initial weights: their spread, and which layers a deeper net takes from A."""

from __future__ import annotations

import pytest
import torch

from pretrain.init import FROM_A, copy_layers, randomise, take_our_pixels, weight_layers
from tests.conftest import Nets, photograph
from vggfeat.errors import VggfeatError
from vggfeat.images import Preprocessing
from vggfeat.table1 import NETS
from vggfeat.vgg import VGG


def test_normal_and_glorot_spread() -> None:
    net = VGG("A", 10, width=0.5, crop=32)
    randomise(net, "normal", 0.01, torch.Generator().manual_seed(0))
    for layer in weight_layers(net).values():
        n = layer.weight.numel()
        # five standard errors
        assert abs(layer.weight.std().item() / 0.01 - 1) < 5 / (2 * n) ** 0.5
        assert not layer.bias.any()  # type: ignore[union-attr]
    randomise(net, "glorot", 0.01, torch.Generator().manual_seed(0))
    conv = weight_layers(net)["conv3_2"].weight  # 128 -> 128 channels, 3x3
    limit = (6 / (128 * 9 + 128 * 9)) ** 0.5
    assert conv.abs().max() <= limit
    assert conv.abs().max() > 0.99 * limit
    assert abs(conv.std().item() / (limit / 3**0.5) - 1) < 0.01


def test_the_same_seed_gives_the_same_net_in_any_precision() -> None:
    single, double = VGG("A", 10, 0.1, 32), VGG("A", 10, 0.1, 32).double()
    for net in (single, double):
        randomise(net, "normal", 0.01, torch.Generator().manual_seed(7))
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("net", [n for n in NETS if n not in ("A", "B-5x5")])
def test_a_deeper_net_has_exactly_these_layers_of_a(net: str) -> None:
    a, deeper = VGG("A", 10, 0.1, 32), VGG(net, 10, 0.1, 32)
    for seed, module in enumerate((a, deeper)):
        randomise(module, "normal", 0.01, torch.Generator().manual_seed(seed))
        for layer in weight_layers(module).values():
            torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    assert copy_layers(deeper, a) == list(FROM_A)
    ours, theirs = weight_layers(deeper), weight_layers(a)
    equal = [
        name
        for name in ours
        if name in theirs
        and ours[name].weight.shape == theirs[name].weight.shape
        and torch.equal(ours[name].weight, theirs[name].weight)
        and torch.equal(ours[name].bias, theirs[name].bias)  # type: ignore[arg-type]
    ]
    # Sect. 3.1: the first four convolutional layers and the last three fully-connected layers
    assert equal == ["conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8"]


@pytest.mark.parametrize(
    "theirs",
    [
        Preprocessing((123.0, 116.0, 103.0)),
        Preprocessing((103.0, 116.0, 123.0), channel_order="BGR"),
        Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), input_range=1),
    ],
)
def test_a_start_with_another_preprocessing_says_the_same_of_a_photograph(
    theirs: Preprocessing, he: Nets
) -> None:
    """As the released nets, Caffe's, and torchvision's."""
    source, net = he("A", width=0.1, crop=32).eval(), VGG("A", 1000, 0.1, 32).eval()
    copy_layers(net, source)
    mean = take_our_pixels(net, theirs)
    images_NHWC = torch.from_numpy(photograph(0, 32, 32))[None]
    expected = source.crop_scores(theirs(images_NHWC))
    said = net.crop_scores(Preprocessing(mean)(images_NHWC))
    assert (said - expected).abs().max() < 1e-4 * expected.abs().max()
    if theirs.channel_order == "BGR":
        assert mean == pytest.approx((123, 116, 103))


def test_layers_can_be_left_as_they_are() -> None:
    """A net of boxes takes all but its last layer, whose outputs are others."""
    source, net = VGG("A", 10, 0.1, 32), VGG("A", 4, 0.1, 32)
    before = weight_layers(net)["fc8"].weight.clone()
    assert copy_layers(net, source, but=("fc8",)) == [*list(weight_layers(net))[:-1]]
    assert torch.equal(weight_layers(net)["fc7"].weight, weight_layers(source)["fc7"].weight)
    assert torch.equal(weight_layers(net)["fc8"].weight, before)


@pytest.mark.parametrize(
    ("net", "classes", "width", "crop", "until", "says"),
    [
        ("B", 10, 0.1, 32, "fc8", "can start from D or A, not from net B"),
        ("A", 11, 0.1, 32, "fc8", "fc8 of the weights"),
        ("A", 10, 0.2, 32, "fc8", "conv1_1 of the weights"),
        ("A", 10, 0.1, 64, "fc8", "fc6 of the weights"),
        ("A", 10, 0.1, 32, "pool5", "end before fc6"),
    ],
)
def test_what_cannot_be_copied_is_refused(
    net: str, classes: int, width: float, crop: int, until: str, says: str
) -> None:
    with pytest.raises(VggfeatError, match=says):
        copy_layers(VGG("D", 10, 0.1, 32), VGG(net, classes, width, crop, until=until))
