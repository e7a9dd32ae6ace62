"""Evaluate nets as Sect. 3.2 and 4 do: dense, multi-crop, both or a central crop, over several Q,
one net or several fused.

One net at three Q; D and E fused, their posteriors kept; those again, without a forward pass; a
table of the paper beside ours; on four GPUs:

    python -m pretrain.evaluate --weights runs/D/weights.safetensors --scales 256,384,512
    python -m pretrain.evaluate --weights oxford:D --weights oxford:E --posteriors de.h5 --mode both
    python -m pretrain.evaluate --from de.h5 --mode crops
    python -m pretrain.evaluate --table 4 --runs runs --data /imagenet
    torchrun --nproc-per-node 4 -m pretrain.evaluate --weights oxford:D --data /imagenet

Exit status: 0 done; 1 it failed, one line says why; 2 usage; 3 done, but some images can't be read,
or couldn't when the kept posteriors were made: they count as errors and are listed (0 under
torchrun, which takes any other status for a crash).
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin("pretrain.evaluate")

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pretrain.submission import refuse_unknown, write_submission
from vggfeat.datasets.devkit import devkit_numbers
from vggfeat.errors import WrongUsage, as_typed
from vggfeat.files import check_outputs, refuse_inputs, try_each, weights_files, write_json
from vggfeat.options import (
    BatchSize,
    Json,
    MaxPool,
    Overwrite,
    OwnDevice,
    Precision,
    Strict,
    Workers,
    leave,
    refuse_repeated,
    sides_typed,
    typed,
    with_debug,
)
from vggfeat.terminal import (
    command,
    in_options,
    list_unreadable,
    out,
    print_columns,
    progress,
    run,
    say,
)

if TYPE_CHECKING:
    from pretrain.kept import KeptPosteriors
    from vggfeat.datasets import Items
    from vggfeat.ranks import Ranks
    from vggfeat.weights import Network

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Option = typer.Option


@app.command("evaluate", cls=Strict)
@with_debug
def evaluate_command(
    context: typer.Context,
    weights: Annotated[
        list[str],
        Option(
            help="A weights file, or a name as oxford:D; several are fused.", show_default=False
        ),
    ] = [],  # noqa: B006
    kept: Annotated[
        list[Path],
        Option("--from", help="Kept posteriors; several files are fused.", show_default=False),
    ] = [],  # noqa: B006
    data: Annotated[
        Path,
        Option(
            "--data",
            "--root",
            envvar="VGGFEAT_DATA",
            help="The folder that holds train/WNID and val/WNID, or test, a flat folder.",
        ),
    ] = Path("data"),
    split: Annotated[
        Literal["val", "train", "test"],
        Option(help="Which images; those of test are without labels."),
    ] = "val",
    scales: Annotated[
        str | None,
        Option(
            help=(
                "Smallest sides Q in pixels, comma-separated; default: those of Sect. 4.2 for each"
                " net."
            ),
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        Literal["dense", "crops", "both", "centre"],
        Option(
            help=(
                "dense: over the whole image; crops: over 50 a scale; both: their average; centre:"
                " of one central crop, at one Q unless --scales has several."
            )
        ),
    ] = "dense",
    max_pool: MaxPool = None,
    posteriors: Annotated[
        Path | None, Option(help="Keep all posteriors in this HDF5 file.")
    ] = None,
    table: Annotated[
        str,
        Option(
            help="3, 4, 5, 6, 7 or all: make the table's rows of the nets in --runs.",
            show_default=False,
        ),
    ] = "",
    runs: Annotated[Path, Option(help="The folder with trained nets, for --table.")] = Path("runs"),
    ledger: Annotated[Path, Option(help="The page that --table updates.")] = Path(
        "docs/results.md"
    ),
    submission: Annotated[
        Path | None,
        Option(help="Also write the five likeliest classes an image, as the devkit scores them."),
    ] = None,
    devkit: Annotated[
        Path | None, Option(help="The folder ILSVRC2012_devkit_t12, for --submission.")
    ] = None,
    json_file: Json = None,
    overwrite: Overwrite = False,
    limit: Annotated[
        int, Option(min=0, help="Only so many images, evenly spread; 0: all of them.")
    ] = 0,
    batch_size: BatchSize = None,
    device: OwnDevice = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
) -> None:
    """Print top-1 and top-5 errors as the paper does; --json has those of each class, too, and what
    is confused most.
    """
    _refuse_contradictions(typed(context), table, split)
    refuse_repeated("--weights", weights)
    refuse_repeated("--from", kept)
    qs = () if scales is None else sides_typed(scales)
    inputs = [*kept, *weights_files(*weights), data, devkit]
    texts = {"--submission": submission, "--json": json_file}
    check_outputs({"--posteriors": posteriors}, texts=texts, inputs=inputs, overwrite=overwrite)
    if table:
        from pretrain.ledger import check_ledger

        cells = ledger.with_name("ledger-ilsvrc.json")
        updated = {"--ledger": ledger, "the cells beside it": cells}  # in place, by design
        check_outputs(updated, inputs=[*inputs, posteriors], overwrite=True)
        check_ledger(ledger)
    wanted = Wanted(
        modes=("dense", "crops") if mode == "both" else (mode,),
        mode=mode,
        scales=qs,
        tables=(3, 4, 5, 6, 7) if table == "all" else tuple(map(int, table)),
        ledger=ledger,
        posteriors=posteriors,
        submission=submission,
        numbers=devkit_numbers(devkit) if devkit is not None else {},
        json_file=json_file,
    )
    # PyTorch is imported from here on: wrong options are answered at once
    from pretrain.kept import KeptPosteriors, refuse_twice
    from pretrain.posteriors import images_of
    from pretrain.runs import measure_tables
    from vggfeat.ranks import joined
    from vggfeat.sources import refuse_contradictions

    for spec in weights:
        refuse_contradictions("", spec, max_pool=max_pool)
    if kept:
        found = KeptPosteriors.joined((str(path), KeptPosteriors.read(path)) for path in kept)
        if not table:  # which has a row for each
            refuse_twice(net.facts for net in found.nets)
        wanted.make(found)
        leave(found.unreadable)
        return
    with joined(device) as ranks:
        items = images_of(data, split, limit)
        for remark in items.remarks if ranks.first else ():
            say(in_options(remark))
        refuse_inputs({"--posteriors": posteriors, **texts}, items.paths())
        threads = workers or ranks.cores
        how: dict[str, Any] = {"batch_size": batch_size, "workers": threads}
        if table:
            found = measure_tables(wanted.tables, runs, items, split, ranks, precision, how)
        else:
            found = _measure(weights, max_pool, wanted, items, split, ranks, precision, how)
        if not ranks.first:
            return
    wanted.make(found)
    leave(found.unreadable)


# how posteriors are measured, and of which images
MEASURING = ("data", "split", "limit", "batch_size", "device", "precision", "workers")


def _refuse_contradictions(given: set[str], table: str, split: str) -> None:
    """Options that don't go together, that miss one, or that would change nothing. given: the
    names of those that are typed.
    """
    weights, kept = "weights" in given, "kept" in given
    if weights + kept + (bool(table) and not kept) != 1:
        raise WrongUsage("give one of --weights, --from and --table (or --from and --table)")
    if table not in ("", "3", "4", "5", "6", "7", "all"):
        raise WrongUsage(f"--table {table}: the paper's tables of classes are 3 to 7, or give all")
    if table and given & {"scales", "mode", "submission", "json_file"}:
        raise WrongUsage(
            "--table takes the paper's Q and modes: no --scales, --mode, --submission or --json"
            " with it"
        )
    if table and split != "val":
        raise WrongUsage(
            f"--table is of the validation set, as the paper's are: no --split {split}"
        )
    if "max_pool" in given and not weights:
        raise WrongUsage(
            "--max-pool is for --weights: kept posteriors have theirs, and --table takes the"
            " weights' own"
        )
    if "submission" in given and "devkit" not in given:
        raise WrongUsage("--submission needs --devkit: its meta.mat has the numbers of the classes")
    for what_for, idle in (
        ("--submission", () if "submission" in given else ("devkit",)),
        ("--table", () if table else ("runs", "ledger")),
        (
            "what is measured now, not for posteriors of --from",
            ("runs", *MEASURING) if kept else (),
        ),
    ):
        for name in idle:
            if name in given:
                raise WrongUsage(f"`{name}` is for {what_for}: leave it out")


def _measure(
    weights: Sequence[str],
    max_pool: str | None,
    wanted: Wanted,
    items: Items,
    split: str,
    ranks: Ranks,
    precision: str,
    how: dict[str, Any],
) -> KeptPosteriors:
    """The nets' posteriors. What could not be fused or submitted in the end is refused first."""
    from pretrain.kept import refuse_twice
    from pretrain.posteriors import evaluate, facts_of, fitting_scales
    from vggfeat.sources import load, of_words

    def net(spec: str, device: Any, precision: str) -> Network:
        network = load(spec, device=device, precision=precision)
        with as_typed(of_words(network.spec)):
            fitting_scales(network, wanted.scales, wanted.modes)
            return network.set_pool(max_pool) if max_pool else network

    if wanted.submission is not None or len(weights) > 1:
        there = []
        for network in (net(spec, "cpu", "float32") for spec in weights):
            if wanted.submission is not None:
                refuse_unknown(network.classes or [], wanted.numbers)
            there.append(facts_of(network))
        with as_typed(all(map(of_words, weights))):
            refuse_twice(there)
    networks = (net(spec, ranks.device, precision) for spec in weights)
    with progress("evaluate", quiet=not ranks.first) as advance:
        return evaluate(
            networks, wanted.scales, wanted.modes, items, split, ranks, advance=advance, **how
        )


@dataclass(frozen=True)
class Wanted:
    """What is to be made of posteriors, whether measured now or kept.

    modes: that are measured; mode: of the submission. scales: Q in pixels, () by default. tables:
    of the paper. numbers: the devkit's, of each class.
    """

    modes: tuple[str, ...]
    mode: str
    scales: tuple[int, ...]
    tables: tuple[int, ...]
    ledger: Path
    posteriors: Path | None
    submission: Path | None
    numbers: dict[str, int]
    json_file: Path | None

    def make(self, found: KeptPosteriors) -> None:
        """Each file, and then what is printed; where one fails, the others all the same."""
        try_each(
            partial(self._keep, found),
            partial(self._submit, found),
            partial(self._figures, found),
            lambda: list_unreadable(
                {found.names[i]: reason for i, reason in sorted(found.unreadable.items())}
            ),
        )

    def _keep(self, found: KeptPosteriors) -> None:
        if self.posteriors is not None:
            found.save(self.posteriors)

    def _submit(self, found: KeptPosteriors) -> None:
        if self.submission is not None:
            write_submission(found, self.mode, self.scales, self.numbers, self.submission)

    def _figures(self, found: KeptPosteriors) -> None:
        if self.tables:
            from pretrain.runs import write_tables

            write_tables(self.tables, found, self.ledger)
            return
        from pretrain.figures import report

        content, (head, *rows), line = report(found, self.modes, self.scales)
        try_each(
            lambda: write_json(self.json_file, {**content, "command": command()}),
            lambda: print_columns(head, rows, range(4, len(head))),
            lambda: out.print(line),
        )


if __name__ == "__main__":
    run(app, "python -m pretrain.evaluate")
