"""What a run says while it works, to people (lines or a bar) and to programs (JSONL, TensorBoard);
and when it leaves: at a signal, or where its net learns nothing."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from vggfeat.errors import CantWrite, Interrupted, VggfeatError, reason
from vggfeat.files import whole
from vggfeat.machine import duration
from vggfeat.terminal import LINE_SECONDS, live, rewrite, say

if TYPE_CHECKING:  # it imports PyTorch, which the processes that read images do without
    from pretrain.checkpoint import State

AGAIN_SECONDS = 1.0  # a second Ctrl-C within it is the first one's echo
LOG = "log.jsonl"
# of a stage's net: where it goes on from, the best by held-out error, and the last
CHECKPOINT, BEST, WEIGHTS = "last.safetensors", "best.safetensors", "weights.safetensors"


class Log:
    """What a stage tells: `log.jsonl` and TensorBoard events in its folder, lines or a live one on
    stderr.

    A line of the file is an event; `event` names it, `iteration` places it. Events of iterations
    that a resumed run repeats are dropped first, so that each happens once in the file. A disk that
    refuses is a warning; what was to be written then is missing. folder None: says and writes
    nothing, as all processes but the first do.
    """

    def __init__(self, folder: Path | None, name: str, iteration: int, stop_at: int) -> None:
        self.folder, self.name, self.start, self.stop_at = folder, name, iteration, stop_at
        self._began = self._shown = time.monotonic()
        self._live = live()
        self._writers = (
            [] if folder is None else [_Lines(folder / LOG, iteration), _Board(folder, iteration)]
        )
        self._refused: set[_Records] = set()

    def __call__(self, event: str, iteration: int, **values: Any) -> None:
        """Append one event."""
        for writer in self._writers:
            try:
                writer.add(event, iteration, values)
            except (OSError, VggfeatError) as error:
                if writer not in self._refused:
                    self._refused.add(writer)
                    self.say(f"warning: {cant_write(writer.path, error)}; training goes on")

    def say(self, text: str) -> None:
        """A line about this stage."""
        if self.folder is not None:
            say(f"{self.name}: {text}")

    def leave_out(self, seconds: float) -> None:
        """Seconds that don't come again: the time that is left isn't reckoned by them."""
        self._began += seconds

    def progress(
        self,
        iteration: int,
        loss: float,
        rate: float,
        images_per_second: float,
        matrix_share: float | None,
        data_wait: float,
    ) -> None:
        """Where the stage is: rewritten in place on a terminal, a line each ten seconds
        elsewhere. matrix_share: of a matrix product's rate; None: not known.
        """
        now = time.monotonic()
        waits = not self._live and now - self._shown < LINE_SECONDS and iteration < self.stop_at
        if self.folder is None or waits:
            return
        self._shown = now
        left = (now - self._began) / max(iteration - self.start, 1) * (self.stop_at - iteration)
        speed = f"{images_per_second:.0f} images/s"
        if matrix_share is not None:
            speed += f", {100 * matrix_share:.0f} % of the matrix rate"
        text = (
            f"iteration {iteration}/{self.stop_at}, loss {loss:.4f}, learning rate {rate:g},"
            f" {speed}, {100 * data_wait:.0f} % waiting for data, {duration(left)} left"
        )
        if self._live:
            rewrite(f"{self.name}: {text}")
        else:
            self.say(text)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.close()


class _Records(ABC):
    """A file that grows record by record; of one that the disk refuses, nothing stays."""

    def __init__(self, path: Path, iteration: int) -> None:
        self.path, self.iteration = path, iteration
        self._file: int | None = None

    @abstractmethod
    def begin(self) -> int:
        """Bring the file to where `iteration` is, and open it; tried again with each event until it
        succeeds.
        """

    @abstractmethod
    def records(self, event: str, iteration: int, values: Mapping[str, Any]) -> Iterator[bytes]:
        """An event's records."""

    def add(self, event: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Append an event. Raises OSError or VggfeatError."""
        if self._file is None:
            self._file = self.begin()
        for record in self.records(event, iteration, values):
            _append(self._file, record)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Lines(_Records):
    def begin(self) -> int:
        kept: list[dict[str, Any]] = []
        if self.iteration:
            kept, dropped = events(self.path)
            if dropped:
                say(
                    f"warning: {self.path}: {dropped} lines are no events of a stage and are"
                    " dropped"
                )
        # a stage that goes on is not finished: what was said of its end is said again
        kept = [e for e in kept if e["iteration"] <= self.iteration and e["event"] != "val"]
        with whole(self.path) as partial:  # not into a pipe, whose reader may never come
            partial.write_text("".join(map(_line, kept)))
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def records(self, event: str, iteration: int, values: Mapping[str, Any]) -> Iterator[bytes]:
        yield _line({"event": event, "iteration": iteration, **values}).encode()


class _Board(_Records):
    """TensorBoard's file, by its record writer; not by its thread, which prints a traceback when a
    disk is full.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(folder / name, iteration)

    def begin(self) -> int:
        # imported here, as only the process that writes needs it
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        file = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
        )
        try:
            _append(file, _framed(Event(wall_time=time.time(), file_version="brain.Event:2")))
            if self.iteration:  # what an earlier file has after this is repeated
                start = SessionLog(status=SessionLog.START)
                _append(
                    file,
                    _framed(
                        Event(wall_time=time.time(), step=self.iteration + 1, session_log=start)
                    ),
                )
        except OSError:
            os.close(file)
            self.path.unlink(missing_ok=True)
            raise
        return file

    def records(self, event: str, iteration: int, values: Mapping[str, Any]) -> Iterator[bytes]:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [
            Summary.Value(tag=f"{event}/{name}", simple_value=value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if scalars:
            yield _framed(
                Event(wall_time=time.time(), step=iteration, summary=Summary(value=scalars))
            )


def _framed(event: Any) -> bytes:
    """An event as TensorBoard's files have it: with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def _append(file: int, record: bytes) -> None:
    end = os.fstat(file).st_size
    try:
        while record:
            record = record[os.write(file, record) :]
    except OSError:
        os.ftruncate(file, end)
        raise


def cant_write(path: Path, error: Exception) -> str:
    """That a file couldn't be written, and why; `files` says both itself."""
    return str(error) if isinstance(error, CantWrite) else f"can't write {path}: {reason(error)}"


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event) + "\n"


def events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All events of a log, and how many lines are none: cut off, damaged, or something else's.
    Raises OSError.

    An event is a JSON object with a name, `event`, and an `iteration`; `time` and what `NUMBERS`
    names are numbers, or not there.
    """
    if not path.exists():
        return [], 0
    if not path.is_file():
        raise OSError("it is no file")
    found, dropped = [], 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # a kill has cut it
            event = _event(line)
            if event is None:
                dropped += 1
            else:
                found.append(event)
    return found, dropped


NUMBERS = (
    "time",
    "epoch",
    "loss",
    "learning_rate",
    "images_per_second",
    "matrix_share",
    "data_wait",
    "seconds",
    "top1_error",
    "top5_error",
    "localisation_error",
    "images",
)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    iteration = event.get("iteration")
    if type(iteration) is not int or not 0 <= iteration <= 2**53:
        return None
    if any(event.get(name) is not None and not is_number(event[name]) for name in NUMBERS):
        return None
    return event


def is_number(value: Any) -> bool:
    """Whether a JSON value is one that a float can hold."""
    return type(value) in (int, float) and (type(value) is float or abs(value) <= 2**53)


# of chance's loss: from here on a mean loss is that of a net that has learned nothing
NO_BETTER = 0.98
# images: where dropout makes single losses differ by 40 %, the mean of so many is known to 1 %
ENOUGH = 2000


@dataclass(frozen=True)
class Chance:
    """What the best constant guess comes to: the same scores for every image. A net that is no
    better knows nothing.

    loss: the entropy of the training images' classes, ln K for K classes of one size. error: top-1,
    per cent, of naming the most frequent class for each held-out image; spread: the standard
    deviation of guessing at that error. Both are NaN without held-out images.
    """

    loss: float
    error: float
    spread: float

    @classmethod
    def of_labels(cls, train: np.ndarray, held_out: np.ndarray) -> Chance:
        """train, held_out: a label an image."""
        shares = np.unique(train, return_counts=True)[1] / len(train)
        loss = float(-(shares * np.log(shares)).sum())
        if not len(held_out):
            return cls(loss, math.nan, math.nan)
        most = int(np.unique(held_out, return_counts=True)[1].max())
        error = 100 * (1 - most / len(held_out))
        return cls(loss, error, math.sqrt(error * (100 - error) / len(held_out)))

    def count(
        self, state: State, loss: float, iterations: int, limit: int, batch_size: int
    ) -> None:
        """Take in the mean loss of the last iterations: how long the stage has been at chance.

        It is while the mean over a twentieth of the limit, and over `ENOUGH` images, is chance's.
        """
        window = min(state.iteration, max(limit // 20, ENOUGH // batch_size))
        weight = min(1.0, iterations / max(1, window))
        state.mean_loss += weight * (loss - state.mean_loss)
        state.at_chance = (
            state.at_chance + iterations if state.mean_loss > NO_BETTER * self.loss else 0
        )

    def surely_beaten(self, top1: float) -> bool:
        """Whether a held-out top-1 error is lower by more than luck: three deviations."""
        return self.error - top1 > 3 * self.spread

    def tells(self) -> bool:
        """Whether the held-out images are enough that a faultless net would be seen."""
        return self.surely_beaten(0.0)


class Stop:
    """Whether SIGTERM or Ctrl-C asked to leave; `signal` is its number, 0 until then.

    While there is something to save it is only noted, and who saves looks here; elsewhere it is a
    KeyboardInterrupt. alone: this is the job's only process.
    """

    def __init__(self, alone: bool) -> None:
        self.signal = 0
        self._alone, self._saving, self._asked = alone, False, 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, a signal is only noted."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal:
            # A scheduler, torchrun and a terminal may each send theirs, to the same end. Only
            # somebody who sees nothing happen and types Ctrl-C again wants to leave at once; under
            # torchrun it does that itself after a while.
            if self._alone and number == signal.SIGINT and now - self._asked > AGAIN_SECONDS:
                os._exit(128 + number)
            return
        self.signal, self._asked = number, now
        if not self._saving:
            raise KeyboardInterrupt(number)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, SIGTERM and Ctrl-C end the run well; see `Stop`. Raises Interrupted where nothing was
    to be saved.
    """
    stop = Stop(alone=os.environ.get("WORLD_SIZE", "1") == "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # what nohup or a shell's `&` has switched off stays so
    before = {
        signum: handler for signum, handler in handlers.items() if handler is not signal.SIG_IGN
    }
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield stop
    except KeyboardInterrupt as error:
        number = stop.signal or signal.SIGINT
        raise Interrupted(
            "stopped; what is finished is kept, and the same command goes on", number
        ) from error
    finally:
        if not stop.signal:  # otherwise its twin may be on its way
            for signum, handler in before.items():
                signal.signal(signum, handler)
