"""The networks of Table 1 (Simonyan & Zisserman, arXiv 1409.1556), for a crop or densely over a
whole image.

N images, H, W height and width, K channels. State-dict keys are torchvision's (`features.N.weight`,
`classifier.0|3|6.weight`), so the same file fits `torchvision.models.vgg16` and this module.

    net = VGG("D")
    net(x_NCHW, "fc8")  # any H, W >= crop: the score map (N, 1000, h, w); FC layers as convolutions
    net.crop_scores(x_NCHW)   # H = W = crop: the scores (N, 1000); FC layers as matrices
    net(images_NHWC, "fc7", preprocessing)  # of uint8 RGB images: a GPU reads them as they are

Both run the same weights: the convolutions are views of the matrices, not copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vggfeat import fused, table1
from vggfeat.errors import VggfeatError
from vggfeat.images import Preprocessing
from vggfeat.table1 import (
    FC_CHANNELS,
    FC_LAYERS,
    STAGE_CHANNELS,
    TABLE_1,
    layer_names,
    parameter_count,
)


class LocalResponseNorm(nn.Module):
    """b_c = a_c / (2 + 1e-4 * sum of a^2 over five neighbouring channels) ^ 0.75 (Krizhevsky et al.
    2012, Sect. 3.3).

    PyTorch's own has no bfloat16 on a CPU and takes two to three times as long there. The sum over
    neighbours is a 1x1 convolution with a band of ones, in float32 where the input is coarser.
    """

    def forward(self, a_NCHW: Tensor) -> Tensor:
        """(N, C, H, W), in the input's type."""
        a = a_NCHW if a_NCHW.dtype == torch.float64 else a_NCHW.float()
        with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
            c = torch.arange(a.shape[1], device=a.device)
            band = ((c[:, None] - c).abs() <= 2).to(a.dtype)[:, :, None, None]
            alpha, k = 1e-4 * band, a.new_full((len(c),), 2.0)
            b = a * F.conv2d(a.square(), alpha, k).pow(-0.75)
        return b.to(a_NCHW.dtype)


class VGG(nn.Module):
    """A net of Table 1.

    net: "A", "A-LRN", "B", "B-5x5", "C", "D" or "E".
    num_classes: outputs of fc8.
    width: factor on the channels of every hidden layer; 1 is the paper's.
    crop: side in pixels of the training crop, a multiple of 32; fc6 covers crop / 32 positions a
    side of pool5. pool: "floor" (PyTorch) or "ceil" (Caffe): what max-pooling makes of an odd side.
    Equal on a 224 crop. until: the last layer that is built; weights of later layers are not
    needed.
    Raises VggfeatError: values that can't be, or more than MOST_PARAMETERS, before anything is
    allocated.
    """

    def __init__(
        self,
        net: str,
        num_classes: int = 1000,
        width: float = 1.0,
        crop: int = 224,
        pool: str = "floor",
        until: str = "fc8",
    ) -> None:
        super().__init__()
        self.layers = layer_names(net)
        if until not in self.layers:
            raise VggfeatError(f"net {net} has no layer {until!r}; it has {', '.join(self.layers)}")
        parameter_count(net, num_classes, width, crop)
        self.layers = self.layers[: self.layers.index(until) + 1]
        self.net, self.num_classes, self.width, self.crop = net, num_classes, width, crop
        self.fc6_kernel = crop // 32
        self.channels: dict[str, int] = {}  # layer -> channels of its output
        self.ends: dict[str, int] = {}  # layer -> modules of `features` that are run for it

        modules: list[nn.Module] = []
        channels = 3
        for s, stage in enumerate(TABLE_1[net], 1):
            index = 0
            for kernel in stage:
                if isinstance(kernel, str):
                    modules.append(LocalResponseNorm())
                    self._close(f"lrn{s}", channels, modules)
                    continue
                index += 1
                out = max(1, round(STAGE_CHANNELS[s - 1] * width))
                modules.append(nn.Conv2d(channels, out, kernel, padding=kernel // 2))
                modules.append(nn.ReLU(inplace=True))
                channels = out
                self._close(f"conv{s}_{index}", channels, modules)
            modules.append(nn.MaxPool2d(2, 2))
            self._close(f"pool{s}", channels, modules)
        self.features = nn.Sequential(*modules[: max(self.ends.values())])

        fc = max(1, round(FC_CHANNELS * width))
        pool5 = channels * self.fc6_kernel**2
        head = [
            nn.Linear(pool5, fc),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(fc, fc),
            nn.ReLU(True),
            nn.Dropout(0.5),
        ]
        head.append(nn.Linear(fc, num_classes))
        present = [name for name in FC_LAYERS if name in self.layers]
        self.classifier = nn.Sequential(*head[: 3 * len(present) - (2 if "fc8" in present else 0)])
        self.channels |= {name: num_classes if name == "fc8" else fc for name in present}

        self.set_pool(pool)

    def set_pool(self, pool: str) -> None:
        """Make max-pooling of an odd side round by "floor" or "ceil"; VggfeatError for anything
        else.
        """
        if pool not in ("floor", "ceil"):
            raise VggfeatError(f"pool {pool!r} is neither 'floor' nor 'ceil'")
        self.pool = pool
        for module in self.features:
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = pool == "ceil"

    def _close(self, name: str, channels: int, modules: list[nn.Module]) -> None:
        if name in self.layers:
            self.channels[name] = channels
            self.ends[name] = len(modules)

    def _require(self, layer: str) -> None:
        if layer not in self.layers:
            raise VggfeatError(
                f"net {self.net} has no layer {layer!r} here (its weights reach {self.layers[-1]});"
                f" ask for one of {', '.join(self.layers)}"
            )

    def min_side(self, layer: str) -> int:
        """Smallest image side in pixels for which `layer` has at least one position."""
        self._require(layer)
        if layer in FC_LAYERS:
            return self.crop
        stage = int(
            layer[-1]
            if layer.startswith("pool")
            else layer.removeprefix("conv").removeprefix("lrn")[0]
        )
        pools = stage if layer.startswith("pool") else stage - 1
        return 1 if self.pool == "ceil" else 2**pools

    def pooled(self, map_NKHW: Tensor, layer: str) -> Tensor:
        """A layer's map averaged over positions: (N, K) float32, whatever the map's type."""
        # channels-last maps have K innermost: the sum over positions reads memory in order
        return map_NKHW.mean(dim=(2, 3), dtype=torch.float32)

    def linear_pooled(
        self, coef_KD: np.ndarray, mean_D: np.ndarray, layer: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """As of `weights.Backbone`: nothing is done to the mean."""
        return coef_KD, np.zeros(len(coef_KD))

    def looks_at(
        self, layer: str, grid: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """As of `weights.Backbone`: a stride's pixels each, of FC layers the crop that fc6
        covers.
        """
        own = next(
            each
            for each in table1.layers(self.net, self.num_classes, self.width, self.crop)
            if each.name == layer
        )
        window = self.crop if layer in FC_LAYERS else own.stride
        rows, columns = (
            np.minimum(own.stride * np.arange(count)[:, None] + [0, window], side) / side
            for count, side in zip(grid, shape, strict=True)
        )
        return rows, columns, own.field

    def forward(
        self, x: Tensor, layer: str = "fc8", preprocessing: Preprocessing | None = None
    ) -> Tensor:
        """The map of `layer`, the net applied densely (Sect. 3.2): (N, K, h, w). Nothing past
        `layer` is computed.

        x: preprocessed images (N, 3, H, W), any H and W from `min_side(layer)` up; or, with the
        preprocessing, uint8 RGB (N, H, W, 3). FC layers run as 7x7, 1x1 and 1x1 convolutions; fc8's
        map is the class score map, before softmax. No dropout here: see `crop_scores`.
        """
        ((_, map_NKHW),) = self.maps(x, (layer,), preprocessing)
        return map_NKHW

    def maps(
        self, x: Tensor, layers: Sequence[str], preprocessing: Preprocessing | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The maps of several layers, as of `forward`, in one pass: each with its layer's name, as
        the pass comes to it.
        """
        for layer in layers:
            self._require(layer)
        h, w = x.shape[-2:] if preprocessing is None else x.shape[-3:-1]
        start = 0
        for name, end in self.ends.items():
            if name in layers:
                x = fused.layers(self.features[start:end], x, preprocessing)
                yield name, x
                start, preprocessing = end, None
        wanted = [name for name in FC_LAYERS if name in layers]
        if not wanted:
            return
        x = fused.layers(self.features[start:], x, preprocessing)
        if min(x.shape[-2:]) < self.fc6_kernel:
            raise VggfeatError(
                f"a {h}x{w} image is smaller than the net's crop of {self.crop}; {wanted[0]} has no"
                " position"
            )
        k = self.fc6_kernel
        for name in FC_LAYERS[: FC_LAYERS.index(wanted[-1]) + 1]:
            fc = cast(nn.Linear, self.classifier[3 * FC_LAYERS.index(name)])
            # The rows of fc6 read pool5 as (K, 7, 7) flattened: a convolution's weight by another
            # name.
            x = fused.windows(x, fc.weight, fc.bias, k)
            if name != "fc8":
                x = F.relu_(x)
            if name in wanted:
                yield name, x
            k = 1

    def crop_scores(self, x: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
        """Scores (N, num_classes) of crops with H = W = crop, FC layers as matrices; dropout in
        training mode. x: as of `forward`.
        """
        self._require("fc8")
        pool5 = fused.layers(self.features, x, preprocessing)
        scores: Tensor = self.classifier(torch.flatten(pool5, 1))
        return scores
