"""Which device, in which precision; and that asking needs no PyTorch until it is asked."""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch

from vggfeat import devices
from vggfeat.devices import (
    PRECISIONS,
    device_failed,
    matrix_rate,
    out_of_memory,
    resolve_device,
    resolve_precision,
)
from vggfeat.errors import VggfeatError


def test_precision_and_device_are_resolved_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == "float32"
    assert resolve_precision("auto", cpu) == "float32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("auto", cpu) == "bfloat16"
    with pytest.raises(VggfeatError, match="precision 'int4' is not one of"):
        resolve_precision("int4", cpu)
    with pytest.raises(VggfeatError, match="no device 'tpu9'"):
        resolve_device("tpu9")
    assert resolve_device("auto") == cpu
    with pytest.raises(VggfeatError, match="PyTorch sees 0 GPUs"):
        resolve_device("cuda")


OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."
    " Please update your GPU driver by downloading and installing a new version from the URL"
)
NO_KERNEL = (
    "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors"
    " might be asynchronously reported at some other API call"
)


def test_a_driver_that_pytorch_refuses_is_one_line_and_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused() -> bool:
        warnings.warn(OLD_DRIVER, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", refused)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # by what the driver's tool says
    with pytest.warns(UserWarning, match="the CPU is") as told:
        assert resolve_device("auto") == torch.device("cpu")
    assert [str(each.message) for each in told] == [
        "the GPU can't be used, the CPU is: CUDA initialization: The NVIDIA driver on your system"
        " is too old (found version 11040)"
    ]
    with pytest.raises(VggfeatError, match=r"sees 0 GPUs \(CUDA initialization: The NVIDIA driver"):
        resolve_device("cuda:0")


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_gpu_that_does_not_compute_is_one_line_and_the_cpu(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without memory at the moment computes; who needs the memory says so."""

    def ones(*shape: int, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        raise kind(NO_KERNEL)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", ones)
    if kind is torch.OutOfMemoryError:
        assert resolve_device("auto") == torch.device("cuda")
        return
    why = "CUDA error: no kernel image is available for execution on the device"
    with pytest.warns(UserWarning, match="the CPU is") as told:
        assert resolve_device("auto") == torch.device("cpu")
    assert [str(each.message) for each in told] == [f"the GPU can't be used, the CPU is: {why}"]
    with pytest.raises(VggfeatError, match=f"'cuda' can't be used: {why}; give `device` cpu"):
        resolve_device("cuda")
    with pytest.raises(VggfeatError, match="'cuda:1' is not there: PyTorch sees 1 GPUs; give"):
        resolve_device("cuda:1")


FAILED = (
    RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might"),
    RuntimeError("CUDA driver error: device not ready"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
)
NO_MEMORY = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
)
OTHERS = (
    RuntimeError("shape '[2]' is invalid for input of size 3"),
    ValueError("CUDA error in a file's name"),
    VggfeatError("CUDA error: in a line of ours"),
)


@pytest.mark.parametrize("error", [*FAILED, *NO_MEMORY, *OTHERS], ids=str)
def test_a_device_that_failed_is_told_from_too_little_memory(error: Exception) -> None:
    assert (device_failed(error), out_of_memory(error)) == (error in FAILED, error in NO_MEMORY)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_rate_of_a_matrix_product_is_known_once_measured(precision: str) -> None:
    drawn, tf32 = torch.get_rng_state(), torch.backends.cuda.matmul.allow_tf32
    rate = matrix_rate(torch.device("cpu"), precision)
    assert rate > 0 and matrix_rate(torch.device("cpu"), precision) == rate
    # nothing else has changed by it
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32


def test_the_rate_is_the_operations_of_a_product_by_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock of our own, on which any product takes half a second."""
    clock = itertools.count(step=0.5)
    own = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(devices, "time", own)
    assert matrix_rate.__wrapped__(torch.device("cpu"), "float32") == 2 * 256**3 / 0.5
