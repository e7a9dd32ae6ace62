"""Files of version 1, which libhdf5 reads within limits: converted, or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import pretrain.kept
import vggfeat.model
import vggfeat.store
from pretrain.kept import KeptPosteriors
from vggfeat import cli
from vggfeat.convert import KINDS, convert
from vggfeat.errors import VggfeatError
from vggfeat.features import open_features
from vggfeat.hdf5 import format_of
from vggfeat.model import open_model

from ..conftest import HANG, Command, python_that_runs

OLD = Path(__file__).parents[1] / "formats" / "version1"


def test_the_formats_have_their_modules_names() -> None:
    assert KINDS == (vggfeat.store.FORMAT, vggfeat.model.FORMAT, pretrain.kept.FORMAT)


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
            assert kept.nets[1].facts["net"] == "E" and kept.nets[0].scales == (256, 288)
        elif name == "model.h5":
            model = open_model(new)
            np.testing.assert_array_equal(model.coef_KD, was["coef"][:])
            assert model.parts[0].layer == "pool4" and model.results is not None
            results = json.loads(was["results"][()])
            del results["scales"]  # a key that has gone since
            results["head"] = "svm"  # and one that has come
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


@pytest.mark.parametrize(
    ("does", "limits", "says"),
    [
        ("while True: pass", {}, "it took more than 1 s to read|libhdf5 ended with status -"),
        ("signal.pause()", {}, "it took more than 1 s to read"),
        ("bytearray(convert.MEMORY)", {"SECONDS": HANG}, "MemoryError"),
    ],
)
def test_libhdf5_is_given_a_limit_of_time_and_memory(
    does: str,
    limits: dict[str, int],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    python = python_that_runs(tmp_path, CHILD.format(does=does))
    monkeypatch.setattr(sys, "executable", python)
    for name, value in {"SECONDS": 1, **limits}.items():
        monkeypatch.setattr(f"vggfeat.convert.{name}", value)
    old, new = OLD / "features.h5", tmp_path / "new.h5"
    with pytest.raises(VggfeatError, match=f"^{old} is damaged: ({says})"):
        convert(old, new)
    assert not new.exists()
    if does.startswith("while"):  # by the kernel, too, should its parent be gone
        ran = subprocess.run([python, "-m", "vggfeat.convert", old, new, str(1 << 31), "1"])
        assert -ran.returncode in (signal.SIGKILL, signal.SIGXCPU)


# A child in which something other than libhdf5 is given the file.
CHILD = """
import signal
from vggfeat import convert
def other(*_):
    {does}
convert._convert = other
convert._main(*sys.argv[-4:])
"""


def test_damage_among_texts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
