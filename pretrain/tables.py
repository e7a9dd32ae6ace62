"""Tables 3 to 6 of the paper as data, and the ledger that keeps our figures beside them.

A cell is a net (or several, fused), its training scale S, its test scales Q and a mode. Cells measured on another data
set than ImageNet, by nets of another recipe, go into a ledger of their own: S and Q are then scaled to those nets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vggfeat.errors import VggfeatError

FIXED, LARGE, JITTER = "256", "384", "256-512"  # the paper's S


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
    """

    table: int
    row: str
    mode: str
    S: str
    Q: str
    top1: float
    top5: float
    images: int
    data: str
    nets: list[str]
    command: str
    when: str
    wrong: str

    @property
    def key(self) -> tuple[int, str, str]:
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


def decide(better: Cell, worse: Cell) -> tuple[str, float, float]:
    """(verdict, difference of the top-1 errors in points, its standard error), on the images that both have seen.

    "holds" or "does not hold" where the difference is beyond two standard errors of the paired difference, else
    "not decided".
    """
    a, b = better.wrong_images(), worse.wrong_images()
    paired = b.astype(float) - a.astype(float)
    difference = 100 * float(paired.mean())
    error = 100 * float(paired.std(ddof=1)) / math.sqrt(len(paired))
    if abs(difference) <= 2 * error or difference == 0:
        return "not decided", difference, error
    return ("holds" if difference > 0 else "does not hold"), difference, error


# --- the ledger --------------------------------------------------------------------------------------------


def read_cells(path: Path) -> list[Cell]:
    """The cells kept in a JSON file; none if there is no file. Raises VggfeatError for another file."""
    if not path.exists():
        return []
    try:
        return [Cell(**record) for record in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise VggfeatError(f"{path} is no ledger of cells: {error}") from error


def update_cells(path: Path, cells: Iterable[Cell]) -> list[Cell]:
    """Put new cells in place of older ones of the same key, write the file, return all in the paper's order."""
    kept = {cell.key: cell for cell in [*read_cells(path), *cells]}
    order = {(row.table, row.name, row.mode): i for i, row in enumerate(PAPER)}
    ordered = sorted(kept.values(), key=lambda c: (c.table, order.get(c.key, len(order)), c.row, c.mode))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([asdict(cell) for cell in ordered], indent=1) + "\n")
    partial.replace(path)
    return ordered


def table_markdown(number: int, cells: Sequence[Cell]) -> str:
    """Ours beside the paper's, a row a cell; rows of the paper that nobody ran say so."""
    ours = {cell.key: cell for cell in cells}
    paper = {(row.table, row.name, row.mode): row for row in PAPER if row.table == number}
    lines = [
        f"**Table {number}** (top-1 / top-5 error, %)",
        "",
        "| nets, the paper's S | mode | ours | S, Q | data | date | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in [*paper, *(cell.key for cell in cells if cell.table == number and cell.key not in paper)]:
        _, name, mode = key
        theirs = f"{paper[key].top1} / {paper[key].top5}" if key in paper else "-"
        cell = ours.get(key)
        if cell is None:
            lines.append(f"| {name} | {mode} | not run | | | | {theirs} |")
        else:
            figures = f"{cell.top1:.1f} / {cell.top5:.1f}"
            lines.append(
                f"| {name} | {mode} | {figures} | S {cell.S}; Q {cell.Q} | {cell.data} | {cell.when} | {theirs} |"
            )
    commands = sorted({cell.command for cell in cells if cell.table == number})
    return "\n".join([*lines, "", *([] if not commands else ["```", *commands, "```", ""])])


def claims_markdown(cells: Sequence[Cell]) -> str:
    """Each of the paper's claims, decided by the pairs of cells that were measured."""
    ours = {cell.key: cell for cell in cells}
    lines = [
        "**The paper's claims**, each on cells over the same images; decided beyond two standard errors",
        "",
        "| claim | the pair | top-1 error, % | difference +- its standard error | verdict | images |",
        "|---|---|---|---|---|---|",
    ]
    header = len(lines)
    for claim in CLAIMS:
        for better, worse in claim.pairs:
            if better in ours and worse in ours:
                a, b = ours[better], ours[worse]
                verdict, difference, error = decide(a, b)
                # where net and S don't tell the cells of a claim apart, the mode and the number of Q do
                told = a.table == 3 and b.table == 3
                pair = " against ".join(cell.row if told else f"{cell.row}, {_how(cell)}" for cell in (a, b))
                lines.append(
                    f"| {claim.text} | {pair} | {a.top1:.1f}, {b.top1:.1f} | {difference:+.2f} +- {error:.2f} "
                    f"| {verdict} | {a.images} |"
                )
    return "\n".join(lines) + "\n" if len(lines) > header else ""


def _how(cell: Cell) -> str:
    return f"{cell.mode}, {cell.Q.count(',') + 1} Q"


def write_ledger(path: Path, heading: str, cells: Sequence[Cell]) -> None:
    """Put the tables and claims between this heading's marks in a Markdown file; append them where there are none."""
    begin, end = f"<!-- ledger: {heading} -->", f"<!-- end of ledger: {heading} -->"
    parts = [begin, f"## {heading}", ""]
    parts += [table_markdown(number, cells) for number in (3, 4, 5, 6)]
    parts += [claims_markdown(cells), end]
    body = "\n".join(parts)
    text = path.read_text() if path.exists() else ""
    if begin in text and end in text:
        text = text[: text.index(begin)] + body + text[text.index(end) + len(end) :]
    else:
        text = text.rstrip("\n") + ("\n\n" if text else "") + body + "\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
