"""Where a stage's weights come from: random (normal 0.01, or Glorot's), a trained A, or the stage
before.

Sect. 3.1: A is shallow enough to be trained from random weights; the first four convolutions and
the three FC layers of deeper nets are A's, the other layers random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vggfeat.errors import VggfeatError
from vggfeat.images import Preprocessing
from vggfeat.table1 import FC_LAYERS
from vggfeat.vgg import VGG

# The first four convolutions of A by (stage, index); by position, the shapes wouldn't fit deeper
# nets.
FROM_A = ("conv1_1", "conv2_1", "conv3_1", "conv3_2", *FC_LAYERS)


def weight_layers(net: VGG) -> dict[str, nn.Conv2d | nn.Linear]:
    """Layer's name in the paper's numbering -> its module, first to last."""
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    for name in net.layers:
        if name.startswith("conv"):
            # a ReLU closes the layer
            layers[name] = cast(nn.Conv2d, net.features[net.ends[name] - 2])
        elif name in FC_LAYERS:
            layers[name] = cast(nn.Linear, net.classifier[3 * FC_LAYERS.index(name)])
    return layers


def learning_layers(net: VGG, learn: str) -> list[str]:
    """Those that learn where a recipe's `learn` is "all", "fc" or "fc8"."""
    names = list(weight_layers(net))
    return names if learn == "all" else [name for name in names if name.startswith(learn)]


@torch.no_grad()
def randomise(net: VGG, how: str, std: float, generator: torch.Generator) -> None:
    """Draw all weights anew, biases 0. how: "normal" (mean 0, std) or "glorot" (uniform, Glorot &
    Bengio 2010).

    In double precision on the CPU, whatever the net's precision is, so that the same seed gives the
    same net.
    """
    for layer in weight_layers(net).values():
        drawn = torch.empty(layer.weight.shape, dtype=torch.float64)
        if how == "normal":
            drawn.normal_(0.0, std, generator=generator)
        elif how == "glorot":
            nn.init.xavier_uniform_(drawn, generator=generator)
        else:
            raise VggfeatError(f"random layers must be normal or glorot, not {how!r}")
        layer.weight.copy_(drawn)
        cast(Tensor, layer.bias).zero_()


@torch.no_grad()
def take_our_pixels(net: VGG, theirs: Preprocessing) -> tuple[float, float, float]:
    """Let a net whose weights were copied from one of another preprocessing take what training
    gives it, RGB in 0..255 minus a mean; the mean, in that order and range, that it learned with.

    The channels' order, range and deviation go into conv1_1, exactly.
    """
    conv = cast(nn.Conv2d, net.features[0])
    std, mean = torch.tensor(theirs.std), torch.tensor(theirs.mean)
    factor = theirs.input_range / 255
    conv.weight.mul_((factor / std)[None, :, None, None].to(conv.weight))
    if theirs.channel_order == "BGR":
        conv.weight.copy_(conv.weight.flip(1))
        mean = mean.flip(0)
    red, green, blue = (mean / factor).tolist()
    return red, green, blue


def _sizes(net: VGG) -> str:
    return f"width {net.width:g}, crop {net.crop}"


@torch.no_grad()
def copy_layers(net: VGG, source: VGG, but: Sequence[str] = ()) -> list[str]:
    """Copy what net takes over from a trained source; the names of the copied layers.

    source of the same net: every layer. A into another net: the layers of FROM_A. but: layers that
    are left as they are. Raises
    VggfeatError when the source is another net still, or a layer's shape differs (another width,
    crop or number of classes).
    """
    ours, theirs = weight_layers(net), weight_layers(source)
    if source.net not in (net.net, "A"):
        nets = " or ".join(dict.fromkeys((net.net, "A")))
        raise VggfeatError(f"net {net.net} can start from {nets}, not from net {source.net}")
    names = [n for n in (ours if source.net == net.net else FROM_A) if n not in but]
    for name in names:
        if name not in theirs:
            raise VggfeatError(
                f"the weights to start from end before {name}: give a file with FC layers"
            )
        if name not in ours or ours[name].weight.shape != theirs[name].weight.shape:
            shape = tuple(ours[name].weight.shape) if name in ours else "absent"
            raise VggfeatError(
                f"{name} of the weights to start from has shape {tuple(theirs[name].weight.shape)},"
                f" here {shape}: width, crop and classes must be the same"
                + (
                    f"; theirs: {_sizes(source)} (`set` KEY=VALUE)"
                    if _sizes(source) != _sizes(net)
                    else ""
                )
            )
        ours[name].weight.copy_(theirs[name].weight)
        cast(Tensor, ours[name].bias).copy_(cast(Tensor, theirs[name].bias))
    return names
