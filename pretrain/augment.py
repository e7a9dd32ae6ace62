"""What is random about a training sample, drawn from a key and nothing else. S training scale, H, W
height and width.

The key is (seed, stage, epoch, sample): whichever process, worker or micro-batch meets the sample,
it sees the same scale, crop, flip, colour shift and dropped units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def augmented_crop(image_HWC: np.ndarray, augmentation: Augmentation, crop: int) -> np.ndarray:
    """The (crop, crop, 3) uint8 that an augmentation cuts from an image; the colour shift is added
    on the device.

    Only the crop is rescaled, not the image around it. Raises UnreadableImage for an image that S
    would blow up.
    """
    height, width = smallest_side_shape(image_HWC.shape[0], image_HWC.shape[1], augmentation.S)
    top = int(augmentation.top * (height - crop + 1))
    left = int(augmentation.left * (width - crop + 1))
    pixels = rescaled_crop(image_HWC, augmentation.S, top, left, crop)
    return np.ascontiguousarray(pixels[:, ::-1]) if augmentation.flip else pixels


def kept_units(rng: np.random.Generator, units: int, dropout: float) -> np.ndarray:
    """(ceil(units / 8),) uint8: one bit a unit, set where it is kept, first unit in the highest
    bit.
    """
    return np.packbits(rng.random(units, dtype=np.float32) >= dropout)
