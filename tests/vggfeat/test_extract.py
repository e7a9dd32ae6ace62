"""The feature file keeps every row, and appears whole; what `vggfeat extract` says of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import vggfeat
from vggfeat import cli, datasets, writer
from vggfeat.describe import describe, describe_all
from vggfeat.errors import Interrupted, VggfeatError
from vggfeat.extract import _Behind, extract, is_of
from vggfeat.weights import Network

from ..conftest import HANG, Command, all_read, assert_same_descriptors, vgg_of
from .conftest import NET, SMALL, Made, cells, read_predictions

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


LAYERS = ("pool5", "fc7", "conv1_1")


def test_layers_of_one_pass_are_the_files_of_each(
    network: Network, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whether it was killed on the way or not; an unreadable image is one in all."""
    (folder / "red" / "03.jpg").write_bytes(b"")
    items, out = datasets.load("folder", folder), tmp_path / "f.h5"
    settings: dict[str, Any] = {"scales": SCALES, "batch_size": 1}
    write, count = writer.FeatureWriter.write, 0

    def stop(self: writer.FeatureWriter, *row: Any) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise VggfeatError("stop")
        write(self, *row)

    with monkeypatch.context() as patch, pytest.raises(VggfeatError, match="goes on from there"):
        patch.setattr(writer.FeatureWriter, "write", stop)
        extract(items, network, out, layer=LAYERS, **settings)
    with pytest.raises(VggfeatError, match="was begun with further layers fc7,conv1_1, not fc7"):
        extract(items, network, out, layer=LAYERS[:2], **settings)
    assert extract(items, network, out, layer=LAYERS, **settings).earlier > 0
    assert is_of(out, items, network, scales=SCALES, layer=LAYERS)
    assert not is_of(out, items, network, scales=SCALES, layer="pool5")
    with pytest.raises(VggfeatError, match="has the layers pool5, fc7, conv1_1: choose one"):
        vggfeat.open_features(out)
    for layer in LAYERS:
        extract(items, network, tmp_path / f"{layer}.h5", layer=layer, **settings)
        one, alone = (
            vggfeat.open_features(out, layer),
            vggfeat.open_features(f"{tmp_path}/{layer}.h5"),
        )
        assert one.descriptors.tobytes() == alone.descriptors.tobytes() and len(one.errors) == 1
        assert one.description == alone.description and one.rows_digest == alone.rows_digest
        one.verify()


def test_a_spoilt_descriptor_of_any_layer_is_described_again(
    network: Network, folder: Path, tmp_path: Path
) -> None:
    items, out = datasets.load("folder", folder), tmp_path / "f.h5"
    extract(items, network, out, layer=LAYERS, scales=SCALES)
    before = vggfeat.open_features(out, "fc7")
    value = before.descriptors[5, 1].tobytes()
    raw = out.read_bytes()
    at = raw.index(value) + 40
    out.write_bytes(raw[:at] + b"\x01\x02\x03\x04" + raw[at + 4 :])
    with pytest.raises(VggfeatError, match="descriptors other than written: 1"):
        vggfeat.open_features(out, "fc7").verify()
    vggfeat.open_features(out, "pool5").verify()
    assert extract(items, network, out, layer=LAYERS, scales=SCALES, retry=True).earlier == 23
    assert_same_descriptors(vggfeat.open_features(out, "fc7").descriptors, before.descriptors)


def test_a_layer_is_chosen_after_the_extraction(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By svm, whose model remembers it: predict and report take it from the file, or of images."""
    monkeypatch.chdir(tmp_path)
    ran = command(
        *("extract", "--dataset", "folder", "--root", folder, *SMALL, "--layer", "pool5,fc7"),
        *("--out", "f.h5"),
    )
    assert ran.status == 0 and "pool5, 2 x 64; fc7, 2 x 512: Q = 32, 48" in ran.err
    told = command("info", "f.h5", "--verify", "--json", "i.json")
    assert cells(told.out, "layers")[0].startswith("pool5, 64 values; fc7, 512 values;")
    assert json.loads(Path("i.json").read_text())["layers"] == ["pool5", "fc7"]
    fit = ("--C", 1, "--workers", 1)
    ran = command("svm", "--features", "f.h5", *fit)
    assert (ran.status, ran.err.count("\n")) == (1, 1)
    assert "f.h5 has the layers pool5, fc7: choose one with --layer" in ran.err
    ran = command("svm", "--features", "f.h5", "--layer", "fc6", *fit)
    assert ran.status == 1 and "f.h5 has no layer 'fc6'; it has pool5, fc7" in ran.err
    assert command("svm", "--features", "f.h5", "--layer", "fc7", "--out", "m", *fit).status == 0
    assert [part.layer for part in vggfeat.open_model("m").parts] == ["fc7"]
    # both layers of the file, stacked
    both = ("--features", "f.h5", "--features", "f.h5")
    ran = command("svm", *both, "--layer", "fc7,pool5", "--out", "two", *fit)
    assert ran.status == 0 and vggfeat.open_model("two").coef_KD.shape[1] == 512 + 64
    ran = command("svm", *both, "--layer", "fc7,pool5,fc6", *fit)
    assert ran.status == 1 and "3 layers of 2 feature files: give --layer one" in ran.err
    images = sorted(folder.rglob("*.jpg"))[:3]
    of = []
    for given in (["f.h5", "f.h5"], images):
        ran = command("predict", *given, "--model", "two", "--out", "p.csv", "--scores")
        assert ran.status == 0, ran.err
        of.append(read_predictions(Path("p.csv"))[3][:3])
        Path("p.csv").unlink()
    np.testing.assert_allclose(of[0], of[1], atol=1e-4)
    assert command("predict", "f.h5", "--model", "m").status == 0
    ran = command("report", "--model", "two", *both)
    assert ran.status == 0, ran.err
    ran = command("report", "--model", "m", *both, "--out", "x.html")
    assert ran.status == 1 and "the results are of 1 feature files; 2 given" in ran.err
    query = ("--features", "f.h5", "--query", images[0], "--top", 1)
    assert command("neighbours", *query).status == 1
    assert "1.0000" in command("neighbours", *query, "--layer", "pool5").out


def test_a_slow_disk_does_not_hold_up_the_device(
    network: Network, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first flush comes back when all images are described, and not before."""
    described, all_of_them = 0, threading.Event()
    flush = writer.FeatureWriter.flush

    def describing(network: Network, images_NHWC: torch.Tensor, **how: Any) -> torch.Tensor:
        nonlocal described
        described += len(images_NHWC)
        if described == 24 * len(SCALES):
            all_of_them.set()
        return describe(network, images_NHWC, **how)

    def flushing(self: writer.FeatureWriter) -> None:
        assert all_of_them.wait(HANG)
        flush(self)

    monkeypatch.setattr("vggfeat.extract.describe", describing)
    monkeypatch.setattr(writer, "FLUSH_ROWS", 0)
    monkeypatch.setattr(writer.FeatureWriter, "flush", flushing)
    items = datasets.load("folder", folder)
    extract(items, network, tmp_path / "f.h5", scales=SCALES, batch_size=1)
    assert vggfeat.open_features(tmp_path / "f.h5").readable.all()


def test_what_a_disk_refuses_is_told_though_it_is_written_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where MOST rows wait, who computes does, too; after a failure nothing else is written."""
    written: list[int] = []
    at_work = threading.Event()

    def failing(row: int) -> None:
        at_work.wait(HANG)
        written.append(row)
        raise VggfeatError("the disk is full")

    behind = _Behind()
    monkeypatch.setattr(_Behind, "MOST", 3)
    with pytest.raises(VggfeatError, match="the disk is full"), behind:
        for row in range(9):
            if row == 3:
                at_work.set()
            behind(failing, row)
    assert written == [0]


def test_an_interrupt_waits_for_what_is_being_written() -> None:
    """Ctrl-C while the last rows are on their way to a slow disk: only then is the file closed."""
    made: list[int] = []
    at_work, go_on = threading.Event(), threading.Event()

    def slowly(row: int) -> None:
        at_work.set()
        assert go_on.wait(HANG)
        made.append(row)

    def interrupt() -> None:
        assert at_work.wait(HANG)
        os.kill(os.getpid(), signal.SIGINT)
        go_on.set()

    with pytest.raises(KeyboardInterrupt):
        with _Behind() as behind:
            for row in range(5):
                behind(slowly, row)
            threading.Thread(target=interrupt).start()
        pytest.fail("it was not interrupted")
    assert made == [0, 1, 2, 3, 4]


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
    with h5py.File(tmp_path / "f.h5") as plain:  # docs/formats.md, with plain h5py
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


# --- the command ----------------------------------------------------------------------------------


def test_extract_tells_what_it_describes_and_what_it_did(made: Made) -> None:
    ran = made.extract
    assert ran.status == 0
    assert ran.err_lines == [
        "images: 24 of 2 classes; 3 random splits of 16 train, 4 val, 4 test",
        "smallest side: 40 to 48 pixels, median 40; enlarged, of the 24: 16 at Q = 48",
        "descriptor: fc7, 2 x 512: Q = 32, 48, with mirror images",
    ]
    assert "images/s" in ran.out and "unreadable" not in ran.out
    facts = json.loads(made.facts.read_text())
    assert (facts["images"], facts["unreadable"], facts["out"]) == (24, {}, str(made.features))
    assert facts["command"].startswith("vggfeat extract --dataset folder --root")


def test_limit_store_and_overwrite(
    command: Command, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "five.h5"
    line = ("extract", "--dataset", "folder", "--root", folder, *SMALL, "--out", path)
    assert command(*line, "--limit", 5, "--store", "float16").status == 0
    whole, five = vggfeat.open_features(extracted), vggfeat.open_features(path)
    assert five.shape == (5, 2, 512) and five.dtype == np.float16
    assert five.names == whole.names[:5]
    np.testing.assert_allclose(five.descriptors, whole.descriptors[:5], rtol=2e-3, atol=1e-3)

    before = path.read_bytes()
    ran = command(*line)
    assert (ran.status, ran.out) == (1, "") and path.read_bytes() == before
    assert ran.err_lines == [f"vggfeat: {path} exists; give --overwrite, or another --out"]
    assert command(*line, "--overwrite", "--limit", 1000).status == 0
    assert vggfeat.open_features(path).shape == (24, 2, 512)

    model = tmp_path / "model.h5"
    model.write_text("mine")
    ran = command("svm", "--features", extracted, "--out", model, "--C", 1)
    assert ran.status == 1 and model.read_text() == "mine"
    assert ran.err_lines == [f"vggfeat: {model} exists; give --overwrite, or another --out"]
    ran = command(
        "svm", "--features", extracted, "--out", model, "--C", 1, "--overwrite", "--workers", 1
    )
    assert ran.status == 0 and h5py.is_hdf5(model)


def test_settings_that_are_not_given_fit_the_net(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    """S of the training; where the weights don't tell it, the paper's; and it is said which."""
    line = ("extract", "--dataset", "folder", "--root", folder, "--limit", 2, "--device", "cpu")
    ran = command(*line, "--weights", "mini:A", "--out", tmp_path / "a.h5")
    assert ran.status == 0
    assert "fc7, 1 x 896: Q = 112 (the net's training scales), with mirror images" in ran.err
    assert vggfeat.open_features(tmp_path / "a.h5").description.scales == (112,)
    ran = command(*line, "--weights", NET, "--no-mirror", "--dry-run")
    assert ran.status == 0
    assert (
        "Q = 256, 384, 512 (the paper's; the weights don't tell theirs), without mirror images"
        in ran.out
    )


def huge_png() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    header = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


BAD = ("empty.jpg", "gone.jpg", "huge.png", "text.jpg", "truncated.jpg")


def add_bad_images(folder: Path) -> None:
    whole = (folder / "00.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image\n")
    (folder / "huge.png").write_bytes(huge_png())
    (folder / "gone.jpg").symlink_to("nowhere.jpg")


def test_unreadable_images_are_listed_and_left_out(
    command: Command, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    add_bad_images(folder / "red")
    features, report, model = tmp_path / "bad.h5", tmp_path / "r.json", tmp_path / "m.h5"
    line = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder,
        *SMALL,
        "--out",
        features,
        "--json",
        report,
    )
    ran = command(*line)
    assert ran.status == 3 and "29 (5 unreadable)" in ran.out
    assert (
        "can't be read: 4 of the 29, the first is red/empty.jpg: empty file (0 bytes)"
        in ran.err_lines
    )
    *listed, hint = ran.err_lines[-6:]
    assert [row.split(": ")[:2] for row in listed] == [["unreadable", f"red/{n}"] for n in BAD]
    assert hint == "the same command with --retry describes just these again"
    reasons = json.loads(report.read_text())["unreadable"]
    assert list(reasons) == [f"red/{n}" for n in BAD]
    assert (
        reasons["red/empty.jpg"] == "empty file (0 bytes)"
        and reasons["red/gone.jpg"] == "no such file"
    )
    assert "60000" in reasons["red/huge.png"].replace(",", "")

    # rows stay where they are; what is readable is as without its bad neighbours
    clean, dirty = vggfeat.open_features(extracted), vggfeat.open_features(features)
    assert dirty.shape == (29, 2, 512)
    assert [dirty.names[i] for i in np.flatnonzero(~dirty.readable).tolist()] == [
        f"red/{n}" for n in BAD
    ]
    assert np.isnan(dirty.descriptors[~dirty.readable]).all()
    assert [n for n, good in zip(dirty.names, dirty.readable, strict=True) if good] == clean.names
    assert_same_descriptors(dirty.descriptors[dirty.readable], clean.descriptors)

    ran = command("info", features)
    assert ran.status == 0 and len(ran.err_lines) == 5

    ran = command(
        "svm",
        "--features",
        features,
        "--C",
        1,
        "--workers",
        1,
        "--overwrite",
        "--json",
        report,
        "--out",
        model,
    )
    assert ran.status == 0 and cells(ran.out, "unreadable images") == ["5, left out"]
    results = json.loads(report.read_text())
    assert results["n_unreadable"] == 5 and results["mean_class_recall"] == 1.0
    used = [
        np.concatenate([dirty.splits[f"split0/{p}"] for p in parts])
        for parts in (("train", "val"), ("test",))
    ]
    assert [results["n_train"], results["n_test"]] == [
        int(dirty.readable[rows].sum()) for rows in used
    ]

    images = [folder / "red" / n for n in ("00.jpg", "text.jpg", "01.jpg", "missing.jpg")]
    table = tmp_path / "p.csv"
    ran = command("predict", *images, "--model", model, "--out", table, "--scores")
    assert ran.status == 3
    assert [row.split(": ")[:2] for row in ran.err_lines] == [
        ["unreadable", str(images[i])] for i in (1, 3)
    ]
    _, names, rows, scores = read_predictions(table)
    assert [row["class"] for row in rows] == ["red", "", "red", ""]
    assert [bool(row["error"]) for row in rows] == [False, True, False, True]
    assert names == [str(p) for p in images] and np.isnan(scores).all(axis=1).tolist() == [
        0,
        1,
        0,
        1,
    ]


def test_weights_that_stop_before_fc7_go_as_far_as_they_reach(
    command: Command, data: Path, folder: Path, tmp_path: Path
) -> None:
    weights, out = data / "vgg16_conv_caffe.safetensors", tmp_path / "f.h5"
    line = ("extract", "--dataset", "folder", "--root", folder, "--weights", weights, "--out", out)
    ran = command(*line, "--scales", 32, "--layer", "fc7")
    assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1) and not out.exists()
    assert "have no layer 'fc7': they reach pool5; give " in ran.err and "layer" in ran.err
    ran = command(*line, "--scales", 32, "--dry-run")
    assert ran.status == 0 and "; the weights reach pool5: that layer is taken" in ran.out, ran.err
    assert command(*line, "--scales", 32, "--layer", "conv1_2", "--limit", 2).status == 0
    assert vggfeat.open_features(out).shape == (2, 1, 64)
