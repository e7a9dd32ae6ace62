"""The processes that read: the same batches as without them, no fork, no /dev/shm, no silent wait,
no orphan.
"""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain import readers
from pretrain.loader import TrainingSet, read_training_set
from pretrain.readers import Batch, CentreCrops, Readers, ReadingFailed, Samples
from pretrain.recipe import read_recipe
from tests.conftest import HANG
from tests.pretrain.conftest import SHORT, command, environment, processes_of

HOW = Samples(
    seed=3,
    stage=1,
    train_scale=(36, 60),
    colour_std=0.1,
    flip=True,
    dropout=0.5,
    hidden_units=40,
    crop=32,
    box_unit=0.1,
    box_cover=0.5,
)
CPU = torch.device("cpu")


@pytest.fixture
def images(drawings: Path) -> TrainingSet:
    (drawings / "train" / "red" / "05.jpg").write_bytes(b"nothing")
    return read_training_set(drawings, read_recipe("mini", ["batch_size=8"]))


@pytest.fixture
def keys(images: TrainingSet) -> list[list[tuple[int, int]]]:
    return [
        [(epoch, int(row)) for row in images.train[i : i + 7]]
        for epoch in (0, 1)
        for i in range(0, 70, 7)
    ]


def same(ours: Batch, theirs: Batch) -> bool:
    return ours.unreadable == theirs.unreadable and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours[:6], theirs[:6], strict=True)
    )


def test_batches_are_those_of_one_process_also_when_two_are_read_at_a_time(
    images: TrainingSet, keys: list[list[tuple[int, int]]]
) -> None:
    centre = CentreCrops(40, 32)
    alone = list(Readers(0, CPU).read(HOW, images.items, keys))
    checks = list(Readers(0, CPU).read(centre, images.items, keys))
    assert sum(len(batch.unreadable) for batch in alone) == 2  # in both epochs
    assert alone[0].crops_NHWC.shape == (7, 32, 32, 3) and alone[0].kept.shape == (7, 5)
    with Readers(2, CPU) as several:
        mine: list[Batch] = []
        for i, batch in enumerate(several.read(HOW, images.items, keys)):
            mine.append(batch)
            if i in (2, 9):  # all of the check's, while batches of training wait
                theirs = list(several.read(centre, images.items, keys))
                assert all(map(same, checks, theirs)) and len(theirs) == len(checks)
            if i == 4:  # one that nobody reads to its end
                assert same(next(several.read(centre, images.items, keys)), checks[0])
        assert all(map(same, alone, mine)) and len(mine) == len(alone)


def test_a_reader_is_no_fork_and_needs_no_shared_memory(
    images: TrainingSet, keys: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise AssertionError("a process with threads was forked")

    def shared(process: Path) -> set[str]:
        """What a process maps of shared memory; torchrun's and xdist's locks may be there
        before.
        """
        return {line for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line}

    monkeypatch.setattr(os, "fork", fork)
    before = shared(Path("/proc/self"))
    with Readers(1, CPU) as several:
        batches = several.read(HOW, images.items, keys)
        next(batches)  # the next ones are being read
        process = Path("/proc") / str(several.processes[0].process.pid)
        assert b"pretrain.readers" in (process / "cmdline").read_bytes()
        assert len(list((process / "task").iterdir())) == 1
        assert "libtorch" not in (process / "maps").read_text()
        assert not shared(process) and shared(Path("/proc/self")) <= before
        for file in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # it reads images, and closes them
                assert "/dev/shm" not in os.readlink(file)


def test_training_where_dev_shm_is_small(drawings: Path, tmp_path: Path) -> None:
    small = ["unshare", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64k none /dev/shm"
    if (
        not shutil.which("unshare")
        or subprocess.run([*small, mount], capture_output=True).returncode
    ):
        pytest.skip("mounting isn't permitted here")
    words = [
        "--net",
        "A",
        *SHORT,
        "--workers",
        "2",
        "--set=*.iterations=3",
        "--data",
        drawings,
        "--out",
        tmp_path / "run",
    ]
    line = [*small, f'{mount} && exec "$@"', "sh", *command([*words, "--out", tmp_path / "run"])]
    done = subprocess.run(line, env=environment(), text=True, capture_output=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


def test_a_killed_reader_is_told(images: TrainingSet, keys: list[list[tuple[int, int]]]) -> None:
    with Readers(2, CPU) as several:
        batches = several.read(HOW, images.items, keys)
        next(batches)
        several.processes[1].process.kill()
        with pytest.raises(ReadingFailed, match=r"was killed by signal 9.*give fewer `workers`"):
            list(batches)


def test_a_stuck_reader_is_told_and_at_last_given_up(
    images: TrainingSet,
    keys: list[list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a clock of our own, a second later whenever it is looked at."""
    seconds = itertools.count()
    with Readers(1, CPU) as several:
        next(several.read(HOW, images.items, keys[:1]))
        several.processes[0].process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(readers, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        monkeypatch.setattr(readers, "WARN_SECONDS", 1.0)
        monkeypatch.setattr(readers, "LOST_SECONDS", 3.0)
        with pytest.raises(ReadingFailed, match="is the storage still there"):
            next(several.read(HOW, images.items, keys))
        said = capsys.readouterr().err
        told = [line.partition(";")[0] for line in said.splitlines()]
        assert told == [f"warning: waiting for images for {i + 1} s" for i in range(len(told))]
        assert len(told) >= 3
        assert f"process {several.processes[0].process.pid}" in said


def test_a_failure_in_a_reader_is_the_trainers(
    images: TrainingSet, keys: list[list[tuple[int, int]]]
) -> None:
    broken = Samples(
        3, 1, (60, 36), 0.1, True, 0.5, 40, 32, 0.1, 0.5
    )  # no integer lies in such a range
    with (
        Readers(1, CPU) as several,
        pytest.raises(RuntimeError, match="reads images failed: ValueError"),
    ):
        next(several.read(broken, images.items, keys))


def test_memory_for_batches_that_is_refused_is_told_to_either_side(
    images: TrainingSet, keys: list[list[tuple[int, int]]]
) -> None:
    """As where a control group has no more; a limit of bytes a file refuses the same."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(most: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    says = r"can't hand over images .*File too large.*give `workers` 0"
    try:
        limited(5000)  # a request has 1 kB, a batch 20
        with Readers(1, CPU) as several:
            limited(before[0])  # from here on only the reader's
            with pytest.raises(ReadingFailed, match=says):
                next(several.read(HOW, images.items, keys))
            limited(16)
            with pytest.raises(ReadingFailed, match=says):
                next(several.read(HOW, images.items, keys))
    finally:
        limited(before[0])


def test_readers_end_with_their_trainer_however_it_ends(
    images: TrainingSet, tmp_path: Path
) -> None:
    script = (
        "import sys, time, torch\nfrom pretrain.readers import Readers\n"
        "with Readers(2, torch.device('cpu')):\n    print(flush=True)\n    time.sleep(600)\n"
    )
    mark = f"MARK={tmp_path}"
    trainer = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**environment(), "MARK": str(tmp_path)},
        stdout=subprocess.PIPE,
    )
    assert trainer.stdout is not None
    trainer.stdout.readline()
    until = time.monotonic() + HANG
    while len(processes_of(mark)) < 3:  # for a moment after exec, a process shows no environment
        assert time.monotonic() < until
        time.sleep(0.05)
    trainer.kill()
    trainer.communicate()
    until = time.monotonic() + HANG
    while processes_of(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes_of(mark)
