"""Evidence: that its parts add up to the scores, and lie where they are said to."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import vggfeat
from vggfeat.aggregate import POOLINGS
from vggfeat.describe import description_of
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.explain import Explainer
from vggfeat.images import smallest_side
from vggfeat.model import Model
from vggfeat.weights import Network

from ..conftest import Command, photograph
from .conftest import NET, Made

POOL5 = "random:A,width=0.0625,crop=32,seed=1"
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def nets() -> list[Network]:
    return [vggfeat.load(NET, device="cpu"), vggfeat.load(POOL5, device="cpu")]


def model_on(
    nets: Sequence[Network], layers: Sequence[str], scales: Sequence[int], mirror: bool, pool: str
) -> Model:
    """A classifier with random weights on these descriptors."""
    rng = np.random.default_rng(0)
    parts = tuple(
        description_of(net, layer, scales, mirror) for net, layer in zip(nets, layers, strict=True)
    )
    times = len(scales) if pool == "stack" else 1
    D = times * sum(net.dim(layer) for net, layer in zip(nets, layers, strict=True))
    coef_KD = rng.standard_normal((len(CLASSES), D))
    model = Model(CLASSES, coef_KD, rng.standard_normal(3), parts, pool, False, None)
    model.__dict__["networks"] = list(nets)
    return model


@pytest.mark.parametrize("pool", POOLINGS)
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("layers", [("fc7",), ("pool5",), ("fc6", "conv4_1")])
def test_contributions_and_intercept_are_the_score(
    nets: list[Network], pool: str, mirror: bool, layers: tuple[str, ...]
) -> None:
    """Of one net and of two; at one scale, and at several."""
    for scales in ((40,), (40, 64, 50)):
        model = model_on(nets[: len(layers)], layers, scales, mirror, pool)
        image = photograph(3, 61, 90)
        [scores_K] = model.scores([image])
        found = Explainer(model)(image, CLASSES)
        np.testing.assert_allclose(found.sums_K + found.constants_K, scores_K, atol=1e-4)
        np.testing.assert_allclose(found.scores_K, scores_K, atol=1e-4)
        assert len(found.maps) == len(layers) * len(scales) * (1 + mirror)
        for k, name in enumerate(CLASSES):
            density_HW = found.on_pixels(name)
            assert density_HW.shape == (61, 90)
            np.testing.assert_allclose(density_HW.sum(), found.sums_K[k], atol=1e-9)


def test_the_same_of_real_photographs(data: Path) -> None:
    """Two nets, fused, of which one sees each image whole."""
    nets = [vggfeat.load("mini", device="cpu"), vggfeat.load("mini:A", device="cpu")]
    photos = sorted((data / "photos").glob("*.JPEG"))[:2]
    for pool in POOLINGS:
        model = model_on(nets, ["fc7", "pool5"], (112, 144), True, pool)
        for of_image, scores_K in zip(
            vggfeat.evidence(model, photos, classes=CLASSES), model.scores(photos), strict=True
        ):
            np.testing.assert_allclose(of_image.sums_K + of_image.constants_K, scores_K, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layer"), [("test_vit", "cls+patches"), ("test_mambaout", "features")]
)
def test_the_same_of_timms_models(tmp_path: Path, name: str, layer: str) -> None:
    """Tokens whose norm the map has; a map whose mean is normed. No side is whole patches."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False, num_classes=0)
    state = {key: value + 0.1 * torch.rand_like(value) for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    network = vggfeat.load(f"timm:{name}@{tmp_path / 'w.safetensors'}", device="cpu")
    classifier = model_on([network], [layer], (70, 100), True, "stack")
    image = photograph(3, 77, 115)
    [scores_K] = classifier.scores([image])
    found = Explainer(classifier)(image, CLASSES)
    np.testing.assert_allclose(found.sums_K + found.constants_K, scores_K, atol=1e-4)
    np.testing.assert_allclose(found.on_pixels(2).sum(), found.sums_K[2], atol=1e-9)
    assert "may see all of the image" in found.sees()


def test_equal_contributions_are_drawn_alike() -> None:
    """Though the windows of FC layers overlap in the middle."""
    net = vggfeat.load("random:A,width=0.05,crop=64", device="cpu")
    found = Explainer(model_on([net], ["fc7"], (64, 128), True, "average"))(photograph(3, 96, 64))
    for part in found.maps:
        part.values_Khw[:] = 1 / part.values_Khw[0].size
    density = found.on_pixels()
    assert density.max() > 1.5 * density.min() > 0
    assert (found.heat()[..., 3] == found.heat()[0, 0, 3]).all()


def batch(image_HWC: np.ndarray, Q: int) -> torch.Tensor:
    return torch.from_numpy(smallest_side(image_HWC, Q).copy())[None]


def test_with_max_a_channel_counts_where_it_is_largest(nets: list[Network]) -> None:
    model = model_on(nets[:1], ["pool5"], (40, 64), False, "max")
    image = photograph(3, 61, 90)
    found = Explainer(model)(image, CLASSES)
    raw = [nets[0].maps_of(batch(image, Q), "pool5").mean(dim=(2, 3))[0].numpy() for Q in (40, 64)]
    pooled_D = np.maximum(*raw)
    for part, own_D in zip(found.maps, raw, strict=True):
        won_D = np.where(own_D == pooled_D, own_D, 0)
        expected = model.coef_KD @ won_D / np.linalg.norm(pooled_D)
        np.testing.assert_allclose(part.values_Khw.sum(axis=(1, 2)), expected, atol=1e-5)


def test_of_a_net_it_is_the_class_score_map(nets: list[Network]) -> None:
    """Less fc8's bias; that of the mirror image folded back. At both scales the mean score."""
    net, image = nets[0], photograph(3, 61, 90)
    found = Explainer(net, (40, 64))(image, top=2)
    names = [f"class {k}" for k in range(net.dim("fc8"))]
    chosen = [names.index(name) for name in found.classes]
    bias_K = net.fc8().bias.detach().numpy()[chosen]
    total_K = np.zeros(2)
    for Q in (40, 64):
        for flip in (False, True):
            seen = batch(image, Q).flip(2) if flip else batch(image, Q)
            map_Khw = net.maps_of(seen, "fc8")[0].double().numpy()
            total_K += map_Khw.mean(axis=(1, 2))[chosen] / 4
            [part] = [part for part in found.maps if (part.Q, part.mirrored) == (Q, flip)]
            expected = (map_Khw[chosen] - bias_K[:, None, None]) / (4 * map_Khw[0].size)
            folded = expected[:, :, ::-1] if flip else expected
            np.testing.assert_allclose(part.values_Khw, folded, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.scores_K, total_K, rtol=1e-5)
    np.testing.assert_allclose(found.sums_K + found.constants_K, total_K, rtol=1e-5)
    [again] = vggfeat.evidence(net, [image], classes=found.classes, scales=(40, 64))
    np.testing.assert_array_equal(again.on_pixels(1), found.on_pixels(found.classes[1]))


def test_where_positions_look(nets: list[Network]) -> None:
    """The strides of pool5, from the left; in the mirror image from the right, since 90 isn't a
    multiple of 32. fc7 looks through a window of its crop.
    """
    image = photograph(3, 64, 90)
    model = model_on(nets[:1], ["pool5"], (64,), True, "average")
    straight, mirrored = Explainer(model)(image).maps
    np.testing.assert_allclose(90 * straight.columns_w2, [[0, 32], [32, 64]])
    np.testing.assert_allclose(90 * mirrored.columns_w2, [[26, 58], [58, 90]])
    np.testing.assert_allclose(64 * mirrored.rows_h2, [[0, 32], [32, 64]])
    sentence = Explainer(model)(image).sees()
    assert straight.field is not None and f"{straight.field} x {straight.field} pixels" in sentence
    assert sentence.endswith("at Q = 64 all of the smallest side.")
    rows, columns, _ = vggfeat.load("random:A,width=0.05,crop=64").module.looks_at(
        "fc7", (1, 2), (64, 100)
    )
    np.testing.assert_allclose(64 * rows, [[0, 64]])
    np.testing.assert_allclose(100 * columns, [[0, 64], [32, 96]])


def test_what_has_no_evidence_is_refused(nets: list[Network], tmp_path: Path) -> None:
    model = model_on(nets[:1], ["pool5"], (40,), False, "average")
    image = photograph(3, 64, 90)
    neighbours: Any = vggfeat.NearestNeighbours(k=1).fit(np.eye(2), [0, 1])
    with pytest.raises(VggfeatError, match="no coefficients that evidence could be told of"):
        vggfeat.evidence(neighbours, [image])
    with pytest.raises(VggfeatError, match="leave out `scales`"):
        vggfeat.evidence(model, [image], scales=(40,))
    with pytest.raises(VggfeatError, match="no class 'dog': give one of ant, bee, cat"):
        vggfeat.evidence(model, [image], classes=["dog"])
    with pytest.raises(VggfeatError, match=r"is one name: give a list, \['ant'\]"):
        vggfeat.evidence(model, [image], classes="ant")
    with pytest.raises(VggfeatError, match="`top` must be a whole number from 1 up, not 0"):
        vggfeat.evidence(model, [image], top=0)
    with pytest.raises(UnreadableImage, match=r"/gone\.jpg: no such file"):
        vggfeat.evidence(model, [image, tmp_path / "gone.jpg"])
    [found] = vggfeat.evidence(model, [image], classes=["bee"])
    with pytest.raises(VggfeatError, match="the evidence is for bee, not 'ant'"):
        found.on_pixels("ant")


# --- vggfeat explain ------------------------------------------------------------------------------


def test_a_page_and_pictures(made: Made, command: Command, tmp_path: Path) -> None:
    model, page = made.model, tmp_path / "page.html"
    shutil.copytree(made.folder, folder := tmp_path / "images")
    (folder / "red/damaged.jpg").write_bytes(b"\xff\xd8nothing")
    ran = command("explain", folder, "--model", model, "--top", 2, "--out", page)
    assert ran.status == 3 and "unreadable: " in ran.err and "damaged.jpg" in ran.err
    text = page.read_text()
    classes = vggfeat.open_model(model).classes
    images = len(list(folder.glob("*/*.jpg"))) - 1
    assert text.count('class="stack"') == 2 * images and "label: red" in text
    assert re.search(r"red [+-]\d\.\d\d = [+-]\d+\.\d\d for, ", text)
    ran = command("explain", folder / "red/00.jpg", "--model", model, "--out", tmp_path / "a.png")
    assert ran.status == 0, ran.err
    assert Image.open(tmp_path / "a.png").size == Image.open(folder / "red/00.jpg").size
    out = f"{tmp_path / 'pictures'}/"
    ran = command("explain", folder / "red", "--model", model, "--class", classes[0], "--out", out)
    assert ran.status == 3, ran.err
    names = sorted(path.name for path in Path(out).iterdir())
    assert len(names) == images / 2 and names[0] == f"0000-0-00-{classes[0]}.png"


def test_nothing_is_written_of_nothing(made: Made, command: Command, tmp_path: Path) -> None:
    bad, image = tmp_path / "bad.jpg", made.folder / "red/00.jpg"
    bad.write_bytes(b"nothing")
    outs = [tmp_path / "p.html", tmp_path / "p.png", f"{tmp_path}/p/"]
    for out in outs:
        ran = command("explain", bad, "--model", made.model, "--out", out)
        assert ran.status == 1 and ran.err_lines[-1].endswith("nothing is written")
        assert ran.err_lines[0].startswith(f"unreadable: {bad}: ")
    for words, told in (
        ((image, image, "--out", outs[1]), "takes one picture, and 2 are asked for"),
        ((*[image] * 201, "--out", outs[0]), "201 figures are more than 200 of a page"),
        ((made.features, "--out", outs[0]), "has descriptors, which have no places"),
        ((image, "--class", "green", "--out", outs[0]), "there is no class 'green'"),
    ):
        ran = command("explain", *words, "--model", made.model)
        assert ran.status == 1 and told in ran.err
    assert os.listdir(tmp_path) == ["bad.jpg"]
