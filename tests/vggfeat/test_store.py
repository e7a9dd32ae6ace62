"""A feature file as it is read: its rows, its layers, and nothing in it is trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggfeat import cli, hdf5
from vggfeat.errors import VggfeatError
from vggfeat.features import open_features
from vggfeat.hdf5 import column, document, open_file, write_file

from ..conftest import Command
from .test_hdf5 import PART, crafted, features_at, refused


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
        ({"further": ["pool5"]}, "descriptions[0] has further layers"),
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
    with pytest.raises(VggfeatError, match="has the layers fc7, pool5: choose one with `layer`"):
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
    path = features_at(tmp_path / "f.h5")
    features = open_features(path)
    assert run_main(cli.main, "info", path, "--verify").status == 0
    with open_file(path, "vggfeat-features", 2) as file:
        at = file.arrays["descriptors"].at + 2 * file.arrays["descriptors"].row_bytes
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    assert run_main(cli.main, "info", path).status == 0
    ran = run_main(cli.main, "info", path, "--verify")
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
