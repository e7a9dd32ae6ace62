"""A task of a slurm job array: each takes its own part of the shards, and then helps the others.

Two that describe one shard lose time and nothing else, so nobody is asked who does what.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence

from vggfeat.errors import WrongUsage


def place_in_array() -> tuple[int, int]:
    """This task's number from 0 on, and how many there are. Raises WrongUsage outside of an
    array.
    """
    told = [os.environ.get(f"SLURM_ARRAY_TASK_{key}", "") for key in ("ID", "MIN", "STEP", "COUNT")]
    if not all(text.isdecimal() for text in told):
        raise WrongUsage(
            "`engine` slurm is for a task of a job array: `sbatch --array=0-63 --requeue --wrap"
            " 'vggfeat extract ... --engine slurm'`"
        )
    number, first, step, count = map(int, told)
    return (number - first) // max(1, step), max(1, count)


def in_turn(
    todo: Sequence[int], number: int, count: int, there: Callable[[int], bool]
) -> Iterator[int]:
    """Those whose number leaves this one's as a rest, so that a task that begins again has its own;
    then, in an order of this task's, what isn't there yet: two that help meet rarely.
    """
    yield from (k for k in todo if k % count == number)
    others = [k for k in todo if k % count != number]
    random.Random(number).shuffle(others)
    for k in others:
        if not there(k):
            yield k
