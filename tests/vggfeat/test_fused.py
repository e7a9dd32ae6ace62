"""The quick way through the layers gives what PyTorch's modules give: on a CPU, and on a GPU, whose
way is also taken on a CPU with PyTorch's layers in the place of cuDNN's and Triton's.
"""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import vggfeat
from vggfeat import fused
from vggfeat.errors import VggfeatError
from vggfeat.images import CAFFE, Preprocessing
from vggfeat.table1 import NETS, layer_names
from vggfeat.weights import Network

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


# --- images as they are ---------------------------------------------------------------------------

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TORCHVISION = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB", 1.0)


def pixels(*shape: int) -> Tensor:
    """Images (N, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("net", NETS)
def test_images_on_a_cpu_are_preprocessed_first(he: Nets, net: str, precision: str) -> None:
    """Bit for bit: what a CPU describes doesn't change."""
    module, images = he(net, width=0.25, crop=32).to(TYPES[precision]), pixels(2, 45, 67)
    for preprocessing in (CAFFE, TORCHVISION):
        x = preprocessing(images).to(TYPES[precision])
        crops, crops_x = images[:, :32, :32], x[..., :32, :32]
        with torch.inference_mode():
            for layer in ("conv1_1", "pool3", "fc7"):
                assert torch.equal(module(images, layer, preprocessing), module(x, layer)), layer
            scores = module.crop_scores(crops, preprocessing)
            assert torch.equal(scores, module.crop_scores(crops_x))


def test_images_that_are_too_small_or_none_are_refused(he: Nets) -> None:
    module = he("A", width=0.25, crop=64)
    small = "a 63x70 image is smaller than the net's crop of 64"
    with torch.inference_mode():
        with pytest.raises(VggfeatError, match=small):
            module(pixels(1, 63, 70), "fc7", CAFFE)
        with pytest.raises(VggfeatError, match=small):
            module(CAFFE(pixels(1, 63, 70)), "fc7")
        with pytest.raises(VggfeatError, match=r"must be \(N, H, W, 3\) uint8"):
            module(pixels(1, 64, 64).float(), "fc7", CAFFE)


def test_a_networks_maps_of_images_are_those_of_what_it_makes_of_them(he: Nets) -> None:
    network = Network("", he("A", width=0.25, crop=32), TORCHVISION, "", {"net": "A"})
    images = pixels(2, 32, 32)
    x = network.preprocessing(images)
    with torch.inference_mode():
        assert torch.equal(network.maps_of(images, "fc6"), network.maps(x, "fc6"))
        assert torch.equal(network.crop_scores_of(images), network.crop_scores(x))
    with pytest.raises(VggfeatError, match="no layer 'fc9'"):
        network.maps_of(images, "fc9")


# --- a GPU's way, on a CPU ------------------------------------------------------------------------


class Kernels(SimpleNamespace):
    """In the place of the module that needs Triton; `called`: how often."""

    def __init__(self) -> None:
        super().__init__(called={"max_pool": 0, "conv1_1": 0})

    def max_pool(self, x_NCHW: Tensor, ceil: bool) -> Tensor:
        """PyTorch's."""
        self.called["max_pool"] += 1
        return F.max_pool2d(x_NCHW, 2, 2, ceil_mode=ceil)

    def conv1_1(
        self, images_NHWC: Tensor, preprocessing: Preprocessing, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """PyTorch's."""
        self.called["conv1_1"] += 1
        x = preprocessing(images_NHWC).to(weight.dtype)
        return F.relu(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2))


def use(kernels: Kernels | None, patch: pytest.MonkeyPatch) -> None:
    """As `vggfeat.kernels`; None: as if there were no Triton."""
    patch.setitem(sys.modules, "vggfeat.kernels", kernels)
    if kernels is None:
        patch.delattr(vggfeat, "kernels", raising=False)
    else:
        patch.setattr(vggfeat, "kernels", kernels, raising=False)


def forget(patch: pytest.MonkeyPatch) -> None:
    """What works on which device."""
    patch.setattr(fused, "_AT_ONCE", {})
    patch.setattr(fused, "_RIGHT", set())
    patch.setattr(fused, "_WITHOUT", set())


@pytest.fixture
def as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The CPU takes a GPU's way. Shapes of the weights of what cuDNN was asked to do at once."""
    asked: list[tuple[int, ...]] = []

    def at_once(x: Tensor, weight: Tensor, bias: Tensor, *settings: Any) -> Tensor:
        asked.append(tuple(weight.shape))
        return F.relu(F.conv2d(x, weight, bias, *settings))

    def with_a_map(
        x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *settings: Any
    ) -> Tensor:
        """Of which alpha times z is added, and a zero asks for none of it."""
        assert z.isnan().all() and alpha == 0
        return torch.cudnn_convolution_relu(x, weight, bias, *settings)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", at_once)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", with_a_map)
    monkeypatch.setitem(fused._WAYS, "cpu", fused._on_gpu)
    monkeypatch.setattr(fused, "_mkldnn_has", lambda dtype: True)
    forget(monkeypatch)
    use(Kernels(), monkeypatch)
    return asked


@pytest.mark.parametrize("triton", [True, False], ids=["Triton", "without"])
@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("net", NETS)
def test_a_gpus_way_is_the_modules(
    he: Nets,
    net: str,
    precision: str,
    triton: bool,
    as_a_gpu: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, but where the first layer sums in another order: over three channels and
    five of zeros.
    """
    dtype = TYPES[precision]
    module = he(net, width=0.25, crop=32).to(dtype).to(memory_format=torch.channels_last)
    kernels = Kernels() if triton else None
    use(kernels, monkeypatch)
    images, preprocessing = pixels(2, 75, 109), TORCHVISION
    x = preprocessing(images).to(dtype)
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in module.features)
    for pool in ("floor", "ceil"):
        module.set_pool(pool)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error" if triton else "ignore")
            expected = module.features(x)
            assert torch.equal(fused.layers(module.features, x), expected)
            for end in (1, 2, 3):  # the convolution alone, its ReLU, what follows it
                modules = module.features[:end]
                assert fused.layers(modules, images, preprocessing).shape == modules(x).shape
            as_a_gpu.clear()
            got = fused.layers(module.features, images, preprocessing)
            own = kernels is not None and dtype == torch.bfloat16
            assert len(as_a_gpu) == convolutions - own  # each was tried before, and none again
            assert ((16, 8, *as_a_gpu[0][2:]) == as_a_gpu[0]) != own
        if own:
            assert torch.equal(got, expected)
        else:  # a bfloat16 of each layer may round to the next
            bound = expected.abs().max() * (2**-5 if dtype == torch.bfloat16 else 1e-5)
            assert ((got - expected).abs() <= bound).all()
        assert expected.std() > 0
    if kernels is not None:
        assert kernels.called["max_pool"] > 20
        assert (kernels.called["conv1_1"] > 0) == (dtype == torch.bfloat16)


def test_a_map_without_a_window_is_refused_on_a_gpu_too(
    he: Nets, as_a_gpu: list[tuple[int, ...]]
) -> None:
    module = he("A", width=0.25, crop=32)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="too small"):
        module(photographs(1, 3, 5, 40), "pool3")
    module.set_pool("ceil")
    with torch.inference_mode():
        assert module(photographs(1, 3, 5, 40), "pool3").shape[2:] == (1, 5)


def test_who_hooked_in_sees_each_layer_of_images(he: Nets, as_a_gpu: list[tuple[int, ...]]) -> None:
    module, seen = he("A", width=0.25, crop=32), []
    module.features[0].register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    with torch.inference_mode():
        module(pixels(1, 33, 40), "pool3", CAFFE)
    assert not as_a_gpu and torch.equal(seen[0], CAFFE(pixels(1, 33, 40)))


WINDOWS = [(7, 7, 7), (7, 9, 12), (1, 3, 4)]


def windows_are_a_convolution(k: int, H: int, W: int, precision: str, device: torch.device) -> None:
    """To what is rounded: in bfloat16 the result, in TF32 both factors."""
    unit = {"float32": 2**-10, "bfloat16": 2**-8}[precision]
    x, fc = photographs(2, 64, H, W).to(TYPES[precision]), nn.Linear(64 * k * k, 128)
    fc = fc.to(TYPES[precision])
    expected = F.conv2d(x.float(), fc.weight.float().view(128, 64, k, k), fc.bias.float())
    x, fc = x.to(device), fc.to(device)
    with torch.inference_mode():
        got = fused.windows(x, fc.weight, fc.bias, k).float().cpu()
    assert (got - expected).norm() <= unit * expected.norm()


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize(("k", "H", "W"), WINDOWS)
def test_a_gpus_windows_are_a_convolution(
    k: int,
    H: int,
    W: int,
    precision: str,
    as_a_gpu: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "WINDOW_BYTES", 40_000)
    windows_are_a_convolution(k, H, W, precision, torch.device("cpu"))


AT_ONCE = (
    r"^cuDNN can't be used for convolution and ReLU at once on cpu \((.*)\): one after the other"
    r" instead, slower$"
)


def failing(how: str) -> Any:
    """cuDNN's one call, which fails for the 3x3 convolutions to 32 and to 64 channels."""

    def at_once(x: Tensor, weight: Tensor, bias: Tensor, *settings: Any) -> Tensor:
        y = F.relu(F.conv2d(x, weight, bias, *settings))
        if len(weight) not in (32, 64):
            return y
        if how == "NaN":
            y[0, 0, 0, 0] = torch.nan
            return y
        if how == "later" and len(x) == 1:
            return y
        if how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise RuntimeError("Unable to find an engine\nto execute this computation")

    return at_once


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("engine", "Unable to find an engine to execute this computation"),
        ("later", "Unable to find an engine to execute this computation"),
        ("NaN", "it isn't the convolution's"),
    ],
)
def test_what_cudnn_does_not_do_at_once_is_done_apart_and_told_once(
    he: Nets,
    how: str,
    why: str,
    as_a_gpu: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "cudnn_convolution_relu", failing(how))
    module, x = he("A", width=0.25, crop=32), photographs(2, 3, 40, 40)
    with torch.inference_mode():
        with pytest.warns(match=AT_ONCE) as told:
            assert torch.equal(fused.layers(module.features, x), module.features(x))
        assert [why in str(warning.message) for warning in told] == [True]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(fused.layers(module.features, x), module.features(x))
    works = {kind[2][0]: good for kind, good in fused._AT_ONCE.items()}
    assert works == {16: True, 32: False, 64: False, 128: True}


def test_what_lies_in_memory_must_not_come_through(
    he: Nets, as_a_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(x: Tensor, weight: Tensor, z: Tensor, alpha: float, *more: Any) -> Tensor:
        return torch.cudnn_convolution_relu(x, weight, *more) + alpha * z

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", reading)
    module, x = he("A", width=0.25, crop=32), photographs(2, 3, 40, 40)
    with torch.inference_mode(), pytest.warns(match=AT_ONCE):
        assert torch.equal(fused.layers(module.features, x), module.features(x))
    assert not any(fused._AT_ONCE.values())


def test_too_little_memory_is_nobodys_fault(
    he: Nets, as_a_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller tries again with fewer images."""
    monkeypatch.setattr(torch, "cudnn_convolution_relu", failing("memory"))
    module = he("A", width=0.25, crop=32)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        fused.layers(module.features, photographs(1, 3, 40, 40))
    assert list(fused._AT_ONCE.values()) == [True]  # conv1_1's

    def full(x_NCHW: Tensor, ceil: bool) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernels = Kernels()
    monkeypatch.setattr(kernels, "max_pool", full)
    use(kernels, monkeypatch)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        fused.layers(module.features[2:3], photographs(1, 16, 40, 40))
    assert not fused._WITHOUT


def test_a_failed_device_is_not_told_as_cudnns_fault(
    he: Nets, as_a_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: object) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", failed)
    monkeypatch.setattr(F, "conv2d", failed)
    with (
        torch.inference_mode(),
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match="acc"),
    ):
        warnings.simplefilter("error")
        fused.layers(he("A", width=0.25, crop=32).features, photographs(1, 3, 40, 40))
    assert not fused._AT_ONCE


def test_sums_in_the_same_order_each_time_are_kept_to(
    he: Nets, as_a_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    module, x = he("A", width=0.25, crop=32), photographs(2, 3, 40, 40)
    with torch.inference_mode():
        assert torch.equal(fused.layers(module.features, x), module.features(x))
    assert not as_a_gpu


WITHOUT = (
    r"^Triton can't be used on cpu \((.*)\): PyTorch's own max-pool and first layer instead,"
    r" slower$"
)


@pytest.mark.parametrize("fault", ["none", "first layer", "max-pool", "compiler"])
def test_triton_that_does_not_work_is_done_without_and_told_once(
    he: Nets, fault: str, as_a_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Tensor:
        if fault == "compiler":
            raise OSError("Failed to find C compiler.\nPlease specify via CC environment variable.")
        own = Kernels.conv1_1 if fault == "first layer" else Kernels.max_pool
        return own(kernels, *arguments).roll(1, 3)

    kernels = Kernels()
    if fault in ("first layer", "compiler"):
        monkeypatch.setattr(kernels, "conv1_1", wrong)
    else:
        monkeypatch.setattr(kernels, "max_pool", wrong)
    use(None if fault == "none" else kernels, monkeypatch)
    module, images = he("A", width=0.25, crop=32).bfloat16(), pixels(2, 40, 50)
    x = F.pad(CAFFE(images).bfloat16(), (0, 0, 0, 0, 0, 5))
    with torch.inference_mode():
        weight = F.pad(module.get_parameter("features.0.weight"), (0, 0, 0, 0, 0, 5))
        first = F.relu(F.conv2d(x, weight, module.get_parameter("features.0.bias"), padding=1))
        with pytest.warns(match=WITHOUT) as told:
            got = fused.layers(module.features, images, CAFFE)
        assert len(told) == 1 and {x.device} == fused._WITHOUT
        why = {
            "none": "import of vggfeat.kernels halted",
            "first layer": "its first layer is wrong",
            "max-pool": "its max-pool is wrong",
            "compiler": "Failed to find C compiler. Please specify via CC environment variable.",
        }
        assert why[fault] in str(told[0].message)
        if fault != "max-pool":  # else the first layer came before
            assert torch.equal(got, module.features[2:](first))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = fused.layers(module.features, images, CAFFE)
        assert torch.equal(got, module.features[2:](first))


# --- on a GPU, where there is one -----------------------------------------------------------------


def needs_triton(gpu: torch.device) -> None:
    """Skipped without Triton, or where it compiles no bfloat16."""
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("the GPU is older than bfloat16")


@pytest.mark.parametrize("triton", [True, False], ids=["Triton", "without"])
@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize(("net", "width"), [*((net, 0.25) for net in NETS), ("D", 1.0)])
def test_on_a_gpu_it_is_the_modules_and_the_cpus(
    he: Nets,
    net: str,
    width: float,
    precision: str,
    triton: bool,
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is rounded: a sum to 8 bits in bfloat16, a factor to 11 in TF32. A layer's map is off by
    at most one unit of that from the modules', in norm, since either rounds once or twice by half a
    unit; ReLU and max-pool add nothing to that, and He's weights keep the norm. So maps after L
    layers are within L units.
    """
    forget(monkeypatch)
    if triton:
        needs_triton(gpu)
    else:
        use(None, monkeypatch)
    dtype, unit = TYPES[precision], {"float32": 2**-10, "bfloat16": 2**-8}[precision]
    crop = 64 if width < 1 else 224
    images = pixels(2, 75, 109) if width < 1 else pixels(2, 231, 333)
    module = he(net, width=width, crop=crop)
    quick = he(net, width=width, crop=crop).to(gpu, dtype).to(memory_format=torch.channels_last)
    modules = list(quick.features)
    depth = sum(isinstance(layer, nn.Conv2d) for layer in modules)
    with warnings.catch_warnings(), torch.inference_mode():
        if not triton:
            warnings.simplefilter("ignore")
        for preprocessing in (CAFFE, TORCHVISION):
            for pool in ("floor", "ceil"):
                module.set_pool(pool)
                quick.set_pool(pool)
                there = images.to(gpu)
                x = preprocessing(there).to(dtype)
                assert fused.applies(x)
                got, expected = fused.layers(modules, there, preprocessing), quick.features(x)
                assert (got - expected).float().norm() <= depth * unit * expected.float().norm()
                ours = quick(there, "fc7", preprocessing).mean((2, 3), dtype=torch.float32).cpu()
                theirs = module(images, "fc7", preprocessing).mean((2, 3))
                assert F.cosine_similarity(ours, theirs).min() >= 0.9999
    assert (gpu in fused._WITHOUT) is not triton


def test_on_a_gpu_nothing_that_lay_in_memory_comes_through(
    he: Nets, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    for precision, dtype in TYPES.items():
        module = he("D", until="pool5").to(gpu, dtype).to(memory_format=torch.channels_last)
        for shape in ((1, 64, 64), (8, 256, 341), (3, 383, 512), (5, 512, 683), (2, 224, 224)):
            torch.full((1 << 30,), torch.nan, dtype=dtype, device=gpu)  # freed at once
            with torch.inference_mode():
                got = module(pixels(*shape).to(gpu), "pool5", CAFFE)
                expected = module.features(CAFFE(pixels(*shape).to(gpu)).to(dtype))
            assert got.isfinite().all() and got.std() > 0, (precision, shape)
            assert (got - expected).float().norm() <= 13 * 2**-8 * expected.float().norm(), shape


def test_on_a_gpu_maps_of_more_than_two_billion_values(gpu: torch.device) -> None:
    needs_triton(gpu)
    from vggfeat import kernels

    if torch.cuda.mem_get_info(gpu)[0] < 12e9:
        pytest.skip("it takes 12 GB of a GPU's memory")
    images = pixels(1, 5800, 64).repeat(1, 1, 91, 1).to(gpu)
    weight = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight, bias = weight.to(gpu, torch.bfloat16), torch.ones(64, device=gpu).bfloat16()
    y = kernels.conv1_1(images, CAFFE, weight, bias)
    assert y.numel() > 2**31
    last = kernels.conv1_1(images[:, -5:], CAFFE, weight, bias)
    assert torch.equal(y[..., -4:, :], last[..., -4:, :]) and last.std() > 1
    pooled = kernels.max_pool(y, False)
    assert torch.equal(pooled[..., -2:, :], F.max_pool2d(y[..., -4:, :], 2, 2))


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize(("k", "H", "W"), WINDOWS)
def test_on_a_gpu_windows_are_a_convolution(
    k: int, H: int, W: int, precision: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "WINDOW_BYTES", 40_000)
    windows_are_a_convolution(k, H, W, precision, gpu)
