"""Tables 3 to 6 of the paper as data, and the ledger that keeps our figures beside them.

A cell is a net (or several, fused), its training scale S, its test scales Q and a mode. Cells measured on another data
set than ImageNet, by nets of another recipe, go into a ledger of their own: S and Q are then scaled to those nets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from scipy.special import stdtrit

from vggfeat.checked import Range, fitted, parse_json, read_text
from vggfeat.errors import VggfeatError
from vggfeat.files import write_json, write_text

FIXED, LARGE, JITTER = "256", "384", "256-512"  # the paper's S
Percent = Annotated[float, Range(0, 100)]

MARK = "<!-- ledger: "


@dataclass(frozen=True)
class Member:
    """A net of Table 1 trained at one of the paper's S; learn: "fc" where only the FC layers were fine-tuned."""

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
            f"{m.net} {m.S}" + (" (FC layers only)" if m.learn == "fc" else "") for m in self.members
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
            Member("D", FIXED), Member("D", LARGE), Member("D", JITTER, "fc"), Member("C", FIXED),
            Member("C", LARGE), Member("E", FIXED), Member("E", LARGE),
        ),
        True, "dense", 24.7, 7.5,
    ),
    _both_nets("dense", 24.0, 7.1),
    _both_nets("crops", 23.9, 7.2),
    _both_nets("both", 23.7, 6.8),
]  # fmt: skip


def paper_scales(train_scale: tuple[int, int], crop: int, multi: bool) -> tuple[int, ...]:
    """Q for a net trained at S (Sect. 4.1, 4.2): S, or S -+ crop/7, too (32 pixels for 224; no Q is below the crop).

    Of a range of S: its middle, or its ends, too.
    """
    low, high = train_scale
    if not multi:
        return ((low + high) // 2,)
    step = round(crop / 7)
    return (max(crop, low - step), low, low + step) if low == high else (low, (low + high) // 2, high)


@dataclass(frozen=True)
class Cell:
    """A measured row. top1, top5: errors, %. wrong: which of the images were top-1 errors, packed bits in hex.

    data: what it was measured on, with the number of images. nets: fingerprints. when: ISO date.
    Raises VggfeatError where `wrong` isn't of so many images.
    """

    table: int
    row: str
    mode: str
    S: str
    Q: str
    top1: Percent
    top5: Percent
    images: Annotated[int, Range(1, 10**8)]
    data: str
    nets: list[str]
    command: str
    when: str
    wrong: str
    seed: Annotated[int, Range(0, 2**63)] = 0
    """Of the nets' recipe: a row that was trained with several seeds has a cell for each."""

    def __post_init__(self) -> None:
        try:
            known = 8 * len(bytes.fromhex(self.wrong))
        except ValueError:
            known = -1
        if not self.images <= known < self.images + 8:
            raise VggfeatError(f"cell {self.row}, {self.mode}: `wrong` is not of {self.images} images")

    @property
    def key(self) -> tuple[int, str, str]:
        """Its place in the paper."""
        return self.table, self.row, self.mode

    def wrong_images(self) -> np.ndarray:
        """(n,) bool."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.wrong), np.uint8))[: self.images].astype(bool)


def pack(wrong: np.ndarray) -> str:
    """(n,) bool -> hex, the inverse of `Cell.wrong_images`."""
    return np.packbits(wrong).tobytes().hex()


# --- the paper's claims, decided on the same images ------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One of the paper's orderings. pairs: (better, worse) by (row, mode, table)."""

    text: str
    pairs: tuple[tuple[tuple[int, str, str], tuple[int, str, str]], ...]


def _dense(table: int, net: str, S: str) -> tuple[int, str, str]:
    return table, f"{net} {S}", "dense"


CLAIMS = [
    Claim("LRN does not help (A against A-LRN)", ((_dense(3, "A", FIXED), _dense(3, "A-LRN", FIXED)),)),
    Claim(
        "depth helps: A, B, C, D",
        tuple((_dense(3, b, FIXED), _dense(3, a, FIXED)) for a, b in (("A", "B"), ("B", "C"), ("C", "D"))),
    ),
    Claim("B with 5x5 layers is worse than B", ((_dense(3, "B", FIXED), (3, "B-5x5 256", "dense")),)),
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
    ),
    Claim(
        "crops and dense together beat either",
        tuple(
            ((5, f"{net} {JITTER}", "both"), (5, f"{net} {JITTER}", mode))
            for net in ("D", "E")
            for mode in ("dense", "crops")
        ),
    ),
    Claim(
        "fusion of D and E beats one net",
        tuple(
            ((6, f"D {JITTER} + E {JITTER}", mode), (5, f"{net} {JITTER}", mode))
            for mode in ("dense", "crops", "both")
            for net in ("D", "E")
        ),
    ),
]


def decide(better: Sequence[Cell], worse: Sequence[Cell]) -> tuple[str, float, float]:
    """(verdict, difference of the top-1 errors in points, half of its 95 % interval), on images that both have seen.

    better, worse: the cells of one row each, with the same seeds in the same order. The difference is the mean over
    seeds; its variance has a part from the images (of the paired difference) and, with several seeds, one from the
    seeds. The interval is Student's, with the degrees of freedom of Welch and Satterthwaite: three seeds that disagree
    leave two, not a thousand. "holds" or "does not hold" where the interval leaves out 0, else "not decided".
    """
    paired_SN = np.array(
        [b.wrong_images().astype(float) - a.wrong_images() for a, b in zip(better, worse, strict=True)]
    )
    seeds, images = paired_SN.shape
    if images < 2:
        return "not decided", 100 * float(paired_SN.mean()), float("inf")
    difference = 100 * float(paired_SN.mean())
    parts = [
        (float(paired_SN.mean(axis=0).var(ddof=1)) / images, images - 1)
    ]  # (variance, degrees of freedom)
    if seeds > 1:
        parts.append((float(paired_SN.mean(axis=1).var(ddof=1)) / seeds, seeds - 1))
    variance = sum(v for v, _ in parts)
    half = 0.0  # the same on every image and seed
    if variance:
        freedom = variance**2 / sum(v**2 / degrees for v, degrees in parts)
        half = 100 * math.sqrt(variance) * float(stdtrit(freedom, 0.975))
    if abs(difference) <= half:
        return "not decided", difference, half
    return ("holds" if difference > 0 else "does not hold"), difference, half


# --- the ledger --------------------------------------------------------------------------------------------


def read_cells(path: Path) -> list[Cell]:
    """The cells kept in a JSON file; none if there is no file. Raises VggfeatError for another file."""
    if not path.exists():
        return []
    return fitted(parse_json(read_text(path, "ledger of cells"), path), list[Cell], path)


def check_ledger(path: Path) -> None:
    """Refuse what is no ledger, or cells beside it that can't be read, before work that would be put into it."""
    text = read_text(path, "ledger") if path.exists() else ""
    if text and MARK not in text and path.suffix != ".md":
        raise VggfeatError(f"`ledger` {path} is no Markdown file: give the name of one, or of none")
    for cells in path.parent.glob("ledger-*.json"):
        read_cells(cells)


def update_cells(path: Path, cells: Iterable[Cell]) -> list[Cell]:
    """Put new cells in place of older ones of the same key and seed, write the file, return all in order."""
    kept = {(cell.key, cell.seed): cell for cell in [*read_cells(path), *cells]}
    order = {(row.table, row.name, row.mode): i for i, row in enumerate(PAPER)}
    ordered = sorted(
        kept.values(), key=lambda c: (c.table, order.get(c.key, len(order)), c.row, c.mode, c.seed)
    )
    write_json(path, [asdict(cell) for cell in ordered])
    return ordered


def by_key(cells: Sequence[Cell]) -> dict[tuple[int, str, str], list[Cell]]:
    """The cells of each place in the paper, one a seed."""
    rows: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.key, []).append(cell)
    return rows


def spread(values: Sequence[float]) -> str:
    """A mean; with several values their standard deviation (ddof 1) too."""
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} +- {np.std(values, ddof=1):.1f}"


def table_markdown(number: int, cells: Sequence[Cell]) -> str:
    """Ours beside the paper's, a row a cell; of several seeds the mean and the spread; what nobody ran says so."""
    ours = by_key(cells)
    paper = {(row.table, row.name, row.mode): row for row in PAPER if row.table == number}
    lines = [
        f"**Table {number}** (top-1 / top-5 error, %)",
        "",
        "| nets, the paper's S | mode | ours | seeds | S, Q | data | date | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys([*paper, *(key for key in ours if key[0] == number)]):
        _, name, mode = key
        theirs = f"{paper[key].top1} / {paper[key].top5}" if key in paper else "-"
        if key not in ours:
            lines.append(f"| {name} | {mode} | not run | | | | | {theirs} |")
            continue
        seeds = ours[key]
        figures = f"{spread([c.top1 for c in seeds])} / {spread([c.top5 for c in seeds])}"
        cell = max(seeds, key=lambda c: c.when)
        lines.append(
            f"| {name} | {mode} | {figures} | {len(seeds)} | S {cell.S}; Q {cell.Q} | {cell.data} | {cell.when} "
            f"| {theirs} |"
        )
    commands = sorted({cell.command for cell in cells if cell.table == number})
    return "\n".join([*lines, "", *([] if not commands else ["```", *commands, "```", ""])])


def claims_markdown(cells: Sequence[Cell]) -> str:
    """Each of the paper's claims, decided by the pairs of cells that were measured on the same images, over the seeds
    that both have.
    """
    ours = by_key(cells)
    lines = [
        "**The paper's claims**, each on cells over the same images; decided where 0 is outside the 95 % interval",
        "",
        "| claim | the pair | top-1 error, % | difference +- half of its 95 % interval | verdict | images | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    header = len(lines)
    for claim in CLAIMS:
        for better, worse in claim.pairs:
            places = [{_measured(c): c for c in ours.get(key, [])} for key in (better, worse)]
            shared = sorted(places[0].keys() & places[1].keys())
            if not shared:
                continue
            # the images of the most seeds, where there were several
            (images, _), *_ = Counter(images for images, _ in shared).most_common(1)
            a, b = ([place[key] for key in shared if key[0] == images] for place in places)
            verdict, difference, half = decide(a, b)
            # where net and S don't tell the cells of a claim apart, the mode and the number of Q do
            told = a[0].table == 3 and b[0].table == 3
            pair = " against ".join(c.row if told else f"{c.row}, {_how(c)}" for c in (a[0], b[0]))
            means = ", ".join(f"{np.mean([c.top1 for c in part]):.1f}" for part in (a, b))
            lines.append(
                f"| {claim.text} | {pair} | {means} | {difference:+.2f} +- {half:.2f} "
                f"| {verdict} | {a[0].images} | {len(a)} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > header else ""


def _measured(cell: Cell) -> tuple[tuple[str, int], int]:
    """The images, and the seed of the nets."""
    return (cell.data, cell.images), cell.seed


def _how(cell: Cell) -> str:
    return f"{cell.mode}, {cell.Q.count(',') + 1} Q"


def write_ledger(path: Path, heading: str, cells: Sequence[Cell]) -> None:
    """Put the tables and claims between this heading's marks in a Markdown file; append them where there are none."""
    begin, end = f"{MARK}{heading} -->", f"<!-- end of ledger: {heading} -->"
    parts = [begin, f"## {heading}", ""]
    parts += [table_markdown(number, cells) for number in (3, 4, 5, 6)]
    parts += [claims_markdown(cells), end]
    body = "\n".join(parts)
    text = read_text(path, "ledger") if path.exists() else ""
    if begin in text and end in text:
        text = text[: text.index(begin)] + body + text[text.index(end) + len(end) :]
    else:
        text = text.rstrip("\n") + ("\n\n" if text else "") + body + "\n"
    write_text(path, text)
