"""Augmentations: each has the distribution that the paper says, and depends on its key alone."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.augment import (
    SAMPLE,
    Augmentation,
    Place,
    augmented_crop,
    draw,
    kept_units,
    keyed,
    with_box,
)
from pretrain.boxes import cover, mirrored
from pretrain.colour import Colours
from tests.conftest import photograph
from vggfeat.decode import read_rgb
from vggfeat.images import rescaled_crop, smallest_side


def test_a_key_gives_the_same_numbers_and_another_key_others() -> None:
    keys = [
        (0, SAMPLE, 0, 0, 0),
        (1, SAMPLE, 0, 0, 0),
        (0, 0, 0, 0, 0),
        (0, SAMPLE, 1, 0, 0),
        (0, SAMPLE, 0, 1, 0),
    ]
    keys += [(0, SAMPLE, 0, 0, 1), (0, SAMPLE, 0, 2**40, 2**40)]
    draws = [keyed(*key).random(4).tolist() for key in keys]
    assert draws == [keyed(*key).random(4).tolist() for key in keys]
    assert len({tuple(d) for d in draws}) == len(keys)


def test_scale_flip_and_place_are_uniform() -> None:
    rngs = (keyed(0, SAMPLE, 0, 0, i) for i in range(20_000))
    drawn = [draw(rng, (256, 512), 0.1) for rng in rngs]
    S = np.array([d.S for d in drawn])
    assert (S.min(), S.max()) == (256, 512)
    assert abs(S.mean() - 384) < 4 * 74.2 / 20_000**0.5  # four standard errors
    assert abs(np.mean([d.flip for d in drawn]) - 0.5) < 4 * 0.5 / 20_000**0.5
    for places in ([d.top for d in drawn], [d.left for d in drawn]):
        assert np.histogram(places, 10, (0, 1))[0].min() > 2000 - 5 * 42.4
    assert draw(keyed(0, SAMPLE, 0, 0, 0), (256, 256), 0.1, flip=False).flip is False


def test_colour_shift_has_the_formulas_covariance() -> None:
    covariance = np.array(
        [[0.0791, 0.0725, 0.0647], [0.0725, 0.0755, 0.0710], [0.0647, 0.0710, 0.0810]]
    )
    colours = Colours((120.0, 115.0, 100.0), tuple(map(tuple, covariance.tolist())))
    alpha = np.array(
        [draw(keyed(0, SAMPLE, 0, 0, i), (256, 256), 0.1).alpha for i in range(20_000)]
    )
    shifts = alpha @ colours.components.T  # (n, 3), grey levels of 255
    # Cov(P diag(l) a) = 0.01 P diag(l^2) P' = 0.01 covariance^2, in [0, 1]
    expected = 0.01 * covariance @ covariance * 255**2
    assert np.abs(np.cov(shifts.T) - expected).max() < 0.04 * expected.max()
    # the first component of natural images is grey: about 3 levels a channel
    assert np.all((shifts.std(0) > 2.5) & (shifts.std(0) < 4))


def test_dropout_bits() -> None:
    kept = np.array(
        [np.unpackbits(kept_units(keyed(0, SAMPLE, 0, 0, i), 1000, 0.3)) for i in range(200)]
    )
    assert kept.shape == (200, 1000)
    assert abs(kept.mean() - 0.7) < 4 * (0.21 / 200_000) ** 0.5
    assert np.unpackbits(kept_units(keyed(0, SAMPLE, 0, 0, 0), 16, 0.0)).all()


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (224, 900), (1000, 667)])
def test_only_the_crop_is_rescaled_to_the_same_pixels(shape: tuple[int, int]) -> None:
    image = photograph(3, *shape)
    for S in (224, 256, 384, 511):
        whole = smallest_side(image, S)
        for top, left in (
            (0, 0),
            (whole.shape[0] - 224, whole.shape[1] - 224),
            ((whole.shape[0] - 224) // 2, 0),
        ):
            expected = whole[top : top + 224, left : left + 224].astype(int)
            difference = np.abs(rescaled_crop(image, S, top, left, 224) - expected)
            assert difference.max() <= 2
            assert difference.mean() < 0.3


def test_crops_reach_every_corner_and_flip_mirrors(data: object) -> None:
    from pathlib import Path

    image = read_rgb(sorted((Path(str(data)) / "photos").iterdir())[0])
    whole = smallest_side(image, 256)
    last = np.nextafter(1.0, 0)
    corner = augmented_crop(image, Augmentation(256, last, last, False, (0, 0, 0)), 224)
    assert np.abs(corner.astype(int) - whole[-224:, -224:]).max() <= 2
    flipped = augmented_crop(image, Augmentation(256, last, last, True, (0, 0, 0)), 224)
    assert np.array_equal(flipped, corner[:, ::-1])


# --- boxes ----------------------------------------------------------------------------------------


def test_a_crop_is_where_it_says_and_a_box_moves_with_it() -> None:
    """A white rectangle on black: in the crop it is where its box is said to be."""
    image = np.zeros((200, 300, 3), np.uint8)
    image[60:120, 100:220] = 255
    corners = np.array([[100.0, 60.0, 220.0, 120.0]])
    for i in range(20):
        augmentation = draw(keyed(0, SAMPLE, 0, 0, i), (128, 160), 0.1)
        place = Place.drawn(image.shape[:2], augmentation, 96)
        pixels = augmented_crop(image, augmentation, 96)[..., 0] > 127
        seen = place.seen(corners)
        x1, y1, x2, y2 = (mirrored(seen, 96) if augmentation.flip else seen)[0]
        columns, rows = np.flatnonzero(pixels.any(0)), np.flatnonzero(pixels.any(1))
        assert abs(columns[0] - max(x1, 0)) <= 1 and abs(columns[-1] + 1 - min(x2, 96)) <= 1
        assert abs(rows[0] - max(y1, 0)) <= 1 and abs(rows[-1] + 1 - min(y2, 96)) <= 1


def test_a_place_is_drawn_anew_until_enough_of_the_box_is_in_the_crop() -> None:
    """A box of a hundredth of the image, in its corner: a place that is drawn once seldom has
    it.
    """
    corners, shape = np.array([[0.0, 0.0, 30.0, 20.0]]), (200, 300)
    frame = np.array([0.0, 0.0, 32.0, 32.0])

    def shares(least: float) -> list[float]:
        found = []
        for i in range(200):
            rng = keyed(0, SAMPLE, 0, 0, i)
            first = draw(rng, (64, 64), 0.1)
            chosen, seen = with_box(rng, first, corners, shape, 32, least)
            assert (chosen.S, chosen.flip, chosen.alpha) == (first.S, first.flip, first.alpha)
            found.append(float(cover(seen[None], frame)[0]))
        return found

    once, enough = shares(0.0), shares(0.5)
    assert np.mean(np.array(once) >= 0.5) < 0.4
    assert np.mean(np.array(enough) >= 0.5) > 2 * np.mean(np.array(once) >= 0.5)


def test_of_several_boxes_each_is_as_likely_and_the_key_decides() -> None:
    corners = np.array([[0.0, 0.0, 40.0, 40.0], [20.0, 20.0, 60.0, 60.0]])

    def box(i: int) -> tuple[float, ...]:
        rng = keyed(0, SAMPLE, 0, 0, i)
        return tuple(with_box(rng, draw(rng, (64, 64), 0.1), corners, (64, 64), 64, 0.5)[1])

    found = [box(i) for i in range(400)]
    assert found == [box(i) for i in range(400)]
    # of each, and of its mirror image
    assert set(found) == {(0, 0, 40, 40), (24, 0, 64, 40), (20, 20, 60, 60), (4, 20, 44, 60)}
    firsts = sum(one in ((0, 0, 40, 40), (24, 0, 64, 40)) for one in found)
    assert 150 < firsts < 250
