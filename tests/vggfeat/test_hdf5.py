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

import vggfeat
from pretrain.kept import KeptPosteriors, Posteriors
from vggfeat import cli, hdf5
from vggfeat.convert import convert
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.hdf5 import column, document, format_of, open_file, write_file
from vggfeat.model import Model, open_model, save_model
from vggfeat.results import Scored
from vggfeat.store import Description, open_features
from vggfeat.writer import FeatureWriter

from ..conftest import Command

PART = Description(
    "A", "random:A", "ab" * 32, "fc7", (32, 48), True, "floor", "bilinear", "float32", "Pillow"
)
OLD = Path(__file__).parents[1] / "formats" / "version1"
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


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"status": np.full((5, 2), 7)}, "status 7"),
        ({"seconds": np.array([np.nan])}, "it took nan seconds"),
        ({"status": np.zeros((5, 2))}, "5 rows are pending"),
        ({"labels": [0, 1, 2, 0, 0]}, "labels outside of -1..1"),
        ({"labels": [0, 1, -2, 0, 0]}, "labels outside of -1..1"),
        ({"splits__split0__train": [0, 5]}, "split split0/train has rows outside of 0..4"),
        ({"splits__split0__train": [-1, 0]}, "split split0/train has rows outside of 0..4"),
        ({"names__offsets": [0, 1, 0, 1, 2, 3]}, "offsets of names are wrong"),
        ({"names__offsets": [0, 1, 2, 3, 4, 1 << 60]}, "offsets of names are wrong"),
        (
            {"descriptors": np.full((5, 2, 8), np.nan)},
            "descriptors other than written: 4, first that of",
        ),
        (
            {"descriptors": np.full((5, 2, 8), -np.inf)},
            "descriptors other than written: 4, first that of",
        ),
        ({"facts": np.frombuffer(b"[" * 40, np.uint8)}, "is no JSON"),
    ],
)
def test_what_a_feature_file_holds_is_checked(
    tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    path = features_at(tmp_path / "f.h5")
    crafted(path, **values)
    message = refused("features", path)
    assert message.startswith(str(path)) and told in message


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"coef": np.full((2, 8), np.nan)}, "coef has values that are not finite"),
        ({"intercept": [np.inf, 0]}, "intercept has values that are not finite"),
        ({"scored__test__rows": [-1, 0, 1, 2]}, "has the row -1"),
        ({"scored__test__scores": np.full((4, 2), np.nan)}, "not finite"),
    ],
)
def test_what_a_model_holds_is_checked(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    path = model_at(tmp_path / "m.h5")
    crafted(path, **values)
    assert told in refused("model", path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scales": list(range(1, 401))}, "scales must be a list of 1 to 64"),
        ({"scales": [32, 10**9]}, "scales[1] must lie in 1..16384"),
        ({"scales": [32, 0]}, "scales[1] must lie in 1..16384"),
        ({"scales": [32, True]}, "scales[1] must be a whole number"),
        ({"scales": []}, "scales must be a list of 1 to 64"),
        ({"scales": [32, 32]}, "scales must be a list without repeats"),
        ({"mirror": 1}, "mirror must be true or false"),
        ({"pool": "median"}, "pool must be one of floor, ceil, none, not 'median'"),
        ({"precision": "float8"}, "precision must be one of float32, bfloat16"),
        ({"net": None}, "net must be text, not None"),
        ({"more": "x"}, "descriptions[0] can't have 'more': a Description has net, "),
    ],
)
def test_what_a_description_says_is_checked(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    path = tmp_path / "m.h5"
    part = {**PART.to_dict(), **change}
    facts = {"pool": "average", "multi_label": False, "descriptions": [part], "results": {}}
    arrays = {
        "facts": document(facts),
        **column("classes", ["a"]),
        "coef": np.ones((1, 8)),
        "intercept": np.ones(1),
    }
    write_file(path, "vggfeat-model", 2, arrays)
    message = refused("model", path)
    assert message.startswith(f"{path} is damaged: facts: descriptions[0]") and told in message


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((1, 3, 2), np.inf), "no probabilities"),
        (np.full((1, 3, 2), np.nan), "no probabilities"),
        (np.full((1, 3, 2), -0.5), "no probabilities"),
    ],
)
def test_what_kept_posteriors_hold_is_checked(
    tmp_path: Path, values: np.ndarray, told: str
) -> None:
    path = posteriors_at(tmp_path / "p.h5")
    crafted(path, nets__000__dense=values)
    assert told in refused("posteriors", path)


def test_a_model_of_another_length_than_its_descriptors_is_refused(tmp_path: Path) -> None:
    spec = "random:A,width=0.125,crop=32,classes=3"
    network = vggfeat.load(spec)
    part = Description(
        "A",
        spec,
        network.fingerprint,
        "pool5",
        (32,),
        False,
        "floor",
        "bilinear, antialiased",
        "float32",
        "Pillow",
    )
    model = Model(["a"], np.ones((1, 9)), np.zeros(1), (part,), "average", False, None)
    with pytest.raises(VggfeatError, match="weighs 9 values, its descriptors have 64"):
        model.scores([np.zeros((40, 40, 3), np.uint8)])


def test_several_layers_and_boxes(tmp_path: Path) -> None:
    """What version 2 has room for: layers chosen later, and rows of boxes in images."""
    facts = {
        "dataset": "d",
        "protocol": "unlabelled",
        "root": "/x",
        "command": "",
        "layers": ["fc7", "pool5"],
    }
    rows = {
        "rows/image": np.array([0, 0, 1]),
        "rows/box": np.arange(12, dtype=np.int32).reshape(3, 4),
    }
    arrays = {
        "facts": document({**facts, "description": PART.to_dict()}),
        **column("names", ["a", "b"]),
        **column("classes", []),
        **rows,
        "status": np.ones((3, 2), np.uint8),
        "errors": np.zeros(3, "S200"),
        "seconds": np.zeros(1),
        "descriptors": np.ones((3, 2, 8), np.float32),
        "descriptors.pool5": np.ones((3, 2, 4), np.float32),
    }
    checked = {"descriptors": "crc32", "descriptors.pool5": "crc32.pool5"}
    arrays |= {sums: hdf5.checksums(arrays[name]) for name, sums in checked.items()}
    write_file(tmp_path / "f.h5", "vggfeat-features", 2, arrays, checked)
    with pytest.raises(VggfeatError, match="has the layers fc7, pool5: say which one"):
        open_features(tmp_path / "f.h5")
    with pytest.raises(VggfeatError, match="has no layer 'fc6'"):
        open_features(tmp_path / "f.h5", layer="fc6")
    for layer, dim in (("fc7", 8), ("pool5", 4)):
        features = open_features(tmp_path / "f.h5", layer=layer)
        assert features.descriptors.shape == (3, 2, dim) and features.description.layer == layer
        assert features.names == ["a", "a", "b"] and features.boxes is not None
        assert features.boxes.tolist() == rows["rows/box"].tolist()


def test_a_file_that_is_replaced_after_it_was_opened_is_not_mixed_up(tmp_path: Path) -> None:
    features = open_features(features_at(tmp_path / "f.h5"))
    features_at(tmp_path / "g.h5").replace(tmp_path / "f.h5")
    with pytest.raises(VggfeatError, match="was replaced since it was opened"):
        features.read()


def test_a_descriptor_that_changed_on_the_disk_is_found(tmp_path: Path, run_main: Command) -> None:
    """Descriptors have checksums of their own, which opening a file doesn't read."""
    features = open_features(features_at(tmp_path / "f.h5"))
    assert run_main(cli.main, "info", features.path, "--verify").status == 0
    with open_file(features.path, "vggfeat-features", 2) as file:
        at = file.arrays["descriptors"].at + 2 * file.arrays["descriptors"].row_bytes
    raw = bytearray(features.path.read_bytes())
    raw[at] ^= 1
    features.path.write_bytes(raw)
    assert run_main(cli.main, "info", features.path).status == 0
    ran = run_main(cli.main, "info", features.path, "--verify")
    assert ran.status == 1 and "descriptors other than written: 1, first that of" in ran.err
    assert features.read(rows=slice(0, 2)).shape == (2, 2, 8)
    with pytest.raises(
        VggfeatError,
        match="`vggfeat extract --retry`, otherwise as it was made, describes them again",
    ):
        features.read()


def test_rows_are_read_as_numpy_would(tmp_path: Path) -> None:
    features = open_features(features_at(tmp_path / "f.h5"))
    every = features.descriptors
    for rows in (
        slice(None),
        slice(1, 3),
        slice(0, 0),
        np.array([0, 2, 4]),
        np.array([], int),
        np.array([1, 2]),
    ):
        np.testing.assert_array_equal(features.read(rows=rows), every[rows])
        np.testing.assert_array_equal(features.read((48,), rows), every[rows][:, 1:])


# --- version 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["features.h5", "multi.h5", "unlabelled.h5", "model.h5", "posteriors.h5"]
)
def test_files_of_version_1_are_converted_and_nothing_else_reads_them(
    tmp_path: Path, run_main: Command, name: str
) -> None:
    old, new = OLD / name, tmp_path / name
    assert format_of(old) is None
    ran = run_main(cli.main, "info", old)
    assert ran.status == 1 and f"`vggfeat convert {old} NEW`" in ran.err
    ran = run_main(cli.main, "convert", old, new)
    what = {"model.h5": "a model of 2 classes", "posteriors.h5": "kept posteriors"}
    with h5py.File(old) as was:
        made = what.get(name) or f"a feature file of {len(was['names'])} images"
    assert (ran.status, ran.out) == (0, f"{new}: {made}, made of {old}, which stays as it is\n")
    with h5py.File(old) as was:
        if name == "posteriors.h5":
            kept = KeptPosteriors.read(new)
            assert kept.names[1] == "val/b/caf\udce9.png" and kept.unreadable == {
                1: "empty file (0 bytes)"
            }
            np.testing.assert_array_equal(kept.nets[0].modes["crops"], was["nets/000/crops"][:])
            assert kept.nets[1].of["net"] == "E" and kept.nets[0].scales == (256, 288)
        elif name == "model.h5":
            model = open_model(new)
            np.testing.assert_array_equal(model.coef_KD, was["coef"][:])
            assert model.parts[0].layer == "pool4" and model.results is not None
            results = json.loads(was["results"][()])
            del results["scales"]  # a key that has gone since
            assert model.results.to_json() == results
            np.testing.assert_array_equal(
                model.scored["split0"].scores, was["scored/split0/scores"][:]
            )
        else:
            features = open_features(new)
            np.testing.assert_array_equal(features.descriptors, was["descriptors"][:])
            assert [os.fsencode(text) for text in features.names] == was["names"][:].tolist()
            np.testing.assert_array_equal(features.status, was["status"][:])
            assert (features.labels is None) == ("labels" not in was)
            assert features.attributes["command"] == was.attrs["command"]
    with pytest.raises(VggfeatError, match="is of version 2 already"):
        convert(new, tmp_path / "again.h5")
    assert not (tmp_path / "again.h5").exists()


@pytest.mark.parametrize(
    ("kind", "array", "value", "told"),
    [
        ("features", "descriptors", np.nan, "descriptors other than written: 1, first that of"),
        ("features", "descriptors", np.inf, "descriptors other than written: 1, first that of"),
        ("features", "status", 7, "it has a row of status 7"),
        ("features", "labels", 99, "labels outside of"),
        (
            "posteriors",
            "nets/000/dense",
            np.inf,
            "nets/000/dense has values that are no probabilities",
        ),
    ],
)
def test_what_is_false_in_version_1_is_not_converted(
    tmp_path: Path, kind: str, array: str, value: float, told: str
) -> None:
    old = tmp_path / "old.h5"
    old.write_bytes((OLD / f"{kind}.h5").read_bytes())
    with h5py.File(old, "r+") as file:
        file[array][0] = value
    with pytest.raises(VggfeatError, match=told):
        convert(old, tmp_path / "new.h5")
    assert not (tmp_path / "new.h5").exists()


def test_libhdf5_is_given_a_limit_of_time_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two zero bytes in the heap of its strings: libhdf5 2.0 goes round for ever, earlier ones may
    refuse it.
    """
    monkeypatch.setattr("vggfeat.convert.SECONDS", 5)
    raw = bytearray((OLD / "features.h5").read_bytes())
    at = raw.index(b"GCOL")
    told = set()
    for place in range(at + 16, at + 600, 40):
        damaged = raw.copy()
        damaged[place : place + 8] = bytes(8)
        (tmp_path / "f.h5").write_bytes(damaged)
        try:
            convert(tmp_path / "f.h5", tmp_path / "new.h5")
        except VggfeatError as error:
            told.add(str(error).removeprefix(f"{tmp_path / 'f.h5'} ")[:20])
            if "more than 5 s" in str(error):
                break
        (tmp_path / "new.h5").unlink(missing_ok=True)
    assert told and all(
        line.startswith(("is damaged", "is no file", "is refused")) for line in told
    ), told
