"""What "10^-2 variance" can mean (Sect. 3.1): initial scores and first iterations of A, D and E, by
initialisation.

    python -m benchmarks.initialisation --data IMAGENET --out build/initialisation
    python -m benchmarks.initialisation --data IMAGENET --a A.safetensors --batch-size 64

Full-width nets learn from crops of 64 pixels of S=72 (so that 200 iterations fit on a laptop; the
convolutions' fan-in, which decides what a standard deviation does to the signal, is the paper's).
Initial scores are taken at 224 as well. Initialisations: normal with standard deviation 0.1 (the
variance read literally) and 0.01, Glorot & Bengio's, and seven layers from A (Glorot's, trained for
`--a-iterations` here, or `--a`'s, whose width and crop all nets then have) with the others normal
0.01 (the paper's way) or Glorot's. Prints a table; writes the losses as JSON and a plot.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from pretrain.colour import Colours, measure
from pretrain.init import copy_layers, randomise
from pretrain.loader import Schedule, TrainingSet, read_training_set
from pretrain.readers import Readers, Samples
from pretrain.recipe import Recipe, Stage
from pretrain.trainer import Machine, Trainer, hidden_units
from vggfeat.decode import read_rgb
from vggfeat.devices import resolve_precision
from vggfeat.images import Preprocessing, centre_crop, smallest_side
from vggfeat.ranks import Ranks
from vggfeat.sources import load
from vggfeat.terminal import columns, out
from vggfeat.vgg import VGG

# label -> (how the random layers are drawn, their standard deviation, whether seven layers are A's)
INITS = {
    "std 0.1": ("normal", 0.1, False),
    "std 0.01": ("normal", 0.01, False),
    "Glorot": ("glorot", 0.0, False),
    "from A, others std 0.01": ("normal", 0.01, True),
    "from A, others Glorot": ("glorot", 0.0, True),
}


def initial_score(net: VGG, data: TrainingSet, mean: tuple[float, ...], crop: int) -> float:
    """Largest absolute score of eight photographs' central crops, minus the mean, in float64: no
    overflow.
    """
    rows = data.train[:: max(1, len(data.train) // 8)][:8]
    crops = [
        centre_crop(smallest_side(read_rgb(data.items.source(int(i))), crop * 8 // 7), crop)
        for i in rows
    ]
    x = Preprocessing(mean)(torch.stack([torch.from_numpy(c) for c in crops])).double()  # type: ignore[arg-type]
    with torch.inference_mode():
        return float(net.double().eval().crop_scores(x).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/initialisation"))
    parser.add_argument("--nets", default="A,D,E")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument(
        "--a-iterations", type=int, default=600, help="of the A that deeper nets start from"
    )
    parser.add_argument("--a", help="weights of a trained A that deeper nets start from instead")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trained_a: VGG | None = None
    if args.a:
        trained_a = cast(VGG, load(args.a, device="cpu", precision="float32").module)
        args.width, args.crop = trained_a.width, trained_a.crop
    stage = Stage("A", (args.crop * 9 // 8,) * 2, args.learning_rate, iterations=args.iterations)
    recipe = Recipe(
        "initialisation", (stage,), width=args.width, crop=args.crop, batch_size=args.batch_size
    )
    data = read_training_set(args.data, recipe)
    names = [data.items.names[i] for i in data.train[::10]]
    colours = measure(data.items.root, names, 2).colours(names)
    ranks = Ranks(torch.device(args.device))
    machine = Machine(resolve_precision("auto", ranks.device), micro_batch=args.batch_size)
    table = columns(
        "net",
        "initialisation",
        "largest score at 224",
        f"at {args.crop}",
        "loss after 1",
        "20",
        "100",
        "last 10",
    )
    curves: dict[str, list[float]] = {}
    for name in args.nets.split(","):
        for label, (how, std, from_a) in INITS.items():
            if from_a and (name == "A" or trained_a is None):
                continue
            net, whole = (
                VGG(name, len(data.classes), args.width, crop) for crop in (args.crop, 224)
            )
            for drawn in (net, whole):
                randomise(drawn, how, std, torch.Generator().manual_seed(0))
            if from_a:
                copy_layers(net, trained_a)  # type: ignore[arg-type]
            # an A trained at another crop has another fc6: "from A" is measured at its own crop
            # only
            scores = ["-" if from_a else f"{initial_score(whole, data, colours.mean, 224):.1e}"]
            del whole
            scores.append(f"{initial_score(net, data, colours.mean, args.crop):.1e}")
            is_source = name == "A" and how == "glorot" and not args.a
            length = max(args.a_iterations, args.iterations) if is_source else args.iterations
            run = replace(recipe, stages=(replace(stage, net=name, iterations=length),))
            losses = first_iterations(run, net.float(), data, colours, ranks, machine, args.out)
            losses = losses[: args.iterations]
            if is_source:
                trained_a = net
            curves[f"{name}, {label}"] = losses
            shown = [f"{losses[i]:.4g}" if i < len(losses) else "-" for i in (0, 19, 99)]
            shown.append(
                f"{sum(losses[-10:]) / 10:.4g}"
                if len(losses) == args.iterations
                else f"not finite at {len(losses)}"
            )
            table.add_row(name, label, *scores, *shown)
            out.print(f"{name}, {label}: scores {', '.join(scores)}; losses {', '.join(shown)}")
    (args.out / "losses.json").write_text(json.dumps(curves))
    plot(curves, len(data.classes), args.out / "losses.svg")
    out.print(table)
    out.print(f"chance: {math.log(len(data.classes)):.4f}; {args.out}/losses.svg")


def first_iterations(
    recipe: Recipe,
    net: VGG,
    data: TrainingSet,
    colours: Colours,
    ranks: Ranks,
    machine: Machine,
    folder: Path,
) -> list[float]:
    """The loss of each iteration, until it is not finite."""
    samples = Samples.from_recipe(recipe, 0, hidden_units(net))
    schedule = Schedule(data.train, recipe, 0, ranks, 0, recipe.stages[0].iterations)
    losses: list[float] = []
    with Readers(1, ranks.device) as readers:
        trainer = Trainer(recipe, 0, net, data, colours, ranks, machine, folder, readers)
        trainer.replica.train()
        for batch in readers.read(samples, data.items, schedule):
            losses.append(float(trainer.step(batch, float(batch.counts.sum()))))
            if not math.isfinite(losses[-1]):
                break
    return losses


def plot(curves: dict[str, list[float]], classes: int, path: Path) -> None:
    """Losses by iteration, a panel a net."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    nets = list(dict.fromkeys(label.partition(",")[0] for label in curves))
    figure, panels = plt.subplots(
        1, len(nets), figsize=(4.5 * len(nets), 3.6), sharey=True, squeeze=False
    )
    for panel, net in zip(panels[0], nets, strict=True):
        for label, losses in curves.items():
            if label.startswith(f"{net},"):
                finite = [loss for loss in losses if math.isfinite(loss)]
                smooth = [
                    sum(finite[max(0, i - 9) : i + 1]) / len(finite[max(0, i - 9) : i + 1])
                    for i in range(len(finite))
                ]
                broke = f" (not finite at {len(losses)})" if len(finite) < len(losses) else ""
                panel.plot(
                    range(1, len(smooth) + 1), smooth, label=label.partition(", ")[2] + broke
                )
        panel.axhline(math.log(classes), color="grey", linewidth=0.8, linestyle=":")
        panel.set(
            title=f"net {net}",
            xlabel="iteration",
            ylim=(0.75 * math.log(classes), 1.3 * math.log(classes)),
        )
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("training loss, mean of 10 (dotted: chance)")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
