"""What a run will cost before it runs: iterations, arithmetic, memory, time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.colour import Colours
from pretrain.loader import TrainingSet
from pretrain.readers import Readers, Samples
from pretrain.recipe import Recipe
from pretrain.replica import forward_gflop, passes, rate_of_device
from pretrain.trainer import DTYPES, Machine, Trainer, hidden_units
from vggfeat.errors import VggfeatError
from vggfeat.ranks import Ranks
from vggfeat.vgg import VGG
from vggfeat.weights import outputs

TRIAL_SECONDS = 1.0  # about, of one iteration of a trial on a CPU
# share of the free memory that activations may take: cuDNN and oneDNN want workspaces beside them
SPARE = 0.6


@dataclass(frozen=True)
class StagePlan:
    """One stage, at most: it ends earlier where its held-out error stops falling. gflop: of its
    forward and backward passes (a multiply-add is two operations). seconds: by a short trial here,
    its checks of the held-out and validation images included. memory: bytes for a process: weights,
    gradients, momentum and the activations of one micro-batch; on a CPU the program and the copy
    that a checkpoint makes, too.
    """

    name: str
    iterations: int
    gflop: float
    seconds: float
    memory: int
    waits: bool
    """Whether it is the reading of images that sets the pace."""
    share: float | None
    """Of a matrix product's rate here, by the trial, reading left out; None: not known."""


def net_of(recipe: Recipe, stage_number: int, classes: int) -> VGG:
    """The net of a stage, its weights not yet set."""
    stage = recipe.stages[stage_number]
    return VGG(stage.net, outputs(stage.boxes, classes), recipe.width, recipe.crop)


def activation_bytes(net: VGG, precision: str) -> int:
    """Bytes that one image's forward pass keeps for the backward pass, weights not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"):
        # in place of autocast, which doesn't run on tensors without data: the whole net in the low
        # precision
        shadow = VGG(net.net, net.num_classes, net.width, net.crop).to(DTYPES[precision])
        x = torch.empty(1, 3, net.crop, net.crop, dtype=DTYPES[precision])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            scores = shadow.crop_scores(x)
        weights = {p.untyped_storage()._cdata for p in shadow.parameters()}
        del scores
    return sum(size for key, size in kept.items() if key not in weights)


def weight_bytes(net: VGG, precision: str) -> int:
    """Weights, gradients and momentum; autocast keeps a bfloat16 copy of the weights besides."""
    each = 8 if precision == "float64" else 4
    return sum(p.numel() for p in net.parameters()) * (
        3 * each + (2 if precision == "bfloat16" else 0)
    )


def program_bytes(device: torch.device) -> int:
    """What this process takes so far, beside the training; none of a GPU."""
    if device.type != "cpu":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device, processes: int) -> int:
    """Bytes that one of the processes on this machine may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
    except OSError as error:
        raise VggfeatError(
            f"the system doesn't tell its free memory ({error}): give `micro_batch`"
        ) from error
    return int(available.split()[1]) * 1024 // processes


def fitting_micro_batch(recipe: Recipe, nets: list[VGG], precision: str, ranks: Ranks) -> int:
    """Images of one pass that fit in memory, for the largest of the nets; at most a process's part
    of the batch.

    On a CPU at most 64: beyond that its caches gain nothing.
    """
    share = -(-recipe.batch_size // ranks.world)
    if ranks.device.type == "cpu":
        share = min(share, 64)
    free = min(ranks.gather(free_memory(ranks.device, ranks.local_world)))
    for net in nets:
        room = SPARE * (free - weight_bytes(net, precision))
        share = min(share, max(1, int(room / activation_bytes(net, precision))))
    return share


Trials = dict[tuple[str, ...], tuple[float, float]]
"""What a trial found (`trial`), by what its arithmetic depends on."""


def plan(
    recipe: Recipe,
    stages: Sequence[int],
    every: TrainingSet,
    ranks: Ranks,
    machine: Machine,
    trials: Trials | None = None,
) -> Iterator[StagePlan]:
    """Each stage's cost on this machine; a trial of a few images measures its rate. every: all
    images, of which a stage may learn from some. trials: those made before, which takes new ones.
    """
    trials = {} if trials is None else trials
    program = program_bytes(ranks.device)
    rate = rate_of_device(ranks.device, machine.precision)
    for number in stages:
        stage = recipe.stages[number]
        data = every.of_stage(stage, recipe.batch_size)
        net = net_of(recipe, number, len(data.classes))
        iterations = stage.iterations_of(len(data.train), recipe.batch_size)
        times = passes(stage.learn)
        per_image = forward_gflop(net) * times
        images = recipe.batch_size * iterations
        memory = program + weight_bytes(net, machine.precision)
        memory += machine.micro_batch * activation_bytes(net, machine.precision)
        if ranks.device.type == "cpu":
            # a checkpoint's copy of weights and momentum
            memory += 2 * sum(p.nbytes for p in net.parameters())
        kind = stage.net, stage.learn, stage.boxes
        if kind not in trials:
            trials[kind] = trial(recipe, number, net, data, ranks, machine)
        net_seconds, read_seconds = trials[kind]
        pace = Pace(read_seconds, ranks, machine)
        checks = -(-iterations // (len(data.train) // recipe.batch_size)) * len(
            data.held_out
        ) + len(data.val)
        seconds = images * pace.seconds(net_seconds) + checks * pace.seconds(net_seconds / times)
        yield StagePlan(
            stage.name,
            iterations,
            per_image * images,
            seconds / ranks.world,
            memory,
            pace.seconds(net_seconds) > 1.1 * net_seconds,
            None if rate is None else 1e9 * per_image / net_seconds / rate,
        )


@dataclass(frozen=True)
class Pace:
    """How reading and computing go on beside each other. read_seconds: of one image, by one
    process.
    """

    read_seconds: float
    ranks: Ranks
    machine: Machine

    def seconds(self, net_seconds: float) -> float:
        """Seconds an image of a process, where the net alone takes so long."""
        if not self.machine.workers:
            return net_seconds + self.read_seconds
        cores = self.ranks.cores
        threads = min(cores, torch.get_num_threads()) if self.ranks.device.type == "cpu" else 1
        alone = self.read_seconds / min(self.machine.workers, cores)
        shared = (
            (net_seconds * threads + self.read_seconds) / cores
            if self.ranks.device.type == "cpu"
            else 0.0
        )
        return max(net_seconds, alone, shared)


def trial(
    recipe: Recipe, number: int, net: VGG, data: TrainingSet, ranks: Ranks, machine: Machine
) -> tuple[float, float]:
    """Seconds an image of training, once it is read, and of reading one: of a batch, or of what
    takes a second.
    """
    device = ranks.device
    colours = Colours(
        (123.68, 116.779, 103.939), ((0.08, 0.07, 0.07), (0.07, 0.08, 0.07), (0.07, 0.07, 0.08))
    )
    alone = Readers(0, device)
    trainer = Trainer(recipe, number, net, data, colours, Ranks(device), machine, None, alone)
    samples = Samples.from_recipe(recipe, number, hidden_units(net))
    rows = np.random.default_rng(0).permutation(data.train)

    def seconds(n: int, steps: int) -> tuple[float, float]:
        began = time.perf_counter()
        batch = next(
            alone.read(samples, data.items, [[(0, int(r)) for r in rows[:n]]], data.corners)
        )
        read, times = time.perf_counter() - began, []
        trainer.compile(batch, n)  # which isn't counted
        for _ in range(1 + steps):  # the first one warms up
            began = time.perf_counter()
            float(trainer.step(batch, n))  # waits for a GPU
            times.append(time.perf_counter() - began)
        return float(np.median(times[1:])) / n, read / n

    share = -(-recipe.batch_size // ranks.world)
    few = min(share, 8) if device.type == "cpu" else share
    found = seconds(few, 2)
    n = min(share, int(TRIAL_SECONDS / found[0]))
    return seconds(n, 5) if n > few else found
