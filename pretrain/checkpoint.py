"""The state of a stage in one file: what exact resume needs, and no pickle. The file appears whole or not at all.

`last.safetensors` holds the tensors `model.*` and `momentum.*`; its metadata hold the rest as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vggfeat.errors import VggfeatError


def save_checkpoint(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Write the model, its momentum and `state` (JSON values), replacing the file only when all is on the disk.

    Raises OSError or SafetensorError when the disk refuses, and then leaves the file that was there.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if (momentum := optimiser.state.get(parameter, {}).get("momentum_buffer")) is not None:
            tensors[f"momentum.{name}"] = momentum
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.torch.save_file(plain, partial, metadata={"state": json.dumps(dict(state))})
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _to_disk(path: Path) -> None:
    """A file's bytes, or a folder's names: after a power cut, either the old checkpoint or the new one is there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, without its tensors. Raises VggfeatError for a file that is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise VggfeatError(
            f"{path} is no checkpoint of a training run: {error}; move it away to start anew"
        ) from error
    if not isinstance(state, dict):
        raise VggfeatError(f"{path} is no checkpoint of a training run; move it away to start anew")
    return state


@torch.no_grad()
def load_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's tensors into model and optimiser, in their own memory layout; return its state.

    Raises VggfeatError for a checkpoint of another net: a tensor too many, too few, or of another shape or type.
    """
    state = read_state(path)
    parameters = dict(model.named_parameters())
    with safetensors.safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if missing := sorted({f"model.{name}" for name in parameters} - names):
            raise VggfeatError(f"{path} is a checkpoint of another net: it lacks {missing[0]}")
        for name in sorted(names):
            kind, _, of = name.partition(".")
            if kind not in ("model", "momentum") or of not in parameters:
                raise VggfeatError(f"{path} is a checkpoint of another net: it has {name}")
            value: Tensor = file.get_tensor(name)
            parameter = parameters[of]
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                raise VggfeatError(
                    f"{path} is a checkpoint of another net: {name} is {tuple(value.shape)} {value.dtype}, "
                    f"here {tuple(parameter.shape)} {parameter.dtype}"
                )
            if kind == "model":
                parameter.copy_(value)
            else:
                optimiser.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(value)
    return state
