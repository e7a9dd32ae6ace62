"""Items -> feature file: a data set's images are described, and what can't be read is told.

What is described is in the file ten seconds later (`writer`), and isn't described again after a
kill.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vggfeat.batches import by_shape, work_shares
from vggfeat.datasets import Items
from vggfeat.decode import expected_shape, read_rgb, upright_shape
from vggfeat.describe import describe, description_of
from vggfeat.errors import Interrupted, UnreachableImage, UnreadableImage, VggfeatError
from vggfeat.look import MISSING, Cheaper, foreword, look, none_readable
from vggfeat.machine import duration
from vggfeat.ranks import Ranks
from vggfeat.regions import Views, cut, cut_shape, regions_of, views_of
from vggfeat.store import Description
from vggfeat.versions import versions
from vggfeat.weights import Network
from vggfeat.writer import FeatureWriter, is_finished

ADVICE_SECONDS, ADVICE_SHARE = 10.0, 0.01
"""Of the work, after which an extraction that is long tells how long."""


@dataclass(frozen=True)
class Report:
    """What an extraction did, in how many seconds, with those of earlier runs into the same file.

    earlier: images that were there before this run. run_seconds, rate: of this run, in images a
    second. unreadable: name -> reason, in the order of the rows.
    """

    images: int
    seconds: float
    unreadable: dict[str, str]
    earlier: int
    run_seconds: float
    rate: float


def extract(
    items: Items,
    network: Network,
    out: str | Path,
    *,
    scales: Sequence[int] | None = None,
    layer: str | list[str] | tuple[str, ...] | None = None,
    mirror: bool = True,
    regions: str | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    store: str = "float32",
    overwrite: bool = False,
    retry: bool = False,
    command: str = "",
    ranks: Ranks | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Describe every item and write the feature file `out` (docs/formats.md), or go on with
    `out`.partial.

    An extraction that ends early, by whatever, leaves `out`.partial; the same call goes on from
    there. An unreadable image is no error, but a row of the Report; it is tried again by a call
    that goes on, and by one with retry where the file is finished. If no image can be read, or
    their disk or share goes away meanwhile, that is an error, and nothing is finished.
    layer: one, or several, which one pass of the net describes; whoever opens the file chooses.
    regions: image, box or image,box, of items that have boxes; None: see `regions_of`.
    ranks: of the processes that share the work; all of them call this, each gets the same Report.
    progress: called with (work done in images, images in all). say: what is about to be done, what
    happens on the way, in a sentence.
    Raises VggfeatError: see `look`, `description_of`, `FeatureWriter`; Interrupted for Ctrl-C.
    """
    ranks = ranks or Ranks(network.device)
    description = description_of(network, layer, scales, mirror, regions_of(items, regions))
    views = views_of(items, description.regions)
    seen = look(views.items)
    facts = {
        "weights_metadata": {k: v for k, v in sorted(network.metadata.items()) if k != "classes"},
        "versions": versions(),
        "command": command,
    }
    dims = tuple(map(network.dim, description.layers))
    make = partial(
        FeatureWriter.open,
        out,
        items,
        description,
        dims,
        store,
        facts,
        overwrite=overwrite,
        retry=retry,
        say=say,
    )
    with _writer(ranks, make, partial(FeatureWriter.join, out, say)) as writer:
        try:
            there, before = int(writer.described.all(1).sum()), writer.seconds
            done_VQ = views.done(writer.described)
            advance = _Advance(done_VQ, description, writer, ranks, progress, say)
            if ranks.first:
                for line in items.remarks:
                    say(line)
                for what, words in foreword(items, seen, network, description, layer, scales):
                    say(f"{what}: {words}")
                if advance.earlier:
                    say(f"going on: {writer.kept()}; {len(items) - there:,} are left")
            left = np.flatnonzero(~done_VQ.all(1))
            # a row is written by one process: all views of an image are
            its_images = np.unique(views.file_V[left])[ranks.rank :: ranks.world]
            mine = left[np.isin(views.file_V[left], its_images)]
            ranks.barrier()  # all have seen the same file; from here on it changes
            reader = Reader(views, seen.shapes, ranks.world)
            failed = set[int]()

            def read(v: int) -> np.ndarray:
                writer.note_source(int(views.file_V[v]), views.items.source(v))
                return reader(v)

            advance(0)
            with _Behind() as behind:
                for i, column, result in described(
                    views,
                    network,
                    description,
                    mine.tolist(),
                    read,
                    done=done_VQ,
                    batch_size=batch_size,
                    workers=workers,
                    advance=advance,
                    say=say,
                ):
                    if isinstance(result, UnreadableImage):
                        failed.add(i)  # for whatever else is known of it
                        behind(writer.fail, i, str(result))
                    elif i not in failed:
                        behind(writer.write, i, column, result)
            writer.flush()
            ranks.barrier()
            unreadable = {items.names[i]: why for i, why in sorted(writer.unreadable.items())}
            seconds = writer.seconds
            ranks.barrier()  # all have read it; now it may get its name
            if len(unreadable) == len(items):
                raise VggfeatError(none_readable(len(items), items, unreadable))
            if ranks.first:
                writer.finish()
        except (KeyboardInterrupt, VggfeatError) as error:
            with suppress(VggfeatError):  # a disk that failed fails again
                writer.flush()
            kept = (
                f"; {writer.kept()}, and the same command goes on from there"
                if writer.kept()
                else ""
            )
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"interrupted{kept}", *(error.args or [signal.SIGINT])) from error
            raise VggfeatError(f"{error}{kept}") from error
    rate = len(items) * (1 - advance.earlier / len(views)) / max(seconds - before, 1e-9)
    return Report(len(items), seconds, unreadable, there, seconds - before, rate)


def is_of(
    path: str | Path,
    items: Items,
    network: Network,
    *,
    scales: Sequence[int] | None = None,
    layer: str | list[str] | tuple[str, ...] | None = None,
    mirror: bool = True,
    regions: str | None = None,
    store: str = "float32",
) -> bool:
    """Whether `extract`, asked for this, would make the finished file that is at path: of the same
    images, as far as their files' sizes and times tell, weights, options and versions.
    """
    description = description_of(network, layer, scales, mirror, regions_of(items, regions))
    dims = tuple(map(network.dim, description.layers))
    return is_finished(Path(path), items, description, dims, store, {"versions": versions()})


def described(
    views: Views,
    network: Network,
    description: Description,
    todo: Sequence[int],
    read: Callable[[int], np.ndarray],
    *,
    done: np.ndarray | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    advance: Callable[[float], None] = lambda images: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, int, np.ndarray | UnreadableImage]]:
    """(row, column, descriptor (D,) or why there is none) of each item of some views, as it comes;
    an unreadable view is there at one of its columns at least.

    todo: the views. read: the pixels of one. done: (V, Q), what isn't described again.
    """
    rows_of = views.rows()
    compute = partial(describe, network, layer=description.layers, mirror=description.mirror)
    for v, s, result in by_shape(
        read,
        partial(_expected_shape, views),
        todo,
        description.scales,
        compute,
        network.device,
        filter=description.filter,
        done=done,
        batch_size=batch_size,
        workers=workers,
        advance=advance,
        say=say,
    ):
        column = int(views.region_V[v]) * len(description.scales) + s
        for i in rows_of(v):
            yield i, column, result


def _expected_shape(views: Views, v: int) -> tuple[int, int] | None:
    """A hint; see `decode.expected_shape`."""
    shape = expected_shape(views.items.source(v))
    if shape is None:
        return None
    with suppress(UnreadableImage):  # who reads it will say what it is
        return cut_shape(shape, views.items, v)
    return None


class _Behind:
    """Makes calls one after the other in a thread of their own, so that a disk never holds up the
    device; where MOST of them wait, who makes them does, too.

    Leaving the `with` block, by whatever, waits until all are made: what was computed is not lost.
    After one that failed no other is made; it is told by the next call, or in the end.
    """

    MOST = 4096

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._calls: deque[Future[None]] = deque()
        self._failed = False

    def __call__(self, function: Callable[..., None], *values: Any) -> None:
        self._calls.append(self._pool.submit(self._make, function, values))
        while self._calls and (self._calls[0].done() or len(self._calls) > self.MOST):
            self._calls.popleft().result()

    def _make(self, function: Callable[..., None], values: tuple[Any, ...]) -> None:
        if not self._failed:
            self._failed = True  # unless it comes back
            function(*values)
            self._failed = False

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *raised: object) -> None:
        interrupted: KeyboardInterrupt | None = None
        last: Future[None] | None = None  # they are made in turn
        while last is None or not last.done():
            try:  # a join of the thread that is interrupted once would count as done
                last = last or self._pool.submit(lambda: None)
                wait([last])
            except KeyboardInterrupt as error:
                interrupted = error
        self._pool.shutdown()
        if interrupted is not None:
            raise interrupted
        if raised[0] is None:
            for call in self._calls:
                call.result()


class _Advance:
    """Counts the work that all processes have done, in images (or views, see `regions`); and
    advises, once, where it will take long. earlier: what was done when it began.
    """

    def __init__(
        self,
        done_VQ: np.ndarray,
        description: Description,
        writer: FeatureWriter,
        ranks: Ranks,
        progress: Callable[[float, int], None],
        say: Callable[[str], None],
    ) -> None:
        self._description, self._writer, self._world = description, writer, ranks.world
        self._progress, self._say = progress, say
        self._images, self._before = len(done_VQ), writer.seconds
        self.earlier = float((done_VQ @ work_shares(description.scales)).sum())
        self._work = self.earlier
        self._advised = not ranks.first

    def __call__(self, images: float) -> None:
        """So much more work is done by this process; the others are about as far."""
        self._work += images * self._world
        self._progress(min(self._work, self._images), self._images)
        seconds, done = self._writer.seconds - self._before, self._work - self.earlier
        enough = done > ADVICE_SHARE * self._images or seconds > 6 * ADVICE_SECONDS
        if not self._advised and seconds > ADVICE_SECONDS and enough and done > 0:
            self._advised = True
            self._advise(seconds / done)

    def _advise(self, seconds: float) -> None:
        """seconds: of an image."""
        left = seconds * (self._images - self._work)
        cheaper = Cheaper.than(self._description)
        if cheaper.worth_saying(left, all_images := cheaper.share * seconds * self._images):
            self._say(
                f"this will take about {duration(left)} more; with {cheaper.options}"
                f" all images would take about {duration(all_images)}"
            )


class Reader:
    """Reads images, and tells one that is missing from a disk or share that has gone away."""

    def __init__(self, views: Views, seen: Iterable[int] = (), step: int = 1) -> None:
        """seen: views that could be read. step: this process reads every so many-th image."""
        self._items, self._file, self._step = views.items, views.file_V, step
        self._missing: set[int] = set()
        # One that could be read, of each folder and of all: part of a data set may lie on a share
        # of its own.
        self._good: dict[Path | None, Path] = {}
        for i in seen:
            self._note(self._items.source(i))

    def _note(self, source: Path | np.ndarray | bytes) -> None:
        if isinstance(source, Path):
            self._good[source.parent] = self._good[None] = source

    def __call__(self, i: int) -> np.ndarray:
        """View i. Raises UnreadableImage; VggfeatError if one that was read before can't be opened
        any more, either, or if none in a long run of rows can.

        That one's row and those after it are to be described later, not to be marked as unreadable.
        """
        source = self._items.source(i)
        try:
            image_HWC = read_rgb(source)
        except UnreachableImage as error:
            before = (
                self._good.get(source.parent, self._good.get(None))
                if isinstance(source, Path)
                else None
            )
            if before is not None:
                try:
                    upright_shape(before)
                except UnreachableImage:
                    raise VggfeatError(
                        f"the images in {before.parent} can't be read any more ({error}): bring"
                        " back the disk or share that they are on"
                    ) from error
                except UnreadableImage:
                    pass  # it is within reach
            self._missing.add(int(self._file[i]))
            self._refuse_run(int(self._file[i]), error)
            raise
        self._note(source)
        return cut(image_HWC, self._items, i)

    def _refuse_run(self, image: int, error: UnreachableImage) -> None:
        """Raise VggfeatError where MISSING images around this one, and nothing between them, can't
        be opened.
        """
        first = last = image
        while first - self._step in self._missing and last - first < MISSING:
            first -= self._step
        while last + self._step in self._missing and last - first < MISSING:
            last += self._step
        if last - first + self._step >= MISSING:
            paths = self._items.files or self._items.names
            one, other = (paths[v] for v in np.searchsorted(self._file, (first, last)))
            ends = f"{self._items.root / one} to {other}"
            raise VggfeatError(
                f"no image from {ends} can be opened ({error}): bring back the disk or share that"
                " they are on, or take them off the list"
            ) from error


def _writer(
    ranks: Ranks, make: Callable[[], FeatureWriter], join: Callable[[], FeatureWriter]
) -> FeatureWriter:
    """The file, made or opened by the first process, then shared with the others."""
    if ranks.world == 1:
        return make()
    writer, refusal = None, None
    if ranks.first:
        try:
            writer = make()
            writer.share()
        except VggfeatError as error:
            refusal = error
    if ranks.same(refusal is not None):
        raise refusal or VggfeatError("the first process could not open the file")
    return writer or join()
