"""How each data set is scored: the paper's Appendix B, and the common rules of all others, as a
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vggfeat.datasets.splits import N_SPLITS, random_splits
from vggfeat.metrics import APKind


@dataclass(frozen=True)
class Protocol:
    """What is drawn, pooled, compared and counted.

    n_train: training images a class, or their share; max_test: most test images a class; for random
        splits that are drawn here.
    pool: over the scales; None: it says nothing, and "average" is the default.
    figure: what chooses C and is compared, for one label an image, by its key in `metrics.FIGURES`;
        ap: the average precision that does so for several, and that is looked at class by class in
        either case.
    left_out: classes that the figures compared leave out: they are distractors.
    classes, images: what the official archives hold, beside which a part of them is told: classes,
        with the background; labelled images of each part.
    """

    n_train: int | float = 0.8
    max_test: int | None = None
    pool: str | None = None
    figure: str = "mean_class_recall"
    ap: APKind = "allpoint"
    left_out: tuple[str, ...] = ()
    classes: int | None = None
    images: Mapping[str, int] = field(default_factory=dict)

    def compared_by(self, several: bool) -> str:
        """The key of the figure that chooses C and is compared. several: labels an image."""
        return f"map_{self.ap}" if several else self.figure

    @property
    def class_ap(self) -> str:
        """The key of a class's average precision."""
        return f"ap_{self.ap}"

    def splits(
        self, labels: np.ndarray, n_splits: int = N_SPLITS, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Its random splits; see `random_splits`."""
        return random_splits(
            labels, n_train=self.n_train, max_test=self.max_test, n_splits=n_splits, seed=seed
        )

    def other_counts(self, n_classes: int, splits: Mapping[str, np.ndarray]) -> list[str]:
        """In which counts the images are not those that it is about, each in a few words."""
        counts = []
        if self.classes not in (None, n_classes):
            counts.append(f"{n_classes:,} classes instead of {self.classes:,}")
        for part, official in self.images.items():
            if (n := len(splits.get(part, ()))) != official:
                counts.append(f"{n:,} {part} images instead of {official:,}")
        return counts


# Appendix B: descriptors are averaged over the scales on VOC, stacked on Caltech; 30 and 60
# training images a class, at most 50 test images of Caltech-101. Of VOC-2007 the 11-point mAP is
# compared.
PROTOCOLS = {
    "voc2007": Protocol(
        pool="average", ap="11point", images={"train": 2501, "val": 2510, "test": 4952}
    ),
    "voc2012": Protocol(pool="average", images={"train": 5717, "val": 5823}),
    # The devkit trains and scores the actions from the second on: its first, "other", is none.
    "voc2012action": Protocol(pool="average", left_out=("other",)),
    "caltech101": Protocol(n_train=30, max_test=50, pool="stack", classes=102),
    "caltech256": Protocol(n_train=60, pool="stack", classes=257),
    "single-label": Protocol(),
    "multi-label": Protocol(),
}


def protocol_of(name: str) -> Protocol:
    """The rules of a protocol; of an unknown one, and of "unlabelled", the common ones."""
    return PROTOCOLS.get(name, Protocol())


def pool_of(protocol: str) -> tuple[str, str]:
    """How a protocol pools over scales, where nobody says, and in words why."""
    pool = protocol_of(protocol).pool
    return (pool, f"the protocol of {protocol}") if pool else ("average", "the default")


def remarks_on(protocol: str, n_classes: int, splits: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """In which counts the images are not its protocol's, as `Items.remarks`."""
    counts = ", ".join(protocol_of(protocol).other_counts(n_classes, splits))
    return (f"{protocol} with {counts}: no figure of these is its protocol's",) if counts else ()
