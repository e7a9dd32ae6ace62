"""The nets of a folder of runs, and the paper's tables made with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from pretrain.posteriors import Kept, Posteriors, evaluate
from pretrain.ranks import Ranks
from pretrain.tables import (
    FIXED,
    JITTER,
    LARGE,
    PAPER,
    Cell,
    Member,
    PaperRow,
    pack,
    paper_scales,
    read_cells,
    table_markdown,
    update_cells,
    write_ledger,
)
from pretrain.watch import say
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.terminal import command, out, progress
from vggfeat.weights import load


@dataclass(frozen=True)
class Trained:
    """A weights file of a run: its net, S and crop in pixels, which layers learned last, the recipe's name."""

    path: Path
    net: str
    train_scale: tuple[int, int]
    crop: int
    learn: str
    recipe: str


def trained_nets(runs: Path) -> list[Trained]:
    """Every stage's weights file under a folder. Raises VggfeatError where there are none."""
    found = []
    for path in sorted(runs.rglob("weights.safetensors")):
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        if (
            not metadata.get("source", "").startswith("pretrain ")
            or not (path.parent / "last.safetensors").exists()
        ):
            continue  # a run's own copy of its last stage, or another file
        low, _, high = metadata["train_scale"].partition("-")
        learn = "fc" if metadata["source"].endswith("-fc") else "all"
        name = json.loads(metadata["recipe"])["name"]
        found.append(
            Trained(path, metadata["net"], (int(low), int(high or low)), int(metadata["crop"]), learn, name)
        )
    if not found:
        raise VggfeatError(f"no trained nets under {runs.absolute()}: expected RUN/STAGE/weights.safetensors")
    return found


def roles(nets: Sequence[Trained]) -> dict[Member, Trained]:
    """Which of the paper's nets each one stands for: by S where it is the paper's, else by order.

    The smallest fixed S stands for 256, a larger one for 384, a range for [256, 512].
    """
    fixed = sorted({net.train_scale[0] for net in nets if net.train_scale[0] == net.train_scale[1]})
    role: dict[Member, Trained] = {}
    for net in nets:
        low, high = net.train_scale
        S = JITTER if low != high else (FIXED if low == fixed[0] else LARGE)
        member = Member(net.net, S, net.learn)
        if member in role:
            raise VggfeatError(
                f"{role[member].path} and {net.path} both stand for {net.net} at {S}: keep one of them"
            )
        role[member] = net
    return role


def run_tables(
    numbers: Sequence[int], runs: Path, ledger: Path, items: Items, data: Path, split: str, ranks: Ranks,
    precision: str, how: dict[str, Any],
) -> None:  # fmt: skip
    """Measure the rows of these tables for which there are nets, print them, and update the ledger.

    The cells are kept as JSON beside the ledger: `ledger-ilsvrc.json` for ImageNet's 1,000 classes and the paper's
    recipe, `ledger-NAME.json` for a stand-in.
    """
    nets = trained_nets(runs)
    role = roles(nets)
    rows = [row for row in PAPER if row.table in numbers]
    if 3 in numbers:
        rows.append(PaperRow(3, (Member("B-5x5", FIXED),), False, "dense", float("nan"), float("nan")))
    possible = [row for row in rows if all(member in role for member in row.members)]
    for row in rows:
        if row not in possible and ranks.first:
            missing = [f"{m.net} {m.S}" for m in row.members if m not in role]
            say(f"table {row.table}, {row.name}: not run, no net for {', '.join(missing)}")
    whole = _measured(possible, role, items, split, ranks, precision, how)
    if not ranks.first:
        return
    recipe = next(iter(role.values())).recipe
    standin = recipe != "paper" or len(items.classes) != 1000
    labelled = len(items)
    where = f"{data.name} {split}, {labelled} images, {len(items.classes)} classes"
    cells = [_cell(row, role, whole, where) for row in possible]
    kept = ledger.with_name(f"ledger-{recipe + '-' + data.name if standin else 'ilsvrc'}.json")
    every = update_cells(kept, cells)
    # the paper's own data come first, also while all their cells are still "not run"
    write_ledger(ledger, "Tables 3 to 6, ILSVRC-2012", read_cells(ledger.with_name("ledger-ilsvrc.json")))
    if standin:
        write_ledger(ledger, f"Tables 3 to 6, stand-in: {recipe} nets on {data.name}", every)
    for number in numbers:
        out.print(table_markdown(number, every))


def _measured(
    rows: Sequence[PaperRow], role: dict[Member, Trained], items: Items, split: str, ranks: Ranks, precision: str,
    how: dict[str, Any],
) -> dict[Member, Kept]:  # fmt: skip
    """Each net's posteriors at every Q and mode that a row wants: one pass a net."""
    whole: dict[Member, Kept] = {}
    for member in dict.fromkeys(member for row in rows for member in row.members):
        net = role[member]
        wanted = [row for row in rows if member in row.members]
        multi = any(row.multi for row in wanted)
        scales = sorted(
            {q for row in wanted for q in paper_scales(net.train_scale, net.crop, row.multi)}
            | (set(paper_scales(net.train_scale, net.crop, False)) if multi else set())
        )
        modes = ("dense", "crops") if any(row.mode != "dense" for row in wanted) else ("dense",)
        network = load(str(net.path)).to(ranks.device, precision)
        with progress(f"{member.net} {member.S}") as show:

            def advance(done: float, total: int, show: Any = show) -> None:
                if ranks.first:
                    show(done, total)

            whole[member] = evaluate([network], scales, modes, items, split, ranks, advance=advance, **how)
    return whole


def _cell(row: PaperRow, role: dict[Member, Trained], whole: dict[Member, Kept], where: str) -> Cell:
    kept = whole[row.members[0]]
    parts: list[np.ndarray] = []
    scales: list[str] = []
    nets: list[Posteriors] = []
    for member in row.members:
        trained = role[member]
        Q = paper_scales(trained.train_scale, trained.crop, row.multi)
        nets.append(whole[member].nets[0])
        parts.append(nets[-1].mean(row.mode, Q))
        scales.append(",".join(map(str, Q)))
    posteriors_NK = np.mean(parts, axis=0)
    top1, top5 = kept.errors(posteriors_NK)
    wrong = kept.wrong(posteriors_NK, 1)
    return Cell(
        row.table, row.name, row.mode, " + ".join(net.of["train_scale"] for net in nets),
        " + ".join(dict.fromkeys(scales)), top1, top5, len(wrong), where, [net.of["fingerprint"] for net in nets],
        command(), date.today().isoformat(), pack(wrong),
    )  # fmt: skip
