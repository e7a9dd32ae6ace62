"""Why dense and crops differ (Sect. 3.2): the windows of the dense net, among their neighbours or
as crops.

    python -m benchmarks.padding --weights D.safetensors --data imagenette144 --scale 136

"dense" is pretrain.evaluate's. "the same windows as crops" cuts out the very pixels that each
position of the dense score map stands for, and averages their scores likewise: all that changes is
that zeros surround a window in every layer, and not the rest of the image. Needs a net with floor
pooling whose crop is a multiple of 32 pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import vggfeat
from pretrain.posteriors import class_order, dense, images_of
from vggfeat.decode import read_rgb
from vggfeat.images import mirror, smallest_side
from vggfeat.terminal import columns, out
from vggfeat.weights import Network

STRIDE = 32  # pixels between windows: five poolings


@torch.inference_mode()
def windows(network: Network, image_HWC: Tensor) -> Tensor:
    """(K,) posteriors: the mean score of the dense net's windows as crops, softmax, mean with the
    mirror image's.
    """
    crop = network.vgg().crop
    tops, lefts = (
        range(0, side // STRIDE * STRIDE - crop + 1, STRIDE) for side in image_HWC.shape[:2]
    )
    views_VHWC = torch.cat([image_HWC[None], mirror(image_HWC[None])])
    cut = [views_VHWC[:, top : top + crop, left : left + crop] for top in tops for left in lefts]
    scores = network.crop_scores(network.preprocessing(torch.cat(cut))).float()
    return scores.view(len(cut), 2, -1).mean(0).softmax(1).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", action="append", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scale", type=int, required=True)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    items = images_of(options.data, "val", options.limit)
    labels = np.asarray(items.labels)
    table = columns("weights", "images", "dense, top-1 error %", "the same windows as crops")
    for spec in options.weights:
        network = vggfeat.load(spec, device=options.device)
        if network.vgg().crop % STRIDE or network.vgg().pool != "floor":
            raise SystemExit(
                f"{spec}: its windows are no crops (crop of {network.vgg().crop},"
                f" {network.vgg().pool} pooling)"
            )
        order = class_order(network, items.classes)
        wrong = np.zeros(2)
        for i, label in enumerate(labels):
            image = torch.from_numpy(smallest_side(read_rgb(items.source(i)), options.scale))
            image = image.to(network.device)
            for k, posteriors in enumerate(
                (dense(network, image[None])[0], windows(network, image))
            ):
                wrong[k] += int(posteriors[order].argmax()) != label
        errors = (f"{100 * share:.1f}" for share in wrong / len(labels))
        table.add_row(spec, str(len(labels)), *errors)
    out.print(table)


if __name__ == "__main__":
    main()
