"""Images in memory, (H, W, 3) uint8 RGB: rescale so that the smallest side is Q; crops; mirror;
mean.

N images, H, W height and width, C = 3 colour channels, Q length of the smallest side in pixels
(Sect. 3.2, test scale). `decode.read_rgb` reads them from files.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from vggfeat.errors import UnreadableImage, VggfeatError

if TYPE_CHECKING:  # a process that only reads images does without PyTorch's two seconds and 600 MB
    import torch

# conv1_1 has 64 channels: 16 Mpixel are 4 GB of float32 in that one layer, and 60:1 at Q = 512,
# more than a photograph
MAX_RESCALED_PIXELS = 16_000_000
BILINEAR, BICUBIC = "bilinear, antialiased", "bicubic, antialiased"
FILTERS = {BILINEAR: Image.Resampling.BILINEAR, BICUBIC: Image.Resampling.BICUBIC}
"""How an image is rescaled, by the words that descriptions and weights' metadata have for it."""
CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)  # released VGG weights: blue, green, red in 0..255

Batch = TypeVar("Batch", np.ndarray, "torch.Tensor")


def smallest_side_shape(height: int, width: int, Q: int) -> tuple[int, int]:
    """(h, w) after an isotropic rescale: the smallest side is Q, the other is rounded, halves up.

    Integer arithmetic throughout, so exact at any size. Source: Sect. 3.2.
    Raises VggfeatError unless all three are at least 1.
    """
    if min(height, width, Q) < 1:
        raise VggfeatError(f"can't rescale {width}x{height} pixels to a smallest side of {Q}")
    short, long = min(height, width), max(height, width)
    other = (2 * long * Q + short) // (2 * short)
    return (Q, other) if height <= width else (other, Q)


def smallest_side(
    image_HWC: Batch, Q: int, filter: str = BILINEAR, *, max_pixels: int = MAX_RESCALED_PIXELS
) -> Batch:
    """The image (h, w, 3) uint8, rescaled so that its smallest side is Q pixels; itself if it is
    already. NumPy; or torch, on whatever device it is.

    filter: one of FILTERS, antialiased when it shrinks (Pillow's, whose support grows with the
    reduction; PyTorch's is at most one grey level from it). Raises UnreadableImage if the result
    has more than max_pixels pixels: a strip of 20000x1 at Q=512 would have 5 gigapixels, and the
    network's first layer 64 channels of them.
    """
    height, width = image_HWC.shape[:2]
    shape = smallest_side_shape(height, width, operator.index(Q))
    _check_rescaled(height, width, *shape, Q, max_pixels)
    if shape == (height, width):
        return image_HWC
    if isinstance(image_HWC, np.ndarray):
        resized = Image.fromarray(image_HWC).resize((shape[1], shape[0]), FILTERS[filter])
        return np.array(resized)
    if min(shape) == 1:  # PyTorch's, on a CPU, goes wrong where a row of the result is one pixel
        return image_HWC.new_tensor(smallest_side(image_HWC.cpu().numpy(), Q, filter))
    from torch.nn import functional

    x_NCHW = image_HWC.permute(2, 0, 1)[None].float()
    if filter == BICUBIC:
        # it overshoots at edges, which Pillow cuts off after either direction
        for size in ((height, shape[1]), shape):
            x_NCHW = functional.interpolate(x_NCHW, size, mode="bicubic", antialias=True)
            x_NCHW = x_NCHW.round_().clamp_(0, 255)
    else:
        x_NCHW = functional.interpolate(x_NCHW, shape, mode="bilinear", antialias=True)
    return x_NCHW[0].round_().byte().permute(1, 2, 0).contiguous()


def _check_rescaled(height: int, width: int, h: int, w: int, Q: int, max_pixels: int) -> None:
    if h * w > max_pixels:
        raise UnreadableImage(
            f"{width}x{height} pixels at Q={Q} would be {w}x{h}, over the limit of {max_pixels}"
            " pixels"
        )


def rescaled_crop(image_HWC: np.ndarray, Q: int, top: int, left: int, size: int) -> np.ndarray:
    """`smallest_side(image, Q)[top : top + size, left : left + size]`, without rescaling what is
    outside of the crop.

    (size, size, 3) uint8, a copy; equal to within 2 grey levels, because Pillow keeps the box in
    single precision. Raises VggfeatError if the crop reaches out of the rescaled image,
    UnreadableImage as `smallest_side` does.
    """
    height, width = image_HWC.shape[:2]
    h, w = smallest_side_shape(height, width, operator.index(Q))
    _check_rescaled(height, width, h, w, Q, MAX_RESCALED_PIXELS)
    if not (0 <= top <= h - size and 0 <= left <= w - size):
        raise VggfeatError(
            f"a crop of {size} pixels at row {top}, column {left} is not inside {w}x{h} pixels"
        )
    if (h, w) == (height, width):
        return image_HWC[top : top + size, left : left + size].copy()
    y, x = height / h, width / w
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    # Pillow's filter reaches over the box's edge into the image, so the crop is the rescaled
    # image's, not the box's.
    resized = Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BILINEAR, box)
    return np.array(resized)


def centre_crop(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The middle (size, size, 3) of the image, a copy; of an odd margin, the smaller half is above
    and left.

    Raises VggfeatError if the image is smaller than the crop.
    """
    crop_HWC: np.ndarray = grid_crops(image_HWC, size, n=1)[0]
    return crop_HWC


def grid_crops(images: Batch, size: int, n: int = 5) -> Batch:
    """A regular n x n grid of crops of (..., H, W, 3): (n*n, ..., size, size, 3), row by row; NumPy
    or torch.

    Evenly spaced: the first is flush with the top left, the last with the bottom right; positions
    between are rounded, halves towards the top left. n=1 is the centre crop, which every odd n
    contains too. Raises VggfeatError if the images are smaller than the crop. Source: Sect. 3.2,
    multi-crop, n=5.
    """
    height, width = images.shape[-3:-1]
    if size < 1 or n < 1:
        raise VggfeatError(f"a grid of {n}x{n} crops of {size} pixels does not exist")
    if min(height, width) < size:
        raise VggfeatError(
            f"can't cut a crop of {size}x{size} from {width}x{height} pixels: use a larger Q"
        )
    crops = [
        images[..., top : top + size, left : left + size, :]
        for top in _grid_positions(height - size, n)
        for left in _grid_positions(width - size, n)
    ]
    if isinstance(images, np.ndarray):
        return np.stack(crops)
    import torch

    return torch.stack(crops)


def _grid_positions(margin: int, n: int) -> list[int]:
    if n == 1:
        return [margin // 2]
    # ceil(i * margin / (n - 1) - 1/2)
    return [(2 * i * margin + n - 2) // (2 * (n - 1)) for i in range(n)]


def mirror(images_NHWC: Batch) -> Batch:
    """Mirror images, left and right exchanged: a contiguous copy, NumPy or torch, of (..., H, W,
    C).

    The width is the last axis but one; a channels-first batch (N, C, H, W) needs `x.flip(-1)`
    instead.
    """
    if not isinstance(images_NHWC, np.ndarray):
        return images_NHWC.flip(-2)
    # torch.from_numpy takes no negative strides
    return np.ascontiguousarray(images_NHWC[..., ::-1, :])


@dataclass(frozen=True)
class Preprocessing:
    """What a network's file says must be done to pixels before its first layer (Sect. 2.1: minus
    the mean).

    (uint8 / 255 * input_range, channels in the net's order, minus mean) / std.
    Bad values raise VggfeatError.
    """

    mean: tuple[float, float, float]
    """Subtracted from each channel; in the net's channel order, in units of input_range."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Each channel is divided by it; same order and units. 1 in the paper, which doesn't divide."""
    channel_order: str = "RGB"
    """RGB, or BGR for weights that came from Caffe (OpenCV's order)."""
    input_range: float = 255.0
    """The value of white before the mean is subtracted: 255 (the paper, Caffe) or 1 (torchvision,
    timm).
    """

    def __post_init__(self) -> None:
        if self.channel_order not in ("RGB", "BGR"):
            raise VggfeatError(f"channel_order must be RGB or BGR, not {self.channel_order!r}")
        if self.input_range not in (255, 1):
            raise VggfeatError(f"input_range must be 255 or 1, not {self.input_range!r}")
        object.__setattr__(self, "input_range", float(self.input_range))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        if not all(0 <= value <= self.input_range for value in self.mean):
            # the usual slip is a mean of 0..255 beside an input range of 1
            raise VggfeatError(
                f"mean {self.mean} lies outside the input range 0..{self.input_range:g}"
            )
        if not all(value > 0 for value in self.std):
            raise VggfeatError(f"std must be positive, not {self.std}")

    def __call__(self, batch_NHWC: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, channels-last in memory, on the batch's
        device.

        Bit for bit torchvision's ToTensor and Normalize where input_range is 1. The batch is left
        as it is. Raises VggfeatError for another shape or type.
        """
        import torch

        if batch_NHWC.ndim != 4 or batch_NHWC.shape[3] != 3 or batch_NHWC.dtype != torch.uint8:
            got = f"{tuple(batch_NHWC.shape)} {batch_NHWC.dtype}"
            raise VggfeatError(f"a batch must be (N, H, W, 3) uint8, not {got}")
        ordered = batch_NHWC.flip(-1) if self.channel_order == "BGR" else batch_NHWC
        x_NHWC = ordered.contiguous().to(torch.float32)
        if self.input_range != 255:
            x_NHWC.div_(255 / self.input_range)
        x_NHWC.sub_(_on_device(self.mean, batch_NHWC.device))
        if self.std != (1.0, 1.0, 1.0):
            x_NHWC.div_(_on_device(self.std, batch_NHWC.device))
        # NHWC in memory seen as NCHW: that is what channels-last means
        return x_NHWC.permute(0, 3, 1, 2)

    def to_metadata(self) -> dict[str, str]:
        """What a weights file keeps: mean, std, channel_order, input_range. Exact: repr of
        floats.
        """
        return {
            "mean": ",".join(map(repr, self.mean)),
            "std": ",".join(map(repr, self.std)),
            "channel_order": self.channel_order,
            "input_range": f"0..{self.input_range:g}",
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Preprocessing:
        """The inverse of `to_metadata`; other keys are ignored, a missing std is 1.

        `mean_bgr` (blue, green, red in 0..255, Caffe's way) may stand for mean; then channel_order
        and input_range default to BGR and 0..255. Otherwise a missing key raises VggfeatError:
        preprocessing is never guessed.
        """
        fields = said(metadata)
        missing = [key for key in ("mean", "channel_order", "input_range") if key not in fields]
        if missing:
            raise VggfeatError(
                f"the weights' metadata lacks {', '.join(missing)}: preprocessing is not guessed"
            )
        ranges = {"0..255": 255.0, "0..1": 1.0}
        if fields["input_range"] not in ranges:
            raise VggfeatError(f"input_range must be 0..255 or 0..1, not {fields['input_range']!r}")
        mean = _three_numbers("mean", fields["mean"].split(","))
        std = _three_numbers("std", fields["std"].split(","))
        return cls(mean, std, fields["channel_order"], ranges[fields["input_range"]])

    def same(self, other: Preprocessing) -> bool:
        """Whether both make the same of an image, to four digits, in whatever units they are
        written.
        """
        ours, theirs = ([v * 255 / p.input_range for v in (*p.mean, *p.std)] for p in (self, other))
        close = all(
            math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-3)
            for a, b in zip(ours, theirs, strict=True)
        )
        return close and self.channel_order == other.channel_order


def said(metadata: Mapping[str, str]) -> dict[str, str]:
    """The facts that a weights file's metadata tell, in one form: `mean_bgr` as mean, with what it
    implies.

    What is empty says nothing; a mean without std has std 1.
    """
    facts = {key: value for key, value in metadata.items() if value not in ("", "[]")}
    if mean_bgr := facts.pop("mean_bgr", None):
        facts = {"pool": "ceil", **facts}  # the weights came through Caffe, whose pooling rounds up
        if "mean" not in facts:
            facts = {"channel_order": "BGR", "input_range": "0..255", **facts}
            values = mean_bgr.split(",")
            facts["mean"] = ",".join(
                values if facts["channel_order"] == "BGR" else reversed(values)
            )
    return {"std": "1,1,1", **facts} if "mean" in facts else facts


def _three_numbers(name: str, values: Any) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in values)
    except (TypeError, ValueError):
        raise VggfeatError(f"{name} must be three numbers, not {values!r}") from None
    if not all(map(math.isfinite, (first, second, third))):
        raise VggfeatError(f"{name} must be finite, not {values!r}")
    return first, second, third


# the authors' nets, and all that came through Caffe
CAFFE = Preprocessing(CAFFE_MEAN_BGR, channel_order="BGR")


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # kept: copying three floats to a GPU in each batch would wait for the batch before it
    import torch

    return torch.tensor(values, dtype=torch.float32, device=device)
