"""What 150 crops an image cost beside the dense net (Sect. 3.2), on the same photographs.

    python -m benchmarks.evaluation --photos DIR --limit 4 --scales 256,384,512

Net D, full width, 1,000 classes, with mirror images; both through `pretrain.evaluate`'s own code,
interleaved, medians. Beside the measured ratio stands the arithmetic one: multiply-adds of 50 crops
a scale over those of whole images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import vggfeat
from pretrain.posteriors import crops, dense
from vggfeat.decode import read_rgb
from vggfeat.images import smallest_side
from vggfeat.plan import forward_flop
from vggfeat.terminal import columns, out
from vggfeat.weights import Network


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--scales", default="256,384,512")
    parser.add_argument("--weights", default="random:D")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    network = vggfeat.load(options.weights, device=options.device)
    paths = sorted(options.photos.iterdir())[: options.limit]
    table = columns("Q", "dense, s/image", "50 crops, s/image", "ratio", "by arithmetic")
    sums = np.zeros(4)
    for Q in map(int, options.scales.split(",")):
        images = [
            torch.from_numpy(smallest_side(read_rgb(path), Q))[None].to(network.device)
            for path in paths
        ]
        modes: dict[str, Callable[[Network, torch.Tensor], torch.Tensor]] = {
            "dense": dense,
            "crops": lambda network, image: crops(network, image, options.batch_size),
        }
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(options.repeats + 1):
            for mode, compute in modes.items():
                began = time.perf_counter()
                for image in images:
                    compute(network, image).cpu()
                times[mode].append((time.perf_counter() - began) / len(images))
        side = network.vgg().crop
        whole = sum(forward_flop(network, "fc8", *image.shape[1:3]) for image in images) / len(
            images
        )
        figures = np.array(
            [
                *(statistics.median(times[mode][1:]) for mode in ("dense", "crops")),
                2 * whole,
                50 * forward_flop(network, "fc8", side, side),
            ]
        )
        sums += figures
        table.add_row(str(Q), *_shown(figures))
    table.add_row("all", *_shown(sums))
    out.print(table)
    out.print(
        f"{len(paths)} photographs, net {network.name}, {network.precision} on {network.device}"
    )


def _shown(figures: np.ndarray) -> tuple[str, ...]:
    dense_s, crops_s, dense_flop, crops_flop = figures
    return (
        f"{dense_s:.2f}",
        f"{crops_s:.2f}",
        f"{crops_s / dense_s:.2f}",
        f"{crops_flop / dense_flop:.2f}",
    )


if __name__ == "__main__":
    main()
