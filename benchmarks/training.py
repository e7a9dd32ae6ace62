"""Images a second of training beside a plain loop, on the same photographs, net and batch.

    python -m benchmarks.training --data IMAGENET [--net D] [--batch-size 16] [--repeats 3]
    torchrun --nproc-per-node 2 -m benchmarks.training --data IMAGENET --trace FILE [--compile]

Ours: `pretrain`'s loader and trainer, every augmentation on, in the precision that `auto` picks,
compiled where the command would; from files on disk to updated weights, and the step alone, on a
batch in memory. The peer: a loop of torchvision's reference transforms (rescale, random crop, flip,
tensor, normalise), its DataLoader and its VGG under DistributedDataParallel, SGD, float32 (and, as
a second peer, under bfloat16 autocast), from files to weights. Interleaved; medians. Before that
the two are checked to be the same work: from the same weights, on the same crops, without dropout,
one step gives the same loss and the same weights. Beside each rate: its share of a large matrix
product's in that precision, measured in the same run.

--trace: a profile of ours instead, for chrome://tracing, by the first of the processes that
torchrun started; and when in the backward pass each bucket of gradients began to be exchanged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchvision.transforms import v2

from pretrain.colour import Colours
from pretrain.init import randomise
from pretrain.loader import Schedule, TrainingSet, read_training_set
from pretrain.plan import net_of
from pretrain.readers import Batch, Readers, Samples
from pretrain.recipe import Recipe, Stage
from pretrain.replica import forward_gflop
from pretrain.trainer import Machine, Trainer, hidden_units
from vggfeat.devices import matrix_rate, resolve_precision
from vggfeat.errors import VggfeatError
from vggfeat.machine import CORES
from vggfeat.ranks import Ranks, joined
from vggfeat.terminal import columns, out
from vggfeat.weights import TORCHVISION_NETS

NAMES = {net: name for name, net in TORCHVISION_NETS.items()}
SIDES = {
    "ours": "",
    "ours, the step alone": "",
    "plain loop, float32": "float32",
    "plain loop, bfloat16": "bfloat16",
}
"""What is timed, and in which precision; "": that of `auto`."""
COLOURS = Colours(
    (123.68, 116.779, 103.939), ((0.08, 0.07, 0.07), (0.07, 0.08, 0.07), (0.07, 0.07, 0.08))
)


class Photographs(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """The peer's data set: an image folder with torchvision's reference transforms."""

    def __init__(self, data: TrainingSet, stage: Stage, crop: int) -> None:
        self.data = data
        self.transform = v2.Compose(
            [
                v2.Resize(stage.train_scale[0], antialias=True),
                v2.RandomCrop(crop),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32),
                v2.Normalize(COLOURS.mean, (1.0, 1.0, 1.0)),
            ]
        )

    def __len__(self) -> int:
        return len(self.data.train)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        row = int(self.data.train[i])
        image = Image.open(self.data.items.root / self.data.items.names[row]).convert("RGB")
        return self.transform(image), int(self.data.items.labels[row])  # type: ignore[index]


def peer_net(recipe: Recipe, classes: int, device: torch.device) -> nn.Module:
    net = torchvision.models.get_model(
        NAMES[recipe.stages[0].net], weights=None, num_classes=classes
    )
    ours = net_of(recipe, 0, classes)
    randomise(ours, "glorot", 0.0, torch.Generator().manual_seed(0))
    net.load_state_dict(ours.state_dict())
    return nn.parallel.DistributedDataParallel(net.to(device))


def peer_step(
    net: nn.Module, optimiser: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, low: bool
) -> float:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
        loss = nn.functional.cross_entropy(net(x), y)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def peer_optimiser(net: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    rate = recipe.stages[0].learning_rate
    return torch.optim.SGD(
        net.parameters(), rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def peer_rate(
    recipe: Recipe, data: TrainingSet, workers: int, device: torch.device, low: bool
) -> float:
    """Images/s of the plain loop, after one iteration to warm up."""
    net = peer_net(recipe, len(data.classes), device)
    optimiser = peer_optimiser(net, recipe)
    loader = torch.utils.data.DataLoader(
        Photographs(data, recipe.stages[0], recipe.crop),
        recipe.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    # epoch after epoch, as ours
    batches = (batch for _ in itertools.count() for batch in loader)

    def step() -> None:
        x, y = next(batches)
        peer_step(
            net, optimiser, x.to(device, non_blocking=True), y.to(device, non_blocking=True), low
        )

    return timed(step, recipe)


@contextmanager
def our_steps(
    recipe: Recipe, data: TrainingSet, machine: Machine, ranks: Ranks
) -> Iterator[tuple[Callable[[], Batch], Callable[[Batch], None]]]:
    """pretrain at work: what reads this process's part of a batch, and what takes a step with it.

    The net is compiled, if it is to be.
    """
    net = net_of(recipe, 0, len(data.classes))
    randomise(net, "glorot", 0.0, torch.Generator().manual_seed(0))
    schedule = Schedule(data.train, recipe, 0, ranks, 0, recipe.stages[0].iterations)
    with Readers(machine.workers, ranks.device) as readers:
        trainer = Trainer(recipe, 0, net, data, COLOURS, ranks, machine, None, readers)
        batches = readers.read(
            Samples.from_recipe(recipe, 0, hidden_units(net)), data.items, schedule
        )
        trainer.replica.train()

        def step(batch: Batch) -> None:
            trainer.compile(batch, recipe.batch_size)
            float(trainer.step(batch, recipe.batch_size))  # waits for a GPU

        yield lambda: next(batches), step


def our_rates(
    recipe: Recipe, data: TrainingSet, machine: Machine, ranks: Ranks
) -> tuple[float, float]:
    """Images/s of pretrain, after one iteration to warm up: from files, and of the step alone."""
    with our_steps(recipe, data, machine, ranks) as (read, step):
        from_files = timed(lambda: step(read()), recipe)
    with our_steps(recipe, data, machine, ranks) as (read, step):
        batch = read()
        return from_files, timed(lambda: step(batch), recipe)


def timed(step: Callable[[], None], recipe: Recipe) -> float:
    step()
    began = time.perf_counter()
    for _ in range(recipe.stages[0].iterations - 1):
        step()
    return (recipe.stages[0].iterations - 1) * recipe.batch_size / (time.perf_counter() - began)


def check_same_work(recipe: Recipe, data: TrainingSet, ranks: Ranks) -> tuple[float, float]:
    """Relative differences of the loss and of the weights after a step on the same crops, without
    dropout, float32.
    """
    calm = replace(recipe, dropout=0.0, colour_std=0.0)
    net = net_of(calm, 0, len(data.classes))
    randomise(net, "glorot", 0.0, torch.Generator().manual_seed(0))
    reader = Readers(0, ranks.device)
    trainer = Trainer(
        calm, 0, net, data, COLOURS, ranks, Machine(micro_batch=calm.batch_size), None, reader
    )
    samples = Samples.from_recipe(calm, 0, hidden_units(net))
    batch = next(reader.read(samples, data.items, Schedule(data.train, calm, 0, ranks, 0, 1)))
    ours = float(trainer.step(batch, float(calm.batch_size)))
    peer = peer_net(calm, len(data.classes), ranks.device).eval()  # no dropout
    x = trainer.training_net.preprocessing(batch.crops_NHWC.to(ranks.device)).contiguous()
    theirs = peer_step(
        peer, peer_optimiser(peer, calm), x, batch.labels.to(ranks.device), low=False
    )
    differences = [
        ((a - b).detach().norm() / b.detach().norm().clamp_min(1e-9))
        for a, b in zip(net.parameters(), peer.parameters(), strict=True)
        if a.ndim > 1
    ]
    return abs(ours - theirs) / theirs, float(max(differences))


def trace(recipe: Recipe, data: TrainingSet, machine: Machine, ranks: Ranks, file: Path) -> None:
    """Profile an iteration; say when buckets of gradients began to be exchanged."""
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with our_steps(recipe, data, machine, ranks) as (read, step):
        for _ in range(2):  # the buckets are made anew after the first
            step(read())
        batch = read()
        ranks.barrier()
        with profile(activities=activities) as profiled:
            step(batch)
    if not ranks.first:
        return
    profiled.export_chrome_trace(str(file))
    backward = [
        event.time_range
        for event in profiled.events() or []
        if event.name.startswith("autograd::engine::evaluate_function")
    ]
    begins, ends = min(each.start for each in backward), max(each.end for each in backward)
    out.print(f"backward pass: {(ends - begins) / 1e3:.1f} ms, as the CPU sees it")
    for event in profiled.events() or []:
        if event.name == "c10d::allreduce_" and event.time_range.start >= begins:
            after = event.time_range.start - begins
            out.print(
                f"a bucket is exchanged from {after / 1e3:.1f} ms on,"
                f" {100 * after / (ends - begins):.0f} % of the backward pass"
            )


def compare(
    recipe: Recipe, data: TrainingSet, machine: Machine, ranks: Ranks, repeats: int
) -> dict[str, list[float]]:
    """Images/s of each side, of each repeat."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group(
            "nccl" if ranks.device.type == "cuda" else "gloo",
            init_method=f"file://{scratch}/meet",
            rank=0,
            world_size=1,
        )
        loss, weights = check_same_work(recipe, data, ranks)
        out.print(f"the same step: loss differs by {loss:.1e}, weights by {weights:.1e} (relative)")
        assert max(loss, weights) < 1e-3
        for _ in range(repeats):
            found = [
                *our_rates(recipe, data, machine, ranks),
                peer_rate(recipe, data, machine.workers, ranks.device, low=False),
                peer_rate(recipe, data, machine.workers, ranks.device, low=True),
            ]
            for name, rate in zip(SIDES, found, strict=True):
                rates[name].append(rate)
        dist.destroy_process_group()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--net", default="D", choices=sorted(NAMES))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(16, CORES))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # the first iteration warms up
    stage = Stage(options.net, (256, 256), 1e-2, iterations=max(options.iterations + 1, 3))
    recipe = Recipe("benchmark", (stage,), batch_size=options.batch_size, held_out=0.0)
    try:
        data = read_training_set(options.data, recipe)
        with joined(options.device) as ranks:
            machine = Machine(
                resolve_precision("auto", ranks.device),
                micro_batch=options.batch_size,
                workers=options.workers,
                compile=options.compile,
            )
            if options.trace:
                trace(recipe, data, machine, ranks, options.trace)
                return
            if ranks.world > 1:
                raise VggfeatError("several processes are for --trace")
            rates = compare(recipe, data, machine, ranks, options.repeats)
    except VggfeatError as error:
        raise SystemExit(str(error)) from error
    medians = {side: statistics.median(values) for side, values in rates.items()}
    flop = 3e9 * forward_gflop(net_of(recipe, 0, len(data.classes)))
    peaks: dict[str, float] = {}
    table = columns("side", "images/s", "TFLOP/s", "% of matrix rate", "ours / it")
    for side, rate in medians.items():
        precision = SIDES[side] or machine.precision
        peak = peaks.setdefault(precision, matrix_rate(ranks.device, precision))
        table.add_row(
            side,
            f"{rate:.2f} ({min(rates[side]):.2f} to {max(rates[side]):.2f})",
            f"{flop * rate / 1e12:.3f}",
            f"{100 * flop * rate / peak:.0f}",
            f"{medians['ours'] / rate:.2f}",
        )
    out.print(table)
    for precision, peak in peaks.items():
        out.print(f"matrix product in {precision} on {ranks.device}: {peak / 1e12:.3f} TFLOP/s")
    out.print(f"ours: in {machine.precision}, batch {options.batch_size}")
    if options.json:
        found = {"images_per_second": rates, "flop": flop, "matrix_flops": peaks}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
