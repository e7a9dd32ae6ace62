"""The files that the ILSVRC-2012 devkit scores: five classes an image, by the numbers that the
devkit gives them; and those with a box each.

python -m pretrain.submission META.mat     # in a process of its own: what `devkit_numbers` reads
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vggfeat.checked import fitted, parse_json, regular
from vggfeat.errors import VggfeatError
from vggfeat.files import write_text

if TYPE_CHECKING:
    from pretrain.box_figures import Located
    from pretrain.kept import KeptPosteriors

# The real file has 0.5 MB. A MATLAB file is compressed and claims its own sizes, so that a short
# one can ask for all the memory: it is read in a process that has this much of it, and this many
# seconds.
MOST_BYTES = 16 << 20
MEMORY = 2 << 30
SECONDS = 60


def devkit_numbers(devkit: Path) -> dict[str, int]:
    """Synset id -> ILSVRC2012_ID, from the devkit's data/meta.mat. Raises VggfeatError where it
    isn't.
    """
    path = devkit / "data" / "meta.mat" if devkit.is_dir() else devkit
    other = f"{path} is not the ILSVRC-2012 devkit's meta.mat"
    if regular(path, "meta.mat of the ILSVRC-2012 devkit") > MOST_BYTES:
        raise VggfeatError(f"{other}: it is longer than {MOST_BYTES:,} bytes")
    root = os.fspath(Path(__file__).parents[1])
    try:
        reader = subprocess.run(
            [sys.executable, "-m", "pretrain.submission", os.path.abspath(path)],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root},
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise VggfeatError(f"{other}: reading it doesn't end") from None
    if reader.returncode:
        said = reader.stderr.decode(errors="replace").strip().splitlines()
        raise VggfeatError(
            f"{other}: {said[-1] if said else f'its reader ended with {reader.returncode}'}"
        )
    pairs = fitted(parse_json(reader.stdout, other), list[tuple[str, int]], other)
    numbers = dict(pairs)
    if not numbers or len(set(numbers.values())) != len(pairs) or min(numbers.values()) < 1:
        raise VggfeatError(f"{other}: its classes don't have a number each")
    return numbers


def _read_meta(path: str) -> list[tuple[str, int]]:
    """(synset id, number) of each class, which is a synset without children."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from scipy.io import loadmat

    synsets = loadmat(path, squeeze_me=True, struct_as_record=True, variable_names=["synsets"])[
        "synsets"
    ]
    return [
        (str(s["WNID"]), int(s["ILSVRC2012_ID"])) for s in synsets if int(s["num_children"]) == 0
    ]


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


if __name__ == "__main__":
    try:
        print(json.dumps(_read_meta(sys.argv[1])))
    except Exception as error:  # scipy meets damage in many ways
        sys.exit(f"{type(error).__name__}: {error}")
