"""Pieces of twelve photographs that come with scikit-learn and scikit-image: of which photograph is
a piece?

A photograph is cut into squares that share no pixel, and each square is one piece: whichever of
them train and whichever test, no pixel is in both. Each piece is seen in a light of its own, a
brightness and a tint, drawn from a fixed seed: else its colours alone would tell its photograph
(docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vggfeat.datasets.items import Items
from vggfeat.datasets.protocol import PROTOCOLS
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError

SIDE = 100  # of a piece, in pixels
BRIGHTNESS, TINT = 0.3, 0.15  # the most that they differ from 1, of a piece and of its channels


@dataclass(frozen=True)
class Photograph:
    """One class.

    package, file: the package it comes with, and its path there. licence, by: as the package names
    them. reduced: by this whole factor, so that a piece shows more of it.
    """

    package: str
    file: str
    licence: str
    by: str
    reduced: int = 1


# In the order of their names. Those of scikit-image lie in its wheel, none is fetched.
PHOTOGRAPHS = {
    "astronaut": Photograph("skimage", "data/astronaut.png", "public domain", "NASA"),
    "bricks": Photograph("skimage", "data/brick.png", "CC0", "CC0Textures"),
    "cat": Photograph("skimage", "data/chelsea.png", "CC0", "Stefan van der Walt"),
    "coffee": Photograph("skimage", "data/coffee.png", "CC0", "Rachel Michetti"),
    "flower": Photograph("sklearn", "datasets/images/flower.jpg", "CC BY 2.0", "vultilion"),
    "galaxies": Photograph(
        "skimage", "data/hubble_deep_field.jpg", "public domain", "NASA, HubbleSite", reduced=2
    ),
    "grass": Photograph("skimage", "data/grass.png", "CC0", "linolafett"),
    "gravel": Photograph("skimage", "data/gravel.png", "CC0", "CC0Textures"),
    "photographer": Photograph("skimage", "data/camera.png", "CC0", "Lav Varshney"),
    "retina": Photograph("skimage", "data/retina.jpg", "CC0", "Mikael Häggström", reduced=3),
    "rocket": Photograph("skimage", "data/rocket.jpg", "public domain", "SpaceX"),
    "temple": Photograph("sklearn", "datasets/images/china.jpg", "CC BY 2.0", "danielbuechele"),
}


def load(root: Path | None = None) -> Items:
    """The pieces in their lights; `root` is not used. Raises VggfeatError as `pieces`."""
    return pieces()


def pieces(brightness: float = BRIGHTNESS, tint: float = TINT) -> Items:
    """Images (N, SIDE, SIDE, 3) uint8 in memory; names are CLASS/ROW-COLUMN; three random 80/20
    splits.

    A piece is multiplied by 1 +- brightness, and each of its channels by 1 +- tint, at the most.
    Raises VggfeatError where scikit-image is not installed, or lacks one of the photographs.
    """
    folders = _packages()
    rng = np.random.default_rng(0)
    names: list[str] = []
    labels: list[int] = []
    images: list[np.ndarray] = []
    for k, (name, photograph) in enumerate(PHOTOGRAPHS.items()):
        pixels = _read(folders[photograph.package] / photograph.file, photograph.reduced)
        for place, square in _squares(pixels):
            light = rng.uniform(1 - tint, 1 + tint, 3)
            light *= rng.uniform(1 - brightness, 1 + brightness)
            names.append(f"{name}/{place}")
            labels.append(k)
            images.append(np.rint(np.minimum(square * light, 255)).astype(np.uint8))
    label_N = np.array(labels, np.int32)
    protocol = "single-label"
    return Items(
        dataset="photographs",
        protocol=protocol,
        root=Path("."),
        names=names,
        labels=label_N,
        classes=list(PHOTOGRAPHS),
        splits=PROTOCOLS[protocol].splits(label_N),
        images=np.stack(images),
    )


def _packages() -> dict[str, Path]:
    """Where the packages lie that have the photographs."""
    import sklearn

    try:
        import skimage
    except ImportError as error:
        raise VggfeatError(
            f"ten of the photographs come with scikit-image ({error}): pip install 'vggfeat[demo]'"
        ) from error
    return {"sklearn": Path(sklearn.__path__[0]), "skimage": Path(skimage.__path__[0])}


def _read(path: Path, reduced: int) -> np.ndarray:
    """(H, W, 3) uint8, each pixel the mean of a square of `reduced` x `reduced`."""
    try:
        pixels = read_rgb(path)
    except UnreadableImage as error:
        raise VggfeatError(
            f"the photograph {path} can't be read ({error}): install the package that it comes"
            " with anew"
        ) from error
    return np.asarray(Image.fromarray(pixels).reduce(reduced))


def _squares(pixels: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Squares row by row, each with its place; what is left at the edges is in none."""
    rows, columns = (side // SIDE for side in pixels.shape[:2])
    top, left = (side % SIDE // 2 for side in pixels.shape[:2])
    return [
        (f"{i}-{j}", pixels[y : y + SIDE, x : x + SIDE])
        for i in range(rows)
        for j in range(columns)
        for y, x in [(top + i * SIDE, left + j * SIDE)]
    ]
