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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pretrain.graph import BY_BOXES, TABLES, Step, graph
from pretrain.watch import stop_on_signals
from vggfeat.errors import WrongUsage
from vggfeat.files import check_outputs, refuse_unwritable
from vggfeat.machine import duration
from vggfeat.options import PRECISION, Overrides, OwnDevice, Processes, Strict, leave, with_debug
from vggfeat.terminal import in_options, list_unreadable, out, print_columns, run, say

if TYPE_CHECKING:
    from pretrain.plan import Trials
    from pretrain.reproduction import Asked

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Option = typer.Option
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
    source: Annotated[
        Path | None,
        Option(
            "--annotations",
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
    overrides: Overrides = [],  # noqa: B006
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
    workers: Processes = None,
) -> None:
    """Make the paper's tables: every net trained once, evaluated, and put beside the paper's."""
    numbers = seeds_typed(seeds)
    wanted = tables_typed(only)
    lacking = _lacking(wanted, source, voc, caltech)
    if only and lacking:
        raise WrongUsage("; ".join(lacking.values()))
    _refuse_idle(wanted, voc, caltech)
    tables = [n for n in wanted if n not in lacking]
    page = ledger or folder / "results.md"
    refuse_unwritable(folder, "--out")
    if ledger is not None or page.parent.is_dir():
        from pretrain.ledger import THEIRS

        updated = {"--ledger": page, "the cells beside it": page.with_name(THEIRS)}
        check_outputs(updated, inputs=[data, source, voc, caltech], overwrite=True)
    with stop_on_signals() as stop:
        graphs = {
            seed: graph(recipe, seed, tables, source is not None, overrides) for seed in numbers
        }
        # the rest is imported from here on: wrong options are answered at once
        from pretrain import reproduction
        from pretrain.ledger import check_ledger
        from pretrain.loader import read_training_set
        from pretrain.posteriors import images_of
        from pretrain.readers import Readers
        from pretrain.trainer import Machine
        from vggfeat.devices import resolve_precision
        from vggfeat.ranks import joined
        from vggfeat.transfer import check_page

        check_ledger(page)
        check_page(page)
        sets, absent = reproduction.data_sets(tables, voc, caltech, each=bool(only))
        with joined(device) as ranks:
            machine = Machine(
                precision=resolve_precision(precision, ranks.device),
                micro_batch=0,
                workers=min(16, ranks.cores) if workers is None else workers,
            )
            with Readers(0 if dry_run else machine.workers, ranks.device) as readers:
                steps = [step for each in graphs.values() for step in each.steps]
                images = read_training_set(data, steps[0].recipe)
                images_of(data, "val", 0)  # all are there, before what takes days
                if source is not None:
                    images = images.with_boxes(source)
                for step in steps:
                    images.of_stage(step.recipe.stages[step.number], step.recipe.batch_size)
                asked = reproduction.Asked(
                    data=data,
                    out=folder,
                    page=page,
                    tables=tables,
                    images=images,
                    ranks=ranks,
                    machine=machine,
                    readers=readers,
                    source=source,
                    sets=sets,
                )
                if ranks.first:
                    for remark in images.items.remarks:
                        say(in_options(remark))
                    for words in lacking.values():
                        say(f"left out: {words}")
                    for words in absent.values():
                        say(f"left out: {in_options(words)}")
                    for name in graphs[numbers[0]].lacking:
                        say(f"left out: {name}, which recipe {recipe} doesn't train")
                if dry_run:
                    _print_plan(asked, steps)
                    return
                shown = reproduction.Validation.of(asked)
                unreadable = dict(shown.unreadable)
                for seed, its in graphs.items():
                    with reproduction.remade(asked, its.steps):
                        unreadable |= reproduction.train(asked, its.steps, stop)
                        reproduction.classify(asked, its.steps, shown)
                        reproduction.localise(asked, its.steps, shown)
                        if seed == numbers[0]:
                            unreadable |= reproduction.transfer(asked, its.steps)
                if ranks.first:
                    reproduction.write_page(asked)
                    list_unreadable(unreadable)
                    out.print(f"tables: {page}", soft_wrap=True)
        leave(unreadable)


def tables_typed(only: str) -> tuple[int, ...]:
    """The tables of "table 6", "3, table 8"; all of them of ""."""
    words = [word.strip().lower().removeprefix("table").strip() for word in only.split(",")]
    if not only:
        return TABLES
    for word in words:
        if word not in map(str, TABLES):
            raise WrongUsage(
                f'--only {only}: give tables of the paper from 3 to 12, as "table 6" or "table 3,'
                ' table 8"'
            )
    return tuple(sorted({int(word) for word in words}))


def seeds_typed(text: str) -> tuple[int, ...]:
    """The numbers of "0,1,2"."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
        raise WrongUsage(f"--seeds {text}: give whole numbers, as 0,1,2")
    found = tuple(map(int, words))
    if len(set(found)) < len(found):
        raise WrongUsage(f"--seeds {text}: each once")
    return found


def _refuse_idle(tables: Sequence[int], voc: Path | None, caltech: Path | None) -> None:
    for option, root, its in (("--voc", voc, (11, 12)), ("--caltech", caltech, (11,))):
        if root is not None and not {*its} & {*tables}:
            words = " and ".join(f"table {number}" for number in its)
            raise WrongUsage(f"{option} is for {words}: leave it out, or ask for one of them")


def _lacking(
    tables: Sequence[int], source: Path | None, voc: Path | None, caltech: Path | None
) -> dict[int, str]:
    """Those tables whose data aren't given, and in words which these are."""
    needs = {
        **dict.fromkeys(BY_BOXES, ("--annotations", source is None)),
        11: ("--voc or --caltech", voc is None and caltech is None),
        12: ("--voc", voc is None),
    }
    return {
        table: f"table {table} needs {needs[table][0]}"
        for table in tables
        if table in needs and needs[table][1]
    }


def _print_plan(asked: Asked, steps: Sequence[Step]) -> None:
    """The graph, a stage a line, and what is left to do."""
    from pretrain.plan import net_of, plan
    from pretrain.reproduction import costs, state_of

    trials: Trials = {}
    rows = []
    seconds, disk = 0.0, 0
    for step in steps:
        state = state_of(asked, step)
        net = net_of(step.recipe, step.number, len(asked.images.classes))
        disk += COPIES * sum(4 * p.numel() for p in net.parameters())
        machine = asked.run_of(step).machine
        places = [step.number]
        (cost,) = plan(step.recipe, places, asked.images, asked.ranks, machine, trials)
        left = 0.0 if state == "done" else cost.seconds
        seconds += left
        start = step.start.name if step.start else "random"
        words = duration(left) if left else "-"
        rows.append((f"{step.seed}/{step.name}", start, f"{cost.iterations:,}", words, state))
    if not asked.ranks.first:
        return
    print_columns(("stage", "starts from", "iterations", "time", "state"), rows, (2, 3))
    world, kind = asked.ranks.world, asked.ranks.device.type
    hours = seconds * world / 3600
    out.print(
        f"training: {duration(seconds)} where no stage ends early, {hours:.3g} hours of {kind}, by"
        " trials of a few iterations, without what starting and checks take;"
        f" {disk / 1e9:.2g} GB of weights and checkpoints"
    )
    first = [step for step in steps if step.seed == steps[0].seed]
    for part in costs(asked, first, trials):
        told = f"{part.seconds / 3600:.3g} hours of {kind}"
        out.print(f"{part.what}: {told}, {part.size / 1e9:.1f} GB, for each seed that has them")


if __name__ == "__main__":
    run(app, "python -m pretrain.reproduce")
