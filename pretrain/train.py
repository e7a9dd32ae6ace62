"""Train a net of Table 1 from scratch, by the paper's whole recipe (Sect. 3.1).

The chain A-256, D-256, D-384, D-256-512; the same net, on four GPUs; on a laptop, of a small
folder; what it will take:

    python -m pretrain.train --net D --data /imagenet
    torchrun --nproc-per-node 4 -m pretrain.train --net D --data /imagenet
    python -m pretrain.train --net D --recipe mini --data photos --out runs/mini
    python -m pretrain.train --net D --data /imagenet --dry-run

A trained net, fine-tuned on one's own classes:

    python -m pretrain.train --net D --recipe finetune --from oxford:D --data photos --out runs/own

And, from its nets, localisation nets (Appendix A), one box for each class:

    python -m pretrain.train --net D --data /imagenet --task localisation --boxes pcr \
        --annotations /imagenet/Annotations/CLS-LOC

The same command goes on where an interrupted run stopped. Exit status: 0 done; 1 it failed, one
line says why; 2 usage; 3 done without some images that can't be read (0 under torchrun, which takes
any other status for a crash); 130 or 143 left on Ctrl-C or SIGTERM, saved.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin("pretrain.train")

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pretrain.recipe import Stage, chain, read_recipe, select
from pretrain.watch import WEIGHTS, stop_on_signals
from vggfeat.errors import VggfeatError, WrongUsage, as_typed
from vggfeat.files import refuse_inputs, refuse_same_names
from vggfeat.machine import duration
from vggfeat.options import PRECISION, Overrides, OwnDevice, Processes, Strict, leave, with_debug
from vggfeat.table1 import NETS
from vggfeat.terminal import in_options, out, print_columns, run, say

if TYPE_CHECKING:
    from pretrain.plan import StagePlan
    from pretrain.stages import Ended

MUCH = 30 * 86400.0  # seconds

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Option = typer.Option


@app.command("train", cls=Strict)
@with_debug
def train(
    net: Annotated[
        str, Option(help=f"The net of Table 1 to train: {', '.join(NETS[:-1])} or {NETS[-1]}.")
    ] = "D",
    data: Annotated[
        Path,
        Option(
            "--data",
            "--root",
            envvar="VGGFEAT_DATA",
            help="The folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE.",
        ),
    ] = Path("data"),
    recipe: Annotated[
        str,
        Option(help="The numbers of the training: paper, mini, tables, finetune, or a .toml file."),
    ] = "paper",
    folder: Annotated[
        Path | None,
        Option("--out", help="The folder of the run; default: runs/NET.", show_default=False),
    ] = None,
    task: Annotated[
        Literal["classification", "localisation", "control"],
        Option(
            help=(
                "What the chain is for: the paper's nets; nets that say boxes; or nets to compare"
                " with, that have learned for as long."
            )
        ),
    ] = "classification",
    boxes: Annotated[
        Literal["scr", "pcr"] | None,
        Option(
            help="Of localisation: one box for all classes (scr), or one of each (pcr).",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        Option(
            "--annotations",
            help="Of localisation: the true boxes, a folder of XML files or a CSV file.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        str, Option(help="A: deeper nets start from a trained A; normal or glorot: from random.")
    ] = "A",
    stages: Annotated[
        str,
        Option(
            help="Train only some stages of the chain: 2-4, D-384, D-256:D-384; default: all.",
            show_default=False,
        ),
    ] = "",
    start: Annotated[
        Path | None,
        Option(
            "--from",
            help="The weights that the first stage starts from: a file, or a name as mini.",
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    seed: Annotated[
        int | None,
        Option(min=0, help="Replace the recipe's seed.", show_default=False),
    ] = None,
    colours: Annotated[
        Path | None,
        Option(help="The colours.json of another run, for its mean and covariance of RGB."),
    ] = None,
    micro_batch: Annotated[
        int,
        Option(min=0, help="Images in a process's forward pass; 0: as many as fit in memory."),
    ] = 0,
    device: OwnDevice = "auto",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"], Option(help=PRECISION)
    ] = "auto",
    workers: Processes = None,
    compiled: Annotated[
        bool | None,
        Option(
            "--compile/--no-compile",
            help="Compile the net by torch.compile; default: on a GPU where that can be done.",
            show_default=False,
        ),
    ] = None,
    checkpoint_minutes: Annotated[
        float, Option(help="Minutes from one checkpoint to the next.")
    ] = 10.0,
    log_every: Annotated[
        int, Option(min=1, help="Iterations from one line of the log to the next.")
    ] = 20,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Print what the run will take, by a trial, and leave."),
    ] = False,
) -> None:
    """Train a net through its chain of stages; the last one's weights.safetensors ends in --out, or
    in its own folder, where it says boxes or is a control.
    """
    if not checkpoint_minutes >= 0:  # nor nan, which not every version of click refuses
        raise WrongUsage(f"--checkpoint-minutes {checkpoint_minutes} is not a number of minutes")
    with stop_on_signals() as stop:
        keys = {override.partition("=")[0].strip() for override in overrides}
        if seed is not None and "seed" in keys:
            raise WrongUsage("--seed and --set seed are one number: give one of them")
        if init != "A" and "random_layers" in keys:
            raise WrongUsage("--init is how random layers are made: leave out --set random_layers")
        if (task == "localisation") != (boxes is not None):
            raise WrongUsage("--task localisation and --boxes scr or pcr go together")
        if (task == "localisation") != (source is not None):
            raise WrongUsage("--task localisation and --annotations, the true boxes, go together")
        numbers = [*overrides, *([] if seed is None else [f"seed={seed}"])]
        its_recipe = read_recipe(recipe, numbers, net, boxes or "")
        its_chain = chain(its_recipe, net, init, task, boxes or "")
        chosen = select(its_chain, stages, task)
        if colours and its_chain.mean and its_chain.covariance:
            with as_typed(not its_chain.file):
                raise VggfeatError(
                    "the recipe has a mean and a covariance of RGB: leave out --colours"
                )
        run_folder = folder or Path("runs") / net
        # what the run writes; all else in its folder is its own, and goes on where it stopped
        for made in (run_folder, *(run_folder / its_chain.stages[i].name for i in chosen)):
            weights = {"the run's own": made / WEIGHTS}
            refuse_same_names(weights, [start, source])
            refuse_inputs(weights, [start, source])
        # the rest is imported from here on: wrong options are answered at once
        from pretrain.loader import read_training_set
        from pretrain.plan import plan
        from pretrain.readers import Readers
        from pretrain.stages import Run, check, train_stages
        from pretrain.trainer import Machine
        from vggfeat.devices import resolve_precision
        from vggfeat.ranks import joined

        with joined(device) as ranks:
            machine = Machine(
                precision=(
                    precision
                    if precision == "float64"
                    else resolve_precision(precision, ranks.device)
                ),
                micro_batch=micro_batch,
                workers=min(16, ranks.cores) if workers is None else workers,
                compile=compiled,
                checkpoint_seconds=60 * checkpoint_minutes,
                log_every=log_every,
            )
            # from here on, so that they start while the folder is listed and the nets are made
            with Readers(0 if dry_run else machine.workers, ranks.device) as readers:
                images = read_training_set(data, its_chain)
                if source is not None:
                    images = images.with_boxes(source)
                for remark in images.items.remarks if ranks.first else ():
                    say(in_options(remark))
                asked = Run(
                    its_chain, chosen, images, run_folder, start, colours, ranks, machine
                ).fitted()
                if dry_run:
                    check(asked)
                    if ranks.first:
                        stages_plan = list(plan(its_chain, chosen, images, ranks, asked.machine))
                        _print_plan(stages_plan)
                        most = max(
                            len(images.of_stage(its_chain.stages[i], its_chain.batch_size).train)
                            for i in chosen
                        )
                        out.print(
                            f"{most} training images, {asked.machine.micro_batch} a"
                            f" pass, {machine.precision} on {ranks.world} x {ranks.device.type}"
                        )
                        _print_advice(stages_plan)
                    return
                ended = train_stages(asked, stop, readers)
            if ended.finished and ranks.first:
                _print_end(ended, {stage.name: stage for stage in its_chain.stages})
                ours = [i for i in chosen if its_chain.stages[i].task == task]
                folders = [asked.out] if asked.of_classes else map(asked.folder, ours)
                for where in folders:
                    out.print(f"weights: {where / WEIGHTS}")
        if not ended.finished:
            raise typer.Exit(128 + stop.signal)
        leave(ended.unreadable)


def _print_plan(stages: Sequence[StagePlan]) -> None:
    head = ("stage", "iterations", "PFLOP", "memory, GB", "% of matrix rate", "time")
    rows = [
        (
            stage.name,
            f"{stage.iterations:,}",
            f"{stage.gflop / 1e6:,.2f}",
            f"{stage.memory / 1e9:.2f}",
            "-" if stage.share is None else f"{100 * stage.share:.0f}",
            duration(stage.seconds),
        )
        for stage in stages
    ]
    print_columns(head, rows, range(1, len(head)))


def _print_advice(stages: Sequence[StagePlan]) -> None:
    total = sum(stage.seconds for stage in stages)
    out.print(
        f"at most {duration(total)} in all, by a trial of a few iterations; a stage ends earlier"
        " where its held-out error stops falling"
    )
    if waiting := [stage.name for stage in stages if stage.waits]:
        out.print(
            f"reading slows {', '.join(waiting)} down: faster storage, smaller image files or more"
            " cores help"
        )
    if total > MUCH:
        out.print(
            "to try the program out in hours instead, train narrow nets on small crops: --recipe"
            " mini"
        )


def _print_end(ended: Ended, stages: Mapping[str, Stage]) -> None:
    """An error of a stage of localisation stands alone."""
    from vggfeat.metrics import error_text

    boxes = {name for name, _ in ended.stages if stages[name].boxes}
    what = "top-1, top-5 error, %" + ("; of boxes: localisation error, %" if boxes else "")
    kinds = (f"{images}, {what}" for images in ("held-out", "validation"))
    head = ("stage", "iterations", "Q", *kinds, "time")
    rows = []
    for name, state in ended.stages:
        errors = [
            "-"
            if pair is None
            else f"{error_text(pair[0])} (boxes)"
            if name in boxes
            else ", ".join(map(error_text, pair))
            for pair in (state.held_out, state.val)
        ]
        rows.append(
            (
                name,
                f"{state.iteration:,}",
                str(stages[name].test_scale),
                *errors,
                duration(state.seconds),
            )
        )
    print_columns(head, rows, range(1, len(head)))
    out.print(
        "errors: of one central crop at Q; the paper's, over the whole image, are"
        + (" pretrain.localise's and" if boxes else "")
        + " pretrain.evaluate's"
    )


if __name__ == "__main__":
    run(app, "python -m pretrain.train")
