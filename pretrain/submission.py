"""The file that the ILSVRC-2012 devkit scores: five classes an image, by the numbers that the
devkit gives them (`vggfeat.datasets.devkit`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vggfeat.errors import VggfeatError
from vggfeat.files import write_text

if TYPE_CHECKING:
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
