"""Evaluate nets as Sect. 3.2 and 4 do: dense, multi-crop or both, over several Q, one net or
several fused.

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
    from vggfeat.__main__ import begin

    begin()

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer
from rich.table import Table

from pretrain.submission import devkit_numbers, refuse_unknown, write_submission
from vggfeat.errors import WrongUsage
from vggfeat.files import check_outputs, refuse_inputs, try_each, weights_files, write_json
from vggfeat.terminal import (
    CORES,
    columns,
    command,
    in_options,
    list_unreadable,
    out,
    progress,
    run,
    say,
)

if TYPE_CHECKING:
    import torch

    from pretrain.kept import KeptPosteriors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Option = typer.Option
CONFUSIONS = 20  # pairs of classes that the JSON file lists


@app.command()
def evaluate(
    weights: Annotated[
        list[str], Option(help="A weights file, or a name as oxford:D; several are fused.")
    ] = [],  # noqa: B006
    kept: Annotated[
        list[Path], Option("--from", help="Kept posteriors; several files are fused.")
    ] = [],  # noqa: B006
    data: Annotated[
        Path,
        Option(
            "--data",
            "--root",
            envvar="VGGFEAT_DATA",
            help="Holds val/WNID; or test, a flat folder.",
        ),
    ] = Path("data"),
    split: Annotated[
        Literal["val", "train", "test"], Option(help="test: images without labels.")
    ] = "val",
    scales: Annotated[
        str, Option(help="Q, as 256,384,512; if not given, those of Sect. 4.2 for each net.")
    ] = "",
    mode: Annotated[Literal["dense", "crops", "both"], Option(help="crops: 50 a scale.")] = "dense",
    max_pool: Annotated[
        Literal["floor", "ceil"] | None,
        Option(
            help="How the nets' pooling rounds odd sides; default: as the weights were trained."
        ),
    ] = None,
    posteriors: Annotated[
        Path | None, Option(help="Keep all posteriors in this HDF5 file.")
    ] = None,
    table: Annotated[
        str, Option(help="3, 4, 5, 6 or all: the table's rows for the nets in --runs.")
    ] = "",
    runs: Annotated[Path, Option(help="Folder with trained nets, for --table.")] = Path("runs"),
    ledger: Annotated[Path, Option(help="What --table updates.")] = Path("docs/results.md"),
    submission: Annotated[
        Path | None, Option(help="Write the devkit's five classes an image.")
    ] = None,
    devkit: Annotated[Path | None, Option(help="ILSVRC2012_devkit_t12, for --submission.")] = None,
    json_file: Annotated[
        Path | None, Option("--json", help="Figures, per class and confusions, too.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace output files.")] = False,
    limit: Annotated[int, Option(min=0, help="So many images, evenly spread; 0: all.")] = 0,
    batch_size: Annotated[int, Option(min=1, help="Images of 224x224 at once.")] = 16,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Option(help="Under torchrun, each process its own GPU.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], Option(help="auto: bfloat16 where it is fast.")
    ] = "auto",
    workers: Annotated[int | None, Option(min=1, help="Threads that read images.")] = None,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print top-1 and top-5 errors as the paper does."""
    if bool(weights) + bool(kept) + (bool(table) and not kept) != 1:
        raise WrongUsage("give one of --weights, --from and --table (or --from and --table)")
    if table and (scales or submission is not None or json_file is not None):
        raise WrongUsage(
            "--table takes the paper's Q and modes: no --scales, --submission or --json with it"
        )
    if table and split != "val":
        raise WrongUsage(
            f"--table is of the validation set, as the paper's are: no --split {split}"
        )
    if table not in ("", "3", "4", "5", "6", "all"):
        raise WrongUsage(f"--table {table}: the paper's tables are 3, 4, 5 and 6, or give all")
    if max_pool and not weights:
        raise WrongUsage(
            "--max-pool is for --weights: kept posteriors have theirs, and --table takes the"
            " weights' own"
        )
    if submission is not None and devkit is None:
        raise WrongUsage("--submission needs --devkit: its meta.mat has the numbers of the classes")
    inputs = [*kept, *weights_files(*weights), data, devkit]
    texts = {"--submission": submission, "--json": json_file}
    check_outputs({"--posteriors": posteriors}, texts=texts, inputs=inputs, overwrite=overwrite)
    if table:
        from pretrain.tables import check_ledger

        cells = ledger.with_name("ledger-ilsvrc.json")
        updated = {"--ledger": ledger, "the cells beside it": cells}  # in place, by design
        check_outputs(updated, inputs=[*inputs, posteriors], overwrite=True)
        check_ledger(ledger)
    try:
        wanted = tuple(int(q) for q in scales.split(",") if q)
    except ValueError:
        raise WrongUsage(f"--scales {scales}: give numbers of pixels, as 256,384,512") from None
    if len(set(wanted)) < len(wanted):
        raise WrongUsage(f"--scales {scales}: give each Q once, or it weighs more than once")
    numbers = devkit_numbers(devkit) if devkit is not None else {}
    modes = ("dense", "crops") if mode == "both" else (mode,)
    # PyTorch is imported from here on: wrong options are answered at once
    from pretrain.kept import KeptPosteriors, refuse_twice
    from pretrain.posteriors import evaluate as evaluate_all
    from pretrain.posteriors import facts_of, fitting_scales, images_of
    from pretrain.runs import measure_tables, write_tables
    from vggfeat.ranks import joined
    from vggfeat.sources import load
    from vggfeat.weights import Network

    def ending(whole: KeptPosteriors) -> None:
        """What is made of posteriors, whether measured now or kept: each file, and then what is
        printed.
        """

        def keep() -> None:
            if posteriors is not None:
                whole.save(posteriors)

        def submit() -> None:
            if submission is not None:
                write_submission(whole, mode, wanted, numbers, submission)

        def figures() -> None:
            if table:
                write_tables(tables, whole, ledger)
                return
            content, *shown = report(whole, modes, wanted)
            try_each(
                lambda: write_json(json_file, content),
                *(partial(out.print, part) for part in shown),
            )

        def unreadable() -> None:
            list_unreadable(
                {whole.names[i]: reason for i, reason in sorted(whole.unreadable.items())}
            )

        try_each(keep, submit, figures, unreadable)

    tables = (3, 4, 5, 6) if table == "all" else tuple(map(int, table))
    if kept:
        whole = KeptPosteriors.joined((str(path), KeptPosteriors.read(path)) for path in kept)
        if not table:  # which has a row for each
            refuse_twice(net.of for net in whole.nets)
        ending(whole)
        raise typer.Exit(3 if whole.unreadable else 0)
    with joined(device) as ranks:
        items = images_of(data, split, limit)
        for remark in items.remarks if ranks.first else ():
            say(in_options(remark))
        refuse_inputs({"--posteriors": posteriors, **texts}, items.paths())
        threads = workers or max(1, CORES // ranks.local_world)
        how: dict[str, Any] = {"batch_size": batch_size, "workers": threads}
        if table:
            whole = measure_tables(tables, runs, items, split, ranks, precision, how)
        else:

            def net(spec: str, device: str | torch.device, precision: str) -> Network:
                network = load(spec, device=device, precision=precision)
                return network.set_pool(max_pool) if max_pool else network

            if submission is not None or len(weights) > 1:  # as it would end, before hours of work
                there = []
                for network in (net(spec, "cpu", "float32") for spec in weights):
                    fitting_scales(network, wanted)
                    if submission is not None:
                        refuse_unknown(network.classes or [], numbers)
                    there.append(facts_of(network))
                refuse_twice(there)
            networks = (net(spec, ranks.device, precision) for spec in weights)
            with progress("evaluate") as show:

                def advance(done: float, total: int) -> None:
                    if ranks.first:
                        show(done, total)

                whole = evaluate_all(
                    networks, wanted, modes, items, split, ranks, advance=advance, **how
                )
        if not ranks.first:
            return
    ending(whole)
    if whole.unreadable and ranks.world == 1:
        raise typer.Exit(3)


def report(
    whole: KeptPosteriors, modes: tuple[str, ...], scales: tuple[int, ...]
) -> tuple[dict[str, Any], Table, str]:
    """The content of the JSON file; and what is printed, a line for each net and mode, and for all
    nets fused.
    """
    from vggfeat.metrics import percent

    labelled = int((whole.labels >= 0).sum())
    counted = ["unreadable"] if whole.unreadable else []
    rows = columns("nets", "S", "Q", "mode", "top-1 error, %", "top-5 error, %", *counted)
    names = told_apart([net.of for net in whole.nets])
    figures: list[dict[str, Any]] = []
    kinds = (*modes, "both") if len(modes) == 2 else modes
    every = list(zip(names, whole.nets, strict=True))
    for named in [[one] for one in every] + ([every] if len(every) > 1 else []):
        nets = [net for _, net in named]
        for kind in kinds:
            posteriors_NK = np.mean([net.mean(kind, scales or None) for net in nets], axis=0)
            used = [",".join(map(str, scales or net.scales)) for net in nets]
            figure: dict[str, Any] = {
                "nets": [net.of for net in nets],
                "scales": used,
                "mode": kind,
                "images": labelled,
                "unreadable": int(np.isnan(posteriors_NK).any(1).sum()),
            }
            shown = "-", "-"
            if labelled:
                top1, top5 = whole.errors(posteriors_NK)
                figure |= {"top1_error": top1, "top5_error": top5, **by_class(whole, posteriors_NK)}
                shown = percent(top1), percent(top5)
            figures.append(figure)
            rows.add_row(
                " + ".join(name for name, _ in named),
                " + ".join(net.of["train_scale"] or "?" for net in nets),
                " + ".join(dict.fromkeys(used)),
                kind,
                *shown,
                *[str(figure["unreadable"]) for _ in counted],
            )
    bad = f", {len(whole.unreadable)} of them unreadable" if whole.unreadable else ""
    bad += ", an error in each row that counts it" if bad and labelled else ""
    unreadable = {whole.names[i]: reason for i, reason in whole.unreadable.items()}
    content = {
        "rows": figures,
        "dataset": whole.dataset,
        "split": whole.split,
        "unreadable": unreadable,
    }
    line = f"{whole.dataset} {whole.split}: {len(whole.names)} images{bad}"
    return {**content, "command": command()}, rows, line


def told_apart(nets: Sequence[Mapping[str, str]]) -> list[str]:
    """What a row calls each net: its letter, and of nets of one letter and S what they differ in
    first.
    """
    words = {
        "pool": "max-pool {}",
        "seed": "seed {}",
        "weights": "{}",
        "fingerprint": "sha256 {:.12}",
    }
    found = []
    for net in nets:
        alike = [
            other
            for other in nets
            if (other["net"], other["train_scale"]) == (net["net"], net["train_scale"])
        ]
        told = next(
            (
                f" ({word.format(net[fact])})"
                for fact, word in words.items()
                if all(other[fact] for other in alike)
                and len({other[fact] for other in alike}) == len(alike)
            ),
            "",
        )
        found.append(net["net"] + (told if len(alike) > 1 else ""))
    return found


def by_class(whole: KeptPosteriors, posteriors_NK: np.ndarray) -> dict[str, Any]:
    """Errors of each class that occurs, and the pairs of classes that are confused most."""
    labels = whole.labels[whole.labels >= 0]
    scores = posteriors_NK[whole.labels >= 0]
    from vggfeat.metrics import tells

    wrong = {k: whole.wrong(posteriors_NK, k) for k in (1, 5)}
    per_class = {}
    for label in np.unique(labels):
        own = labels == label
        errors = {
            f"top{k}_error": (
                100 * float(wrong[k][own].mean()) if tells(k, len(whole.classes)) else None
            )
            for k in (1, 5)
        }
        per_class[whole.classes[label]] = {"images": int(own.sum()), **errors}
    readable = ~np.isnan(scores).any(1)
    guesses = scores[readable].argmax(1)
    pairs, counts = np.unique(np.stack([labels[readable], guesses]), axis=1, return_counts=True)
    mistakes = [
        {"is": whole.classes[i], "taken_for": whole.classes[j], "images": int(n)}
        for (i, j), n in zip(pairs.T, counts, strict=True)
        if i != j
    ]
    mistakes.sort(key=lambda pair: -pair["images"])
    return {"per_class": per_class, "confusions": mistakes[:CONFUSIONS]}


if __name__ == "__main__":
    run(app, "python -m pretrain.evaluate")
