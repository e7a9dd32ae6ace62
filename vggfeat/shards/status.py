"""How far a set of shards is, by the names of its files: no engine is asked."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from vggfeat.errors import VggfeatError
from vggfeat.place import Place
from vggfeat.shards.engines.failed import ATTEMPTS
from vggfeat.shards.plan import SEAL, Plan, missing_of
from vggfeat.shards.sharded import opened, verify_shards

SAMPLE = 32
"""Shards that are opened to tell the rate."""


@dataclass(frozen=True)
class Status:
    """Of `shards`: so many are done; the others were begun, failed (shard -> why, as it was last
    told), or nobody has begun them. killing: that have ended so many processes that their images
    are looked at one by one. images: that are done; None where the plan is open. rate: images a
    second of one process, over some of the shards; 0 where that is unknown.
    """

    shards: int
    done: int
    begun: int
    killing: int
    failed: dict[int, str]
    left: int
    sealed: bool
    images: int | None
    rate: float


def status_of(place: Place, plan: Plan) -> Status:
    """Raises VggfeatError, StorageError."""
    missing = missing_of(plan, list(place.names("data")))
    gone = set(missing)
    attempts = Counter(_shards(place, "attempts"))
    failed: dict[int, str] = {}
    for name in sorted(place.names("failed"), key=_number):
        if (k := _number(name)[0]) in gone:
            failed[k] = place.read(f"failed/{name}").decode(errors="replace")
    begun = [k for k in missing if attempts[k] and k not in failed]
    done = [k for k in range(plan.shards) if k not in gone]
    rows, seconds = 0, 0.0
    for k in done[:: max(1, len(done) // SAMPLE)]:
        with suppress(VggfeatError), opened(place, plan, k) as table:
            rows, seconds = rows + table.rows, seconds + float(table.facts["seconds"])
    return Status(
        plan.shards,
        len(done),
        len(begun),
        sum(attempts[k] >= ATTEMPTS for k in begun),
        failed,
        len(missing) - len(begun) - len(failed),
        place.size(SEAL) is not None,
        None if plan.rows is None else sum(len(plan.rows_of(k)) for k in done),
        rows / seconds if seconds else 0.0,
    )


def verify_done(place: Place, plan: Plan) -> int:
    """Read the shards that are there whole, each page against its checksum; how many there are.
    Raises VggfeatError for what is damaged, or another plan's.
    """
    missing = set(missing_of(plan, list(place.names("data"))))
    done = [k for k in range(plan.shards) if k not in missing]
    verify_shards(place, plan, done)
    return len(done)


def _shards(place: Place, folder: str) -> list[int]:
    return [_number(name)[0] for name in place.names(folder)]


def _number(name: str) -> tuple[int, int]:
    """Shard and how manieth of "00007.2"; shard -1 of what isn't one of ours."""
    k, _, n = name.partition(".")
    return (int(k), int(n)) if k.isdecimal() and n.isdecimal() else (-1, 0)
