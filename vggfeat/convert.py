"""Files of version 1, which libhdf5 has to read -> files of version 2, in a process with limits of
memory and time.

    vggfeat convert OLD NEW

Files of version 1 keep texts where HDF5 has no checksums: damage there, or a crafted file, makes
libhdf5 run for ever or out of memory. So it reads them in a process of its own, which is ended when
it takes more than its share.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np

from vggfeat import hdf5
from vggfeat.errors import VggfeatError, reason
from vggfeat.files import whole
from vggfeat.hdf5 import Layout, column, decode, document
from vggfeat.store import DONE, PENDING, REASON_BYTES, UNREADABLE

MEMORY, SECONDS = 2 << 30, 60
"""Of the child: bytes beside twice the file's length, and seconds beside one for 10 MB."""
# as `store`, `model` and `pretrain.kept` call theirs, which are imported where they are needed
FEATURES, MODEL, POSTERIORS = "vggfeat-features", "vggfeat-model", "vggfeat-posteriors"
KINDS = (FEATURES, MODEL, POSTERIORS)
REFUSED = 9  # exit status of a child that says why
ROWS = 1 << 24  # bytes of descriptors that are copied at a time


def convert(old: Path, new: Path) -> str:
    """Write the file `new` with all that is in `old`; it appears whole. What it is, in words.

    Raises VggfeatError: `old` is no file of version 1, is damaged, or takes too much memory or time
    to read.
    """
    try:
        size = os.stat(old).st_size
    except (OSError, ValueError) as error:
        raise VggfeatError(f"can't read {old}: {reason(error)}") from error
    if not old.is_file():
        raise VggfeatError(f"{old} is no file")
    seconds = SECONDS + size // 10_000_000
    with whole(new, durable=True) as partial:
        command = [sys.executable, "-m", "vggfeat.convert", os.fspath(old), os.fspath(partial)]
        limits = [str(MEMORY + 2 * size), str(seconds)]
        try:
            child = subprocess.run(
                [*command, *limits], capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise VggfeatError(f"{old} is damaged: it took more than {seconds} s to read") from None
        if child.returncode == REFUSED:
            raise VggfeatError(f"{old} {decode(child.stderr).splitlines()[-1]}")
        if child.returncode:
            lines = decode(child.stderr).splitlines() or [
                f"libhdf5 ended with status {child.returncode}"
            ]
            raise VggfeatError(f"{old} is damaged: {lines[-1]}")
        found = hdf5.format_of(partial)
        if found is None:
            raise VggfeatError(f"{old} is damaged: what was made of it can't be read")
        return _checked(partial, found)


def _checked(made: Path, format: str) -> str:
    """What was made, in words, after reading it as everybody will, before it gets its name. Raises
    VggfeatError.
    """
    if format == FEATURES:
        from vggfeat.store import open_feature_file

        features = open_feature_file(made)
        features.verify()
        return f"a feature file of {features.shape[0]:,} images"
    if format == MODEL:
        from vggfeat.model import open_model

        return f"a model of {len(open_model(made).classes):,} classes"
    return "kept posteriors"


class _Refused(Exception):  # noqa: N818 - it ends the child
    """Why a file can't be converted, as the end of a sentence about it."""


def _main(old: str, new: str, memory: str, seconds: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(memory),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _convert(Path(old), Path(new))
    except _Refused as error:
        _end(str(error))
    except OSError as error:
        _end(f"{'is damaged' if error.errno is None else 'cannot be converted'}: {error}")
    except BaseException as error:  # h5py meets damage in many ways
        _end(f"is damaged: {type(error).__name__} {error}")
    os._exit(0)


def _end(why: str) -> NoReturn:
    """Tell the parent why, and end without libhdf5's own end, which damage can make hang."""
    os.write(2, hdf5.encode(" ".join(why.split())))
    os._exit(REFUSED)


def _convert(old: Path, new: Path) -> None:
    with open(old, "rb") as raw:
        start = raw.read(8)
    if start == hdf5.MAGIC:
        raise _Refused("is of version 2 already")
    if start != hdf5.HDF5_SIGNATURE:
        raise _Refused("is no HDF5 file")
    with h5py.File(old, "r", locking=False) as file:
        format, version = file.attrs.get("format"), file.attrs.get("format_version")
        if format not in KINDS or version != 1:
            raise _Refused(
                f"is no file of version 1 of this program (its format is {str(format)[:40]!r})"
            )
        _refuse_links(file)
        if format == FEATURES:
            _features(file, new)
        else:
            arrays = _model(file) if format == MODEL else _posteriors(file)
            hdf5.write_file(new, format, 2, arrays)


def _refuse_links(group: h5py.Group, seen: int = 0) -> int:
    for name in group:
        seen += 1
        if seen > 10_000:
            raise _Refused("is refused: it has more than 10,000 objects")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise _Refused(f"is refused: {name} is a link out of its place")
        item = group[name]
        if isinstance(item, h5py.Group):
            seen = _refuse_links(item, seen)
        elif item.external or item.is_virtual:
            raise _Refused(f"is refused: {name} keeps its data in another file")
        elif item.nbytes > max(item.id.get_storage_size(), 1 << 16):
            raise _Refused(f"is damaged: {name} claims more values than the file holds")
    return seen


def _texts(dataset: h5py.Dataset) -> list[str]:
    return [decode(raw) for raw in dataset[:]]


def _description(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "decoder": "Pillow"}


def _features(file: h5py.File, new: Path) -> None:
    """All arrays but the descriptors at once, these in parts."""
    stored, done_NQ = file["descriptors"], file["described"][:] == 1
    count, scales, dim = stored.shape
    status = file["status"][:]
    if (status == PENDING).any():
        raise _Refused("is half-written: only a finished extraction can be converted")
    if (status > UNREADABLE).any():
        raise _Refused(f"is damaged: it has a row of status {status.max()}, which there isn't")
    status_NQ = np.where(
        (status == UNREADABLE)[:, None], UNREADABLE, np.where(done_NQ, DONE, PENDING)
    )
    attributes = file.attrs
    description = _description(json.loads(attributes["description"]))
    root = attributes["root"]
    facts = {
        **{
            key: str(attributes[key])
            for key in ("dataset", "protocol", "command")
            if key in attributes
        },
        "root": decode(root) if isinstance(root, bytes) else str(root),
        "layers": [description["layer"]],
        "description": description,
        **{
            key: json.loads(attributes[key])
            for key in ("weights_metadata", "versions")
            if key in attributes
        },
    }
    facts.setdefault("command", "")
    zeros = np.zeros(count, np.int64)
    arrays = {
        "facts": document(facts),
        **column("names", _texts(file["names"])),
        **column("classes", _texts(file["classes"])),
        **({"labels": file["labels"][:]} if "labels" in file else {}),
    }
    file["splits"].visititems(
        lambda name, item: (
            arrays.update({f"splits/{name}": item[:]}) if isinstance(item, h5py.Dataset) else None
        )
    )
    arrays |= {
        "status": status_NQ.astype(np.uint8),
        "errors": np.array(
            [decode(raw).encode("utf-8", "replace") for raw in file["errors"][:]],
            f"S{REASON_BYTES}",
        ),
        # their checksums were of parts of the images: nothing is known of them
        **{f"images/{name}": zeros for name in ("bytes", "modified", "changed")},
        "images/crc32": zeros.astype(np.uint32),
        "seconds": np.asarray(file["seconds"][:] if "seconds" in file else [0.0], np.float64),
    }
    specs = {name: (values.shape, values.dtype) for name, values in arrays.items()}
    specs |= {
        "crc32": ((count, scales), np.dtype("<u4")),
        "descriptors": ((count, scales, dim), stored.dtype),
    }
    layout = Layout.of_arrays(FEATURES, 2, specs, {"descriptors": "crc32"})
    descriptor = os.open(new, os.O_RDWR | os.O_CLOEXEC)
    layout.write(descriptor)
    for name, values in arrays.items():
        layout.places[name].write(descriptor, values)
    step = max(1, ROWS // max(1, stored.dtype.itemsize * scales * dim))
    for low in range(0, count, step):
        block_NQD = stored[low : low + step]
        layout.places["descriptors"].write(descriptor, block_NQD, low)
        layout.places["crc32"].write(descriptor, hdf5.checksums(block_NQD), low)
    with hdf5.File(new, descriptor, unfinished=True) as made:
        made.seal()


def _model(file: h5py.File) -> dict[str, np.ndarray]:
    facts = {
        "pool": str(file.attrs["pool"]),
        "multi_label": bool(file.attrs["multi_label"]),
        "descriptions": [_description(json.loads(text)) for text in _texts(file["descriptions"])],
        "results": json.loads(file["results"][()]),
    }
    arrays = {"facts": document(facts), **column("classes", _texts(file["classes"]))}
    arrays |= {name: file[name][:] for name in ("coef", "intercept")}
    for name, part in file.get("scored", {}).items():
        arrays |= {f"scored/{name}/{key}": part[key][:] for key in ("rows", "scores")}
    return arrays


def _posteriors(file: h5py.File) -> dict[str, np.ndarray]:
    nets = []
    arrays: dict[str, np.ndarray] = {}
    for n, key in enumerate(sorted(file["nets"])):
        group = file["nets"][key]
        facts = {name: str(value) for name, value in group.attrs.items() if name != "scales"}
        scales = [int(q) for q in group.attrs["scales"]]
        nets.append({"of": facts, "scales": scales, "modes": list(group)})
        for mode in group:
            arrays[f"nets/{n:03d}/{mode}"] = posteriors = group[mode][:]
            # NaN, of what can't be read, is neither
            if ((posteriors < 0) | (posteriors > 1 + 1e-5)).any():
                raise _Refused(
                    f"is damaged: nets/{key}/{mode} has values that are no probabilities"
                )
    about = {key: str(file.attrs.get(key, "")) for key in ("dataset", "data", "split")}
    return {
        "facts": document({**about, "nets": nets}),
        **column("names", _texts(file["names"])),
        **column("classes", _texts(file["classes"])),
        "labels": file["labels"][:],
        "unreadable/rows": file["unreadable/rows"][:],
        **column("unreadable/reasons", _texts(file["unreadable/reasons"])),
        **arrays,
    }


if __name__ == "__main__":
    _main(*sys.argv[1:])
