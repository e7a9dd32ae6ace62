"""The `vggfeat` command: parse, call one function, print.

What it writes where, and its exit statuses, are `terminal`'s.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin()

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vggfeat.checked import fitted, parse_json, shown
from vggfeat.errors import VggfeatError, WrongUsage, as_typed
from vggfeat.files import (
    check_outputs,
    plain,
    refuse_inputs,
    refuse_same_names,
    try_each,
    weights_files,
    write_json,
    write_text,
)
from vggfeat.machine import CORES, duration
from vggfeat.options import (
    BatchSize,
    Device,
    Json,
    MaxPool,
    Moved,
    Overwrite,
    Pool,
    Precision,
    Root,
    StoredScales,
    Strict,
    Workers,
    costs_typed,
    leave,
    refuse_repeated,
    sides_typed,
    typed,
    with_debug,
)
from vggfeat.terminal import (
    columns,
    command,
    in_options,
    list_unreadable,
    out,
    print_table,
    progress,
    run,
    say,
)

if TYPE_CHECKING:
    import numpy as np

    from vggfeat.datasets import Items
    from vggfeat.extract import Report
    from vggfeat.model import Model
    from vggfeat.plan import Plan
    from vggfeat.results import Results
    from vggfeat.store import Description, Features
    from vggfeat.table1 import Stack

MOST_DEPTH = 8  # of records inside records that are printed

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Dense multi-scale VGG descriptors, and linear SVMs on them (arXiv 1409.1556, appendix B)."
    ),
)


def _root(given: Path | None) -> Path:
    """Where datasets lie."""
    return given or Path(os.environ.get("VGGFEAT_DATA") or "data")


def _dataset_names(incomplete: str) -> list[tuple[str, str]]:
    """What a shell can complete --dataset to, with what it is."""
    from vggfeat.datasets import describe_datasets

    return [(name, about) for name, about, _ in describe_datasets() if name.startswith(incomplete)]


@app.command("extract", cls=Strict)
@with_debug
def extract_command(
    dataset: Annotated[
        str,
        typer.Option(help="One of `vggfeat datasets`.", autocompletion=_dataset_names),
    ],
    root: Annotated[
        Path | None,
        typer.Option(
            help="Where the dataset lies; default: $VGGFEAT_DATA, or ./data.", show_default=False
        ),
    ] = None,
    net: Annotated[
        str,
        typer.Option(
            help=(
                "The net of Table 1 that the weights must hold; alone, as D or E, its released"
                " weights."
            ),
            show_default=False,
        ),
    ] = "",
    weights: Annotated[
        str | None,
        typer.Option(
            help=(
                "A file, or a source of `vggfeat weights`; default: oxford:D, the released net D."
            ),
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help=(
                "The layer that describes, by the paper's name: conv1_1 ... pool5, fc6, fc7;"
                " default: fc7, or the last that the weights reach."
            ),
            show_default=False,
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            help=(
                "Smallest sides Q in pixels, comma-separated; default: those that the net was"
                " trained at, 256,384,512 for the paper's."
            ),
            show_default=False,
        ),
    ] = None,
    mirror: Annotated[
        bool, typer.Option(help="Average each descriptor with the mirror image's.")
    ] = True,
    regions: Annotated[
        Literal["image", "box", "image,box"] | None,
        typer.Option(
            help=(
                "What of an image is described, where items are boxes in images: the image, what"
                " is in the box, or both; default: both."
            ),
            show_default=False,
        ),
    ] = None,
    max_pool: MaxPool = None,
    store: Annotated[
        Literal["float16", "float32"], typer.Option(help="Type of the stored descriptors.")
    ] = "float32",
    out_file: Annotated[Path, typer.Option("--out", help="The feature file to write.")] = Path(
        "feats.h5"
    ),
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Describe only the first so many images.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the dataset into --root first.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what it will take, by a trial, and write nothing."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace output files that exist, and a feature file begun otherwise.",
        ),
    ] = False,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry",
            help="Keep the feature file, and describe what is unreadable in it once more.",
        ),
    ] = False,
    json_file: Json = None,
) -> None:
    """Describe every image of a dataset; write one HDF5 feature file."""
    qs = None if scales is None else sides_typed(scales)
    spec = weights or net or "oxford:D"
    _refuse_idle(dataset, root, dry_run=dry_run, retry=retry, overwrite=overwrite and not json_file)
    refuse_same_names({"--out": out_file, "--json": json_file})
    from vggfeat import datasets
    from vggfeat.writer import behind_link, partial_of

    folder = _root(root)
    partial = partial_of(behind_link(out_file))
    read = [folder, *weights_files(weights), partial, out_file if retry else None]
    output = {} if retry else {"--out": out_file}
    check_outputs(
        {} if dry_run else output, texts={"--json": json_file}, inputs=read, overwrite=overwrite
    )
    from vggfeat.describe import description_of
    from vggfeat.extract import extract
    from vggfeat.look import foreword, look
    from vggfeat.plan import PLANNED, plan
    from vggfeat.ranks import joined
    from vggfeat.regions import regions_of, views_of
    from vggfeat.sources import load, of_words, refuse_contradictions

    refuse_contradictions(net if weights else "", spec, layer, qs, max_pool)
    with joined(device, minutes=60 * 24 * 30) as ranks:
        if ranks.world != ranks.local_world:
            raise VggfeatError(
                "the processes must be on one machine; give each machine its own --dataset and"
                " --out"
            )
        items = datasets.load(dataset, folder, download=download)
        refuse_inputs(
            {"--out": out_file, "--json": json_file, "--out's": partial},
            [folder, *weights_files(weights), *items.paths()],
        )
        if limit is not None:
            items = items.first(limit)
        datasets.refuse_absent(items)
        described = regions_of(items, regions)
        source = (net, weights) if net and weights else (spec,)
        network = load(*source, device=ranks.device, precision=precision)
        with as_typed(of_words(network.spec)):
            if max_pool:
                network.set_pool(max_pool)
            description = description_of(network, layer, qs, mirror, described)
        if dry_run:
            if ranks.first:
                views = views_of(items, described).items
                seen = look(views, PLANNED)
                planned = plan(
                    views,
                    seen,
                    network,
                    description,
                    store,
                    rows=len(items),
                    batch_size=batch_size,
                    workers=workers or ranks.cores,
                    processes=ranks.world,
                )
                before = foreword(items, seen, network, description, layer, qs)
                _write_plan(
                    json_file, items, planned, before, f"on {ranks.device} in {network.precision}"
                )
                try:
                    check_outputs(output, inputs=read, overwrite=overwrite)
                except VggfeatError as error:
                    say(in_options(f"without --dry-run this would be refused: {error}"))
            return
        with progress("extract", quiet=not ranks.first) as advance:
            report = extract(
                items,
                network,
                out_file,
                scales=qs,
                layer=layer,
                mirror=mirror,
                regions=regions,
                batch_size=batch_size,
                workers=workers or ranks.cores,
                store=store,
                overwrite=overwrite and not retry,
                retry=retry,
                command=command(),
                ranks=ranks,
                progress=advance,
                say=lambda line: say(in_options(line)),
            )
        if not ranks.first:
            return
    values = f"{description.columns} x {network.dim(description.layer)}"
    regions_told = f" ({' and '.join(described)})" if description.of_boxes else ""
    _write_report(json_file, out_file, report, f"{description.layer}, {values}{regions_told}")
    leave(report.unreadable)


def _refuse_idle(
    dataset: str, root: Path | None, *, dry_run: bool, retry: bool, overwrite: bool
) -> None:
    """Options of an extraction that would change nothing. overwrite: without another output."""
    from vggfeat.datasets import refuse_idle_root

    if root is not None:
        refuse_idle_root(dataset)
    if retry and dry_run:
        raise WrongUsage("--dry-run is of all images: leave out --retry")
    if retry and overwrite:
        raise WrongUsage("--retry keeps the feature file: leave out --overwrite")


@app.command("svm", cls=Strict)
@with_debug
def svm_command(
    context: typer.Context,
    features: Annotated[
        list[Path],
        typer.Option(help="A feature file; several of one dataset are stacked (fusion of nets)."),
    ],
    pool: Pool = None,
    scales: StoredScales = None,
    C: Annotated[
        str,
        typer.Option(
            "--C",
            help="The SVM's C: a value or a list; auto: chosen on the validation part.",
        ),
    ] = "auto",
    loss: Annotated[
        Literal["squared_hinge", "hinge"],
        typer.Option(help="What the SVM minimises, beside the norm of its weights."),
    ] = "squared_hinge",
    class_weight: Annotated[
        Literal["balanced"] | None,
        typer.Option(
            help="balanced: errors of small classes count for more, as in scikit-learn.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Draw the random splits anew from this seed; default: those in the file.",
            show_default=False,
        ),
    ] = None,
    submission: Annotated[
        Path | None,
        typer.Option(
            help="Also write VOC's comp2 (comp10) files of the test images into this folder."
        ),
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Also save the classifier in this HDF5 file.")
    ] = None,
    solver: Annotated[
        Literal["newton", "liblinear"],
        typer.Option(
            help="newton trains all classes at once; liblinear is scikit-learn's, as a reference."
        ),
    ] = "newton",
    device: Device = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="Threads that train the SVMs.", show_default="as many as there are cores"
        ),
    ] = CORES,
    overwrite: Overwrite = False,
    json_file: Json = None,
    ledger: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Also put the figure into Table 11 or 12 of this page, beside the paper's; its"
                " cells are kept beside it."
            ),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train and score a linear SVM by the dataset's protocol."""
    qs = None if scales is None else sides_typed(scales)
    cs = costs_typed(C)
    refuse_repeated("--features", features)
    if solver == "liblinear":
        for option in ("device", "workers"):
            if option in typed(context):
                raise WrongUsage(f"--solver liblinear runs on one core: leave out --{option}")
    check_outputs(
        {"--out": out_file},
        texts={"--json": json_file},
        folders={"--submission": submission},
        inputs=features,
        overwrite=overwrite,
    )
    if ledger:
        _check_ledger(ledger, [*features, out_file, json_file])
    import torch

    from vggfeat import protocols
    from vggfeat.classify import problem_from
    from vggfeat.datasets.voc import check_submission, write_submission
    from vggfeat.devices import resolve_device
    from vggfeat.model import model_from, save_model
    from vggfeat.results import seen_by_net
    from vggfeat.transfer import refuse_other_data

    protocols.grid_of(cs)
    on = resolve_device(device)
    problem, parts, made = problem_from(features, pool, qs)
    if ledger:
        refuse_other_data(problem.dataset)
    if submission:
        if "test" not in problem.splits:
            raise VggfeatError(
                "--submission is of the test part, and these features have none: VOC's is described"
                " where its list of test images, test.txt, is there with the images"
            )
        test = problem.splits["test"]
        check_submission(submission, test, problem.classes, problem.names, problem.protocol)
    # each takes memory at once, whether there is a core for it or not
    torch.set_num_threads(min(workers, CORES))
    outcome = protocols.run(
        problem,
        C=cs,
        seed=seed,
        loss=loss,
        solver=solver,
        device=str(on),
        class_weight=class_weight,
        progress=lambda line: say(in_options(line)),
    )
    results = replace(outcome.results, made=replace(made, command=command()))
    seen, scored = seen_by_net(results)
    if scored:
        say(f"warning: the net was trained on {seen}")
    for line in results.same_images:
        say(f"warning: {line}")

    def submit() -> None:
        if submission:
            scored_test = outcome.scored["test"]
            write_submission(
                submission,
                scored_test.rows,
                scored_test.scores,
                problem.classes,
                problem.names,
                problem.protocol,
            )

    def save() -> None:
        if out_file:
            save_model(out_file, model_from(outcome, problem.classes, parts, results))

    try_each(
        lambda: write_json(json_file, results.to_json()),
        save,
        submit,
        lambda: _print_results(results),
        lambda: _to_ledger(results, ledger),
    )


def _check_ledger(page: Path, inputs: Sequence[Path | None]) -> None:
    """Refuse a page that can't be written, or isn't one, before the work."""
    from vggfeat.transfer import CELLS, check_page

    updated = {"--ledger": page, "the cells beside it": page.with_name(CELLS)}
    check_outputs(updated, inputs=inputs, overwrite=True)  # in place, by design
    check_page(page)


def _to_ledger(results: Results, page: Path | None) -> None:
    """The figure into the page, and the table that it is in, printed."""
    if page is None:
        return
    from vggfeat.transfer import cell_of, write_cell

    heading, lines = write_cell(cell_of(results), page)
    for line in ["", heading, "", *lines]:
        out.print(line, soft_wrap=True)


@app.command(cls=Strict)
@with_debug
def predict(
    images: Annotated[list[Path], typer.Argument(help="The images to classify.")],
    model: Annotated[Path, typer.Option(help="A classifier of `vggfeat svm --out`.")],
    weights: Annotated[
        list[str] | None,
        typer.Option(help=f"{Moved}; of several nets, each in its order.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print an image.")] = 5,
    batch_size: BatchSize = None,
    device: Device = "auto",
    workers: Workers = None,
    json_file: Json = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Also write all scores as CSV to this file.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score new images with a saved classifier."""
    from vggfeat.model import open_model

    check_outputs(
        {},
        texts={"--json": json_file, "--csv": csv_file},
        inputs=[*images, model, *weights_files(*(weights or []))],
        overwrite=overwrite,
    )
    classifier = open_model(model, weights=weights or (), device=device)
    refuse_inputs(
        {"--json": json_file, "--csv": csv_file},
        weights_files(*(part.weights for part in classifier.parts)),
    )
    scores_NK, bad = classifier.scores(
        images,
        batch_size=batch_size,
        workers=workers or CORES,
        progress=True,
        return_unreadable=True,
    )
    table = columns("image", "class", "score")
    records: list[dict[str, Any]] = []
    for i, path in enumerate(images):
        if i in bad:
            records.append({"image": str(path), "error": bad[i]})
            continue
        order = (-scores_NK[i]).argsort(kind="stable")[:top]
        best = [(classifier.classes[k], float(scores_NK[i, k])) for k in order]
        for rank, (name, score) in enumerate(best):
            table.add_row("" if rank else str(path), name, f"{score:+.3f}")
        records.append(
            {"image": str(path), "top": [{"class": name, "score": score} for name, score in best]}
        )
    try_each(
        lambda: write_json(json_file, records),
        lambda: write_text(csv_file, _scores_csv(images, classifier.classes, scores_NK, bad)),
        lambda: out.print(table) if table.row_count else None,
    )
    list_unreadable(
        {str(images[i]): reason for i, reason in sorted(bad.items())}, "--json FILE writes them all"
    )
    leave(bad)


@app.command("report", cls=Strict)
@with_debug
def report_command(
    results: Annotated[
        Path | None,
        typer.Option(
            help="The results of `vggfeat svm --json`; default: the model's.", show_default=False
        ),
    ] = None,
    features: Annotated[
        list[Path],
        typer.Option(
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
    overwrite: Overwrite = False,
) -> None:
    """One HTML page to look at: figures, curves, confusions, right and wrong images, a map of the
    descriptors.
    """
    if not results and not model:
        raise WrongUsage("a report needs --results or --model")
    if root and not features:
        raise WrongUsage("--root is of the images that --features knows: give both, or neither")
    refuse_repeated("--features", features)
    check_outputs(
        {"--out": out_file}, inputs=[results, *features, model, root], overwrite=overwrite
    )
    from vggfeat.datasets import at_hand
    from vggfeat.report import write_report
    from vggfeat.results import read_results
    from vggfeat.store import open_features

    files = [open_features(path) for path in features]
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
            refuse_inputs({"--out": out_file}, items.paths())
    told, trained = read_results(results) if results else None, None
    if model:
        from vggfeat.model import open_model

        trained = open_model(model)
    page, left_out = write_report(told, files, trained, items, why_not)
    write_text(out_file, page)
    for line in left_out:
        say(in_options(f"left out: {line}"))
    out.print(f"{out_file}: {len(page) / 1e6:.1f} MB")


@app.command("neighbours", cls=Strict)
@with_debug
def neighbours_command(
    features: Annotated[Path, typer.Option(help="The feature file to look in.")],
    query: Annotated[str, typer.Option(help="An image, or the name of one in the feature file.")],
    top: Annotated[int, typer.Option(min=1, help="How many neighbours to find.")] = 10,
    pool: Pool = None,
    scales: StoredScales = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Also draw them in this file: .png, .jpg or .webp.", show_default=False),
    ] = None,
    root: Root = None,
    weights: Annotated[str | None, typer.Option(help=f"{Moved}.", show_default=False)] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """The images that are nearest to a query, by the cosine of their descriptors."""
    qs = None if scales is None else sides_typed(scales)
    if picture and picture.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise WrongUsage(f"--picture {picture} must end in .png, .jpg or .webp")
    if root and not picture:
        raise WrongUsage("--root is of the images that --picture draws: give both, or neither")
    check_outputs(
        {"--picture": picture},
        texts={"--json": json_file},
        inputs=[features, Path(query), *weights_files(weights), root],
        overwrite=overwrite,
    )
    from vggfeat.datasets import at_hand
    from vggfeat.datasets.protocol import pool_of
    from vggfeat.devices import resolve_device
    from vggfeat.neighbours import draw, nearest, query_of
    from vggfeat.store import open_features

    resolve_device(device)
    file = open_features(features)
    outputs = {"--picture": picture, "--json": json_file}
    refuse_inputs(outputs, weights_files(file.description.weights))
    items, why_not = None, ""
    if picture:
        items, why_not = at_hand(
            file.attributes["dataset"],
            file.names,
            root,
            file.attributes["root"],
            files=file.files,
            boxes=file.boxes,
        )
        if items is not None:
            refuse_inputs(outputs, items.paths())
    over_scales, why = (pool, "--pool") if pool else pool_of(file.attributes["protocol"])
    described, row = query_of(file, query, pool=over_scales, scales=qs, spec=weights, device=device)
    found = nearest(file, described, pool=over_scales, scales=qs, top=top, without=row)
    table = columns("", "image", "labels", "cosine")
    for rank, neighbour in enumerate(found, 1):
        labels = ", ".join(neighbour.labels)
        table.add_row(str(rank), neighbour.name, labels, f"{neighbour.cosine:.4f}")
    missing = ""

    def picture_them() -> None:
        nonlocal missing
        if picture:
            missing = draw(picture, query, row, found, items, why_not)

    try_each(
        lambda: write_json(json_file, [neighbour.__dict__ for neighbour in found]),
        picture_them,
        lambda: out.print(table),
    )
    if len(qs or file.description.scales) > 1 and pool is None:
        say(f"pool: {over_scales} ({why})")
    if missing:
        say(in_options(f"left out: {missing}"))
    if weights and row is not None:
        say(f"--weights isn't used: {features} has the descriptor of {query}")
    if picture:
        out.print(f"picture: {picture}")


@app.command(cls=Strict)
@with_debug
def info(
    file: Annotated[
        Path,
        typer.Argument(
            help=(
                "A feature file, a model, or a net of Table 1, as D; a file of a net's name comes"
                " first."
            )
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also hold every descriptor against its checksum.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every attribute, also those of the weights.")
    ] = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Tell about a feature file, a model or a net of the paper; all that is known with --all, or in
    --json.
    """
    from vggfeat.table1 import NETS

    of_net = str(file) in NETS and not file.is_file()
    inputs = [] if of_net else [file]
    check_outputs({}, texts={"--json": json_file}, inputs=inputs, overwrite=overwrite)
    if of_net:
        if verify:
            raise WrongUsage("--verify is for a feature file: leave it out")
        _tell_net(str(file), everything, json_file)
        return
    if not os.path.lexists(file) and str(file).isalnum():  # rather a net's name than a file's
        raise VggfeatError(f"no feature file at {file}; the nets of Table 1 are {', '.join(NETS)}")
    from vggfeat.convert import MODEL, POSTERIORS
    from vggfeat.hdf5 import format_of
    from vggfeat.store import open_features

    facts: dict[str, Any]
    unreadable: dict[str, str] = {}
    kind = format_of(file)
    if kind == POSTERIORS:
        raise VggfeatError(
            f"{file} holds kept posteriors: `python -m pretrain.evaluate --from {file}` looks at"
            " them"
        )
    if kind == MODEL:
        from vggfeat.model import open_model

        m = open_model(file)
        facts = {
            "kind": "model",
            "classes": len(m.classes),
            "descriptor": m.coef_KD.shape[1],
            "pool": m.pool,
            "multi_label": m.multi_label,
        }
        for i, part in enumerate(m.parts):
            facts |= {f"network {i + 1} {key}": value for key, value in part.__dict__.items()}
        facts |= m.results.in_brief() if m.results else {}
        rows = _model_rows(m)
    else:
        f = open_features(file)
        if verify:
            f.verify()  # a model is read whole anyway
        facts = {
            "kind": "features",
            "images": f.shape[0],
            "unreadable": len(f.errors),
            "descriptors": f"{f.shape} {f.dtype}",
            "classes": len(f.classes),
            "labels": (
                "none"
                if f.labels is None
                else ("several an image" if f.labels.ndim == 2 else "one an image")
            ),
            "splits": {name: len(rows) for name, rows in f.splits.items()},
            "checked": "every byte" if verify else "all but the descriptors (--verify)",
            **f.description.to_dict(),
            **{k: v for k, v in f.attributes.items() if k != "description"},
        }
        rows = _feature_rows(f, facts["labels"], facts["checked"])
        unreadable = {f.names[i]: reason for i, reason in f.errors.items()}
    write_json(json_file, facts if kind == MODEL else {**facts, "errors": unreadable})
    print_table(str(file), list(_flat(plain(facts))) if everything else rows)
    list_unreadable(unreadable, "--json FILE writes them all")


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

    table = columns("dataset", "what", "where")
    for row in describe_datasets():
        table.add_row(*row)
    out.print(table)


@app.command("weights")
def weights_command() -> None:
    """List the sources of weights."""
    from vggfeat.sources import forms

    table = columns("--weights", "what")
    for row in forms():
        table.add_row(*row)
    out.print(table)


# --- printing -------------------------------------------------------------------------------------


def _write_plan(
    json_file: Path | None,
    items: Items,
    planned: Plan,
    before: list[tuple[str, str]],
    where: str,
) -> None:
    """What an extraction would take, beside what it would describe. where: the device, in words."""
    cheaper = planned.cheaper and in_options(planned.cheaper)
    write_json(json_file, {**planned.__dict__, "cheaper": cheaper})
    for remark in items.remarks:
        say(in_options(remark))
    rows = [*before, ("expected time", f"{duration(planned.seconds)} {where}")]
    if planned.cheaper_seconds is not None:
        rows.append(("cheaper", f"{cheaper}: about {duration(planned.cheaper_seconds)}"))
    print_table("plan", [*rows, ("feature file", f"{planned.bytes / 1e6:,.1f} MB")])


def _write_report(json_file: Path | None, out_file: Path, report: Report, descriptor: str) -> None:
    """What an extraction did."""
    bad = report.unreadable
    facts = {
        "out": str(out_file),
        "images": report.images,
        "seconds": report.seconds,
        "unreadable": bad,
        "command": command(),
    }
    images = f"{report.images:,}" + (f" ({len(bad):,} unreadable)" if bad else "")
    time = f"{duration(report.seconds)}, {report.rate:,.2f} images/s"
    if report.earlier:
        images += (
            f": {report.earlier:,} by earlier runs, {report.images - report.earlier:,} by this one"
        )
        time = (
            f"{duration(report.run_seconds)}, {report.rate:,.2f} images/s;"
            f" {duration(report.seconds)} in all"
        )
    rows = [("images", images), ("descriptor", descriptor), ("time", time)]
    try_each(
        lambda: write_json(json_file, facts),
        lambda: print_table(str(out_file), rows),
        lambda: list_unreadable(bad, f"`vggfeat info {out_file} --json FILE` writes them all"),
    )
    if bad:
        say("the same command with --retry describes just these again")


def _scores_csv(
    images: Sequence[Path], classes: Sequence[str], scores_NK: np.ndarray, bad: dict[int, str]
) -> str:
    """A line an image with the score of each class, none where it was unreadable."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", *classes])
    for i, path in enumerate(images):
        cells = (
            [""] * len(classes) if i in bad else [repr(score) for score in scores_NK[i].tolist()]
        )
        writer.writerow([path, *cells])
    return text.getvalue()


def _print_results(results: Results) -> None:
    from vggfeat.results import choice_columns, class_columns, summary, title

    print_table(title(results), summary(results))
    for head, rows in (choice_columns(results), class_columns(results)):
        if 0 < len(rows) <= 20:
            table = columns(*head)
            for row in rows:
                table.add_row(*row)
            out.print(table)


def _tell_net(net: str, everything: bool, json_file: Path | None) -> None:
    """Tables 1 and 2 of one net, and Sect. 2.3's arithmetic of its stacks, as computed."""
    from vggfeat.table1 import TABLE_2, layers, stacks

    every, own = layers(net), [stack for stack in stacks(net) if stack.field > 3]
    weighted = [layer for layer in every if layer.parameters]
    parameters = sum(layer.parameters for layer in every)
    multiply_adds = sum(layer.multiply_adds for layer in every)
    facts: dict[str, Any] = {
        "kind": "net",
        "net": net,
        "crop": every[0].side,
        "classes": every[-1].channels,
        "weight_layers": len(weighted),
        "parameters": parameters,
        "table_2_millions": TABLE_2.get(net),
        "multiply_adds": multiply_adds,
        "layers": [layer._asdict() for layer in every],
        "stacks": [stack._asdict() for stack in own],
    }
    write_json(json_file, facts)
    title = f"net {net}, a crop of {every[0].side}x{every[0].side} pixels"
    if everything:
        print_table(title, list(_flat(plain(facts))))
        return
    head = ("layer", "kernel", "channels", "side", "parameters", "MMAC", "field", "stride")
    table = columns(*head, title=title, title_justify="left")
    for layer in every:
        table.add_row(
            layer.name,
            "-" if layer.name.startswith("lrn") else f"{layer.kernel}x{layer.kernel}",
            str(layer.channels),
            str(layer.side),
            f"{layer.parameters:,}" if layer.parameters else "-",
            f"{layer.multiply_adds / 1e6:,.1f}" if layer.multiply_adds else "-",
            str(layer.field),
            str(layer.stride),
        )
    out.print(table)
    theirs = f"; Table 2: {TABLE_2[net]} million" if net in TABLE_2 else ""
    for line in (
        "side: of a layer's output, in positions; MMAC: million multiply-adds, biases left out;",
        "field, stride: pixels that a position sees as the net runs densely, and to the next one",
        f"weight layers: {len(weighted)}",
        f"parameters: {parameters:,}{theirs}",
        f"multiply-adds: {multiply_adds / 1e9:.2f} billion",
        *map(_stack_line, own),
    ):
        out.print(line, soft_wrap=True)


def _stack_line(stack: Stack) -> str:
    """Sect. 2.3 of one stack: 3x3 layers against one layer of their field, or the other way."""
    side = f"{stack.field}x{stack.field}"
    several = len(stack.kernels) > 1
    other, weights = (
        (f"one {side} layer", stack.one_layer)
        if several
        else (f"{stack.field // 2} layers of 3x3", stack.of_3x3)
    )
    difference = 100 * (weights / stack.weights - 1)
    return (
        f"{' + '.join(f'{k}x{k}' for k in stack.kernels)}"
        f" (stage{'s' * (len(stack.stages) > 1)} {', '.join(map(str, stack.stages))}):"
        f" a field of {side}, {stack.weights} C^2 weights; {other}: {weights} C^2,"
        f" {abs(difference):.0f} % {'more' if difference > 0 else 'fewer'}"
    )


def _feature_rows(f: Features, labels: str, checked: str) -> list[tuple[str, str]]:
    """What a person wants to know of a feature file."""
    facts = f.attributes
    parts: dict[str, list[str]] = {}
    for name, rows in sorted(f.splits.items(), key=lambda item: "test" in item[0]):
        split, _, part = name.rpartition("/")
        parts.setdefault(split or "splits", []).append(f"{part} {len(rows):,}")
    made = datetime.fromtimestamp(f.path.stat().st_mtime).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    version = facts.get("versions", {}).get("vggfeat")
    return [
        ("what", "feature file: a descriptor of each image at each scale"),
        ("data set", facts["dataset"] + (f", in {facts['root']}" if facts["root"] else "")),
        (
            "images" if f.boxes is None else "boxes",
            f"{f.shape[0]:,}"
            + (f", the first of {facts['total']:,}" if "total" in facts else "")
            + (f" ({len(f.errors):,} unreadable)" if f.errors else ""),
        ),
        ("classes", f"{len(f.classes):,}" if f.classes else "none"),
        ("labels", labels),
        *((split, ", ".join(of_split)) for split, of_split in parts.items()),
        ("protocol", facts["protocol"]),
        *_description_rows(f.description, f.shape[2]),
        *_trained_rows(facts.get("weights_metadata")),
        ("stored as", str(f.dtype)),
        ("checked", checked),
        (
            "made",
            f"{made}, in {duration(facts['seconds'])}"
            + (f", by vggfeat {version}" if version else ""),
        ),
        ("command", facts["command"]),
    ]


def _model_rows(m: Model) -> list[tuple[str, str]]:
    """What a person wants to know of a saved classifier."""
    from vggfeat.results import summary

    rows = [
        ("what", "model: linear SVMs on descriptors"),
        ("classes", f"{len(m.classes):,}"),
        ("labels", "several an image" if m.multi_label else "one an image"),
        ("descriptor", f"{m.coef_KD.shape[1]:,} values, {m.pool} over the scales"),
    ]
    for part in m.parts:
        rows += _description_rows(part)
    if m.results:
        rows += [("data set", m.results.dataset), *summary(m.results)]
        rows += [("command", m.results.made.command)] if m.results.made.command else []
    return rows


def _description_rows(description: Description, values: int | None = None) -> list[tuple[str, str]]:
    kept_apart = "; `svm --pool` pools them" if len(description.scales) > 1 else ""
    rounds = {"floor": "down", "ceil": "up"}.get(description.pool)
    return [
        ("net", description.net),
        ("layer", description.layer + (f", {values:,} values" if values else "")),
        *([("regions", " and ".join(description.regions))] if description.of_boxes else []),
        ("scales", ", ".join(map(str, description.scales)) + (kept_apart if values else "")),
        ("mirror images", "averaged in" if description.mirror else "left out"),
        *([("max-pooling", f"odd sides rounded {rounds}")] if rounds else []),
        ("weights", f"{description.weights}, sha256 {description.fingerprint[:12]}"),
        ("precision", description.precision),
    ]


def _trained_rows(metadata: Any) -> list[tuple[str, str]]:
    """What the weights' own metadata say of their training, where it is told as our files tell
    it.
    """
    from vggfeat.metrics import error_text

    metadata = metadata if isinstance(metadata, dict) else {}
    names = {"source": "weights from", "train_scale": "trained at S", "epoch": "epochs"}
    rows = [(name, str(metadata[key])[:200]) for key, name in names.items() if metadata.get(key)]
    with suppress(VggfeatError):
        kind = dict[str, dict[str, float | None]]
        errors = fitted(parse_json(str(metadata.get("errors", "{}")), ""), kind, "")
        for images, error in errors.items():
            told = [
                f"{name.replace('top', 'top-')} {error_text(value)} %"
                for name, value in error.items()
            ]
            rows.append((f"error, {images.replace('_', '-')} images", ", ".join(told)))
    return rows


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every value of a record with its name, also of the records inside it, and of those that are
    JSON in a text.
    """
    if isinstance(value, str) and value[:1] in ("{", "["):
        with suppress(VggfeatError):
            value = parse_json(value, name)
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        value = ", ".join(map(str, value)) or "-"
    if not isinstance(value, dict | list):
        yield name, value if isinstance(value, str) else json.dumps(value)
        return
    if depth > MOST_DEPTH:
        yield name, shown(value)
        return
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for key, item in items:
        yield from _flat(item, f"{name} {key}".strip(), depth + 1)


def main() -> None:
    """The `vggfeat` command."""
    run(app, "vggfeat")


if __name__ == "__main__":
    main()
