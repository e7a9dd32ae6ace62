"""One shard: its images are described, and its file is put, whole. It knows no engine.

A shard that is described twice, here and on another machine, costs time and nothing else: the file
that is put first stays. N rows, Q scales, D descriptor length.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from vggfeat.datasets import Items
from vggfeat.decode import upright_shape
from vggfeat.errors import UnreachableImage, UnreadableImage, VggfeatError
from vggfeat.extract import Reader, described
from vggfeat.parquet import to_bytes
from vggfeat.place import Place
from vggfeat.regions import views_of
from vggfeat.shards.fetch import NO_SUCH_FILE, fetched
from vggfeat.shards.inside import Inside, count_inside, read_inside
from vggfeat.shards.plan import Plan, columns_of, encoded, items_of, parts_of, shard_name
from vggfeat.store import DONE, UNREADABLE
from vggfeat.versions import versions
from vggfeat.weights import Network
from vggfeat.writer import STAMPS, VERSIONS, cut_reason, stamp, stored

WITNESSES = 8
"""Of other shards, one image each, which are asked for where none of a shard is there."""


@dataclass(frozen=True)
class Facts:
    """What was done for a shard. put: whether this process's file is the one that stays.
    unreadable: how many of its rows.
    """

    shard: int
    rows: int
    unreadable: int
    seconds: float
    put: bool


def already(place: Place, k: int) -> Facts | None:
    """Of shard k, where its file is there: another process has described it."""
    return None if place.size(shard_name(k)) is None else Facts(k, 0, 0, 0.0, put=False)


def refuse_other_worker(plan: Plan, network: Network) -> None:
    """Raise VggfeatError where this process would describe otherwise than the plan has it."""
    here = versions()
    for package in VERSIONS:
        if here.get(package) != plan.versions.get(package):
            raise VggfeatError(
                f"the plan was made with {package} {plan.versions.get(package)}, and this machine"
                f" ({platform.node()}) has {here.get(package)}: install the same everywhere"
            )
    told = {
        "weights": (plan.description.fingerprint, network.fingerprint),
        "precision": (plan.description.precision, network.precision),
    }
    for what, (wanted, there) in told.items():
        if wanted != there:
            raise VggfeatError(
                f"the plan is of {what} {wanted[:12]}, and this machine ({platform.node()}) has"
                f" {there[:12]}"
            )


def content_of(place: Place, plan: Plan, k: int, rows: range | None = None) -> Inside:
    """The images of shard k, or of some of its rows; where a store or a file has them, in memory.

    Raises VggfeatError, AbsentError, StorageError.
    """
    if plan.rows is None:
        parts = parts_of(place, plan)
        return read_inside(plan.dataset, parts.names[k], parts.address(k), rows)
    its = items_of(place, plan, k)
    items, reasons = fetched(its if rows is None else its.take(np.array(rows, np.int64)))
    return Inside(items, [], (), reasons)


def rows_of(place: Place, plan: Plan, k: int) -> int:
    """How many images shard k has."""
    if plan.rows is not None:
        return len(plan.rows_of(k))
    parts = parts_of(place, plan)
    return count_inside(plan.dataset, parts.names[k], parts.address(k))


@dataclass(frozen=True)
class Described:
    """N rows: values_NQD, NaN where unreadable, D of all layers together; reasons: row -> why it
    is; stamps: of each row's image, zeros where it is unreadable. absent: rows whose images can't
    even be opened.
    """

    values_NQD: np.ndarray
    reasons: dict[int, str]
    stamps: list[tuple[int, ...]]
    absent: set[int]


def describe_rows(
    items: Items,
    plan: Plan,
    network: Network,
    *,
    workers: int = 2,
    batch_size: int | None = None,
    known_bad: dict[int, str] | None = None,
    advance: Callable[[float], None] = lambda images: None,
) -> Described:
    """Describe items as a plan has it. known_bad: row -> why it isn't read at all: it has ended the
    processes that did.

    Raises VggfeatError: a disk, share or store that doesn't give the images. No image's own fault
    raises.
    """
    description = plan.description
    views = views_of(items, description.regions)
    D = sum(plan.dims.values())
    values_NQD = np.full((len(items), description.columns, D), np.nan, plan.store)
    reasons = dict(known_bad or {})
    of_image: dict[int, tuple[int, ...]] = {}
    absent = set[int]()
    reader = Reader(views)

    def read(v: int) -> np.ndarray:
        image = int(views.file_V[v])
        if image not in of_image:
            with suppress(OSError, ValueError):  # what is wrong with it is told by who decodes it
                of_image[image] = stamp(views.items.source(v))
        return reader(v)

    skipped = {v for row in reasons for v in views.view_NR[row].tolist()}
    for row, column, result in described(
        views,
        network,
        description,
        [v for v in range(len(views)) if v not in skipped],
        read,
        workers=workers,
        batch_size=batch_size,
        advance=advance,
    ):
        if isinstance(result, UnreadableImage):
            reasons[row] = str(result)
            if isinstance(result, UnreachableImage):
                absent.add(row)
        elif row not in reasons:
            name, again = items.names[row], ", and another `out`"
            values_NQD[row, column] = stored(result, values_NQD.dtype, name, again)
    values_NQD[list(reasons)] = np.nan
    nothing = (0,) * len(STAMPS)
    image_N = items.by_file()[1].tolist()
    stamps = [
        nothing if i in reasons else of_image.get(image, nothing) for i, image in enumerate(image_N)
    ]
    return Described(values_NQD, reasons, stamps, absent)


def describe_shard(
    place: Place,
    plan: Plan,
    network: Network,
    k: int,
    *,
    workers: int = 2,
    batch_size: int | None = None,
    known_bad: dict[int, str] | None = None,
    advance: Callable[[float], None] = lambda images: None,
) -> Facts:
    """Describe shard k, unless its file is there, and put it; see `describe_rows`.

    Raises VggfeatError, too: weights, precision or versions other than the plan's; what can't be
    written.
    """
    began, name = time.perf_counter(), shard_name(k)
    if (there := already(place, k)) is not None:
        return there
    refuse_other_worker(plan, network)
    inside = content_of(place, plan, k)
    made = describe_rows(
        inside.items,
        plan,
        network,
        workers=workers,
        batch_size=batch_size,
        known_bad=inside.reasons | (known_bad or {}),
        advance=advance,
    )
    n = len(inside.items)
    absent = made.absent | {i for i, why in inside.reasons.items() if why == NO_SUCH_FILE}
    if len(absent) == n and plan.rows is not None:
        _refuse_absent(place, plan, k, made.reasons[0])
    status_N = np.full(n, DONE, np.uint8)
    status_N[list(made.reasons)] = UNREADABLE
    columns: dict[str, Any] = {
        "status": status_N,
        "error": [cut_reason(made.reasons.get(i, "")) for i in range(n)],
    }
    if plan.rows is None:
        columns["name"] = [encoded(each) for each in inside.items.names]
        columns["label"] = inside.labels
    for number, key in enumerate(STAMPS):
        kind = np.uint32 if key == "crc32" else np.int64
        columns[key] = np.array([each[number] for each in made.stamps], kind)
    start = 0
    for layer, dim in plan.dims.items():
        for number, key in enumerate(columns_of(plan.description, layer)):
            columns[key] = made.values_NQD[:, number, start : start + dim]
        start += dim
    seconds = time.perf_counter() - began
    told = {"labels": sorted(set(inside.labels) - {""}), "classes": list(inside.classes)}
    facts = {
        **(told if plan.rows is None else {}),
        "plan": plan.identity,
        "shard": k,
        "unreadable": len(made.reasons),
        "host": platform.node(),
        "device": str(network.device),
        "seconds": round(seconds, 3),
        "versions": versions(),
    }
    put = place.put_new(name, to_bytes(columns, facts))
    return Facts(k, n, len(made.reasons), seconds, put)


def _refuse_absent(place: Place, plan: Plan, k: int, why: str) -> None:
    """Raise VggfeatError where no image of shard k is there, and none of the others' first images,
    either: this machine lacks the disk or share that they are on, and no row is to be marked for
    it.
    """
    spread = np.unique(np.linspace(0, plan.shards - 1, WITNESSES).round().astype(int))
    others = [j for j in spread.tolist() if j != k]
    for j in others:
        items, reasons = fetched(items_of(place, plan, j).take(np.array([0])))
        try:
            if not reasons:
                upright_shape(items.source(0))
                return
        except UnreachableImage:
            continue
        except UnreadableImage:
            return  # it is within reach
    more = f", nor the first of {len(others):,} other shards" if others else ""
    raise VggfeatError(
        f"no image of shard {k} can be opened on {platform.node()}{more} ({why}): bring back the"
        " disk, share or bucket that they are in"
    )
