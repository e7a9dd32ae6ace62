"""A run that is killed, stopped or refused by the disk goes on to the same net, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pretrain.checkpoint import read_state
from pretrain.recipe import Recipe, chain
from pretrain.standing import INTERRUPTED, standing_of
from pretrain.train import app
from tests import prepared
from tests.conftest import HANG, Command
from tests.pretrain.conftest import SHORT, command, environment, processes_of, words_of
from vggfeat import terminal

Train = Callable[..., subprocess.CompletedProcess[str]]
Running = subprocess.Popen[bytes] | prepared.Process
KILLS = int(os.environ.get("KILLS", "3"))  # 20 for the figure in docs/results.md
TERMS = int(os.environ.get("TERMS", "2"))  # signals to a group; 200 for the figure in the docs
# A and then D from A, each ending in the middle of an epoch, a checkpoint after every iteration
RUN = [
    "--net",
    "D",
    "--stages",
    "1-2",
    *SHORT,
    "--set=batch_size=8",
    "--micro-batch",
    "8",  # whatever memory is free: sums of other parts are rounded otherwise
    f"--set=*.epochs={max(2.5, KILLS / 2 + 0.5)}",  # the more kills, the longer
    "--checkpoint-minutes",
    "0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, train: Train) -> tuple[list[object], Path]:
    """A run's arguments without --out, and the folder of one that nobody interrupted."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("resume")
    for c in range(3):
        for i in range(16):
            folder = root / "data" / "train" / f"n{c}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([c, i]).integers(0, 256, (40, 44, 3), np.uint8)
            pixels[..., c] //= 3
            Image.fromarray(pixels).save(folder / f"{i}.png")
    arguments = [*RUN, "--data", root / "data", "--colours", root / "colours.json"]
    (root / "colours.json").write_text(
        '{"mean": [100, 100, 100], "covariance": [[0.08, 0, 0], [0, 0.07, 0], [0, 0, 0.06]],'
        ' "images": 1, "unreadable": {}, "training_set": ""}'
    )
    train(*arguments, "--out", root / "whole")
    return arguments, root / "whole"


def losses(folder: Path) -> list[tuple[int, float]]:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(event["iteration"], event["loss"]) for event in events if event["event"] == "train"]


def content(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """A safetensors file's metadata and its tensors' bytes: the order of its header's keys is not
    determined.
    """
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


def assert_same(out: Path, whole: Path) -> None:
    assert content(out / "weights.safetensors") == content(whole / "weights.safetensors")
    for stage in ("A-36", "D-36"):
        assert losses(out / stage) == losses(whole / stage)
        iterations = read_state(out / stage / "last.safetensors")[0].iteration
        assert len(losses(out / stage)) == iterations > 10
        for name in ("weights.safetensors", "best.safetensors"):
            assert content(out / stage / name) == content(whole / stage / name)
        # the momentum, too; the state beside it counts seconds
        assert (
            content(out / stage / "last.safetensors")[1]
            == content(whole / stage / "last.safetensors")[1]
        )
        assert not list((out / stage).glob("*.partial"))


def test_sigkill_at_random_moments(run: tuple[list[object], Path], tmp_path: Path) -> None:
    arguments, whole = run
    rng, killed, round_ = random.Random(5), 0, 0
    while True:
        out = tmp_path / str(round_)
        with open(tmp_path / "stderr", "w") as told:
            process = prepared.start(
                words_of([*arguments, "--out", out]), environment(), stderr=told
            )
        if killed < KILLS:
            written = _checkpoints(out)
            while process.poll() is None and _checkpoints(out) == written:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.2)  # an iteration and its checkpoint take some 30 ms
        if killed < KILLS and process.poll() is None:
            process.kill()
            process.wait()
            killed += 1
            continue
        assert process.wait(HANG) == 0, (tmp_path / "stderr").read_text()[-2000:]
        assert_same(out, whole)
        if killed == KILLS:
            break
        round_ += 1  # a run that was faster than this process


def _checkpoints(out: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(out.glob("*/last.safetensors"))]


SIGNALLED = """
import os, time
from pretrain import train, trainer
from vggfeat import terminal
stage, iteration, number = os.environ["AT"].split()
step = trainer.Trainer.step
def signalled(self, batch, images):
    if (self.stage.name, self.state.iteration, self.ranks.rank) == (stage, int(iteration), 0):
        os.kill(os.getpid(), int(number))
        while not self.stop.signal:
            time.sleep(0.01)
    return step(self, batch, images)
trainer.Trainer.step = signalled
terminal.run(train.app, "pretrain.train")
"""


def signalled_at(
    arguments: list[object], at: str, tmp_path: Path, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """A run whose first process gets a signal in the midst of an iteration. at: the stage, the
    iteration, which signal.
    """
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    words = words_of(arguments, tmp_path / "signalled.py")
    return prepared.run(words, {**environment(), "AT": at}, processes, timeout=HANG)


def test_signals_save_and_leave(
    run: tuple[list[object], Path], tmp_path: Path, train: Train
) -> None:
    arguments, whole = run
    arguments = [*arguments, "--out", tmp_path / "stopped"]
    for number, at in ((signal.SIGTERM, "A-36 7"), (signal.SIGINT, "D-36 4")):
        done = signalled_at(arguments, f"{at} {number:d}", tmp_path)
        assert done.returncode == 128 + number
        assert "stopped and saved at iteration" in done.stderr
        assert "Traceback" not in done.stderr
        end = standing_of(tmp_path / "stopped").end
        assert end is not None and (end.how, end.stage) == (INTERRUPTED, at.split()[0])
        page = (tmp_path / "stopped" / "report.html").read_text()
        assert f"interrupted at {end.iteration} of " in page
    done = train(*arguments)
    told = [
        line
        for line in done.stderr.splitlines()
        if "random" in line or "done" in line or "going" in line
    ]
    assert told == ["A-36: done before", "D-36: going on from iteration 5"]
    assert_same(tmp_path / "stopped", whole)


def test_a_line_of_the_log_is_the_mean_of_the_iterations_since_the_last(
    run: tuple[list[object], Path], tmp_path: Path, train: Train
) -> None:
    """Also where a run goes on with lines at other iterations."""
    arguments = [*run[0], "--stages", "1", "--out", tmp_path / "run", "--log-every"]
    signalled_at([*arguments, "5"], f"A-36 5 {signal.SIGTERM:d}", tmp_path)
    train(*arguments, "4")
    each, lines = dict(losses(run[1] / "A-36")), dict(losses(tmp_path / "run" / "A-36"))
    assert lines[5] == pytest.approx(sum(each[i] for i in range(1, 6)) / 5)
    assert lines[8] == pytest.approx(sum(each[i] for i in range(6, 9)) / 3)


def gone(folder: Path, seconds: float = HANG) -> bool:
    """Whether no process of a run in this folder is left, readers included, after at most so many
    seconds.
    """
    until = time.monotonic() + seconds
    while (left := processes_of(f"RUN={folder}")) and time.monotonic() < until:
        time.sleep(0.05)
    return not left


def begun(
    arguments: list[object], out: Path, processes: int = 1, script: Path | None = None
) -> Running:
    """A run in a process group of its own, as a scheduler starts it; several under torchrun. What
    it says is in `OUT.stderr`.
    """
    arguments, marked = [*arguments, "--out", out], {**environment(), "RUN": str(out)}
    with open(f"{out}.stderr", "w") as told:
        if processes == 1:
            return prepared.start(words_of(arguments, script), marked, stderr=told, session=True)
        line = command(arguments, processes, script)
        return subprocess.Popen(line, env=marked, stderr=told, start_new_session=True)


def signalled(process: Running, number: signal.Signals, out: Path) -> str:
    """What a run says whose whole group gets a signal."""
    os.killpg(process.pid, number)
    Path(f"{out}.signalled").touch()
    process.wait(HANG)
    stderr = Path(f"{out}.stderr").read_text()
    assert "reads images" not in stderr, stderr
    return stderr


def test_signals_to_the_group_save_and_leave(
    run: tuple[list[object], Path], tmp_path: Path
) -> None:
    """As torchrun, slurm, systemd and a terminal send them: readers get them, and torchrun sends
    its own besides.
    """
    out, rng, before = tmp_path / "run", random.Random(3), 0
    arguments = [
        *run[0],
        "--stages",
        "1",
        "--workers",
        "2",
        "--set=*.epochs=100000",
        "--set=patience=1000000",
    ]
    arguments += ["--set=held_out=0.2", "--set=*.learning_rate=1e-5", "--checkpoint-minutes", "5"]
    for i in range(TERMS):
        processes, number = ((1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGINT))[i % 3]
        process = begun(arguments, out, processes)
        log = out / "A-36" / "log.jsonl"
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size <= size):
            time.sleep(0.01)
        # in an iteration, or in one of the checks, of which each sixth has one
        time.sleep(rng.random())
        stderr = signalled(process, number, out)
        if processes == 1:  # torchrun's own status is another
            assert process.returncode == 128 + number, (i, stderr)
        said = re.search(r"stopped and saved at iteration (\d+)", stderr)
        assert said, (i, stderr)
        state, _ = read_state(out / "A-36" / "last.safetensors")
        assert state.iteration == int(said[1]) > before, (i, stderr)
        assert all(len(tensor) for tensor in content(out / "A-36" / "last.safetensors")[1].values())
        assert gone(out), i
        before = state.iteration


@pytest.mark.parametrize(
    ("slow", "number", "says"),
    [
        ("loader.read_training_set", signal.SIGINT, "stopped; what is finished is kept"),
        ("stages.measure", signal.SIGTERM, "stopped; what is finished is kept"),
        ("readers.CentreCrops.read", signal.SIGTERM, "stopped and saved at iteration 5"),
        ("stages.set_weights", signal.SIGTERM, "stopped; what is finished is kept"),
    ],
)
def test_signals_at_any_time_leave_well(
    slow: str,
    number: signal.Signals,
    says: str,
    run: tuple[list[object], Path],
    tmp_path: Path,
    train: Train,
) -> None:
    marker, out = tmp_path / "there", tmp_path / "run"
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, time\nfrom pretrain import loader, readers, stages, train\nfrom vggfeat"
        f" import terminal\nreal = {slow}\ndef slow(*arguments):\n   "
        f" pathlib.Path({str(marker)!r}).touch()\n    while not"
        f" pathlib.Path('{out}.signalled').exists():\n        time.sleep(0.01)\n    return"
        f" real(*arguments)\n{slow} = slow\nterminal.run(train.app, 'pretrain.train')\n"
    )
    colours = run[0].index("--colours")
    arguments = [*run[0][:colours], *run[0][colours + 2 :], "--set=held_out=0.1", "--workers", "0"]
    process = begun(arguments, out, script=script)
    while process.poll() is None and not marker.exists():
        time.sleep(0.01)
    stderr = signalled(process, number, out)
    assert process.returncode == 128 + number, stderr
    assert says in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert gone(out)
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    if "CentreCrops" in slow:  # the check that was left is made first
        train(*arguments, "--out", out)
        log = [json.loads(line) for line in (out / "A-36" / "log.jsonl").read_text().splitlines()]
        places = [(event["iteration"], event["event"]) for event in log]
        assert (
            places[places.index((5, "train")) + 1] == (5, "held_out")
            and places.count((5, "held_out")) == 1
        )
        assert [i for i, event in places if event == "train"] == list(
            range(1, log[-1]["iteration"] + 1)
        )


@pytest.mark.skipif("HANGS" not in os.environ, reason="HANGS=50, for an hour")
def test_torchrun_trainings_of_many_epochs_never_hang(
    run: tuple[list[object], Path], tmp_path: Path
) -> None:
    """A reader that was forked beside gloo's threads deadlocked in two of five such runs."""
    arguments = [
        *run[0],
        "--stages",
        "1",
        "--workers",
        "2",
        "--set=held_out=0.2",
        "--checkpoint-minutes",
        "5",
    ]
    arguments += ["--set=patience=1000000", "--set=*.learning_rate=1e-5"]
    arguments += ["--set=*.epochs=80"]
    for i in range(int(os.environ["HANGS"])):
        out = tmp_path / str(i)
        process = begun(arguments, out, 2)
        log, size, since = out / "A-36" / "log.jsonl", 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.1)
            if log.exists() and log.stat().st_size != size:
                size, since = log.stat().st_size, time.monotonic()
            if time.monotonic() - since > HANG:  # a line of this log takes some 30 ms
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"run {i} hangs after {size} bytes of its log")
        assert process.returncode == 0, Path(f"{out}.stderr").read_text()
        assert gone(out), i


def test_another_number_of_processes_goes_on(
    run: tuple[list[object], Path], tmp_path: Path, train: Train
) -> None:
    arguments = [*run[0], "--precision", "float64"]
    whole, out = tmp_path / "whole", tmp_path / "moved"
    train(*arguments, "--out", whole)
    signalled_at([*arguments, "--out", out], f"A-36 7 {signal.SIGTERM:d}", tmp_path, processes=2)
    assert read_state(out / "A-36" / "last.safetensors")[0].iteration > 0
    assert not (out / "weights.safetensors").exists()
    train(*arguments, "--out", out)
    for stage in ("A-36", "D-36"):
        for (i, ours), (j, theirs) in zip(losses(out / stage), losses(whole / stage), strict=True):
            assert i == j
            assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_full_disk_leaves_the_checkpoint_before_it(
    run: tuple[list[object], Path], tmp_path: Path, train: Train
) -> None:
    arguments, whole = run
    out = tmp_path / "full"
    shutil.copytree(whole / "A-36", out / "A-36")
    before = (out / "A-36" / "last.safetensors").read_bytes()
    (out / "A-36" / "weights.safetensors").unlink()  # the stage's end is to be written again
    assert read_state(out / "A-36" / "last.safetensors")[0].finished
    # as a full disk, this refuses to let a file grow
    limits = {resource.RLIMIT_FSIZE: len(before) // 2}
    words = words_of([*arguments, "--out", out, "--stages", "1"])
    done = prepared.run(words, environment(), limits=limits, timeout=HANG)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("pretrain.train: can't write")
    assert "Traceback" not in done.stderr
    assert (out / "A-36" / "last.safetensors").read_bytes() == before
    assert not list((out / "A-36").glob("*.partial"))
    train(*arguments, "--out", out)
    assert_same(out, whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--set=width=0.2"], "was made with width 0.1, now 0.2"),
        (["--set=*.learning_rate=0.5"], "was made with learning_rate 0.01, now 0.5"),
        (["--seed=1"], "was made with seed 0, now 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    change: list[str], says: str, run: tuple[list[object], Path], run_main: Command
) -> None:
    arguments, whole = run
    kept = (whole / "A-36" / "last.safetensors").read_bytes()
    main = functools.partial(terminal.run, app, "python -m pretrain.train")
    ran = run_main(main, *arguments, *change, "--out", whole, "--stages", "1")
    assert ran.status == 1 and says in ran.err
    assert (whole / "A-36" / "last.safetensors").read_bytes() == kept


def test_another_column_of_table_1_is_no_other_run(
    run: tuple[list[object], Path], run_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage says which nets have it: by default all that there are."""

    def with_another(*arguments: Any) -> Recipe:
        found = chain(*arguments)
        stages = tuple(replace(stage, nets=stage.nets[:-1]) for stage in found.stages)
        return replace(found, stages=stages)

    monkeypatch.setattr("pretrain.train.chain", with_another)
    arguments, whole = run
    main = functools.partial(terminal.run, app, "python -m pretrain.train")
    ran = run_main(main, *arguments, "--out", whole, "--stages", "1")
    assert ran.status == 0 and "A-36: done before" in ran.err, ran.err
