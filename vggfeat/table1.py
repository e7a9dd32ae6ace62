"""Table 1 of Simonyan & Zisserman (arXiv 1409.1556) as data, and what follows by arithmetic:
layers, their names in a state dict, parameters, multiply-adds, receptive fields. Imported without
PyTorch; `vgg` builds the nets.
"""

from __future__ import annotations

from typing import NamedTuple

from vggfeat.errors import VggfeatError

# Table 1. A row is a stage, closed by a 2x2 max-pool; a number is a convolution's kernel side,
# "LRN" the local response normalisation. Padding is kernel // 2, so that no convolution changes the
# resolution.
TABLE_1: dict[str, tuple[tuple[int | str, ...], ...]] = {
    "A": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "A-LRN": ((3, "LRN"), (3,), (3, 3), (3, 3), (3, 3)),
    "B": ((3, 3), (3, 3), (3, 3), (3, 3), (3, 3)),
    # Sect. 4.1: each pair of 3x3 layers of B as one 5x5 layer
    "B-5x5": ((5,), (5,), (5,), (5,), (5,)),
    "C": ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)),
    "D": ((3, 3), (3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "E": ((3, 3), (3, 3), (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 3)),
}
NETS = tuple(TABLE_1)
# Table 2: millions of parameters
TABLE_2 = {"A": 133, "A-LRN": 133, "B": 133, "C": 134, "D": 138, "E": 144}
STAGE_CHANNELS = (64, 128, 256, 512, 512)
FC_CHANNELS = 4096
FC_LAYERS = ("fc6", "fc7", "fc8")
# Of a whole net, 2.8 GB in float32: E at twice its width has 567 million, D as published 138.
MOST_PARAMETERS = 700_000_000


def layer_names(net: str) -> list[str]:
    """Names of net's layers in the paper's numbering, first to last: conv1_1 … pool5, fc6, fc7,
    fc8.

    A convolution's or hidden FC layer's output is taken after its ReLU (the paper's "activations").
    A-LRN has lrn1 besides. Raises VggfeatError for a net that Table 1 doesn't have.
    """
    if net not in TABLE_1:
        raise VggfeatError(f"there is no net {net!r}; Table 1 has {', '.join(NETS)}")
    names = []
    for s, stage in enumerate(TABLE_1[net], 1):
        convs = [k for k in stage if k != "LRN"]
        names += [f"conv{s}_{i}" for i in range(1, len(convs) + 1)]
        names += [f"lrn{s}"] * (len(stage) - len(convs))
        names.append(f"pool{s}")
    return [*names, *FC_LAYERS]


def layer_keys(net: str) -> dict[str, str]:
    """Layer with weights -> its name in a state dict: conv1_1 -> features.0 … fc8 -> classifier.6.

    Raises VggfeatError for a net that Table 1 doesn't have.
    """
    layer_names(net)
    keys, at = {}, 0
    for s, stage in enumerate(TABLE_1[net], 1):
        convs = 0
        for kernel in stage:
            if kernel != "LRN":
                convs += 1
                keys[f"conv{s}_{convs}"] = f"features.{at}"
                at += 1  # its ReLU
            at += 1
        at += 1  # the pooling
    return keys | {layer: f"classifier.{3 * i}" for i, layer in enumerate(FC_LAYERS)}


class Layer(NamedTuple):
    """A layer of a whole net on a crop, in numbers."""

    name: str
    kernel: int
    """Side in positions of its input; fc6's covers pool5, an LRN's is 1 (it is over channels)."""
    channels: int
    """Of its output."""
    side: int
    """Height and width of its output, in positions."""
    parameters: int
    """Weights and biases."""
    multiply_adds: int
    """Of convolutions and FC layers, biases left out."""
    field: int
    """Side in pixels of what one position sees when the net runs densely: its receptive field."""
    stride: int
    """Pixels from a position to the next."""


def layers(
    net: str, num_classes: int = 1000, width: float = 1.0, crop: int = 224
) -> tuple[Layer, ...]:
    """All layers by name, first to last, by arithmetic: nothing is built. Arguments as of VGG.

    Raises VggfeatError for values that can't be.
    """
    names = iter(layer_names(net))
    if crop < 32 or crop % 32:
        raise VggfeatError(f"crop {crop} is not a positive multiple of 32, the stride of pool5")
    if not 0 < width < float("inf") or num_classes < 1:
        raise VggfeatError(
            f"width {width} and num_classes {num_classes} must be positive and finite"
        )
    found: list[Layer] = []
    channels, side, field, stride = 3, crop, 1, 1

    def weighted(kernel: int, out: int) -> None:
        nonlocal channels, field
        weights = channels * kernel**2 * out
        channels, field = out, field + (kernel - 1) * stride
        macs = weights * side**2
        found.append(Layer(next(names), kernel, out, side, weights + out, macs, field, stride))

    for stage, stage_channels in zip(TABLE_1[net], STAGE_CHANNELS, strict=True):
        out = max(1, round(stage_channels * min(width, 1e6)))
        for kernel in stage:
            if isinstance(kernel, str):
                found.append(Layer(next(names), 1, channels, side, 0, 0, field, stride))
            else:
                weighted(kernel, out)
        side, field, stride = side // 2, field + stride, 2 * stride
        found.append(Layer(next(names), 2, channels, side, 0, 0, field, stride))
    kernel, side = side, 1
    fc = max(1, round(FC_CHANNELS * min(width, 1e6)))
    for out in (fc, fc, num_classes):
        weighted(kernel, out)
        kernel = 1
    return tuple(found)


def parameter_count(net: str, num_classes: int, width: float, crop: int) -> int:
    """Weights and biases of a whole net, by arithmetic: nothing is built. Arguments as of VGG.

    Raises VggfeatError where VGG does: values that can't be, or more than MOST_PARAMETERS.
    """
    count = sum(layer.parameters for layer in layers(net, num_classes, width, crop))
    if count > MOST_PARAMETERS:
        raise VggfeatError(
            f"net {net} of width {width:g}, crop {crop} and {num_classes} classes has"
            f" {count / 1e6:,.0f} million parameters; at most {MOST_PARAMETERS // 10**6} million"
            " are built"
        )
    return count


class Stack(NamedTuple):
    """Convolutions with no pooling between them, of C channels each, as Sect. 2.3 counts them:
    weights are in units of C^2, biases left out.
    """

    stages: tuple[int, ...]
    """Those of the net that have it, counted from 1."""
    kernels: tuple[int, ...]
    """Their sides, first to last."""
    field: int
    """Side of what one of its outputs sees of its input."""
    weights: int
    one_layer: int
    """Weights of one layer of that field."""
    of_3x3: int
    """Weights of 3x3 layers of that field."""


def stacks(net: str) -> tuple[Stack, ...]:
    """The kinds of stacks in a net's stages. Raises VggfeatError for a net that there isn't."""
    layer_names(net)
    stages: dict[tuple[int, ...], list[int]] = {}
    for s, stage in enumerate(TABLE_1[net], 1):
        kernels = tuple(kernel for kernel in stage if not isinstance(kernel, str))
        stages.setdefault(kernels, []).append(s)
    found = []
    for kernels, where in stages.items():
        field = 1 + sum(kernel - 1 for kernel in kernels)
        weights = sum(kernel**2 for kernel in kernels)
        found.append(Stack(tuple(where), kernels, field, weights, field**2, 9 * (field // 2)))
    return tuple(found)
