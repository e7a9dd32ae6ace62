"""ImageNet (ILSVRC-2012), or any part of it, in its usual layout.

    train/n01440764/n01440764_10026.JPEG
    val/n01440764/ILSVRC2012_val_00000293.JPEG

"Train", "training", "validation" … stand for the same. What lies beside the two is left out.
The official validation archive is flat: its images must first be sorted into folders named by
synset id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vggfeat.datasets.download import need_root
from vggfeat.datasets.folder import LeftOut, children, one_folder_each, read_splits
from vggfeat.datasets.items import Items
from vggfeat.datasets.splits import parts_among
from vggfeat.errors import VggfeatError


def load(root: Path | None) -> Items:
    """Splits "train" and "val", or the one that is there; classes are the sorted synset ids.

    labels: (N,) int32.
    Raises VggfeatError when neither folder is there, a class folder is empty, or "val" has a class
    that "train" lacks.
    """
    root = need_root("imagenet", root, "the folder that holds train and val")
    left = LeftOut()
    folder_of = part_folders(root, left) if root.is_dir() else {}
    if not folder_of:
        looked = " or ".join(str((root / split).absolute()) for split in ("train", "val"))
        raise VggfeatError(
            f"no folder {looked}: give `root` the folder that holds train/WNID and val/WNID"
        )
    if "val" in folder_of and not children(root / folder_of["val"])[0]:
        raise VggfeatError(
            f"no class folders in {(root / folder_of['val']).absolute()}: sort the validation"
            f" images into folders named by synset id, or move {folder_of['val']} away to use train"
            " alone"
        )
    return read_splits("imagenet", root, folder_of, left)


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
