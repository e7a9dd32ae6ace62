"""A set of shards is the file that one extraction makes; what is wrong with it is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Command
from tests.vggfeat.shards.made import SCALES, Job, job, make_images, same
from vggfeat import cli
from vggfeat.errors import VggfeatError
from vggfeat.extract import extract
from vggfeat.features import open_features, open_layers
from vggfeat.model import open_model
from vggfeat.shards.shard import describe_shard
from vggfeat.shards.sharded import merge, open_set, seal
from vggfeat.store import Features

CLOSE = 1e-4
"""Of the largest value: what another batch's arithmetic makes of one image."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job(tmp_path_factory.mktemp("images"), bad={3, 8})


@pytest.fixture(scope="module")
def one(made: Job, tmp_path_factory: pytest.TempPathFactory) -> Features:
    path = tmp_path_factory.mktemp("one") / "one.h5"
    extract(made.items, made.network, path, scales=SCALES, command="cmd", workers=1)
    return open_features(path)


def equal(a: Features, b: Features) -> None:
    """All that is known of the rows; descriptors up to CLOSE."""
    assert list(a.names) == list(b.names) and a.classes == b.classes and a.errors == b.errors
    assert a.labels is not None and b.labels is not None and same(a.labels, b.labels)
    assert same(a.status, b.status) and same(a.crc32, b.crc32)
    assert a.splits.keys() == b.splits.keys()
    assert all(same(a.splits[name], b.splits[name]) for name in a.splits)
    assert a.rows_digest == b.rows_digest and a.description == b.description
    assert (a.shape, a.dtype, a.layers) == (b.shape, b.dtype, b.layers)
    told = [
        {k: v for k, v in f.attributes.items() if k not in ("seconds", "versions")} for f in (a, b)
    ]
    assert told[0] == told[1]
    x, y = a.read(), b.read()
    assert (np.isnan(x) == np.isnan(y)).all()
    assert np.nanmax(np.abs(x - y)) <= CLOSE * np.nanmax(np.abs(y))


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(shard_rows=st.integers(1, 13), bad=st.sets(st.integers(0, 11), max_size=5))
def test_a_set_is_the_file(
    made: Job, shard_rows: int, bad: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("set")
    its = Job(make_images(folder / "images", bad), made.network)
    extract(its.items, its.network, folder / "one.h5", scales=SCALES, command="cmd", workers=1)
    its.made(folder / "set", shard_rows)
    opened = open_features(folder / "set")
    assert len(opened.errors) == len(bad)
    equal(opened, open_features(folder / "one.h5"))
    # merging copies bits
    assert merge(folder / "set", folder / "merged.h5")[0] == 12
    merged = open_features(folder / "merged.h5")
    equal(merged, opened)
    assert same(merged.read(), opened.read())
    rows = np.array([0, 3, 4, 11])
    assert same(opened.read((48,), rows), merged.read((48,), rows))
    opened.verify()


def test_a_set_of_several_layers_is_the_file(made: Job, tmp_path: Path) -> None:
    layers = ("pool5", "fc7")
    its = replace(made, layer=layers)
    extract(its.items, its.network, tmp_path / "one.h5", scales=SCALES, layer=layers, workers=1)
    its.made(tmp_path / "set", 8192)
    merge(tmp_path / "set", tmp_path / "merged.h5")
    with pytest.raises(VggfeatError, match="set has the layers pool5, fc7: choose one"):
        open_features(tmp_path / "set")
    with pytest.raises(VggfeatError, match="begun with further layers fc7, not none"):
        replace(its, layer="pool5").begun(tmp_path / "set", 8192)
    paths = [tmp_path / name for name in ("set", "one.h5", "merged.h5")]
    for number, layer in enumerate(layers):
        opened, one, merged = (open_features(path, layer) for path in paths)
        assert same(opened.read(), one.read()) and same(merged.read(), one.read())
        assert same(opened.read((48,)), one.read((48,)))
        assert opened.description == merged.description and merged.layers == layers
        opened.verify()
        assert [same(f[number].read(), one.read()) for f in map(open_layers, paths)] == [True] * 3


def test_where_a_shard_is_all_of_the_images_the_bits_are_the_files(
    made: Job, one: Features, tmp_path: Path
) -> None:
    made.made(tmp_path / "set", 8192)
    assert same(open_set(tmp_path / "set").read(), one.read())


def test_names_are_read_when_they_are_asked_for(
    made: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.made(tmp_path / "set", 5)
    opened = open_set(tmp_path / "set")
    asked: list[str] = []
    read = opened.place.read

    def noted(name: str, *more: int) -> bytes:
        asked.append(name)
        return read(name, *more)

    monkeypatch.setattr(opened.place, "read", noted)
    assert opened.names[6] == made.items.names[6] and opened.names[5:7] == made.items.names[5:7]
    assert [name.rpartition("/")[2] for name in asked] == ["00001.parquet"]
    assert opened.names[-1] == made.items.names[-1] and len(opened.names) == 12
    assert made.items.names[3] in opened.names and opened.names.index(made.items.names[7]) == 7


def test_what_is_missing_surplus_foreign_or_cut_off_is_named(made: Job, tmp_path: Path) -> None:
    place, plan = made.begun(tmp_path / "set", 5)
    with pytest.raises(
        VggfeatError, match="half-written: 3 of 3 shards are missing, the first is 0"
    ):
        open_set(tmp_path / "set")
    for k in (0, 1):
        describe_shard(place, plan, made.network, k, workers=1)
    with pytest.raises(VggfeatError, match="1 of 3 shards are missing, the first is 2"):
        seal(place, plan)
    with pytest.raises(VggfeatError, match="half-written"):
        merge(tmp_path / "set", tmp_path / "m.h5")
    assert not list(tmp_path.glob("m.h5*"))
    data = tmp_path / "set" / "data"
    whole = (data / "00001.parquet").read_bytes()
    (data / "00002.parquet").write_bytes(whole)
    with pytest.raises(VggfeatError, match=r"00002.parquet has 5 rows of shard 1, not 2 of 2"):
        seal(place, plan)
    (data / "00002.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VggfeatError, match=r"00002.parquet is damaged, or no Parquet file"):
        seal(place, plan)
    (data / "00002.parquet").unlink()
    other, its = made.begun(tmp_path / "other", 5, "float16")
    describe_shard(other, its, made.network, 2, workers=1)
    (data / "00002.parquet").write_bytes(other.read("data/00002.parquet"))
    with pytest.raises(VggfeatError, match=r"00002.parquet is of another plan: move it away"):
        seal(place, plan)
    (data / "00002.parquet").unlink()
    describe_shard(place, plan, made.network, 2, workers=1)
    (data / "00007.parquet").write_bytes(whole)
    with pytest.raises(VggfeatError, match=r"1 shards that its plan doesn't know, such as 00007"):
        seal(place, plan)
    (data / "00007.parquet").unlink()
    seal(place, plan)
    # a bit of a descriptor that the disk has changed
    spoilt = bytearray((data / "00001.parquet").read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    (data / "00001.parquet").write_bytes(spoilt)
    with pytest.raises(VggfeatError, match=r"00001.parquet (is damaged|is of another plan)"):
        open_set(tmp_path / "set").verify()


def test_svm_report_and_neighbours_are_the_same_on_set_and_file(
    tmp_path: Path, run_main: Command
) -> None:
    made = job(tmp_path / "images", bad={8}, n=30)
    made.made(tmp_path / "set", 7)
    merge(tmp_path / "set", tmp_path / "one.h5")
    told = {}
    for name in ("set", "one.h5"):
        where, out = str(tmp_path / name), tmp_path / f"of-{name}"
        out.mkdir()
        svm = ("--C", "1", "--device", "cpu", "--out", out / "m.h5", "--json", out / "r.json")
        ran = run_main(cli.main, "svm", "--features", where, *svm)
        assert ran.status == 0, ran.err
        found = ("--query", "c0/02.png", "--json", out / "n.json")
        near = run_main(cli.main, "neighbours", "--features", where, *found)
        assert near.status == 0, near.err
        page = ("--model", out / "m.h5", "--out", out / "p.html")
        assert run_main(cli.main, "report", "--features", where, *page).status == 0
        results = json.loads((out / "r.json").read_text())
        told[name] = (
            {k: v for k, v in results.items() if k not in ("seconds", "command", "features")},
            json.loads((out / "n.json").read_text()),
            open_model(out / "m.h5").coef_KD,
        )
    assert told["set"][0] == told["one.h5"][0] and told["set"][1] == told["one.h5"][1]
    assert same(told["set"][2], told["one.h5"][2])
