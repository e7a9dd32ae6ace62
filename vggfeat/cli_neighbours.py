"""`vggfeat index` and `vggfeat neighbours`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.files import check_outputs, refuse_inputs, try_each, weights_files, write_json
from vggfeat.options import (
    Device,
    Json,
    Moved,
    Overwrite,
    Pool,
    Root,
    StoredLayer,
    StoredScales,
    leave,
    sides_typed,
    typed,
    with_debug,
)
from vggfeat.place import local
from vggfeat.terminal import (
    columns,
    in_options,
    list_unreadable,
    out,
    print_table,
    progress,
    say,
)

if TYPE_CHECKING:
    from vggfeat.datasets import Items
    from vggfeat.index import Index
    from vggfeat.neighbours import Answer, Asked
    from vggfeat.store import Features

INDEX = "vggfeat-index"  # as in its file, which is told without PyTorch
TABLED = 20  # queries whose neighbours are printed
FEW = 20  # unreadable queries that are listed


@with_debug
def index_command(
    context: typer.Context,
    features: Annotated[
        str, typer.Option(metavar="PATH", help="The feature file, or set of shards, to search in.")
    ],
    out_file: Annotated[Path, typer.Option("--out", help="The index to write.")],
    layer: StoredLayer = None,
    pool: Pool = None,
    scales: StoredScales = None,
    recall: Annotated[
        float,
        typer.Option(
            help="Share of the ten nearest images that a search by lists finds, at least."
        ),
    ] = 0.95,
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Features of images like those to be searched for, to measure the recall with;"
            " default: images of the index.",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Without lists: each search compares all images.")
    ] = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Write the descriptors of a feature file once more, ready to be searched by `neighbours`; of
    many images with lists of similar ones, of which a search looks through a few.
    """
    qs = None if scales is None else sides_typed(scales)
    if not 0 < recall <= 1:
        raise WrongUsage(f"--recall must lie in 0..1, not {recall}")
    if exact and {"queries", "recall"} & typed(context):
        raise WrongUsage("--queries and --recall are for lists, and --exact makes none")
    read = [features, *([queries] if queries else [])]
    check_outputs(
        {"--out": out_file},
        texts={"--json": json_file},
        inputs=local(read),
        overwrite=overwrite,
    )
    from vggfeat.features import open_features
    from vggfeat.index import build_index, told_of
    from vggfeat.terminal import command

    source, remarks = _made_of(open_features(features, layer), pool, qs)
    queries_MD = None
    if queries:
        like = open_features(queries, source.description.layer)
        if like.rows_digest == source.rows_digest:
            raise VggfeatError(f"{queries} has the images of {features}: leave out `queries`")
        queries_MD = source.like(like)[like.readable.nonzero()[0]]
    with progress("index") as show:
        index = build_index(
            out_file,
            source,
            recall=recall,
            exact=exact,
            queries_MD=queries_MD,
            command=command(),
            progress=show,
            say=lambda line: say(in_options(line)),
        )
    try_each(
        lambda: write_json(json_file, {"out": str(out_file), **told_of(index)}),
        lambda: print_table(str(out_file), index_rows(index)),
    )
    for line in remarks:
        say(line)


def _made_of(
    file: Features, pool: str | None, scales: tuple[int, ...] | None
) -> tuple[Index, list[str]]:
    """A feature file to search; and, where nobody has said it, how several scales are pooled."""
    from vggfeat.datasets.protocol import pool_of
    from vggfeat.index import index_of

    over_scales, why = (pool, "--pool") if pool else pool_of(file.attributes["protocol"])
    index = index_of(file, pool=over_scales, scales=scales)
    several = len(index.description.scales) > 1 and pool is None
    return index, [f"pool: {over_scales} ({why})"] * several


def index_rows(index: Index) -> list[tuple[str, str]]:
    """What a person wants to know of an index."""
    n, D = index.rows.shape
    bad = f" ({len(index.errors):,} unreadable)" if index.errors else ""
    how = "all images are compared"
    rows = [
        ("what", "index: descriptors that `neighbours` searches"),
        ("images" if index.boxes is None else "boxes", f"{n:,}{bad}"),
        ("descriptor", f"{D:,} values, {index.pool} over the scales, float16"),
    ]
    if index.tuning is not None and index.lists is not None:
        told = index.tuning
        how = (
            f"{told['probes']:,} of {len(index.lists.ends):,} lists, {told['candidates']:,}"
            " candidates compared"
        )
        recall = f"{told['recall']:.3f} of the ten nearest, of {told['queries']:,} queries"
        rows.append(("recall", f"{recall} (asked: {told['asked']:g})"))
    return [*rows, ("search", how)]


@with_debug
def neighbours_command(
    context: typer.Context,
    features: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Where to look: a feature file, a set of shards, or an index of `vggfeat index`.",
        ),
    ],
    query: Annotated[
        list[str],
        typer.Option(
            help=(
                "What to look for: an image, the name of one in the feature file, a folder, a CSV"
                " file or a list (.txt) of images, - for a list on stdin, or another feature file."
            )
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many neighbours to find.")] = 10,
    layer: StoredLayer = None,
    pool: Pool = None,
    scales: StoredScales = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare all images, though the index has lists.")
    ] = False,
    probes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many lists of the index to look through; default: as its recall asks for.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many images of these lists to compare; default: as its recall asks for.",
            show_default=False,
        ),
    ] = None,
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
    """The images that are nearest to one query or to many, by the cosine of their descriptors."""
    qs = None if scales is None else sides_typed(scales)
    if picture and picture.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise WrongUsage(f"--picture {picture} must end in .png, .jpg or .webp")
    if root and not picture:
        raise WrongUsage("--root is of the images that --picture draws: give both, or neither")
    if exact and (probes or candidates):
        raise WrongUsage("--exact compares all images: leave out --probes and --candidates")
    check_outputs(
        {"--picture": picture},
        texts={"--json": json_file},
        inputs=[*local([features, *query]), *weights_files(weights), root],
        overwrite=overwrite,
    )
    from vggfeat.devices import resolve_device
    from vggfeat.features import open_features
    from vggfeat.hdf5 import format_of
    from vggfeat.index import open_index
    from vggfeat.neighbours import answers, asked_of, described

    resolve_device(device)
    if local([features]) and format_of(Path(features)) == INDEX:
        if own := sorted({"layer", "pool", "scales"} & typed(context)):
            raise VggfeatError(f"{features} has its own {own[0]}: leave out `{own[0]}`")
        index, remarks = open_index(features), list[str]()
    else:
        index, remarks = _made_of(open_features(features, layer), pool, qs)
    asked = asked_of(index, query)
    if picture and len(asked) != 1:
        raise VggfeatError(f"`picture` draws the neighbours of one query, not of {len(asked):,}")
    outputs = {"--picture": picture, "--json": json_file}
    refuse_inputs(outputs, [*weights_files(index.description.weights), *map(Path, asked.paths())])
    items, why_not = _images_of(index, root, outputs) if picture else (None, "")
    settings = {
        "top": min(top, len(index.names)),
        "exact": exact,
        "probes": probes,
        "candidates": candidates,
    }
    with progress("neighbours", quiet=len(asked) == 1) as show:
        batches = described(
            index, asked, spec=weights, device=device, progress=show, say=lambda line: say(line)
        )
        found = list(answers(index, batches, **settings))
    if all(answer.error is not None for answer in found):
        first = found[0]
        raise VggfeatError(f"{first.query}: {first.error}")
    _tell(asked, found, picture, json_file, items, why_not)
    for line in [*asked.remarks, *remarks]:
        say(line)
    if weights and not asked.paths():
        say(f"--weights isn't used: {features} has the descriptor of {found[0].query}")
    leave([answer for answer in found if answer.error is not None])


def _images_of(
    index: Index, root: Path | None, outputs: dict[str, Path | None]
) -> tuple[Items | None, str]:
    """The images of the index, to be drawn; or None, and why they aren't at hand."""
    from vggfeat.datasets import at_hand

    items, why_not = at_hand(
        index.dataset, index.names, root, index.root, files=index.files, boxes=index.boxes
    )
    if items is not None:
        refuse_inputs(outputs, items.paths())
    return items, why_not


def _tell(
    asked: Asked,
    found: list[Answer],
    picture: Path | None,
    json_file: Path | None,
    items: Items | None,
    why_not: str,
) -> None:
    """Write the files, then print a table of the first queries."""
    from vggfeat.neighbours import draw

    several = len(asked) > 1
    table = columns(*["query"] * several, "", "image", "labels", "cosine")
    readable = [answer for answer in found if answer.error is None]
    for answer in readable[:TABLED]:
        for rank, neighbour in enumerate(answer.neighbours, 1):
            name = [answer.query if rank == 1 else ""] * several
            labels = ", ".join(neighbour.labels)
            table.add_row(*name, str(rank), neighbour.name, labels, f"{neighbour.cosine:.4f}")
    missing = ""

    def picture_them() -> None:
        nonlocal missing
        if picture:
            [only] = found
            row = None if only.row < 0 else only.row
            missing = draw(picture, only.query, row, only.neighbours, items, why_not)

    try_each(
        lambda: write_json(json_file, [answer.record() for answer in found]),
        picture_them,
        lambda: out.print(table),
    )
    if (more := len(readable) - TABLED) > 0:
        out.print(f"and {more:,} more queries; --json FILE has them all")
    if missing:
        say(in_options(f"left out: {missing}"))
    unreadable = [answer for answer in found if answer.error is not None]
    first = {answer.query: answer.error or "" for answer in unreadable[:FEW]}
    list_unreadable(first, "--json FILE has them all", len(unreadable))
    if picture:
        out.print(f"picture: {picture}")
