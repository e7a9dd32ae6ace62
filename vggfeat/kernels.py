"""Two layers that PyTorch's own kernels are slow at on a GPU, in Triton: the max-pool, and the
first convolution, straight from the pixels.

Both are bound by memory, and touch it once. N images, H, W height and width, C channels. `fused`
alone imports this module, where it needs it: Triton comes with PyTorch's CUDA builds, and there it
may still want a C compiler.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vggfeat.images import Preprocessing

POOLED = 2048  # values that a program of the max-pool writes
RUNS = 64  # of pixels that conv1_1 computes at a time, as rows of a matrix
COLUMNS = 256  # of that matrix: the channels of a run of pixels
PROGRAMS = 1056  # of conv1_1: some for each of a GPU's processors, 132 on an H100
# How they are compiled: with so few registers two programs fit a processor, and one computes while
# the other loads.
MAX_POOL = {"num_warps": 8}
CONV1_1 = {"num_warps": 8, "maxnreg": 128}


def _channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for a map."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


@triton.jit(do_not_specialize=["H", "W", "h", "w"])
def _max_pool(
    x: tl.tensor,
    y: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    h: tl.tensor,
    w: tl.tensor,
    C: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(w * C, BLOCK)
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < w * C
    channel, column = at % C, at // C
    # a window that reaches beyond the edge has what lies before the edge twice
    top, bottom = 2 * (line % h), tl.minimum(2 * (line % h) + 1, H - 1)
    left, right = 2 * column * C + channel, tl.minimum(2 * column + 1, W - 1) * C + channel
    first = (line // h).to(tl.int64) * H
    above, below = x + (first + top) * W * C, x + (first + bottom) * W * C
    a = tl.load(above + left, mask=there)
    b = tl.load(above + right, mask=there)
    c = tl.load(below + left, mask=there)
    d = tl.load(below + right, mask=there)
    ab = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    cd = tl.maximum(c, d, propagate_nan=tl.PropagateNan.ALL)
    greatest = tl.maximum(ab, cd, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + line.to(tl.int64) * w * C + at, greatest, mask=there)


def max_pool(x_NCHW: Tensor, ceil: bool) -> Tensor:
    """2x2 at stride 2: F.max_pool2d's values, of a map that has a window; channels-last."""
    N, C, H, W = x_NCHW.shape
    h, w = ((H + 1) // 2, (W + 1) // 2) if ceil else (H // 2, W // 2)
    x = x_NCHW.contiguous(memory_format=torch.channels_last)
    y = _channels_last(x, (N, C, h, w))
    programs = N * h * triton.cdiv(w * C, POOLED)
    with torch.cuda.device_of(x):  # Triton's is the current one, which may be another
        _max_pool[programs,](x, y, H, W, h, w, C, BLOCK=POOLED, **MAX_POOL)
    return y


@triton.jit(do_not_specialize=["H", "W", "units"])
def _conv1_1(
    images: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    units: tl.tensor,
    mean_r: tl.tensor,
    mean_g: tl.tensor,
    mean_b: tl.tensor,
    std_r: tl.tensor,
    std_g: tl.tensor,
    std_b: tl.tensor,
    WHITE: tl.constexpr,
    DIVIDE: tl.constexpr,
    BGR: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    RUNS: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """A matrix product: a row is a run of PIXELS pixels of a line, a column a channel of one of
    them, and summed over are the SIDE lines of 3 * (PIXELS + SIDE - 1) values that the run sees.
    """
    SPAN: tl.constexpr = 3 * (PIXELS + SIDE - 1)
    k = tl.arange(0, K)
    down, along = k // SPAN, k % SPAN  # which line, and which value in it
    colour = along % 3  # red, green, blue, as in the images
    column = tl.arange(0, PIXELS * CHANNELS)
    pixel, channel = column // CHANNELS, column % CHANNELS
    mean = tl.where(colour == 0, mean_r, tl.where(colour == 1, mean_g, mean_b))
    std = tl.where(colour == 0, std_r, tl.where(colour == 1, std_g, std_b))

    # (K, PIXELS * CHANNELS): the weights, each pixel's moved along by its place in the run
    across = along[:, None] // 3 - pixel[None, :]
    inner = 2 - colour if BGR else colour
    place = ((channel[None, :] * 3 + inner[:, None]) * SIDE + down[:, None]) * SIDE + across
    meets = (down[:, None] < SIDE) & (across >= 0) & (across < SIDE) & (channel[None, :] < C)
    matrix = tl.load(weight + place, mask=meets, other=0.0)
    added = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)

    tiles = tl.cdiv(W, RUNS * PIXELS)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        line = unit // tiles  # of all images' lines, one after the other
        run = (unit % tiles) * RUNS + tl.arange(0, RUNS)
        seen = line % H + down - SIDE // 2
        value = 3 * (PIXELS * run[:, None] - SIDE // 2) + along[None, :]  # its place in the line
        there = (value >= 0) & (value < 3 * W)
        there &= ((down < SIDE) & (seen >= 0) & (seen < H))[None, :]
        pixels = images + line.to(tl.int64) * 3 * W
        x = tl.load(pixels + (down - SIDE // 2)[None, :] * 3 * W + value, mask=there, other=0)
        x = x.to(tl.float32)
        if WHITE != 255.0:
            x = tl.div_rn(x, 255.0 / WHITE)
        x = x - mean[None, :]
        if DIVIDE:
            x = tl.div_rn(x, tl.broadcast_to(std[None, :], x.shape))
        x = tl.where(there, x, 0.0).to(matrix.dtype)  # beyond the edge is the mean, not black
        values = (tl.dot(x, matrix) + added[None, :]).to(y.dtype.element_ty)
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
        at = PIXELS * run[:, None] + pixel[None, :]
        inside = at < W
        if C != CHANNELS:
            inside &= channel[None, :] < C
        map_line = y + line.to(tl.int64) * W * C
        tl.store(map_line + at * C + channel[None, :], values, mask=inside)


def conv1_1_sizes(C: int, side: int) -> dict[str, int]:
    """Of the matrices, which are powers of two, for so many channels and such a kernel."""
    channels = max(4, triton.next_power_of_2(C))
    pixels = min(4, max(1, COLUMNS // channels))
    k = triton.next_power_of_2(side * 3 * (pixels + side - 1))
    return {
        "C": C,
        "CHANNELS": channels,
        "SIDE": side,
        "PIXELS": pixels,
        "RUNS": RUNS,
        "K": max(16, k),
    }


def conv1_1(
    images_NHWC: Tensor, preprocessing: Preprocessing, weight: Tensor, bias: Tensor
) -> Tensor:
    """The first convolution of images as they are, with its ReLU: (N, C, H, W), channels-last, in
    the weight's type, bfloat16.

    images_NHWC: uint8 RGB. weight: (C, 3, side, side), stride 1, padded by side // 2. Values are
    made as `preprocessing` makes them on a CPU, rounded to bfloat16, and summed in float32.
    """
    N, H, W, _ = images_NHWC.shape
    C, _, side, _ = weight.shape
    images, weight = images_NHWC.contiguous(), weight.contiguous()
    y = _channels_last(weight, (N, C, H, W))
    sizes = conv1_1_sizes(C, side)
    units = N * H * triton.cdiv(W, sizes["RUNS"] * sizes["PIXELS"])
    bgr = preprocessing.channel_order == "BGR"
    # by red, green, blue
    mean, std = (v[::-1] if bgr else v for v in (preprocessing.mean, preprocessing.std))
    with torch.cuda.device_of(images):
        _conv1_1[min(units, PROGRAMS),](
            images,
            weight,
            bias,
            y,
            H,
            W,
            units,
            *mean,
            *std,
            WHITE=preprocessing.input_range,
            DIVIDE=preprocessing.std != (1.0, 1.0, 1.0),
            BGR=bgr,
            **sizes,
            **CONV1_1,
        )
    return y
