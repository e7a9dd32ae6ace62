"""The processes that do one job together: who this one is, and the few words they exchange (gradients are not here).

torchrun starts them and says so in the environment; without it there is one process, and nothing is exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vggfeat.errors import VggfeatError
from vggfeat.weights import resolve_device


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This process's part of start..stop: contiguous, the parts differ by one at most."""
        n = stop - start
        return start + n * self.rank // self.world, start + n * (self.rank + 1) // self.world

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64; exact for integers below 2^53."""
        if self.world == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU, through gloo: never waits for a GPU
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise VggfeatError(
                f"another process of this job has ended ({' '.join(str(error).split())[:80]})"
            ) from error
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks, in every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def collect(self, part: np.ndarray, axis: int) -> np.ndarray:
        """In the first process all processes' parts, one after another along axis; in the others their own."""
        if self.world == 1:
            return part
        parts: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(part, parts, dst=0)
        return part if parts is None else np.concatenate(parts, axis)

    def same(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum([0.0])


@contextmanager
def joined(device: str, minutes: float = 30) -> Iterator[Ranks]:
    """Join the processes that torchrun started, each on a GPU of its own; leave them afterwards.

    device: "auto", "cpu" or "cuda". minutes: how long one waits for another. Raises VggfeatError when a process has no
    GPU.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(resolve_device(device))
        return
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        if local_world > torch.cuda.device_count():
            raise VggfeatError(
                f"{local_world} processes on this machine and {torch.cuda.device_count()} GPUs: "
                "start one process per GPU, or give --device cpu"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    # Small words go through gloo on the CPU, gradients through NCCL where there are GPUs.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield Ranks(chosen, int(os.environ["RANK"]), world, local_rank, local_world)
    finally:
        dist.destroy_process_group()
