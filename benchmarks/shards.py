"""What a set of shards costs: beside one file, where there is nothing to describe, and on workers
that die.

    python -m benchmarks.shards overhead --data flowers              # photographs, a folder a class
    python -m benchmarks.shards empty --shards 122070 --part ray     # or local, files
    python -m benchmarks.shards simulate                             # 64 workers, no real time

`overhead` runs `vggfeat extract` into one file and into sets, in turns, each process on a core of
its own: images/s of the whole command, imports and the start of processes with it; of describing
alone, by the seconds that the command tells (a set's are its shards', added up); processor time of
the command and all its processes, which other work on the machine changes least. Medians; ratios
are within a round, with the least and the largest. A set is merged, and its file compared.

`empty` has the engines do shards that cost nothing. `local` and `ray` are the engines' own `run`;
what describes a shard (the worker process; the task's function) is a stub that answers at once and
touches no file. `files` is the other half, without an engine, in one process: plan, listing,
attempts, shards of a row each, seal, all on the disk; only the pixels and the net are a stub. Peak
memory is this process's, the driver's.

`simulate` is a simulation of events: shards take `--seconds` in the mean, lognormally spread, nodes
die as a Poisson process, and all their workers come back after `--restart`. slurm: each worker goes
by `vggfeat.shards.engines.slurm.in_turn`, and leaves out what is there when its turn comes. ray:
one queue, to whose head the shard of a worker that died comes back after `--notice`. Not simulated:
storage, and what `attempts` brings about. lost: work of those that died; doubled: work on shards
that were there, through another, when it was done. Both are shares of the work. tail: from the
moment when each shard is there or begun until all are there; helping (slurm): from when the first
worker is through its own part. After +- half of Student's 95 % interval over the seeds.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.intervals import interval
from vggfeat import datasets
from vggfeat.datasets import Items
from vggfeat.describe import description_of
from vggfeat.features import open_features
from vggfeat.files import write_json
from vggfeat.place import place_of
from vggfeat.shards import shard as shards_shard
from vggfeat.shards.engines import local, ray, slurm
from vggfeat.shards.engines.failed import Failed
from vggfeat.shards.plan import Plan, plan_of, settle
from vggfeat.shards.shard import Described, Facts
from vggfeat.shards.sharded import merge, open_set, seal
from vggfeat.shards.status import status_of
from vggfeat.shards.worker import Work, attempt
from vggfeat.sources import load
from vggfeat.terminal import columns, out, say
from vggfeat.versions import versions
from vggfeat.writer import STAMPS, VERSIONS

Rows = list[dict[str, Any]]


def spread(values: Sequence[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# --- overhead -------------------------------------------------------------------------------------

WAYS = {"one file": (0, 1)} | {
    f"{shards} shard{'s' * (shards > 1)}, {processes} process{'es' * (processes > 1)}": (
        shards,
        processes,
    )
    for processes in (1, 2)
    for shards in (1, 2, 4)
    if shards >= processes
}
"""Shards (0: one file) and processes."""


@dataclass(frozen=True)
class Run:
    """One command. wall, cpu: seconds of all of it; told: seconds of describing, as it tells."""

    wall: float
    cpu: float
    told: float


def extracted(words: Sequence[str], target: Path, shards: int, processes: int, images: int) -> Run:
    """Run `vggfeat extract` on as many cores as it has processes."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    told = target.parent / "told.json"
    words = [sys.executable, "-m", "vggfeat", "extract", *words, "--json", str(told)]
    if shards:
        words += ["--out", f"{target}/", "--workers", str(processes)]
        words += ["--shard-rows", str(-(-images // shards))]
    else:
        words += ["--out", str(target), "--overwrite"]
    told.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    ran = subprocess.run(
        words,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    wall = time.perf_counter() - began
    if ran.returncode not in (0, 3):  # 3: images that can't be read
        sys.exit(f"{' '.join(words)}\n{ran.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds: float = json.loads(told.read_text())["seconds"]
    return Run(wall, cpu, seconds / processes)


def compared(one: Path, other: Path) -> dict[str, Any]:
    """Two feature files: what differs, and the largest difference of descriptors as a share of the
    largest value.
    """
    a, b = open_features(one), open_features(other)
    same = {
        "names": list(a.names) == list(b.names),
        "labels": (
            a.labels is b.labels
            if a.labels is None or b.labels is None
            else np.array_equal(a.labels, b.labels)
        ),
        "classes": a.classes == b.classes,
        "splits": a.splits.keys() == b.splits.keys()
        and all(np.array_equal(rows, b.splits[name]) for name, rows in a.splits.items()),
        "status": np.array_equal(a.status, b.status),
        "reasons": a.errors == b.errors,
    }
    values, others = np.nan_to_num(a.descriptors[:]), np.nan_to_num(b.descriptors[:])
    difference = np.abs(values.astype(np.float64) - others).max() / np.abs(values).max()
    unlike = [key for key, equal in same.items() if not equal]
    return {"unlike": unlike, "difference": float(difference)}


def overhead(options: argparse.Namespace) -> Rows:
    items = datasets.load("folder", options.data)
    images = min(len(items), options.limit)
    words = ["--dataset", "folder", "--root", str(options.data.resolve()), "--device", "cpu"]
    words += ["--weights", options.weights, "--scales", options.scales, "--limit", str(images)]
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    seen: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for turn in range(options.repeats):
            for way, (shards, processes) in WAYS.items():
                target = folder / (f"set{turn}-{shards}-{processes}" if shards else "one.h5")
                runs[way].append(extracted(words, target, shards, processes, images))
                if shards and turn == 0:
                    merge(target, folder / "merged.h5", overwrite=True)
                    seen[way] = compared(folder / "one.h5", folder / "merged.h5")
                say(f"round {turn + 1}, {way}: {runs[way][-1].wall:.1f} s")
    beside, rows = runs["one file"], []
    figures: dict[str, Callable[[Run], float]] = {
        "images/s": lambda run: images / run.wall,
        "describing": lambda run: images / run.told,
        "CPU, s": lambda run: run.cpu,
    }
    head = [column for figure in figures for column in (figure, "of one file's")]
    title = f"{images:,} images, {options.weights}, Q={options.scales}, {options.repeats} rounds"
    table = columns("", *head, "largest difference", title=title)
    for way, its in runs.items():
        cells = []
        for figure in figures.values():
            ratios = [figure(a) / figure(b) for a, b in zip(its, beside, strict=True)]
            cells += [f"{statistics.median(map(figure, its)):.1f}", spread(ratios)]
        found = seen.get(way, {"unlike": [], "difference": 0.0})
        difference = f"{found['difference']:.1e} {', '.join(found['unlike'])}".strip()
        table.add_row(way, *cells, "-" if way == "one file" else difference)
        rows.append({"way": way, **found, "runs": [run.__dict__ for run in its]})
    out.print(table)
    if unlike := [row["way"] for row in rows if row["unlike"]]:
        sys.exit(f"not the same: {', '.join(unlike)}")
    return rows


# --- shards that cost nothing ---------------------------------------------------------------------

ANSWERS = """
import sys
print('"ready"', flush=True)
for line in sys.stdin:
    told = '{"shard": %d, "rows": 0, "unreadable": 0, "seconds": 0.0, "put": true}'
    print(told % int(line), flush=True)
"""


class Answering(Work):
    """Its processes answer each number at once."""

    def words(self) -> list[str]:
        return [sys.executable, "-c", ANSWERS]


def answer(_: dict[str, Any], k: int) -> dict[str, Any]:
    """In place of the Ray task's function."""
    return {"shard": k, "rows": 0, "unreadable": 0, "seconds": 0.0, "put": True}


class Meter:
    """Seconds, processor time and peak memory of this process while a block runs."""

    def __enter__(self) -> Meter:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = self._held()
        self._began, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu = time.process_time() - self._cpu
        self.peak = self._held()

    def _held(self) -> float:
        """MB, at most."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))

    def row(self, what: str, shards: int, start: float = 0.0) -> dict[str, Any]:
        seconds = self.seconds - start
        return {
            "what": what,
            "shards": shards,
            "start": start,
            "seconds": seconds,
            "ms": 1e3 * seconds / shards,
            "cpu_ms": 1e3 * self.cpu / shards,
            "peak_mb": self.peak,
            "before_mb": self.before,
        }


def told_at_once(engine: Iterator[Facts | Failed], shards: int, what: str) -> dict[str, Any]:
    """Exhaust an engine: its start apart from its shards."""
    first, seen = 0.0, set()
    began = time.perf_counter()
    with Meter() as meter:
        for result in engine:
            first = first or time.perf_counter() - began
            if isinstance(result, Failed):
                sys.exit(f"shard {result.shard}: {result.why}")
            seen.add(result.shard)
    if seen != set(range(shards)):
        sys.exit(f"{what}: {shards - len(seen)} shards did not come")
    return meter.row(what, shards, first)


def in_files(shards: int) -> Rows:
    """Of a set of so many shards of a row, each step on the disk."""
    network = load("mini", device="cpu")
    description = description_of(network, None, (96,), True)
    dim, here = network.dim(description.layer), versions()
    names = [f"{i:06d}.jpg" for i in range(shards)]
    items = Items("folder", "unlabelled", Path("/nowhere"), names, None, [])
    rows: Rows = []

    def described(part: Items, plan: Plan, *_: Any, **__: Any) -> Described:
        zeros = np.zeros((len(part), description.columns, dim), plan.store)
        return Described(zeros, {}, [(0,) * len(STAMPS)] * len(part), set())

    def step(what: str, do: Callable[[], Any]) -> Any:
        with Meter() as meter:
            made = do()
        rows.append(meter.row(what, shards))
        return made

    with tempfile.TemporaryDirectory() as temporary:
        place, work = place_of(temporary), Work(temporary, "cpu", 1)
        plan = plan_of(
            items,
            description,
            (dim,),
            "float32",
            shard_rows=1,
            weights_metadata={},
            versions={name: here[name] for name in VERSIONS if name in here},
        )
        step("files: plan and listing", lambda: settle(place, plan, items))
        with mock.patch.object(shards_shard, "describe_rows", described):
            step(
                "files: an attempt and a shard",
                lambda: [attempt(place, plan, network, k, work) for k in range(shards)],
            )
        step("files: the seal", lambda: seal(place, plan))
        step("files: how far it is (info)", lambda: status_of(place, plan))
        opened = step("files: opened as one set", lambda: open_set(temporary))
        step("files: all names", lambda: sum(map(len, opened.names)))
    return rows


def empty(options: argparse.Namespace) -> Rows:
    n = options.shards
    rows: Rows = []
    for part in options.part.split(","):
        if part == "local":
            engine = local.run(Answering("nowhere"), range(n), ["cpu"] * options.processes)
            rows.append(told_at_once(engine, n, f"local, {options.processes} processes"))
        elif part == "ray":
            with mock.patch.object(ray, "_shard", answer):
                tasks = ray.run(Work("nowhere", "cpu"), range(n), options.at_once, None)
                rows.append(told_at_once(tasks, n, f"ray, {options.at_once} tasks at once"))
        elif part == "files":
            rows += in_files(n)
        else:
            sys.exit(f"there is no part {part}: local, ray, files")
        say(f"{part}: done")
    head = ("start, s", "s", "ms a shard", "CPU, ms a shard", "peak, MB", "of it new")
    table = columns("", *head, title=f"{n:,} shards that cost nothing; CPU and peak: the driver's")
    for row in rows:
        table.add_row(
            row["what"],
            f"{row['start']:.1f}" if row["start"] else "-",
            f"{row['seconds']:.1f}",
            f"{row['ms']:.2f}",
            f"{row['cpu_ms']:.2f}",
            f"{row['peak_mb']:.0f}",
            f"{max(0, row['peak_mb'] - row['before_mb']):.0f}",
        )
    out.print(table)
    return rows


# --- workers that die, simulated ------------------------------------------------------------------


@dataclass
class Worker:
    """Number of a worker; the shard that it is at, since when; which of its lives it is in."""

    number: int
    shard: int | None = None
    since: float = 0.0
    life: int = 0
    waits: bool = False
    left: bool = False
    turn: Iterator[int] = field(default_factory=lambda: iter(()))


class Simulation:
    """All shards, from the first to the last that is there."""

    def __init__(self, options: argparse.Namespace, engine: str, seed: int) -> None:
        self.options, self.engine = options, engine
        chance = np.random.default_rng([seed, 0])  # shards and deaths are the same for both engines
        sigma = options.spread
        self.seconds_K = (
            options.seconds * np.exp(chance.normal(-(sigma**2) / 2, sigma, options.shards))
        ).tolist()
        nodes = -(-options.workers // options.per_node)
        self._deaths = [np.random.default_rng([seed, 1, node]) for node in range(nodes)]
        self._events: list[tuple[float, int, str, int, int]] = []
        self._number = 0
        self.there = bytearray(options.shards)
        self.missing = self.untouched = options.shards
        self.at: Counter[int] = Counter()
        self.workers = [Worker(i) for i in range(options.workers)]
        self.queue = deque(range(options.shards))
        self.now = self.lost = self.doubled = 0.0
        self.tail_from: float | None = None
        self.helps_from: float | None = None
        self.died = 0

    def at_time(self, when: float, what: str, who: int, life: int = 0) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, who, life))

    def next_death(self, node: int) -> None:
        if self.options.deaths:
            wait = self._deaths[node].exponential(3600 / self.options.deaths)
            self.at_time(self.now + wait, "death", node)

    def begin(self, worker: Worker) -> None:
        """A worker starts, for the first time or again, and lists what is missing."""
        if self.engine == "slurm":
            todo = [k for k in range(len(self.there)) if not self.there[k]]
            count = len(self.workers)
            own = sum(k % count == worker.number for k in todo)
            turn = slurm.in_turn(todo, worker.number, count, lambda k: bool(self.there[k]))
            worker.turn = self.watched(turn, own)
        self.take(worker)

    def watched(self, turn: Iterator[int], own: int) -> Iterator[int]:
        """The same; it is noted when a worker's own part is done."""
        for i, k in enumerate(turn):
            if i == own and self.helps_from is None:
                self.helps_from = self.now
            yield k

    def take(self, worker: Worker) -> None:
        """The next shard that isn't there, if there is one."""
        worker.shard, worker.waits = None, False
        if self.engine == "slurm":
            found = next((k for k in worker.turn if not self.there[k]), None)
        else:
            found = self.queue.popleft() if self.queue else None
        if found is None:
            worker.left, worker.waits = self.engine == "slurm", self.engine == "ray"
            return
        if not self.at[found]:
            self.untouched -= 1
            if not self.untouched and self.tail_from is None:
                self.tail_from = self.now
        self.at[found] += 1
        worker.shard, worker.since = found, self.now
        self.at_time(self.now + self.seconds_K[found], "done", worker.number, worker.life)

    def done(self, worker: Worker) -> None:
        k = worker.shard
        assert k is not None
        self.at[k] -= 1
        if self.there[k]:
            self.doubled += self.now - worker.since
        else:
            self.there[k] = 1
            self.missing -= 1
        self.take(worker)

    def death(self, node: int) -> None:
        first = node * self.options.per_node
        for worker in self.workers[first : first + self.options.per_node]:
            if worker.left:
                continue
            worker.life += 1
            worker.waits = False
            k, worker.shard = worker.shard, None
            self.at_time(self.now + self.options.restart, "back", worker.number, worker.life)
            if k is None:
                continue
            self.died += 1
            self.lost += self.now - worker.since
            self.at[k] -= 1
            if not self.at[k] and not self.there[k]:
                self.untouched += 1
            if self.engine == "ray":
                self.at_time(self.now + self.options.notice, "again", k)
        self.next_death(node)

    def again(self, k: int) -> None:
        self.queue.appendleft(k)
        for worker in self.workers:
            if worker.waits:
                self.take(worker)
                return

    def run(self) -> dict[str, float]:
        for node in range(len(self._deaths)):
            self.next_death(node)
        for worker in self.workers:
            self.begin(worker)
        while self.missing:
            self.now, _, what, who, life = heapq.heappop(self._events)
            if what == "death":
                self.death(who)
            elif what == "again":
                self.again(who)
            elif self.workers[who].life == life:
                getattr(self, {"done": "done", "back": "begin"}[what])(self.workers[who])
        # what is under way is ended, for nothing
        self.doubled += sum(
            self.seconds_K[worker.shard] for worker in self.workers if worker.shard is not None
        )
        work = sum(self.seconds_K)
        assert self.tail_from is not None
        return {
            "hours": self.now / 3600,
            "beside arithmetic": self.now * len(self.workers) / work,
            "lost": self.lost / work,
            "doubled": self.doubled / work,
            "tail": self.now - self.tail_from,
            "helping": 0.0 if self.helps_from is None else self.now - self.helps_from,
            "died": self.died,
        }


def simulate(options: argparse.Namespace) -> Rows:
    forms = {
        "hours": (1, ".2f", "h"),
        "beside arithmetic": (1, ".3f", "of arithmetic"),
        "lost": (100, ".2f", "lost, %"),
        "doubled": (100, ".2f", "doubled, %"),
        "tail": (1, ".0f", "tail, s"),
        "helping": (1, ".0f", "helping, s"),
        "died": (1, ".0f", "shards that died"),
    }
    table = columns(
        "",
        *(words for _, _, words in forms.values()),
        title=(
            f"{options.shards:,} shards of {options.seconds:g} s, {options.workers} workers, a node"
            f" of {options.per_node} dies {options.deaths:g} times an hour, {options.seeds} seeds"
        ),
    )
    rows: Rows = []
    for engine in options.engine.split(","):
        found = []
        for seed in range(options.seeds):
            found.append(Simulation(options, engine, seed).run())
            say(f"{engine}, seed {seed}: {found[-1]['hours']:.2f} h")
        cells = [
            interval([scale * each[key] for each in found], form)
            for key, (scale, form, _) in forms.items()
        ]
        table.add_row(engine, *cells)
        rows.append({"engine": engine, "seeds": found})
    out.print(table)
    exact = options.shards * options.seconds / options.workers / 3600
    out.print(f"arithmetic: shards x seconds / workers are {exact:.2f} h")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    its = parts.add_parser("overhead")
    its.add_argument("--data", type=Path, required=True, help="photographs, a folder a class")
    its.add_argument("--weights", default="mini")
    its.add_argument("--scales", default="96,128")
    its.add_argument("--limit", type=int, default=1 << 20, help="images")
    its.add_argument("--repeats", type=int, default=3)
    its.set_defaults(do=overhead)
    its = parts.add_parser("empty")
    its.add_argument("--shards", type=int, default=4000)
    its.add_argument("--part", default="local,ray,files", help="some of these")
    its.add_argument("--processes", type=int, default=2, help="of the local engine")
    its.add_argument("--at-once", type=int, default=64, help="tasks that Ray is given")
    its.set_defaults(do=empty)
    its = parts.add_parser("simulate")
    its.add_argument("--shards", type=int, default=122_070)
    its.add_argument("--seconds", type=float, default=21.0, help="of a shard, in the mean")
    its.add_argument("--spread", type=float, default=0.25, help="sigma of their logarithm")
    its.add_argument("--workers", type=int, default=64)
    its.add_argument("--per-node", type=int, default=8, help="workers that die together")
    its.add_argument("--deaths", type=float, default=0.5, help="of a node, an hour: ten times 5 %%")
    its.add_argument("--restart", type=float, default=120.0, help="seconds until it is back")
    its.add_argument("--notice", type=float, default=30.0, help="seconds until Ray knows of it")
    its.add_argument("--seeds", type=int, default=5)
    its.add_argument("--engine", default="slurm,ray")
    its.set_defaults(do=simulate)
    for part in parts.choices.values():
        part.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = options.do(options)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
