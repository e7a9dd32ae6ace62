"""What is random about a training sample, drawn from a key and nothing else. S training scale, H, W
height and width.

The key is (seed, stage, epoch, sample): whichever process, worker or micro-batch meets the sample,
it sees the same scale, crop, flip, colour shift and dropped units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pretrain.boxes import cover, mirrored
from vggfeat.images import rescaled_crop, smallest_side_shape

# What a stream of random numbers is for: no two purposes share one.
ORDER, SAMPLE = 0, 1


def keyed(seed: int, purpose: int, stage: int, epoch: int, sample: int = 0) -> np.random.Generator:
    """The random numbers of one key. Philox is counter-based: any key's stream starts at once,
    without the others.
    """
    # The low words of the counter count the draws; the key and the high words name the stream.
    return np.random.Generator(
        np.random.Philox(key=[seed, purpose << 32 | stage], counter=[0, 0, epoch, sample])
    )


@dataclass(frozen=True)
class Augmentation:
    """One sample's random choices (Sect. 3.1)."""

    S: int
    """Smallest side in pixels to which the image is rescaled."""
    top: float
    """Place of the crop as a share of the rows that it can start at, in [0, 1)."""
    left: float
    """The same for columns."""
    flip: bool
    alpha: tuple[float, float, float]
    """Random factors of the principal colour components (Krizhevsky et al. 2012, Sect. 4.1)."""


def draw(
    rng: np.random.Generator, train_scale: tuple[int, int], colour_std: float, flip: bool = True
) -> Augmentation:
    """An augmentation; S is uniform over the integers of train_scale, both ends included."""
    low, high = train_scale
    S = int(rng.integers(low, high, endpoint=True))
    top, left, coin = rng.random(3)
    a, b, c = rng.standard_normal(3) * colour_std
    return Augmentation(
        S, float(top), float(left), bool(flip and coin < 0.5), (float(a), float(b), float(c))
    )


@dataclass(frozen=True)
class Place:
    """Where a crop lies in an image that is rescaled to S; all in pixels.

    shape: (height, width) of the image; rescaled: that of the rescaled one.
    """

    shape: tuple[int, int]
    rescaled: tuple[int, int]
    top: int
    left: int
    crop: int

    @classmethod
    def drawn(cls, shape: tuple[int, int], augmentation: Augmentation, crop: int) -> Place:
        """Where an augmentation cuts. Raises UnreadableImage for an image that S would blow up."""
        height, width = smallest_side_shape(*shape, augmentation.S)
        top = int(augmentation.top * (height - crop + 1))
        left = int(augmentation.left * (width - crop + 1))
        return cls(shape, (height, width), top, left, crop)

    @classmethod
    def central(cls, shape: tuple[int, int], Q: int, crop: int) -> Place:
        """The central crop at smallest side Q. Raises as `drawn`."""
        height, width = smallest_side_shape(*shape, Q)
        return cls(shape, (height, width), (height - crop) // 2, (width - crop) // 2, crop)

    def seen(self, corners_N4: np.ndarray) -> np.ndarray:
        """(N, 4): boxes of the image, in pixels of the crop; they may reach out of it."""
        (h, w), (H, W) = self.rescaled, self.shape
        shift = np.array([self.left, self.top, self.left, self.top])
        seen: np.ndarray = corners_N4 * np.array([w / W, h / H, w / W, h / H]) - shift
        return seen


def augmented_crop(image_HWC: np.ndarray, augmentation: Augmentation, crop: int) -> np.ndarray:
    """The (crop, crop, 3) uint8 that an augmentation cuts from an image; the colour shift is added
    on the device.

    Only the crop is rescaled, not the image around it. Raises UnreadableImage for an image that S
    would blow up.
    """
    place = Place.drawn(image_HWC.shape[:2], augmentation, crop)
    pixels = rescaled_crop(image_HWC, augmentation.S, place.top, place.left, crop)
    return np.ascontiguousarray(pixels[:, ::-1]) if augmentation.flip else pixels


DRAWS = 10  # of a crop's place, until enough of the box is in it


def with_box(
    rng: np.random.Generator,
    augmentation: Augmentation,
    corners_N4: np.ndarray,
    shape: tuple[int, int],
    crop: int,
    least: float,
) -> tuple[Augmentation, np.ndarray]:
    """The augmentation, its place drawn anew until a share `least` of a true box is in the crop,
    or else the one of `DRAWS` that has most of it; and that box, (4,) in pixels of the crop as it
    is flipped.

    corners_N4: the true boxes of an image of this (height, width), of which one is drawn, as long
    as there are any.
    """
    corners_14 = corners_N4[[rng.integers(len(corners_N4))]]
    frame = np.array([0.0, 0.0, crop, crop])
    best, most = augmentation, -1.0
    for _ in range(DRAWS):
        share = float(cover(Place.drawn(shape, augmentation, crop).seen(corners_14), frame)[0])
        if share > most:
            best, most = augmentation, share
        if share >= least:
            break
        top, left = rng.random(2)
        augmentation = replace(augmentation, top=float(top), left=float(left))
    seen_14 = Place.drawn(shape, best, crop).seen(corners_14)
    return best, (mirrored(seen_14, crop) if best.flip else seen_14)[0]


def kept_units(rng: np.random.Generator, units: int, dropout: float) -> np.ndarray:
    """(ceil(units / 8),) uint8: one bit a unit, set where it is kept, first unit in the highest
    bit.
    """
    return np.packbits(rng.random(units, dtype=np.float32) >= dropout)
