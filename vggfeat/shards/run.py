"""A set of shards from its plan to its seal, by an engine: what is there is left as it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.extract import Report
from vggfeat.files import absolute_source
from vggfeat.machine import CORES
from vggfeat.place import Place, is_url, place_of
from vggfeat.shards.engines import local, ray, slurm
from vggfeat.shards.engines.failed import Failed
from vggfeat.shards.plan import SHARD_ROWS, Plan, missing_of, plan_of, settle, shard_name
from vggfeat.shards.shard import Facts
from vggfeat.shards.sharded import in_threads, seal, unreadable_of
from vggfeat.shards.worker import Work
from vggfeat.store import Description
from vggfeat.versions import versions
from vggfeat.weights import Network
from vggfeat.writer import VERSIONS

MOST_FAILED = 8
"""Shards that may fail before a run is stopped."""


@dataclass(frozen=True)
class Told:
    """How a run is heard of: progress (images done, all of them), a sentence."""

    progress: Callable[[float, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda line: None


def finish(
    place: Place,
    plan: Plan,
    engine: Callable[[list[int]], Iterator[Facts | Failed]],
    told: Told,
) -> Report:
    """Describe what is missing, and seal the set. engine: the shards that are missing -> what comes
    of each, as it comes.

    Raises VggfeatError where a shard failed: those that are there stay, and the same command goes
    on; at once where a machine refuses the plan, or MOST_FAILED have failed.
    """
    began = time.monotonic()
    missing = missing_of(plan, list(place.names("data")))
    # of an open plan nobody knows how many images are left: its shards are counted
    open_plan, total = plan.rows is None, plan.shards if plan.rows is None else plan.rows
    left = len(missing) if open_plan else sum(len(plan.rows_of(k)) for k in missing)
    if missing and left < total:
        told.say(
            f"going on: {plan.shards - len(missing):,} of {plan.shards:,} shards are there,"
            f" {left:,} {'files' if open_plan else 'images'} are left"
        )
    done, here = float(total - left), 0
    told.progress(done, total)
    failed: dict[int, str] = {}
    results = engine(missing) if missing else iter(())
    try:
        for result in results:
            if isinstance(result, Failed):
                failed[result.shard] = result.why
                _note(place, result)
                if result.refused:
                    raise VggfeatError(result.why)
                if len(failed) > MOST_FAILED and len(failed := _still(place, failed)) > MOST_FAILED:
                    raise VggfeatError(_failures(plan, failed))
                told.say(f"shard {result.shard} failed: {result.why}")
            else:
                failed.pop(result.shard, None)
                here += result.rows if result.put else 0  # else another process has described it
                done += 1 if open_plan else len(plan.rows_of(result.shard))
                told.progress(done, total)
    finally:
        close = getattr(results, "close", None)
        if close is not None:
            close()
    if failed := _still(place, failed):
        raise VggfeatError(_failures(plan, failed))
    sealed = seal(place, plan)
    unreadable: dict[str, str] = {}
    bad = [k for k, each in enumerate(sealed.shards) if each.unreadable]
    for its in in_threads(lambda k: unreadable_of(place, plan, sealed, k), bad):
        unreadable |= its
    seconds = time.monotonic() - began
    rows = sealed.rows
    here = min(here, rows)
    return Report(rows, sealed.seconds, unreadable, rows - here, seconds, here / max(seconds, 1e-9))


def _still(place: Place, failed: dict[int, str]) -> dict[int, str]:
    """Those that another task of the job hasn't described meanwhile."""
    return {k: why for k, why in failed.items() if place.size(shard_name(k)) is None}


def _note(place: Place, failed: Failed) -> None:
    """Leave word of it, for whoever asks how far the set is."""
    with suppress(VggfeatError):
        number = 0
        while not place.put_new(f"failed/{failed.shard:05d}.{number}", failed.why.encode()):
            number += 1


@dataclass(frozen=True)
class Settings:
    """Where shards are described, and how they are kept. engine: local, ray or slurm. processes: at
    once; 0: as many as there are devices. address: of a Ray cluster. device: of its workers; "": as
    here. store: type of the stored descriptors. weights: where they lie for the processes, if not
    where this one has them.
    """

    engine: str = "local"
    processes: int = 0
    address: str | None = None
    device: str = ""
    store: str = "float32"
    shard_rows: int = SHARD_ROWS
    batch_size: int | None = None
    weights: str = ""
    command: str = ""


def extract_set(
    items: Items,
    network: Network,
    description: Description,
    where: str,
    how: Settings,
    told: Told,
) -> Report:
    """Describe items into the set at `where`, or go on with it. network: on any device: the plan is
    made by it, and each process loads its own.

    Raises VggfeatError: see `settle`, `finish`.
    """
    place = place_of(where)
    metadata = {k: v for k, v in sorted(network.metadata.items()) if k != "classes"}
    here = versions()
    planned = plan_of(
        items,
        description,
        tuple(map(network.dim, description.layers)),
        how.store,
        shard_rows=how.shard_rows,
        weights_metadata=metadata,
        versions={package: here[package] for package in VERSIONS if package in here},
        command=how.command,
    )
    plan = settle(place, planned, items)
    devices = _devices(network.device, how.processes)
    if how.engine == "slurm":
        devices = devices[:1]
    threads = max(1, CORES // len(devices))
    # Ray's processes have another working folder
    there = where if is_url(where) else os.path.abspath(where)
    weights = absolute_source(how.weights)
    work = Work(there, str(network.device), threads, how.batch_size or 0, weights)

    def run(todo: list[int]) -> Iterator[Facts | Failed]:
        if how.engine == "ray":
            its = replace(work, device=how.device or work.device)
            return ray.run(its, todo, how.processes, how.address)
        if how.engine == "slurm":
            number, count = slurm.place_in_array()
            mine = slurm.in_turn(
                todo, number, count, lambda k: place.size(shard_name(k)) is not None
            )
            return local.run(work, mine, devices)
        return local.run(work, todo, devices)

    return finish(place, plan, run, told)


def _devices(device: torch.device, processes: int) -> list[str]:
    """Of each process: every GPU in turn, or the CPU."""
    if device.type != "cuda":
        return ["cpu"] * max(1, processes)
    there = torch.cuda.device_count()
    return [f"cuda:{i % there}" for i in range(processes or there)]


def _failures(plan: Plan, failed: dict[int, str]) -> str:
    k, why = min(failed.items())
    return (
        f"{len(failed):,} of {plan.shards:,} shards failed, the first is {k}: {why}; what was"
        " described is kept, and the same command goes on"
    )
