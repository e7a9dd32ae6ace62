"""A chain of stages: each from the weights of the one before, in a folder that no other run has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pretrain import recipe
from tests.conftest import Command, Nets
from tests.pretrain.conftest import (
    A_STAGE,
    D_STAGE,
    FEW,
    SHORT,
    Train,
    evaluating,
    layers,
    one_line,
    training,
)
from vggfeat import cli
from vggfeat.images import Preprocessing
from vggfeat.sources import load
from vggfeat.vgg import VGG
from vggfeat.weights import save_weights


@pytest.fixture
def command(run_main: Command) -> Command:
    return training(run_main)


# The first of two processes writes a stage's weights, which the next one starts from, when the
# second waits for it at the stage's end, and isn't ahead.
SLOW = """
import time
from pathlib import Path
from pretrain import stages, train, trainer
from vggfeat import ranks, terminal

here = Path(__file__).parent
run, set_weights, write = trainer.Trainer.run, stages.set_weights, trainer.write_weights

def ended(self, stop):
    finished = run(self, stop)
    if self.ranks.rank:
        ranks.WARN_SECONDS, ranks.say = 0.0, lambda text: (here / "waits").touch()
    return finished

def next_stage(run, number, net):
    if run.ranks.rank and number:
        (here / "ahead").touch()
    return set_weights(run, number, net)

def slow(path, trainer):
    while not trainer.stage_number and not (here / "waits").exists():
        assert not (here / "ahead").exists()
        time.sleep(0.01)
    write(path, trainer)

trainer.Trainer.run, stages.set_weights, trainer.write_weights = ended, next_stage, slow
terminal.run(train.app, "pretrain.train")
"""


def test_processes_wait_for_the_weights_of_the_stage_before(
    train: Train, drawings: Path, tmp_path: Path
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    few = ("--stages", "1-2", "--set=*.iterations=1", "--set=held_out=0", "--data", drawings)
    out = tmp_path / "run"
    train("--net", "D", *FEW, *few, "--out", out, processes=2, script=script)
    assert (out / D_STAGE / "weights.safetensors").exists()


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
    numbers = (Path(recipe.__file__).parent / "recipes" / "mini.toml").read_text()
    (tmp_path / "own.toml").write_text(numbers)  # of another name
    for net, *more in (
        ("E",),
        ("A",),
        ("E", "--dry-run"),
        ("C", "--recipe", tmp_path / "own.toml", "--dry-run"),
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


def test_a_lock_that_is_a_link_is_refused(command: Command, drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "other")
    ran = command("--net", "A", *FEW, "--data", drawings, "--out", tmp_path / "run")
    assert ran.status == 1
    assert "its file lock is a link" in one_line(ran.err)
    assert not (tmp_path / "other").exists()


# a net of a tenth of the width, fine-tuned for three small steps a stage
TUNE = [
    *("--net", "A", "--recipe", "finetune", "--device", "cpu", "--workers", "0"),
    *("--precision", "float32", "--set=width=0.1", "--set=crop=32", "--set=batch_size=16"),
    *("--set=*.train_scale=[36,36]", "--set=*.iterations=3", "--set=*.learning_rate=1e-5"),
]
FC8_STAGE = "A-36-fc8"
MEAN = (100.0, 110.0, 120.0)


def save_start(path: Path, module: VGG, classes: Sequence[str] = ()) -> Path:
    """A net that learned BGR minus another mean than that of any images here."""
    order = Preprocessing(MEAN[::-1], channel_order="BGR")
    save_weights(path, module, order, classes=list(classes), train_scale="36")
    return path


def test_a_net_is_fine_tuned_on_other_classes(
    command: Command, drawings: Path, tmp_path: Path, run_main: Command, he: Nets
) -> None:
    start = save_start(
        tmp_path / "start.safetensors", he("A", num_classes=3, width=0.1, crop=32), ["a", "b", "c"]
    )
    out = tmp_path / "run"
    ran = command(*TUNE, "--from", start, "--data", drawings, "--out", out)
    assert ran.status == 0, ran.err
    assert (
        f"A-36-fc8: all layers but fc8 from {start} (net A); the others random (standard deviation"
        " 0.01); only fc8 learns"
    ) in ran.err
    assert f"A-36: all layers from {out / FC8_STAGE / 'weights.safetensors'}" in ran.err
    assert "warning" not in ran.err  # the mean is theirs

    first, last = (layers(out / s / "weights.safetensors") for s in (FC8_STAGE, A_STAGE))
    theirs = layers(start)
    # the start's order of channels is in conv1_1
    assert torch.equal(first["conv1_1"], theirs["conv1_1"].flip(1))
    same = [name for name in first if name not in ("conv1_1", "fc8")]
    assert all(torch.equal(first[name], theirs[name]) for name in same)
    assert first["fc8"].shape[0] == 2 and 0.008 < first["fc8"].std() < 0.012
    assert not any(torch.equal(first[name], last[name]) for name in last)
    momenta = safetensors.torch.load_file(out / FC8_STAGE / "last.safetensors")
    kept = [name for name in momenta if name.startswith("momentum.")]
    assert kept == ["momentum.classifier.6.bias", "momentum.classifier.6.weight"]

    tuned = load(str(out / "weights.safetensors"), device="cpu", precision="float32")
    assert tuned.classes == ["blue", "red"]
    assert tuned.preprocessing == Preprocessing(MEAN)
    given = ("--weights", out / "weights.safetensors")
    tested = (*given, "--data", drawings, "--scales", "36", "--mode", "centre", "--json")
    assert evaluating(run_main)(*tested, tmp_path / "errors.json").status == 0
    [net] = json.loads((tmp_path / "errors.json").read_text())["rows"][0]["nets"]
    assert (net["recipe"], net["stands_for"]) == ("finetune", "")
    described = ("extract", *given, "--dataset", "imagenet", "--root", drawings, "--scales", "36")
    assert run_main(cli.main, *described, "--out", tmp_path / "own.h5").status == 0

    # a checkpoint of one start isn't another's
    other = save_start(
        tmp_path / "other.safetensors", he("A", num_classes=2, width=0.1, crop=32), ["b", "a"]
    )
    ran = command(*TUNE, "--from", other, "--data", drawings, "--out", out)
    assert ran.status == 1 and "has another start" in one_line(ran.err)


def test_of_the_same_classes_the_last_layer_goes_on_too(
    command: Command, drawings: Path, tmp_path: Path, he: Nets
) -> None:
    start = save_start(
        tmp_path / "start.safetensors", he("A", num_classes=2, width=0.1, crop=32), ["blue", "red"]
    )
    words = (*TUNE, "--data", drawings, "--out", tmp_path / "run", "--stages", "1")
    ran = command(*words, "--from", start)
    assert ran.status == 0, ran.err
    assert f"A-36-fc8: all layers from {start} (net A); only fc8 learns" in ran.err


def test_fc_layers_that_a_start_lacks_are_new_where_they_learn(
    command: Command, drawings: Path, tmp_path: Path
) -> None:
    start = save_start(tmp_path / "start.safetensors", VGG("A", 2, 0.1, 32, until="pool5"))
    words = (*TUNE, "--data", drawings, "--out", tmp_path / "run", "--stages", "1")
    ran = command(*words, "--from", start)
    assert ran.status == 1
    assert (
        f"stage A-36-fc8: only fc8 would learn, but fc6, fc7 of {start} can't be had, and would"
        " stay random: --set STAGE.learn=all or fc"
    ) in one_line(ran.err)
    ran = command(*words, "--from", start, "--set=A-256-512-fc8.learn=fc")
    assert ran.status == 0, ran.err
    said = "A-36-fc: all layers but fc6, fc7, fc8 from"
    assert said in ran.err and "only fc6, fc7, fc8 learn" in ran.err


def test_what_cannot_be_fine_tuned_is_told_before_the_work(
    command: Command, drawings: Path, tmp_path: Path, he: Nets
) -> None:
    wide = save_start(
        tmp_path / "wide.safetensors", he("A", num_classes=3, width=0.2, crop=32), ["a", "b", "c"]
    )
    deep = save_start(
        tmp_path / "deep.safetensors", he("B", num_classes=3, width=0.1, crop=32), ["a", "b", "c"]
    )
    out = tmp_path / "run"
    for more, says in (
        ((), "stage A-36-fc8: only fc8 would learn, and the other layers would stay random: give"),
        (("--from", wide), "theirs: width 0.2, crop 32"),
        (("--from", deep), "net A can start from A, not from net B"),
    ):
        ran = command(*TUNE, *more, "--data", drawings, "--out", out)
        assert ran.status == 1 and says in one_line(ran.err), ran.err
    for split in ("train", "val"):
        shutil.rmtree(drawings / split / "red")
    ran = command(*TUNE, "--from", wide, "--data", drawings, "--out", out)
    assert ran.status == 1 and f"{drawings} has one class, blue" in one_line(ran.err)
    assert not out.exists()
