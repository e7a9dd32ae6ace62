"""Tables 3 to 10 of the paper as data, and the cells that our figures are kept in.

A cell is a net (or several, fused), its training scale S, its test scales Q and a mode, on one set
of images. Tables 7 and 10 compare rows of the others with other methods, and have no cells of their
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from pretrain.recipe import PAPER_S
from vggfeat.checked import OneOf, Range
from vggfeat.errors import VggfeatError

FIXED, LARGE, JITTER = PAPER_S
RELEASED = "the authors' weights"
"""Among what tells a net from one of ours by the paper's recipe."""
Percent = Annotated[float, Range(0, 100)]

AS_LONG = 1.1  # the plateau rule ends a stage an epoch earlier or later
Key = tuple[int, str, str]
"""Table, row and mode: a place in the paper."""


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


def box_scales(train_scale: tuple[int, int], crop: int, lower: bool) -> tuple[int, ...]:
    """Q of Tables 8 and 9 for a net trained at S: S, or S - crop/7 (32 for 224), too."""
    (S,) = paper_scales(train_scale, crop, multi=False)
    return tuple(dict.fromkeys((max(crop, S - round(crop / 7)), S))) if lower else (S,)


def box_q(S: str, lower: bool) -> str:
    """Those Q in the paper's numbers: "352,384" of its "384"."""
    return f"{int(S) - 32},{S}" if lower else S


@dataclass(frozen=True)
class Member:
    """A net of Table 1 trained at one of the paper's S, or "S=..." for another. learn: "fc", "fc8":
    only these layers did. control: it only was trained for another to be compared with.
    """

    net: str
    S: str
    learn: str = "all"
    control: bool = False

    @property
    def name(self) -> str:
        """Net and S in the paper's words."""
        return (
            f"{self.net} {self.S}"
            + (" (control)" if self.control else "")
            + {"fc": " (FC layers only)", "fc8": " (fc8 only)"}.get(self.learn, "")
        )


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 3, 4, 5 or 6. top1, top5: the paper's errors on the validation set, %; NaN:
    none. test5: its top-5 error on the test set, as the server told it.

    multi: several Q (the row's own of Table 4), else one. mode: "dense", "crops", "both" or
    "centre". says: in the place of figures.
    """

    table: int
    members: tuple[Member, ...]
    multi: bool
    mode: str
    top1: float = math.nan
    top5: float = math.nan
    test5: float | None = None
    says: str = "-"

    @property
    def name(self) -> str:
        """Nets and S in the paper's words."""
        return " + ".join(m.name for m in self.members)

    @property
    def key(self) -> Key:
        return self.table, self.name, self.mode

    @property
    def beside(self) -> str:
        """What stands beside ours."""
        return self.says if math.isnan(self.top1) else f"{self.top1} / {self.top5}"


def _rows(table: int, multi: bool, lines: str) -> list[PaperRow]:
    rows = []
    for line in lines.strip().splitlines():
        net, S, top1, top5 = line.split()
        rows.append(PaperRow(table, (Member(net, S),), multi, "dense", float(top1), float(top5)))
    return rows


def _both_nets(mode: str, top1: float, top5: float, test5: float | None = None) -> PaperRow:
    return PaperRow(6, (Member("D", JITTER), Member("E", JITTER)), True, mode, top1, top5, test5)


SUBMITTED = PaperRow(
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
    7.3,
)
B_5X5, B_CONTROL = Member("B-5x5", FIXED), Member("B", FIXED, control=True)


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
    # Sect. 4.1: B as it is, and as B-5x5 learns, from random weights
    PaperRow(3, (Member("B", FIXED),), False, "centre"),
    PaperRow(3, (B_CONTROL,), False, "centre"),
    PaperRow(3, (B_5X5,), False, "centre", says="top-1: 7 % more than B's"),
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
    # what jitter is held against where the dense net's edges tell small nets apart
    PaperRow(5, (Member("D", FIXED, control=True),), True, "crops"),
    PaperRow(5, (Member("E", FIXED, control=True),), True, "crops"),
    SUBMITTED,
    _both_nets("dense", 24.0, 7.1, 7.0),
    _both_nets("crops", 23.9, 7.2),
    _both_nets("both", 23.7, 6.8, 6.8),
]


@dataclass(frozen=True)
class BoxNet:
    """A net of a row of Table 8 or 9. S: as a member's. boxes: "scr", shared by all classes, or
    "pcr", per class. learn: as a member's. Q: in the paper's numbers where it is S or S - 32 and S,
    else "Q=...".
    """

    net: str
    S: str
    boxes: str
    learn: str
    Q: str

    @property
    def name(self) -> str:
        """Without Q."""
        layers = {"fc": "FC1-2", "fc8": "fc8"}.get(self.learn, "all layers")
        return f"{self.net} {self.S}, {self.boxes.upper()}, {layers}"

    @property
    def own_Q(self) -> tuple[str, str]:
        """Its S as Q, in either spelling."""
        return self.S, self.S.replace("S=", "Q=")

    @property
    def at(self) -> str:
        """With Q; "all layers" and PCR, which all of Table 9 are, go without saying."""
        best = (self.boxes, self.learn) == ("pcr", "all")
        return f"{f'{self.net} {self.S}' if best else self.name} at {self.Q}"


@dataclass(frozen=True)
class BoxRow:
    """A row of Table 8 (one net, "centre": the true class's box of a central crop) or 9 ("dense":
    boxes of the five likeliest classes, merged over positions, Q and nets). error: the paper's, %;
    of Table 9 the top-5 error. test: on the test set, as the server told it.
    """

    table: int
    nets: tuple[BoxNet, ...]
    error: float = math.nan
    test5: float | None = None

    @property
    def mode(self) -> str:
        return "centre" if self.table == 8 else "dense"

    @property
    def name(self) -> str:
        if self.table == 8:
            (net,) = self.nets
            return net.name + ("" if net.Q in net.own_Q else f" at {net.Q}")
        return " + ".join(net.at for net in self.nets)

    @property
    def key(self) -> Key:
        return self.table, self.name, self.mode

    @property
    def beside(self) -> str:
        return f"{self.error}" if self.table == 8 else f"- / {self.error}"


def _all_layers(S: str, Q: str) -> BoxNet:
    return BoxNet("D", S, "pcr", "all", Q)


_LOWER = box_q(LARGE, lower=True)
_FUSED = (_all_layers(FIXED, FIXED), _all_layers(LARGE, _LOWER))
BOXES: list[BoxRow] = [
    BoxRow(8, (BoxNet("D", LARGE, "scr", "fc", LARGE),), 36.4),
    BoxRow(8, (BoxNet("D", LARGE, "pcr", "fc", LARGE),), 34.3),
    BoxRow(8, (BoxNet("D", LARGE, "pcr", "all", LARGE),), 33.1),
    BoxRow(9, (_all_layers(FIXED, FIXED),), 29.5),
    BoxRow(9, (_all_layers(LARGE, LARGE),), 28.2, 26.7),
    BoxRow(9, (_all_layers(LARGE, _LOWER),), 27.5),
    BoxRow(9, _FUSED, 26.9, 25.3),
]
_EVERY: list[PaperRow | BoxRow] = [*PAPER, *BOXES]
ROWS = {row.key: row for row in _EVERY}


@dataclass(frozen=True)
class Compared:
    """A row of Table 7 or 10: errors on the validation set and, by the server, on the test set, %.

    key: the row of another table that it is, if it is one of the paper's own nets.
    """

    table: int
    method: str
    top1: float | None
    top5: float | None
    test5: float | None
    key: Key | None = None


_PAIR = f"D {JITTER} + E {JITTER}"
COMPARED = [
    Compared(7, "VGG, 2 nets, multi-crop and dense", 23.7, 6.8, 6.8, (6, _PAIR, "both")),
    Compared(7, "VGG, 1 net, multi-crop and dense", 24.4, 7.1, 7.0, (5, f"E {JITTER}", "both")),
    Compared(7, "VGG, the submission, 7 nets, dense", 24.7, 7.5, 7.3, SUBMITTED.key),
    Compared(7, "GoogLeNet, 1 net", None, 7.9, 7.9),
    Compared(7, "GoogLeNet, 7 nets", None, 6.7, 6.7),
    Compared(7, "MSRA, 11 nets", None, None, 8.1),
    Compared(7, "MSRA, 1 net", 27.9, 9.1, 9.1),
    Compared(7, "Clarifai, multiple nets", None, None, 11.7),
    Compared(7, "Clarifai, 1 net", None, None, 12.5),
    Compared(7, "Zeiler & Fergus, 6 nets", 36.0, 14.7, 14.8),
    Compared(7, "Zeiler & Fergus, 1 net", 37.5, 16.0, 16.1),
    Compared(7, "OverFeat, 7 nets", 34.0, 13.2, 13.6),
    Compared(7, "OverFeat, 1 net", 35.7, 14.2, None),
    Compared(7, "Krizhevsky et al., 5 nets", 38.1, 16.4, 16.4),
    Compared(7, "Krizhevsky et al., 1 net", 40.7, 18.2, None),
    Compared(10, "VGG", None, 26.9, 25.3, BOXES[-1].key),
    Compared(10, "GoogLeNet", None, None, 26.7),
    Compared(10, "OverFeat", None, 30.0, 29.9),
    Compared(10, "Krizhevsky et al.", None, None, 34.2),
]


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
    the row. when: ISO date. seed: of the recipe; a row of several seeds has a cell for each.

    Of Tables 8 and 9 the errors are of localisation; in Table 8, which takes the true class, top5
    is None. box_set: digest of the true boxes. classifier: of what told the five classes, "" the
    true one. judged: which error `wrong` is of, "top5" in Table 9. unreadable: how many of the
    images can't be read, which are errors. Raises VggfeatError where `wrong` isn't of so many
    images and errors.
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
    box_set: str = ""
    classifier: str = ""
    judged: Annotated[str, OneOf(("top1", "top5"))] = "top1"
    unreadable: Annotated[int, Range(0, 10**8)] = 0

    def __post_init__(self) -> None:
        try:
            known = 8 * len(bytes.fromhex(self.wrong))
        except ValueError:
            known = -1
        if not self.images <= known < self.images + 8:
            raise VggfeatError(
                f"cell {self.row}, {self.mode}: `wrong` is not of {self.images} images"
            )
        if not abs(100 * float(self.wrong_images().mean()) - self.error) <= 1e-6:  # NaN, too
            raise VggfeatError(
                f"cell {self.row}, {self.mode}: `wrong` is not of {self.error} % errors"
            )

    @property
    def key(self) -> Key:
        """Its place in the paper."""
        return self.table, self.row, self.mode

    @property
    def error(self) -> float:
        """The one that rows are compared by, %; NaN where it isn't known."""
        error = self.top1 if self.judged == "top1" else self.top5
        return math.nan if error is None else error

    def wrong_images(self) -> np.ndarray:
        """(n,) bool."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.wrong), np.uint8))[
            : self.images
        ].astype(bool)


def pack(wrong: np.ndarray) -> str:
    """(n,) bool -> hex, the inverse of `Cell.wrong_images`."""
    return np.packbits(wrong).tobytes().hex()


# --- rows of cells --------------------------------------------------------------------------------


def by_row(cells: Iterable[Cell]) -> dict[tuple[Key, tuple[str, ...]], list[Cell]]:
    """The cells of each place in the paper and each change of the recipe, one a seed.

    What else than the seed tells nets apart, in words, stands among the changes: they are no seeds
    of one row. Another S or Q is such a difference, where a recipe's numbers have changed.
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
    """Parts of a row whose nets had the same training, precision, S and Q, and what tells each part
    from the others.
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
        sets, precisions, (box_set, classifier), (S, Q) = _sets(part[0])
        words.append(
            (
                f"{epochs} epoch{'' if epochs == '1' else 's'} of training",
                (
                    "training images"
                    f" {' + '.join(dict.fromkeys(each[:8] or 'unknown' for each in sets))}"
                ),
                "/".join(dict.fromkeys(precisions)),
                f"boxes {box_set[:8]}",
                f"classes by {classifier[:8]}",
                f"S {S}, tested at {Q}",
            )
        )
    differ = [len(set(column)) > 1 for column in zip(*words, strict=True)]
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


def _sets(
    cell: Cell,
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, str], tuple[str, str]]:
    return (
        tuple(net.training_set for net in cell.nets),
        tuple(net.precision for net in cell.nets),
        (cell.box_set, cell.classifier),
        (cell.S, cell.Q),
    )


def marks(cells: Sequence[Cell]) -> dict[tuple[str, ...], str]:
    """Changes of the recipe -> the mark of a row that has them; none for the recipe as it is."""
    changes = sorted({changes for _, changes in by_row(cells)})
    return {(): ""} | {change: f" [{i}]" for i, change in enumerate(filter(None, changes), 1)}


def span(values: Sequence[float]) -> str:
    """ "20", or "20 to 22"."""
    low, high = (f"{round(value, 1):g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
