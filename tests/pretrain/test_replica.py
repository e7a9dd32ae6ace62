"""How a net's passes run: compiled or not, and why; and gradients are exchanged while the backward
pass goes on.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain import replica
from pretrain.colour import Colours
from pretrain.replica import Replica, TrainingNet, unfit
from pretrain.trainer import Trainer, hidden_units
from pretrain.watch import Log
from tests.conftest import Command, Ran
from tests.pretrain.conftest import (
    A_STAGE,
    D_STAGE,
    FEW,
    JITTER,
    layers,
    losses,
    one_line,
    training,
)
from vggfeat.errors import VggfeatError
from vggfeat.ranks import Ranks
from vggfeat.vgg import VGG

CPU = torch.device("cpu")
COLOURS = Colours(
    (123.68, 116.779, 103.939), ((0.08, 0.07, 0.07), (0.07, 0.08, 0.07), (0.07, 0.07, 0.08))
)


@pytest.fixture
def command(run_main: Command) -> Command:
    return training(run_main)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What dynamo has compiled since, by a backend that runs it as it stands."""
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return made


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """From here on a compiler that raises this."""

    def backend(*_: object) -> Callable[..., Any]:
        raise error

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setitem(replica.COMPILED, "cpu", True)
    monkeypatch.setattr(replica, "unfit", lambda device: "")


class Small(nn.Module):
    """In a training net's place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, crops_NHWC: Tensor, alpha_N3: Tensor, kept: Tensor) -> Tensor:
        x = self.layer(crops_NHWC.flatten(1).float() / 255).relu()
        return cast(Tensor, (x + alpha_N3) * kept[:, :1])


def small(compiled: bool | None = True) -> Replica:
    torch.manual_seed(0)
    return Replica(cast(TrainingNet, Small()), Ranks(CPU), compiled)


def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.Generator().manual_seed(n)
    crops = torch.randint(0, 256, (n, 2, 2, 3), generator=own, dtype=torch.uint8)
    return crops, torch.rand(n, 3, generator=own), torch.ones(n, 2, dtype=torch.uint8)


def test_on_a_cpu_nothing_is_compiled_unless_it_is_asked_for() -> None:
    assert not small(None).undecided and not small(False).undecided and small(True).undecided
    assert replica.COMPILED == {"cpu": False, "cuda": True}


def test_what_compiling_on_a_gpu_takes_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: name if name in ("clang", "mine") else None)
    monkeypatch.delenv("CC", raising=False)
    assert unfit(CPU) == ""
    monkeypatch.setenv("CC", "mine")
    assert unfit(CPU) == ""
    monkeypatch.setenv("CC", "gcc-4")
    assert unfit(CPU) == "there is no C compiler: $CC is gcc-4"
    monkeypatch.delenv("CC")
    capability = [(7, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert unfit(torch.device("cuda")) == ""
    capability[0] = (6, 1)
    assert unfit(torch.device("cuda")) == "Triton has no code for GPUs of that age"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert unfit(torch.device("cuda")) == "there is no C compiler: gcc or clang"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert unfit(torch.device("cuda")) == "Triton is not installed"


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_net_computes_the_same_and_is_compiled_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left for the last batch; inductor where there is a C++ compiler."""
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    compiled, plain = small(), small(False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    # for its checks of a processor's instructions a compiler is called for each of them
    with torch._inductor.config.patch({"cpp.simdlen": 1, "compile_threads": 1}):
        seconds = compiled.compile(lambda: float(compiled(*batch(5)).sum().backward() or 0))
        assert seconds > 0 and compiled.compile(pytest.fail) == 0.0
        for n in (5, 3, 1, 5):
            scores = []
            for net in (compiled, plain):
                net._forward.zero_grad()
                scores.append(net(*batch(n)))
                scores[-1].sum().backward()
            assert scores[0].shape == (n, 3)
            torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(
                compiled._forward.parameters(), plain._forward.parameters(), strict=True
            ):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert counted["unique_graphs"] == before + 1


def test_a_chain_of_many_stages_is_compiled_to_its_end(
    graphs: list[torch.fx.GraphModule],
) -> None:
    """Of one piece of code dynamo has eight cases, and then compiles no more."""
    for i in range(10):
        net = small()
        net.compile(functools.partial(net, *batch(2)))
        assert len(graphs) == i + 1


# --- in training ----------------------------------------------------------------------------------


def words(drawings: Path, out: Path, *more: str) -> list[str]:
    return ["--net", "A", *FEW, "--stages", "1", "--data", str(drawings), "--out", str(out), *more]


def events(out: Path, stage: str = A_STAGE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


def same(one: Path, other: Path, tolerance: float) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=tolerance)
    a, b = (layers(out / "weights.safetensors") for out in (one, other))
    assert all(float((a[k] - b[k]).norm()) <= tolerance * float(b[k].norm()) for k in a)


def test_each_stage_of_a_chain_is_compiled_once(
    command: Command, drawings: Path, tmp_path: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    """16 images in passes of 7: 6, 6 and 4; checks of held-out and validation images between."""
    out = tmp_path / "run"
    line = ["--net", "D", *FEW, "--data", drawings, "--micro-batch", "7", "--set=held_out=0.1"]
    ran = command(*line, "--compile", "--out", out)
    assert ran.status == 0, ran.err
    assert len(graphs) == 3
    for stage in (A_STAGE, D_STAGE, JITTER):
        assert f"{stage}: compiled in " in ran.err
        told = events(out, stage)
        [compiled] = [event for event in told if event["event"] == "compiled"]
        assert compiled["iteration"] == 1 and compiled["seconds"] > 0
    assert command(*line, "--no-compile", "--out", tmp_path / "plain").status == 0
    assert len(graphs) == 3
    same(out, tmp_path / "plain", 1e-4)


def test_a_run_goes_on_compiled_or_not(
    command: Command,
    drawings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graphs: list[torch.fx.GraphModule],
) -> None:
    def halted(self: Trainer, batch: Any, images: float) -> Tensor:
        if self.state.iteration in halts:
            halts.remove(self.state.iteration)
            raise VggfeatError("halted")
        return step(self, batch, images)

    halts, step = [2, 4], Trainer.step
    monkeypatch.setattr(Trainer, "step", halted)
    line = words(drawings, tmp_path / "run", "--checkpoint-minutes", "0")
    for compiled, status in (("--compile", 1), ("--no-compile", 1), ("--compile", 0)):
        ran = command(*line, compiled)
        assert ran.status == status, ran.err
    assert not halts and len(graphs) == 2
    told = events(tmp_path / "run")
    assert [event["iteration"] for event in told if event["event"] == "compiled"] == [1, 5]
    assert command(*words(drawings, tmp_path / "plain")).status == 0
    same(tmp_path / "run", tmp_path / "plain", 1e-5)


def test_what_compiling_takes_is_not_in_the_rates(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: list[float] = []
    monkeypatch.setattr(Log, "leave_out", lambda self, seconds: left_out.append(seconds))
    monkeypatch.setattr(Replica, "compile", lambda self, attempt: 1e6)
    ran = command(*words(drawings, tmp_path / "run", "--compile"))
    assert ran.status == 0 and left_out[0] == 1e6
    assert "compiled in 1000000 s" in ran.err
    # a clock that was set on by so much
    first = next(event for event in events(tmp_path / "run") if event["event"] == "train")
    assert first["images_per_second"] < 0


def test_a_net_that_cannot_be_compiled_runs_as_it_is(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*words(drawings, tmp_path / "plain")).status == 0
    by_default(monkeypatch)
    failing(monkeypatch, AssertionError("no such instruction\nand pages more"))
    ran = command(*words(drawings, tmp_path / "run"))
    assert ran.status == 0, ran.err
    assert "compiled in" not in ran.err
    assert [line for line in ran.err_lines if "torch.compile" in line] == [
        "torch.compile can't be used here (AssertionError: no such instruction): the net runs"
        " uncompiled"
    ]
    # bit for bit, from the first step on
    same(tmp_path / "run", tmp_path / "plain", 0.0)
    assert not [event for event in events(tmp_path / "run") if event["event"] == "compiled"]


def test_what_was_asked_for_and_cannot_be_done_is_one_line(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, ValueError("no such instruction"))
    for more in ([], ["--dry-run"]):
        ran = command(*words(drawings, tmp_path / "run", "--compile", *more))
        assert ran.status == 1
        assert one_line(ran.err) == (
            "pretrain.train: torch.compile can't be used here (ValueError: no such instruction):"
            " give --no-compile"
        )


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("CUDA error: unspecified launch failure\nmore"), "cpu failed (CUDA error: "),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_or_failed_device_is_not_the_compilers_fault(
    error: Exception,
    says: str,
    wrapped: bool,
    command: Command,
    drawings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Met by the net, or by the compiler as it tries its kernels."""
    by_default(monkeypatch)
    if wrapped:
        failing(monkeypatch, error)
    else:
        monkeypatch.setattr(Replica, "__call__", lambda *_: failing_now(error))
    ran: Ran = command(*words(drawings, tmp_path / "run"))
    assert ran.status == 1
    line = one_line(ran.err)
    assert says in line and "the run goes on from its last checkpoint" in line
    assert "torch.compile" not in line and "more" not in line.replace("memory", "")


def failing_now(error: Exception) -> Tensor:
    raise error


# --- gradients ------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A job of one process, through gloo."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("group")
def test_gradients_are_exchanged_while_the_backward_pass_goes_on(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first bucket, that of the last layers, goes before the first layer's gradient is there.

    A compiled backward pass would be one piece, had dynamo not cut it between the buckets.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    # fc7 and fc8 together fill PyTorch's first bucket, of 1 MB
    net = TrainingNet(VGG("A", 2, 1 / 8, 32).double(), COLOURS, 0.5)
    plain = copy.deepcopy(net)
    two = Replica(net, Ranks(CPU, world=2), compiled)
    wrapped = two._module
    assert isinstance(wrapped, DistributedDataParallel)
    kept = torch.full((3, hidden_units(net.net) // 8), 255, dtype=torch.uint8)
    crops = torch.zeros((3, 32, 32, 3), dtype=torch.uint8)

    def backward() -> float:
        loss = two(crops, torch.ones(3, 3), kept).sum()
        loss.backward()
        return float(loss.detach())

    told: list[str] = []

    def exchange(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        told.append(f"bucket {bucket.index()}")
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    # it looks at the types themselves
    exchange.__annotations__ |= {
        "bucket": dist.GradBucket,
        "return": torch.futures.Future[Tensor],
    }
    wrapped.register_comm_hook(None, exchange)
    for name, parameter in net.net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: told.append(name))
    if compiled:
        assert two.compile(backward) > 0 and two._forward.compiled is not None
        assert not [each for each in told if "bucket" in each]  # nothing is exchanged by it
    backward()  # all in one bucket; the next ones are made of what was seen
    plain(crops, torch.ones(3, 3), kept).sum().backward()
    for _ in range(2):
        told.clear()
        net.zero_grad()
        backward()
        buckets = [each for each in told if "bucket" in each]
        assert buckets[0] == "bucket 0" and len(buckets) > 1
        assert told.index("bucket 0") < told.index("features.0.weight")
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
