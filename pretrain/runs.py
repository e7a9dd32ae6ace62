"""The nets of a folder of runs, and the paper's tables made with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.kept import MODES, KeptPosteriors
from pretrain.posteriors import evaluate, how_trained
from pretrain.tables import (
    FIXED,
    JITTER,
    LARGE,
    PAPER,
    Cell,
    Member,
    PaperRow,
    check_ledger,
    pack,
    paper_scales,
    read_cells,
    table_markdown,
    update_cells,
    write_ledger,
)
from pretrain.trainer import CHECKPOINT
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.ranks import Ranks
from vggfeat.terminal import command, out, progress, say
from vggfeat.weights import load, metadata_of


@dataclass(frozen=True)
class Trained:
    """A net of a run: its S and crop in pixels, which layers learned last, the recipe's name and seed, its file."""

    net: str
    train_scale: tuple[int, int]
    crop: int
    learn: str
    recipe: str
    weights: str
    seed: int = 0

    @classmethod
    def of(cls, of: Mapping[str, str]) -> Trained:
        """From the strings that a weights file or kept posteriors have; VggfeatError where they don't say it."""
        try:
            low, _, high = of["train_scale"].partition("-")
            S = int(low), int(high or low)
            seed = int(of.get("seed") or 0)  # posteriors of before there were several have none
            trained = cls(of["net"], S, int(of["crop"]), of["learn"], of["recipe"], of["weights"], seed)
        except (KeyError, ValueError):
            trained = None
        if trained is None or not trained.learn:
            raise VggfeatError(
                f"net {of.get('net')} ({of.get('weights')}) is neither one of pretrain.train nor the authors', or its "
                "posteriors were kept by an older version: a table needs to know how it was trained"
            )
        return trained


def trained_nets(runs: Path) -> list[Trained]:
    """Every stage's weights file under a folder. Raises VggfeatError where there are none."""
    found = []
    for path in sorted(runs.rglob("weights.safetensors")):
        metadata = metadata_of(path)
        # a run's own copy of its last stage has no checkpoint beside it
        if how_trained(metadata)["learn"] and (path.parent / CHECKPOINT).exists():
            found.append(Trained.of({**metadata, **how_trained(metadata), "weights": str(path)}))
    if not found:
        raise VggfeatError(f"no trained nets under {runs.absolute()}: expected RUN/STAGE/weights.safetensors")
    return found


def roles(nets: Sequence[Trained]) -> dict[int, dict[Member, int]]:
    """Seed -> which of the paper's nets each one (by its position) stands for: by S where it is the paper's, else by
    order.

    The smallest fixed S stands for 256, a larger one for 384, a range for [256, 512].
    """
    recipes = sorted({net.recipe for net in nets})
    if len(recipes) > 1:
        raise VggfeatError(f"the nets are of recipes {' and '.join(recipes)}: a ledger compares nets of one")
    fixed = sorted({net.train_scale[0] for net in nets if net.train_scale[0] == net.train_scale[1]})
    of_seed: dict[int, dict[Member, int]] = {}
    for i, net in enumerate(nets):
        low, high = net.train_scale
        S = JITTER if low != high else (FIXED if low == fixed[0] else LARGE)
        member = Member(net.net, S, net.learn)
        role = of_seed.setdefault(net.seed, {})
        if member in role:
            raise VggfeatError(
                f"{nets[role[member]].weights} and {net.weights} both stand for {net.net} at {S}: keep one of them"
            )
        role[member] = i
    return dict(sorted(of_seed.items()))


def rows_of(numbers: Sequence[int]) -> list[PaperRow]:
    """The rows of these tables, with B-5x5's, of which Sect. 4.1 tells beside Table 3."""
    rows = [row for row in PAPER if row.table in numbers]
    if 3 in numbers:
        rows.append(PaperRow(3, (Member("B-5x5", FIXED),), False, "dense", float("nan"), float("nan")))
    return rows


def measure_tables(
    numbers: Sequence[int],
    runs: Path,
    items: Items,
    split: str,
    ranks: Ranks,
    precision: str,
    how: dict[str, Any],
) -> KeptPosteriors:
    """Posteriors of the nets under a folder, at every Q and mode that a row of these tables wants: one pass a net."""
    nets = trained_nets(runs)
    rows = rows_of(numbers)
    wanted: dict[int, list[PaperRow]] = {}  # of each net, the rows that it is in
    for role in roles(nets).values():
        for row in rows:
            if all(member in role for member in row.members):
                for member in row.members:
                    wanted.setdefault(role[member], []).append(row)
    if not wanted:
        raise VggfeatError(
            f"none of the nets under {runs.absolute()} is in table {', '.join(map(str, numbers))}"
        )
    parts: list[tuple[str, KeptPosteriors]] = []
    for i, its_rows in wanted.items():
        net = nets[i]
        # Table 4's several Q beside Table 3's one: so "several Q help" is decided on the same images
        kinds = {row.multi for row in its_rows} | {False}
        scales = sorted({q for multi in kinds for q in paper_scales(net.train_scale, net.crop, multi)})
        modes = MODES if any(row.mode != "dense" for row in its_rows) else ("dense",)
        network = load(net.weights, device=ranks.device, precision=precision)
        with progress(f"{net.net} {network.metadata['train_scale']}, seed {net.seed}") as show:

            def advance(done: float, total: int, show: Any = show) -> None:
                if ranks.first:
                    show(done, total)

            kept = evaluate([network], scales, modes, items, split, ranks, advance=advance, **how)
        parts.append((net.weights, kept))
    return KeptPosteriors.joined(parts)


def write_tables(numbers: Sequence[int], whole: KeptPosteriors, ledger: Path) -> None:
    """The cells of these tables from kept posteriors: printed beside the paper's, and put into the ledger.

    The cells are kept as JSON beside the ledger: `ledger-ilsvrc.json` for ImageNet's 1,000 classes and the paper's
    recipe, `ledger-RECIPE-DATA.json` for a stand-in. Raises VggfeatError: images without labels, several recipes.
    """
    if (whole.labels < 0).any():
        raise VggfeatError("the images have no labels: a table needs the validation set's")
    check_ledger(ledger)  # all of it can be read, or none of it is changed
    nets = [Trained.of(net.of) for net in whole.nets]
    images, K = len(whole.names), len(np.unique(whole.labels))
    where = f"{whole.data} {whole.split}, {images} images, {K} classes"
    cells = []
    of_seed = roles(nets)
    for row in rows_of(numbers):
        complete = [seed for seed, role in of_seed.items() if all(member in role for member in row.members)]
        cells += [_cell(row, of_seed[seed], nets, whole, where, seed) for seed in complete]
        if not complete:
            there = set().union(*of_seed.values())
            missing = [f"{m.net} {m.S}" for m in row.members if m not in there]
            say(
                f"table {row.table}, {row.name}: not run, no net for {', '.join(missing) or 'all of one seed'}"
            )
    standin = "ilsvrc" if nets[0].recipe == "paper" and K == 1000 else f"{nets[0].recipe}-{whole.data}"
    every = update_cells(ledger.with_name(f"ledger-{standin}.json"), cells)
    # the paper's own data come first, also while all their cells are still "not run"
    write_ledger(ledger, "Tables 3 to 6, ILSVRC-2012", read_cells(ledger.with_name("ledger-ilsvrc.json")))
    if standin != "ilsvrc":
        heading = f"Tables 3 to 6, stand-in: nets of the recipe {nets[0].recipe} on {whole.data}"
        write_ledger(ledger, heading, every)
    for number in numbers:
        for line in table_markdown(number, every).splitlines():
            out.print(line, soft_wrap=True)


def _cell(
    row: PaperRow,
    role: Mapping[Member, int],
    nets: Sequence[Trained],
    whole: KeptPosteriors,
    where: str,
    seed: int,
) -> Cell:
    parts: list[np.ndarray] = []
    scales: list[str] = []
    for member in row.members:
        net = nets[role[member]]
        Q = paper_scales(net.train_scale, net.crop, row.multi)
        parts.append(whole.nets[role[member]].mean(row.mode, Q))
        scales.append(",".join(map(str, Q)))
    posteriors_NK = np.mean(parts, axis=0)
    top1, top5 = whole.errors(posteriors_NK)
    wrong = whole.wrong(posteriors_NK, 1)
    used = [whole.nets[role[member]].of for member in row.members]
    return Cell(
        row.table, row.name, row.mode, " + ".join(of["train_scale"] for of in used),
        " + ".join(dict.fromkeys(scales)), top1, top5, len(wrong), where, [of["fingerprint"] for of in used],
        command(), date.today().isoformat(), pack(wrong), seed,
    )  # fmt: skip
