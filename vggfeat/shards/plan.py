"""What a set of shards is to be, written once and never changed: which images are in which shard,
and how they are described.

    plan.json                           the plan
    listing/3f2a…-8192/00007.parquet    the items of shard 7, by digest and rows of a shard
    listing/3f2a…-8192/splits.parquet   the splits, as rows of the whole
    listing/3f2a…-0/parts.parquet       of an open plan, instead of both: the files, one a shard
    data/00007.parquet                  what is described of them (`shard`)
    set.json                            the seal: all shards are there (`sharded`)

Row i of the set is item i of the data set: shard k has the rows from k times `shard_rows` on. A
plan is open where its items are files with images in them (`Items.containers`): how many is known
when the set is sealed, and the rows of shard k are those of file k, behind those of the files
before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from vggfeat import datasets
from vggfeat.checked import OneOf, Range, Several, fitted, parse_json
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.parquet import Table, to_bytes
from vggfeat.place import AbsentError, Place, place_of
from vggfeat.store import MAX_DIM, MAX_LAYERS, REGIONS, Description, differences

FORMAT, VERSION = "vggfeat-plan", 1
PLAN, SEAL = "plan.json", "set.json"
SHARD_ROWS = 8192
"""Images of a shard: the window in which images are put in order of their shapes (`batches`)."""
MOST_SHARDS = 10**6
THREADS = 16  # that put small files
Count = Annotated[int, Range(0, 2**53)]


@dataclass(frozen=True)
class Plan:
    """See the top of this file. N rows in all; None, and 0 shard_rows, in an open plan of so many
    `parts`.

    dataset, protocol, root, classes, total: as of `Items`. in_memory: its images come with the data
    set, and are read from no file. at_urls: whether root is a URL, or "" where names are. labels:
    "none", "one" (class) or "several" an item. boxes: items are boxes in images. splits: their
    names. listing: digest of what the items are. description,
    dim, store: how they are described, the descriptor's length and type; further_dims: those of
    further layers. weights_metadata, command:
    as of a feature file's facts. versions: of what takes part in a descriptor.
    """

    format: str
    version: int
    dataset: str
    protocol: str
    root: str
    in_memory: bool
    at_urls: bool
    classes: list[str]
    total: Count | None
    rows: Count | None
    parts: Count
    shard_rows: Annotated[int, Range(0, 2**31)]
    labels: Annotated[str, OneOf(("none", "one", "several"))]
    boxes: bool
    splits: list[str]
    listing: str
    description: Description
    dim: Annotated[int, Range(1, MAX_DIM)]
    store: Annotated[str, OneOf(("float16", "float32"))]
    weights_metadata: dict[str, str]
    versions: dict[str, str]
    command: str
    further_dims: Annotated[
        tuple[Annotated[int, Range(1, MAX_DIM)], ...], Several(MAX_LAYERS - 1)
    ] = ()

    @property
    def shards(self) -> int:
        return self.parts if self.rows is None else -(-self.rows // self.shard_rows)

    @property
    def identity(self) -> str:
        """sha256 of all that a shard's content depends on: not of where things lie, or lay."""
        record = {k: v for k, v in self.to_dict().items() if k not in ("command", "root")}
        del record["description"]["weights"]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        record = {**asdict(self), "description": self.description.to_dict()}
        dims = record.pop("further_dims")
        return {**record, "further_dims": list(dims)} if dims else record

    @property
    def dims(self) -> dict[str, int]:
        """Of each layer, in their order."""
        return dict(zip(self.description.layers, (self.dim, *self.further_dims), strict=True))

    def rows_of(self, k: int) -> range:
        """The rows of shard k, of a plan that isn't open."""
        assert self.rows is not None
        return range(k * self.shard_rows, min(self.rows, (k + 1) * self.shard_rows))

    @property
    def folder(self) -> str:
        """Of the listing: another one, or one that is divided otherwise, has another."""
        return f"listing/{self.listing[:16]}-{self.shard_rows}"


def shard_name(k: int) -> str:
    return f"data/{k:05d}.parquet"


def read_plan(place: Place) -> Plan:
    """Raises VggfeatError where there is none, or it is damaged."""
    where = f"{place.name}/{PLAN}"
    try:
        record = parse_json(place.read(PLAN), where)
    except AbsentError as error:
        raise VggfeatError(f"{place.name} is no set of shards: it has no {PLAN}") from error
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise VggfeatError(f"{where} is no plan of version {VERSION}")
    plan: Plan = fitted(record, Plan, where)
    if len(plan.further_dims) != len(plan.description.further):
        raise VggfeatError(f"{where} is damaged: `further_dims` aren't those of `further`")
    if plan.rows is not None and not plan.shard_rows:
        raise VggfeatError(f"{where} is damaged: shards have 0 rows")
    if plan.shards > MOST_SHARDS:
        raise VggfeatError(f"{where} has {plan.shards:,} shards, more than {MOST_SHARDS:,}")
    return plan


def plan_of(
    items: Items,
    description: Description,
    dims: tuple[int, ...],
    store: str,
    *,
    shard_rows: int = SHARD_ROWS,
    weights_metadata: dict[str, str],
    versions: dict[str, str],
    command: str = "",
) -> Plan:
    """The plan of a job, which isn't written yet. Raises VggfeatError for too many shards."""
    labels = "none" if items.labels is None else "several" if items.labels.ndim == 2 else "one"
    root = os.path.abspath(items.root) if items.url is None else items.url
    plan = Plan(
        FORMAT,
        VERSION,
        items.dataset,
        items.protocol,
        "" if items.images is not None else root,
        items.images is not None,
        items.url is not None,
        list(items.classes),
        items.total,
        None if items.containers else len(items),
        len(items) if items.containers else 0,
        0 if items.containers else shard_rows,
        labels,
        items.boxes is not None,
        list(items.splits),
        listing_digest(items),
        description,
        dims[0],
        store,
        weights_metadata,
        versions,
        command,
        dims[1:],
    )
    if plan.shards > MOST_SHARDS:
        raise VggfeatError(
            f"{plan.shards:,} shards are more than {MOST_SHARDS:,}: give more `shard_rows`"
        )
    return plan


def settle(place: Place, plan: Plan, items: Items) -> Plan:
    """The plan that is there, or this one, put there with its listing; of several processes the
    first wins. Raises VggfeatError where another plan is there: nothing of it is changed.
    """
    try:
        there = read_plan(place)
    except VggfeatError:
        if place.size(PLAN) is not None:
            raise
        if place.names("data") or place.size(SEAL) is not None:
            raise VggfeatError(
                f"{place.name} has shards and no {PLAN}: bring that back, or give another `out`"
            ) from None
        _put_listings(place, plan, items)
        place.put_new(PLAN, (json.dumps(plan.to_dict(), indent=1) + "\n").encode())
        there = read_plan(place)
    if difference := next(_differences(there, plan), ""):
        raise VggfeatError(
            f"{place.name} was begun with {difference}: give the same, or another `out`"
        )
    return there


def _differences(there: Plan, here: Plan) -> Iterator[str]:
    """What the plan that is there has otherwise, each in a few words."""
    yield from differences(there.description, here.description)
    if there.store != here.store:
        yield f"`store` {there.store}, not {here.store}"
    for package in sorted(there.versions.keys() | here.versions.keys()):
        if there.versions.get(package) != here.versions.get(package):
            yield (f"{package} {there.versions.get(package)}, not {here.versions.get(package)}")
    if there.dataset != here.dataset:
        yield f"dataset {there.dataset}, not {here.dataset}"
    if (there.rows, there.parts) != (here.rows, here.parts):
        yield f"{_extent(there)}, not {_extent(here)}"
    if there.shard_rows != here.shard_rows:
        yield f"`shard_rows` {there.shard_rows:,}, not {here.shard_rows:,}"
    if there.root != here.root:
        yield f"`root` {there.root or '-'}, not {here.root or '-'}"
    if there.listing != here.listing:
        yield "other images, labels or splits"
    if there.identity != here.identity:
        ours, theirs = here.to_dict(), there.to_dict()
        yield f"another {next((key for key in ours if ours[key] != theirs[key]), 'plan')}"


def _extent(plan: Plan) -> str:
    return f"{plan.parts:,} files" if plan.rows is None else f"{plan.rows:,} images"


# --- the listing ----------------------------------------------------------------------------------


def listing_digest(items: Items) -> str:
    """sha256 of all that the items are: names, files, boxes, labels, classes, splits, in their
    order.
    """
    digest = hashlib.sha256()
    texts = {"names": items.names, "classes": items.classes, "files": items.files or []}
    for key, values in texts.items():
        digest.update(f"\0{key} {len(values)}\0".encode())
        digest.update(b"\0".join(map(encoded, values)))
    arrays = {"boxes": items.boxes, "labels": items.labels, **items.splits}
    for key, array in arrays.items():
        if array is not None:
            digest.update(b"\0" + encoded(key) + f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, "<i8").data)
    return digest.hexdigest()


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _put_listings(place: Place, plan: Plan, items: Items) -> None:
    if plan.rows is None:
        content = to_bytes({"name": [encoded(name) for name in items.names]}, {})
        place.put_new(f"{plan.folder}/parts.parquet", content)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda k: _put_listing(place, plan, items, k), range(plan.shards)):
            pass
    if plan.splits:
        place.put_new(f"{plan.folder}/splits.parquet", _splits_bytes(items))


def _put_listing(place: Place, plan: Plan, items: Items, k: int) -> None:
    rows = plan.rows_of(k)
    part = slice(rows.start, rows.stop)
    columns: dict[str, Any] = {"name": [encoded(name) for name in items.names[part]]}
    if items.files is not None:
        columns["file"] = [encoded(name) for name in items.files[part]]
    if items.labels is not None:
        columns["label"] = items.labels[part]
    if items.boxes is not None:
        columns["box"] = items.boxes[part].astype(np.int32)
    content = to_bytes(columns, {"listing": plan.listing, "shard": k})
    place.put_new(f"{plan.folder}/{k:05d}.parquet", content)


def _splits_bytes(items: Items) -> bytes:
    names = [encoded(name) for name in items.splits]
    numbers = np.repeat(np.arange(len(names)), [len(rows) for rows in items.splits.values()])
    rows = np.concatenate([*items.splits.values(), np.zeros(0, np.int64)]).astype(np.int64)
    return to_bytes({"split": numbers.astype(np.int32), "row": rows}, {})


def read_splits(place: Place, plan: Plan) -> dict[str, np.ndarray]:
    """Name -> rows. Raises VggfeatError."""
    if not plan.splits:
        return {}
    name = f"{plan.folder}/splits.parquet"
    table = Table(place.read(name), f"{place.name}/{name}")
    number, row = table.array("split"), table.array("row")
    assert plan.rows is not None  # an open plan has no splits
    if len(row) and not (row.min() >= 0 and row.max() < plan.rows):
        raise VggfeatError(f"{table.where} has rows outside of 0..{plan.rows - 1}")
    return {split: row[number == i] for i, split in enumerate(plan.splits)}


def listing_of(place: Place, plan: Plan, k: int) -> Table:
    """Raises VggfeatError where it is damaged or of another plan."""
    name = f"{plan.folder}/{k:05d}.parquet"
    table = Table(place.read(name), f"{place.name}/{name}")
    told = table.facts if isinstance(table.facts, dict) else {}
    if (told.get("listing"), told.get("shard"), table.rows) != (
        plan.listing,
        k,
        len(plan.rows_of(k)),
    ):
        raise VggfeatError(
            f"{table.where} isn't of this plan: put back what the plan was made with"
        )
    return table


def names_of(table: Table) -> list[str]:
    return [_decoded(name) for name in table.texts("name")]


def parts_of(place: Place, plan: Plan) -> Items:
    """The files of an open plan, as `containers` has them. Raises VggfeatError."""
    name = f"{plan.folder}/parts.parquet"
    return _parts(place.name, name, plan.listing, plan.dataset, plan.protocol, *_where(plan))


@lru_cache(4)  # there may be 10^5, and each shard asks for its own
def _parts(
    where: str, name: str, listing: str, dataset: str, protocol: str, root: Path, url: str | None
) -> Items:
    table = Table(place_of(where).read(name), f"{where}/{name}")
    items = Items(dataset, protocol, root, names_of(table), None, [], url=url, containers=True)
    if listing_digest(items) != listing:
        raise VggfeatError(f"{table.where} isn't of this plan: put back what it was made with")
    return items


def _where(plan: Plan) -> tuple[Path, str | None]:
    """`Items.root` and `Items.url`."""
    return (Path(), plan.root) if plan.at_urls else (Path(plan.root), None)


def items_of(place: Place, plan: Plan, k: int) -> Items:
    """The items of shard k, without splits, of a plan that isn't open. Raises VggfeatError."""
    if plan.in_memory:
        return replace(_in_memory(plan).take(np.array(plan.rows_of(k))), splits={})
    table = listing_of(place, plan, k)
    names = names_of(table)
    labels = None
    if plan.labels != "none":
        labels = table.array("label", None if plan.labels == "one" else len(plan.classes))
    root, url = _where(plan)
    return Items(
        plan.dataset,
        plan.protocol,
        root,
        names,
        labels,
        plan.classes,
        url=url,
        boxes=table.array("box", 4) if plan.boxes else None,
        files=[_decoded(each) for each in table.texts("file")] if "file" in table.names else None,
    )


def _in_memory(plan: Plan) -> Items:
    items = datasets.load(plan.dataset)
    if plan.total is not None and plan.rows is not None:
        items = items.first(plan.rows)
    if listing_digest(items) != plan.listing:
        raise VggfeatError(f"{plan.dataset} is another here than the plan was made with")
    return items


def columns_of(description: Description, layer: str) -> list[str]:
    """The names of the columns of a layer's descriptors, a region and scale each, in the order of a
    feature file's: "fc7.256", or of boxes "fc7.box.256".
    """
    regions = [""] if description.regions == REGIONS[:1] else [f"{r}." for r in description.regions]
    return [f"{layer}.{region}{q}" for region in regions for q in description.scales]


def widths_of(plan: Plan) -> dict[str, int]:
    """All of them -> the length of a descriptor there."""
    return {
        name: dim
        for layer, dim in plan.dims.items()
        for name in columns_of(plan.description, layer)
    }


def missing_of(plan: Plan, there: Sequence[str]) -> list[int]:
    """The shards that aren't among the names in data/."""
    found = set(there)
    return [k for k in range(plan.shards) if f"{k:05d}.parquet" not in found]
