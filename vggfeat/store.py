"""The feature file: what is in it, and its reader (`writer` writes it). N rows, Q scales, D
descriptor length.

Row i is always item i of the dataset: an unreadable image keeps its row (NaN, status 2 and a
reason). The file has its final name only when it is complete; until then it is `NAME.partial`.
`docs/formats.md` has the layout for readers without this package.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np

from vggfeat.checked import (
    MAX_Q,
    MAX_SCALES,
    OneOf,
    Range,
    Several,
    first_few,
    path_of,
    shown,
    sides,
)
from vggfeat.datasets.items import counted, name_digest
from vggfeat.devices import PRECISIONS
from vggfeat.errors import VggfeatError
from vggfeat.hdf5 import Damaged, File, Place, checksums, damaged, decode, open_file
from vggfeat.notebook import Displayed

FORMAT = "vggfeat-features"
FORMAT_VERSION = 2
PENDING, DONE, UNREADABLE = 0, 1, 2
REASON_BYTES = 200  # of why an image is unreadable
MAX_DIM = 1 << 20
MAX_LAYERS = 64
REGIONS = ("image", "box")
"""What of an image a row is of: all of it, the box in it."""
READ_BYTES = 1 << 26  # of descriptors that are checked at a time


@dataclass(frozen=True)
class Description:
    """How images were described: all that is needed to describe another image in the same way.

    net, weights: what `vggfeat.load` takes. fingerprint: of the weights. layer: the paper's name,
    or the backbone's own. scales: Q in pixels, smallest side, one descriptor each. mirror: averaged
    with the mirror image's. pool: floor | ceil, the net's max-pooling. filter: of the rescale.
    precision: of the forward pass. decoder: what made pixels of the images' files. regions: of the
    image, each with a descriptor at every scale. preprocessing: mean, std, order of channels and
    range of a backbone that is none of Table 1's; "" of those. further: layers that the same passes
    of the net describe beside `layer`; in what was described, one layer is chosen, and this is ().
    """

    net: str
    weights: str
    fingerprint: str
    layer: str
    scales: Annotated[
        tuple[Annotated[int, Range(1, MAX_Q)], ...], Several(MAX_SCALES, different=True)
    ]
    mirror: bool
    pool: Annotated[str, OneOf(("floor", "ceil", "none"))]
    filter: str
    precision: Annotated[str, OneOf(PRECISIONS)]
    decoder: str
    regions: Annotated[
        tuple[Annotated[str, OneOf(REGIONS)], ...], Several(len(REGIONS), different=True)
    ] = REGIONS[:1]
    preprocessing: str = ""
    further: Annotated[tuple[str, ...], Several(MAX_LAYERS - 1, different=True)] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """All that are described, the first of them `layer`."""
        return (self.layer, *self.further)

    def in_words(self, values: Mapping[str, int], why: str = "") -> str:
        """How, in a line. values: of each layer, how many; why: what is said of the scales."""
        layers = "; ".join(f"{name}, {len(self.scales)} x {n}" for name, n in values.items())
        scales = ", ".join(map(str, self.scales))
        mirror = "with" if self.mirror else "without"
        return f"{layers}: Q = {scales}{why}, {mirror} mirror images"

    def of_layer(self, layer: str) -> Description:
        """The same of one of its layers alone."""
        return replace(self, layer=layer, further=())

    @property
    def columns(self) -> int:
        """How many descriptors a row has: at each scale of the first region, then of the second."""
        return len(self.regions) * len(self.scales)

    @property
    def of_boxes(self) -> bool:
        """Whether it takes a box to describe an image so."""
        return "box" in self.regions

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; without `regions` where that is the image alone, and without
        `preprocessing` and `further` where they are empty, as in older files.
        """
        lists = {key: list(getattr(self, key)) for key in ("scales", "regions", "further")}
        record = {**asdict(self), **lists}
        if self.regions == REGIONS[:1]:
            del record["regions"]
        for key in ("preprocessing", "further"):
            if not record[key]:
                del record[key]
        return record


def differences(there: Description, here: Description) -> Iterator[str]:
    """What one description has otherwise than another, each in a few words; the same weights may
    have moved.
    """
    names = {
        "fingerprint": "other weights, sha256",
        "pool": "max-pooling",
        "further": "further layers",
    }
    for key, wanted in asdict(here).items():
        found = asdict(there)[key]
        if key != "weights" and found != wanted:
            yield f"{names.get(key, key)} {_short(found)}, not {_short(wanted)}"


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


class _Facts(TypedDict):
    dataset: str
    protocol: str
    root: str
    command: str
    layers: Annotated[list[str], Several(MAX_LAYERS, different=True)]
    description: Description


class Facts(_Facts, total=False):
    """What is used of a feature file's facts."""

    total: Annotated[int, Range(1, 2**53)]
    versions: dict[str, Any]


def arrays_of(layers: Sequence[str]) -> list[tuple[str, str]]:
    """The arrays of each layer's descriptors and of their checksums: the first has the plain names,
    the others their own behind them.
    """
    return [(f"descriptors{of}", f"crc32{of}") for of in ("", *(f".{n}" for n in layers[1:]))]


@dataclass(frozen=True, repr=False)
class Features(Displayed):
    """A feature file, opened. Descriptors are read when asked for, the rest is here.

    names (N), labels as in Items or None, classes (C), splits, status (N,) uint8, errors: row ->
    reason. description: how the images were described; its layer is the one that is read, of all
    `layers` in the file. boxes: (N, 4) int32, left, top, right, bottom in pixels, where rows are of
    boxes in images; else None. files: (N) the images' names, where rows' are others; else None.
    shape: (N, Q, D); with two regions there are Q descriptors of the first, then of the second.
    crc32: (N,) uint32, of each image's file; 0 where that is unknown.
    attributes: all facts in the file.
    """

    path: Path | str
    names: Sequence[str]
    labels: np.ndarray | None
    classes: list[str]
    splits: dict[str, np.ndarray]
    status: np.ndarray
    errors: dict[int, str]
    description: Description
    attributes: dict[str, Any]
    shape: tuple[int, int, int]
    dtype: np.dtype
    layers: tuple[str, ...] = ()
    boxes: np.ndarray | None = None
    files: list[str] | None = None
    crc32: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    number: bytes = b""

    def _title(self) -> str:
        return f"Features of {self.attributes['dataset']}"

    def _rows(self) -> list[tuple[str, str]]:
        part, facts = self.description, self.attributes
        n, total = self.shape[0], facts.get("total")
        several = "; several an image" if self.labels is not None and self.labels.ndim == 2 else ""
        unreadable = f"; {len(self.errors):,} unreadable" if self.errors else ""
        return [
            (
                "images" if self.boxes is None else "boxes",
                counted(n, total, self.labels, self.classes, self.splits) + several + unreadable,
            ),
            ("descriptor", part.in_words({part.layer: self.shape[2]})),
            ("net", f"{part.net}, {part.weights}"),
            ("classes", first_few(self.classes) or "none"),
            *([("layers", ", ".join(self.layers))] if len(self.layers) > 1 else []),
            *([("regions", " and ".join(part.regions))] if part.of_boxes else []),
            ("stored as", f"{self.dtype} ({', '.join(map(str, self.shape))})"),
            ("protocol", str(facts["protocol"])),
        ]

    @property
    def readable(self) -> np.ndarray:
        """(N,) bool: rows that have descriptors."""
        readable_N: np.ndarray = self.status == DONE
        return readable_N

    @cached_property
    def rows_digest(self) -> str:
        """sha256 of what the rows are: images by name and checksum, boxes, labels, classes and
        splits.

        What was learned from a file is known by it: the same rows again, whatever describes them.
        """
        digest = hashlib.sha256(
            name_digest(self.names).encode() + name_digest(self.classes).encode()
        )
        arrays = {"crc32": self.crc32, "boxes": self.boxes, "labels": self.labels, **self.splits}
        for name, values in sorted(arrays.items()):
            if values is not None:
                digest.update(f"\0{name}{values.shape}".encode("utf-8", "surrogateescape"))
                digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def descriptors(self) -> np.ndarray:
        """(N, Q, D) as stored: not normalised, not aggregated; NaN rows where an image was
        unreadable.
        """
        return self.read()

    def read(
        self, scales: tuple[int, ...] | None = None, rows: slice | np.ndarray = slice(None)
    ) -> np.ndarray:
        """(N, Q, D) for a subset of the stored scales, in the order given, and of the rows; all by
        default. Of two regions 2 Q, those of the first before those of the second.

        rows: a slice, or rising indices. Each row is held against its checksum.
        Raises VggfeatError for a scale that the file doesn't have, for damage, and when the file
        was replaced.
        """
        columns = self.columns_of(scales)
        wanted = np.arange(self.shape[0])[rows]
        made = np.empty((len(wanted), len(columns), self.shape[2]), self.dtype)
        self._read(wanted, columns, made)
        return made

    def columns_of(self, scales: tuple[int, ...] | None) -> list[int]:
        """Where descriptors of these scales, or of all, are in a row, by regions. Raises
        VggfeatError for one that the file doesn't have.
        """
        scales, stored = None if scales is None else sides(scales), self.description.scales
        missing = [q for q in scales or () if q not in stored]
        if missing:
            raise VggfeatError(
                f"{self.path} has no scale {missing[0]}; it has {', '.join(map(str, stored))}"
            )
        return [
            region * len(stored) + stored.index(q)
            for region in range(len(self.description.regions))
            for q in scales or stored
        ]

    def verify(self) -> None:
        """Hold every descriptor against its checksum, in little memory. Raises VggfeatError."""
        self._read(np.arange(self.shape[0]), list(range(self.shape[1])), None)

    def _read(self, rows: np.ndarray, columns: list[int], made: np.ndarray | None) -> None:
        with (
            open_file(Path(self.path), FORMAT, FORMAT_VERSION, unfinished=True) as file,
            damaged(self.path),
        ):
            if file.number != self.number:
                raise VggfeatError(f"{self.path} was replaced since it was opened: open it again")
            number = self.layers.index(self.description.layer)
            spoilt = read_rows(file, number, list(self.layers), rows, columns, self.status, made)
            if spoilt:
                raise Damaged(
                    f"descriptors other than written: {len(spoilt)}, first that of"
                    f" {shown(self.names[spoilt[0]])}; `vggfeat extract --retry`, otherwise as it"
                    " was made, describes them again"
                )


def read_rows(
    file: File,
    number: int,
    layers: list[str],
    rows: np.ndarray,
    columns: list[int],
    status: np.ndarray,
    made: np.ndarray | None,
) -> list[int]:
    """Read descriptors of rows (rising) at some of the scales into made (rows, columns, D), or only
    check them.

    Those that are spoilt: a row has another checksum, or is done and not finite.
    """
    spoilt: list[int] = []
    place, sums = (file.arrays[name] for name in arrays_of(layers)[number])
    for start, low, high in runs(rows, max(1, READ_BYTES // max(1, place.row_bytes))):
        block_NQD = place.read(file.descriptor, low, high)
        sums_NQ = sums.read(file.descriptor, low, high)
        other = (checksums(block_NQD) != sums_NQ)[:, columns].any(1)
        broken = ~np.isfinite(block_NQD[:, columns]).all((1, 2)) & (status[low:high] == DONE)
        spoilt += (low + np.flatnonzero(other | broken)).tolist()
        if made is not None:
            made[start : start + high - low] = block_NQD[:, columns]
    return spoilt


def runs(rows: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """Rising rows as runs (place of the first, low, high) of at most so many neighbours each."""
    breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    values, found = rows.tolist(), []
    for start, stop in pairwise([0, *breaks, len(values)]):
        for at in range(start, stop, most):
            found.append((at, values[at], values[min(at + most, stop) - 1] + 1))
    return found


def row_status(status_NQ: np.ndarray) -> np.ndarray:
    """(N,) of the rows, from that of each scale: unreadable at one is unreadable, done is done at
    all.
    """
    return np.where(
        (status_NQ == UNREADABLE).any(1),
        UNREADABLE,
        np.where((status_NQ == DONE).all(1), DONE, PENDING),
    ).astype(np.uint8)


def open_feature_file(path: str | os.PathLike[str], layer: str | None = None) -> Features:
    """Open a feature file. layer: which one to read of a file with several.

    Raises VggfeatError when it isn't one, is damaged or half-written, or doesn't have the layer.
    """
    path = path_of(path, "a feature file")
    with open_file(path, FORMAT, FORMAT_VERSION) as file, damaged(path):
        layers = file.document("facts", Facts)["layers"]
        return read_features(file, chosen_layer(path, layers, layer))


def open_file_layers(path: str | os.PathLike[str]) -> list[Features]:
    """A feature file once for each of its layers, in their order. Raises VggfeatError."""
    path = path_of(path, "a feature file")
    with open_file(path, FORMAT, FORMAT_VERSION) as file, damaged(path):
        return [read_features(file, name) for name in file.document("facts", Facts)["layers"]]


def chosen_layer(path: Path | str, layers: Sequence[str], layer: str | None) -> str:
    """The layer that is read of those in a file. Raises VggfeatError where it has several and none
    is asked for, or another.
    """
    if layer is None and len(layers) > 1:
        raise VggfeatError(f"{path} has the layers {', '.join(layers)}: choose one with `layer`")
    if layer is not None and layer not in layers:
        raise VggfeatError(f"{path} has no layer {layer!r}; it has {', '.join(layers)}")
    return layers[0] if layer is None else layer


def read_features(file: File, layer: str) -> Features:
    """The features of an open file, of one of its layers, everything checked but the descriptors
    themselves. Raises VggfeatError.
    """
    path = file.path
    facts: Facts = file.document("facts", Facts)
    layers = facts["layers"]
    number = layers.index(layer)
    description = facts["description"].of_layer(layer)
    names, classes = file.texts("names"), file.texts("classes")
    boxes, files, crc32 = None, None, np.zeros(len(names), np.uint32)
    if "images/crc32" in file.arrays:
        crc32 = file.array("images/crc32", "u", (len(names),))
    if "rows/image" in file.arrays:
        image_N = file.array("rows/image", "i", (None,))
        _check_indices("rows/image", image_N, len(names))
        files, crc32 = [names[i] for i in image_N.tolist()], crc32[image_N]
        names = file.texts("rows/name") if "rows/name/bytes" in file.arrays else files
        if len(names) != len(files):
            raise Damaged(f"it has {len(names)} names of {len(files)} rows")
        boxes = file.array("rows/box", "i", (len(names), 4))
    if boxes is None and description.of_boxes:
        raise Damaged("it describes boxes, and has none")
    count, scales = len(names), description.columns
    status = row_status(read_status(file, count, scales))
    if (status == PENDING).any():
        raise VggfeatError(
            f"{path} is half-written: {(status == PENDING).sum()} rows are pending; extract again"
        )
    reasons = file.array("errors", "S", (count,))
    place = _descriptors(file, number, layers, count, scales)
    return Features(
        path=path,
        names=names,
        labels=read_labels(file, count, len(classes)),
        classes=classes,
        splits=_splits(file, count),
        status=status,
        errors={int(i): decode(bytes(reasons[i])) for i in np.flatnonzero(status == UNREADABLE)},
        description=description,
        attributes={
            **facts,
            "description": description.to_dict(),
            "seconds": read_seconds(file),
        },
        shape=(count, scales, place.shape[2]),
        dtype=place.dtype,
        layers=tuple(layers),
        boxes=boxes,
        files=files,
        crc32=crc32,
        number=file.number,
    )


def read_status(file: File, count: int, scales: int) -> np.ndarray:
    """(N, Q) uint8. Raises Damaged for anything but the three that there are."""
    status_NQ = file.array("status", "u", (count, scales))
    if count and status_NQ.max() > UNREADABLE:
        raise Damaged(f"it has a row of status {status_NQ.max()}, which there isn't")
    return status_NQ


def read_seconds(file: File) -> float:
    """Spent on the extraction. Raises Damaged."""
    seconds = float(file.array("seconds", "f", (1,))[0])
    if not 0 <= seconds < float("inf"):
        raise Damaged(f"it took {seconds} seconds")
    return seconds


def _descriptors(file: File, number: int, layers: list[str], count: int, scales: int) -> Place:
    name, sums = arrays_of(layers)[number]
    place = file.place(name, "f", (count, scales, None))
    if place.dtype.itemsize > 4 or not 0 < place.shape[2] <= MAX_DIM:
        raise Damaged(f"{name} is {place.dtype} of length {place.shape[2]}")
    if file.checked.get(name) != sums:
        raise Damaged(f"{name} has no checksums")
    return place


def read_labels(file: File, count: int, classes: int) -> np.ndarray | None:
    """As `Features` has them. Raises Damaged for one of no class."""
    if "labels" not in file.arrays:
        return None
    several = len(file.arrays["labels"].shape) == 2
    labels = file.array("labels", "i", (count, classes) if several else (count,))
    low, high = (-1, 1) if several else (-1, classes - 1)
    if labels.size and not low <= labels.min() <= labels.max() <= high:
        raise Damaged(f"it has labels outside of {low}..{high}")
    return labels


def _splits(file: File, count: int) -> dict[str, np.ndarray]:
    splits = {}
    for name in file.under("splits/"):
        splits[name] = file.array(f"splits/{name}", "i", (None,))
        _check_indices(f"split {name}", splits[name], count)
    return splits


def _check_indices(name: str, index: np.ndarray, count: int) -> None:
    if index.size and not 0 <= index.min() <= index.max() < count:
        raise Damaged(f"{name} has rows outside of 0..{count - 1}")
