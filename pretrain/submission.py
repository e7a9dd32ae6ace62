"""The files that the ILSVRC-2012 devkit scores: five classes an image, by the numbers that the
devkit gives them (`vggfeat.datasets.devkit`); and those with a box each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vggfeat.errors import VggfeatError
from vggfeat.files import write_text

if TYPE_CHECKING:
    from pretrain.box_figures import Located
    from pretrain.kept import KeptPosteriors


def refuse_unknown(classes: list[str], numbers: dict[str, int]) -> None:
    """Refuse classes that the devkit has no number for."""
    missing = [name for name in classes if name not in numbers]
    if missing:
        raise VggfeatError(
            f"the devkit has no class {missing[0]!r}: a submission needs nets of ILSVRC's classes"
        )


def write_submission(
    kept: KeptPosteriors, mode: str, scales: tuple[int, ...], numbers: dict[str, int], path: Path
) -> None:
    """The devkit's format: a line an image, in the order of names, with the numbers of the five
    likeliest classes.

    An unreadable image has no prediction, and its line is five zeros.
    """
    refuse_unknown(kept.classes, numbers)
    posteriors_NK = kept.fused(mode, scales or None)
    best = (-posteriors_NK).argsort(1, kind="stable")[:, :5]
    lines = []
    for i in sorted(range(len(kept.names)), key=kept.names.__getitem__):
        guesses = [0] * 5 if i in kept.unreadable else [numbers[kept.classes[k]] for k in best[i]]
        lines.append(" ".join(map(str, guesses)))
    write_text(path, "\n".join(lines) + "\n")


def write_localisation(
    found: Located,
    names: Sequence[str],
    sizes_N2: np.ndarray,
    numbers: dict[str, int],
    path: Path,
) -> None:
    """The devkit's format of classification with localisation: a line an image, in the order of
    names, with five times a class's number and its box, xmin ymin xmax ymax, whole pixels from 1,
    the last ones inside it.

    An edge goes to the nearest whole one, halves up; a box has a pixel at least. sizes_N2: height
    and width of the images. What has no prediction, as an unreadable image, is zeros.
    """
    refuse_unknown(found.classes, numbers)
    lines = []
    for i in sorted(range(len(names)), key=names.__getitem__):
        row = [0] * 25
        height, width = map(int, sizes_N2[i])
        for c, (label, corners) in enumerate(
            zip(found.labels_NC[i], found.corners_NC4[i], strict=True)
        ):
            if not np.isnan(corners).any():
                x1, y1, x2, y2 = (math.floor(edge + 0.5) for edge in corners)
                left, top = min(x1 + 1, width), min(y1 + 1, height)
                box = [left, top, max(left, x2), max(top, y2)]
                row[5 * c : 5 * c + 5] = [numbers[found.classes[label]], *box]
        lines.append(" ".join(map(str, row)))
    write_text(path, "\n".join(lines) + "\n")
