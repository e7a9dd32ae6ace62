"""What an extraction will take is told by headers and by a trial."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vggfeat
from vggfeat import datasets
from vggfeat.batches import by_shape
from vggfeat.decode import read_rgb
from vggfeat.describe import description_of
from vggfeat.look import look
from vggfeat.plan import plan
from vggfeat.weights import Network

from ..conftest import Command
from .conftest import SMALL, contents

SCALES = (40, 64)


@pytest.fixture(scope="module")
def network() -> Network:
    return vggfeat.load("random:B,width=0.125,crop=32,classes=4")


def test_plan_counts_the_work(network: Network, folder: Path) -> None:
    items = datasets.load("folder", folder)
    description = description_of(network, "conv1_1", (64,), True)
    asked = plan(items, look(items), network, description, "float16")
    assert asked.images == asked.sampled == 24
    assert asked.bytes == 24 * 8 * 2
    # conv1_1 alone: 2 * 8 channels * 27 weights a pixel, image and mirror; 8 images of each shape
    pixels = 8 * (64 * 96 + 96 * 64 + 64 * 64)
    assert asked.gflop == pytest.approx(2 * 2 * 8 * 27 * pixels / 1e9)
    assert asked.seconds > 0 and asked.cheaper is None
    assert (asked.smallest_sides, asked.enlarged) == ((40, 40, 48), {64: 24})
    # of several layers: one pass to the last of them, and all of their values
    three = description_of(network, ("pool1", "conv1_2", "conv1_1"), (64,), True)
    deepest = description_of(network, "pool1", (64,), True)
    several, alone = (plan(items, look(items), network, d, "float16") for d in (three, deepest))
    assert (several.bytes, several.gflop) == (3 * asked.bytes, alone.gflop)
    # 24 million pixels at Q = 64: not described
    Image.new("L", (1, 6000)).save(folder / "red" / "strip.png")
    items = datasets.load("folder", folder)
    again = plan(items, look(items), network, description, "float16")
    assert (again.images, again.sampled) == (25, 24) and again.gflop == pytest.approx(
        asked.gflop * 25 / 24
    )


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("new", [0.0, 0.2])
def test_plan_expects_what_the_whole_takes_by_a_part_of_it(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, new: float
) -> None:
    """By a clock of our own: a batch takes alpha, one second for 10,000 pixels, and more if its
    shape is new.
    """
    (tmp_path / "all").mkdir()
    sides = np.random.default_rng(0).integers(0, 8, 120) ** 2
    for i, side in enumerate(sides):
        Image.new("RGB", (40 + int(side), 40)).save(tmp_path / "all" / f"{i:03d}.png")
    clock, described = 0.0, 0
    seen: set[tuple[int, ...]] = set()

    def describe(
        network: Network, batch_NHWC: torch.Tensor, layer: str, mirror: bool
    ) -> torch.Tensor:
        nonlocal clock, described
        shape = tuple(batch_NHWC.shape)
        clock += alpha + batch_NHWC[..., 0].numel() / 10_000 + (0 if shape in seen else new)
        seen.add(shape)
        described += shape[0]
        return torch.zeros(shape[0], 4)

    monkeypatch.setattr("vggfeat.plan.describe", describe)
    monkeypatch.setattr("vggfeat.plan.time", SimpleNamespace(perf_counter=lambda: clock))
    items = datasets.load("folder", tmp_path)
    description = description_of(network, None, SCALES, False)
    expected = plan(items, look(items), network, description, "float32", batch_size=1).seconds
    assert described < 2 * 120  # each at two scales, twice: less than half of them
    clock = 0.0
    seen.clear()
    compute = functools.partial(describe, network, layer="fc7", mirror=False)
    for _ in by_shape(
        lambda i: read_rgb(items.source(i)),
        look(items).shapes.get,
        range(120),
        SCALES,
        compute,
        network.device,
        batch_size=1,
    ):
        pass
    assert clock > 90
    assert expected == pytest.approx(clock, rel=0.05)


def test_dry_run_writes_nothing(command: Command, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "feats.h5"
    line = ("extract", "--dataset", "folder", "--root", folder, *SMALL, "--out", out, "--dry-run")
    before = contents(tmp_path)
    ran = command(*line)
    assert (ran.status, ran.err) == (0, "") and contents(tmp_path) == before
    assert "plan" in ran.out and "0.1 MB" in ran.out and "cpu in float32" in ran.out
    ran = command(*line, "--overwrite", "--json", tmp_path / "plan.json", "--no-mirror")
    once = json.loads((tmp_path / "plan.json").read_text())
    assert (once["images"], once["sampled"], once["bytes"]) == (24, 24, 24 * 2 * 512 * 4)
    command(*line, "--overwrite", "--json", tmp_path / "plan.json")
    twice = json.loads((tmp_path / "plan.json").read_text())
    assert twice["gflop"] == pytest.approx(2 * once["gflop"]) and once["gflop"] > 0
    assert not out.exists()
    out.write_bytes(b"")
    for refused, why in ((out, "exists; give --overwrite"), (tmp_path / "none" / "f.h5", "folder")):
        told = command(*(refused if word == out else word for word in line))
        assert told.status == 0 and "expected time" in told.out
        assert "without --dry-run this would be refused: " in told.err and why in told.err
    said = command(*line, "--overwrite", "--limit", 3).err_lines
    # what the library says of it, in the option's name
    assert "--limit 3 takes the first images, of 1 of the 2 classes" in said
    assert once["smallest_sides"] == [40, 40, 48] and once["enlarged"] == {"32": 0, "48": 16}
    assert "24 of 2 classes; 3 random splits of 16 train, 4 val, 4 test" in ran.out
    assert "40 to 48 pixels, median 40; enlarged, of the 24: 16 at Q = 48" in ran.out
