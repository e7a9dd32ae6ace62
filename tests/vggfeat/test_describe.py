"""Descriptors against a slow float64 reference, and `embed`, which gives them for any images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vggfeat
from vggfeat.decode import read_rgb
from vggfeat.describe import describe, describe_all, description_of, network_of
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import smallest_side
from vggfeat.weights import Network

from ..conftest import all_read, assert_same_descriptors, photograph, vgg_of

SCALES = (40, 64)


@pytest.fixture(scope="module")
def network() -> Network:
    return vggfeat.load("random:B,width=0.125,crop=32,classes=4")


def reference(
    network: Network, image: np.ndarray, scale: int, layer: str, mirror: bool
) -> np.ndarray:
    """One image, one view at a time, in float64: the mean over positions, then over the two
    views.
    """
    module = vgg_of(network).double()
    small = smallest_side(read_rgb(image), scale)
    views = []
    for view in (small, small[:, ::-1]) if mirror else (small,):
        x = torch.tensor(view.astype(np.float64) - np.array([123.68, 116.779, 103.939]))
        with torch.inference_mode():
            views.append(module(x.permute(2, 0, 1)[None], layer)[0].mean((1, 2)).numpy())
    module.float()
    mean: np.ndarray = np.mean(views, axis=0)
    return mean


@pytest.mark.parametrize(
    ("layer", "mirror"), [("fc7", True), ("fc7", False), ("pool5", True), ("conv3_1", False)]
)
def test_descriptors_equal_a_slow_reference(network: Network, layer: str, mirror: bool) -> None:
    images = [
        photograph(i, h, w)
        for i, (h, w) in enumerate([(50, 70), (70, 50), (50, 70), (45, 45), (33, 90)])
    ]
    description = description_of(network, layer, SCALES, mirror)
    got = all_read(describe_all(network, images, description, batch_size=2))
    assert sorted(got) == list(range(5))
    for i, image in enumerate(images):
        for s, scale in enumerate(SCALES):
            expected = reference(network, image, scale, layer, mirror)
            assert expected.std() > 0
            assert_same_descriptors(got[i][s], expected.astype(np.float32))


def test_batch_size_workers_and_order_do_not_change_a_descriptor(network: Network) -> None:
    images = [photograph(i, 40 + 7 * (i % 3), 60) for i in range(9)]
    description = description_of(network, "fc7", SCALES, True)
    one = all_read(describe_all(network, images, description, batch_size=1, workers=1))
    many = all_read(describe_all(network, images[::-1], description, batch_size=64, workers=4))
    for i in range(9):
        assert_same_descriptors(one[i], many[8 - i])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpus_descriptors_are_the_cpus(gpu: torch.device, precision: str) -> None:
    """Photographs of many shapes, large and small, in batches that are full or not: rescaled there,
    each in its row. Cosine 0.9999, as what is rescaled is a level away here and there.
    """
    shapes = [(300, 400), (320, 400), (500, 333), (260, 1400), (2000, 1500), (64, 64), (31, 90)]
    images = [photograph(i, *shapes[i % len(shapes)]) for i in range(40)]
    spec, scales = "random:D,width=0.25,crop=64,classes=4", (64, 96)
    exact = vggfeat.load(spec, device="cpu", precision="float32")
    network = vggfeat.load(spec, device=gpu, precision=precision)
    for layer in ("fc7", "pool5"):
        description = description_of(network, layer, scales, True)
        expected = all_read(describe_all(exact, images, description))
        for batch_size in (1, 64):
            got = all_read(describe_all(network, images, description, batch_size=batch_size))
            assert sorted(got) == list(range(40))
            for i in range(40):
                products = (got[i] * expected[i]).sum(1)
                lengths = np.linalg.norm(got[i], axis=1) * np.linalg.norm(expected[i], axis=1)
                assert (products >= 0.9999 * lengths).all(), i


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_several_layers_are_described_as_each_alone(precision: str) -> None:
    """In whatever order they are asked for; one pass goes on from the one to the other."""
    network = vggfeat.load("random:B,width=0.125,crop=32,classes=4", precision=precision)
    images_NHWC = torch.from_numpy(np.stack([photograph(i, 40, 60) for i in range(2)]))
    layers = ("fc7", "conv1_2", "pool5", "fc6", "conv3_1", "fc8")
    together = describe(network, images_NHWC, layers, mirror=True)
    alone = [describe(network, images_NHWC, layer, mirror=True) for layer in layers]
    assert together.dtype == torch.float32 and together.isfinite().all()
    for ours, theirs in zip(together.split([x.shape[1] for x in alone], 1), alone, strict=True):
        assert_same_descriptors(ours.numpy(), theirs.numpy())
        assert precision != "float32" or torch.equal(ours, theirs)


def test_layers_that_can_not_be_described_together(network: Network) -> None:
    with pytest.raises(VggfeatError, match="must be one or more different names"):
        description_of(network, ("fc7", "fc7"), SCALES, True)
    with pytest.raises(VggfeatError, match="scale 31 is too small: fc6 of net B needs at least 32"):
        description_of(network, ("pool4", "fc6"), (31,), True)
    with pytest.raises(VggfeatError, match="have no layer 'fc9'"):
        description_of(network, ("pool5", "fc9"), SCALES, True)
    with pytest.raises(VggfeatError, match="`layer` must be the name of one layer, not a list"):
        vggfeat.embed(network, [photograph(0, 40, 40)], SCALES, layer=["fc6", "fc7"])  # type: ignore[call-overload]


def test_an_empty_image_is_a_row_without_a_descriptor(network: Network) -> None:
    nothing = [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0), np.uint8), Image.new("RGB", (0, 5))]
    images = [photograph(0, 40, 60), *nothing]
    x, bad = vggfeat.embed(network, images, scales=SCALES, return_unreadable=True)
    assert sorted(bad) == [1, 2, 3] and all("there is nothing in it" in why for why in bad.values())
    assert np.isfinite(x[0]).all() and np.isnan(x[1:]).all()


def test_mirror_image_has_the_same_descriptor(network: Network) -> None:
    image = photograph(5, 50, 80)
    a, b = vggfeat.embed(network, [image, image[:, ::-1]], scales=SCALES)
    assert_same_descriptors(a, b)
    c, d = vggfeat.embed(network, [image, image[:, ::-1]], scales=SCALES, mirror=False)
    assert np.abs(c - d).max() > 1e-3 * np.abs(c).max()


def test_embed_is_normalised_and_ordered(network: Network, tmp_path: Path) -> None:
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


def test_embed_keeps_what_can_be_read(network: Network, tmp_path: Path) -> None:
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


def test_embed_marks_an_image_of_which_one_scale_fails(network: Network) -> None:
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


def test_embed_takes_the_networks_own_scales(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [photograph(0, 50, 60)]
    monkeypatch.setitem(network.metadata, "train_scale", "40-64")
    x = vggfeat.embed(network, images)
    assert_same_descriptors(x, vggfeat.embed(network, images, scales=(40, 52, 64)))
    assert not np.allclose(x, vggfeat.embed(network, images, scales=(40,)), rtol=1e-3)


def test_embed_shows_its_progress_where_it_is_asked_to(
    network: Network, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vggfeat.terminal.LINE_SECONDS", 0.0)
    images = [photograph(i, 40, 50) for i in range(3)]
    vggfeat.embed(network, images, SCALES, batch_size=1)
    assert capsys.readouterr() == ("", "")
    vggfeat.embed(network, images, SCALES, batch_size=1, progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "describe: 3 of 3 images, " in printed.err


@pytest.mark.parametrize(
    ("layer", "scales", "message"),
    [
        ("fc7", (31,), "scale 31 is too small: fc7 of net B needs at least 32"),
        ("fc7", (64, 64), "different numbers"),
        ("fc9", (64,), "no layer 'fc9'"),
        ("pool5", (), "one or more"),
    ],
)
def test_bad_settings_are_refused(
    network: Network, layer: str, scales: tuple[int, ...], message: str
) -> None:
    with pytest.raises(VggfeatError, match=message):
        description_of(network, layer, scales, True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"scales": (1,)}, "scale 1 is too small"), ({"layer": "fc9"}, "no layer 'fc9'")],
)
def test_a_description_in_a_file_that_no_network_can_follow_is_refused(
    wrong: dict[str, Any], message: str
) -> None:
    network = vggfeat.load("random:A,width=0.0625,crop=32,classes=4")
    description = description_of(network, "fc7", (40,), True)
    with pytest.raises(VggfeatError, match=message):
        network_of(replace(description, **wrong))
