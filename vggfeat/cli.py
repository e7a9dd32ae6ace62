"""The `vggfeat` command: parse, call one function, print.

What it writes where, and its exit statuses, are `terminal`'s.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin()

import math
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vggfeat.cli_classify import classify_command, svm_command
from vggfeat.cli_explain import explain_command
from vggfeat.cli_extract import extract_command, merge_command
from vggfeat.cli_info import info_command
from vggfeat.cli_neighbours import index_command, neighbours_command
from vggfeat.cli_push import push_command
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.files import (
    check_outputs,
    refuse_inputs,
    refuse_same_names,
    try_each,
    weights_files,
    write_json,
    write_text,
)
from vggfeat.machine import CORES, size
from vggfeat.options import (
    CLASSIFIER,
    BatchSize,
    Device,
    Moved,
    MovedNets,
    Overwrite,
    Root,
    Strict,
    Workers,
    leave,
    typed,
    with_debug,
)
from vggfeat.place import local
from vggfeat.terminal import (
    columns,
    in_options,
    list_unreadable,
    out,
    print_columns,
    print_table,
    progress,
    run,
    say,
)

if TYPE_CHECKING:
    from rich.table import Table

    from vggfeat.predict import Tally

TABLED = 100  # images whose classes `predict` prints

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Dense multi-scale VGG descriptors, and linear SVMs on them (arXiv 1409.1556, appendix B)."
    ),
)


app.command("extract", cls=Strict)(extract_command)
app.command("merge", cls=Strict)(merge_command)
app.command("classify", cls=Strict)(classify_command)
app.command("svm", cls=Strict)(svm_command)


@app.command("predict", cls=Strict)
@with_debug
def predict_command(
    context: typer.Context,
    source: Annotated[
        list[str],
        typer.Argument(
            help=(
                "What to classify: images, folders, a CSV file or a list (.txt) of images, - for a"
                " list on stdin; or feature files or sets of shards, one a net."
            ),
        ),
    ],
    model: Annotated[
        Path,
        typer.Option(help=CLASSIFIER),
    ],
    weights: MovedNets = None,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Write a row an image to this .csv, .jsonl or .parquet file instead."
        ),
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Into the file, the score of each class, too.")
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Of a classifier of several labels an image: name classes above this score.",
            show_default="0",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="How many classes to print an image, without --out.")
    ] = 5,
    batch_size: BatchSize = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Score images with a saved classifier."""
    _refuse_idle_of_predict(context, out_file, threshold)
    refuse_same_names({"--out": out_file}, [*local(source), model])
    from vggfeat.writer import behind_link, partial_of

    partial = None if out_file is None else partial_of(behind_link(out_file))
    read = [*local(source), model, *weights_files(*(weights or []))]
    check_outputs({"--out": out_file}, inputs=[*read, partial], overwrite=overwrite)
    from vggfeat.model import open_model
    from vggfeat.predict import Tally, predict_all, source_of, write_predictions

    classifier = open_model(model, weights=weights or (), device=device)
    rows = source_of(source, classifier)
    if rows.files and weights:
        raise VggfeatError(f"{source[0]} is described already: leave out --weights")
    refuse_inputs(
        {"--out": out_file, "--out's": partial},
        chain(weights_files(*(part.weights for part in classifier.parts)), read, rows.paths()),
    )
    for line in rows.remarks:
        say(line)
    shared: dict[str, Any] = {
        "threshold": threshold,
        "batch_size": batch_size,
        "workers": workers or CORES,
        "say": lambda line: say(in_options(line)),
    }
    told = ["image", "class", "score", *["probability"] * classifier.has_probabilities]
    table, tally = columns(*told, numbers=range(2, len(told))), Tally(classifier, rows)
    with progress("predict") as show:
        if out_file is not None:
            tally = write_predictions(
                classifier,
                rows,
                out_file,
                scores=scores,
                overwrite=overwrite,
                progress=show,
                **shared,
            )
        else:
            for row in predict_all(classifier, rows, progress=show, **shared):
                tally.add(row.image, row.classes, row.error)
                if tally.rows - tally.unreadable <= TABLED:
                    for cells in row.best(classifier, top):
                        table.add_row(*cells)
    _print_predictions(out_file, table, tally)
    leave(range(tally.unreadable))


def _refuse_idle_of_predict(
    context: typer.Context, out_file: Path | None, threshold: float | None
) -> None:
    """Options that change nothing, and what can't be, whatever the classifier is."""
    if out_file is None and "scores" in typed(context):
        raise WrongUsage("--scores is of the file that --out names: give both, or neither")
    if out_file is not None and "top" in typed(context):
        raise WrongUsage("--top is of what is printed, and --out prints no rows: leave out one")
    if out_file is not None and out_file.suffix.lower() not in (".csv", ".jsonl", ".parquet"):
        raise WrongUsage(f"--out {out_file} must end in .csv, .jsonl or .parquet")
    if threshold is not None and not math.isfinite(threshold):
        raise WrongUsage(f"--threshold must be a finite number, not {threshold}")


def _print_predictions(out_file: Path | None, table: Table, tally: Tally) -> None:
    if out_file is not None:
        unreadable = f", {tally.unreadable:,} of them unreadable" if tally.unreadable else ""
        out.print(f"{out_file}: {tally.rows:,} rows{unreadable}", soft_wrap=True)
    elif table.row_count:
        out.print(table)
    if out_file is None and (more := tally.rows - tally.unreadable - TABLED) > 0:
        out.print(f"and {more:,} more images; --out FILE writes them all")
    if tally.accuracy:
        out.print(tally.accuracy, soft_wrap=True)
    rest = "" if out_file else "--out FILE writes them all"
    list_unreadable(tally.first_unreadable, rest, tally.unreadable)


@app.command("export", cls=Strict)
@with_debug
def export_command(
    model: Annotated[
        Path,
        typer.Argument(help=CLASSIFIER),
    ],
    to: Annotated[
        Literal["onnx", "npz"],
        typer.Option(
            help="onnx: from pixels to scores, of one net at one scale; npz: the weights alone."
        ),
    ],
    out_file: Annotated[
        Path, typer.Option("--out", help="The file to write, which ends in .onnx or .npz.")
    ],
    weights: Annotated[str | None, typer.Option(help=f"{Moved}.", show_default=False)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a saved classifier for use without this program; a graph's scores are compared with
    it.
    """
    if out_file.suffix != f".{to}":
        raise WrongUsage(f"--out {out_file} must end in .{to}")
    if weights and to == "npz":
        raise WrongUsage("--weights is for --to onnx: leave it out")
    check_outputs({"--out": out_file}, inputs=[model, *weights_files(weights)], overwrite=overwrite)
    from vggfeat.export import INSTALL, write_npz, write_onnx
    from vggfeat.model import open_model

    classifier = open_model(model, weights=weights or (), device="cpu")
    of_parts = weights_files(*(part.weights for part in classifier.parts))
    refuse_inputs({"--out": out_file}, of_parts)
    rows = [("file", str(out_file)), ("classes", f"{len(classifier.classes):,}")]
    if to == "npz":
        write_npz(out_file, classifier)
        print_table(to, [*rows, ("descriptor", f"{classifier.coef_KD.shape[1]:,} values")])
        return
    differences = write_onnx(out_file, classifier)
    [part] = classifier.parts
    told = f"not checked: onnxruntime isn't there ({INSTALL})"
    if differences.float32 is not None:
        told = f"{differences.float32:.1e} of the largest, in float32"
    rows += [
        ("images", f"uint8 RGB (N, H, W, 3), smallest side {part.scales[0]}, {part.filter}"),
        ("preprocessing", "in the graph"),
        ("largest difference of scores", told),
    ]
    if differences.own is not None:
        rows.append(("in bfloat16, the classifier's own", f"{differences.own:.1e} of the largest"))
    print_table(to, rows)


@app.command("report", cls=Strict)
@with_debug
def report_command(
    context: typer.Context,
    results: Annotated[
        Path | None,
        typer.Option(
            help="The results of `vggfeat svm --json`; default: the model's.", show_default=False
        ),
    ] = None,
    features: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help="The feature files that the model was trained on, in their order.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    model: Annotated[
        Path | None, typer.Option(help="The classifier of `vggfeat svm --out`.")
    ] = None,
    root: Root = None,
    out_file: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path(
        "report.html"
    ),
    mistakes: Annotated[
        Path | None,
        typer.Option(
            help="Also write all mistakes as CSV to this file, a row each, the worst first.",
            show_default=False,
        ),
    ] = None,
    weights: MovedNets = None,
    evidence: Annotated[
        bool,
        typer.Option(
            "--evidence/--no-evidence",
            help="Run the classifier's nets on the best pictures of each class, to show where the"
            " scores come from.",
        ),
    ] = True,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Also write the data problems, near duplicates, likely wrong labels and odd"
            " images, as JSON to this file.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """One HTML page to look at: the score, mistakes with their images, confusions, curves, data
    problems, a map of the descriptors.
    """
    if not results and not model:
        raise WrongUsage("a report needs --results or --model")
    if weights and not (model and features and evidence):
        raise WrongUsage("--weights are for the evidence, of --model and --features")
    if evidence and "evidence" in typed(context) and not (model and features):
        raise WrongUsage("--evidence is shown of --model and --features: give both")
    if mistakes and not (model and features):
        raise WrongUsage("--mistakes needs --model and --features, for the scores and the labels")
    if root and not features:
        raise WrongUsage("--root is of the images that --features knows: give both, or neither")
    if json_file and not features:
        raise WrongUsage("--json is of the images that --features knows: give both, or neither")
    check_outputs(
        {"--out": out_file},
        texts={"--mistakes": mistakes, "--json": json_file},
        inputs=[results, *local(features), model, root, *weights_files(*(weights or []))],
        overwrite=overwrite,
    )
    from vggfeat.audit_page import audit_features, record_of
    from vggfeat.datasets import at_hand
    from vggfeat.mistakes import all_mistakes, as_csv
    from vggfeat.report import write_report
    from vggfeat.results import read_results
    from vggfeat.same_run import open_described

    told, trained = read_results(results) if results else None, None
    if model:
        from vggfeat.model import open_model

        trained = open_model(model, weights=weights or ())
    files = open_described(features, told, trained) if features else []
    items, why_not = None, "the images are known by --features only"
    if files:
        items, why_not = at_hand(
            files[0].attributes["dataset"],
            files[0].names,
            root,
            files[0].attributes["root"],
            files=files[0].files,
            boxes=files[0].boxes,
        )
        if items is not None:
            outputs = {"--out": out_file, "--mistakes": mistakes, "--json": json_file}
            refuse_inputs(outputs, items.paths())
    problems = cache(lambda: audit_features(files, told, trained, items, why_not))
    with progress("report", quiet=not files, unit="images with evidence") as show:
        page, left_out = write_report(
            told,
            files,
            trained,
            items,
            why_not,
            look_for_problems=problems,
            explain=evidence,
            show=show,
        )
    rows = ""
    if mistakes and trained:
        rows = as_csv(all_mistakes(told, files, trained), files[0])
    try_each(
        lambda: write_text(out_file, page),
        lambda: write_text(mistakes, rows),
        lambda: write_json(json_file, record_of(problems(), files[0]) if json_file else None),
    )
    for line in left_out:
        say(in_options(f"left out: {line}"))
    out.print(f"{out_file}: {size(len(page))}")


app.command("explain", cls=Strict)(explain_command)
app.command("index", cls=Strict)(index_command)
app.command("neighbours", cls=Strict)(neighbours_command)
app.command("info", cls=Strict)(info_command)
app.command("push", cls=Strict)(push_command)


@app.command("convert", cls=Strict)
@with_debug
def convert_command(
    old: Annotated[Path, typer.Argument(help="A feature, model or posteriors file of version 1.")],
    new: Annotated[Path, typer.Argument(help="The same of version 2, which is written.")],
    overwrite: Overwrite = False,
) -> None:
    """Rewrite a file that an earlier version of this program made."""
    check_outputs({"NEW": new}, inputs=[old], overwrite=overwrite)
    from vggfeat.convert import convert

    out.print(f"{new}: {convert(old, new)}, made of {old}, which stays as it is", soft_wrap=True)


@app.command("datasets")
def datasets_command() -> None:
    """List the datasets."""
    from vggfeat.datasets import describe_datasets

    print_columns(("dataset", "what", "where"), describe_datasets())


@app.command("weights")
def weights_command() -> None:
    """List the sources of weights."""
    from vggfeat.sources import forms

    print_columns(("--weights", "what"), forms())


def main() -> None:
    """The `vggfeat` command."""
    run(app, "vggfeat")


if __name__ == "__main__":
    main()
