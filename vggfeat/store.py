"""The HDF5 feature file: what is in it, and its reader (`writer` writes it). N images, Q scales, D descriptor length.

Row i is always item i of the dataset: an unreadable image keeps its row (NaN, status 2 and a reason).
The file has its final name only when it is complete; until then it is `NAME.partial`.
`docs/formats.md` has the layout for readers without this package.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vggfeat.errors import VggfeatError

FORMAT = "vggfeat-features"
FORMAT_VERSION = 1
PENDING, DONE, UNREADABLE = 0, 1, 2
REASON_BYTES = 200  # of why an image is unreadable
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


def encode(text: str) -> bytes:
    """File names need not be valid Unicode; their bytes are kept."""
    return text.encode("utf-8", "surrogateescape")


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

    def read(
        self, scales: tuple[int, ...] | None = None, rows: slice | np.ndarray = slice(None)
    ) -> np.ndarray:
        """(N, Q, D) for a subset of the stored scales, in the order given, and of the rows; all by default.

        rows: a slice, or rising indices. Raises VggfeatError for a scale that the file doesn't have.
        """
        with h5py.File(self.path, "r") as file:
            data = file["descriptors"]
            if scales is None or tuple(scales) == self.description.scales:
                return data[rows]
            missing = [q for q in scales if q not in self.description.scales]
            if missing:
                raise VggfeatError(
                    f"{self.path} has no scale {missing[0]}; it has "
                    f"{', '.join(str(q) for q in self.description.scales)}"
                )
            return np.stack([data[rows, self.description.scales.index(q)] for q in scales], axis=1)


def create_hdf5(path: Path) -> h5py.File:
    """A new file for writing, in the oldest form of HDF5 whose structure carries checksums.

    HDF5 finds damage in it; without them it follows a damaged pointer, for ever or out of its memory.
    """
    return h5py.File(path, "w", libver=("v108", "v108"))


def format_of(path: Path) -> str | None:
    """The `format` of an HDF5 file of this program; None for any other file."""
    if not path.is_file() or not _has_checksums(path):
        return None
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("format"))
    except Exception:  # h5py meets damage in many ways; whoever reads the file says which
        return None


def _has_checksums(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)  # the signature, and the version of the superblock
    return head[:8] == b"\x89HDF\r\n\x1a\n" and len(head) == 9 and head[8] >= 2


def open_hdf5(path: Path, kind: str, version: int, *, unfinished: bool = False) -> h5py.File:
    """Open one of our HDF5 files for reading, after checking that it is one.

    kind: the `format` attribute. unfinished: also one that the caller is writing.
    Raises VggfeatError: missing, half-written, another kind, another version,
    or links out of the file (a file from a stranger must not make us read other files).
    """
    what = kind.removeprefix("vggfeat-").rstrip("s")
    if path.name.endswith(".partial") and not unfinished:
        raise VggfeatError(f"{path} is half-written: its extraction has not finished; run it to the end")
    if not path.is_file():
        partial = path.with_name(path.name + ".partial")
        hint = f" (there is {partial.name}: its extraction has not finished)" if partial.exists() else ""
        raise VggfeatError(f"no {what} file at {path}{hint}")
    no_such_file = (
        f"{path} is not a {what} file: damaged, another format, or written before files had checksums"
    )
    if not _has_checksums(path):
        raise VggfeatError(no_such_file)
    try:
        file = h5py.File(path, "r", locking=False) if unfinished else h5py.File(path, "r")
    except Exception as error:  # h5py meets damage in many ways
        raise VggfeatError(no_such_file) from error
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
        elif item.nbytes > max(item.id.get_storage_size(), 1 << 16):
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
            if "seconds" in file:
                attributes["seconds"] = float(file["seconds"][0])
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
