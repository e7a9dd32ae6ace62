"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, for a first try without a
download.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vggfeat.datasets.items import Items
from vggfeat.datasets.protocol import PROTOCOLS


def load(root: Path | None = None) -> Items:
    """Images (1797, 8, 8) uint8 in memory, 0..255 from the original 0..16; three random 80/20
    splits.

    labels: (1797,) int32. `root` is not used.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int32)
    protocol = "single-label"
    return Items(
        dataset="digits",
        protocol=protocol,
        root=Path("."),
        names=[f"digits/{i:04d}" for i in range(len(labels))],
        labels=labels,
        classes=[str(name) for name in data.target_names],
        splits=PROTOCOLS[protocol].splits(labels),
        images=np.rint(data.images * (255 / 16)).astype(np.uint8),
    )
