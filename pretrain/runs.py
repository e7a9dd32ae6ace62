"""The nets of a folder of runs, and the paper's tables made with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.kept import BOTH, MODES, KeptPosteriors
from pretrain.ledger import (
    MEASURED,
    THEIRS,
    check_ledger,
    file_of,
    notes_markdown,
    read_cells,
    sections,
    table_markdown,
    with_new,
    with_section,
)
from pretrain.posteriors import evaluate, how_trained
from pretrain.recipe import CONTROL, LOCALISATION
from pretrain.tables import (
    COMPARED,
    PAPER,
    RELEASED,
    BoxNet,
    Cell,
    Learned,
    Member,
    PaperRow,
    box_q,
    box_scales,
    pack,
    paper_scales,
)
from pretrain.watch import CHECKPOINT, WEIGHTS
from vggfeat.checked import read_text
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.ledger import alone, plain_word, write
from vggfeat.metrics import tells
from vggfeat.ranks import Ranks
from vggfeat.sources import load
from vggfeat.table1 import NETS
from vggfeat.tensors import metadata_of
from vggfeat.terminal import command, out, progress, say
from vggfeat.weights import trained_at


@dataclass(frozen=True)
class Trained:
    """A net of a run: its S and crop in pixels, which layers learned last, its recipe, how long it
    learned, its file.

    task: what it was trained for; "" in older files: classes. stands_for: the paper's S that its
    own stands for, "" for none. changes: of the recipe (`recipe.identity`), and `max_pool` where it
    was evaluated with other pooling than its own. epochs: in all its stages, None where unknown.
    training_set: digest of its images, "" unknown.
    """

    net: str
    train_scale: tuple[int, int]
    crop: int
    learn: str
    recipe: str
    weights: str
    seed: int = 0
    stands_for: str = ""
    changes: tuple[str, ...] = ()
    epochs: float | None = None
    training_set: str = ""
    task: str = ""

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> Trained:
        """From the strings that a weights file or kept posteriors have; VggfeatError where they
        don't say it.
        """
        try:
            S = trained_at(facts["train_scale"])
            if not (S and facts["learn"] and facts["recipe"]) or facts["net"] not in NETS:
                raise ValueError
            changes = facts["changes"].splitlines()
            own = "ceil" if RELEASED in changes else "floor"  # Caffe's, and ours
            if facts.get("pool", "") not in ("", own):
                changes.append(f"max_pool={plain_word(facts['pool'])}")
            return cls(
                facts["net"],
                S,
                int(facts["crop"]),
                facts["learn"],
                plain_word(facts["recipe"]),
                facts["weights"],
                int(facts["seed"]),
                facts["stands_for"],
                tuple(changes),
                float(facts["epochs"]) if facts["epochs"] else None,
                facts["training_set"],
                facts.get("task", ""),
            )
        except (KeyError, ValueError):
            raise VggfeatError(
                f"net {facts.get('net')} ({facts.get('weights')}) doesn't tell by which recipe it"
                " was trained: a table takes nets of pretrain.train and the authors'; where an"
                " older version kept its posteriors, evaluate it again"
            ) from None

    @property
    def member(self) -> Member:
        """What it is in the paper's tables, or would be at another S than the paper's."""
        return Member(self.net, self.S, self.learn, self.task == CONTROL)

    @property
    def S(self) -> str:
        """The paper's that it stands for, or its own as "S=112"."""
        low, high = self.train_scale
        return self.stands_for or (f"S={low}" if low == high else f"S={low}-{high}")

    def box_net(self, boxes: str, scales: Sequence[int]) -> BoxNet:
        """What it is in Tables 8 and 9, tested at these Q. boxes: "scr" or "pcr"."""
        lower = [
            each
            for each in (False, True)
            if self.S.isdecimal() and tuple(scales) == box_scales(self.train_scale, self.crop, each)
        ]
        Q = box_q(self.S, lower[0]) if lower else f"Q={','.join(map(str, scales))}"
        return BoxNet(self.net, self.S, boxes, self.learn, Q)


Roles = dict[tuple[str, tuple[str, ...], int], dict[Member, int]]
"""(recipe, changes of it, seed) -> the nets that were trained alike, by what they are in the
paper's tables.
"""


def known(facts: Sequence[Mapping[str, str]], tell: bool = True) -> list[tuple[int, Trained]]:
    """The nets that tell how they were trained, and their positions; the others are left out, and
    named if `tell`.

    Raises VggfeatError where all are.
    """
    found: list[tuple[int, Trained]] = []
    errors: list[VggfeatError] = []
    for i, of_net in enumerate(facts):
        try:
            found.append((i, Trained.from_facts(of_net)))
        except VggfeatError as error:
            errors.append(error)
    if errors and not found:
        raise errors[0]
    for left_out in errors if tell else ():
        say(f"left out: {left_out}")
    return found


def trained_nets(runs: Path, tell: bool = True) -> list[Trained]:
    """Every stage's weights file under a folder, but those that tell boxes; see `known`. Raises
    VggfeatError where there are none.
    """
    # a run's own copy of its last stage has no checkpoint beside it
    there = [path for path in sorted(runs.rglob(WEIGHTS)) if (path.parent / CHECKPOINT).exists()]
    if not (nets := nets_of(there, tell)):
        raise VggfeatError(f"no trained nets under {runs.absolute()}: expected RUN/STAGE/{WEIGHTS}")
    return nets


def nets_of(files: Iterable[Path], tell: bool = True) -> list[Trained]:
    """The nets of our weights files, but those that tell boxes; see `known`."""
    facts = []
    for path in files:
        metadata = metadata_of(path)
        if metadata.get("source", "").startswith("pretrain "):
            its = {**metadata, **how_trained(metadata), "weights": str(path)}
            facts += [its] if its["task"] != LOCALISATION else []
    return [net for _, net in known(facts, tell)]


def roles(nets: Sequence[Trained]) -> Roles:
    """Which of the paper's nets each one (by its position) stands for, by what its recipe says that
    its S stand for.
    """
    found: Roles = {}
    for i, net in enumerate(nets):
        role = found.setdefault((net.recipe, net.changes, net.seed), {})
        if net.member in role:
            first = nets[role[net.member]].weights
            raise VggfeatError(
                f"{first} and {net.weights} both stand for {net.net} at {net.member.S}: keep one of"
                " them"
            )
        role[net.member] = i
    return dict(sorted(found.items()))


def rows_of(numbers: Collection[int], members: Iterable[Member]) -> list[PaperRow]:
    """The rows of these tables; of Tables 3 and 4 also those of nets that no table of the paper
    has.

    Among them are controls and B-5x5, of which Sect. 4.1 tells beside Table 3. Table 7's are rows
    of Tables 5 and 6.
    """
    theirs = {
        member
        for row in PAPER
        if row.mode != "centre"
        for member in row.members
        if not member.control
    }
    others = [member for member in dict.fromkeys(members) if member not in theirs]
    compared = {row.key for row in COMPARED if row.table in numbers}
    return [row for row in PAPER if row.table in numbers or row.key in compared] + [
        PaperRow(table, (member,), multi, "dense")
        for table, multi in ((3, False), (4, True))
        if table in numbers
        for member in others
    ]


def wanted_rows(numbers: Sequence[int], nets: Sequence[Trained]) -> dict[int, list[PaperRow]]:
    """Of each net, by its position, the rows of these tables that it is in. Raises VggfeatError
    where there are none.
    """
    wanted: dict[int, list[PaperRow]] = {}
    for role in roles(nets).values():
        for row in rows_of(numbers, role):
            if all(member in role for member in row.members):
                for member in row.members:
                    wanted.setdefault(role[member], []).append(row)
    if not wanted:
        raise VggfeatError(
            f"none of the {len(nets)} nets, such as {nets[0].weights}, is in table"
            f" {', '.join(map(str, numbers))}"
        )
    return wanted


def asked_of(net: Trained, rows: Iterable[PaperRow]) -> tuple[list[int], list[str]]:
    """Q and modes that a net's rows want."""
    # Table 4's several Q beside Table 3's one: so "several Q help" is decided on the same images
    kinds = {row.multi for row in rows} | {False}
    scales = sorted({q for multi in kinds for q in paper_scales(net.train_scale, net.crop, multi)})
    asked = {row.mode for row in rows}
    asked |= {*BOTH} if "both" in asked else set()
    return scales, [mode for mode in MODES if mode in asked]


def measure_net(
    net: Trained,
    rows: Sequence[PaperRow],
    items: Items,
    split: str,
    ranks: Ranks,
    precision: str,
    how: dict[str, Any],
) -> KeptPosteriors:
    """Posteriors of a net, at every Q and mode that its rows want: in one pass."""
    scales, modes = asked_of(net, rows)
    network = load(net.weights, device=ranks.device, precision=precision)
    what = f"{net.member.name}, seed {net.seed}"
    with progress(what, quiet=not ranks.first) as advance:
        return evaluate([network], scales, modes, items, split, ranks, advance=advance, **how)


def measure_tables(
    numbers: Sequence[int],
    runs: Path,
    items: Items,
    split: str,
    ranks: Ranks,
    precision: str,
    how: dict[str, Any],
) -> KeptPosteriors:
    """Posteriors of the nets under a folder, as these tables' rows want them: see `measure_net`."""
    nets = trained_nets(runs, tell=ranks.first)
    return KeptPosteriors.joined(
        (nets[i].weights, measure_net(nets[i], rows, items, split, ranks, precision, how))
        for i, rows in wanted_rows(numbers, nets).items()
    )


def write_tables(numbers: Sequence[int], kept: KeptPosteriors, ledger: Path) -> None:
    """The cells of these tables from kept posteriors: printed beside the paper's, and put into the
    ledger (`put_into`).

    The cells are kept as JSON beside the ledger: `ledger-ilsvrc.json` for ImageNet's whole
    validation set and the paper's recipe as it is, else `ledger-RECIPE-DATA.json`. Nothing is
    written before all is computed; the cells are written first, and the ledger is made of them, so
    the same command mends what a full disk has left undone. Raises VggfeatError: not a validation
    set, images without labels, no net that can be in a table, no row at all.
    """
    if not tells(1, len(kept.classes)):
        raise VggfeatError("the nets know one class only: there is no error to put into a table")
    if (kept.labels < 0).any() or not len(kept.labels):
        raise VggfeatError("the images have no labels: a table needs the validation set's")
    if kept.split != "val":
        raise VggfeatError(
            f"the posteriors are of the {kept.split} images: a table is of the validation set"
        )
    put_into(ledger, _cells(numbers, kept), is_ilsvrc(kept), numbers)


def put_into(
    ledger: Path, cells: Sequence[Cell], ilsvrc: bool, numbers: Sequence[int] = MEASURED
) -> None:
    """New cells into the ledger, and these tables of theirs printed. ilsvrc: the images are all of
    ILSVRC-2012's validation set. Nothing is written where the page, or a file of cells beside it,
    can't be read (VggfeatError).
    """
    shown: list[str] = []
    with alone(ledger):
        check_ledger(ledger)  # all of it can be read, or none of it is changed
        theirs = ledger.with_name(THEIRS)
        # the paper's own data come first, also while all their cells are still "not run"
        new: dict[Path, list[Cell]] = {theirs: []}
        for cell in cells:
            of_paper = ilsvrc and cell.recipe == "paper" and {*cell.changes} <= {RELEASED}
            own = theirs if of_paper else ledger.with_name(file_of(cell.recipe, cell.data))
            new.setdefault(own, []).append(cell)
        text = read_text(ledger, "ledger") if ledger.exists() else ""
        contents: dict[Path, list[Cell]] = {}
        for path, some in new.items():
            every = with_new(read_cells(path), some)
            for heading, part in sections(every, path == theirs).items():
                text = with_section(text, heading, part)
                if any(cell in some for cell in part):
                    tables = [table_markdown(n, part, path == theirs) for n in numbers]
                    shown += [heading, "", *notes_markdown(part), *filter(None, tables)]
            if some:
                contents[path] = every
        write(ledger, text, contents)
    for line in "\n".join(shown).splitlines():
        out.print(line, soft_wrap=True)


def _cells(numbers: Sequence[int], kept: KeptPosteriors) -> list[Cell]:
    """Of all rows that these nets fill. Raises VggfeatError where there are none."""
    there = known([net.facts for net in kept.nets])
    nets = [net for _, net in there]
    kept = replace(kept, nets=[kept.nets[i] for i, _ in there])
    cells: list[Cell] = []
    for (_, changes, seed), role in roles(nets).items():
        for row in rows_of(numbers, role):
            if not all(member in role for member in row.members):
                continue  # the table says so
            try:
                cells.append(_cell(row, role, nets, kept, changes, seed))
            except VggfeatError as error:  # kept at other Q, or in one mode only
                say(f"table {row.table}, {row.name}, {row.mode}: left out, {error}")
    if not cells:
        raise VggfeatError(
            f"none of these nets fills a row of table {', '.join(map(str, numbers))}"
        )
    return cells


def is_ilsvrc(kept: KeptPosteriors) -> bool:
    """Whether these are the validation images of ILSVRC-2012, all of them, told apart in its 1,000
    classes.
    """
    stems = {name.rpartition("/")[2].partition(".")[0] for name in kept.names}
    theirs = {f"ILSVRC2012_val_{i:08d}" for i in range(1, 50_001)}
    return len(kept.classes) == len(np.unique(kept.labels)) == 1000 and stems == theirs


def _cell(
    row: PaperRow,
    role: Mapping[Member, int],
    nets: Sequence[Trained],
    kept: KeptPosteriors,
    changes: Sequence[str],
    seed: int,
) -> Cell:
    parts: list[np.ndarray] = []
    scales: list[str] = []
    learned: list[Learned] = []
    for member in row.members:
        net, its = nets[role[member]], kept.nets[role[member]]
        Q = paper_scales(net.train_scale, net.crop, row.multi)
        parts.append(its.mean(row.mode, Q))
        scales.append(",".join(map(str, Q)))
        learned.append(
            Learned(its.facts["fingerprint"], net.epochs, net.training_set, its.facts["precision"])
        )
    posteriors_NK = np.mean(parts, axis=0)
    _, top5 = kept.errors(posteriors_NK)
    wrong = kept.wrong(posteriors_NK, 1)
    top1 = 100 * float(wrong.mean())
    S = " + ".join(kept.nets[role[member]].facts["train_scale"] for member in row.members)
    return Cell(
        row.table,
        row.name,
        row.mode,
        S,
        " + ".join(dict.fromkeys(scales)),
        top1,
        top5,
        plain_word(kept.data),
        kept.split,
        len(wrong),
        len(kept.classes),
        kept.image_set,
        nets[role[row.members[0]]].recipe,
        list(changes),
        seed,
        learned,
        command(),
        date.today().isoformat(),
        pack(wrong),
        unreadable=int(np.isnan(posteriors_NK).any(axis=1).sum()),
    )
