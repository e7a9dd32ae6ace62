"""scikit-learn's digits."""

from __future__ import annotations

import numpy as np

from vggfeat.datasets import load


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    items = load("digits")
    assert items.images is not None and items.labels is not None
    assert items.images.shape == (1797, 8, 8) and items.images.dtype == np.uint8
    assert items.images.min() == 0 and items.images.max() == 255
    assert np.abs(items.images * (16 / 255) - load_digits().images).max() < 0.04
    assert np.bincount(items.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (items.names[7], items.classes[3]) == ("digits/0007", "3")
    assert np.shares_memory(items.source(5), items.images[5])
