"""Tables 11 and 12 of the paper (Appendix B) as data, and the ledger that keeps our figures beside
them.

A cell is what `vggfeat svm` found: one or several nets' descriptors, pooled in one way, on one data
set. Images that aren't all of the protocol's, or a part that isn't its test part, have a section of
their own and never stand in the paper's tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from textwrap import fill
from typing import Annotated, TypedDict

from vggfeat import ledger
from vggfeat.aggregate import POOLINGS
from vggfeat.checked import OneOf, Range, read_text
from vggfeat.datasets.protocol import protocol_of
from vggfeat.datasets.splits import N_SPLITS
from vggfeat.errors import VggfeatError
from vggfeat.metrics import FIGURES
from vggfeat.results import HEAD_NAMES, Count, Fraction, Results, part_scored, seen_by_net, told

THEIRS = "Tables 11 and 12, transfer"
CELLS = "ledger-transfer.json"
"""Beside the page."""
WHAT = {
    "voc2007": "VOC-2007, mAP",
    "voc2012": "VOC-2012, mAP",
    "caltech101": "Caltech-101, mean class recall",
    "caltech256": "Caltech-256, mean class recall",
    "voc2012action": "VOC-2012 action, mAP",
}
"""Data set -> a column of the two tables."""
TABLES = {11: ("voc2007", "voc2012", "caltech101", "caltech256"), 12: ("voc2012action",)}
REGIONS = ("image", "box", "image,box")
GIVEN = "C was given, and not chosen on validation images"


@dataclass(frozen=True)
class Published:
    """A row of a table in the paper. figures: %, data set -> "91.8 +- 1.0". whose: "the paper" for
    its own.

    regions: what of an image is described.
    """

    table: int
    whose: str
    method: str
    figures: dict[str, str]
    regions: str = "image"


def _row(whose: str, method: str, *figures: str) -> Published:
    there = {name: figure for name, figure in zip(TABLES[11], figures, strict=True) if figure}
    return Published(11, whose, method, there)


def _action(whose: str, method: str, figure: str, regions: str = "image") -> Published:
    return Published(12, whose, method, {"voc2012action": figure}, regions)


OWN = "the paper"
PAPER = [
    _row("others", "Zeiler & Fergus", "", "79.0", "86.5 +- 0.5", "74.2 +- 0.3"),
    _row("others", "Chatfield et al.", "82.4", "83.2", "88.4 +- 0.6", "77.6 +- 0.1"),
    _row("others", "He et al.", "82.4", "", "93.4 +- 0.5", ""),
    _row("others", "Wei et al.", "81.5", "81.7", "", ""),
    _row("others", "Wei et al., pre-trained on 2,000 classes", "85.2", "90.3", "", ""),
    _row(OWN, "D", "89.3", "89.0", "91.8 +- 1.0", "85.0 +- 0.2"),
    _row(OWN, "E", "89.3", "89.0", "92.3 +- 0.5", "85.1 +- 0.3"),
    _row(OWN, "D & E", "89.7", "89.3", "92.7 +- 0.5", "86.2 +- 0.3"),
    _action("others", "Oquab et al., pre-trained on 1,512 classes", "70.2"),
    _action("others", "Gkioxari et al.", "73.6"),
    _action("others", "Hoai", "76.3"),
    _action(OWN, "D & E", "79.2"),
    _action(OWN, "D & E", "84.0", "image,box"),
]


@dataclass(frozen=True)
class Described:
    """How one net described the images. weights: as `vggfeat.load` takes them."""

    name: str
    weights: str
    fingerprint: str
    layer: str
    scales: list[Annotated[int, Range(1, 2**31)]]
    mirror: bool


@dataclass(frozen=True)
class Cell:
    """A figure of one data set.

    rows: digest of the images, their labels and splits. scored: which part, in words; images: how
    many of it (of Table 12, persons), of the first split where there are several; trained: on how
    many the scored classifier learned; classes: how many have a score. figure: key of
    `metrics.FIGURES`; mean, std: over the splits, fractions of 1. svm: the solver and its loss, and
    class weights that aren't equal. other: in what it isn't the paper's protocol on all of its
    images; empty where it is.
    """

    dataset: Annotated[str, OneOf(tuple(WHAT))]
    nets: list[Described]
    pool: Annotated[str, OneOf(POOLINGS)]
    regions: Annotated[str, OneOf(REGIONS)]
    svm: str
    figure: Annotated[str, OneOf(tuple(FIGURES))]
    mean: Fraction
    std: Fraction | None
    splits: Annotated[int, Range(1, 10**6)]
    drawn: str
    scored: str
    images: Count
    trained: Count
    classes: Count
    rows: str
    other: list[str]
    command: str
    when: str

    @property
    def method(self) -> str:
        """The nets, in the paper's words."""
        return " & ".join(net.name for net in self.nets)

    @property
    def as_the_papers(self) -> bool:
        """Whether its descriptors are of the paper's layer."""
        return {net.layer for net in self.nets} == {"fc7"}

    @property
    def key(self) -> tuple[object, ...]:
        """What it is a figure of; a cell of the same takes its place."""
        nets = [(n.name, n.fingerprint, n.layer, n.scales, n.mirror) for n in self.nets]
        how = nets, self.pool, self.regions, self.svm
        return self.dataset, self.rows, self.drawn, *how, self.other

    @property
    def how(self) -> str:
        """Nets, layer, scales and what was done with them."""
        alike = {(n.layer, tuple(n.scales), n.mirror) for n in self.nets}
        words = [self.method]
        for net in self.nets if len(alike) > 1 else self.nets[:1]:
            Q = ",".join(map(str, net.scales))
            pooled = f"{self.pool} of Q {Q}" if len(net.scales) > 1 else f"Q {Q}"
            words += [net.layer, pooled, *([] if net.mirror else ["no mirror image"])]
        if "squared_hinge" not in self.svm or "balanced" in self.svm:
            words.append(self.svm)
        return ", ".join(words)

    @property
    def weights(self) -> str:
        return " & ".join(dict.fromkeys(net.weights for net in self.nets))

    @property
    def percent(self) -> str:
        """The figure in the paper's form."""
        return f"{100 * self.mean:.1f}" + ("" if self.std is None else f" +- {100 * self.std:.1f}")


class _Cells(TypedDict):
    version: int
    cells: list[Cell]


def refuse_other_data(dataset: str) -> None:
    """Raise VggfeatError for a data set that neither table has."""
    if dataset not in WHAT:
        raise VggfeatError(
            f"Tables 11 and 12 are of {', '.join(WHAT)}, and these features of {dataset}: leave out"
            " `ledger`"
        )


def cell_of(results: Results) -> Cell:
    """What `vggfeat svm` found, as a cell of today. Raises VggfeatError: another data set; no
    figure.
    """
    refuse_other_data(results.dataset)
    figures, made = results.scored.figures, results.made
    figure = results.compared_by or ""
    mean = told(figures.mean(figure)) if figure in FIGURES else None
    if mean is None:
        raise VggfeatError("no labelled image was scored: there is no figure for the ledger")
    described = {name for part in made.features for name in part.regions or REGIONS[:1]}
    validated = results.validation if results.test_labels == "none" else None
    weights = [] if results.class_weight is None else [f"class weights {results.class_weight}"]
    return Cell(
        dataset=results.dataset,
        nets=[
            Described(
                part.net,
                part.weights or "",
                part.fingerprint or "",
                part.layer,
                part.scales,
                bool(part.mirror),
            )
            for part in made.features
        ],
        pool=results.pool,
        regions=",".join(name for name in REGIONS[:2] if name in described),
        svm=", ".join([results.solver or "", *weights]),
        figure=figure,
        mean=mean,
        std=told(figures.std(figure)),
        splits=len(results.per_split) or 1,
        drawn=results.splits or "",
        scored=part_scored(results),
        images=validated.n if validated else results.n_test,
        trained=results.n_train - (validated.n if validated else 0),
        classes=min(
            (n for part in results.per_split if (n := part.figures.n_classes) is not None),
            default=figures.n_classes or 0,
        ),
        rows=(made.features[0].rows or "") if made.features else "",
        other=_other(results),
        command=made.command or "",
        when=date.today().isoformat(),
    )


def _other(results: Results) -> list[str]:
    """In what these results aren't of the paper's protocol and all of its images."""
    other = list(results.other_images)
    if results.n_unreadable:
        what = "persons' images" if results.dataset in TABLES[12] else "images"
        other.append(f"{results.n_unreadable:,} {what} can't be read")
    if results.test_labels == "none" or results.test_split != "test":
        other.append(f"scored on {part_scored(results)}, and not on the test part")
    random = isinstance(protocol_of(results.protocol).n_train, int)
    if random and (n := len(results.per_split)) != N_SPLITS:
        other.append(f"{n} random splits instead of {N_SPLITS}")
    if results.head != "svm":
        other.append(f"by {HEAD_NAMES[results.head]}, not SVMs")
    if results.choice.selected_by is None:
        other.append(GIVEN)
    seen, scored = seen_by_net(results)
    if scored:
        other.append(f"the net was trained on {seen}")
    return other


# --- the page -------------------------------------------------------------------------------------


def _heading(cell: Cell) -> str:
    if not cell.other:
        return THEIRS
    (number,) = (number for number, names in TABLES.items() if cell.dataset in names)
    what = "persons" if number == 12 else "images"
    return (
        f"Table {number}, stand-in: {cell.dataset}, {cell.images:,} {what} of {cell.classes:,}"
        f" classes scored ({cell.rows[:8]})"
    )


def sections(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Heading -> the cells below it. The paper's is there without cells, too."""
    found: dict[str, list[Cell]] = {THEIRS: []}
    for cell in cells:
        found.setdefault(_heading(cell), []).append(cell)
    return found


def section_markdown(heading: str, cells: Sequence[Cell]) -> str:
    """A section of the page."""
    if heading == THEIRS:
        lines = [line for number in TABLES for line in table_markdown(number, cells)]
    else:
        lines = _standin_markdown(cells)
    return ledger.section(heading, [*lines, *(ledger.commands(cells) if cells else [])])


def table_markdown(number: int, cells: Sequence[Cell]) -> list[str]:
    """A table of the paper with all of its rows and ours, a row for each way; what nobody ran in
    one line.
    """
    names = TABLES[number]
    theirs = [row for row in PAPER if row.table == number]
    ours = [cell for cell in cells if cell.dataset in names]
    regions = number == 12
    head = ["method", *(["described"] if regions else []), "whose", *(WHAT[n] for n in names)]
    head += ["weights", "date"]
    rows = [
        [row.method, *([_regions(row.regions, row.whose == OWN)] if regions else []), row.whose]
        + [row.figures.get(name, "-") for name in names]
        + ["-", "-"]
        for row in theirs
    ]
    rows += [
        [cell.how, *([_regions(cell.regions)] if regions else []), "ours"]
        + [cell.percent if cell.dataset == name else "-" for name in names]
        + [cell.weights, cell.when]
        for cell in ours
    ]
    there = {(c.method, c.dataset, c.regions) for c in ours if c.as_the_papers}
    missing = [
        f"{row.method} on {WHAT[name].partition(',')[0]}"
        + (f" ({_regions(row.regions)})" if regions else "")
        for row in theirs
        if row.whose == OWN
        for name in row.figures
        if (row.method, name, row.regions) not in there
    ]
    what = "; ".join(missing) if ours else f"all {len(missing)} of ours"
    return [
        f"**Table {number}** (%; +- is the standard deviation over random splits)",
        "",
        *ledger.table(head, rows),
        "",
        *([*fill(f"Not run: {what}.", 120).splitlines(), ""] if missing else []),
    ]


def _regions(regions: str, known: bool = True) -> str:
    return regions.replace(",", " + ") if known else "-"


def _standin_markdown(cells: Sequence[Cell]) -> list[str]:
    why = dict.fromkeys(reason for cell in cells for reason in cell.other)
    beside = "The last column is of all images: the two can't be compared."
    rows = []
    for cell in cells:
        theirs = [
            row.figures[cell.dataset]
            for row in PAPER
            if row.whose == OWN
            and (row.method, row.regions) == (cell.method, cell.regions)
            and cell.dataset in row.figures
            and cell.as_the_papers
        ]
        rows.append(
            [
                cell.how,
                _regions(cell.regions),
                cell.percent,
                f"{cell.scored}, {cell.drawn}",
                f"{cell.trained:,}",
                cell.weights,
                cell.when,
                *(theirs or ["-"]),
            ]
        )
    name = FIGURES[cells[0].figure]
    head = ["nets", "described", f"ours, {name}, %", "scored on", "trained on", "weights", "date"]
    return [
        *fill(f"Not the paper's: {'; '.join(why)}. {beside}", 120).splitlines(),
        "",
        *ledger.table([*head, "the paper"], rows),
        "",
    ]


# --- the files ------------------------------------------------------------------------------------


def read_cells(path: Path) -> list[Cell]:
    """See `ledger.read`."""
    cells: list[Cell] = ledger.read(path, _Cells)
    return cells


def check_page(page: Path) -> None:
    """Refuse a page, or cells beside it, that a cell can't be put into, before the work."""
    read_cells(page.with_name(CELLS))
    ours = (THEIRS, *(f"Table {number}, stand-in: " for number in TABLES))
    ledger.check(page, lambda text: page.with_name(CELLS) if text.startswith(ours) else None)


def with_new(kept: Sequence[Cell], new: Cell) -> list[Cell]:
    """A new cell in place of an older one of the same, in the order of the data sets."""
    every = [cell for cell in kept if cell.key != new.key] + [new]
    order = list(WHAT)
    return sorted(every, key=lambda c: (order.index(c.dataset), len(c.nets), c.how, c.regions))


def write_cell(cell: Cell, page: Path) -> tuple[str, list[str]]:
    """Put a cell into the page and the file of cells beside it; the heading and the lines of its
    section's tables. All is made before the first of them is written.
    """
    with ledger.alone(page):
        check_page(page)
        path = page.with_name(CELLS)
        every = with_new(read_cells(path), cell)
        text = read_text(page, "ledger") if page.exists() else ""
        made = sections(every)
        for heading, part in made.items():
            text = ledger.with_section(text, heading, section_markdown(heading, part))
        ledger.write(page, text, {path: every})
    heading = _heading(cell)
    if heading == THEIRS:
        (number,) = (number for number, names in TABLES.items() if cell.dataset in names)
        return heading, table_markdown(number, made[heading])
    return heading, _standin_markdown(made[heading])
