"""What is read of a checkpoint is checked: what is missing, odd or not finite is refused in a line
that names it.
"""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from pretrain.checkpoint import State, load_checkpoint, read_state, save_checkpoint
from vggfeat.errors import VggfeatError

Tensors = dict[str, torch.Tensor]
SOUND = State(iteration=3, learning_rate=0.01, best_top1=50.0, held_out=(50.0, 5.0))


def trained() -> tuple[nn.Linear, torch.optim.SGD]:
    net = nn.Linear(3, 2)
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return net, optimiser


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "last.safetensors", *trained(), SOUND, {"net": "A"})
    return tmp_path / "last.safetensors"


def changed(path: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> None:
    """Write the checkpoint again, its tensors and its state changed."""
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    change(tensors, state)
    safetensors.torch.save_file(tensors, path, metadata={"state": json.dumps(state)})


def test_what_is_written_is_read(path: Path) -> None:
    net, optimiser = trained()
    with torch.no_grad():
        net.weight.zero_()
    load_checkpoint(path, net, optimiser)
    state, identity = read_state(path)
    assert (state, identity) == (SOUND, {"net": "A"})
    kept = safetensors.torch.load_file(path)
    assert torch.equal(net.weight, kept["model.weight"]) and net.weight.any()
    assert torch.equal(optimiser.state[net.bias]["momentum_buffer"], kept["momentum.bias"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("iteration", v) for v in (-5, 1.5, "3", None, True, 10**30)),
        *(("learning_rate", v) for v in ("a", math.nan, -1.0, 0, math.inf)),
        *(("drops", v) for v in (-1, 0.5)),
        *(("best_top1", v) for v in (math.nan, -1, "x")),
        ("checks_since_best", -1),
        ("pending_loss", math.nan),
        ("finished", 1),
        ("seconds", -1.0),
        ("seconds", "long" * 1000),
        *(("held_out", v) for v in ([50.0], [math.nan, 1.0], "ab", [101, 1])),
        ("val", 5),
    ],
)
def test_an_impossible_state_is_refused_by_name(name: str, value: object, path: Path) -> None:
    changed(path, lambda tensors, state: state["progress"].update({name: value}))
    told = f"last.safetensors is no checkpoint.*its progress: {name}.* must"
    with pytest.raises(VggfeatError, match=told) as refused:
        read_state(path)
    assert len(str(refused.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state["progress"].pop("drops"), "its progress lacks drops"),
        (
            lambda state: state["progress"].update(extra=1),
            "its progress can't have 'extra': a State has iteration",
        ),
        (lambda state: state.update(progress=[1]), "its state: progress must be a record"),
        (lambda state: state.pop("progress"), "its state: progress is missing"),
        (lambda state: state.pop("identity"), "its state: identity is missing"),
        (lambda state: state.update(identity=3), "its state: identity must be a record"),
    ],
)
def test_a_state_with_other_parts_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], says: str, path: Path
) -> None:
    changed(path, lambda tensors, state: change(state))
    with pytest.raises(VggfeatError, match=says):
        read_state(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop("momentum.bias"), "lacks momentum.bias"),
        (lambda tensors: tensors.pop("model.weight"), "lacks model.weight"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "has other"),
        (
            lambda tensors: tensors["model.weight"].fill_(math.nan),
            "model.weight has values that are not finite",
        ),
        (
            lambda tensors: tensors["momentum.bias"].fill_(math.inf),
            "momentum.bias has values that are not finite",
        ),
        (lambda tensors: tensors.update({"model.bias": torch.ones(3)}), r"model.bias is \(3,\)"),
        (
            lambda tensors: tensors.update({"model.bias": torch.ones(2).double()}),
            "torch.float64, here",
        ),
    ],
)
def test_other_tensors_are_refused_by_name_and_change_nothing(
    change: Callable[[Tensors], object], says: str, path: Path
) -> None:
    changed(path, lambda tensors, state: change(tensors))
    net, optimiser = trained()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(VggfeatError, match=says):
        load_checkpoint(path, net, optimiser)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "", '"a"'])
def test_a_state_that_is_no_object_is_refused(text: str, path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"state": text})
    with pytest.raises(VggfeatError, match="is no checkpoint of a training run"):
        read_state(path)


def test_a_folder_a_pipe_and_other_files_are_refused(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    for odd in (path, path.parent):
        with pytest.raises(VggfeatError, match="is no checkpoint of a training run"):
            read_state(odd)


def test_a_checkpoint_that_cannot_be_opened_just_now_is_not_called_damaged(path: Path) -> None:
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))  # no file can be opened
    try:
        for read in (read_state, lambda path: load_checkpoint(path, *trained())):
            with pytest.raises(
                VggfeatError, match=r"can't read .*last\.safetensors: Too many open files"
            ):
                read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_checkpoint_in_a_folder_that_is_no_utf8_is_read(path: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xe9")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("names are UTF-8 here")
    save_checkpoint(odd / path.name, *trained(), SOUND, {"net": "A"})
    assert read_state(odd / path.name)[0] == SOUND
    load_checkpoint(odd / path.name, *trained())
