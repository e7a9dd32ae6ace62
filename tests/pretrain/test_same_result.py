"""One process or many, whole batches or accumulated ones: the same losses and weights (Sect. 3.1,
last paragraph).

Twenty iterations on real photographs with every augmentation and dropout on. The same comparison
must notice when dropout or the order isn't keyed: then it doesn't compare nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pretrain.checkpoint import read_state
from tests.pretrain.conftest import SHORT, write_boxes

Train = Callable[..., subprocess.CompletedProcess[str]]
STEPS = ["--net", "D", "--init", "glorot", *SHORT]
# float64 rounds at 1e-16: losses, weights and momentum, tensor by tensor
TOLERANCE = 1e-9
# float32 rounds at 6e-8, and on some processors that turns a ReLU or a max-pool the other way: one
# step's gradient then differs by a per cent in the layers before it. So: losses, and the weights
# taken together, at a calm rate.
TOLERANCE_FLOAT32, CALM = 1e-4, "--set=*.learning_rate=1e-3"
CALM_64 = ("--precision", "float64", CALM)
# name -> (processes, images of a pass)
WAYS = {"one process": (1, 32), "two": (2, 16), "four": (4, 8), "accumulated": (1, 8)}

# the losses of a run, and the tensors of its last checkpoint
Result = tuple[list[float], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def start(photos: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the stage before, and the colours measured."""
    out = tmp_path_factory.mktemp("start")
    train(*STEPS, "--stages", "D-36", "--set=*.iterations=1", "--data", photos, "--out", out)
    return out


def steps(
    train: Train,
    photos: Path,
    start: Path,
    out: Path,
    way: str,
    *more: object,
    iterations: int = 20,
    script: Path | None = None,
) -> Result:
    processes, micro_batch = WAYS[way]
    arguments = [
        *STEPS,
        "--stages",
        "D-36-64",
        "--from",
        start / "D-36" / "weights.safetensors",
        "--out",
        out,
    ]
    arguments += [
        "--data",
        photos,
        "--colours",
        start / "colours.json",
        "--micro-batch",
        micro_batch,
        f"--set=*.iterations={iterations}",
        *more,
    ]
    train(*arguments, processes=processes, script=script)
    folder = out / "D-36-64"
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert read_state(folder / "last.safetensors")[0].iteration == iterations
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert len(losses) == iterations
    # the checkpoint, not the weights file: it has the training precision, and the momentum
    return losses, safetensors.torch.load_file(folder / "last.safetensors")


def difference(one: Result, other: Result) -> float:
    """The largest relative difference of the losses and of each tensor's norm."""
    losses = [abs(a - b) / abs(a) for a, b in zip(one[0], other[0], strict=True)]
    assert one[1].keys() == other[1].keys()
    return max(
        *losses, *(float((one[1][k] - other[1][k]).norm() / one[1][k].norm()) for k in one[1])
    )


def test_one_two_and_four_processes_and_accumulation(
    photos: Path, train: Train, start: Path, tmp_path: Path
) -> None:
    results = {
        way: steps(train, photos, start, tmp_path / way, way, "--precision", "float64")
        for way in WAYS
    }
    one = results["one process"]
    assert one[0][0] != one[0][-1]
    for way, result in results.items():
        assert difference(one, result) <= TOLERANCE, way


def test_the_same_in_float32(photos: Path, train: Train, start: Path, tmp_path: Path) -> None:
    ways = ("one process", "two", "accumulated")
    results = {
        way: steps(train, photos, start, tmp_path / way, way, "--precision", "float32", CALM)
        for way in ways
    }
    one = results["one process"]
    assert one[0][0] != one[0][-1]
    weights = [key for key in one[1] if key.startswith("model.")]
    whole = sum(float(one[1][k].norm() ** 2) for k in weights) ** 0.5
    for way, (losses, state) in results.items():
        assert (
            max(abs(a - b) / a for a, b in zip(one[0], losses, strict=True)) <= TOLERANCE_FLOAT32
        ), way
        apart = sum(float((one[1][k] - state[k]).norm() ** 2) for k in weights) ** 0.5
        assert apart <= TOLERANCE_FLOAT32 * whole, way


UNKEYED = {
    "dropout": "readers.kept_units = lambda rng, units, p: np.packbits(own.random(units) >= p)",
    "order": "loader.keyed = lambda seed, purpose, *key: own",
}


@pytest.mark.parametrize("what", UNKEYED)
def test_the_comparison_notices_what_is_not_keyed(
    what: str, photos: Path, train: Train, start: Path, tmp_path: Path
) -> None:
    script = tmp_path / "unkeyed.py"
    script.write_text(
        "import os\nimport numpy as np\nfrom pretrain import loader, readers, train\nfrom vggfeat"
        " import terminal\n"
        # as if each process were seeded by its rank
        "own = np.random.default_rng(int(os.environ.get('RANK', '0')))\n"
        f"{UNKEYED[what]}\nterminal.run(train.app, 'pretrain.train')\n"
    )
    # read by the training process itself: a reader is a Python of its own, which the script doesn't
    # touch
    more = "--precision", "float64", "--workers", "0"
    one, two = (
        steps(train, photos, start, tmp_path / way, way, *more, iterations=5, script=script)
        for way in ("one process", "two")
    )
    assert difference(one, two) > 1e-3


def test_boxes_are_learned_alike_in_one_process_and_two(
    photos: Path, train: Train, start: Path, tmp_path: Path
) -> None:
    boxes = write_boxes(tmp_path / "boxes.csv", photos)
    results = {}
    for way in ("one process", "two", "accumulated"):
        out = tmp_path / way
        processes, micro_batch = WAYS[way]
        train(
            *(*STEPS, "--stages", "D-36-pcr", "--from", start / "D-36" / "weights.safetensors"),
            *("--task", "localisation", "--boxes", "pcr", "--annotations", boxes, "--out", out),
            *("--data", photos, "--colours", start / "colours.json", "--precision", "float64"),
            *("--micro-batch", micro_batch, "--set=*.iterations=5"),
            processes=processes,
        )
        text = (out / "D-36-pcr" / "log.jsonl").read_text()
        events = [json.loads(line) for line in text.splitlines()]
        losses = [event["loss"] for event in events if event["event"] == "train"]
        errors = [event["localisation_error"] for event in events if event["event"] == "val"]
        state = safetensors.torch.load_file(out / "D-36-pcr" / "last.safetensors")
        results[way] = ([*losses, *(1 + error for error in errors)], state)
    one = results["one process"]
    assert len(one[0]) == 6 and one[0][0] != one[0][4]
    for way, result in results.items():
        assert difference(one, result) <= TOLERANCE, way


# what a compiled net is made of, without a compiler of C++; in some processes it can't be done
COMPILED = """
import functools, os, torch
from pretrain import replica, train
from vggfeat import terminal
replica.COMPILED["cpu"], replica.unfit = True, lambda device: ""
def broken(*_):
    raise ValueError("not here")
backend = broken if os.environ.get("RANK") in {broken_in} else "aot_eager"
torch.compile = functools.partial(torch.compile, backend=backend)
terminal.run(train.app, "pretrain.train")
"""


def test_compiled_it_is_the_same_net(
    photos: Path, train: Train, start: Path, tmp_path: Path
) -> None:
    """Also in passes of 11, 11 and 10 images."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED.replace("{broken_in}", "()"))
    one = steps(train, photos, start, tmp_path / "plain", "one process", *CALM_64, iterations=3)
    for way, *more in (("two",), ("accumulated", "--micro-batch", "12")):
        words, out = (*CALM_64, *more), tmp_path / way
        made = steps(train, photos, start, out, way, *words, iterations=3, script=script)
        events = (out / "D-36-64" / "log.jsonl").read_text()
        assert events.count('"event": "compiled"') == 1
        assert difference(one, made) <= TOLERANCE, way


@pytest.mark.skipif("LONG" not in os.environ, reason="LONG=1: it compiles two nets")
def test_processes_are_compiled_together_or_not_at_all(
    photos: Path, train: Train, start: Path, tmp_path: Path
) -> None:
    """One that goes on alone would wait for gradients that the others exchange in other pieces."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED.replace("{broken_in}", "('1',)"))
    told: list[str] = []

    def listening(*words: object, **how: Any) -> subprocess.CompletedProcess[str]:
        done = train(*words, **how)
        told.append(done.stderr)
        return done

    one, two = (
        steps(listening, photos, start, tmp_path / way, way, *CALM_64, iterations=3, script=using)
        for way, using in (("one process", None), ("two", script))
    )
    assert difference(one, two) <= TOLERANCE
    line = "torch.compile can't be used here (ValueError: not here): the net runs uncompiled"
    assert told[1].count("torch.compile") == told[1].count(line) == 1
