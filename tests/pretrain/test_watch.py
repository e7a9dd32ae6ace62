"""A stage's log, its signals, and the watch for a net that doesn't learn."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pretrain import watch
from pretrain.checkpoint import State
from pretrain.recipe import read_recipe
from pretrain.watch import Chance, Log, stop_on_signals
from tests.conftest import Command
from tests.pretrain.conftest import A_STAGE, FEW, training


@pytest.fixture
def command(run_main: Command) -> Command:
    return training(run_main)


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


@pytest.mark.parametrize("iteration", [0, 3])
def test_a_log_is_never_written_into_a_pipe(
    iteration: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # its reader would be waited for, in a wait that no signal ends
    os.mkfifo(tmp_path / "log.jsonl")
    with Log(tmp_path, "A-36", iteration, 10) as log:
        log("train", iteration + 1, loss=1.0)
    assert "warning: " in (err := capsys.readouterr().err) and "log.jsonl" in err


def test_an_ignored_signal_stays_ignored() -> None:
    """As a shell starts what it runs in the background: another command's Ctrl-C is not meant for
    it.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop.signal and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_time_left_is_reckoned_without_what_comes_but_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    own = SimpleNamespace(monotonic=lambda: now, time=lambda: now)
    monkeypatch.setattr(watch, "time", own)
    with Log(tmp_path, "A-36", 0, 100) as log:
        now = 30.0
        log.leave_out(20.0)
        log.progress(10, 2.0, 0.01, 64.0, 0.567, 0.01)
    assert capsys.readouterr().err == (
        "A-36: iteration 10/100, loss 2.0000, learning rate 0.01, 64 images/s, 57 % of the matrix"
        " rate, 1 % waiting for data, 90.0 s left\n"
    )
