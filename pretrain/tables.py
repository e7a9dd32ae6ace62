"""Tables 3 to 6 of the paper as data, and the ledger that keeps our figures beside them.

A cell is a net (or several, fused), its training scale S, its test scales Q and a mode, on one set
of images. Nets of other recipes than the paper's, and images other than ImageNet's validation set,
have a ledger of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Annotated, TypedDict

import numpy as np
from scipy.special import stdtr, stdtrit

from pretrain.recipe import LENGTHS, PAPER_S
from vggfeat.checked import OneOf, Range, fitted, parse_json, read_text
from vggfeat.errors import VggfeatError

FIXED, LARGE, JITTER = PAPER_S
RELEASED = "the authors' weights"
"""Among what tells a net from one of ours by the paper's recipe."""
Percent = Annotated[float, Range(0, 100)]

VERSION = 2
MARK = "<!-- ledger: "
_HEAD = "| nets, the paper's S |"
ILSVRC = "Tables 3 to 6, ILSVRC-2012"


@dataclass(frozen=True)
class Member:
    """A net of Table 1 trained at one of the paper's S, or "S=..." for another. learn: "fc": only
    the FC layers did.
    """

    net: str
    S: str
    learn: str = "all"


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 3, 4, 5 or 6. top1, top5: the paper's errors on the validation set, %.

    multi: several Q (the row's own of Table 4), else one. mode: "dense", "crops" or "both".
    """

    table: int
    members: tuple[Member, ...]
    multi: bool
    mode: str
    top1: float
    top5: float

    @property
    def name(self) -> str:
        """Nets and S in the paper's words."""
        return " + ".join(
            f"{m.net} {m.S}" + (" (FC layers only)" if m.learn == "fc" else "")
            for m in self.members
        )


def _rows(table: int, multi: bool, lines: str) -> list[PaperRow]:
    rows = []
    for line in lines.strip().splitlines():
        net, S, top1, top5 = line.split()
        rows.append(PaperRow(table, (Member(net, S),), multi, "dense", float(top1), float(top5)))
    return rows


def _both_nets(mode: str, top1: float, top5: float) -> PaperRow:
    return PaperRow(6, (Member("D", JITTER), Member("E", JITTER)), True, mode, top1, top5)


PAPER: list[PaperRow] = [
    *_rows(
        3,
        False,
        """
        A 256 29.6 10.4
        A-LRN 256 29.7 10.5
        B 256 28.7 9.9
        C 256 28.1 9.4
        C 384 28.1 9.3
        C 256-512 27.3 8.8
        D 256 27.0 8.8
        D 384 26.8 8.7
        D 256-512 25.6 8.1
        E 256 27.3 9.0
        E 384 26.9 8.7
        E 256-512 25.5 8.0
        """,
    ),
    *_rows(
        4,
        True,
        """
        B 256 28.2 9.6
        C 256 27.7 9.2
        C 384 27.8 9.2
        C 256-512 26.3 8.2
        D 256 26.6 8.6
        D 384 26.5 8.6
        D 256-512 24.8 7.5
        E 256 26.9 8.7
        E 384 26.7 8.6
        E 256-512 24.8 7.5
        """,
    ),
    PaperRow(5, (Member("D", JITTER),), True, "dense", 24.8, 7.5),
    PaperRow(5, (Member("D", JITTER),), True, "crops", 24.6, 7.5),
    PaperRow(5, (Member("D", JITTER),), True, "both", 24.4, 7.2),
    PaperRow(5, (Member("E", JITTER),), True, "dense", 24.8, 7.5),
    PaperRow(5, (Member("E", JITTER),), True, "crops", 24.6, 7.4),
    PaperRow(5, (Member("E", JITTER),), True, "both", 24.4, 7.1),
    PaperRow(
        6,
        (
            Member("D", FIXED),
            Member("D", LARGE),
            Member("D", JITTER, "fc"),
            Member("C", FIXED),
            Member("C", LARGE),
            Member("E", FIXED),
            Member("E", LARGE),
        ),
        True,
        "dense",
        24.7,
        7.5,
    ),
    _both_nets("dense", 24.0, 7.1),
    _both_nets("crops", 23.9, 7.2),
    _both_nets("both", 23.7, 6.8),
]


def paper_scales(train_scale: tuple[int, int], crop: int, multi: bool) -> tuple[int, ...]:
    """Q for a net trained at S (Sect. 4.1, 4.2): S, or S -+ crop/7, too (32 pixels for 224; no Q is
    below the crop).

    Of a range of S: its middle, or its ends, too.
    """
    low, high = train_scale
    if not multi:
        return ((low + high) // 2,)
    step = round(crop / 7)
    wanted = (
        (max(crop, low - step), low, low + step) if low == high else (low, (low + high) // 2, high)
    )
    # S may be the crop itself: a Q that stood twice would weigh twice
    return tuple(dict.fromkeys(wanted))


@dataclass(frozen=True)
class Learned:
    """A net of a cell. epochs: of its training, in all stages of its chain; None: unknown.

    training_set: digest of the images that it learned from, "" unknown. precision: of the forward
    pass.
    """

    fingerprint: str
    epochs: Annotated[float, Range(0, 1e9)] | None
    training_set: str
    precision: str


@dataclass(frozen=True)
class Cell:
    """A measured row. top1, top5: errors, %; top5 None among too few classes (`metrics.tells`).

    wrong: which of the images were top-1 errors, packed bits in hex. data: name of the images'
    folder. image_set: digest of the images' names, their classes, all `classes` that were to choose
    among, and (not in older cells) the checksums of their files. recipe, changes: of all nets of
    the row. when: ISO date. seed: of the recipe; a row of several seeds has a cell for each. Raises
    VggfeatError where `wrong` isn't of so many images and errors.
    """

    table: int
    row: str
    mode: str
    S: str
    Q: str
    top1: Percent
    top5: Percent | None
    data: str
    split: Annotated[str, OneOf(("val",))]
    images: Annotated[int, Range(1, 10**8)]
    classes: Annotated[int, Range(1, 10**8)]
    image_set: str
    recipe: str
    changes: list[str]
    seed: Annotated[int, Range(0, 2**63)]
    nets: list[Learned]
    command: str
    when: str
    wrong: str

    def __post_init__(self) -> None:
        try:
            known = 8 * len(bytes.fromhex(self.wrong))
        except ValueError:
            known = -1
        if not self.images <= known < self.images + 8:
            raise VggfeatError(
                f"cell {self.row}, {self.mode}: `wrong` is not of {self.images} images"
            )
        if abs(100 * float(self.wrong_images().mean()) - self.top1) > 1e-6:
            raise VggfeatError(
                f"cell {self.row}, {self.mode}: `wrong` is not of {self.top1} % errors"
            )

    @property
    def key(self) -> Key:
        """Its place in the paper."""
        return self.table, self.row, self.mode

    def wrong_images(self) -> np.ndarray:
        """(n,) bool."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.wrong), np.uint8))[
            : self.images
        ].astype(bool)


Key = tuple[int, str, str]
"""Table, row and mode: a place in the paper."""


def pack(wrong: np.ndarray) -> str:
    """(n,) bool -> hex, the inverse of `Cell.wrong_images`."""
    return np.packbits(wrong).tobytes().hex()


# --- the paper's claims, decided on the same images -----------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One of the paper's orderings. pairs: (better, worse).

    same_nets: the two differ in how the same nets are used; else in how they were trained, and must
    have had as much.
    """

    text: str
    pairs: tuple[tuple[Key, Key], ...]
    same_nets: bool = False


def _dense(table: int, net: str, S: str) -> Key:
    return table, f"{net} {S}", "dense"


CLAIMS = [
    Claim(
        "LRN does not help (A against A-LRN)", ((_dense(3, "A", FIXED), _dense(3, "A-LRN", FIXED)),)
    ),
    Claim(
        "depth helps: A, B, C, D",
        tuple(
            (_dense(3, b, FIXED), _dense(3, a, FIXED))
            for a, b in (("A", "B"), ("B", "C"), ("C", "D"))
        ),
    ),
    Claim(
        "B with 5x5 layers is worse than B", ((_dense(3, "B", FIXED), (3, "B-5x5 256", "dense")),)
    ),
    Claim(
        "scale jitter in training helps",
        tuple((_dense(3, net, JITTER), _dense(3, net, FIXED)) for net in ("C", "D", "E")),
    ),
    Claim(
        "several Q help",
        tuple(
            (_dense(4, net, S), _dense(3, net, S))
            for net in ("B", "C", "D", "E")
            for S in (FIXED, LARGE, JITTER)
        ),
        same_nets=True,
    ),
    Claim(
        "crops and dense together beat either",
        tuple(
            ((5, f"{net} {JITTER}", "both"), (5, f"{net} {JITTER}", mode))
            for net in ("D", "E")
            for mode in ("dense", "crops")
        ),
        same_nets=True,
    ),
    Claim(
        "fusion of D and E beats one net",
        tuple(
            ((6, f"D {JITTER} + E {JITTER}", mode), (5, f"{net} {JITTER}", mode))
            for mode in ("dense", "crops", "both")
            for net in ("D", "E")
        ),
        same_nets=True,
    ),
]
LEVEL = 0.05  # an interval leaves out what is there in one case of twenty
AS_LONG = 1.1  # the plateau rule ends a stage an epoch earlier or later


@dataclass(frozen=True)
class Difference:
    """Of two rows' top-1 errors. points: worse minus better. half: of its 95 % interval. p: of no
    difference.
    """

    points: float
    half: float
    p: float


def difference(better: Sequence[Cell], worse: Sequence[Cell]) -> Difference:
    """Over images that both have seen. better, worse: the cells of one row each, the same seeds in
    the same order.

    The difference is the mean over seeds; its variance has a part from the images (of the paired
    difference) and, with several seeds, one from the seeds. The interval is Student's, with the
    degrees of freedom of Welch and Satterthwaite: three seeds that disagree leave two, not a
    thousand.
    """
    paired_SN = np.array(
        [
            b.wrong_images().astype(float) - a.wrong_images()
            for a, b in zip(better, worse, strict=True)
        ]
    )
    seeds, images = paired_SN.shape
    mean = float(paired_SN.mean())
    if images < 2:
        return Difference(100 * mean, float("inf"), 1.0)
    # (variance, degrees of freedom)
    parts = [(float(paired_SN.mean(axis=0).var(ddof=1)) / images, images - 1)]
    if seeds > 1:
        parts.append((float(paired_SN.mean(axis=1).var(ddof=1)) / seeds, seeds - 1))
    variance = sum(v for v, _ in parts)
    if not variance:  # the same on every image and seed
        return Difference(100 * mean, 0.0, 0.0 if mean else 1.0)
    freedom = variance**2 / sum(v**2 / degrees for v, degrees in parts)
    error = math.sqrt(variance)
    half = error * float(stdtrit(freedom, 1 - LEVEL / 2))
    return Difference(100 * mean, 100 * half, 2 * float(stdtr(freedom, -abs(mean) / error)))


def holm(p: Sequence[float]) -> list[bool]:
    """Which of several hypotheses Holm's procedure rejects, so that it errs in any of them with 5 %
    at most.
    """
    rejected = [False] * len(p)
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] > LEVEL / (len(p) - rank):
            break
        rejected[i] = True
    return rejected


def unlike(better: Sequence[Cell], worse: Sequence[Cell], same_nets: bool) -> str:
    """What else than the claim tells two rows apart, in words; "" where nothing does. Seeds as in
    `difference`.
    """
    found = []
    for a, b in zip(better, worse, strict=True):
        if same_nets and not {n.fingerprint for n in b.nets} <= {n.fingerprint for n in a.nets}:
            found.append("other nets")
        elif same_nets and a.changes != b.changes:  # as of how they pool
            found.append(f"{', '.join(sorted({*a.changes} ^ {*b.changes}))} in one of them")
        if {n.precision for n in a.nets} != {n.precision for n in b.nets}:
            found.append(
                " against ".join("/".join(sorted({n.precision for n in c.nets})) for c in (a, b))
            )
    if same_nets:
        return ", ".join(dict.fromkeys(found))
    lengths = [[n.epochs for c in side for n in c.nets] for side in (better, worse)]
    known = [[each for each in side if each is not None] for side in lengths]
    if known != lengths:
        found.append("training of unknown length")
    elif max(map(max, known)) > AS_LONG * min(map(min, known)):
        found.append(f"{_range(known[0])} epochs against {_range(known[1])}")
    sets = [{n.training_set for c in side for n in c.nets} for side in (better, worse)]
    if "" in sets[0] | sets[1]:
        found.append("unknown training images")
    elif len(sets[0] | sets[1]) > 1:
        found.append("other training images")
    # a length that was changed is told by the epochs
    numbers = [
        {item for item in side[0].changes if not _is_length(item)} for side in (better, worse)
    ]
    if odd := sorted(numbers[0] ^ numbers[1]):
        found.append(f"{', '.join(odd)} in one of them")
    return ", ".join(dict.fromkeys(found))


def _is_length(change: str) -> bool:
    return change.partition("=")[0].rpartition(".")[2] in LENGTHS


def _range(values: Sequence[float]) -> str:
    low, high = (f"{round(value, 1):g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# --- the ledger -----------------------------------------------------------------------------------


class _Ledger(TypedDict):
    version: int
    cells: list[Cell]


def read_cells(path: Path) -> list[Cell]:
    """The cells kept in a JSON file; none if there is no file. Raises VggfeatError for another
    file.
    """
    if not path.exists():
        return []
    way_out = (
        "bring it back from version control or a copy, or give another `ledger`; the page beside it"
        " is as it was"
    )
    try:
        record = parse_json(read_text(path, "ledger of cells"), path)
    except VggfeatError as error:
        raise VggfeatError(f"{error}: {way_out}") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise VggfeatError(
            f"{path} is no ledger of cells of version {VERSION} (older ones don't tell a cell's"
            " images and recipe): move it away, take its tables out of the page, and make them"
            " again"
        )
    try:
        cells: list[Cell] = fitted(record, _Ledger, path)["cells"]
    except VggfeatError as error:
        raise VggfeatError(f"{error}: {way_out}") from error
    if len({(cell.image_set, cell.images) for cell in cells}) > len(
        {cell.image_set for cell in cells}
    ):
        raise VggfeatError(
            f"{path} is damaged: cells of one set of images are of other numbers of them: {way_out}"
        )
    return cells


def ledger_content(cells: Sequence[Cell]) -> dict[str, object]:
    """What `read_cells` reads."""
    return {"version": VERSION, "cells": [asdict(cell) for cell in cells]}


def check_ledger(path: Path) -> None:
    """Refuse what is no ledger, or cells beside it that can't be read, before work that would be
    put into it.
    """
    text = read_text(path, "ledger") if path.exists() else ""
    if text and MARK not in text and path.suffix != ".md":
        raise VggfeatError(f"`ledger` {path} is no Markdown file: give the name of one, or of none")
    for cells in path.parent.glob("ledger-*.json"):
        read_cells(cells)
    for heading, body in re.findall(
        f"{re.escape(MARK)}(.*) -->\n((?:(?!{re.escape(MARK)}).*\n)*)", text
    ):
        its = re.search(r"recipe ([\w.+-]+) on ([\w.+-]+) ", heading)
        name = f"ledger-{its[1]}-{its[2]}.json" if its else "ledger-ilsvrc.json"
        # made anew, the tables would lose these rows
        if _HEAD in body and not (path.parent / name).exists():
            raise VggfeatError(
                f"{path} has tables whose cells are missing, {path.parent / name}: bring that file"
                " back from version control or a copy, or give another `ledger`, or take those"
                " tables out of the page to begin them anew"
            )


def with_new(kept: Sequence[Cell], new: Iterable[Cell]) -> list[Cell]:
    """New cells in place of older ones of the same images (tested, trained on), recipe, row and
    seed.

    All in the paper's order.
    """

    def identity(cell: Cell) -> tuple[object, ...]:
        sets = tuple(net.training_set for net in cell.nets)
        return cell.image_set, cell.recipe, *cell.changes, cell.key, cell.seed, sets

    every = {identity(cell): cell for cell in [*kept, *new]}
    order = {(row.table, row.name, row.mode): i for i, row in enumerate(PAPER)}
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
                f"Tables 3 to 6, stand-in: recipe {cell.recipe} on {cell.data} {cell.split},"
                f" {cell.images:,} images of {cell.classes:,} classes ({cell.image_set[:8]})"
            )
        found.setdefault(heading, []).append(cell)
    return found


def by_row(cells: Iterable[Cell]) -> dict[tuple[Key, tuple[str, ...]], list[Cell]]:
    """The cells of each place in the paper and each change of the recipe, one a seed.

    What else than the seed tells nets apart, in words, stands among the changes: they are no seeds
    of one row.
    """
    rows: dict[tuple[Key, tuple[str, ...]], list[Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.key, tuple(cell.changes)), []).append(cell)
    return {
        (key, (*changes, *told)): alike
        for (key, changes), seeds in rows.items()
        for told, alike in _differ_in_the_seed(seeds)
    }


def _differ_in_the_seed(cells: Iterable[Cell]) -> list[tuple[tuple[str, ...], list[Cell]]]:
    """Parts of a row whose nets had the same training and precision, and what tells each part from
    the others.
    """
    parts: list[list[Cell]] = []
    for cell in sorted(cells, key=lambda c: [net.epochs or 0.0 for net in c.nets]):
        part = next(
            (part for part in parts if _as_long(part[0], cell) and _sets(part[0]) == _sets(cell)),
            None,
        )
        if part is None:
            parts.append(part := [])
        part.append(cell)
    words = []
    for part in parts:
        epochs = " + ".join(
            "unknown" if net.epochs is None else f"{net.epochs:g}" for net in part[0].nets
        )
        sets, precisions = _sets(part[0])
        words.append(
            (
                f"{epochs} epoch{'' if epochs == '1' else 's'} of training",
                (
                    "training images"
                    f" {' + '.join(dict.fromkeys(each[:8] or 'unknown' for each in sets))}"
                ),
                "/".join(dict.fromkeys(precisions)),
            )
        )
    differ = [len({each[i] for each in words}) > 1 for i in range(3)]
    return [
        (
            tuple(word for word, told in zip(each, differ, strict=True) if told),
            sorted(part, key=lambda c: c.seed),
        )
        for each, part in zip(words, parts, strict=True)
    ]


def _as_long(shorter: Cell, longer: Cell) -> bool:
    return all(
        (a.epochs is None) == (b.epochs is None)
        and max(a.epochs or 0, b.epochs or 0) <= AS_LONG * min(a.epochs or 0, b.epochs or 0)
        for a, b in zip(shorter.nets, longer.nets, strict=True)
    )


def _sets(cell: Cell) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(net.training_set for net in cell.nets), tuple(net.precision for net in cell.nets)


def spread(errors: Sequence[float | None]) -> str:
    """A mean; with several values their standard deviation, too; "-" where one of them is None."""
    values = [error for error in errors if error is not None]
    if len(values) < len(errors):
        return "-"
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} +- {np.std(values, ddof=1):.1f}"


def _notes(cells: Sequence[Cell]) -> dict[tuple[str, ...], str]:
    """Changes of the recipe -> the mark of a row that has them; none for the recipe as it is."""
    changes = sorted({changes for _, changes in by_row(cells)})
    return {(): ""} | {change: f" [{i}]" for i, change in enumerate(filter(None, changes), 1)}


def notes_markdown(cells: Sequence[Cell]) -> list[str]:
    """What the marks of the rows mean, a line each; none where no recipe was changed."""
    notes = [
        f"-{mark}: the recipe with {', '.join(changes)}"
        for changes, mark in _notes(cells).items()
        if mark
    ]
    return [*notes, ""] if notes else []


def table_markdown(number: int, cells: Sequence[Cell], ilsvrc: bool = False) -> str:
    """Ours beside the paper's, a row a cell; of several seeds the mean and the spread; what nobody
    ran in one line.

    cells: a section's. ilsvrc: they are of the paper's own images.
    """
    ours = {row: seeds for row, seeds in by_row(cells).items() if row[0][0] == number}
    paper = {(row.table, row.name, row.mode): row for row in PAPER if row.table == number}
    marks = _notes(cells)
    lines = [f"**Table {number}** (top-1 / top-5 error, %)", ""]
    if ours:
        theirs = "the paper" if ilsvrc else "the paper, ILSVRC's 1,000 classes"
        lines += [
            f"{_HEAD} mode | ours | seeds | S; Q | epochs | date | {theirs} |",
            "|" + 8 * "---|",
        ]
    for (key, changes), seeds in ours.items():
        _, name, mode = key
        figures = f"{spread([c.top1 for c in seeds])} / {spread([c.top5 for c in seeds])}"
        cell = max(seeds, key=lambda c: c.when)
        epochs = " + ".join(_epochs([c.nets[i] for c in seeds]) for i in range(len(cell.nets)))
        beside = f"{paper[key].top1} / {paper[key].top5}" if key in paper else "-"
        lines.append(
            f"| {name}{marks[changes]} | {mode} | {figures} | {len(seeds)} | S {cell.S}; Q {cell.Q}"
            f" | {epochs} | {cell.when} | {beside} |"
        )
    there = {key for key, _ in ours}
    missing = [_place(key) for key in paper if key not in there]
    if missing:
        what = "; ".join(missing) if ours else f"all {len(missing)} rows"
        lines += [*([""] if ours else []), f"Not run: {what}."]
    return "\n".join([*lines, ""])


def _place(key: Key) -> str:
    return key[1] if key[2] == "dense" else f"{key[1]} ({key[2]})"


def _epochs(nets: Sequence[Learned]) -> str:
    known = [net.epochs for net in nets if net.epochs is not None]
    return _range(known) if len(known) == len(nets) else "unknown"


def claims_markdown(cells: Sequence[Cell]) -> str:
    """Each of the paper's claims, decided by the pairs of rows of a section, over the seeds that
    both have.
    """
    marks = _notes(cells)
    found = [
        (claim, kinds, a, b, difference(a, b), unlike(a, b, claim.same_nets))
        for claim in CLAIMS
        for better, worse in claim.pairs
        for kinds, a, b in _pairs(better, worse, cells)
    ]
    if not found:
        return ""
    decided = [i for i, (*_, odd) in enumerate(found) if not odd]
    safe = dict(zip(decided, holm([found[i][4].p for i in decided]), strict=True))
    lines = [
        "**The paper's claims**, each on the same images and seeds",
        "",
        (
            "| claim | the pair | top-1 error, % | difference +- half of its 95 % interval |"
            " verdict | seeds |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for i, (claim, kinds, a, b, by, odd) in enumerate(found):
        # where net and S don't tell the cells of a claim apart, the mode and the number of Q do
        told = a[0].table == 3 and b[0].table == 3
        pair = " against ".join(
            c.row + marks[kind] + ("" if told else f", {c.mode}, {c.Q.count(',') + 1} Q")
            for kind, c in zip(kinds, (a[0], b[0]), strict=True)
        )
        means = ", ".join(f"{np.mean([c.top1 for c in part]):.1f}" for part in (a, b))
        if odd:
            verdict = f"confounded: {odd}"
        elif by.p >= LEVEL:
            verdict = "not decided"
        else:
            verdict = ("holds" if by.points > 0 else "does not hold") + (
                "" if safe[i] else ", taken alone"
            )
        lines.append(
            f"| {claim.text} | {pair} | {means} | {by.points:+.2f} +- {by.half:.2f} | {verdict} |"
            f" {len(a)} |"
        )
    n = len(decided)
    many = (
        f"{n} of these {len(found)} pairs differ in nothing but what the claim is of. Each interval"
        f" errs in one case of twenty: if no claim were true, {LEVEL * n:.1f} of the {n} verdicts"
        " would be expected by chance. What stands after Holm's correction for all of them says"
        ' "holds" or "does not hold"; what doesn\'t says "taken alone".'
    )
    lines += ["", fill(many, 120)]
    return "\n".join(lines) + "\n"


def _pairs(
    better: Key, worse: Key, cells: Sequence[Cell]
) -> Iterator[tuple[tuple[tuple[str, ...], tuple[str, ...]], list[Cell], list[Cell]]]:
    """The rows of two places, of the same changes of the recipe or none in one of them, with their
    common seeds.
    """
    rows = by_row(cells)
    for key_a, ours in rows.items():
        for key_b, theirs in rows.items():
            changes = key_a[1], key_b[1]
            if (key_a[0], key_b[0]) != (better, worse) or (
                changes[0] != changes[1] and all(changes)
            ):
                continue
            a, b = ({c.seed: c for c in side} for side in (ours, theirs))
            if shared := sorted(a.keys() & b.keys()):
                yield changes, [a[seed] for seed in shared], [b[seed] for seed in shared]


def section_markdown(heading: str, cells: Sequence[Cell]) -> str:
    """A heading with its tables and claims, between marks."""
    parts = [f"{MARK}{heading} -->", f"## {heading}", ""]
    if cells:
        ilsvrc = heading.startswith(ILSVRC)
        if not ilsvrc:
            other = (
                "The last column is of another task: nets of the paper's recipe, 50,000 images,"
                f" 1,000 classes to choose among; here {cells[0].images:,} and"
                f" {cells[0].classes:,}. Only the order of rows can be compared."
            )
            parts += [fill(other, 120), ""]
        parts += [
            "+- is the standard deviation over seeds. Epochs are of a net's whole chain of stages.",
            "",
        ]
        parts += notes_markdown(cells)
        parts += [table_markdown(number, cells, ilsvrc) for number in (3, 4, 5, 6)]
        parts += [
            "```",
            *sorted({cell.command for cell in cells}),
            "```",
            "",
            claims_markdown(cells),
        ]
    else:
        parts += [f"Not run: all {len(PAPER)} rows.", ""]
    return "\n".join([*parts, f"<!-- end of ledger: {heading} -->"])


def with_section(text: str, heading: str, cells: Sequence[Cell]) -> str:
    """A Markdown text with this section in place of the one of the same heading, or at its end."""
    begin, end = f"{MARK}{heading} -->", f"<!-- end of ledger: {heading} -->"
    body = section_markdown(heading, cells)
    if begin in text and end in text:
        return text[: text.index(begin)] + body + text[text.index(end) + len(end) :]
    return text.rstrip("\n") + ("\n\n" if text else "") + body + "\n"


def plain_word(text: str) -> str:
    """A name of somebody else's as it may stand in a heading or a file's name."""
    return re.sub(r"[^\w.+-]+", "-", text)[:60].strip("-.") or "unnamed"
