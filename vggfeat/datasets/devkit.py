"""What ILSVRC-2012 tells beside its images: the devkit's numbers of the classes, and the classes of
the validation images, which come without folders.

    ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt   490
    ILSVRC2012_devkit_t12/data/meta.mat                                 490 is n01751748
    LOC_val_solution.csv (Kaggle's)        ILSVRC2012_val_00000001,n01751748 111 108 441 193

python -m vggfeat.datasets.devkit META.mat     # what `devkit_numbers` reads, in its own process
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from vggfeat.checked import fitted, parse_json, read_text, regular, shown
from vggfeat.errors import VggfeatError

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SOLUTION = "LOC_val_solution.csv"
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
    root = os.fspath(Path(__file__).parents[2])
    try:
        reader = subprocess.run(
            [sys.executable, "-m", "vggfeat.datasets.devkit", os.path.abspath(path)],
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


def validation_classes(path: Path) -> dict[str, str]:
    """Image, without its ending -> synset id, by the devkit's ground truth, with meta.mat beside
    it, or by Kaggle's list.

    Raises VggfeatError naming the file, and the line, that is missing or malformed.
    """
    return _solution(path) if path.name == SOLUTION else _ground_truth(path)


def _ground_truth(path: Path) -> dict[str, str]:
    numbers = devkit_numbers(path.with_name("meta.mat"))
    synset_of = {str(number): synset for synset, number in numbers.items()}
    lines = read_text(path, "the devkit's ground truth", most=MOST_BYTES).split("\n")
    if not lines[-1].strip():
        del lines[-1]
    found = {}
    for i, line in enumerate(lines, 1):
        if line.strip() not in synset_of:
            raise VggfeatError(
                f"{path}, line {i}: {shown(line)} is no class of its meta.mat, which has"
                f" {len(numbers):,}"
            )
        found[f"ILSVRC2012_val_{i:08d}"] = synset_of[line.strip()]
    return found


def _solution(path: Path) -> dict[str, str]:
    first, *lines = read_text(path, "Kaggle's list", most=MOST_BYTES).splitlines() or [""]
    if first.strip() != "ImageId,PredictionString":
        raise VggfeatError(f"{path}, line 1: expected ImageId,PredictionString, not {shown(first)}")
    while lines and not lines[-1].strip():
        lines.pop()
    found: dict[str, str] = {}
    for i, line in enumerate(lines, 2):
        image, _, told = line.partition(",")
        words = told.split()
        synsets = set(words[::5])  # a class and the four numbers of its box, for each object
        if len(synsets) != 1 or len(words) % 5:
            raise VggfeatError(
                f"{path}, line {i}: expected an image and its one class, with the four numbers of a"
                f" box for each object, not {shown(line)}"
            )
        if found.setdefault(image, *synsets) not in synsets:
            raise VggfeatError(f"{path}, line {i}: {shown(image)} had another class before")
    return found


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_read_meta(sys.argv[1])))
    except Exception as error:  # scipy meets damage in many ways
        sys.exit(f"{type(error).__name__}: {error}")
