"""The HDF5 feature file: layout, writer, reader. N images, Q scales, D descriptor length, C classes.

Row i is always item i of the dataset: an unreadable image keeps its row (NaN, status 2 and a reason).
The file has its final name only when it is complete; until then it is `NAME.partial`.
`docs/formats.md` has the layout for readers without this package.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError, WriteFailed

FORMAT = "vggfeat-features"
FORMAT_VERSION = 1
PENDING, DONE, UNREADABLE = 0, 1, 2
FLUSH_ROWS, FLUSH_SECONDS = 1000, 10.0  # rows kept in memory before they are written
REASON_BYTES = 512  # room kept in the file for a row's reason, should every image be unreadable
_BROKEN: list[FeatureWriter] = []  # with files that HDF5 can't close; letting go of one would crash it
TEXT = h5py.string_dtype("utf-8")


@dataclass(frozen=True)
class Description:
    """How images were described: all that is needed to describe another image in the same way.

    net, weights: what `vggfeat.load` takes. fingerprint: of the weights. layer: the paper's name.
    scales: Q in pixels, smallest side, one descriptor each. mirror: averaged with the mirror image's.
    pool: floor | ceil, the net's max-pooling. filter: of the rescale. precision: of the forward pass.
    """

    net: str
    weights: str
    fingerprint: str
    layer: str
    scales: tuple[int, ...]
    mirror: bool
    pool: str
    filter: str
    precision: str

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Raises VggfeatError when a field is missing, unknown or of another kind."""
        try:
            fields = json.loads(text)
            made = cls(**{**fields, "scales": tuple(int(q) for q in fields["scales"])})
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise VggfeatError(f"the stored description is damaged: {error}") from error
        if not made.scales or not all(isinstance(v, str) for v in (made.net, made.weights, made.layer)):
            raise VggfeatError("the stored description is damaged: empty scales or names")
        return made

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _reserve(descriptor: int, size: int) -> None:
    """Take size bytes of the disk for an open file; OSError when it doesn't have them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def encode(text: str) -> bytes:
    """File names need not be valid Unicode; their bytes are kept."""
    return text.encode("utf-8", "surrogateescape")


class FeatureWriter:
    """Writes `path`.partial; `finish` gives it its name, leaving the `with` block by an error removes it.

    items: the rows. dim: D. dtype: "float16" or "float32". attributes: further facts (strings or JSON-able).
    Raises VggfeatError when `path` exists (unless overwrite), another process writes it, or the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        items: Items,
        description: Description,
        dim: int,
        dtype: str = "float32",
        attributes: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        if self.path.exists() and not overwrite:
            raise VggfeatError(f"{self.path} exists; give --overwrite, or another --out")
        if not self.path.parent.is_dir():
            raise VggfeatError(f"there is no folder {self.path.parent} to write {self.path.name} in")
        self._refuse_second_writer()
        self._rows: dict[int, np.ndarray] = {}
        self._failures: dict[int, str] = {}
        self._last_flush = time.monotonic()
        size = len(items) * (len(description.scales) * dim * np.dtype(dtype).itemsize + REASON_BYTES) + (
            1 << 20
        )
        size += sum(len(encode(name)) + 32 for name in items.names)
        size += 0 if items.labels is None else items.labels.nbytes
        size += sum(rows.nbytes for rows in items.splits.values())
        try:
            # A full disk is found now, not after hours of work; the same room is then held by the file itself.
            with open(self.partial, "xb") as probe:
                _reserve(probe.fileno(), size)
            self.partial.unlink()
            self._file = h5py.File(self.partial, "x")
            self._create(items, description, dim, dtype, attributes or {})
            self._file.flush()
            with open(self.partial, "rb+") as file:
                _reserve(file.fileno(), size)
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            raise VggfeatError(
                f"can't write {self.path} ({size / 1e6:,.1f} MB): {error.strerror or error}"
            ) from error

    def _refuse_second_writer(self) -> None:
        if not self.partial.exists():
            return
        try:
            # HDF5 locks a file that is open for writing: this fails while another process has it
            h5py.File(self.partial, "r+").close()
        except BlockingIOError as error:
            raise VggfeatError(f"another process is writing {self.partial}") from error
        except OSError as error:
            if "lock" in str(error):
                raise VggfeatError(f"another process is writing {self.partial}") from error
        self.partial.unlink()  # left behind by a kill

    def _create(
        self, items: Items, description: Description, dim: int, dtype: str, attributes: dict[str, Any]
    ) -> None:
        count, scales = len(items), len(description.scales)
        file = self._file
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # every row is written once, its status says when
        self._descriptors = file.create_dataset("descriptors", (count, scales, dim), dtype, dcpl=early)
        self._status = file.create_dataset("status", data=np.full(count, PENDING, np.uint8))
        self._errors = file.create_dataset("errors", (count,), TEXT)
        file.create_dataset("names", data=[encode(name) for name in items.names], dtype=TEXT)
        file.create_dataset("classes", data=[encode(name) for name in items.classes], dtype=TEXT)
        if items.labels is not None:
            file.create_dataset("labels", data=items.labels)
        splits = file.create_group("splits")
        for name, index in items.splits.items():
            splits.create_dataset(name, data=np.asarray(index, np.int64))
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["dataset"] = items.dataset
        file.attrs["protocol"] = items.protocol
        file.attrs["root"] = encode(str(items.root))
        for key, value in asdict(description).items():
            file.attrs[key] = value
        file.attrs["description"] = description.to_json()
        for key, value in attributes.items():
            file.attrs[key] = value if isinstance(value, str | int | float | bool) else json.dumps(value)

    def write(self, row: int, descriptors_QD: np.ndarray) -> None:
        """Keep row's descriptors; they reach the file with the next flush."""
        target = self._descriptors.dtype
        with np.errstate(over="ignore"):
            stored = descriptors_QD.astype(target)
        if not np.isfinite(stored).all():
            raise VggfeatError(
                f"row {row} has descriptors beyond the range of {target}; "
                + ("give --store float32" if target == np.float16 else "the weights are not usable")
            )
        self._rows[row] = stored
        self._flush_if_due()

    def fail(self, row: int, reason: str) -> None:
        """Mark row as unreadable, with the reason."""
        self._failures[row] = reason
        self._flush_if_due()

    def _flush_if_due(self) -> None:
        pending = len(self._rows) + len(self._failures)
        if pending >= FLUSH_ROWS or time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring the rows written so far to the disk: descriptors first, then their status."""
        try:
            order = sorted(self._rows)
            # one write a run of neighbouring rows: HDF5 is slow on scattered ones
            runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1) if order else []
            for run in runs:
                block = np.stack([self._rows[int(i)] for i in run])
                self._descriptors[int(run[0]) : int(run[-1]) + 1] = block
            for row, reason in self._failures.items():
                self._descriptors[row] = np.nan
                self._errors[row] = encode(reason)
            self._file.flush()
            status = self._status[:]
            status[order] = DONE
            status[list(self._failures)] = UNREADABLE
            self._status[:] = status
            self._file.flush()
        except (OSError, RuntimeError) as error:
            _BROKEN.append(self)
            raise WriteFailed(f"can't write {self.partial}: {error}") from error
        self._rows.clear()
        self._failures.clear()
        self._last_flush = time.monotonic()

    def finish(self, attributes: dict[str, Any] | None = None) -> None:
        """Flush, check that no row is pending, and give the file its name."""
        self.flush()
        pending = int((self._status[:] == PENDING).sum())
        if pending:
            raise VggfeatError(f"{pending} rows of {self.partial} were never described")
        try:
            for key, value in (attributes or {}).items():
                self._file.attrs[key] = value
            self._file.close()
            with open(self.partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.partial, self.path)
        except OSError as error:
            raise VggfeatError(f"can't write {self.path}: {error}") from error

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._file and self not in _BROKEN:
                self._file.close()
            self.partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Features:
    """A feature file, opened. Descriptors are read when asked for, the rest is here.

    names (N), labels as in Items or None, classes (C), splits, status (N,) uint8, errors: row -> reason.
    description: how the images were described. attributes: all facts in the file.
    """

    path: Path
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    splits: dict[str, np.ndarray]
    status: np.ndarray
    errors: dict[int, str]
    description: Description
    attributes: dict[str, Any]
    shape: tuple[int, int, int]
    dtype: np.dtype

    @property
    def readable(self) -> np.ndarray:
        """(N,) bool: rows that have descriptors."""
        return self.status == DONE

    @property
    def descriptors(self) -> np.ndarray:
        """(N, Q, D) as stored: not normalised, not aggregated; NaN rows where an image was unreadable."""
        return self.read()

    def read(self, scales: tuple[int, ...] | None = None) -> np.ndarray:
        """(N, Q, D) for a subset of the stored scales, in the order given; all by default.

        Raises VggfeatError for a scale that the file doesn't have.
        """
        with h5py.File(self.path, "r") as file:
            data = file["descriptors"]
            if scales is None or tuple(scales) == self.description.scales:
                return data[:]
            missing = [q for q in scales if q not in self.description.scales]
            if missing:
                raise VggfeatError(
                    f"{self.path} has no scale {missing[0]}; it has "
                    f"{', '.join(str(q) for q in self.description.scales)}"
                )
            return np.stack([data[:, self.description.scales.index(q)] for q in scales], axis=1)


def open_hdf5(path: Path, kind: str, version: int) -> h5py.File:
    """Open one of our HDF5 files for reading, after checking that it is one.

    kind: the `format` attribute. Raises VggfeatError: missing, half-written, another kind, another version,
    or links out of the file (a file from a stranger must not make us read other files).
    """
    what = kind.removeprefix("vggfeat-").rstrip("s")
    if path.name.endswith(".partial"):
        raise VggfeatError(f"{path} is half-written: its extraction has not finished; run it to the end")
    if not path.is_file():
        partial = path.with_name(path.name + ".partial")
        hint = f" (there is {partial.name}: its extraction has not finished)" if partial.exists() else ""
        raise VggfeatError(f"no {what} file at {path}{hint}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise VggfeatError(
            f"{path} is not a {what} file: HDF5 can't open it (damaged, or another format)"
        ) from error
    try:
        found = file.attrs.get("format")
        if found != kind:
            raise VggfeatError(f"{path} is not a {what} file (its format is {found!r})")
        if file.attrs.get("format_version") != version:
            raise VggfeatError(
                f"{path} has version {file.attrs.get('format_version')} of the {what} format; this program "
                f"reads version {version}: make the file again"
            )
        _refuse_links(file, path)
    except VggfeatError:
        file.close()
        raise
    except Exception as error:  # h5py meets damage in many ways
        file.close()
        raise VggfeatError(f"{path} is damaged: {error}") from error
    return file


def _refuse_links(group: h5py.Group, path: Path) -> None:
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise VggfeatError(f"{path} is refused: {name} is a link out of its place")
        item = group[name]
        if isinstance(item, h5py.Group):
            _refuse_links(item, path)
        elif item.external or item.is_virtual:
            raise VggfeatError(f"{path} is refused: {name} keeps its data in another file")
        elif h5py.check_string_dtype(item.dtype) is None and item.nbytes > max(
            item.id.get_storage_size(), 1 << 16
        ):
            # also what a claimed shape without data looks like: reading it would fill the memory
            raise VggfeatError(f"{path} is damaged: {name} claims more values than the file holds")


def texts(dataset: h5py.Dataset) -> list[str]:
    """Strings of a dataset, their bytes kept where they are not Unicode."""
    return [raw.decode("utf-8", "surrogateescape") for raw in dataset[:]]


def open_features(path: str | os.PathLike[str]) -> Features:
    """Open a feature file. Raises VggfeatError when it isn't one, or is damaged or half-written."""
    path = Path(path)
    with open_hdf5(path, FORMAT, FORMAT_VERSION) as file:
        try:
            status = file["status"][:]
            splits: dict[str, np.ndarray] = {}
            file["splits"].visititems(
                lambda name, item: splits.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None
            )
            errors = file["errors"]
            attributes = {
                k: v.tolist() if isinstance(v, np.ndarray | np.generic) else v for k, v in file.attrs.items()
            }
            features = Features(
                path=path,
                names=texts(file["names"]),
                labels=file["labels"][:] if "labels" in file else None,
                classes=texts(file["classes"]),
                splits=splits,
                status=status,
                errors={
                    int(i): errors[int(i)].decode("utf-8", "replace")
                    for i in np.flatnonzero(status == UNREADABLE)
                },
                description=Description.from_json(file.attrs["description"]),
                attributes=attributes,
                shape=file["descriptors"].shape,
                dtype=file["descriptors"].dtype,
            )
        except VggfeatError as error:
            raise VggfeatError(f"{path}: {error}") from error
        except Exception as error:  # h5py meets damage in many ways
            raise VggfeatError(f"{path} is damaged: {error}") from error
    count = len(features.names)
    labels = features.labels
    if (
        len(features.shape) != 3
        or features.shape[:2] != (count, len(features.description.scales))
        or features.dtype not in (np.float16, np.float32)
        or status.shape != (count,)
        or (labels is not None and (len(labels) != count or labels.ndim > 2 or labels.dtype.kind != "i"))
        or (labels is not None and labels.ndim == 2 and labels.shape[1] != len(features.classes))
        or any(
            i.ndim != 1 or i.dtype.kind != "i" or (i.size and not 0 <= i.min() <= i.max() < count)
            for i in splits.values()
        )
    ):
        raise VggfeatError(f"{path} is damaged: its parts have different lengths")
    if (status == PENDING).any():
        raise VggfeatError(
            f"{path} is half-written: {(status == PENDING).sum()} rows are pending; extract again"
        )
    return features
