"""The feature file keeps every row, and appears whole."""

from __future__ import annotations

import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import vggfeat
from vggfeat import cli, datasets
from vggfeat.describe import describe_all
from vggfeat.errors import Interrupted, VggfeatError
from vggfeat.extract import extract
from vggfeat.weights import Network

from ..conftest import Command, all_read, assert_same_descriptors, vgg_of

SCALES = (40, 64)


@pytest.fixture(scope="module")
def network() -> Network:
    return vggfeat.load("random:B,width=0.125,crop=32,classes=4")


def test_progress_counts_work_and_ends_at_the_number_of_images(
    network: Network, folder: Path, tmp_path: Path
) -> None:
    (folder / "red" / "03.jpg").write_bytes(b"")
    told: list[float] = []
    items = datasets.load("folder", folder)
    extract(
        items,
        network,
        tmp_path / "f.h5",
        scales=(32, 64),
        progress=lambda done, total: told.append(done),
    )
    assert told[0] == 0
    steps = np.diff(told)
    assert told[-1] == pytest.approx(24)
    assert (steps > 0).all()
    # eight images of one shape are one batch: 1/5 of them at Q=32, 4/5 at Q=64, whose pixels are
    # four times as many
    assert any(step == pytest.approx(8 / 5) for step in steps) and any(
        step == pytest.approx(8 * 4 / 5) for step in steps
    )


# --- the file -------------------------------------------------------------------------------------


def test_every_row_stays_in_its_place(network: Network, folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "03.jpg").write_bytes(b"")
    (folder / "red" / "05.jpg").write_bytes(b"not an image")
    whole = (folder / "blue" / "07.jpg").read_bytes()
    (folder / "blue" / "07.jpg").write_bytes(whole[: len(whole) // 2])
    items = datasets.load("folder", folder)
    report = extract(items, network, tmp_path / "f.h5", scales=SCALES, command="the command")
    assert list(report.unreadable) == ["blue/07.jpg", "red/03.jpg", "red/05.jpg"]
    features = vggfeat.open_features(tmp_path / "f.h5")
    assert features.names == items.names and features.shape == (24, 2, 512)
    bad = [items.names.index(name) for name in report.unreadable]
    assert np.flatnonzero(~features.readable).tolist() == bad
    assert features.errors[bad[1]].startswith("empty file")
    x = features.descriptors
    assert np.isnan(x[bad]).all() and np.isfinite(x[features.readable]).all()
    for i in (0, 8, 23):
        alone = all_read(describe_all(network, [folder / items.names[i]], features.description))[0]
        assert_same_descriptors(x[i], alone)
    np.testing.assert_array_equal(features.read((64,)), x[:, 1:])
    np.testing.assert_array_equal(features.read((64, 40)), x[:, ::-1])
    with pytest.raises(VggfeatError, match="no scale 99; it has 40, 64"):
        features.read((99,))
    with pytest.raises(VggfeatError, match=r"`scales` must be whole numbers of pixels, .* not 64"):
        features.read(64)  # type: ignore[arg-type]
    np.testing.assert_array_equal(features.labels, items.labels)
    assert {name: rows.tolist() for name, rows in features.splits.items()} == {
        name: rows.tolist() for name, rows in items.splits.items()
    }
    assert features.attributes["command"] == "the command"
    assert features.description.fingerprint == network.fingerprint
    assert features.attributes["weights_metadata"]["net"] == "B"
    with h5py.File(tmp_path / "f.h5") as plain:  # contract 3, with plain h5py
        assert {"descriptors", "status", "errors", "names", "labels", "classes", "splits"} <= set(
            plain
        )
        assert plain["status"][:].tolist() == [[2, 2] if i in bad else [1, 1] for i in range(24)]
        assert plain["names/bytes"][:].tobytes() == "".join(items.names).encode()
        assert np.diff(plain["names/offsets"][:]).tolist() == list(map(len, items.names))
        assert plain.attrs["format"] == b"vggfeat-features" and plain.attrs["format_version"] == 2
        np.testing.assert_array_equal(plain["descriptors"][:], x)
        assert plain["labels"].dtype == np.int32 and plain["splits/split0/train"].dtype == np.int64
    assert not (tmp_path / "f.h5.partial").exists()


def test_float16_holds_the_same_to_its_precision_and_refuses_overflow(
    network: Network, folder: Path, tmp_path: Path
) -> None:
    items = datasets.load("folder", folder).first(5)
    extract(items, network, tmp_path / "a.h5", scales=(40,), store="float32")
    extract(items, network, tmp_path / "b.h5", scales=(40,), store="float16")
    a, b = (vggfeat.open_features(tmp_path / f"{n}.h5").descriptors for n in "ab")
    assert b.dtype == np.float16
    np.testing.assert_array_equal(a.astype(np.float16), b)
    with torch.no_grad():
        vgg_of(network).get_parameter("classifier.3.weight").mul_(1e6)
    try:
        with pytest.raises(VggfeatError, match="beyond the range of float16; give `store` float32"):
            extract(items, network, tmp_path / "c.h5", scales=(40,), store="float16")
    finally:
        with torch.no_grad():
            vgg_of(network).get_parameter("classifier.3.weight").div_(1e6)
    assert sorted(p.name for p in tmp_path.glob("*.h5*")) == ["a.h5", "b.h5"]


def test_an_existing_file_stays_until_another_is_whole(
    network: Network, folder: Path, tmp_path: Path
) -> None:
    items = datasets.load("folder", folder)
    out = tmp_path / "f.h5"
    extract(items, network, out, scales=(40,))
    before = out.read_bytes()

    def interrupt(done: float, total: int) -> None:
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(VggfeatError, match="exists; give `overwrite`"):
        extract(items, network, out, scales=(40,))
    with pytest.raises(Interrupted, match="the same command goes on"):
        extract(items, network, out, scales=(40,), overwrite=True, progress=interrupt)
    assert out.read_bytes() == before
    with pytest.raises(VggfeatError, match="no folder"):
        extract(items, network, tmp_path / "no" / "f.h5", scales=(40,))


@pytest.mark.parametrize("kilobytes", [10, 98])
def test_a_disk_without_room_is_found_before_the_work(
    run_main: Command, folder: Path, tmp_path: Path, kilobytes: int
) -> None:
    """Room for nothing, and room for the descriptors but not for the rest; one line, exit 1, no
    file.
    """
    words = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder,
        "--weights",
        "random:A,width=0.125,crop=32",
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, before[1]))
    try:
        ran = run_main(cli.main, *words, "--scales", "32,40", "--out", tmp_path / "f.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1)
    assert ran.err.startswith("vggfeat: can't write") and "File too large" in ran.err
    assert not list(tmp_path.glob("f.h5*"))
