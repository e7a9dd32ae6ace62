"""A net's layers, on a CPU and without gradients with less traffic to memory than PyTorch's modules
have.

On a processor with matrix units a convolution of VGG's takes less time than the ReLU after it, or
the pooling of a large map, or the rearrangement of fc6's weights for each batch. So a convolution
writes its map once, after the ReLU; a max-pool is two maxima over whole rows of channels; and an FC
layer on a map is one product of a matrix with all windows. N images, H, W height and width, C, D
channels; maps are channels-last in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

# oneDNN's bfloat16 convolution takes up to five times as long on maps of some widths: 383, 359,
# 335, never a multiple of four, never a narrow map
WIDE, COLUMNS = 256, 4
_MKLDNN: Any = torch.backends.mkldnn  # untyped, as is the other
_JIT: Any = torch.jit
WINDOW_BYTES = 1 << 28  # of windows laid out side by side at a time


def applies(x: Tensor) -> bool:
    """Whether x takes the quick way: on a CPU, without gradients or autocast, in a type that oneDNN
    has on this one.

    Not while a graph is recorded: an exported net keeps to PyTorch's public operations.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and bool(_MKLDNN.is_available())
        and bool(_MKLDNN.enabled)
        # without AVX-512, PyTorch's modules compute in bfloat16 all the same
        and (
            x.dtype == torch.float32
            or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
        and not torch.is_autocast_enabled("cpu")
        and not _JIT.is_tracing()
        and not torch.compiler.is_compiling()
    )


def layers(modules: Iterable[nn.Module], x_NCHW: Tensor) -> Tensor:
    """What the modules make of x one after the other; a ReLU follows each convolution.

    Bit for bit. In bfloat16 only: in float32 the convolutions take nearly all of the time, and
    oneDNN may sum in another order where a ReLU follows.
    """
    modules, x = list(modules), x_NCHW
    if (
        x.dtype != torch.bfloat16
        or not applies(x)
        or any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    ):
        for module in modules:  # who hooked in wants each layer's own output
            x = module(x)
        return x
    # Further columns are kept at zero, which is what a convolution finds beyond an image's edge.
    width = x.shape[3]
    before: nn.Conv2d | None = None
    for module in modules:
        if isinstance(module, nn.Conv2d):
            before = module
        elif isinstance(module, nn.ReLU) and before is not None:
            if width >= WIDE and x.shape[3] % COLUMNS:
                x = F.pad(x, (0, -width % COLUMNS))
            # oneDNN's convolution with an elementwise end, which torch.compile uses as well
            x = torch.ops.mkldnn._convolution_pointwise(
                x,
                before.weight,
                before.bias,
                before.padding,
                before.stride,
                before.dilation,
                before.groups,
                "relu",
                [],
                "",
            )
            x[..., width:] = 0
            before = None
        else:
            x = x[..., :width]
            x = max_pool(x, module.ceil_mode) if isinstance(module, nn.MaxPool2d) else module(x)
            width = x.shape[3]
    x = x[..., :width]
    return x if before is None else before(x)


def max_pool(x_NCHW: Tensor, ceil: bool) -> Tensor:
    """2x2 at stride 2. PyTorch's own compares one value after the other where the type is
    bfloat16.
    """
    if min(x_NCHW.shape[2:]) < 2 and not ceil:
        return F.max_pool2d(x_NCHW, 2, 2)  # raises: there is no window
    x_NHWC = x_NCHW.permute(0, 2, 3, 1)
    for dim in (1, 2):
        pairs, rest = divmod(x_NHWC.shape[dim], 2)
        shape = list(x_NHWC.shape)
        shape[dim] = pairs + (rest if ceil else 0)
        pooled = x_NHWC.new_empty(shape)
        in_pairs = torch.unflatten(x_NHWC.narrow(dim, 0, 2 * pairs), dim, (pairs, 2))
        first, second = in_pairs.unbind(dim + 1)
        torch.maximum(first, second, out=pooled.narrow(dim, 0, pairs))
        if ceil and rest:
            pooled.narrow(dim, pairs, 1).copy_(x_NHWC.narrow(dim, 2 * pairs, 1))
        x_NHWC = pooled
    return x_NHWC.permute(0, 3, 1, 2)


def windows(x_NCHW: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """An FC layer at each k x k window of a map, (N, D, H - k + 1, W - k + 1). weight: (D, C * k *
    k).
    """
    if not applies(x_NCHW):
        return F.conv2d(x_NCHW, weight.view(len(weight), -1, k, k), bias)
    N, C, H, W = x_NCHW.shape
    h, w = H - k + 1, W - k + 1
    if k == 1:
        y = F.linear(x_NCHW.permute(0, 2, 3, 1).reshape(N * h * w, C), weight, bias)
        return y.view(N, h, w, -1).permute(0, 3, 1, 2)
    # (N, h, w, C, k, k)
    views = x_NCHW.contiguous().unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, 1, 4, 5)
    y_NhwD = x_NCHW.new_empty(N, h, w, len(weight))
    rows = max(1, WINDOW_BYTES // (N * w * weight.shape[1] * weight.element_size()))
    for top in range(0, h, rows):
        part = views[:, top : top + rows]
        y = F.linear(part.reshape(-1, weight.shape[1]), weight, bias)
        y_NhwD[:, top : top + rows] = y.view(*part.shape[:3], -1)
    return y_NhwD.permute(0, 3, 1, 2)
