"""The quick way through the layers on a CPU gives what PyTorch's modules give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from vggfeat import fused
from vggfeat.table1 import NETS, layer_names

from ..conftest import Nets


def photographs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = 100 * torch.randn(*shape, generator=generator)
    return x.to(memory_format=torch.channels_last)


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bfloat16 on this processor",
)


@needs_bfloat16
@pytest.mark.parametrize("net", NETS)
def test_layers_are_the_modules_bit_for_bit(he: Nets, net: str) -> None:
    module = he(net, width=0.25, crop=32).bfloat16().to(memory_format=torch.channels_last)
    x = photographs(2, 3, 75, 109).bfloat16()
    for pool in ("floor", "ceil"):
        module.set_pool(pool)
        for layer in layer_names(net)[:-3]:
            modules = module.features[: module.ends[layer]]
            with torch.inference_mode():
                assert fused.applies(x)
                ours, theirs = fused.layers(modules, x), modules(x)
            assert torch.equal(ours, theirs), layer
            assert theirs.std() > 0


@needs_bfloat16
@pytest.mark.parametrize("width", [255, 257, 335, 518, 683])
@pytest.mark.parametrize("net", ["A-LRN", "C"])
def test_widened_maps_are_the_modules_bit_for_bit(he: Nets, net: str, width: int) -> None:
    module = he(net, width=0.25, crop=32).bfloat16().to(memory_format=torch.channels_last)
    x = photographs(2, 3, 37, width).bfloat16()
    for pool in ("floor", "ceil"):
        module.set_pool(pool)
        for end in range(1, module.ends["pool3"] + 1):
            with torch.inference_mode():
                ours, theirs = fused.layers(module.features[:end], x), module.features[:end](x)
            assert torch.equal(ours, theirs), end


@pytest.mark.parametrize(
    ("size", "ceil", "out"), [(1, True, 1), (2, True, 1), (7, True, 4), (7, False, 3)]
)
def test_max_pool(size: int, ceil: bool, out: int) -> None:
    x = photographs(2, 5, size, 9)
    got = fused.max_pool(x, ceil)
    assert got.shape == (2, 5, out, 5 if ceil else 4)
    assert torch.equal(got, F.max_pool2d(x, 2, 2, ceil_mode=ceil))
    x[0, 3, 0, 0] = torch.nan
    assert torch.equal(
        fused.max_pool(x, ceil).isnan(), F.max_pool2d(x, 2, 2, ceil_mode=ceil).isnan()
    )


@pytest.mark.parametrize(("k", "H", "W"), [(7, 7, 7), (7, 9, 12), (1, 3, 4), (3, 40, 5)])
def test_windows_are_a_convolution(k: int, H: int, W: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "WINDOW_BYTES", 40_000)  # some rows of windows at a time
    x, fc = photographs(2, 6, H, W), nn.Linear(6 * k * k, 11)
    with torch.inference_mode():
        got = fused.windows(x, fc.weight, fc.bias, k)
        expected = F.conv2d(x, fc.weight.view(11, 6, k, k), fc.bias)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert expected.std() > 1


def test_a_processor_without_bfloat16_takes_the_plain_way(
    he: Nets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN refuses it there, which PyTorch's own modules know."""
    module, x = he("A", width=0.25, crop=32).bfloat16(), photographs(1, 3, 40, 40).bfloat16()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    with torch.inference_mode():
        assert not fused.applies(x) and module(x, "fc7").std() > 0


def test_gradients_double_precision_and_hooks_take_the_plain_way(he: Nets) -> None:
    module = he("A", width=0.25, crop=32)
    x = photographs(1, 3, 64, 64)
    assert not fused.applies(x)
    module(x, "fc8").sum().backward()
    gradient = module.get_parameter("features.0.weight").grad
    assert gradient is not None and gradient.abs().sum() > 0
    module, x = module.bfloat16(), x.bfloat16()
    with torch.inference_mode():
        assert fused.applies(
            x.float()
        ) == torch.backends.mkldnn.is_available() and not fused.applies(x.double())
        with torch.autocast("cpu"):
            assert not fused.applies(x)
        seen: list[float] = []
        module.features[3].register_forward_hook(
            lambda _, inputs, out: seen.append(float(out.min()))
        )
        module(x, "pool3")
    assert seen and seen[0] < 0  # the convolution's own output, before its ReLU
