"""A set of shards as one feature file: its seal, its rows, and the file that it merges to.

N rows, Q scales, D descriptor length.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import numpy as np

from vggfeat.checked import Range, fitted, parse_json, shown
from vggfeat.datasets import Items
from vggfeat.datasets.containers import in_order
from vggfeat.datasets.protocol import PROTOCOLS
from vggfeat.datasets.splits import part_named
from vggfeat.errors import VggfeatError
from vggfeat.parquet import ROW_GROUP, Table
from vggfeat.place import AbsentError, Place, place_of
from vggfeat.shards.plan import (
    SEAL,
    THREADS,
    Plan,
    columns_of,
    items_of,
    missing_of,
    names_of,
    parts_of,
    read_plan,
    read_splits,
    shard_name,
    widths_of,
)
from vggfeat.store import DONE, UNREADABLE, Features, chosen_layer
from vggfeat.writer import STAMPS, FeatureWriter

Count = Annotated[int, Range(0, 2**53)]
Answer = TypeVar("Answer")
READ_AT_ONCE = 4
"""Shards whose descriptors are read at once: each takes some 50 MB."""


@dataclass(frozen=True)
class Sealed:
    """A shard in the seal: its rows, how many can't be read, bytes of its file."""

    rows: Count
    unreadable: Count
    bytes: Count


@dataclass(frozen=True)
class Seal:
    """All shards of a plan, in their order; seconds: that they took, added up. classes: that the
    labels in an open plan's files name.
    """

    plan: str
    seconds: Annotated[float, Range(0, float("inf"))]
    shards: list[Sealed]
    classes: list[str]

    @property
    def rows(self) -> int:
        return sum(each.rows for each in self.shards)

    @property
    def starts(self) -> np.ndarray:
        """(K + 1,) int64: the first row of each of K shards, and behind the last."""
        return np.cumsum([0, *(each.rows for each in self.shards)], dtype=np.int64)


def seal(place: Place, plan: Plan) -> Seal:
    """Look at every shard that exists, and put the seal. Raises VggfeatError where one is missing,
    of another plan, cut off or surplus: whatever an engine has told.
    """
    there = place.names("data")
    missing = []
    for k in missing_of(plan, list(there)):  # a store may list late what it has
        size = place.size(shard_name(k))
        if size is None:
            missing.append(k)
        else:
            there[shard_name(k).rpartition("/")[2]] = size
    if missing:
        raise VggfeatError(half_written(place, plan, missing))
    wanted = {shard_name(k).rpartition("/")[2] for k in range(plan.shards)}
    if surplus := sorted({name for name in there if name.endswith(".parquet")} - wanted):
        raise VggfeatError(
            f"{place.name} has {len(surplus):,} shards that its plan doesn't know, such as"
            f" {surplus[0]}: move them away"
        )
    seconds = 0.0
    shards = []
    order: tuple[str, ...] = ()
    found = set[str]()
    every = in_threads(lambda k: _facts(place, plan, k), range(plan.shards))
    for k, facts in enumerate(every):
        seconds += facts["seconds"]
        size = there[shard_name(k).rpartition("/")[2]]
        shards.append(Sealed(facts["rows"], facts["unreadable"], size))
        found |= set(facts.get("labels", ()))
        its = tuple(facts.get("classes", ()))
        if order and its not in ((), order):
            raise VggfeatError(
                f"{parts_of(place, plan).address(k)} tells other classes than the files before it:"
                " describe them into sets of their own"
            )
        order = order or its
    if order and (odd := sorted(found - set(order))):
        raise VggfeatError(
            f"{place.name}: some files name the class {shown(odd[0])}, which isn't among those that"
            " others tell: describe them into sets of their own"
        )
    made = Seal(plan.identity, seconds, shards, list(order) or in_order(found))
    if not made.rows:
        raise VggfeatError(f"there is no image in the {plan.shards:,} files of {place.name}")
    if sum(each.unreadable for each in shards) == made.rows:
        first = next(k for k, each in enumerate(shards) if each.rows)
        name, why = next(iter(unreadable_of(place, plan, made, first).items()))
        raise VggfeatError(
            f"none of the {made.rows:,} images can be read, the first is {name}: {why}"
        )
    place.put_new(SEAL, (json.dumps(asdict(made)) + "\n").encode())
    return read_seal(place, plan)


def in_threads(
    function: Callable[[int], Answer], shards: Iterable[int], threads: int = THREADS
) -> Iterator[Answer]:
    """What a function gives for each, in their order: a store is waited for, most of the time."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, shards)


def unreadable_of(place: Place, plan: Plan, sealed: Seal, k: int) -> dict[str, str]:
    """Name -> reason, of shard k's images that can't be read."""
    names = listed(place, plan, sealed, k).names
    with opened(place, plan, k, sealed.shards[k].rows) as table:
        reasons, status = table.texts("error"), table.array("status")
    return {names[i]: reasons[i] for i in np.flatnonzero(status == UNREADABLE).tolist()}


def half_written(place: Place, plan: Plan, missing: Sequence[int]) -> str:
    return (
        f"{place.name} is half-written: {len(missing):,} of {plan.shards:,} shards are missing, the"
        f" first is {missing[0]}; the command that made them goes on"
    )


def _facts(place: Place, plan: Plan, k: int) -> dict[str, Any]:
    """What shard k tells of itself. Raises VggfeatError: another plan's, or not whole."""
    with opened(place, plan, k) as table:
        told = ("unreadable", "seconds", "labels", "classes")
        return {"rows": table.rows, **{key: table.facts[key] for key in told if key in table.facts}}


@contextmanager
def opened(place: Place, plan: Plan, k: int, rows: int | None = None) -> Iterator[Table]:
    """Shard k's file. rows: that it has; None: as the plan says, or any of an open one. Raises
    VggfeatError where it isn't this plan's, or not whole.
    """
    if rows is None and plan.rows is not None:
        rows = len(plan.rows_of(k))
    where = f"{place.name}/{shard_name(k)}"
    with place.open(shard_name(k)) as file:
        table = Table(file, where)
        facts = table.facts if isinstance(table.facts, dict) else {}
        if facts.get("plan") != plan.identity:
            raise VggfeatError(f"{where} is of another plan: move it away, and describe it again")
        widths = widths_of(plan)
        if not all(table.has_lists(name, plan.store, dim) for name, dim in widths.items()):
            dims = " and ".join(f"{dim:,}" for dim in plan.dims.values())
            raise VggfeatError(
                f"{where} is damaged: its columns aren't {', '.join(widths)} of {dims}"
                f" {plan.store}; move it away, and describe it again"
            )
        if facts.get("shard") != k or rows not in (None, table.rows):
            raise VggfeatError(
                f"{where} has {table.rows:,} rows of shard {facts.get('shard')}, not"
                f" {rows or 0:,} of {k}: move it away, and describe it again"
            )
        yield table


def verify_shards(place: Place, plan: Plan, shards: Iterable[int], but: Sequence[str] = ()) -> None:
    """Read shards whole, but for some columns, each page against its checksum. Raises VggfeatError
    for what is damaged, or another plan's.
    """

    def verify(k: int) -> None:
        with opened(place, plan, k) as table:
            table.verify(but)

    for _ in in_threads(verify, shards, READ_AT_ONCE):
        pass


def read_seal(place: Place, plan: Plan) -> Seal:
    """Raises VggfeatError where the set isn't sealed, or its seal is another plan's."""
    where = f"{place.name}/{SEAL}"
    try:
        record = parse_json(place.read(SEAL), where)
    except AbsentError:
        missing = missing_of(plan, list(place.names("data")))
        if missing:
            raise VggfeatError(half_written(place, plan, missing)) from None
        raise VggfeatError(
            f"{place.name} has all its shards and no seal: the command that made them goes on"
        ) from None
    made: Seal = fitted(record, Seal, where)
    if (
        made.plan != plan.identity
        or len(made.shards) != plan.shards
        or (plan.rows is not None and made.starts[:-1].tolist() != _starts(plan))
        or plan.rows not in (None, made.rows)
    ):
        raise VggfeatError(f"{where} is of another plan: move it away, and seal the set again")
    return made


def _starts(plan: Plan) -> list[int]:
    return [plan.rows_of(k).start for k in range(plan.shards)]


def listed(place: Place, plan: Plan, sealed: Seal, k: int) -> Items:
    """The items of shard k of a sealed set, without splits. Raises VggfeatError."""
    if plan.rows is not None:
        return items_of(place, plan, k)
    label_n = None
    with opened(place, plan, k, sealed.shards[k].rows) as table:
        names = names_of(table)
        if sealed.classes:
            number = {name: i for i, name in enumerate(sealed.classes)}
            label_n = np.array([number.get(text, -1) for text in table.texts("label")], np.int32)
    protocol = "single-label" if sealed.classes else plan.protocol
    return Items(plan.dataset, protocol, Path(plan.root), names, label_n, sealed.classes)


def splits_of(
    place: Place, plan: Plan, sealed: Seal, label_N: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The splits of a sealed set; of an open plan by its files' names, where each is train, val or
    test by that, and else at random. Raises VggfeatError.
    """
    if plan.rows is not None:
        return read_splits(place, plan)
    if label_N is None:
        return {}
    parts = [part_named(name) for name in parts_of(place, plan).names]
    told = {found[0] for found in parts if found}
    if not all(parts) or "train" not in told or "eval" in told or len(told) < 2:
        return PROTOCOLS["single-label"].splits(label_N)
    starts = sealed.starts
    rows_of: dict[str, list[np.ndarray]] = {}
    for k, found in enumerate(parts):
        assert found is not None
        rows_of.setdefault(found[0], []).append(np.arange(starts[k], starts[k + 1]))
    order = [name for name in ("train", "val", "test") if name in rows_of]
    rows_of_part = {name: np.concatenate(rows_of[name]) for name in order}
    return {name: rows[label_N[rows] >= 0] for name, rows in rows_of_part.items()}


# --- one logical set ------------------------------------------------------------------------------


class Names(Sequence[str]):
    """The names of all rows, read shard by shard when they are asked for."""

    KEPT = 64  # shards

    def __init__(self, place: Place, plan: Plan, sealed: Seal) -> None:
        self._starts = sealed.starts
        self._of = lru_cache(self.KEPT)(lambda k: listed(place, plan, sealed, k).names)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(len(self))[row]]
        i = range(len(self))[row]
        k = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._of(k)[i - int(self._starts[k])]

    def __iter__(self) -> Iterator[str]:
        for k in range(len(self._starts) - 1):
            yield from self._of(k)


@dataclass(frozen=True, repr=False)
class ShardedFeatures(Features):
    """`Features` of a sealed set; see there."""

    place: Place = field(kw_only=True)
    plan: Plan = field(kw_only=True)
    sealed: Seal = field(kw_only=True)

    def of_layer(self, layer: str) -> ShardedFeatures:
        """The same of another layer."""
        shape = (*self.shape[:2], self.plan.dims[layer])
        return replace(self, description=self.description.of_layer(layer), shape=shape)

    def verify(self) -> None:
        """As of a file: every byte of every shard."""
        descriptors = columns_of(self.plan.description, self.description.layer)
        verify_shards(self.place, self.plan, range(self.plan.shards), descriptors)
        super().verify()  # which reads the descriptors: what is done is finite

    def _read(self, rows: np.ndarray, columns: list[int], made: np.ndarray | None) -> None:
        names = columns_of(self.plan.description, self.description.layer)
        wanted = [names[column] for column in columns]
        starts = self.sealed.starts
        runs = list(_runs(np.searchsorted(starts, rows, "right") - 1))

        def read(i: int) -> None:
            start, stop, k = runs[i]
            local = rows[start:stop] - starts[k]
            with opened(self.place, self.plan, k, self.sealed.shards[k].rows) as table:
                for low, high, number in _runs(local // ROW_GROUP):
                    block = table.block(number, dict.fromkeys(wanted, self.shape[2]))
                    inside = local[low:high] - number * ROW_GROUP
                    values_nQD = np.stack([block[name][inside] for name in wanted], 1)
                    done = self.status[rows[start + low : start + high]] == DONE
                    if not np.isfinite(values_nQD[done]).all():
                        raise VggfeatError(f"{table.where} is damaged: a descriptor is not finite")
                    if made is not None:
                        made[start + low : start + high] = values_nQD

        for _ in in_threads(read, range(len(runs)), READ_AT_ONCE):
            pass


def _runs(parts: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Of rising numbers: (from, to, which number)."""
    for part in np.unique(parts).tolist():
        start, stop = np.searchsorted(parts, (part, part + 1)).tolist()
        yield start, stop, part


def open_set(where: str | os.PathLike[str], layer: str | None = None) -> ShardedFeatures:
    """The features of a sealed set, of one of its layers. Raises VggfeatError where it isn't
    sealed, or damaged; for a layer that it doesn't have, or none of several.
    """
    place = place_of(where)
    plan = read_plan(place)
    sealed = read_seal(place, plan)
    chosen = chosen_layer(place.name, plan.description.layers, layer)
    starts = sealed.starts.tolist()
    labels: list[np.ndarray] = []
    boxes: list[np.ndarray] = []
    files: list[str] = []
    status_N, crc32_N = np.full(sealed.rows, DONE, np.uint8), np.zeros(sealed.rows, np.uint32)
    errors: dict[int, str] = {}
    every = in_threads(lambda k: _rows_of(place, plan, sealed, k), range(plan.shards))
    for k, (items, status_n, crc32_n, reasons) in enumerate(every):
        part = slice(starts[k], starts[k + 1])
        status_N[part], crc32_N[part] = status_n, crc32_n
        errors |= {starts[k] + i: why for i, why in reasons.items()}
        labels += [items.labels] if items.labels is not None else []
        boxes += [items.boxes] if items.boxes is not None else []
        files += items.files or []
    label_N = np.concatenate(labels) if labels else None
    return ShardedFeatures(
        path=place.name,
        names=Names(place, plan, sealed),
        labels=label_N,
        classes=items.classes,
        splits=splits_of(place, plan, sealed, label_N),
        status=status_N,
        errors=errors,
        description=plan.description.of_layer(chosen),
        attributes={**facts_of(plan, items.protocol), "seconds": sealed.seconds},
        shape=(sealed.rows, plan.description.columns, plan.dims[chosen]),
        dtype=np.dtype(plan.store),
        layers=plan.description.layers,
        boxes=np.concatenate(boxes) if boxes else None,
        files=files or None,
        crc32=crc32_N,
        place=place,
        plan=plan,
        sealed=sealed,
    )


def open_set_layers(where: str | os.PathLike[str]) -> list[ShardedFeatures]:
    """A sealed set once for each of its layers. Raises VggfeatError."""
    first, *others = read_plan(place_of(where)).description.layers
    opened = open_set(where, first)
    return [opened, *(opened.of_layer(layer) for layer in others)]


def _rows_of(
    place: Place, plan: Plan, sealed: Seal, k: int
) -> tuple[Items, np.ndarray, np.ndarray, dict[int, str]]:
    """Of shard k: its items, without their names; status, crc32, and row in it -> reason."""
    items = listed(place, plan, sealed, k)
    reasons: dict[int, str] = {}
    with opened(place, plan, k, sealed.shards[k].rows) as table:
        crc32_n, status_n = table.array("crc32"), table.array("status")
        if sealed.shards[k].unreadable:
            told = table.texts("error")
            reasons = {i: told[i] for i in np.flatnonzero(status_n == UNREADABLE).tolist()}
    return replace(items, names=[], splits={}), status_n, crc32_n, reasons


def facts_of(plan: Plan, protocol: str) -> dict[str, Any]:
    """A feature file's facts, of a plan."""
    return {
        "dataset": plan.dataset,
        "protocol": protocol,
        "root": plan.root,
        "command": plan.command,
        "layers": list(plan.description.layers),
        "description": plan.description.of_layer(plan.description.layer).to_dict(),
        **({} if plan.total is None else {"total": plan.total}),
        "weights_metadata": plan.weights_metadata,
        "versions": plan.versions,
    }


def merge(
    where: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    advance: Callable[[float, int], None] = lambda done, total: None,
) -> tuple[int, dict[str, str]]:
    """A sealed set as one feature file, bit for bit; how many rows it has, and name -> reason of
    those that are unreadable. Raises VggfeatError.
    """
    place = place_of(where)
    plan = read_plan(place)
    sealed = read_seal(place, plan)
    items = whole(place, plan, sealed)
    facts = facts_of(plan, items.protocol)
    description, widths = plan.description, widths_of(plan)
    # of each region and scale, the columns of all layers
    names = list(zip(*(columns_of(description, layer) for layer in plan.dims), strict=True))
    dims = tuple(plan.dims.values())
    _, image_N = items.by_file()
    with FeatureWriter.open(
        out, items, description, dims, plan.store, facts, overwrite=overwrite, images_here=False
    ) as writer:
        row = 0
        for k, each in enumerate(sealed.shards):
            with opened(place, plan, k, each.rows) as table:
                status, reasons = table.array("status").tolist(), table.texts("error")
                stamps = zip(*(table.array(key).tolist() for key in STAMPS), strict=True)
                told = iter(list(zip(status, reasons, stamps, strict=True)))
                for block in table.blocks(widths):
                    together = [np.hstack([block[name] for name in of]) for of in names]
                    for values in zip(*together, strict=True):
                        its, reason, its_stamp = next(told)
                        if its == UNREADABLE:
                            writer.fail(row, reason)
                        else:
                            writer.note_stamp(int(image_N[row]), its_stamp)
                            for column, value_D in enumerate(values):
                                writer.write(row, column, value_D)
                        row += 1
            advance(row, sealed.rows)
        writer.flush()
        unreadable = {items.names[i]: why for i, why in sorted(writer.unreadable.items())}
        writer.finish()
    return sealed.rows, unreadable


def whole(place: Place, plan: Plan, sealed: Seal) -> Items:
    """All items of a sealed set, with their splits, in memory."""
    parts = [listed(place, plan, sealed, k) for k in range(plan.shards)]
    first = parts[0]

    def joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        there = [array for array in arrays if array is not None]
        return np.concatenate(there) if there else None

    files = [name for part in parts for name in part.files or []]
    label_N = joined([part.labels for part in parts])
    return replace(
        first,
        names=[name for part in parts for name in part.names],
        labels=label_N,
        boxes=joined([part.boxes for part in parts]),
        images=joined([part.images for part in parts]),
        files=files or None,
        splits=splits_of(place, plan, sealed, label_N),
        total=plan.total,
    )
