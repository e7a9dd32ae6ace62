"""Decode once; rescale so that the smallest side is Q; crops; mean; mirror.

N images, H, W height and width, C = 3 colour channels, Q length of the smallest side in pixels (Sect. 3.2,
test scale). Up to `Preprocessing` an image is (H, W, 3) uint8 RGB, where 0 is black and 255 is white.

What the paper leaves open, and what is done here:
- Transparent pixels are composited over white. Dropping alpha (Pillow's `convert("RGB")`) would show the
  colours hidden under it, which are whatever the drawing program left there; white is what a page shows.
- Sixteen-bit grey is divided by 257, which takes 65535 to 255; clipping at 255, as Pillow's `convert` does
  with integer modes, turns nearly every such image white. Sixteen-bit colour is decoded by Pillow, which
  keeps the high byte (at most one level away from dividing by 257).
- ICC profiles are ignored: the nets were trained on pixel values as stored. A broken profile does no harm.
- Of an animation or a file of several pages, the first frame.
- EPS and WMF are not read: Pillow hands them to other programs, and a drawing has no pixels of its own.
"""

from __future__ import annotations

import io
import logging
import math
import operator
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from vggfeat.errors import UnreadableImage, VggfeatError

if TYPE_CHECKING:  # a process that only reads images does without PyTorch's two seconds and 600 MB
    import torch

MAX_PIXELS = 178_956_970  # half a GiB of RGB: where Pillow, too, takes a file for a decompression bomb
# conv1_1 has 64 channels: 16 Mpixel are 4 GB of float32 in that one layer, and 60:1 at Q = 512, more than a photograph
MAX_RESCALED_PIXELS = 16_000_000
CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)  # released VGG weights: blue, green, red in 0..255

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262
# EPS, WMF: see above. The others are stubs that recognise a file and can't decode it.
_NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_WITH_ALPHA = {
    "1",
    "L",
    "P",
    "RGB",
    "LA",
    "La",
    "PA",
    "RGBA",
    "RGBa",
}  # in themselves, or by a transparent colour

# From an image stored with EXIF orientation k to the upright one (EXIF 2.32, tag 274).
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

Batch = TypeVar("Batch", np.ndarray, "torch.Tensor")

# All decoders are registered here, once, so that threads never meet a half-filled registry.
Image.init()
# Pillow warns of odd metadata; here an image's outcome is an array or UnreadableImage, and nothing else.
# `warnings.catch_warnings` is not thread-safe, so the filter is the process's; it goes last in the list, and
# any filter that the user sets comes before it. Pillow also logs; with no handler, Python would print that.
# What libtiff itself prints of a damaged compressed TIFF can't be silenced from here.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_rgb(
    source: str | os.PathLike[str] | bytes | Image.Image | np.ndarray, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """One image as (H, W, 3) uint8 RGB, C-contiguous, writeable, upright.

    source: a path; the bytes of a file; a PIL image (its current frame; it is not closed); or an array,
    (H, W) or (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8, uint16 (0..65535) or floats (0..1).
    A uint8 RGB array is not copied if it already is what is returned.
    max_pixels: H x W above this is refused from the header, before any pixel is decoded. It stands in place
    of `PIL.Image.MAX_IMAGE_PIXELS`, which is left alone. Arrays are not limited: they are in memory already.

    EXIF orientation is honoured. Alpha, 16 bits, profiles, animations: see the top of this file. Float images
    must lie in 0..1; 32-bit integer ones are taken as 16 bits wide and must lie in 0..65535.
    Safe to call from many threads. Only regular files are opened, so that a pipe or device can't hang it.

    Raises UnreadableImage for whatever is wrong with the image; its message is the reason, without the path.
    """
    if isinstance(source, np.ndarray):
        return _rgb_of_array(source)
    if isinstance(source, Image.Image):
        return _decode(lambda: source, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode_file(io.BytesIO(source), len(source), max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise VggfeatError(
            f"an image is a path, bytes, a PIL image or a NumPy array, not {type(source).__name__}"
        )
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        file = open(source, "rb")  # noqa: SIM115 - closed by the `with` below; only opening is tried here
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UnreadableImage(_one_line(reason[:1].lower() + reason[1:])) from error
    with file:
        return _decode_file(file, status.st_size, max_pixels)


def _decode_file(file: IO[bytes], n_bytes: int, max_pixels: int) -> np.ndarray:
    if n_bytes == 0:
        raise UnreadableImage("empty file (0 bytes)")
    return _decode(lambda: _open_header(file), max_pixels)


def _open_header(file: IO[bytes]) -> Image.Image:
    # Image.open is this loop and a check for bombs, which either warns or raises without saying the width and
    # height, and whose limit is one global for all threads. Ours is in `_check_size`.
    prefix = file.read(16)
    for name in [name for name in Image.ID if name not in _NOT_DECODED]:
        factory, accept = Image.OPEN[name]
        accepted = accept(prefix) if accept else True
        if not accepted or isinstance(accepted, str):  # a string says why this Pillow can't
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # not of this format after all
            continue
    raise UnidentifiedImageError


def _decode(open_image: Callable[[], Image.Image], max_pixels: int) -> np.ndarray:
    try:
        image = open_image()
        _check_size(image, max_pixels)
        image.load()
        _check_size(image, max_pixels)  # an icon's header can disagree with the picture inside
        rgb = _rgb_of_pixels(image)
        upright = _UPRIGHT.get(_orientation(image), lambda a: a)(rgb)
        return np.require(upright, np.uint8, ["C", "W"])
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(_one_line(f"a picture inside is too large: {error}")) from error
    except MemoryError as error:
        raise UnreadableImage("not enough memory to decode it") from error
    except Exception as error:
        # Decoders of damaged files raise SyntaxError, struct.error, zlib.error, IndexError, and others too
        # many to list: one bad image must not stop a run over a million.
        reason = str(error) or type(error).__name__
        cut = isinstance(error, EOFError) or re.search("truncated|unexpected end|eof", reason, re.IGNORECASE)
        raise UnreadableImage(_one_line(f"{'truncated' if cut else 'damaged'}: {reason}")) from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadableImage(f"{width}x{height} pixels: there is nothing in it")
    if width * height > max_pixels:
        raise UnreadableImage(f"{width}x{height} pixels is over the limit of {max_pixels} pixels")


def _orientation(image: Image.Image) -> int:
    # Asked after load(): a PNG may keep EXIF behind its pixels, and Pillow turns a TIFF upright as it loads.
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata; the pixels are good
        return 1


def _rgb_of_pixels(image: Image.Image) -> np.ndarray:
    mode = image.mode
    if mode == "F":
        return _rgb_of_array(np.asarray(image))
    if mode == "I" or mode.startswith("I;16"):
        return _rgb_of_deep_grey(image)
    if mode in _WITH_ALPHA and image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _rgb_of_deep_grey(image: Image.Image) -> np.ndarray:
    stored = np.asarray(image)
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # TIFF only
    # Pillow unpacks 12-bit TIFF as 0..4095, and leaves "0 is white" uninverted, in 16-bit modes only
    white = 4095 if image.mode != "I" and tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] == 12 else 65535
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high > white:
        raise UnreadableImage(f"integers span {low}..{high}; white is known only for 0..{white}")
    values = stored.astype(np.int32)  # 511 * 65535 below still fits
    if image.mode != "I" and tags.get(_TIFF_PHOTOMETRIC) == 0:
        values = white - values
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG's tRNS: the one grey that is transparent
        values[values == transparent] = white
    grey = ((2 * 255 * values + white) // (2 * white)).astype(np.uint8)  # rounded
    return np.stack([grey] * 3, axis=-1)


def _rgb_of_array(array: np.ndarray) -> np.ndarray:
    described = f"array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UnreadableImage(f"{described}: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.size == 0:
        raise UnreadableImage(f"{described}: there is nothing in it")
    if array.dtype.newbyteorder("=") == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 x 257; rounded
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise UnreadableImage("float values that are not finite (NaN or infinity)")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise UnreadableImage(f"float values span {low:g}..{high:g}; floats must lie in 0..1")
        array = (array.astype(np.float64) * 255 + 0.5).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UnreadableImage(f"{described}: expected uint8, uint16 or floats in 0..1")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    elif array.shape[2] == 4:
        array = _over_white(array)
    return np.require(array, np.uint8, ["C", "W"])


def _over_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(
        np.uint8
    )  # at most 65152: fits 16 bits


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:200]


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


def smallest_side(image_HWC: np.ndarray, Q: int, *, max_pixels: int = MAX_RESCALED_PIXELS) -> np.ndarray:
    """The image (h, w, 3) uint8, rescaled so that its smallest side is Q pixels; itself if it is already.

    Bilinear; antialiased when it shrinks (Pillow's BILINEAR, whose support grows with the reduction).
    Raises UnreadableImage if the result has more than max_pixels pixels: a strip of 20000x1 at Q=512 would
    have 5 gigapixels, and the network's first layer 64 channels of them.
    """
    height, width = image_HWC.shape[:2]
    shape = smallest_side_shape(height, width, operator.index(Q))
    _check_rescaled(height, width, *shape, Q, max_pixels)
    if shape == (height, width):
        return image_HWC
    resized = Image.fromarray(image_HWC).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.array(resized)


def _check_rescaled(height: int, width: int, h: int, w: int, Q: int, max_pixels: int) -> None:
    if h * w > max_pixels:
        raise UnreadableImage(
            f"{width}x{height} pixels at Q={Q} would be {w}x{h}, over the limit of {max_pixels} pixels"
        )


def rescaled_crop(image_HWC: np.ndarray, Q: int, top: int, left: int, size: int) -> np.ndarray:
    """`smallest_side(image, Q)[top : top + size, left : left + size]`, without rescaling what is outside of the crop.

    (size, size, 3) uint8, a copy; equal to within 2 grey levels, because Pillow keeps the box in single precision.
    Raises VggfeatError if the crop reaches out of the rescaled image, UnreadableImage as `smallest_side` does.
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
    # Pillow's filter reaches over the box's edge into the image, so the crop is the rescaled image's, not the box's.
    resized = Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BILINEAR, box)
    return np.array(resized)


def centre_crop(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The middle (size, size, 3) of the image, a copy; of an odd margin, the smaller half is above and left.

    Raises VggfeatError if the image is smaller than the crop.
    """
    return grid_crops(image_HWC, size, n=1)[0]


def grid_crops(images: Batch, size: int, n: int = 5) -> Batch:
    """A regular n x n grid of crops of (..., H, W, 3): (n*n, ..., size, size, 3), row by row; NumPy or torch.

    Evenly spaced: the first is flush with the top left, the last with the bottom right; positions between are
    rounded, halves towards the top left. n=1 is the centre crop, which every odd n contains too.
    Raises VggfeatError if the images are smaller than the crop. Source: Sect. 3.2, multi-crop, n=5.
    """
    height, width = images.shape[-3:-1]
    if size < 1 or n < 1:
        raise VggfeatError(f"a grid of {n}x{n} crops of {size} pixels does not exist")
    if min(height, width) < size:
        raise VggfeatError(f"can't cut a crop of {size}x{size} from {width}x{height} pixels: use a larger Q")
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
    return [(2 * i * margin + n - 2) // (2 * (n - 1)) for i in range(n)]  # ceil(i * margin / (n - 1) - 1/2)


def mirror(images_NHWC: Batch) -> Batch:
    """Mirror images, left and right exchanged: a contiguous copy, NumPy or torch, of (..., H, W, C).

    The width is the last axis but one; a channels-first batch (N, C, H, W) needs `x.flip(-1)` instead.
    """
    if not isinstance(images_NHWC, np.ndarray):
        return images_NHWC.flip(-2)
    return np.ascontiguousarray(images_NHWC[..., ::-1, :])  # torch.from_numpy takes no negative strides


@dataclass(frozen=True)
class Preprocessing:
    """What a network's file says must be done to pixels before its first layer (Sect. 2.1: minus the mean).

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
    """The value of white before the mean is subtracted: 255 (the paper, Caffe) or 1 (torchvision, timm)."""

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
            raise VggfeatError(f"mean {self.mean} lies outside the input range 0..{self.input_range:g}")
        if not all(value > 0 for value in self.std):
            raise VggfeatError(f"std must be positive, not {self.std}")

    def __call__(self, batch_NHWC: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, channels-last in memory, on the batch's device.

        Bit for bit torchvision's ToTensor and Normalize where input_range is 1. The batch is left as it is.
        Raises VggfeatError for another shape or type.
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
        return x_NHWC.permute(0, 3, 1, 2)  # NHWC in memory seen as NCHW: that is what channels-last means

    def to_metadata(self) -> dict[str, str]:
        """What a weights file keeps: mean, std, channel_order, input_range. Exact: repr of floats."""
        return {
            "mean": ",".join(map(repr, self.mean)),
            "std": ",".join(map(repr, self.std)),
            "channel_order": self.channel_order,
            "input_range": f"0..{self.input_range:g}",
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Preprocessing:
        """The inverse of `to_metadata`; other keys are ignored, a missing std is 1.

        `mean_bgr` (blue, green, red in 0..255, Caffe's way) may stand for mean; then channel_order and
        input_range default to BGR and 0..255. Otherwise a missing key raises VggfeatError: preprocessing is
        never guessed.
        """
        caffe = "mean" not in metadata and "mean_bgr" in metadata
        fields = {
            "std": "1,1,1",
            **({"channel_order": "BGR", "input_range": "0..255"} if caffe else {}),
            **metadata,
        }
        missing = [
            key
            for key in ("mean_bgr" if caffe else "mean", "channel_order", "input_range")
            if key not in fields
        ]
        if missing:
            raise VggfeatError(
                f"the weights' metadata lacks {', '.join(missing)}: preprocessing is not guessed"
            )
        ranges = {"0..255": 255.0, "0..1": 1.0}
        if fields["input_range"] not in ranges:
            raise VggfeatError(f"input_range must be 0..255 or 0..1, not {fields['input_range']!r}")
        mean = _three_numbers("mean", fields["mean_bgr" if caffe else "mean"].split(","))
        if caffe and fields["channel_order"] == "RGB":
            mean = (mean[2], mean[1], mean[0])
        std = _three_numbers("std", fields["std"].split(","))
        return cls(mean, std, fields["channel_order"], ranges[fields["input_range"]])


def _three_numbers(name: str, values: Any) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in values)
    except (TypeError, ValueError):
        raise VggfeatError(f"{name} must be three numbers, not {values!r}") from None
    if not all(map(math.isfinite, (first, second, third))):
        raise VggfeatError(f"{name} must be finite, not {values!r}")
    return first, second, third


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # kept: copying three floats to a GPU in each batch would wait for the batch before it
    import torch

    return torch.tensor(values, dtype=torch.float32, device=device)
