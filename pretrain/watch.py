"""What a run says while it works: lines or a bar for people, JSONL and TensorBoard for programs; and when to leave."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from vggfeat.files import write_text
from vggfeat.terminal import duration, live, rewrite, say

LINE_SECONDS = 10.0
LOG = "log.jsonl"


class Log:
    """What a stage tells: `log.jsonl` and TensorBoard events in its folder, lines or a live one on stderr.

    A line of the file is an event; `event` names it, `iteration` places it. Events of iterations that a resumed run
    repeats are dropped first, so that each happens once in the file. folder None: says and writes nothing, as all
    processes but the first do.
    """

    def __init__(self, folder: Path | None, name: str, iteration: int, stop_at: int) -> None:
        self.folder, self.name, self.start, self.stop_at = folder, name, iteration, stop_at
        self._began = self._shown = time.monotonic()
        self._live = live()
        if folder is None:
            return
        # imported here: it takes a second, and only the process that writes needs it
        from torch.utils.tensorboard import SummaryWriter

        path = folder / LOG
        kept = (
            [line for line in _lines(path) if json.loads(line)["iteration"] <= iteration] if iteration else []
        )
        write_text(path, "".join(kept))
        self._file = open(path, "a")  # noqa: SIM115 - closed in __exit__
        self._board = SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else None)

    def __call__(self, event: str, iteration: int, **values: Any) -> None:
        """Append one event."""
        if self.folder is None:
            return
        self._file.write(json.dumps({"event": event, "iteration": iteration, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{event}/{name}", value, iteration)

    def say(self, text: str) -> None:
        """A line about this stage."""
        if self.folder is not None:
            say(f"{self.name}: {text}")

    def progress(
        self, iteration: int, loss: float, rate: float, images_per_second: float, data_wait: float
    ) -> None:
        """Where the stage is: rewritten in place on a terminal, a line each ten seconds elsewhere."""
        now = time.monotonic()
        waits = not self._live and now - self._shown < LINE_SECONDS and iteration < self.stop_at
        if self.folder is None or waits:
            return
        self._shown = now
        left = (now - self._began) / max(iteration - self.start, 1) * (self.stop_at - iteration)
        text = (
            f"iteration {iteration}/{self.stop_at}, loss {loss:.4f}, learning rate {rate:g}, "
            f"{images_per_second:.0f} images/s, {100 * data_wait:.0f} % waiting for data, {duration(left)} left"
        )
        if self._live:
            rewrite(f"{self.name}: {text}")
        else:
            self.say(text)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.folder is not None:
            self._file.close()
            self._board.close()


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        with open(path) as file:
            yield from (line for line in file if line.endswith("\n"))  # a kill may have cut the last one


def events(path: Path) -> list[dict[str, Any]]:
    """All events of a log. Raises ValueError where a line is none."""
    return [json.loads(line) for line in _lines(path)]


class Stop:
    """Whether SIGTERM or Ctrl-C asked to leave; `signal` is its number, 0 until then."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:  # asked twice: at once
            os._exit(128 + number)
        self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, SIGTERM and Ctrl-C only set a flag, so that an iteration ends and is saved; twice leaves at once."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
