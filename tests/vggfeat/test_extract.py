"""Descriptors against a slow float64 reference, and the feature file that keeps every row."""

from __future__ import annotations

import functools
import resource
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import vggfeat
from vggfeat import cli, datasets
from vggfeat.decode import read_rgb
from vggfeat.errors import Interrupted, UnreadableImage, VggfeatError
from vggfeat.extract import (
    by_shape,
    describe_all,
    description_of,
    extract,
    gathered,
    limited,
    network_of,
    plan,
)
from vggfeat.images import smallest_side
from vggfeat.look import Cheaper, look

from ..conftest import assert_same_descriptors, photograph

SCALES = (40, 64)


@pytest.fixture(scope="module")
def network():
    return vggfeat.load("random:B,width=0.125,crop=32,classes=4")


def reference(network, image, scale, layer, mirror):
    """One image, one view at a time, in float64: the mean over positions, then over the two
    views.
    """
    module = network.module.double()
    small = smallest_side(read_rgb(image), scale)
    views = []
    for view in (small, small[:, ::-1]) if mirror else (small,):
        x = torch.tensor(view.astype(np.float64) - np.array([123.68, 116.779, 103.939]))
        with torch.inference_mode():
            views.append(module(x.permute(2, 0, 1)[None], layer)[0].mean((1, 2)).numpy())
    network.module.float()
    return np.mean(views, axis=0)


@pytest.mark.parametrize(
    ("layer", "mirror"), [("fc7", True), ("fc7", False), ("pool5", True), ("conv3_1", False)]
)
def test_descriptors_equal_a_slow_reference(network, layer, mirror):
    images = [
        photograph(i, h, w)
        for i, (h, w) in enumerate([(50, 70), (70, 50), (50, 70), (45, 45), (33, 90)])
    ]
    description = description_of(network, layer, SCALES, mirror)
    got = dict(describe_all(network, images, description, batch_size=2))
    assert sorted(got) == list(range(5))
    for i, image in enumerate(images):
        for s, scale in enumerate(SCALES):
            expected = reference(network, image, scale, layer, mirror)
            assert expected.std() > 0
            assert_same_descriptors(got[i][s], expected.astype(np.float32))


def test_batch_size_workers_and_order_do_not_change_a_descriptor(network):
    images = [photograph(i, 40 + 7 * (i % 3), 60) for i in range(9)]
    description = description_of(network, "fc7", SCALES, True)
    one = dict(describe_all(network, images, description, batch_size=1, workers=1))
    many = dict(describe_all(network, images[::-1], description, batch_size=64, workers=4))
    for i in range(9):
        assert_same_descriptors(one[i], many[8 - i])


def test_mirror_image_has_the_same_descriptor(network):
    image = photograph(5, 50, 80)
    a, b = vggfeat.embed(network, [image, image[:, ::-1]], scales=SCALES)
    assert_same_descriptors(a, b)
    c, d = vggfeat.embed(network, [image, image[:, ::-1]], scales=SCALES, mirror=False)
    assert np.abs(c - d).max() > 1e-3 * np.abs(c).max()


def test_full_buckets_are_run_before_memory_is(network, monkeypatch):
    monkeypatch.setattr("vggfeat.extract.WAITING_BYTES", 40_000)
    images = [photograph(i, 40, 40 + i) for i in range(12)]
    description = description_of(network, "pool3", SCALES, False)
    got = dict(describe_all(network, images, description, batch_size=1000))
    assert sorted(got) == list(range(12))


def test_progress_counts_work_and_ends_at_the_number_of_images(network, folder, tmp_path):
    (folder / "red" / "03.jpg").write_bytes(b"")
    told = []
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


def test_embed_is_normalised_and_ordered(network, tmp_path):
    array = photograph(0, 50, 60)
    Image.fromarray(array).save(tmp_path / "a.png")
    x = vggfeat.embed(
        network,
        [tmp_path / "a.png", Image.fromarray(array), photograph(1, 60, 50), array],
        scales=SCALES,
    )
    assert x.shape == (4, 512) and x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    assert_same_descriptors(x[0], x[3])
    np.testing.assert_array_less(x[0] @ x[2], 0.9999)
    assert vggfeat.embed(network, [array], scales=SCALES, pool="stack").shape == (1, 1024)


def test_embed_keeps_what_can_be_read(network, tmp_path):
    images = [photograph(0, 50, 60), tmp_path / "gone.png", photograph(1, 60, 50), b"no image"]
    with pytest.raises(UnreadableImage, match=r"image [13]: "):
        vggfeat.embed(network, images, scales=SCALES)
    for pool, length in (("average", 512), ("stack", 1024), ("max", 512)):
        x, unreadable = vggfeat.embed(network, images, SCALES, pool=pool, return_unreadable=True)
        assert (
            x.shape == (4, length)
            and list(unreadable) == [1, 3]
            and unreadable[1] == "no such file"
        )
        assert np.isnan(x[[1, 3]]).all()
        assert_same_descriptors(x[[0, 2]], vggfeat.embed(network, images[::2], SCALES, pool=pool))
    x, unreadable = vggfeat.embed(network, images[::2], SCALES, return_unreadable=True)
    assert unreadable == {} and np.isfinite(x).all()
    x, unreadable = vggfeat.embed(network, images[1:2], SCALES, return_unreadable=True)
    assert x.shape == (1, 512) and np.isnan(x).all() and unreadable == {0: "no such file"}


def test_embed_marks_an_image_of_which_one_scale_fails(network):
    """A strip that is too long at the larger scale only; its row is NaN whatever the smaller one
    gave.
    """
    strip = np.zeros((10, 40_000, 3), np.uint8)
    x, unreadable = vggfeat.embed(
        network,
        [photograph(0, 50, 60), strip],
        (32, 64),
        layer="conv1_1",
        mirror=False,
        return_unreadable=True,
    )
    assert list(unreadable) == [1] and "at Q=64" in unreadable[1] and np.isnan(x[1]).all()
    assert np.isfinite(x[0]).all()


def test_embed_takes_the_networks_own_scales(network, monkeypatch):
    images = [photograph(0, 50, 60)]
    monkeypatch.setitem(network.metadata, "train_scale", "40-64")
    x = vggfeat.embed(network, images)
    assert_same_descriptors(x, vggfeat.embed(network, images, scales=(40, 52, 64)))
    assert not np.allclose(x, vggfeat.embed(network, images, scales=(40,)), rtol=1e-3)


def test_embed_shows_its_progress_where_it_is_asked_to(network, monkeypatch, capsys):
    monkeypatch.setattr("vggfeat.terminal.LINE_SECONDS", 0.0)
    images = [photograph(i, 40, 50) for i in range(3)]
    vggfeat.embed(network, images, SCALES, batch_size=1)
    assert capsys.readouterr() == ("", "")
    vggfeat.embed(network, images, SCALES, batch_size=1, progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "describe: 3 of 3 images, " in printed.err


def test_bad_settings_are_refused(network):
    for layer, scales, message in [
        ("fc7", (31,), "scale 31 is too small: fc7 of net B needs at least 32"),
        ("fc7", (64, 64), "different numbers"),
        ("fc9", (64,), "no layer 'fc9'"),
        ("pool5", (), "one or more"),
    ]:
        with pytest.raises(VggfeatError, match=message):
            description_of(network, layer, scales, True)


def test_a_description_in_a_file_that_no_network_can_follow_is_refused() -> None:
    network = vggfeat.load("random:A,width=0.0625,crop=32,classes=4")
    description = description_of(network, "fc7", (40,), True)
    for wrong, match in (
        ({"scales": (1,)}, "scale 1 is too small"),
        ({"layer": "fc9"}, "no layer 'fc9'"),
    ):
        with pytest.raises(VggfeatError, match=match):
            network_of(replace(description, **wrong))


# --- the file -------------------------------------------------------------------------------------


def test_every_row_stays_in_its_place(network, folder, tmp_path):
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
        alone = dict(describe_all(network, [folder / items.names[i]], features.description))[0]
        assert_same_descriptors(x[i], alone)
    np.testing.assert_array_equal(features.read((64,)), x[:, 1:])
    np.testing.assert_array_equal(features.read((64, 40)), x[:, ::-1])
    with pytest.raises(VggfeatError, match="no scale 99; it has 40, 64"):
        features.read((99,))
    with pytest.raises(VggfeatError, match=r"`scales` must be whole numbers of pixels, .* not 64"):
        features.read(64)
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


def test_float16_holds_the_same_to_its_precision_and_refuses_overflow(network, folder, tmp_path):
    items = limited(datasets.load("folder", folder), 5)
    extract(items, network, tmp_path / "a.h5", scales=(40,), store="float32")
    extract(items, network, tmp_path / "b.h5", scales=(40,), store="float16")
    a, b = (vggfeat.open_features(tmp_path / f"{n}.h5").descriptors for n in "ab")
    assert b.dtype == np.float16
    np.testing.assert_array_equal(a.astype(np.float16), b)
    with torch.no_grad():
        network.module.classifier[3].weight.mul_(1e6)
    try:
        with pytest.raises(VggfeatError, match="beyond the range of float16; give `store` float32"):
            extract(items, network, tmp_path / "c.h5", scales=(40,), store="float16")
    finally:
        with torch.no_grad():
            network.module.classifier[3].weight.div_(1e6)
    assert sorted(p.name for p in tmp_path.glob("*.h5*")) == ["a.h5", "b.h5"]


def test_an_existing_file_stays_until_another_is_whole(network, folder, tmp_path):
    items = datasets.load("folder", folder)
    out = tmp_path / "f.h5"
    extract(items, network, out, scales=(40,))
    before = out.read_bytes()

    def interrupt(done, total):
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
def test_a_disk_without_room_is_found_before_the_work(run_main, folder, tmp_path, kilobytes):
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


def test_plan_counts_the_work(network, folder):
    items = datasets.load("folder", folder)
    description = description_of(network, "conv1_1", (64,), True)
    asked = plan(items, look(items), network, description, "float16")
    assert asked.images == asked.sampled == 24
    assert asked.bytes == 24 * 8 * 2
    # conv1_1 alone: 2 * 8 channels * 27 weights a pixel, image and mirror; 8 images of each shape
    pixels = 8 * (64 * 96 + 96 * 64 + 64 * 64)
    assert asked.gflop == pytest.approx(2 * 2 * 8 * 27 * pixels / 1e9)
    assert asked.seconds > 0 and asked.cheaper is None
    assert (asked.smallest_sides, asked.enlarged) == ((40, 40, 48), {64: 24})
    Image.new("L", (1, 6000)).save(
        folder / "red" / "strip.png"
    )  # 24 million pixels at Q = 64: not described
    items = datasets.load("folder", folder)
    again = plan(items, look(items), network, description, "float16")
    assert (again.images, again.sampled) == (25, 24) and again.gflop == pytest.approx(
        asked.gflop * 25 / 24
    )


def test_plan_knows_the_batches_that_there_will_be(network, monkeypatch):
    """Full ones, those that memory sends on, and the rest, by the shapes alone."""
    monkeypatch.setattr("vggfeat.extract.WAITING_BYTES", 60_000)
    images = [photograph(i, 40 + i % 3, 40 + 2 * (i % 2)) for i in range(30)]
    real = []

    def compute(batch_NHWC):
        real.append(tuple(batch_NHWC.shape[:3]))
        return batch_NHWC.float().mean((1, 2))

    for _ in by_shape(
        images.__getitem__, range(30), SCALES, compute, torch.device("cpu"), batch_size=1
    ):
        pass
    shapes = (
        ((s, *smallest_side(image, q).shape[:2]), i)
        for i, image in enumerate(images)
        for s, q in enumerate(SCALES)
    )
    told = list(gathered(shapes, lambda: 224 * 224))
    assert [(len(members), *shape[1:]) for shape, members in told] == real
    assert sum(n for n, _, _ in real) == 60 and len({n for n, _, _ in real}) > 2


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("new", [0.0, 0.2])
def test_plan_expects_what_the_whole_takes_by_a_part_of_it(
    network, tmp_path, monkeypatch, alpha, new
):
    """By a clock of our own: a batch takes alpha, one second for 10,000 pixels, and more if its
    shape is new.
    """
    (tmp_path / "all").mkdir()
    sides = np.random.default_rng(0).integers(0, 8, 120) ** 2
    for i, side in enumerate(sides):
        Image.new("RGB", (40 + int(side), 40)).save(tmp_path / "all" / f"{i:03d}.png")
    clock, seen, described = 0.0, set(), 0

    def describe(network, batch_NHWC, layer, mirror):
        nonlocal clock, described
        shape = tuple(batch_NHWC.shape)
        clock += alpha + batch_NHWC[..., 0].numel() / 10_000 + (0 if shape in seen else new)
        seen.add(shape)
        described += shape[0]
        return torch.zeros(shape[0], 4)

    monkeypatch.setattr("vggfeat.extract.describe", describe)
    monkeypatch.setattr("vggfeat.extract.time", SimpleNamespace(perf_counter=lambda: clock))
    items = datasets.load("folder", tmp_path)
    description = description_of(network, None, SCALES, False)
    expected = plan(items, look(items), network, description, "float32", batch_size=1).seconds
    assert described < 2 * 120  # each at two scales, twice: less than half of them
    clock, _ = 0.0, seen.clear()
    compute = functools.partial(describe, network, layer="fc7", mirror=False)
    for _ in by_shape(
        lambda i: read_rgb(items.source(i)),
        range(120),
        SCALES,
        compute,
        network.device,
        batch_size=1,
    ):
        pass
    assert clock > 90
    assert expected == pytest.approx(clock, rel=0.05)


def test_what_is_cheaper_is_the_smallest_scale_alone(network):
    paper = Cheaper.than(description_of(network, None, (384, 256, 512), True))
    assert paper.options == "`scales` 256 `no_mirror`"
    assert paper.share == pytest.approx(256**2 / (256**2 + 384**2 + 512**2) / 2)
    assert paper.worth_saying(668, 46) and not paper.worth_saying(100, 10)
    alone = Cheaper.than(description_of(network, None, (256,), False))
    assert alone.share == 1 and not alone.worth_saying(668, 668)


def test_a_look_at_headers_tells_what_reading_would(tmp_path, monkeypatch):
    """Upright sizes, of some images evenly over all; what can't be read; a format whose header
    doesn't tell.
    """
    for i in range(9):
        exif = Image.Exif()
        exif[0x0112] = i  # orientation; 5 to 8 stand on their side
        Image.fromarray(photograph(i, 40, 50 + i)).save(tmp_path / f"{i}.jpg", exif=exif)
    (tmp_path / "z.jpg").write_text("no image")
    items = datasets.load("folder", tmp_path)
    seen = look(items)
    assert seen.shapes == {i: read_rgb(items.source(i)).shape[:2] for i in range(9)}
    assert seen.unreadable == {"z.jpg": "not an image that Pillow can read"}
    assert (seen.looked, seen.smallest_sides, seen.enlarged(40), seen.enlarged(41)) == (
        10,
        (40, 40, 40),
        0,
        9,
    )
    few = look(items, 4)
    assert few.looked == 4 and list(few.shapes) == [0, 3, 6]
    for name in ("x.bmp", "y.bmp"):  # what a file is, its content tells
        Image.fromarray(photograph(3, 30, 41)).save(tmp_path / name, format="JPEG2000")
    items = replace(items, names=["x.bmp", "y.bmp"])
    monkeypatch.setattr("vggfeat.look.DECODED", 1)  # it takes a process each
    assert list(look(items).shapes.values()) == [(30, 41)]
