"""The whole paper in one command: train what its tables need, evaluate, localise, describe, score,
and put ours beside theirs.

All of it; what it will take; some tables, by a small recipe, on a folder of photographs; on four
GPUs:

    python -m pretrain.reproduce --data /imagenet --annotations /imagenet/Annotations/CLS-LOC \\
        --voc /data --caltech /data --out runs
    python -m pretrain.reproduce --data /imagenet --out runs --dry-run
    python -m pretrain.reproduce --data photos --recipe tables --seeds 0,1,2 --only "table 3"
    torchrun --nproc-per-node 4 -m pretrain.reproduce --data /imagenet --out runs

Each stage is trained once: A is shared, and what exists in --out is used. The same command goes on
where it was killed. The page is OUT/results.md, with its cells beside it. Exit status: as of
pretrain.train.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin("pretrain.reproduce")

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pretrain.graph import BY_BOXES, BY_POSTERIORS, TABLES, Step, graph
from pretrain.watch import CHECKPOINT, Stop, stop_on_signals
from vggfeat.errors import WrongUsage
from vggfeat.machine import duration
from vggfeat.options import PRECISION, OwnDevice, Strict, leave, with_debug
from vggfeat.terminal import columns, in_options, out, run, say

if TYPE_CHECKING:
    from pretrain.loader import TrainingSet
    from pretrain.plan import Trials
    from pretrain.readers import Readers
    from pretrain.trainer import Machine
    from vggfeat.ranks import Ranks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Option = typer.Option
COLOURS = "A"  # the run whose mean and covariance of RGB all others take
COPIES = 5  # of a net's weights: the last and the best, the run's own, and a checkpoint's two


@app.command("reproduce", cls=Strict)
@with_debug
def reproduce(
    data: Annotated[
        Path,
        Option(
            "--data",
            "--root",
            envvar="VGGFEAT_DATA",
            help="ImageNet, or another folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE.",
        ),
    ] = Path("data"),
    folder: Annotated[
        Path, Option("--out", help="The folder of all that is made; what exists is used.")
    ] = Path("runs"),
    annotations: Annotated[
        Path | None,
        Option(
            help="The true boxes of --data, a folder of XML files or a CSV file: Tables 8 to 10.",
            show_default=False,
        ),
    ] = None,
    voc: Annotated[
        Path | None,
        Option(help="The folder that holds VOCdevkit: Tables 11 and 12.", show_default=False),
    ] = None,
    caltech: Annotated[
        Path | None,
        Option(
            help="The folder that holds Caltech-101, Caltech-256 or both: Table 11.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str, Option(help="The numbers of the training: paper, tables, mini, or a .toml file.")
    ] = "paper",
    seeds: Annotated[
        str,
        Option(help="Seeds of the training, comma-separated; Tables 11 and 12 are the first's."),
    ] = "0",
    only: Annotated[
        str,
        Option(help='Some tables only, as "table 6" or "table 3, table 8".', show_default=False),
    ] = "",
    ledger: Annotated[
        Path | None, Option(help="The page; default: OUT/results.md.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Print the graph, and what it will take, by a trial, and leave."),
    ] = False,
    device: OwnDevice = "auto",
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Option(help=PRECISION)] = "auto",
    workers: Annotated[
        int | None,
        Option(
            min=0,
            help=(
                "Processes that read images, beside each that trains; default: one a core, 16 at"
                " most."
            ),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make the paper's tables: every net trained once, evaluated, and put beside the paper's."""
    tables = tables_typed(only)
    numbers = seeds_typed(seeds)
    page = ledger or folder / "results.md"
    there = _possible(tables, annotations, voc, caltech, given=bool(only))
    with stop_on_signals() as stop:
        graphs = {seed: graph(recipe, seed, there, annotations is not None) for seed in numbers}
        # the rest is imported from here on: wrong options are answered at once
        from pretrain.ledger import check_ledger
        from pretrain.loader import read_training_set
        from pretrain.readers import Readers
        from pretrain.trainer import Machine
        from vggfeat.devices import resolve_precision
        from vggfeat.ranks import joined

        check_ledger(page)
        with joined(device) as ranks:
            machine = Machine(
                precision=resolve_precision(precision, ranks.device),
                micro_batch=0,
                workers=min(16, ranks.cores) if workers is None else workers,
            )
            with Readers(0 if dry_run else machine.workers, ranks.device) as readers:
                steps = [step for each in graphs.values() for step in each.steps]
                images = read_training_set(data, steps[0].recipe)
                if annotations is not None:
                    images = images.with_boxes(annotations)
                asked = Asked(
                    data,
                    folder,
                    page,
                    there,
                    images,
                    ranks,
                    machine,
                    readers,
                    annotations,
                    voc,
                    caltech,
                )
                if ranks.first:
                    for remark in images.items.remarks:
                        say(in_options(remark))
                    for name in next(iter(graphs.values())).lacking:
                        say(f"left out: {name}, which recipe {recipe} doesn't train")
                if dry_run:
                    _print_plan(asked, steps)
                    return
                unreadable: dict[str, str] = {}
                for seed, its in graphs.items():
                    trained = train(asked, its.steps, stop)
                    unreadable |= trained
                    measure(asked, seed, its.steps)
        leave(unreadable)


def tables_typed(only: str) -> tuple[int, ...]:
    """The tables of "table 6", "3, table 8"; all of them of ""."""
    words = [word.strip().lower().removeprefix("table").strip() for word in only.split(",")]
    if not only:
        return TABLES
    for word in words:
        if not (word.isascii() and word.isdecimal() and int(word) in TABLES):
            raise WrongUsage(
                f'--only {only}: give tables of the paper from 3 to 12, as "table 6" or "table 3,'
                ' table 8"'
            )
    return tuple(sorted({int(word) for word in words}))


def seeds_typed(text: str) -> tuple[int, ...]:
    """The numbers of "0,1,2"."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) < 2**63 for word in words):
        raise WrongUsage(f"--seeds {text}: give whole numbers, as 0,1,2")
    found = tuple(map(int, words))
    if len(set(found)) < len(found):
        raise WrongUsage(f"--seeds {text}: each once")
    return found


def _possible(
    tables: Sequence[int],
    annotations: Path | None,
    voc: Path | None,
    caltech: Path | None,
    given: bool,
) -> tuple[int, ...]:
    """Those tables whose data are given; what is left out is told, or refused where it was asked
    for by its number.
    """
    needs = {
        **dict.fromkeys(BY_BOXES, ("--annotations", annotations is not None)),
        11: ("--voc or --caltech", voc is not None or caltech is not None),
        12: ("--voc", voc is not None),
    }
    there = [n for n in tables if n not in needs or needs[n][1]]
    for n in tables:
        if n not in there:
            if given:
                raise WrongUsage(f"table {n} needs {needs[n][0]}")
            say(f"left out: table {n}, which needs {needs[n][0]}")
    return tuple(there)


@dataclass(frozen=True)
class Asked:
    """What is reproduced, of what, where and by whom. tables: those whose data are there."""

    data: Path
    out: Path
    page: Path
    tables: Sequence[int]
    images: TrainingSet
    ranks: Ranks
    machine: Machine
    readers: Readers
    annotations: Path | None
    voc: Path | None
    caltech: Path | None

    def run_of(self, step: Step) -> Any:
        """The run of `pretrain.stages` that trains a step."""
        from pretrain.stages import COLOURS as FILE
        from pretrain.stages import Run

        # measured once: it is of the images, and not of a seed
        colours = next(iter(sorted(self.out.glob(f"seed*/*/{FILE}"))), None)
        run = Run(
            step.recipe,
            [step.number],
            self.images,
            self.out / step.seed / step.run,
            step.start.weights(self.out) if step.start else None,
            self.ranks.same(colours),
            self.ranks,
            self.machine,
        )
        return run.fitted()


def train(asked: Asked, steps: Sequence[Step], stop: Stop) -> dict[str, str]:
    """Train each step that isn't done; name -> reason of training images that can't be read.

    Raises typer.Exit after a signal, all saved.
    """
    from pretrain.stages import train_stages

    unreadable: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        if asked.ranks.first:
            say(f"{step.seed}/{step.name}, {number} of {len(steps)}")
        ended = train_stages(asked.run_of(step), stop, asked.readers)
        unreadable |= ended.unreadable
        if not ended.finished:
            raise typer.Exit(128 + stop.signal)
    return unreadable


def measure(asked: Asked, seed: int, steps: Sequence[Step]) -> None:
    """Everything that a seed's trained nets are asked, into the page."""
    if numbers := [n for n in asked.tables if n in BY_POSTERIORS]:
        _classify(asked, seed, numbers)


def _classify(asked: Asked, seed: int, numbers: Sequence[int]) -> None:
    """Tables 3 to 7, of posteriors that are kept net by net, so that what is measured isn't
    measured again.
    """
    from pretrain.kept import KeptPosteriors
    from pretrain.posteriors import images_of
    from pretrain.runs import measure_net, trained_nets, wanted_rows, write_tables

    ranks, folder = asked.ranks, asked.out / f"seed{seed}"
    nets = trained_nets(folder, tell=ranks.first)
    items = images_of(asked.data, "val", 0)
    how: dict[str, Any] = {"batch_size": None, "workers": ranks.cores}
    parts: list[tuple[str, KeptPosteriors]] = []
    for i, rows in wanted_rows(numbers, nets).items():
        net = nets[i]
        path = folder / "posteriors" / f"{Path(net.weights).parent.name}.h5"
        kept = _kept(path, net, rows, items.names) if ranks.first else None
        if ranks.same(kept is None):
            made = measure_net(net, rows, items, "val", ranks, asked.machine.precision, how)
            if ranks.first:
                path.parent.mkdir(parents=True, exist_ok=True)
                made.save(path)
            kept = made
        if kept is not None:
            parts.append((net.weights, kept))
    if ranks.first:
        write_tables(numbers, KeptPosteriors.joined(parts), asked.page)
    ranks.barrier()


def _kept(path: Path, net: Any, rows: Any, names: list[str]) -> Any:
    """A net's posteriors, where they are kept for these images, at the Q and modes that are asked;
    else None.
    """
    from pretrain.kept import KeptPosteriors
    from pretrain.runs import asked_of
    from vggfeat.sources import load

    if not path.exists():
        return None
    kept = KeptPosteriors.read(path)
    scales, modes = asked_of(net, rows)
    (its,) = kept.nets
    same = its.facts["fingerprint"] == load(net.weights, device="cpu").fingerprint
    there = {*scales} <= {*its.scales} and {*modes} <= {*its.modes}
    return kept if same and there and kept.names == names else None


def _print_plan(asked: Asked, steps: Sequence[Step]) -> None:
    from pretrain.plan import net_of, plan

    trials: Trials = {}
    rows, seconds, disk = [], 0.0, 0
    classes = len(asked.images.classes)
    for step in steps:
        run_ = asked.run_of(step)
        (cost,) = plan(step.recipe, [step.number], asked.images, asked.ranks, run_.machine, trials)
        size = COPIES * sum(
            4 * p.numel() for p in net_of(step.recipe, step.number, classes).parameters()
        )
        done = step.weights(asked.out).exists()
        state = (
            "done"
            if done
            else "begun"
            if (step.weights(asked.out).with_name(CHECKPOINT)).exists()
            else "-"
        )
        rows.append(
            (
                f"{step.seed}/{step.name}",
                step.start.name if step.start else "-",
                str(cost.iterations),
                "-" if done else duration(cost.seconds),
                state,
            )
        )
        seconds += 0.0 if done else cost.seconds
        disk += size
    if asked.ranks.first:
        table = columns("stage", "starts from", "iterations", "time", "state")
        for row in rows:
            table.add_row(*row)
        out.print(table)
        out.print(
            f"training: at most {duration(seconds)}, {seconds * asked.ranks.world / 3600:.3g} hours of"
            f" {asked.ranks.device.type}; weights and checkpoints: {disk / 1e9:.1f} GB"
        )


if __name__ == "__main__":
    run(app, "python -m pretrain.reproduce")
