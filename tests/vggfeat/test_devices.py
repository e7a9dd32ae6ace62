"""Which device, in which precision; and that asking needs no PyTorch until it is asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vggfeat.devices import resolve_device, resolve_precision
from vggfeat.errors import VggfeatError

from ..conftest import HANG


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


def test_memory_can_be_kept_before_pytorch_is_imported() -> None:
    script = """
import sys
from vggfeat.devices import keep_memory
keep_memory()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=HANG)
