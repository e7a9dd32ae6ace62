"""Worker processes of this machine, each with a net of its own, a shard at a time."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vggfeat.errors import reason
from vggfeat.shards.engines.failed import ATTEMPTS, Failed
from vggfeat.shards.shard import Facts
from vggfeat.shards.worker import Work

MOST_DEATHS = 2 * ATTEMPTS
"""Of the processes of one shard, whose images were looked at one by one meanwhile."""


def run(work: Work, todo: Iterable[int], devices: list[str]) -> Iterator[Facts | Failed]:
    """Describe shards, each device by a process; as they are done. A process that dies is started
    again, and so is its shard. Closing the iterator ends the processes.
    """
    waiting = _Waiting(todo)
    done: queue.SimpleQueue[Facts | Failed | None] = queue.SimpleQueue()
    deaths: Counter[int] = Counter()
    workers = [_Worker(replace(work, device=device), waiting, done, deaths) for device in devices]
    try:
        for worker in workers:
            worker.start()
        left = len(workers)
        while left:
            result = done.get()
            if result is None:
                left -= 1
            else:
                yield result
    finally:
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.join()


class _Waiting:
    """Shards that are to be described: those that were given back, then one after the other of the
    rest, asked for when it is due.
    """

    def __init__(self, todo: Iterable[int]) -> None:
        self._todo, self._again, self._lock = iter(todo), deque[int](), threading.Lock()

    def next(self) -> int | None:
        with self._lock:
            return self._again.popleft() if self._again else next(self._todo, None)

    def put_back(self, k: int) -> None:
        with self._lock:
            self._again.append(k)


class _Worker(threading.Thread):
    """Asks a process for one shard after another."""

    def __init__(
        self,
        work: Work,
        waiting: _Waiting,
        done: queue.SimpleQueue[Facts | Failed | None],
        deaths: Counter[int],
    ) -> None:
        super().__init__(name="shards", daemon=True)
        self._work, self._waiting, self._done, self._deaths = work, waiting, done, deaths
        self._process: subprocess.Popen[bytes] | None = None
        self._ended, self._lock = False, threading.Lock()

    def run(self) -> None:
        try:
            while not self._ended:
                k = self._waiting.next()
                if k is None or not self._described(k):
                    return
        finally:
            self.end()
            self._let_go()
            self._done.put(None)

    def _described(self, k: int) -> bool:
        """Whether the process may be asked again."""
        answer = self._ask(k)
        if self._ended:
            return False
        if answer is None:
            self._deaths[k] += 1
            if self._deaths[k] < MOST_DEATHS:
                self._waiting.put_back(k)
            else:
                what = f"{MOST_DEATHS} processes ended in it, and no image of it by itself does"
                self._done.put(Failed(k, what, False))
            return True
        self._done.put(answer)
        return not (isinstance(answer, Failed) and answer.refused)

    def _ask(self, k: int) -> Facts | Failed | None:
        """What comes of a shard; None where the process has ended instead."""
        if self._process is None or self._process.poll() is not None:
            with self._lock:
                if self._ended:
                    return None
                self._let_go()
                try:
                    self._process = subprocess.Popen(
                        self._work.words(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
                    )
                except OSError as error:
                    return Failed(k, f"can't start a worker process: {reason(error)}", True)
            first = self._line()
            if first is None and self._process.returncode > 0:
                what = (
                    f"a worker process can't start, it ends with status {self._process.returncode}"
                )
                return Failed(k, f"{what}: what it wrote stands above", True)
            if first != "ready":
                return None if first is None else Failed(k, first["why"], first["refused"])
        assert self._process.stdin is not None
        with suppress(OSError):  # it has just died
            self._process.stdin.write(b"%d\n" % k)
            self._process.stdin.flush()
        answer = self._line()
        if answer is None:
            return None
        return Failed(**answer) if "why" in answer else Facts(**answer)

    def _line(self) -> Any:
        """What the process says next; None where it has ended instead."""
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._process.wait()
            return None
        return json.loads(line)

    def end(self) -> None:
        """Let the process go: it has been asked for nothing, or for what another can do."""
        with self._lock:  # a process is started before, or not at all
            self._ended = True
            if self._process is not None:
                self._process.kill()  # its thread sees that, and closes the pipes

    def _let_go(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
