"""A net's layers without gradients, with less traffic to memory than PyTorch's modules have.

A convolution of VGG's takes less time than what PyTorch does around it: the bias and the ReLU after
it, the pooling of a large map, the rearrangement of fc6's weights for each batch. So a convolution
writes its map once, after the ReLU, by oneDNN on a CPU and by cuDNN on a GPU; a max-pool reads its
map once; and an FC layer on a map is one product of a matrix with all windows. On a GPU the first
convolution reads the images as they are.

N images, H, W height and width, C, D channels; maps are channels-last in memory. What a library or
a GPU can't do is left to PyTorch's layers, with a warning where that costs time.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vggfeat.devices import out_of_memory
from vggfeat.images import Preprocessing

# oneDNN's bfloat16 convolution takes up to five times as long on maps of some widths: 383, 359,
# 335, never a multiple of four, never a narrow map
WIDE, COLUMNS = 256, 4
# cuDNN's convolution of 8 channels takes half as long as that of 3
PADDING = 8 - 3
TRIED = 512  # pixels a side at most, of an image on which a GPU's way is tried
_MKLDNN: Any = torch.backends.mkldnn  # untyped, as are the others
_CUDNN: Any = torch.backends.cudnn
_JIT: Any = torch.jit
WINDOW_BYTES = 1 << 28  # of windows laid out side by side at a time


def applies(x: Tensor) -> bool:
    """Whether x takes the quick way: without gradients or autocast, in a type that oneDNN has on
    this CPU, or cuDNN on a GPU.

    Not while a graph is recorded: an exported net keeps to PyTorch's public operations.
    """
    return (
        not torch.compiler.is_compiling()  # first, as what follows can't all be compiled
        and not _JIT.is_tracing()
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.device.type in _WAYS
        and not torch.is_grad_enabled()
        and (_cudnn_has() if x.device.type == "cuda" else _mkldnn_has(x.dtype))
        and not torch.is_autocast_enabled(x.device.type)
    )


def _mkldnn_has(dtype: torch.dtype) -> bool:
    """oneDNN. Without AVX-512, PyTorch's modules compute in bfloat16 all the same."""
    return (
        bool(_MKLDNN.is_available())
        and bool(_MKLDNN.enabled)
        and (dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


def _cudnn_has() -> bool:
    """cuDNN, and not AMD's MIOpen under its name."""
    available = torch.version.hip is None and bool(_CUDNN.is_available())
    return available and bool(_CUDNN.enabled)


def layers(
    modules: Iterable[nn.Module], x: Tensor, preprocessing: Preprocessing | None = None
) -> Tensor:
    """What the modules make of x one after the other; a ReLU follows each convolution.

    x: (N, C, H, W); or, with the preprocessing, uint8 RGB images (N, H, W, 3), and the first module
    is a convolution. On a CPU bit for bit what the modules make; on a GPU to the rounding of its
    type.
    """
    modules = list(modules)
    typed = x if preprocessing is None else cast(nn.Conv2d, modules[0]).weight
    if applies(typed) and not any(
        module._forward_hooks or module._forward_pre_hooks for module in modules
    ):
        return _WAYS[typed.device.type](modules, x, preprocessing)
    return _modules(modules, x, preprocessing)  # who hooked in wants each layer's own output


def _modules(
    modules: Sequence[nn.Module], x: Tensor, preprocessing: Preprocessing | None
) -> Tensor:
    x = _prepared(modules, x, preprocessing)
    for module in modules:
        x = module(x)
    return x


def _prepared(
    modules: Sequence[nn.Module], x: Tensor, preprocessing: Preprocessing | None
) -> Tensor:
    """What the first module takes: (N, C, H, W)."""
    if preprocessing is None:
        return x
    return preprocessing(x).to(cast(nn.Conv2d, modules[0]).weight.dtype)


# --- on a CPU -------------------------------------------------------------------------------------


def _on_cpu(modules: Sequence[nn.Module], x: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    """In bfloat16 only: in float32 the convolutions take nearly all of the time, and oneDNN may sum
    in another order where a ReLU follows.
    """
    x = _prepared(modules, x, preprocessing)
    if x.dtype != torch.bfloat16:
        return _modules(modules, x, None)
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


# --- on a GPU -------------------------------------------------------------------------------------

# (device, type, weight's shape) -> whether cuDNN makes convolution and ReLU at once, and right
_AT_ONCE: dict[tuple[Any, ...], bool] = {}
_RIGHT: set[tuple[Any, ...]] = set()  # (device, layer, its kind) that Triton's kernels make right
_WITHOUT: set[torch.device] = set()  # Triton


def _on_gpu(modules: Sequence[nn.Module], x: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    before: nn.Conv2d | None = None
    for module in modules:
        if isinstance(module, nn.Conv2d):
            before = module
        elif isinstance(module, nn.ReLU) and before is not None:
            if preprocessing is None:
                x = _convolution_relu(before, x, before.weight)
            else:
                x = _first(before, x, preprocessing)
            before = preprocessing = None
        else:
            x = _pooled(module, x) if isinstance(module, nn.MaxPool2d) else module(x)
    return x if before is None else before(_prepared([before], x, preprocessing))


def _first(conv: nn.Conv2d, images_NHWC: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The first convolution, with its ReLU, of images as they are.

    In float32, which is cuDNN's TF32 where its flag allows that, the convolution is cuDNN's.
    """
    weight, bias = conv.weight, cast(Tensor, conv.bias)

    def right(kernels: Any) -> bool:
        count = 2 * 5 * 300 * 3  # more pixels a line than are computed at a time
        some = (torch.arange(count, device=weight.device) * 37 % 256).byte().view(2, 5, 300, 3)
        expected = F.relu_(conv(preprocessing(some).to(weight.dtype)))
        return _close(kernels.conv1_1(some, preprocessing, weight, bias), expected, bias)

    images = images_NHWC.dtype == torch.uint8 and images_NHWC.shape[3:] == (3,)
    if weight.dtype == torch.bfloat16 and images:
        kernels = _triton(weight.device, ("first layer", weight.shape, preprocessing), right)
        if kernels is not None:
            return cast(Tensor, kernels.conv1_1(images_NHWC, preprocessing, weight, bias))
    x = F.pad(preprocessing(images_NHWC).to(weight.dtype), (0, 0, 0, 0, 0, PADDING))
    return _convolution_relu(conv, x, F.pad(weight, (0, 0, 0, 0, 0, PADDING)))


def _convolution_relu(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """By one call of cuDNN's, where it has one for this layer that is right; else by two.

    cuDNN is also given the memory that it writes to as a map to be added, times zero. Should its
    kernel read that, a NaN left there by others would come through: so what it makes of a layer's
    first image with a map full of NaN is compared.
    """
    settings: Any = conv.stride, conv.padding, conv.dilation, conv.groups

    def at_once(x: Tensor) -> Tensor:
        return torch.cudnn_convolution_relu(x, weight, conv.bias, *settings)

    def apart(x: Tensor) -> Tensor:
        return F.relu_(F.conv2d(x, weight, conv.bias, *settings))

    kind = x.device, x.dtype, weight.shape
    # the one call doesn't ask whether sums may be in another order each time
    ordered = _CUDNN.deterministic or torch.are_deterministic_algorithms_enabled()
    if ordered or not _AT_ONCE.get(kind, True):
        return apart(x)
    try:
        if kind not in _AT_ONCE:
            some = x[:1, :, :TRIED, :TRIED].contiguous(memory_format=torch.channels_last)
            expected = apart(some)
            added = torch.full_like(expected, torch.nan), 0.0
            tried = torch.cudnn_convolution_add_relu(some, weight, *added, conv.bias, *settings)
            for y in (tried, at_once(some)):
                if not _close(y, expected, cast(Tensor, conv.bias)):
                    raise RuntimeError("it isn't the convolution's")
            _AT_ONCE[kind] = True
        return at_once(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = _in_short(error)
    y = apart(x)  # of a GPU that has failed, or has too little memory, this fails too
    if all(_AT_ONCE.values()):
        warnings.warn(
            f"cuDNN can't be used for convolution and ReLU at once on {x.device} ({why}): one after"
            " the other instead, slower",
            stacklevel=2,
        )
    _AT_ONCE[kind] = False
    return y


def _pooled(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    C = x.shape[1]

    def right(kernels: Any) -> bool:
        some = torch.arange(5 * 7 * C, device=x.device).sin().to(x.dtype).view(1, 5, 7, C)
        some = some.permute(0, 3, 1, 2)
        return all(
            torch.equal(kernels.max_pool(some, ceil), F.max_pool2d(some, 2, 2, ceil_mode=ceil))
            for ceil in (False, True)
        )

    if min(x.shape[2:]) >= 2 or pool.ceil_mode:  # else there is no window, and the module raises
        kernels = _triton(x.device, ("max-pool", x.dtype, C), right)
        if kernels is not None:
            return cast(Tensor, kernels.max_pool(x, pool.ceil_mode))
    return cast(Tensor, pool(x))


def _triton(device: torch.device, kind: tuple[Any, ...], right: Callable[[Any], bool]) -> Any:
    """The module `kernels`, where Triton works on the device and `right` says that this kind of
    layer is, asked once in a process; else None. The first failure ends it for the device.
    """
    if device in _WITHOUT:
        return None
    try:
        from vggfeat import kernels  # only here: PyTorch has Triton in its CUDA builds

        if (device, *kind) not in _RIGHT:
            if not right(kernels):
                raise RuntimeError(f"its {kind[0]} is wrong")
            _RIGHT.add((device, *kind))
        return kernels
    except Exception as error:  # compilers, drivers and old GPUs fail in many ways
        if out_of_memory(error):
            raise
        _WITHOUT.add(device)
        warnings.warn(
            f"Triton can't be used on {device} ({_in_short(error)}): PyTorch's own max-pool and"
            " first layer instead, slower",
            stacklevel=2,
        )
        return None


def _close(y: Tensor, expected: Tensor, bias: Tensor) -> bool:
    """Whether both are the same convolution with a ReLU, a sum rounded to bfloat16 or TF32 before
    or after the bias; never where there is a NaN.
    """
    largest = torch.maximum(expected.abs().max(), bias.abs().max()).float()
    return bool(((y.float() - expected.float()).abs() <= largest / 64).all())


def _in_short(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")


_WAYS = {"cpu": _on_cpu, "cuda": _on_gpu}


# --- on both --------------------------------------------------------------------------------------


def windows(x_NCHW: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """An FC layer at each k x k window of a map, (N, D, H - k + 1, W - k + 1). weight: (D, C * k *
    k).
    """
    if not applies(x_NCHW):
        return F.conv2d(x_NCHW, weight.view(len(weight), -1, k, k), bias)
    N, C, H, W = x_NCHW.shape
    h, w = H - k + 1, W - k + 1
    if k == 1:
        y = _product(x_NCHW.permute(0, 2, 3, 1).reshape(N * h * w, C), weight, bias)
        return y.view(N, h, w, -1).permute(0, 3, 1, 2)
    # (N, h, w, C, k, k)
    views = x_NCHW.contiguous().unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, 1, 4, 5)
    y_NhwD = x_NCHW.new_empty(N, h, w, len(weight))
    rows = max(1, WINDOW_BYTES // (N * w * weight.shape[1] * weight.element_size()))
    for top in range(0, h, rows):
        part = views[:, top : top + rows]
        y = _product(part.reshape(-1, weight.shape[1]), weight, bias)
        y_NhwD[:, top : top + rows] = y.view(*part.shape[:3], -1)
    return y_NhwD.permute(0, 3, 1, 2)


def _product(x_MC: Tensor, weight_DC: Tensor, bias: Tensor) -> Tensor:
    """(M, D). In float32 on a GPU as a convolution: whether that may be TF32 is the flag of cuDNN,
    as in all layers before, not that of matrix products.
    """
    if _WAYS[x_MC.device.type] is _on_gpu and x_MC.dtype == torch.float32:
        return F.conv2d(x_MC[:, :, None, None], weight_DC[:, :, None, None], bias).flatten(1)
    return F.linear(x_MC, weight_DC, bias)
