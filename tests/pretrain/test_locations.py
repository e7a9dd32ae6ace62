"""Where a net's boxes lie in the images: made nets, whose box in every window is known, against
arithmetic by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vggfeat
from pretrain import locations
from pretrain.kept import KeptPosteriors
from pretrain.locations import Guessed, best, central, dense, fitting_scales, guesses
from pretrain.posteriors import evaluate, images_of
from tests.conftest import Nets, photograph, vgg_of
from tests.pretrain.conftest import CLASSES, save_boxes
from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.images import Preprocessing, mirror, smallest_side
from vggfeat.ranks import Ranks
from vggfeat.weights import Network, outputs

ALONE = Ranks(torch.device("cpu"))
# Of a crop of 32 in units of 16 pixels: centre (16 + 4, 16 - 2), 16 wide, 8 high.
SAID = (0.25, -0.125, 1.0, 0.5)
IN_CROP = np.array([12.0, 10, 28, 18])


def loaded(path: Path) -> Network:
    return vggfeat.load(str(path), device="cpu", precision="float32")


@pytest.fixture
def constant(he: Nets, plain: Preprocessing, tmp_path: Path) -> Any:
    """A net that says the same box wherever it looks; per class, its width grows by half a unit a
    class.
    """

    def make(boxes: str, pool: str = "floor") -> Network:
        module = he("A", num_classes=outputs(boxes, len(CLASSES)), width=0.05, crop=32, pool=pool)
        with torch.no_grad():
            module.get_parameter("classifier.6.weight").zero_()
            bias = module.get_parameter("classifier.6.bias").view(-1, 4)
            bias.copy_(torch.tensor(SAID).expand_as(bias))
            bias[:, 2] += torch.arange(len(bias)) / 2
        path = save_boxes(tmp_path / f"{boxes}-{pool}.safetensors", module, plain, boxes)
        return loaded(path)

    return make


@pytest.fixture
def one(tmp_path: Path) -> Items:
    """An image 45 high and 60 wide, of class n02."""
    for name in CLASSES:
        (tmp_path / "one" / "val" / name).mkdir(parents=True)
        Image.fromarray(photograph(3, 45, 60)).save(tmp_path / "one" / "val" / name / "0.png")
    return images_of(tmp_path / "one", "val", 0).take(np.array([2]))


def guessed(*labels: int) -> Guessed:
    shares = np.linspace(0.5, 0.25, len(labels))[None]
    return Guessed(CLASSES, np.array([labels]), shares, np.zeros(0, np.uint32))


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What is merged, call by call."""
    calls: list[list[Any]] = []

    def record(parts: Any, above: float) -> tuple[np.ndarray, np.ndarray]:
        calls.append(list(parts))
        return best(parts, above)

    monkeypatch.setattr(locations, "best", record)
    return calls


@pytest.mark.parametrize("boxes", ["scr", "pcr"])
def test_the_central_crops_box_in_the_image(boxes: str, constant: Any, one: Items) -> None:
    """At Q = 36 the image is 36 x 48, the crop's corner row 2, column 8, and a pixel 1.25 wide."""
    assert one.labels is not None
    located, seen = central(constant(boxes), one, one.labels, 36, ALONE)
    expected = np.array([20, 12, 36, 20]) * 1.25
    if boxes == "pcr":  # the third class's is twice as wide
        expected += np.array([-8, 0, 8, 0]) * 1.25
    assert located.corners_NC4[0, 0] == pytest.approx(expected)
    assert located.labels_NC.tolist() == [[2]] and located.scales == [(36,)]
    assert seen.sizes_N2.tolist() == [[45, 60]] and not seen.failures
    assert located.nets[0]["boxes"] == boxes and located.nets[0]["box_unit"] == "0.5"


@pytest.mark.parametrize("pool", ["floor", "ceil"])
def test_windows_of_the_dense_map_lie_32_pixels_apart(
    pool: str, constant: Any, one: Items, windows: list[list[Any]]
) -> None:
    """At Q = 64 the image is 64 x 85, and its map 2 x 2; pooling that rounds up has 2 x 3."""
    dense([constant("scr", pool)], [(64,)], one, guessed(2, 0), [], ALONE)
    [[found]] = windows
    columns = (0, 32, 64) if pool == "ceil" else (0, 32)
    crops = [np.array([x, y, x, y]) for y in (0, 32) for x in columns]
    plain = np.stack([IN_CROP + corner for corner in crops])
    flipped = plain.copy()
    flipped[:, [0, 2]] = 85 - plain[:, [2, 0]]
    expected = np.concatenate([plain, flipped]) * np.array([60 / 85, 45 / 64] * 2)
    expected = expected.clip(0, [60, 45, 60, 45])  # as the box from x = 76 to 92 of 85
    assert found.corners_MC4[:, 0] == pytest.approx(expected)
    assert found.scores_MC.shape == (len(expected), 2) and (found.scores_MC == 1).all()


def test_without_mirror_images_and_with_a_box_a_class(
    constant: Any, one: Items, windows: list[list[Any]]
) -> None:
    [located], _ = dense(
        [constant("pcr")], [(32,)], one, guessed(4, 0), [], ALONE, mirror_too=False
    )
    # at Q = 32, 32 x 43 pixels, one window: the fifth class's box is 48 wide, the first's 16
    sides = np.array([60 / 43, 45 / 32] * 2)
    first, fifth = IN_CROP * sides, np.array([-4, 10, 44, 18]) * sides
    expected = np.stack([fifth.clip(0, [60, 45, 60, 45]), first])
    assert windows[0][0].corners_MC4[0] == pytest.approx(expected)
    assert located.corners_NC4[0] == pytest.approx(expected)
    assert located.ratings_NC[0] == pytest.approx([0.5, 0.25])  # all windows, times the posterior


def test_a_dense_map_of_one_window_is_the_crop(localisers: dict[str, Path], tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "square" / "val" / name).mkdir(parents=True)
        path = tmp_path / "square" / "val" / name / "0.png"
        Image.fromarray(photograph(len(name), 50, 50)).save(path)
    items = images_of(tmp_path / "square", "val", 0)
    assert items.labels is not None
    for path in localisers.values():
        network = loaded(path)
        crop, _ = central(network, items, items.labels, 32, ALONE)
        each = Guessed(CLASSES, items.labels[:, None], np.ones((7, 1)), np.zeros(0, np.uint32))
        [map_], _ = dense([network], [(32,)], items, each, [], ALONE, mirror_too=False)
        assert map_.corners_NC4 == pytest.approx(crop.corners_NC4, abs=1e-4)


def test_several_scales_and_nets_are_one_union(
    constant: Any, one: Items, windows: list[list[Any]]
) -> None:
    nets = [constant("scr"), constant("pcr")]
    found, _ = dense(nets, [(32, 64), (64,)], one, guessed(1, 3), [], ALONE)
    counts = [[len(part.corners_MC4) for part in call] for call in windows]
    # two views of one window at Q = 32, of four at 64: each net alone, and both
    assert counts == [[2, 8], [8], [2, 8, 8]]
    assert [each.scales for each in found] == [[(32, 64)], [(64,)], [(32, 64), (64,)]]
    assert [[net["boxes"] for net in each.nets] for each in found] == [
        ["scr"],
        ["pcr"],
        ["scr", "pcr"],
    ]


def test_a_box_is_rated_by_the_classification_nets_scores_there(
    constant: Any,
    one: Items,
    weights: dict[str, Path],
    windows: list[list[Any]],
) -> None:
    nets = [loaded(weights[name]) for name in ("D-36", "B-36")]
    [located], _ = dense([constant("scr")], [(64,)], one, guessed(6, 2), nets, ALONE)
    pixels = torch.from_numpy(np.array(smallest_side(photograph(3, 45, 60), 64)))[None]
    expected = []
    for view in (pixels, mirror(pixels)):
        maps = [
            net.maps_of(view, "fc8").softmax(1)[0, [6, 2]].flatten(1).T.detach().numpy()
            for net in nets
        ]
        expected.append(np.mean(maps, 0))
    [[found]] = windows
    assert found.scores_MC == pytest.approx(np.concatenate(expected), abs=1e-5)
    _, ratings = best([found], 0.5)
    assert located.ratings_NC[0] == pytest.approx(ratings)


def test_the_best_rated_box_of_each_class() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [30, 0, 40, 10]], float)[:, None]
    scores = np.array([[0.2, 0.1], [0.2, 0.1], [0.3, 0.9]])
    corners, ratings = best([locations._Windows(boxes, scores)], 0.5)
    assert corners.tolist() == [[0.5, 0, 10.5, 10], [30, 0, 40, 10]]
    assert ratings == pytest.approx([0.4 / 3, 0.3])
    # a box a class, beside one that all share
    own = np.repeat(boxes[2:], 2, 1)
    own[0, 1] = [0, 0, 10, 10]
    parts = [locations._Windows(boxes, scores), locations._Windows(own, np.ones((1, 2)))]
    corners, ratings = best(parts, 0.5)
    assert corners[0].tolist() == [30, 0, 40, 10] and ratings[0] == pytest.approx(1.3 / 4)
    assert corners[1] == pytest.approx([1 / 3, 0, 31 / 3, 10])
    assert ratings[1] == pytest.approx(1.2 / 4)


def test_kept_posteriors_are_matched_with_the_images(
    images: Path, weights: dict[str, Path], constant: Any
) -> None:
    items = images_of(images, "val", 0)
    network = loaded(weights["A-36"])
    kept = evaluate(
        [network],
        (36,),
        ("dense",),
        items,
        "val",
        ALONE,
        batch_size=None,
        workers=1,
        advance=lambda done, total: None,
    )
    fused = kept.fused("dense")
    few = images_of(images, "val", 5)
    chosen = guesses(kept, "dense", few, "k.h5")
    rows = [items.names.index(name) for name in few.names]
    assert (chosen.labels_NC[:, 0] == fused[rows].argmax(1)).all()
    assert chosen.posteriors_NC.shape == (5, 5)
    assert (np.diff(chosen.posteriors_NC, axis=1) <= 0).all()
    assert chosen.told_by == f"A {network.fingerprint[:12]} at 36, dense"
    assert (chosen.crc32 == kept.crc32[rows]).all()
    dense([constant("scr")], [(36,)], few, chosen, [], ALONE)

    Image.fromarray(photograph(99, 40, 60)).save(images / few.names[3])
    with pytest.raises(VggfeatError, match=f"{few.names[3]} is another picture than the one"):
        dense([constant("scr")], [(36,)], few, chosen, [], ALONE)

    def refused(part: KeptPosteriors, among: Items) -> str:
        with pytest.raises(VggfeatError) as error:
            guesses(part, "dense", among, "k.h5")
        return str(error.value)

    (images / "val" / "n00" / "0.png").rename(images / "val" / "n00" / "new.png")
    assert "k.h5: no posteriors of 1 of the 42 images, such as val/n00/new.png" in refused(
        kept, images_of(images, "val", 0)
    )
    kept.classes[6] = "other"
    assert "no posteriors of 1 of the 7 classes, such as 'n06'" in refused(kept, few)


def test_unreadable_images_and_those_without_posteriors(images: Path, constant: Any) -> None:
    items = images_of(images, "val", 4)
    (images / items.names[1]).write_bytes(b"nothing")
    labels, shares = np.zeros((4, 2), int), np.full((4, 2), 0.5)
    shares[2] = np.nan
    each = Guessed(CLASSES, labels, shares, np.zeros(0, np.uint32))
    [located], seen = dense([constant("scr")], [(36, 50)], items, each, [], ALONE)
    assert np.isnan(located.corners_NC4).all((1, 2)).tolist() == [False, True, True, False]
    assert sorted(seen.failures) == [1, 2] and seen.failures[2] == "it had no posteriors"
    assert seen.sizes_N2[1].tolist() == [0, 0]


def test_nets_and_scales_that_cannot_be(constant: Any, weights: dict[str, Path]) -> None:
    assert fitting_scales(constant("scr"), ()) == (36,)
    assert fitting_scales(constant("scr"), (32, 64)) == (32, 64)
    with pytest.raises(VggfeatError, match="Q=31 is smaller than the crop of 32"):
        fitting_scales(constant("scr"), (31,))
    network = loaded(weights["A-36"])
    with pytest.raises(VggfeatError, match="says classes, not boxes"):
        fitting_scales(network, ())
    ceil = [locations.facts(constant("scr", "ceil"))]
    with pytest.raises(VggfeatError, match=r"max-pooling by floor .* max-pooling by ceil: its"):
        locations.refuse_other_windows(network, ceil)
    assert vgg_of(network).pool == "floor"
