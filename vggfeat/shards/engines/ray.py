"""Ray's tasks, one a shard: placement, retries where a process or a node dies, and more nodes for
what waits, are Ray's. No image and no row goes through it: only the numbers of shards.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from vggfeat.errors import VggfeatError
from vggfeat.shards.engines.failed import ATTEMPTS, Failed
from vggfeat.shards.shard import Facts
from vggfeat.shards.worker import Work, attempt, loaded, tried

AT_ONCE = 64
"""Tasks that wait or run: what an autoscaler sees of the work."""
CONNECT = 5.0  # seconds
_HOST_AND_PORT = re.compile(r"(?:ray://)?([^/:]+):(\d+)")
OF_A_GPU, OF_A_CPU = (2, 8), (1, 1)
"""Cores that a task asks Ray for, and threads that it reads with: nodes have few cores or many, and
a task that asks for more than any has would wait for ever.
"""


def run(
    work: Work, todo: Iterable[int], at_once: int, address: str | None
) -> Iterator[Facts | Failed]:
    """Describe shards as tasks, so many of them given to Ray at once (0: AT_ONCE), each with a GPU
    where that is work's device; as they are done. address: of a cluster, as `ray.init` takes it;
    None: one that is started here, and ended.

    Raises VggfeatError where Ray isn't installed, or no cluster answers.
    """
    ray = _ray()
    # a worker's own processes look for an image that ends them; each counts as a shard's attempt
    gpus = int(work.device.startswith("cuda"))
    cpus, threads = OF_A_GPU if gpus else OF_A_CPU
    work = replace(work, device="cuda" if gpus else "cpu", threads=threads)
    task = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=2 * ATTEMPTS, max_calls=0)(_shard)
    started = _start(ray, address)
    at_once = at_once or AT_ONCE
    running: dict[Any, int] = {}
    waiting = iter(todo)
    try:
        while True:
            while len(running) < at_once and (k := next(waiting, None)) is not None:
                running[task.remote(asdict(work), k)] = k
            if not running:
                return
            (first,), _ = ray.wait(list(running), num_returns=1)
            k = running.pop(first)
            try:
                answer = ray.get(first)
            except ray.exceptions.RayError as error:
                yield Failed(k, str(error).strip().splitlines()[-1][:300], False)
                continue
            yield Failed(**answer) if "why" in answer else Facts(**answer)
    finally:
        if started:
            ray.shutdown()
        for left in running if not started else ():
            ray.cancel(left)  # by force, Ray now and then aborts this process, too


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise VggfeatError(
            f"`engine` ray needs Ray ({error}): pip install 'vggfeat[cloud,ray]'"
        ) from error
    return ray


def _start(ray: Any, address: str | None) -> bool:
    """Whether a Ray was started for this alone."""
    if ray.is_initialized():
        return False
    # on a shared node Ray's own 15 would leave it what others don't want
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # which aborts at SIGTERM
    what = "Ray can't be started here" if address is None else f"no Ray answers at {address}"
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None and (found := _HOST_AND_PORT.fullmatch(address)):
            # Ray itself would wait for minutes
            socket.create_connection((found[1], int(found[2])), CONNECT).close()
        ray.init(
            address=address or "local",  # else it joins whatever runs on this machine
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except SystemExit:  # of Ray's own handler
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise VggfeatError(f"{what} ({told})") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    return address is None


@lru_cache(1)
def _loaded(work: Work) -> Any:
    """The net stays in the process for its next shard."""
    return loaded(work)


def _shard(words: dict[str, Any], k: int) -> dict[str, Any]:
    """In Ray's process: a shard's facts, or why it failed. What ends the process is Ray's to
    tell.
    """
    work = Work(**words)
    try:
        place, plan, network = _loaded(work)
    except VggfeatError as error:
        return asdict(Failed(k, str(error), True))
    return asdict(tried(k, lambda: attempt(place, plan, network, k, work)))
