"""The processes that read images for training, beside each training process, as long as the run
lives. N images.

A reader is a fresh Python without PyTorch, not a fork: a fork of a process with threads (gloo's,
autograd's, PyTorch's pools) inherits locks that nobody will ever open. It knows nothing of the data
set; each request says what is read and how. Requests and batches lie in unnamed files in memory
(memfd), which need no /dev/shm; a pipe says which. Ctrl-C and SIGTERM pass a reader by: it ends
with its trainer, however that one ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pretrain.augment import SAMPLE, Place, augmented_crop, draw, kept_units, keyed, with_box
from pretrain.boxes import encoded
from vggfeat.datasets import Items
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import rescaled_crop

if TYPE_CHECKING:  # a reader does without: PyTorch takes two seconds and 600 MB
    import torch
    from torch import Tensor

    from pretrain.recipe import Recipe

AHEAD = 4  # batches that a reader is asked for before the first of them is used
WARN_SECONDS = 30.0  # between lines that say what is waited for
# on one image: longer than any storage that comes back needs, and no night is lost
LOST_SECONDS = 1800.0
Key = tuple[int, int]
"""(epoch, row of the items)."""
Source = Path | np.ndarray | bytes
NO_BOXES = np.zeros((0, 4))


class Batch(NamedTuple):
    """One process's part of a batch, n images. An unreadable image stays as a row of zeros that
    doesn't count.
    """

    crops_NHWC: Tensor
    """(n, crop, crop, 3) uint8 RGB."""
    alpha_N3: Tensor
    """(n, 3) float32: factors of the colour shift."""
    kept: Tensor
    """(n, bytes) uint8: bits of the units that dropout keeps, fc6's and fc7's."""
    labels: Tensor
    """(n,) int64."""
    counts: Tensor
    """(n,) float32: 1, or 0 for an unreadable image."""
    boxes: Tensor
    """(n, k, 4) float32, k = 0 where classes are learned. Of training samples, k = 1: what the net
    is to say. Of central crops: the image's own frame, then its true boxes, corners in pixels of
    the crop, filled up with NaN.
    """
    unreadable: list[tuple[str, str]]
    """(name, reason)."""


class Sample(NamedTuple):
    """One image of a batch."""

    crop: np.ndarray
    """(crop, crop, 3) uint8 RGB."""
    alpha: np.ndarray
    """(3,) float32."""
    kept: np.ndarray
    """(bytes,) uint8."""
    boxes: np.ndarray
    """(k, 4) float32, as of `Batch`."""
    reason: str
    """Why it can't be read, or ""."""


@dataclass(frozen=True)
class Samples:
    """Augmented training samples: uint8 crops, to be finished on the device."""

    seed: int
    stage: int
    """Its place in the chain, part of the key of a sample's random numbers."""
    train_scale: tuple[int, int]
    colour_std: float
    flip: bool
    dropout: float
    hidden_units: int
    """Of fc6 and fc7 together."""
    crop: int
    box_unit: float
    box_cover: float
    """See `Recipe`."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, stage_number: int, hidden_units: int) -> Samples:
        scale = recipe.stages[stage_number].train_scale
        return cls(
            recipe.seed,
            stage_number,
            scale,
            recipe.colour_std,
            recipe.flip,
            recipe.dropout,
            hidden_units,
            recipe.crop,
            recipe.box_unit,
            recipe.box_cover,
        )

    def read(self, source: Source, key: Key, corners_N4: np.ndarray = NO_BOXES) -> Sample:
        rng = keyed(self.seed, SAMPLE, self.stage, *key)
        augmentation = draw(rng, self.train_scale, self.colour_std, self.flip)
        kept = kept_units(rng, self.hidden_units, self.dropout)
        boxes_14 = np.zeros((min(1, len(corners_N4)), 4), np.float32)

        def cut(image_HWC: np.ndarray) -> np.ndarray:
            chosen = augmentation
            if len(corners_N4):
                shape = image_HWC.shape[:2]
                chosen, seen_4 = with_box(
                    rng, augmentation, corners_N4, shape, self.crop, self.box_cover
                )
                boxes_14[0] = encoded(seen_4, self.crop, self.box_unit)
            return augmented_crop(image_HWC, chosen, self.crop)

        crop, reason = _crop(source, self.crop, cut)
        return Sample(crop, np.array(augmentation.alpha, np.float32), kept, boxes_14, reason)


@dataclass(frozen=True)
class CentreCrops:
    """The central crop at smallest side Q: the held-out and validation checks."""

    Q: int
    crop: int

    def read(self, source: Source, key: Key, corners_N4: np.ndarray = NO_BOXES) -> Sample:
        boxes_M4 = np.full((len(corners_N4) + (len(corners_N4) > 0), 4), np.nan, np.float32)

        def centre(image_HWC: np.ndarray) -> np.ndarray:
            height, width = shape = image_HWC.shape[:2]
            place = Place.central(shape, self.Q, self.crop)
            if len(boxes_M4):
                frame_14 = np.array([[0.0, 0.0, width, height]])
                boxes_M4[:] = place.seen(np.concatenate([frame_14, corners_N4]))
            return rescaled_crop(image_HWC, self.Q, place.top, place.left, self.crop)

        crop, reason = _crop(source, self.crop, centre)
        return Sample(crop, np.zeros(3, np.float32), np.zeros(0, np.uint8), boxes_M4, reason)


def _crop(
    source: Source, side: int, cut: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, str]:
    """What is cut from an image; or black, and the reason why it can't be read."""
    try:
        return cut(read_rgb(source)), ""
    except UnreadableImage as error:
        return np.zeros((side, side, 3), np.uint8), str(error)


@dataclass(frozen=True)
class Request:
    """A part of a batch to read: the images, and how."""

    how: Samples | CentreCrops
    keys: list[Key]
    sources: list[Source]
    labels: list[int]
    corners: list[np.ndarray]
    """(k, 4) of each image: its true boxes; k = 0 where none are asked for."""

    def read(
        self, at: Callable[[int], None] = lambda i: None
    ) -> tuple[list[np.ndarray], list[tuple[int, str]]]:
        """The arrays of a Batch, and (position, reason) of its unreadable images. at: told each
        position before it.
        """
        samples = []
        every = zip(self.sources, self.keys, self.corners, strict=True)
        for i, (source, key, corners_N4) in enumerate(every):
            at(i)
            samples.append(self.how.read(source, key, corners_N4))
        crops, alpha, kept, boxes, reasons = zip(*samples, strict=True)
        most = max(map(len, boxes))
        filled = np.full((len(boxes), most, 4), np.nan, np.float32)
        for place, own in zip(filled, boxes, strict=True):
            place[: len(own)] = own
        counts = [0.0 if reason else 1.0 for reason in reasons]
        arrays = [
            np.stack(crops),
            np.stack(alpha),
            np.stack(kept),
            np.array(self.labels, np.int64),
            np.array(counts, np.float32),
            filled,
        ]
        return arrays, [(i, reason) for i, reason in enumerate(reasons) if reason]


# --- in the trainer -------------------------------------------------------------------------------


class ReadingFailed(VggfeatError):  # noqa: N818 - named as what happened
    """A process that reads images has ended, or is stuck."""


class Readers:
    """Processes that read images, for the time of a `with`; 0: this process reads, when a batch is
    asked for.

    device: where batches go; for a GPU they lie in memory that it can fetch by itself.
    """

    def __init__(self, workers: int, device: torch.device) -> None:
        self.workers, self.pinned = workers, device.type == "cuda"
        self.processes: list[_Reader] = []

    def __enter__(self) -> Readers:
        self.processes = [_Reader() for _ in range(self.workers)]
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self.processes:
            reader.end()
        self.processes = []

    def read(
        self,
        how: Samples | CentreCrops,
        items: Items,
        keys: Iterable[list[Key]],
        corners: Callable[[int], np.ndarray] = lambda row: NO_BOXES,
    ) -> Iterator[Batch]:
        """The Batches of lists of keys, in their order. corners: row -> its true boxes, (k, 4).

        Several such iterators may be open at a time, as that of the held-out images beside that of
        training. Raises ReadingFailed when a reader was killed, or one image took it
        `LOST_SECONDS`.
        """

        def request(part: list[Key]) -> Request:
            assert items.labels is not None
            rows = [row for _, row in part]
            return Request(
                how,
                part,
                [items.source(r) for r in rows],
                [int(items.labels[r]) for r in rows],
                [corners(r) for r in rows],
            )

        def named(part: list[Key], unreadable: list[tuple[int, str]]) -> list[tuple[str, str]]:
            return [(items.names[part[i][1]], reason) for i, reason in unreadable]

        if not self.processes:
            for part in keys:
                arrays, unreadable = request(part).read()
                yield _batch(self._tensors(arrays), named(part, unreadable))
            return
        asked: deque[tuple[_Reader, int, list[Key]]] = deque()
        turns = cycle(self.processes)
        room, left = AHEAD * len(self.processes), iter(keys)
        try:
            while True:
                for part in islice(left, room - len(asked)):
                    reader = next(turns)
                    asked.append((reader, reader.ask(request(part)), part))
                if not asked:
                    return
                reader, slot, part = asked[0]
                tensors, unreadable = reader.take(slot, self.pinned)
                asked.popleft()
                yield _batch(tensors, named(part, unreadable))
        finally:
            for reader, slot, _ in asked:
                reader.forget(slot)

    def _tensors(self, arrays: list[np.ndarray]) -> list[Tensor]:
        import torch

        tensors = [torch.from_numpy(array) for array in arrays]
        return [tensor.pin_memory() for tensor in tensors] if self.pinned else tensors


def _batch(tensors: list[Tensor], unreadable: list[tuple[str, str]]) -> Batch:
    crops, alpha, kept, labels, counts, boxes = tensors
    return Batch(crops, alpha, kept, labels, counts, boxes, unreadable)


# a bell says: slot, bytes of the request or of the answer's head; a place: slot, position in the
# request
BELL, PLACE = struct.Struct("qq"), struct.Struct("qq")
_START = "import sys; sys.path[:] = {path}; from pretrain.readers import serve; serve(*{numbers})"


class _Reader:
    """One of these processes, as its trainer sees it.

    A slot is an unnamed file in memory: a request is written there, and its batch in the same
    place. There are enough for two iterators, and one that isn't asked for is free. `place` is
    where the reader says which image it is at.
    """

    def __init__(self) -> None:
        slots = 2 * AHEAD
        self.slots: list[int] = []
        try:
            self.place = os.memfd_create("place of a reader")
            os.pwrite(self.place, PLACE.pack(-1, -1), 0)
            for _ in range(slots):
                self.slots.append(os.memfd_create("batch"))
            self.line, theirs = Pipe()
        except OSError as error:
            raise _cant_hand_over(error) from error
        self.free = list(range(slots))
        self.requests: dict[int, Request] = {}  # asked, not answered
        self.answers: dict[int, int] = {}  # answered, not taken: bytes of the answer's head
        self.forgotten: set[int] = set()  # asked, and nobody waits for the answer
        numbers = theirs.fileno(), self.place, self.slots, os.getpid()
        # A signal to the group, at any moment of its life, passes it by: it inherits this mask, and
        # keeps it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=ascii(sys.path), numbers=numbers)],
                stdin=subprocess.DEVNULL,
                pass_fds=[numbers[0], self.place, *self.slots],
                # one thread each: there are as many readers as cores
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise VggfeatError(
                f"can't start a process that reads images: {error}; give fewer `workers`"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def ask(self, request: Request) -> int:
        """Hand over a request; the slot where its answer will be."""
        while not self.free:
            self._hear()
        slot = self.free.pop()
        written = pickle.dumps(request)
        self.requests[slot] = request
        try:
            _write(self.slots[slot], written, 0)
        except OSError as error:
            raise _cant_hand_over(error) from error
        try:
            self.line.send_bytes(BELL.pack(slot, len(written)))
        except OSError as error:
            raise self._gone() from error
        return slot

    def take(self, slot: int, pinned: bool) -> tuple[list[Tensor], list[tuple[int, str]]]:
        """The answer, copied out of the slot, which is then free."""
        import torch

        while slot not in self.answers:
            self._hear()
        file, start = self.slots[slot], self.answers.pop(slot)
        head = bytearray(start)
        _read(file, memoryview(head), 0)
        failure, refused, arrays, unreadable = pickle.loads(head)
        tensors = []
        for name, shape in arrays:
            tensor = torch.empty(shape, dtype=getattr(torch, name), pin_memory=pinned)
            start += _read(file, tensor.view(-1).view(torch.uint8).numpy().data, start)
            tensors.append(tensor)
        self._clear(slot)
        if refused:
            raise _cant_hand_over(failure)
        if failure:
            error = RuntimeError(f"a process that reads images failed: {failure.splitlines()[-1]}")
            error.add_note(failure)
            raise error
        return tensors, unreadable

    def forget(self, slot: int) -> None:
        """Nobody waits for this answer any more."""
        if self.answers.pop(slot, None) is not None:
            self._clear(slot)
        elif slot in self.requests:
            self.forgotten.add(slot)

    def _clear(self, slot: int) -> None:
        os.ftruncate(self.slots[slot], 0)  # its memory is the system's again
        self.free.append(slot)

    def _hear(self) -> None:
        """Wait for an answer, whichever it is. Raises ReadingFailed."""
        waited = moved = said = time.monotonic()
        place = b""
        while not self.line.poll(1.0):
            now = time.monotonic()
            if place != (place := os.pread(self.place, PLACE.size, 0)):
                moved = now
            if now - moved >= LOST_SECONDS:
                raise ReadingFailed(
                    f"{self._doing()} for {(now - moved) / 60:.0f} minutes: is the storage still"
                    " there?"
                )
            if now - said >= WARN_SECONDS:
                said = now
                # here, as a reader has no use for it
                from vggfeat.terminal import say

                say(f"warning: waiting for images for {now - waited:.0f} s; {self._doing()}")
        try:
            slot, head = BELL.unpack(self.line.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._gone() from error
        del self.requests[slot]
        if slot in self.forgotten:
            self.forgotten.remove(slot)
            self._clear(slot)
        else:
            self.answers[slot] = head

    def _doing(self) -> str:
        slot, i = PLACE.unpack(os.pread(self.place, PLACE.size, 0))
        if slot not in self.requests:
            return f"process {self.process.pid} starts"
        return f"process {self.process.pid} reads {self.requests[slot].sources[i]}"

    def _gone(self) -> ReadingFailed:
        try:
            status = self.process.wait(5)
        except subprocess.TimeoutExpired:
            status = 0
        how = (
            f"was killed by signal {-status}, often because memory ran out"
            if status < 0
            else "has ended"
        )
        return ReadingFailed(f"a process that reads images {how}: give fewer `workers`")

    def end(self) -> None:
        """End the process at once: it has nothing to save."""
        self.process.kill()
        self.line.close()
        for file in (self.place, *self.slots):
            os.close(file)
        # on a share that doesn't answer, even a kill has to wait
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)


def _cant_hand_over(why: object) -> ReadingFailed:
    """For what the system refuses, to either side: memory for batches, descriptors."""
    return ReadingFailed(f"can't hand over images from other processes ({why}): give `workers` 0")


def _read(file: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer of bytes from a file's offset; its length."""
    done = 0
    while done < len(buffer):
        n = os.preadv(file, [buffer[done:]], offset + done)
        if n == 0:
            raise RuntimeError("a batch of images is shorter than it says")
        done += n
    return done


def _write(file: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of data to a file's offset; its length."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
    return done


# --- in the reader --------------------------------------------------------------------------------


def serve(line: int, place: int, slots: list[int], trainer: int) -> None:
    """Answer requests until the trainer has ended."""
    bell = Connection(line)

    def at(slot: int, i: int) -> None:
        if os.getppid() != trainer:
            sys.exit()
        os.pwrite(place, PLACE.pack(slot, i), 0)

    with suppress(EOFError, ConnectionError):  # the trainer has ended
        while True:
            slot, length = BELL.unpack(bell.recv_bytes())
            file = slots[slot]
            written = bytearray(length)
            _read(file, memoryview(written), 0)
            try:
                arrays, unreadable = pickle.loads(written).read(partial(at, slot))
                head = pickle.dumps(
                    ("", False, [(array.dtype.name, array.shape) for array in arrays], unreadable)
                )
                end = _write(file, head, 0)
                for array in arrays:
                    end += _write(file, array.reshape(-1).view(np.uint8).data, end)
            except Exception as error:  # the trainer tells it
                refused = isinstance(error, OSError | MemoryError)
                why = str(error) or type(error).__name__
                os.ftruncate(file, 0)
                head = pickle.dumps((why if refused else traceback.format_exc(), refused, [], []))
                _write(file, head, 0)
            bell.send_bytes(BELL.pack(slot, len(head)))
