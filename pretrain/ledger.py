"""The ledger of Tables 3 to 10: cells as JSON, and the page that is made of them.

Nets of other recipes than the paper's, and images other than ImageNet's validation set, have a file
and a section of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import TypedDict

from pretrain.claims import claims_markdown
from pretrain.tables import COMPARED, ROWS, Cell, Compared, Key, Learned, by_row, marks, span
from vggfeat import ledger
from vggfeat.ledger import spread
from vggfeat.transfer import CELLS as OF_TRANSFER

ILSVRC = "Tables 3 to 10, ILSVRC-2012"
THEIRS = "ledger-ilsvrc.json"
"""The cells of the paper's own images and recipe, beside the page."""
MEASURED = (3, 4, 5, 6, 8, 9)
"""Tables that have cells of their own."""
_FORMER = "Tables 3 to 6"  # how headings began before there were cells of boxes


class _Cells(TypedDict):
    version: int
    cells: list[Cell]


def read_cells(path: Path) -> list[Cell]:
    """See `vggfeat.ledger.read`."""

    def refuse(cells: Sequence[Cell]) -> str:
        sets = {cell.image_set for cell in cells}
        if len({(cell.image_set, cell.images) for cell in cells}) > len(sets):
            return "cells of one set of images are of other numbers of them"
        return ""

    cells: list[Cell] = ledger.read(path, _Cells, refuse)
    return cells


def check_ledger(path: Path) -> None:
    """Refuse what is no ledger, or cells beside it that can't be read, before work that would be
    put into it.
    """
    for cells in path.parent.glob("ledger-*.json"):
        if cells.name != OF_TRANSFER:
            read_cells(cells)

    def cells_of(heading: str) -> Path | None:
        if not heading.startswith("Tables 3 to "):
            return None
        its = re.search(r"recipe ([\w.+-]+) on ([\w.+-]+) ", heading)
        return path.with_name(file_of(its[1], its[2]) if its else THEIRS)

    ledger.check(path, cells_of)


def file_of(recipe: str, data: str) -> str:
    """The name of the file with a stand-in's cells."""
    return f"ledger-{recipe}-{data}.json"


def with_new(kept: Sequence[Cell], new: Iterable[Cell]) -> list[Cell]:
    """New cells in place of older ones of the same images (tested, trained on), recipe, row, S, Q
    and seed.

    All in the paper's order.
    """

    def identity(cell: Cell) -> tuple[object, ...]:
        sets = tuple(net.training_set for net in cell.nets)
        boxes = cell.box_set, cell.classifier
        places = cell.key, cell.S, cell.Q
        return cell.image_set, cell.recipe, *cell.changes, places, cell.seed, sets, boxes

    every = {identity(cell): cell for cell in [*kept, *new]}
    order = {key: i for i, key in enumerate(ROWS)}
    return sorted(
        every.values(),
        key=lambda c: (
            c.table,
            order.get(c.key, len(order)),
            c.row,
            c.mode,
            len(c.changes),
            c.changes,
            c.seed,
            c.image_set,
        ),
    )


def sections(cells: Sequence[Cell], ilsvrc: bool = False) -> dict[str, list[Cell]]:
    """Heading -> the cells that can stand in one table: of the same images and the same recipe.

    ilsvrc: they are of the paper's own images, and have their heading without cells, too.
    """
    found: dict[str, list[Cell]] = {ILSVRC: []} if ilsvrc and not cells else {}
    first = min((cell.image_set for cell in cells), default="")
    for cell in cells:
        if ilsvrc:
            # the names of the same images may have other endings
            heading = ILSVRC if cell.image_set == first else f"{ILSVRC} ({cell.image_set[:8]})"
        else:
            heading = (
                f"Tables 3 to 10, stand-in: recipe {cell.recipe} on {cell.data} {cell.split},"
                f" {cell.images:,} images of {cell.classes:,} classes ({cell.image_set[:8]})"
            )
        found.setdefault(heading, []).append(cell)
    return found


# --- Markdown -------------------------------------------------------------------------------------


def notes_markdown(cells: Sequence[Cell]) -> list[str]:
    """What the marks of the rows mean, a line each; none where no recipe was changed."""
    notes = [
        f"-{mark}: the recipe with {', '.join(changes)}"
        for changes, mark in marks(cells).items()
        if mark
    ]
    if lost := max((cell.unreadable for cell in cells), default=0):
        notes.append(f"{lost:,} of the images can't be read, and are errors in every row.")
    return [*notes, ""] if notes else []


_TITLES = {
    3: "top-1 / top-5 error, %; centre: Sect. 4.1, on a central crop",
    4: "top-1 / top-5 error, %",
    5: "top-1 / top-5 error, %",
    6: "top-1 / top-5 error, %; test: top-5, as only the server knows it",
    7: "%; validation and test set, as only the server knows the latter",
    8: "localisation error, %; a central crop and the true class",
    9: "top-1 / top-5 localisation error, %; test: top-5, as only the server knows it",
    10: "top-5 localisation error, %; validation and test set, as only the server knows the latter",
}
_FIRST = {8: "net, the paper's S; boxes; what learned", 9: "nets, the paper's S and Q"}


def table_markdown(number: int, cells: Sequence[Cell], ilsvrc: bool = False) -> str:
    """Ours beside the paper's, a row a cell; of several seeds the mean and the spread; what nobody
    ran in one line. Tables 7 and 10: `compared_markdown`.

    cells: a section's. ilsvrc: they are of the paper's own images.
    """
    if number not in MEASURED:
        return compared_markdown(number, cells, ilsvrc)
    ours = {row: seeds for row, seeds in by_row(cells).items() if row[0][0] == number}
    paper = {key: row for key, row in ROWS.items() if row.table == number}
    mark = marks(cells)
    test = any(row.test5 is not None for row in paper.values())
    theirs = "the paper" if ilsvrc else "the paper, ILSVRC's 1,000 classes"
    head = [
        _FIRST.get(number, "nets, the paper's S"),
        *([] if number in _FIRST else ["mode"]),
        *(["ours", "ours, test"] if test else ["ours"]),
        *("seeds", "S; Q", "epochs", "date"),
        *([theirs, "the paper, test"] if test else [theirs]),
    ]
    rows = []
    for (key, changes), seeds in ours.items():
        _, name, mode = key
        cell = max(seeds, key=lambda c: c.when)
        epochs = " + ".join(_epochs([c.nets[i] for c in seeds]) for i in range(len(cell.nets)))
        row = paper.get(key)
        rows.append(
            [
                f"{name}{mark[changes]}",
                *([] if number in _FIRST else [mode]),
                _figures(seeds),
                *(["-"] if test else []),
                f"{len(seeds)}",
                f"S {cell.S}; Q {cell.Q}",
                epochs,
                cell.when,
                row.beside if row else "-",
                *([_figure(row.test5 if row else None)] if test else []),
            ]
        )
    lines = [f"**Table {number}** ({_TITLES[number]})", ""]
    lines += ledger.table(head, rows) if rows else []
    there = {key for key, _ in ours}
    missing = [_place(key) for key in paper if key not in there]
    if missing:
        what = "; ".join(missing) if ours else f"all {len(missing)} rows"
        lines += [*([""] if ours else []), f"Not run: {what}."]
    return "\n".join([*lines, ""])


def _figures(seeds: Sequence[Cell]) -> str:
    top1 = spread([c.top1 for c in seeds])
    return top1 if seeds[0].table == 8 else f"{top1} / {spread([c.top5 for c in seeds])}"


def _figure(error: float | None) -> str:
    return "-" if error is None else f"{error}"


def _place(key: Key) -> str:
    # all of Table 8 is of a central crop
    return key[1] if key[2] == "dense" or key[0] == 8 else f"{key[1]} ({key[2]})"


def _epochs(nets: Sequence[Learned]) -> str:
    known = [net.epochs for net in nets if net.epochs is not None]
    return span(known) if len(known) == len(nets) else "unknown"


def compared_markdown(number: int, cells: Sequence[Cell], ilsvrc: bool) -> str:
    """Table 7 or 10: the paper's own rows, which are rows of Tables 5, 6 and 9, ours beside them,
    and the others', as the paper has them; "" where the images aren't the paper's, and none of its
    own rows was run.
    """
    ours = by_row(cells)
    there = {key for key, _ in ours}
    rows = [row for row in COMPARED if row.table == number]
    if not ilsvrc:
        rows = [row for row in rows if row.key in there]
    if not rows:
        return ""
    mark = marks(cells)
    columns: dict[str, Callable[[Compared | Cell], float | None]] = {
        "top-1 val": lambda row: row.top1,
        "top-5 val": lambda row: row.top5,
    }
    if number == 10:
        del columns["top-1 val"]
    shown = []
    for row in rows:
        theirs = [*(_figure(read(row)) for read in columns.values()), _figure(row.test5)]
        if row.key is None:
            shown.append([row.method, "others", *theirs, *len(theirs) * ["-"]])
            continue
        its = [(changes, seeds) for (key, changes), seeds in ours.items() if key == row.key]
        for changes, seeds in its or [((), [])]:
            figures = [
                spread([read(cell) for cell in seeds]) if seeds else "not run"
                for read in columns.values()
            ]
            shown.append([row.method + mark[changes], "the paper", *theirs, *figures, "-"])
    heads = [*columns, "top-5 test"]
    head = ["method", "whose", *heads, *(f"ours: {each}" for each in heads)]
    lines = [f"**Table {number}** ({_TITLES[number]})", "", *ledger.table(head, shown), ""]
    if not ilsvrc:
        lines += ["Other methods' rows are of ILSVRC-2012, and stand in its section.", ""]
    return "\n".join(lines)


def section_markdown(heading: str, cells: Sequence[Cell]) -> str:
    """A heading with its tables and claims, between marks."""
    ilsvrc = heading.startswith(ILSVRC)
    if not cells:
        lines = [f"Not run: all {len(ROWS)} rows of Tables 3 to 6, 8 and 9.", ""]
        lines += [compared_markdown(number, [], ilsvrc) for number in (7, 10)]
        return ledger.section(heading, lines)
    lines = []
    if not ilsvrc:
        other = (
            "The last column is of another task: nets of the paper's recipe, 50,000 images,"
            f" 1,000 classes to choose among; here {cells[0].images:,} and"
            f" {cells[0].classes:,}. Only the order of rows can be compared."
        )
        lines += [fill(other, 120), ""]
    lines += [
        "+- is the standard deviation over seeds. Epochs are of a net's whole chain of stages.",
        "",
        *notes_markdown(cells),
        *filter(None, (table_markdown(number, cells, ilsvrc) for number in range(3, 11))),
        *ledger.commands(cells),
        claims_markdown(cells),
    ]
    return ledger.section(heading, lines)


def with_section(text: str, heading: str, cells: Sequence[Cell]) -> str:
    """A Markdown text with this section in place of the one of the same heading, or at its end."""
    former = heading.replace("Tables 3 to 10", _FORMER)
    for mark in ("ledger: ", "end of ledger: "):
        text = text.replace(f"<!-- {mark}{former} -->", f"<!-- {mark}{heading} -->")
    return ledger.with_section(text, heading, section_markdown(heading, cells))
