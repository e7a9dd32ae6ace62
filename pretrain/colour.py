"""The training set's colours: mean RGB, and the covariance whose principal components shift them at
random.

The mean is all of the preprocessing (Sect. 2.1). The shift is Krizhevsky's (Krizhevsky et al. 2012,
Sect. 4.1): to every pixel of an image is added [p1 p2 p3] [a1 l1, a2 l2, a3 l3]', p and l the
eigenvectors and eigenvalues of the 3x3 covariance of RGB values in [0, 1], a random factors.
"Literally" that is about 3 grey levels of 255 a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np

from vggfeat.checked import Range, fitted, parse_json, read_text
from vggfeat.datasets.items import name_digest
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.files import write_json


@dataclass(frozen=True)
class Colours:
    """What one pass over the training set finds.

    mean: RGB in 0..255. covariance: 3x3, of RGB in [0, 1]. images: N read. unreadable: name ->
    reason. training_set: `name_digest` of the set's names, so that those of another aren't used by
    mistake. Every pixel of every readable image counts once.
    """

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    images: Annotated[int, Range(0, 2**53)] = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    training_set: str = ""

    @property
    def components(self) -> np.ndarray:
        """(3, 3) float32: column k is 255 l_k p_k, so that `components @ alpha` is the shift in
        0..255.
        """
        values, vectors = np.linalg.eigh(np.array(self.covariance))
        order = np.argsort(values)[::-1]
        vectors = vectors[:, order]
        vectors = vectors * np.where(vectors.sum(0) < 0, -1, 1)  # a sign of our own: LAPACKs differ
        components: np.ndarray = (255.0 * vectors * values[order]).astype(np.float32)
        return components

    def save(self, path: Path) -> None:
        """Write as JSON; the file appears whole."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Colours:
        """The inverse of `save`. Raises VggfeatError for a missing or unfit file."""
        text = read_text(path, "colour statistics")
        try:
            record = parse_json(text, "it")
            colours: Colours = fitted(record, cls, "its content")
            if lacking := [each.name for each in fields(cls) if each.name not in record]:
                raise VggfeatError(f"it lacks {lacking[0]}")
            refuse_impossible(colours.mean, colours.covariance)
            return colours
        except VggfeatError as error:
            raise VggfeatError(
                f"{path} can't be read as colour statistics: {error}; delete it to measure anew"
            ) from error


def refuse_impossible(mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> None:
    """Raise VggfeatError for finite numbers that are no mean and covariance of colours."""
    if len(mean) != 3 or not all(0 <= v <= 255 for v in mean):
        raise VggfeatError(f"mean must be three numbers in 0..255, not {str(mean)[:80]}")
    if [len(row) for row in covariance] != [3, 3, 3] or np.abs(covariance).max() >= 1e6:
        raise VggfeatError(
            f"covariance must be three rows of three numbers, not {str(covariance)[:80]}"
        )
    matrix = np.array(covariance)
    if not np.allclose(matrix, matrix.T, rtol=1e-6) or np.linalg.eigvalsh(matrix).min() < -1e-6:
        raise VggfeatError(
            "covariance must be symmetric and have no negative variances, not"
            f" {str(covariance)[:80]}"
        )


@dataclass
class Sums:
    """Exact integer sums over pixels, so that any division among processes gives the same mean and
    covariance.
    """

    pixels: int = 0
    first: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    second: np.ndarray = field(default_factory=lambda: np.zeros((3, 3), np.int64))
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        self.pixels += other.pixels
        self.first = self.first + other.first
        self.second = self.second + other.second
        self.unreadable |= other.unreadable

    def colours(self, names: Sequence[str]) -> Colours:
        """Raises VggfeatError when no image could be read."""
        if self.pixels == 0:
            raise VggfeatError("not one of the training images can be read")
        mean = self.first / self.pixels
        covariance = (self.second / self.pixels - np.outer(mean, mean)) / 255.0**2
        unreadable = {name: self.unreadable[name] for name in names if name in self.unreadable}
        return Colours(
            tuple(mean.tolist()),
            tuple(map(tuple, covariance.tolist())),
            len(names) - len(unreadable),
            unreadable,
            name_digest(names),
        )


def measure(
    root: Path, names: Iterable[str], workers: int, advance: Callable[[int], None] = lambda n: None
) -> Sums:
    """Sums over the images `root / name`, decoded in `workers` threads. advance: called after each
    with the count.
    """
    total = Sums()
    waiting = iter(names)
    with ThreadPoolExecutor(workers) as pool:
        done = 0
        # In slices: the queue of a million futures would cost more memory than the images.
        try:
            while part := list(islice(waiting, 64 * workers)):
                for sums in pool.map(lambda name: _sums_of(root, name), part):
                    total.add(sums)
                    done += 1
                    advance(done)
        except BaseException:
            # Ctrl-C doesn't wait for images that are still to come
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return total


def _sums_of(root: Path, name: str) -> Sums:
    try:
        image_HWC = read_rgb(root / name)
    except UnreadableImage as error:
        return Sums(unreadable={name: str(error)})
    # Products of bytes summed in float64 are exact below 2^53, which is 138 gigapixels.
    x_N3 = image_HWC.reshape(-1, 3).astype(np.float64)
    return Sums(len(x_N3), x_N3.sum(0).astype(np.int64), (x_N3.T @ x_N3).astype(np.int64))
