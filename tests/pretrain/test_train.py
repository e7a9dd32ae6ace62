"""The command, on generated images: what it leaves behind, what it refuses, and in which words."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pretrain import plan, trainer
from pretrain.checkpoint import State, read_state
from pretrain.colour import Colours
from pretrain.init import FROM_A, weight_layers
from pretrain.loader import read_training_set
from pretrain.posteriors import how_trained
from pretrain.readers import Batch
from pretrain.recipe import chain, history_of, read_recipe
from pretrain.train import app
from pretrain.trainer import Trainer, TrainingNet
from pretrain.watch import Chance
from tests import prepared
from tests.conftest import HANG, Command
from tests.pretrain.conftest import SHORT, environment, words_of
from vggfeat import cli
from vggfeat.ranks import Ranks
from vggfeat.sources import load
from vggfeat.store import open_features
from vggfeat.tensors import metadata_of
from vggfeat.terminal import run
from vggfeat.vgg import NETS, VGG

Train = Callable[..., subprocess.CompletedProcess[str]]
A_STAGE, D_STAGE, JITTER = "A-36", "D-36", "D-36-64"
FEW = [
    *SHORT,
    "--workers",
    "0",
    "--set=batch_size=16",
    "--set=*.iterations=6",
    "--precision",
    "float32",
]


@pytest.fixture
def command(run_main: Command) -> Command:
    """`command("--net", "A", …)` in this process."""
    return functools.partial(run_main, functools.partial(run, app, "python -m pretrain.train"))


def one_line(text: str) -> str:
    """The last line of stderr, which is the command's own."""
    line = text.strip().splitlines()[-1]
    assert line.startswith("pretrain.train: "), text
    assert "Traceback" not in text
    return line


def layers(path: Path) -> dict[str, torch.Tensor]:
    module = load(str(path)).module
    assert isinstance(module, VGG)
    return {name: layer.weight.detach() for name, layer in weight_layers(module).items()}


def test_the_chain_and_what_it_leaves(
    command: Command, run_main: Command, drawings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ran = command("--net", "D", *FEW, "--data", drawings, "--out", out)
    assert ran.status == 0, ran.err
    for stage in (A_STAGE, D_STAGE, JITTER):
        names = {path.name for path in (out / stage).iterdir()}
        assert {"last.safetensors", "best.safetensors", "weights.safetensors", "log.jsonl"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
        assert f"{stage}: validation error" in ran.err
        assert stage in ran.out
    assert (out / "weights.safetensors").read_bytes() == (
        out / JITTER / "weights.safetensors"
    ).read_bytes()
    # which layers D took from A is said, by the paper's names
    assert (
        f"D-36: {', '.join(FROM_A)} from {out / A_STAGE / 'weights.safetensors'} (net A)" in ran.err
    )
    assert (
        "D-36-64: all layers from" in ran.err
        and "A-36: all layers random (Glorot's way)" in ran.err
    )

    events = [json.loads(line) for line in (out / JITTER / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "train"]
    assert [event["iteration"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "images_per_second", "data_wait", "epoch"} <= steps[0].keys()
    checks = [event for event in events if event["event"] == "held_out"]
    # each epoch of 76 // 16 iterations, and the end
    assert [event["iteration"] for event in checks] == [
        4,
        6,
    ]
    assert {"top1_error", "top5_error", "images"} <= checks[0].keys()
    # of two classes a top-5 error is none: 0.00 was printed, a faultless net's
    assert all(event["top5_error"] is None for event in events if "top5_error" in event)
    assert "% top-1, - % top-5, central crop at Q=" in ran.err
    assert (
        re.search(r"36-64 .*\b50 .* \d+\.\d+, - ", ran.out)
        and "errors: of one central crop at Q" in ran.out
    )

    network = load(str(out / "weights.safetensors"))
    assert network.classes == ["blue", "red"]
    # how long its whole chain has learned, and on what: A's stage counts, too
    past = history_of(network.metadata)
    assert [each.stage for each in past] == [A_STAGE, D_STAGE, JITTER]
    assert [each.epochs for each in past] == [6 / 4] * 3
    assert {(each.recipe, each.images) for each in past} == {("mini", 76)}
    assert len({each.training_set for each in past}) == 1
    assert how_trained(network.metadata)["epochs"] == "4.50"
    measured = Colours.read(out / "colours.json")
    assert network.preprocessing.mean == pytest.approx(measured.mean, abs=1e-4)
    state, _ = read_state(out / JITTER / "last.safetensors")
    assert state.finished
    assert state.learning_rate < 5e-3  # drop_by of the mini recipe

    # what came out is what `vggfeat extract` takes
    features, hidden = tmp_path / "feats.h5", len(layers(out / "weights.safetensors")["fc7"])
    ran = run_main(
        cli.main,
        "extract",
        "--dataset",
        "folder",
        "--root",
        drawings,
        "--weights",
        out / "weights.safetensors",
        "--scales",
        "36,48",
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--out",
        features,
    )
    assert ran.status == 0, ran.err
    assert open_features(features).read().shape == (88, 2, hidden)

    # a finished run is only told again
    before = (out / "weights.safetensors").stat().st_mtime_ns
    again = command("--net", "D", *FEW, "--data", drawings, "--out", out)
    assert again.status == 0
    assert again.err.splitlines() == [
        f"{stage}: done before" for stage in (A_STAGE, D_STAGE, JITTER)
    ]
    assert again.out == ran.out or JITTER in again.out
    assert (out / JITTER / "weights.safetensors").stat().st_mtime_ns <= before


@pytest.mark.parametrize("net", NETS)
def test_every_net_of_table_1_learns(
    net: str, command: Command, drawings: Path, tmp_path: Path
) -> None:
    few = ("--init", "glorot", "--stages", "1", "--set=*.iterations=2", "--precision", "bfloat16")
    ran = command("--net", net, *FEW, *few, "--data", drawings, "--out", tmp_path / "run")
    assert ran.status == 0, ran.err
    assert load(str(tmp_path / "run" / "weights.safetensors")).name == net


def test_processes_wait_for_the_weights_of_the_stage_before(
    train: Train, drawings: Path, tmp_path: Path
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nfrom pretrain import train, trainer\nfrom vggfeat import terminal\n"
        "write = trainer.write_weights\n"
        "trainer.write_weights = lambda *args: (time.sleep(2), write(*args))\n"
        "terminal.run(train.app, 'pretrain.train')\n"
    )
    few = ("--stages", "1-2", "--set=*.iterations=1", "--set=held_out=0")
    train(
        "--net",
        "D",
        *FEW,
        *few,
        "--data",
        drawings,
        "--out",
        tmp_path / "run",
        processes=2,
        script=script,
    )
    assert (tmp_path / "run" / D_STAGE / "weights.safetensors").exists()


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
    assert not metadata_of(later / "weights.safetensors")["history"]


def test_a_plan_costs_nothing_and_writes_nothing(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ran = command("--net", "D", *FEW, "--data", drawings, "--out", out, "--dry-run")
    assert ran.status == 0, ran.err
    for stage in (A_STAGE, D_STAGE, JITTER):
        assert stage in ran.out
    assert "76 training images" in ran.out and " in all, " in ran.out
    assert not out.exists()


def test_a_plan_is_of_whole_batches_their_reading_and_the_checks(
    drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, sizes = torch.device("cpu"), []

    def step(self: Trainer, batch: Batch, images: float) -> torch.Tensor:
        sizes.append((len(batch.labels), images))
        return torch.zeros(())

    numbers = ("width=0.1", "crop=32", "batch_size=16", "held_out=0.1", "*.iterations=7")
    recipe = chain(
        read_recipe("mini", [*numbers, "*.train_scale=[36,36]", "A-112.learn=fc"], "A"), "A"
    )
    recipe = replace(recipe, stages=(recipe.stages[0], replace(recipe.stages[0], learn="all")))
    data, machine = read_training_set(drawings, recipe), trainer.Machine(micro_batch=4, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        net, read = plan.trial(recipe, 0, plan.net_of(recipe, 0, 2), data, Ranks(cpu), machine)
    # a batch as in training, of images that were read
    assert sizes[-1] == (16, 16) and 0 < net < read

    monkeypatch.setattr(plan, "trial", lambda *_: (0.5, 0.25))
    for workers, of_net, waits in ((0, 0.75, True), (1, 0.5, False)):
        monkeypatch.setattr(plan, "CORES", 64)
        fc, all_ = plan.plan(recipe, range(2), data, Ranks(cpu), replace(machine, workers=workers))
        # two epochs' checks, validation
        assert fc.seconds == pytest.approx((7 * 16 + 2 * 8 + 8) * of_net)
        forward = 0.5 / 3 + 0.25 if not workers else 0.25
        assert all_.seconds == pytest.approx(7 * 16 * of_net + (2 * 8 + 8) * forward)
        assert (fc.waits, all_.waits) == (waits, waits)
    # as many threads as cores: reading takes from the net
    monkeypatch.setattr(plan, "CORES", torch.get_num_threads())
    pace = plan.Pace(0.25, Ranks(cpu), machine)
    assert pace.seconds(0.5) == pytest.approx(0.5 + 0.25 / torch.get_num_threads())


@pytest.mark.parametrize(("train", "val"), [("Training", "Validation"), ("train_set", "val_set")])
def test_other_words_for_train_and_val(
    train: str, val: str, command: Command, drawings: Path, tmp_path: Path
) -> None:
    for part, word in (("train", train), ("val", val)):
        (drawings / part).rename(drawings / word)
    (drawings / train / "red" / "IMG.heic").touch()
    ran = command("--net", "A", *FEW, "--data", drawings, "--out", tmp_path / "run", "--dry-run")
    assert ran.status == 0, ran.err
    assert "76 training images" in ran.out
    assert (
        f"left out: 1 file without an image's ending (.heic 1), for example {train}/red/IMG.heic"
        in ran.err
    )


def test_a_class_may_be_called_train(command: Command, drawings: Path, tmp_path: Path) -> None:
    (drawings / "train" / "red").rename(drawings / "train" / "train")
    words = [
        "--net",
        "A",
        *FEW,
        "--data",
        drawings / "train",
        "--out",
        tmp_path / "run",
        "--dry-run",
    ]
    ran = command(*words)
    assert ran.status == 0, ran.err
    assert "taken for classes: train" in ran.err
    (drawings / "train" / "train").rename(drawings / "fold1")
    shutil.copytree(drawings / "fold1", drawings / "parts" / "fold1" / "red")
    for part in ("fold1/blue", "fold2/red", "fold2/blue"):
        shutil.copytree(drawings / "val" / "red", drawings / "parts" / part)
    words[words.index("--data") + 1] = drawings / "parts"
    assert "hold the same folders, blue, red" in one_line(command(*words).err)


def test_unreadable_images_are_left_out_the_same_by_every_process(
    drawings: Path, tmp_path: Path, command: Command, train: Train
) -> None:
    bad = [drawings / "train" / "blue" / "00.jpg", drawings / "train" / "red" / "39.jpg"]
    bad[0].write_bytes(b"nothing")
    bad[1].write_bytes(bad[1].read_bytes()[:100])
    whole, later = tmp_path / "whole", tmp_path / "later"
    words = ["--net", "A", *FEW[:-1], "float64", "--data", drawings]
    ran = command(*words, "--out", whole)
    assert ran.status == 3
    named = Colours.read(whole / "colours.json").unreadable
    assert list(named) == ["train/blue/00.jpg", "train/red/39.jpg"]
    for name in named:
        assert name in ran.err
    assert "2 training images can't be read and are left out" in ran.err
    done = train(*words, "--out", later, processes=2)
    assert list(Colours.read(later / "colours.json").unreadable) == list(named)
    assert "train/blue/00.jpg" in done.stderr
    assert losses(later) == pytest.approx(losses(whole), rel=1e-9)

    # one that breaks after the colours were measured: its row doesn't count
    out = tmp_path / "broken"
    out.mkdir()
    shutil.copy(whole / "colours.json", out)
    for name in ("train/red/07.jpg", "val/blue/00.jpg"):
        (drawings / name).write_bytes(b"nothing")
    ran = command(*words, "--out", out, "--set=held_out=0.05", "--set=A-112.iterations=10")
    assert "unreadable, left out: train/red/07.jpg" in ran.err
    assert "unreadable, counted as an error: val/blue/00.jpg" in ran.err
    assert all(math.isfinite(loss) for loss in losses(out))


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


@pytest.mark.parametrize("name", ["weights", "A-36/weights", "A-36/best", "A-36/last"])
def test_what_no_file_can_take_the_place_of_is_told_before_the_work(
    name: str, command: Command, drawings: Path, tmp_path: Path
) -> None:
    (tmp_path / A_STAGE).mkdir()
    os.mkfifo(tmp_path / f"{name}.safetensors")
    ran = command("--net", "A", *FEW, "--data", drawings, "--out", tmp_path)
    assert ran.status == 1
    assert f"{name}.safetensors is no regular file" in one_line(ran.err)
    assert [path.name for path in (tmp_path / A_STAGE).iterdir() if not path.is_fifo()] == []


def test_a_stage_whose_folder_cannot_be_written_is_told_before_the_work(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no folder that even root can't write in")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / A_STAGE).symlink_to("/proc/self")
    ran = command("--net", "A", *FEW, "--data", drawings, "--out", tmp_path / "run")
    assert ran.status == 1
    assert f"can't write in the folder {tmp_path / 'run' / A_STAGE}" in one_line(ran.err)


def test_a_system_that_does_not_tell_its_free_memory(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr(plan, "open", missing, raising=False)
    words = ["--net", "A", *FEW, "--stages", "1", "--data", drawings, "--out", tmp_path / "run"]
    assert "/proc/meminfo'): give --micro-batch" in one_line(command(*words).err)
    assert command(*words, "--micro-batch", "8").status == 0


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


def losses(out: Path) -> list[float]:
    events = [json.loads(line) for line in (out / A_STAGE / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "train"]


def test_what_is_no_imagenet(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--net", "A", *FEW, "--out", tmp_path / "run"]
    nowhere = command(*words, "--data", tmp_path / "nowhere")
    assert nowhere.status == 1
    assert str(tmp_path / "nowhere") in one_line(nowhere.err)
    (tmp_path / "empty").mkdir()
    empty = command(*words, "--data", tmp_path / "empty")
    assert empty.status == 1
    assert "train/WNID" in one_line(empty.err)
    monkeypatch.chdir(tmp_path)
    without = command(*words)  # ./data, where vggfeat looks, too
    assert without.status == 1
    assert f"{tmp_path}/data/train" in one_line(without.err)
    monkeypatch.setenv("VGGFEAT_DATA", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in one_line(command(*words).err)
    (drawings / "train" / "green").mkdir()
    assert "no images in the class folder" in one_line(command(*words, "--data", drawings).err)
    (drawings / "train" / "green").rmdir()
    (drawings / "val" / "red").rename(drawings / "val" / "green")
    assert "has no class of the same name" in one_line(command(*words, "--data", drawings).err)
    few = command(*words, "--data", drawings, "--set=batch_size=256")
    assert few.status == 1
    assert not (tmp_path / "run").exists()


def test_stages_need_the_weights_before_them(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    words = ["--net", "D", *FEW, "--data", drawings]
    ran = command(*words, "--out", tmp_path / "run", "--stages", D_STAGE)
    assert ran.status == 1
    assert "stage D-36 starts from A-36" in one_line(ran.err)
    assert not (tmp_path / "run" / "colours.json").exists()
    other = tmp_path / "other"
    shutil.copytree(drawings, tmp_path / "renamed")
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / "red").rename(tmp_path / "renamed" / split / "scarlet")
    assert command("--net", "A", *FEW, "--data", tmp_path / "renamed", "--out", other).status == 0
    start = other / A_STAGE / "weights.safetensors"
    ran = command(*words, "--out", tmp_path / "run", "--stages", D_STAGE, "--from", start)
    assert ran.status == 1
    assert "'red' is in one and not in the other" in one_line(ran.err)
    # which a dry run says, too
    for more, says in ((("--from", start), "'red' is in one"), ((), "stage D-36 starts from A-36")):
        ran = command(*words, "--out", tmp_path / "run", "--stages", D_STAGE, *more, "--dry-run")
        assert ran.status == 1 and says in one_line(ran.err)
    # a run's folder with another net's checkpoint in it
    shutil.copytree(other, tmp_path / "moved")
    (tmp_path / "moved" / A_STAGE).rename(tmp_path / "moved" / "B-36")
    for path in (tmp_path / "moved").rglob("weights.safetensors"):
        path.unlink()
    ran = command(
        "--net",
        "B",
        "--init",
        "glorot",
        *FEW,
        "--stages",
        "B-36",
        "--data",
        tmp_path / "renamed",
        "--out",
        tmp_path / "moved",
    )
    assert ran.status == 1
    assert "was made with net A, now B" in one_line(ran.err)
    (other / A_STAGE / "last.safetensors").write_bytes(b"half")
    ran = command("--net", "A", *FEW, "--data", tmp_path / "renamed", "--out", other)
    assert ran.status == 1
    assert "is no checkpoint of a training run" in one_line(ran.err)


def test_a_folder_with_the_weights_of_another_net_is_refused(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    """E's weights took the place of D's without a word."""
    out = tmp_path / "run"
    words = [*FEW, "--data", drawings, "--out", out]
    by_parts = [command("--net", "C", *words, "--stages", stage) for stage in ("1", "2")]
    assert [ran.status for ran in by_parts] == [0, 0], by_parts[1].err
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    for net, *more in (
        ("E",),
        ("A",),
        ("E", "--dry-run"),
        ("C", "--recipe", "tables", "--dry-run"),
    ):
        ran = command("--net", net, *words, *more)
        assert ran.status == 1, ran.err
        assert "has other weights ('pretrain mini C-36'), which this run would replace" in one_line(
            ran.err
        )
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before
    # a stage's folder may have such a file, too
    (out / "E-36").mkdir()
    shutil.copy(out / "weights.safetensors", out / "E-36")
    (out / "weights.safetensors").unlink()
    ran = command("--net", "E", *words)
    assert (
        ran.status == 1
        and f"{out / 'E-36' / 'weights.safetensors'} has other weights" in one_line(ran.err)
    )


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
        assert D_STAGE in (out / "report.html").read_text()
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


# Losses of the paper's nets at full width on ten classes, A and D from A, by iteration
# (docs/training.md).
A_10 = {0: 2.303, 150: 2.24, 450: 1.57, 1500: 0.17}
D_10 = {0: 2.303, 300: 2.300, 450: 1.85, 750: 1.03, 2200: 0.09}


def watched(losses: Callable[[int], float], iterations: int, classes: int, limit: int) -> State:
    """Where the watch is after a stage of such losses, or when it has reached its limit; with a
    batch's noise.
    """
    chance, state = Chance.of_labels(np.arange(classes), np.zeros(0, np.int64)), State()
    noise = np.random.default_rng(0).normal(0, 0.02, iterations // 20)
    for i in range(iterations // 20):
        state.iteration += 20
        chance.count(state, max(0.0, losses(state.iteration) + noise[i]), 20, limit, 256)
        if state.at_chance >= limit:
            break
    return state


@pytest.mark.parametrize("curve", [A_10, D_10])
@pytest.mark.parametrize(("classes", "slower"), [(10, 1), (1000, 10), (1000, 30)])
def test_the_papers_chain_is_let_pass(curve: dict[int, float], classes: int, slower: int) -> None:
    limit = read_recipe("paper").chance_after
    x, y = (
        slower * np.array(list(curve)),
        np.array(list(curve.values())) * math.log(classes) / math.log(10),
    )
    state = watched(lambda i: float(np.interp(i, x, y)), int(x[-1]), classes, limit)
    assert state.iteration == x[-1] // 20 * 20 and state.at_chance == 0
    while_at_chance = watched(lambda i: float(np.interp(i, x, y)), slower * 300, classes, limit)
    assert while_at_chance.at_chance < (limit / 2 if slower < 30 else limit)
    # the rate is not lowered before learning has begun
    state.at_chance, state.best_top1, state.learning_rate = 1, 80.0, 0.01
    for _ in range(100):
        assert not state.judge(90.0, read_recipe("paper"))
    assert (state.drops, state.finished) == (0, False)


def test_what_stays_at_chance_or_falls_back_to_it_is_stopped() -> None:
    limit = 1000
    stays = watched(lambda i: 2.30, 10 * limit, 10, limit)
    assert stays.iteration == stays.at_chance == limit
    falls_back = watched(lambda i: 0.1 if i <= 5000 else 2.303, 20 * limit, 10, limit)
    assert 5000 + limit < falls_back.iteration < 5000 + 1.5 * limit
    assert limit <= falls_back.at_chance < falls_back.iteration
    # single losses of small batches lie far below chance's; all of them together don't
    noisy, few = State(), Chance.of_labels(np.arange(2), np.zeros(0, np.int64))
    # of a net that doesn't learn
    for loss in (
        0.74,
        0.66,
        0.60,
        0.78,
        0.85,
        0.78,
        0.60,
        0.68,
        0.64,
        0.72,
    ):
        noisy.iteration += 1
        few.count(noisy, loss, 1, 10, 16)
    assert noisy.at_chance > 0 and noisy.mean_loss == pytest.approx(0.705)
    learns_late = watched(lambda i: 2.303 if i < 900 else 1.8, 3 * limit, 10, limit)
    assert learns_late.at_chance == 0 and learns_late.iteration == 3 * limit


def test_chance_is_what_a_constant_guess_gets() -> None:
    labels = np.repeat([0, 1], [90, 10])
    chance = Chance.of_labels(labels, labels[::5])
    assert chance.loss == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert chance.error == pytest.approx(10)
    assert not chance.tells() and not chance.surely_beaten(0.0)  # of 20 images
    hundred = Chance.of_labels(np.arange(10), np.repeat(np.arange(10), 10))
    assert hundred.error == pytest.approx(90) and hundred.spread == pytest.approx(3)
    assert hundred.surely_beaten(80.9) and not hundred.surely_beaten(81.1)


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


def test_two_runs_in_one_folder(
    command: Command, drawings: Path, tmp_path: Path, locks: None
) -> None:
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print();"
        " sys.stdin.read()"
    )
    line = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        ran = command("--net", "A", *FEW, "--data", drawings, "--out", tmp_path)
        other.communicate()
    assert ran.status == 1
    assert "another run is at work in" in one_line(ran.err)
    assert not list(tmp_path.glob("*/last.safetensors"))


def test_a_folder_that_cannot_be_written(command: Command, drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    ran = command("--net", "A", *FEW, "--data", drawings, "--out", tmp_path / "file")
    assert ran.status == 1
    assert "can't write in the folder" in one_line(ran.err)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--net", "F"], "there is no net 'F'"),
        (["--recipe", "nothing.toml"], "nothing.toml"),
        (["--stages", "9"], "stages"),
        (["--set", "batch_sise=3"], "can't have 'batch_sise'"),
        (["--init", "zero"], "init"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], says: str, command: Command, tmp_path: Path
) -> None:
    ran = command(*words, "--data", tmp_path, "--out", tmp_path / "run")
    assert ran.status in (1, 2)
    assert says in ran.err
    assert not (tmp_path / "run").exists()


def test_a_page_that_cannot_be_written_does_not_end_the_training(
    train: Callable[..., subprocess.CompletedProcess[str]], drawings: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    done = train(
        "--net", "A", *SHORT, "--set=*.iterations=1", "--data", drawings, "--out", tmp_path / "run"
    )
    assert "warning: " in done.stderr and "report.html is a folder" in done.stderr
    assert "training goes on" in done.stderr
    assert (tmp_path / "run" / "weights.safetensors").exists()


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


def test_a_broken_log_does_not_block_a_checkpoint(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    words = ["--net", "A", *FEW, "--data", drawings, "--out", tmp_path / "run"]
    assert command(*words).status == 0
    log = tmp_path / "run" / A_STAGE / "log.jsonl"
    (tmp_path / "run" / A_STAGE / "weights.safetensors").unlink()  # its end is made again
    whole = log.read_bytes()
    odd = [
        b"no json",
        b"[1]",
        b'{"event": "train"}',
        b"\xff\xfe",
        bytes(4096),
        b'{"event": "train", "iteration": -1}',
    ]
    log.write_bytes(b"\n".join(odd) + b"\n" + whole + b'{"event": "tra')
    ran = command(*words)
    assert ran.status == 0, ran.err
    assert f"warning: {log}: {len(odd)} lines are no events of a stage and are dropped" in ran.err
    kept = log.read_bytes().splitlines()
    assert kept[: len(whole.splitlines())] == whole.splitlines()
    assert all(json.loads(line)["event"] for line in kept)


def test_a_full_disk_is_a_warning_a_file_until_the_last(drawings: Path, tmp_path: Path) -> None:
    """A limit of no bytes a file, which refuses what a full disk does: every file but the last is
    only missing.
    """

    words = [
        "--net",
        "A",
        *FEW,
        "--checkpoint-minutes",
        "0",
        "--data",
        drawings,
        "--out",
        tmp_path / "run",
    ]
    limits = {resource.RLIMIT_FSIZE: 0}
    done = prepared.run(words_of(words), environment(), limits=limits, timeout=HANG)
    assert done.returncode == 1
    last = f"can't write {tmp_path / 'run' / A_STAGE / 'weights.safetensors'}"
    assert last in one_line(done.stderr)
    for name in ("colours.json", "log.jsonl", "events.out", "last.safetensors", "best.safetensors"):
        lines = [line for line in done.stderr.splitlines() if name in line]
        assert len(lines) == 1, done.stderr
        assert "warning: " in lines[0] and "training goes on" in lines[0]
    assert "held-out error" in done.stderr and "validation error" in done.stderr  # it did go on
    left = {
        path.name: path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    assert left == {"lock": 0, "log.jsonl": 0}


def test_a_lock_that_is_a_link_is_refused(command: Command, drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "other")
    ran = command("--net", "A", *FEW, "--data", drawings, "--out", tmp_path / "run")
    assert ran.status == 1
    assert "its file lock is a link" in one_line(ran.err)
    assert not (tmp_path / "other").exists()
