"""What a training will take: of whole batches and the checks, in the memory that there is."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain import plan, trainer
from pretrain.loader import read_training_set
from pretrain.readers import Batch, Key, Readers, Samples
from pretrain.recipe import chain, read_recipe
from pretrain.trainer import Trainer
from tests.conftest import Command
from tests.pretrain.conftest import A_STAGE, D_STAGE, FEW, JITTER, one_line, training
from vggfeat.datasets import Items
from vggfeat.ranks import Ranks


@pytest.fixture
def command(run_main: Command) -> Command:
    return training(run_main)


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
    """By a clock of our own: a step takes 1/128 s an image, the first of its size a minute more;
    reading takes 1/4 s an image.
    """
    cpu, clock = torch.device("cpu"), 0.0
    sizes: list[tuple[int, float]] = []
    real = Readers.read

    def step(self: Trainer, batch: Batch, images: float) -> torch.Tensor:
        nonlocal clock
        size = len(batch.labels), images
        clock += images / 128 + (0 if size in sizes else 60)
        sizes.append(size)
        return torch.zeros(())

    def read(
        self: Readers,
        samples: Samples,
        items: Items,
        schedule: list[list[Key]],
        corners: Callable[[int], np.ndarray],
    ) -> Iterator[Batch]:
        nonlocal clock
        batches = real(self, samples, items, schedule, corners)
        for keys, batch in zip(schedule, batches, strict=True):
            clock += len(keys) / 4
            yield batch

    numbers = ("width=0.1", "crop=32", "batch_size=16", "held_out=0.1", "*.iterations=7")
    recipe = chain(
        read_recipe("mini", [*numbers, "*.train_scale=[36,36]", "A-112.learn=fc"], "A"), "A"
    )
    recipe = replace(recipe, stages=(recipe.stages[0], replace(recipe.stages[0], learn="all")))
    data, machine = read_training_set(drawings, recipe), trainer.Machine(micro_batch=4, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        patch.setattr(Readers, "read", read)
        patch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: clock))
        found = plan.trial(recipe, 0, plan.net_of(recipe, 0, 2), data, Ranks(cpu), machine)
    # a batch as in training, of images that were read; what warms up isn't counted
    assert sizes[-1] == (16, 16) and found == (1 / 128, 1 / 4)

    monkeypatch.setattr(plan, "trial", lambda *_: (0.5, 0.25))
    monkeypatch.setattr(plan, "rate_of_device", lambda *_: 1e9)
    for workers, of_net, waits in ((0, 0.75, True), (1, 0.5, False)):
        monkeypatch.setattr("vggfeat.ranks.CORES", 64)
        fc, all_ = plan.plan(recipe, range(2), data, Ranks(cpu), replace(machine, workers=workers))
        # two epochs' checks, validation
        assert fc.seconds == pytest.approx((7 * 16 + 2 * 8 + 8) * of_net)
        forward = 0.5 / 3 + 0.25 if not workers else 0.25
        assert all_.seconds == pytest.approx(7 * 16 * of_net + (2 * 8 + 8) * forward)
        assert (fc.waits, all_.waits) == (waits, waits)
        # of a device of a GFLOP/s, which reading leaves as it is
        for stage in (fc, all_):
            assert stage.share == pytest.approx(stage.gflop / (7 * 16) / 0.5)
        assert fc.share and all_.share == pytest.approx(3 * fc.share)
    # as many threads as cores: reading takes from the net
    monkeypatch.setattr("vggfeat.ranks.CORES", torch.get_num_threads())
    pace = plan.Pace(0.25, Ranks(cpu), machine)
    assert pace.seconds(0.5) == pytest.approx(0.5 + 0.25 / torch.get_num_threads())


def test_a_system_that_does_not_tell_its_free_memory(
    command: Command, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr(plan, "open", missing, raising=False)
    words = ["--net", "A", *FEW, "--stages", "1", "--data", drawings, "--out", tmp_path / "run"]
    assert "/proc/meminfo'): give --micro-batch" in one_line(command(*words).err)
    assert command(*words, "--micro-batch", "8").status == 0
