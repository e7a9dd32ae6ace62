"""`vggfeat extract` and `vggfeat merge`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vggfeat.errors import VggfeatError, WrongUsage, as_typed
from vggfeat.files import (
    check_outputs,
    refuse_inputs,
    refuse_same_names,
    try_each,
    weights_files,
    write_json,
)
from vggfeat.machine import duration
from vggfeat.options import (
    BatchSize,
    Device,
    Json,
    MaxPool,
    Overwrite,
    Precision,
    Workers,
    layers_typed,
    leave,
    sides_typed,
    with_debug,
)
from vggfeat.place import is_url
from vggfeat.terminal import (
    command,
    in_options,
    list_unreadable,
    out,
    print_table,
    progress,
    refused_otherwise,
    say,
)

if TYPE_CHECKING:
    from vggfeat.datasets import Items
    from vggfeat.extract import Report
    from vggfeat.plan import Plan
    from vggfeat.shards.run import Settings
    from vggfeat.store import Description
    from vggfeat.weights import Network


def _root(given: str | None) -> Path | str:
    """Where datasets lie: a folder, or a URL as it is typed."""
    root = given or os.environ.get("VGGFEAT_DATA") or "data"
    return root if is_url(root) else Path(root)


def _dataset_names(incomplete: str) -> list[tuple[str, str]]:
    """What a shell can complete --dataset to, with what it is."""
    from vggfeat.datasets import describe_datasets

    return [(name, about) for name, about, _ in describe_datasets() if name.startswith(incomplete)]


@with_debug
def extract_command(
    dataset: Annotated[
        str,
        typer.Option(help="One of `vggfeat datasets`.", autocompletion=_dataset_names),
    ],
    root: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Where the dataset lies, here or at a URL; default: $VGGFEAT_DATA, or ./data.",
            show_default=False,
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
            metavar="NAMES",
            help=(
                "The layer that describes, by the paper's name: conv1_1 ... pool5, fc6, fc7;"
                " of a transformer patches, cls, cls+patches, block0 ...; several, comma-separated,"
                " are described in one pass, and one is chosen later; default: fc7, or the last"
                " that the weights reach."
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
    out_name: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="PATH",
            help="The feature file to write; DIR/, or a URL: a set of shards.",
        ),
    ] = "feats.h5",
    engine: Annotated[
        Literal["local", "ray", "slurm"] | None,
        typer.Option(
            help=(
                "What describes shards where: processes of this machine, tasks of a Ray cluster,"
                " or this task of a slurm array; default: local."
            ),
            show_default=False,
        ),
    ] = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Images of a shard; default: 8192.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Of a Ray cluster, or auto; default: one of this machine's own.",
            show_default=False,
        ),
    ] = None,
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
    """Describe every image of a dataset; write one HDF5 feature file, or a set of shards."""
    qs, layers = None if scales is None else sides_typed(scales), layers_typed(layer)
    out_file, of_shards = Path(out_name), _is_set(out_name)
    _refuse_idle_engine(
        engine, shard_rows, address, workers, out_name, of_shards, overwrite or retry
    )
    spec = weights or net or "oxford:D"
    _refuse_idle(dataset, root, dry_run=dry_run, retry=retry, overwrite=overwrite and not json_file)
    refuse_same_names({"--out": out_file, "--json": json_file})
    from vggfeat import datasets
    from vggfeat.writer import behind_link, partial_of

    folder = _root(root)
    partial = partial_of(behind_link(out_file))
    here = folder if isinstance(folder, Path) else None
    read = [here, *weights_files(weights), partial, out_file if retry else None]
    output = {} if retry or of_shards else {"--out": out_file}
    check_outputs(
        {} if dry_run else output, texts={"--json": json_file}, inputs=read, overwrite=overwrite
    )
    from vggfeat.describe import description_of
    from vggfeat.extract import extract
    from vggfeat.look import Look, foreword
    from vggfeat.ranks import joined
    from vggfeat.regions import regions_of, views_of
    from vggfeat.sources import load, of_words, refuse_contradictions

    refuse_contradictions(net if weights else "", spec, layers or (), qs, max_pool)
    device, theirs = _devices(device, precision, engine)
    with joined(device, minutes=60 * 24 * 30) as ranks:
        if ranks.world != ranks.local_world:
            raise VggfeatError(
                "the processes must be on one machine; give each machine its own --dataset and"
                " --out"
            )
        items = datasets.load(dataset, folder, download=download)
        refuse_inputs(
            {"--out": out_file, "--json": json_file, "--out's": partial},
            [here, *weights_files(weights), *items.paths()],
        )
        _refuse_far(items, shard_rows, of_shards=of_shards, limit=limit, dry_run=dry_run)
        if limit is not None:
            items = items.first(limit)
        datasets.refuse_absent(items)
        described = regions_of(items, regions)
        source = (net, weights) if net and weights else (spec,)
        network = load(*source, device=ranks.device, precision=precision)
        with as_typed(of_words(network.spec)):
            if max_pool:
                network.set_pool(max_pool)
            description = description_of(network, layers, qs, mirror, described)
        if dry_run:
            if ranks.first:
                planned, before = _planned(
                    items,
                    network,
                    description,
                    store,
                    layers,
                    qs,
                    batch_size=batch_size,
                    workers=workers or ranks.cores,
                    processes=ranks.world,
                )
                _write_plan(
                    json_file, items, planned, before, f"on {ranks.device} in {network.precision}"
                )
                refused_otherwise(lambda: check_outputs(output, inputs=read, overwrite=overwrite))
            return
        if of_shards:
            if ranks.world > 1:
                raise VggfeatError("a set of shards has processes of its own: leave out torchrun")
            for remark in items.remarks:
                say(in_options(remark))
            if not items.containers:
                # who starts a set reads no image, since one may end the process that does
                seen = Look(len(views_of(items, described)), 0, {}, {})
                for what, words in foreword(items, seen, network, description, layers, qs):
                    say(in_options(f"{what}: {words}"))
            how = _settings(
                engine, workers, address, theirs, store, shard_rows, batch_size, weights
            )
            report = _extracted_set(items, network, description, out_name, how)
            _write_report(json_file, out_name, report, _descriptor(network, description), "")
            leave(report.unreadable)
            return
        with progress("extract", quiet=not ranks.first) as advance:
            report = extract(
                items,
                network,
                out_file,
                scales=qs,
                layer=layers,
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
    _write_report(json_file, out_name, report, _descriptor(network, description))
    leave(report.unreadable)


def _devices(device: str, precision: str, engine: str | None) -> tuple[str, str]:
    """Of this process, and of Ray's: who starts a job needs no GPU."""
    from vggfeat.devices import gpus

    if engine != "ray" or not device.startswith("cuda") or gpus()[0]:
        return device, ""
    if precision == "auto":
        raise VggfeatError(
            "--precision auto is by a GPU, and this machine has none: give bfloat16 or float32"
        )
    return "cpu", device


def _planned(
    items: Items,
    network: Network,
    description: Description,
    store: str,
    layers: tuple[str, ...] | None,
    qs: tuple[int, ...] | None,
    **how: Any,
) -> tuple[Plan, list[tuple[str, str]]]:
    """What it will take, and what is said of it first."""
    from vggfeat.look import foreword, look
    from vggfeat.plan import PLANNED, plan
    from vggfeat.regions import views_of

    views = views_of(items, description.regions).items
    seen = look(views, PLANNED)
    planned = plan(views, seen, network, description, store, rows=len(items), **how)
    return planned, foreword(items, seen, network, description, layers, qs)


def _settings(
    engine: str | None,
    workers: int | None,
    address: str | None,
    device: str,
    store: str,
    shard_rows: int | None,
    batch_size: int | None,
    weights: str | None,
) -> Settings:
    from vggfeat.shards.plan import SHARD_ROWS
    from vggfeat.shards.run import Settings as Made

    return Made(
        engine or "local",
        workers or 0,
        address,
        device,
        store=store,
        shard_rows=shard_rows or SHARD_ROWS,
        batch_size=batch_size,
        weights=weights or "",
        command=command(),
    )


def _extracted_set(
    items: Items,
    network: Network,
    description: Description,
    where: str,
    how: Settings,
) -> Report:
    """Describe items into a set of shards."""
    from vggfeat.shards.run import Told, extract_set

    with progress("extract") as advance:
        told = Told(advance, lambda line: say(in_options(line)))
        return extract_set(items, network, description, where, how, told)


def _refuse_far(
    items: Items, shard_rows: int | None, *, of_shards: bool, limit: int | None, dry_run: bool
) -> None:
    """What can't be done with images in a store, or inside of larger files."""
    if items.url is None and not items.containers:
        return
    where = "inside of larger files" if items.containers else "in a store"
    if not of_shards:
        raise WrongUsage(
            f"images {where} are described into a set of shards: give --out DIR/, or a URL;"
            " `vggfeat merge` makes one file of it"
        )
    if dry_run:
        raise WrongUsage(f"--dry-run looks at images' headers here: leave it out for those {where}")
    if items.containers and shard_rows is not None:
        raise WrongUsage("each file of images is a shard: leave out --shard-rows")
    if items.containers and limit is not None:
        raise WrongUsage("--limit counts images, and how many a file has isn't known: leave it out")


def _descriptor(network: Network, description: Description) -> str:
    """What each image is described by."""
    regions = f" ({' and '.join(description.regions)})" if description.of_boxes else ""
    each = (
        f"{layer}, {description.columns} x {network.dim(layer)}" for layer in description.layers
    )
    return f"{'; '.join(each)}{regions}"


def _is_set(out_name: str) -> bool:
    """Whether --out is of a set of shards, not of a file."""
    return out_name.endswith("/") or is_url(out_name) or Path(out_name, "plan.json").is_file()


def _refuse_other_folder(out_name: str) -> None:
    """A folder that is there, and holds what is no set of shards."""
    known = {"plan.json", "listing", "data", "attempts", "failed", "set.json"}
    if is_url(out_name) or Path(out_name, "plan.json").is_file():
        return
    with suppress(FileNotFoundError):
        others = [name for name in sorted(os.listdir(out_name)) if not name.startswith(".vggfeat-")]
        if odd := next((name for name in others if name not in known), None):
            raise VggfeatError(
                f"--out {out_name} is a folder with other files, such as {odd}: give a new one for"
                " a set of shards"
            )


def _refuse_idle_engine(
    engine: str | None,
    shard_rows: int | None,
    address: str | None,
    workers: int | None,
    out_name: str,
    of_shards: bool,
    replaces: bool,
) -> None:
    """Options of a set of shards that would change nothing."""
    given = {"--engine": engine, "--shard-rows": shard_rows, "--address": address}
    for option, value in given.items():
        if value is not None and not of_shards:
            raise WrongUsage(f"{option} is for a set of shards: give --out a folder, as DIR/")
    if address is not None and engine != "ray":
        raise WrongUsage("--address is of a Ray cluster: give --engine ray, or leave it out")
    if of_shards and replaces:
        raise WrongUsage(
            "a shard that is there stays: no --overwrite and no --retry with a set; give another"
            " --out"
        )
    if engine == "slurm":
        if workers is not None:
            raise WrongUsage(
                "a task of a slurm array is one process with all its cores: leave out --workers,"
                " and give the array more tasks"
            )
        from vggfeat.shards.engines.slurm import place_in_array

        place_in_array()
    if of_shards:
        _refuse_other_folder(out_name)


def _refuse_idle(
    dataset: str, root: str | None, *, dry_run: bool, retry: bool, overwrite: bool
) -> None:
    """Options of an extraction that would change nothing. overwrite: without another output."""
    from vggfeat.datasets import refuse_idle_root

    if root is not None:
        refuse_idle_root(dataset)
    if retry and dry_run:
        raise WrongUsage("--dry-run is of all images: leave out --retry")
    if retry and overwrite:
        raise WrongUsage("--retry keeps the feature file: leave out --overwrite")


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


def _write_report(
    json_file: Path | None,
    out_name: str,
    report: Report,
    descriptor: str,
    again: str = "the same command with --retry describes just these again",
) -> None:
    """What an extraction did. again: how images that can't be read are tried once more."""
    bad = report.unreadable
    facts = {
        "out": out_name,
        "images": report.images,
        "seconds": report.seconds,
        "unreadable": bad,
        "command": command(),
    }
    images = f"{report.images:,}" + (f" ({len(bad):,} unreadable)" if bad else "")
    time = f"{duration(report.run_seconds)}, {report.rate:,.2f} images/s"
    if report.earlier:
        images += (
            f": {report.earlier:,} by earlier runs, {report.images - report.earlier:,} by this one"
        )
        time += f"; {duration(report.seconds)} in all"
    rows = [("images", images), ("descriptor", descriptor), ("time", time)]
    try_each(
        lambda: write_json(json_file, facts),
        lambda: print_table(out_name, rows),
        lambda: list_unreadable(bad, f"`vggfeat info {out_name} --json FILE` writes them all"),
    )
    if bad and again:
        say(again)


@with_debug
def merge_command(
    features: Annotated[
        str, typer.Argument(metavar="SET", help="The set of shards: DIR, or a URL.")
    ],
    out_file: Annotated[Path, typer.Option("--out", help="The feature file to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Make one feature file of a set of shards, bit for bit."""
    check_outputs({"--out": out_file}, inputs=[Path(features)], overwrite=overwrite)
    from vggfeat.shards.sharded import merge

    with progress("merge") as advance:
        rows, unreadable = merge(features, out_file, overwrite=overwrite, advance=advance)
    out.print(f"{out_file}: {rows:,} images, of {features}, which stays as it is", soft_wrap=True)
    leave(unreadable)
