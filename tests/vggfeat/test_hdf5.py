"""Our HDF5 files: any reader of HDF5 reads the same, ours needs no libhdf5, and nothing in one is
trusted.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pretrain.kept import KeptPosteriors, Posteriors
from vggfeat import hdf5
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.features import open_features
from vggfeat.hdf5 import column, open_file, write_file
from vggfeat.model import Model, open_model, save_model
from vggfeat.results import Scored
from vggfeat.store import Description
from vggfeat.writer import FeatureWriter

PART = Description(
    "A", "random:A", "ab" * 32, "fc7", (32, 48), True, "floor", "bilinear", "float32", "Pillow"
)
NAMES = ["a.jpg", "", "ü" * 3000, "caf\udce9\n.jpg", "e.jpg"]


def features_at(path: Path, count: int = 5) -> Path:
    """A finished feature file; its fourth row is unreadable."""
    splits = {"split0/train": np.array([0, 2]), "split0/test": np.zeros(0, np.int64)}
    items = Items(
        "folder",
        "single-label",
        Path("/x"),
        NAMES,
        np.arange(5, dtype=np.int32) % 2,
        ["a", "b"],
        splits,
    )
    with FeatureWriter.open(path, items, PART, 8) as file:
        for i in range(5):
            for s in range(2):
                file.write(i, s, np.full(8, 10 * i + s, np.float32))
        file.fail(3, "why not")
        file.finish()
    return path


def model_at(path: Path) -> Path:
    scored = {"test": Scored(np.arange(4), np.zeros((4, 2)))}
    save_model(
        path,
        Model(["a", "ü"], np.ones((2, 8)), np.zeros(2), (PART,), "average", False, None, scored),
    )
    return path


def posteriors_at(path: Path) -> Path:
    facts = dict.fromkeys(
        ("net", "train_scale", "crop", "learn", "recipe", "seed", "weights", "fingerprint"), "x"
    )
    values = np.full((1, 3, 2), 0.5, np.float32)
    values[0, 1] = np.nan
    nets = [Posteriors({**facts, "precision": "float32"}, (256,), {"dense": values})]
    kept = KeptPosteriors(
        "imagenet", "d", "val", ["a", "b", "c"], np.array([0, 1, -1]), ["x", "y"], {1: "why"}, nets
    )
    kept.save(path)
    return path


MAKERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "features": (features_at, lambda path: open_features(path).descriptors),
    "model": (model_at, open_model),
    "posteriors": (posteriors_at, KeptPosteriors.read),
}
kinds = pytest.mark.parametrize("kind", MAKERS)


def crafted(
    path: Path, table: Callable[[dict[str, Any]], Any] = lambda table: None, **values: Any
) -> None:
    """What a stranger can make of a file: another table, other values of arrays, and right
    checksums for both.
    """
    raw = bytearray(path.read_bytes())
    length = struct.unpack_from("<I", raw, 8)[0]
    held = json.loads(raw[64 : 64 + length])
    for name, value in values.items():
        kind, _, at = held["arrays"][name.replace("__", "/")]
        data = np.ascontiguousarray(value, kind).tobytes()
        raw[at : at + len(data)] = data
    changed = table(held)
    text = json.dumps(held if changed is None else changed).encode()
    assert len(text) <= 4096 - 64
    raw[8:12] = struct.pack("<I", len(text))
    raw[64 : 64 + len(text)] = text
    path.write_bytes(raw)
    reseal(path)


def reseal(path: Path) -> None:
    """Right checksums for whatever is in a file."""
    with open(path, "r+b") as file:
        head = file.read(12)
        length = struct.unpack("<I", head[8:])[0] if len(head) == 12 else 0
        file.seek(64)
        checksum = zlib.crc32(file.read(min(length, 1 << 20)))
        file.seek(12)
        file.write(struct.pack("<I", checksum))
        file.flush()
        try:
            with hdf5.File(path, file.fileno(), unfinished=True) as made:
                for name, sums in made.checked.items():
                    values = made.arrays[name].read(made.descriptor)
                    made.arrays[sums].write(made.descriptor, hdf5.checksums(values))
                made.seal()
        except (VggfeatError, MemoryError):
            pass  # so broken that it has no seal


def refused(kind: str, path: Path) -> str:
    with pytest.raises(VggfeatError) as caught:
        MAKERS[kind][1](path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the same by any reader -----------------------------------------------------------------------


def test_libhdf5_reads_what_we_read(tmp_path: Path) -> None:
    features = open_features(features_at(tmp_path / "f.h5"))
    assert features.names == NAMES and features.errors == {3: "why not"}
    assert features.status.tolist() == [1, 1, 1, 2, 1] and features.layers == ("fc7",)
    with h5py.File(features.path) as file:
        np.testing.assert_array_equal(file["descriptors"][:], features.descriptors)
        offsets, raw = file["names/offsets"][:], file["names/bytes"][:].tobytes()
        names = [raw[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(offsets)]
        assert names == NAMES and file["errors"][3] == b"why not"
        assert json.loads(file["facts"][:].tobytes())["description"]["net"] == "A"
        assert file.attrs["format"] == b"vggfeat-features" and file.attrs["format_version"] == 2
        assert "crc32" not in file
    assert np.isnan(features.descriptors[3]).all()


def test_no_structure_of_a_file_is_kept_where_it_has_no_checksum(tmp_path: Path) -> None:
    """No heap, no old group: what libhdf5 follows in it is in headers with checksums, for other
    readers' sake.
    """
    for maker, _ in MAKERS.values():
        raw = maker(tmp_path / maker.__name__).read_bytes()
        assert not any(word in raw for word in (b"GCOL", b"HEAP", b"SNOD", b"TREE"))
        at = raw.index(hdf5.HDF5_SIGNATURE)
        assert raw[at + 8] == 2  # of the superblock


@pytest.mark.parametrize("values", [[], [""], ["a", "", "\udcff"], ["x" * 100_000, "y"]])
def test_texts_come_back(tmp_path: Path, values: list[str]) -> None:
    write_file(tmp_path / "t", "vggfeat-test", 1, column("t", values))
    with open_file(tmp_path / "t", "vggfeat-test", 1) as file:
        assert file.texts("t") == values


def test_reading_needs_no_lock_and_no_writing(tmp_path: Path, locks: None) -> None:
    import fcntl

    path = features_at(tmp_path / "f.h5")
    path.chmod(0o444)
    with open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert open_features(path).readable.sum() == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_why_a_file_cant_be_opened_just_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = features_at(tmp_path / "f.h5")

    def no(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    for name in ("open", "preadv"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no)
            message = refused("features", path)
        assert message == f"can't read {path}: {os.strerror(number)}"
    assert open_features(path).shape == (5, 2, 8)


# --- damage and strangers -------------------------------------------------------------------------


@kinds
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind][0](tmp_path / "f")
    raw = path.read_bytes()
    for at in range(0, len(raw), 37):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        assert "no structure" not in refused(kind, path)
    for end in (0, 7, 8, 64, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:end])
        refused(kind, path)
    path.write_bytes(raw + b"\0")
    assert "bytes, not" in refused(kind, path)


@kinds
def test_a_file_that_another_program_has_written_into_is_refused(tmp_path: Path, kind: str) -> None:
    """Forty groups, each linked twice from the one before it: whoever walks them walks 2^40
    paths.
    """
    path = MAKERS[kind][0](tmp_path / "f.h5")
    with h5py.File(path, "r+") as file:
        group = file.create_group("z")
        for _ in range(40):
            inner = group.create_group("a")
            group["b"] = inner
            group = inner
    assert "is damaged: it has" in refused(kind, path)


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = to

    return change


@kinds
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: [], "damaged"),
        (lambda table: {}, "damaged"),
        (_set("arrays", to=[1]), "damaged"),
        (_set("checked", to={"facts": "facts"}), "checksums of facts are not one a row"),
        (_set("checked", to={"nothing": "facts"}), "damaged"),
        (_set("size", to=10**15), "bytes, not"),
        (_set("arrays", "facts", to=["|u1", [1 << 40], 0]), "overlap"),
        (_set("arrays", "facts", to=["|u1", [1 << 40], 1 << 20]), "beyond its end"),
        (_set("arrays", "facts", to=["|u1", [1 << 62, 1 << 62], 1 << 20]), "impossible place"),
        (_set("arrays", "facts", to=["|u1", [-5], 1 << 20]), "impossible place"),
        (_set("arrays", "facts", to=["|O", [5], 4096]), "unknown type"),
        (_set("arrays", "facts", to=["|S1000000000", [5], 4096]), "unknown type"),
        (_set("arrays", "facts", to=["|Sx", [5], 4096]), "damaged"),
        (_set("arrays", "facts", to=["|u1", [5]]), "damaged"),
        (_set("arrays", "facts", to="|u1"), "damaged"),
        (lambda table: table["arrays"].pop("facts") and None, "it has no facts"),
        (
            lambda table: table["arrays"].update(
                facts=["|u1", [2, 2], table["arrays"]["facts"][2]]
            ),
            "facts is uint8",
        ),
    ],
)
def test_a_table_is_not_trusted(
    tmp_path: Path, kind: str, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    path = MAKERS[kind][0](tmp_path / "f.h5")
    crafted(path, change)
    assert told in refused(kind, path)
