"""Devices: which one, in which precision, how much goes through it, and how fast; what it says when
its memory is used up, or when it fails. Imported without PyTorch.
"""

from __future__ import annotations

import functools
import re
import sys
import time
import warnings
from statistics import median
from typing import TYPE_CHECKING

from vggfeat.checked import shown
from vggfeat.errors import VggfeatError, WrongUsage

if TYPE_CHECKING:
    import torch

PRECISIONS = ("float32", "bfloat16")
BATCH_SIZE = {"cpu": 32, "cuda": 128}
"""Images of 224 x 224 that go through a device at once, where nothing else is asked for."""
# what PyTorch's errors say: the CPU's allocator; CUDA itself, and its libraries. Of a convolution
# that doesn't fit, cuDNN is asked for one way after the other, and says that it has none.
_NO_MEMORY = re.compile(
    r"can't allocate memory|(CUDA( driver)? error|Triton Error \[CUDA\]): out of memory"
    r"|(CUBLAS|CUDNN)_STATUS_\w*ALLOC|unable to find an engine"
)
_FAILED = re.compile(
    r"CUDA( driver)? error|cuDNN error|(CUBLAS|CUDNN)_STATUS_|Triton Error \[CUDA\]"
)


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" -> the first GPU, or the CPU; where there is a GPU that PyTorch can't use, that is
    warned of. Raises VggfeatError for a GPU that was asked for and isn't there, or can't be used.
    """
    import torch

    automatic = isinstance(device, str) and device == "auto"
    try:
        if not isinstance(device, str | torch.device):
            raise TypeError
        resolved = torch.device("cuda" if automatic else device)
    except (RuntimeError, TypeError) as error:
        raise WrongUsage(
            f"there is no device {shown(device)}; give auto, cpu, cuda or cuda:N"
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise WrongUsage(f"device {device!r} is not supported; give auto, cpu, cuda or cuda:N")
    if resolved.type == "cpu":
        return resolved
    count, why = gpus()
    if count > (resolved.index or 0) and not (why := _refusal(resolved)):
        return resolved
    if automatic:
        if why:
            warnings.warn(cpu_instead(why), stacklevel=2)
        return torch.device("cpu")
    if count > (resolved.index or 0):
        raise VggfeatError(f"device {device!r} can't be used: {why}; give `device` cpu")
    raise VggfeatError(
        f"device {device!r} is not there: PyTorch sees {count} GPUs{f' ({why})' if why else ''};"
        " give `device` cpu"
    )


def cpu_instead(why: str) -> str:
    """What is said where a GPU is there, and the CPU is used."""
    return f"the GPU can't be used, the CPU is: {why}"


def gpus() -> tuple[int, str]:
    """How many GPUs PyTorch sees, and why it sees none where the driver isn't one for it."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception as error:  # PyTorch's own way to find out is broken: of many kinds
            return 0, first_sentence(error)
    return count, "" if count or not caught else first_sentence(caught[0].message)


def _refusal(device: torch.device) -> str:
    """Why a GPU that is there can't be used: it is too old for this PyTorch, broken, or another's
    alone; "" where it computes.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age; whether it computes is seen here
        try:
            if torch.ones(2, device=device).sum().item() == 2:
                return ""
        except torch.OutOfMemoryError:
            return ""  # that is told where something is computed
        except Exception as error:  # of many kinds, where not even CUDA itself comes up
            return first_sentence(error)
    return "1 + 1 is not 2 on it"


def first_sentence(error: object) -> str:
    """Of what CUDA says, which goes on for a paragraph; 160 characters at most."""
    line = " ".join(str(error).strip().partition("\n")[0].split())
    return line.partition(". ")[0].rstrip(".")[:160]


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" -> "bfloat16" where the hardware multiplies bfloat16, else "float32"; other names
    unchanged.
    """
    import torch

    if precision == "auto":
        if device.type == "cuda":
            with torch.cuda.device(device):
                fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # bfloat16 without these instructions is emulated: slower than float32, and no better
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bfloat16" if fast else "float32"
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise WrongUsage(
            f"precision {shown(precision)} is not one of auto, {', '.join(PRECISIONS)}"
        )
    return precision


def dtype_of(precision: str) -> torch.dtype:
    """PyTorch's type of one of PRECISIONS."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


@functools.cache
def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product (a multiply-add is two): the median of some, measured once
    in a process. On a GPU no net surpasses it by much; on a CPU with matrix units, of which
    PyTorch's product uses a part, its convolutions do.

    8192 x 8192 on a GPU; on a CPU as large as takes some hundredths of a second, 2048 at most. In
    float32 a GPU multiplies as its convolutions do, by default in TF32.
    """
    import torch

    gpu = device.type == "cuda"

    def seconds(n: int, times: int) -> float:
        own = torch.Generator(device).manual_seed(0)
        a = torch.rand((n, n), generator=own, device=device).to(dtype_of(precision))
        found = []
        for _ in range(1 + times):  # the first one warms up
            if gpu:
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            a @ a
            if gpu:
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - began)
        return median(found[1:])

    n = 8192 if gpu else 256
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        while not gpu and n < 2048 and seconds(n, 1) < 0.01:
            n *= 2
        return 2.0 * n**3 / seconds(n, 10 if gpu else 5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def free_memory(gpu: torch.device) -> float:
    """Bytes of a GPU that are free, those that PyTorch keeps for its next tensors among them."""
    import torch

    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return float(torch.cuda.mem_get_info(gpu)[0] + kept)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had too little memory; PyTorch's CPU allocator raises a plain
    RuntimeError.
    """
    # asked for only where it is there: most errors are told without PyTorch
    of_device = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, (MemoryError, of_device)) or bool(_NO_MEMORY.search(str(error)))


def device_failed(error: BaseException) -> bool:
    """Whether a GPU failed, or was taken away; all that this process asks of it from then on fails,
    too. Not where it was its memory that didn't suffice.
    """
    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return False
    of_device = getattr(sys.modules.get("torch"), "AcceleratorError", ())
    return isinstance(error, of_device) or bool(_FAILED.search(str(error)))
