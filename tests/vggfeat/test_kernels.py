"""Triton's kernels give what PyTorch's layers give, in Triton's interpreter, which needs no GPU;
and they compile for two generations. `test_fused` has what runs on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vggfeat.images import CAFFE, Preprocessing

from ..conftest import HANG

ROOT = Path(__file__).parents[2]
TORCHVISION = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB", 1.0)
PREPROCESSINGS = {
    "caffe": CAFFE,
    "rgb": Preprocessing((123.68, 116.779, 103.939)),
    "torchvision": TORCHVISION,
    "torchvision, bgr": Preprocessing(TORCHVISION.mean, TORCHVISION.std, "BGR", 1.0),
    "divided": Preprocessing((100.0, 90.0, 80.0), (58.0, 57.0, 56.0), "BGR"),
}
# It is asked for before Triton is imported, so in a process of its own: all cases in one.
INTERPRETED = """
import sys, torch
from vggfeat import kernels
from vggfeat.images import Preprocessing
kernels.PROGRAMS = 3  # each of them several lines
results = {}
for name, (images, fields, weight, bias) in torch.load(sys.argv[1])["conv1_1"].items():
    results[name] = kernels.conv1_1(images, Preprocessing(**fields), weight, bias)
for name, (x, ceil) in torch.load(sys.argv[1])["max_pool"].items():
    results[name] = kernels.max_pool(x, ceil)
torch.save(results, sys.argv[2])
"""

# (channels, side): the first layers at widths 1, 0.25, 0.3, and less; and wider
FIRST = [(64, 3), (16, 3), (19, 3), (1, 3), (200, 3), (64, 5), (16, 5)]
IMAGES = [(2, 5, 7), (1, 1, 1), (1, 3, 290), (2, 9, 1)]
MAPS = [(2, 16, 7, 9), (1, 19, 1, 5), (3, 64, 2, 2), (1, 5, 33, 40), (1, 2, 6, 1), (1, 64, 3, 71)]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def first_layers() -> dict[str, tuple[Tensor, Preprocessing, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = {}
    for i, (C, side) in enumerate(FIRST):
        weight = torch.randn(C, 3, side, side, generator=generator) / side
        weight = weight.to(memory_format=torch.channels_last)
        bias = 10 * torch.randn(C, generator=generator)
        for j, shape in enumerate(IMAGES):
            how = list(PREPROCESSINGS)[(i + j) % len(PREPROCESSINGS)]
            images = torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=generator)
            name = f"{C} channels, {side}x{side}, {shape}, {how}"
            cases[name] = (images, PREPROCESSINGS[how], weight, bias)
    return cases


def maps() -> dict[str, tuple[Tensor, bool]]:
    """With NaN and infinities; in bfloat16 as after a ReLU, since not every interpreter compares
    others right.
    """
    generator = torch.Generator().manual_seed(1)
    cases = {}
    for shape in MAPS:
        x = torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
        x[torch.rand(shape, generator=generator) < 0.02] = torch.nan
        x[0, 1, 0, 0], x[0, 0, 0, 0], x[-1, -1, -1, -1] = torch.nan, torch.inf, -torch.inf
        for name, dtype in TYPES.items():
            for ceil in (False, True) if min(shape[2:]) > 1 else (True,):
                map_NCHW = F.relu(x).to(dtype) if dtype == torch.bfloat16 else x
                cases[f"{shape} {name} {'ceil' if ceil else 'floor'}"] = map_NCHW, ceil
    return cases


FIRST_LAYERS, MAX_POOLS = first_layers(), maps()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Case -> what the kernel made of it."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("interpreted")
    cases = {
        "conv1_1": {
            name: (images, vars(preprocessing), weight, bias)
            for name, (images, preprocessing, weight, bias) in FIRST_LAYERS.items()
        },
        "max_pool": MAX_POOLS,
    }
    torch.save(cases, folder / "cases.pt")
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED, folder / "cases.pt", folder / "results.pt"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=HANG,
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in ran.stderr:
        pytest.skip("the interpreter of this Triton is older than this NumPy")  # 3.6 and 2.5
    assert ran.returncode == 0, ran.stderr
    results: dict[str, Tensor] = torch.load(folder / "results.pt")
    return results


@pytest.mark.parametrize("case", FIRST_LAYERS)
def test_the_first_layer_is_preprocessing_and_convolution(
    case: str, interpreted: dict[str, Tensor]
) -> None:
    """In float32, as the interpreter has no product of bfloat16."""
    images, preprocessing, weight, bias = FIRST_LAYERS[case]
    padding = weight.shape[2] // 2
    x = preprocessing(images).double()
    expected = F.relu(F.conv2d(x, weight.double(), bias.double(), padding=padding)).float()
    got = interpreted[case]
    assert got.is_contiguous(memory_format=torch.channels_last)
    largest = max(expected.max().item(), bias.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("case", MAX_POOLS)
def test_max_pool(case: str, interpreted: dict[str, Tensor]) -> None:
    x, ceil = MAX_POOLS[case]
    got, expected = interpreted[case], F.max_pool2d(x, 2, 2, ceil_mode=ceil)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == x.dtype
    assert torch.equal(got.isnan(), expected.isnan()) and expected.isnan().any()
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


Compiled = Callable[[Any, dict[str, str], dict[str, Any], dict[str, int]], Any]


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Compiled:
    """A kernel as a GPU of this generation gets it; its memory shared by a program, in bytes."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(
        kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int]
    ) -> Any:
        types = types | dict.fromkeys(constants, "constexpr")
        of_16 = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(types)
            if types[name].startswith("*") or (kernel.__name__ == "_max_pool" and name == "C")
        }
        return triton.compile(
            triton.compiler.ASTSource(kernel, types, constants, of_16),
            target=compiler.GPUTarget("cuda", request.param, 32),
            options=options,
        )

    return compile


SHARED = 99 * 1024  # bytes a program may have on the smallest GPU of these generations


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_max_pool_compiles(dtype: str, compiled: Compiled) -> None:
    kernels = pytest.importorskip("vggfeat.kernels")
    types = {"x": f"*{dtype}", "y": f"*{dtype}"} | dict.fromkeys(("H", "W", "h", "w", "C"), "i32")
    made = compiled(kernels._max_pool, types, {"BLOCK": kernels.POOLED}, kernels.MAX_POOL)
    assert made.asm["cubin"] and made.metadata.shared <= SHARED


@pytest.mark.parametrize(
    ("C", "side", "how"),
    [(64, 3, "caffe"), (64, 3, "torchvision"), (19, 3, "rgb"), (64, 5, "caffe")],
)
def test_the_first_layer_compiles(C: int, side: int, how: str, compiled: Compiled) -> None:
    kernels = pytest.importorskip("vggfeat.kernels")
    preprocessing = PREPROCESSINGS[how]
    types = {"images": "*u8", "weight": "*bf16", "bias": "*bf16", "y": "*bf16"}
    types |= dict.fromkeys(("H", "W", "units"), "i32")
    types |= {f"{name}_{colour}": "fp32" for name in ("mean", "std") for colour in "rgb"}
    constants = {
        "WHITE": preprocessing.input_range,
        "DIVIDE": preprocessing.std != (1.0, 1.0, 1.0),
        "BGR": preprocessing.channel_order == "BGR",
        **kernels.conv1_1_sizes(C, side),
    }
    made = compiled(kernels._conv1_1, types, constants, kernels.CONV1_1)
    assert made.asm["cubin"] and made.metadata.shared <= SHARED
