"""Table 1 of Simonyan & Zisserman (arXiv 1409.1556) as data, and what follows by arithmetic:
layers, their names in a state dict, parameters. Imported without PyTorch; `vgg` builds the nets.
"""

from __future__ import annotations

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


def parameter_count(net: str, num_classes: int, width: float, crop: int) -> int:
    """Weights and biases of a whole net, by arithmetic: nothing is built. Arguments as of VGG.

    Raises VggfeatError where VGG does: values that can't be, or more than MOST_PARAMETERS.
    """
    layer_names(net)
    if crop < 32 or crop % 32:
        raise VggfeatError(f"crop {crop} is not a positive multiple of 32, the stride of pool5")
    if not 0 < width < float("inf") or num_classes < 1:
        raise VggfeatError(
            f"width {width} and num_classes {num_classes} must be positive and finite"
        )
    count, channels = 0, 3
    for stage, stage_channels in zip(TABLE_1[net], STAGE_CHANNELS, strict=True):
        out = max(1, round(stage_channels * min(width, 1e6)))
        for kernel in stage:
            if not isinstance(kernel, str):
                count += (channels * kernel**2 + 1) * out
                channels = out
    fc = max(1, round(FC_CHANNELS * min(width, 1e6)))
    inputs = channels * (crop // 32) ** 2
    for out in (fc, fc, num_classes):
        count += (inputs + 1) * out
        inputs = out
    if count > MOST_PARAMETERS:
        raise VggfeatError(
            f"net {net} of width {width:g}, crop {crop} and {num_classes} classes has"
            f" {count / 1e6:,.0f} million parameters; at most {MOST_PARAMETERS // 10**6} million"
            " are built"
        )
    return count
