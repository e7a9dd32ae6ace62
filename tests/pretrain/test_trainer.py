"""A stage: what learns, by which step, and what ends it before its time."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pretrain import trainer
from pretrain.checkpoint import read_state
from pretrain.init import weight_layers
from pretrain.posteriors import how_trained
from pretrain.readers import Batch
from pretrain.recipe import UNKNOWN, history_of, read_recipe
from pretrain.replica import TrainingNet
from pretrain.trainer import Trainer, optimiser
from pretrain.watch import Chance
from tests.conftest import Command
from tests.pretrain.conftest import A_STAGE, D_STAGE, FEW, layers, one_line, training
from vggfeat.sources import load
from vggfeat.table1 import NETS
from vggfeat.tensors import metadata_of
from vggfeat.vgg import VGG


@pytest.fixture
def command(run_main: Command) -> Command:
    return training(run_main)


@pytest.mark.parametrize("net", NETS)
def test_every_net_of_table_1_learns(
    net: str, command: Command, drawings: Path, tmp_path: Path
) -> None:
    few = ("--init", "glorot", "--stages", "1", "--set=*.iterations=2", "--precision", "bfloat16")
    ran = command("--net", net, *FEW, *few, "--data", drawings, "--out", tmp_path / "run")
    assert ran.status == 0, ran.err
    assert load(str(tmp_path / "run" / "weights.safetensors")).name == net


def test_only_the_fc_layers_learn_where_the_recipe_says_so(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["--net", "A", *FEW, "--data", drawings, "--out", out]
    assert command(*words).status == 0
    start = out / A_STAGE / "weights.safetensors"
    ran = command(*words, "--set=A-112.learn=fc", "--stages", "A-36-fc", "--from", start)
    assert ran.status == 0, ran.err
    before, after = layers(start), layers(out / "A-36-fc" / "weights.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["fc6", "fc7", "fc8"]

    # of weights that don't tell how long they were trained, nothing is made up
    silent = tmp_path / "silent.safetensors"
    metadata = {k: v for k, v in metadata_of(start).items() if k != "history"}
    safetensors.torch.save_file(safetensors.torch.load_file(start), silent, metadata)
    later = tmp_path / "later"
    assert command(*words[:-1], later, "--stages", "1", "--from", silent).status == 0
    past = history_of(metadata_of(later / "weights.safetensors"))
    assert past[0] == UNKNOWN and [each.stage for each in past[1:]] == ["A-36"]
    facts = how_trained(metadata_of(later / "weights.safetensors"))
    assert facts["epochs"] == facts["training_set"] == ""


def test_storage_that_is_gone_ends_a_run(command: Command, drawings: Path, tmp_path: Path) -> None:
    """Else every batch is empty, and a net that has learned nothing more is finished without a
    word.
    """
    words = ["--net", "A", *FEW, "--stages", "1", "--data", drawings]
    assert command(*words, "--out", tmp_path / "whole").status == 0
    for image in (drawings / "train").rglob("*.jpg"):
        image.write_bytes(b"")
    ran = command(
        *words, "--colours", tmp_path / "whole" / "colours.json", "--out", tmp_path / "run"
    )
    assert ran.status == 1
    assert "iteration 0: not one image of a batch can be read" in one_line(ran.err)


def test_weights_that_are_refused_at_the_end_leave_a_checkpoint_to_write_them_from(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, trainer: Trainer) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["--net", "A", *FEW, "--stages", "1", "--data", drawings, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_weights", refused)
        ran = command(*words)
    assert ran.status == 1
    assert "weights.safetensors: No space left on device; the same command goes on" in one_line(
        ran.err
    )
    assert read_state(tmp_path / "run" / A_STAGE / "last.safetensors")[0].finished
    ran = command(*words)
    assert ran.status == 0 and "iteration" not in ran.err
    assert "A-36: going on from its end" in ran.err and "random" not in ran.err
    assert load(str(tmp_path / "run" / "weights.safetensors")).name == "A"


def test_a_loss_that_blows_up_stops_with_advice(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ran = command("--net", "A", *FEW, "--data", drawings, "--out", out, "--set=*.learning_rate=1e6")
    assert ran.status == 1
    line = one_line(ran.err)
    assert "the loss is" in line
    assert "lower rate" in line
    assert not (out / A_STAGE / "weights.safetensors").exists()


def test_a_net_that_stays_at_chance_stops_with_advice(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    words = ["--net", "E", "--init", "normal", *FEW, "--data", drawings, "--set=chance_after=5"]
    ran = command(*words, "--stages", "E-36", "--out", tmp_path / "run")
    assert ran.status == 1
    line = one_line(ran.err)
    assert (
        "E-36, iteration 5: the net is no better than chance: for 5 iterations its loss has been"
        " 0.693" in line
    )
    assert "that of a constant guess is 0.693" in line
    for way in (
        "learning_rate",
        "--init A",
        "--init glorot",
        f"move {tmp_path / 'run' / 'E-36'} away",
    ):
        assert way in line


def test_a_deeper_stage_at_chance_is_no_finished_one(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [
        "--net",
        "D",
        *FEW,
        "--data",
        drawings,
        "--out",
        out,
        "--stages",
        "1-2",
        "--set=held_out=0.1",
    ]
    words += ["--set=random_layers=normal", "--set=D-112.learning_rate=1e-9"]
    assert command(*words, "--stages", "1").status == 0  # A is left at chance, unwatched
    for after, why in (
        (5, "for 5 iterations its loss has been"),
        (100, "its loss is"),
        (100, "its loss is"),
    ):
        ran = command(*words, f"--set=chance_after={after}")
        assert ran.status == 1
        line = one_line(ran.err)
        assert "D-36, iteration" in line and f"no better than chance: {why} 0.69" in line
        assert (
            "a start that has learned more (--from FILE)" in line and "--set chance_after=0" in line
        )
        assert f"{A_STAGE}: done before" in ran.err
        assert not (out / D_STAGE / "weights.safetensors").exists()
        page = (out / "report.html").read_text()
        assert '<p class="state">failed: D-36, iteration ' in page and D_STAGE in page
        assert read_state(out / D_STAGE / "last.safetensors")[0].iteration == (
            5 if after == 5 else 6
        )
    # who wants it all the same can have it, from where it is
    ran = command(*words, "--set=chance_after=0")
    assert ran.status == 0, ran.err
    assert (
        "iteration 6" not in ran.err
        and load(str(out / D_STAGE / "weights.safetensors")).name == "D"
    )


def test_an_error_of_chance_is_refused_whatever_the_loss(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a net has learned its images by heart; of few held-out ones nothing is concluded."""
    monkeypatch.setattr(Chance, "count", lambda *_: None)
    monkeypatch.setattr(Trainer, "errors", lambda *_: (50.0, 0.0))
    words = ["--net", "A", *FEW, "--data", drawings, "--set=chance_after=100", "--stages", "1"]
    ran = command(*words, "--set=held_out=0.2", "--out", tmp_path / "many")
    assert ran.status == 1
    assert (
        "its held-out error is 50.00 % top-1 in the end, and that of a constant guess is 50.00 %"
        in ran.err
    )
    assert command(*words, "--set=held_out=0.1", "--out", tmp_path / "few").status == 0


def test_a_net_that_has_learned_and_falls_back_to_chance_is_stopped(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checks of four epochs are faultless; what comes then is a diverged net's constant
    guess.
    """

    def step(self: Trainer, batch: Batch, images: float) -> torch.Tensor:
        return torch.tensor(0.1 if self.state.iteration < 16 else 0.7, dtype=torch.float64)

    errors = [0.0] * 4 + [50.0] * 100
    monkeypatch.setattr(Trainer, "errors", lambda *_: (errors.pop(0), 0.0))
    monkeypatch.setattr(Trainer, "step", step)
    words = [
        "--net",
        "A",
        *FEW,
        "--data",
        drawings,
        "--out",
        tmp_path / "run",
        "--set=chance_after=20",
    ]
    words += [
        "--set=*.iterations=2000",
        "--set=patience=1000",
        "--set=held_out=0.2",
        "--set=batch_size=16",
    ]
    ran = command(*words)
    assert ran.status == 1
    assert (
        "no better than chance: it had learned, but for 20 iterations its loss has been"
        in one_line(ran.err)
    )


def test_a_chain_that_learns_is_let_pass(command: Command, drawings: Path, tmp_path: Path) -> None:
    words = [
        "--net",
        "D",
        *FEW,
        "--set=*.iterations=30",
        "--set=chance_after=20",
        "--set=held_out=0.1",
    ]
    ran = command(*words, "--data", drawings, "--out", tmp_path / "run")
    assert ran.status == 0, ran.err


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_too_little_memory_is_one_line(
    kind: type[Exception],
    command: Command,
    drawings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(*_: torch.Tensor) -> torch.Tensor:
        raise kind("tried to allocate 20 GiB")

    monkeypatch.setattr(TrainingNet, "forward", forward)
    ran = command(
        "--net", "A", *FEW, "--micro-batch", "12", "--data", drawings, "--out", tmp_path / "run"
    )
    assert ran.status == 1
    assert "out of memory on cpu: give a --micro-batch below 12; the run goes on" in one_line(
        ran.err
    )


def test_a_device_that_fails_is_one_line_and_the_run_goes_on(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Trainer, batch: Batch, images: float) -> torch.Tensor:
        if self.state.iteration == 3:
            raise torch.AcceleratorError(
                "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"
            )
        return step(self, batch, images)

    step = Trainer.step
    words = ["--net", "A", *FEW, "--stages", "1", "--checkpoint-minutes", "0", "--data", drawings]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fails)
        ran = command(*words, "--out", tmp_path / "run")
    assert ran.status == 1
    assert one_line(ran.err) == (
        "pretrain.train: A-36, iteration 3: cpu failed (CUDA error: unspecified launch failure);"
        " the run goes on from its last checkpoint"
    )
    ran = command(*words, "--out", tmp_path / "run")
    assert ran.status == 0 and "A-36: going on from iteration 3" in ran.err


def test_a_killed_reader_is_one_line_and_the_run_goes_on(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def after_a_kill(self: Trainer, batch: Batch, images: float) -> torch.Tensor:
        if self.state.iteration == 2:
            for reader in self.readers.processes:
                reader.process.kill()
        return step(self, batch, images)

    words = [
        "--net",
        "A",
        *FEW,
        "--workers",
        "1",
        "--checkpoint-minutes",
        "0",
        "--set=*.iterations=30",
    ]
    words += ["--data", str(drawings), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", after_a_kill)
        ran = command(*words)
    assert ran.status == 1
    assert "a process that reads images was killed" in one_line(ran.err)
    assert "give fewer --workers" in one_line(ran.err)
    assert (tmp_path / "run" / A_STAGE / "last.safetensors").exists()
    assert command(*words).status == 0


@pytest.mark.parametrize("caffe", [False, True])
def test_a_step_is_sgd_with_momentum_and_decay(caffe: bool) -> None:
    """v = 0.9 v + gradient + 5e-4 w, w -= rate v; of biases alike, or Caffe's: twice the rate and
    no decay.
    """
    recipe = read_recipe("paper", [f"caffe_biases={str(caffe).lower()}"])
    net = VGG("A", 2, width=0.02, crop=32).double()
    layers = list(weight_layers(net).values())
    sgd = optimiser(net, recipe, 1e-2)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    assert len(parameters) == len(list(net.parameters()))
    expected = [p.detach().clone() for p in parameters]
    velocities = [torch.zeros_like(p) for p in parameters]
    generator = torch.Generator().manual_seed(0)
    for rate in (1e-2, 1e-2, 1e-3):
        for group in sgd.param_groups:
            group["lr"] = rate * group["rate_factor"]
        for i, p in enumerate(parameters):
            p.grad = torch.empty_like(p).normal_(generator=generator)
            bias = caffe and p.ndim == 1
            velocities[i] = 0.9 * velocities[i] + p.grad + (0 if bias else 5e-4) * expected[i]
            expected[i] = expected[i] - (2 if bias else 1) * rate * velocities[i]
        sgd.step()
    for ours, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"iteration": 7}, "its iteration is 7, and 6 is the last"),
        ({"drops": 50}, "its drops is 50, and 2 is"),
    ],
)
def test_a_checkpoint_beyond_the_end_is_refused(
    change: dict[str, int], says: str, command: Command, drawings: Path, tmp_path: Path
) -> None:
    words = ["--net", "A", *FEW, "--data", drawings, "--out", tmp_path / "run"]
    assert command(*words).status == 0
    path = tmp_path / "run" / A_STAGE / "last.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    state["progress"].update(change)
    safetensors.torch.save_file(tensors, path, metadata={"state": json.dumps(state)})
    ran = command(*words)
    assert ran.status == 1
    assert says in one_line(ran.err)
