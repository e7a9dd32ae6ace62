"""The state of a stage in one file: what exact resume needs, and no pickle. The file appears whole
or not at all.

`last.safetensors` holds the tensors `model.*` and `momentum.*`; its metadata hold a `State` and an
identity as JSON. Whatever is read is checked here: a file that something else wrote, or damaged, is
refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pretrain.recipe import Recipe
from vggfeat.checked import Range, fitted, parse_json
from vggfeat.errors import VggfeatError, reason
from vggfeat.files import whole
from vggfeat.tensors import opened

_Count = Annotated[int, Range(0, 2**53)]
_Sum = Annotated[float, Range(0, 1e308)]
_Percent = Annotated[float, Range(0, 100)]
_Errors = tuple[_Percent, _Percent | None]
"""Top-1 and top-5 error; None where there are too few classes for the latter (`metrics.tells`)."""


class _Record(TypedDict):
    progress: dict[str, Any]
    identity: dict[str, Any]
    """What the checkpoint is of."""


@dataclass
class State:
    """Where a stage is. What is not a tensor and must survive a kill."""

    iteration: _Count = 0
    learning_rate: Annotated[float, Range(math.ulp(0.0), 1e308)] = 0.0
    drops: _Count = 0
    """Divisions of the learning rate so far."""
    best_top1: Annotated[float, Range(0, math.inf)] = math.inf
    """Lowest held-out top-1 error, per cent."""
    checks_since_best: _Count = 0
    pending_loss: _Sum = 0.0
    """Sum of the losses of the iterations since the last line of the log."""
    logged: _Count = 0
    """Iteration of that line."""
    mean_loss: _Sum = 0.0
    """Mean of the last losses, for the watch on chance."""
    at_chance: _Count = 0
    """Iterations in a row that it has been chance's; 0 where that isn't watched."""
    finished: bool = False
    seconds: _Sum = 0.0
    """Spent in this stage, in all its runs."""
    check_due: bool = False
    """Whether a signal came before the held-out check that is due after this iteration had ended.
    """
    held_out: _Errors | None = None
    """The last check's top-1 and top-5 error, per cent."""
    val: _Errors | None = None
    """The same on the validation set, once the stage is finished."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> State:
        """From JSON. Raises VggfeatError that names what is missing, unknown, of another type or
        out of range.
        """
        if "logged" not in record:  # a checkpoint from before chance was watched in all stages
            new = {
                "pending_loss": 0.0,
                "logged": record.get("iteration"),
                "mean_loss": 0.0,
                "at_chance": 0,
            }
            record = {"check_due": False, **record, **new}
        if lacking := [field.name for field in fields(cls) if field.name not in record]:
            raise VggfeatError(f"its progress lacks {lacking[0]}")
        state: State = fitted(record, cls, "its progress")
        return state

    def judge(self, top1: float, recipe: Recipe) -> bool:
        """Take in a held-out error: divide the rate or finish when it has stopped falling; whether
        it is the best.
        """
        if top1 < self.best_top1:
            self.best_top1, self.checks_since_best = top1, 0
            return True
        # no plateau: it hasn't begun to learn, and at a lower rate it never would
        if self.at_chance:
            return False
        self.checks_since_best += 1
        if self.checks_since_best >= recipe.patience:
            if self.drops == recipe.rate_drops:
                self.finished = True
            else:
                self.drop(recipe)
        return False

    def drop(self, recipe: Recipe) -> None:
        """Divide the learning rate once."""
        self.learning_rate /= recipe.rate_divisor
        self.drops += 1
        self.checks_since_best = 0


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: State,
    identity: Mapping[str, Any],
) -> None:
    """Write the model, its momentum, where it is and what it is, replacing the file only when all
    is on the disk.

    Raises SafetensorError or CantWrite when the disk refuses, and then leaves the file that was
    there.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in _learning(model).items():
        momentum = optimiser.state.get(parameter, {}).get("momentum_buffer")
        # none before the first step, which is what zeros are
        tensors[f"momentum.{name}"] = torch.zeros_like(parameter) if momentum is None else momentum
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"state": json.dumps({"progress": asdict(state), "identity": dict(identity)})}
    # after a power cut, either the old checkpoint or the new one is there
    with whole(path, durable=True) as partial:
        safetensors.torch.save_file(plain, partial, metadata=metadata)


def _learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """A checkpoint's state and identity, without its tensors. Raises VggfeatError for a file that
    is none.
    """
    why: object = "its metadata have no state"
    try:
        with _checkpoint(path) as file:
            metadata = file.metadata() or {}
    except (ValueError, safetensors.SafetensorError) as error:
        metadata, why = {}, error
    if "state" in metadata:
        try:
            record: _Record = fitted(
                parse_json(metadata["state"], "its state"), _Record, "its state"
            )
            return State.from_json(record["progress"]), record["identity"]
        except VggfeatError as error:
            why = error
    raise VggfeatError(
        f"{path} is no checkpoint of a training run: {why}; move it away to start anew"
    )


@contextmanager
def _checkpoint(path: Path) -> Iterator[Any]:
    """An open checkpoint. Raises VggfeatError for one that can't be opened just now: it is not to
    be moved away.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with opened(path) as file:
            yield file
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's, where it can't be mapped
        raise VggfeatError(f"can't read {path}: {reason(error)}") from error


@torch.no_grad()
def load_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into model and optimiser, in their own memory layout.

    Raises VggfeatError, and changes nothing, for a checkpoint of another net: a tensor too many,
    too few, or of another shape or type; and for one with values that are not finite.
    """
    parameters, learning = dict(model.named_parameters()), _learning(model)
    due = {
        **{f"model.{n}": p for n, p in parameters.items()},
        **{f"momentum.{n}": p for n, p in learning.items()},
    }
    values: dict[str, Tensor] = {}
    try:
        with _checkpoint(path) as file:
            names = set(file.keys())
            if missing := sorted(due.keys() - names):
                raise VggfeatError(f"{path} is a checkpoint of another net: it lacks {missing[0]}")
            if surplus := sorted(names - due.keys()):
                raise VggfeatError(f"{path} is a checkpoint of another net: it has {surplus[0]}")
            for name, parameter in due.items():
                value = file.get_tensor(name)
                if value.shape != parameter.shape or value.dtype != parameter.dtype:
                    raise VggfeatError(
                        f"{path} is a checkpoint of another net: {name} is {tuple(value.shape)}"
                        f" {value.dtype}, here {tuple(parameter.shape)} {parameter.dtype}"
                    )
                if not value.isfinite().all():
                    raise VggfeatError(
                        f"{path} is damaged: {name} has values that are not finite; move it away"
                    )
                values[name] = value
    except (ValueError, safetensors.SafetensorError) as error:
        raise VggfeatError(f"{path} is damaged: {error}; move it away to start anew") from error
    for name, parameter in parameters.items():
        parameter.copy_(values[f"model.{name}"])
        if name in learning:
            momentum = torch.empty_like(parameter).copy_(values[f"momentum.{name}"])
            optimiser.state[parameter]["momentum_buffer"] = momentum
