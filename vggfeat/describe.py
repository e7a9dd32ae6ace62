"""Batch of images -> pooled maps: the one computation that evaluation and extraction share.

N images, H, W height and width, D channels of the layer's map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggfeat.images import mirror as mirrored
from vggfeat.weights import Network

LARGE = 3 * 4_000_000  # values of an image whose mirror image had better not be in memory beside it


@torch.inference_mode()
def describe(network: Network, images_NHWC: Tensor, layer: str, mirror: bool) -> Tensor:
    """Descriptors (N, D) float32: the layer's map averaged over positions, and with the mirror
    image's.

    images_NHWC: uint8 RGB of one shape, on the network's device. The mirror image goes through in
    the same batch, unless it is large. The average over positions is taken in float32 whatever the
    network's precision (Appendix B: global average pooling, average with the mirror image's
    descriptor; not normalised here).
    """
    if mirror and images_NHWC[0].numel() > LARGE:
        return (
            describe(network, images_NHWC, layer, False)
            + describe(network, mirrored(images_NHWC), layer, False)
        ) / 2
    if mirror:
        images_NHWC = torch.cat([images_NHWC, mirrored(images_NHWC)])
    x_NCHW = network.preprocessing(images_NHWC)
    map_NDHW = network.maps(x_NCHW, layer)
    # channels-last maps have D innermost: the sum over positions reads memory in order
    pooled_ND = map_NDHW.mean(dim=(2, 3), dtype=torch.float32)
    return pooled_ND.view(2, -1, pooled_ND.shape[1]).mean(0) if mirror else pooled_ND
