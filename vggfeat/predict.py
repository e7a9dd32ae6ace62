"""Images in files, folders and lists, or feature files -> what a saved classifier says of each, a
row each in their order; and these rows in a file.

N rows, K classes. Memory holds the names of all rows, and the scores of CHUNK of them. Rows that go
to a file are kept in `OUT.partial` as they come (docs/formats.md): a run that was killed goes on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fcntl import LOCK_EX
from functools import partial
from itertools import islice
from pathlib import Path
from signal import SIGINT
from typing import Any, BinaryIO

import numpy as np

from vggfeat import parquet
from vggfeat.checked import regular, shown
from vggfeat.classify import refuse_other_rows
from vggfeat.datasets import csv_file
from vggfeat.datasets.folder import IMAGE_EXTENSIONS, images_under
from vggfeat.datasets.items import name_digest
from vggfeat.describe import gathered, refuse_counts
from vggfeat.descriptors import Descriptors
from vggfeat.errors import CantWrite, Interrupted, VggfeatError, reason
from vggfeat.features import open_features
from vggfeat.files import whole
from vggfeat.hdf5 import format_of
from vggfeat.machine import CORES
from vggfeat.model import Model
from vggfeat.notebook import Displayed
from vggfeat.place import is_url
from vggfeat.results import in_percent
from vggfeat.store import Description, Features, differences
from vggfeat.weights import Network
from vggfeat.writer import behind_link, locked, partial_of

CHUNK = 1024  # rows that are scored, and kept, together
FORMAT = "vggfeat-predictions"
COLUMNS = ("image", "class", "score", "probability", "margin", "error")
FIRST = 20  # unreadable images whose reasons are told

Given = str | os.PathLike[str]
Record = dict[str, Any]
"""A row as a line of JSON has it."""


# --- what is scored -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """N rows to score.

    names: paths of images as they can be opened from here; of feature files, the rows' own. labels:
    (N,) numbers of the model's classes, -1 unknown; None where nothing tells them. files: the
    features, one file a net; none for images. remarks: sentences, of what was left out.
    """

    names: Sequence[str]
    labels: np.ndarray | None
    files: tuple[Features, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> Iterator[Path]:
        """The files that are read for the rows."""
        return map(Path, (str(file.path) for file in self.files) if self.files else self.names)

    @property
    def digest(self) -> str:
        """sha256 of what the rows are."""
        rows = (file.rows_digest for file in self.files)
        return hashlib.sha256("".join([name_digest(self.names), *rows]).encode()).hexdigest()


def source_of(given: Given | Iterable[Given], model: Model) -> Source:
    """What is given to a model, one thing or several, one after the other: images; folders, with
    all that is in them; .csv files as `datasets.csv_file` reads them, labels or not; .txt files
    with a name a line, "-" for such lines on stdin. Names are relative to the folder of their list.
    Or feature files and sets of shards, one for each of the model's nets, in its order.

    Labels, where the model has one class an image, are those of a CSV or feature file, or the
    folders that images lie in: the nearest that is called like a class.
    Raises VggfeatError for what can't be read; for features that were described otherwise than
    those that the model learned from.
    """
    texts, readers = _readers(given)
    if None not in readers:
        model.refuse_images()
        return images_of(texts, () if model.multi_label else model.classes)
    if others := [text for text, reader in zip(texts, readers, strict=True) if reader]:
        raise VggfeatError(
            f"{texts[readers.index(None)]} has descriptors, and {others[0]} is of images: give"
            " one kind at a time"
        )
    return _described(texts, model)


def images_of(given: Given | Iterable[Given], classes: Sequence[str]) -> Source:
    """The images that are given, as of `source_of`, with their labels where they are one of these
    classes. Raises VggfeatError also for feature files.
    """
    texts, readers = _readers(given)
    names: list[str] = []
    labels: list[np.ndarray] = []
    remarks: tuple[str, ...] = ()
    number = {name: k for k, name in enumerate(classes)}
    for text, reader in zip(texts, readers, strict=True):
        if reader is None:
            raise VggfeatError(f"{text} has descriptors, which have no places: give the images")
        its_names, its_labels, told = reader(text, number)
        names += its_names
        labels.append(np.full(len(its_names), -1) if its_labels is None else its_labels)
        remarks += told
    label_N = np.concatenate(labels)
    return Source(names, label_N if (label_N >= 0).any() else None, remarks=remarks)


def _readers(given: Given | Iterable[Given]) -> tuple[list[str], list[_Reader | None]]:
    """What is given, each with what reads it."""
    places = [given] if isinstance(given, str | os.PathLike) else list(given)
    if not places or not all(isinstance(place, str | os.PathLike) for place in places):
        raise VggfeatError("give the paths of images, folders, lists or feature files")
    texts = [os.fspath(place) for place in places]
    return texts, [reader_of(text) for text in texts]


_Listed = tuple[list[str], np.ndarray | None, tuple[str, ...]]
_Reader = Callable[[str, dict[str, int]], _Listed]


def reader_of(text: str) -> _Reader | None:
    """What reads images, a folder or a list of them, given the place of each class that is known,
    to their paths, labels and remarks; None for descriptors.
    """
    ending = os.path.splitext(text)[1].lower()
    if text == "-" or ending == ".txt":
        return _list
    if is_url(text) or os.path.isfile(os.path.join(text, "plan.json")):
        return None
    if os.path.isdir(text):
        return _folder
    if ending == ".csv":
        return _csv
    if ending in (".h5", ".hdf5") or (ending not in IMAGE_EXTENSIONS and format_of(Path(text))):
        return None
    return lambda image, number: ([image], _by_folder([image], number), ())


def _list(text: str, number: dict[str, int]) -> _Listed:
    if text == "-":
        lines = [os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer]
    else:
        regular(Path(text), "list of images")
        try:
            with open(text, encoding="utf-8-sig", errors="surrogateescape") as file:
                lines = [line.rstrip("\n") for line in file]
        except OSError as error:
            raise VggfeatError(f"can't read {text}: {reason(error)}") from error
    folder = "" if text == "-" else os.path.dirname(text)
    names = [os.path.join(folder, line) for line in lines if line.strip()]
    if not names:
        where = "stdin" if text == "-" else text
        raise VggfeatError(f"no images are listed in {where}: give a name a line")
    return names, _by_folder(names, number), ()


def _folder(text: str, number: dict[str, int]) -> _Listed:
    names, remarks = images_under(Path(text))
    names = [os.path.join(text, name) for name in names]
    return names, _by_folder(names, number), remarks


def _by_folder(names: Sequence[str], number: dict[str, int]) -> np.ndarray:
    """(N,) numbers of the classes that the nearest folder is called like; -1 where none is."""
    return np.array(
        [
            next((number[part] for part in name.split("/")[-2::-1] if part in number), -1)
            for name in names
        ]
    )


def _csv(text: str, number: dict[str, int]) -> _Listed:
    items = csv_file.load(Path(text), to_learn=False)
    if items.url is not None or items.boxes is not None:
        what = "URLs of images" if items.url is not None else "boxes in images"
        raise VggfeatError(
            f"{text} lists {what}: describe them with `vggfeat extract`, and give what that makes"
        )
    folder = os.path.dirname(text)
    names = [os.path.join(folder, name) for name in items.names]
    return names, _of_model(items.labels, items.classes, number), items.remarks


def _of_model(
    labels: np.ndarray | None, classes: Sequence[str], number: dict[str, int]
) -> np.ndarray | None:
    """(N,) numbers of the model's classes, -1 where it has no such class; None where there are no
    labels, or several a row.
    """
    if labels is None or labels.ndim == 2:
        return None
    # the last stands for unknown, -1
    known: np.ndarray = np.array([*(number.get(name, -1) for name in classes), -1])[labels]
    return known


def _described(texts: Sequence[str], model: Model) -> Source:
    """Raises VggfeatError where the features aren't those that the model sees."""
    if len(texts) != len(model.parts):
        nets = ", ".join(part.net for part in model.parts)
        raise VggfeatError(
            f"the classifier takes {len(model.parts)} feature file(s), of {nets}, in this order;"
            f" {len(texts)} given"
        )
    files = [open_features(text, part.layer) for text, part in zip(texts, model.parts, strict=True)]
    for file, part in zip(files, model.parts, strict=True):
        there = replace(file.description, precision=part.precision)  # it only rounds
        if set(part.scales) <= set(there.scales):
            there = replace(there, scales=part.scales)
        if told := ", ".join(differences(there, part)):
            raise VggfeatError(
                f"{file.path} was described otherwise than what the classifier learned from: {told}"
            )
    refuse_other_rows(files)
    first = files[0]
    number = {} if model.multi_label else {name: k for k, name in enumerate(model.classes)}
    labels = _of_model(first.labels, first.classes, number)
    known = labels is not None and bool((labels >= 0).any())
    return Source(first.names, labels if known else None, tuple(files))


# --- scores ---------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Prediction(Displayed):
    """What a classifier says of an image.

    classes: its one class; of a multi-label model those above the threshold, the surest first.
    scores: theirs. probabilities: theirs, of logistic regression; of other classifiers there are
    none. margin: the best score minus the second of all; NaN where there is one class.
    all_scores: (K,) float64. error: why it is unreadable; then there is nothing else.
    """

    image: str
    classes: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()
    margin: float = math.nan
    all_scores: np.ndarray | None = None
    error: str | None = None

    def _title(self) -> str:
        return f"Prediction of {self.image}"

    def _rows(self) -> list[tuple[str, str]]:
        if self.error is not None:
            return [("unreadable", self.error)]
        rows = [
            (name, f"{score:+.3f}") for name, score in zip(self.classes, self.scores, strict=True)
        ]
        if self.probabilities:
            rows = [
                (name, f"{score}, {in_percent(chance, 1)}")
                for (name, score), chance in zip(rows, self.probabilities, strict=True)
            ]
        return [*(rows or [("no class", "above the threshold")]), ("margin", f"{self.margin:.3f}")]

    def best(self, model: Model, top: int) -> list[tuple[str, ...]]:
        """Rows (image, class, score, and the probability where there is one) of a table, of the
        best classes; none of an unreadable one.
        """
        if self.all_scores is None:
            return []
        order = (-self.all_scores).argsort(kind="stable")[:top]
        cells = [[model.classes[k], f"{self.all_scores[k]:+.3f}"] for k in order]
        if model.has_probabilities:
            chances_K = model.probabilities(self.all_scores)
            cells = [
                [*row, in_percent(chances_K[k], 1)] for row, k in zip(cells, order, strict=True)
            ]
        names = [self.image, *[""] * top]
        return [(name, *row) for name, row in zip(names, cells, strict=False)]


def predict_all(
    model: Model,
    source: Source | Given | Iterable[Given],
    *,
    threshold: float | None = None,
    batch_size: int | None = None,
    workers: int = CORES,
    start: int = 0,
    progress: Callable[[float, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Prediction]:
    """A row for each image, or row of feature files, in their order, while the next ones are still
    to be described: any number of them takes no more memory than their names.

    source: as of `source_of`. threshold: of a multi-label model's scores; None: 0. batch_size,
    workers: as of `vggfeat.embed`. start: the first row, a multiple of CHUNK. progress: called with
    (work done in images, images in all). say: what happens on the way, in a sentence.
    Raises VggfeatError: see `source_of`, `threshold_of`, `Model.networks`; for an image, its row
    tells.
    """
    refuse_counts(batch_size, workers)
    rows = source if isinstance(source, Source) else source_of(source, model)
    above = threshold_of(model, threshold)
    if rows.files:
        score = _of_features(model, rows)
    else:
        score = partial(_of_images, model, rows.names, batch_size, workers, say)
    return _predicted(model, rows, score, above, start, progress)


def threshold_of(model: Model, threshold: float | None) -> float:
    """The score above which a class is named. Raises VggfeatError where the model names one class
    an image, or the threshold is no number.
    """
    if threshold is None:
        return 0.0
    if not model.multi_label:
        raise VggfeatError("the classifier names one class an image: leave out `threshold`")
    if not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise VggfeatError(f"`threshold` must be a finite number, not {shown(threshold)}")
    return float(threshold)


_Score = Callable[[slice, Callable[[float], None]], tuple[np.ndarray, dict[int, str]]]
"""(rows, what is told of work in images) -> (n, K) scores; place among them -> why there are none.
"""


def _of_images(
    model: Model,
    names: Sequence[str],
    batch_size: int | None,
    workers: int,
    say: Callable[[str], None],
    rows: slice,
    advance: Callable[[float], None],
) -> tuple[np.ndarray, dict[int, str]]:
    chunk = names[rows]

    def describe(network: Network, part: Description) -> tuple[np.ndarray, dict[int, str]]:
        return gathered(
            network,
            chunk,
            part,
            batch_size=batch_size,
            workers=workers,
            keep_going=True,
            advance=lambda images: advance(images / len(model.parts)),
            say=say,
        )

    return model.scores_by(describe)


def _of_features(model: Model, source: Source) -> _Score:
    X = Descriptors(source.files, model.parts, model.pool)

    def score(rows: slice, advance: Callable[[float], None]) -> tuple[np.ndarray, dict[int, str]]:
        scores_NK = model.decision_function(X[rows])
        advance(len(scores_NK))
        told = {
            i: file.errors.get(rows.start + i, "unreadable")
            for file in reversed(source.files)
            for i in np.flatnonzero(~file.readable[rows]).tolist()
        }
        return scores_NK, told

    return score


def _predicted(
    model: Model,
    source: Source,
    score: _Score,
    above: float,
    start: int,
    progress: Callable[[float, int], None],
) -> Iterator[Prediction]:
    total, done = len(source), float(start)

    def advance(images: float) -> None:
        nonlocal done
        done += images
        progress(min(done, total), total)

    progress(done, total)
    for low in range(start, total, CHUNK):
        rows = slice(low, min(low + CHUNK, total))
        scores_NK, unreadable = score(rows, advance)
        chances_NK = model.probabilities(scores_NK) if model.has_probabilities else None
        for i, (name, scores_K) in enumerate(zip(source.names[rows], scores_NK, strict=True)):
            if i in unreadable:
                yield Prediction(name, error=unreadable[i])
            else:
                chances_K = None if chances_NK is None else chances_NK[i]
                yield _prediction(model, name, scores_K, chances_K, above)


def _prediction(
    model: Model, name: str, scores_K: np.ndarray, chances_K: np.ndarray | None, above: float
) -> Prediction:
    order = (-scores_K).argsort(kind="stable")
    best = order[: np.count_nonzero(scores_K > above)] if model.multi_label else order[:1]
    return Prediction(
        name,
        tuple(model.classes[k] for k in best),
        tuple(scores_K[best].tolist()),
        () if chances_K is None else tuple(chances_K[best].tolist()),
        float(scores_K[order[0]] - scores_K[order[1]]) if len(order) > 1 else math.nan,
        scores_K,
    )


# --- what is counted ------------------------------------------------------------------------------


class Tally:
    """What is told of all rows at the end, counted as they come: how many, which were unreadable
    (the first of them, name -> reason), how many of the labelled ones were right.
    """

    def __init__(self, model: Model, source: Source) -> None:
        self.rows = self.unreadable = 0
        self.first_unreadable: dict[str, str] = {}
        self._labels = source.labels
        self._number = {name: k for k, name in enumerate(model.classes)}
        self._images_K = np.zeros(len(model.classes), np.int64)
        self._right_K = np.zeros(len(model.classes), np.int64)

    def add(self, image: str, classes: Sequence[str], error: str | None) -> None:
        """The next row."""
        label = -1 if self._labels is None else int(self._labels[self.rows])
        self.rows += 1
        if error is not None:
            self.unreadable += 1
            if len(self.first_unreadable) < FIRST:
                self.first_unreadable[image] = error
        elif label >= 0:
            self._images_K[label] += 1
            self._right_K[label] += self._number[classes[0]] == label

    @property
    def accuracy(self) -> str:
        """How many of the labelled rows were right, in words; nothing where none is labelled."""
        if not (images := int(self._images_K.sum())):
            return ""
        there = self._images_K > 0
        recall = float((self._right_K[there] / self._images_K[there]).mean())
        right = int(self._right_K.sum())
        return (
            f"accuracy {in_percent(right / images)} ({right:,} of {images:,} labelled images),"
            f" mean class recall {in_percent(recall)} ({np.count_nonzero(there):,} classes)"
        )


# --- rows in a file -------------------------------------------------------------------------------


def write_predictions(
    model: Model,
    source: Source,
    out: Path,
    *,
    scores: bool = False,
    threshold: float | None = None,
    overwrite: bool = False,
    batch_size: int | None = None,
    workers: int = CORES,
    progress: Callable[[float, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Tally:
    """Put all rows into `out`, a .csv, .jsonl or .parquet file, which appears when it is whole; or
    go on with `out`.partial, where that is of the same rows, model and options.

    scores: those of all classes, too. overwrite: begin anew where `out`.partial is of other rows,
    another model or other options. The others as of `predict_all`.
    Raises VggfeatError: see there, and where that would lose rows; CantWrite; Interrupted for
    Ctrl-C. What was scored is kept.
    """
    write = _writer(out, model, scores)
    header = {
        "format": FORMAT,
        "version": 1,
        "model": model.fingerprint,
        "rows": source.digest,
        "count": len(source),
        "threshold": threshold_of(model, threshold),
        "scores": scores,
    }
    place, tally = partial_of(behind_link(out)), Tally(model, source)
    with _begun(place, json.dumps(header).encode() + b"\n", overwrite, say) as file:
        begin = file.tell()
        try:
            for records in _kept(file, source.names):
                _count(tally, records)
            if tally.rows:
                left = len(source) - tally.rows
                say(f"going on: {tally.rows:,} rows are in {place}; {left:,} are left")
            rows = predict_all(
                model,
                source,
                threshold=threshold,
                batch_size=batch_size,
                workers=workers,
                start=tally.rows,
                progress=progress,
                say=say,
            )
            while chunk := [_record(model, row, scores) for row in islice(rows, CHUNK)]:
                _keep(file, place, chunk)
                _count(tally, chunk)
            with whole(out, durable=True) as made:
                file.seek(begin)
                write(made, file)
        except (KeyboardInterrupt, VggfeatError) as error:
            kept = f"; {tally.rows:,} rows are in {place}, and the same command goes on from there"
            if not tally.rows:
                kept = ""
                place.unlink(missing_ok=True)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"interrupted{kept}", *(error.args or [SIGINT])) from error
            raise VggfeatError(f"{error}{kept}") from error
        with suppress(OSError):  # the rows are where they were asked for
            place.unlink()
    return tally


def _record(model: Model, row: Prediction, scores: bool) -> Record:
    if row.error is not None:
        return {"image": row.image, "error": row.error}
    several = model.multi_label
    record: Record = {
        "image": row.image,
        "class": list(row.classes) if several else row.classes[0],
        "score": list(row.scores) if several else row.scores[0],
    }
    if model.has_probabilities:
        record["probability"] = list(row.probabilities) if several else row.probabilities[0]
    record["margin"] = None if math.isnan(row.margin) else row.margin
    if scores and row.all_scores is not None:
        record["scores"] = dict(zip(model.classes, row.all_scores.tolist(), strict=True))
    return record


def _count(tally: Tally, records: Sequence[Record]) -> None:
    for record in records:
        classes = record.get("class", ())
        tally.add(
            record["image"], [classes] if isinstance(classes, str) else classes, record.get("error")
        )


@contextmanager
def _begun(
    place: Path, header: bytes, overwrite: bool, say: Callable[[str], None]
) -> Iterator[BinaryIO]:
    """The rows' file, held by a lock, behind its header; with overwrite begun anew where it has
    another one. Raises VggfeatError where it isn't to be, or was made by somebody else.
    """
    with os.fdopen(locked(place, os.O_CREAT, LOCK_EX, say), "r+b") as file:
        first = file.readline(1 << 16)
        if first != header:
            if first and not header.startswith(first):  # cut off, as by a kill
                if not first.startswith(header[: header.index(b",")]):
                    raise VggfeatError(
                        f"{place} is no half-written file of predictions: move it away"
                    )
                other = f"{place} is of other images, another classifier or other options"
                if file.read(1) and not overwrite:  # there are rows
                    raise VggfeatError(
                        f"{other}: give what it was begun with, or `overwrite` to begin anew"
                    )
                say(f"{other}: begun anew")
            _emptied(file, place, header)
        yield file


def _emptied(file: BinaryIO, place: Path, header: bytes) -> None:
    try:
        file.seek(0)
        file.truncate()
        file.write(header)
        file.flush()
    except OSError as error:
        raise CantWrite(f"can't write {place}: {reason(error)}") from error


def _kept(file: BinaryIO, names: Sequence[str]) -> Iterator[list[Record]]:
    """The rows that an earlier run has kept, by whole chunks; what is behind them is cut off."""
    for low in range(0, len(names), CHUNK):
        end, records = file.tell(), list[Record]()
        for name in names[low : low + CHUNK]:
            record = _parsed(file.readline())
            if record is None or record.get("image") != name:
                file.seek(end)
                file.truncate()
                return
            records.append(record)
        yield records


def _parsed(line: bytes) -> Record | None:
    """A row; None for a line that was cut off, or never reached the disk."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _keep(file: BinaryIO, place: Path, records: Sequence[Record]) -> None:
    try:
        file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise CantWrite(f"can't write {place}: {reason(error)}") from error


_Write = Callable[[Path, BinaryIO], None]


def _writer(out: Path, model: Model, scores: bool) -> _Write:
    """What makes a file, by its ending, of lines of JSON. Raises VggfeatError for another ending, a
    class that would have the name of another column, or where a library is missing.
    """
    ending = out.suffix.lower()
    if ending == ".jsonl":
        return _as_lines
    classes = model.classes if scores else []
    columns = [name for name in COLUMNS if model.has_probabilities or name != "probability"]
    if ending not in ENDINGS:
        raise VggfeatError(f"{out} must end in {', '.join(ENDINGS)}")
    if taken := sorted({*classes} & {*columns}):
        raise VggfeatError(
            f"the class {shown(taken[0])} and a column of {out} have one name: leave out `scores`,"
            " or give a .jsonl file"
        )
    if ending == ".csv":
        return partial(_as_csv, columns, classes)
    parquet.pyarrow()
    number = "numbers" if model.multi_label else "number"
    kinds = {"class": "texts" if model.multi_label else "text", "score": number}
    kinds |= {"probability": number, "margin": "number"}
    named = {name: kinds.get(name, "text") for name in columns}
    return partial(_as_parquet, named | dict.fromkeys(classes, "number"))


ENDINGS = (".csv", ".jsonl", ".parquet")


def _as_lines(made: Path, lines: BinaryIO) -> None:
    with open(made, "wb") as file:
        for line in lines:
            file.write(line)


def _as_csv(columns: Sequence[str], classes: Sequence[str], made: Path, lines: BinaryIO) -> None:
    with open(made, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *classes])
        for record in map(json.loads, lines):
            cells = [_cell(record.get(name)) for name in columns]
            every = record.get("scores", {})
            writer.writerow([*cells, *(_cell(every.get(name)) for name in classes)])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ";".join(map(_cell, value))
    return "" if value is None else value if isinstance(value, str) else repr(value)


def _as_parquet(columns: dict[str, str], made: Path, lines: BinaryIO) -> None:
    def blocks() -> Iterator[list[Record]]:
        records = map(json.loads, lines)
        while block := list(islice(records, CHUNK)):
            yield [
                {**record, "image": _utf8(record["image"]), **record.pop("scores", {})}
                for record in block
            ]

    parquet.write_records(made, columns, blocks())


def _utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
