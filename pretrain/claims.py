"""The paper's claims as data, and how they are decided: on pairs of rows of cells, over the same
images and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np
from scipy.special import stdtr, stdtrit

from pretrain.recipe import LENGTHS
from pretrain.tables import AS_LONG, FIXED, JITTER, LARGE, Cell, Key, by_row, marks, span

Pair = tuple[Key, Key]
"""(better, worse), as the paper has it."""


@dataclass(frozen=True)
class Claim:
    """One of the paper's orderings. questions: of each the pairs of rows that answer it, the best
    first. A later one, whose nets learned unequally, is for where the first one's weren't trained.

    same_nets: the two differ in how the same nets are used; else in how they were trained, and must
    have had as much.
    """

    text: str
    questions: tuple[tuple[Pair, ...], ...]
    same_nets: bool = False


def _dense(table: int, net: str, S: str) -> Key:
    return table, f"{net} {S}", "dense"


def _control(net: str, mode: str = "dense") -> Key:
    return 3, f"{net} {FIXED} (control)", mode


CLAIMS = [
    Claim(
        "LRN does not help (A against A-LRN)",
        (((_dense(3, "A", FIXED), _dense(3, "A-LRN", FIXED)),),),
    ),
    Claim(
        "depth helps: A, B, C, D",
        (
            # B is built on a trained A, and has seen its images, too
            (
                (_dense(3, "B", FIXED), _control("A")),
                (_dense(3, "B", FIXED), _dense(3, "A", FIXED)),
            ),
            ((_dense(3, "C", FIXED), _dense(3, "B", FIXED)),),
            ((_dense(3, "D", FIXED), _dense(3, "C", FIXED)),),
        ),
    ),
    Claim(
        "B with 5x5 layers is worse than B",
        (
            (
                (_control("B", "centre"), (3, f"B-5x5 {FIXED}", "centre")),
                # a recipe without controls, as the paper's
                ((3, f"B {FIXED}", "centre"), (3, f"B-5x5 {FIXED}", "centre")),
                (_dense(3, "B", FIXED), _dense(3, "B-5x5", FIXED)),
            ),
        ),
    ),
    Claim(
        "scale jitter in training helps",
        tuple(
            (
                (_dense(3, net, JITTER), _control(net)),
                (_dense(3, net, JITTER), _dense(3, net, FIXED)),
            )
            for net in ("C", "D", "E")
        ),
    ),
    Claim(
        # a dense map has zeros around it where a crop has, and between them none: nets that learned
        # on small crops are worse there, and the more so the larger Q is
        "scale jitter in training helps, by crops",
        tuple(
            (((5, f"{net} {JITTER}", "crops"), (5, f"{net} {FIXED} (control)", "crops")),)
            for net in ("D", "E")
        ),
    ),
    Claim(
        "several Q help",
        tuple(
            ((_dense(4, net, S), _dense(3, net, S)),)
            for net in ("B", "C", "D", "E")
            for S in (FIXED, LARGE, JITTER)
        ),
        same_nets=True,
    ),
    Claim(
        "crops and dense together beat either",
        tuple(
            (((5, f"{net} {JITTER}", "both"), (5, f"{net} {JITTER}", mode)),)
            for net in ("D", "E")
            for mode in ("dense", "crops")
        ),
        same_nets=True,
    ),
    Claim(
        "fusion of D and E beats one net",
        tuple(
            (((6, f"D {JITTER} + E {JITTER}", mode), (5, f"{net} {JITTER}", mode)),)
            for mode in ("dense", "crops", "both")
            for net in ("D", "E")
        ),
        same_nets=True,
    ),
]


def box_claims(cells: Sequence[Cell]) -> list[Claim]:
    """Those of Tables 8 and 9, of whatever nets and S there are."""
    found = {cell.key for cell in cells}
    heads = sorted({row.partition(", ")[0] for table, row, _ in found if table == 8})
    rows = sorted(row for table, row, _ in found if table == 9)
    nets = {row: row.rpartition(" at ") for row in rows if " + " not in row}

    def same(kind: str) -> tuple[tuple[Pair, ...], ...]:
        better, worse = kind.split(" < ")
        return tuple(
            (((8, f"{head}, {better}", "centre"), (8, f"{head}, {worse}", "centre")),)
            for head in heads
        )

    def used(pairs: list[tuple[str, str]]) -> tuple[tuple[Pair, ...], ...]:
        return tuple((((9, a, "dense"), (9, b, "dense")),) for a, b in pairs)

    several = [
        (a, b)
        for a, (net, _, more) in nets.items()
        for b, (other, _, one) in nets.items()
        if net == other and "," in more and "," not in one
    ]
    fused = [(row, one) for row in rows if " + " in row for one in nets if one in row.split(" + ")]
    claims = [
        Claim("boxes: per class (PCR) beats shared (SCR)", same("PCR, FC1-2 < SCR, FC1-2")),
        Claim("boxes: all layers beat FC1-2", same("PCR, all layers < PCR, FC1-2")),
        Claim("boxes: several Q help", used(several), same_nets=True),
        Claim("boxes: fusion beats one net", used(fused), same_nets=True),
    ]
    return [claim for claim in claims if claim.questions]


# --- statistics -----------------------------------------------------------------------------------

LEVEL = 0.05  # an interval leaves out what is there in one case of twenty


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
        if a.classifier != b.classifier:
            found.append("classes told by other nets")
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
        found.append(f"{span(known[0])} epochs against {span(known[1])}")
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


# --- verdicts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """A pair of rows: marks, better and worse cells; odd: see `unlike`."""

    claim: Claim
    marks: tuple[str, str]
    better: list[Cell]
    worse: list[Cell]
    by: Difference
    odd: str


def _answers(cells: Sequence[Cell]) -> Iterator[_Answer]:
    mark = marks(cells)
    for claim in [*CLAIMS, *box_claims(cells)]:
        for question in claim.questions:
            found: list[_Answer] = []
            for better, worse in question:
                found += [
                    _Answer(claim, (mark[kinds[0]], mark[kinds[1]]), a, b, difference(a, b), odd)
                    for kinds, a, b in _pairs(better, worse, cells)
                    # beside a control, nets that learned unequally say nothing
                    if not (odd := unlike(a, b, claim.same_nets)) or not found
                ]
            yield from found


def claims_markdown(cells: Sequence[Cell]) -> str:
    """Each of the paper's claims, decided by the pairs of rows of a section, over the seeds that
    both have.
    """
    found = list(_answers(cells))
    if not found:
        return ""
    decided = [i for i, answer in enumerate(found) if not answer.odd]
    safe = dict(zip(decided, holm([found[i].by.p for i in decided]), strict=True))
    five = " (of Table 9 top-5)" if any(c.judged == "top5" for c in cells) else ""
    lines = [
        "**The paper's claims**, each on the same images and seeds",
        "",
        (
            f"| claim | the pair | top-1 error, %{five} | difference +- half of its 95 % interval |"
            " verdict | seeds |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for i, answer in enumerate(found):
        a, b, by = answer.better, answer.worse, answer.by
        pair = " against ".join(
            c.row + mark + _told(c, a[0].table == b[0].table)
            for mark, c in zip(answer.marks, (a[0], b[0]), strict=True)
        )
        means = ", ".join(f"{np.mean([c.error for c in part]):.1f}" for part in (a, b))
        if answer.odd:
            verdict = f"confounded: {answer.odd}"
        elif by.p >= LEVEL:
            verdict = "not decided"
        else:
            verdict = ("holds" if by.points > 0 else "does not hold") + (
                "" if safe[i] else ", taken alone"
            )
        lines.append(
            f"| {answer.claim.text} | {pair} | {means} | {by.points:+.2f} +- {by.half:.2f} |"
            f" {verdict} | {len(a)} |"
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


def _told(cell: Cell, one_table: bool) -> str:
    """What beside net and S tells a row apart from that which it is compared with."""
    if cell.table in (8, 9):
        return ""
    if cell.table == 3 and one_table:
        return "" if cell.mode == "dense" else ", central crop"
    return f", {cell.mode}, {cell.Q.count(',') + 1} Q"


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
