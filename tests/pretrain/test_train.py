"""The command, on generated images: what it leaves behind, what it refuses, and in which words."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest

from pretrain.checkpoint import read_state
from pretrain.colour import Colours
from pretrain.init import FROM_A
from pretrain.posteriors import how_trained
from pretrain.recipe import history_of
from tests import prepared
from tests.conftest import HANG, Command
from tests.pretrain.conftest import (
    A_STAGE,
    D_STAGE,
    FEW,
    JITTER,
    environment,
    layers,
    one_line,
    training,
    words_of,
)
from vggfeat import cli
from vggfeat.sources import load
from vggfeat.store import open_features


@pytest.fixture
def command(run_main: Command) -> Command:
    return training(run_main)


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
