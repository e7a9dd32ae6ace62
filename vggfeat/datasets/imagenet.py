"""ImageNet (ILSVRC-2012), or any part of it: sorted into a folder a class, or as it is downloaded.

    train/n01440764/n01440764_10026.JPEG
    val/n01440764/ILSVRC2012_val_00000293.JPEG          sorted
    val/ILSVRC2012_val_00000293.JPEG                    flat, as in the official archive; then
    ILSVRC2012_devkit_t12/data/{meta.mat, ILSVRC2012_validation_ground_truth.txt}, or
    LOC_val_solution.csv                                tell the classes

Kaggle's archive has train and val in ILSVRC/Data/CLS-LOC, and the list beside ILSVRC. "Train",
"training", "validation" … stand for the same. What lies beside the two is left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path, PurePath

from vggfeat.checked import first_few, shown
from vggfeat.datasets.devkit import GROUND_TRUTH, SOLUTION, validation_classes
from vggfeat.datasets.download import need_root
from vggfeat.datasets.folder import LeftOut, children, one_folder_each, read_splits
from vggfeat.datasets.items import Items
from vggfeat.datasets.splits import parts_among
from vggfeat.errors import VggfeatError

_KAGGLE = PurePath("ILSVRC/Data/CLS-LOC")
# Where the labels of flat validation images may lie, below a folder.
_LABELS = (
    *(f"{folder}/data/{GROUND_TRUTH}" for folder in ("ILSVRC2012_devkit_t12", "devkit")),
    SOLUTION,
)


def load(root: Path | None) -> Items:
    """Splits "train" and "val", or the one that is there; classes are the sorted synset ids.

    labels: (N,) int32. Flat validation images have the order and the labels that they would have
    if they were sorted.
    Raises VggfeatError when neither folder is there, a class folder is empty, "val" has a class
    that "train" lacks, or the labels of flat images are missing, malformed or contradictory.
    """
    root = need_root("imagenet", root, "the folder that holds train and val")
    base = with_parts(root)
    folder_of = part_folders(base) if base.is_dir() else {}
    if not folder_of:
        looked = " or ".join(str((root / split).absolute()) for split in ("train", "val"))
        raise VggfeatError(
            f"no folder {looked}: give `root` the folder that holds train/WNID and val/WNID"
        )
    if "train" in folder_of:
        _refuse_packed(base / folder_of["train"])
    if "val" not in folder_of or children(base / folder_of["val"])[0]:
        left = LeftOut()
        return read_splits("imagenet", base, part_folders(base, left), left)
    sources = _sources(root, base)
    left = LeftOut(used={_below(base, path).split("/")[0] for path in sources})
    part_folders(base, left)
    images_of, remarks = _by_class(base, folder_of, sources, left)
    items = read_splits("imagenet", base, folder_of, left, {"val": images_of})
    lists = [_below(base, path) for path in sources]
    return replace(items, lists=lists, remarks=(*items.remarks, *remarks))


def with_parts(root: Path, wanted: Sequence[str] = ("train", "val")) -> Path:
    """The folder that holds the parts: root; or, where Kaggle's archive was unpacked, one below."""
    for start in range(len(_KAGGLE.parts)):
        below = root.joinpath(*_KAGGLE.parts[start:])
        if below.is_dir() and not part_folders(root, wanted=wanted):
            return below
    return root


def part_folders(
    root: Path, left: LeftOut | None = None, wanted: Sequence[str] = ("train", "val")
) -> dict[str, str]:
    """Part -> its folder under root, of those parts that are wanted and there; the plain word
    before another form.

    left: takes what lies beside them, but for ILSVRC's own test images, which are flat.
    Raises VggfeatError where root is no folder, or a part has two.
    """
    folders, images = children(root, left)
    among = parts_among(folders)
    part_of = {
        name: part
        for name, part in among.items()
        if part in wanted and (name == part or part not in folders)
    }
    if left is not None:
        beside = " and ".join(part_of)
        for name in folders:
            if name not in part_of and (among.get(name) != "test" or children(root / name)[0]):
                left.add(f"folder{{s}} beside {beside}", name)
        for name in images:
            left.add(f"image{{s}} beside {beside}", name)
    return one_folder_each(root, part_of)


# --- as it is downloaded --------------------------------------------------------------------------


def _refuse_packed(train: Path) -> None:
    """Raise VggfeatError where the archive of training images was unpacked, but not those in it."""
    packed = LeftOut()
    if not children(train, packed)[0] and ".tar" in packed.endings:
        raise VggfeatError(
            f"{train.absolute()} holds archives, one a class: unpack each into a folder of its"
            f' name, in that folder: for t in *.tar; do mkdir -p "${{t%.tar}}" && tar -xf "$t" -C'
            ' "${t%.tar}" && rm "$t"; done'
        )


def _sources(root: Path, base: Path) -> list[Path]:
    """The files that tell the classes of flat validation images, where they usually lie."""
    places = [root.absolute(), base.absolute()]
    if places[1].parts[-3:] == _KAGGLE.parts:
        places.append(places[1].parents[2])
    found = [place / name for place in dict.fromkeys(places) for name in _LABELS]
    return [path for path in found if os.path.lexists(path)]


def _below(base: Path, path: Path) -> str:
    """A file's name as `Items.lists` have it: relative to base where it lies there."""
    own = base.absolute()
    return path.relative_to(own).as_posix() if path.is_relative_to(own) else str(path)


def _by_class(
    base: Path, folder_of: dict[str, str], sources: Sequence[Path], left: LeftOut
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Class -> its sorted image names, relative to base, of flat validation images; and what is to
    be said of them.
    """
    inside = folder_of["val"]
    val = (base / inside).absolute()
    _, images = children(base / inside, left, inside)
    if not images:
        raise VggfeatError(
            f"no images in {val}: unpack the validation images there, or move it away to use train"
            " alone"
        )
    if not sources:
        raise VggfeatError(
            f"no class folders in {val}, and nothing beside it that tells the classes of its"
            f" images: put the devkit (ILSVRC2012_devkit_t12/data with meta.mat and {GROUND_TRUTH})"
            f" or Kaggle's {SOLUTION} into {base.absolute()}, sort the images into folders named by"
            f" synset id, or move {inside} away to use train alone"
        )
    stem_of = {name: os.path.splitext(name)[0] for name in images}
    if len(set(stem_of.values())) < len(images):
        twin = next(b for a, b in pairwise(images) if stem_of[a] == stem_of[b])
        raise VggfeatError(f"{val} holds {stem_of[twin]} twice, as {twin}, too: remove one")
    first, *others = [(path, validation_classes(path)) for path in sources]
    remarks: list[str] = []
    for path, told in (first, *others):
        _refuse_unlike(path, told, val, stem_of, remarks)
    for path, told in others:
        for name, stem in stem_of.items():
            if told[stem] != first[1][stem]:
                raise VggfeatError(
                    f"{name} is of class {first[1][stem]} by {first[0]}, of {told[stem]} by {path}:"
                    " remove the file that is wrong"
                )
    images_of: dict[str, list[str]] = {}
    for name, stem in stem_of.items():
        images_of.setdefault(first[1][stem], []).append(f"{inside}/{name}")
    if "train" in folder_of:
        folders = set(children(base / folder_of["train"])[0])
        if missing := sorted(set(images_of) - folders):
            raise VggfeatError(
                f"{images_of[missing[0]][0]} in {base.absolute()} is of class {missing[0]}, which"
                f" has no folder in {folder_of['train']} ({len(missing):,} in all have none):"
                f" unpack their training images, or sort {inside} into folders of the others alone"
            )
    return images_of, tuple(remarks)


def _refuse_unlike(
    path: Path, told: dict[str, str], val: Path, stem_of: dict[str, str], remarks: list[str]
) -> None:
    """Raise VggfeatError where a file doesn't tell the classes of these images.

    The devkit's ground truth has a line for each image, by its number alone: any other number of
    lines leaves all in doubt. Kaggle's list may have more, which is told.
    """
    if unknown := [name for name, stem in stem_of.items() if stem not in told]:
        raise VggfeatError(
            f"{path}, with {len(told):,} images, doesn't tell the class of"
            f" {first_few(unknown, spelt=shown)} in {val}: are they of another data set?"
        )
    absent = sorted(told.keys() - stem_of.values())
    if absent and path.name == GROUND_TRUTH:
        raise VggfeatError(
            f"{path} has {len(told):,} lines for the {len(stem_of):,} images in {val}, which lacks"
            f" {first_few(absent, spelt=shown)}: unpack all of them, or sort those that are there"
            " into folders named by synset id"
        )
    if absent:
        remarks.append(f"listed in {path.name}, but not there: {first_few(absent, spelt=shown)}")
