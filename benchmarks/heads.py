"""What each head makes of the same descriptors, and what class weights do where classes are
unequal.

    python -m benchmarks.heads --features c256.h5

Two tables by the data set's own protocol (its splits, C chosen in training): all heads on all
images; and with the training images of every second class cut down to `--few`, with equal classes
and with `class_weight` balanced. Mean class recall, and in the second table that of either half of
the classes: mean and standard deviation over the splits, and of the weights' gain the 95 % interval
over them (Student's t).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.intervals import half_interval
from vggfeat import protocols
from vggfeat.classify import problem_from
from vggfeat.problem import Problem
from vggfeat.protocols import HEADS, Outcome
from vggfeat.terminal import columns, err, out


def thinned(problem: Problem, few: int, seed: int = 0) -> Problem:
    """Every second class with `few` training images a split, drawn at random."""
    rng = np.random.default_rng(seed)
    splits = dict(problem.splits)
    for name in [name for name in splits if name.endswith("train")]:
        rows = splits[name]
        kept = [
            rng.permutation(of_class)[: few if k % 2 else None]
            for k in range(len(problem.classes))
            for of_class in [rows[problem.labels[rows] == k]]
        ]
        splits[name] = np.sort(np.concatenate(kept))
    return replace(problem, splits=splits)


def recalls(outcome: Outcome, problem: Problem) -> np.ndarray:
    """(splits, K) recall, in %; NaN where a split tests no image of a class."""
    K = len(problem.classes)
    found = np.full((len(outcome.scored), K), np.nan)
    for s, scored in enumerate(outcome.scored.values()):
        labels, scores = problem.labels[scored.rows], scored.scores
        right = scores.argmax(1) == labels
        for k in np.unique(labels[labels >= 0]):
            found[s, k] = 100 * right[labels == k].mean()
    return found


def told(values: np.ndarray) -> str:
    """Of a figure a split: mean, and standard deviation."""
    deviation = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{deviation}"


def between(differences: np.ndarray) -> str:
    """Mean, and the ends of its 95 % interval where there are several."""
    mean = differences.mean()
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = half_interval(differences)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=Path, action="append", required=True)
    parser.add_argument("--pool", help="Default: the data set's own.")
    parser.add_argument("--few", type=int, default=3)
    options = parser.parse_args()
    problem, _, _ = problem_from(options.features, options.pool)

    table = columns("head", "chosen C", "mean class recall, %", "accuracy, %", "seconds")
    for head in HEADS:
        outcome = protocols.run(problem, head=head, progress=err.print)
        figures = outcome.results.figures
        choices = [split.choice.C for split in outcome.results.per_split]
        assert figures.accuracy is not None and figures.accuracy_std is not None
        table.add_row(
            head,
            ", ".join("-" if C is None else f"{C:g}" for C in choices),
            told(np.nanmean(recalls(outcome, problem), axis=1)),
            f"{100 * figures.accuracy:.2f} ± {100 * figures.accuracy_std:.2f}",
            f"{outcome.results.seconds:.1f}",
        )
    out.print(table)

    unequal = thinned(problem, options.few)
    odd = np.arange(len(problem.classes)) % 2 == 1
    table = columns("head", "classes' weights", "all", f"of {options.few} images", "the others")
    for head in HEADS:
        found = [
            recalls(protocols.run(unequal, head=head, class_weight=weight), unequal)
            for weight in (None, "balanced")
        ]
        halves = [
            [np.nanmean(each[:, which], axis=1) for which in (odd | True, odd, ~odd)]
            for each in found
        ]
        table.add_row(head, "equal", *map(told, halves[0]))
        table.add_row("", "balanced", *map(told, halves[1]))
        gains = [new - old for old, new in zip(*halves, strict=True)]
        table.add_row("", "balanced less equal", *map(between, gains))
    out.print(table)


if __name__ == "__main__":
    main()
