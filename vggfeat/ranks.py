"""The processes that do one job together: who this one is, and the few words they exchange
(gradients are not here).

torchrun starts them and says so in the environment; without it there is one process, and nothing
is exchanged. No wait is silent: who waits for another says for which, from `WARN_SECONDS` on, and a
limit ends it with a sentence.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from vggfeat.devices import cpu_instead, gpus, resolve_device
from vggfeat.errors import VggfeatError
from vggfeat.machine import CORES
from vggfeat.terminal import say

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

JOIN_MINUTES = 30.0  # a process that hasn't begun by then won't, however long the work may take
# until the first line about a wait; the next ones come after twice as long each
WARN_SECONDS = 30.0


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    meeting: Meeting | None = None
    """Where they wait for each other; None for one process."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This process's share of the processors of its machine, one at least."""
        return max(1, CORES // self.local_world)

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This process's part of start..stop: contiguous, the parts differ by one at most."""
        n = stop - start
        return start + n * self.rank // self.world, start + n * (self.rank + 1) // self.world

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64; exact for integers below 2^53.

        Raises VggfeatError, as all of these do: another process has ended, or hasn't come in
        `joined`'s minutes.
        """
        if self.meeting is None:
            return [float(v) for v in values]
        # on the CPU, through gloo: never waits for a GPU
        tensor = torch.tensor(values, dtype=torch.float64)
        with telling_of_others():
            self.meeting.wait(dist.all_reduce(tensor, async_op=True))
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks, in every process."""
        values: list[Any] = [value] * self.world
        if self.meeting is not None:
            self.barrier()  # once all are here, the exchange itself takes no time
            with telling_of_others():
                dist.all_gather_object(values, value)
        return values

    def collect(self, part: np.ndarray, axis: int) -> np.ndarray:
        """In the first process all processes' parts, one after another along axis; in the others
        their own.
        """
        if self.meeting is None:
            return part
        parts: list[Any] | None = [None] * self.world if self.first else None
        self.barrier()
        with telling_of_others():
            dist.gather_object(part, parts, dst=0)
        return part if parts is None else np.concatenate(parts, axis)

    def same(self, value: Any) -> Any:
        """The first process's value, in every process."""
        box = [value]
        if self.meeting is not None:
            self.barrier()
            with telling_of_others():
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum([0.0])


@contextmanager
def telling_of_others() -> Iterator[None]:
    """Inside, an exchange that fails as another process has ended is a VggfeatError."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        # gloo's own are plain, and name its source
        if isinstance(error, dist.DistError) or "/gloo/" in text:
            raise VggfeatError(f"another process of this job has ended ({text[:80]})") from error
        raise


class Meeting:
    """Where the processes of a job wait for each other, and can ask for whom. minutes: how long
    they do.
    """

    def __init__(self, store: Store, rank: int, world: int, minutes: float) -> None:
        self.store, self.rank, self.world, self.minutes = store, rank, world, minutes
        self.waits = 0  # so far: a wait's name, as all processes have the same ones

    def join(self) -> None:
        """Wait until all processes have started."""
        self.store.set(self._key(self.rank), "here")

        def started(seconds: float) -> bool:
            keys = [self._key(rank) for rank in range(self.world)]
            try:
                self.store.wait(keys, timedelta(seconds=seconds))
            except RuntimeError:
                return self.store.check(keys)
            return True

        self._until(started, min(self.minutes, JOIN_MINUTES))

    def wait(self, work: dist.Work) -> None:
        """Wait until an exchange that has begun is done."""

        def done(seconds: float) -> bool:
            try:
                work.wait(timedelta(seconds=seconds))
            except RuntimeError:
                if not work.is_completed():
                    return False
                # it has ended, maybe since that wait had: this one raises what the exchange itself
                # met
                work.wait()
            return True

        self._until(done, self.minutes)

    def _key(self, rank: int) -> str:
        return f"vggfeat/wait {self.waits}/{rank}"

    def _until(self, done: Callable[[float], bool], minutes: float) -> None:
        began, pause = time.monotonic(), WARN_SECONDS
        while not done(1.0):  # short ones, as a signal is heard between them
            self.store.set(self._key(self.rank), "here")
            waited = time.monotonic() - began
            if waited < min(pause, 60 * minutes):
                continue
            here = [self.store.check([self._key(rank)]) for rank in range(self.world)]
            missing = ", ".join(str(rank) for rank in range(self.world) if not here[rank])
            whom = (
                f"process {missing} of this job"
                if missing
                else "the network: all processes are here"
            )
            if waited >= 60 * minutes:
                raise VggfeatError(
                    f"waited {waited / 60:.0f} minutes for {whom}; is it stuck, or what it reads"
                    " from?"
                )
            pause *= 2
            if here.index(True) == self.rank:  # one line, not one of each
                say(f"waiting for {whom} ({waited:.0f} s)")
        self.waits += 1


def _told(name: str, low: int, high: int) -> int:
    """A number that torchrun says in the environment. Raises VggfeatError where another hand has
    set the others.
    """
    text = os.environ.get(name, "nothing")
    if not (text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise VggfeatError(
            f"the environment says {name}={text}, not {low} to {high}: start the processes of a job"
            " by torchrun, or one alone without WORLD_SIZE"
        )
    return int(text)


def _met(minutes: float) -> Store:
    """Where the processes of a job find each other; the first one makes it.

    In a thread, as PyTorch waits for the first process without a word and without hearing a signal.
    """
    met: list[Store | Exception] = []

    def meet() -> None:
        try:
            met.append(next(rendezvous("env://", timeout=timedelta(minutes=minutes)))[0])
        except Exception as error:  # told by the one who waits
            met.append(error)

    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    began, pause = time.monotonic(), WARN_SECONDS
    while thread.is_alive():
        thread.join(1.0)
        if (waited := time.monotonic() - began) >= pause and thread.is_alive():
            say(f"waiting for the first process of this job, at {where} ({waited:.0f} s)")
            pause *= 2
    if isinstance(met[0], Exception):
        text = " ".join(str(met[0]).split())
        raise VggfeatError(
            f"can't meet the other processes of this job at {where}: {text[:120]}"
        ) from met[0]
    return met[0]


@contextmanager
def joined(device: str, minutes: float = 30) -> Iterator[Ranks]:
    """Join the processes that torchrun started, each on a GPU of its own; leave them afterwards.

    device: "auto", "cpu" or "cuda". minutes: how long one waits for another, 30 at most for its
    start. Raises VggfeatError: a process has no GPU, or hasn't come.
    """
    world = _told("WORLD_SIZE", 1, 1 << 20) if "WORLD_SIZE" in os.environ else 1
    if world == 1:
        yield Ranks(resolve_device(device))
        return
    rank, local_world = _told("RANK", 0, world - 1), _told("LOCAL_WORLD_SIZE", 1, world)
    local_rank = _told("LOCAL_RANK", 0, local_world - 1)
    count, why = gpus()
    if device == "auto":  # the same for all: not the CPU for the one whose GPU can't be used
        device = "cuda" if count else "cpu"
        if why and rank == 0:
            warnings.warn(cpu_instead(why), stacklevel=3)
    if device == "cuda" and count:
        if local_world > count:
            raise VggfeatError(
                f"{local_world} processes on this machine and {count} GPUs: "
                "start one process per GPU, or give `device` cpu"
            )
        torch.cuda.set_device(local_rank)  # else each would take memory of the first
        device = f"cuda:{local_rank}"
    chosen = resolve_device(device)
    store = _met(min(minutes, JOIN_MINUTES))
    with telling_of_others():
        meeting = Meeting(store, rank, world, minutes)
        meeting.join()
        # Small words go through gloo on the CPU, gradients through NCCL where there are GPUs. Their
        # own limit is later than ours, which has the better words.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        limit = timedelta(minutes=minutes + 1)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    ranks = Ranks(chosen, rank, world, local_rank, local_world, meeting)
    _joined.append(ranks)
    try:
        yield ranks
    finally:
        _joined.remove(ranks)
        dist.destroy_process_group()


_joined: list[Ranks] = []


def job() -> Ranks | None:
    """The processes that this one has `joined`, and all of which do what it does; None where it is
    alone.
    """
    return _joined[-1] if _joined else None
